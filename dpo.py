"""Direct Preference Optimization: learn from people's choices, without a reward model and without RL.

Rafailov et al. 2023, "Your Language Model is Secretly a Reward Model", arXiv 2305.18290. In brief
(x is a prompt, y an answer, y_w the chosen and y_l the rejected one):

1. RLHF looks for the policy π that earns the most reward r while it stays near the reference π_ref:
       max over π of  E[r(x, y)] − β KL(π ‖ π_ref)                                             (eq. 3)
2. The answer is known. It is the reference, with each answer y made likelier by its reward:
       π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x)                                            (eq. 4)
   Z(x) sums over all texts there are, so π* cannot be computed. But read the equation backwards:
       r(x, y) = β log(π*(y|x) / π_ref(y|x)) + β log Z(x)                                      (eq. 5)
   For every reward there is an ideal policy, and every policy has an implicit reward it is ideal for.
3. People choose y_w over y_l with probability σ(r(x, y_w) − r(x, y_l)) (Bradley and Terry 1952). Only
   the difference counts. Both answers have the same prompt, so the unknown β log Z(x) cancels, and
   what is left is a loss that is ordinary classification:
       loss = −log σ(β log(π(y_w|x) / π_ref(y_w|x)) − β log(π(y_l|x) / π_ref(y_l|x)))          (eq. 7)

The pairs lie in `runs/pretrain/preferences.jsonl`: two answers of the pretrained model to each prompt, and
which one people like better. Open the file and look.

    python sample.py --ask
    python dpo.py

takes less than a minute on two CPU cores (AVX2). What you see, all on held-out pairs:
    val_loss      falls from log 2 = 0.693; no model can get below the volunteers' own noise
    val_accuracy  share of pairs where the chosen answer has the higher implicit reward β log(π / π_ref);
                  `best_accuracy` is the best that any model could do on these pairs
    margin        implicit reward of chosen − of rejected; grows from 0
    chosen        implicit reward of the chosen answers. It may fall below 0: the loss asks for the
                  *difference* only, and both answers may make room for a better one that was not in
                  this pair. Watch `margin`, and the samples.
    nats_per_token   the policy's surprise at the chosen answers. Beyond log V, what guessing blindly among
                  V tokens would give, the policy is broken: lower --lr, or raise --beta.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from data import Tokenizer, batches, best_accuracy, load_pairs, pad_pairs, preference_file
from model import Run, add_common_options, bar, load_model, make_optimizers, make_parser, number, refuse
from model import run_script, save_model, set_lr, set_up, shares, token_log_probs, update

LOSSES = ["dpo", "ipo", "cdpo", "hinge", "sft"]

parser = make_parser("dpo.py", "Align a model by Direct Preference Optimization.")
option = parser.add_argument
option("--init", default="runs/pretrain", help="checkpoint to start from")
option("--data", help="preference file; if left out, preferences.jsonl in --init")
option("--out", default="runs/dpo", help="directory for the checkpoint")
option("--beta", type=number(float, 1e-9), default=0.5, help="higher stays closer to the reference")
option("--loss", choices=LOSSES, default="dpo", help="which loss")
option("--steps", type=number(int, 1), help="optimizer steps; if left out, one pass over the pairs")
option("--batch-size", type=number(int, 1), default=32, help="pairs per step")
option("--lr", type=number(float, 1e-9), default=1.4e-3, help="peak learning rate")
add_common_options(parser)  # --lr, --batch-size: tuned on seed 0, see notebooks/tuning.jsonl


def dpo_loss(chosen, rejected, beta, loss="dpo"):
    """The loss of each pair (B,), from its two log-ratios log π(y|x) − log π_ref(y|x), (B,) each.

    A log-ratio is summed over the answer's tokens, EOS included. The gradient of "dpo" with respect to
    `chosen` is −β σ(β rejected − β chosen): pairs that the policy ranks wrong weigh most.
    """
    margin = chosen - rejected  # in nats; β times it is the implicit reward's
    match loss:
        case "dpo":  # Rafailov et al. 2023, eq. 7
            return -F.logsigmoid(beta * margin)
        case "ipo":  # Azar et al. 2023 (arXiv 2310.12036), eq. 17: aim at a margin, do not chase infinity
            return (margin - 1 / (2 * beta)) ** 2
        case "cdpo":  # Mitchell 2023 (ericmitchell.ai/cdpo.pdf): 10% of the labels are assumed flipped
            return -0.9 * F.logsigmoid(beta * margin) - 0.1 * F.logsigmoid(-beta * margin)
        case "hinge":  # Liu et al. 2023 (RSO, arXiv 2309.06657): done once the margin is 1
            return F.relu(1 - beta * margin)
        case "sft":  # fine-tuning on the chosen answers (Preferred-FT in the paper, section 6)
            return -chosen


def pair_log_probs(model, pairs, device):
    """log π(chosen|prompt) and log π(rejected|prompt) as (B, 2), in one forward pass."""
    tokens, mask, start = pad_pairs(pairs, device)
    return token_log_probs(model, tokens, mask, start, copies=2).sum(1).view(2, -1).T


def main(args):
    with set_up(args) as device:
        refuse(parser, args, ["beta"] if args.loss == "sft" else [], "on --loss sft")

        # The policy starts as a copy of the reference.
        tokenizer = Tokenizer.load(args.init)
        policy = load_model(args.init).to(device)

        # Pairs of answers to the same prompt, the last ones held out.
        path, context = preference_file(args), policy.config.n_positions
        pairs, records, n_val = load_pairs(path, tokenizer, context, args.batch_size)
        train, val = np.split(np.arange(len(pairs)), [len(pairs) - n_val])
        lengths = np.array([sum(map(len, pair)) for pair in pairs])

        # The reference never changes, so its log-probabilities are computed once, before the policy moves.
        # (One that changes must be saved, by `run.state.setdefault` after Run; all figures are beside it.)
        reference = torch.zeros(len(pairs), 2, device=device)
        with torch.no_grad():
            n = math.ceil(len(pairs) / args.batch_size)
            for rows in bar(np.array_split(lengths.argsort(), n), "reference"):
                reference[rows] = pair_log_probs(policy, [pairs[i] for i in rows], device)

        def log_ratios(rows):
            """log π(y|x) − log π_ref(y|x) of chosen and rejected answers, (B,) each."""
            return (pair_log_probs(policy, [pairs[i] for i in rows], device) - reference[rows]).unbind(1)

        @torch.no_grad()
        def evaluate():
            """The loss and the implicit rewards β log(π / π_ref) on the held-out pairs, means."""
            parts = np.split(val, range(args.batch_size, n_val, args.batch_size))
            chosen, rejected = torch.cat([torch.stack(log_ratios(rows)) for rows in parts], dim=1)
            margin, said = args.beta * (chosen - rejected), -(chosen + reference[val, 0])
            return {
                "val_loss": dpo_loss(chosen, rejected, args.beta, args.loss).mean().item(),
                "val_accuracy": (margin.sign().mean() / 2 + 0.5).item(),
                "margin": margin.mean().item(),
                "chosen": args.beta * chosen.mean().item(),
                "rejected": args.beta * rejected.mean().item(),
                "nats_per_token": (said.sum() / sum(len(pairs[i][1]) for i in val)).item(),
            }

        rng = np.random.default_rng(args.seed)
        order = shares(batches(len(train), args.batch_size, rng, args.steps))
        steps, tolerance = len(order), 1e-3 if args.dtype == "float32" else 0.5
        if args.compile:
            policy.transformer.compile(dynamic=True)
        optimizers = make_optimizers(policy, args.lr)
        run = Run(args, "dpo", steps, pairs, [policy], optimizers)
        for step in run:
            if step % 100 == 0:
                run.show(step, policy, tokenizer, pairs[val[-1]][0])
            rows = order[step]
            if step == 0:
                with torch.no_grad():
                    moved = torch.stack(log_ratios(rows)).abs().mean()
                assert moved < tolerance, "the policy does not start as the reference"
            policy.train()  # here alone: a dropout that you add would act now
            chosen, rejected = log_ratios(rows)
            loss = dpo_loss(chosen, rejected, args.beta, args.loss).mean()
            set_lr(optimizers, step, steps, warmup=10)  # steps: Adam's averages are rough at first
            loss.backward()
            update([policy], optimizers, weight=len(rows))
            policy.eval()

            if step % 100 == 99 or step == steps - 1:
                metrics = evaluate()
                run.log(weight=len(rows), loss=loss.item(), **metrics)
            elif step % 10 == 9:
                run.log(weight=len(rows), loss=loss.item())

        run.show(steps, policy, tokenizer, pairs[val[-1]][0])
        # With β the model is a reward model, too: β log(π / π_ref), where π_ref is the model in --init (and
        # no reference that has moved).
        save_model(policy, tokenizer, args.out, beta=None if args.loss == "sft" else args.beta)
        best = best_accuracy([records[i] for i in val])
        accuracy, loss = metrics["val_accuracy"], metrics["val_loss"]
        look = ["--init", args.out, "--prompt", "…"] if args.data else ["--compare", args.init, args.out]
        at_start = dpo_loss(torch.zeros(1), torch.zeros(1), args.beta, args.loss).item()
        fault = loss >= at_start and "no better than guessing"
        if metrics["nats_per_token"] > math.log(policy.config.vocab_size):
            fault = "worse than guessing at what people say"
        run.finish(["sample.py", *look], fault, val_accuracy=accuracy, best_accuracy=best, val_loss=loss)


if __name__ == "__main__":
    run_script(main, parser)
