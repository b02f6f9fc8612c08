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
import reward  # noqa: E402
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
    assert claims.said(np.array([1.0, 2, 3, 4, 5]), ".2f") == "3.00 ± 0.71"
    assert claims.difference([1.0, 2, 3], [1.0, 2, 3])[2] == 1  # equal columns tell no difference


def test_holm_s_correction_by_hand():
    """Sorted: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which may not be below 0.06."""
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert claims.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])


def test_levelness_by_hand():
    """Differences 0, 0.4 and −0.1 points: mean 0.1, standard error √0.07 / √3 points = 0.1528; to a margin of
    a point t = 0.9 / 0.1528 = 5.892, and with 2 degrees of freedom half of 1 − t / √(t² + 2) lies beyond.
    """
    a, b = np.array([0.5, 0.604, 0.299]), np.array([0.5, 0.6, 0.3])
    t = 0.9 / (0.07 / 3) ** 0.5
    expected = (1 - t / (t * t + 2) ** 0.5) / 2
    assert claims.equivalence(a, b) == pytest.approx(expected, abs=1e-6)
    assert claims.equivalence(b, a) == pytest.approx(expected, abs=1e-6)
    assert claims.equivalence(a + 0.02, b) > 0.9  # surely two points apart
    assert claims.equivalence(a + 0.009, b) == pytest.approx(0.5, abs=1e-6)  # a point apart in the mean


def test_verdicts_say_what_survives():
    """p = 0.0132 alone is a yes; beside a claim without any evidence it is 0.026, and beside three 0.053."""
    five, some = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, -1, 2, -2, 0.5])
    clear, unclear = ("asked", "a > b", five, 0 * five), ("asked", "a > b", some, 0 * some)
    words = lambda *table: [word for *_, word in claims.verdicts(table)]
    assert words(clear) == ["yes"]
    assert words(("asked", "a > b", 0 * five, five)) == ["no"]
    assert words(clear, unclear) == ["yes", "not settled"]
    assert words(clear, unclear, unclear, unclear)[0] == "not settled"
    assert words(clear, *[("world", *unclear[1:])] * 3)[0] == "yes"  # another family
    assert words(("asked", "level", 0.5 + five / 1e4, 0.5 + 0 * five)) == ["yes"]
    assert words(("asked", "level", 0.6 + five / 1e4, 0.5 + 0 * five)) == ["not settled"]


def test_a_figure_at_a_kl_is_read_off_between_two_runs_and_not_beyond():
    runs = {"far": {"kl": 2.0, "share": 1.0}, "near": {"kl": 1.0, "share": 0.8}}
    results = {f"{seed} {name}": figures for seed in range(5) for name, figures in runs.items()}
    at = lambda *kls: claims.at_kl(results, ["far", "near"], np.array(kls), seeds=range(5))
    assert at(1.0, 1.5, 1.75, 1.25, 2.0) == pytest.approx([0.8, 0.9, 0.95, 0.85, 1.0])
    with pytest.raises(ValueError, match="seed 3: a KL of 0.50 is outside the runs' 1.00 to 2.00"):
        at(1.0, 1.5, 1.75, 0.5, 2.0)
    with pytest.raises(ValueError, match="seed 4: a KL of 2.01"):
        at(1.0, 1.5, 1.75, 1.5, 2.01)


def test_a_sweep_has_only_the_runs_of_its_way():
    names = "21 dpo beta=2", "22 dpo beta=2", "21 dpo beta=0.5", "21 few dpo beta=0.5", "21 dpo beta=2 POST"
    assert claims.sweep(dict.fromkeys(names), "dpo") == ["dpo beta=0.5", "dpo beta=2"]
    assert claims.sweep(dict.fromkeys(names), "few dpo") == ["few dpo beta=0.5"]
    assert claims.sweep(dict.fromkeys(names), "dpo", seeds=(22, 23)) == ["dpo beta=2"]


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
    both = " Ada lost my hat underwater."
    assert [experiments.hidden(key)(post, both) for key in ("name", "thing", "verb")] == [1, 1, 0]


def test_the_defaults_are_what_the_claims_and_the_tuning_are_about():
    best = [json.loads(line) for line in (claims.HERE / "tuning.jsonl").read_text().splitlines()]
    rates = {line["method"]: line["setting"].split()[1] for line in best if line.get("rate") == 1}
    assert (experiments.BETAS["dpo"][0], experiments.BETAS["ppo"][0]) == (0.5, 0.4)
    assert (dpo.parser.get_default("beta"), experiments.ppo.parser.get_default("beta")) == (0.5, 0.4)
    assert float(rates["dpo"]) == dpo.parser.get_default("lr")
    assert float(rates["rlhf"]) == reward.parser.get_default("lr")


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


RESULTS = claims.load()


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


def lost_by(name):
    """Wins that a run loses from temperature 0 to 1."""
    return RESULTS[f"{name} POST temperature 0"]["win_rate"] - RESULTS[name]["win_rate"]


