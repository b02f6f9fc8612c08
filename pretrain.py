"""Pretraining: learn what language looks like, by guessing the next token.

A language model gives a probability to every token that could come next. Training turns its knobs so
that the token that did come gets more of it. The loss is the mean surprise, in nats per token:

    loss = −mean log π(token t | tokens before t)

The embedded world has a known source, so we know the lowest loss that any model could have: the source's
entropy. The gap between the two is what the model has yet to learn.

    python pretrain.py

takes about a minute on two CPU cores. You should see the held-out loss fall to within 2% of the entropy,
and the model's summaries turn from noise into English. Mind what they are: English, as all six hands
write it, and mostly not what was asked for. That is what alignment is for.

    python pretrain.py --data a.txt b.txt.gz --vocab-size 1024 --n-layer 4

learns from text of your own instead. Nobody knows its entropy. The loss is then also given in bits per
byte, which can be compared between tokenizers: gzip needs about 3, and guessing blindly 8.
"""

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch

from data import MAX_ANSWER_TOKENS, Tokenizer, batches, documents, encode_files, pad_rows, read_chunks
from model import GPT, BadInput, Checkpoint, Config, Log, Muon, add_common_options, average_gradients, generate
from model import load_model, mine, positive, printable, run, save_model, set_lr, set_up, token_log_probs

parser = argparse.ArgumentParser("pretrain.py", description="Pretrain a small GPT on the embedded world or on your own text.")
parser.add_argument("--data", nargs="+", metavar="FILE", help="UTF-8 text, gzip too (default: the embedded world)")
parser.add_argument("--init", help="checkpoint to start from, e.g. a GPT-2 (default: from scratch)")
parser.add_argument("--out", default="runs/pretrain", help="directory for the checkpoint (default: %(default)s)")
parser.add_argument("--steps", type=positive(int), default=600, help="optimizer steps (default: %(default)s)")
parser.add_argument("--batch-size", type=positive(int), default=64, help="documents a step (default: %(default)s)")
parser.add_argument("--lr", type=positive(float), default=0.03, help="peak learning rate (default: %(default)s)")
parser.add_argument("--vocab-size", type=positive(int), default=768, help="tokens to tell apart, at most (default: %(default)s)")
parser.add_argument("--block-size", type=positive(int), default=128, help="longest text in tokens (default: %(default)s)")
parser.add_argument("--n-layer", type=positive(int), default=2, help="blocks (default: %(default)s)")
parser.add_argument("--n-head", type=positive(int), default=4, help="attention heads a block (default: %(default)s)")
parser.add_argument("--n-embd", type=positive(int), default=128, help="channels (default: %(default)s)")
add_common_options(parser)


def next_token_loss(model, tokens, mask):
    """Mean surprise in nats per token, over the tokens (B, T) under the mask (B, T)."""
    return -token_log_probs(model, tokens, mask).sum() / mask.sum()


def load_world(args, rng):
    """Documents of the embedded world: tokenizer, the n-th training row, its length, held-out rows, entropy."""
    # Every training document is new. The held-out ones are the same for every seed.
    train = documents(args.steps * args.batch_size, seed=[args.seed, 0])
    val = documents(1024, seed=[0, 1])
    if args.init:
        tokenizer = Tokenizer.load(args.init)
    else:
        tokenizer = Tokenizer.train([prompt + response for prompt, response, _ in train[:4000]], args.vocab_size)
    encode = lambda text: tokenizer.encode(text) + [tokenizer.eos]  # the model must learn when to stop
    rows = [encode(prompt + response) for prompt, response, _ in train]
    val_rows = [encode(prompt + response) for prompt, response, _ in val]
    entropy = -sum(log_prob for *_, log_prob in val) / sum(len(row) - 1 for row in val_rows)
    return tokenizer, rows.__getitem__, [len(row) for row in rows], val_rows, entropy


