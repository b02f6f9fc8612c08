"""Look at what the models write, and hold them against the best that any model could do.

    python sample.py --prompt 'POST: It snowed all day. My cousin Uma hid my drum abroad.\nTL;DR:'
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

At another temperature than 1 a model is another policy, the one that is really sampled, and its score, KL
and share are those of that policy. The reference that it is held against is always at temperature 1.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from data import MAX_ANSWER_TOKENS, BadInput, Tokenizer, documents, judge, printable, read_preferences
from data import read_text, write_files
from model import generate, load_model, make_parser, number, run_script, sample_texts, set_up
from model import token_log_probs

parser = make_parser("sample.py", "Talk to a checkpoint, compare checkpoints, or label pairs of answers.")
option = parser.add_argument
option("--init", help="checkpoint to talk to; if left out, runs/dpo, or with --label runs/pretrain")
option("--prompt", help=r"answer this and stop; \n stands for a new line")
option("--max-new-tokens", type=number(int, 1, 2**31), default=MAX_ANSWER_TOKENS, help="longest answer")
option("--temperature", type=number(float, 0), default=1.0, help="0 always takes the likeliest token")
option("--top-k", type=number(int, 0), default=0, help="choose among the k likeliest tokens; 0: all")
option("--top-p", type=number(float, 0, 1), default=1.0, help="choose among the likeliest with this mass")
option("--compare", nargs="*", metavar="DIR", help="checkpoints, the reference first; none: those in runs/")
option("--shifted", action="store_true", help="compare on letters, which no volunteer ever saw")
option("--posts", type=number(int, 2), default=64, help="held-out posts to compare on")
option("--answers", type=number(int, 2), default=256, help="answers of the reference to each of them")
option("--json", action="store_true", help="print the comparison as one JSON list")
option("--label", type=number(int, 1), metavar="N", help="show N pairs and let you choose")
option("--labels", default="runs/labels.jsonl", help="file that your choices are added to")
option("--data", help="with --label: preference file with prompts; if left out, new posts")
option("--seed", type=number(int, 0, 2**63 - 1), default=1, help="seed of the sampling")
option("--device", choices=["cpu", "cuda", "mps"], help="the best one here, if left out")


def measure(policy, reference, tokenizer, posts, k, temperature=1.0):
    """k answers of the policy to each of P posts.

    Returns texts (P lists of k), and (P, k) each: the judge's scores, log π − log π_ref, lengths in tokens.
    π is what was sampled from, at that temperature; the mean of log π − log π_ref is its KL.
    """
    texts, scores, log_ratios, lengths = [], [], [], []
    for post in posts:
        prompt = tokenizer.encode(post)
        same = [prompt] * k
        tokens, mask, log_probs = generate(policy, same, MAX_ANSWER_TOKENS, tokenizer.eos, temperature)
        with torch.no_grad():
            reference_log_probs = token_log_probs(reference, tokens, mask, len(prompt), copies=k)
        texts.append([tokenizer.decode(row[new]) for row, new in zip(tokens, mask)])
        scores.append([judge(post, text) for text in texts[-1]])
        log_ratios.append((log_probs - reference_log_probs).sum(1).tolist())
        lengths.append(mask.sum(1).tolist())
    return texts, np.array(scores), np.array(log_ratios), np.array(lengths)


def optimal_weights(scores, beta):
    """The ideal policy's weight on each of k reference answers (P, k): softmax(r / β)."""
    w = np.exp((scores - scores.max(axis=1, keepdims=True)) / beta)
    return w / w.sum(axis=1, keepdims=True)


def wins(scores, reference_scores):
    """How often each answer (P, k) beats a reference answer (P, m) to its post: (P, k); ties count half."""
    return np.sign(scores[:, :, None] - reference_scores[:, None, :]).mean(2) / 2 + 0.5


