"""What the notebooks share: the look of their plots, kinds of answers, and some larger pictures."""

import itertools
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from data import DISHES, GREETERS, SMALL_TALK, WORDS, facts, kind_of

plt.rcParams |= {
    "figure.facecolor": "white",
    "figure.figsize": (7, 3.5),
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.fontsize": "small",
}
BLUE, ORANGE, GREEN, RED, GRAY = "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:gray"


def read_metrics(directory):
    """A finished run's logged steps, and its last line with the figures of the end."""
    lines = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return lines[:-1], lines[-1]


def curve(log, name):
    """The steps at which a metric was logged, and its values."""
    return zip(*[(line["step"], line[name]) for line in log if name in line])


def check(number, answer, truth):
    """Say whether the answer to an exercise is right, to one in a hundred."""
    if answer is None:
        print(f"{number}. no answer yet")
    elif abs(answer - truth) <= 0.01 * abs(truth) + 1e-6:
        print(f"{number}. {answer:.3g} is right")
    else:
        print(f"{number}. {answer:.3g} is not it")


# ----------------------------------------------------------------------------------------------------
# Kinds of answers

KINDS = {  # of `data.kind_of`, and their colors: what people like is green, what is wrong is red
    "full": "#1a7a3c",
    "lucky": "#63b67b",
    "short": "#b5dcae",
    "rambling": "#e8c25a",
    "wrong, obvious": "#d1495b",
    "wrong, hidden": "#eba0a8",
    "off topic": "#a9a4cf",
    "repeats": "#7f8c99",
}
OLD_KINDS = {  # race.json and roads.json have these names until the race is run anew; then this goes
    "repeats, and it is the news": "#63b67b",
    "wrong word": "#d1495b",
    "beside the point": "#a9a4cf",
    "repeats the first sentence": "#7f8c99",
    "else": "#d9d9d9",
}
SMALL_TALK_SENTENCES = {
    template.format(*words) for template, *gaps in SMALL_TALK for words in itertools.product(*gaps)
}


def shares(posts, answers, weights=None):
    """The share of each kind among the answers, one to each post, by default all with the same weight."""
    weights = np.full(len(posts), 1 / len(posts)) if weights is None else weights
    result = dict.fromkeys(KINDS, 0.0)
    for post, answer, weight in zip(posts, answers, weights):
        result[kind_of(post, answer)] += weight
    return result


def spoiled(post, rng=random):
    """The full summary of a post, and what it becomes with each kind of fault: {fault: answer}."""
    name, verb, thing, place = facts(post)
    other = lambda key, word: rng.choice([w for w in WORDS[post.split(":")[0]][key] if w != word])
    small_talk = rng.choice(sorted(SMALL_TALK_SENTENCES))
    return f" {name} {verb} my {thing} {place}.", {
        "beside the point": f" {small_talk}",
        "no place": f" {name} {verb} my {thing}.",
        "rambling": f" {name} {verb} my {thing} {place}. {small_talk}",
        "a dish for the thing": f" {name} {verb} my {rng.choice(DISHES)} {place}.",
        "a greeter for the name": f" {rng.choice(GREETERS)} {verb} my {thing} {place}.",
        "another thing": f" {name} {verb} my {other('thing', thing)} {place}.",
        "another name": f" {other('name', name)} {verb} my {thing} {place}.",
    }


def stacked_bars(rows, title, path=None):
    """One bar for each row {label: shares}, made of kinds of answers; also into a file."""
    fig, axis = plt.subplots(figsize=(9, 1.5 + 0.5 * len(rows)))
    left = np.zeros(len(rows))
    for kind in next(iter(rows.values())):
        color = (KINDS | OLD_KINDS)[kind]
        widths = np.array([row[kind] for row in rows.values()])
        axis.barh(range(len(rows)), widths, left=left, color=color, edgecolor="white", label=kind)
        for y, (x, width) in enumerate(zip(left, widths)):
            if width > 0.04:
                axis.text(x + width / 2, y, f"{width:.0%}", ha="center", va="center", fontsize="small")
        left += widths
    axis.set(title=title, xlabel="share of the answers (%)", xlim=(0, 1))
    axis.set_xticks(np.linspace(0, 1, 6), range(0, 101, 20))
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.grid(False)
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    if path:
        fig.savefig(path, dpi=130)
    plt.show()


