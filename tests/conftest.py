"""What the test files share: the way to the scripts, quick settings, and a folder of finished runs."""

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Networks of a few thousand weights are no quicker on two threads, and two programs at once much slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The training scripts, in the order in which they can run, and options with which each takes about a second.
# A new script is tested for all that every script promises (test_runs.py) by a line here.
SCRIPTS = {
    "pretrain": "--steps 8 --batch-size 8 --n-layer 1 --n-embd 16 --n-head 2 --vocab-size 300 "
    "--block-size 200",
    "dpo": "--steps 8 --batch-size 16",
    "reward": "--steps 6 --batch-size 16",
    "ppo": "--steps 6 --batch-size 16",
}
MODULES = {name: importlib.import_module(name) for name in (*SCRIPTS, "sample")}
model = importlib.import_module("model")


def words(name, *options):
    """A script's quick settings, and after them these options, which win: all as texts.

    On the CPU: a test often goes on with a network that a script made, and equal digits are promised there.
    """
    small = SCRIPTS.get(name, "")
    if name == "pretrain" and "--init" in options:  # then the sizes come with it
        small = "--steps 8 --batch-size 8"
    device = ["--device", "cpu"] if name in MODULES else []
    return [*device, *small.split(), *map(str, options)]


def call(name, *options):
    """Run a script's `main` in this process, with its quick settings."""
    MODULES[name].main(MODULES[name].parser.parse_args(words(name, *options)))


def run_args(out):
    """What a training script's `Run` is given, for tests that make one of their own."""
    args = MODULES["dpo"].parser.parse_args(["--out", str(out)])
    args.began = 0.0
    return args


def start(name, *options, before="", launcher=(), env=(), **how):
    """Start a script as a user does, with its quick settings.

    `before` is a line of Python that runs first; `launcher` stands between Python and the script.
    """
    command = [*launcher, str(ROOT / f"{name}.py"), *words(name, *options)]
    if before:
        run = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = ["-c", f"{before}; {run}", *command]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | how
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | dict(env)
    return subprocess.Popen([sys.executable, *command], env=env, **how)


def metrics(directory):
    """All lines of a finished run's metrics, but for those that hold an answer."""
    lines = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "answer" not in line]


def contents(directory):
    """{name: bytes} of all files in a folder."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def weights(directory):
    return Path(directory, "model.safetensors").read_bytes()


def copy(source, target):
    """A copy of a folder's files."""
    Path(target).mkdir(parents=True)
    for name, content in contents(source).items():
        Path(target, name).write_bytes(content)


def save_after_every_step(patch=setattr, stop_after=None):
    """Make `Run` save after every step: its clock stands still but for one second a step.

    With `stop_after`, a Ctrl-C comes when so many steps are done.
    """
    clock, steps = SimpleNamespace(now=0.0), model.Run.__iter__

    def one_second_each(self):
        for step in steps(self):
            if step == stop_after:
                raise KeyboardInterrupt
            clock.now += 1
            yield step

    patch(model, "SAVE_SECONDS", 0)
    patch(model, "time", SimpleNamespace(time=lambda: clock.now))
    patch(model.Run, "__iter__", one_second_each)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder where all scripts have run, in small."""
    where, before = tmp_path_factory.mktemp("finished"), os.getcwd()
    os.chdir(where)
    for name in SCRIPTS:
        call(name, *["--steps", 60] * (name == "pretrain"))
        if name == "pretrain":
            call("sample", "--ask", 300)
    os.chdir(before)
    return where


@pytest.fixture
def home(finished, monkeypatch):
    """That folder, entered. Several tests share it, so each writes under a name of its own."""
    monkeypatch.chdir(finished)
    return finished


@pytest.fixture
def speak(home, monkeypatch, capfd):
    """A function that runs a script as its command line does, in this process: (status, printed, said)."""

    def run(name, *options, stdin=""):
        module = MODULES[name]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words(name, *options)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        status = 0
        try:
            model.run_script(module.main, module.parser)
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return run