def frontier(scores, values=()):
    """The ideal policies, from the scores (P, k) of reference answers, post by post.

    Returns an array (2 + len(values), 100, P), where β falls and the KL rises along the second axis: each
    policy's KL from the reference, its score, and its mean of each of `values` (P, k).
    """
    points = []
    for beta in np.geomspace(1e4, 0.05, 100):
        w = optimal_weights(scores, beta)
        kl = (w * np.log(np.maximum(w * scores.shape[1], 1e-300))).sum(1)
        points.append([kl, *[(w * value).sum(1) for value in (scores, *values)]])
    return np.array(points).transpose(1, 0, 2)


def standard_errors(statistic, n_posts, resamples=400):
    """Bootstrap over posts (Efron 1979): how much `statistic(posts)` varies when other posts are drawn."""
    rng = np.random.default_rng(0)
    return np.std([statistic(rng.integers(0, n_posts, n_posts)) for _ in range(resamples)], axis=0, ddof=1)


TABLE = [  # title of a column, its figure, how to print it, and whether its standard error stands beside it
    ("score", "score", ".2f", True),
    ("KL", "kl", ".2f", True),
    ("optimum", "optimal_score", ".2f", False),
    ("share", "share", ".1%", True),
    ("wins", "win_rate", ".1%", True),
    ("optimum", "optimal_win_rate", ".1%", False),
    ("length", "length", ".1f", False),
    ("repeats", "repeats", ".0%", False),
]
LEGEND = """
score: the judge's, mean; 4 is perfect. KL: distance from the first model, in nats an answer. optimum: the
best that any policy could do at that KL. share: of the optimal gain. wins: against the first model's answers
at temperature 1, ties half. length: in tokens. repeats: answers that repeat the post's first sentence.
"""


