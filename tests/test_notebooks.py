"""The notebooks run from top to bottom, in a much shorter setting than the committed outputs come from."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import claims  # noqa: E402

NAMES = ["01_pretraining", "02_rlhf", "03_dpo", "04_rlhf_vs_dpo", "05_where_they_part", "06_checked_rewards"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the scripts and notebooks, so that nothing is written beside the real ones."""
    where = tmp_path_factory.mktemp("clone")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, where)
    shutil.copytree(ROOT / "notebooks", where / "notebooks")
    return where


@pytest.fixture(scope="module")
def executed(clone):
    """{name: the process that executed it}: two at a time, each in a folder of its own."""

    def execute(name):
        quick = clone / f"quick-{name}"
        quick.mkdir()
        command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
        command += ["--output-dir", str(clone), f"{name}.ipynb"]
        how = {"env": {**os.environ, "QUICK": str(quick)}, "capture_output": True, "text": True}
        return subprocess.run(command, cwd=clone / "notebooks", **how)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(execute, NAMES)))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(executed, name):
    assert executed[name].returncode == 0, executed[name].stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole(name):
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # once, from the top
    outputs = [out for cell in code for out in cell["outputs"]]
    assert not any(out["output_type"] == "error" for out in outputs)
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3
    assert str(Path.home()) not in json.dumps(cells)


def displayed(name, kind):
    """(data, metadata) of all that a page's outputs have of a kind."""
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", []) if kind in out.get("data", {})]
    return [("".join(out["data"][kind]), out["metadata"].get(kind, {})) for out in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_says_in_words_what_it_shows(name):
    """In its own alt text, or in the text below it."""
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = []
    for cell, below in zip(cells, cells[1:]):
        pictures = [out for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
        said = "".join(below["source"]).split("\n\n")[0]
        said = said if said.startswith("*Picture: ") else ""
        texts += [out["metadata"].get("image/png", {}).get("alt", said) for out in pictures]
    assert min(map(len, texts)) > 60 and len({*texts}) == len(texts)
    assert not re.search(r"\bnan\b|\{", " ".join(texts))


@pytest.mark.parametrize("name", NAMES)
def test_each_listing_begins_with_its_file(name):
    """And stands there as it is shown."""
    listings = [text for text, _ in displayed(name, "text/markdown") if text.startswith("```python")]
    for listing in listings:
        file, code = re.fullmatch(r"```python\n# (\w+\.py)\n(.*)```", listing, re.DOTALL).groups()
        where = [path for path in (ROOT / file, ROOT / "notebooks" / file) if path.is_file()]
        assert where and code in where[0].read_text(encoding="utf-8")
    assert listings


def test_readme_notebook_and_results_say_the_same():
    """The table of claims is what `experiments.json` gives, in notebook 04 and, in short, in the README."""
    results = claims.load()
    assert f"\n\n{claims.readme(results)}\n\n" in README
    cells = json.loads((ROOT / "notebooks/04_rlhf_vs_dpo.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [out.get("data", {}).get("text/markdown") for c in cells for out in c.get("outputs", [])]
    assert claims.markdown(results) in ["".join(text) for text in shown if text]


def test_the_readme_shows_pictures_that_are_there():
    """Plots both for light pages and for dark ones."""
    pictures = re.findall(r'(?:srcset|src)="notebooks/([^"]+)"', README)
    plain = {picture for picture in pictures if "-dark" not in picture}
    assert plain == {"kinds.png", "frontier.png", "law.png", "explore.png"}
    assert all((ROOT / "notebooks" / picture).is_file() for picture in pictures)
    assert {p for p in pictures if f"{p[:-4]}-dark.png" in pictures} == plain - {"explore.png"}
