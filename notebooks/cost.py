"""What it costs to reach 90% of the gain that is optimal at 1 nat: seconds, operations, memory.

    python notebooks/cost.py       # ten minutes; nothing else should run beside it: it is timed on both cores

Each side may choose freely: how many pairs, how many passes, rates, β, iterations, RLOO, and when to stop.
Twelve schedules a side were tried on seed 0, with an earlier pretraining and PyTorch's own Muon; the cheapest
of each is run on the seeds that are reported.
While a policy learns, copies of it are put aside. They are measured afterwards, and the time at which the
score was reached is read off between two of them. Seconds are those in `main`, without Python's own start.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
from claims import COST as RESULTS
from experiments import SEEDS
from measure import HERE, RUNS, Reference, ask, dpo, home_of, ppo, pretrained, reward, rounded

from data import read_preferences, write_files
from model import Run, load_model, save_model

SCHEDULES = {
    "dpo": [  # pairs asked about, passes, rate over the default one, β
        (500, 4, 1, 0.5), (1000, 2, 1, 0.5), (1000, 4, 1, 0.5), (1000, 2, 2, 0.5), (1500, 2, 1, 0.5),
        (2000, 1, 1, 0.5), (2000, 1, 2, 0.5), (2000, 2, 1, 0.5), (2000, 1, 2, 0.25), (3000, 1, 1, 0.5),
        (3000, 1, 2, 0.25), (4000, 1, 1, 0.5),
    ],
    "rlhf": [  # pairs, passes of the reward model, advantage, iterations, rate over the default one, β
        (500, 2, "rloo", 20, 1, 0.4), (700, 2, "rloo", 20, 1, 0.4), (700, 2, "rloo", 15, 2, 0.4),
        (700, 2, "rloo", 20, 2, 0.4), (700, 2, "gae", 20, 1, 0.4), (1000, 1, "rloo", 20, 1, 0.4),
        (1000, 2, "rloo", 15, 2, 0.25), (1000, 1, "gae", 20, 2, 0.4), (1000, 2, "rloo", 30, 1, 0.4),
        (500, 3, "rloo", 15, 2, 0.25), (1500, 1, "rloo", 15, 2, 0.4), (1500, 1, "rloo", 20, 1, 0.4),
    ],
}  # fmt: skip
COPIES = 10  # of the policy while it learns


def operations(way, schedule, fraction, here, records):
    """Floating-point operations by formula: two a weight and token forward, six in training (Kaplan 2020).

    Embeddings are looked up and cost nothing. Prompts that several answers share are read once. Of the last
    training only this fraction counts.
    """
    config, asked, passes = here.model.config, *schedule[:2]
    body, head = 12 * config.n_layer * config.n_embd**2, config.vocab_size * config.n_embd
    length = lambda *keys: np.mean([len(here.tokenizer.encode(r[k])) for r in records[:500] for k in keys])
    prompt, answer = length("prompt"), length("chosen", "rejected") + 1
    pair, pairs = prompt + 2 * answer, len(records)  # tokens of a pair; those whose answers differ
    total = asked * 2 * (body * pair + head * 2 * answer)  # sampling
    if way == "dpo":  # the reference reads all pairs; nine in ten are learned from
        return total + (2 + 0.9 * 6 * passes * fraction) * pairs * (body * pair + head * 2 * answer)
    total += 0.9 * 6 * passes * pairs * body * pair  # the reward model
    _, _, advantage, iterations, *_ = schedule
    answers, epochs = (ppo.parser.get_default(name) for name in ("batch_size", "epochs"))
    each = fraction * iterations * answers
    total += each * (2 + 2 + 6 * epochs) * (body * (prompt + answer) + head * answer)  # policy, reference
    critic = 2 + 6 * epochs if advantage == "gae" else 0
    return total + each * (2 + critic) * body * (prompt + answer)  # reward model, and the critic


def read_off(copies, score, start, wanted):
    """When the score was reached: (whether it was, seconds, share of the run, the scores looked at).

    `copies` are (seconds, share of the run, weights), `score(i)` is that of copy i from 1 on, and `start` the
    pretrained model's. Scores rise, so the first copy that is good enough is found by halving. Between it and
    the one before it lies the moment, on a straight line; nothing is known of the time before the first copy.
    """
    low, high = 0, len(copies)
    scores = {low: start, high: score(high)}
    reached = scores[high] >= wanted
    while reached and high - low > 1:
        middle = (low + high) // 2
        scores[middle] = score(middle)
        low, high = (low, middle) if scores[middle] >= wanted else (middle, high)
    s1, f1, _ = copies[high - 1]
    if not reached or not low:
        return reached, s1, f1, scores
    s0, f0, _ = copies[low - 1]
    at = (wanted - scores[low]) / (scores[high] - scores[low])
    return reached, s0 + at * (s1 - s0), f0 + at * (f1 - f0), scores


def trial(seed, way, schedule):
    """One schedule from the pretrained model on: what it cost until the score was reached."""
    home = RUNS / f"{seed}-cost"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(home_of(seed, "pretrain"), home, ignore=shutil.ignore_patterns("preferences*"))
    common = ["--init", home, "--seed", seed]
    began, copies = time.perf_counter(), []

    class Watched(Run):
        """A run that puts copies of the policy aside, with the time and how much of the run is done."""

        def __iter__(self):
            marks = {round(self.steps * (i + 1) / COPIES) for i in range(COPIES)}
            for step in super().__iter__():
                yield step
                if step + 1 in marks:
                    weights = {name: p.detach().clone() for name, p in self.models[0].state_dict().items()}
                    copies.append((time.perf_counter() - began, (step + 1) / self.steps, weights))

    def run(script, *options):
        words = [str(option) for option in (*common, *options)]
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(script.parser.parse_args(words))

    asked, passes, *rest = schedule
    # Three answers in ten are the same twice: so many steps are about so many passes.
    steps = passes * math.ceil(0.63 * asked / 32)
    ask(home, seed, asked)
    with patch.object(dpo, "Run", Watched), patch.object(ppo, "Run", Watched):
        if way == "dpo":
            how = ["--lr", dpo.parser.get_default("lr") * rest[0], "--beta", rest[1]]
            run(dpo, "--out", home / "policy", "--steps", steps, *how)
        else:
            run(reward, "--out", home / "reward", "--steps", steps)
            how = ["--advantage", rest[0], "--steps", rest[1], "--beta", rest[3]]
            how += ["--lr", ppo.parser.get_default("lr") * rest[2], "--reward", home / "reward"]
            run(ppo, "--out", home / "policy", *how)
    highest = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]  # in KB, on Linux
    here, policy = Reference(seed), load_model(home / "policy")
    records = read_preferences(home / "preferences.jsonl")
    wanted = here.start + 0.9 * (np.interp(1, *here.frontier.T) - here.start)
    (home / "copy").mkdir()

    def score(i):
        """Of the copy number i, from 1 on; 0 is the pretrained model."""
        policy.load_state_dict(copies[i - 1][2])
        save_model(policy, here.tokenizer, home / "copy")
        return here.measure(home / "copy", kinds=False)["score"]

    reached, seconds, fraction, scores = read_off(copies, score, here.start, wanted)
    return {
        "reached": bool(reached),
        "seconds": seconds,
        "operations": operations(way, schedule, fraction, here, records),
        "memory": int(highest) / 1024,
        "wanted": wanted,
        "scores": scores,
    }


def cheapest(results, way):
    """The schedule that was quickest on seed 0."""
    found = {json.dumps(s): results[f"0 cost {way} {json.dumps(s)}"] for s in SCHEDULES[way]}
    reached = {name: figures["seconds"] for name, figures in found.items() if figures["reached"]}
    return json.loads(min(reached, key=reached.get))


def main():
    if sys.argv[1:]:  # in a process of its own, whose memory is that of one trial
        seed, way, schedule = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
        return print(json.dumps(rounded(trial(seed, way, schedule))))
    for seed in (0, *SEEDS):
        pretrained(seed)
        results = json.loads(RESULTS.read_text())
        for way, schedules in SCHEDULES.items():
            for schedule in schedules if seed == 0 else [cheapest(results, way)]:
                name = f"{seed} cost {way}" + f" {json.dumps(schedule)}" * (seed == 0)
                if name not in results:
                    words = [sys.executable, __file__, str(seed), way, json.dumps(schedule)]
                    env = os.environ | {"OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"}
                    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
                    results[name] = json.loads(done.stdout.splitlines()[-1]) | {"schedule": schedule}
                    write_files(HERE, {RESULTS.name: json.dumps(results, indent=0).encode()})
                    print(
                        name, {k: results[name][k] for k in ("reached", "seconds", "operations")}, flush=True
                    )


if __name__ == "__main__":
    main()
