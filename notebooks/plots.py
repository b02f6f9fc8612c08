"""What the notebooks share: the look of their plots, kinds of answers, and some larger pictures."""

import io
import itertools
import json
import math
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter

import ppo
from data import DISHES, GREETERS, SMALL_TALK, WORDS, facts, kind_of, pad_rows
from model import final_scores, token_values

plt.rcParams |= {
    "figure.facecolor": "white",
    "figure.figsize": (7, 3),
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
# RLHF is orange and DPO blue everywhere (Okabe and Ito's colors, which color-blind eyes tell apart).
BLUE, ORANGE, GREEN, RED, GRAY = "#0072b2", "#e69f00", "#009e73", "#b2182b", "#7f7f7f"
DARK = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#0d1117")
DARK |= dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6edf3"
)
percent = FuncFormatter(lambda x, _: f"{100 * x:g}%")


def read_metrics(directory):
    """A finished run's logged steps, and its last line with the figures of the end."""
    lines = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines[:-1] if "answer" not in line], lines[-1]


def curve(log, name):
    """The steps at which a metric was logged, and its values."""
    return [*zip(*[(line["step"], line[name]) for line in log if name in line])]


def show_figure(alt):
    """Show the current figure, and say in a text what it shows, for those who don't see it.

    JupyterLab and nbconvert read that text, `alt`, from the metadata of the picture.
    """
    from IPython.display import Image, display  # here, since this file as a script does without

    file = io.BytesIO()
    plt.savefig(file, bbox_inches="tight", pil_kwargs={"optimize": True})
    plt.close()
    display(Image(file.getvalue(), alt=alt))


def in_both_lights(draw, path=None, alt=None):
    """Show the figure that `draw` makes; with a path it is kept, too, once more for dark pages."""
    if path:
        with plt.rc_context(DARK):
            draw().savefig(path.with_stem(f"{path.stem}-dark"))
            plt.close()
    figure = draw()
    if path:
        figure.savefig(path)
    show_figure(alt) if alt else plt.show()


# ----------------------------------------------------------------------------------------------------
# Kinds of answers

KINDS = {  # of `data.kind_of`: where two colors have one lightness, hatching tells them apart
    "full": ("#1b7837", ""),
    "lucky": ("#7fbf7b", ""),
    "short": ("#c7e9c0", ""),
    "rambling": ("#f6e8b1", ""),
    "wrong, obvious": ("#ffb3b3", "///"),
    "wrong, hidden": ("#b2182b", "xxx"),
    "off topic": ("#c9c6e3", "..."),
    "repeats": ("#5b6670", "\\\\"),
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
        "off topic": f" {small_talk}",
        "short": f" {name} {verb} my {thing}.",
        "rambling": f" {name} {verb} my {thing} {place}. {small_talk}",
        "a dish for the thing": f" {name} {verb} my {rng.choice(DISHES)} {place}.",
        "a greeter for the name": f" {rng.choice(GREETERS)} {verb} my {thing} {place}.",
        "another thing": f" {name} {verb} my {other('thing', thing)} {place}.",
        "another name": f" {other('name', name)} {verb} my {thing} {place}.",
    }


def draw_bars(rows, title):
    fig, axis = plt.subplots(figsize=(5.6, 1.2 + 0.28 * len(rows)))
    left = np.zeros(len(rows))
    for kind, (color, hatch) in KINDS.items():
        edge = {"///": "#7a0c17", "...": "#5b6670"}.get(hatch, plt.rcParams["axes.facecolor"])
        widths = np.array([row[kind] for row in rows.values()])
        look = {"color": color, "hatch": hatch, "edgecolor": edge, "lw": 0.5}
        axis.barh(range(len(rows)), widths, left=left, label=kind, **look)
        for y, (x, width) in enumerate(zip(left, widths)):
            if width > 0.055:
                dark = np.dot(to_rgb(color), (0.3, 0.59, 0.11)) < 0.5
                box = {"facecolor": color, "edgecolor": "none", "pad": 1} if hatch else None
                look = {"ha": "center", "va": "center", "fontsize": 8, "bbox": box}
                axis.text(x + width / 2, y, f"{width:.0%}", color="white" if dark else "black", **look)
        left += widths
    axis.set(title=title, xlim=(0, 1))
    axis.xaxis.set_major_formatter(percent)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.grid(False)
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1)
    return fig


