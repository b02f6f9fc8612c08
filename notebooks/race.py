"""The race: what stands in the README's table and in notebook 04, measured on five seeds.

    python notebooks/race.py           # about two hours on two cores; stop it and start it again as you like

Each result is kept in `race.json` as it comes, under a name such as "3 dpo beta=0.5": the seed, and what was
run. The models are in `runs/race`; keep them until the race is over. All models are trained by the scripts
with their defaults, except for what the name says. None of these seeds was used to choose a default (that was
seed 0: see `tune.py`).

How a policy is measured. This model is small enough to list what it may say: `list_answers` follows every
beginning of an answer that has a probability of more than 3e-5, and comes to about 97% of all answers, with
their exact probabilities. Score, KL and the optimum at that KL are sums over that list, scaled to 100%. So no
sampling error is left but that of the 64 posts, and as each seed has posts of its own, the spread over seeds
counts both.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dpo  # noqa: E402
import ppo  # noqa: E402
import pretrain  # noqa: E402
import reward  # noqa: E402
from data import MAX_ANSWER_TOKENS, Tokenizer, documents, encode_pairs, judge, kind_of, pad_rows  # noqa: E402
from data import preference, read_preferences, write_files, write_records  # noqa: E402
from model import Cache, ScalarGPT, final_scores, load_model, own_pairs, sample_texts  # noqa: E402
from plots import KINDS  # noqa: E402
from sample import frontier, measure  # noqa: E402

SCRIPTS = {"pretrain": pretrain, "dpo": dpo, "reward": reward, "ppo": ppo}
SEEDS, RUNS, RESULTS = (1, 2, 3, 4, 5), HERE.parent / "runs/race", HERE / "race.json"
BETAS = {"dpo": (0.15, 0.3, 0.5, 1, 2), "ppo": (0.15, 0.25, 0.4, 0.7, 1.4), "judge": (0.25, 0.4, 0.8)}
FEW, NOISE = (250, 500, 1000, 2000, 4000, 8000), (0.1, 0.25, 0.5)
POSTS = 64
BETA_GRID = np.geomspace(1e3, 0.05, 80)  # from large to small, as the optimum's KL grows


# ----------------------------------------------------------------------------------------------------
# Measuring a policy


@torch.no_grad()
def list_answers(model, reference, prompt, eos, temperature=1.0, floor=3e-5):
    """The answers that are likelier than `floor`, as lists of ids with EOS, and two arrays (N,).

    These are their log-probabilities under the model, at that temperature, and under the reference.
    """
    caches = [Cache(model.config) for _ in range(2)]
    hidden = [m.transformer(torch.tensor([prompt]), c)[:, -1] for m, c in zip((model, reference), caches)]
    tokens, so_far = torch.zeros(1, 0, dtype=torch.long), [torch.zeros(1, 1)] * 2
    answers, found = [], []
    for _ in range(MAX_ANSWER_TOKENS):
        logits = model.head(hidden[0]) / temperature, reference.head(hidden[1])
        log_probs = [x.log_softmax(-1) + before for x, before in zip(logits, so_far)]  # (beginnings, V) each
        likely = log_probs[0] > math.log(floor)
        ended = likely[:, eos].nonzero().flatten()
        answers += [[*row, eos] for row in tokens[ended].tolist()]
        found.append(torch.stack([x[ended, eos] for x in log_probs]))
        likely[:, eos] = False
        rows, new = likely.nonzero(as_tuple=True)
        if not len(rows):
            break
        tokens, so_far = (
            torch.cat([tokens[rows], new[:, None]], dim=1),
            [x[rows, new, None] for x in log_probs],
        )
        for cache in caches:
            cache.take(rows)
        hidden = [m.transformer(new[:, None], c)[:, -1] for m, c in zip((model, reference), caches)]
    return answers, *torch.cat(found, dim=1).double().numpy()


def listed(model, reference, tokenizer, post, temperature=1.0):
    """Answers to a post: texts, p scaled to sum 1, log(p / p_ref), the judge's scores; the mass listed."""
    prompt = tokenizer.encode(post)
    answers, log_p, log_p_ref = list_answers(model, reference, prompt, tokenizer.eos, temperature)
    texts = [tokenizer.decode(answer) for answer in answers]
    p, scores = np.exp(log_p), np.array([judge(post, text) for text in texts])
    return texts, p / p.sum(), log_p - log_p_ref, scores, p.sum()


