"""Pretraining: learn what language looks like, by guessing the next token.

A language model gives a probability to every token that could come next. Training turns its knobs so
that the token that did come gets more of it. The loss is the mean surprise, the cross-entropy between the
text and the model, in nats per token:

    loss = −mean log π(token t | tokens before t)

The embedded world has a known source, so we know the lowest loss that any model could have: the source's
entropy. The gap between the two is what the model has yet to learn.

    python pretrain.py

takes less than a minute on two CPU cores (AVX2). You should see the held-out loss fall to 1.5% above the
entropy, and the model's likeliest answer to one prompt turn from noise into English. Look at what it says:
it repeats the first sentence, because most summaries do. It knows what language looks like, and doesn't do
what people want. That is what alignment is for.

    python pretrain.py --data a.txt b.txt.gz --vocab-size 1024 --n-layer 4

learns from text of your own instead. Nobody knows its entropy. The loss is then also given in bits per
byte, which can be compared between tokenizers: gzip needs about 3, and guessing blindly 8.
"""

import itertools
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import HELD_OUT, KINDS, TRAINED, BadInput, Tokenizer, batches, documents, encode_files, pad_rows
from data import read_chunks
from model import GPT, RANK, Config, Run, add_common_options, load_model, make_optimizers, make_parser, number
from model import refuse, run_script, save_model, seeded, set_lr, set_up, shares, update

parser = make_parser("pretrain.py", "Pretrain a small GPT on the embedded world or on your own text.")
option = parser.add_argument
option("--data", nargs="+", metavar="FILE", help="UTF-8 text, gzip too; if left out, the embedded world")
option("--init", help="checkpoint to start from, e.g. a GPT-2; if left out, from scratch")
option("--out", default="runs/pretrain", help="directory for the checkpoint")
option("--steps", type=number(int, 1), default=500, help="optimizer steps")
option("--batch-size", type=number(int, 1), default=64, help="documents per step")
option("--lr", type=number(float, 1e-9), default=0.02, help="peak learning rate")
option("--vocab-size", type=number(int, 1), default=768, help="size of the vocabulary, at most")
option("--block-size", type=number(int, 2), default=128, help="the context: longest text in tokens")
option("--n-layer", type=number(int, 1), default=2, help="blocks")
option("--n-head", type=number(int, 1), default=4, help="attention heads per block")
option("--n-embd", type=number(int, 1), default=128, help="width: channels of the hidden states")
add_common_options(parser)


def next_token_loss(model, tokens, mask):
    """Cross-entropy in nats per token, over the tokens (B, T) under the mask (B, T); the first is given."""
    logits = model(tokens[:, :-1]).float()  # (B, T − 1, V); those at t are about the token at t + 1
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)  # F.cross_entropy ignores −100
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_world(args, rng):
    """The embedded world, as (tokenizer, rows, order, val_rows, entropy).

    rows, val_rows: lists of token ids, each a document that ends with EOS. order: the indices of each step's
    rows. entropy: of the source, in nats per guessed token, so no model's loss can be lower.
    """
    # Every training document is new. The held-out ones are the same for every seed.
    train = documents(args.steps * args.batch_size, seed=[args.seed, TRAINED])
    val = documents(1024, seed=[0, HELD_OUT])
    if args.init:
        tokenizer = Tokenizer.load(args.init)
    else:
        tokenizer = Tokenizer.train([d.prompt + d.response for d in train[:4000]], args.vocab_size)
    rows = [tokenizer.encode(d.prompt + d.response) + [tokenizer.eos] for d in train + val]
    rows, val_rows = rows[: len(train)], rows[len(train) :]
    entropy = -sum(d.log_prob for d in val) / sum(len(row) - 1 for row in val_rows)  # nats per guessed token
    return tokenizer, rows, batches(len(rows), args.batch_size, rng), val_rows, entropy


