"""The answers to the exercises, so that they do not stand beside the questions: numbers, and functions."""

import math
import re
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import dpo
import ppo
from data import judge
from start import POST


def clipped():
    """The loss of a token at ratio 1.5 and advantage −1, and whether its gradient is not 0."""
    log_prob, one = torch.tensor([[math.log(0.30)]], requires_grad=True), torch.ones(1, 1)
    loss, _ = ppo.policy_loss(log_prob, torch.tensor([[math.log(0.20)]]), -one, one.bool())
    loss.backward()
    return loss.item(), float(log_prob.grad.abs() > 0)


def climb():
    """The gradient of the mean reward with respect to the third logit."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    (logits.softmax(0) @ torch.tensor([1.0, 0.0, 2.0])).backward()
    return logits.grad[2].item()


def ideal(reference, rewards, beta):
    w = np.array(reference) * np.exp(np.array(rewards) / beta)
    return w / w.sum()


def keeps_most_without_things(found):
    """Whether a reward has most of the gain, and does not change when the thing does."""
    share, _, reward = found
    a, b = (reward(POST, f" Hugo lost my {thing} underwater.") for thing in ("kite", "hat"))
    return share > 0.9 and a == b


ANSWERS = {  # a number or several, or what they must satisfy
    "pretraining 1": lambda: math.log(24),
    "pretraining 2": lambda: judge(POST, " My captain Hugo lost my soup."),
    "pretraining 3": lambda: -sum(p * math.log(p) for p in (0.5, 0.25, 0.25)),
    "pretraining 6": lambda: lambda loss: loss > math.log(759) + 0.5,  # clearly more than a blind guess costs
    "rlhf 1": climb,
    "rlhf 2": clipped,
    "rlhf 3": lambda: 0.4 * 8 * 0.15,
    "rlhf 4": lambda: 1.1**8,
    "rlhf 10": lambda: lambda both: both[0] < 0.5 < both[1],  # KL; reward, which begins at about 0
    "dpo 1": lambda: 0.5 * math.log(10),
    "dpo 2": lambda: math.log(1 + math.exp(-0.5 * (3 - 1))),
    "dpo 3": lambda: ideal([0.7, 0.2, 0.1], [0, 1, 2], 0.5)[2],
    "dpo 4": lambda: -0.5 / (1 + math.exp(0.5 * (2 - -1))),
    "race 1": lambda: math.log(4) - 3 / 4,
    "race 2": lambda: (3.0 - 1.6) / (3.6 - 1.6),
    "race 3": lambda: 3 / math.sqrt(2.5 / 5),
    "race 4": lambda: 2 / 2**6,
    "roads 1": lambda: ideal([0.5, 0.5], [0.25, 0], 0.4)[0],
    "roads 2": lambda: (ideal([0.5, 0.5], [0.02, 0], 0.4)[0], ideal([0.5, 0.5], [0.5, 0], 0.4)[0]),
    "roads 3": lambda: lambda found: found[1] > found[2],  # hidden wrong words: its own, the blind judge's
    "roads 4": lambda: keeps_most_without_things,
    "checked 3": lambda: (7 / 8) / math.sqrt(((7 / 8) ** 2 + 7 * (1 / 8) ** 2) / 7),
    "checked 4": lambda: 0.6**4 + 0.4**4,
    "checked 6": lambda: lambda both: both[0] > 0.9 and both[1] > 0.4,  # share of guesses, pass@1
}


def check(name, answer):
    """Say whether an answer is right, to one in a hundred."""
    truth = ANSWERS[name]()
    if answer is None or isinstance(answer, tuple) and None in answer:
        return print(f"{name}: no answer yet")
    if callable(truth):
        right = truth(answer)
    else:
        right = np.shape(answer) == np.shape(truth) and np.asarray(answer).dtype.kind in "if"
        right = right and np.allclose(answer, truth, rtol=0.01, atol=1e-6)
    print(f"{name}: {'right' if right else 'not yet'}")


# ----------------------------------------------------------------------------------------------------
# Functions that readers write: the key to each


def next_token_loss(logits, targets):
    log_probs = logits - logits.logsumexp(1, keepdim=True)
    return -log_probs[torch.arange(len(targets)), targets].mean()


def sample_token(logits, temperature):
    return torch.multinomial((logits / temperature).softmax(1), 1).squeeze(1)


def reinforce_loss(log_probs, rewards, values, mask):
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    return -((to_come - values).detach() * log_probs * mask).sum(1).mean()


def policy_loss(log_probs, old_log_probs, advantages, mask):
    ratio = (log_probs - old_log_probs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -gain[mask].mean()


def gae(rewards, values, mask, lam):
    advantages, later, value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        later = (rewards[:, t] + value - values[:, t] + lam * later) * mask[:, t]
        value, advantages[:, t] = values[:, t] * mask[:, t], later
    return advantages


def group_advantages(returns, estimator):
    groups = returns.view(-1, 4)
    if estimator == "rloo":
        return (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def answer_ratios(log_probs, old_log_probs, mask):
    return ((log_probs - old_log_probs) * mask).sum(1).exp()


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    return -F.logsigmoid(beta * (chosen - reference_chosen - rejected + reference_rejected)).mean()


def simpo_loss(chosen, rejected, n_chosen, n_rejected, beta, gamma):
    return -F.logsigmoid(beta * (chosen / n_chosen - rejected / n_rejected) - gamma).mean()


def kto_loss(log_ratios, good, kl, beta):
    return (1 - torch.sigmoid(beta * torch.where(good, log_ratios - kl, kl - log_ratios))).mean()


# ----------------------------------------------------------------------------------------------------
# How they are checked: each is tried on random numbers, beside the scripts' own function where there is one


def ppo_gae(rewards, values, mask, lam):
    with patch.object(ppo, "LAMBDA", lam):
        return ppo.gae(rewards, values, mask)


def script_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    return dpo.dpo_loss(chosen - reference_chosen, rejected - reference_rejected, beta).mean()


def masked(g, n):
    """n times random numbers (5, 7), and a mask under which the five rows have unequal lengths."""
    lengths = torch.tensor([[7], [3], [1], [5], [6]])
    return *torch.randn(n, 5, 7, generator=g), torch.arange(7) < lengths


def targets(g, i):
    return torch.randn(6, 9, generator=g), torch.randint(9, (6,), generator=g)


def pairs(g, n):
    return [*3 * torch.randn(n, 8, generator=g) - 9]


TRIALS = {  # the right function, how many of its arguments may have a gradient, and what trial i draws
    "next_token_loss": (F.cross_entropy, 1, targets),
    "reinforce_loss": (reinforce_loss, 3, lambda g, i: masked(g, 3)),
    "policy_loss": (ppo.policy_loss, 1, lambda g, i: masked(g, 3)),
    "gae": (ppo_gae, 0, lambda g, i: (*masked(g, 2), (0.95, 0.0, 1.0)[i])),
    "group_advantages": (
        ppo.group_advantages,
        0,
        lambda g, i: (torch.randn(12, generator=g) + 1, ("rloo", "grpo", "grpo")[i]),
    ),
    "answer_ratios": (answer_ratios, 1, lambda g, i: masked(g, 2)),
    "dpo_loss": (script_dpo_loss, 2, lambda g, i: (*pairs(g, 4), 0.3)),
    "simpo_loss": (
        simpo_loss,
        2,
        lambda g, i: (*pairs(g, 2), *torch.randint(3, 12, (2, 8), generator=g), 2.0, 0.5),
    ),
    "kto_loss": (kto_loss, 1, lambda g, i: (pairs(g, 1)[0] + 9, torch.arange(8) % 3 > 0, 0.7, 0.5)),
}


def grade(name, yours):
    """What to say of a function that a reader wrote."""
    if name == "sample_token":
        return grade_sampler(yours)
    right, n, draw = TRIALS[name]
    for i in range(3):
        found = []
        for function in (yours, right):
            arguments = draw(torch.Generator().manual_seed(i), i)
            leaves = [x.requires_grad_() for x in arguments[:n]]
            result = function(*arguments)
            if result is None:
                return "not written yet"
            result = torch.as_tensor(result[0] if isinstance(result, tuple) else result)
            there = n and result.requires_grad
            gradients = torch.autograd.grad(result.sum(), leaves, allow_unused=True) if there else [None] * n
            gradients = [0 * x.detach() if dx is None else dx for x, dx in zip(leaves, gradients)]
            found.append((result.detach(), gradients))
        (result, gradients), (truth, true_gradients) = found
        if result.shape != truth.shape:
            return f"its shape is {(*result.shape,)}, and should be {(*truth.shape,)}"
        if not torch.allclose(result, truth, rtol=1e-4, atol=1e-5):
            one, other = (x.flatten()[(result - truth).abs().argmax()] for x in (result, truth))
            return f"it gives {one:.4f} where it should give {other:.4f}"
        if not all(torch.allclose(*both, atol=1e-5) for both in zip(gradients, true_gradients)):
            return "what it gives is right, and its gradient is not"
    return "right" + ", and so is its gradient" * (n > 0)


def grade_sampler(yours):
    """Four rows of logits, five thousand tokens of each, at three temperatures."""
    logits = torch.tensor(
        [[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0], [-5.0, 1.0, 1.0, 1.5], [9.0, 9.0, 7.0, 8.0]]
    )
    for temperature in (1.0, 0.5, 2.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokens = yours(logits.repeat(5000, 1), temperature)
        if tokens is None:
            return "not written yet"
        if tokens.shape != (20000,):
            return f"its shape is {(*tokens.shape,)} for 20000 rows, and should be (20000,)"
        shares = (tokens.view(5000, 4, 1) == torch.arange(4)).float().mean(0)  # of each row (4, 4)
        off = (shares - (logits / temperature).softmax(1)).abs().max()
        if off > 0.03:  # four standard errors
            return f"at temperature {temperature:g} it draws a token {off:.0%} too often or too rarely"
    return "right"


def check_function(name, yours):
    """Say whether a function is right, and its gradient, on random numbers."""
    print(f"{name}: {grade(name, yours)}")


def advantages_of_groups(rewards):
    return ppo.group_advantages(rewards.flatten(), "grpo").view_as(rewards)


def pass_at_k(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def checker(prompt, response):
    total = str(sum(map(int, re.findall(r"\d", prompt))))
    return re.findall(r"-?\d+", response)[-1:] == [total] and "or" not in response.split()


SAID = "27; 25; 12 18 27; 25 or 27; 27 or 28; The sum is 27.; = 27; 12 18 27 or 26; 127; 12 27 18; 2 7; -27"
VALUES = {  # functions that give numbers, and what each is tried on
    "group_advantages": (
        advantages_of_groups,
        [(torch.eye(4)[:3] * 2,), (torch.ones(2, 4),), (torch.randn(5, 4, generator=ppo.seeded("trial")),)],
    ),
    "pass_at_k": (pass_at_k, [(6, 2, 3), (8, 0, 4), (8, 5, 4), (32, 3, 8), (16, 16, 1)]),
    "checker": (
        checker,
        [("Sum: 8+4+6+9=", f" {said}") for said in SAID.split("; ")] + [("Sum: 1+0+0+1=", " 2")],
    ),
}


def check_values(name, yours):
    """Compare a function that gives numbers with the right one, on what it is tried on."""
    right, trials = VALUES[name]
    for arguments in trials:
        mine, truth = yours(*arguments), right(*arguments)
        if mine is None:
            return print(f"{name}: not written yet")
        if np.shape(mine) != np.shape(truth) or not np.allclose(mine, truth, atol=1e-4):
            return print(f"{name}: not yet; of {arguments} it makes {mine}, and should make {truth}")
    print(f"{name}: right")
