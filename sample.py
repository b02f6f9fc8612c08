"""Look at what the models write, and compare them with the best that any model could do.

    python sample.py --prompt "…"     # go on from this text
    python sample.py                  # the same in a loop: type a prompt, read the answer
    python sample.py --words runs/pretrain    # … and what DPO's implicit reward says of each word
    python sample.py --ask            # two answers to each prompt, and volunteers choose: pairs for dpo.py
    python sample.py --label 100      # be the volunteer, then: python dpo.py --data runs/labels.jsonl
    python sample.py --compare        # pretrained and aligned models in one table

The judge of the embedded world is asked here, after training, and by the volunteers. No training script
sees it, but for `ppo.py --reward judge`.

How the optimum is known. For a reference π_ref, a reward r and a strength β, the best policy is
π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β). Take k answers to a prompt from the reference and give answer i
the weight w_i = softmax(r / β)_i: that *is* π*, to sampling error. Its reward is Σ w r and its KL from
the reference is Σ w log(k w). With β from large to small this draws the frontier: no policy can earn
more at the same KL. A policy's share of the optimal gain is
    (its score − the reference's) / (the frontier's score at its KL − the reference's).

At another temperature than 1 a model is another policy, the one that is really sampled, and its score, KL
and share are those of that policy. It is compared with the reference at temperature 1, always.
"""

import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data import ASKED, BEST, COMPARED, HELD_OUT, KINDS, LABELLED, MAX_ANSWER_TOKENS, BadInput, Tokenizer
from data import ask_volunteers, documents, judge, kind_of, locked, printable, read_preferences
from data import write_files, write_records
from model import RANK, bar, command, generate, load_model, make_parser, number, refuse, run_script
from model import sample_texts, seeded, set_up, token_log_probs

ENOUGH = 32  # choices to learn from: one batch of dpo.py
ESCAPED = {"n": "\n", "\\": "\\"}
ESCAPES = r"\n stands for a new line, \\ for a backslash"

parser = make_parser("sample.py", "Talk to a checkpoint, ask people about its answers, compare checkpoints.")
option = parser.add_argument
option("--init", help="checkpoint; if left out, runs/dpo, with --ask and --label runs/pretrain")
option("--temperature", type=number(float, 0), default=1.0, help="0 always takes the likeliest token")
option("--max-new-tokens", type=number(int, 1), default=MAX_ANSWER_TOKENS, help="longest answer, in tokens")
option("--seed", type=number(int, 0, 2**63 - 1), default=1, help="of the sampling")
option("--device", choices=["cpu", "cuda", "mps"], help="if left out, the best one here")
option = parser.add_argument_group("talk").add_argument
option("--prompt", metavar="TEXT", help=f"answer this and stop; {ESCAPES}")
option("--top-k", type=number(int, 0), default=0, help="choose among the k likeliest tokens; 0: all")
option("--top-p", type=number(float, 0, 1), default=1.0, help="choose among the likeliest with this mass")
option("--words", metavar="DIR", help="of what --init was aligned from: each token's implicit reward")
option = parser.add_argument_group("compare").add_argument
option("--compare", nargs="*", metavar="DIR", help="checkpoints, reference first; none: those in runs/")
option("--shifted", action="store_true", help="on the kind of prompts that no volunteer ever saw")
option("--n-prompts", type=number(int, 2), default=64, help="held-out prompts")
option("--answers", type=number(int, 2), default=256, help="per prompt of the reference; others a quarter")
option("--json", action="store_true", help="print one JSON list instead of a table")
option = parser.add_argument_group("ask").add_argument
asked = {"nargs": "?", "const": 16000, "metavar": "N", "type": number(int, 20)}
option("--ask", **asked, help="volunteers choose between two answers to each of N prompts; N: 16000")
option = parser.add_argument_group("label").add_argument
option("--label", type=number(int, 1), metavar="N", help="show N pairs and let you choose")
option("--out", default="runs/labels.jsonl", help="file that your choices are added to")
option("--data", help="preference file with prompts; if left out, new ones")


