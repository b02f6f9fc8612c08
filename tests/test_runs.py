"""Promises that hold for every training script: nothing saved is lost, and every mistake has a sentence."""

import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    MODULES,
    SCRIPTS,
    call,
    contents,
    copy,
    metrics,
    run_args,
    save_after_every_step,
    start,
    weights,
)
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
from data import BadInput, Tokenizer, printable
from model import GPT, ScalarGPT, load_model, read_safetensors, safetensors_bytes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SAVING = "import conftest; conftest.save_after_every_step()"  # for `start`

every_script = pytest.mark.parametrize("name", SCRIPTS)


def on_the_clock(name, *options, stop_after=None):
    """A run that saves after every step, and is stopped after so many."""
    with pytest.MonkeyPatch.context() as patch:
        save_after_every_step(patch.setattr, stop_after)
        if stop_after is None:
            return call(name, *options)
        with pytest.raises(KeyboardInterrupt):
            call(name, *options)


@pytest.fixture(scope="module")
def straight(finished):
    """{script: metrics} of runs that nobody stopped, in runs/NAME-straight."""
    before = os.getcwd()
    os.chdir(finished)
    for name in SCRIPTS:
        on_the_clock(name, "--out", f"runs/{name}-straight")
    os.chdir(before)
    return {name: metrics(finished / f"runs/{name}-straight") for name in SCRIPTS}


