"""How fast is it, and how near to what this machine can do?

    python tests/benchmark.py            # the small size, some minutes
    python tests/benchmark.py --large    # the large one as well, much longer
    python tests/benchmark.py --race     # from nothing to an aligned model: see benchmark_race.py

Everything is timed in one run, ours and theirs in turns, so that a busy machine slows both alike. Theirs is
`transformers` in a plain loop, and `trl`, where they are installed (`pip install transformers trl==1.12.0`,
the last release with a PPO trainer). It has GPT-2's approximate GELU where ours is exact.
Share of peak: counted floating-point operations a second, over those of a large matrix
product on the same machine. Nothing is asserted.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
import pretrain  # noqa: E402
import reward  # noqa: E402
from data import Tokenizer  # noqa: E402
from model import GPT, Config, ScalarGPT, generate, make_optimizers, save_model  # noqa: E402
from benchmark_race import race  # noqa: E402

parser = argparse.ArgumentParser(
    "benchmark.py", description="Measure speed, side by side with other libraries."
)
parser.add_argument("--large", action="store_true", help="also 6 layers × 384, vocabulary 4,096, context 256")
parser.add_argument(
    "--seconds", type=float, default=6.0, help="time for each measurement and side (default: %(default)s)"
)
parser.add_argument("--race", action="store_true", help="time to an aligned model, instead of speed")
parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best one here")
args = parser.parse_args()
device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
SIZES = {"4 x 128": Config(512, 128, 128, 4, 4), "6 x 384": Config(4096, 256, 384, 6, 6)}


def forward_flops(config, tokens, context, logits):
    """Operations to read `tokens` tokens, each of which looks back at `context` others on average.

    Two for each weight that is met, two for each product in attention; `logits` tokens get logits.
    """
    C = config.n_embd
    return tokens * config.n_layer * (2 * 12 * C**2 + 4 * context * C) + logits * 2 * C * config.vocab_size


def serve(pipe, build, *what):
    """One side of a comparison: build the work, then do it whenever asked and say how long it took."""
    torch.manual_seed(0)
    work = build(*what)
    work()  # warm up
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    pipe.send("ready")
    while pipe.recv():
        wait()
        began = time.perf_counter()
        work()
        wait()
        pipe.send(time.perf_counter() - began)


def in_turns(*sides):
    """Seconds per call of each work, the median of calls that alternate between them.

    Each side, a function that builds the work and what it is built from, has a process of its own, so that
    both have memory as their users have it. While one works the others sleep.
    """
    context, pipes = multiprocessing.get_context("spawn"), []
    for side in sides:
        pipe, other_end = context.Pipe()
        context.Process(target=serve, args=(other_end, *side), daemon=True).start()
        other_end.close()
        pipe.recv()  # ready
        pipes.append(pipe)
    times = [[] for _ in sides]
    while sum(map(sum, times)) < args.seconds * len(sides) or len(times[0]) < 3:
        for pipe, spent in zip(pipes, times):
            pipe.send(True)
            spent.append(pipe.recv())
    for pipe in pipes:
        pipe.send(False)
    return [float(np.median(spent)) for spent in times]


def matmul():
    n = 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    return lambda: a @ b


def report(size, name, unit, amount, work, seconds, theirs=None, who=""):
    line = f"{size:8} {name:16} {amount / seconds:10,.0f} {unit:12} {work / seconds / peak:6.0%} of peak"
    print(line + (f"   {theirs / seconds:5.2f} times {who}" if theirs else ""), flush=True)


def hf_model(config, kind="GPT2LMHeadModel", **how):
    import transformers

    sizes = {
        **vars(config),
        "activation_function": "gelu_new",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **how}
    return getattr(transformers, kind)(transformers.GPT2Config(**sizes)).to(device)


def installed(name):
    if importlib.util.find_spec(name):
        return True
    print(f"({name} is not installed, so it is left out)")
    return False


# Pretraining: B rows of T tokens.


def our_pretraining(c, B, T):
    tokens = torch.randint(0, c.vocab_size, (B, T), device=device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[:, 0] = False
    model = GPT(c).to(device)
    optimizers = make_optimizers(model, 1e-4)

    def step():
        pretrain.next_token_loss(model, tokens, mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def their_pretraining(c, B, T):
    tokens, model = torch.randint(0, c.vocab_size, (B, T), device=device), hf_model(c)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# Sampling: B prompts of P tokens, N new ones each, and no row ends early.


def our_sampling(c, B, P, N):
    prompts, model = torch.randint(1, c.vocab_size, (B, P)).tolist(), GPT(c).to(device)
    return lambda: generate(model, prompts, N, eos=-1)


def their_sampling(c, B, P, N):
    tokens, model = torch.randint(1, c.vocab_size, (B, P), device=device), hf_model(c).eval()
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": N, "min_new_tokens": N}
    return lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)


# DPO with its reference pass, or a reward model: n pairs, prompt and answers 32 tokens each, batch 32.


def random_pairs(c, n):
    return [tuple(torch.randint(1, c.vocab_size, (32,)).tolist() for _ in range(3)) for _ in range(n)]


def our_preference_training(c, n, kind):
    pairs, model = random_pairs(c, n), GPT(c).to(device) if kind == "DPO" else ScalarGPT(c).to(device)
    optimizers = make_optimizers(model, 1e-4)
    chunks = [pairs[i : i + 32] for i in range(0, n, 32)]

    def one_pass():
        if kind == "DPO":
            with torch.no_grad():
                reference = [dpo.pair_log_probs(model, chunk, device) for chunk in chunks]
        for i, chunk in enumerate(chunks):
            if kind == "DPO":
                chosen, rejected = (dpo.pair_log_probs(model, chunk, device) - reference[i]).unbind(1)
                loss = dpo.dpo_loss(chosen, rejected, 0.1).mean()
            else:
                loss = reward.reward_loss(*reward.pair_scores(model, chunk, device).unbind(1)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return one_pass


def their_preference_training(c, n, kind):
    import trl
    from datasets import Dataset

    # Their trainers want text; a tokenizer that reads one character as one id gives the same lengths.
    write = lambda ids: "".join(chr(0x4E00 + i) for i in ids)  # noqa: E731
    rows = [
        {"prompt": write(p), "chosen": write(a[:-1]), "rejected": write(b[:-1])}
        for p, a, b in random_pairs(c, n)
    ]
    settings = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=32, num_train_epochs=1)
    settings |= dict(max_length=96, use_cpu=device.type == "cpu", bf16=False, gradient_checkpointing=False)
    settings |= dict(report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)
    data = dict(train_dataset=Dataset.from_list(rows), processing_class=letters(c.vocab_size))
    if kind == "DPO":
        trainer = trl.DPOTrainer(hf_model(c), hf_model(c), trl.DPOConfig(**settings), **data)
    else:
        head = hf_model(c, "GPT2ForSequenceClassification", num_labels=1)
        trainer = trl.RewardTrainer(head, trl.RewardConfig(**settings), **data)
    return lambda: quietly(trainer.train)


def letters(size):
    """A tokenizer of theirs in which every character is one token."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(0x4E00 + i): i for i in range(size)}
    fast = Fast(models.WordLevel(vocab, unk_token=chr(0x4E00 + 1)))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=chr(0x4E00), pad_token=chr(0x4E00), unk_token=chr(0x4E00 + 1)
    )