def compare(args, device):
    names = args.compare or [f"runs/{name}" for name in ("pretrain", "dpo", "ppo")]
    names = [name for name in names if args.compare or Path(name, "config.json").exists()]
    if not names:
        raise BadInput("runs/: no checkpoints there; run pretrain.py and dpo.py first")
    tokenizer = Tokenizer.load(names[0])
    for name in names[1:]:
        if Tokenizer.load(name) != tokenizer:
            raise BadInput(f"{name}: its tokenizer is not that of {names[0]}, so they cannot be compared")
    models = [load_model(name).to(device) for name in names]
    posts = [d.prompt for d in documents(args.posts, seed=[0, 3], kind="LETTER" if args.shifted else "POST")]
    firsts = [re.match(r"\w+:( .+?\.)", post)[1] for post in posts]

    def ask(model, k, temperature=1.0):
        torch.manual_seed(args.seed)  # so that no model's figures depend on which others stand beside it
        return measure(model, models[0], tokenizer, posts, k, temperature)

    base = ask(models[0], args.answers)
    optimum = frontier(base[1], [wins(base[1], base[1])])
    k = 1 if args.temperature < 1e-3 else max(2, args.answers // 4)
    measured = [base] if args.temperature == 1 else [ask(models[0], k, args.temperature)]
    measured += [ask(model, k, args.temperature) for model in models[1:]]

    rows = []
    for name, (texts, scores, log_ratios, lengths) in zip(names, measured):
        repeats = np.array([[text == first for text in some] for some, first in zip(texts, firsts)])
        means = np.array([x.mean(1) for x in (scores, log_ratios, wins(scores, base[1]), lengths, repeats)])

        def figures(some):
            """In the order of `TABLE`, from the posts of these numbers."""
            score, kl, win_rate, length, repeats = means[:, some].mean(1)
            kls, optimal_scores, optimal_wins = optimum[:, :, some].mean(2)
            best, start = np.interp(kl, kls, optimal_scores), base[1][some].mean()
            share = (score - start) / max(best - start, 1e-9)
            return [score, kl, best, share, win_rate, np.interp(kl, kls, optimal_wins), length, repeats]

        row = {"checkpoint": name}
        both = figures(np.arange(len(posts))), standard_errors(figures, len(posts))
        for (_, key, _, _), value, error in zip(TABLE, *both):
            row |= {key: round(value, 6) + 0.0, f"{key}_se": round(error, 6)}  # + 0.0: no −0.0
        if row["kl"] < 0.05:
            row |= {"share": None, "share_se": None}  # so near, next to nothing could be gained
        rows.append(row)
    if args.json:
        print(json.dumps(rows))
        return

    kind = "letters" if args.shifted else "posts"
    print(f"{args.posts} held-out {kind}, temperature {args.temperature:g}; ± one standard error\n")
    widths = [15 if with_error else 9 for *_, with_error in TABLE]
    print(f"{'checkpoint':14}" + "".join(f"{title:>{width}}" for (title, *_), width in zip(TABLE, widths)))
    for row in rows:
        cells = []
        for _, key, form, with_error in TABLE:
            cell = "" if row[key] is None else f"{row[key]:{form}}"
            cells.append(f"{cell} ± {row[f'{key}_se']:{form}}" if with_error and cell else cell)
        print(f"{row['checkpoint']:14}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths)))
    print(LEGEND)
    for i, post in enumerate(posts[:5]):
        print(post)
        for name, (texts, scores, _, _) in zip(names, measured):
            print(printable(f"    {name:18}{scores[i][0]:6.2f} {texts[i][0]}"))
        print()


def ask_user(question):
    """A line from the user, or None at the end of the input."""
    print(question, end="", flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def label(args, device):
    """Two answers side by side; the user chooses. Each choice is a line in a preference file at once."""
    init = args.init or "runs/pretrain"
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    path = Path(args.labels)
    lines = [line for line in read_text(path).split("\n") if line] if path.exists() else []
    if lines and lines[0].startswith("["):
        raise BadInput(f"{path}: a JSON array, to which no line can be added; give another --labels file")

    def save():
        write_files(path.parent, {path.name: "".join(f"{line}\n" for line in lines).encode()})

    save()  # if it cannot be written, better to know before the first choice
    seen = {record["prompt"] for record in read_preferences(path)} if lines else set()
    if args.data:
        prompts = [record["prompt"] for record in read_preferences(args.data)]
    else:
        prompts = [d.prompt for d in documents(len(seen) + 3 * args.label, seed=[args.seed, 4], kind="POST")]
    room = model.config.n_positions - args.max_new_tokens
    prompts = [p for p in dict.fromkeys(prompts) if p and p not in seen and len(tokenizer.encode(p)) < room]
    if not prompts:
        raise BadInput(f"{args.data or init}: no new prompt is left that fits into the model's context")
    print(f"{path}: {len(lines)} choices so far. 1 or 2: that one is better. s: skip. u: undo. q: stop.\n")

    def new_pairs():
        for prompt in prompts:
            how = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
            first, second = sample_texts(model, tokenizer, [prompt] * 2, **how)
            if first != second:  # else there is nothing to choose
                yield prompt, first, second

    pairs, waiting, chosen_pairs = new_pairs(), [], []
    while len(chosen_pairs) < args.label:
        pair = waiting.pop() if waiting else next(pairs, None)
        if pair is None:
            break
        prompt, *answers = pair
        print(printable(f"{prompt}\n  1 {answers[0]}\n  2 {answers[1]}"))
        key = ask_user(f"[{len(chosen_pairs) + 1} of {args.label}] 1, 2, s, u, q> ")
        print()
        key = "q" if key is None else key.strip().lower()
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
        save()
    print(f"{len(lines)} choices in {path}. Learn from them: python dpo.py --init {init} --data {path}")


def talk(args, device):
    """Answer `--prompt`, or one prompt after another until the end of the input."""
    init = args.init or "runs/dpo"
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    prompt = args.prompt if args.prompt is not None else ask_user("prompt> ")
    while prompt is not None:
        prompt = prompt.replace(r"\n", "\n")
        try:
            if not prompt:
                raise BadInput("an empty prompt: write a few words to go on from")
            print(printable(prompt + sample_texts(model, tokenizer, [prompt], args.max_new_tokens, **how)[0]))
        except BadInput as error:
            if args.prompt is not None:
                raise
            print(error)
        prompt = None if args.prompt is not None else ask_user("prompt> ")


def main(args):
    device = set_up(args)
    if args.compare is not None:
        compare(args, device)
    elif args.label:
        label(args, device)
    else:
        talk(args, device)


if __name__ == "__main__":
    run_script(main, parser)