def load_files(args, rng):
    """The same for your own text: rows of `block_size` tokens that begin anywhere. The end is held out.

    order is (steps, batch_size), and entropy None, since nobody knows it. BadInput where text is too short.
    """
    for path in args.data:
        if {".json", ".jsonl"} & {*Path(path).suffixes}:
            raise BadInput(f"{path}: JSON, of which the model would learn the brackets; give plain text")
        if not args.init and Path(path).is_fifo():  # once for the vocabulary, once to learn from
            raise BadInput(f"{path}: a pipe, and it would be read twice; write it to a file, and give that")
    if args.init:
        tokenizer = Tokenizer.load(args.init)
    else:  # the first sixteen million characters tell enough about which words are frequent
        pieces = itertools.islice((text for path in args.data for text in read_chunks(path)), 16)
        tokenizer = Tokenizer.train(pieces, args.vocab_size)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    ids = encode_files(tokenizer, args.data, Path(args.out, f"tokens{RANK or ''}.bin"))
    n_val = min(len(ids) // 10, 100_000) // args.block_size * args.block_size
    if n_val == 0:
        raise BadInput(f"{args.data[0]}: {len(ids)} tokens are too few; ten times --block-size are needed")
    rows = np.lib.stride_tricks.sliding_window_view(ids[:-n_val], args.block_size)
    order = rng.integers(0, len(rows), size=(args.steps, args.batch_size))
    return tokenizer, rows, order, ids[-n_val:].reshape(-1, args.block_size), None


def main(args):
    with set_up(args) as device:
        # Text: each row begins with a token that is given, and the rest is to be guessed.
        if args.init:
            sizes = [field.name for field in fields(Config) if field.name in args]
            sizes += ["block_size"] * (not args.data)
            refuse(parser, args, sizes, "with --init, which already fixes it")
        load = load_files if args.data else load_world
        tokenizer, rows, order, val_rows, entropy = load(args, np.random.default_rng(args.seed))
        order = shares(order)
        if args.init:
            model = load_model(args.init).to(device)
        else:
            config = Config(len(tokenizer.vocab), args.block_size, args.n_embd, args.n_layer, args.n_head)
            model = GPT(config, seeded("weights", args.seed)).to(device)
        longest = args.block_size if args.data else max(map(len, rows + val_rows))
        if longest > model.config.n_positions:
            context = model.config.n_positions
            raise BadInput(f"texts of {longest} tokens exceed the context, {context}: see --block-size")

        def batch(some):
            """Tokens (B, T) and the mask of what is to be guessed: all but the first token."""
            return pad_rows([row[:1] for row in some], [row[1:] for row in some], device)[:2]

        @torch.no_grad()
        def evaluate():
            """Cross-entropy on the held-out rows, in nats per token and in bits per byte."""
            by_length = sorted(val_rows, key=len)
            total = 0.0
            for i in range(0, len(by_length), args.batch_size):
                tokens, mask = batch(by_length[i : i + args.batch_size])
                total += next_token_loss(model, tokens, mask).item() * mask.sum().item()
            guessed = [int(token) for row in val_rows for token in row[1:]]
            n_bytes = sum(len(tokenizer.id_to_token[i]) for i in guessed if i != tokenizer.eos)
            return total / len(guessed), total / math.log(2) / max(1, n_bytes)

        if args.data:
            shown, temperature = val_rows[0][: max(1, args.block_size // 8)].tolist(), 0.8
        else:
            prompt = documents(1, seed=[0, HELD_OUT], kind=KINDS[0])[0].prompt
            shown, temperature = tokenizer.encode(prompt), 0

        if args.compile:
            model.transformer.compile(dynamic=True)
        optimizers = make_optimizers(model, args.lr)
        made_from = [tokenizer.merges, args.data and np.memmap(Path(args.out, f"tokens{RANK or ''}.bin"))]
        run = Run(args, "pretrain", args.steps, made_from, [model], optimizers)
        for step in run:
            if step % 100 == 0:
                run.show(step, model, tokenizer, shown, temperature)
            tokens, mask = batch([rows[i] for i in order[step]])
            model.train()  # here alone: a dropout that you add would act now
            loss = next_token_loss(model, tokens, mask)
            set_lr(optimizers, step, args.steps, warmup=20, final=0.05)  # steps; share of the full rate
            loss.backward()
            update([model], optimizers, weight=mask.sum())
            model.eval()

            if step % 100 == 99 or step == args.steps - 1:
                val_loss, bits_per_byte = evaluate()
                known = {"bits_per_byte": bits_per_byte} if args.data else {"entropy": entropy}
                run.log(weight=mask.sum(), loss=loss.item(), val_loss=val_loss, **known)
            elif step % 10 == 9:
                run.log(weight=mask.sum(), loss=loss.item())

        run.show(args.steps, model, tokenizer, shown, temperature)
        save_model(model, tokenizer, args.out)
        then = ["sample.py", "--init", args.out, *(["--prompt", "…"] if args.data else ["--ask"])]
        ratio = val_loss / entropy if entropy else None
        fault = val_loss >= math.log(model.config.vocab_size) and "no better than guessing"
        figures = {"val_loss": val_loss, "entropy": entropy, "ratio": ratio, "bits_per_byte": bits_per_byte}
        run.finish(then, fault, **figures)


if __name__ == "__main__":
    run_script(main, parser)
