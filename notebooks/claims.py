"""The claims of the story, what was found, and what survives a test: one table, from `experiments.json`.

Runs with the same seed are compared: the difference, with a 95% interval by Student's t over the seeds.
Of so many claims one in twenty would come out by luck, so the verdicts are those of Holm's correction (1979):
"yes" and "no" survive it, "not settled" does not.
"""

import json
import math

import numpy as np
from measure import HERE

RESULTS = HERE / "experiments.json"
SEEDS, TEN = (11, 12, 13, 14, 15), tuple(range(11, 21))  # ten: for letters
FEW_DPO = ["pairs=250 dpo beta=0.25", "pairs=250 dpo beta=0.5"]
SHOWN = (  # in the README
    "DPO is at least as good",
    "RLHF multiplies hidden wrong words",
    "… and is ahead where nothing is compared with the post",
    "DPO is cheaper",
    "DPO carries over better to letters",
)


def over(results, name, *keys, seeds=SEEDS):
    """A figure on each seed: over(results, "dpo beta=0.5", "letters", "score") is (5,)."""
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


def holm(p_values):
    """Holm's adjusted p-values: the smallest times n, the next times n − 1, …, none below the last."""
    p, adjusted, largest = np.asarray(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def said(x, form=".2f"):
    """The mean over the seeds ± its standard error."""
    return f"{np.mean(x):{form}} ± {np.std(x, ddof=1) / math.sqrt(len(x)):{form}}"


def versus(a, b, form=".1%"):
    """a − b over the seeds, with its 95% interval and p-value."""
    mean, half, p = difference(a, b)
    return f"{mean:+{form}} ± {half:{form}}, p = {p:.3f}"


def at_kl(results, names, kl, key="share", seeds=SEEDS):
    """A figure at a KL, read off on each seed between the runs `names`; beyond them the nearest one's."""
    kls, figures = (np.array([over(results, name, k, seeds=seeds) for name in names]).T for k in ("kl", key))
    kl = np.broadcast_to(kl, len(kls))
    return np.array([np.interp(x, *np.array(sorted(zip(ks, fs))).T) for x, ks, fs in zip(kl, kls, figures)])


def sweep(results, way):
    """The names of a way's runs over β, without those on other pairs."""
    names = {name.split(" ", 1)[1] for name in results}
    return sorted(name for name in names if name.startswith(f"{way} beta="))


def rows(results, seeds=SEEDS, ten=TEN):
    """(claim, the paper, RLHF, DPO, what was measured, a, b): the claim says that a > b, seed by seed."""
    get = lambda *keys: over(results, *keys, seeds=seeds)
    percent = lambda x: said(x, ".1%")
    wrong = lambda *keys: get(*keys, "kinds", "wrong, hidden")
    dpo, rlhf, posts = "dpo beta=0.5", "ppo beta=0.4", ("pretrain", "POST")
    share = {
        way: at_kl(results, sweep(results, way), 1.0, seeds=seeds)
        for way in ("dpo", "ppo", "judge", "implicit")
    }
    ratio = get("pretrain", "val_loss") / get("pretrain", "entropy")
    greedy = sum(get(*posts, "temperature 0", "kinds", kind) for kind in ("repeats", "lucky"))
    lowered = max((get(*posts, f"temperature {t:g}", "score") for t in (0, 0.25, 0.5, 0.75, 1)), key=np.mean)
    gain = {name: get(name, "score") for name in (dpo, rlhf, "sft", "noise dpo", "noise ppo")}
    loss = {name: get(name, "temperature 0", "win_rate") - get(name, "win_rate") for name in (dpo, rlhf)}
    letters = {name: over(results, name, "letters", "share", seeds=ten) for name in (dpo, rlhf)}
    judges = {
        way: get("judges", way, "as a judge", "POST", "correlation") for way in ("explicit", "implicit")
    }
    best = {way: get("asks for", way, "best of n", "64", "score") for way in ("learned", "implicit")}
    few = get("pairs=250 ppo", "share")
    few_dpo = at_kl(results, FEW_DPO, get("pairs=250 ppo", "kl"), seeds=seeds)
    times = {key: get("cost rlhf", key) / get("cost dpo", key) for key in ("seconds", "operations")}
    to_reach = lambda way: f"{said(get(f'cost {way}', 'seconds'), '.1f')} s"
    return [
        ["Pretraining comes within 2% of the best possible loss", "", "", "",
         f"loss / entropy {said(ratio, '.3f')}", 1.02 + 0 * ratio, ratio],
        ["It doesn't do what people want (the world was built so)", "", "", "",
         f"at temperature 0 the first sentence in {percent(greedy)}", greedy, 0.5 + 0 * greedy],
        ["A lower temperature doesn't cure that", "", said(gain[rlhf]), said(gain[dpo]),
         f"score; pretrained, at its best temperature {said(lowered)}", gain[rlhf], lowered],
        ["DPO is at least as good", "wins 61% against 57% (summaries)", percent(share["ppo"]),
         percent(share["dpo"]), "share at 1 nat", share["dpo"], share["ppo"]],
        ["RLHF multiplies hidden wrong words", "", percent(wrong(rlhf)), percent(wrong(dpo)),
         f"of its answers; pretrained {percent(wrong(*posts, 'temperature 1'))}",
         wrong(rlhf), wrong(*posts, "temperature 1")],
        ["… and is better on DPO's implicit reward", "", percent(share["implicit"]), percent(share["dpo"]),
         "share at 1 nat; tested against RLHF above", share["implicit"], share["ppo"]],
        ["… and is ahead where nothing is compared with the post", "", percent(get("taste ppo", "share")),
         percent(get("taste dpo", "share")), "share, by another taste",
         get("taste ppo", "share"), get("taste dpo", "share")],
        ["DPO is as good as PPO on the true reward", "yes (sentiment)", percent(share["judge"]),
         percent(share["dpo"]), "share at 1 nat; RLHF asks the judge", share["dpo"], share["judge"]],
        ["DPO is cheaper", "", to_reach("rlhf"), to_reach("dpo"),
         f"to 90% of the gain at 1 nat; RLHF / DPO: seconds {said(times['seconds'], '.1f')}",
         np.log(times["seconds"]), 0 * few],
        ["… three times or more, in operations", "(its author: 3 to 6)", "", "",
         f"RLHF / DPO: {said(times['operations'], '.1f')}", times["operations"], 3 + 0 * few],
        ["Temperature 1 harms PPO more than DPO", "PPO falls to the base model", percent(loss[rlhf]),
         percent(loss[dpo]), "wins lost from temperature 0 to 1", loss[rlhf], loss[dpo]],
        ["DPO carries over better to letters", "wins 36% against 26% (news)", percent(letters[rlhf]),
         percent(letters[dpo]), f"share on letters, {len(ten)} seeds", letters[dpo], letters[rlhf]],
        ["Fine-tuning on the chosen is not enough", "yes", said(gain[rlhf]), said(gain[dpo]),
         f"score; fine-tuned {said(gain['sft'])}, at temperature 0 "
         f"{said(get('sft', 'temperature 0', 'score'))}",
         gain[rlhf], gain["sft"]],
        ["Best of 64 by the reward model is as good as DPO", "DPO matches best of 128", said(best["learned"]),
         said(gain[dpo]), f"score; by the implicit reward {said(best['implicit'])}",
         best["learned"], gain[dpo]],
        ["The implicit reward is the better judge of posts", "(equal in theory)",
         said(judges["explicit"], ".3f"), said(judges["implicit"], ".3f"), "correlation with the judge",
         judges["implicit"], judges["explicit"]],
        ["With 250 pairs RLHF is ahead", "", percent(few), percent(few_dpo), "share at RLHF's KL",
         few, few_dpo],
        ["Half of the labels random: RLHF is ahead by share", "", percent(get("noise ppo", "share")),
         percent(get("noise dpo", "share")),
         f"share; score {said(gain['noise ppo'])} and {said(gain['noise dpo'])}",
         get("noise ppo", "share"), get("noise dpo", "share")],
    ]  # fmt: skip


def verdicts(table):
    """For each row (difference, half-width, p, adjusted p, verdict)."""
    found = [difference(a, b) for *_, a, b in table]
    adjusted = holm([p for *_, p in found])
    words = ["not settled" if q >= 0.05 else "yes" if d > 0 else "no" for (d, *_), q in zip(found, adjusted)]
    return [(*some, q, word) for some, q, word in zip(found, adjusted, words)]


def markdown(results, seeds=SEEDS, ten=TEN):
    """The table as it stands in notebook 04."""
    table = rows(results, seeds, ten)
    lines = ["| claim | the paper | RLHF | DPO | what was measured | p (Holm) | holds? |", "| --- " * 7 + "|"]
    for (claim, paper, rlhf, dpo, what, *_), (*_, p, q, word) in zip(table, verdicts(table)):
        lines.append(f"| {claim} | {paper} | {rlhf} | {dpo} | {what} | {p:.4f} ({q:.3f}) | {word} |")
    return "\n".join(lines)


def readme(results, seeds=SEEDS, ten=TEN):
    """Those of its rows that stand in the README."""
    table = rows(results, seeds, ten)
    lines = ["| claim | RLHF | DPO | | holds? |", "| --- " * 5 + "|"]
    for (claim, _, rlhf, dpo, what, *_), (*_, word) in zip(table, verdicts(table)):
        if claim in SHOWN:
            lines.append(f"| {claim} | {rlhf} | {dpo} | {what} | {word} |")
    return "\n".join(lines)


def load():
    return json.loads(RESULTS.read_text())
