"""What notebooks 04 and 05 and the README's figures come from: experiments on seeds that chose nothing.

    python notebooks/experiments.py [SEED …]     # twelve hours on one core; stop and start as you like

What was predicted stands in each experiment's docstring, and was committed before its first run. Results are
kept in `experiments.json` as they come, under a name such as "21 dpo beta=0.5": the seed, and what was run.
The models are in `runs/race`, and those that are missing are made again. All are trained by the scripts with
their defaults, except for what the name says; settings were tuned on seed 0 (`tune.py`). "Share" is of the
gain that is optimal at the same KL, by listing answers (`measure.py`).
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from unittest.mock import patch

import measure
import numpy as np
import torch
import torch.nn.functional as F
from measure import HERE, RUNS, Reference, ask, best_of_n, dpo, home_of, list_answers
from measure import ppo, pretrained, rounded, train

import data
import plots
from data import DISHES, FACTS, GREETERS, KINDS, WORDS, Tokenizer, ask_volunteers, documents, encode_pairs
from data import facts, judge, kind_of, read_preferences, stated, write_document, write_files, write_records
from model import GPT, ScalarGPT, answer_states, final_scores, load_model, sample_texts, token_log_probs

RESULTS = HERE / "experiments.json"
SEEDS = (21, 22, 23, 24, 25)
MORE = tuple(range(31, 41))  # for the main rows alone
BETAS = {"dpo": (0.5, 1, 2), "ppo": (0.4, 0.8, 1.6), "judge": (0.6, 1.4), "mended": (0.4, 1.2)}
DOSES = (0, 1000, 3000, 12000, 24000, 48000)  # pairs that differ in one hidden word, beside a seed's own
AGAIN = {"dpo": (0.5, 1.2), "ppo": (0.4, 0.8), "mended": (0.4, 0.8)}
SIZES = {"4x128": (4, 128), "4x256": (4, 256)}  # layers and width, where the default is 2 and 128
LABELS = (250, 1000, 4000)  # pairs, each seen three times; 40,000 are seen once, as all of a seed's own are
KLS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6)  # nats
BEST_OF = (2, 4, 8, 16, 64, 256, 1024)
LAW = (0, 0.125, 0.25, 0.5, 1, 1.5, 2, 3)  # points that are taken for each hidden word; the judge takes 2


# ----------------------------------------------------------------------------------------------------
# What many experiments share


def own_records(seed):
    return read_preferences(home_of(seed, "pretrain") / "preferences.jsonl")


def policy(seed, name, script, *options, judge=judge):
    """Train a policy with these options, and measure it on posts."""
    return train(script, seed, name, *options) | Reference(seed, judge=judge).measure(home_of(seed, name))


def rlhf(seed, name, *options, beta=0.4, **how):
    """A reward model with these options, and PPO on it."""
    train("reward", seed, f"{name} reward", *options)
    how_ppo = ["--reward", home_of(seed, f"{name} reward"), "--beta", beta]
    return policy(seed, f"{name} ppo beta={beta:g}", "ppo", *options, *how_ppo, **how)


def hidden(*keys):
    """A function that counts an answer's wrong words that only the post refutes, of these sorts."""
    every = {word for words in WORDS.values() for key in keys for word in words[key]} - {*DISHES, *GREETERS}
    return lambda prompt, response: len((stated(response) & every) - {*facts(prompt)})


hidden_words = hidden(*FACTS)  # another name, verb, thing or place


@torch.no_grad()
def margins(tokenizer, values_of, records):
    """The value of the chosen answers minus that of the rejected ones, (pairs,).

    `values_of(tokens, mask, start, copies)` are the values of answers, (B,).
    """
    pairs, found = encode_pairs(tokenizer, records, 128)[0], []
    for i in range(0, len(pairs), 100):
        chosen, rejected = values_of(*data.pad_pairs(pairs[i : i + 100]), 2).view(2, -1)
        found.append(chosen - rejected)
    return torch.cat(found)


def faults(seed, values_of, kinds=KINDS[:1], say=str):
    """Of a full summary against one with a fault: how often its value is higher, the margin, the judge's.

    On 400 texts of each kind; `say` puts the answers into other words.
    """
    tokenizer, found = Tokenizer.load(home_of(seed, "pretrain")), {}
    for kind in kinds:
        posts = [in_first(d.prompt) for d in documents(400, seed=[seed, 13], kind=kind)]
        both = [plots.spoiled(post, random.Random(i)) for i, post in enumerate(posts)]
        found[kind] = {}
        for fault in both[0][1]:
            answers = [(say(a), say(b[fault])) for a, b in both]
            records = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(posts, answers)]
            margin = margins(tokenizer, values_of, records)
            true = np.mean([judge(p, a) - judge(p, b[fault]) for p, (a, b) in zip(posts, both)])
            right = (margin > 0).double().mean().item()
            found[kind][fault] = {"right": right, "margin": margin.mean().item(), "true": true}
    return found


