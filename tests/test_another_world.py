"""Another task in the world's place: sums instead of summaries. Only section 1 of data.py is replaced."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

from data import GREETERS, KINDS, WORDS

sys.path.append(str(ROOT / "notebooks"))
import world  # noqa: E402

SUMS = '''
KINDS = ("sum", "difference")
BEST = 3
MAX_ANSWER_TOKENS = 12
Document = namedtuple("Document", "prompt response writer log_prob")


def documents(n, seed, kind=None):
    """3+4= 7: one writer in two is right, one in four is wrong by one, one in four talks too much."""
    rng, result = random.Random(str(seed)), []
    for _ in range(n):
        a, b, sign = rng.randrange(100), rng.randrange(100), "+-"[KINDS.index(kind or rng.choice(KINDS))]
        right = a + b if sign == "+" else a - b
        writer = rng.choice(["right", "right", "wrong", "talks"])
        response = {"right": f" {right}", "wrong": f" {right + 1}", "talks": f" I say {right}"}[writer]
        p = 0.5 if writer == "right" else 0.25
        result.append(Document(f"{sign}: {a}{sign}{b}=", response, writer, math.log(p / 100**2)))
    return result


def judge(prompt, response):
    """Three points for the right number, half a point less for each word more."""
    a, b = map(int, re.findall(r"[0-9]+", prompt))
    words = response.split()
    right = str(a + b if prompt[0] == "+" else a - b) in words
    return BEST * right - 0.5 * max(0, len(words) - 1)


def kind_of(prompt, response):
    return "right" if judge(prompt, response) == BEST else "talks" if judge(prompt, response) > 0 else "wrong"


'''


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with the scripts, in which sums stand where the world stood."""
    where = tmp_path_factory.mktemp("sums")
    world.make(SUMS, where)
    return where


def run(where, *command):
    done = subprocess.run([sys.executable, *command], cwd=where, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_road_leads_through_another_world(elsewhere):
    """pretrain, dpo, reward, ppo and compare, with no other line changed."""
    assert "of 3" in run(elsewhere, "data.py")
    for name, small in SCRIPTS.items():
        run(elsewhere, f"{name}.py", *small.split(), *["--steps", "60"] * (name == "pretrain"))
        if name == "pretrain":
            run(elsewhere, "sample.py", "--ask", "300")
    run(elsewhere, "ppo.py", *SCRIPTS["ppo"].split(), "--reward", "judge", "--out", "runs/ppo-judge")
    pairs = [json.loads(line) for line in (elsewhere / "runs/pretrain/preferences.jsonl").open()]
    assert len(pairs) > 200 and all(re.fullmatch(r"\+: \d+\+\d+=", pair["prompt"]) for pair in pairs)
    table = run(elsewhere, "sample.py", "--compare", "--n-prompts", "4", "--answers", "16")
    assert "3 is perfect" in table and "wrong" in table and "runs/ppo" in table
    assert "-: " in run(
        elsewhere, "sample.py", "--compare", "--shifted", "--n-prompts", "4", "--answers", "16"
    )


def test_nothing_outside_section_1_speaks_of_the_world():
    """Neither the kinds of its texts nor the people in them stand in any script."""
    text = (ROOT / "data.py").read_text(encoding="utf-8")
    begin, end = (text.index(f"# {'-' * 100}\n# {i}. ") for i in (1, 2))
    scripts = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py") if path.name != "data.py"]
    others = "\n".join([text[:begin], text[end:], *scripts])
    for word in (*WORDS, *GREETERS, *WORDS[KINDS[0]]["relation"], "TL;DR", "post", "lazy"):
        assert not re.search(rf"\b{word}\b", others), word
        assert re.search(rf"\b{word}\b", text[begin:end])
