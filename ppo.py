"""Reinforcement learning from human feedback, third step: turn the model's knobs until it earns reward.

The policy writes answers; the reward model scores them; Proximal Policy Optimization (Schulman et al.
2017, arXiv 1707.06347) makes tokens likelier that led to more than was expected. The aim is the one that
DPO reaches without all this:
    max over π of  E[r(x, y)] − β KL(π ‖ π_ref)                        (Ziegler et al. 2019, eq. 2)
Four networks take part: the policy, the frozen reference, the reward model, and a critic that guesses at
each token how much reward is still to come. Every iteration has five phases, numbered in the loop below.

    python ppo.py

takes a bit more than a minute on two CPU cores, after `pretrain.py` and `reward.py`. This is textbook PPO. Where
it departs: no entropy bonus, no discount (γ = 1), no dropout, and the critic is a network of its own.

What you see, what is healthy, and what to do otherwise:
    score         the reward model's, mean. Rises and levels off. If it rises on and on while the answers
                  get worse, the policy exploits the reward model's errors: raise --beta.
    kl            nats an answer from the reference, the sum of log π − log π_ref over its tokens. 0 at
                  first, then about 0.5 here. Far above: raise --beta; stuck near 0: lower it.
    objective     score − β kl, the thing that is maximised. Should rise all the way.
    entropy       nats a token. Falls slowly. Near 0, the policy says one thing only: raise --beta.
    approx_kl     how far an iteration moved the policy, nats a token, mean over its minibatches. Below 0.02; above: lower --lr.
    clip_fraction share of tokens whose probability moved by more than the clip allows. Below 0.2.
    ratio         mean of π_new / π_old. Stays within 1 % or so of 1.
    value_loss    the critic's squared error, halved, in the last minibatch. Falls.
    explained_variance   1 − Var(return − value) / Var(return). 1 is a perfect critic, 0 one that knows
                  only the mean, below 0 a harmful one. Starts below 0 here and ends above 0.6.
    eos           share of answers that ended by themselves. Near 1; others get 1 point less.
    length        tokens an answer. Watch it: learned rewards often grow fond of length.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data import MAX_ANSWER_TOKENS, Tokenizer, read_preferences
from model import BadInput, Checkpoint, Log, Muon, ScalarGPT, add_common_options, average_gradients, final_scores
from model import generate, last_token, load_model, mine, positive, run, save_model, set_lr, set_up, token_log_probs
from model import token_values

parser = argparse.ArgumentParser("ppo.py", description="Align a pretrained model by PPO on a reward.")
parser.add_argument("--init", default="runs/pretrain", help="checkpoint to start from (default: %(default)s)")
parser.add_argument("--reward", default="runs/reward", help="reward model, or a name in REWARDS (default: %(default)s)")
parser.add_argument("--data", help="preference file to take the prompts from (default: the one beside --init)")
parser.add_argument("--out", default="runs/ppo", help="directory for the checkpoint (default: %(default)s)")
parser.add_argument("--beta", type=float, default=0.4, help="higher stays closer to the reference (default: %(default)s)")
parser.add_argument("--target-kl", type=positive(float), help="steer beta so that the KL comes to this (default: beta stays)")
parser.add_argument("--advantage", choices=["gae", "rloo", "grpo"], default="gae", help="default: %(default)s")
parser.add_argument("--steps", type=positive(int), default=80, help="iterations (default: %(default)s)")
parser.add_argument("--batch-size", type=positive(int), default=128, help="answers an iteration (default: %(default)s)")
parser.add_argument("--epochs", type=positive(int), default=2, help="passes over each iteration's answers (default: %(default)s)")
parser.add_argument("--lr", type=positive(float), default=2e-3, help="peak learning rate (default: %(default)s)")
add_common_options(parser)

CLIP, LAMBDA, GROUP, MINIBATCH = 0.2, 0.95, 4, 64


def four_words(prompt, response):
    """Likes an answer of four words; says nothing about what is in it."""
    return -abs(len(response.split()) - 4)


# Put any score(prompt, response) -> float here, and train on it with --reward NAME.
REWARDS = {"length": four_words}


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the tokens under the mask, and 0 elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred / (masked_mean(centred**2, mask) + 1e-8).sqrt()


def token_rewards(score, log_probs, reference_log_probs, mask, beta):
    """What each token earns (B, T), from the scores of whole answers (B,).

    Every token pays β (log π − log π_ref); its mean over samples of π is the KL (the estimator k1, which
    may be negative for one sample). The last token of an answer earns its score as well.
    """
    return -beta * (log_probs - reference_log_probs) * mask + score[:, None] * last_token(mask)


def gae(rewards, values, mask):
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), with γ = 1.

    rewards, values, mask: (B, T). values[:, t] is what was expected before token t was written. Returns
    the advantages (B, T), 0 outside the mask: how much better each token turned out than expected.
        δ_t = r_t + V_{t+1} − V_t          A_t = δ_t + λ A_{t+1}          V = A = 0 after the end
    """
    values, advantages = values * mask, torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        next_advantage = advantages[:, t] = (delta + LAMBDA * next_advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages


def group_advantages(returns, kind):
    """Advantages (B,) from the returns (B,) of whole answers, GROUP neighbours answering one prompt.

    rloo: the return minus the mean of the other answers' (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).
    grpo: minus the group's mean, over its standard deviation (Shao et al. 2024, arXiv 2402.03300, 4.1.2).
    """
    groups = returns.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "rloo":
        return (centred * GROUP / (GROUP - 1)).view(-1)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def policy_loss(log_probs, old_log_probs, advantages, mask):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7) as a loss, all (B, T). Returns (loss, ratio).

    A token that already moved by more than the clip gets no gradient that would move it further.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    return masked_mean(loss, mask), ratio


