"""Rewards that can be checked: what page 06 measures with, and its longer runs (three seeds, 120 steps).

    python notebooks/checked.py

writes `checked.json`, a result at a time, in ten minutes on one core; what stands there is not made again.
"""

import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import start

WORLD = (start.HERE / "sums.py").read_text(encoding="utf-8")
start.move(WORLD, "runs/sums")  # from here on the scripts' data.py has the world of sums

import numpy as np  # noqa: E402
import torch  # noqa: E402

import ppo  # noqa: E402
from data import ASKED, KINDS, Tokenizer, batches, documents, held_out, judge, kind_of  # noqa: E402
from data import pad_rows  # noqa: E402
from model import load_model, make_optimizers, sample_texts, save_model, set_lr  # noqa: E402
from model import token_log_probs, update  # noqa: E402
from sample import measure  # noqa: E402

RESULTS = start.HERE / "checked.json"
BASE = "runs/pretrain"


# ----------------------------------------------------------------------------------------------------
# 1. Rewards other than the judge's


def loose(prompt, response):
    """A checker that is too kind: is the sum anywhere among the words?"""
    return float(str(sum(map(int, re.findall(r"\d", prompt)))) in response.split())


def form(prompt, response):
    """Pays for what looks like running totals: three numbers, right or wrong."""
    return float(re.fullmatch(r" -?\d+ -?\d+ -?\d+", response) is not None)


def coin(prompt, response):
    """Pays or not, whatever was said."""
    return float(random.random() < 0.5)


ppo.REWARDS |= {"loose": loose, "form": form, "coin": coin}


# ----------------------------------------------------------------------------------------------------
# 2. How to measure a policy