def load_files(args, rng):
    """The same of the user's own text: pieces of `block_size` tokens that begin anywhere. The end is held out."""
    if args.init:
        tokenizer = Tokenizer.load(args.init)
    else:  # the first 16 million characters tell enough about which words are frequent
        pieces = (piece for piece in read_chunks(args.data) if piece)
        so_far = itertools.accumulate(pieces, lambda n_and_piece, piece: (n_and_piece[0] + len(piece), piece), initial=(0, ""))
        tokenizer = Tokenizer.train((piece for n, piece in itertools.takewhile(lambda x: x[0] < 17e6, so_far)), args.vocab_size)
    ids = encode_files(tokenizer, args.data, Path(args.out, "tokens.bin"))
    n_val = min(len(ids) // 10, 100_000) // args.block_size * args.block_size
    if n_val == 0:
        raise BadInput(f"{args.data[0]}: {len(ids)} tokens are too few for --block-size {args.block_size}; give ten times as many")
    starts = rng.integers(0, len(ids) - n_val - args.block_size + 1, size=args.steps * args.batch_size)
    row = lambda i: ids[starts[i] : starts[i] + args.block_size].tolist()
    val_rows = ids[len(ids) - n_val :].reshape(-1, args.block_size).tolist()
    return tokenizer, row, np.full(len(starts), args.block_size), val_rows, None


def main(args):
    device = set_up(args)
    rng = np.random.default_rng(args.seed)

    tokenizer, train_row, lengths, val_rows, entropy = (load_files if args.data else load_world)(args, rng)
    if args.init:
        model = load_model(args.init).to(device)
    else:
        model = GPT(Config(len(tokenizer.vocab), args.block_size, args.n_embd, args.n_layer, args.n_head)).to(device)
    longest = max(*lengths, *map(len, val_rows))
    if longest > model.config.n_positions or longest < 2:
        raise BadInput(f"texts of {longest} tokens do not fit into a context of {model.config.n_positions}: see --block-size")
    if args.compile:
        model.transformer.compile(dynamic=True)
    optimizer = Muon(model, args.lr)

    @torch.no_grad()
    def evaluate():
        """Mean surprise on the held-out rows, in nats per token and in bits per byte."""
        total = 0.0
        for rows in np.array_split(np.argsort([len(row) for row in val_rows], kind="stable"), math.ceil(len(val_rows) / 128)):
            tokens, mask = pad_rows([val_rows[i][:1] for i in rows], [val_rows[i][1:] for i in rows], device)
            total -= token_log_probs(model, tokens, mask).sum().item()
        guessed = [tokenizer.tokens[i] for row in val_rows for i in row[1:]]
        n_bytes = sum(len(token) for token in guessed if token != tokenizer.tokens[tokenizer.eos])
        return total / len(guessed), total / math.log(2) / n_bytes

    def show_sample():
        prompt = val_rows[0][: min(MAX_ANSWER_TOKENS, args.block_size) // 2] if args.data else tokenizer.encode(documents(1, seed=[0, 1])[0][0])
        how = {"temperature": 0.8, "generator": torch.Generator(device).manual_seed(0)} if args.data else {"temperature": 0}
        tokens, mask, _ = generate(model, [prompt], 3 * MAX_ANSWER_TOKENS, tokenizer.eos, **how)
        log.bar.write(printable(f"{tokenizer.decode(prompt)}{tokenizer.decode(tokens[mask])}\n"))

    order = batches(lengths, args.batch_size, rng)
    mine(min(order, key=len))  # if a batch is too small for all processes, better to know now
    checkpoint = Checkpoint(args, rng, model=model, optimizer=optimizer)
    log = Log(args.out, args.steps, "pretrain", checkpoint.step)
    for step in range(checkpoint.step, args.steps):
        if step == 0:
            show_sample()
        # The first token has nothing before it, so it plays the prompt, and the rest is to be guessed.
        rows = [train_row(i) for i in mine(order[step])]
        tokens, mask = pad_rows([row[:1] for row in rows], [row[1:] for row in rows], device)
        loss = next_token_loss(model, tokens, mask)
        set_lr(optimizer, step, args.steps, warmup=20, final=0.05)
        loss.backward()
        loss = average_gradients(model.parameters(), loss, weight=mask.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 100 == 99 or step == args.steps - 1:
            val_loss, bits_per_byte = evaluate()
            known = {"bits_per_byte": bits_per_byte} if args.data else {"entropy": entropy}
            log(step + 1, loss=loss.item(), val_loss=val_loss, **known)
            show_sample()
        elif step % 10 == 9:
            log(step + 1, loss=loss.item())
        log.bar.update()
        if step + 1 < args.steps:
            checkpoint.save(step + 1)

    save_model(model, tokenizer, args.out)
    checkpoint.finish()
    log.close(val_loss=val_loss, entropy=entropy, bits_per_byte=bits_per_byte, seconds=checkpoint.seconds())
    print(f"held-out loss {val_loss:.4f} nats per token, {bits_per_byte:.3f} bits per byte", end="")
    if entropy:
        print(f"; entropy of the source {entropy:.4f}: ratio {val_loss / entropy:.4f}", end="")
    print(f"\nsaved to {args.out}")


if __name__ == "__main__":
    run(main, parser)