def fault_bars(accuracies, n):
    """How often each scorer {name: {fault: share}} prefers the full summary to the spoiled one; n posts."""
    fig, axis = plt.subplots(figsize=(8, 1.6 + 0.4 * sum(map(len, accuracies.values())) / 1.4))
    height = 0.8 / len(accuracies)
    for i, ((name, found), color) in enumerate(zip(accuracies.items(), (ORANGE, BLUE))):
        share = np.array([*found.values()])
        at = np.arange(len(found)) + (i - (len(accuracies) - 1) / 2) * height
        error = np.sqrt(share * (1 - share) / n)
        axis.barh(at, share, height, xerr=error, color=color, alpha=0.85, label=name)
    axis.axvline(0.5, color="black", linestyle=":", label="guessing")
    axis.set_yticks(range(len(found)), found)
    axis.invert_yaxis()
    axis.set(title="Does it prefer the full summary to one with this fault?", xlim=(0, 1.02))
    axis.set_xlabel(f"share of {n} posts where it does (bars: one standard error)")
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plt.show()


# ----------------------------------------------------------------------------------------------------
# Pictures that only one notebook has


def attention_picture(weights, words, targets, title):
    """What a head looks at (targets, words) before it writes each target."""
    fig, axis = plt.subplots(figsize=(9, 3))
    image = axis.imshow(weights, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(words)), [word.replace("\n", "⏎") for word in words], rotation=90)
    axis.set_yticks(range(len(targets)), [f"about to write{word}" for word in targets])
    axis.grid(False)
    axis.set(title=title, xlabel="token of the post")
    fig.colorbar(image, label="share of attention")
    plt.show()


def calibration_picture(rows):
    """Rows (how sure, how often right, pairs) against the diagonal."""
    sure, right, n = np.array(rows).T
    fig, axis = plt.subplots(figsize=(5, 4))
    axis.plot([0.5, 1], [0.5, 1], color="black", linestyle="--", label="as often right as it is sure")
    error = np.sqrt(sure * (1 - sure) / n)
    label = "held-out pairs, in bins (± one standard error)"
    axis.errorbar(sure, right, error, fmt="o", capsize=3, color=ORANGE, label=label)
    axis.set(title="Is it right as often as it is sure?", ylabel="how often right (share of the bin's pairs)")
    axis.set(xlabel="how sure (probability, mean of the bin)")
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    plt.show()


def networks_picture():
    """Which networks take part in RLHF's last step and in DPO, what flows between them, which are trained."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 5))
    style = {  # of a box; the light colors are filled, so that the text is black on both kinds of pages
        "trained": {"facecolor": "#cfe3f7", "edgecolor": BLUE, "linewidth": 2},
        "frozen": {"facecolor": "#e6e6e6", "edgecolor": "gray", "linewidth": 2},
        "numbers": {"facecolor": "white", "edgecolor": "black"},
    }

    def box(axis, x, y, text, kind):
        look = style[kind] | {"boxstyle": "round,pad=0.45"}
        axis.text(x, y, text, ha="center", va="center", bbox=look, fontsize=9.5, zorder=3)

    def arrow(axis, start, end, text="", at=0.5, gradient=False, bend=0.0):
        look = {"arrowstyle": "-|>", "mutation_scale": 13, "connectionstyle": f"arc3,rad={bend}"}
        look |= {"color": BLUE, "linestyle": "--", "linewidth": 1.8} if gradient else {"color": "black"}
        axis.annotate("", end, start, arrowprops=look, zorder=2)
        x, y = (a + at * (b - a) for a, b in zip(start, end))
        page = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        if text:
            axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=page, zorder=2.5)

    left, right = axes
    box(left, 5.4, 9.3, "prompts", "numbers")
    box(left, 5.4, 7.4, "policy\nwrites answers", "trained")
    box(left, 2.3, 4.4, "reference\nthe policy as\nit began", "frozen")
    box(left, 5.4, 4.4, "reward model\ntrained before,\nby reward.py", "frozen")
    box(left, 8.5, 4.4, "critic\nguesses the\nscore to come", "trained")
    box(left, 5.4, 1.2, "advantages, and PPO's clipped loss", "numbers")
    arrow(left, (5.4, 8.9), (5.4, 8.05))
    for x, text in ((2.3, "log π_ref"), (5.4, "score"), (8.5, "expected")):
        arrow(left, (5.4, 6.75), (x, 5.3), "answers, log π" if x == 5.4 else "")
        arrow(left, (x, 3.5), (5.4 + (x - 5.4) / 2, 1.65), text)
    arrow(left, (2.4, 1.2), (3.9, 7.4), gradient=True, bend=-0.95)
    arrow(left, (8.4, 1.2), (9.2, 3.5), gradient=True, bend=0.4)
    left.set_title("RLHF (ppo.py): four networks, two of them trained,\non new answers in each iteration")

    box(right, 5, 9.3, "pairs: prompt, chosen, rejected", "numbers")
    box(right, 2.6, 5.8, "policy", "trained")
    once = "reference: the policy as it began\nreads each pair once, and\nonly its numbers are kept"
    box(right, 7.2, 5.8, once, "frozen")
    box(right, 5, 1.2, "DPO's loss", "numbers")
    for x, text, top in ((2.6, "log π", 6.3), (7.2, "log π_ref", 6.7)):
        arrow(right, (5 + (x - 5) / 2, 8.9), (x, top))
        arrow(right, (x, 5.3 if x < 5 else 4.9), (5 + (x - 5) / 4, 1.65), text)
    arrow(right, (4.0, 1.2), (1.8, 5.4), gradient=True, bend=-0.4)
    right.set_title("DPO (dpo.py): one network,\non pairs that are already there")
    for axis in axes:
        axis.set(xlim=(-0.6, 10.2), ylim=(0.3, 10))
        axis.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, **style[kind]) for kind in ("trained", "frozen")]
    handles.append(plt.Line2D([], [], color=BLUE, linestyle="--", linewidth=1.8))
    labels = "trained network", "frozen network", "gradients: who learns from the loss"
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    plt.show()


def theorem_picture(reference, ideal, found, reward, implicit):
    """Five answers: the probabilities that DPO found, and the implicit reward of what it found."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
    at = np.arange(len(reference))
    left.bar(at - 0.27, reference, 0.27, color="lightgray", edgecolor="gray", label="reference")
    left.bar(at, ideal, 0.27, color="black", label="ideal policy (eq. 4)")
    left.bar(at + 0.27, found, 0.27, color=BLUE, label="what DPO found")
    left.set(title="DPO finds the ideal policy", xlabel="answer", ylabel="probability")
    left.legend(loc="upper right")
    constant = np.mean(np.array(implicit) - np.array(reward))
    ends = np.array([min(reward) - 0.1, max(reward) + 0.1])
    right.plot(ends, ends + constant, color="black", linestyle="--", label="slope 1")
    right.scatter(reward, implicit, color=BLUE, zorder=3, label="the five answers")
    right.set(title="Its implicit reward is the true one, up to a constant", xlabel="true reward r")
    right.set_ylabel("implicit reward β log(π / π_ref)")
    right.legend()
    plt.show()


