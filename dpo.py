"""Direct Preference Optimisation: learn from people's choices, without a reward model and without RL.

Rafailov et al. 2023, "Your Language Model is Secretly a Reward Model", arXiv 2305.18290. In brief:

1. RLHF looks for the policy π that earns the most reward r while it stays near the reference π_ref:
       max over π of  E[r(x, y)] − β KL(π ‖ π_ref)                                             (eq. 3)
2. The answer is known. It is the reference, with each answer y made likelier by its reward:
       π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x)                                            (eq. 4)
   Z(x) sums over all texts there are, so π* cannot be computed. But read the equation backwards:
       r(x, y) = β log(π*(y|x) / π_ref(y|x)) + β log Z(x)                                      (eq. 5)
   For every reward there is an ideal policy, and every policy conceals the reward it is ideal for.
3. People choose y_w over y_l with probability σ(r(x, y_w) − r(x, y_l)) (Bradley and Terry 1952). Only
   the difference counts. Both answers have the same prompt, so the unknown β log Z(x) cancels, and
   what is left is a loss that is ordinary classification:
       loss = −log σ(β log(π(y_w|x) / π_ref(y_w|x)) − β log(π(y_l|x) / π_ref(y_l|x)))          (eq. 7)

The first run samples two answers to each post from the pretrained model and asks the volunteers which
one they like better. The pairs are kept in `runs/preferences.jsonl`: open it and look.

    python dpo.py

takes less than a minute on two CPU cores. What you see while it runs, all on held-out pairs:
    val_loss      falls from log 2 = 0.693, its value before the first step; no model can get below the volunteers' own noise
    val_accuracy  share of pairs where the chosen answer has the higher implicit reward β log(π / π_ref)
    margin        implicit reward of chosen − of rejected; grows from 0
    chosen        implicit reward of the chosen answers. It may fall below 0, and that is no error: the
                  loss asks for the *difference* only. An answer that people like less loses probability,
                  one that they like a little more may lose some too, and both make room for a better
                  answer that was not in this pair. Watch `margin`, and the samples.
"""

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F

from data import MAX_ANSWER_TOKENS, Tokenizer, batches, best_accuracy, collect_preferences
from data import encode_pairs, pack_pairs, read_preferences
from model import BadInput, Checkpoint, Log, Muon, add_common_options, average_gradients, load_model, mine, positive
from model import run, sample_texts, save_model, set_lr, set_up, token_log_probs

parser = argparse.ArgumentParser("dpo.py", description="Align a pretrained model by Direct Preference Optimisation.")
parser.add_argument("--init", default="runs/pretrain", help="checkpoint to start from (default: %(default)s)")
parser.add_argument("--data", help="preference file (default: pairs of the model's own answers, made if missing)")
parser.add_argument("--pairs", type=positive(int), default=17_408, help="how many to collect if missing (default: %(default)s)")
parser.add_argument("--out", default="runs/dpo", help="directory for the checkpoint (default: %(default)s)")
parser.add_argument("--beta", type=positive(float), default=0.5, help="higher stays closer to the reference (default: %(default)s)")
parser.add_argument("--loss", choices=["dpo", "ipo", "cdpo", "hinge"], default="dpo", help="default: %(default)s")
parser.add_argument("--steps", type=positive(int), help="optimizer steps (default: one pass over the pairs)")
parser.add_argument("--batch-size", type=positive(int), default=64, help="pairs a step (default: %(default)s)")
parser.add_argument("--lr", type=positive(float), default=2e-3, help="peak learning rate (default: %(default)s)")
add_common_options(parser)


def dpo_loss(chosen, rejected, beta, kind="dpo"):
    """The loss of each pair (B,), from its two log-ratios log π(y|x) − log π_ref(y|x), (B,) each.

    A log-ratio is summed over the answer's tokens, EOS included. Its gradient by `chosen` is
    −β σ(β rejected − β chosen): pairs that the policy ranks wrong weigh most.
    """
    h = chosen - rejected
    match kind:
        case "dpo":  # Rafailov et al. 2023, eq. 7
            return -F.logsigmoid(beta * h)
        case "ipo":  # Azar et al. 2023 (arXiv 2310.12036), eq. 17: aim at a margin, do not chase infinity
            return (h - 1 / (2 * beta)) ** 2
        case "cdpo":  # Mitchell 2023: one choice in ten is taken for a slip of the hand
            return -0.9 * F.logsigmoid(beta * h) - 0.1 * F.logsigmoid(-beta * h)
        case "hinge":  # Zhao et al. 2023 (SLiC, arXiv 2305.10425): done once the margin is 1
            return F.relu(1 - beta * h)


