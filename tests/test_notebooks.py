"""The notebooks run from top to bottom, in a much shorter setting than the committed outputs come from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import plots  # noqa: E402
from data import documents  # noqa: E402

NAMES = ["01_pretraining", "02_rlhf", "03_dpo"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the scripts and notebooks, so that nothing is written beside the real ones."""
    where = tmp_path_factory.mktemp("clone")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, where)
    shutil.copytree(ROOT / "notebooks", where / "notebooks")
    return where


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(clone, name):
    env = {**os.environ, "QUICK": str(clone / "quick")}
    (clone / "quick").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    command += ["--output-dir", str(clone), f"{name}.ipynb"]
    done = subprocess.run(command, cwd=clone / "notebooks", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole(name):
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # once, from the top
    outputs = [out for cell in code for out in cell["outputs"]]
    assert not any(out["output_type"] == "error" for out in outputs)
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3
    assert str(Path.home()) not in json.dumps(cells)


def test_kinds_of_answers():
    """`plots.kind_of` finds the writer of every answer from the facts of its post."""
    for document in documents(1000, seed=0, kind="POST"):
        kind = plots.kind_of(document.prompt, document.response)
        found = {"wrong word": ("wrong thing", "wrong name"), "repeats, and it is the news": ("lazy",)}
        found["repeats the first sentence"] = ("lazy",)
        assert document.writer in found.get(kind, (kind,)), (document, kind)
    for words in (" Hugo hid the cake.", ""):
        assert plots.kind_of(document.prompt, words) == "else"
