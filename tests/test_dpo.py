import json
import math
from pathlib import Path

import pytest
import torch
from conftest import call, copy, metrics

import dpo
from data import Tokenizer, read_preferences
from dpo import dpo_loss, pair_log_probs
from model import GPT, Config, load_model, seeded

LOSSES = ["dpo", "ipo", "cdpo", "hinge", "sft"]
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
    assert loss("sft") == pytest.approx(-0.3)  # the rejected answer does not count


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_of_each_loss(kind):
    torch.manual_seed(0)
    ratios = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda chosen, rejected: dpo_loss(chosen, rejected, 0.7, kind), ratios)


def test_sft_is_cross_entropy_on_the_chosen_answer():
    """Its gradient is that of the next-token loss, summed over the chosen answer, and of nothing else."""
    model = GPT(Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2), seeded(0))
    prompt, chosen, rejected = [1, 2, 3], [4, 10], [5, 6, 7, 10]
    log_probs = pair_log_probs(model, [(prompt, chosen, rejected)], "cpu")
    dpo_loss(*(log_probs - 5.0).unbind(1), 0.5, "sft").mean().backward()  # the reference is a constant
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(torch.tensor([prompt + chosen]))[0]
    torch.nn.functional.cross_entropy(logits[2:4], torch.tensor(chosen), reduction="sum").backward()
    for ours, theirs in zip(found, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


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


def slow_log_prob(model, prompt, answer):
    """Token by token, in float64, without padding or cache."""
    total = 0.0
    for t, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:t]]))[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
    return total


def test_pair_log_probs_sum_over_the_answer_with_its_end():
    model = GPT(Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2), seeded(0))
    pairs = [([1, 2, 3], [4, 10], [5, 6, 7, 10]), ([8], [9, 9, 10], [10])]  # 10 is EOS
    got = pair_log_probs(model, pairs, "cpu")
    for row, (prompt, *answers) in enumerate(pairs):
        for column, answer in enumerate(answers):
            assert got[row, column].item() == pytest.approx(slow_log_prob(model, prompt, answer), abs=1e-5)


def test_the_theorem():
    """Minimising the DPO loss reaches the optimum of RLHF, without ever seeing the reward.

    Two prompts with five possible answers each, so everything can be written down as a table: the
    reference, the reward, and therefore the optimal policy π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x).
    The people's choices follow Bradley–Terry. The loss is not sampled: each pair of answers counts as
    often as it would come up. Its minimiser knows only the choices, yet it must be π*, and it must
    have it as its implicit reward: β log(π / π_ref) = r, up to one constant per prompt, which no choice
    shows.
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
    implicit = beta * (policy / reference).log()
    constant = implicit - reward  # −β log Z(x), the same for all answers to a prompt
    assert (constant - constant.mean(1, keepdim=True)).abs().max() < 1e-3
    log_z = ((reward / beta).exp() * reference).sum(1).log()
    assert torch.allclose(constant.mean(1), -beta * log_z, atol=1e-3)
    # And it is a real change: the reference itself is far from the optimum.
    assert (optimum * (optimum / reference).log()).sum(1).min() > 0.1


# ----------------------------------------------------------------------------------------------------
# The script


def test_dpo_leaves_pairs_a_checkpoint_and_its_figures(home):
    pairs = read_preferences("runs/pretrain/preferences.jsonl")
    assert 250 < len(pairs) <= 300 and all(pair["chosen"] != pair["rejected"] for pair in pairs)
    final = metrics("runs/dpo")[-1]
    assert final["final"] is True and final["seconds"] > 0 and 0.5 < final["best_accuracy"] < 1
    sure = [max(pair["certainty"], 1 - pair["certainty"]) for pair in pairs[-(len(pairs) // 10) :]]
    assert final["best_accuracy"] == pytest.approx(sum(sure) / len(sure))


@pytest.mark.parametrize(
    "kind, first", [("dpo", math.log(2)), ("cdpo", math.log(2)), ("hinge", 1), ("ipo", 1), ("sft", 0)]
)
def test_the_first_loss_is_that_of_a_policy_equal_to_its_reference(home, kind, first):
    """With β = 1/2 the margin that ipo aims at is 1."""
    assert dpo.parser.get_default("beta") == 0.5
    call("dpo", "--loss", kind, "--steps", 1, "--out", f"runs/dpo-{kind}")
    assert metrics(f"runs/dpo-{kind}")[0]["loss"] == pytest.approx(first, abs=1e-5)


def test_the_held_out_figures_once_more_by_hand(home):
    """From the saved policy and the reference, pair by pair and token by token."""
    tokenizer, beta = Tokenizer.load("runs/dpo"), dpo.parser.get_default("beta")
    policy, reference = load_model("runs/dpo"), load_model("runs/pretrain")
    pairs = read_preferences("runs/pretrain/preferences.jsonl")
    implicit = {"chosen": [], "rejected": []}
    for pair in pairs[-(len(pairs) // 10) :]:
        prompt = tokenizer.encode(pair["prompt"])
        for which, rewards in implicit.items():
            answer = tokenizer.encode(pair[which]) + [tokenizer.eos]
            ratio = slow_log_prob(policy, prompt, answer) - slow_log_prob(reference, prompt, answer)
            rewards.append(beta * ratio)
    mean = lambda numbers: sum(numbers) / len(numbers)
    margins = [c - r for c, r in zip(implicit["chosen"], implicit["rejected"])]
    last = metrics("runs/dpo")[-2]
    assert last["chosen"] == pytest.approx(mean(implicit["chosen"]), abs=1e-4)
    assert last["rejected"] == pytest.approx(mean(implicit["rejected"]), abs=1e-4)
    assert last["margin"] == pytest.approx(mean(margins), abs=1e-4)
    assert last["val_accuracy"] == pytest.approx(mean([m > 0 for m in margins]))
    assert last["val_loss"] == pytest.approx(mean([math.log(1 + math.exp(-m)) for m in margins]), abs=1e-4)
    assert metrics("runs/dpo")[-1]["val_loss"] == last["val_loss"]
    assert abs(last["margin"]) > 1e-3  # or else all this says little


def test_one_pass_learns_from_every_pair_once_and_from_no_held_out_one(home, monkeypatch):
    seen, real = [], dpo.pair_log_probs

    def watch(model, pairs, device):
        seen.extend(pairs if torch.is_grad_enabled() else [])
        return real(model, pairs, device)

    monkeypatch.setattr(dpo, "pair_log_probs", watch)
    dpo.main(dpo.parser.parse_args(["--device", "cpu", "--batch-size", "16", "--out", "runs/dpo-pass"]))
    tokenizer = Tokenizer.load("runs/dpo-pass")
    pairs = read_preferences("runs/pretrain/preferences.jsonl")
    learned = pairs[: len(pairs) - len(pairs) // 10]
    texts = lambda pair: tuple(pair[key] for key in ("prompt", "chosen", "rejected"))
    assert sorted(tuple(map(tokenizer.decode, pair)) for pair in seen) == sorted(map(texts, learned))


def test_a_new_checkpoint_does_not_inherit_pairs(home):
    """They would be another model's answers."""
    copy("runs/dpo", "runs/rewritten")
    Path("runs/rewritten/preferences.jsonl").write_bytes(Path("runs/pretrain/preferences.jsonl").read_bytes())
    call("dpo", "--out", "runs/rewritten")
    assert not Path("runs/rewritten/preferences.jsonl").exists()
    assert Path("runs/rewritten/preferences.jsonl.old").exists()