def quietly(work):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


# PPO: whole iterations of 64 answers, prompt 32, 32 new tokens, 4 epochs. Ours is ppo.py's own main.


def our_ppo(c, steps):
    home = Path(tempfile.mkdtemp())
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 50], 280)
    for name, network in (("pretrain", GPT(c)), ("reward", ScalarGPT(c))):
        (home / name).mkdir()
        save_model(network, tokenizer, home / name)
    with open(home / "prompts.jsonl", "w") as file:
        for _ in range(300):
            text = "".join(chr(97 + letter) for letter in torch.randint(26, (32,)))
            file.write(f'{{"prompt": "{text}", "chosen": "a", "rejected": "b"}}\n')
    options = f"--init {home}/pretrain --reward {home}/reward --data {home}/prompts.jsonl --out {home}/ppo"
    options += f" --epochs 4 --batch-size 64 --lr 1e-5 --steps {steps} --device {device.type}"
    return lambda: quietly(lambda: ppo.main(ppo.parser.parse_args(options.split())))


def their_ppo(c, steps):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    head = lambda: hf_model(c, "GPT2ForSequenceClassification", num_labels=1)  # noqa: E731
    rows = Dataset.from_list(
        [{"input_ids": torch.randint(1, c.vocab_size, (32,)).tolist()} for _ in range(256)]
    )
    how = dict(per_device_train_batch_size=64, gradient_accumulation_steps=1, num_mini_batches=1)
    how |= dict(num_ppo_epochs=4, total_episodes=64 * steps, response_length=32, num_sample_generations=0)
    how |= dict(use_cpu=device.type == "cpu", bf16=False, local_rollout_forward_batch_size=64)
    how |= dict(report_to=[], save_strategy="no", disable_tqdm=True)

    def build():
        config = PPOConfig(output_dir=tempfile.mkdtemp(), **how)
        networks = hf_model(c), hf_model(c), head(), rows, head()
        return PPOTrainer(config, letters(c.vocab_size), *networks, eval_dataset=rows)

    return lambda: quietly(lambda: build().train())


