"""The statistics behind the table of claims: `notebooks/claims.py`, and what a trial costs: `cost.py`."""

import json
import math
import re
import statistics
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
    assert claims.difference([1.0, 2, 3], [1.0, 2, 3])[2] == 1  # equal columns tell no difference


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
    results = {f"{seed} {name}": figures for seed in range(5) for name, figures in runs.items()}
    found = claims.at_kl(results, ["far", "near"], np.array([1.0, 1.5, 1.75, 0.5, 3.0]), seeds=range(5))
    assert found == pytest.approx([0.8, 0.9, 0.95, 0.8, 1.0])  # beyond both, the nearest one's


def test_a_sweep_has_only_the_runs_on_all_pairs():
    names = "11 dpo beta=2", "12 dpo beta=2", "11 dpo beta=0.5", "11 pairs=250 dpo beta=0.5", "11 dpo"
    assert claims.sweep(dict.fromkeys(names), "dpo") == ["dpo beta=0.5", "dpo beta=2"]


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


def test_the_defaults_are_what_the_claims_and_the_tuning_are_about():
    best = [json.loads(line) for line in (claims.HERE / "tuning.jsonl").read_text().splitlines()]
    rates = {line["method"]: line["setting"].split()[1] for line in best if line.get("rate") == 1}
    assert {"dpo beta=0.5", "ppo beta=0.4"} <= {*experiments.MAIN}
    assert (dpo.parser.get_default("beta"), experiments.ppo.parser.get_default("beta")) == (0.5, 0.4)
    assert float(rates["dpo"]) == dpo.parser.get_default("lr")
    assert float(rates["rlhf"]) == experiments.reward.parser.get_default("lr")


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


@pytest.mark.parametrize(
    "wanted, expected",
    [(2.5, (True, 5.0, 0.5)), (3.4, (True, 9.0, 0.9)), (1.5, (True, 2.0, 0.2)), (4.0, (False, 10.0, 1.0))],
)
def test_when_a_score_was_reached_by_hand(wanted, expected):
    """Five copies, at 2, 4, … seconds, with these scores; 1 at the start. 2.5 lies half-way from 2 to 3."""
    points = [1.0, 1.5, 2.0, 3.0, 3.2, 3.6]
    copies = [(2.0 * i, 0.2 * i, None) for i in range(1, 6)]
    reached, seconds, fraction, scores = cost.read_off(copies, lambda i: points[i], points[0], wanted)
    assert (reached, seconds, fraction) == (expected[0], *map(pytest.approx, expected[1:]))
    assert all(scores[i] == points[i] for i in scores)


def test_every_experiment_says_what_was_predicted():
    assert all(jobs.__doc__.startswith("Predicted: ") for jobs in experiments.EXPERIMENTS)


RESULTS = json.loads(claims.RESULTS.read_text())


def test_the_committed_results_are_those_of_the_code():
    """Each job of each seed has its figures in the file, and the file has no other ones."""
    found = {name for name in RESULTS if " cost " not in name}
    jobs = {
        f"{seed} {name}"
        for experiment, seeds in experiments.EXPERIMENTS.items()
        for seed in seeds
        for name, *_ in experiment(seed)
    }
    assert found == jobs


def figure(name, *keys, seeds=claims.SEEDS):
    """One figure of each seed, straight from the file."""
    values = [RESULTS[f"{seed} {name}"] for seed in seeds]
    for key in keys:
        values = [value[key] for value in values]
    return values