def test_the_volunteers_choose_as_often_as_they_say(home):
    """`certainty` is the probability of the choice that was made, so it averages E[p² + (1 − p)²]."""
    sure = [json.loads(line)["certainty"] for line in open("runs/pretrain/preferences.jsonl")]
    expected = sum(p**2 + (1 - p) ** 2 for p in sure) / len(sure)
    spread = math.sqrt(sum((2 * p - 1) ** 2 * p * (1 - p) for p in sure)) / len(sure)
    assert abs(sum(sure) / len(sure) - expected) < 4 * spread


@pytest.mark.parametrize("kind, expected", [*zip(LOSSES, [math.log(2), 1, math.log(2), 1, 0])])
def test_the_held_out_loss_is_of_the_loss_that_was_chosen(home, kind, expected):
    """At the reference's own weights both log-ratios are 0; for ipo at β = 0.5 that is (1 / 2β)² = 1."""
    call("dpo", "--loss", kind, "--lr", 1e-9, "--steps", 2, "--out", "runs/dpo-unmoved")
    assert metrics("runs/dpo-unmoved")[-1]["val_loss"] == pytest.approx(expected, abs=1e-3)


def test_the_strength_that_a_checkpoint_carries(home):
    """So that others can tell its implicit reward: its own β, and none where there is no such reward."""
    call("dpo", "--beta", 0.25, "--steps", 2, "--out", "runs/dpo-carries")
    call("dpo", "--loss", "sft", "--init", "runs/pretrain", "--steps", 2, "--out", "runs/sft-carries")
    call("pretrain", "--init", "runs/dpo-carries", "--steps", 2, "--out", "runs/pretrain-carries")
    assert load_model("runs/dpo-carries").beta == 0.25
    assert load_model("runs/sft-carries").beta is None and load_model("runs/pretrain-carries").beta is None


def test_surprise_at_the_chosen_answers_by_hand(home):
    """Nats per token of the held-out chosen answers, EOS included, of the policy that was saved."""
    call("dpo", "--out", "runs/dpo-surprise", "--lr", 0.01)
    tokenizer, policy = Tokenizer.load("runs/pretrain"), load_model("runs/dpo-surprise")
    records = read_preferences("runs/pretrain/preferences.jsonl")
    some = records[len(records) - len(records) // 10 :]
    total, n = 0.0, 0
    for record in some:
        answer = tokenizer.encode(record["chosen"]) + [tokenizer.eos]
        total -= slow_log_prob(policy, tokenizer.encode(record["prompt"]), answer)
        n += len(answer)
    assert metrics("runs/dpo-surprise")[-2]["nats_per_token"] == pytest.approx(total / n, abs=1e-3)


def test_what_a_healthy_loss_is_depends_on_the_loss(home, capsys):
    """hinge begins at 1, so 0.9 is something learned, though it is over log 2."""
    call("dpo", "--loss", "hinge", "--out", "runs/dpo-hinge", "--steps", 16, "--lr", 3e-3)
    assert math.log(2) < metrics("runs/dpo-hinge")[-1]["val_loss"] < 1
    assert "Next:" in capsys.readouterr().out