def measure(policy, reference, tokenizer, prompts, k, temperature=1.0, generator=None):
    """k answers of the policy to each of P prompts.

    Returns texts (P lists of k), and (P, k) each: the judge's scores, log π − log π_ref, lengths in tokens.
    π is what was sampled from, at that temperature; the mean of log π − log π_ref is its KL.
    """
    texts, scores, log_ratios, lengths = [], [], [], []
    how = {"temperature": temperature, "generator": generator}
    for prompt in bar(prompts, "prompts"):
        ids = tokenizer.encode(prompt)
        tokens, mask, log_probs = generate(policy, [ids] * k, MAX_ANSWER_TOKENS, tokenizer.eos, **how)
        with torch.no_grad():
            reference_log_probs = token_log_probs(reference, tokens, mask, len(ids), copies=k)
        texts.append([tokenizer.decode(row[new]) for row, new in zip(tokens, mask)])
        scores.append([judge(prompt, text) for text in texts[-1]])
        log_ratios.append((log_probs - reference_log_probs).sum(1).tolist())
        lengths.append(mask.sum(1).tolist())
    return texts, np.array(scores), np.array(log_ratios), np.array(lengths)


def optimal_weights(scores, beta):
    """The ideal policy's weight on each of k reference answers (P, k): softmax(r / β)."""
    w = np.exp((scores - scores.max(axis=1, keepdims=True)) / beta)
    return w / w.sum(axis=1, keepdims=True)


def wins(scores, reference_scores):
    """How often each answer (P, k) beats a reference answer (P, m) to its prompt: (P, k); ties count half."""
    return np.sign(scores[:, :, None] - reference_scores[:, None, :]).mean(2) / 2 + 0.5


def frontier(scores):
    """The ideal policies, from the scores (P, k) of reference answers, prompt by prompt.

    Returns KLs and scores, (100, P) each, where β falls and the KL rises along the first axis.
    """
    kls, best = [], []
    for beta in np.geomspace(1e4, 0.05, 100):
        w = optimal_weights(scores, beta)
        kls.append((w * np.log(np.maximum(w * scores.shape[1], 1e-300))).sum(1))
        best.append((w * scores).sum(1))
    return np.array(kls), np.array(best)


def standard_errors(statistic, n, resamples=400):
    """Bootstrap over n prompts (Efron 1979): how much `statistic(prompts)` varies when others are drawn."""
    rng = np.random.default_rng(0)
    return np.std([statistic(rng.integers(0, n, n)) for _ in range(resamples)], axis=0, ddof=1)