def softmax(logs):
    w = np.exp(logs - logs.max())
    return w / w.sum()


class Reference:
    """A seed's pretrained model on its posts of one kind, and the best that any policy could do there."""

    def __init__(self, seed, kind="POST"):
        home = RUNS / str(seed) / "pretrain"
        self.model, self.tokenizer = load_model(home), Tokenizer.load(home)
        self.posts = [d.prompt for d in documents(POSTS, seed=[seed, 9], kind=kind)]
        kept = home / f"listed-{kind}.json"
        if not kept.exists():
            every = [listed(self.model, self.model, self.tokenizer, post) for post in self.posts]
            kept.write_text(json.dumps([(texts, p.tolist(), s.tolist()) for texts, p, _, s, _ in every]))
        self.texts, self.p, self.scores = zip(*json.loads(kept.read_text()))
        self.p, self.scores = [np.array(p) for p in self.p], [np.array(s) for s in self.scores]
        self.start = np.mean([p @ s for p, s in zip(self.p, self.scores)])
        self.frontier = np.array([self.optimum(beta) for beta in BETA_GRID])

    def optimum(self, beta):
        """KL and score of the ideal policy π_ref exp(score / β), scaled to sum 1."""
        points = []
        for p, scores in zip(self.p, self.scores):
            w = softmax(np.log(p) + scores / beta)
            points.append([(w * np.log(np.maximum(w, 1e-300) / p)).sum(), w @ scores])
        return np.mean(points, axis=0)

    def optimal_kinds(self, kl):
        """What the optimum at that KL writes: the share of each kind of answer."""
        beta = np.interp(kl, self.frontier[:, 0], BETA_GRID)
        kinds = dict.fromkeys(KINDS, 0.0)
        for post, texts, p, scores in zip(self.posts, self.texts, self.p, self.scores):
            for text, share in zip(texts, softmax(np.log(p) + scores / beta)):
                kinds[kind_of(post, text)] += share / POSTS
        return kinds

    def share(self, score, kl):
        """Of the gain that is optimal at that KL."""
        best = np.interp(kl, self.frontier[:, 0], self.frontier[:, 1])
        return (score - self.start) / (best - self.start) if kl > 0.02 else None

    def wins(self, i, scores):
        """How often answers with these scores beat the reference's answer to post i; ties count half."""
        p, theirs = self.p[i], self.scores[i]
        return (np.sign(scores[:, None] - theirs[None]) / 2 + 0.5) @ p

    def selected(self, values, n):
        """The best of n answers of the reference by `values`, one array for each post."""
        w = [best_of_n(p, value, n) for p, value in zip(self.p, values)]
        score, learned = (np.mean([x @ y for x, y in zip(w, of)]) for of in (self.scores, values))
        kl = np.mean([(x * np.log(np.maximum(x, 1e-300) / p)).sum() for x, p in zip(w, self.p)])
        return {"score": score, "learned score": learned, "kl": kl, "share": self.share(score, kl)}

    def measure(self, directory, temperature=1.0):
        """All figures of a checkpoint."""
        model, rows, kinds = load_model(directory), [], dict.fromkeys(KINDS, 0.0)
        for i, post in enumerate(self.posts):
            texts, p, log_ratio, scores, mass = listed(model, self.model, self.tokenizer, post, temperature)
            words = np.array([len(text.split()) for text in texts])
            rows.append([p @ scores, p @ log_ratio, p @ self.wins(i, scores), p @ words, mass])
            for text, share in zip(texts, p):
                kinds[kind_of(post, text)] += share / POSTS
        score, kl, wins, words, mass = np.mean(rows, axis=0)
        figures = {"score": score, "kl": kl, "share": self.share(score, kl), "win_rate": wins, "words": words}
        return figures | {"mass": mass, "kinds": {kind: round(share, 4) for kind, share in kinds.items()}}


def best_of_n(p, values, n):
    """The exact distribution of the best of n answers drawn from p by `values`; of equals, the first."""
    order = np.argsort(values, kind="stable")
    _, group = np.unique(values[order], return_inverse=True)
    mass = np.bincount(group, p[order])
    upto = np.minimum(np.cumsum(mass), 1.0)
    below = np.concatenate([[0.0], upto[:-1]])
    result = np.empty_like(p)
    result[order] = p[order] * ((upto**n - below**n) / mass)[group]
    return result / result.sum()


