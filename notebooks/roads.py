"""Where the two roads part: what stands in notebook 05, on five seeds, or on three where it takes long.

    python notebooks/roads.py       # an hour and three quarters on two cores; it can be stopped and started

It goes on from the models of `race.py` in `runs/race`, and makes those that are missing. Each result is kept
in `roads.json` as it comes. Policies are measured as in the race, by listing their answers, except by `far`.
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
    log_ratios_of,
    run_all,
    scores_of,
    steps,
    train,
)

import plots
from data import Tokenizer, ask_volunteers, documents, encode_pairs, judge, kind_of, read_preferences
from data import write_records
from model import ScalarGPT, load_model, own_pairs, sample_texts
from sample import measure

THREE = SEEDS[:3]


# ----------------------------------------------------------------------------------------------------
# 1. Over-optimisation

OVER_PASSES = {250: (1, 3, 9, 48), 1500: (1, 3, 9)}  # over so many pairs; the last ones take as many steps
OVER_BETAS, LEASHES = (0.02, 0.05, 0.1, 0.2, 0.5), (0, 0.05, 0.1, 0.2, 0.4)


def rewards_to_over_optimise():
    for s in THREE:
        for n in OVER_PASSES:
            name, how = f"over reward pairs={n}", ["--data", (few_pairs, s, n), "--steps", steps(n, 3)]
            yield f"{s} {name}", (job_reward, s, name, True, *how)


def far(seed, name, script, *options):
    """Train a policy, and measure it by 16 sampled answers to each post.

    Far from the pretrained model answers become so many that a list of the likely ones misses up to half.
    """
    figures, here = train(script, seed, name, *options), Reference(seed)
    torch.manual_seed(seed)
    policy = load_model(home_of(seed, name))
    _, scores, log_ratios, _ = measure(policy, here.model, here.tokenizer, here.posts, 16)
    return figures | {"score": scores.mean(), "kl": log_ratios.mean()}


def over_optimisation():
    for s in THREE:
        for n in OVER_PASSES:
            for beta in LEASHES:
                name, judge_of = f"over ppo pairs={n} beta={beta:g}", home_of(s, f"over reward pairs={n}")
                yield f"{s} {name}", (far, s, name, "ppo", "--reward", judge_of, "--beta", beta)
            for k in OVER_PASSES[n]:
                for beta in OVER_BETAS:
                    name = f"over dpo pairs={n} passes={k} beta={beta:g}"
                    how = ["--data", (few_pairs, s, n), "--steps", steps(n, k), "--beta", beta]
                    yield f"{s} {name}", (far, s, name, "dpo", *how)


# ----------------------------------------------------------------------------------------------------
# 2. Support: pairs between two kinds of answers only

TWO_KINDS = {"full", "repeats"}


def two_kinds(seed):
    """The pairs of a seed that are between the two kinds: the file."""
    records = read_preferences(home_of(seed, "pretrain") / "preferences.jsonl")
    kinds = lambda r: {kind_of(r["prompt"], r[side]) for side in ("chosen", "rejected")}
    write_records(home_of(seed, "two-kinds.jsonl"), [r for r in records if kinds(r) == TWO_KINDS])
    return home_of(seed, "two-kinds.jsonl")


def reward_of_two_kinds(seed):
    name = "support reward"
    figures = job_reward(seed, name, False, "--data", two_kinds(seed), "--steps", 120)
    return figures | {"prefers": explicit_preferences(seed, name)}


def dpo_of_two_kinds(seed):
    name = "support dpo"
    figures = job_policy(seed, name, "dpo", "--data", two_kinds(seed), "--steps", 120)
    return figures | {"prefers": implicit_preferences(seed, name)}


def support():
    for s in SEEDS:
        yield f"{s} support dpo", (dpo_of_two_kinds, s)
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
    assert len(records) >= n, "too many of the answers are the same"
    path = home_of(seed, f"sampled {number} {n} {home.name}.jsonl")
    write_records(path, records[:n])
    return path


def rounds(seed, n_rounds, fresh=True):
    """DPO in rounds, each on pairs of the policy as it is then; as many labels in all.

    Each round's reference is the policy before it, so its β is n times as large: then the ideal policy at the
    end is the same. Without `fresh` all pairs are the pretrained model's, and all else is as it was.
    """
    init = pretrained = home_of(seed, "pretrain")
    for number in range(n_rounds):
        data = sampled_pairs(seed, init if fresh else pretrained, number, LABELS // n_rounds)
        name = f"{'round' if fresh else 'stale round'} {number} of {n_rounds}"
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
        yield f"{s} stale rounds 8", (rounds, s, 8, False)
        yield f"{s} foreign dpo", (job_policy, s, "foreign dpo", "dpo", "--data", (foreign_pairs, s))
        yield f"{s} foreign dpo after sft", (after_fine_tuning, s)


# ----------------------------------------------------------------------------------------------------
# 4. Labels are dear, prompts are free

DEAR = (250, 500, 1000)


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
            name, how = f"dear reward {n}", ["--data", (few_pairs, s, n), "--steps", steps(n, 3)]
            yield f"{s} {name}", (job_reward, s, name, False, *how)


def dear_labels():
    for s in THREE:
        for n in DEAR:
            judged = ["--reward", home_of(s, f"dear reward {n}")]
            for name, script, how in (
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


def preferences(seed, values_of):
    """How often the better answer has the higher value, on 400 posts and 400 letters: {kind: {test: share}}.

    `values_of` gives the values of chosen and rejected answers (N, 2) of encoded pairs.
    """
    tokenizer, found = Tokenizer.load(home_of(seed, "pretrain")), {}
    for kind in ("POST", "LETTER"):
        posts = [d.prompt for d in documents(400, seed=[seed, 13], kind=kind)]
        both = [plots.spoiled(post, random.Random(i)) for i, post in enumerate(posts)]
        tests = {fault: [(full, faulty[fault]) for full, faulty in both] for fault in both[0][1]}
        for fault in ("no place", "a dish for the thing", "another thing"):
            tests[f"another order, against {fault}"] = [(reordered(full), f[fault]) for full, f in both]
        found[kind] = {}
        for test, answers in tests.items():
            records = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(posts, answers)]
            chosen, rejected = values_of(encode_pairs(tokenizer, records, 128)[0]).T
            found[kind][test] = (chosen > rejected).double().mean().item()
    return found


def explicit_preferences(seed, name):
    scorer = load_model(home_of(seed, name), ScalarGPT)
    return preferences(seed, lambda pairs: scores_of(scorer, pairs))


def implicit_preferences(seed, name):
    return preferences(seed, lambda pairs: log_ratios_of(seed, name, pairs))


def judges(seed):
    """What reward model and implicit reward prefer."""
    home = home_of(seed, "pretrain")
    train("pretrain", seed, "pretrain")
    args = dpo.parser.parse_args(["--init", str(home), "--seed", str(seed)])
    own_pairs(args, load_model(home), Tokenizer.load(home))
    train("dpo", seed, "dpo beta=0.5", "--beta", 0.5)
    train("reward", seed, "reward")
    return {
        "explicit": explicit_preferences(seed, "reward"),
        "implicit": implicit_preferences(seed, "dpo beta=0.5"),
    }


# ----------------------------------------------------------------------------------------------------
# 6. Why chosen answers lose probability

LOSSES = ("dpo", "ipo", "cdpo", "hinge", "dpo+nll")
BINS = {  # their edges
    "likeness": (0, 0.4, 0.6, 0.8, 1.01),  # of the two answers: 1 if they are the same
    "score": (-9, 0.5, 2.5, 3.5, 4.5),  # the judge's, of the chosen answer
}


def plus_nll(chosen, rejected, beta, kind="dpo", original=dpo.dpo_loss):
    """DPO's loss and a tenth of the negative log-likelihood of the chosen answer, up to a constant."""
    return original(chosen, rejected, beta) - 0.1 * chosen