def value_loss(values, old_values, returns, mask):
    """Half the squared error of the critic, all (B, T); a value that moved too far gets no gradient."""
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def main(args):
    device = set_up(args)
    rng = np.random.default_rng(args.seed)

    if args.beta < 0 or args.batch_size % GROUP:
        raise BadInput(f"--beta must not be below 0, and --batch-size must be a multiple of {GROUP}")

    # The policy starts as a copy of the reference, the critic as a copy of the reward model.
    tokenizer = Tokenizer.load(args.init)
    policy, reference = (load_model(args.init).to(device) for _ in range(2))
    learned = args.reward not in REWARDS
    if learned and Tokenizer.load(args.reward) != tokenizer:
        raise BadInput(f"{args.reward}: its tokenizer is not that of {args.init}; train both from one pretrained model")
    reward_model = load_model(args.reward, ScalarGPT).to(device) if learned else None
    critic = load_model(args.reward if learned else args.init, ScalarGPT, new_head=not learned).to(device)
    use_critic = args.advantage == "gae"

    # Prompts: those of the preference file, the last ones held out.
    data = args.data or Path(args.init).parent / "preferences.jsonl"
    texts = [record["prompt"] for record in read_preferences(data) if record["prompt"]]
    if policy.config.n_positions <= MAX_ANSWER_TOKENS:
        raise BadInput(f"{args.init}: a context of {policy.config.n_positions} leaves no room for answers of {MAX_ANSWER_TOKENS}")
    prompts = [tokenizer.encode(text)[-(policy.config.n_positions - MAX_ANSWER_TOKENS) :] for text in texts]
    if len(prompts) < 20:
        raise BadInput(f"{data}: {len(prompts)} prompts are too few to learn on; give at least 20")
    n_val = min(1024, len(prompts) // 10)
    print(f"{data}: {len(prompts) - n_val} prompts to learn on, {n_val} held out")

    @torch.no_grad()
    def rollout(rows):
        """Answers to prompts, all (B, T): tokens, mask, log π, log π_ref; and their scores and ends (B,)."""
        tokens, mask, log_probs = generate(policy, [prompts[i] for i in rows], MAX_ANSWER_TOKENS, tokenizer.eos)
        reference_log_probs = token_log_probs(reference, tokens, mask)
        if learned:
            score = final_scores(reward_model, tokens, mask)
        else:
            answers = [tokenizer.decode(row[new]) for row, new in zip(tokens, mask)]
            score = torch.tensor([float(REWARDS[args.reward](texts[i], a)) for i, a in zip(rows, answers)], device=device)
        ended = ((tokens == tokenizer.eos) & mask).any(1)
        return tokens, mask, log_probs, reference_log_probs, score - ~ended * 1.0, ended

    if args.compile:
        policy.transformer.compile(dynamic=True)
        critic.transformer.compile(dynamic=True)
    trained = [*policy.parameters(), *(critic.parameters() if use_critic else [])]
    optimizers = [Muon(policy, args.lr)] + [Muon(critic, args.lr)] * use_critic
    tolerance = 1e-3 if args.dtype == "float32" else 0.5  # between one token at a time and all at once
    parts = {"critic": critic, "critic_optimizer": optimizers[1]} if use_critic else {}
    checkpoint = Checkpoint(args, rng, policy=policy, optimizer=optimizers[0], **parts)
    beta, waiting, first_score = checkpoint.extra or (args.beta, [], None)
    log = Log(args.out, args.steps, "ppo", checkpoint.step)
    for step in range(checkpoint.step, args.steps):
        # 1. Rollout: the policy answers a batch of prompts. The sampler's log-probabilities are the old ones.
        n = args.batch_size if use_critic else args.batch_size // GROUP
        if len(waiting) < n:
            waiting = rng.permutation(len(prompts) - n_val).tolist()
        rows, waiting = waiting[:n], waiting[n:]
        rows = np.repeat(rows, 1 if use_critic else GROUP)
        # 2. Score: once per answer, at its end.
        tokens, mask, old_log_probs, reference_log_probs, score, ended = rollout(rows)
        # 3. Rewards: every token pays for leaving the reference; the last one also earns the score.
        kl = (old_log_probs - reference_log_probs).sum(1)  # of single answers; their mean is the KL
        rewards = token_rewards(score, old_log_probs, reference_log_probs, mask, beta)
        # 4. Advantages: what came, against what was expected.
        if use_critic:
            with torch.no_grad():
                old_values = token_values(critic, tokens, mask)
            advantages = gae(rewards, old_values, mask)
            returns = advantages + old_values  # before whitening, which is only for the policy
            advantages = whiten(advantages, mask)
        else:
            advantages = group_advantages(rewards.sum(1), args.advantage)[:, None] * mask
        # 5. Update: a few passes over these answers, in minibatches.
        for optimizer in optimizers:
            set_lr(optimizer, step, args.steps, warmup=5)
        ratios = []
        for _ in range(args.epochs):
            for i in torch.randperm(len(tokens), device=device).split(MINIBATCH):
                i = mine(i)
                log_probs = token_log_probs(policy, tokens[i], mask[i])
                loss, ratio = policy_loss(log_probs, old_log_probs[i], advantages[i], mask[i])
                if not ratios:  # nothing has moved yet in this iteration
                    assert (ratio - 1).abs().max() < tolerance, "the sampler and the model disagree"
                if use_critic:
                    values = token_values(critic, tokens[i], mask[i])
                    critic_loss = value_loss(values, old_values[i], returns[i], mask[i])
                    loss = loss + critic_loss  # two networks, so one backward pass serves both
                loss.backward()
                average_gradients(trained, loss, weight=mask[i].sum())
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                ratios.append(ratio.detach()[mask[i]])
        if step == 0:
            assert kl.abs().mean() < tolerance, "the policy does not start as the reference"

        ratio = torch.cat(ratios)
        figures = {
            "score": score.mean(), "kl": kl.mean(), "objective": (score - beta * kl).mean(), "beta": beta,
            "entropy": -masked_mean(old_log_probs, mask), "approx_kl": (ratio - 1 - ratio.log()).mean(),
            "clip_fraction": ((ratio - 1).abs() > CLIP).float().mean(), "ratio": ratio.mean(),
            "eos": ended.float().mean(), "length": mask.sum(1).float().mean(),
        }  # fmt: skip
        if use_critic:
            figures["value_loss"] = critic_loss.detach()
            figures["explained_variance"] = 1 - (returns - old_values)[mask].var() / returns[mask].var()
        log(step + 1, **{name: float(value) for name, value in figures.items()})
        if args.target_kl:  # Ziegler et al. 2019, section 2.2
            beta *= 1 + 0.1 * max(-0.2, min(0.2, kl.mean().item() / args.target_kl - 1))
        # Three ways to collapse, said while it happens.
        first_score = score.mean().item() if first_score is None else first_score
        if (figures["objective"] < first_score - 1 and beta) or figures["entropy"] < 0.02:
            log.bar.write(f"iteration {step + 1}: the KL costs more than the score has gained, or the entropy is near 0; raise --beta or lower --lr")
        if len({tuple(row[new].tolist()) for row, new in zip(tokens, mask)}) == 1:
            log.bar.write(f"iteration {step + 1}: all prompts got the same answer; raise --beta or lower --lr")
        log.bar.update()
        if step + 1 < args.steps:
            checkpoint.save(step + 1, extra=(beta, waiting, first_score))

    save_model(policy, tokenizer, args.out)
    checkpoint.finish()
    _, _, log_probs, reference_log_probs, score, _ = rollout(range(len(prompts) - n_val, len(prompts)))
    reward, kl = score.mean().item(), (log_probs - reference_log_probs).sum(1).mean().item()
    explained = float(figures["explained_variance"]) if use_critic else None
    log.close(reward=reward, kl=kl, explained_variance=explained, seconds=checkpoint.seconds())
    print(f"held-out prompts: score {reward:.3f} at KL {kl:.3f} from the reference, objective {reward - beta * kl:.3f}")
    print(f"saved to {args.out}")


if __name__ == "__main__":
    run(main, parser)