def other_weights(directory):
    """Move all weights of a checkpoint a little."""
    path = Path(directory, "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path)


# ----------------------------------------------------------------------------------------------------
# Resuming


@every_script
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(home, straight, name):
    call(name, "--out", f"runs/{name}-again")
    call(name, "--out", f"runs/{name}-seed2", "--seed", 2)
    assert weights(f"runs/{name}-again") == weights(f"runs/{name}-straight") != weights(f"runs/{name}-seed2")


@every_script
@pytest.mark.parametrize("moment", [1, 4, "within the last step"])
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_was_not(home, straight, name, moment):
    """Weights bit for bit, and all metrics. The clock counts steps, so even the seconds must be equal."""
    out = f"runs/{name}-stopped{moment}"
    if moment == "within the last step":  # weights have changed already, nothing is saved yet
        log = model.Run.log
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            save_after_every_step(patch.setattr)

            def interrupted(self, **figures):
                log(self, **figures)
                if self.step == self.steps - 1:
                    raise KeyboardInterrupt

            patch.setattr(model.Run, "log", interrupted)
            call(name, "--out", out)
    else:
        on_the_clock(name, "--out", out, stop_after=moment)
    assert Path(out, "resume.pt").exists() and not Path(out, "model.safetensors").exists()
    torch.manual_seed(99)  # whatever happened in between
    on_the_clock(name, "--out", out, "--resume")
    assert weights(out) == weights(f"runs/{name}-straight")
    assert metrics(out) == straight[name]
    assert not Path(out, "resume.pt").exists()


@pytest.fixture
def dropout(monkeypatch):
    """What somebody may add: a dropout in each MLP, which takes its numbers from the global generator."""
    mlp = model.MLP.forward
    monkeypatch.setattr(model.MLP, "forward", lambda self, x: F.dropout(mlp(self, x), 0.3, self.training))


@every_script
def test_a_dropout_that_somebody_adds_is_resumed_bit_for_bit(home, straight, dropout, name):
    """It acts on what is learned, but not in PPO, whose ratio needs the same network twice."""
    whole, out = f"runs/{name}-dropout", f"runs/{name}-dropout-stopped"
    torch.manual_seed(5)
    on_the_clock(name, "--out", whole)
    on_the_clock(name, "--out", out, stop_after=4)
    torch.manual_seed(99)
    on_the_clock(name, "--out", out, "--resume")
    assert weights(out) == weights(whole)
    assert (weights(out) == weights(f"runs/{name}-straight")) == (name == "ppo")


@every_script
def test_a_dropout_leaves_all_that_is_measured_alone(home, monkeypatch, request, name):
    """At a rate that moves nothing: reference, samples and held-out figures are those without it."""
    figures = []
    for _ in range(2):
        call(name, "--out", f"runs/{name}-measured", "--lr", 1e-9)
        figures.append(metrics(f"runs/{name}-measured")[-1])
        request.getfixturevalue("dropout")
    for key in figures[0].keys() - {"seconds", "val_accuracy"}:  # of margins that are roundings
        assert figures[1][key] == pytest.approx(figures[0][key], abs=1e-6), key


def test_the_global_generator_is_seeded_by_seed_step_and_process(tmp_path, monkeypatch):
    def drawn(rank, seed, **more):
        monkeypatch.setattr(model, "RANK", rank)
        args = run_args(tmp_path / f"{rank}-{seed}")
        args.seed = seed
        torch.manual_seed(len(more))  # whatever was drawn before
        run = model.Run(args, "own", 5, [], [torch.nn.Linear(1, 1)], [])
        run.step = more.get("begin", 0)
        return [torch.rand(1).item() for _ in run]

    first = drawn(0, 1)
    assert drawn(0, 1, begin=2) == first[2:]
    assert len({*first, *drawn(1, 1), *drawn(0, 2)}) == 15


@every_script
def test_a_run_that_was_stopped_after_its_last_step_can_be_resumed(home, straight, monkeypatch, name):
    """The last step is done and saved, but no model was written yet."""

    def interrupt(*_, **more):
        raise KeyboardInterrupt

    out = f"runs/{name}-stopped-late"
    with monkeypatch.context() as patch:
        patch.setattr(MODULES[name], "save_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            on_the_clock(name, "--out", out)
    on_the_clock(name, "--out", out, "--resume")
    assert weights(out) == weights(f"runs/{name}-straight")
    assert metrics(out) == straight[name]


@every_script
def test_what_decides_no_result_may_change_when_a_run_goes_on(home, straight, tmp_path, name):
    """A folder that was moved and is written with a slash, and the device by its name."""
    on_the_clock(name, "--out", tmp_path / "before", stop_after=4)
    (tmp_path / "before").rename(tmp_path / "after")
    on_the_clock(name, "--out", f"{tmp_path}/after/", "--device", "cpu", "--resume")
    assert weights(tmp_path / "after") == weights(f"runs/{name}-straight")


def test_what_a_script_keeps_in_its_state_comes_back(tmp_path):
    """Numbers, tensors and lists; and networks of one's own that are given as models."""
    args = run_args(tmp_path)
    average = torch.nn.Linear(2, 2)
    run = model.Run(args, "own", 4, [], [average], [])
    run.state |= {"beta": 0.25, "mean": torch.arange(3.0), "seen": [1, "two"]}
    run.save()
    before, args.resume = average.weight.detach().clone(), True
    run = model.Run(args, "own", 4, [], [average], [])
    assert run.state["beta"] == 0.25 and run.state["seen"] == [1, "two"]
    assert run.state["mean"].tolist() == [0, 1, 2] and torch.equal(average.weight, before)


@every_script
def test_all_randomness_comes_from_generators_of_its_own(home, straight, monkeypatch, name):
    """The seeds of the whole process change nothing."""
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    call(name, "--out", f"runs/{name}-other-randomness")
    assert weights(f"runs/{name}-other-randomness") == weights(f"runs/{name}-straight")


defaults = lambda name: MODULES[name].parser.parse_args([])
CHANGES = [
    *[(name, "--lr") for name in SCRIPTS],
    ("dpo", "--beta"),
    *[(name, "the init weights") for name in SCRIPTS],
    ("pretrain", "the text"),
    *[(name, "the pairs") for name in SCRIPTS if name != "pretrain" and "data" in vars(defaults(name))],
    ("ppo", "the reward weights"),
    ("ppo rloo", "the reward weights"),
]


@pytest.mark.parametrize("name, what", CHANGES)
def test_a_run_does_not_go_on_from_something_else(home, tmp_path, name, what):
    name, *advantage = name.split()
    here = {part: tmp_path / part for part in ("init", "reward", "pairs", "text")}
    copy("runs/pretrain", here["init"])
    copy("runs/reward", here["reward"])
    here["pairs"].write_bytes(Path("runs/pretrain/preferences.jsonl").read_bytes())
    here["text"].write_text("one two three four five six seven\n" * 100)
    options, known = (["--init", here["init"], "--out", tmp_path / "out"], vars(defaults(name)))
    if what == "the text":
        options += ["--data", here["text"], "--block-size", 32]
    elif "data" in known and name != "pretrain":
        options += ["--data", here["pairs"]]
    options += ["--reward", here["reward"]] if "reward" in known else []
    options += ["--advantage", advantage[0]] if advantage else []
    on_the_clock(name, *options, stop_after=3)
    before = contents(tmp_path / "out")
    match what:
        case "--lr" | "--beta":
            options += [what, 0.0123]
        case "the init weights":
            other_weights(here["init"])
        case "the reward weights":
            other_weights(here["reward"])
        case "the text":
            here["text"].write_text(here["text"].read_text().replace("seven", "eight"))
        case "the pairs":
            here["pairs"].write_text(here["pairs"].read_text().replace("POST", "GHOST", 1))
    named = rf"{what} \(was 0" if what[:2] == "--" else r"the data or the first weights \(was "
    with pytest.raises(BadInput, match=r"resume.pt: changed since that run was stopped: " + named):
        call(name, *options, "--resume")
    after = contents(tmp_path / "out")
    assert {**after, "tokens.bin": 0} == {**before, "tokens.bin": 0}  # encoded text is made anew by every run


@every_script
def test_forgetting_resume_is_refused_and_loses_nothing(home, name):
    out = f"runs/{name}-forgotten"
    on_the_clock(name, "--out", out, stop_after=2)
    before = contents(out)
    with pytest.raises(BadInput, match=f"{out}/resume.pt: a run was stopped here; add --resume"):
        call(name, "--out", out)
    assert contents(out) == before


@every_script
def test_resuming_where_nothing_or_nonsense_is_saved_is_refused(home, name):
    out = f"runs/{name}-nothing"
    with pytest.raises(BadInput, match="resume.pt: not there, so there is nothing to resume"):
        call(name, "--out", out, "--resume")
    Path(out, "resume.pt").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="resume.pt: cannot be resumed"):
        call(name, "--out", out, "--resume")


# ----------------------------------------------------------------------------------------------------
# NaN, kill, full disk, Ctrl-C


@pytest.mark.parametrize(
    "name, more",
    [
        *[(name, ["--lr", 1e6]) for name in SCRIPTS],
        ("ppo", ["--lr", 1e6, "--epochs", 1]),  # the figures of this step are still fine, the weights are not
        ("ppo", ["--lr", 1e6, "--epochs", 1, "--advantage", "rloo"]),
        ("ppo", ["--lr", 2**31, "--epochs", 1]),  # the weights are still finite, the next logits are not
    ],
)
def test_a_run_that_stops_at_nan_leaves_the_finished_run_alone(home, tmp_path, name, more):
    copy(f"runs/{name}", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(BadInput, match=r"step \d+: .*--lr is too high"):
        call(name, "--out", tmp_path / "out", *more)
    assert contents(tmp_path / "out") == before


def assert_whole(out):
    """The checkpoint opens. A kill just between two of its files is noticed, and the run can be resumed."""
    try:
        load_model(out, network=None)
        Tokenizer.load(out)
    except BadInput as error:
        assert "no config.json" in str(error) and (out / "resume.pt").exists()


@every_script
def test_kills_at_any_moment_leave_what_was_saved_and_a_run_that_goes_on(home, name):
    """A run that saves after every step is killed at random moments and resumed, again and again.

    TRUST_KILLS says how often. The checkpoint always opens, and is either the old or the new one. A run that
    gets to its end has the weights of one that was left alone.
    """
    rng, steps = random.Random(name), ["--steps", 12 if name == "ppo" else 40]
    out, left_alone = Path("runs", f"{name}-killed"), f"runs/{name}-left-alone"
    began = time.time()
    call(name, *steps, "--out", left_alone)
    whole = time.time() - began
    copy(f"runs/{name}", out)  # something that must not be lost
    old, new = weights(out), weights(left_alone)
    kills, ends = int(os.environ.get("TRUST_KILLS", 2)), 0
    while kills or not ends:
        resume = ["--resume"] if (out / "resume.pt").exists() else []
        process = start(name, *steps, "--out", out, *resume, before=f"{SAVING}; print('ready', flush=True)")
        assert process.stdout.readline() == "ready\n"
        if kills:
            time.sleep(rng.uniform(0, whole))
            process.kill()
        _, said = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills -= 1
        else:
            assert process.returncode == 0, said
            assert weights(out) == new
            ends += 1
        assert weights(out) in (old, new)
        assert_whole(out)
        assert metrics(out)[-1]["final"]
        if (out / "resume.pt").exists():
            torch.load(out / "resume.pt", weights_only=True)


@pytest.mark.parametrize("renamed", [1, 3, 5])
def test_a_kill_between_two_files_of_a_checkpoint_is_noticed_and_mended(home, straight, renamed):
    """Each file gets its name at once, but six names take six moments."""
    out, replace, done = Path(f"runs/pretrain-torn{renamed}"), os.replace, []
    call("pretrain", "--out", out, "--vocab-size", 280)  # all files are others

    def killed(source, target):
        if Path(target).name != "resume.pt" and Path(target).suffix != ".jsonl":
            done.append(target)
            if len(done) > renamed:
                raise KeyboardInterrupt
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        on_the_clock("pretrain", "--out", out)
    with pytest.raises(BadInput, match="no config.json.*--resume, if it was stopped"):
        load_model(out)
    on_the_clock("pretrain", "--out", out, "--resume")
    assert weights(out) == weights("runs/pretrain-straight")
    load_model(out)


def no_large_files():
    """For a child process: no file may grow beyond 6 kB, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


@every_script
def test_a_full_disk_is_said_and_harms_nothing(home, name):
    before = contents(f"runs/{name}")
    process = start(name, preexec_fn=no_large_files)
    _, said = process.communicate()
    assert process.returncode == 2 and "Traceback" not in said
    assert re.fullmatch(
        rf"{name}.py: .*File too large; what was saved before is untouched", said.splitlines()[-1]
    )
    assert contents(f"runs/{name}") == before


def test_a_disk_that_fills_up_while_a_run_saves_leaves_the_last_save(home, straight):
    out = "runs/dpo-filled"
    on_the_clock("dpo", "--out", out, stop_after=3)
    saved = Path(out, "resume.pt").read_bytes()
    process = start("dpo", "--out", out, "--resume", before=SAVING, preexec_fn=no_large_files)
    _, said = process.communicate()
    assert process.returncode == 2 and said.splitlines()[-1].endswith("what was saved before is untouched")
    assert Path(out, "resume.pt").read_bytes() == saved
    on_the_clock("dpo", "--out", out, "--resume")
    assert weights(out) == weights("runs/dpo-straight")


@every_script
@pytest.mark.parametrize("saved", [False, True], ids=["before the first step", "after a save"])
def test_ctrl_c_ends_in_one_sentence_that_says_how_to_go_on(home, straight, speak, name, saved):
    out, begin, save = Path(f"runs/{name}-ctrl-c-{saved}"), model.Run.__init__, model.Run.save

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def press(run, *how):
        (save if saved else begin)(run, *how)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        if saved:
            save_after_every_step(patch.setattr)
        patch.setattr(model.Run, "save" if saved else "__init__", press)
        status, _, said = speak(name, "--out", out)
    assert status == 130 and "Traceback" not in said
    if saved:
        assert said.splitlines()[-1].startswith(f"{name}.py: stopped; the same command with --resume")
        on_the_clock(name, "--out", out, "--resume")
        assert weights(out) == weights(f"runs/{name}-straight")
    else:
        assert said.splitlines()[-1] == f"{name}.py: stopped"
        assert not list(out.glob("resume.pt*"))


@pytest.mark.parametrize("moment", ["before the first step", "after a save"])
def test_ctrl_c_from_outside_ends_a_long_run_in_one_sentence(home, moment):
    out = Path(f"runs/dpo-{moment.replace(' ', '-')}")
    line = "import model, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    line += f"; model.SAVE_SECONDS = {0 if moment == 'after a save' else 10**6}"
    process = start("dpo", "--out", out, "--steps", 100_000, before=line)
    if moment == "after a save":
        while not (out / "resume.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    else:
        assert any("pairs to learn from" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said
    if moment == "after a save":
        assert "--resume" in said.splitlines()[-1]
        assert torch.load(out / "resume.pt", weights_only=True)["step"] > 0
    else:
        assert said.splitlines()[-1] == "dpo.py: stopped"


# ----------------------------------------------------------------------------------------------------
# Refusals: a command, and the essential words of the sentence that it ends in

SPOILED = "transformer.h.0.mlp.c_fc.weight"  # which some checkpoints have with a number that is none
NEEDS_NUMBERS = [f"{name} --init runs/pretrain" for name in SCRIPTS] + ["ppo --reward runs/reward"]
NEEDS_NUMBERS += ["sample --prompt x --init runs/pretrain", "sample --compare runs/pretrain"]
NO_DEVICE = "cuda" if not torch.cuda.is_available() else "mps"
REFUSED = {
    "pretrain --steps 0": "0 is not a number from 1",
    f"pretrain --steps {'9' * 400}": "9 is not a number from 1",
    "pretrain --steps many": "argument --steps: invalid int value: 'many'",
    "pretrain --lr nan": "nan is not a number",
    "pretrain --lr 0": "0 is not a number",
    "pretrain --lr inf": "inf is not a number",
    "pretrain --seed -1": "-1 is not a number from 0",
    "pretrain --n-head 3": "not a multiple of n_head 3",
    "pretrain --block-size 20": "exceed the context, 20",
    "pretrain --vocab-size 10": "a vocabulary of 10 is too small",
    "pretrain --data nothing.txt": "nothing.txt: cannot be read (No such file",
    "pretrain --data .": ".: cannot be read (Is a directory)",
    "pretrain --data short.txt": "tokens are too few; ten times --block-size are needed",
    "pretrain --data latin.txt": "latin.txt:2: not UTF-8",
    "pretrain --data books.tar.gz": "books.tar.gz:1: not text; an archive must be unpacked first",
    "pretrain --init nowhere": "nowhere: no checkpoint there",
    "pretrain --init runs/reward": "runs/reward: a reward model, not a language model",
    "pretrain --init runs/dpo --n-layer 3": "--n-layer has no effect with --init",
    "pretrain --init runs/dpo --block-size 99": "--block-size has no effect with --init",
    "pretrain --init runs/dpo --out runs/dpo": "--out runs/dpo would overwrite the model that is read",
    "dpo --init runs/dpo": "--out runs/dpo would overwrite the model that is read",
    "dpo --init runs/bare": "for the embedded world, run python sample.py --ask --init runs/bare",
    "reward --init runs/bare": "runs/bare/preferences.jsonl: not there; give --data FILE or",
    "ppo --init runs/bare": "runs/bare/preferences.jsonl: not there; give --data FILE or",
    "ppo --out runs/reward": "--out runs/reward would overwrite the model that is read",
    "ppo --reward runs/dpo --out ./runs/../runs/dpo": "would overwrite the model that is read",
    "dpo --init nowhere": "nowhere: no checkpoint there",
    "dpo --data nothing.jsonl": "nothing.jsonl: cannot be read",
    "dpo --data few.jsonl": "few.jsonl: too few pairs (5, of which 0 have equal answers",
    "dpo --loss sft --beta 2": "--beta has no effect on --loss sft",
    "dpo --data bad.jsonl": "bad.jsonl:2: not JSON",
    "dpo --data equal.jsonl": "equal.jsonl: too few pairs (30, of which 30 have equal answers",
    "dpo --data alike.jsonl": "alike.jsonl: too few pairs (30, of which 30 have equal answers (cut to 100",
    "dpo --data no-prompt.jsonl": "no-prompt.jsonl:1: the prompt is empty",
    "dpo --data system.jsonl": 'system.jsonl:1: "system" would be lost',
    "dpo --beta 0": "0 is not a number",
    "dpo --loss ppo": "invalid choice: 'ppo'",
    "dpo --batch-size 5000": "not fewer than --batch-size",
    f"dpo --device {NO_DEVICE}": "there is none here",
    "reward --init nowhere": "nowhere: no checkpoint there",
    "reward --data few.jsonl": "few.jsonl: too few pairs (5, of which 0 have equal answers",
    "reward --batch-size 5000": "not fewer than --batch-size",
    "ppo --init nowhere": "nowhere: no checkpoint there",
    "ppo --init runs/reward": "runs/reward: a reward model, not a language model",
    "ppo --reward nowhere": "nowhere: no checkpoint there",
    "ppo --reward runs/pretrain": "runs/pretrain: not aligned, so it has no implicit reward",
    "ppo --reward runs/foreign": "runs/foreign: its tokenizer is not that of runs/pretrain",
    "ppo --data few.jsonl": "few.jsonl: 5 prompts",
    "ppo --beta -1": "-1 is not a number from 0",
    "ppo --batch-size 3": "3 is not a number from 4",
    "sample --init nowhere --prompt x": "nowhere: no checkpoint there",
    "sample --init runs/pretrain --prompt LONG": "leaves no room in a context of 200",
    "sample --top-p 2": "2 is not a number from 0 to 1",
    "sample --compare nowhere": "nowhere: no checkpoint there",
    "sample --compare runs/reward": "runs/reward: a reward model, not a language model",
    "sample --compare runs/pretrain runs/foreign": "runs/foreign: its tokenizer is not that of runs/pretrain",
    "sample --label 1 --init nowhere": "nowhere: no checkpoint there",
    "sample --label 1 --out array.json": "array.json: a JSON array",
    "sample --label 1 --top-k 5": "--top-k has no effect with --label",
    "sample --compare --top-p 0.5": "--top-p has no effect with --compare",
    "sample --compare --init runs/dpo": "--init has no effect with --compare",
    "sample --compare --max-new-tokens 9": "--max-new-tokens has no effect with --compare",
    "sample --compare --prompt x": "--prompt has no effect with --compare",
    "sample --ask --label 3": "--label has no effect with --ask",
    "sample --ask 20 --init nowhere": "nowhere: no checkpoint there",
    "sample --json": "--json has no effect without --compare",
    "sample --data few.jsonl": "--data has no effect without --label",
    "sample --label 1 --max-new-tokens 999": "--max-new-tokens 999: no room for a prompt; lower it",
    **{f"{name} --out file/x": "file/x: Not a directory" for name in SCRIPTS},
    **{
        f"{command}-{bad}": f"{command.split()[-1]}-{bad}: {SPOILED} has NaN or infinite numbers"
        for command in NEEDS_NUMBERS
        for bad in ("nan", "inf", "-inf")
    },
}


@pytest.fixture(scope="module")
def strange_files(finished):
    before = os.getcwd()
    os.chdir(finished)
    pairs = Path("runs/pretrain/preferences.jsonl").read_text().splitlines()
    Path("few.jsonl").write_text("\n".join(pairs[:5]))
    Path("bad.jsonl").write_text("\n".join([pairs[0], pairs[1][:-5], pairs[2]]))
    Path("equal.jsonl").write_text('{"prompt": "x", "chosen": "y", "rejected": "y"}\n' * 30)
    alike = {"chosen": "word " * 99 + "yes", "rejected": "word " * 99 + "no"}  # for 100 tokens and more
    data.write_records("alike.jsonl", [{"prompt": "x"} | alike] * 30)
    data.write_records("no-prompt.jsonl", [{"prompt": "", "chosen": "yes", "rejected": "no"}] * 30)
    data.write_records("system.jsonl", [{"prompt": "x", "system": "Be brief."} | alike] * 30)
    for source, bad in itertools.product(("runs/pretrain", "runs/reward"), ("nan", "inf", "-inf")):
        copy(source, f"{source}-{bad}")
        tensors = load_file(f"{source}/model.safetensors")
        tensors[SPOILED][3, 5] = float(bad)
        save_file(tensors, f"{source}-{bad}/model.safetensors")
    with tarfile.open("books.tar.gz", "w:gz") as archive:
        archive.add("few.jsonl")
    Path("array.json").write_text(json.dumps([json.loads(line) for line in pairs[:5]]))
    Path("short.txt").write_text("too short")
    Path("latin.txt").write_bytes("fine\nça\n".encode("latin-1"))
    Path("file").write_text("")
    call("pretrain", "--out", "runs/foreign", "--vocab-size", 270)
    copy("runs/pretrain", "runs/bare")
    Path("runs/bare/preferences.jsonl").unlink()
    os.chdir(before)


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(strange_files, speak, command):
    name, *options = command.replace("LONG", "word" * 200).split()
    if name == "pretrain" and "--data" in options:
        options += ["--out", "runs/refused"]  # the encoded text is written first
    there = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    status, _, said = speak(name, *options)
    assert status == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"{name}.py: ")
    assert REFUSED[command] in said.splitlines()[-1]
    assert {path: path.read_bytes() for path in there} == there  # nothing was harmed


@pytest.mark.parametrize("name", ["dpo", "reward", "ppo"])
def test_twenty_pairs_are_enough(home, name):
    lines = Path("runs/pretrain/preferences.jsonl").read_text().splitlines()[:20]
    Path("enough.jsonl").write_text("\n".join(lines))
    call(name, "--data", "enough.jsonl", "--steps", 1, "--batch-size", 8, "--out", f"runs/{name}-enough")
    assert metrics(f"runs/{name}-enough")[-1]["final"]


# ----------------------------------------------------------------------------------------------------
# Damaged files


def mutate(raw, rng):
    """A damaged copy: some bytes changed, removed, repeated or cut off."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 5)):
        at, n = rng.integers(0, len(raw) + 1), rng.integers(1, 9)
        match rng.integers(0, 5):
            case 0:
                raw[at : at + n] = rng.bytes(n)
            case 1:
                del raw[at : at + n]
            case 2:
                raw[at:at] = raw[max(0, at - n) : at]
            case 3:
                del raw[at:]
            case 4:
                raw[at : at + 1] = rng.choice(list(b'0123456789-"[]{},:\\\x00\xff\n')).tobytes()[:1]
    return bytes(raw)


@pytest.fixture
def little_memory():
    """A reader that a damaged file tells to ask for more than 32 GiB fails its test with a MemoryError."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_damaged_files_are_read_or_refused_but_never_crash(home, tmp_path, little_memory):
    """FUZZ says how many."""
    rng = np.random.default_rng(0)
    names = ("config.json", "vocab.json", "merges.txt")
    whole = {name: Path("runs/pretrain", name).read_bytes() for name in names}
    whole["model.safetensors"] = safetensors_bytes({"a": torch.ones(3, 2), "b": torch.ones(4)})
    pairs = b"\n".join(Path("runs/pretrain/preferences.jsonl").read_bytes().splitlines()[:3])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pairs += b"\n" + json.dumps({"prompt": "a", "chosen": chat, "rejected": chat}).encode()
    copy("runs/pretrain", tmp_path / "checkpoint")
    layer = torch.nn.Linear(1, 1)
    args = run_args(tmp_path)
    run = model.Run(args, "fuzz", 4, [], [layer], [])
    run.save()
    saved, args.resume = run.path.read_bytes(), True
    refused, n = {i: 0 for i in range(5)}, int(os.environ.get("FUZZ", 1500))
    for i in range(n):
        try:
            match i % 5:
                case 0:
                    (tmp_path / "w").write_bytes(mutate(whole["model.safetensors"], rng))
                    read_safetensors(tmp_path / "w")
                case 1:
                    zipped = data.gzip.compress(pairs) if i % 3 else pairs
                    (tmp_path / "p.jsonl").write_bytes(mutate(zipped, rng))
                    data.read_preferences(tmp_path / "p.jsonl")
                case 2:
                    vocab = mutate(whole["vocab.json"], rng) if i % 3 else whole["vocab.json"]
                    (tmp_path / "vocab.json").write_bytes(vocab)
                    (tmp_path / "merges.txt").write_bytes(mutate(whole["merges.txt"], rng))
                    Tokenizer.load(tmp_path)
                case 3:
                    (tmp_path / "checkpoint/config.json").write_bytes(mutate(whole["config.json"], rng))
                    load_model(tmp_path / "checkpoint")
                case 4:
                    run.path.write_bytes(mutate(saved, rng))
                    model.Run(args, "fuzz", 4, [], [layer], [])
        except BadInput as error:
            assert len(str(error).splitlines()) == 1
            refused[i % 5] += 1
    assert all(count > n / 20 for count in refused.values()) and sum(refused.values()) < n, refused


# ----------------------------------------------------------------------------------------------------
# The terminal


@pytest.mark.parametrize(
    "name, options, encoding, status, expected",
    [
        ("sample", ["--init", "runs/dpo", "--prompt", "POST: ünï 日本 €"], "latin-1", 0, "POST: ünï 日本 €"),
        ("sample", ["--init", "nö-€", "--prompt", "x"], "ascii", 2, "nö-€: no checkpoint there"),
        (
            "sample",
            ["--init", "runs/asked", "--ask", 20],
            "ascii",
            0,
            "the other pairs of answers were the same",
        ),
        ("data", [], "ascii", 0, "TL;DR:"),
    ],
)
def test_any_standard_output_will_do(home, name, options, encoding, status, expected):
    """Not only a UTF-8 one: nothing ends in an encoding error, and all is printed as UTF-8."""
    if "--ask" in options:
        copy("runs/pretrain", "runs/asked")
    process = start(name, *options, env={"PYTHONIOENCODING": encoding})
    printed, said = process.communicate()
    assert process.returncode == status and "Traceback" not in said, said
    assert expected in printed + said


# ----------------------------------------------------------------------------------------------------
# Several processes, other precision, compiled


def two_processes(name, *options):
    """Run a script in two processes, as the README says."""
    process = start(name, *options, env={"OMP_NUM_THREADS": "1"}, launcher=TORCHRUN)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    assert printed.count("saved to") == 1  # the first process alone prints


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "ppo"])
def test_two_processes_take_the_same_steps_as_one(home, name):
    """Roundings differ, and each further step multiplies them: up to 1e-4 of the loss after eight.

    After two it is 1e-6 or less. Processes that do not share their gradients differ by 7e-4 or more.
    """
    two_processes(name, "--steps", 2, "--out", f"runs/{name}-two")
    call(name, "--steps", 2, "--out", f"runs/{name}-one")
    one, two = metrics(f"runs/{name}-one"), metrics(f"runs/{name}-two")
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for figure in {"loss", "val_loss"} & a.keys():
            assert b[figure] == pytest.approx(a[figure], abs=2e-5), figure


def test_two_processes_of_ppo_earn_the_same_score_as_one(home):
    """Each process writes answers of its own, so only means can agree, to their standard error.

    The figure is the mean reward of the last four iterations. Four runs of one process with other seeds tell
    its standard deviation sd, from sampling and training together. So the difference of one run of two
    processes from the mean of the four has a standard error of sd √(1 + 1/4); 4 of them are allowed. The gain
    must be larger.
    """
    options = ["--reward", "length", "--steps", 8, "--batch-size", 64, "--beta", 0.05, "--lr", 0.02]
    late = lambda lines: np.mean([line["reward"] for line in lines[4:8]])
    one, first = [], []
    for seed in range(1, 5):
        call("ppo", *options, "--seed", seed, "--out", "runs/ppo-one")
        one.append(late(metrics("runs/ppo-one")))
        first.append(metrics("runs/ppo-one")[0]["reward"])
    two_processes("ppo", *options, "--out", "runs/ppo-two")
    two = late(metrics("runs/ppo-two"))
    allowed = 4 * np.std(one, ddof=1) * math.sqrt(1 + 1 / 4)
    assert abs(two - np.mean(one)) < allowed
    assert two - np.mean(first) > allowed


def test_bfloat16_is_timed_against_float32(monkeypatch):
    """Three rounds each; of 5, 2, 4 seconds in float32 and 9, 8, 7 in bfloat16 the shortest count."""
    rounds = iter([5, 2, 4, 9, 8, 7])
    measured = lambda products, number, repeat: [next(rounds) for _ in range(repeat)] if products() else []
    monkeypatch.setattr(model.timeit, "repeat", measured)
    assert model.slowdown("cpu") == 3.5 and not list(rounds)


@pytest.mark.parametrize("times, said", [(16.4, True), (1.2, False), (0.5, False)])
def test_where_bfloat16_is_slower_one_sentence_says_so(home, monkeypatch, speak, times, said):
    monkeypatch.setattr(model, "slowdown", lambda device: times)
    options = ["--steps", 1, "--out", "runs/slow-bf16"]
    status, printed, _ = speak("dpo", *options, "--dtype", "bfloat16")
    assert status == 0 and ("bfloat16 takes 16 times as long as float32 here" in printed) == said
    assert "times as long" not in speak("dpo", *options)[1]


@every_script
def test_bfloat16_stays_near_float32(home, straight, name):
    call(name, "--out", f"runs/{name}-bf16", "--dtype", "bfloat16")
    low, full = metrics(f"runs/{name}-bf16")[0], straight[name][0]
    figure = "kl" if "kl" in full else "loss"  # "kl" is before the first step: 0 but for the precision
    assert low[figure] != full[figure]  # it did something
    assert low[figure] == pytest.approx(full[figure], abs=0.1)
    assert not torch.is_autocast_enabled("cpu")  # and it is over


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "name, backend", [(name, "inductor" if name == "reward" else "eager") for name in SCRIPTS]
)
def test_a_compiled_network_gives_the_same_figures(home, straight, monkeypatch, name, backend):
    """ "eager" traces the network and leaves out the C++ compiler, which takes half a minute a script.

    What can't be traced is left as it is, and so is what was compiled too often. Here both are errors.
    """
    compile, used = torch.nn.Module.compile, []

    def with_backend(module, **how):
        used.append(module)
        compile(module, backend=backend, fullgraph=True, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", with_backend)
    torch._dynamo.reset()  # so that no code compiled for another script is taken
    call(name, "--out", f"runs/{name}-compiled", "--compile")
    assert used
    timeless = lambda line: {key: value for key, value in line.items() if key != "seconds"}
    for a, b in zip(straight[name], metrics(f"runs/{name}-compiled"), strict=True):
        assert timeless(b) == pytest.approx(timeless(a), rel=1e-3, abs=1e-4)


# ----------------------------------------------------------------------------------------------------
# Files from elsewhere, and memory


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpt2_directory_from_elsewhere_is_a_valid_start_and_goes_back(home, dtype):
    """Written by `transformers`, aligned here in every way, and opened there again with the same numbers.

    As they come: with and without "transformer." in the names, and with the masks that old files keep.
    """
    import transformers

    theirs, tokenizer = Path("runs", f"theirs-{dtype}"), Tokenizer.load("runs/pretrain")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer.vocab), n_positions=160, n_embd=16, n_layer=2, n_head=2
    )
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype))
    (gpt2.transformer if dtype == "float16" else gpt2).save_pretrained(theirs)
    if dtype == "bfloat16":
        masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 160, 160, dtype=torch.uint8)}
        save_file(load_file(theirs / "model.safetensors") | masks, theirs / "model.safetensors")
    data.write_files(theirs, tokenizer.files())

    tokens = torch.tensor([tokenizer.encode("POST: It rained all day.\nTL;DR: It")])
    with torch.no_grad():
        ours = load_model(theirs)(tokens)
        assert torch.allclose(ours, gpt2.float().eval()(tokens).logits, atol=1e-4)

    pairs = ["--data", "runs/pretrain/preferences.jsonl"]
    call("pretrain", "--init", theirs, "--steps", 2, "--out", theirs / "pretrain")
    call("dpo", "--init", theirs, *pairs, "--steps", 2, "--out", theirs / "dpo")
    call("reward", "--init", theirs, *pairs, "--steps", 2, "--out", theirs / "reward")
    call(
        "ppo", "--init", theirs, "--reward", theirs / "reward", *pairs, "--steps", 1, "--out", theirs / "ppo"
    )
    for name in ("pretrain", "dpo", "reward", "ppo"):
        kind = "GPT2ForSequenceClassification" if name == "reward" else "GPT2LMHeadModel"
        back, info = getattr(transformers, kind).from_pretrained(theirs / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            here = load_model(theirs / name, ScalarGPT if name == "reward" else GPT)(tokens)
            there = back.eval()(tokens).logits
        assert torch.allclose(here[:, -1:] if name == "reward" else here, there, atol=1e-4)


@every_script
@pytest.mark.parametrize("held_out", [30, 120])
def test_evaluation_takes_no_more_memory_when_more_is_held_out(home, monkeypatch, name, held_out):
    """What could grow with the held-out part is a batch, so this looks at the largest without gradients."""
    records = [json.loads(line) for line in Path("runs/pretrain/preferences.jsonl").open()][:250]
    more = [record | {"prompt": f"{i} {record['prompt']}"} for i in range(5) for record in records]
    data.write_records("many.jsonl", more[: 10 * held_out])
    Path("many.txt").write_text("one two three four five six seven\n" * 20 * held_out)
    forward, largest = model.Transformer.forward, {True: 0, False: 0}

    def watch(self, tokens, cache=None):
        largest[torch.is_grad_enabled()] = max(largest[torch.is_grad_enabled()], len(tokens))
        return forward(self, tokens, cache)

    monkeypatch.setattr(model.Transformer, "forward", watch)
    own = ["--data", "many.txt", "--block-size", 32] if name == "pretrain" else ["--data", "many.jsonl"]
    call(name, "--out", f"runs/{name}-many{held_out}", "--steps", 1, "--batch-size", 8, *own)
    assert 8 <= largest[False] <= largest[True] <= 16  # pairs are two rows


# ----------------------------------------------------------------------------------------------------
# A GPU need not be waited for


class Waits(TorchDispatchMode):
    """Counts operations whose result the program must wait for: a number, or a size that depends on it."""

    WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.watching, self.count = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func.overloadpacket.__name__ == "index" and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        self.count += self.watching and (indexed or func.overloadpacket.__name__ in self.WAIT)
        return func(*args, **kwargs or {})


@every_script
def test_no_step_waits_for_a_gpu_before_its_update_is_done(home, monkeypatch, name):
    """From the first step that checks nothing to the last update of each step; but sampling does wait."""
    waits, during, steps, generate = Waits(), [], model.Run.__iter__, model.generate

    def watched(self):
        for step in steps(self):
            waits.watching, waits.count = step > 0, 0
            during.append(0)
            yield step
            waits.watching = False

    def updating(optimizer, *_):  # AdamW reads its count of steps, which it keeps on the CPU
        waits.watching &= type(optimizer) is not torch.optim.AdamW

    def updated(optimizer, *_):
        waits.watching, during[-1] = len(during) > 1, waits.count

    def unwatched(*how, **more):
        before, waits.watching = waits.watching, False
        result = generate(*how, **more)
        waits.watching = before
        return result

    monkeypatch.setattr(model.Run, "__iter__", watched)
    for module in (model, MODULES[name]):
        if hasattr(module, "generate"):
            monkeypatch.setattr(module, "generate", unwatched)
    hooks = register_optimizer_step_pre_hook(updating), register_optimizer_step_post_hook(updated)
    with waits:
        call(name, "--out", f"runs/{name}-watched")
        waits.watching, waits.count = True, 0
        ones = torch.ones(3)
        assert (ones.sum().item(), len(ones[ones > 0])) == (3, 3) and waits.count == 2  # it does see them
    for hook in hooks:
        hook.remove()
    assert len(during) > 5 and not any(during)


# ----------------------------------------------------------------------------------------------------
# Two processes in one place

HOLDS = """import model, pathlib, time
wait = lambda *_, **more: (pathlib.Path('HELD').touch(), time.sleep(99))
model.Run.__iter__ = model.sample_texts = wait"""


@pytest.mark.parametrize("name", [*SCRIPTS, "ask"])
def test_a_place_where_a_run_is_going_is_refused_before_anything_is_touched(home, tmp_path, name):
    """And a kill leaves no lock behind."""
    out, held = tmp_path / "out", tmp_path / "held"
    copy("runs/pretrain", out)
    Path("book.txt").write_text("one two three four five six seven\n" * 300)
    script, options = name, ["--out", out]
    if name == "pretrain":
        options += ["--data", "book.txt", "--block-size", 16]
    if name == "ask":
        script, options = "sample", ["--init", out, "--ask", 20]
    process = start(script, *options, before=HOLDS.replace("HELD", str(held)))
    while not held.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    before = contents(out)
    with pytest.raises(
        BadInput, match="out: another run is writing there; wait for it, or give another place"
    ):
        call(script, *options)
    assert contents(out) == before
    process.kill()
    process.communicate()
    call(script, *options)


def test_two_people_who_label_into_one_file_lose_nothing(home, speak):
    """The second is refused while the first one is there. Lines that others append stay."""
    Path("shared.jsonl").write_text('{"prompt": "It is", "chosen": "a", "rejected": "b"}')  # without an end
    process = start("sample", "--label", 5, "--out", "shared.jsonl", stdin=-1)
    while not process.stdout.readline().startswith("  2 "):
        pass
    status, _, said = speak("sample", "--label", 5, "--out", "shared.jsonl", stdin="1\n")
    assert status == 2 and "shared.jsonl: another run is writing there" in said
    process.stdin.write("1\n")
    process.stdin.flush()
    for _ in range(200):  # ten seconds
        if len(Path("shared.jsonl").read_text().splitlines()) == 2:
            break
        time.sleep(0.05)
    with open("shared.jsonl", "a") as file:
        file.write('{"prompt": "My", "chosen": "a", "rejected": "b"}\n')
    process.communicate("2\n")
    prompts = [record["prompt"] for record in data.read_preferences("shared.jsonl")]
    assert len(prompts) == len({*prompts}) == 4 and prompts[0] == "It is" and prompts[2] == "My"


# ----------------------------------------------------------------------------------------------------
# What is said at the end


@pytest.mark.parametrize(
    "name, options, fault",
    [
        ("pretrain", ["--lr", 3], "no better than guessing"),
        ("reward", ["--lr", 3], "no better than guessing"),
        ("dpo", ["--lr", 5], "worse than guessing at what people say"),
        ("ppo", ["--lr", 1], "no better than the model that it started from"),
    ],
)
def test_a_broken_model_is_called_one(home, speak, name, options, fault):
    status, printed, _ = speak(name, *options, "--steps", 20, "--out", f"runs/{name}-broken")
    assert status == 0 and f"{fault}: try a lower --lr, or more --steps" in printed.splitlines()[-1]
    assert "Next:" not in printed


@pytest.mark.parametrize("beta", [1e3, 1e6])
def test_a_strength_that_multiplies_roundings_does_not_stop_a_run(home, beta):
    call("dpo", "--beta", beta, "--lr", 1e-6, "--out", "runs/dpo-strong")


def test_figures_at_the_end_say_which_value_is_good_and_answers_are_kept(home, speak):
    status, printed, _ = speak("pretrain", "--out", "runs/said")
    assert status == 0 and re.search(r"ratio +[\d.]+ +times the entropy; 1 is the best possible", printed)
    lines = [json.loads(line) for line in Path("runs/said/metrics.jsonl").read_text().splitlines()]
    answers = [line for line in lines if "answer" in line]
    assert [line["step"] for line in answers] == [0, 8] and lines[-1]["final"]
    assert all(f"step {line['step']:4}: {printable(line['answer'])}" in printed for line in answers)


def test_resuming_says_after_which_step(home, speak):
    on_the_clock("pretrain", "--out", "runs/said-again", stop_after=3)
    _, printed, _ = speak("pretrain", "--out", "runs/said-again", "--resume")
    assert "pretrain: goes on after step 3 → runs/said-again;" in printed


def test_a_reader_who_has_seen_enough_is_no_error(home):
    """As in `python sample.py … | head -1`."""
    process = start("sample", "--compare", "runs/pretrain", "runs/dpo", "--n-prompts", 2, "--answers", 8)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and "roken pipe" not in process.stderr.read()


@pytest.mark.parametrize("name", ["model", "data"])
def test_helpers_have_a_help(name):
    printed, said = start(name, "--help").communicate()
    assert printed.startswith(f"usage: {name}.py") and not said


@every_script
def test_rates_and_weights_of_each_update(home, monkeypatch, name):
    """The rate is (s + 1) / warm-up of the full one, then falls in a line; what counts is tokens or pairs."""
    rates, weights_given, real, module = [], [], model.update, MODULES[name]
    warmup, final, steps = {"pretrain": (20, 0.05, 24), "ppo": (5, 0, 8)}.get(name, (10, 0, 24))

    def spy(models, optimizers, weight):
        rates.append(optimizers[0].param_groups[0]["lr"] / optimizers[0].param_groups[0]["initial_lr"])
        weights_given.append(int(weight))
        real(models, optimizers, weight)

    masks = []
    monkeypatch.setattr(module, "update", spy)
    if name == "pretrain":
        loss = module.next_token_loss
        seen = lambda network, tokens, mask: torch.is_grad_enabled() and masks.append(mask.sum().item())
        monkeypatch.setattr(module, "next_token_loss", lambda *how: (seen(*how), loss(*how))[1])
    if name == "ppo":
        loss = module.policy_loss
        monkeypatch.setattr(module, "policy_loss", lambda *x: (masks.append(x[3].sum().item()), loss(*x))[1])
    options = ["--epochs", 1] if name == "ppo" else []
    call(name, *options, "--steps", steps, "--out", "runs/rates")
    assert rates[:3] == pytest.approx([1 / warmup, 2 / warmup, 3 / warmup])
    assert rates[-1] == pytest.approx(final + (1 - final) / (steps - warmup)) and len(rates) == steps
    assert weights_given == masks if masks else {*weights_given} <= {14, 15, 16}


@every_script
def test_all_random_numbers_depend_on_the_seed(home, monkeypatch, name):
    """Each generator that a script makes, but the one of the answers that are shown, is named after it."""
    named, module, rng = [], MODULES[name], np.random.default_rng
    monkeypatch.setattr(module, "seeded", lambda *x, **how: named.append(x) or model.seeded(*x, **how), False)
    monkeypatch.setattr(np.random, "default_rng", lambda *x: named.append(x) or rng(*x))
    call(name, "--seed", 77, "--steps", 2, "--out", "runs/seeded")
    assert len(named) >= 1 and all(77 in x for x in named), named


def test_a_kill_before_the_metrics_are_written_can_be_resumed(home, straight):
    """The run is over only when they are."""

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "write_records", killed)
        on_the_clock("pretrain", "--out", "runs/no-metrics")
    on_the_clock("pretrain", "--out", "runs/no-metrics", "--resume")
    assert metrics("runs/no-metrics") == straight["pretrain"]
