"""Where the two roads part: what stands in notebook 05, on five seeds, or on three where it takes long.

    python notebooks/roads.py          # about an hour and a half on two cores; it can be stopped and started

It goes on from the models of `race.py` in `runs/race`, and makes those that are missing. Each result is kept
in `roads.json` as it comes. Policies are measured as in the race, by listing their answers.
"""

import difflib
import random
from unittest.mock import patch

import numpy as np
import torch
from race import (
    HERE,
    SEEDS,
    Reference,
    dpo,
    few_pairs,
    home_of,
    job_policy,
    job_reward,
    run_all,
    steps,
    train,
)

import plots
import reward
from data import Tokenizer, ask_volunteers, documents, encode_pairs, read_preferences, write_records
from model import ScalarGPT, load_model, own_pairs, sample_texts

THREE = SEEDS[:3]


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


# ----------------------------------------------------------------------------------------------------
# 1. Over-optimisation

OVER_PAIRS, OVER_BETAS, LEASHES = (250, 1500), (0.02, 0.05, 0.1, 0.2, 0.5), (0, 0.05, 0.1, 0.2, 0.4)


def rewards_to_over_optimise():
    for s in THREE:
        for n in OVER_PAIRS:
            name, how = f"over reward pairs={n}", ["--data", (few_pairs, s, n), "--steps", steps(n, 3)]
            yield f"{s} {name}", (job_reward, s, name, True, *how)


def over_optimisation():
    for s in THREE:
        for n in OVER_PAIRS:
            for beta in LEASHES:
                name, judge_of = f"over ppo pairs={n} beta={beta:g}", home_of(s, f"over reward pairs={n}")
                yield f"{s} {name}", (job_policy, s, name, "ppo", "--reward", judge_of, "--beta", beta)
            for k in (1, 3, 9):
                for beta in OVER_BETAS:
                    name = f"over dpo pairs={n} passes={k} beta={beta:g}"
                    how = ["--data", (few_pairs, s, n), "--steps", steps(n, k), "--beta", beta]
                    yield f"{s} {name}", (job_policy, s, name, "dpo", *how)


# ----------------------------------------------------------------------------------------------------
# 2. Support: pairs between two kinds of answers only

TWO_KINDS = {"full", "repeats the first sentence"}


def two_kinds(seed):
    """The pairs of a seed that are between the two kinds: the file."""
    records = read_preferences(home_of(seed, "pretrain") / "preferences.jsonl")
    kinds = lambda r: {plots.kind_of(r["prompt"], r[side]) for side in ("chosen", "rejected")}
    write_records(home_of(seed, "two-kinds.jsonl"), [r for r in records if kinds(r) == TWO_KINDS])
    return home_of(seed, "two-kinds.jsonl")


def rewards_of_two_kinds():
    for s in SEEDS:
        how = ["--data", (two_kinds, s), "--steps", 120]
        yield f"{s} support reward", (job_reward, s, "support reward", False, *how)


def support():
    for s in SEEDS:
        how = ["--data", (two_kinds, s), "--steps", 120]
        yield f"{s} support dpo", (job_policy, s, "support dpo", "dpo", *how)
        how = ["--reward", home_of(s, "support reward")]
        yield f"{s} support ppo", (job_policy, s, "support ppo", "ppo", *how)


# ----------------------------------------------------------------------------------------------------
# 3. Where the pairs come from: 4,000 labels each time

LABELS = 4000


def sampled_pairs(seed, home, number, n):
    """n pairs of a model's own answers, to posts that no other round has: the file."""
    model, tokenizer = load_model(home), Tokenizer.load(home)
    posts = [d.prompt for d in documents(4 * n, seed=[seed, 11, number], kind="POST")]
    generator, records = torch.Generator().manual_seed(seed), []
    for i in range(0, len(posts), n):  # until there are enough whose answers differ
        if len(records) < n:
            some = posts[i : i + n]
            answers = sample_texts(model, tokenizer, [p for p in some for _ in range(2)], generator=generator)
            records += ask_volunteers(some, answers, seed=[seed, number, i])
    path = home_of(seed, f"sampled {number} {n}.jsonl")
    write_records(path, records[:n])
    return path