def pair_log_probs(model, pairs, device):
    """log π(chosen|prompt) and log π(rejected|prompt) as (B, 2), in one forward pass."""
    tokens, masks, layout = pack_pairs(pairs, device)  # masks: (2, B, T)
    return (token_log_probs(model, tokens, masks.any(0), layout) * masks).sum(-1).T


def main(args):
    device = set_up(args)
    rng = np.random.default_rng(args.seed)

    # The policy starts as a copy of the reference.
    tokenizer = Tokenizer.load(args.init)
    policy = load_model(args.init).to(device)

    # Pairs of answers to the same prompt, the last ones held out.
    answer = lambda prompts: sample_texts(policy, tokenizer, prompts, MAX_ANSWER_TOKENS)
    data = args.data or collect_preferences(args.init, answer, args.pairs)
    records = read_preferences(data)
    pairs, kept = encode_pairs(tokenizer, records, policy.config.n_positions)
    if len(pairs) < max(20, args.batch_size):
        raise BadInput(f"{data}: {len(pairs)} usable pairs are too few; give at least 20, and not less than --batch-size")
    n_val = min(1024, len(pairs) // 10)
    train, val = range(len(pairs) - n_val), range(len(pairs) - n_val, len(pairs))
    lengths = [len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs]
    print(f"{data}: {len(train)} pairs to learn from, {n_val} held out, {len(records) - len(pairs)} dropped")

    # The reference never changes, so its log-probabilities are computed once and it can leave memory.
    reference = torch.zeros(len(pairs), 2, device=device)
    with torch.no_grad():
        for rows in batches(lengths, args.batch_size, rng):
            reference[rows] = pair_log_probs(policy, [pairs[i] for i in rows], device)

    def log_ratios(rows):
        """log π(y|x) − log π_ref(y|x) of chosen and rejected answers, (B,) each."""
        return (pair_log_probs(policy, [pairs[i] for i in rows], device) - reference[rows]).unbind(1)

    @torch.no_grad()
    def evaluate():
        chosen, rejected = torch.cat([torch.stack(log_ratios(rows)) for rows in np.array_split(val, min(8, n_val))], dim=1)
        margin = args.beta * (chosen - rejected)
        return {"val_loss": dpo_loss(chosen, rejected, args.beta, args.loss).mean().item(),
                "val_accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item(),
                "chosen": args.beta * chosen.mean().item(), "rejected": args.beta * rejected.mean().item()}  # fmt: skip

    if args.compile:
        policy.transformer.compile(dynamic=True)
    optimizer = Muon(policy, args.lr)
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = args.steps or per_epoch
    epochs = math.ceil(steps / per_epoch)
    order = [rows for _ in range(epochs) for rows in batches(lengths[: len(train)], args.batch_size, rng)]
    mine(min(order, key=len))  # if a batch is too small for all processes, better to know now
    checkpoint = Checkpoint(args, rng, policy=policy, optimizer=optimizer)
    log = Log(args.out, steps, "dpo", checkpoint.step)
    for step in range(checkpoint.step, steps):
        rows = mine(order[step])
        chosen, rejected = log_ratios(rows)
        loss = dpo_loss(chosen, rejected, args.beta, args.loss).mean()
        if step == 0 and args.loss == "dpo":  # policy and reference are still the same
            assert abs(loss.item() - math.log(2)) < (1e-3 if args.dtype == "float32" else 0.1), loss.item()
        set_lr(optimizer, step, steps, warmup=10)
        loss.backward()
        loss = average_gradients(policy.parameters(), loss, weight=len(rows))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 50 == 49 or step == steps - 1:
            val_figures = evaluate()
            log(step + 1, loss=loss.item(), **val_figures)
        elif step % 10 == 9:
            log(step + 1, loss=loss.item())
        log.bar.update()
        if step + 1 < steps:
            checkpoint.save(step + 1)

    save_model(policy, tokenizer, args.out)
    checkpoint.finish()
    log.close(val_accuracy=val_figures["val_accuracy"], val_loss=val_figures["val_loss"], seconds=checkpoint.seconds())
    print(f"held-out pairs: loss {val_figures['val_loss']:.4f}, accuracy {val_figures['val_accuracy']:.3f}", end="")
    if best := best_accuracy(kept[-n_val:]):
        print(f"; no model can be right more often than {best:.3f}", end="")
    print(f"\nsaved to {args.out}")


if __name__ == "__main__":
    run(main, parser)