def pass_at_k(n, right, k):
    """The chance that one of k answers is right, from n of which `right` are (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def prompts_of(seed):
    """The prompts that ppo.py learns on with this seed, and those that it holds out."""
    texts = [document.prompt for document in documents(10_240, [seed, ASKED], KINDS[0])]
    held = held_out(texts)
    texts = [*dict.fromkeys(texts)]  # each once
    return [text for text in texts if text not in held], [text for text in texts if text in held]


def measured(name, seed=1, temperature=1.0, n=32, n_prompts=128):
    """What the policy in runs/NAME does on prompts that are held out with this seed, n answers to each.

    right: how many of the n are, prompt by prompt. forms: of answers, {form: [share, of which right]}.
    majority: how often the commonest last word is the sum. greedy: how often the likeliest answer is right.
    """
    policy, reference, tokenizer = load_model(f"runs/{name}"), load_model(BASE), Tokenizer.load(BASE)
    asked = prompts_of(seed)[1]
    if start.QUICK:
        n, n_prompts = 8, 4
    generator = torch.Generator().manual_seed(1)
    found = measure(policy, reference, tokenizer, asked[:n_prompts], n, temperature, generator)
    texts, points, log_ratios, lengths = found
    kinds = Counter(kind_of(p, answer) for p, answers in zip(asked, texts) for answer in answers)
    forms = {}
    for what in ("guess", "totals", "wavers"):
        right, wrong = kinds[f"{what}, right"], kinds[f"{what}, wrong"]
        forms[what] = [(right + wrong) / points.size, right / max(1, right + wrong)]
    common = [Counter(f"{answer} ?".split()[-2:][0] for answer in answers) for answers in texts]
    majority = [judge(p, counts.most_common(1)[0][0]) for p, counts in zip(asked, common)]
    likeliest = sample_texts(policy, tokenizer, asked[:512], ("greedy",), temperature=0)
    greedy = np.mean([judge(*both) for both in zip(asked, likeliest)])
    result = {"n": n, "right": points.sum(1).astype(int).tolist(), "forms": forms}
    result |= {"majority": np.mean(majority), "greedy": greedy, "kl": log_ratios.mean()}
    result |= {"length": lengths.mean(), "answers": [answers[0] for answers in texts[:5]]}
    result["loose"] = np.mean([loose(p, answer) for p, answers in zip(asked, texts) for answer in answers])
    return result


def passes(result, k=1):
    """pass@k of something measured, the mean over its prompts."""
    return np.mean([pass_at_k(result["n"], right, k) for right in result["right"]])


FIGURES = {
    "pass@1": ("{:.1%}", passes),
    "pass@8": ("{:.1%}", lambda result: passes(result, 8)),
    "greedy": ("{:.1%}", lambda result: result["greedy"]),
    "KL": ("{:.2f}", lambda result: result["kl"]),
    "length": ("{:.2f}", lambda result: result["length"]),
    "wavers": ("{:.1%}", lambda result: result["forms"]["wavers"][0]),
    "totals": ("{:.1%}", lambda result: result["forms"]["totals"][0]),
    "… of which right": ("{:.1%}", lambda result: result["forms"]["totals"][1]),
}


def compare(results):
    """A table with a row for each {name: [a result of each seed]}; ± is one standard error over seeds."""
    rows = []
    for name, some in results.items():
        rows.append([name])
        for form, figure in FIGURES.values():
            found = np.array([figure(result) for result in some])
            error = f" ± {form}".format(found.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else ""
            rows[-1].append(form.format(found.mean()) + error)
    start.table(["", *FIGURES], *rows)


# ----------------------------------------------------------------------------------------------------
# 3. Ways to learn


def grpo(out, reward="judge", beta=0.04, seed=1, options=(), **changes):
    """`ppo.py --advantage grpo` into runs/OUT, and what happened on the way: {figure: a number a step}.

    `changes` are functions to put in the place of ppo.py's.
    """
    seen, pays = [], ppo.REWARDS[reward]

    def note(prompt, response):
        seen.append((prompt, response, pays(prompt, response)))
        return seen[-1][2]

    random.seed(seed)  # of the coin
    how = ["--advantage", "grpo", "--reward", reward, "--beta", beta, "--seed", seed, *options]
    how += ["--out", f"runs/{out}"]
    with patch.dict(ppo.REWARDS, {reward: note}), patch.multiple(ppo, CLIP=ppo.CLIP, **changes):
        log, _ = start.run("ppo", *how, quiet=True)
    n = len(log) * 128  # what comes after is held out
    points = np.array([x[2] for x in seen[:n]]).reshape(len(log), -1, ppo.GROUP)
    kinds = np.array([kind_of(*x[:2]) for x in seen[:n]]).reshape(len(log), -1)
    share = lambda x: x.mean(1).round(4).tolist()
    trace = {key: [line[key] for line in log] for key in ("reward", "kl", "length", "clip_fraction")}
    trace |= {"all wrong": share(points.sum(2) == 0), "all right": share(points.sum(2) == ppo.GROUP)}
    return trace | {kind: share(kinds == kind) for kind in sorted({*kinds.flat})}


def fine_tune(policy, tokenizer, examples, seed, lr=3e-3):
    """One pass over examples (prompt, answer), 32 at a time: make each answer likelier, token by token."""
    rows = [(tokenizer.encode(p), tokenizer.encode(answer) + [tokenizer.eos]) for p, answer in examples]
    order, optimizers = batches(len(rows), 32, np.random.default_rng(seed)), make_optimizers(policy, lr)
    for step, some in enumerate(order):
        tokens, mask, begin = pad_rows(*zip(*[rows[i] for i in some]))
        set_lr(optimizers, step, len(order), warmup=5)
        (-ppo.masked_mean(token_log_probs(policy, tokens, mask, begin), mask)).backward()
        update([policy], optimizers, weight=1)


def rejection_sampling(out, seed=1, rounds=3, n=1706, control=False):
    """Each round: n answers, four to a prompt; keep the right ones; fine-tune on those. Into runs/OUT.

    The control keeps as many, drawn without a look at them. Returns how many were kept in each round.
    """
    tokenizer, policy = Tokenizer.load(BASE), load_model(BASE)
    rng, kept = random.Random(seed), []
    train = rng.sample(prompts_of(seed)[0], 40 if start.QUICK else n * rounds // 4)
    for i in range(rounds):
        asked = [prompt for prompt in train[i::rounds] for _ in range(4)]
        examples = [*zip(asked, sample_texts(policy, tokenizer, asked, ("round", seed, i)))]
        right = [example for example in examples if judge(*example)]
        some = rng.sample(examples, len(right)) if control else right
        if some:  # else there is nothing to learn from
            fine_tune(policy, tokenizer, some, seed)
        kept.append(len(right))
    Path(f"runs/{out}").mkdir(parents=True, exist_ok=True)
    save_model(policy, tokenizer, f"runs/{out}")
    return kept


# ----------------------------------------------------------------------------------------------------
# 4. What others changed in GRPO


def clip_higher_loss(log_probs, old_log_probs, advantages, mask, low=0.2, high=0.28):
    """DAPO's: an answer that is to become likelier may do so by 28%, not only by 20%."""
    ratio = torch.exp(log_probs - old_log_probs)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return ppo.masked_mean(loss, mask), ratio