# ----------------------------------------------------------------------------------------------------
# What is run. Each job gives figures, and its name says all.


def home_of(seed, name):
    """The directory of a run."""
    return RUNS / str(seed) / name.replace(" ", "-")


def train(script, seed, name, *options):
    """Run a script with its defaults and these options, unless it has run; the figures of its end."""
    out = home_of(seed, name)
    if not (out / "metrics.jsonl").exists():
        init = [] if script == "pretrain" else ["--init", home_of(seed, "pretrain")]
        words = [str(word) for word in (*init, "--out", out, "--seed", seed, *options)]
        (out / "resume.pt").unlink(missing_ok=True)  # of a race that was stopped
        with contextlib.redirect_stdout(io.StringIO()):
            SCRIPTS[script].main(SCRIPTS[script].parser.parse_args(words))
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = ("val_loss", "val_accuracy", "best_accuracy", "entropy", "reward")
    figures = {key: final[key] for key in wanted if key in final}
    return figures | {"training_seconds": final["seconds"]}


def job_pretrain(seed):
    """The pretrained model, its pairs, its temperatures, the optimum, and the best of n by the judge."""
    home = RUNS / str(seed)
    figures = train("pretrain", seed, "pretrain")
    args = dpo.parser.parse_args(["--init", str(home / "pretrain"), "--seed", str(seed)])
    with contextlib.redirect_stdout(io.StringIO()):
        own_pairs(args, load_model(args.init), Tokenizer.load(args.init))
    for kind in ("POST", "LETTER"):
        here = Reference(seed, kind)
        figures[kind] = {
            f"temperature {t:g}": here.measure(home / "pretrain", max(t, 1e-3))
            for t in (0, 0.25, 0.5, 0.75, 1)
        }
        figures[kind]["frontier"] = here.frontier.round(4).tolist()
        figures[kind]["optimum at 1 nat"] = {"score": np.interp(1, *here.frontier.T)} | here.optimal_kinds(1)
        torch.manual_seed(seed)
        _, scores, _, _ = measure(here.model, here.model, here.tokenizer, here.posts, 256)
        sampled = np.mean(frontier(scores), axis=2)  # KL and score, (2, 100)
        figures[kind]["optimum from 256 answers"] = sampled[:, ::5].T.round(4).tolist()
        figures[kind]["best of n"] = {n: here.selected(here.scores, n) for n in (2, 4, 8, 16, 64, 256)}
    return figures


def job_policy(seed, name, script, *options):
    """Train a policy and measure it on posts; with all the pairs and the default β also on letters."""
    figures = train(script, seed, name, *options)
    figures |= Reference(seed).measure(home_of(seed, name))
    if name == "dpo beta=0.5":
        figures["as a judge"] = as_a_judge(seed, lambda pairs: 0.5 * log_ratios_of(seed, name, pairs))
    if name in ("dpo beta=0.5", "ppo beta=0.4", "judge beta=0.4", "sft"):
        posts, letters, model = Reference(seed), Reference(seed, "LETTER"), home_of(seed, name)
        figures["temperature 0"] = posts.measure(model, 1e-3)
        figures["letters"] = letters.measure(model) | {"temperature 0": letters.measure(model, 1e-3)}
    return figures


def job_reward(seed, name, best_of=False, *options):
    """Train a reward model; with `best_of` also the best of n answers by it."""
    figures = train("reward", seed, name, *options)
    if best_of:
        here, scorer = Reference(seed), load_model(home_of(seed, name), ScalarGPT)
        values = []
        for post in here.posts:
            prompt = here.tokenizer.encode(post)
            answers, _, _ = list_answers(here.model, here.model, prompt, here.tokenizer.eos)
            tokens, mask, start = pad_rows([prompt] * len(answers), answers)
            with torch.no_grad():
                values.append(final_scores(scorer, tokens, mask, start, copies=len(answers)).numpy())
        figures["best of n"] = {n: here.selected(values, n) for n in (1, 2, 4, 8, 16, 64, 256)}
        figures["as a judge"] = as_a_judge(seed, lambda pairs: scores_of(scorer, pairs))
    return figures


def scores_of(scorer, pairs):
    """A reward model's scores of chosen and rejected answers, (N, 2)."""
    with torch.no_grad():
        some = [reward.pair_scores(scorer, pairs[i : i + 64], "cpu") for i in range(0, len(pairs), 64)]
    return torch.cat(some)


