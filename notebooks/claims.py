"""The claims of the story, what was found, and what survives a test: one table, from `experiments.json`.

Runs with the same seed are compared, by Student's t over the seeds. A claim that one side is ahead is tested
by the difference, two-sided. A claim that both are level is tested by two one-sided t-tests: that the
difference is less than `LEVEL` to either side (Schuirmann 1987). Of so many claims one in twenty would come
out by luck, so verdicts are those of Holm's correction (1979), in two families: whether the world is as it
was meant, and what was asked. "yes" and "no" survive it, "not settled" does not.
"""

import json
import math
import re

import numpy as np
from experiments import RESULTS, SEEDS
from measure import HERE

COST = HERE / "cost.json"
LEVEL = 0.01  # of the optimal gain: a point, said before the runs
DPO, RLHF = "dpo beta=0.5", "ppo beta=0.4"  # at the defaults
NAT = 1.0  # the KL at which policies are compared
SHOWN = (  # in the README
    "DPO is at least as good",
    "RLHF multiplies hidden wrong words",
    "RLHF is level with the ideal policy for its reward",
    "Its reward mended, RLHF is ahead of DPO",
    "Where nothing need be compared RLHF is ahead",
    "DPO is cheaper",
    "DPO carries over better to letters",
)


def over(results, name, *keys, seeds=SEEDS):
    """A figure on each seed: over(results, "dpo beta=0.5", "kinds", "full") is (5,)."""
    found = [results[f"{seed} {name}"] for seed in seeds]
    for key in keys:
        found = [figures[key] for figures in found]
    return np.array(found, dtype=float)


def p_value(t, df):
    """Of Student's t with `df` degrees of freedom, two-sided: the mass beyond ±t, by integration."""
    angle = np.linspace(0, math.atan(abs(t) / math.sqrt(df)), 2001)  # x = √df tan(angle)
    within = np.trapezoid(np.cos(angle) ** (df - 1), angle)
    return 1 - within * 2 * math.gamma((df + 1) / 2) / (math.sqrt(math.pi) * math.gamma(df / 2))


