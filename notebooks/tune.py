"""The trials that the default settings come from, on seed 0, which no result is reported for.

    python notebooks/tune.py           # half an hour on two cores; stop it and start it again as you like

Each line of `tuning.jsonl` is a trial. Those without "round" are older: they were made with 9,600 pairs, on a
world of other digits, and measured by sampling. Their grid ended at its corner for the reward model, so the
second round tries lower rates, more passes and other batches, the same twelve settings for both roads. RLHF's
settings are those of its reward model, and PPO goes on from that with its defaults. Policies are measured as
in the race, by listing their answers.
"""

import json
import math

from race import HERE, Reference, dpo, home_of, job_pretrain, reward, run_all, train

from data import read_preferences

SETTINGS = [  # (rate over the default one, passes over the pairs, pairs a step)
    (1, 1, 32), (1 / 3, 1, 32), (1 / 2, 1, 32), (2, 1, 32), (1, 2, 32), (1 / 2, 2, 32), (1 / 3, 3, 32),
    (1 / 2, 3, 32), (1, 1, 64), (1.4, 1, 64), (1, 1, 16), (1 / 2, 1, 16),
]  # fmt: skip
SFT_RATES = (1 / 4, 1 / 2, 1, 2, 4, 8)  # of fine-tuning on the chosen answers


def options(script, rate, passes, batch_size):
    """A setting as options of a script. One pass is nine pairs in ten, as the rest are held out."""
    pairs = len(read_preferences(home_of(0, "pretrain") / "preferences.jsonl"))
    steps = passes * math.ceil((pairs - min(1024, pairs // 10)) / batch_size)
    lr = float(f"{rate * script.parser.get_default('lr'):.2g}")
    return ["--lr", lr, "--batch-size", batch_size, "--steps", steps]


def trial(way, *setting):
    if way == "rlhf":
        how = options(reward, *setting)
        name = "tune reward " + " ".join(map(str, how))
        figures = train("reward", 0, name, *how)
        figures |= {
            f"ppo_{key}": x for key, x in train("ppo", 0, f"{name} ppo", "--reward", home_of(0, name)).items()
        }
        policy = home_of(0, f"{name} ppo")
    else:
        how = options(dpo, *setting) + ["--loss", way] * (way == "sft")
        policy = home_of(0, f"tune {way} " + " ".join(map(str, how)))
        figures = train("dpo", 0, policy.name, *how)
    return {"setting": " ".join(map(str, how))} | figures | Reference(0).measure(policy)


def stages(results):
    yield {"pretrain": (job_pretrain, 0)}
    trials = {("rlhf", *setting): 0 for setting in SETTINGS} | {("dpo", *setting): 0 for setting in SETTINGS}
    trials |= {("sft", rate, 1, 32): 0 for rate in SFT_RATES}
    yield {json.dumps(setting): (trial, *setting) for setting in trials}


if __name__ == "__main__":
    results = run_all(stages, home_of(0, "tuning.json"))
    older = [line for line in (HERE / "tuning.jsonl").read_text().splitlines() if '"round"' not in line]
    del results["pretrain"]
    trials = [{"round": 2, "method": json.loads(name)[0]} | found for name, found in results.items()]
    (HERE / "tuning.jsonl").write_text("".join(f"{line}\n" for line in [*older, *map(json.dumps, trials)]))
