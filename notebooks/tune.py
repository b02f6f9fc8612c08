"""The trials that the default settings come from, on seed 0, which no result is reported for.

    python notebooks/tune.py           # half an hour on two cores; stop it and start it again as you like

Each line of `tuning.jsonl` is a trial; those that it has are not run again. Lines of an earlier round are of
another pretraining (600 steps, sorted batches, Muon in bfloat16), those without "round" of another world. The
third is of today's: the same four settings for both roads. RLHF's are those of its reward model, and PPO
goes on from that with its defaults. Policies are measured as in the experiments, by listing their answers.

Predicted before the third round: the default setting is within a point of the best on each side,
the best of RLHF's stays under 93% of the optimal gain, and every one of DPO's is above that.
"""

import json
import math

from measure import HERE, Reference, dpo, home_of, pretrained, reward, rounded, train

from data import read_preferences

# (rate over the default one, passes over the pairs, pairs a step)
SETTINGS = [(1, 1, 32), (1 / 3, 1, 32), (1 / 2, 1, 32), (2, 1, 32)]


def options(script, rate, passes, batch_size):
    """A setting as options of a script. One pass is nine pairs in ten, as the rest are held out."""
    pairs = len(read_preferences(home_of(0, "pretrain") / "preferences.jsonl"))
    steps = passes * math.ceil((pairs - min(1024, pairs // 10)) / batch_size)
    lr = float(f"{rate * script.parser.get_default('lr'):.2g}")
    return ["--lr", lr, "--batch-size", batch_size, "--steps", steps]


def trial(way, how):
    """Train with these options, and measure the policy that comes out."""
    name = f"tune {way} " + " ".join(map(str, how))
    if way == "rlhf":
        figures = train("reward", 0, f"{name} reward", *how)
        found = train("ppo", 0, name, "--reward", home_of(0, f"{name} reward"))
        figures |= {f"ppo_{key}": x for key, x in found.items()}
    else:
        figures = train("dpo", 0, name, *how)
    return rounded(figures | Reference(0).measure(home_of(0, name)))


TRIALS = [(way, *setting) for way in ("rlhf", "dpo") for setting in SETTINGS]


def key(way, rate, passes, batch_size):
    """What a line of `tuning.jsonl` says of its trial. The number of steps depends on that of the pairs."""
    return {"round": 3, "method": way, "rate": round(rate, 2), "passes": passes, "batch_size": batch_size}


def main():
    pretrained(0)
    path = HERE / "tuning.jsonl"
    tried = [json.loads(line) for line in path.read_text().splitlines()]
    for way, *setting in TRIALS:
        if not any(key(way, *setting).items() <= line.items() for line in tried):
            how = options(reward if way == "rlhf" else dpo, *setting)
            line = key(way, *setting) | {"setting": " ".join(map(str, how))} | trial(way, how)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