def explicit(directory):
    """A reward model's score of answers."""
    model = load_model(directory, ScalarGPT)
    return lambda *answers: final_scores(model, *answers)


def implicit(model, start, values=token_log_probs):
    """What DPO's policy gives to answers, at the default β: β log(π / π_ref), or the same of other values."""
    return lambda *answers: 0.5 * (values(model, *answers) - values(start, *answers)).sum(1)


def rewards(seed, names=("reward", "dpo beta=0.5")):
    """The reward model's scores and the implicit reward, as functions: {name: values_of}."""
    model, start = (load_model(home_of(seed, name)) for name in (names[1], "pretrain"))
    return {"explicit": explicit(home_of(seed, names[0])), "implicit": implicit(model, start)}


def asks_for(seed, values_of, kinds=KINDS[:1]):
    """What a reward asks for: its faults, and the ideal policy for it at 1 nat."""
    here = Reference(seed)
    ideal = here.figures(here.ideal_at(here.valued(values_of), 1))
    return {"faults": faults(seed, values_of, kinds), "ideal": ideal}


# ----------------------------------------------------------------------------------------------------
# The race


def base(seed, kinds=KINDS, temperatures=(0, 1)):
    """The pretrained model at several temperatures, and the frontier."""
    figures = pretrained(seed) | {"pairs": len(own_records(seed))}
    for kind in kinds:
        here, home = Reference(seed, kind), home_of(seed, "pretrain")
        figures[kind] = {f"temperature {t:g}": here.measure(home, t) for t in temperatures}
        figures[kind]["frontier"] = here.frontier
    return figures


def learned(seed, way, beta):
    """A policy of one of the ways, at a β."""
    of = home_of(seed, "reward") if way in ("ppo", "mended") else way
    how = ["dpo"] if way == "dpo" else ["ppo", "--reward", of]
    with mended(2) if way == "mended" else contextlib.nullcontext():
        return policy(seed, f"{way} beta={beta:g}", *how, "--beta", beta)


def roads(seed):
    """Predicted: at 1 nat DPO has 96% of the optimal gain, RLHF 91%, PPO on the judge 97 to 98%; RLHF has
    three to four times as many hidden wrong words as DPO, and more than the pretrained model.
    """
    yield "pretrain", base, seed
    yield "reward", train, "reward", seed, "reward"
    for way in ("dpo", "ppo", "judge"):
        for beta in BETAS[way]:
            yield f"{way} beta={beta:g}", learned, seed, way, beta


def elsewhere(seed):
    """Predicted: on letters 85 to 90% for DPO and 82 to 86% for RLHF, not settled with five seeds. From
    temperature 0 to 1, at 1 nat, RLHF loses more wins than DPO, by less than two points.
    """

    def measured(name, kind, temperature):
        return Reference(seed, kind).measure(home_of(seed, name), temperature)

    for name in (f"{way} beta={beta:g}" for way in ("dpo", "ppo") for beta in BETAS[way]):
        yield f"{name} {KINDS[0]} temperature 0", measured, name, KINDS[0], 0
        if name in ("dpo beta=0.5", "ppo beta=0.4"):
            yield f"{name} {KINDS[1]} temperature 1", measured, name, KINDS[1], 1


def again(seed):
    """Predicted: on ten seeds more, named before one was run, each verdict is that of the first five. DPO is
    ahead of RLHF at 1 nat by 3.5 to 5 points, the mended RLHF ahead of DPO by 0.5 to 2, RLHF level with the
    ideal policy for its reward, and it has two to three times the pretrained model's hidden wrong words.
    """
    yield "pretrain", base, seed, KINDS[:1], (1,)
    yield "reward", train, "reward", seed, "reward"
    yield from law(seed)
    for way, betas in AGAIN.items():
        for beta in betas:
            yield f"{way} beta={beta:g}", learned, seed, way, beta


# ----------------------------------------------------------------------------------------------------
# What decides: the proof, the dose, the law, the form, the taste


def mended(points):
    """`ppo.load_reward` with so many points less for each hidden word, as an oracle would have it."""
    load = ppo.load_reward

    def loaded(args, tokenizer, reference):
        score, network = load(args, tokenizer, reference)

        def less(tokens, mask, start):
            prompts = [tokenizer.decode(row[:n]) for row, n in zip(tokens, mask.int().argmax(1))]
            answers = [tokenizer.decode(row[new]) for row, new in zip(tokens, mask)]
            wrong = torch.tensor([hidden_words(*texts) for texts in zip(prompts, answers)])
            return score(tokens, mask, start) - points * wrong

        return less, network

    return patch.object(ppo, "load_reward", loaded)