def log_ratios_of(seed, name, pairs):
    """log π − log π_ref of chosen and rejected answers, (N, 2), for a policy of this seed."""
    policy, reference = load_model(home_of(seed, name)), load_model(home_of(seed, "pretrain"))
    with torch.no_grad():
        some = [
            dpo.pair_log_probs(policy, pairs[i : i + 64], "cpu")
            - dpo.pair_log_probs(reference, pairs[i : i + 64], "cpu")
            for i in range(0, len(pairs), 64)
        ]
    return torch.cat(some)


def as_a_judge(seed, values_of):
    """How good a judge of two answers is, on 512 posts and 512 letters; `values_of` encoded pairs are (N, 2).

    accuracy: of the choices that volunteers would make, over the best possible. correlation: with the true
    difference of the judge's scores. calibration: mean distance between σ(margin) and the true probability.
    """
    home, figures = RUNS / str(seed) / "pretrain", {}
    reference, tokenizer = load_model(home), Tokenizer.load(home)
    for kind in ("POST", "LETTER"):
        posts = [d.prompt for d in documents(512, seed=[seed, 10], kind=kind)]
        generator = torch.Generator().manual_seed(seed)
        texts = sample_texts(
            reference, tokenizer, [post for post in posts for _ in range(2)], generator=generator
        )
        both = [(post, a, b) for post, a, b in zip(posts, texts[0::2], texts[1::2]) if a != b]
        records = [{"prompt": post, "chosen": a, "rejected": b} for post, a, b in both]
        pairs, _ = encode_pairs(tokenizer, records, reference.config.n_positions)
        margin = (values_of(pairs) @ torch.tensor([1.0, -1.0])).double().numpy()
        p = np.array([preference(*pair) for pair in both])
        truth = np.array([judge(post, a) - judge(post, b) for post, a, b in both])
        right, best = np.where(margin > 0, p, 1 - p).mean(), np.maximum(p, 1 - p).mean()
        figures[kind] = {"accuracy": right / best, "correlation": np.corrcoef(margin, truth)[0, 1]}
        figures[kind]["calibration"] = np.abs(1 / (1 + np.exp(-margin)) - p).mean()
    return figures


def few_pairs(seed, n, noise=0.0):
    """The first n pairs of a seed, of which a share `noise` is labelled by coin: the file."""
    path = RUNS / str(seed) / f"pairs-{n}-{noise}.jsonl"
    records, rng = (
        read_preferences(RUNS / str(seed) / "pretrain/preferences.jsonl")[:n],
        np.random.default_rng(seed),
    )
    for record in records:
        if rng.random() < noise and rng.random() < 0.5:
            record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    write_records(path, records)
    return path


def passes(n):
    """How many passes over n pairs are tried; the best is chosen by the held-out loss."""
    return (1, 3, 9) if n <= 1000 else (1, 3) if n <= 4000 else (1,)


def best_passes(results, seed, script, n):
    """Of the runs over n pairs, that with the lowest held-out loss: its name."""
    names = [f"{script} pairs={n} passes={k}" for k in passes(n)]
    return min(names, key=lambda name: results[f"{seed} {name}"]["val_loss"])


