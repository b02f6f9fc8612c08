"""What the race measures by listing all answers: `notebooks/race.py`."""

import itertools
import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "notebooks"))

import dpo  # noqa: E402
import plots  # noqa: E402
import race  # noqa: E402
import roads  # noqa: E402
from data import Tokenizer, documents, encode_pairs, judge  # noqa: E402
from model import GPT, Config  # noqa: E402

EOS = 2


def small_model(seed):
    """A vocabulary of three, one of them EOS, with marked preferences."""
    torch.manual_seed(seed)
    model = GPT(Config(3, 16, 8, 1, 1))
    model.transformer.wte.weight.data *= 20
    return model.double()


def by_hand(model, prompt, answer, temperature=1.0):
    """log π(answer | prompt), each token from the whole text before it."""
    total = 0.0
    for t, token in enumerate(answer):
        logits = model(torch.tensor([[*prompt, *answer[:t]]]))[0, -1]
        total += (logits / temperature).log_softmax(-1)[token].item()
    return total


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("floor", [1e-12, 0.02])
def test_all_answers_above_the_floor_are_listed_with_their_probabilities(monkeypatch, temperature, floor):
    monkeypatch.setattr(race, "MAX_ANSWER_TOKENS", 5)
    model, reference, prompt = small_model(0), small_model(1), [0, 1, 1]
    every = [(*body, EOS) for n in range(5) for body in itertools.product((0, 1), repeat=n)]
    expected = {answer: by_hand(model, prompt, answer, temperature) for answer in every}
    expected = {answer: log_p for answer, log_p in expected.items() if log_p > math.log(floor)}
    answers, log_p, log_p_ref = race.list_answers(model, reference, prompt, EOS, temperature, floor)
    assert len(answers) == len(expected) and (floor > 0.01) == (len(expected) < len(every))
    for answer, p, p_ref in zip(answers, log_p, log_p_ref):
        assert p == pytest.approx(expected[tuple(answer)], abs=1e-5)
        assert p_ref == pytest.approx(by_hand(reference, prompt, answer), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_drawing_every_n_answers(n):
    """The best of n draws, of equals the first, for all n-tuples with their probabilities."""
    p, values = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 3.0, 1.0, 3.0])
    expected = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        best = max(drawn, key=lambda i: values[i])  # max takes the first of equals
        expected[best] += math.prod(p[i] for i in drawn)
    assert race.best_of_n(p, values, n) == pytest.approx(expected)


def reference_of(p, scores):
    """A `Reference` of one post, from the probabilities and scores of its answers."""
    here = object.__new__(race.Reference)
    here.p, here.scores, here.start = [p], [scores], p @ scores
    here.frontier = np.array([here.optimum(beta) for beta in race.BETA_GRID])
    return here


def test_the_optimum_of_two_answers_by_hand():
    """Of scores 0 and 1, the best policy at a KL takes the second answer as often as it may."""
    here = reference_of(np.array([0.75, 0.25]), np.array([0.0, 1.0]))
    for q in (0.4, 0.6, 0.9):
        kl = q * math.log(q / 0.25) + (1 - q) * math.log((1 - q) / 0.75)
        assert here.share(q, kl) == pytest.approx(1, abs=2e-3)
        assert here.share(0.25 + (q - 0.25) / 2, kl) == pytest.approx(0.5, abs=2e-3)
    assert here.share(0.25, 0.001) is None
    assert here.wins(0, np.array([0.0, 1.0])) == pytest.approx([0.375, 0.75 + 0.125])


def test_labels_by_coin_are_as_many_as_the_name_says(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "RUNS", tmp_path)
    (tmp_path / "1/pretrain").mkdir(parents=True)
    records = [{"prompt": d.prompt, "chosen": "a", "rejected": "b"} for d in documents(2000, seed=0)]
    race.write_records(tmp_path / "1/pretrain/preferences.jsonl", records)
    for noise in (0.0, 0.5):
        flipped = sum(r["chosen"] == "b" for r in race.read_preferences(race.few_pairs(1, None, noise)))
        assert flipped == pytest.approx(2000 * noise / 2, abs=4 * math.sqrt(2000 * 0.25 * 0.75))
    assert len(race.read_preferences(race.few_pairs(1, 250))) == 250


