"""The reward model: learn to predict which of two answers people choose. RLHF's second step.

The network is the pretrained GPT with one number at its end instead of logits: the score r(x, y) of answer
y to prompt x, read at the last token, EOS, when the whole answer is known. People choose y_w over y_l with
probability σ(r(x, y_w) − r(x, y_l)) (Bradley and Terry 1952), so the loss is
    loss = −log σ(r(x, y_w) − r(x, y_l))                              (Ouyang et al. 2022, eq. 1)

Only differences count: any constant could be added to all scores. So at the end the scores are shifted to
mean 0 on the pretrained model's own answers. A score above 0 then means "better than usual".

    python sample.py --ask      # unless dpo.py's pairs are there already
    python reward.py

takes half a minute on two CPU cores (AVX2), and learns from the same preference file as `dpo.py`. What
you see while it runs, all on held-out pairs:
    val_loss      falls from about log 2 = 0.693; no model can get below the volunteers' own noise
    val_accuracy  share of pairs where the chosen answer has the higher score. People make mistakes, so it
                  can't reach 1: `best_accuracy` is the best that any model could do on these pairs
    margin        score of chosen − of rejected; grows from about 0
The table shows calibration: of the pairs where the model was 80% sure, was it right in 80%?
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from data import MAX_ANSWER_TOKENS, Tokenizer, batches, best_accuracy, load_pairs, pad_pairs, preference_file
from model import Run, ScalarGPT, add_common_options, final_scores, generate, load_model, make_optimizers
from model import make_parser, number, run_script, save_model, seeded, set_lr, set_up, shares, update

parser = make_parser("reward.py", "Learn a reward model from preferences.")
option = parser.add_argument
option("--init", default="runs/pretrain", help="checkpoint to start from")
option("--data", help="preference file; if left out, preferences.jsonl in --init")
option("--out", default="runs/reward", help="directory for the checkpoint")
option("--steps", type=number(int, 1), help="optimizer steps; if left out, one pass over the pairs")
option("--batch-size", type=number(int, 1), default=32, help="pairs per step")
option("--lr", type=number(float, 1e-9), default=5e-3, help="peak learning rate")
add_common_options(parser)  # --lr, --batch-size: tuned on seed 0, see notebooks/tuning.jsonl


def reward_loss(chosen, rejected):
    """The loss of each pair (B,), from the scores of its two answers, (B,) each."""
    return -F.logsigmoid(chosen - rejected)


def pair_scores(model, pairs, device):
    """r(prompt, chosen) and r(prompt, rejected) as (B, 2), in one forward pass."""
    tokens, mask, start = pad_pairs(pairs, device)
    return final_scores(model, tokens, mask, start, copies=2).view(2, -1).T


def calibration(margin, bins=10):
    """How sure the model was and how often it was right, pair by pair from margins (N,), in bins.

    It is σ(|margin|) sure of its favourite; a margin of 0 is right in half. Returns rows (mean certainty,
    share right, pairs).
    """
    certainty, right = torch.sigmoid(margin.abs()), margin.sign() / 2 + 0.5
    which = ((certainty - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = [(certainty[which == i], right[which == i]) for i in range(bins)]
    return [(c.mean().item(), r.mean().item(), len(c)) for c, r in rows if len(c)]


@torch.no_grad()
def shift_to_mean_0(model, reference, prompts, eos, batch_size, generator):
    """Shift all scores so that their mean is 0 on the reference's own answers to these prompts."""
    prompts, scores = sorted(prompts, key=len), []
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        tokens, mask, _ = generate(reference, some, MAX_ANSWER_TOKENS, eos, generator=generator)
        scores.append(final_scores(model, tokens, mask))
    model.shift(-torch.cat(scores).mean())


def main(args):
    with set_up(args) as device:
        # The reward model starts as the reference, with a new head.
        tokenizer = Tokenizer.load(args.init)
        reference = load_model(args.init).to(device)
        model = load_model(args.init, ScalarGPT, new_head=seeded("head", args.seed)).to(device)

        # Pairs of answers to the same prompt, the last ones held out.
        path, context = preference_file(args), model.config.n_positions
        pairs, records, n_val = load_pairs(path, tokenizer, context, args.batch_size)
        train, val = np.split(np.arange(len(pairs)), [len(pairs) - n_val])

        @torch.no_grad()
        def evaluate():
            """The margins (N,) of the held-out pairs, and what is logged of them."""
            parts = np.split(val, range(args.batch_size, n_val, args.batch_size))
            scores = torch.cat([pair_scores(model, [pairs[i] for i in rows], device) for rows in parts])
            margin = scores[:, 0] - scores[:, 1]
            return margin, {
                "val_loss": reward_loss(*scores.unbind(1)).mean().item(),
                "val_accuracy": (margin.sign().mean() / 2 + 0.5).item(),
                "margin": margin.mean().item(),
            }

        rng = np.random.default_rng(args.seed)
        order = shares(batches(len(train), args.batch_size, rng, args.steps))
        steps = len(order)
        if args.compile:
            model.transformer.compile(dynamic=True)
        optimizers = make_optimizers(model, args.lr)
        run = Run(args, "reward", steps, pairs, [model], optimizers)
        for step in run:
            rows = order[step]
            model.train()  # here alone: a dropout that you add would act now
            chosen, rejected = pair_scores(model, [pairs[i] for i in rows], device).unbind(1)
            loss = reward_loss(chosen, rejected).mean()
            set_lr(optimizers, step, steps, warmup=10)  # steps: Adam's averages are rough at first
            loss.backward()
            update([model], optimizers, weight=len(rows))
            model.eval()

            if step % 100 == 99 or step == steps - 1:
                margin, metrics = evaluate()
                run.log(weight=len(rows), loss=loss.item(), **metrics)
            elif step % 10 == 9:
                run.log(weight=len(rows), loss=loss.item())

        prompts, generator = [pairs[i][0] for i in val], seeded("answers", args.seed, device=device)
        shift_to_mean_0(model, reference, prompts, tokenizer.eos, args.batch_size, generator)
        save_model(model, tokenizer, args.out)
        best = best_accuracy([records[i] for i in val])
        print("how sure   how often right   pairs")
        for certainty, right, n in calibration(margin):
            print(f"{certainty:8.0%}{right:18.0%}{n:8}")
        accuracy, loss = metrics["val_accuracy"], metrics["val_loss"]
        then = ["ppo.py", "--init", args.init, "--reward", args.out]
        then += ["--data", args.data] if args.data else []
        fault = loss >= math.log(2) and "no better than guessing"
        run.finish(then, fault, val_accuracy=accuracy, best_accuracy=best, val_loss=loss)


if __name__ == "__main__":
    run_script(main, parser)
