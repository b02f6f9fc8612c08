"""Look at what the models write, and hold them against the best that any model could do.

    python sample.py --prompt 'POST: It snowed all day. My cousin Uma hid my drum at school.\nTL;DR:'
    python sample.py                 # the same in a loop: type a prompt, read the answer
    python sample.py --compare       # pretrained and aligned models in one table
    python sample.py --label 100     # be the volunteer yourself, then: python dpo.py --data runs/labels.jsonl

The judge of the embedded world is asked here, after training, and by the volunteers. No training script
sees it.

How the optimum is known. For a reference π_ref, a reward r and a strength β, the best policy is
π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β). Take k answers to a prompt from the reference and give answer i
the weight w_i = softmax(r / β)_i: that *is* π*, to sampling error. Its reward is Σ w r and its KL from
the reference is Σ w log(k w). With β from large to small this draws the frontier: no policy can earn
more at the same KL. A policy's share of the optimal gain is
    (its score − the reference's) / (the frontier's score at its KL − the reference's).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data import MAX_ANSWER_TOKENS, Tokenizer, documents, judge, read_preferences, read_text, write_text
from model import BadInput, generate, load_model, positive, printable, run, sample_texts, set_up, token_log_probs

parser = argparse.ArgumentParser("sample.py", description="Talk to a checkpoint, or compare checkpoints.")
parser.add_argument("--init", help="checkpoint to talk to (default: runs/dpo; with --label, runs/pretrain)")
parser.add_argument("--prompt", help=r"answer this and stop; \n stands for a new line")
parser.add_argument("--max-new-tokens", type=positive(int), default=MAX_ANSWER_TOKENS, help="default: %(default)s")
parser.add_argument("--temperature", type=positive(float, or_zero=True), default=1.0, help="0 always takes the likeliest (default: %(default)s)")
parser.add_argument("--top-k", type=positive(int, or_zero=True), default=0, help="choose among the k likeliest tokens (default: all)")
parser.add_argument("--top-p", type=positive(float), default=1.0, help="choose among the likeliest with this mass (default: all)")
parser.add_argument("--compare", nargs="*", metavar="DIR", help="score checkpoints, the reference first (default: those in runs/)")
parser.add_argument("--prompts", type=positive(int), default=64, help="held-out posts to compare on (default: %(default)s)")
parser.add_argument("--answers", type=positive(int), default=256, help="answers to each of them (default: %(default)s)")
parser.add_argument("--label", type=positive(int), metavar="N", help="show N pairs of answers and let you choose")
parser.add_argument("--labels", default="runs/labels.jsonl", help="file that your choices are added to (default: %(default)s)")
parser.add_argument("--data", help="with --label: preference file to take the prompts from (default: new posts)")
parser.add_argument("--json", action="store_true", help="print the comparison as one JSON list")
parser.add_argument("--seed", type=int, default=1, help="seed of the sampling (default: %(default)s)")
parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best one here")


def measure(policy, reference, tokenizer, posts, k, temperature=1.0):
    """k answers of the policy to each of P posts.

    Returns texts (P lists of k), the judge's scores (P, k), log π − log π_ref (P, k) and lengths (P, k)
    in tokens. At temperature 1 the mean of log π − log π_ref over these samples is the KL from the reference.
    """
    texts, scores, log_ratios, lengths = [], [], [], []
    for post in posts:
        prompt = tokenizer.encode(post)
        tokens, mask, log_probs = generate(policy, [prompt] * k, MAX_ANSWER_TOKENS, tokenizer.eos, temperature)
        with torch.no_grad():
            reference_log_probs = token_log_probs(reference, tokens, mask)
        texts.append([tokenizer.decode(row[new]) for row, new in zip(tokens, mask)])
        scores.append([judge(post, text) for text in texts[-1]])
        log_ratios.append((log_probs - reference_log_probs).sum(1).tolist())
        lengths.append(mask.sum(1).tolist())
    return texts, np.array(scores), np.array(log_ratios), np.array(lengths)


def optimal_weights(scores, beta):
    """The ideal policy's weight on each of k reference answers (P, k): softmax(r / β)."""
    w = np.exp((scores - scores.max(axis=1, keepdims=True)) / beta)
    return w / w.sum(axis=1, keepdims=True)


def frontier(scores, betas=np.geomspace(0.05, 1e4, 300)):
    """The best reward at each KL, from the scores (P, k) of reference answers.

    Returns (beta, KL, reward), an array each, KL ascending.
    """
    points = []
    for beta in betas[::-1]:
        w = optimal_weights(scores, beta)
        kl = (w * np.log(np.maximum(w * scores.shape[1], 1e-300))).sum(1).mean()
        points.append((beta, kl, (w * scores).sum(1).mean()))
    return np.array(points).T


def win_rate(scores, reference_scores, weights=None):
    """How often an answer (P, k) beats a reference answer (P, m) to the same post; ties count half."""
    if weights is None:
        weights = np.full(scores.shape, 1 / scores.shape[1])
    beats = np.sign(scores[:, :, None] - reference_scores[:, None, :]).mean(2) / 2 + 0.5  # (P, k)
    return (weights * beats).sum(1).mean()