def compare(size, c, has_hf, has_trl):
    def sides(ours, theirs, here, *what):
        return [(build, c, *what) for build in ([ours, theirs] if here else [ours])]

    B, T = 32, c.n_positions
    seconds = in_turns(*sides(our_pretraining, their_pretraining, has_hf, B, T))
    report(
        size,
        "pretraining",
        "tokens/s",
        B * T,
        3 * forward_flops(c, B * T, T / 2, B * T),
        *seconds,
        who="a plain transformers loop",
    )

    B, P, N = 64, 32, 64
    seconds = in_turns(*sides(our_sampling, their_sampling, has_hf, B, P, N))
    report(
        size,
        "sampling",
        "tokens/s",
        B * N,
        forward_flops(c, B * (P + N), (P + N) / 2, B * N),
        *seconds,
        who="transformers' generate",
    )

    n = 128 if c.n_embd < 256 else 32
    for kind, trainer in (("DPO", "DPOTrainer"), ("reward model", "RewardTrainer")):
        seconds = in_turns(*sides(our_preference_training, their_preference_training, has_trl, n, kind))
        forward = forward_flops(c, n * 96, 48, n * 64 if kind == "DPO" else 0)
        report(
            size, kind, "pairs/s", n, (4 if kind == "DPO" else 3) * forward, *seconds, who=f"TRL's {trainer}"
        )

    times = in_turns(*sides(our_ppo, their_ppo, has_trl, 1), *sides(our_ppo, their_ppo, has_trl, 3))
    seconds = np.subtract(*np.split(np.array(times), 2)[::-1])  # two iterations, without the setting up
    policy, critic = (forward_flops(c, 128 * 64, 32, logits) for logits in (128 * 32, 0))
    work = (
        2 * policy + 2 * critic + 4 * 3 * (policy + critic)
    )  # rollout, reference; reward, values; four epochs
    report(size, "PPO", "answers/s", 128, work, *seconds, who="TRL's PPOTrainer")


if __name__ == "__main__" and args.race:
    race()
elif __name__ == "__main__":
    peak = 2 * 2048**3 / in_turns((matmul,))[0]
    print(f"{device}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}; ", end="")
    print(f"{peak / 1e9:,.0f} GFLOP/s in a large matrix product")
    has_hf, has_trl = installed("transformers"), installed("trl")
    for size, config in SIZES.items():
        if size == "4 x 128" or args.large:
            compare(size, config, has_hf, has_trl)