def by_loss(seed, loss):
    """Train by this loss and measure, also how log π − log π_ref of held-out answers came out in each bin."""
    name, home = f"loss {loss}", home_of(seed, "pretrain")
    with patch.object(dpo, "dpo_loss", plus_nll if loss == "dpo+nll" else dpo.dpo_loss):
        figures = job_policy(seed, name, "dpo", "--loss", "dpo" if loss == "dpo+nll" else loss)
    tokenizer, records = Tokenizer.load(home), read_preferences(home / "preferences.jsonl")[-1024:]
    pairs, records = encode_pairs(tokenizer, records, 128)
    change = log_ratios_of(seed, name, pairs)
    alike = [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for _, a, b in pairs]
    values = {"likeness": alike, "score": [judge(r["prompt"], r["chosen"]) for r in records]}
    figures["change"] = {"all": change.mean(0).tolist()}
    for by, edges in BINS.items():
        which = np.digitize(values[by], edges)
        rows = [change[torch.tensor(which == i)] for i in range(1, len(edges))]
        figures["change"] |= {by: [x.mean(0).tolist() for x in rows], f"pairs by {by}": [*map(len, rows)]}
    return figures


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
    rewards = {f"{s} support reward": (reward_of_two_kinds, s) for s in SEEDS}
    yield rewards | dict([*rewards_of_few_labels(), *rewards_to_over_optimise()])
    yield dict([*without_a_critic(), *support(), *origins()])
    yield dict([*dear_labels(), *chosen_answers(), *over_optimisation()])


if __name__ == "__main__":
    run_all(stages, HERE / "roads.json")