def stacked_bars(rows, title, path=None):
    """One bar for each row {name: {kind: share}}; also into files."""
    said = lambda row: ", ".join(f"{kind} {share:.0%}" for kind, share in row.items() if share > 0.005)
    alt = "Stacked bars. " + ". ".join(f"{name}: {said(row)}" for name, row in rows.items())
    in_both_lights(lambda: draw_bars(rows, title), path, alt)


def fault_bars(accuracies, n, title):
    """How often each scorer {name: {fault: share}} prefers the full summary to the spoiled one; n posts."""
    fig, axis = plt.subplots(figsize=(7.5, 1.6 + 0.2 * sum(map(len, accuracies.values()))))
    height = 0.8 / len(accuracies)
    for i, ((name, found), color, hatch) in enumerate(zip(accuracies.items(), (ORANGE, BLUE), ("", "//"))):
        share = np.array([*found.values()])
        at = np.arange(len(found)) + (i - (len(accuracies) - 1) / 2) * height
        error = np.sqrt(share * (1 - share) / n)
        look = {"color": color, "hatch": hatch, "edgecolor": "white", "label": name}
        axis.barh(at, share, height, xerr=error, **look)
    axis.axvline(0.5, color="black", linestyle=":", label="guessing")
    axis.set_yticks(range(len(found)), found)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(percent)
    axis.set(title=title, xlim=(0, 1.02))
    axis.set_xlabel(f"prefers the full summary to one with this fault ({n} posts, ± one standard error)")
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    said = lambda found: ", ".join(f"{fault} {share:.0%}" for fault, share in found.items())
    show_figure("Bars. " + ". ".join(f"{name}: {said(found)}" for name, found in accuracies.items()))


# ----------------------------------------------------------------------------------------------------
# Pictures that only one notebook has


def pretraining_picture(log, final):
    """The loss over the steps, and how far above the entropy it is."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3))
    left.plot(*curve(log, "loss"), color=BLUE, alpha=0.4, label="training batch")
    left.plot(*curve(log, "val_loss"), "o-", color=BLUE, label="held-out texts")
    left.axhline(final["entropy"], color="black", linestyle="--", label="entropy of the source")
    left.set(title="The loss comes down to the entropy …", xlabel="step", ylabel="loss (nats per token)")
    left.set_ylim(0, None)
    left.legend()
    steps, losses = curve(log, "val_loss")
    above = np.array(losses) / final["entropy"] - 1
    right.semilogy(steps, above, "o-", color=BLUE)
    right.set(
        title=f"… and ends {above[-1]:.1%} above it", xlabel="step", ylabel="held-out loss above the entropy"
    )
    right.set_yticks((0.01, 0.02, 0.05, 0.1, 0.2, 0.4))
    right.yaxis.set_major_formatter(percent)
    right.minorticks_off()
    show_figure(
        f"Left, loss over steps: it falls from {losses[0]:.2f} at step {steps[0]} to {losses[-1]:.2f}, just "
        f"above the entropy of {final['entropy']:.2f}. Right, the same as a distance from the entropy, on a "
        f"logarithmic axis: from {above[0]:.1%} to {above[-1]:.1%}."
    )


def exercise_picture(log, mine, label, knows_nothing):
    fig, axis = plt.subplots()
    axis.plot(*curve(log, "loss"), color=GRAY, label="the run above")
    axis.plot(*curve(mine, "loss"), "o-", color=RED, label=label)
    axis.axhline(knows_nothing, color="black", linestyle=":", label="knows nothing")
    axis.set(title="Loss on the training batches", xlabel="step", ylabel="nats per token", xlim=(0, 100))
    axis.legend()
    show_figure(f"Lines: loss over the first hundred steps, of the run above and of {label}.")


def attention_picture(weights, words, targets, title):
    """What a head looks at (targets, words) before it writes each target."""
    fig, axis = plt.subplots(figsize=(7.5, 2.8))
    image = axis.imshow(weights, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(words)), [word.replace("\n", "⏎") for word in words], rotation=90)
    axis.set_yticks(range(len(targets)), targets)
    axis.grid(False)
    axis.set(title=title, xlabel="token of the post")
    fig.colorbar(image, label="share of attention")
    most = [
        f"{target}: most on {words[int(row.argmax())].strip()!r}" for target, row in zip(targets, weights)
    ]
    show_figure(f"A heat map, a row for each head, a column for each token of the post. {'; '.join(most)}.")


def learning_picture(log, final, color, name):
    """Loss and accuracy on held-out pairs over the steps, beside guessing and the best possible."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3))
    left.plot(*curve(log, "loss"), color=color, alpha=0.4, label="training batch")
    left.plot(*curve(log, "val_loss"), "o-", color=color, label="held-out pairs")
    left.axhline(np.log(2), color=GRAY, linestyle=":", label="guessing, log 2")
    left.set(title="The surprise at the choices falls …", xlabel="step", ylabel="loss (nats per pair)")
    best = final["best_accuracy"]
    error = np.sqrt(best * (1 - best) / 1024)
    right.axhspan(best - error, best + error, color="black", alpha=0.12, label="± one standard error")
    right.axhline(best, color="black", linestyle="--", label="best that any model can do")
    right.plot(*curve(log, "val_accuracy"), "o-", color=color, label=name)
    right.axhline(0.5, color=GRAY, linestyle=":", label="guessing")
    right.set(title="… and most of what can be predicted is", xlabel="step", xlim=(0, None))
    right.set_ylabel("right on held-out pairs")
    right.yaxis.set_major_formatter(percent)
    for axis in (left, right):
        axis.legend()
    losses, accuracies = ([*curve(log, f"val_{key}")[1]] for key in ("loss", "accuracy"))
    show_figure(
        f"Left, loss over steps: on held-out pairs from {losses[0]:.2f} to {losses[-1]:.2f}. Right, "
        f"accuracy: from {accuracies[0]:.0%} to {accuracies[-1]:.0%}; any model's best is {best:.0%}."
    )