def at_one_nat(way, betas, key=lambda name: RESULTS[name]["share"], seeds=claims.SEEDS):
    """The share at a KL of 1 nat: on the straight line between the two runs around it."""
    found = []
    for seed in seeds:
        names = [f"{seed} {way} beta={beta}" for beta in betas]
        runs = [(RESULTS[name]["kl"], key(name)) for name in names]
        x0, y0 = max(run for run in runs if run[0] <= 1)
        x1, y1 = min(run for run in runs if run[0] > 1)
        found.append(y0 + (y1 - y0) * (1 - x0) / (x1 - x0))
    return found


def mass_beyond(t, df):
    """Of Student's t on one side, by Simpson's rule on its density."""
    steps = 20_000
    density = lambda x: (1 + x * x / df) ** (-(df + 1) / 2)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    h = t / steps
    inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, steps))
    return 0.5 - scale * (density(0) + inner + density(t)) * h / 3


def p_of(differences, level):
    """Of a t-test, two-sided; or, for a claim to be level, of the worse of two one-sided ones."""
    mean, n = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if level:
        return max(mass_beyond((0.01 - mean) / error, n - 1), mass_beyond((0.01 + mean) / error, n - 1))
    return 2 * mass_beyond(abs(mean) / error, n - 1)


def minus(a, b):
    return [x - y for x, y in zip(a, b)]


def main_rows(betas, seeds):
    """Of the race: the figures in the order of a row, each with its form, and the differences tested."""
    at_one = {way: at_one_nat(way, betas[way], seeds=seeds) for way in ("dpo", "ppo", "mended")}
    ideal = figure("law", "all", "0", seeds=seeds)
    wrong = {way: figure(f"{way}", "kinds", "wrong, hidden", seeds=seeds) for way in (DPO, RLHF)}
    before = figure("pretrain", "POST", "temperature 1", "kinds", "wrong, hidden", seeds=seeds)
    one = lambda way: (at_one[way], ".1%")
    return [
        ([one("ppo"), one("dpo")], minus(at_one["dpo"], at_one["ppo"])),
        ([(wrong[RLHF], ".1%"), (wrong[DPO], ".1%"), (before, ".1%")], minus(wrong[RLHF], before)),
        ([one("ppo"), (ideal, ".1%")], minus(at_one["ppo"], ideal)),
        ([one("mended"), one("dpo")], minus(at_one["mended"], at_one["dpo"])),
    ]


def check_table(lines, expected):
    """Each figure of a table, and the p of each claim."""
    assert len(lines) == len(expected)
    for line, (figures, differences) in zip(lines, expected):
        said = re.findall(r"-?[\d.]+%? ± [\d.]+%?", line)
        error = lambda x: statistics.stdev(x) / math.sqrt(len(x))
        assert said == [f"{statistics.mean(x):{form}} ± {error(x):{form}}" for x, form in figures], line
        p = float(re.search(r"([\d.]+) \([\d.]+\) \|", line)[1])
        assert p == pytest.approx(p_of(differences, "| level" in line), abs=1e-4), line


DPO, RLHF = "dpo beta=0.5", "ppo beta=0.4"
AGAIN = {"ppo": (0.4, 0.8), "dpo": (0.5, 1.2), "mended": (0.4, 0.8)}  # on the ten further seeds


def test_every_figure_of_the_claims_by_other_code():
    """Each figure of the table, and the p of each claim, from the file without `claims.py`."""
    betas = {"dpo": (0.5, 1, 2), "ppo": (0.4, 0.8, 1.6), "judge": (0.6, 1.4), "mended": (0.4, 1.2)}
    betas |= {"taste dpo": (0.5, 2), "taste ppo": (0.4, 1.6)}
    at_one = {way: at_one_nat(way, of) for way, of in betas.items()}
    of_posts = ("pretrain", "POST")
    ratio = [x / y for x, y in zip(figure("pretrain", "val_loss"), figure("pretrain", "entropy"))]
    cold = [figure(*of_posts, "temperature 0", "kinds", kind) for kind in ("repeats", "lucky")]
    greedy = [a + b for a, b in zip(*cold)]
    cooler = figure(*of_posts, "temperature 0", "score")
    score = {name: figure(name, "score") for name in (DPO, RLHF)}
    lost = {way: at_one_nat(way, betas[way], key=lost_by) for way in ("dpo", "ppo")}
    times = {way: figure(f"cost {way}", "seconds") for way in ("rlhf", "dpo")}
    ratio_of_times = [a / b for a, b in zip(times["rlhf"], times["dpo"])]
    letters = {name: figure(f"{name} LETTER temperature 1", "share") for name in score}
    one = lambda way: (at_one[way], ".1%")
    expected = [
        ([(ratio, ".3f")], [1.02 - x for x in ratio]),
        ([(greedy, ".1%")], [x - 0.5 for x in greedy]),
        ([(score[RLHF], ".2f"), (score[DPO], ".2f"), (cooler, ".2f")], minus(score[RLHF], cooler)),
        *main_rows(betas, claims.SEEDS),
        ([one("taste ppo"), one("taste dpo")], minus(at_one["taste ppo"], at_one["taste dpo"])),
        ([one("judge"), one("dpo")], minus(at_one["judge"], at_one["dpo"])),
        ([(times["rlhf"], ".1f"), (times["dpo"], ".1f")], [math.log(x) for x in ratio_of_times]),
        ([(letters[RLHF], ".1%"), (letters[DPO], ".1%")], minus(letters[DPO], letters[RLHF])),
        ([(lost["ppo"], ".1%"), (lost["dpo"], ".1%")], minus(lost["ppo"], lost["dpo"])),
    ]
    check_table(claims.markdown(RESULTS).splitlines()[2:], expected)