def compare(args, device):
    directories = args.compare or [d for d in ("runs/pretrain", "runs/dpo", "runs/ppo") if Path(d, "config.json").exists()]
    if not directories:
        raise BadInput("runs/: no checkpoints there; run pretrain.py and dpo.py first")
    tokenizer = Tokenizer.load(directories[0])
    for directory in directories[1:]:
        if Tokenizer.load(directory) != tokenizer:
            raise BadInput(f"{directory}: its tokenizer is not that of {directories[0]}, so they cannot be compared")
    models = [load_model(directory).to(device) for directory in directories]
    posts = [prompt for prompt, _, _ in documents(args.prompts, seed=[0, 3])]
    measured = []
    for model in models:
        torch.manual_seed(args.seed)  # so that no model's figures depend on which others stand beside it
        measured.append(measure(model, models[0], tokenizer, posts, args.answers))
    reference_scores = measured[0][1]
    betas, kls, rewards = frontier(reference_scores)

    rows = []
    for directory, (_, scores, log_ratios, lengths) in zip(directories, measured):
        kl = round(log_ratios.mean(), 6) + 0.0  # not −0.0 for the reference itself
        optimal = np.interp(kl, kls, rewards)
        ideal = optimal_weights(reference_scores, np.exp(np.interp(kl, kls, np.log(betas))))
        gain, optimal_gain = scores.mean() - reference_scores.mean(), optimal - reference_scores.mean()
        rows.append({
            "checkpoint": str(directory), "score": scores.mean(), "kl": kl, "optimal_score": optimal,
            "share": gain / optimal_gain if rows else None, "win_rate": win_rate(scores, reference_scores),
            "optimal_win_rate": win_rate(reference_scores, reference_scores, ideal), "length": lengths.mean(),
        })  # fmt: skip
    if args.json:
        print(json.dumps(rows))
        return

    print(f"{args.prompts} held-out posts, {args.answers} answers to each, temperature 1\n")
    print(f"{'checkpoint':20}{'score':>8}{'KL':>8}{'optimum':>10}{'share':>8}{'wins':>8}{'optimum':>10}{'length':>8}")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        print(f"{row['checkpoint']:20}{row['score']:8.2f}{row['kl']:8.2f}{row['optimal_score']:10.2f}{share:>8}"
              f"{row['win_rate']:8.1%}{row['optimal_win_rate']:10.1%}{row['length']:8.1f}")  # fmt: skip
    print(
        "\nscore: the judge's, mean. KL: distance from the first model, in nats an answer. optimum: the best that"
        "\nany policy could do at that KL. share: of the optimal gain. wins: against the first model's answers,"
        "\nties half. length: in tokens, with the end.\n"
    )
    for i, post in enumerate(posts[:5]):
        print(post)
        for directory, (texts, scores, _, _) in zip(directories, measured):
            print(printable(f"    {str(directory):18}{scores[i][0]:6.2f} {texts[i][0]}"))
        print()


def label(args, device):
    """Two answers side by side; the user chooses. Each choice is a line in a preference file at once."""
    init = args.init or "runs/pretrain"
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    lines = [line for line in read_text(args.labels).split("\n") if line] if Path(args.labels).exists() else []
    if lines and lines[0].startswith("["):
        raise BadInput(f"{args.labels}: a JSON array, to which no line can be added; give another --labels file")
    seen = {record["prompt"] for record in read_preferences(args.labels)} if lines else set()
    if args.data:
        prompts = [record["prompt"] for record in read_preferences(args.data)]
    else:
        prompts = [prompt for prompt, _, _ in documents(len(seen) + 3 * args.label, seed=[args.seed, 4])]
    room = model.config.n_positions - args.max_new_tokens
    prompts = [p for p in dict.fromkeys(prompts) if p and p not in seen and len(tokenizer.encode(p)) < room]
    print(f"{args.labels}: {len(lines)} choices so far. 1 or 2: that one is better. s: skip. u: undo. q: stop and keep.\n")

    def new_pairs():
        for prompt in prompts:
            first, second = sample_texts(model, tokenizer, [prompt] * 2, args.max_new_tokens, temperature=args.temperature)
            if first != second:  # else there is nothing to choose
                yield prompt, first, second

    pairs, waiting, chosen_pairs = new_pairs(), [], []
    while len(chosen_pairs) < args.label:
        pair = waiting.pop() if waiting else next(pairs, None)
        if pair is None:
            break
        prompt, *answers = pair
        print(printable(f"{prompt}\n  1 {answers[0]}\n  2 {answers[1]}"))
        print(f"[{len(chosen_pairs) + 1} of {args.label}] 1, 2, s, u, q> ", end="", flush=True)
        key = (sys.stdin.readline() or "q").strip().lower()  # the end of the input is a q
        print()
        if key == "q":
            break
        if key in ("1", "2"):
            chosen, rejected = answers if key == "1" else answers[::-1]
            lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
            chosen_pairs.append(pair)
        elif key == "u" and chosen_pairs:
            lines.pop()
            waiting += [pair, chosen_pairs.pop()]
        elif key != "s":
            waiting.append(pair)  # ask again
        write_text(args.labels, "".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} choices in {args.labels}. Learn from them: python dpo.py --init {init} --data {args.labels}")


def main(args):
    device = set_up(args)
    if args.compare is not None:
        return compare(args, device)
    if args.label:
        return label(args, device)
    init = args.init or "runs/dpo"
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    while True:
        try:
            prompt = (args.prompt if args.prompt is not None else input("prompt> ")).replace(r"\n", "\n")
        except EOFError:
            break
        if prompt:
            how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
            print(printable(prompt + sample_texts(model, tokenizer, [prompt], args.max_new_tokens, **how)[0]))
        if args.prompt is not None:
            break


if __name__ == "__main__":
    run(main, parser)
