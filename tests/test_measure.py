"""What notebooks 04 and 05 measure by listing answers: `notebooks/measure.py`, `notebooks/experiments.py`."""

import itertools
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import data  # noqa: E402
import experiments  # noqa: E402
import measure  # noqa: E402
import plots  # noqa: E402
import reward  # noqa: E402
import tune  # noqa: E402
from data import Tokenizer, documents, judge, write_records  # noqa: E402
from model import GPT, Config, ScalarGPT  # noqa: E402

EOS = 2


def small_model(seed, network=GPT):
    """A vocabulary of three, one of them EOS, with marked preferences."""
    torch.manual_seed(seed)
    model = network(Config(3, 16, 8, 1, 1))
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
    monkeypatch.setattr(measure, "MAX_ANSWER_TOKENS", 5)
    model, reference, prompt = small_model(0), small_model(1), [0, 1, 1]
    every = [(*body, EOS) for n in range(5) for body in itertools.product((0, 1), repeat=n)]
    expected = {answer: by_hand(model, prompt, answer, temperature) for answer in every}
    expected = {answer: log_p for answer, log_p in expected.items() if log_p > math.log(floor)}
    answers, log_p, log_p_ref = measure.list_answers(model, reference, prompt, EOS, temperature, floor)
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
    assert measure.best_of_n(p, values, n) == pytest.approx(expected)


def reference_of(p, scores):
    """A `Reference` of one post, from the probabilities and scores of its answers."""
    here = object.__new__(measure.Reference)
    here.p, here.scores, here.start = [p], [scores], p @ scores
    grid = [here.ideal(here.scores, beta) for beta in measure.BETA_GRID]
    here.frontier = np.array([[here.kl(w), here.mean(w, here.scores)] for w in grid])
    return here


def test_the_optimum_of_two_answers_by_hand():
    """Of scores 0 and 1, the best policy at a KL takes the second answer as often as it may."""
    here = reference_of(np.array([0.75, 0.25]), np.array([0.0, 1.0]))
    for q in (0.4, 0.6, 0.9):
        kl = q * math.log(q / 0.25) + (1 - q) * math.log((1 - q) / 0.75)
        assert here.share(q, kl) == pytest.approx(1, abs=2e-3)
        assert here.share(0.25 + (q - 0.25) / 2, kl) == pytest.approx(0.5, abs=2e-3)
        (weights,) = here.ideal_at([np.array([-7.0, 2.0])], kl)  # any reward that prefers the second
        assert weights == pytest.approx([1 - q, q], abs=1e-4)
    assert here.share(0.25, 0.001) is None
    assert here.wins(0, np.array([0.0, 1.0])) == pytest.approx([0.375, 0.75 + 0.125])


@pytest.mark.parametrize("kind", data.KINDS)
def test_what_the_judge_thinks_of_the_answers_that_are_compared(kind):
    """Each fault costs what the judge's rule says."""
    for document in documents(50, seed=3, kind=kind):
        full, faulty = plots.spoiled(document.prompt, random.Random(0))
        points = {fault: judge(document.prompt, answer) for fault, answer in faulty.items()}
        assert judge(document.prompt, full) == 4 and points["short"] == 3
        assert all(points[f] == 2 for f in points if f.startswith(("a ", "another")))