def proof(seed):
    """Predicted: PPO on the learned reward from which two points are taken for each hidden word has 96.5%,
    and no more hidden wrong words than DPO. So the gap is in the reward, and in nothing else.
    """
    for beta in BETAS["mended"]:
        yield f"mended beta={beta:g}", learned, seed, "mended", beta


def law(seed):
    """Predicted: without any training, the ideal policy at 1 nat gains half of what there is to gain once an
    eighth of the true margin (0.25 of 2) is there, and all of it at a half (1); more adds nothing. Names are
    worth twice as much as things, and both together more than their sum.
    """

    def measured():
        here = Reference(seed)
        learned = here.scored(home_of(seed, "reward"))
        found = {"optimum": here.share_at(here.scores)}
        for what, count in (("all", hidden_words), ("things", hidden("thing")), ("names", hidden("name"))):
            n = here.judged(count)
            found[what] = {m: here.share_at([x - m * k for x, k in zip(learned, n)]) for m in LAW}
        blind = [x + 2 * k for x, k in zip(here.scores, here.judged(hidden_words))]
        return found | {"blind judge": here.share_at(blind)}

    yield "law", measured


def minimal_pairs(seed, n):
    """A seed's own pairs, and n that differ in one hidden word, thing and name in turns: the file."""
    posts, rng = [d.prompt for d in documents(n, seed=[seed, 14], kind=KINDS[0])], random.Random(seed)
    answers = []
    for i, post in enumerate(posts):
        full, faulty = plots.spoiled(post, rng)
        answers += [full, faulty[("another thing", "another name")[i % 2]]]
    path = RUNS / str(seed) / f"minimal-{n}.jsonl"
    write_records(path, [*ask_volunteers(posts, answers, [seed, 14]), *own_records(seed)])
    return path


def doses(seed):
    """Predicted: sight comes in jumps. With 3,000 added pairs (1,500 of each sort) things or names are seen
    on half of the seeds, with 12,000 things on all, with 24,000 names still on few. Accuracy says little: the
    ideal policy gains only where the *margin* has grown and no other fault's has shrunk. PPO follows the
    ideal policy to within a point.
    Asked later, of 1,000 and 48,000: with 1,000 neither is seen on any seed (40 to 60%), with 48,000 both are
    on all, with margins of a point or more, and the ideal policy has 95.5 to 97.5%.
    """

    def dose(n):
        home = home_of(seed, f"reward +{n}")
        return train("reward", seed, home.name, "--data", minimal_pairs(seed, n)) | asks_for(
            seed, explicit(home)
        )

    for n in DOSES:
        yield f"dose {n}", dose, n
        if n in (3000, 12000, 24000):
            how = ["--reward", home_of(seed, f"reward +{n}")]
            yield f"ppo +{n}", policy, seed, f"ppo +{n}", "ppo", *how


def on_the_law(seed):
    """Predicted: the share of the ideal policy for a reward model that saw more pairs is that of the old
    reward less its margins for things and for names, to within half a point; where it is lower, the margin of
    another fault has shrunk.
    """

    def measured(n):
        here, learned = Reference(seed), Reference(seed).scored(home_of(seed, "reward"))
        seen = json.loads(RESULTS.read_text())[f"{seed} dose {n}"]["faults"][KINDS[0]]
        for key in ("thing", "name"):
            margin = seen[f"another {key}"]["margin"]
            learned = [x - margin * k for x, k in zip(learned, here.judged(hidden(key)))]
        return {"share": here.share_at(learned)}

    for n in DOSES[1:]:
        yield f"law +{n}", measured, n


class Readout(GPT):
    """A language model with a second matrix of token embeddings, from which its tokens' logits are read."""

    def __init__(self, config, generator=None):
        super().__init__(config, generator)
        self.fresh = torch.nn.Parameter(0.02 * torch.randn(config.vocab_size, config.n_embd))

    def head(self, hidden):
        return hidden @ self.fresh.T


def token_logits(model, tokens, mask, start=1, copies=1):
    """In place of `token_log_probs`: each token's logit, not normalised. So nothing makes it a policy."""
    logits = model.head(answer_states(model, tokens, start, copies)[:, :-1]).float()
    return F.pad(logits.gather(-1, tokens[:, start:, None]).squeeze(-1), (start, 0)) * mask