def calibration_picture(rows):
    """Rows (how sure, how often right, pairs) against the diagonal."""
    sure, right, n = np.array(rows).T
    fig, axis = plt.subplots(figsize=(5, 2.6))
    axis.plot([0.5, 1], [0.5, 1], color="black", linestyle="--", label="as often right as it is sure")
    error = np.sqrt(sure * (1 - sure) / n)
    label = "held-out pairs, in bins (± one standard error)"
    axis.errorbar(sure, right, error, fmt="o", capsize=3, color=ORANGE, label=label)
    said = ", ".join(f"{s:.0%} sure and {r:.0%} right" for s, r in zip(sure, right))
    axis.set(title="It is right about as often as it is sure", xlabel="how sure", ylabel="how often right")
    axis.xaxis.set_major_formatter(percent)
    axis.yaxis.set_major_formatter(percent)
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    show_figure(f"Points near the diagonal, how sure and how often right: {said}.")


def climbing_picture(curves, best):
    """REINFORCE {baseline: mean rewards (climbs, steps)}: means, and ± one standard deviation."""
    fig, axis = plt.subplots()
    said = []
    for (name, climbs), color, style in zip(curves.items(), (GRAY, ORANGE, GREEN), (":", "--", "-")):
        mean, spread = climbs.mean(0), climbs.std(0)
        axis.fill_between(range(len(mean)), mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
        axis.plot(mean, color=color, linestyle=style, label=name)
        said.append(f"{name} {mean[-1]:.2f} ± {spread[-1]:.2f}")
    axis.axhline(best, color="black", linewidth=1, label=f"best possible, {best:.2f}")
    axis.set(title="The less noise, the surer the climb, and the higher in the end", xlabel="step")
    axis.set_ylabel("mean reward")
    axis.legend()
    show_figure(f"Lines with bands, mean reward over steps. At the end: {', '.join(said)}.")


def clip_picture(policy_loss):
    """PPO's loss of one token over its ratio, for an advantage of +1 and of −1."""
    ratio, one = torch.linspace(0.4, 1.7, 200), torch.ones(1, 1).bool()
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), sharey=False)
    texts = {1.0: ("has risen enough:\nno push", 1.45, "still pushed up", 0.68)}
    texts[-1.0] = ("has fallen enough:\nno push", 0.6, "still pushed down", 1.4)
    for axis, (A, (flat, x_flat, steep, x_steep)) in zip(axes, texts.items()):
        losses = [policy_loss(x.log().view(1, 1), torch.zeros(1, 1), A * one.float(), one)[0] for x in ratio]
        axis.plot(ratio, losses, color="black")
        low, high = (1.2, 1.7) if A > 0 else (0.4, 0.8)
        axis.axvspan(low, high, color=GRAY, alpha=0.2)
        axis.axvline(1, color=GRAY, linestyle=":")
        y = np.mean(losses)
        axis.text(x_flat, y, flat, ha="center", fontsize=8)
        axis.text(x_steep, y, steep, ha="center", fontsize=8, color=GREEN)
        axis.set(title=f"advantage {A:+.0f}", xlabel="ratio ρ = π / π_old", ylabel="loss")
    fig.suptitle("The clip stops a push that goes on, never one that brings a token back", fontsize=10)
    show_figure(
        "Two bent lines, the loss of a token over its ratio. Advantage +1: it falls up to a ratio of 1.2, "
        "and is flat from there on. Advantage −1: it is flat up to 0.8, and rises from there on."
    )


