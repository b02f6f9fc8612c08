"""The notebooks run from top to bottom, in a much shorter setting than the committed outputs come from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["01_pretraining", "02_rlhf", "03_dpo", "04_rlhf_vs_dpo"]


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
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--output-dir",
        str(clone),
        f"{name}.ipynb",
    ]
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