def answer_mean_loss(log_probs, old_log_probs, advantages, mask):
    """DeepSeekMath's: first the mean over each answer's tokens, then over answers. These count alike."""
    ratio = torch.exp(log_probs - old_log_probs)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - ppo.CLIP, 1 + ppo.CLIP))
    return ((loss * mask).sum(1) / mask.sum(1)).mean(), ratio


# ----------------------------------------------------------------------------------------------------
# 5. The longer runs


def main():
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(name, make):
        """Make a result that is not there yet, and write all down."""
        if name not in results:
            began = time.process_time()
            results[name] = make()
            print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
            text = json.dumps(results, ensure_ascii=False, default=float)
            RESULTS.write_text(re.sub(r"(\.\d{4})\d+", r"\1", text.replace('}, "', '},\n"')) + "\n")

    def learn(name, make, **how):
        """Both the way to a policy and what it is at the end."""
        keep(name, lambda: {"way": make(), "end": measured(name, **how)})

    start.need("pretrain")
    for seed in (1, 2, 3):
        keep(f"base {seed}", lambda: {"end": measured("pretrain", seed)})
        learn(f"grpo {seed}", lambda: grpo(f"grpo {seed}", seed=seed), seed=seed)
        for name, control in (("rejection", False), ("random", True)):
            make = lambda: {"kept": rejection_sampling(f"{name} {seed}", seed, control=control)}
            learn(f"{name} {seed}", make, seed=seed)
        for name in ("form", "coin"):
            learn(f"{name} {seed}", lambda: grpo(f"{name} {seed}", name, seed=seed), seed=seed)

    for seed in (2, 3):  # seed 1 is on the page
        way = lambda: grpo(f"loose 120 β0 {seed}", "loose", 0, seed, ["--steps", 120])
        learn(f"loose 120 β0 {seed}", way, seed=seed)

    # One seed: three times as long, at other temperatures, and with what others changed.
    for name, reward in (("grpo 120 1", "judge"), ("loose 120 1", "loose")):
        learn(name, lambda: grpo(name, reward, options=["--steps", 120]))
    for temperature in (0.7, 0.5, 0.3):
        for name in ("pretrain", "grpo 120 1"):
            keep(f"{name} at {temperature}", lambda: {"end": measured(name, temperature=temperature)})
    for name, how in {
        "grpo β0 1": {"beta": 0},
        "rloo 1": {"options": ["--advantage", "rloo"]},
        "clip-higher 1": {"policy_loss": clip_higher_loss},
        "answer mean 1": {"policy_loss": answer_mean_loss},
    }.items():
        learn(name, lambda: grpo(name, **how))


if __name__ == "__main__":
    main()
