"""Runs that are stopped, killed, misled or cut short: nothing saved is lost, and every mistake has a sentence."""

import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import dpo
import model
import ppo
import pretrain
import reward
import sample
from data import Tokenizer
from model import BadInput, Checkpoint, ScalarGPT, Stopped, load_model, printable, read_safetensors

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "pretrain": (pretrain, ["--steps", 8, "--batch-size", 8, "--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--vocab-size", 300]),
    "dpo": (dpo, ["--steps", 8, "--batch-size", 16]),
    "reward": (reward, ["--practice", 4, "--steps", 4, "--batch-size", 16]),
    "ppo": (ppo, ["--steps", 6, "--batch-size", 16]),
}


def call(name, *options):
    """Run a script's main in this process, with its small settings."""
    module, small = SCRIPTS[name]
    module.main(module.parser.parse_args([str(x) for x in (*small, *options)]))


def start(name, *options, **how):
    """Start a script as a user does, with its small settings."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *(str(x) for x in (*SCRIPTS[name][1], *options))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small pretrained model, pairs, and every script's finished checkpoint in runs/NAME."""
    where = tmp_path_factory.mktemp("home")
    before = os.getcwd()
    os.chdir(where)
    call("pretrain", "--steps", 60, "--block-size", 160)
    call("dpo", "--pairs", 300)
    call("reward")
    call("ppo")
    yield where
    os.chdir(before)


def same_weights(a, b):
    return Path("runs", a, "model.safetensors").read_bytes() == Path("runs", b, "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(home, monkeypatch, name, stop_after):
    options = ["--block-size", 160] if name == "pretrain" else []
    if stop_after == 1:
        call(name, "--out", f"runs/{name}-straight", *options)
    save = Checkpoint.save

    def stop_here(self, step, extra=()):
        self.stopped = step == stop_after
        save(self, step, extra)

    out = f"{name}-stopped{stop_after}"
    monkeypatch.setattr(Checkpoint, "save", stop_here)
    with pytest.raises(Stopped, match=f"after step {stop_after}; .* --resume"):
        call(name, "--out", f"runs/{out}", *options)
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever happened in between
    call(name, "--out", f"runs/{out}", *options, "--resume")
    assert same_weights(out, f"{name}-straight")
    assert not Path("runs", out, "resume.pt").exists()
    straight, resumed = ([json.loads(line) for line in open(f"runs/{d}/metrics.jsonl")] for d in (f"{name}-straight", out))
    timeless = lambda lines: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]  # noqa: E731
    assert timeless(straight) == timeless(resumed)


