import math

import numpy as np
import pytest
import torch

from ppo import CLIP, LAMBDA, gae, group_advantages, policy_loss, token_rewards, value_loss, whiten

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()


def test_gae_by_hand():
    """Two tokens, values 1 and 2, reward 0 and then 5."""
    advantages = gae(torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool())
    last = 5 - 2  # nothing comes after
    first = (0 + 2 - 1) + LAMBDA * last
    assert advantages.tolist() == [pytest.approx([first, last])]


def test_gae_equals_its_definition():
    """A_t = Σ_l λ^l δ_{t+l}, written out in float64, row by row, without the recursion."""
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 5) * MASK, torch.randn(4, 5)
    got = gae(rewards, values, MASK)
    for row in range(4):
        where = MASK[row].nonzero().flatten().tolist()
        r, v = rewards[row, where].double().numpy(), np.append(values[row, where].double().numpy(), 0)
        delta = r + v[1:] - v[:-1]
        expected = [sum(LAMBDA**l * delta[t + l] for l in range(len(r) - t)) for t in range(len(r))]
        assert got[row, where].tolist() == pytest.approx(expected, abs=1e-5)
    assert (got[~MASK] == 0).all()


def test_whitening_by_hand():
    x = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, -99.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    sd = math.sqrt((4 + 1 + 0 + 9) / 4)  # mean 3
    assert whiten(x, mask).flatten().tolist() == pytest.approx([-2 / sd, -1 / sd, 0, 0, 3 / sd, 0], abs=1e-5)


def test_every_token_pays_the_kl_and_the_last_earns_the_score():
    log_probs, reference = torch.full((4, 5), -1.0), torch.full((4, 5), -3.0)
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]), log_probs, reference, MASK, beta=0.5)
    assert rewards[0].tolist() == [0, -1, -1, 9, 0]  # likelier than under the reference, so it costs
    assert rewards[3].tolist() == [0, 39, 0, 0, 0]
    assert rewards[2].tolist() == [-1, -1, -1, -1, 29]


def test_kl_estimators_on_three_tokens():
    """k1 = log π − log π_ref, k2 = k1² / 2, k3 = exp(−k1) − 1 + k1, against the exact KL(π ‖ π_ref).

    The reward that `token_rewards` takes away, averaged over π's own tokens, is β KL with the right sign.
    """
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    exact = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    one = torch.ones(3, 1).bool()
    paid = -token_rewards(torch.zeros(3), policy.log()[:, None], reference.log()[:, None], one, beta=1.0)[
        :, 0
    ]
    assert (policy * paid).sum().item() == pytest.approx(exact, abs=1e-6)
    assert exact > 0 and paid[2] < 0  # the mean is positive, single ones need not be
    k2, k3 = paid**2 / 2, torch.exp(-paid) - 1 + paid
    assert (policy * k3).sum().item() == pytest.approx(exact, abs=1e-6) and (k3 >= 0).all()
    assert (policy * k2).sum().item() == pytest.approx(exact, rel=0.2)  # biased, but close


@pytest.mark.parametrize(
    "ratio, advantage, loss, moves",
    [
        (1.0, 2.0, -2.0, True),  # not moved yet
        (1.5, 2.0, -2.0 * (1 + CLIP), False),  # already likelier than the clip allows: stop
        (1.5, -2.0, 2.0 * 1.5, True),  # moved the wrong way: no clip protects it
        (0.5, -2.0, 2.0 * (1 - CLIP), False),
        (0.5, 2.0, -2.0 * 0.5, True),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, loss, moves):
    log_probs = torch.tensor([[math.log(ratio), 7.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    got, _ = policy_loss(log_probs, torch.zeros(1, 2), torch.tensor([[advantage, 7.0]]), mask)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert (log_probs.grad[0, 0] != 0) == moves and log_probs.grad[0, 1] == 0


@pytest.mark.parametrize(
    "value, loss",
    [
        (1.1, 0.5 * 0.9**2),  # within 0.2 of the old value 1: the plain squared error to the return 2
        (1.5, 0.5 * 0.8**2),  # moved towards the return by more: counted as 1.2
        (0.5, 0.5 * 1.5**2),  # moved away by more: the larger error counts
    ],
)
def test_clipped_value_loss_by_hand(value, loss):
    one = lambda x: torch.tensor([[x]])
    assert value_loss(one(value), one(1.0), one(2.0), one(True)).item() == pytest.approx(loss, rel=1e-5)


def test_group_advantages_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    rloo = group_advantages(returns, "rloo")
    assert rloo[:4].tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])
    sd = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert group_advantages(returns, "grpo")[:4].tolist() == pytest.approx(
        [-2 / sd, -1 / sd, 0, 3 / sd], abs=1e-3
    )
    assert rloo[4:].tolist() == [0, 0, 0, 0]  # equal answers teach nothing


@pytest.mark.parametrize("kind", ["gae", "rloo", "grpo"])
def test_a_bandit_reaches_the_known_optimum(kind):
    """One prompt, two possible one-token answers: PPO must end at π* ∝ π_ref exp(r / β)."""
    torch.manual_seed(0)
    reference, reward, beta = torch.tensor([0.7, 0.3]), torch.tensor([0.0, 1.0]), 0.5
    optimum = reference * (reward / beta).exp()
    optimum /= optimum.sum()
    logits = reference.log().clone().requires_grad_()
    value = torch.zeros(1, requires_grad=True)  # the critic: one number
    optimizer = torch.optim.Adam([logits, value], lr=0.02)
    mask = torch.ones(256, 1).bool()
    for _ in range(150):
        with torch.no_grad():
            actions = torch.multinomial(logits.softmax(0), 256, replacement=True)
            old = logits.log_softmax(0)[actions][:, None]
        rewards = token_rewards(reward[actions], old, reference.log()[actions][:, None], mask, beta)
        if kind == "gae":
            old_values = value.detach().expand(256, 1)
            advantages = gae(rewards, old_values, mask)
            returns, advantages = advantages + old_values, whiten(advantages, mask)
        else:
            advantages = group_advantages(rewards.sum(1), kind)[:, None]
        for _ in range(2):
            loss, _ = policy_loss(logits.log_softmax(0)[actions][:, None], old, advantages, mask)
            if kind == "gae":
                loss = loss + value_loss(value.expand(256, 1), old_values, returns, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    policy = logits.detach().softmax(0)
    assert (policy * (policy / optimum).log()).sum() < 0.05
    assert (reference * (reference / optimum).log()).sum() > 0.3  # it was far away