def rounds(seed, n_rounds):
    """DPO in rounds, each on pairs of the policy as it is then; as many labels in all.

    Each round's reference is the policy before it, so its β is n times as large: then the ideal policy at the
    end is the same.
    """
    init = home_of(seed, "pretrain")
    for number in range(n_rounds):
        data, name = sampled_pairs(seed, init, number, LABELS // n_rounds), f"round {number} of {n_rounds}"
        train("dpo", seed, name, "--init", init, "--data", data, "--beta", 0.5 * n_rounds)
        init = home_of(seed, name)
    return Reference(seed).measure(init)


def foreign_pairs(seed):
    """Pairs that are not the model's own: of the full summary and seven faulty ones, two by chance."""
    posts, rng = [d.prompt for d in documents(LABELS, seed=[seed, 12], kind="POST")], random.Random(seed)
    answers = []
    for post in posts:
        full, faulty = plots.spoiled(post, rng)
        answers += rng.sample([full, *faulty.values()], 2)
    write_records(home_of(seed, "foreign.jsonl"), ask_volunteers(posts, answers, seed=[seed, 12]))
    return home_of(seed, "foreign.jsonl")


def after_fine_tuning(seed):
    """On the same foreign pairs: first fine-tuning on the chosen answers, then DPO."""
    train("dpo", seed, "foreign sft", "--data", foreign_pairs(seed), "--loss", "sft")
    how = ["--init", home_of(seed, "foreign sft"), "--data", foreign_pairs(seed)]
    return job_policy(seed, "foreign dpo after sft", "dpo", *how)


def origins():
    for s in SEEDS:
        for n in (1, 2, 4, 8):
            yield f"{s} rounds {n}", (rounds, s, n)
        yield f"{s} foreign dpo", (job_policy, s, "foreign dpo", "dpo", "--data", (foreign_pairs, s))
        yield f"{s} foreign dpo after sft", (after_fine_tuning, s)


# ----------------------------------------------------------------------------------------------------
# 4. Labels are dear, prompts are free

DEAR = (250, 500, 1000)


def few_labels(seed, n):
    return ["--data", (few_pairs, seed, n), "--steps", steps(n, 3)]


def labelled_by_model(seed, n):
    """All pairs of a seed, with the choices that the reward model of n labels would make: the file."""
    scorer, home = load_model(home_of(seed, f"dear reward {n}"), ScalarGPT), home_of(seed, "pretrain")
    records, rng = read_preferences(home / "preferences.jsonl"), np.random.default_rng(seed)
    pairs, records = encode_pairs(Tokenizer.load(home), records, scorer.config.n_positions)
    margins = scores_of(scorer, pairs) @ torch.tensor([1.0, -1.0])
    for record, p in zip(records, margins.sigmoid().tolist()):
        del record["certainty"]
        if rng.random() > p:
            record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    path = home_of(seed, f"labelled by model {n}.jsonl")
    write_records(path, records)
    return path


def rewards_of_few_labels():
    for s in THREE:
        for n in DEAR:
            yield f"{s} dear reward {n}", (job_reward, s, f"dear reward {n}", False, *few_labels(s, n))


def dear_labels():
    for s in THREE:
        for n in DEAR:
            judged = ["--reward", home_of(s, f"dear reward {n}")]
            for name, script, how in (
                (f"dear dpo {n}", "dpo", few_labels(s, n)),
                (f"dear dpo {n} labelled by the reward model", "dpo", ["--data", (labelled_by_model, s, n)]),
                (f"dear ppo {n} all prompts", "ppo", judged),
                (f"dear ppo {n} labelled prompts", "ppo", [*judged, "--data", (few_pairs, s, n)]),
            ):
                yield f"{s} {name}", (job_policy, s, name, script, *how)


# ----------------------------------------------------------------------------------------------------
# 5. What the implicit reward knows


def reordered(full):
    """ "Hugo lost my kite nearby." as "My kite Hugo lost nearby.": the judge gives 4 to both."""
    name, verb, _, thing, place = full.strip(" .").split()
    return f" My {thing} {name} {verb} {place}."


def judges(seed):
    """How often reward model and implicit reward prefer the better answer, on 400 posts and 400 letters."""
    home = home_of(seed, "pretrain")
    train("pretrain", seed, "pretrain")
    args = dpo.parser.parse_args(["--init", str(home), "--seed", str(seed)])
    own_pairs(args, load_model(home), Tokenizer.load(home))
    train("dpo", seed, "dpo beta=0.5", "--beta", 0.5)
    train("reward", seed, "reward")
    scorer, figures = load_model(home_of(seed, "reward"), ScalarGPT), {"explicit": {}, "implicit": {}}
    for kind in ("POST", "LETTER"):
        posts = [d.prompt for d in documents(400, seed=[seed, 13], kind=kind)]
        both = [plots.spoiled(post, random.Random(i)) for i, post in enumerate(posts)]
        tests = {fault: [(full, faulty[fault]) for full, faulty in both] for fault in both[0][1]}
        for fault in ("no place", "a dish for the thing", "another thing"):
            tests[f"another order, against {fault}"] = [(reordered(full), f[fault]) for full, f in both]
        for test, answers in tests.items():
            records = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(posts, answers)]
            pairs, _ = encode_pairs(Tokenizer.load(home), records, scorer.config.n_positions)
            values = {
                "explicit": scores_of(scorer, pairs),
                "implicit": log_ratios_of(seed, "dpo beta=0.5", pairs),
            }
            for which, x in values.items():
                figures[which].setdefault(kind, {})[test] = (x[:, 0] > x[:, 1]).double().mean().item()
    return figures


