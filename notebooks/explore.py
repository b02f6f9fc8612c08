"""Makes `explore.html`, a page to touch: turn β and see a policy move. It needs no server and no network.

    python notebooks/explore.py [--runs runs] [--out notebooks/explore.html]

It holds the listed answers (`measure.py`) to some posts and letters, with their probabilities under the
pretrained model and both aligned ones, the judge's points, and both learned rewards: of `runs/pretrain`,
`runs/reward`, `runs/dpo` and `runs/ppo`. All that the page shows is computed from these in the browser, by
the formulas of `measure.py`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from experiments import hidden_words
from measure import HERE, list_answers, softmax
from plots import KINDS

import data
from data import DISHES, FACTS, GREETERS, WORDS, Tokenizer, documents, facts, judge, kind_of, pad_rows
from model import final_scores, load_model, token_log_probs

POSTS = {data.KINDS[0]: 8, data.KINDS[1]: 3}  # as many as fit into 400 KB
FLOOR = 1e-4  # the least probability of an answer that is listed


@torch.no_grad()
def listed(post, networks, tokenizer, floor):
    """All that the page needs of one post."""
    reference, prompt, eos = networks["pretrain"], tokenizer.encode(post), tokenizer.eos
    answers, log_p, _ = list_answers(reference, reference, prompt, eos, floor=floor)
    order = np.argsort(-log_p)
    answers, log_p = [answers[i] for i in order], log_p[order]
    tokens, mask, start = pad_rows([prompt] * len(answers), answers)
    logs = {
        name: token_log_probs(networks[name], tokens, mask, start, len(answers))
        for name in ("pretrain", "dpo", "ppo")
    }
    texts, beta = [tokenizer.decode(answer) for answer in answers], networks["dpo"].beta
    steps = beta * (logs["dpo"] - logs["pretrain"])
    found = {
        "text": texts,
        "kind": [[*KINDS].index(kind_of(post, text)) for text in texts],
        "hidden": [hidden_words(post, text) for text in texts],
        "judge": [round(judge(post, text), 1) for text in texts],
        "learned": final_scores(networks["reward"], tokens, mask, start, len(answers)).tolist(),
        "implicit": steps.sum(1).tolist(),
        "pretrain": np.log(softmax(log_p)).tolist(),
        "dpo": logs["dpo"].sum(1).tolist(),
        "ppo": logs["ppo"].sum(1).tolist(),
    }
    found = {
        key: [float(f"{x:.8g}") if isinstance(x, float) else x for x in row] for key, row in found.items()
    }
    shown = {i for name in ("pretrain", "dpo", "ppo") for i in np.argsort(found[name])[-8:].tolist()}
    tell = lambda token: tokenizer.decode([token]) if token != eos else "(end)"
    words = {
        i: [[tell(a), round(x, 3)] for a, x in zip(answers[i], steps[i][mask[i]].tolist())] for i in shown
    }
    policies = {}
    for name in ("dpo", "ppo"):  # as they are, by answers of their own
        own, log_own, log_ref = list_answers(networks[name], reference, prompt, eos, floor=floor)
        p, points = softmax(log_own), np.array([judge(post, tokenizer.decode(answer)) for answer in own])
        policies[name] = [float(p @ points), float(p @ (log_own - log_ref))]
    return {"post": post, "facts": facts(post), "answers": found, "words": words, "policies": policies}


def page(runs, floor=FLOOR, posts=POSTS):
    """The page as text."""
    networks = {
        name: load_model(Path(runs, name), network=None) for name in ("pretrain", "reward", "dpo", "ppo")
    }
    tokenizer = Tokenizer.load(Path(runs, "pretrain"))
    texts = [d.prompt for kind, n in posts.items() for d in documents(n, [0, data.COMPARED], kind)]
    every = sorted({word for words in WORDS.values() for key in FACTS for word in words[key]})
    found = {
        "posts": [listed(post, networks, tokenizer, floor) for post in texts],
        "kinds": {kind: color for kind, (color, _) in KINDS.items()},
        "odd": [*DISHES, *GREETERS],
        "words": every,
    }
    template = (HERE / "explore-template.html").read_text(encoding="utf-8")
    return template.replace(
        "/*DATA*/", json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    )


def main():
    parser = argparse.ArgumentParser(description="Make explore.html.")
    parser.add_argument("--runs", default="runs", help="folder with pretrain, reward, dpo and ppo")
    parser.add_argument("--out", default=HERE / "explore.html", type=Path)
    args = parser.parse_args()
    args.out.write_text(page(args.runs), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} KB; open it in a browser")


if __name__ == "__main__":
    main()
