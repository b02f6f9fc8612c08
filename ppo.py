"""Reinforcement learning from human feedback, third step: turn the model's knobs until it earns reward.

The policy writes answers; the reward model scores them; Proximal Policy Optimization (Schulman et al.
2017, arXiv 1707.06347) makes tokens likelier that led to more than was expected. The aim is the one that
DPO reaches without all this:
    max over π of  E[r(x, y)] − β KL(π ‖ π_ref)                        (Ziegler et al. 2019, eq. 2)
Four networks take part: the policy, the frozen reference, the reward model, and a critic that guesses at
each token how much reward is still to come. Every iteration has five phases, numbered in the loop below.

    python ppo.py

takes about half a minute on two CPU cores, after `pretrain.py` and `reward.py`. This is textbook PPO for
language models: no entropy bonus, no discount (γ = 1), no dropout, and the critic is a network of its own.

What you see, what is healthy, and what to do otherwise:
    score         the reward model's, mean. Rises and levels off. If it rises on and on while the answers
                  get worse, the policy exploits the reward model's errors: raise --beta.
    kl            nats an answer from the reference, the sum of log π − log π_ref over its tokens. 0 at
                  first, then about 1 here. Far above: raise --beta; stuck near 0: lower it.
    objective     score − β kl, the thing that is maximised. Should rise and level off.
    entropy       nats a token. Falls slowly. Near 0, the policy says one thing only: raise --beta.
    approx_kl     how far an iteration moved the policy, nats a token, mean over its minibatches. Below 0.02;
                  above: lower --lr.
    clip_fraction share of tokens whose probability moved by more than the clip allows. Below 0.2.
    ratio         mean of π_new / π_old. Stays within 1 % or so of 1.
    value_loss    the critic's squared error, halved, in the last minibatch. Falls.
    explained_variance   1 − Var(return − value) / Var(return). 1 is a perfect critic, 0 one that knows
                  only the mean, below 0 a harmful one. Ends above 0.6 here.
    eos           share of answers that ended by themselves. Near 1; others get 1 point less.
    length        tokens an answer. Watch it: learned rewards often grow fond of length.
"""

from pathlib import Path

import numpy as np
import torch

from data import MAX_ANSWER_TOKENS, BadInput, Tokenizer, read_preferences
from model import RANK, Run, ScalarGPT, add_common_options, average_gradients, final_scores, generate
from model import last_index, load_model, make_optimizers, make_parser, number, run_script, save_model
from model import set_lr, set_up, shard, token_log_probs, token_values

CLIP, LAMBDA, GROUP, MINIBATCH, PENALTY = 0.2, 0.95, 4, 64, 1.0

parser = make_parser("ppo.py", "Align a pretrained model by PPO on a reward.")
option = parser.add_argument
option("--init", default="runs/pretrain", help="checkpoint to start from")
option("--reward", default="runs/reward", help="reward model, or a name in REWARDS")
option("--data", help="preference file to take the prompts from; if left out, the one in --init")
option("--out", default="runs/ppo", help="directory for the checkpoint")
option("--beta", type=number(float, 0), default=0.4, help="higher stays closer to the reference")
option("--advantage", choices=["gae", "rloo", "grpo"], default="gae", help="how to credit tokens")
option("--steps", type=number(int, 1), default=40, help="iterations")
option("--batch-size", type=number(int, GROUP), default=128, help="answers an iteration")
option("--epochs", type=number(int, 1), default=2, help="passes over each iteration's answers")
option("--lr", type=number(float, 1e-9), default=1e-3, help="peak learning rate")
add_common_options(parser)


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


def is_last(mask):
    """The last token under the mask in each row, as a mask (B, T)."""
    return torch.zeros_like(mask).scatter(1, last_index(mask), True)


