import math

import pytest
import torch

from dpo import dpo_loss, pair_log_probs
from model import GPT, Config

SIGMOID = lambda z: 1 / (1 + math.exp(-z))


def test_losses_by_hand():
    chosen, rejected = torch.tensor([0.3]), torch.tensor([-0.2])  # h = 0.5
    loss = lambda kind: dpo_loss(chosen, rejected, 0.4, kind).item()
    z = 0.4 * 0.5
    assert loss("dpo") == pytest.approx(-math.log(SIGMOID(z)))
    assert loss("cdpo") == pytest.approx(-0.9 * math.log(SIGMOID(z)) - 0.1 * math.log(SIGMOID(-z)))
    assert loss("ipo") == pytest.approx((0.5 - 1.25) ** 2)
    assert loss("hinge") == pytest.approx(0.8)
    assert dpo_loss(torch.tensor(9.0), torch.tensor(0.0), 0.4, "hinge") == 0  # margin over 1


def test_loss_and_gradient_of_three_tokens_by_hand():
    """One prompt, three possible one-token answers; "a" is chosen over "b". Everything on paper."""
    logits = torch.tensor([0.5, 0.1, -0.2], requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5]).log()  # its probabilities
    ratio = logits.log_softmax(0) - reference
    beta = 0.7
    loss = dpo_loss(ratio[0], ratio[1], beta)
    loss.backward()

    # The partition function of the softmax cancels: h = (0.5 − 0.1) − (log 0.2 − log 0.3).
    h = 0.4 - math.log(0.2 / 0.3)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-beta * h)), rel=1e-5)
    # Section 4: the gradient is −β σ(r̂_l − r̂_w) [∇ log π(y_w) − ∇ log π(y_l)], and for a softmax that
    # bracket is (1, −1, 0): the chosen logit up, the rejected one down, the third untouched.
    weight = beta * SIGMOID(-beta * h)
    assert logits.grad.tolist() == pytest.approx([-weight, weight, 0], abs=1e-6)


def test_a_pair_that_is_ranked_wrong_weighs_more():
    chosen = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    dpo_loss(chosen, torch.zeros(3), beta=1.0).sum().backward()
    assert (-chosen.grad).tolist() == pytest.approx([SIGMOID(3), 0.5, SIGMOID(-3)])


def test_loss_is_log_2_and_margin_0_where_policy_and_reference_are_the_same():
    assert dpo_loss(torch.zeros(5), torch.zeros(5), 0.5).tolist() == pytest.approx([math.log(2)] * 5)


def test_pair_log_probs_sum_over_the_answer_with_its_end():
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    pairs = [([1, 2, 3], [4, 10], [5, 6, 7, 10]), ([8], [9, 9, 10], [10])]  # 10 is EOS
    got = pair_log_probs(model, pairs, "cpu")
    for row, (prompt, *answers) in enumerate(pairs):
        for column, answer in enumerate(answers):
            expected = 0.0
            for t, token in enumerate(answer):
                logits = model(torch.tensor([prompt + answer[:t]]))[0, -1]
                expected += logits.log_softmax(-1)[token].item()
            assert got[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_the_theorem():
    """Minimising the DPO loss reaches the optimum of RLHF, without ever seeing the reward.

    Two prompts with five possible answers each, so everything can be written down as a table: the
    reference, the reward, and therefore the optimal policy π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x).
    The people's choices follow Bradley–Terry. The loss is not sampled: each pair of answers counts as
    often as it would come up. Its minimiser knows only the choices, yet it must be π*, and it must
    conceal the reward: β log(π / π_ref) = r, up to one constant per prompt, which no choice can show.
    """
    torch.manual_seed(0)
    beta = 0.5
    reference = torch.randn(2, 5, dtype=torch.float64).softmax(1)
    reward = torch.randn(2, 5, dtype=torch.float64)
    optimum = reference * (reward / beta).exp()
    optimum /= optimum.sum(1, keepdim=True)

    asked = reference[:, :, None] * reference[:, None, :]  # both answers come from the reference
    prefers = torch.sigmoid(reward[:, :, None] - reward[:, None, :])  # P(first is chosen)
    logits = reference.log().clone().requires_grad_()  # the policy starts as the reference
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        ratio = logits.log_softmax(1) - reference.log()
        first, second = ratio[:, :, None].expand(2, 5, 5), ratio[:, None, :].expand(2, 5, 5)
        loss = (asked * prefers * dpo_loss(first, second, beta)).sum() * 2
        loss.backward()
        return loss

    optimizer.step(closure)
    policy = logits.detach().softmax(1)
    kl = (optimum * (optimum / policy).log()).sum(1)
    assert kl.max() < 1e-3
    concealed = beta * (policy / reference).log()
    constant = concealed - reward  # −β log Z(x), the same for all answers to a prompt
    assert (constant - constant.mean(1, keepdim=True)).abs().max() < 1e-3
    log_z = ((reward / beta).exp() * reference).sum(1).log()
    assert torch.allclose(constant.mean(1), -beta * log_z, atol=1e-3)
    # And it is a real change: the reference itself is far from the optimum.
    assert (optimum * (optimum / reference).log()).sum(1).min() > 0.1
