"""Every command of the README works as it stands: run in a copy of the scripts, with short settings added."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import transformers
from conftest import ROOT

import data

README, MORE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tests/README.md"))
find_blocks = lambda text: re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)  # (language, code)
BLOCKS = [code for language, code in find_blocks(README + MORE) if not language]
COMMANDS = [command for block in BLOCKS for line in block.splitlines() for command in line.split(" && ")]
COMMANDS = [c for c in COMMANDS if c.startswith("python ") and "pytest" not in c]
TINY = "--n-layer 1 --n-embd 16 --n-head 2"
SHORT = {
    "pretrain.py": f"--steps 2 {TINY}",
    "dpo.py": "--steps 2",
    "reward.py": "--steps 2",
    "ppo.py": "--steps 1 --batch-size 8",
    "sample.py": "",
}


def shortened(command):
    """A command with short settings, which come last and so count."""
    script = command.split()[1]
    more = SHORT.get(script, "")
    command = command.replace("--ask", "--ask 120")
    if "--compare" in command:
        more += " --n-prompts 2 --answers 8"
    return f"{command} {more}".replace("python", shlex.quote(sys.executable), 1)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The scripts, with a GPT-2 and a file of transcripts beside them, as the README asks for."""
    where = tmp_path_factory.mktemp("clone")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, where)
    tokenizer = data.Tokenizer.train(["Tell me a joke. Human: Assistant: "] * 3, 270)
    sizes = {
        "n_positions": 128,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = transformers.GPT2Config(vocab_size=len(tokenizer.vocab), **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(where / "gpt2")
    data.write_files(where / "gpt2", tokenizer.files())
    with gzip.open(where / "train.jsonl.gz", "wt") as file:
        for i in range(40):
            asked = f"\n\nHuman: Tell me joke {i}.\n\nAssistant:"
            print(json.dumps({"chosen": f"{asked} Ha.", "rejected": f"{asked} No."}), file=file)
    return where


def test_there_are_commands():
    scripts = {command.split()[1] for command in COMMANDS} - {"-X"}
    assert scripts == {*SHORT} and len(COMMANDS) >= 15


def test_every_command_works(clone):
    """In the README's order: each goes on from what those before it left."""
    second = ["python sample.py --ask --init runs/dpo", "python dpo.py --init runs/dpo --out runs/dpo2"]
    for command in COMMANDS + second:
        done = subprocess.run(
            shortened(command),
            shell=True,
            cwd=clone,
            input="1\n" * 100,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", ["README.md", "notebooks/README.md", "tests/README.md"])
def test_code_is_no_wider_than_the_page(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [line for _, code in find_blocks(text) for line in code.splitlines() if len(line) > 95] == []


def test_every_link_leads_somewhere():
    places = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(places) > 15
    assert all(place.startswith("https://") or (ROOT / place).exists() for place in places)
