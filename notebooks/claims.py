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
SEEDS, TEN = (11, 12, 13, 14, 15), range(11, 21)


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
    return d.mean(), critical(len(d) - 1) * error, p_value(d.mean() / error, len(d) - 1) if error else 0.0


def holm(p_values):
    """Holm's adjusted p-values: the smallest times n, the next times n − 1, …, none below the last."""
    p, adjusted, largest = np.asarray(p_values), np.empty(len(p_values)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def said(x, form=".2f"):
    """Mean ± standard error over the seeds."""
    return f"{np.mean(x):{form}} ± {np.std(x, ddof=1) / math.sqrt(len(x)):{form}}"


def at_kl(results, names, kl, key="share", seeds=SEEDS):
    """A figure at a KL, read off on each seed between the runs `names`; beyond them the nearest one's."""
    kls, figures = (np.array([over(results, name, k, seeds=seeds) for name in names]).T for k in ("kl", key))
    kl = np.broadcast_to(kl, len(kls))
    return np.array([np.interp(x, *np.array(sorted(zip(ks, fs))).T) for x, ks, fs in zip(kl, kls, figures)])


def sweep(results, way):
    """The names of a way's runs over β."""
    return sorted({name.split(" ", 1)[1] for name in results if f" {way} beta=" in f"{name}"})


def rows(results, seeds=SEEDS, ten=TEN):
    """(claim, in the paper, with RLHF, with DPO, what is tested, a, b): the claim says that a > b."""
    get = lambda *keys: over(results, *keys, seeds=seeds)
    dpo, rlhf, posts = "dpo beta=0.5", "ppo beta=0.4", ("pretrain", "POST")
    share = {
        way: at_kl(results, sweep(results, way), 1.0, seeds=seeds)
        for way in ("dpo", "ppo", "judge", "implicit")
    }
    percent, hidden = lambda x: said(x, ".1%"), ("kinds", "wrong, hidden")
    ratio = get("pretrain", "val_loss") / get("pretrain", "entropy")
    greedy = sum(get(*posts, "temperature 0", "kinds", kind) for kind in ("repeats", "lucky"))
    lowered = max((get(*posts, f"temperature {t:g}", "score") for t in (0, 0.25, 0.5, 0.75, 1)), key=np.mean)
    letters = {name: over(results, name, "letters", "share", seeds=ten) for name in (dpo, rlhf)}
    wins = {name: (get(name, "temperature 0", "win_rate"), get(name, "win_rate")) for name in (dpo, rlhf)}
    judge_of = {w: get("judges", w, "as a judge", "POST", "correlation") for w in ("explicit", "implicit")}
    few = {"rlhf": get("pairs=250 ppo", "share")}
    few["dpo"] = at_kl(
        results, [f"pairs=250 dpo beta={b:g}" for b in (0.25, 0.5)], get("pairs=250 ppo", "kl"), seeds=seeds
    )
    noise = {way: {key: get(f"noise {way}", key) for key in ("share", "score")} for way in ("dpo", "ppo")}
    best_of = lambda reward, n: get("asks for", reward, "best of n", str(n), "score")
    return [
        (
            "Pretraining comes within 2% of the best possible loss",
            "",
            "",
            "",
            f"loss / entropy {said(ratio, '.3f')}",
            1.02 + 0 * ratio,
            ratio,
        ),
        (
            "It doesn't do what people want (the world was built so)",
            "",
            "",
            "",
            f"at temperature 0 the first sentence in {percent(greedy)}",
            greedy,
            0.5 + 0 * greedy,
        ),
        (
            "A lower temperature doesn't cure that",
            "",
            said(get(rlhf, "score")),
            said(get(dpo, "score")),
            f"score at its best temperature {said(lowered)}",
            get(rlhf, "score"),
            lowered,
        ),
        (
            "DPO is at least as good",
            "wins 61% against 57% (summaries)",
            percent(share["ppo"]),
            percent(share["dpo"]),
            "share at 1 nat",
            share["dpo"],
            share["ppo"],
        ),
        (
            "RLHF multiplies hidden wrong words",
            "",
            percent(get(rlhf, *hidden)),
            percent(get(dpo, *hidden)),
            f"pretrained {percent(get(*posts, 'temperature 1', *hidden))}",
            get(rlhf, *hidden),
            get(*posts, "temperature 1", *hidden),
        ),
        (
            "… and no longer stays behind on DPO's implicit reward",
            "",
            percent(share["implicit"]),
            percent(share["dpo"]),
            "share at 1 nat; tested against the textbook's reward",
            share["implicit"],
            share["ppo"],
        ),
        (
            "… nor where the taste compares nothing with the post",
            "",
            percent(get("taste ppo", "share")),
            percent(get("taste dpo", "share")),
            "share, by that taste",
            get("taste ppo", "share"),
            get("taste dpo", "share"),
        ),
        (
            "DPO is as good as PPO on the true reward",
            "yes (sentiment)",
            percent(share["judge"]),
            percent(share["dpo"]),
            "share at 1 nat; RLHF asks the judge",
            share["dpo"],
            share["judge"],
        ),
        (
            "Temperature 1 harms PPO more than DPO",
            "PPO falls to the base model",
            f"{wins[rlhf][0].mean():.1%}, {wins[rlhf][1].mean():.1%}",
            f"{wins[dpo][0].mean():.1%}, {wins[dpo][1].mean():.1%}",
            "wins at temperatures 0 and 1",
            wins[rlhf][0] - wins[rlhf][1],
            wins[dpo][0] - wins[dpo][1],
        ),
        (
            "DPO carries over better to letters",
            "wins 36% against 26% (news)",
            percent(letters[rlhf]),
            percent(letters[dpo]),
            "share on letters, ten seeds",
            letters[dpo],
            letters[rlhf],
        ),
        (
            "Fine-tuning on the chosen is not enough",
            "yes",
            said(get(rlhf, "score")),
            said(get(dpo, "score")),
            f"score of fine-tuning {said(get('sft', 'score'))}, at temperature 0 "
            f"{said(get('sft', 'temperature 0', 'score'))}",
            get(rlhf, "score"),
            get("sft", "score"),
        ),
        (
            "Best of 64 by the learned reward is as good as DPO",
            "DPO matches best of 128",
            said(best_of("learned", 64)),
            said(get(dpo, "score")),
            f"score; best of 64 by the implicit reward {said(best_of('implicit', 64))}",
            best_of("learned", 64),
            get(dpo, "score"),
        ),
        (
            "The implicit reward is the better judge of posts",
            "(equivalence is a theorem)",
            said(judge_of["explicit"], ".3f"),
            said(judge_of["implicit"], ".3f"),
            "correlation with the judge",
            judge_of["implicit"],
            judge_of["explicit"],
        ),
        (
            "With 250 pairs RLHF is ahead",
            "",
            percent(few["rlhf"]),
            percent(few["dpo"]),
            "share at RLHF's KL",
            few["rlhf"],
            few["dpo"],
        ),
        (
            "Half of the labels random: RLHF has the larger share",
            "",
            percent(noise["ppo"]["share"]),
            percent(noise["dpo"]["share"]),
            f"score: RLHF {said(noise['ppo']['score'])}, DPO {said(noise['dpo']['score'])}",
            noise["ppo"]["share"],
            noise["dpo"]["share"],
        ),
    ]


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


def load():
    return json.loads(RESULTS.read_text())