FIGURES = ("score", "kl", "optimal_score", "share", "win_rate", "length")
TITLES = "        score           KL  optimum          share            wins length"
LEGEND = f"""
score: the judge's, mean; {BEST} is perfect. KL: distance from the first model, nats per answer.
optimum: the best that any policy could do at that KL. share: of the optimal gain. wins:
against the first model's answers at temperature 1, ties half. length: in tokens.
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
    if not args.json:
        of = f"{args.n_prompts} held-out prompts, {args.answers} answers of the first model to each"
        print(f"{of}, temperature {args.temperature:g}; ± one standard error\n", flush=True)
    models = [load_model(name).to(device) for name in names]
    prompts = [d.prompt for d in documents(args.n_prompts, [0, COMPARED], kind=KINDS[args.shifted])]

    def measured_at(model, k, temperature=1.0):
        """Each model has the same random numbers: its figures do not depend on what it is compared with."""
        generator = seeded("compared", args.seed, device=device)
        return measure(model, models[0], tokenizer, prompts, k, temperature, generator)

    base = measured_at(models[0], args.answers)
    kls, best_scores = frontier(base[1])
    k = 1 if args.temperature < 1e-3 else max(2, args.answers // 4)
    measured = [base] if args.temperature == 1 else [measured_at(models[0], k, args.temperature)]
    measured += [measured_at(model, k, args.temperature) for model in models[1:]]

    rows, kinds = [], {}
    for name, (texts, scores, log_ratios, lengths) in zip(names, measured):
        kinds[name] = Counter(kind_of(prompt, text) for prompt, some in zip(prompts, texts) for text in some)
        means = np.array([x.mean(1) for x in (scores, log_ratios, wins(scores, base[1]), lengths)])

        def figures(some):
            """In the order of `FIGURES`, from the prompts of these numbers."""
            score, kl, win_rate, length = means[:, some].mean(1)
            best = np.interp(kl, kls[:, some].mean(1), best_scores[:, some].mean(1))
            before = base[1][some].mean()
            share = (score - before) / (best - before) if best - before > 1e-6 else math.nan
            return [score, kl, best, share, win_rate, length]

        row = {"checkpoint": name}
        both = figures(np.arange(len(prompts))), standard_errors(figures, len(prompts))
        for key, value, error in zip(FIGURES, *both):
            row |= {key: round(value, 6) + 0.0, f"{key}_se": round(error, 6)}  # + 0.0: no −0.0
        if row["kl"] < 0.05 or not row["share_se"] < 1:
            row |= {"share": None, "share_se": None}  # so near, next to nothing could be gained
        rows.append(row)
    if args.json:
        print(json.dumps(rows))
        return

    width = max(13, *map(len, names)) + 1
    print(f"{'checkpoint':{width}}{TITLES}")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.1%} ± {row['share_se']:.1%}"
        print(f"{row['checkpoint']:{width}}{row['score']:6.2f} ± {row['score_se']:.2f}", end="")
        print(f"{row['kl']:6.2f} ± {row['kl_se']:.2f}{row['optimal_score']:9.2f}{share:>15}", end="")
        print(f"{row['win_rate']:9.1%} ± {row['win_rate_se']:<5.1%}{row['length']:7.1f}")
    print(LEGEND)
    columns = [kind for kind, _ in sum(kinds.values(), Counter()).most_common()]
    print(" " * width + "".join(f"  {kind}" for kind in columns))
    for name, counts in kinds.items():
        shares = [f"{counts[kind] / counts.total():{len(kind) + 2}.0%}" for kind in columns]
        print(name.ljust(width) + "".join(shares))
    for i, prompt in enumerate(prompts[:5]):
        print(f"\n{prompt}")
        for name, (texts, scores, *_) in zip(names, measured):
            print(printable(f"    {name.ljust(width)}{scores[i][0]:6.2f} {texts[i][0]}"))


def ask(args, device):
    """Two answers of the model to each of N new prompts; volunteers choose, and their choices are written."""
    init = args.init or "runs/pretrain"
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    path = Path(init, "preferences.jsonl")
    if not os.access(init, os.W_OK):
        raise BadInput(f"{path}: cannot be written; copy {init}, and ask the copy")
    with contextlib.nullcontext() if RANK else locked(init):
        prompts = [document.prompt for document in documents(args.ask, [args.seed, ASKED], KINDS[0])]
        twice = [prompt for prompt in prompts for _ in range(2)]
        how = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        answers = sample_texts(model, tokenizer, twice, ("asked", args.seed), **how)
        records = ask_volunteers(prompts, answers, ["volunteers", args.seed])
        if not records:
            raise BadInput(f"{init}: its two answers to a prompt are always the same; raise --temperature")
        if RANK == 0:
            if path.exists():
                write_files(init, {path.name: None})
                print(f"{path}: the older file is now {path.name}.old")
            write_records(path, records)
    print(f"{path}: {len(records)} choices; the other pairs of answers were the same. One of them:")
    print(printable("{prompt}\n    chosen:  {chosen}\n    rejected:{rejected}".format(**records[0])))
    print(f"Next: {command('dpo.py', '--init', init)}")


def ask_user(question):
    """A line from the user, or None at the end of the input."""
    print(question, end="", flush=True)
    line = sys.stdin.readline() if sys.stdin else ""  # none at all, as by <&-
    return line.rstrip("\r\n") if line else None


def label(args, device):
    """Two answers side by side; the user chooses. Each choice is a line in a preference file at once."""
    init, path = args.init or "runs/pretrain", Path(args.out)
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file, locked(path):
        file.seek(0)
        if (before := file.read()).lstrip()[:1] in (b"[", b"\x1f"):
            raise BadInput(f"{path}: a JSON array or gzip, to which no line can be added; give another --out")
        file.write(b"\n" * (before[-1:] not in (b"", b"\n")))
        records = read_preferences(path) if before.strip() else []
        if args.data:
            prompts = [record["prompt"] for record in read_preferences(args.data)]
        else:
            n = len(records) + 3 * args.label
            prompts = [document.prompt for document in documents(n, [args.seed, LABELLED], kind=KINDS[0])]
        room, seen = model.config.n_positions - args.max_new_tokens, {record["prompt"] for record in records}
        if room < 2:
            raise BadInput(f"--max-new-tokens {args.max_new_tokens}: no room for a prompt; lower it")
        fit = [p for p in dict.fromkeys(prompts) if p not in seen and 0 < len(tokenizer.encode(p)) < room]
        if not fit:
            raise BadInput(f"{args.data or init}: no new prompt is left of less than {room} tokens")
        print(f"{path}: {len(records)} choices so far. 1 or 2: that one is better. s: skip. q: stop.\n")

        how, n = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}, 0
        for prompt in fit:
            answers = sample_texts(model, tokenizer, [prompt] * 2, ("labelled", args.seed, prompt), **how)
            if answers[0] == answers[1] or not "".join(answers).strip():
                continue  # there is nothing to choose
            print(printable(f"{prompt}\n  1 {answers[0]}\n  2 {answers[1]}"))
            key = ""
            while key not in ("1", "2", "s", "q"):
                key = ask_user(f"[{n + 1} of {args.label}] 1, 2, s, q> ")
                key = "q" if key is None else key.strip().lower()
            print()
            if key in ("1", "2"):
                chosen, rejected = answers if key == "1" else answers[::-1]
                record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(f"{json.dumps(record)}\n".encode())
                file.flush()
                os.fsync(file.fileno())
                n += 1
            if key == "q" or n == args.label:
                break
    n += len(records)
    then = f"{ENOUGH - n} more are needed to learn from them" if n < ENOUGH else "Learn from them:"
    print(f"{n} choices in {path}. {then}")
    if n >= ENOUGH:
        how = ["--init", init, "--data", path, "--beta", 0.1, "--steps", 30, "--out", "runs/mine"]
        print(f"    {command('dpo.py', *how)}")


def print_words(model, reference, tokenizer, tokens, mask):
    """Each token of an answer with its part of the implicit reward, β log(π / π_ref): a number and a bar."""
    with torch.no_grad():
        both = [token_log_probs(network, tokens, mask)[mask] for network in (model, reference)]
    for token, reward in zip(tokens[mask], model.beta * (both[0] - both[1])):
        length, text = min(60, round(8 * abs(reward.item()))), tokenizer.decode([token]) or "(end)"
        print(printable(f"{text!r:>16} {reward:7.2f} {('+' if reward > 0 else '-') * length}"))


def talk(args, device):
    """Answer `--prompt`, or one prompt after another until the end of the input."""
    init = args.init or "runs/dpo"
    tokenizer, model = Tokenizer.load(init), load_model(init).to(device)
    if args.words:
        reference = load_model(args.words).to(device)
        if not model.beta or Tokenizer.load(args.words) != tokenizer:
            raise BadInput(f"{init}: not aligned from {args.words}, so it has no implicit reward beside it")
    examples = (document.prompt for document in documents(1000, [0, HELD_OUT], KINDS[0]))
    if args.prompt is None:
        print(f"{init}, temperature {args.temperature:g}, goes on from what you type. It knows such texts:")
        print(f"\n{next(examples)}\n\nAn empty line takes another one of these. {ESCAPES}. Ctrl-D ends.")
    prompt, n = args.prompt if args.prompt is not None else ask_user("prompt> "), 0
    while prompt is not None:
        prompt, n = re.sub(r"\\(n|\\)", lambda found: ESCAPED[found[1]], prompt), n + 1
        try:
            if args.prompt is None and not prompt:
                prompt = next(examples)
            if not prompt:
                raise BadInput("an empty prompt: write a few words to go on from")
            ids, generator = tokenizer.encode(prompt), seeded("talk", args.seed, n, device=device)
            how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
            how |= {"max_new_tokens": args.max_new_tokens, "eos": tokenizer.eos, "generator": generator}
            tokens, mask, _ = generate(model, [ids], **how)
            print(printable(prompt + tokenizer.decode(tokens[mask])))
            if tokens[0, -1] != tokenizer.eos and mask.sum() < args.max_new_tokens:
                context = f"its context of {model.config.n_positions} tokens is full"
                print(f"(--max-new-tokens {args.max_new_tokens}: {context})", file=sys.stderr)
            if args.words:
                print_words(model, reference, tokenizer, tokens, mask)
        except BadInput as error:
            if args.prompt is not None:
                raise
            print(error)
        prompt = None if args.prompt is not None else ask_user("prompt> ")


def main(args):
    ways = {  # each with the options that only it has
        "compare": ["shifted", "n_prompts", "answers", "json"],
        "ask": [],
        "label": ["out", "data"],
        "prompt": ["top_k", "top_p", "words"],
    }
    way = "ask" if args.ask else "label" if args.label else "prompt"
    way = "compare" if args.compare is not None else way
    for other, names in ways.items():
        if other != way:
            because = f"without --{other}" if way == "prompt" else f"with --{way}"
            refuse(parser, args, [other, *names], because)
    refuse(parser, args, ["init", "max_new_tokens"] if way == "compare" else [], "with --compare")
    with set_up(args) as device:
        {"compare": compare, "ask": ask, "label": label, "prompt": talk}[way](args, device)


if __name__ == "__main__":
    run_script(main, parser)
