"""The exercises of notebooks 01 to 03: the keys pass; stubs as they stand, and usual mistakes, don't."""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

before = os.getcwd()
import answers  # noqa: E402

os.chdir(before)  # notebooks go to the folder of the scripts
KEYS = {name: getattr(answers, name) for name in (*answers.TRIALS, "sample_token")}


ASKED = [  # (page, code) of each cell that checks an answer
    (path.stem, "".join(cell["source"]))
    for path in sorted((ROOT / "notebooks").glob("0[123]*.ipynb"))
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code" and re.search(r"^ *check(_function)?\(", "".join(cell["source"]), re.M)
]


@pytest.mark.parametrize("name", KEYS)
def test_the_key_passes(name):
    assert answers.grade(name, KEYS[name]) in ("right", "right, and so is its gradient")


def test_every_page_asks_and_no_cell_passes_as_it_stands(capsys):
    """Executed with nothing filled in: a stub is "not written yet", a number "no answer yet"."""
    for _, source in ASKED:
        exec(source, {"check": answers.check, "check_function": answers.check_function, "torch": torch})
    said = capsys.readouterr().out.splitlines()
    assert all(line.endswith(("no answer yet", "not written yet")) for line in said)
    asked = {line.split(":")[0] for line in said}
    assert {*KEYS} <= asked
    of_runs = {name for name, truth in answers.ANSWERS.items() if callable(truth())}
    pages = ("pretraining", "rlhf", "dpo")
    assert {n for n in answers.ANSWERS if n.split()[0] in pages} - of_runs <= asked
    for page in {page for page, _ in ASKED}:
        calls = [
            re.findall(r"^ *check(?:_function)?\(", source, re.M) for where, source in ASKED if where == page
        ]
        assert len(sum(calls, [])) >= 4


@pytest.mark.parametrize("answer", [None, (None, None), [], (), "", math.nan, 1e9])
def test_an_empty_answer_is_not_right(capsys, answer):
    for name, truth in answers.ANSWERS.items():
        if not callable(truth()):
            answers.check(name, answer)
    assert "right" not in capsys.readouterr().out


def test_an_experiment_that_does_nothing_is_not_right(capsys):
    """A rate of 1e-9 leaves the loss at a blind guess's, the KL at 0 and the reward at 0."""
    answers.check("pretraining 6", math.log(759))
    answers.check("rlhf 10", (0.0, 0.0))
    assert capsys.readouterr().out == "pretraining 6: not yet\nrlhf 10: not yet\n"


def to_come(rewards, mask):
    return (rewards * mask).flip(1).cumsum(1).flip(1)


def clipped(x):
    return x.clamp(0.8, 1.2)


def backwards(advantage, mask, lam):
    """A_t = δ_t + λ A_{t+1}, from a table of δ."""
    result, later = torch.zeros_like(advantage), 0.0
    for t in reversed(range(advantage.shape[1])):
        result[:, t] = later = (advantage[:, t] + lam * later) * mask[:, t]
    return result


def shifted(values):
    return F.pad(values[:, 1:], (0, 1))


def groups(returns):
    return returns.view(-1, 4)


MISTAKES = {
    "next_token_loss": [
        lambda logits, y: -F.cross_entropy(logits, y),  # a sign
        lambda logits, y: F.cross_entropy(logits, y, reduction="sum"),  # a sum
        lambda logits, y: -logits[torch.arange(6), y].mean(),  # no normalization
        lambda logits, y: F.cross_entropy(logits, y) / math.log(2),  # bits
        lambda logits, y: F.cross_entropy(logits, y).item(),  # no gradient
    ],
    "sample_token": [
        lambda logits, t: logits.argmax(1),  # always the likeliest
        lambda logits, t: torch.multinomial(logits.softmax(1), 1)[:, 0],  # at temperature 1
        lambda logits, t: torch.multinomial((logits * t).softmax(1), 1)[:, 0],  # upside down
        lambda logits, t: torch.multinomial((logits / t).softmax(1), 1),  # a column
        lambda logits, t: torch.multinomial((logits / t).softmax(0).T, len(logits), True)[0],  # across rows
    ],
    "reinforce_loss": [
        lambda lp, r, v, m: ((to_come(r, m) - v).detach() * lp * m).sum(1).mean(),  # a sign
        lambda lp, r, v, m: -((to_come(r, m) - v).detach() * lp).sum(1).mean(),  # no mask
        lambda lp, r, v, m: -((to_come(r, m) - v) * lp * m).sum(1).mean(),  # the baseline learns, too
        lambda lp, r, v, m: -((r * m).sum(1, keepdim=True) - v).detach().mul(lp * m).sum(1).mean(),  # earlier
        lambda lp, r, v, m: -(to_come(r, m).detach() * lp * m).sum(1).mean(),  # no baseline
        lambda lp, r, v, m: -((to_come(r, m) - v).detach() * lp * m).sum() / m.sum(),  # mean over tokens
        lambda lp, r, v, m: -((r - v).detach() * lp * m).sum(1).mean(),  # its own reward only
    ],
    "policy_loss": [
        lambda lp, old, A, m: ((lp - old).exp() * A)[m].mean(),  # a sign, and no clip
        lambda lp, old, A, m: -((lp - old).exp() * A)[m].mean(),  # no clip
        lambda lp, old, A, m: -(clipped((lp - old).exp()) * A)[m].mean(),  # no minimum
        lambda lp, old, A, m: -torch.maximum((lp - old).exp() * A, clipped((lp - old).exp()) * A)[m].mean(),
        lambda lp, old, A, m: -torch.minimum((lp - old).exp() * A, clipped((lp - old).exp()) * A).mean(),
        lambda lp, old, A, m: -torch.minimum((lp - old).exp() * A, clipped((lp - old).exp()) * A)[m].sum(),
        lambda lp, old, A, m: -torch.minimum((lp / old) * A, clipped(lp / old) * A)[m].mean(),
    ],
    "gae": [
        lambda r, v, m, lam: backwards(r - v, m, lam),  # the next value left out
        lambda r, v, m, lam: backwards(v - r - shifted(v * m), m, lam),  # a sign
        lambda r, v, m, lam: backwards(r + shifted(v) - v, m, lam),  # a value after the end
        lambda r, v, m, lam: backwards(r + shifted(v * m) - v, m, 0.95),  # always this λ
        lambda r, v, m, lam: backwards(r + shifted(v * m) - v, m, 1 - lam),  # λ the wrong way round
        lambda r, v, m, lam: backwards(r + shifted(v * m) - v, m, lam) + v * m,  # returns
    ],
    "group_advantages": [
        lambda x, how: (groups(x) - groups(x).mean(1, keepdim=True)).flatten(),  # neither
        lambda x, how: x - x.mean(),  # over the batch
        lambda x, how: -answers.group_advantages(x, how),  # a sign
        lambda x, how: answers.group_advantages(x, "rloo"),  # no division
        lambda x, how: (  # RLOO's baseline for both
            answers.group_advantages(x, "rloo") / (groups(x).std(1, keepdim=True).repeat(1, 4).flatten())
        ),
        lambda x, how: answers.group_advantages(x.view(4, -1).T.flatten(), how),  # groups across
        lambda x, how: answers.group_advantages(x, how).view(-1, 4),  # shape
    ],
    "answer_ratios": [
        lambda lp, old, m: (lp - old).sum(1).exp(),  # no mask
        lambda lp, old, m: (((lp - old) * m).sum(1) / m.sum(1)).exp(),  # mean instead of sum
        lambda lp, old, m: ((lp - old).exp() * m).sum(1),  # sum instead of product
        lambda lp, old, m: ((old - lp) * m).sum(1).exp(),  # upside down
        lambda lp, old, m: ((lp - old).exp() * m).prod(1),  # times 0 after the end
        lambda lp, old, m: ((lp - old).detach() * m).sum(1).exp(),  # no gradient
    ],
    "dpo_loss": [
        lambda w, lo, rw, rl, b: -answers.dpo_loss(w, lo, rw, rl, b),  # a sign
        lambda w, lo, rw, rl, b: answers.dpo_loss(lo, w, rl, rw, b),  # winner and loser
        lambda w, lo, rw, rl, b: -F.logsigmoid(b * (w - lo)).mean(),  # no reference
        lambda w, lo, rw, rl, b: -F.logsigmoid(w - rw - lo + rl).mean(),  # no β
        lambda w, lo, rw, rl, b: -F.logsigmoid(b * (w - rw - lo + rl)).sum(),  # a sum
        lambda w, lo, rw, rl, b: (
            -F.logsigmoid(b * (w - rw - lo.detach() + rl)).mean()
        ),  # half of the gradient
        lambda w, lo, rw, rl, b: -F.logsigmoid(b * (w - lo + rw - rl)).mean(),  # the reference's sign
    ],
    "simpo_loss": [
        lambda w, lo, nw, nl, b, g: -F.logsigmoid(b * (w - lo) - g).mean(),  # sums
        lambda w, lo, nw, nl, b, g: -F.logsigmoid(b * (w / nw - lo / nl) + g).mean(),  # the margin's sign
        lambda w, lo, nw, nl, b, g: -F.logsigmoid(b * (w / nw - lo / nl)).mean(),  # no margin
        lambda w, lo, nw, nl, b, g: -F.logsigmoid(b * (w / nw - lo / nl - g)).mean(),  # β times the margin
        lambda w, lo, nw, nl, b, g: answers.simpo_loss(w, lo, nl, nw, b, g),  # the other's length
    ],
    "kto_loss": [
        lambda x, good, kl, b: answers.kto_loss(x, ~good, kl, b),  # upside down
        lambda x, good, kl, b: answers.kto_loss(x, good, 0.0, b),  # no KL
        lambda x, good, kl, b: answers.kto_loss(x, good, kl, 1.0),  # no β
        lambda x, good, kl, b: (1 - torch.sigmoid(b * (x - kl))).mean(),  # all are good
        lambda x, good, kl, b: -answers.kto_loss(x, good, kl, b) + 1,  # a sign
        lambda x, good, kl, b: answers.kto_loss(x, good, kl, b) * len(x),  # a sum
    ],
}
WRONG = [(name, i) for name, mistakes in MISTAKES.items() for i in range(len(mistakes))]


@pytest.mark.parametrize("name, i", WRONG)
def test_a_usual_mistake_does_not_pass(name, i):
    assert not answers.grade(name, MISTAKES[name][i]).startswith("right")


def test_there_are_mistakes_for_every_function():
    assert {*MISTAKES} == {*KEYS}


def test_right_by_hand():
    """Where no script has the function: three tokens, two pairs and two answers, worked out on paper."""
    one = torch.ones(1, 3).bool()
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    rewards, values = torch.tensor([[0.5, 0.0, 2.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    # 2.5 − 1, 2 − 1 and 2 − 1 times −1, −2 and −3, with a minus
    assert answers.reinforce_loss(log_probs, rewards, values, one).item() == pytest.approx(1.5 + 2 + 3)
    old = torch.tensor([[-1.5, -2.0, -2.0]])
    assert answers.answer_ratios(log_probs, old, one).item() == pytest.approx(math.exp(0.5 + 0 - 1))
    # Meng et al., eq. 6: β 2, γ 1, means −1 and −2: −log σ(2 · 1 − 1)
    pair = [torch.tensor([x]) for x in (-3.0, -8.0, 3.0, 4.0)]
    assert answers.simpo_loss(*pair, 2.0, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    # Ethayarajh et al., eq. 8 with both λ 1: σ of 0.5 (2 − 1) and of 0.5 (1 − (−1))
    both = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    expected = 1 - (1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(-1))) / 2
    assert answers.kto_loss(*both, 1.0, 0.5).item() == pytest.approx(expected)
