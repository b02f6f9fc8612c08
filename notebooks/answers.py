"""The answers to the exercises, computed, so that they do not stand beside the questions."""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F

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


ANSWERS = {  # a number or several, or what they must satisfy
    "pretraining 1": lambda: math.log(24),
    "pretraining 2": lambda: judge(POST, " My captain Hugo lost my soup."),
    "pretraining 3": lambda: -sum(p * math.log(p) for p in (0.5, 0.25, 0.25)),
    "rlhf 1": climb,
    "rlhf 2": clipped,
    "rlhf 3": lambda: 0.4 * 8 * 0.15,
    "rlhf 5": lambda: lambda kl: kl < 0.5,
    "dpo 1": lambda: 0.5 * math.log(10),
    "dpo 2": lambda: math.log(1 + math.exp(-0.5 * (3 - 1))),
    "dpo 3": lambda: ideal([0.7, 0.2, 0.1], [0, 1, 2], 0.5)[2],
    "dpo 4": lambda: -0.5 / (1 + math.exp(0.5 * (2 - -1))),
    "race 1": lambda: math.log(4) - 3 / 4,
    "race 2": lambda: (3.0 - 1.6) / (3.6 - 1.6),
    "race 3": lambda: 3 / math.sqrt(2.5 / 5),
    "roads 1": lambda: ideal([0.5, 0.3, 0.2], [1, 0, 0], 0.5)[2],
    "roads 2": lambda: (1 / (1 + math.exp(-4)) + 1 / (1 + math.exp(1))) / 2,
    "checked 3": lambda: (7 / 8) / math.sqrt(((7 / 8) ** 2 + 7 * (1 / 8) ** 2) / 7),
    "checked 4": lambda: 0.6**4 + 0.4**4,
    "checked 6": lambda: lambda both: both[0] > 0.9 and both[1] > 0.4,  # share of guesses, pass@1
}


def check(name, answer):
    """Say whether an answer is right, to one in a hundred."""
    truth = ANSWERS[name]()
    if answer is None or answer == (None, None):
        print(f"{name}: no answer yet")
    elif truth(answer) if callable(truth) else np.allclose(answer, truth, rtol=0.01, atol=1e-6):
        print(f"{name}: right")
    else:
        print(f"{name}: not yet")


def reinforce_loss(log_probs, rewards):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return -((rewards - others) * log_probs).mean()


def next_token_loss(logits, targets):
    return F.cross_entropy(logits, targets)


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    return -F.logsigmoid(beta * (chosen - reference_chosen - rejected + reference_rejected)).mean()


TRIALS = {  # each function, and what it is tried on
    "reinforce_loss": (
        reinforce_loss,
        lambda g: (torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g)),
    ),
    "next_token_loss": (
        next_token_loss,
        lambda g: (torch.randn(6, 9, generator=g), torch.randint(9, (6,), generator=g)),
    ),
    "dpo_loss": (dpo_loss, lambda g: (*(3 * torch.randn(4, 8, generator=g) - 9), 0.3)),
}


def check_function(name, yours):
    """Compare a function with the right one, and its gradient with the right gradient, on random numbers."""
    right, draw = TRIALS[name]
    found = []
    for function in (yours, right):
        arguments = draw(torch.Generator().manual_seed(1))
        arguments[0].requires_grad_()
        loss = function(*arguments)
        if loss is None:
            return print(f"{name}: not written yet")
        (gradient,) = torch.autograd.grad(torch.as_tensor(loss), arguments[0])
        found.append((float(loss), gradient))
    if abs(found[0][0] - found[1][0]) > 1e-4 * abs(found[1][0]):
        print(f"{name}: the loss is {found[0][0]:.4f}, and should be {found[1][0]:.4f}")
    elif not torch.allclose(found[0][1], found[1][1], atol=1e-5):
        print(f"{name}: the loss is right, and its gradient is not")
    else:
        print(f"{name}: right, and so is its gradient")


def group_advantages(rewards):
    return ppo.group_advantages(rewards.flatten(), "grpo").view_as(rewards)


def pass_at_k(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def checker(prompt, response):
    total = str(sum(map(int, re.findall(r"\d", prompt))))
    return re.findall(r"-?\d+", response)[-1:] == [total] and "or" not in response.split()


SAID = "27; 25; 12 18 27; 25 or 27; 27 or 28; The sum is 27.; = 27; 12 18 27 or 26; 127; 12 27 18; 2 7; -27"
VALUES = {  # functions that give numbers, and what each is tried on
    "group_advantages": (
        group_advantages,
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