def at_one_nat(names, kls=None):
    """The share at a KL of 1 nat, or at those: on the straight line between the two runs around it."""
    found = []
    for i, seed in enumerate(claims.SEEDS):
        at = kls[i] if kls else 1.0
        runs = sorted((RESULTS[f"{seed} {name}"]["kl"], RESULTS[f"{seed} {name}"]["share"]) for name in names)
        below, above = [run for run in runs if run[0] <= at], [run for run in runs if run[0] > at]
        if not below or not above:
            found.append((below or [above[0]])[-1][1])
        else:
            (x0, y0), (x1, y1) = below[-1], above[0]
            found.append(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return found


def two_sided_p(differences):
    """By Simpson's rule on the density of Student's t."""
    n = len(differences)
    t = abs(statistics.mean(differences)) / (statistics.stdev(differences) / math.sqrt(n))
    df, steps = n - 1, 20_000
    density = lambda x: (1 + x * x / df) ** (-(df + 1) / 2)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    h = t / steps
    inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, steps))
    return 1 - 2 * scale * (density(0) + inner + density(t)) * h / 3


def test_every_figure_of_the_claims_by_other_code():
    """Each figure of the table, and the p of each claim, from the file without `claims.py`."""
    betas = {"dpo": (0.15, 0.3, 0.5, 1, 2), "ppo": (0.15, 0.25, 0.4, 0.7, 1.4)}
    betas |= {"judge": (0.25, 0.4, 0.8), "implicit": (0.25, 0.4, 0.8)}
    at_one = {way: at_one_nat([f"{way} beta={beta}" for beta in betas[way]]) for way in betas}
    minus = lambda a, b: [
        x - (y if isinstance(b, list) else b) for x, y in zip(a, b if isinstance(b, list) else a)
    ]
    over = lambda a, b: [x / y for x, y in zip(a, b)]
    dpo, rlhf, of_posts = "dpo beta=0.5", "ppo beta=0.4", ("pretrain", "POST")
    ratio = over(figure("pretrain", "val_loss"), figure("pretrain", "entropy"))
    cold = [figure(*of_posts, "temperature 0", "kinds", kind) for kind in ("repeats", "lucky")]
    greedy = [a + b for a, b in zip(*cold)]
    cooler = [figure(*of_posts, f"temperature {t}", "score") for t in ("0", "0.25", "0.5", "0.75", "1")]
    cooler = max(cooler, key=statistics.mean)
    score = {name: figure(name, "score") for name in (dpo, rlhf, "sft", "noise dpo", "noise ppo")}
    wrong = {name: figure(name, "kinds", "wrong, hidden") for name in (dpo, rlhf)}
    wrong_before = figure(*of_posts, "temperature 1", "kinds", "wrong, hidden")
    lost = {x: minus(figure(x, "temperature 0", "win_rate"), figure(x, "win_rate")) for x in (dpo, rlhf)}
    letters = {name: figure(name, "letters", "share", seeds=claims.TEN) for name in (dpo, rlhf)}
    taste = {way: figure(f"taste {way}", "share") for way in ("dpo", "ppo")}
    best = {way: figure("asks for", way, "best of n", "64", "score") for way in ("learned", "implicit")}
    judge_of = {w: figure("judges", w, "as a judge", "POST", "correlation") for w in ("explicit", "implicit")}
    few = figure("pairs=250 ppo", "share")
    few_dpo = ["pairs=250 dpo beta=0.25", "pairs=250 dpo beta=0.5"]
    few_dpo = at_one_nat(few_dpo, figure("pairs=250 ppo", "kl"))
    noise = {way: figure(f"noise {way}", "share") for way in ("dpo", "ppo")}
    seconds = {way: figure(f"cost {way}", "seconds") for way in ("dpo", "rlhf")}
    operations = over(figure("cost rlhf", "operations"), figure("cost dpo", "operations"))
    faster = over(seconds["rlhf"], seconds["dpo"])
    expected = [  # the figures in the order of a row, each with its form, and the differences that are tested
        ([(ratio, ".3f")], minus([1.02] * len(ratio), ratio)),
        ([(greedy, ".1%")], minus(greedy, 0.5)),
        ([(score[rlhf], ".2f"), (score[dpo], ".2f"), (cooler, ".2f")], minus(score[rlhf], cooler)),
        ([(at_one["ppo"], ".1%"), (at_one["dpo"], ".1%")], minus(at_one["dpo"], at_one["ppo"])),
        (
            [(wrong[rlhf], ".1%"), (wrong[dpo], ".1%"), (wrong_before, ".1%")],
            minus(wrong[rlhf], wrong_before),
        ),
        ([(at_one["implicit"], ".1%"), (at_one["dpo"], ".1%")], minus(at_one["implicit"], at_one["ppo"])),
        ([(taste["ppo"], ".1%"), (taste["dpo"], ".1%")], minus(taste["ppo"], taste["dpo"])),
        ([(at_one["judge"], ".1%"), (at_one["dpo"], ".1%")], minus(at_one["dpo"], at_one["judge"])),
        ([(seconds["rlhf"], ".1f"), (seconds["dpo"], ".1f"), (faster, ".1f")], [math.log(x) for x in faster]),
        ([(operations, ".1f")], minus(operations, 3)),
        ([(lost[rlhf], ".1%"), (lost[dpo], ".1%")], minus(lost[rlhf], lost[dpo])),
        ([(letters[rlhf], ".1%"), (letters[dpo], ".1%")], minus(letters[dpo], letters[rlhf])),
        (
            [(score[rlhf], ".2f"), (score[dpo], ".2f"), (score["sft"], ".2f")]
            + [(figure("sft", "temperature 0", "score"), ".2f")],
            minus(score[rlhf], score["sft"]),
        ),
        (
            [(best["learned"], ".2f"), (score[dpo], ".2f"), (best["implicit"], ".2f")],
            minus(best["learned"], score[dpo]),
        ),
        (
            [(judge_of["explicit"], ".3f"), (judge_of["implicit"], ".3f")],
            minus(judge_of["implicit"], judge_of["explicit"]),
        ),
        ([(few, ".1%"), (few_dpo, ".1%")], minus(few, few_dpo)),
        (
            [(noise["ppo"], ".1%"), (noise["dpo"], ".1%")]
            + [(score["noise ppo"], ".2f"), (score["noise dpo"], ".2f")],
            minus(noise["ppo"], noise["dpo"]),
        ),
    ]
    lines = claims.markdown(RESULTS).splitlines()[2:]
    assert len(lines) == len(expected)
    for line, (figures, differences) in zip(lines, expected):
        said = re.findall(r"[\d.]+%? ± [\d.]+%?", line)
        error = lambda x: statistics.stdev(x) / math.sqrt(len(x))
        assert said == [f"{statistics.mean(x):{form}} ± {error(x):{form}}" for x, form in figures], line
        p = float(re.search(r"([\d.]+) \([\d.]+\) \|", line)[1])
        assert p == pytest.approx(two_sided_p(differences), abs=1e-4), line