def read_by_tokens(seed, fresh, normalised):
    """What `dpo.py` learns if an answer's value is read otherwise: (the trained model, the untrained one)."""
    trained, untrained = [], []

    def load(directory, network=GPT):
        model = load_model(directory)
        if fresh:
            torch.manual_seed(seed)
            model, old = Readout(model.config), model
            model.transformer.load_state_dict(old.transformer.state_dict())
        return model

    def kept(model, *_, **__):
        trained.append(model)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(dpo, "load_model", load))
        stack.enter_context(patch.object(dpo, "save_model", kept))
        if not normalised:
            stack.enter_context(patch.object(dpo, "token_log_probs", token_logits))
        name = "form " + " ".join(["fresh"] * fresh + ["normalised"] * normalised)
        (home_of(seed, name) / "metrics.jsonl").unlink(missing_ok=True)  # the model is kept in memory alone
        train("dpo", seed, name)
        untrained.append(load(home_of(seed, "pretrain")))
    return trained[0].requires_grad_(False), untrained[0]


def rewarded(values_of):
    """`ppo.load_reward` that gives answers these values."""

    def loaded(args, tokenizer, reference):
        @torch.no_grad()
        def score(*answers):
            return values_of(*answers) - ppo.PENALTY * ~ppo.has_ended(*answers[:2], tokenizer.eos)

        return score, None

    return patch.object(ppo, "load_reward", loaded)


def form(seed):
    """Predicted: the same pairs, network, loss, steps and rate, and each answer's value read as a sum over
    its tokens: of logits by a fresh matrix, by the pretrained one, or of log-probabilities (DPO), each minus
    what it was at the start. All see things and names on posts (over 90%), where one number at the end sees
    neither. Only those that read with the pretrained matrix see them on letters. Without normalisation the
    ideal policy at 1 nat stays below 94%, since other faults' margins are worse; with it 97%.
    (What is trained: three seeds.)
    Asked later: does PPO follow? On each form, at its own KL, it is within a point of the ideal policy at
    that KL; so on the fresh matrix it stays behind DPO, and on DPO's own reward it is level with DPO.
    """

    def value_of(name):
        if name == "one number":
            return explicit(home_of(seed, "reward"))
        if name == "dpo":
            return rewards(seed)["implicit"]
        values = token_log_probs if "normalised" in name else token_logits
        return implicit(*read_by_tokens(seed, "fresh" in name, "normalised" in name), values)

    def read(name):
        return asks_for(seed, value_of(name), KINDS)

    def pursued(name):
        here, value = Reference(seed), value_of(name)
        with rewarded(value):
            found = policy(seed, f"form {name} ppo", "ppo", "--reward", f"form {name}")
        values = here.valued(value)
        weights = here.ideal_at(values, found["kl"])
        ideal = {"ideal": here.share_at(values, found["kl"]), "ideal reward": here.mean(weights, values)}
        return found | ideal

    names = ("one number", "dpo", "fresh", "pretrained", "fresh normalised")
    for name in names if seed in SEEDS[:3] else names[:2]:
        yield f"form {name}", read, name
    for name in names if seed in SEEDS[:3] else ():
        yield f"form {name} ppo", pursued, name


def another_taste(prompt, response):
    """A taste that compares nothing with the post.

    +1 for each of who, did, what and where that the response states, whichever; −1 for each dish or greeter;
    −0.2 for each word over five.
    """
    words = stated(response)
    points = sum(any(words & {*of[key]} for of in WORDS.values()) for key in FACTS)
    points -= len(words & {*DISHES, *GREETERS})
    return points - 0.2 * max(0, len(response.split()) - 5)


def relabelled(seed, name, taste, say=str):
    """The pairs of a seed, put into other words, and chosen anew by volunteers of this taste: the file."""
    path, records = home_of(seed, f"{name}.jsonl"), []
    with patch.object(data, "judge", taste):
        for i, record in enumerate(own_records(seed)):
            prompt, *answers = (say(record[key]) for key in ("prompt", "chosen", "rejected"))
            records += ask_volunteers([prompt], answers, [seed, name, i])
    write_records(path, records)
    return path


def taste(seed):
    """Predicted: where nothing is to be compared with the post there is nothing that a reward model can't
    see, and RLHF and DPO differ by less than a point at 1 nat, either way.
    """

    def tasted(script, beta):
        how = ["--data", relabelled(seed, "taste", another_taste)]
        if script == "dpo":
            how += ["--beta", beta]
            return policy(seed, f"taste dpo beta={beta:g}", "dpo", *how, judge=another_taste)
        return rlhf(seed, "taste", *how, beta=beta, judge=another_taste)

    for way, beta in (("dpo", 0.5), ("dpo", 2), ("ppo", 0.4), ("ppo", 1.6)):
        yield f"taste {way} beta={beta:g}", tasted, way, beta


# ----------------------------------------------------------------------------------------------------
# How far it holds: larger models, other words for the same, fewer labels, farther away, more rounds


