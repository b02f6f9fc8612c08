"""Reinforcement learning from human feedback, third step: turn the model's knobs until it earns reward.

The policy writes answers; a reward model scores them; Proximal Policy Optimization (Schulman et al. 2017,
arXiv 1707.06347) makes tokens likelier that led to more than was expected. The aim is the one that DPO
reaches without all this:
    max over π of  E[r(x, y)] − β KL(π ‖ π_ref)                        (Ziegler et al. 2019, eq. 2)
Four networks take part: the policy, the frozen reference, the reward model, and a critic that guesses at
each token how much reward is still to come. Every iteration has five phases, numbered in the loop below.

    python ppo.py

takes less than a minute on two cores (AVX2), after `pretrain.py`, `sample.py --ask` and `reward.py`. This is
textbook PPO for language models: no entropy bonus, no discount (γ = 1), no dropout, and the critic is a
network of its own. Other rewards than a reward model's: `--reward runs/dpo` uses that language model's
implicit reward β log(π_dpo / π_ref), and `--reward judge` what nobody has in real life, a reward that can be
checked.

What you see, what is healthy, and what to do otherwise:
    reward        mean over answers. Rises and levels off. If it rises on and on while the answers get
                  worse, the policy exploits the reward model's errors: raise --beta.
    kl            nats per answer from the reference, the sum of log π − log π_ref over its tokens. 0 at
                  first, then about 1 here. Far above: raise --beta; stuck near 0: lower it.
    objective     reward − β kl, the thing that is maximised. Should rise and level off.
    entropy       nats per token. Falls slowly. Near 0, the policy says one thing only: raise --beta.
    approx_kl     how far an iteration moved the policy, nats per token, mean over its minibatches. Below
                  0.02; above: lower --lr.
    clip_fraction share of tokens whose probability moved by more than the clip allows. Below 0.2.
    ratio         mean of π_new / π_old. Stays within 1% or so of 1.
    value_loss    half the critic's squared error, or the clipped one where that is larger, in the last
                  minibatch. Falls.
    explained_variance   1 − Var(return − value) / Var(return). 1 is a perfect critic, 0 one that knows
                  only the mean, below 0 a harmful one. Ends at 0.5 to 0.8 here.
    eos           share of answers that ended by themselves. Near 1; the others lose 1 (PENALTY).
    length        tokens per answer. Watch it: learned rewards often grow fond of length.
"""

import numpy as np
import torch

from data import ASKED, KINDS, MAX_ANSWER_TOKENS, BadInput, Tokenizer, documents, held_out, judge
from data import preference_file, read_preferences
from model import RANK, Run, ScalarGPT, add_common_options, final_scores, generate, last_index, load_model
from model import make_optimizers, make_parser, number, run_script, save_model, seeded, set_lr, set_up, shares
from model import token_log_probs, token_values, update

CLIP = 0.2  # of π_new / π_old, as a share, and of a value, in points of reward (Schulman et al. 2017)
LAMBDA = 0.95  # per token: 0 trusts the critic alone, 1 what really came (Schulman et al. 2015)
GROUP = 4  # answers to each prompt, for rloo and grpo: enough for a mean
MINIBATCH = 64  # answers per optimizer step
PENALTY = 1.0  # points of reward that an answer loses if it does not end by itself

parser = make_parser("ppo.py", "Align a pretrained model by PPO on a reward.")
option = parser.add_argument
option("--init", default="runs/pretrain", help="checkpoint to start from")
option("--reward", default="runs/reward", help="reward model, language model, or name in REWARDS")
option("--data", help="preference file with the prompts; if left out, preferences.jsonl in --init")
option("--out", default="runs/ppo", help="directory for the checkpoint")
option("--beta", type=number(float, 0), default=0.4, help="higher stays closer to the reference")
option("--advantage", choices=["gae", "rloo", "grpo"], default="gae", help="how to credit tokens")
option("--steps", type=number(int, 1), default=40, help="iterations")
option("--batch-size", type=number(int, GROUP), default=128, help="answers per iteration")
option("--epochs", type=number(int, 1), default=2, help="passes over an iteration's answers")
option("--lr", type=number(float, 1e-9), default=1e-3, help="peak learning rate")
add_common_options(parser)