def test_as_many_labels_are_random_as_the_name_says(tmp_path, monkeypatch):
    """Of half of the labels that are random half are as they were: a quarter is flipped."""
    monkeypatch.setattr(measure, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    (tmp_path / "1/pretrain").mkdir(parents=True)
    records = [{"prompt": d.prompt, "chosen": "a", "rejected": "b"} for d in documents(2000, seed=0)]
    write_records(tmp_path / "1/pretrain/preferences.jsonl", records)
    found = data.read_preferences(experiments.random_labels(1, 0.5))
    flipped = sum(r["chosen"] == "b" for r in found)
    assert flipped == pytest.approx(500, abs=4 * math.sqrt(2000 * 0.25 * 0.75))
    assert data.read_preferences(experiments.few_pairs(1, 250)) == records[:250]


PAIRS = [([0, 1], [1, 0, 2], [0, 2]), ([1, 1, 0], [0, 2], [1, 1, 0, 2])]


@torch.no_grad()
def test_a_summed_score_is_the_sum_of_the_numbers_at_an_answer_s_tokens():
    """Answers and prompts of several lengths, each alone, and all in one batch."""
    model = small_model(3, ScalarGPT)
    tokens, mask, start = data.pad_pairs(PAIRS, "cpu")
    found = experiments.summed_scores(model, tokens, mask, start, copies=2).view(2, -1).T
    for (prompt, *answers), row in zip(PAIRS, found):
        for answer, score in zip(answers, row):
            numbers = model.head(model.transformer(torch.tensor([[*prompt, *answer]])))[0, :]
            assert score.item() == pytest.approx(numbers[len(prompt) :].sum().item(), abs=1e-4)


@torch.no_grad()
def test_the_language_modelling_loss_is_that_of_the_chosen_answers():
    """Scores as without it; beside them the mean surprise at the chosen answers' tokens, by a GPT's head."""
    model, language = small_model(4, ScalarGPT), experiments.LanguageModelling(0.5)
    scores = language.pair_scores(model, PAIRS, "cpu")
    assert scores.numpy() == pytest.approx(reward.pair_scores(model, PAIRS, "cpu").numpy(), abs=1e-5)
    gpt = small_model(4)
    gpt.transformer.load_state_dict(model.transformer.state_dict())
    surprise = [-by_hand(gpt, prompt, chosen) for prompt, chosen, _ in PAIRS]
    tokens = sum(len(chosen) for _, chosen, _ in PAIRS)
    assert language.loss.item() == pytest.approx(sum(surprise) / tokens, abs=1e-5)
    zero = torch.zeros(2)
    total = language.reward_loss(zero, zero).mean().item()
    assert total == pytest.approx(math.log(2) + 0.5 * sum(surprise) / tokens, abs=1e-5)


def the_judge_itself(directory, pairs):
    """In place of a model's values of both answers, the judge's, read from the tokens."""
    read = Tokenizer.load(directory).decode
    return torch.tensor([[judge(read(prompt), read(answer)) for answer in both] for prompt, *both in pairs])


def test_no_fault_escapes_the_judge_and_it_agrees_with_itself(home, monkeypatch):
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: home / "runs" / name)
    monkeypatch.setattr(experiments, "documents", lambda n, **how: documents(40, **how))
    for values_of, expected in (
        (the_judge_itself, {"accuracy": 1, "correlation": 1, "calibration": 0}),
        (lambda *x: -the_judge_itself(*x), {"correlation": -1}),
    ):
        judged = experiments.as_a_judge(5, values_of, home / "runs/pretrain")
        found = experiments.by_fault(5, values_of, home / "runs/pretrain")
        for kind in data.KINDS:
            assert {key: judged[kind][key] for key in expected} == pytest.approx(expected, abs=1e-6)
            assert set(found[kind].values()) == {1.0 if expected["correlation"] > 0 else 0.0}
            assert len(found[kind]) == 7


def test_volunteers_of_two_tastes_take_turns(home, monkeypatch):
    """One always likes the longer answer, the other the shorter one."""
    longer, shorter = (lambda _, answer, sign=sign: sign * 1000 * len(answer) for sign in (1, -1))
    before = [{"prompt": "P", "chosen": f" {'a' * (i % 3 + 1)}", "rejected": " bb b"} for i in range(12)]
    monkeypatch.setattr(experiments, "own_records", lambda seed: before)
    monkeypatch.setattr(experiments, "RUNS", home)
    (home / "5").mkdir()
    after = data.read_preferences(experiments.relabelled(5, "turns", longer, shorter))
    assert [record["chosen"] for record in after] == [
        " bb b" if i % 2 == 0 else record["chosen"] for i, record in enumerate(before)
    ]


def test_every_trial_of_the_tuning_is_in_the_file_once():
    """As many for one side as for the other, and each with the rate, in `setting`, that its key says."""
    lines = [json.loads(line) for line in (measure.HERE / "tuning.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("round") == 2]
    for one in (tune.key(*trial) for trial in tune.TRIALS):
        assert sum(one.items() <= line.items() for line in lines) == 1
    assert len(lines) == len(tune.TRIALS)
    methods = [line["method"] for line in lines]
    assert methods.count("rlhf") == methods.count("dpo") == 12
    for line in lines:
        default = (reward if line["method"] == "rlhf" else measure.dpo).parser.get_default("lr")
        assert float(line["setting"].split()[1]) == pytest.approx(line["rate"] * default, rel=0.05)