def size(seed):
    """Predicted: with twice the layers the reward model is as blind for things and names (45 to 55%, margins
    under 0.05), the ideal policy for it has 88 to 92%, and RLHF is level with it; DPO has 96 to 98%, at most
    2.5% hidden wrong words, and the mended RLHF is not behind it. (Each at its own KL.)
    Then, of twice the width as well, seven times the default's weights: as blind, with the same ideal policy;
    DPO 93 to 96% and 2 to 3.5% hidden wrong words, as with 4 × 128, for its rates are those of two layers;
    the mended RLHF one to three points ahead of it; the ideal policy for the implicit reward 97 to 98.5%.
    """

    def larger(name, function, *arguments):
        layers, width = SIZES[name]
        with patch.object(measure, "RUNS", RUNS / name):
            train("pretrain", seed, "pretrain", "--n-layer", layers, "--n-embd", width)
            return function(*arguments)

    def asked(which):
        return asks_for(seed, rewards(seed)[which])

    for name in SIZES:
        yield f"{name} pretrain", larger, name, base, seed, KINDS[:1], (1,)
        yield f"{name} reward", larger, name, train, "reward", seed, "reward"
        yield f"{name} law", larger, name, next(law(seed))[1]
        for way, beta in (("dpo", 0.5), ("ppo", 0.4), ("mended", 0.4)):
            yield f"{name} {way}", larger, name, learned, seed, way, beta
        for which in ("explicit", "implicit"):
            yield f"{name} {which}", larger, name, asked, which


SECOND = {  # for each of a post's words, in their order, another one that means the same
    "verb": "mislaid spotted smashed mended stashed flogged coloured cadged",
    "thing": "glider cap cycle lantern tambour timer dinghy urn "
    "shawl band seat boiler steps glass carpet fiddle",
    "place": "overhead outdoors midtown away offstage close submerged inside",
}
TO_SECOND = {a: b for key, words in SECOND.items() for a, b in zip(WORDS[KINDS[0]][key], words.split())}
TO_FIRST = {b: a for a, b in TO_SECOND.items()}


def put(words):
    """A function that replaces words in a text, {old: new}."""
    return lambda text: re.sub(r"\w+", lambda word: words.get(word[0], word[0]), text)


in_first, in_second = put(TO_FIRST), put(TO_SECOND)


def by_meaning(function):
    """A taste, or kind, of prompt and response that takes both words of a meaning for the same."""
    return lambda prompt, response: function(in_first(prompt), in_first(response))


def in_dialects(pick, kind):
    """`write_document` where people speak two dialects: a post is in one of them, its summary in either.

    Letters pick one, too, though none of their words is in any: so their `log_prob` is up to log 4 too low.
    """
    prompt, response, writer = write_document(pick, kind)
    prompt = pick([in_first, in_second])(prompt)
    if writer == "repeats":
        return prompt, " " + re.search(r": (.*?\.)", prompt)[1], writer
    if writer == "off topic":
        return prompt, response, writer
    return prompt, pick([in_first, in_second])(response), writer


def meanings(here, model):
    """A policy's KL and share where answers of one meaning are one; how many are in the first dialect."""
    rows = []
    for post, prompt in zip(here.posts, here.prompts):
        answers, *logs = list_answers(model, here.model, prompt, here.tokenizer.eos)
        texts = [here.tokenizer.decode(answer) for answer in answers]
        meaning = np.unique([in_first(text) for text in texts], return_inverse=True)[1]
        w, ref = (np.bincount(meaning, np.exp(log)) for log in logs)
        p, scores = np.exp(logs[0]), [here.judge(post, text) for text in texts]
        first, second = ([say(text) != text for text in texts] for say in (in_second, in_first))
        rows.append([w @ np.log(w / ref) / w.sum(), p @ scores / p.sum(), p @ first, p @ second])
    kl, score, first, second = np.mean(rows, axis=0)
    return {"kl": kl, "share": here.share(score, kl), "first": first / (first + second)}