def ppo_picture(log):
    """Four figures of a run of PPO over its iterations."""
    fig, axes = plt.subplots(2, 2, figsize=(7.5, 5), sharex=True)
    panels = [
        (("reward", "objective"), "It earns more of the learned score …", "mean over answers"),
        (("kl",), "… and leaves the reference", "KL (nats per answer)"),
        (("entropy",), "It writes with less variety", "entropy (nats per token)"),
        (("explained_variance",), "The critic learns to foresee", "explained variance"),
    ]
    for axis, (names, title, label) in zip(axes.flat, panels):
        for name, style in zip(names, ("-", "--")):
            said = {"objective": "reward − β KL"}.get(name, name)
            axis.plot(*curve(log, name), style, color=ORANGE, label=said)
        axis.set(title=title, ylabel=label)
    axes[0, 0].legend()
    axes[1, 1].axhline(0, color=GRAY, linestyle=":")
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    ends = [(name, curve(log, name)[1]) for names, *_ in panels for name in names]
    said = ", ".join(f"{name} from {values[0]:.2f} to {values[-1]:.2f}" for name, values in ends)
    show_figure(f"Four panels over iterations: {said}.")


@torch.no_grad()
def credit_table(reward_model, critics, tokenizer, prompt, answer):
    """The advantage of each token of an answer by each critic {name: network}, where nobody pays KL."""
    tokens, mask, start = pad_rows([tokenizer.encode(prompt)], [tokenizer.encode(answer) + [tokenizer.eos]])
    score, zero = final_scores(reward_model, tokens, mask, start), torch.zeros(tokens.shape)
    rewards = ppo.token_rewards(score, zero, zero, mask, 0.0)
    values = [token_values(critic, tokens, mask, start) for critic in critics.values()]
    print(f"\n{answer.strip():31}score {score.item():5.2f}")
    print(f"{'':11}" + "".join(f"{'critic ' + name:>23}" for name in critics))
    print("token      " + "    expected  advantage" * len(critics))
    for t in mask[0].nonzero().flatten().tolist():
        print(f"{tokenizer.decode(tokens[0, t : t + 1]) or ' (EOS)':11}", end="")
        print("".join(f"{v[0, t]:12.2f}{ppo.gae(rewards, v, mask)[0, t]:11.2f}" for v in values))


def chase_picture(chased):
    """{β: [(learned scores, judge's scores, KL) of each set of pairs]}: thin, and their mean, thick."""
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.2))
    for (beta, some), color, style in zip(chased.items(), (RED, ORANGE), ("-", "--")):
        for axis, lines in zip(axes, zip(*[run[:2] for run in some])):
            at = np.arange(1, len(lines[0]) + 1)
            for line in lines:
                axis.plot(at, line, style, color=color, linewidth=0.7, alpha=0.6)
            axis.plot(at, np.mean(lines, axis=0), style, color=color, linewidth=2.5, label=f"β = {beta}")
    axes[0].set(title="The learned score keeps rising …", ylabel="learned score, rise since the start")
    axes[1].set(title="… and without a penalty people like it less", ylabel="judge's score (4 is perfect)")
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.legend()
    ends = [
        f"β = {beta}: learned score up by {np.mean([run[0][-1] for run in some]):.1f}, "
        f"judge's at {np.mean([run[1][-1] for run in some]):.1f}"
        for beta, some in chased.items()
    ]
    show_figure(
        f"Thin lines over iterations, one for each set, and their means. At the end {'; '.join(ends)}."
    )