def test_where_two_lines_cross_by_hand():
    """Ahead by 0.1 at 100 labels and behind by 0.1 at 400: level at 200, half-way in log n."""
    rlhf, dpo_there = np.array([[0.9, 0.9], [0.9, 0.9], [0.9, 0.9]]), np.array([[0.8, 1.0], [1, 1], [0, 0]])
    assert race.crossing(rlhf, dpo_there, np.array([100, 400])) == pytest.approx([200, 100, 400])


def test_a_figure_at_a_kl_is_read_off_between_two_runs():
    runs = {"far": {"kl": 2.0, "share": 1.0}, "near": {"kl": 1.0, "share": 0.8}}
    results = {f"{seed} {name}": figures for seed in race.SEEDS for name, figures in runs.items()}
    found = race.at_kl(results, ["far", "near"], np.array([1.0, 1.5, 1.75, 0.5, 3.0]))
    assert found == pytest.approx([0.8, 0.9, 0.95, 0.8, 1.0])  # beyond both, the nearest one's


def test_flops_by_counting(tmp_path, monkeypatch):
    """The formula against PyTorch's counter, which also sees attention: a few percent more at this length."""
    monkeypatch.setattr(race, "RUNS", tmp_path)
    (tmp_path / "1/pretrain").mkdir(parents=True)
    tokenizer = Tokenizer.train(["ab " * 10], 258)
    record = {"prompt": "a" * 30, "chosen": "b" * 8, "rejected": "c" * 8}
    race.write_records(tmp_path / "1/pretrain/preferences.jsonl", [record] * 800)
    model = GPT(Config(len(tokenizer.vocab)))
    pairs, _ = encode_pairs(tokenizer, [record], 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dpo.pair_log_probs(model, pairs, "cpu")
    here = SimpleNamespace(model=model, tokenizer=tokenizer)
    expected = counter.get_total_flops() * (1000 + 50 * (1 + 0.9 * 3))  # of 1,000 pairs 50 differ
    assert race.flops("dpo", {"pairs": 1000}, here) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["POST", "LETTER"])
def test_what_the_judge_thinks_of_the_answers_that_are_compared(kind):
    """Another order is as good; each fault costs what the judge's rule says."""
    for document in documents(50, seed=3, kind=kind):
        full, faulty = plots.spoiled(document.prompt, random.Random(0))
        points = {fault: judge(document.prompt, answer) for fault, answer in faulty.items()}
        assert judge(document.prompt, full) == judge(document.prompt, roads.reordered(full)) == 4
        assert points["no place"] == 3
        assert all(points[f] == 2 for f in points if f.startswith(("a ", "another")))


def test_a_difference_must_be_beyond_luck():
    """Differences 1, …, 5: mean 3, standard error √0.5, so t = 4.24. Less 2: t = 1.41. 95% is at 2.78.

    Of three seeds 1, 2, 3: t = 2 √3 = 3.46; 2, 3, 4: 3 √3 = 5.20. There 95% is at 4.30.
    """
    d = np.array([1.0, 2, 3, 4, 5])
    assert race.differs(d, 0) and race.differs(np.zeros(5), d) and not race.differs(d, 2)
    assert not race.differs(d[:3], 0) and race.differs(d[1:4], 0)
    assert race.said(d) == "3.00 ± 0.71"


@pytest.mark.parametrize("which", [race, roads])
def test_the_committed_results_are_those_of_the_code(which):
    """Every job that would be run has its figures in the file, and the file has no other ones."""
    results = json.loads((race.HERE / f"{which.__name__}.json").read_text())
    jobs = {name for stage in which.stages(results) for name in stage}
    assert jobs == {name for name in results if " cost " not in name}
