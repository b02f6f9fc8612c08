"""What every page begins with: `import start` finds the scripts, and the folder `runs` that they write to."""

import contextlib
import importlib
import inspect
import io
import json
import os
import sys
from pathlib import Path

from IPython.display import Markdown, display

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
# Tests run the pages in another folder, with very short settings.
QUICK = os.environ.get("QUICK")
os.chdir(QUICK or HERE.parent)
SHORT = {
    "pretrain": ["--steps", "30", "--n-layer", "1"],
    "dpo": ["--steps", "5"],
    "reward": ["--steps", "5"],
    "ppo": ["--steps", "2"],
}

import data  # noqa: E402
import model  # noqa: E402
import plots  # noqa: E402
import world  # noqa: E402

# The post that the pages come back to.
POST = "POST: It rained all day. My captain Hugo lost my kite underwater. I had soup for lunch.\nTL;DR:"


def run(name, *options, quiet=False):
    """Run a script, as in `python NAME.py OPTIONS`. Returns its logged steps and its final figures."""
    script, words = importlib.import_module(name), [str(option) for option in options]
    if QUICK:
        words += ["300"] * (words == ["--ask"]) + SHORT.get(name, [])
    args = script.parser.parse_args(words)
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        script.main(args)
    return plots.read_metrics(args.out) if name in SHORT else None


def need(name, script=None, *options, ask=True):
    """The same into `runs/NAME`, unless there is such a run already. After pretraining, people are asked."""
    out = Path("runs", name)
    if not (out / "config.json").exists():
        run(script or name, *options, "--out", out, quiet=True)
    if ask and name == "pretrain" and not (out / "preferences.jsonl").exists():
        run("sample", "--ask", quiet=True)
    return plots.read_metrics(out)


def watch(name):
    """Run a script with its defaults and see it learn. If it has run before, see what it has logged then."""
    out = Path("runs", name)
    if not (out / "config.json").exists():
        return run(name)
    print(f"{out} is there already: this is what it has logged. Delete it, and this cell trains it anew.")
    log, final = plots.read_metrics(out)
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "answer" in line:
            print(f"  step {line['step']:4}: {line['answer']}")
    for figure, value in final.items():
        if figure not in ("final", "seconds") and value is not None:
            print(f"{figure:>20} {value:9.4f}   {model.GOOD.get(figure, '')}")
    return log, final


def move(text, where):
    """Go to a folder of the scripts where another world stands, and import the scripts from there."""
    world.make(text, where)
    os.chdir(where)
    sys.path.insert(0, os.getcwd())
    for script in HERE.parent.glob("*.py"):
        sys.modules.pop(script.stem, None)


def load(name, network=model.GPT):
    """A model that a script has saved."""
    return model.load_model(f"runs/{name}", network)


def tokenizer():
    return data.Tokenizer.load("runs/pretrain")


def posts(n, seed=data.COMPARED):
    """n posts that nothing was trained on."""
    return [d.prompt for d in data.documents(min(n, 16) if QUICK else n, [0, seed], data.KINDS[0])]


def picture(name):
    """Where a picture that the README shows is kept, but not in tests."""
    return None if QUICK else HERE / name


def show(*functions):
    """Functions as they stand in the scripts."""
    for function in functions:
        where = Path(inspect.getsourcefile(inspect.unwrap(function))).name  # not the decorator's file
        display(Markdown(f"```python\n# {where}\n{inspect.getsource(function)}```"))


def table(columns, *rows):
    """A table, from the names of its columns and the cells of its rows."""
    lines = columns, ["---"] * len(columns), *rows
    display(Markdown("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)))