def pipeline_picture():
    """Both roads from the same pairs: files, networks, and which of them learn."""
    fig, axis = plt.subplots(figsize=(7.5, 3.4))
    style = {
        "learns": {"facecolor": "#cfe3f7", "edgecolor": BLUE, "linewidth": 1.5},
        "frozen": {"facecolor": "#e3e3e3", "edgecolor": GRAY, "linewidth": 1.5},
        "data": {"facecolor": "white", "edgecolor": "black", "linewidth": 0.8},
    }

    def box(x, y, text, kind):
        look = style[kind] | {"boxstyle": "round,pad=0.35"}
        axis.text(x, y, text, ha="center", va="center", fontsize=8, bbox=look, zorder=3)

    def arrow(start, end, text="", shift=0.0):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"}, zorder=1)
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + shift
        axis.text(x, y, text, ha="center", va="center", fontsize=7.5, bbox=dict(fc="white", ec="none", pad=1))

    box(0.6, 5, "text", "data")
    box(2.7, 5, "language model\npretrain.py", "learns")
    box(5.3, 5, "pairs: people choose\nthe better of two answers", "data")
    box(7.6, 7.6, "reward model\nreward.py", "learns")
    box(10.9, 7.6, "policy and critic\nppo.py", "learns")
    box(10.9, 5.2, "reward model,\nreference", "frozen")
    box(10.9, 2.4, "policy\ndpo.py", "learns")
    box(7.6, 1.2, "reference", "frozen")
    arrow((0.95, 5), (1.65, 5))
    arrow((3.75, 5), (4.0, 5))
    arrow((5.6, 5.6), (6.8, 7.4))
    arrow((8.2, 7.1), (9.95, 5.5), "the same, frozen")
    arrow((8.4, 7.7), (9.65, 7.7), "a copy:\ncritic", 0.6)
    arrow((10.9, 5.9), (10.9, 7.0), "score, KL")
    arrow((5.9, 4.4), (10.1, 2.6), "the pairs themselves", 0.0)
    arrow((8.2, 1.3), (10.1, 2.1), "once", 0.1)
    axis.text(5.6, 8.4, "RLHF", color=ORANGE, fontsize=12, weight="bold")
    axis.text(5.6, 2.2, "DPO", color=BLUE, fontsize=12, weight="bold")
    axis.set(xlim=(0, 12.2), ylim=(0.4, 9))
    axis.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, **style[kind]) for kind in style]
    fig.legend(handles, ("learns here", "frozen", "data"), loc="outside lower center", ncols=3)
    axis.set_title("One beginning, two roads: RLHF learns three networks, DPO one")
    show_figure(
        "A diagram. Text makes a language model, its answers make pairs. Above, RLHF: a reward "
        "model is learned from them; frozen, with the reference, it trains policy and critic. Below, DPO: "
        "the pairs themselves train the policy; the frozen reference is asked once."
    )


def dpo_picture(log):
    """DPO's loss, and the implicit rewards of held-out answers, over the steps."""
    log = [
        {"step": 0, "loss": np.log(2), "val_loss": np.log(2), "chosen": 0, "rejected": 0, "margin": 0},
        *log,
    ]
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.2))
    left.plot(*curve(log, "loss"), color=BLUE, alpha=0.4, label="training batch")
    left.plot(*curve(log, "val_loss"), "o-", color=BLUE, label="held-out pairs")
    left.axhline(np.log(2), color=GRAY, linestyle=":", label="guessing, log 2")
    left.set(title="The surprise at the choices falls", xlabel="step", ylabel="loss (nats per pair)")
    for name, color, style in (("margin", "black", "o-"), ("chosen", BLUE, "^--"), ("rejected", RED, "v:")):
        right.plot(*curve(log, name), style, color=color, label=name, markersize=4)
    right.axhline(0, color=GRAY, linewidth=0.8)
    right.set(title="Rejected answers lose more than chosen ones", xlabel="step")
    right.set_ylabel("implicit reward, mean")
    for axis in (left, right):  # below, where they cover nothing
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1)
    show_figure(
        f"Left, loss over steps: from log 2 to {log[-1]['val_loss']:.2f} on held-out pairs. Right, implicit "
        f"rewards there: chosen end at {log[-1]['chosen']:.2f}, rejected at {log[-1]['rejected']:.2f}, the "
        f"margin at {log[-1]['margin']:.2f}."
    )


