"""The statistics behind the table of claims: `notebooks/claims.py`, and what a trial costs: `cost.py`."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "notebooks"))

import claims  # noqa: E402
import cost  # noqa: E402
import dpo  # noqa: E402
import experiments  # noqa: E402
from data import Tokenizer, encode_pairs, judge  # noqa: E402
from model import GPT, Config  # noqa: E402


@pytest.mark.parametrize(
    "df, five_percent, one_percent", [(2, 4.3027, 9.9248), (4, 2.7764, 4.6041), (9, 2.2622, 3.2498)]
)
def test_student_s_t_by_the_printed_tables(df, five_percent, one_percent):
    assert claims.critical(df) == pytest.approx(five_percent, abs=1e-3)
    assert claims.critical(df, 0.01) == pytest.approx(one_percent, abs=1e-3)
    assert claims.p_value(-five_percent, df) == pytest.approx(0.05, abs=1e-4)


def test_a_paired_difference_by_hand():
    """Differences 1, …, 5: mean 3, standard error √0.5, so ± 2.776 √0.5; t = 4.243 has p = 0.0132."""
    mean, half, p = claims.difference([2.0, 4, 6, 8, 10], [1.0, 2, 3, 4, 5])
    assert (mean, half) == (pytest.approx(3), pytest.approx(2.7764 * 0.5**0.5, abs=1e-3))
    assert p == pytest.approx(0.0132, abs=2e-4)
    assert claims.said(np.array([1.0, 2, 3, 4, 5])) == "3.00 ± 0.71"


def test_holm_s_correction_by_hand():
    """Sorted: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which may not be below 0.06."""
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert claims.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])


def test_verdicts_say_what_survives():
    """p = 0.0132 alone is a yes; beside a claim without any evidence it is 0.026, and beside three 0.053."""
    five, some = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, -1, 2, -2, 0.5])
    clear, unclear = ("", five, 0 * five), ("", some, 0 * some)
    words = lambda *table: [word for *_, word in claims.verdicts(table)]
    assert words(clear) == ["yes"]
    assert words(("", 0 * five, five)) == ["no"]
    assert words(clear, unclear) == ["yes", "not settled"]
    assert words(clear, unclear, unclear, unclear)[0] == "not settled"


def test_a_figure_at_a_kl_is_read_off_between_two_runs():
    runs = {"far": {"kl": 2.0, "share": 1.0}, "near": {"kl": 1.0, "share": 0.8}}
    results = {f"{seed} {name}": figures for seed in claims.SEEDS for name, figures in runs.items()}
    found = claims.at_kl(results, ["far", "near"], np.array([1.0, 1.5, 1.75, 0.5, 3.0]))
    assert found == pytest.approx([0.8, 0.9, 0.95, 0.8, 1.0])  # beyond both, the nearest one's


def test_the_reward_of_people_who_disagree():
    """Of one person it is that person's taste; of two its chances of winning are the mean of theirs."""
    rng = np.random.default_rng(0)
    p, a, b = rng.dirichlet(np.ones(6)), rng.normal(size=6), 3 * rng.normal(size=6)
    sigma = lambda x: 1 / (1 + np.exp(-x))
    assert experiments.bradley_terry(p, [a]) == pytest.approx(a - p @ a, abs=1e-4)
    r = experiments.bradley_terry(p, [a, b])
    for i in range(6):
        wins = [sum(p[j] * sigma(u[i] - u[j]) for j in range(6)) for u in (a, b, r)]
        assert wins[2] == pytest.approx((wins[0] + wins[1]) / 2, abs=1e-4)


def test_tastes_by_hand():
    post = "POST: It rained all day. My captain Hugo lost my kite underwater. I had soup for lunch.\nTL;DR:"
    for answer, fact, any_word, hidden in (
        (" Hugo lost my kite underwater.", 4, 4, 0),
        (" Ada lost my hat underwater.", 0, 4, 2),
        (" Hugo lost my soup underwater.", 2, 2, 0),
        (" It rained all day.", 0, 0, 0),
        (" My captain Hugo lost my kite underwater.", 3.6, 3.6, 0),
    ):
        assert judge(post, answer) == pytest.approx(fact)
        assert experiments.another_taste(post, answer) == pytest.approx(any_word)
        assert experiments.hidden_words(post, answer) == hidden
        assert experiments.short_answers(post, answer) == -0.5 * len(answer.split())


def test_operations_by_counting():
    """The formula against PyTorch's counter, which also sees attention: a few percent more at this length."""
    tokenizer = Tokenizer.train(["ab " * 10], 258)
    record = {"prompt": "a" * 30, "chosen": "b" * 8, "rejected": "c" * 8}
    model = GPT(Config(len(tokenizer.vocab)))
    pairs, _ = encode_pairs(tokenizer, [record], 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dpo.pair_log_probs(model, pairs, "cpu")
    here = SimpleNamespace(model=model, tokenizer=tokenizer)
    expected = counter.get_total_flops() * (1000 + 50 * (1 + 0.9 * 3 * 2 * 0.5))  # of 1,000 pairs 50 differ
    found = cost.operations("dpo", (1000, 2, 1, 0.5), 0.5, here, [record] * 50)
    assert found == pytest.approx(expected, rel=0.1)


def test_every_experiment_says_what_was_predicted():
    assert all(jobs.__doc__.startswith("Predicted: ") for jobs in experiments.EXPERIMENTS)
