"""The page to touch, made of tiny models and read in a real browser, where there is one."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "notebooks"))

import explore  # noqa: E402
from data import COMPARED, KINDS, Tokenizer, documents, judge, pad_rows  # noqa: E402
from measure import best_of_n, divergence, list_answers, softmax  # noqa: E402
from model import ScalarGPT, final_scores, load_model, token_log_probs  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLOOR, POSTS = 1e-3, {KINDS[0]: 2, KINDS[1]: 1}


SCRIPT = re.compile(r'(?<=type="application/json">)(.*?)(?=</script>)', flags=re.S)


@pytest.fixture(scope="module")
def made(finished):
    """The page of the finished runs, and what it holds."""
    text = explore.page(finished / "runs", FLOOR, POSTS)
    return text, json.loads(SCRIPT.search(text)[0])


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    """The same with other rewards, since a tiny model says nothing of worth: the file, and what it holds."""
    text, found = made
    path, rng = tmp_path_factory.mktemp("page") / "explore.html", np.random.default_rng(0)
    for post in found["posts"]:
        n = len(post["answers"]["text"])
        for name in ("judge", "learned", "implicit"):
            post["answers"][name] = (rng.integers(-8, 9, n) / 2).tolist()  # with ties
        post["answers"]["hidden"] = rng.integers(0, 2, n).tolist()
    path.write_text(SCRIPT.sub(lambda _: json.dumps(found).replace("<", "\\u003c"), text), encoding="utf-8")
    return path, found


def read(path, **state):
    """What the browser makes of the page: the document, and what it said in its console."""
    if not BROWSER:
        assert not os.environ.get("NEEDS_BROWSER"), "no browser"
        pytest.skip("no Chromium or Chrome")
    how = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
    ]
    place = f"file://{path}#" + "&".join(f"{key}={value}" for key, value in state.items())
    done = subprocess.run([BROWSER, *how, "--dump-dom", place], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def figures(dom):
    body = re.search(r"<body[^>]*>", dom)[0]
    return {
        key: float(re.search(rf'data-{key}="([^"]*)"', body)[1]) for key in ("kl", "score", "share", "wrong")
    }


@torch.no_grad()
def test_what_the_page_holds_is_what_the_models_say(finished, made):
    """Answer by answer: probabilities, the reward model's score, DPO's implicit reward."""
    tokenizer = Tokenizer.load(finished / "runs/pretrain")
    reference, dpo, ppo = (load_model(finished / f"runs/{name}") for name in ("pretrain", "dpo", "ppo"))
    scorer = load_model(finished / "runs/reward", ScalarGPT)
    posts = [d.prompt for kind, k in POSTS.items() for d in documents(k, [0, COMPARED], kind)]
    assert [post["post"] for post in made[1]["posts"]] == posts
    for post in made[1]["posts"]:
        a, prompt = post["answers"], tokenizer.encode(post["post"])
        answers, log_p, _ = list_answers(reference, reference, prompt, tokenizer.eos, floor=FLOOR)
        assert len(answers) == len(a["text"]) > 3
        for i in np.argsort(-log_p)[:4]:
            j = a["text"].index(tokenizer.decode(answers[i]))
            tokens, mask, _ = pad_rows([prompt], [answers[i]])
            logs = [token_log_probs(network, tokens, mask).sum().item() for network in (reference, dpo, ppo)]
            assert a["pretrain"][j] == pytest.approx(logs[0] - math.log(np.exp(log_p).sum()), abs=1e-4)
            assert (a["dpo"][j], a["ppo"][j]) == (
                pytest.approx(logs[1], abs=1e-4),
                pytest.approx(logs[2], abs=1e-4),
            )
            assert a["implicit"][j] == pytest.approx(dpo.beta * (logs[1] - logs[0]), abs=1e-4)
            assert a["learned"][j] == pytest.approx(final_scores(scorer, tokens, mask).item(), abs=1e-4)


@pytest.mark.parametrize(
    "number, state",
    [
        (0, {"reward": "judge", "beta": -0.5}),
        (0, {"reward": "learned", "beta": -1, "m": 0.5}),
        (1, {"reward": "implicit", "beta": 1.5}),
        (2, {"reward": "judge", "mode": "n", "n": 3}),
        (1, {"reward": "learned", "mode": "n", "n": 5, "m": 2}),
    ],
)
def test_the_browser_computes_what_measure_computes(page, number, state):
    path, found = page
    a = {name: np.array(row) for name, row in found["posts"][number]["answers"].items()}
    p, values = np.exp(a["pretrain"]), a[state["reward"]] - state.get("m", 0) * a["hidden"]
    tilted = "beta" in state
    w = (
        softmax(np.log(p) + values / math.exp(state["beta"]))
        if tilted
        else best_of_n(p, values, 2 ** state["n"])
    )
    grid = [softmax(np.log(p) + a["judge"] / beta) for beta in np.geomspace(1e3, 0.05, 80)]
    kls, best = [divergence(x, p) for x in grid], [x @ a["judge"] for x in grid]
    start, kl, score = p @ a["judge"], divergence(w, p), w @ a["judge"]
    share = (score - start) / (np.interp(kl, kls, best) - start)
    dom, said = read(path, post=number, **state)
    expected = {"kl": kl, "score": score, "share": share, "wrong": w[a["hidden"] > 0].sum()}
    assert figures(dom) == {key: pytest.approx(x, abs=1e-6) for key, x in expected.items()} and not said
    assert kl > 0.1


def test_the_ideal_policy_of_the_judge_lies_on_the_frontier_of_all_posts(page):
    dom, said = read(page[0], post="all", reward="judge", beta=0)
    assert figures(dom)["share"] == pytest.approx(1, abs=0.005) and not said
    assert dom.count('class="answer"') == 8  # the kinds


def test_an_error_in_the_page_would_be_noticed(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page[0].read_text(encoding="utf-8").replace("function figures()", "function figured()"))
    assert read(broken)[1]


def test_the_page_that_is_kept_agrees_with_itself():
    """The texts' kinds, points and hidden words are what data.py says of them. It loads nothing."""
    text = (ROOT / "notebooks/explore.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000 and not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", text)
    template = (ROOT / "notebooks/explore-template.html").read_text(encoding="utf-8")
    assert SCRIPT.sub("", text) == SCRIPT.sub("", template)  # else make it anew
    found = json.loads(SCRIPT.search(text)[0])
    kinds = [*found["kinds"]]
    for post in found["posts"]:
        a = post["answers"]
        assert len({len(row) for row in a.values()}) == 1
        assert sum(map(math.exp, a["pretrain"])) == pytest.approx(1, abs=1e-5)
        for text, kind, points, hidden in zip(a["text"], a["kind"], a["judge"], a["hidden"]):
            assert points == pytest.approx(judge(post["post"], text)) and kinds[kind] == explore.kind_of(
                post["post"], text
            )
            assert hidden == explore.hidden_words(post["post"], text)
        for i, words in post["words"].items():
            assert sum(x for _, x in words) == pytest.approx(a["implicit"][int(i)], abs=0.02)