def critical(df, p=0.05):
    """The t beyond which, on both sides together, lies a mass of p."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, df) > p else (low, middle)
    return high


def difference(a, b):
    """Mean of a − b over seeds, half the width of its 95% interval, and the p-value."""
    d = np.asarray(a, dtype=float) - b
    error = d.std(ddof=1) / math.sqrt(len(d))
    p = p_value(d.mean() / error, len(d) - 1) if error else float(d.mean() == 0)  # equal columns tell nothing
    return d.mean(), critical(len(d) - 1) * error, p


def equivalence(a, b, margin=LEVEL):
    """The p-value of two one-sided t-tests: small where a − b is surely within ± margin."""
    d = np.asarray(a, dtype=float) - b
    error = d.std(ddof=1) / math.sqrt(len(d))
    t = (margin - abs(d.mean())) / error  # of the side that is nearer
    half = p_value(t, len(d) - 1) / 2
    return half if t > 0 else 1 - half


def holm(p_values):
    """Holm's adjusted p-values: the smallest times n, the next times n − 1, …, none below the last."""
    p, adjusted, largest = np.asarray(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def said(x, form=".1%"):
    """The mean over the seeds ± its standard error."""
    return f"{np.mean(x):{form}} ± {np.std(x, ddof=1) / math.sqrt(len(x)):{form}}"


def versus(a, b, form=".1%"):
    """a − b over the seeds, with its 95% interval and p-value."""
    mean, half, p = difference(a, b)
    return f"{mean:+{form}} ± {half:{form}}, p = {p:.3f}"


def at_kl(results, names, kl, key="share", seeds=SEEDS):
    """A figure at a KL, read off on each seed between the runs `names`. ValueError outside them."""
    kls, figures = (np.array([over(results, name, k, seeds=seeds) for name in names]).T for k in ("kl", key))
    kl = np.broadcast_to(kl, len(kls))
    for seed, x, ks in zip(seeds, kl, kls):
        if not min(ks) <= x <= max(ks):
            raise ValueError(
                f"seed {seed}: a KL of {x:.2f} is outside the runs' {min(ks):.2f} to {max(ks):.2f}"
            )
    return np.array([np.interp(x, *np.array(sorted(zip(ks, fs))).T) for x, ks, fs in zip(kl, kls, figures)])


def sweep(results, way, seeds=SEEDS):
    """The names of a way's runs over β."""
    names = [name.split(" ", 1)[1] for name in results if name.startswith(f"{seeds[0]} ")]
    return sorted(name for name in names if re.fullmatch(rf"{way} beta=[\d.]+", name))


def share_of(results, way, seeds=SEEDS):
    """Of the optimal gain, at 1 nat, on each seed."""
    return at_kl(results, sweep(results, way, seeds), NAT, seeds=seeds)


def wins_lost(results, way, seeds=SEEDS):
    """From temperature 0 to 1, by policies at 1 nat at temperature 1, on each seed."""
    lost = dict(results)
    for seed in seeds:
        for name in sweep(results, way, seeds):
            cold = results[f"{seed} {name} POST temperature 0"]["win_rate"]
            warm = results[f"{seed} {name}"]
            lost[f"{seed} {name}"] = warm | {"lost": cold - warm["win_rate"]}
    return at_kl(lost, sweep(results, way, seeds), NAT, "lost", seeds)


def main_rows(results, seeds=SEEDS):
    """(family, claim, RLHF, DPO, what was measured, "a > b" or "level", a, b), a and b seed by seed."""
    get = lambda *keys: over(results, *keys, seeds=seeds)
    share = {way: share_of(results, way, seeds) for way in ("dpo", "ppo", "mended")}
    ideal, at = get("law", "all", "0"), "share at 1 nat"
    wrong = lambda *keys: get(*keys, "kinds", "wrong, hidden")
    before = wrong("pretrain", "POST", "temperature 1")
    return [
        ["asked", "DPO is at least as good", said(share["ppo"]), said(share["dpo"]), at,
         "a > b", share["dpo"], share["ppo"]],
        ["asked", "RLHF multiplies hidden wrong words", said(wrong(RLHF)), said(wrong(DPO)),
         f"of its answers; pretrained {said(before)}", "a > b", wrong(RLHF), before],
        ["asked", "RLHF is level with the ideal policy for its reward", said(share["ppo"]), "",
         f"{at}; ideal {said(ideal)}", "level", share["ppo"], ideal],
        ["asked", "Its reward mended, RLHF is ahead of DPO", said(share["mended"]), said(share["dpo"]),
         at + "; predicted: level" * (seeds == SEEDS), "a > b", share["mended"], share["dpo"]],
    ]  # fmt: skip


def rows(results, seeds=SEEDS):
    """All rows of the table, as `main_rows` has them."""
    get = lambda *keys: over(results, *keys, seeds=seeds)
    posts, letter = ("pretrain", "POST"), "LETTER temperature 1"
    share = {way: share_of(results, way, seeds) for way in ("dpo", "judge", "taste dpo", "taste ppo")}
    ratio = get("pretrain", "val_loss") / get("pretrain", "entropy")
    greedy = sum(get(*posts, "temperature 0", "kinds", kind) for kind in ("repeats", "lucky"))
    cold = get(*posts, "temperature 0", "score")
    lost = {way: wins_lost(results, way, seeds) for way in ("dpo", "ppo")}
    times = {way: get(f"cost {way}", "seconds") for way in ("rlhf", "dpo")}
    letters = {name: get(f"{name} {letter}", "share") for name in (DPO, RLHF)}
    at = "share at 1 nat"
    return [
        ["world", "Pretraining comes within 2% of the best possible loss", "", "",
         f"loss / entropy {said(ratio, '.3f')}", "a > b", 1.02 + 0 * ratio, ratio],
        ["world", "It doesn't do what people want", "", "",
         f"at temperature 0 the first sentence in {said(greedy)}", "a > b", greedy, 0.5 + 0 * greedy],
        ["world", "A lower temperature doesn't cure that", said(get(RLHF, "score"), ".2f"),
         said(get(DPO, "score"), ".2f"), f"score; pretrained at temperature 0 {said(cold, '.2f')}",
         "a > b", get(RLHF, "score"), cold],
        *main_rows(results, seeds),
        ["asked", "Where nothing need be compared RLHF is ahead", said(share["taste ppo"]),
         said(share["taste dpo"]), f"{at}, by another taste; predicted: level",
         "a > b", share["taste ppo"], share["taste dpo"]],
        ["asked", "PPO on the true reward is ahead of DPO", said(share["judge"]), said(share["dpo"]),
         f"{at}; RLHF asks the judge", "a > b", share["judge"], share["dpo"]],
        ["asked", "DPO is cheaper", f"{said(times['rlhf'], '.1f')} s", f"{said(times['dpo'], '.1f')} s",
         "to 90% of the gain at 1 nat", "a > b", np.log(times["rlhf"] / times["dpo"]), 0 * ratio],
        ["asked", "DPO carries over better to letters", said(letters[RLHF]), said(letters[DPO]),
         "share on letters", "a > b", letters[DPO], letters[RLHF]],
        ["asked", "Temperature 1 harms RLHF more than DPO", said(lost["ppo"]), said(lost["dpo"]),
         "wins lost from temperature 0 to 1, at 1 nat", "a > b", lost["ppo"], lost["dpo"]],
    ]  # fmt: skip


def verdicts(table):
    """For each row (p, adjusted p, verdict), families apart."""
    p = [equivalence(a, b) if how == "level" else difference(a, b)[2] for *_, how, a, b in table]
    adjusted = np.empty(len(p))
    for family in {row[0] for row in table}:
        mine = [i for i, row in enumerate(table) if row[0] == family]
        adjusted[mine] = holm([p[i] for i in mine])
    ahead = [how == "level" or np.mean(a) > np.mean(b) for *_, how, a, b in table]
    words = ["not settled" if q >= 0.05 else "yes" if up else "no" for q, up in zip(adjusted, ahead)]
    return list(zip(p, adjusted, words))


def markdown(results, seeds=SEEDS, rows=rows):
    """The table as it stands in notebook 04."""
    table = rows(results, seeds)
    lines = ["| claim | holds? | RLHF | DPO | what was measured | test | p (Holm) |", "| --- " * 7 + "|"]
    tests = {"level": f"level, ± {LEVEL:.0%}", "a > b": "t"}
    for (_, claim, rlhf, dpo, what, how, *_), (p, q, word) in zip(table, verdicts(table)):
        lines.append(f"| {claim} | {word} | {rlhf} | {dpo} | {what} | {tests[how]} | {p:.4f} ({q:.3f}) |")
    return "\n".join(lines)


def readme(results, seeds=SEEDS):
    """Those of its rows that stand in the README."""
    table = rows(results, seeds)
    lines = ["| claim | holds? | RLHF | DPO |", "| --- " * 4 + "|"]
    for (_, claim, rlhf, dpo, what, *_), (*_, word) in zip(table, verdicts(table)):
        if claim in SHOWN:
            lines.append(f"| {claim} ({what}) | {word} | {rlhf} | {dpo} |")
    return "\n".join(lines)


def load():
    """All results: {name: figures}."""
    return json.loads(RESULTS.read_text()) | json.loads(COST.read_text())