def test_the_figures_of_fresh_seeds_in_the_readme_are_those_of_the_results():
    """Shares and hidden wrong words of three policies, and the law of the margin, on seeds 21 to 25."""
    results = json.loads((claims.HERE / "sight.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ways, seeds = ("dpo", "ppo", "ppo mended"), range(21, 26)
    over = lambda name, *keys: claims.over(results, name, *keys, seeds=seeds)
    for row, keys in (
        ("share of the optimal gain", ["share"]),
        ("hidden wrong words", ["kinds", "wrong, hidden"]),
    ):
        cells = " | ".join(claims.said(over(way, *keys), ".1%") for way in ways)
        assert f"| {row} | {cells} |" in readme
    start, quarter, one, two = (over("law", "all", m).mean() for m in ("0", "0.25", "1", "2"))
    assert f"has {start:.1%} with the learned reward, {quarter:.1%} with a quarter" in readme
    assert f"{one:.1%} with one" in readme and abs(two - one) < 0.002
    seeing = {key: figures["margins"] for key, figures in results.items() if "dose" in key}
    names = {key for key, x in seeing.items() if x["another name"]["right"] > 0.9}
    things = {key for key, x in seeing.items() if x["another thing"]["right"] > 0.9}
    assert names == {"24 dose 24000", "25 dose 3000"} and things == {"24 dose 24000"}
    assert f"RLHF then had {results['24 ppo +24000']['share']:.1%}" in readme
