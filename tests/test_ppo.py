import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, copy, metrics

import ppo
from data import ASKED, KINDS, Tokenizer, documents, load_pairs, read_preferences, write_records
from model import ScalarGPT, generate, load_model, save_model, seeded, token_log_probs
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
        expected = [sum(LAMBDA**k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
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


def test_what_is_paid_is_the_kl_with_its_sign():
    """What `token_rewards` takes away, averaged over π's own tokens, is β KL(π ‖ π_ref), by hand."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    exact = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    one = torch.ones(3, 1).bool()
    paid = -token_rewards(torch.zeros(3), policy.log()[:, None], reference.log()[:, None], one, beta=1.0)[
        :, 0
    ]
    assert (policy * paid).sum().item() == pytest.approx(exact, abs=1e-6)
    assert exact > 0 and paid[2] < 0  # the mean is positive, single ones need not be


def test_the_gradients_of_both_losses():
    torch.manual_seed(0)
    new, old, advantages = (torch.randn(4, 5, dtype=torch.float64) for _ in range(3))
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, MASK)[0], [new])
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, advantages, MASK), [new])


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


# ----------------------------------------------------------------------------------------------------
# The loop


def watch(monkeypatch):
    """Everything that passes through some functions of ppo.py: {name: [(arguments, result), …]}."""
    seen = {}

    def watched(name):
        real, calls = getattr(ppo, name), seen.setdefault(name, [])

        def spy(*how, **more):
            calls.append((how, real(*how, **more)))
            return calls[-1][1]

        return spy

    for name in ("generate", "policy_loss", "value_loss"):
        monkeypatch.setattr(ppo, name, watched(name))
    return seen


def whole_texts(tokens, mask):
    """Each row alone, without padding: prompt and answer, and how many of its tokens are the answer."""
    for row, new in zip(tokens, mask):
        yield row[: new.nonzero().max() + 1][None], int(new.sum())


def slow_rollout(tokens, mask, eos):
    """Answer by answer, at the start of training: its score, its log π_ref and the critic's values."""
    reference, critic = load_model("runs/pretrain"), load_model("runs/reward", ScalarGPT)
    scores, log_probs, values = [], [], []
    with torch.no_grad():
        for text, n in whole_texts(tokens, mask):
            said = critic(text)[0].double()
            ended = text[0, -1] == eos
            scores.append(said[-1].item() - (0 if ended else 1))  # who does not end loses a point
            values.append(said[-n - 1 : -1].tolist())
            logits = reference(text)[0, -n - 1 : -1].double()
            log_probs.append(logits.log_softmax(-1).gather(1, text[0, -n:, None])[:, 0].tolist())
    return scores, log_probs, values


def test_the_first_iteration_once_more_by_hand(home, monkeypatch):
    """Rewards, advantages, whitening and returns, from slow pieces, against what the two losses are given.

    Returns are made before whitening. Two epochs of two minibatches: each answer is learned from twice.
    """
    seen = watch(monkeypatch)
    call("ppo", "--out", "runs/ppo-watched", "--steps", 1, "--batch-size", 128, "--beta", 0.3)
    _, (tokens, mask, old_log_probs) = seen["generate"][0]
    scores, reference_log_probs, values = slow_rollout(tokens, mask, Tokenizer.load("runs/pretrain").eos)
    all_advantages, all_returns = [], []
    for row, score in enumerate(scores):
        v = [*values[row], 0.0]
        r = -0.3 * (old_log_probs[row][mask[row]].double().numpy() - np.array(reference_log_probs[row]))
        r[-1] += score
        delta = [r[t] + v[t + 1] - v[t] for t in range(len(r))]
        advantages = [sum(0.95**k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
        all_advantages.append(np.array(advantages))
        all_returns.append(np.array(advantages) + np.array(values[row]))
    every = np.concatenate(all_advantages)
    whitened = [(a - every.mean()) / every.std() for a in all_advantages]

    assert len(seen["policy_loss"]) == len(seen["value_loss"]) == 4
    row_of = {tuple(row.tolist()): i for i, row in enumerate(old_log_probs)}
    assert len(row_of) == 128
    learned = []
    for ((_, old, advantages, m), _), ((_, _, returns, _), _) in zip(seen["policy_loss"], seen["value_loss"]):
        for i in range(len(old)):
            row = row_of[tuple(old[i].tolist())]
            learned.append(row)
            assert torch.equal(m[i], mask[row]) and (advantages[i][~m[i]] == 0).all()
            assert advantages[i][m[i]].tolist() == pytest.approx(whitened[row].tolist(), abs=1e-3)
            assert returns[i][m[i]].tolist() == pytest.approx(all_returns[row].tolist(), abs=1e-3)
    assert sorted(learned[:128]) == sorted(learned[128:]) == list(range(128))

    # And the figures of that iteration.
    log_ratios = [old_log_probs[i][mask[i]].sum().item() - sum(reference_log_probs[i]) for i in range(128)]
    lengths = mask.sum(1).tolist()
    ratios = [loss[1][how[3]].detach() for how, loss in seen["policy_loss"]]
    mean_of = lambda figure: np.mean([figure(ratio).mean().item() for ratio in ratios])
    expected = {
        "reward": np.mean(scores),
        "kl": np.mean(log_ratios),
        "objective": np.mean(scores) - 0.3 * np.mean(log_ratios),
        "entropy": -old_log_probs.sum().item() / sum(lengths),
        "eos": np.mean(
            [tokens[i][mask[i]][-1].item() == Tokenizer.load("runs/pretrain").eos for i in range(128)]
        ),
        "length": np.mean(lengths),
        "ratio": mean_of(lambda ratio: ratio),
        "approx_kl": mean_of(lambda ratio: ratio - 1 - ratio.log()),
        "clip_fraction": mean_of(lambda ratio: ((ratio > 1.2) | (ratio < 0.8)).float()),
        "value_loss": seen["value_loss"][-1][1].item(),
        "explained_variance": 1 - every.var() / np.concatenate(all_returns).var(),
    }
    first = metrics("runs/ppo-watched")[0]
    for name, value in expected.items():
        rel, absolute = (
            (1e-2, 1e-7) if name == "approx_kl" else (1e-4, 2e-3 if name == "explained_variance" else 1e-4)
        )
        assert first[name] == pytest.approx(value, rel=rel, abs=absolute), name


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_answers_to_the_same_prompt_are_held_against_each_other(home, monkeypatch, kind):
    seen, options = watch(monkeypatch), ["--advantage", kind, "--steps", 1, "--batch-size", 16, "--beta", 0.3]
    call("ppo", "--out", f"runs/ppo-{kind}-watched", *options)
    (_, prompts, *_), (tokens, mask, old_log_probs) = seen["generate"][0]
    assert len(prompts) == 16 and len({tuple(prompt) for prompt in prompts}) == 4
    assert all(prompts[i] == prompts[i - i % 4] for i in range(16))
    scores, reference_log_probs, _ = slow_rollout(tokens, mask, Tokenizer.load("runs/pretrain").eos)
    paid = [-0.3 * (old_log_probs[i].sum().item() - sum(reference_log_probs[i])) for i in range(16)]
    for (_, old, advantages, m), _ in seen["policy_loss"]:
        for i in range(len(old)):
            row = (old_log_probs == old[i]).all(1).nonzero().item()
            others = [j for j in range(row - row % 4, row - row % 4 + 4) if j != row]
            mean_of_others = lambda x: np.mean([x[j] for j in others])
            expected = paid[row] - mean_of_others(paid)  # the KL is held against the others' by both
            if kind == "rloo":
                expected += scores[row] - mean_of_others(scores)
            else:
                group = [scores[j] for j in (*others, row)]
                expected += (scores[row] - np.mean(group)) / np.std(group, ddof=1)
            assert advantages[i][m[i]].tolist() == pytest.approx(
                [expected] * int(m[i].sum()), rel=0.02, abs=1e-3
            )
    assert not seen["value_loss"]  # no critic


def test_the_held_out_prompts_are_measured_and_never_learned_from(home, monkeypatch):
    seen = watch(monkeypatch)
    call("ppo", "--out", "runs/ppo-held-out", "--steps", 12, "--batch-size", 32, "--lr", 1e-9)
    tokenizer = Tokenizer.load("runs/pretrain")
    texts = [record["prompt"] for record in read_preferences("runs/pretrain/preferences.jsonl")]
    n_val = len(texts) // 10
    asked = [tokenizer.decode(prompt) for how, _ in seen["generate"] for prompt in how[1]]
    learned, held_out = asked[: 12 * 32], asked[12 * 32 :]
    assert sorted(held_out) == sorted(texts[-n_val:])
    assert set(learned) == set(texts[:-n_val])  # 384 prompts are more than one pass
    assert len(set(learned[: len(texts) - n_val])) == len(texts) - n_val  # and no prompt twice before that
    scores, kls = [], []
    for _, (tokens, mask, log_probs) in seen["generate"][12:]:
        some, reference_log_probs, _ = slow_rollout(tokens, mask, tokenizer.eos)
        scores += some
        kls += [log_probs[i].sum().item() - sum(each) for i, each in enumerate(reference_log_probs)]
    final = metrics("runs/ppo-held-out")[-1]
    assert final["reward"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert final["kl"] == pytest.approx(np.mean(kls), abs=1e-4)


def test_prompts_that_come_back_are_held_out_from_ppo_as_from_the_reward_model(home):
    """A hundred pairs about forty prompts in any order: all pairs of a prompt lie on one side."""
    rng = random.Random(3)
    rows = [{"prompt": f"It is {rng.randrange(40)}", "chosen": " yes", "rejected": " no"} for _ in range(100)]
    write_records("again.jsonl", rows)
    tokenizer = Tokenizer.load("runs/pretrain")
    pairs, _, n_val = load_pairs("again.jsonl", tokenizer, 128, 8)
    train, val = ppo.load_prompts(ppo.parser.parse_args(["--data", "again.jsonl"]), tokenizer, 99)
    unique = lambda pairs: {tuple(prompt) for prompt, *_ in pairs}
    assert {*map(tuple, val)} == unique(pairs[-n_val:]) and {*map(tuple, train)} == unique(pairs[:-n_val])
    assert len(val) >= 3 and len(train) == len(unique(pairs[:-n_val]))  # each once


def test_it_starts_as_the_reference_and_explains_every_figure(home):
    lines = metrics("runs/ppo")
    assert abs(lines[0]["kl"]) < 1e-4 and lines[0]["ratio"] == pytest.approx(1, abs=0.05)
    for name in lines[0].keys() - {"step"}:
        assert f"    {name} " in ppo.__doc__, f"{name} is logged but not explained"
    assert {"final", "reward", "kl", "explained_variance", "seconds"} <= set(lines[-1])


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_every_way_of_crediting_learns_a_reward_of_ones_own(home, monkeypatch, advantage):
    """The reward counts how often a letter stands in the answer: it must rise."""
    monkeypatch.setitem(ppo.REWARDS, "letters", lambda prompt, response: response.count("a"))
    how = ["--reward", "letters", "--advantage", advantage, "--steps", 15, "--batch-size", 32, "--beta", 0.01]
    call("ppo", "--out", f"runs/ppo-{advantage}", *how, "--lr", 0.02)
    scores = [line["reward"] for line in metrics(f"runs/ppo-{advantage}")[:-1]]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1


# ----------------------------------------------------------------------------------------------------
# What is rewarded


def test_the_implicit_reward_of_a_language_model(home):
    """β (log π − log π_ref), answer by answer, token by token, with the β that it was trained with."""
    call("dpo", "--out", "runs/dpo-beta", "--beta", 0.3, "--steps", 30)
    tokenizer, reference = Tokenizer.load("runs/pretrain"), load_model("runs/pretrain")
    policy = load_model("runs/dpo-beta")
    assert policy.beta == 0.3 and reference.beta is None
    prompts = [tokenizer.encode(r["prompt"]) for r in read_preferences("runs/pretrain/preferences.jsonl")[:6]]
    tokens, mask, _ = generate(reference, prompts, 32, tokenizer.eos, generator=seeded(0))
    args = ppo.parser.parse_args(["--reward", "runs/dpo-beta"])
    score, _ = ppo.load_reward(args, tokenizer, reference)
    found = score(tokens, mask, min(map(len, prompts)))
    for got, (text, n) in zip(found.tolist(), whole_texts(tokens, mask)):
        said = []
        with torch.no_grad():
            for network in (policy, reference):
                log_probs = network(text)[0, -n - 1 : -1].double().log_softmax(-1)
                said.append(log_probs.gather(1, text[0, -n:, None]).sum().item())
        lost = 0 if text[0, -1] == tokenizer.eos else 1
        assert got == pytest.approx(0.3 * (said[0] - said[1]) - lost, abs=1e-4)
    assert found.std() > 1e-3


def test_a_reward_with_a_name_sees_the_texts_and_needs_no_preference_file(home, monkeypatch, tmp_path):
    """Prompts come from the world. What the function is given is what was generated."""
    copy("runs/pretrain", tmp_path / "init")
    (tmp_path / "init/preferences.jsonl").unlink()
    asked = []
    monkeypatch.setitem(ppo.REWARDS, "spy", lambda *texts: asked.append(texts) or 1.0)
    seen = watch(monkeypatch)
    options = ["--init", tmp_path / "init", "--reward", "spy", "--steps", 1, "--batch-size", 16]
    call("ppo", *options, "--out", tmp_path / "out")
    tokenizer = Tokenizer.load("runs/pretrain")
    (_, prompts, *_), (tokens, mask, _) = seen["generate"][0]
    answers = [tokenizer.decode(row[new]) for row, new in zip(tokens, mask)]
    assert asked[:16] == [(tokenizer.decode(prompt), text) for prompt, text in zip(prompts, answers)]
    world = {d.prompt for d in documents(10_240, [1, ASKED], KINDS[0])}
    assert {prompt for prompt, _ in asked} <= world


def test_the_context_is_the_shortest_of_all_networks(home, monkeypatch):
    """A reward model that reads less than the policy: prompts are cut to what both can read."""
    tokenizer, scorer = Tokenizer.load("runs/reward"), load_model("runs/reward", ScalarGPT)
    scorer.config.n_positions = 100
    scorer.transformer.wpe.weight = torch.nn.Parameter(scorer.transformer.wpe.weight[:100])
    Path("runs/short-reward").mkdir()
    save_model(scorer, tokenizer, "runs/short-reward")
    seen = watch(monkeypatch)
    call("ppo", "--reward", "runs/short-reward", "--steps", 1, "--out", "runs/ppo-short")
    longest = max(len(prompt) for (_, prompts, *_), _ in seen["generate"] for prompt in prompts)
    assert longest == 100 - 32 and metrics("runs/ppo-short")[-1]["final"]


# ----------------------------------------------------------------------------------------------------
# After the first iteration, when policy and reference are no longer equal


@pytest.mark.parametrize("kind", ["gae", "rloo"])
def test_the_second_iteration_once_more_by_hand(home, monkeypatch, kind):
    """At a high rate: what is credited, what is logged, and what is measured at the end, from slow pieces."""
    seen, named, out = watch(monkeypatch), [], f"runs/ppo-second-{kind}"
    credit = {"gae": "gae", "rloo": "group_advantages"}[kind]
    credited, real = [], getattr(ppo, credit)
    monkeypatch.setattr(ppo, credit, lambda *how: credited.append(how) or real(*how))
    monkeypatch.setattr(ppo, "seeded", lambda *name, **more: named.append(name) or seeded(*name, **more))
    options = ["--advantage", kind, "--steps", 2, "--batch-size", 32, "--beta", 0.3, "--lr", 0.03]
    call("ppo", "--out", out, *options)
    eos, lines = Tokenizer.load("runs/pretrain").eos, metrics(out)

    # Each answer's rewards sum to its score − β KL, of the policy as it was when it wrote.
    _, (tokens, mask, log_probs) = seen["generate"][1]
    scores, reference_log_probs, _ = slow_rollout(tokens, mask, eos)
    kl = log_probs.double().sum(1).numpy() - np.array([sum(each) for each in reference_log_probs])
    returns = credited[1][0].sum(1) if kind == "gae" else credited[2][0] + credited[3][0]
    assert abs(kl.mean()) > 0.05  # so that a sign, or a term that is forgotten, shows
    assert returns.tolist() == pytest.approx((np.array(scores) - 0.3 * kl).tolist(), abs=1e-3)
    assert lines[1]["kl"] == pytest.approx(kl.mean(), abs=1e-3)
    assert lines[1]["reward"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert lines[1]["objective"] == pytest.approx(np.mean(scores) - 0.3 * kl.mean(), abs=1e-3)

    # The critic's clip is around what it said before this iteration's first update.
    if kind == "gae":
        before = {tuple(row.tolist()) for row in credited[1][1]}
        clipped = [row for (_, old, *_), _ in seen["value_loss"][2:] for row in old]
        assert len(clipped) == 2 * 32 and {tuple(row.tolist()) for row in clipped} <= before

    # At the end the saved policy is measured, not the reference.
    saved, scores, kls = load_model(out), [], []
    for _, (tokens, mask, log_probs) in seen["generate"][2:]:
        some, reference_log_probs, _ = slow_rollout(tokens, mask, eos)
        scores += some
        with torch.no_grad():
            now = token_log_probs(saved, tokens, mask).sum(1).tolist()
        assert log_probs.sum(1).tolist() == pytest.approx(now, abs=1e-3)
        kls += [x - sum(each) for x, each in zip(now, reference_log_probs)]
    assert lines[-1]["reward"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert lines[-1]["kl"] == pytest.approx(np.mean(kls), abs=1e-3) and np.mean(kls) > 0.05

    # No two iterations, nor their shuffling, have the same random numbers.
    assert len(named) == len(set(named)) >= 5
    assert saved.beta == 0.3


def test_a_group_of_equal_rewards_teaches_nothing_but_the_kl(home, monkeypatch):
    """GRPO, with a reward that is 1 for all: the advantages are RLOO's of −β KL, by hand, and small."""
    seen = watch(monkeypatch)
    monkeypatch.setitem(ppo.REWARDS, "one", lambda prompt, response: 1.0)
    monkeypatch.setattr(ppo, "PENALTY", 0.0)
    monkeypatch.setattr(ppo, "has_ended", lambda tokens, mask, eos: torch.ones(len(tokens), dtype=torch.bool))
    options = ["--reward", "one", "--advantage", "grpo", "--steps", 2, "--batch-size", 16, "--beta", 0.05]
    call("ppo", *options, "--lr", 0.02, "--out", "runs/ppo-equal")
    _, (tokens, mask, log_probs) = seen["generate"][1]
    _, reference_log_probs, _ = slow_rollout(tokens, mask, Tokenizer.load("runs/pretrain").eos)
    paid = [-0.05 * (log_probs[i].sum().item() - sum(reference_log_probs[i])) for i in range(16)]
    mean_of_others = lambda i: np.mean([paid[j] for j in range(i - i % 4, i - i % 4 + 4) if j != i])
    found = {}
    for (_, old, advantages, m), _ in seen["policy_loss"][2:]:
        for i in range(len(old)):
            found[(log_probs == old[i]).all(1).nonzero().item()] = advantages[i][m[i]][0].item()
    assert len(found) == 16 and 0.001 < max(map(abs, found.values())) < 0.3
    assert found == {i: pytest.approx(paid[i] - mean_of_others(i), abs=1e-3) for i in range(16)}


def test_prompts_that_are_cut_are_counted(home, capsys):
    texts = [f"It is {i} {'word ' * (30 if i < 7 else 0)}" for i in range(40)]
    write_records("cut.jsonl", [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in texts])
    tokenizer = Tokenizer.load("runs/pretrain")
    train, val = ppo.load_prompts(ppo.parser.parse_args(["--data", "cut.jsonl"]), tokenizer, 20)
    assert train + val == [tokenizer.encode(text)[-20:] for text in texts]  # they keep their ends
    assert "36 prompts to learn on, 4 held out, 7 cut to 20 tokens\n" in capsys.readouterr().out


def test_how_far_a_policy_moved_by_hand():
    """Three tokens under the mask, one of them rarer by half, one more frequent by a quarter; one outside."""
    ratio, mask = torch.tensor([[0.5, 1.25, 1.0, 9.0]]), torch.tensor([[True, True, True, False]])
    mean, approx_kl, clipped, _ = ppo.drift(ratio, mask).tolist()
    assert mean == pytest.approx(2.75 / 3) and clipped == pytest.approx(2 / 3)
    assert approx_kl == pytest.approx((-0.5 + math.log(2) + 0.25 - math.log(1.25)) / 3)


def test_a_policy_that_ends_worse_than_it_began_is_called_so(home, capsys, monkeypatch):
    """A reward of 10 in the first iteration, 0 in the second and 5 at the end: the first is what counts."""
    calls = []
    reward = lambda prompt, response: (
        calls.append(1) or (10 if len(calls) <= 16 else 0 if len(calls) <= 32 else 5)
    )
    monkeypatch.setitem(ppo.REWARDS, "falls", reward)
    call("ppo", "--reward", "falls", "--steps", 2, "--lr", 1e-6, "--out", "runs/ppo-falls")
    assert "no better than the model that it started from" in capsys.readouterr().out


def test_only_an_end_of_the_answer_is_its_end():
    tokens = torch.tensor([[7, 1, 2, 3], [1, 2, 7, 0], [1, 2, 3, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    assert ppo.has_ended(tokens, mask, 7).tolist() == [False, True, False]
