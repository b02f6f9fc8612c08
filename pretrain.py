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
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from data import MAX_ANSWER_TOKENS, Tokenizer, batches, documents, pad_rows
from model import GPT, Config, Log, Muon, generate, pick_device, run, save_model, set_lr, token_log_probs

parser = argparse.ArgumentParser("pretrain.py", description="Pretrain a small GPT on the embedded world.")
parser.add_argument("--out", default="runs/pretrain", help="directory for the checkpoint (default: %(default)s)")
parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=64, help="documents a step (default: %(default)s)")
parser.add_argument("--lr", type=float, default=0.03, help="peak learning rate (default: %(default)s)")
parser.add_argument("--vocab-size", type=int, default=768, help="tokens to tell apart, at most (default: %(default)s)")
parser.add_argument("--block-size", type=int, default=128, help="longest text in tokens (default: %(default)s)")
parser.add_argument("--n-layer", type=int, default=2, help="blocks (default: %(default)s)")
parser.add_argument("--n-head", type=int, default=4, help="attention heads a block (default: %(default)s)")
parser.add_argument("--n-embd", type=int, default=128, help="channels (default: %(default)s)")
parser.add_argument("--seed", type=int, default=1, help="seed of weights and data (default: %(default)s)")
parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best one here")


def next_token_loss(model, tokens, mask):
    """Mean surprise in nats per token, over the tokens (B, T) under the mask (B, T)."""
    return -token_log_probs(model, tokens, mask).sum() / mask.sum()


def main(args):
    began = time.time()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    Path(args.out).mkdir(parents=True, exist_ok=True)

    # Data: every training document is new. The held-out ones are the same for every seed.
    train = documents(args.steps * args.batch_size, seed=[args.seed, 0])
    val = documents(1024, seed=[0, 1])
    tokenizer = Tokenizer.train([prompt + response for prompt, response, _ in train[:4000]], args.vocab_size)
    encode = lambda text: tokenizer.encode(text) + [tokenizer.eos]  # the model must learn when to stop
    train_rows = [encode(prompt + response) for prompt, response, _ in train]
    val_rows = [encode(prompt + response) for prompt, response, _ in val]
    entropy = -sum(log_prob for *_, log_prob in val) / sum(len(row) - 1 for row in val_rows)

    model = GPT(Config(len(tokenizer.vocab), args.block_size, args.n_embd, args.n_layer, args.n_head)).to(device)
    optimizer = Muon(model, args.lr)

    @torch.no_grad()
    def evaluate():
        total = 0.0
        for rows in np.split(np.argsort([len(row) for row in val_rows], kind="stable"), 8):
            tokens, mask = pad_rows([val_rows[i][:1] for i in rows], [val_rows[i][1:] for i in rows], device)
            total -= token_log_probs(model, tokens, mask).sum().item()
        return total / sum(len(row) - 1 for row in val_rows)

    def show_sample():
        prompt = val[0][0]
        tokens, mask, _ = generate(model, [tokenizer.encode(prompt)], MAX_ANSWER_TOKENS, tokenizer.eos, temperature=0)
        log.bar.write(f"{prompt}{tokenizer.decode(tokens[mask])}\n")

    log = Log(args.out, args.steps, "pretrain")
    for step, rows in enumerate(batches([len(row) for row in train_rows], args.batch_size, rng)):
        # The first token has nothing before it, so it plays the prompt, and the rest is to be guessed.
        tokens, mask = pad_rows([train_rows[i][:1] for i in rows], [train_rows[i][1:] for i in rows], device)
        loss = next_token_loss(model, tokens, mask)
        set_lr(optimizer, step, args.steps, warmup=20, final=0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 100 == 99 or step == args.steps - 1:
            val_loss = evaluate()
            log(step + 1, loss=loss.item(), val_loss=val_loss, entropy=entropy)
            show_sample()
        elif step % 10 == 9:
            log(step + 1, loss=loss.item())
        log.bar.update()

    save_model(model, args.out, tokenizer.eos, tokenizer.pad)
    tokenizer.save(args.out)
    log.close(val_loss=val_loss, entropy=entropy, seconds=time.time() - began)
    print(f"held-out loss {val_loss:.4f}, entropy of the source {entropy:.4f} nats per token: ratio {val_loss / entropy:.4f}")
    print(f"saved to {args.out}")


if __name__ == "__main__":
    run(main, parser)