def dialects(seed):
    """Predicted: (share of the optimum, RLHF / DPO, each at its own KL; tests are in both dialects) pairs in
    both dialects 91 / 95%; pairs in the first alone 89 / 91%: DPO stays ahead, since on letters it carried
    over to words that no pair had. By the taste that compares nothing: 98 / 96 and 97 / 93%. Where an answer
    says it in the other dialect, the implicit reward from pairs in the first alone is right about things and
    places in 85 to 95%, the reward model about obvious faults in 97%. (Razin et al. 2025, arXiv 2507.07981,
    would have RLHF ahead with pairs in the first alone.) Pretraining has twice the steps: with 500 its loss
    stayed 6% above the entropy on seed 21, whose policies were thrown away; with 1,000 1% on seed 0.
    Asked when seed 21 had shown DPO behind (90.7 / 92.4%), with as few hidden wrong words as ever: does it
    pay nats for the dialect? Then 80% or more of its answers are in the first, where half were, and its
    implicit reward gives a summary a point or more for being in it; RLHF 60% and 0.3 points at most. And
    where answers of one meaning count as one, its share is what it is with pairs in both, to within a point
    (this last was written after a look at four posts of seed 21).
    """
    tastes = {"facts": by_meaning(judge), "any": by_meaning(another_taste)}

    def spoken(function, *arguments):
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(measure, "RUNS", RUNS / "dialects"))
            stack.enter_context(patch.object(measure, "kind_of", by_meaning(kind_of)))
            stack.enter_context(patch.object(data, "write_document", in_dialects))
            train("pretrain", seed, "pretrain", "--vocab-size", 1024, "--steps", 1000)
            pretrained(seed)
            return function(*arguments)

    def tried(way, taste, words):
        name, taste = f"{taste} {words}", tastes[taste]
        pairs = relabelled(seed, name, taste, in_first if words == "first" else str)
        if way == "dpo":
            return policy(seed, f"{name} dpo", "dpo", "--data", pairs, judge=taste)
        return rlhf(seed, name, "--data", pairs, judge=taste)

    def names_of(taste, words):
        return f"{taste} {words} reward", f"{taste} {words} dpo"

    def seen(which, words, say):
        return faults(seed, rewards(seed, names_of("facts", words))[which], say=say)

    def ideal():
        """Of each reward: the ideal policy's share at 1 nat."""
        found = {}
        for taste, words in itertools.product(tastes, ("both", "first")):
            here, names = Reference(seed, judge=tastes[taste]), names_of(taste, words)
            for which, value in rewards(seed, names).items():
                found[f"{taste} {words} {which}"] = here.share_at(here.valued(value))
        return found

    def paid():
        """Of each policy: KL and share where answers of one meaning count as one answer, and the share that
        is in the first dialect, of answers in any. Of each reward: the value of a full summary in either.
        """
        here, found = Reference(seed, judge=tastes["facts"]), {}
        full = [plots.spoiled(in_first(post))[0] for post in here.posts]
        for words in ("both", "first"):
            for which, value in rewards(seed, names_of("facts", words)).items():
                values = []
                for say in (in_first, in_second):
                    answers = [[*here.tokenizer.encode(say(text)), here.tokenizer.eos] for text in full]
                    with torch.no_grad():
                        values.append(value(*data.pad_rows(here.prompts, answers)).mean().item())
                found[f"{words} {which}"] = values
            for name in (f"facts {words} dpo", f"facts {words} ppo beta=0.4"):
                found[name] = meanings(here, load_model(home_of(seed, name)))
        return found

    yield "dialects pretrain", spoken, lambda: policy(seed, "pretrain", "pretrain", judge=tastes["facts"])
    for taste, words in itertools.product(tastes, ("both", "first")):
        for way in ("dpo", "ppo"):
            yield f"dialects {taste} {words} {way}", spoken, tried, way, taste, words
    for which, words in itertools.product(("explicit", "implicit"), ("both", "first")):
        for name, say in (("same", str), ("other", in_second)):
            yield f"dialects {which} {words} {name}", spoken, seen, which, words, say
    yield "dialects ideal", spoken, ideal
    yield "dialects paid", spoken, paid