def steps(n, passes):
    """So many passes in steps: 32 pairs each, and a tenth of the pairs is held out."""
    return math.ceil((n - n // 10) / 32) * passes


def stages(results):
    """Lists of jobs {name: (function, …)} in their order; those of one list do not need one another."""
    yield {f"{s} pretrain": (job_pretrain, s) for s in (*SEEDS, 0)}
    for s in SEEDS:
        jobs = {f"{s} reward": (job_reward, s, "reward", True)}
        jobs[f"{s} sft"] = (job_policy, s, "sft", "dpo", "--loss", "sft")
        for beta in BETAS["dpo"]:
            jobs[f"{s} dpo beta={beta:g}"] = (job_policy, s, f"dpo beta={beta:g}", "dpo", "--beta", beta)
        for share in NOISE:
            how = ["--data", (few_pairs, s, None, share)]
            jobs[f"{s} dpo noise={share:g}"] = (job_policy, s, f"dpo noise={share:g}", "dpo", *how)
            jobs[f"{s} reward noise={share:g}"] = (job_reward, s, f"reward noise={share:g}", False, *how)
        for n in FEW:
            for k in passes(n):
                how = ["--data", (few_pairs, s, n), "--steps", steps(n, k)]
                for script in ("dpo", "reward"):
                    name = f"{script} pairs={n} passes={k}"
                    jobs[f"{s} {name}"] = (train, script, s, name, *how)
        yield jobs

        jobs = {}
        for name, judge_of in (("ppo", RUNS / str(s) / "reward"), ("judge", "judge")):
            for beta in BETAS[name]:
                how = ["--reward", judge_of, "--beta", beta]
                jobs[f"{s} {name} beta={beta:g}"] = (job_policy, s, f"{name} beta={beta:g}", "ppo", *how)
        for share in NOISE:
            how = ["--reward", RUNS / str(s) / f"reward-noise={share:g}"]
            jobs[f"{s} ppo noise={share:g}"] = (job_policy, s, f"ppo noise={share:g}", "ppo", *how)
        for n in FEW:
            how = ["--reward", home_of(s, best_passes(results, s, "reward", n))]
            jobs[f"{s} ppo pairs={n}"] = (job_policy, s, f"ppo pairs={n}", "ppo", *how)
            chosen = best_passes(results, s, "dpo", n)
            jobs[f"{s} dpo pairs={n} beta=0.5"] = (job_policy, s, chosen, "dpo")
            beta = 0.25 if n <= 1000 else 1  # for a second KL, so that DPO can be read off at PPO's
            how = ["--data", (few_pairs, s, n), "--steps", steps(n, int(chosen.split("=")[-1]))]
            name = f"dpo pairs={n} beta={beta:g}"
            jobs[f"{s} {name}"] = (job_policy, s, name, "dpo", *how, "--beta", beta)
        yield jobs


def do(job):
    """In a process of its own: (name, figures)."""
    name, function, *arguments = job
    began = time.time()
    arguments = [a[0](*a[1:]) if isinstance(a, tuple) else a for a in arguments]
    return name, function(*arguments) | {"seconds": time.time() - began}


def run_all(stages, path):
    """Run all jobs that have no result in the file yet, two at a time, with one thread each."""
    results = json.loads(path.read_text()) if path.exists() else {}
    began = time.time()
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, stage in enumerate(stages(results), start=1):
            jobs = [(name, *job) for name, job in stage.items() if name not in results]
            stage_began = time.time()
            for done, (name, figures) in enumerate(pool.imap_unordered(do, jobs), start=1):
                keep(results, path, name, figures)
                left = (time.time() - stage_began) / done * (len(jobs) - done) / 60
                print(f"{(time.time() - began) / 60:5.1f} min: {name}; ", end="")
                print(f"stage {number} is done in about {left:.0f} min", flush=True)
    return results


def keep(results, path, name, figures):
    results[name] = rounded(figures)
    write_files(path.parent, {path.name: json.dumps(results, indent=0).encode()})


def main():
    results = run_all(stages, RESULTS)
    for seed in (0, *SEEDS[:3]):
        for way, schedules in SCHEDULES.items():
            for schedule in schedules if seed == 0 else cheapest(results, way):
                name = f"{seed} cost {way} {json.dumps(schedule)}"
                if name not in results:
                    keep(results, RESULTS, name, job_cost(seed, way, schedule))
                    print(f"{name}: {results[name]['seconds']:.0f} s", flush=True)
                if seed and results[name]["reached"]:
                    break


def cheapest(results, way):
    """The schedules that reached the score on seed 0, from cheap to dear."""
    found = [(results[f"0 cost {way} {json.dumps(s)}"], s) for s in SCHEDULES[way]]
    return [s for figures, s in sorted(found, key=lambda item: item[0]["seconds"]) if figures["reached"]]


# ----------------------------------------------------------------------------------------------------
# Cost until a score, timed alone, with both cores. Each side may shorten every stage.

SCHEDULES = {  # from cheap to dear, chosen on seed 0
    "dpo": [{"pairs": m} for m in (250, 500, 1000, 2000, 4000, 8000)],
    "rlhf": [{"pairs": m, "steps": n} for m in (250, 500, 1000, 2000) for n in (20, 40)],
}


def timed(script, *options):
    """Run a script as its user does: seconds, and the peak memory of its process in MB."""
    words, began = [sys.executable, f"{HERE.parent / script}.py", *map(str, options)], time.time()
    # A child is said to have had its parent's memory, too, so its parent is a small process of its own.
    watch = (
        "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], check=True, stdout=s.DEVNULL); "
        "print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss)"
    )
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", watch, *words], env=env, capture_output=True, check=True)
    return time.time() - began, int(found.stdout) / 1024


def flops(way, schedule, here):
    """Floating-point operations by formula: two a weight and token forward, six in training (Kaplan 2020).

    Embeddings are looked up and cost nothing. Prompts that several answers share are read once.
    """
    config, records = here.model.config, read_preferences(RUNS / "1/pretrain/preferences.jsonl")
    differ = len(records) / dpo.parser.get_default("pairs")  # the rest have the same answer twice
    body, head = 12 * config.n_layer * config.n_embd**2, config.vocab_size * config.n_embd
    length = lambda keys: np.mean([len(here.tokenizer.encode(r[key])) for r in records[:500] for key in keys])
    prompt, answer = length(["prompt"]), length(["chosen", "rejected"]) + 1
    pair, pairs = prompt + 2 * answer, differ * schedule["pairs"]  # tokens of a pair, and how many
    total = schedule["pairs"] * 2 * (body * pair + head * 2 * answer)  # sampling
    if way == "dpo":  # the reference reads all pairs; nine in ten are learned from
        return total + (2 + 0.9 * 6) * pairs * (body * pair + head * 2 * answer)
    total += 0.9 * 6 * pairs * body * pair  # the reward model
    answers, epochs = (ppo.parser.get_default(name) for name in ("batch_size", "epochs"))
    passes = 2 + 2 + 6 * epochs  # the policy writes, the reference reads, the policy learns
    total += schedule["steps"] * answers * passes * (body * (prompt + answer) + head * answer)
    # As many for the other two: the reward model scores, the critic guesses, the critic learns.
    return total + schedule["steps"] * answers * passes * body * (prompt + answer)


def job_cost(seed, way, schedule):
    """By one schedule, from the pretrained model on: seconds, memory, and the score beside that to reach."""
    home = RUNS / f"{seed}-cost"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(RUNS / str(seed) / "pretrain", home, ignore=shutil.ignore_patterns("preferences*"))
    here = Reference(seed)
    wanted = here.start + 0.9 * (np.interp(1, *here.frontier.T) - here.start)
    common = ["--init", home, "--seed", seed]
    if way == "dpo":
        runs = [timed("dpo", *common, "--out", home / "policy", "--pairs", schedule["pairs"])]
    else:
        runs = [timed("reward", *common, "--out", home / "reward", "--pairs", schedule["pairs"])]
        how = ["--reward", home / "reward", "--steps", schedule["steps"]]
        runs.append(timed("ppo", *common, "--out", home / "policy", *how))
    figures = here.measure(home / "policy")
    figures |= {"stages": [run[0] for run in runs], "seconds": sum(run[0] for run in runs)}
    figures["memory"] = max(run[1] for run in runs)
    figures["flops"] = flops(way, schedule, here)
    return figures | {"wanted": wanted, "reached": bool(figures["score"] >= wanted)}


# ----------------------------------------------------------------------------------------------------
# What came out


def over_seeds(results, name, *keys, seeds=SEEDS):
    """A figure of the race on each seed: over_seeds(results, "dpo beta=0.5", "letters", "score") is (5,)."""
    found = [results[f"{seed} {name}"] for seed in seeds]
    for key in keys:
        found = [figures[key] for figures in found]
    return np.array(found, dtype=float)


def said(x, form=".2f"):
    """Mean ± standard error over the seeds."""
    return f"{np.mean(x):{form}} ± {np.std(x, ddof=1) / math.sqrt(len(x)):{form}}"


def differs(a, b):
    """Whether two figures differ, seed by seed, by more than luck would have it in one case of twenty.

    By Student's t: more than 2.78 standard errors of the difference with five seeds, 4.30 with three.
    """
    d = np.asarray(a) - b
    return abs(d.mean()) > {3: 4.30, 5: 2.78}[len(d)] * d.std(ddof=1) / math.sqrt(len(d))


def at_kl(results, names, kl, key="share"):
    """A figure of DPO at these KLs (5,), read off between the runs `names`; beyond them the nearest one's."""
    kls, figures = (np.array([over_seeds(results, name, k) for name in names]).T for k in ("kl", key))
    ordered = np.argsort(kls, axis=1)
    return np.array([np.interp(x, ks[o], f[o]) for x, ks, f, o in zip(kl, kls, figures, ordered)])


def by_labels(results):
    """Shares of the optimal gain with 250, …, 8,000 and all labels, (5, 7): RLHF, and DPO at RLHF's KL.

    Where DPO did not go so far from the reference, it is the share at its farthest.
    """
    rlhf, dpo_there = [], []
    for n in (*FEW, None):
        name = f"ppo pairs={n}" if n else "ppo beta=0.4"
        some = [f"dpo pairs={n} beta={b:g}" for b in (0.5, 0.25 if n <= 1000 else 1)] if n else None
        some = some or [f"dpo beta={b:g}" for b in BETAS["dpo"]]
        rlhf.append(over_seeds(results, name, "share"))
        dpo_there.append(at_kl(results, some, over_seeds(results, name, "kl")))
    return np.array(rlhf).T, np.array(dpo_there).T


def crossing(rlhf, dpo_there, n_labels):
    """How many labels DPO needs to draw level, on each seed: where the last change of sign lies, in log n."""
    result = []
    for d in rlhf - dpo_there:
        ahead = np.flatnonzero(d > 0)  # where RLHF is
        if not len(ahead) or ahead[-1] == len(d) - 1:
            result.append(n_labels[-1] if len(ahead) else n_labels[0])
            continue
        i = ahead[-1]
        logs = np.log(n_labels[i : i + 2])
        result.append(np.exp(logs[0] + d[i] / (d[i] - d[i + 1]) * (logs[1] - logs[0])))
    return np.array(result)


def cost(results, way):
    """Of the first schedule that reached the score, on seeds 1 to 3: seconds, FLOPs and memory, (3,) each."""
    rows = []
    for seed in SEEDS[:3]:
        names = [f"{seed} cost {way} {json.dumps(schedule)}" for schedule in cheapest(results, way)]
        rows.append(next(results[name] for name in names if name in results and results[name]["reached"]))
    return {key: np.array([row[key] for row in rows]) for key in ("seconds", "flops", "memory")}


def claims(results):
    """The claims of the story: what the DPO paper has (arXiv 2305.18290), and what came out here; a table."""
    get = lambda name, *keys: over_seeds(results, name, *keys)
    both = lambda *keys: (get("dpo beta=0.5", *keys), get("ppo beta=0.4", *keys))
    every_dpo, posts = [f"dpo beta={beta:g}" for beta in BETAS["dpo"]], ("pretrain", "POST")
    percent = lambda x: said(x, ".1%")

    def above(a, b):
        """Whether a figure is above another one by more than luck would have it: see `differs`."""
        return "within the spread" if not differs(a, b) else "yes" if np.mean(a) > np.mean(b) else "no"

    loss = get("pretrain", "val_loss") / get("pretrain", "entropy")
    repeats = [k for k in results["1 sft"]["kinds"] if k == "lucky" or k.startswith("repeats")]
    greedy = [get(*posts, "temperature 0", "kinds", kind) for kind in repeats]
    lowered = max((get(*posts, f"temperature {t:g}", "score") for t in (0, 0.25, 0.5, 0.75, 1)), key=np.mean)
    (dpo_score, rlhf_score), (dpo_wins, rlhf_wins) = both("score"), both("win_rate")
    (_, rlhf_share), (_, rlhf_kl) = both("share"), both("kl")
    dpo_share = at_kl(results, every_dpo, rlhf_kl)
    judge_share = get("judge beta=0.4", "share")
    beside_judge = at_kl(results, every_dpo, get("judge beta=0.4", "kl"))
    seconds, operations = (cost(results, "rlhf")[k] / cost(results, "dpo")[k] for k in ("seconds", "flops"))
    ratio = lambda x: f"{np.median(x):.1f} ({min(x):.1f} to {max(x):.1f})"
    dpo_greedy, rlhf_greedy = both("temperature 0", "win_rate")
    dpo_letters, rlhf_letters = both("letters", "share")
    dpo_letter_wins, rlhf_letter_wins = both("letters", "win_rate")
    sft, sft_letters = get("sft", "score"), get("sft", "letters", "win_rate")
    best_of = [get("reward", "best of n", n, "score") for n in ("16", "256")]
    implicit, explicit = (
        [get(name, "as a judge", kind, "correlation") for kind in ("POST", "LETTER")]
        for name in ("dpo beta=0.5", "reward")
    )
    few_rlhf, few_dpo = by_labels(results)
    level = crossing(few_rlhf, few_dpo, np.array([*FEW, get("pretrain", "pairs").mean()]))
    coin_dpo, coin_rlhf = get("dpo noise=0.5", "share"), get("ppo noise=0.5", "share")
    rows = [
        ("claim", "the paper", "here", "holds?"),
        ("---",) * 4,
        (
            "Pretraining comes near the best possible guess",
            "",
            f"held-out loss {said(loss, '.3f')} times the entropy",
            "yes" if loss.mean() <= 1.02 else "no",
        ),
        (
            "It does not do what people want",
            "(GPT-2 repeats the question)",
            f"temperature 0: repeats the first sentence in {percent(sum(greedy))}",
            "yes" if np.mean(sum(greedy)) > 0.5 else "no",
        ),
        (
            "A lower temperature does not mend that",
            "",
            f"score at its best temperature {said(lowered)}; RLHF {said(rlhf_score)}, DPO {said(dpo_score)}",
            above(rlhf_score, lowered),
        ),
        (
            "RLHF works",
            "wins 57% against people",
            f"wins {percent(rlhf_wins)} against the pretrained model",
            above(rlhf_wins, 0.5),
        ),
        (
            "DPO is at least as good",
            "wins 61%",
            f"wins {percent(dpo_wins)}; share at RLHF's KL {percent(dpo_share)}, RLHF {percent(rlhf_share)}",
            above(dpo_share, rlhf_share),
        ),
        (
            "… even as PPO on the true reward",
            "yes (sentiment)",
            f"share at its KL {percent(beside_judge)}, PPO that asks the judge {percent(judge_share)}",
            above(beside_judge, judge_share),
        ),
        (
            "It is three to six times cheaper",
            "(its author: a little over 4)",
            f"seconds {ratio(seconds)}, operations {ratio(operations)}",
            "yes" if np.median(seconds) >= 3 else "in operations" if np.median(operations) >= 3 else "no",
        ),
        (
            "Temperature harms PPO more than DPO",
            "PPO falls to the base model",
            f"wins at 0 and 1: DPO {dpo_greedy.mean():.1%}, {dpo_wins.mean():.1%}; "
            f"RLHF {rlhf_greedy.mean():.1%}, {rlhf_wins.mean():.1%}",
            above(rlhf_greedy - rlhf_wins, dpo_greedy - dpo_wins),
        ),
        (
            "It carries over to other text",
            "wins: DPO 36%, PPO 26%",
            f"letters: DPO wins {percent(dpo_letter_wins)}, RLHF {percent(rlhf_letter_wins)}",
            above(np.minimum(dpo_letter_wins, rlhf_letter_wins), 0.5),
        ),
        (
            "… and DPO's does better there",
            "yes",
            f"letters, share: DPO {percent(dpo_letters)}, RLHF {percent(rlhf_letters)}",
            above(dpo_letters, rlhf_letters),
        ),
        (
            "Fine-tuning on the chosen is not enough",
            "yes",
            f"score {said(sft)}; on letters it wins {percent(sft_letters)}",
            above(rlhf_score, sft),
        ),
        (
            "Best of n is as good",
            "DPO matches n = 128",
            f"by the reward model: n = 16 {said(best_of[0])}, n = 256 {said(best_of[1])}",
            above(best_of[0], dpo_score),
        ),
        (
            "The language model is a reward model",
            "yes (a theorem)",
            f"correlation with the judge {said(implicit[0], '.3f')}, reward model {said(explicit[0], '.3f')}",
            above(implicit[0], explicit[0]),
        ),
        (
            "With few labels RLHF is better",
            "",
            f"250 pairs: {percent(few_rlhf[:, 0])}, DPO {percent(few_dpo[:, 0])}; "
            f"DPO draws level at {np.median(level):.0f} ({min(level):.0f} to {max(level):.0f})",
            above(few_rlhf[:, 0], few_dpo[:, 0]),
        ),
        (
            "Half of the labels by coin harm DPO more",
            "",
            f"share: DPO {percent(coin_dpo)}, RLHF {percent(coin_rlhf)}",
            above(coin_rlhf, coin_dpo),
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def rounded(x):
    """Floats to five digits, at any depth."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(float(x), 5) if isinstance(x, (float, np.floating)) else x


if __name__ == "__main__":
    main()
