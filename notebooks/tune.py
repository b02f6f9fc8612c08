"""The trials that the default settings come from, on seed 0, which no result is reported for.

    python notebooks/tune.py dpo "--lr 1e-3" "--lr 2e-3 --batch-size 32" …
    python notebooks/tune.py reward "--lr 5e-3" …
    python notebooks/tune.py ppo "--lr 1e-3 --epochs 1" …

Each trial runs a script with these options on the pretrained model in `runs/tuning/pretrain`, measures what
came out, and adds a line to `notebooks/tuning.jsonl`: the method, the setting, the figures. Both roads had
twelve trials; those of the reward model count for RLHF. They were made with 9,600 pairs asked for.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import Tokenizer, documents  # noqa: E402
from model import load_model  # noqa: E402
from sample import frontier, measure  # noqa: E402

RUNS = HERE.parent / "runs" / "tuning"
POSTS = [d.prompt for d in documents(64, seed=[0, 6], kind="POST")]  # others than `sample.py --compare` has


def judged(directory, k):
    """The judge's score, the KL from the reference, and the share of the optimal gain at that KL."""
    torch.manual_seed(0)
    tokenizer, reference = Tokenizer.load(RUNS / "pretrain"), load_model(RUNS / "pretrain")
    base = RUNS / "reference.npy"
    if not base.exists():
        np.save(base, measure(reference, reference, tokenizer, POSTS, 256)[1])
    start = np.load(base)
    kls, best = np.mean(frontier(start), axis=2)
    _, scores, log_ratios, _ = measure(load_model(directory), reference, tokenizer, POSTS, k)
    score, kl = scores.mean(), log_ratios.mean()
    return {
        "score": score,
        "kl": kl,
        "share": (score - start.mean()) / (np.interp(kl, kls, best) - start.mean()),
    }


def trial(method, setting):
    out = RUNS / f"{method} {setting}".replace(" ", "_").replace("/", "-")
    command = [sys.executable, f"{method}.py", "--seed", "0", "--init", RUNS / "pretrain", "--out", out]
    command += ["--reward", RUNS / "reward"] * (method == "ppo") + setting.split()
    subprocess.run([str(part) for part in command], cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    if method == "reward":
        figures["accuracy / best possible"] = figures["val_accuracy"] / figures["best_accuracy"]
    else:
        figures |= judged(out, 64)
    figures = {
        name: round(float(value), 4)
        for name, value in figures.items()
        if value is not None and name != "final"
    }
    with open(HERE / "tuning.jsonl", "a") as file:
        print(json.dumps({"method": method, "setting": setting, **figures}), file=file)
    print(method, setting, figures, flush=True)


if __name__ == "__main__":
    for setting in sys.argv[2:]:
        trial(sys.argv[1], setting)