def token_rewards(score, log_probs, reference_log_probs, mask, beta):
    """What each token earns (B, T), from the scores of whole answers (B,).

    Every token pays β (log π − log π_ref); its mean over samples of π is the KL (the estimator k1, which
    may be negative for one sample). The last token of an answer earns its score as well.
    """
    return -beta * (log_probs - reference_log_probs) * mask + score[:, None] * is_last(mask)


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

    # The policy starts as a copy of the reference, the critic as a copy of the reward model.
    tokenizer = Tokenizer.load(args.init)
    policy, reference = (load_model(args.init).to(device) for _ in range(2))
    learned = args.reward not in REWARDS
    if learned and Tokenizer.load(args.reward) != tokenizer:
        raise BadInput(f"{args.reward}: its tokenizer is not that of {args.init}; train both from one model")
    reward_model = load_model(args.reward, ScalarGPT).to(device) if learned else None
    critic = load_model(args.reward if learned else args.init, ScalarGPT, new_head=not learned).to(device)
    use_critic = args.advantage == "gae"

    # Prompts: those of the preference file, the last ones held out.
    data = args.data or Path(args.init, "preferences.jsonl")
    texts = [record["prompt"] for record in read_preferences(data) if record["prompt"]]
    room = policy.config.n_positions - MAX_ANSWER_TOKENS
    if len(texts) < 20:
        raise BadInput(f"{data}: {len(texts)} prompts are too few to learn on; give 20 or more")
    if room < 1:
        raise BadInput(f"{args.init}: its context leaves no room for answers of {MAX_ANSWER_TOKENS} tokens")
    prompts = [tokenizer.encode(text)[-room:] for text in texts]
    n_val = min(1024, len(prompts) // 10)
    print(f"{data}: {len(prompts) - n_val} prompts to learn on, {n_val} held out")

    @torch.no_grad()
    def rollout(rows):
        """Answers to prompts: tokens, mask, log π, log π_ref (B, T); scores, ended (B,); first column."""
        asked = [prompts[i] for i in rows]
        start = min(map(len, asked))
        tokens, mask, log_probs = generate(policy, asked, MAX_ANSWER_TOKENS, tokenizer.eos)
        reference_log_probs = token_log_probs(reference, tokens, mask, start)
        if learned:
            score = final_scores(reward_model, tokens, mask, start)
        else:
            answers = [tokenizer.decode(row[new]) for row, new in zip(tokens, mask)]
            scores = [float(REWARDS[args.reward](texts[i], answer)) for i, answer in zip(rows, answers)]
            score = torch.tensor(scores, device=device)
        ended = ((tokens == tokenizer.eos) & mask).any(1)
        return tokens, mask, log_probs, reference_log_probs, score - PENALTY * ~ended, ended, start

    def evaluate():
        """Mean score and KL of answers to the held-out prompts."""
        val = sorted(range(len(prompts) - n_val, len(prompts)), key=lambda i: len(prompts[i]))
        score, kl = [], []
        for i in range(0, n_val, args.batch_size):
            _, _, log_probs, reference_log_probs, scores, *_ = rollout(val[i : i + args.batch_size])
            score += scores.tolist()
            kl += (log_probs - reference_log_probs).sum(1).tolist()
        return np.mean(score), np.mean(kl)

    if args.compile:
        policy.transformer.compile(dynamic=True)
        critic.transformer.compile(dynamic=True)
    models = [policy, critic] if use_critic else [policy]
    optimizers = [optimizer for model in models for optimizer in make_optimizers(model, args.lr)]
    tolerance = 1e-3 if args.dtype == "float32" else 0.5  # between one token at a time and all at once
    n = args.batch_size if use_critic else args.batch_size // GROUP  # prompts an iteration
    n_minibatches = max(1, args.batch_size // MINIBATCH)
    passes = range(0, args.steps * n, len(prompts) - n_val)
    order = np.concatenate([rng.permutation(len(prompts) - n_val) for _ in passes])
    weights = [p.detach().cpu().numpy() for p in reward_model.parameters()] if learned else []
    run = Run(args, "ppo", args.steps, [prompts, weights], models, optimizers)
    for step in run:
        torch.manual_seed(hash((args.seed, step, RANK)))  # each process has its own answers, also if resumed
        # 1. Rollout: the policy answers a batch of prompts. The sampler's log-probabilities are the old ones.
        # 2. Score: once per answer, at its end.
        rows = shard(order[step * n : (step + 1) * n]).repeat(1 if use_critic else GROUP)
        tokens, mask, old_log_probs, reference_log_probs, score, ended, start = rollout(rows)
        # 3. Rewards: every token pays for leaving the reference; the last one also earns the score.
        kl = (old_log_probs - reference_log_probs).sum(1)  # of single answers; their mean is the KL
        rewards = token_rewards(score, old_log_probs, reference_log_probs, mask, args.beta)
        # 4. Advantages: what came, against what was expected.
        if use_critic:
            with torch.no_grad():
                old_values = token_values(critic, tokens, mask, start)
            advantages = gae(rewards, old_values, mask)
            returns = advantages + old_values  # before whitening, which is only for the policy
            advantages = whiten(advantages, mask)
        else:
            advantages = group_advantages(rewards.sum(1), args.advantage)[:, None] * mask
        # 5. Update: a few passes over these answers, in minibatches.
        set_lr(optimizers, step, args.steps, warmup=5)
        moved = []
        for _ in range(args.epochs):
            for i in torch.randperm(len(tokens), device=device).tensor_split(n_minibatches):
                log_probs = token_log_probs(policy, tokens[i], mask[i], start)
                loss, ratio = policy_loss(log_probs, old_log_probs[i], advantages[i], mask[i])
                r = ratio.detach()
                moved.append([masked_mean(x, mask[i]) for x in (r, r - 1 - r.log(), ((r - 1).abs() > CLIP))])
                if len(moved) == 1 and loss.isfinite():  # nothing has moved yet in this iteration
                    assert (ratio - 1).abs().max() < tolerance, "the sampler and the model disagree"
                if use_critic:
                    values = token_values(critic, tokens[i], mask[i], start)
                    critic_loss = value_loss(values, old_values[i], returns[i], mask[i])
                    loss = loss + critic_loss  # two networks, so one backward pass serves both
                loss.backward()
                for model in models:
                    average_gradients(model.parameters(), loss, weight=mask[i].sum())
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        if step == 0:
            assert kl.abs().mean() < tolerance, "the policy does not start as the reference"

        ratio, approx_kl, clip_fraction = torch.tensor(moved).mean(0)
        metrics = {
            "score": score.mean(),
            "kl": kl.mean(),
            "objective": (score - args.beta * kl).mean(),
            "entropy": -masked_mean(old_log_probs, mask),
            "approx_kl": approx_kl,
            "clip_fraction": clip_fraction,
            "ratio": ratio,
            "eos": ended.float().mean(),
            "length": mask.sum(1).float().mean(),
        }
        if use_critic:
            metrics["value_loss"] = critic_loss.detach()
            variance = returns[mask].var().clamp(min=1e-8)
            metrics["explained_variance"] = 1 - (returns - old_values)[mask].var() / variance
        run.log(**{name: float(value) for name, value in metrics.items()})
        lost = metrics["objective"] < run.metrics[0]["score"] - 1 and args.beta
        if lost or metrics["entropy"] < 0.02:
            run.bar.write(f"iteration {step + 1}: the policy collapses; raise --beta or lower --lr")

    save_model(policy, tokenizer, args.out)
    reward, kl = evaluate()
    explained = float(metrics["explained_variance"]) if use_critic else None
    run.finish(reward=reward, kl=kl, explained_variance=explained)
    print(f"held-out prompts: score {reward:.3f} at KL {kl:.3f}, objective {reward - args.beta * kl:.3f}")
    print(f"saved to {args.out}")


if __name__ == "__main__":
    run_script(main, parser)