def slopes_picture(truth, learned):
    """Differences in score, chosen − rejected: the judge's against each scorer's {name: differences}."""
    fig, axes = plt.subplots(1, len(learned), figsize=(11, 4), sharex=True, sharey=True)
    for axis, (name, values), color in zip(axes, learned.items(), (ORANGE, BLUE)):
        axis.scatter(truth, values, s=10, alpha=0.35, color=color, label="held-out pairs")
        axis.axline((0, 0), slope=1, color="black", linestyle="--", label="slope 1: as the judge")
        axis.set(title=name, xlabel="judge: chosen − rejected (points)", ylabel="learned: chosen − rejected")
        axis.legend(loc="upper left")
    plt.show()


# ----------------------------------------------------------------------------------------------------
# The race (notebook 04). Arrays of figures have one row for each seed; bars are one standard error.


def mean_and_error(x):
    """Over seeds, the first axis: the mean and its standard error."""
    x = np.asarray(x, dtype=float)
    return x.mean(0), x.std(0, ddof=1) / np.sqrt(len(x))


def draw_frontier(axis, frontiers, lines, title, farthest=2.0):
    """Score over KL: the optimum, from the frontiers (points of (KL, score)) of all seeds, and policies.

    `lines` is {label: (kls, scores, style, texts)}; kls and scores are (seeds, points), and a text stands
    beside each point that has one.
    """
    grid = np.linspace(0, farthest**0.5, 100) ** 2  # dense where the line is steep
    best, error = mean_and_error([np.interp(grid, *np.transpose(points)) for points in frontiers])
    axis.fill_between(grid, best - error, best + error, color="black", alpha=0.15)
    axis.plot(grid, best, color="black", label="the best possible at this KL")
    for label, (kls, scores, style, texts) in lines.items():
        (x, x_error), (y, y_error) = mean_and_error(kls), mean_and_error(scores)
        axis.errorbar(x, y, y_error, x_error, label=label, capsize=2, **style)
        for text, at in zip(texts, zip(x, y)):
            axis.annotate(text, at, (5, -9), textcoords="offset points", fontsize=8, color=style["color"])
    axis.set(title=title, xlabel="KL from the pretrained model (nats per answer)", xlim=(-0.05, farthest))
    axis.set_ylabel("judge's score (4 is perfect)")
    axis.legend(loc="lower right")


def draw_lines(axis, xs, lines, title, xlabel, ylabel):
    """{label: (figures (seeds, points), style)} over the places xs, which are evenly spaced and named."""
    for label, (figures, style) in lines.items():
        axis.errorbar(range(len(xs)), *mean_and_error(figures), label=label, capsize=3, **style)
    axis.set_xticks(range(len(xs)), xs)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.legend()