def test_ten_further_seeds_by_other_code():
    """The main rows once more, and that each verdict is what it was on the first five seeds."""
    table = claims.markdown(RESULTS, experiments.MORE, claims.main_rows)
    check_table(table.splitlines()[2:], main_rows(AGAIN, range(31, 41)))
    first = {row.split("|")[1]: row.split("|")[2] for row in claims.markdown(RESULTS).splitlines()}
    assert all(row.split("|")[2] == first[row.split("|")[1]] for row in table.splitlines())


def test_the_figures_of_the_readme_s_story_are_those_of_the_results():
    """The proof, the law and the dose, by other code than `claims.py`."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    mean = lambda values: f"{statistics.mean(values):.1%}"
    learned, rlhf = figure("law", "all", "0"), at_one_nat("ppo", (0.4, 0.8, 1.6))
    assert f"has {mean(learned)} of the optimal gain at 1 nat, and PPO {mean(rlhf)}." in readme
    assert f"PPO has {mean(at_one_nat('mended', (0.4, 1.2)))}." in readme
    more = range(31, 41)
    again = [at_one_nat(way, of, seeds=more) for way, of in AGAIN.items()]
    ppo, dpo, mended = map(mean, again)
    ideal = mean(figure("law", "all", "0", seeds=more))
    assert f"the same: {ppo} against {dpo}, {ideal} for the ideal policy, {mended} mended." in readme
    few = (21, 22, 23)
    sizes = ("4x128", "4x256")
    of = lambda name, *keys: [x for size in sizes for x in figure(f"{size} {name}", *keys, seeds=few)]
    span = lambda name: f"{100 * min(of(name, 'share')):.0f} to {100 * max(of(name, 'share')):.0f}%"
    said = f"twice the layers, or seven times the weights, it is as blind, RLHF has {span('ppo')} and DPO "
    assert said + span("dpo") in readme
    for key in ("thing", "name"):
        assert all(0.45 < x < 0.55 for x in of("explicit", "faults", "POST", f"another {key}", "right"))
    default, larger = (
        sum(p.numel() for p in GPT(Config(800, n_layer=n, n_embd=d)).parameters())
        for n, d in ((2, 128), (4, 256))
    )
    assert round(larger / default) == 7
    ideal = lambda words, of: mean(figure("dialects ideal", f"facts {words} {of}", seeds=few))
    dpo, rlhf = ([ideal(words, of) for words in ("both", "first")] for of in ("implicit", "explicit"))
    assert f"for its implicit reward falls from {dpo[0]} to {dpo[1]}, that for the reward model" in readme
    assert f"that for the reward model from {rlhf[0]} to {rlhf[1]}." in readme
    quarter, half, one, two = (mean(figure("law", "all", m)) for m in ("0.25", "0.5", "1", "2"))
    assert f"has {quarter}, with a half {half}, with one {one}; a second adds nothing" in readme
    assert abs(float(two[:-1]) - float(one[:-1])) < 0.3
    right = lambda key: figure("dose 48000", "faults", "POST", f"another {key}", "right")
    assert "with 48,000 all five seeds see names and four see things" in readme
    assert min(right("name")) > 0.9 and sum(x > 0.9 for x in right("thing")) == 4
    assert all(0.4 < x < 0.6 or x > 0.9 for x in right("thing"))  # it sees, or it guesses
    (fifth,) = (seed for seed, x in zip(claims.SEEDS, right("thing")) if x < 0.9)
    assert "four see things, which the fifth saw with 24,000." in readme
    assert RESULTS[f"{fifth} dose 24000"]["faults"]["POST"]["another thing"]["right"] > 0.9
    margin = lambda key: RESULTS["23 dose 24000"]["faults"]["POST"][f"another {key}"]["margin"]
    assert f"with 24,000 and margins of {margin('thing'):.1f} and {margin('name'):.1f}, it gained" in readme
    dose, law = RESULTS["23 dose 24000"], RESULTS["23 law +24000"]["share"]
    short = [RESULTS[f"23 dose {n}"]["faults"]["POST"]["short"]["margin"] for n in (0, 24000)]
    assert dose["ideal"]["share"] < RESULTS["23 dose 0"]["ideal"]["share"] + 0.001 < law - 0.05
    assert short[1] < short[0] / 2
    times = [a / b for a, b in zip(figure("cost rlhf", "seconds"), figure("cost dpo", "seconds"))]
    error = statistics.stdev(times) / math.sqrt(5)
    assert f"{statistics.mean(times):.2f} ± {error:.2f} times when each side is free" in readme