def labels(seed):
    """Predicted: tilt the listed answers by each reward, from KL 0.25 to 6. The score has a peak: for the
    explicit reward at 1.5 to 2.5 nats and 3.5 to 3.7 points, and from 1,000 labels on in the same place; for
    the implicit one at 2 nats with 1,000 labels and farther and higher with all of them. So more labels let
    a policy go farther where errors are noise, and not where they are blindness. Best of n has its peak
    there, too. With 250 labels, at 1 nat, RLHF is not behind DPO.
    Asked later, of 40,000 labels (each seen once): the implicit reward reaches 3.85 to 3.9 points, at 2
    nats; the reward model sees names (in 75% or more) on one or two of the three seeds, and reaches 3.6 to
    3.75 there, and 3.5 elsewhere.
    """

    def some(script, n):
        path, records = home_of(seed, f"pairs {n}.jsonl"), own_records(seed)
        how = ["--steps", 3 * math.ceil((n - n // 10) / 32)] if n in LABELS else []  # or one pass
        if n > len(records):  # more on other posts: on the same ones volunteers draw the same luck
            old = {record["prompt"] for record in records}
            records += [record for record in more_records(seed) if record["prompt"] not in old]
        write_records(path, records[:n])
        train(script, seed, f"labels {n} {script}", "--data", path, *how)

    def curve(n):
        for script in ("reward", "dpo") if n else ():
            some(script, n)
        names = (f"labels {n} reward", f"labels {n} dpo") if n else ("reward", "dpo beta=0.5")
        here, found = Reference(seed), {}
        for which, values_of in rewards(seed, names).items():
            values = here.valued(values_of)
            tilted = [here.ideal_at(values, kl) for kl in KLS]
            best = [[best_of_n(p, x, n) for p, x in zip(here.p, values)] for n in BEST_OF]
            at = lambda policies: [[here.kl(w), here.mean(w, here.scores)] for w in policies]
            found[which] = {"tilted": at(tilted), "best": at(best)}
        return found

    def race(way, beta):
        how = ["--data", home_of(seed, f"pairs {LABELS[0]}.jsonl"), "--beta", beta]
        if way == "dpo":
            how += ["--steps", 3 * math.ceil((LABELS[0] - LABELS[0] // 10) / 32)]
        else:
            how += ["--reward", home_of(seed, f"labels {LABELS[0]} reward")]
        return policy(seed, f"few {way} beta={beta:g}", way, *how)

    for n in (*LABELS, None, 40000):
        yield f"labels {n or 'all'}", curve, n
    most = home_of(seed, "labels 40000 reward")
    yield "labels 40000 seen", lambda: asks_for(seed, explicit(most))
    for way, beta in (("dpo", 0.5), ("dpo", 0.1), ("ppo", 0.4), ("ppo", 1.6)):
        yield f"few {way} beta={beta:g}", race, way, beta


def more_records(seed):
    """More of a seed's own pairs, three to four times as many, part of them on the same posts."""
    home = home_of(seed, "more")
    if not home.exists():
        shutil.copytree(home_of(seed, "pretrain"), home, ignore=shutil.ignore_patterns("*.jsonl"))
        ask(home, seed, 56000)
    return read_preferences(home / "preferences.jsonl")


def more_pairs(seed):
    """Predicted: as many more of a seed's own pairs, in the place of those that differ in one hidden word,
    cure nothing: with 12,000 and with 24,000 of them the reward model is right about things and names in 45
    to 60%, and the ideal policy for it has what it had, to within a point.
    Asked later, as names were seen on seed 22 with 24,000, of the next seeds: they are (in 75% or more) on
    one or two of three with 24,000, on none with 12,000, things on none; where they are, the ideal policy
    gains a point. (One was run, seed 23.)
    """

    def control(n):
        path, own = home_of(seed, f"more {n}.jsonl"), own_records(seed)
        write_records(path, more_records(seed)[: len(own) + n])
        name = f"reward more {n}"
        return train("reward", seed, name, "--data", path) | asks_for(seed, explicit(home_of(seed, name)))

    for n in (12000, 24000):
        yield f"more {n}", control, n


def rounds(seed):
    """Predicted: DPO once more, from DPO's policy and with that as the reference (semi-online DPO: Lanchantin
    et al. 2025, arXiv 2506.21495). Whose labels, or how fresh the answers? On new answers of its own that
    people label 97 to 98% of the optimal gain at its own KL; on the same ones labelled by the reward model,
    with people's noise, 93 to 95% and twice the hidden wrong words; with the old pairs once more 95 to 96%.
    Asked when seed 21 had shown 98.2, 95.9 and 94.1%: is it that the answers are fresh, or that there are
    more labels? As many new labels on the pretrained model's answers: 96 to 97%, so half is the freshness.
    (New answers are to the posts of the first round; one pair in twenty comes out as it was.)
    """
    first = home_of(seed, "dpo beta=0.5")

    def once_more(name, records):
        path = home_of(seed, f"round {name}.jsonl")
        write_records(path, records)
        return policy(seed, f"round {name}", "dpo", "--init", first, "--data", path)

    def fresh():
        if not (first / "preferences.jsonl").exists():
            ask(first, seed)
        return read_preferences(first / "preferences.jsonl")

    def by_the_reward_model():
        rng, records = random.Random(seed), []
        scores = margins(Tokenizer.load(first), rewards(seed)["explicit"], fresh()).tolist()
        for record, m in zip(fresh(), scores, strict=True):
            a, b = record["chosen"], record["rejected"]
            if rng.random() > 1 / (1 + math.exp(-m)):
                a, b = b, a
            records.append({"prompt": record["prompt"], "chosen": a, "rejected": b})
        return records

    yield "round people", lambda: once_more("people", fresh())
    yield "round reward model", lambda: once_more("reward model", by_the_reward_model())
    yield "round stale", lambda: once_more("stale", own_records(seed))
    yield "round more", lambda: once_more("more", more_records(seed)[-len(fresh()) :])


def by_token():
    """Patches of `ppo.py`: each token earns its own part of an implicit reward; the last one earned it all.

    In the manner of RTO (Zhong et al. 2024, arXiv 2404.18922).
    """
    load, place, kept = ppo.load_reward, ppo.token_rewards, []

    def loaded(args, tokenizer, reference):
        score, network = load(args, tokenizer, reference)

        def score_and_keep(*answers):
            both = [token_log_probs(model, *answers) for model in (network, reference)]
            kept[:] = [network.beta * (both[0] - both[1])]
            return score(*answers)

        return score_and_keep, network

    def token_rewards(reward, *rest):
        return place(reward - kept[0].sum(1), *rest) + kept[0]

    return patch.multiple(ppo, load_reward=loaded, token_rewards=token_rewards)


def questions(seed):
    """Predicted: PPO on the judge with β = 0 goes beyond 4 nats and scores 3.9: an exact reward needs no
    leash. PPO from DPO's policy: on the learned reward it doubles the hidden wrong words and falls by two
    points of share, on the judge it has 97.5%. Fine-tuning on the best of 16 answers by the reward model has
    85 to 90% at 1.2 to 1.8 nats, more hidden wrong words than before, and is behind RLHF; on a random one
    of the 16 it stays where it was, within 0.1 nats. Added before the first run: PPO on DPO's implicit reward
    at DPO's β, whose ideal policy is DPO's, token by token or at the end (the tokens' parts sum to it): after
    10 iterations it is nearer to DPO's policy token by token, on each seed, after 40 as near.
    Asked when seed 21 had shown 2.6 nats and 3.97 points for the judge without the KL: the learned reward
    without it goes beyond 2 nats, too, and has fewer points than with it, 3.2 to 3.4.
    """
    first = home_of(seed, "dpo beta=0.5")

    def go_on(reward):
        of = home_of(seed, "reward") if reward == "learned" else reward
        how = ["--reward", of, "--init", first, "--data", home_of(seed, "pretrain") / "preferences.jsonl"]
        return policy(seed, f"dpo then ppo {reward}", "ppo", *how)

    def tuned(which):
        home, path = home_of(seed, "pretrain"), home_of(seed, f"of 16 {which}.jsonl")
        posts = [d.prompt for d in documents(2000, seed=[seed, 15], kind=KINDS[0]) for _ in range(16)]
        tokenizer, value, records = Tokenizer.load(home), rewards(seed)["explicit"], []
        texts = sample_texts(load_model(home), tokenizer, posts, ("of 16", seed))
        for i in range(0, len(posts), 16):
            some = texts[i : i + 16]
            if which == "best":
                ids = [[*tokenizer.encode(text), tokenizer.eos] for text in some]
                with torch.no_grad():
                    scores = value(*data.pad_rows([tokenizer.encode(posts[i])] * 16, ids)).tolist()
                some = [text for _, text in sorted(zip(scores, some), reverse=True)]
            others = [text for text in some if text != some[0]]
            records += [{"prompt": posts[i], "chosen": some[0], "rejected": text} for text in others[:1]]
        write_records(path, records)
        return policy(seed, f"of 16 {which}", "dpo", "--data", path, "--loss", "sft")

    def approached(steps, at):
        how = ["--reward", first, "--beta", 0.5, "--steps", steps]
        with by_token() if at == "token by token" else contextlib.nullcontext():
            found = policy(seed, f"implicit {at} {steps}", "ppo", *how)
        from_dpo = Reference(seed, home=first).measure(home_of(seed, f"implicit {at} {steps}"), kinds=False)
        return found | {"from DPO": from_dpo["kl"]}

    for steps in (10, 40):
        for at in ("at the end", "token by token"):
            yield f"implicit {at} {steps}", approached, steps, at
    yield "leash 0", policy, seed, "leash 0", "ppo", "--reward", "judge", "--beta", 0
    how = ["--reward", home_of(seed, "reward"), "--beta", 0]
    yield "leash 0 learned", policy, seed, "leash 0 learned", "ppo", *how
    for reward in ("learned", "judge"):
        yield f"dpo then ppo {reward}", go_on, reward
    for which in ("best", "random"):
        yield f"of 16 {which}", tuned, which


EXPERIMENTS = dict.fromkeys((roads, elsewhere, proof, law, taste, form, doses, on_the_law), SEEDS)
EXPERIMENTS |= dict.fromkeys((size, dialects, labels, more_pairs, rounds, questions), SEEDS[:3])
EXPERIMENTS |= {again: MORE}


def main():
    os.environ["TQDM_DISABLE"] = "1"
    wanted = [int(seed) for seed in sys.argv[1:]] or [*SEEDS, *MORE]
    for experiment, seed in [(e, seed) for e, seeds in EXPERIMENTS.items() for seed in seeds]:
        if seed not in wanted:
            continue
        pretrained(seed)
        for name, function, *arguments in experiment(seed):
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if f"{seed} {name}" not in results:
                began = time.time()
                figures = rounded(function(*arguments)) | {"seconds": round(time.time() - began, 1)}
                results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                results[f"{seed} {name}"] = figures
                write_files(HERE, {RESULTS.name: json.dumps(results, indent=0).encode()})
                print(f"{seed} {name}: {figures['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