def test_resume_without_a_stopped_run_or_with_other_options_is_refused(home, monkeypatch):
    with pytest.raises(BadInput, match="nothing to resume"):
        call("dpo", "--out", "runs/dpo", "--resume")
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, step, extra=(): (setattr(self, "stopped", True), save(self, step, extra)))
    with pytest.raises(Stopped):
        call("dpo", "--out", "runs/other")
    with pytest.raises(BadInput, match="--lr was 0.002"):
        call("dpo", "--out", "runs/other", "--lr", 0.1, "--resume")
    Path("runs/other/resume.pt").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="resume.pt: cannot be resumed"):
        call("dpo", "--out", "runs/other", "--resume")


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    process = start("dpo", "--out", "runs/interrupted", "--steps", 100_000)
    while not (Path("runs/interrupted/metrics.jsonl").exists() and Path("runs/interrupted/metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130 and "with --resume" in printed.splitlines()[-1] and "Traceback" not in printed
    assert torch.load("runs/interrupted/resume.pt", weights_only=True)["step"] > 0


# ----------------------------------------------------------------------------------------------------
# Kill, full disk, folders that cannot be written


# Runs a script as it is, but for one thing: it saves after every step, not after every 50.
SAVE_ALWAYS = """
import inspect, runpy, sys, textwrap, model
exec(textwrap.dedent(inspect.getsource(model.Checkpoint.save)).replace("step % 50 == 0", "True"), vars(model))
model.Checkpoint.save = model.save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_kills_at_any_moment_leave_what_was_saved_and_a_run_that_goes_on(home, name):
    """A run that saves after every step is killed at random moments and resumed, again and again. TRUST_KILLS says
    how often. The last checkpoint always opens, and a run that gets to its end has the weights of one that was left alone.
    """
    rng, kind = random.Random(name), ScalarGPT if name == "reward" else model.GPT
    out, straight = Path("runs", f"{name}-killed"), f"{name}-alone"
    steps = ["--steps", 12 if name == "ppo" else 40, *(["--block-size", 160] if name == "pretrain" else [])]
    out.mkdir()
    for file in Path("runs", name).iterdir():  # something that must not be lost
        (out / file.name).write_bytes(file.read_bytes())

    def launch(directory, *more):
        command = [sys.executable, "-c", SAVE_ALWAYS, ROOT / f"{name}.py", *SCRIPTS[name][1], *steps, "--out", directory, *more]
        where = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([str(x) for x in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=where)

    began = time.time()
    process = launch(Path("runs", straight))
    assert not process.wait(), process.communicate()
    whole = time.time() - began
    kills, ends = int(os.environ.get("TRUST_KILLS", 2)), 0
    while kills or not ends:
        process = launch(out, *(["--resume"] if (out / "resume.pt").exists() else []))
        try:
            _, printed = process.communicate(timeout=rng.uniform(0, whole) if kills else None)
            assert process.returncode == 0, printed
            assert same_weights(out.name, straight)
            ends += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills -= 1
        load_model(out, kind)
        Tokenizer.load(out)
        if (out / "resume.pt").exists():
            torch.load(out / "resume.pt", weights_only=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_is_said_and_harms_nothing(home, name):
    before = {path.name: path.read_bytes() for path in Path("runs", name).iterdir() if path.name != "metrics.jsonl"}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # no file may grow beyond 6 kB  # noqa: E731
    process = start(name, "--out", f"runs/{name}", *(["--block-size", 160] if name == "pretrain" else []), preexec_fn=limit)
    _, printed = process.communicate()
    assert process.returncode == 2 and "untouched" in printed.splitlines()[-1] and "Traceback" not in printed
    assert before == {path.name: path.read_bytes() for path in Path("runs", name).iterdir() if path.name != "metrics.jsonl"}


def test_a_place_that_cannot_be_written_is_said_before_any_work(home):
    Path("file").write_text("")
    for name in SCRIPTS:
        with pytest.raises(BadInput, match="--out file/x: cannot be made"):
            call(name, "--out", "file/x")


# ----------------------------------------------------------------------------------------------------
# Bad numbers, bad settings, bad files


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(home):
    with pytest.raises(BadInput, match=r"step \d+: loss is (nan|inf).*--lr is too high"):
        call("pretrain", "--out", "runs/nan", "--lr", 1e30, "--steps", 100)
    assert not Path("runs/nan/model.safetensors").exists()


def test_a_plain_reward_model_does_not_practise_and_learns_from_the_last_token_alone(home, monkeypatch):
    scores = reward.pair_scores
    monkeypatch.setattr(reward, "pair_scores", lambda *how: (scores(*how)[0], scores(*how)[1] * math.nan))
    call("reward", "--out", "runs/plain", "--plain")
    assert [json.loads(line).get("step") for line in open("runs/plain/metrics.jsonl")] == [4, None]  # of 4 + 4
    with pytest.raises(BadInput, match="loss is nan"):
        call("reward", "--out", "runs/not-plain")


@pytest.mark.parametrize(
    "command, message",
    [
        ("pretrain --steps 0", "0 is not above 0, or not finite"),
        ("pretrain --lr nan", "nan is not above 0, or not finite"),
        ("pretrain --n-head 3", "not a multiple of n_head"),
        ("pretrain --block-size 20", "do not fit into a context of 20"),
        ("pretrain --seed -1", "give 0 or more"),
        ("dpo --beta 0", "0 is not above 0, or not finite"),
        ("dpo --batch-size 5000", "not less than --batch-size"),
        ("dpo --device mps", "there is none here"),
        ("ppo --beta -1", "must not be below 0"),
        ("ppo --batch-size 6", "multiple of 4"),
        ("ppo --reward runs/foreign", "its tokenizer is not that of"),
        ("ppo --init runs/reward", "do not fit|score"),
        ("sample --compare runs/pretrain runs/foreign", "its tokenizer is not that of"),
        ("sample --label 1 --init nowhere", "nowhere/vocab.json: there is no such file"),
    ],
)
def test_bad_settings_end_in_one_sentence(home, capfd, command, message):
    if not Path("runs/foreign").exists():
        call("pretrain", "--out", "runs/foreign", "--block-size", 160, "--vocab-size", 270)
    name, *options = command.split()
    module, small = SCRIPTS.get(name, (sample, []))
    with pytest.raises(SystemExit) as end:
        sys_argv, sys.argv = sys.argv, [f"{name}.py", *map(str, small), *options]
        try:
            model.run(module.main, module.parser)
        finally:
            sys.argv = sys_argv
    printed = capfd.readouterr().err
    assert end.value.code == 2 and "Traceback" not in printed
    assert re.search(message, printed.splitlines()[-1]), printed


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(home, tmp_path):
    for file in Path("runs/pretrain").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"extra": len(vocab)}))
    with pytest.raises(BadInput, match="the model beside it knows"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([*lines[:5], "one two three", *lines[5:]]))
    with pytest.raises(BadInput, match="merges.txt:6: not two tokens"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_bytes("\r\n".join(lines).encode())  # saved on Windows
    assert Tokenizer.load(tmp_path) == Tokenizer.load("runs/pretrain")


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


def test_damaged_files_are_read_or_refused_but_never_crash(home, tmp_path):
    """FUZZ says how many; memory is bounded, because a reader that is told to ask for more fails the test."""
    rng = np.random.default_rng(0)
    whole = {name: Path("runs/pretrain", name).read_bytes() for name in ("config.json", "vocab.json", "merges.txt")}
    whole["model.safetensors"] = model.safetensors_bytes({"a": torch.ones(3, 2), "b": torch.ones(4)})
    pairs = b"\n".join(Path("runs/preferences.jsonl").read_bytes().splitlines()[:3]) + b'\n{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}'
    refused = 0
    n = int(os.environ.get("FUZZ", 1500))
    soft = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, soft[1]))
    for i in range(n):
        try:
            match i % 4:
                case 0:
                    (tmp_path / "w").write_bytes(mutate(whole["model.safetensors"], rng))
                    read_safetensors(tmp_path / "w")
                case 1:
                    (tmp_path / "p.jsonl").write_bytes(mutate(data.gzip.compress(pairs) if i % 3 else pairs, rng))
                    data.read_preferences(tmp_path / "p.jsonl")
                case 2:
                    (tmp_path / "vocab.json").write_bytes(mutate(whole["vocab.json"], rng) if i % 3 else whole["vocab.json"])
                    (tmp_path / "merges.txt").write_bytes(mutate(whole["merges.txt"], rng))
                    Tokenizer.load(tmp_path)
                case 3:
                    (tmp_path / "c").mkdir(exist_ok=True)
                    (tmp_path / "c/config.json").write_bytes(mutate(whole["config.json"], rng))
                    if i < 8:
                        (tmp_path / "c/model.safetensors").write_bytes(Path("runs/pretrain/model.safetensors").read_bytes())
                    load_model(tmp_path / "c")
        except BadInput as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    resource.setrlimit(resource.RLIMIT_AS, soft)
    assert n / 3 < refused < n  # the damage was real, and not everything is refused


# ----------------------------------------------------------------------------------------------------
# The terminal


def test_control_characters_are_escaped():
    assert printable("plain ünï 日本\nline") == "plain ünï 日本\nline"
    assert printable("\x1b[2Jred\r\x07\u202e") == "\\x1b[2Jred\\r\\x07\\u202e"


def test_a_person_labels_through_a_terminal_and_the_model_follows(home):
    """The person likes the shorter answer, skips one, takes one back, quits, and comes again."""
    Path("labels.jsonl").unlink(missing_ok=True)

    def session(keys, n):
        """Play a list of keys, "shorter" standing for the key of the shorter answer; then q."""
        master, slave = pty.openpty()
        command = [sys.executable, str(ROOT / "sample.py"), "--label", str(n), "--labels", "labels.jsonl", "--max-new-tokens", "12"]
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        seen, keys = "", list(keys)
        while True:
            try:
                seen += os.read(master, 4096).decode("utf-8", "replace")
            except OSError:  # the program has ended
                break
            if seen.endswith("q> "):
                key = keys.pop(0) if keys else "q"
                if key == "shorter":
                    answers = seen[seen.rindex("\r\n  1 ") :]
                    first, second = answers.split("\r\n  2 ")
                    key = "1" if len(first) - 6 <= len(second.split("\r\n[")[0]) else "2"
                seen = ""
                os.write(master, f"{key}\n".encode())
        assert process.wait() == 0
        return [json.loads(line) for line in Path("labels.jsonl").read_text().splitlines()]

    first = session(["shorter", "s", "shorter", "nonsense", "shorter", "u"], 10)
    assert len(first) == 2
    both = session(["shorter"] * 30, 30)
    assert len(both) == 32 and both[:2] == first
    assert len({record["prompt"] for record in both}) == 32
    shorter = [len(printable(r["chosen"])) <= len(printable(r["rejected"])) for r in both]
    assert sum(shorter) >= 31  # escapes on the screen may make one look longer
    call("dpo", "--data", "labels.jsonl", "--out", "runs/mine", "--steps", 30, "--beta", 0.1)
    tokenizer, prompts = Tokenizer.load("runs/pretrain"), [r["prompt"] for r in both] * 4
    lengths = {}
    for name in ("pretrain", "mine"):
        torch.manual_seed(0)
        texts = model.sample_texts(load_model(f"runs/{name}"), tokenizer, prompts, 12)
        lengths[name] = np.mean([len(text) for text in texts])
    assert lengths["mine"] < 0.9 * lengths["pretrain"]


# ----------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_take_the_same_steps_as_one(home, name):
    options = [*SCRIPTS[name][1], *(["--block-size", 160] if name == "pretrain" else [])]
    if name == "ppo":
        options += ["--steps", 3]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for out, launcher in ((f"{name}-one", [sys.executable]), (f"{name}-two", torchrun)):
        command = [*launcher, str(ROOT / f"{name}.py"), *map(str, options), "--out", f"runs/{out}"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved to") == 1  # the first process alone prints
    one, two = ([json.loads(line) for line in open(f"runs/{name}-{n}/metrics.jsonl")] for n in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for figure in ("loss", "val_loss", "score", "kl", "entropy"):
            if figure in a:
                assert b[figure] == pytest.approx(a[figure], abs=1e-4), figure


# ----------------------------------------------------------------------------------------------------
# Files of the user's own


@pytest.mark.parametrize("dtype, prefix", [("float32", "transformer."), ("float16", ""), ("bfloat16", "transformer.")])
def test_a_gpt2_directory_from_elsewhere_is_a_valid_start(home, dtype, prefix):
    """Written by `transformers` and `safetensors`: sampled from, aligned, scored with, and opened there again."""
    import transformers
    from safetensors.torch import save_file

    theirs = Path("runs", f"theirs-{dtype}")
    theirs.mkdir()
    model.write_files(theirs, Tokenizer.load("runs/pretrain").files())
    size = len(Tokenizer.load("runs/pretrain").vocab)
    config = transformers.GPT2Config(vocab_size=size, n_positions=160, n_embd=16, n_layer=2, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype))
    config.save_pretrained(theirs)
    weights = {n.replace("transformer.", prefix): t.contiguous() for n, t in gpt2.state_dict().items() if n != "lm_head.weight"}
    weights[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 160, 160, dtype=torch.uint8)  # old files keep their masks
    save_file(weights, theirs / "model.safetensors")
    call("dpo", "--init", theirs, "--data", "runs/preferences.jsonl", "--steps", 2, "--out", theirs / "dpo")
    call("reward", "--init", theirs, "--data", "runs/preferences.jsonl", "--out", theirs / "reward")
    call("pretrain", "--init", theirs, "--steps", 2, "--out", theirs / "more")
    call("ppo", "--init", theirs, "--reward", theirs / "reward", "--data", "runs/preferences.jsonl", "--steps", 1, "--out", theirs / "ppo")
    for name, kind in (("dpo", "GPT2LMHeadModel"), ("reward", "GPT2ForSequenceClassification"), ("ppo", "GPT2LMHeadModel")):
        _, info = getattr(transformers, kind).from_pretrained(theirs / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_pretraining_on_text_of_ones_own(home, capsys):
    """A text without any surprise: the loss must fall to almost nothing, in nats and in bits per byte."""
    Path("a.txt").write_text("one two three four five six seven\n" * 400, encoding="utf-8")
    Path("b.txt.gz").write_bytes(data.gzip.compress(b"one two three four five six seven\n" * 200))
    call("pretrain", "--data", "a.txt", "b.txt.gz", "--out", "runs/text", "--block-size", 32, "--steps", 150, "--lr", 0.02)
    final = json.loads(open("runs/text/metrics.jsonl").read().splitlines()[-1])
    ids = np.memmap("runs/text/tokens.bin", dtype=np.uint16, mode="r")
    tokenizer = Tokenizer.load("runs/text")
    assert tokenizer.decode(ids) == "one two three four five six seven\n" * 600 and (ids == tokenizer.eos).sum() == 2
    assert final["val_loss"] < 0.3 and final["entropy"] is None
    ours = final["val_loss"] / np.log(2) * len(ids) / (600 * 34)  # tokens are about as long everywhere
    assert final["bits_per_byte"] == pytest.approx(ours, rel=0.1)
    Path("short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(BadInput, match="short.txt: .* too few"):
        call("pretrain", "--data", "short.txt", "--out", "runs/short", "--block-size", 32)
    Path("latin.txt").write_bytes("fine\nça\n".encode("latin-1"))
    with pytest.raises(BadInput, match="latin.txt:2: not UTF-8"):
        call("pretrain", "--data", "latin.txt", "--out", "runs/short")
    with pytest.raises(BadInput, match="nothing.txt: cannot be read"):
        call("pretrain", "--data", "nothing.txt", "--out", "runs/short")


@pytest.mark.parametrize("name", SCRIPTS)
def test_bfloat16_stays_near_float32(home, name):
    call(name, "--out", f"runs/{name}-bf16", "--dtype", "bfloat16", *(["--block-size", 160] if name == "pretrain" else []))
    call(name, "--out", f"runs/{name}-fp32", *(["--block-size", 160] if name == "pretrain" else []))
    low, full = (json.loads(open(f"runs/{name}-{kind}/metrics.jsonl").read().splitlines()[0]) for kind in ("bf16", "fp32"))
    figure = "kl" if name == "ppo" else "loss"  # before the first step: 0 but for the precision
    assert low[figure] != full[figure]  # it did something
    assert low[figure] == pytest.approx(full[figure], abs=0.1)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiled_network_gives_the_same_figures(home, name):
    options = ["--block-size", 160] if name == "pretrain" else []
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        call(name, "--out", f"runs/{name}-{out}", *options, *more)
    plain, compiled = ([json.loads(line) for line in open(f"runs/{name}-{out}/metrics.jsonl")] for out in ("plain", "compiled"))
    for a, b in zip(plain, compiled, strict=True):
        assert {k: v for k, v in b.items() if k != "seconds"} == pytest.approx({k: v for k, v in a.items() if k != "seconds"}, rel=1e-3, abs=1e-4)