REWARDS = {  # put any function of prompt and response here, and train on it with --reward NAME
    "length": lambda prompt, response: -abs(len(response.split()) - 4),  # likes four words, whichever
    "judge": judge,
}


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the tokens under the mask, and 0 elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred / (masked_mean(centred**2, mask) + 1e-8).sqrt()


def has_ended(tokens, mask, eos):
    """Whether each answer (B,) ends by itself, with EOS."""
    return ((tokens == eos) & mask).any(1)


def token_rewards(reward, log_probs, reference_log_probs, mask, beta):
    """What each token earns (B, T), from the rewards of whole answers (B,) (Ziegler et al. 2019, eq. 2).

    Every token pays β (log π − log π_ref); its mean over samples of π is the KL (the estimator k1, which
    may be negative for one sample). The last token of an answer earns the answer's reward as well.
    """
    rewards = -beta * (log_probs - reference_log_probs) * mask
    return rewards.scatter_add(1, last_index(mask), reward[:, None])


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


def group_advantages(returns, estimator):
    """Advantages (B,) from the returns (B,) of whole answers, GROUP neighbours answering one prompt.

    rloo: the return minus the mean of the other answers' (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).
    grpo: minus the group's mean, over its standard deviation (Shao et al. 2024, arXiv 2402.03300, 4.1.2).
    There each answer counts alike, by the mean over its tokens; here each token of a minibatch does.
    """
    groups = returns.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    if estimator == "rloo":
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
    """Half the squared error of the critic, all (B, T), in points of reward squared.

    A value that moved by more than CLIP since the answers were written gets no gradient that moves it on.
    """
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def drift(ratio, mask):
    """How far from the policy that sampled: mean ratio, approx_kl, clip_fraction, largest |ratio − 1|."""
    far = (ratio - 1).abs()
    means = [masked_mean(x, mask) for x in (ratio, ratio - 1 - ratio.log(), (far > CLIP).float())]
    return torch.stack([*means, far.max()])


def load_reward(args, tokenizer, reference):
    """What --reward says: a function score(tokens, mask, start), and the network behind it, or None.

    It gives each generated answer a number (B,): a reward model's score at the last token, a language model's
    implicit reward β log(π / π_ref) (Rafailov et al. 2023, eq. 5, without the part that only depends on the
    prompt), or what a function in REWARDS says. An answer that did not end by itself loses PENALTY, whatever
    gave the number. BadInput where --reward names no reward.
    """
    network = None if args.reward in REWARDS else load_model(args.reward, network=None)
    if network and Tokenizer.load(args.reward) != tokenizer:
        raise BadInput(f"{args.reward}: its tokenizer is not that of {args.init}; train both from one model")
    if network and not isinstance(network, ScalarGPT) and not network.beta:
        raise BadInput(f"{args.reward}: not aligned, so it has no implicit reward; give what dpo.py saved")
    if network:
        network.to(reference.device).requires_grad_(False)

    def score(tokens, mask, start):
        if isinstance(network, ScalarGPT):
            scores = final_scores(network, tokens, mask, start)
        elif network:
            both = [token_log_probs(model, tokens, mask, start).sum(1) for model in (network, reference)]
            scores = network.beta * (both[0] - both[1])
        else:
            prompts = [tokenizer.decode(row[:n]) for row, n in zip(tokens, mask.int().argmax(1))]
            answers = [tokenizer.decode(row[new]) for row, new in zip(tokens, mask)]
            scores = [float(REWARDS[args.reward](*texts)) for texts in zip(prompts, answers)]
            scores = torch.tensor(scores, device=tokens.device)
        return scores - PENALTY * ~has_ended(tokens, mask, tokenizer.eos)

    return score, network


