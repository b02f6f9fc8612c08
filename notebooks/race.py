"""The race between RLHF and DPO: every run behind notebook 04 and behind the README's table of claims.

    python notebooks/race.py

takes between one and two hours on two CPU cores and writes `notebooks/race.json`. A run that is finished is
not repeated, so it may be stopped and started again; checkpoints go to `runs/race/`. To start afresh,
remove `runs/race/` and the file.

The judge is asked here, but only about models that are done with training.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import Tokenizer, documents, encode_pairs, preference, read_preferences, write_text  # noqa: E402
from model import load_model  # noqa: E402
from sample import frontier, measure, win_rate  # noqa: E402

RESULTS, RUNS = HERE / "race.json", HERE.parent / "runs" / "race"
SEEDS = [1, 2, 3]
BETAS = {"dpo": [0.2, 0.35, 0.5, 1.0, 2.0], "ppo": [0.15, 0.25, 0.4, 0.8, 1.6]}  # the third is the default
DPO_STEPS, PPO_STEPS = [17, 34, 68, 136], [10, 20, 40]  # shorter schedules than the default
TEMPERATURES = [0, 0.25, 0.5, 0.75, 1]
POSTS, ANSWERS = 64, 256
WITH_JUDGE = "import data, ppo; ppo.REWARDS['judge'] = data.judge; ppo.main(ppo.parser.parse_args())"


# ----------------------------------------------------------------------------------------------------
# What a method costs, by formula


def forward_flops(config, tokens, context, wanted, logits=True):
    """Floating-point operations to read `tokens` tokens, each of which looks back at `context` others on
    average: two for each weight that is met, two for each product in attention (queries with keys, then
    weights with values). `wanted` of them are asked for: the last block's MLP skips the others, and only
    these are turned into logits.
    """
    C = config.n_embd
    blocks = tokens * config.n_layer * (2 * 12 * C**2 + 4 * context * C) - (tokens - wanted) * 2 * 8 * C**2
    return blocks + logits * wanted * 2 * C * config.vocab_size


def training_flops(config, pairs, method, steps, practice=0, epochs=2):
    """FLOPs of one method from a preference file on; `config` is the language model's.

    A training step costs three forward passes: one forward, two backward. For DPO and the reward model
    `steps` are of 64 pairs; for PPO they are iterations of 128 answers.
    """
    prompt, answer = (np.mean([f(pair) for pair in pairs]) for f in (lambda p: len(p[0]), lambda p: len(p[1] + p[2]) / 2))
    one = lambda n, c=config, logits=True: n * forward_flops(c, prompt + answer, (prompt + answer) / 2, answer, logits)
    both = lambda n, c=config, logits=True: n * forward_flops(c, prompt + 2 * answer, (prompt + answer) / 2, 2 * answer, logits)
    if method == "pairs":  # two answers to each post, which is read once
        return both(len(pairs))
    if method == "dpo":  # the reference once, then training
        return both(len(pairs)) + 3 * both(64 * steps)
    larger = type(config)(**{**vars(config), "n_layer": config.n_layer + 1})  # the reward model has one more block
    if method == "reward":
        return 3 * both(64 * (practice + steps), larger, False)
    # PPO: the policy writes, the reference reads, the reward model and the critic read; then both train
    rollout = one(2 * 128 * steps) + one(2 * 128 * steps, larger, False)
    return rollout + 3 * epochs * (one(128 * steps) + one(128 * steps, larger, False))


# ----------------------------------------------------------------------------------------------------
# Running and measuring


def run(results, name, script, **options):
    """Run a script unless `name` is done, and keep its last figures, with peak memory in MB.

    "ppo-judge" is `ppo.py` with the judge itself as the reward: no practitioner could do that.
    """
    if name in results["runs"]:
        return
    out = RUNS / name
    program = ["-c", WITH_JUDGE] if script == "ppo-judge" else [f"{script}.py"]
    command = [sys.executable, *program, "--out", str(out)]
    for option, value in options.items():
        command += [] if value is None else [f"--{option}", str(value)]
    print(" ".join(command[1:]), flush=True)
    with open(RUNS / "log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed: see {RUNS / 'log.txt'}")
    figures = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    per_mb = 2**20 if sys.platform == "darwin" else 2**10
    results["runs"][name] = {**figures, "peak_mb": usage.ru_maxrss / per_mb}
    save(results)


def save(results):
    tidy = lambda x: float(f"{x:.5g}") if isinstance(x, float) else x
    walk = lambda x: {k: walk(v) for k, v in x.items()} if isinstance(x, dict) else [walk(v) for v in x] if isinstance(x, list) else tidy(x)
    write_text(RESULTS, json.dumps(walk(results), indent=1) + "\n")


class Track:
    """One seed's pretrained model, and what is measured against it, on familiar or on shifted posts."""

    def __init__(self, seed, shifted=False):
        self.home = RUNS / f"seed{seed}"
        self.tokenizer = Tokenizer.load(self.home / "pretrain")
        self.reference = load_model(self.home / "pretrain")
        self.posts = [prompt for prompt, _, _ in documents(POSTS, seed=[0, 3], shifted=shifted)]
        torch.manual_seed(seed)
        _, self.scores, _, _ = measure(self.reference, self.reference, self.tokenizer, self.posts, ANSWERS)
        _, self.kls, self.rewards = frontier(self.scores)

    def measure(self, directory, temperature=1.0, answers=ANSWERS // 4):
        """Judge's score, KL from the reference, share of the optimal gain at that KL, win rate, length."""
        torch.manual_seed(1)
        policy = load_model(directory)
        _, scores, log_ratios, lengths = measure(policy, self.reference, self.tokenizer, self.posts, answers, temperature)
        kl, base = log_ratios.mean(), self.scores.mean()
        return {"score": scores.mean(), "kl": kl, "win_rate": win_rate(scores, self.scores), "length": lengths.mean(),
                "share": (scores.mean() - base) / (np.interp(kl, self.kls, self.rewards) - base)}  # fmt: skip


def best_of_n(scores, n):
    """Expected best score of n answers, from k answers to each post (P, k), drawn with replacement."""
    ordered, k = np.sort(scores, axis=1), scores.shape[1]
    edges = (np.arange(k + 1) / k) ** n  # the best is among the i worst with probability (i / k)^n
    return (ordered * np.diff(edges)).sum(1).mean()


def relabel(source, target, seed, coin):
    """The same answers, shown to volunteers of whom a share `coin` tosses a coin."""
    rng = np.random.default_rng([seed, 7])
    lines = []
    for record in read_preferences(source):
        prompt, a, b = record["prompt"], record["chosen"], record["rejected"]
        p = (1 - coin) * preference(prompt, a, b) + coin / 2
        if rng.random() > p:
            a, b, p = b, a, 1 - p
        lines.append(json.dumps({"prompt": prompt, "chosen": a, "rejected": b, "certainty": round(p, 4)}))
    write_text(target, "\n".join(lines) + "\n")


def shorten(source, target, n):
    """The first n pairs to learn from, and a ninth of that, which the scripts hold out."""
    lines = source.read_text(encoding="utf-8").splitlines()
    write_text(target, "\n".join(lines[:n] + lines[-((n - 1) // 9) :]) + "\n")


def chain(results, seed):
    """Both roads at default settings, and the same with less training, each timed on its own."""
    home = f"seed{seed}"
    run(results, f"{home}/pretrain", "pretrain", seed=seed)
    init = RUNS / home / "pretrain"
    pairs = RUNS / home / "preferences.jsonl"
    run(results, f"{home}/dpo-with-pairs", "dpo", init=init, seed=seed)
    run(results, f"{home}/dpo", "dpo", init=init, seed=seed, data=pairs)
    run(results, f"{home}/reward", "reward", init=init, seed=seed, data=pairs)
    run(results, f"{home}/ppo", "ppo", init=init, seed=seed, data=pairs, reward=RUNS / home / "reward")
    for steps in DPO_STEPS:
        run(results, f"{home}/dpo-steps{steps}", "dpo", init=init, seed=seed, data=pairs, steps=steps)
    for steps in PPO_STEPS:
        run(results, f"{home}/ppo-steps{steps}", "ppo", init=init, seed=seed, data=pairs, reward=RUNS / home / "reward", steps=steps)


def sweep(results, seed):
    """A range of β for both. PPO runs 40 iterations here: at the default β the second 40 changed little."""
    home = f"seed{seed}"
    init, pairs = RUNS / home / "pretrain", RUNS / home / "preferences.jsonl"
    for beta in BETAS["dpo"]:
        if beta != BETAS["dpo"][2]:
            run(results, f"{home}/dpo-beta{beta}", "dpo", init=init, seed=seed, data=pairs, beta=beta)
    for beta in BETAS["ppo"]:
        if beta != BETAS["ppo"][2]:
            run(results, f"{home}/ppo-beta{beta}", "ppo", init=init, seed=seed, data=pairs, beta=beta,
                reward=RUNS / home / "reward", steps=40)  # fmt: skip
    if seed == SEEDS[0]:
        run(results, f"{home}/ppo-judge", "ppo-judge", init=init, seed=seed, data=pairs, reward="judge")


def scarcity(results, seed):
    """Fewer pairs, with more passes over them, and volunteers of whom some toss a coin. PPO runs 40 iterations."""
    home = f"seed{seed}"
    init, pairs = RUNS / home / "pretrain", RUNS / home / "preferences.jsonl"
    settings = []
    for n, passes in ((500, 4), (2000, 2)):
        shorten(pairs, RUNS / home / f"pairs{n}.jsonl", n)
        settings.append((f"pairs{n}", passes * math.ceil(n / 64)))
    relabel(pairs, RUNS / home / "coin0.5.jsonl", seed, 0.5)
    settings.append(("coin0.5", None))
    for name, steps in settings:
        data = RUNS / home / f"{name}.jsonl"
        run(results, f"{home}/dpo-{name}", "dpo", init=init, seed=seed, data=data, steps=steps)
        run(results, f"{home}/reward-{name}", "reward", init=init, seed=seed, data=data, steps=steps)
        run(results, f"{home}/ppo-{name}", "ppo", init=init, seed=seed, data=pairs, reward=RUNS / home / f"reward-{name}", steps=40)


def judge_all(results, seed):
    """Everything that is there, by the judge."""
    home, track = f"seed{seed}", Track(seed)
    reference = results["reference"].setdefault(home, {})
    if not reference:
        keep = np.searchsorted(track.kls, np.linspace(0, 2, 60)).clip(max=len(track.kls) - 1)
        config = track.reference.config
        pairs, _ = encode_pairs(track.tokenizer, read_preferences(track.home / "preferences.jsonl"), config.n_positions)
        flops = {"pairs": training_flops(config, pairs, "pairs", 0)}
        full = math.ceil((len(pairs) - 1024) / 64)  # one pass
        for name, steps in [("dpo", full), *((f"dpo-steps{n}", n) for n in DPO_STEPS)]:
            flops[name] = training_flops(config, pairs, "dpo", steps)
        flops["reward"] = training_flops(config, pairs, "reward", full, practice=300)
        for name, steps in [("ppo", 80), *((f"ppo-steps{n}", n) for n in PPO_STEPS)]:
            flops[name] = training_flops(config, pairs, "ppo", steps)
        reference.update(
            score=track.scores.mean(), kl=track.kls[keep].tolist(), optimum=track.rewards[keep].tolist(), flops=flops,
            best_of_n={str(n): best_of_n(track.scores, n) for n in (1, 2, 3, 4, 6, 8, 12, 16)},
        )  # fmt: skip
    policies = [n for n in results["runs"] if n.startswith(home) and n.split("/")[1].startswith(("dpo", "ppo"))]
    for name in policies:
        if name not in results["judged"]:
            default = name in (f"{home}/dpo", f"{home}/ppo")
            results["judged"][name] = track.measure(RUNS / name, answers=ANSWERS if default else ANSWERS // 4)
            save(results)
    shifted = None
    for method in ("pretrain", "dpo", "ppo"):
        for temperature in TEMPERATURES:
            name = f"{home}/{method}/temperature{temperature}"
            if name not in results["judged"]:
                results["judged"][name] = track.measure(RUNS / home / method, temperature, answers=64)
        if f"{home}/{method}/shifted" not in results["judged"]:
            shifted = shifted or Track(seed, shifted=True)
            results["judged"][f"{home}/{method}/shifted"] = shifted.measure(RUNS / home / method)
    save(results)


# ----------------------------------------------------------------------------------------------------
# What comes out


def cost(results, seed, method):
    """What it takes from nothing but the pretrained model until the policy is good enough.

    Good enough: 90% of the gain that is optimal at a KL of 0.5, without going further than 1 nat. Of all
    schedules that were run, the cheapest that gets there counts. Both sides pay for the pairs, RLHF for its
    reward model as well. Returns {"seconds", "flops", "peak_mb", "schedule"}.
    """
    home, runs, judged = f"seed{seed}", results["runs"], results["judged"]
    reference = results["reference"][home]
    target = reference["score"] + 0.9 * (np.interp(0.5, reference["kl"], reference["optimum"]) - reference["score"])
    asking = runs[f"{home}/dpo-with-pairs"]["seconds"] - runs[f"{home}/dpo"]["seconds"]
    schedules = [["dpo"], *([f"dpo-steps{n}"] for n in DPO_STEPS)]
    if method == "ppo":
        schedules = [["reward", "ppo"], *(["reward", f"ppo-steps{n}"] for n in PPO_STEPS)]
    options = []
    for stages in schedules:
        end = judged[f"{home}/{stages[-1]}"]
        if end["score"] >= target and end["kl"] <= 1:
            options.append({
                "seconds": asking + sum(runs[f"{home}/{stage}"]["seconds"] for stage in stages),
                "flops": sum(reference["flops"][stage] for stage in ["pairs", *stages]),
                "peak_mb": max(runs[f"{home}/{stage}"]["peak_mb"] for stage in stages), "schedule": " + ".join(stages),
            })  # fmt: skip
    return min(options, key=lambda option: option["seconds"])


def over_seeds(function, form="{:.2f}"):
    """Mean ± standard deviation of function(seed) over the seeds, as text."""
    values = [function(seed) for seed in SEEDS]
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values, ddof=1))}"


def table(results):
    """The README's table of claims, from the file."""
    judged, runs = results["judged"], results["runs"]
    of = lambda name, key="share": over_seeds(lambda s: 100 * judged[f"seed{s}/{name}"][key], "{:.1f}") + "%"
    ratio = lambda key: over_seeds(lambda s: cost(results, s, "ppo")[key] / cost(results, s, "dpo")[key], "{:.1f}")
    whole = lambda method: over_seeds(lambda s: runs[f"seed{s}/pretrain"]["seconds"] + cost(results, s, method)["seconds"], "{:.0f}")
    accuracy = lambda name: over_seeds(lambda s: runs[f"seed{s}/{name}"]["val_accuracy"], "{:.3f}")
    best = over_seeds(lambda s: runs[f"seed{s}/reward"]["best_accuracy"], "{:.3f}")
    rows = [
        ("DPO is three to six times cheaper", "three to six times (the press)",
         f"seconds {ratio('seconds')} times, FLOPs {ratio('flops')} times; with pretraining {whole('dpo')} s against {whole('ppo')} s"),
        ("It is at least as good at summarising", "wins 61% against 57% for PPO, temperature 0",
         f"wins against the pretrained model, temperature 1: {of('dpo', 'win_rate')}, PPO {of('ppo', 'win_rate')}"),
        ("It gets more reward at the same KL", "its frontier lies above PPO's, even with the true reward",
         f"share of the optimal gain {of('dpo')}, PPO {of('ppo')}, PPO with the judge itself {100 * judged['seed1/ppo-judge']['share']:.1f}% (one seed)"),
        ("PPO suffers from temperature, DPO hardly", "at temperature 1 PPO falls to the level of the base model",
         "wins at temperature 0 and 1: " + ", ".join(f"{name} {of(f'{m}/temperature0', 'win_rate')} and {of(f'{m}/temperature1', 'win_rate')}"
                                                     for name, m in (("DPO", "dpo"), ("PPO", "ppo"), ("pretrained", "pretrain")))),
        ("It carries over to other text", "CNN/DailyMail: wins 36% against 26%",
         f"longer posts, new names: {of('dpo/shifted', 'win_rate')} against {of('ppo/shifted', 'win_rate')}"),
        ("The policy conceals a reward model", "a theorem", f"predicts {accuracy('dpo')} of the choices, `reward.py` {accuracy('reward')}, best possible {best}"),
    ]  # fmt: skip
    return "\n".join(["| claim | the paper | here, mean ± standard deviation of three seeds |", "| --- | --- | --- |",
                      *(f"| {a} | {b} | {c} |" for a, b, c in rows)])  # fmt: skip


def measured(results):
    """The README's table of the three seeds, from the file."""
    judged, runs = results["judged"], results["runs"]
    score = lambda m: lambda h: f"{judged[f'{h}/{m}']['score']:.2f} ({results['reference'][h]['score']:.2f})"
    figure = lambda m, key, form: lambda h: form.format(judged[f"{h}/{m}"][key])
    accuracy = lambda m: lambda h: f"{runs[f'{h}/{m}']['val_accuracy']:.3f} ({runs[f'{h}/reward']['best_accuracy']:.3f})"
    seconds = lambda *names: lambda h: " / ".join(f"{runs[f'{h}/{name}']['seconds']:.0f}" for name in names)
    rows = [("pretraining: held-out loss over entropy", lambda h: f"{runs[f'{h}/pretrain']['val_loss'] / runs[f'{h}/pretrain']['entropy']:.3f}")]
    rows += [(f"{name}: held-out accuracy (best possible)", accuracy(m)) for name, m in (("reward model", "reward"), ("DPO", "dpo"))]
    for name, m in (("DPO", "dpo"), ("PPO", "ppo")):
        rows += [
            (f"{name}: score by the judge (pretrained)", score(m)),
            (f"{name}: KL from the pretrained model, nats an answer", figure(m, "kl", "{:.2f}")),
            (f"{name}: share of the optimal gain at that KL", figure(m, "share", "{:.1%}")),
            (f"{name}: wins against the pretrained model", figure(m, "win_rate", "{:.1%}")),
        ]
    rows += [
        ("seconds: pretraining / DPO with its pairs", seconds("pretrain", "dpo-with-pairs")),
        ("seconds: reward model / PPO, without the pairs", seconds("reward", "ppo")),
    ]
    return "\n".join(["| | seed 1 | seed 2 | seed 3 |", "| --- | --- | --- | --- |",
                      *(f"| {name} | " + " | ".join(cell(f"seed{s}") for s in SEEDS) + " |" for name, cell in rows)])  # fmt: skip


def main():
    RUNS.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}, "reference": {}, "judged": {}}
    for seed in SEEDS:
        chain(results, seed)
    for seed in SEEDS:
        sweep(results, seed)
        judge_all(results, seed)
    scarcity(results, SEEDS[0])
    judge_all(results, SEEDS[0])
    print(measured(results), table(results), sep="\n\n")


if __name__ == "__main__":
    main()