# ----------------------------------------------------------------------------------------------------
# 6. Why chosen answers lose probability

LOSSES = ("dpo", "ipo", "cdpo", "hinge", "dpo+nll")
ALIKE = (0, 0.2, 0.4, 0.6, 0.8, 1.01)  # the edges of bins: how alike two answers are


def plus_nll(chosen, rejected, beta, kind="dpo", original=dpo.dpo_loss):
    """DPO's loss and a tenth of the negative log-likelihood of the chosen answer, up to a constant."""
    return original(chosen, rejected, beta) - 0.1 * chosen


def by_loss(seed, loss):
    """Train by this loss and measure, also log π − log π_ref of held-out answers by how alike two are."""
    name, home = f"loss {loss}", home_of(seed, "pretrain")
    with patch.object(dpo, "dpo_loss", plus_nll if loss == "dpo+nll" else dpo.dpo_loss):
        figures = job_policy(seed, name, "dpo", "--loss", "dpo" if loss == "dpo+nll" else loss)
    records, policy = read_preferences(home / "preferences.jsonl")[-1024:], load_model(home_of(seed, name))
    pairs, _ = encode_pairs(Tokenizer.load(home), records, policy.config.n_positions)
    change = log_ratios_of(seed, name, pairs)
    alike = [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for _, a, b in pairs]
    which = torch.tensor(np.digitize(alike, ALIKE) - 1)
    rows = [change[which == i] for i in range(len(ALIKE) - 1)]
    figures["change"] = {"all": change.mean(0).tolist(), "pairs": [len(row) for row in rows]}
    return figures | {"change by likeness": [row.mean(0).tolist() for row in rows]}


def chosen_answers():
    for s in THREE:
        for loss in LOSSES:
            yield f"{s} loss {loss}", (by_loss, s, loss)


# ----------------------------------------------------------------------------------------------------
# 7. What came after PPO


def without_a_critic():
    for s in SEEDS:
        for kind in ("gae", "rloo", "grpo"):
            how = ["--reward", home_of(s, "reward"), "--advantage", kind]
            yield f"{s} advantage {kind}", (job_policy, s, f"advantage {kind}", "ppo", *how)


def stages(results):
    """First what others go on from: `judges` makes pretrained models, their pairs, and reward models."""
    yield {f"{s} judges": (judges, s) for s in SEEDS}
    yield dict([*rewards_of_two_kinds(), *rewards_of_few_labels(), *rewards_to_over_optimise()])
    yield dict([*without_a_critic(), *support(), *origins()])
    yield dict([*dear_labels(), *chosen_answers(), *over_optimisation()])


if __name__ == "__main__":
    run_all(stages, HERE / "roads.json")