def load_prompts(args, tokenizer, room):
    """Prompts as lists of ids, cut to `room` tokens: those to learn on, and those that are held out."""
    if args.reward in REWARDS and not args.data:
        texts = [document.prompt for document in documents(10_240, [args.seed, ASKED], KINDS[0])]
    else:
        texts = [record["prompt"] for record in read_preferences(preference_file(args))]
    prompts, held = {text: tokenizer.encode(text) for text in texts}, held_out(texts)  # each once
    if len(prompts) < 20:
        raise BadInput(f"{args.data or args.init}: {len(prompts)} prompts are too few; give 20 or more")
    if room < 1:
        raise BadInput(f"{args.init}: its context leaves no room for answers of {MAX_ANSWER_TOKENS} tokens")
    cut = sum(len(ids) > room for ids in prompts.values())
    print(f"{len(prompts) - len(held)} prompts to learn on, {len(held)} held out, {cut} cut to {room} tokens")
    train = [ids[-room:] for text, ids in prompts.items() if text not in held]
    return train, [ids[-room:] for text, ids in prompts.items() if text in held]


def main(args):
    with set_up(args) as device:
        # The policy starts as a copy of the reference, the critic as a copy of the reward model. All stay in
        # .eval(): the ratio compares the policy that writes with the one that learns, so dropout may not.
        tokenizer = Tokenizer.load(args.init)
        policy, reference = load_model(args.init).to(device), load_model(args.init).to(device)
        score, network = load_reward(args, tokenizer, reference.requires_grad_(False))
        learned = isinstance(network, ScalarGPT)  # else the critic is a copy of the reference with a new head
        new_head = None if learned else seeded("head", args.seed)
        critic = load_model(args.reward if learned else args.init, ScalarGPT, new_head).to(device)
        context = min(model.config.n_positions for model in (policy, critic, network or policy))
        train, val = load_prompts(args, tokenizer, context - MAX_ANSWER_TOKENS)
        eos = tokenizer.eos

        @torch.no_grad()
        def evaluate():
            """Mean reward and KL of answers to the held-out prompts."""
            generator, by_length = seeded("held out", args.seed, device=device), sorted(val, key=len)
            reward, kl = [], []
            for i in range(0, len(val), args.batch_size):
                asked = by_length[i : i + args.batch_size]
                tokens, mask, log_probs = generate(policy, asked, MAX_ANSWER_TOKENS, eos, generator=generator)
                reward += score(tokens, mask, len(asked[0])).tolist()
                kl += (log_probs - token_log_probs(reference, tokens, mask, len(asked[0]))).sum(1).tolist()
            return np.mean(reward), np.mean(kl)

        use_critic = args.advantage == "gae"
        if not use_critic and args.batch_size % GROUP:
            which = f"--batch-size {args.batch_size} with --advantage {args.advantage}"
            raise BadInput(f"{which}: answers come in groups of {GROUP}; give a multiple of {GROUP}")
        models = [policy, critic] if use_critic else [policy]
        if args.compile:
            for model in models:
                model.transformer.compile(dynamic=True)
        optimizers = [optimizer for model in models for optimizer in make_optimizers(model, args.lr)]
        tolerance = 1e-3 if args.dtype == "float32" else 0.5  # between one token at a time and all at once
        answers_each = 1 if use_critic else GROUP  # to a prompt
        n = args.batch_size // answers_each  # prompts per iteration
        n_minibatches = max(1, args.batch_size // MINIBATCH)
        rng = np.random.default_rng(args.seed)
        order = np.concatenate([rng.permutation(len(train)) for _ in range(0, args.steps * n, len(train))])
        order = shares(order[: args.steps * n].reshape(args.steps, n))
        weights = [p.detach().cpu().numpy() for p in network.parameters()] if network else args.reward
        run = Run(args, "ppo", args.steps, [train, val, weights], models, optimizers)
        for step in run:
            if step % 10 == 0:
                run.show(step, policy, tokenizer, val[-1])
            # 1. Rollout: the policy answers some prompts. The sampler's log-probabilities are the old ones.
            asked = [train[i] for i in order[step].repeat(answers_each)]
            start, generator = min(map(len, asked)), seeded("answers", args.seed, step, RANK, device=device)
            tokens, mask, old_log_probs = generate(policy, asked, MAX_ANSWER_TOKENS, eos, generator=generator)
            # 2. Score: one number per answer.
            reward = score(tokens, mask, start)
            assert reward.shape == (len(tokens),)
            # 3. Rewards: every token pays for leaving the reference; the last one also earns the score.
            reference_log_probs = token_log_probs(reference, tokens, mask, start)
            kl = (old_log_probs - reference_log_probs).sum(1)  # of single answers; their mean is the KL
            rewards = token_rewards(reward, old_log_probs, reference_log_probs, mask, args.beta)
            # 4. Advantages: what came, against what was expected.
            if use_critic:
                with torch.no_grad():
                    old_values = token_values(critic, tokens, mask, start)
                advantages = gae(rewards, old_values, mask)
                returns = advantages + old_values  # before whitening, which is only for the policy
                advantages = whiten(advantages, mask)
            else:
                # The KL apart: where a group's rewards are equal, grpo would blow up its noise to full size.
                paid = rewards.sum(1) - reward
                advantages = group_advantages(reward, args.advantage) + group_advantages(paid, "rloo")
                advantages = advantages[:, None] * mask
            # 5. Update: a few passes over these answers, in minibatches.
            set_lr(optimizers, step, args.steps, warmup=5)  # iterations: Adam's averages are rough at first
            shuffle, moved = seeded("minibatches", args.seed, step, RANK), []
            for _ in range(args.epochs):
                for i in torch.randperm(len(tokens), generator=shuffle).tensor_split(n_minibatches):
                    log_probs = token_log_probs(policy, tokens[i], mask[i], start)
                    loss, ratio = policy_loss(log_probs, old_log_probs[i], advantages[i], mask[i])
                    moved.append(drift(ratio.detach(), mask[i]))
                    if use_critic:
                        values = token_values(critic, tokens[i], mask[i], start)
                        critic_loss = value_loss(values, old_values[i], returns[i], mask[i])
                        loss = loss + critic_loss  # of two networks, so both parts count fully
                    loss.backward()
                    update(models, optimizers, weight=mask[i].sum())

            # The first minibatch still has the policy that sampled, and the first policy is the reference.
            agree = not moved[0][-1] > tolerance
            assert agree or step, "the sampler and the model disagree"
            if not agree:  # the same weights as before, but so large that roundings show
                raise BadInput(f"step {step + 1}: weights are beyond all bounds; usually --lr is too high")
            assert step or not kl.abs().mean() > tolerance, "the policy does not start as the reference"
            metrics = {"reward": reward.mean(), "kl": kl.mean()}
            metrics |= zip(("ratio", "approx_kl", "clip_fraction"), torch.stack(moved).mean(0))
            metrics["entropy"] = -masked_mean(old_log_probs, mask)
            metrics["objective"] = metrics["reward"] - args.beta * metrics["kl"]
            metrics["eos"] = has_ended(tokens, mask, eos).float().mean()
            metrics["length"] = mask.sum(1).float().mean()
            if use_critic:
                metrics["value_loss"] = critic_loss.detach()
                error, variance = (returns - old_values)[mask].var(), returns[mask].var()
                metrics["explained_variance"] = 1 - error / variance if variance > 1e-6 else 0.0
            run.log(weight=len(tokens), **{name: float(value) for name, value in metrics.items()})

        run.show(args.steps, policy, tokenizer, val[-1])
        reward, kl = evaluate()
        save_model(policy, tokenizer, args.out, beta=args.beta)
        explained = float(metrics["explained_variance"]) if use_critic else None
        look = ["--init", args.out, "--prompt", "…"] if args.data else ["--compare", args.init, args.out]
        before = next(line["objective"] for line in run.metrics if "objective" in line)  # of the reference
        fault = reward - args.beta * kl < before and "no better than the model that it started from"
        run.finish(["sample.py", *look], fault, reward=reward, kl=kl, explained_variance=explained)


if __name__ == "__main__":
    run_script(main, parser)