def theorem_picture(reference, ideal, found, reward, implicit):
    """Five answers: the probabilities that DPO found, and the implicit reward of what it found."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.4))
    at = np.arange(len(reference))
    left.bar(at - 0.27, reference, 0.27, color="#d9d9d9", edgecolor=GRAY, label="reference")
    left.bar(at, ideal, 0.27, color="black", label="ideal policy (eq. 4)")
    left.bar(at + 0.27, found, 0.27, color=BLUE, hatch="//", edgecolor="white", label="what DPO found")
    left.set(title="DPO finds the ideal policy …", xlabel="answer", ylabel="probability")
    left.yaxis.set_major_formatter(percent)
    constant = np.mean(np.array(implicit) - np.array(reward))
    ends = np.array([min(reward) - 0.1, max(reward) + 0.1])
    right.plot(ends, ends + constant, color="black", linestyle="--", label="slope 1")
    right.scatter(reward, implicit, color=BLUE, zorder=3, label="the five answers")
    right.set(title="… and with it the true reward", xlabel="true reward r")
    right.set_ylabel("implicit reward β log(π / π_ref)")
    for axis in (left, right):  # below, where they cover nothing
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1)
    show_figure(
        "Left, bars: for each of five answers what DPO found is as high as the ideal policy. Right: five "
        "points on a line of slope 1, the implicit reward over the true one."
    )


def losses_picture(paths):
    """Where each loss takes the margin of pairs that all agree: {label: (steps, margins in nats)}."""
    fig, axis = plt.subplots()
    looks = zip(paths.items(), (BLUE, ORANGE, GREEN, RED, GRAY), ("o-", "s--", "^-.", "v:", "D-"))
    for (label, (steps, margins)), color, style in looks:
        axis.plot(steps, margins, style, color=color, label=label, markersize=4)
    axis.set(title="1,000 equal labels: DPO's margin has no end, the others' have", xlabel="step")
    axis.set(xscale="log", ylabel="log-ratio, chosen − rejected (nats)")
    fig.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    ends = ", ".join(f"{label} {margins[-1]:.1f}" for label, (_, margins) in paths.items())
    show_figure(
        f"Lines: the margin over steps, on a logarithmic axis. At the end: {ends}; only DPO's still rises."
    )


def slopes_picture(truth, learned):
    """Differences in score, chosen − rejected: the judge's against each scorer's {name: differences}."""
    fig, axes = plt.subplots(1, len(learned), figsize=(7.5, 3.6), sharex=True, sharey=True)
    for axis, (name, values), color in zip(axes, learned.items(), (ORANGE, BLUE)):
        axis.scatter(truth, values, s=6, alpha=0.3, color=color, label="held-out pairs")
        axis.axline((0, 0), slope=1, color="black", linestyle="--", label="slope 1: as the judge")
        axis.set(title=name, xlabel="judge: chosen − rejected (points)")
        axis.legend(loc="upper left")
    axes[0].set_ylabel("learned: chosen − rejected")
    said = [f"{name}: correlation {np.corrcoef(v, truth)[0, 1]:.2f}" for name, v in learned.items()]
    show_figure(
        f"Two clouds of points about a rising line, learned differences over the judge's. {'; '.join(said)}."
    )


def few_picture(frontier, all_pairs, few, beta):
    """Score over KL: DPO on few pairs {β: [answers at each stage]}, beside the frontier (KLs, scores)."""
    fig, axis = plt.subplots(figsize=(7, 3.4))
    figures = lambda answers: (answers[2].mean(), answers[1].mean())  # KL and score
    kls, best = frontier
    farthest = max(figures(answers)[0] for some in few.values() for answers in some)
    axis.plot(
        [*kls, max(kls[-1], farthest)], [*best, best[-1]], color="black", label="best possible at this KL"
    )
    axis.plot(*figures(all_pairs), "*", color=BLUE, markersize=12, label=f"all pairs, β = {beta}")
    for (b, answers), color, style in zip(few.items(), (BLUE, RED), ("o-", "s--")):
        axis.plot(*zip(*map(figures, answers)), style, color=color, label=f"forty pairs, β = {b}: on the way")
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set(
        title="Forty pairs, seen too often: farther away, and no better",
        ylabel="judge's score (4 is perfect)",
    )
    axis.set(xlabel="KL from the reference (nats per answer, square-root axis)", xlim=(0, farthest * 1.1))
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    said = [
        f"β = {b}: " + ", ".join(f"{score:.1f} at {kl:.1f} nats" for kl, score in map(figures, some))
        for b, some in few.items()
    ]
    show_figure(
        f"Lines below a curve, the best possible; judge's score at KL. Forty pairs, {'; '.join(said)}."
    )


# ----------------------------------------------------------------------------------------------------
# Notebooks 04 and 05. Arrays of figures have one row for each seed; error bars are one standard error.


def mean_and_error(x):
    """Over seeds, the first axis: the mean and its standard error."""
    x = np.asarray(x, dtype=float)
    return x.mean(0), x.std(0, ddof=1) / np.sqrt(len(x))


def draw_frontier(axis, frontiers, lines, title, farthest):
    """Score over KL: the optimum, from the frontiers (points of (KL, score)) of all seeds, and policies.

    `lines` is {label: (kls, scores, style, texts)}; kls and scores are (seeds, points), and a text stands
    beside each point that has one.
    """
    ink = plt.rcParams["text.color"]
    grid = np.linspace(0, farthest**0.5, 100) ** 2  # dense where the line is steep
    best, error = mean_and_error([np.interp(grid, *np.transpose(points)) for points in frontiers])
    axis.fill_between(grid, best - error, best + error, color=ink, alpha=0.15)
    axis.plot(grid, best, color=ink, label="best possible at this KL")
    for label, (kls, scores, style, texts) in lines.items():
        (x, x_error), (y, y_error) = mean_and_error(kls), mean_and_error(scores)
        axis.errorbar(x, y, y_error, x_error, label=label, elinewidth=0.7, markersize=5, **style)
        for text, at in zip(texts, zip(x, y)):
            axis.annotate(text, at, (5, -10), textcoords="offset points", fontsize=8, color=style["color"])
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set(title=title, xlabel="KL from the pretrained model (nats per answer, square-root axis)")
    ticks = (0, 0.1, 0.5, 1, 2, 4) if farthest < 9 else (0, 1, 4, 9, 25, 49, 81, 121)
    axis.set(xlim=(0, farthest), xticks=[x for x in ticks if x <= farthest])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("judge's score (4 is perfect)")


def frontier_picture(frontiers, lines, title, path=None, farthest=2.2):
    """One such picture with its legend; also into files."""

    def draw():
        fig, axis = plt.subplots(figsize=(5.6, 4))
        draw_frontier(axis, frontiers, lines, title, farthest)
        fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return fig

    means = {label: zip(np.mean(kls, 0), np.mean(scores, 0)) for label, (kls, scores, *_) in lines.items()}
    said = lambda points: ", ".join(f"{y:.2f} at {x:.2f}" for x, y in points)
    alt = ". ".join(f"{label}: {said(points)}" for label, points in means.items())
    in_both_lights(draw, path, f"Score over KL, below a line of the best possible. {alt}.")


def gap_picture(rows, title):
    """Differences in share {label: (one a seed, color)}, as points and their mean, from the line at zero."""
    fig, axis = plt.subplots(figsize=(7.5, 0.8 + 0.28 * len(rows)))
    for y, (values, color) in enumerate(rows.values()):
        axis.plot([0, np.mean(values)], [y, y], color=color, linewidth=5, alpha=0.5, solid_capstyle="butt")
        axis.plot(values, [y] * len(values), "o", color=color, markersize=4)
        axis.plot(np.mean(values), y, "D", color="black", markersize=4)
    axis.axvline(0, color=BLUE, linewidth=2)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(percent)
    axis.set(title=title, xlabel="share of the optimal gain, minus DPO's on the same seed (diamonds: means)")
    said = ", ".join(f"{label} {np.mean(values):+.1%}" for label, (values, _) in rows.items())
    show_figure(f"A point for each seed, the difference in share from DPO; the means: {said}.")


def law_picture(margins, curves, title, path=None):
    """Share of the ideal policy over the points taken, {words: (seeds, points)}: thin; the mean: thick."""

    def draw():
        fig, axis = plt.subplots(figsize=(5.6, 3.2))
        ink = plt.rcParams["text.color"]
        looks = {"all": (ink, "o", "-"), "names": (GREEN, "s", "--"), "things": (RED, "^", ":")}
        for what, shares in curves.items():
            color, marker, style = looks[what]
            axis.plot(margins, shares.T, style, color=color, linewidth=0.7, alpha=0.5)
            look = {"color": color, "marker": marker, "linewidth": 2.5, "markersize": 5}
            axis.plot(
                margins,
                shares.mean(0),
                style,
                **look,
                label=f"for {what}" + " hidden words" * (what == "all"),
            )
        axis.set(title=title, xlabel="points taken for each hidden wrong word (the judge takes 2)")
        axis.set_ylabel("share of the optimal gain, 1 nat")
        axis.yaxis.set_major_formatter(percent)
        fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return fig

    means = {what: zip(margins, shares.mean(0)) for what, shares in curves.items()}
    said = lambda points: ", ".join(f"{y:.1%} at {x:g}" for x, y in points)
    alt = ". ".join(f"For {what}: {said(points)}" for what, points in means.items())
    in_both_lights(draw, path, f"Lines, share over points taken. {alt}.")


def dose_picture(found, title):
    """{pairs added: [figures of each seed]}: margins for a thing and a name, and what they are worth."""
    fig, axes = plt.subplots(1, 3, figsize=(7.5, 3.2))
    markers = "osD^v"
    for axis, key in zip(axes, ("another thing", "another name", None)):
        for i, marker in enumerate(markers):
            some = [figures[i] for figures in found.values()]
            y = [x["faults"]["POST"][key]["margin"] if key else x["ideal"]["share"] for x in some]
            axis.plot(range(len(found)), y, f"{marker}-", color=f"C{i}", markersize=4, linewidth=1)
        axis.set_xticks(range(len(found)), [f"{n // 1000}k" if n else "0" for n in found])
        axis.set_xlabel("pairs added")
        axis.set_title(f"margin: {key}" if key else "ideal policy: share")
    axes[0].set_ylabel("points (the judge: 2)")
    axes[2].yaxis.set_major_formatter(percent)
    fig.suptitle(f"{title} (a line for each seed)", fontsize=10)
    said = lambda n: ", ".join(f"{figures['ideal']['share']:.1%}" for figures in found[n])
    alt = ". ".join(f"With {n:,} pairs added: {said(n)}" for n in found)
    show_figure(f"Three panels of lines over pairs added, the third being the ideal policy's share. {alt}.")


def draw_runs(directories, path):
    """The metrics of finished runs, a panel each and a line for each run, into a picture."""
    runs = {str(directory): read_metrics(directory)[0] for directory in directories}
    names = list(
        dict.fromkeys(name for log in runs.values() for line in log for name in line if name != "step")
    )
    fig, axes = plt.subplots(math.ceil(len(names) / 3), 3, figsize=(10, 2.2 * math.ceil(len(names) / 3)))
    for axis, name in itertools.zip_longest(axes.flat, names):
        axis.set_visible(name is not None)
        for i, (label, log) in enumerate(runs.items()):
            if any(name in line for line in log):
                look = {"color": f"C{i}", "linestyle": ("-", "--", ":", "-.")[i % 4], "marker": "."}
                axis.plot(*curve(log, name), label=label, **look)
        axis.set_title(name)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("python notebooks/plots.py DIR …: draw the metrics of these runs into runs/metrics.png")
    draw_runs(sys.argv[1:], Path("runs/metrics.png"))
    print("runs/metrics.png")
