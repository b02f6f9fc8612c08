"""Faults from the field, each with an input of its own: other people's models, data and programs, consoles of
every kind, a machine without a compiler, and the kernels of GPUs. More of them: REFUSED in test_runs.py."""

import errno
import io
import json
import math
import os
import random
import re
import shlex
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen
import transformers
import yaml
from conftest import MODULES, SCRIPTS, call, copy, metrics, start, words
from safetensors.torch import load_file, save_file, save_model
from test_runs import two_processes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model
from data import EOS, BadInput, Tokenizer, printable, read_preferences, write_files, write_records
from model import generate, load_model, seeded

WEIGHTS, POSITIONS, MASK = "model.safetensors", "transformer.wpe.weight", "transformer.h.1.attn.bias"


def edit(path, change):
    """Change the tensors of a file, or what its JSON says."""
    if path.suffix == ".safetensors":
        save_file(change(load_file(path)), path, {"format": "pt"})
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


# ----------------------------------------------------------------------------------------------------
# GPT-2 directories as hubs hold them

TEXT = "POST: It rained all day.\nTL;DR: <|im_start|>It rained"


@pytest.fixture
def theirs(tmp_path):
    """A directory that `transformers` wrote, with 270 tokens."""
    path, tokenizer = tmp_path / "theirs", Tokenizer.train([TEXT] * 9, 270)
    sizes = {"vocab_size": 270, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    made = transformers.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(made).save_pretrained(path)
    write_files(path, tokenizer.files())
    return path


KEYS = {  # of config.json: values, and the words of their refusal, or None
    "scale_attn_by_inverse_layer_idx": {True: "is True, not False", False: None},
    "scale_attn_weights": {False: "is False, not True"},
    "add_cross_attention": {True: "is True, not False"},
    "tie_word_embeddings": {False: "is False, not True"},
    "layer_norm_epsilon": {1e-6: "is 1e-06, not 1e-05"},
    "activation_function": {"relu": "is 'relu', not 'gelu' or 'gelu_new'", "gelu": None},
    "n_inner": {48: "is 48, not 64", 64: None, None: None},
    "reorder_and_upcast_attn": {True: None},
    "n_ctx": {32: None},
    "a_key_of_tomorrow": {"yes": None},
}
CASES = {(key, value): why and f"{key} {why}" for key in KEYS for value, why in KEYS[key].items()} | {
    "newer tokenizer": None,
    "a space first": "tokenizer_config.json: not of a GPT-2 tokenizer .add_prefix_space is not implemented",
    "a token first": "tokenizer_config.json: not of a GPT-2 tokenizer .add_bos_token is not implemented",
    "a token that is not made of bytes": "'雨' is not made of bytes",
    **dict.fromkeys(["bool mask", "uint8 mask", "float64", "one tied tensor"]),
    "int8 mask": r"not a whole safetensors file .I8 is not read, but F64, F32, F16, BF16, U8, BOOL",
    **dict.fromkeys(["more rows than tokens", "shards", "UTF-8 mark", "CRLF"]),
    "pickled": r"missing \(pytorch_model.bin is not read, since unpickling it may run anything",
    "a shard is lost": r"model-00001-of-\d+.safetensors: cannot be read \(No such file",
    "pickled shards": r"missing \(pytorch_model.bin is not read",
    "no weights": r"missing \(no weights there",
}


def change(path, case):
    """Let a directory be as others keep it."""
    network = transformers.GPT2LMHeadModel.from_pretrained(path)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(path)
    if case in ("one tied tensor", "shards", "a shard is lost", "pickled", "pickled shards", "no weights"):
        (path / WEIGHTS).unlink()
    match case:
        case key, value:
            edit(path / "config.json", lambda found: found | {key: value})
        case "newer tokenizer":
            tokenizer.save_pretrained(path)  # as tokenizer.json; the older files stay
        case "a token that is not made of bytes":
            edit(path / "vocab.json", lambda found: found | {"雨": 270})
        case "a space first" | "a token first":
            key = "add_prefix_space" if "space" in case else "add_bos_token"
            (path / "tokenizer_config.json").write_text(json.dumps({key: True}))
        case "bool mask" | "uint8 mask" | "int8 mask":
            dtype = getattr(torch, case.split()[0])
            edit(path / WEIGHTS, lambda found: found | {MASK: torch.ones(1, 1, 64, 64, dtype=dtype).tril()})
        case "float64":
            edit(path / WEIGHTS, lambda found: {name: tensor.double() for name, tensor in found.items()})
        case "one tied tensor":
            save_model(network, path / WEIGHTS, {"format": "pt"})
        case "more rows than tokens":
            network.resize_token_embeddings(320).weight.data[270:].normal_(std=0.5)
            network.save_pretrained(path)
        case "shards" | "a shard is lost":
            network.save_pretrained(path, max_shard_size="8KB")
            if case == "a shard is lost":
                next(path.glob("model-00001-of-*.safetensors")).unlink()
        case "pickled":
            torch.save(network.state_dict(), path / "pytorch_model.bin")
        case "pickled shards":
            torch.save(network.state_dict(), path / "pytorch_model-00001-of-00001.bin")
        case "UTF-8 mark":
            for name in ("config.json", "vocab.json"):
                (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
        case "CRLF":
            merges = (path / "merges.txt").read_bytes()
            (path / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))


@torch.no_grad()
def as_they_read(path):
    """Tokens of TEXT, and their logits."""
    tokens = transformers.GPT2TokenizerFast.from_pretrained(path)(TEXT, return_tensors="pt").input_ids
    return tokens, transformers.GPT2LMHeadModel.from_pretrained(path).eval()(tokens).logits


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_directory_from_elsewhere_is_read_as_they_read_it_or_refused(theirs, case):
    """The same tokens and logits, or one sentence for the true reason."""
    before = as_they_read(theirs)
    change(theirs, case)
    if CASES[case]:
        with pytest.raises(BadInput, match=CASES[case]):
            assert Tokenizer.load(theirs) and load_model(theirs)
    else:
        tokens, logits = before if case in ("UTF-8 mark", "CRLF") else as_they_read(theirs)
        assert Tokenizer.load(theirs).encode(TEXT) == tokens[0].tolist()
        assert torch.allclose(load_model(theirs)(tokens), logits, atol=1e-5)


def test_what_a_padded_model_says_is_decoded_as_they_decode_it(theirs, speak):
    change(theirs, "more rows than tokens")
    _, printed, _ = speak("sample", "--init", theirs, "--prompt", "It", "--max-new-tokens", 50)
    ours, network = Tokenizer.load(theirs), load_model(theirs)
    (tokens,), *_ = generate(network, [ours.encode("It")], 50, ours.eos, generator=seeded("talk", 1, 1))
    assert (tokens >= 270).sum() > 3  # ids without a token
    text = transformers.GPT2TokenizerFast.from_pretrained(theirs).decode(tokens, skip_special_tokens=True)
    assert printed == f"{printable(text)}\n"


# ----------------------------------------------------------------------------------------------------
# Rewards and pairs of one's own, pairs that repeat, contexts that differ


def monotonous(path, logit, *tokens):
    """A model that says these tokens, the likelier the higher their logit: that of others is 0."""
    network, tokenizer = load_model("runs/pretrain"), Tokenizer.load("runs/pretrain")
    norm, C = network.transformer.ln_f, network.config.n_embd
    norm.weight.data, norm.bias.data = torch.zeros(C), torch.ones(C)
    network.transformer.wte.weight.data.zero_()[[tokenizer.vocab[token] for token in tokens]] = logit / C
    model.save_model(network, tokenizer, path)


@pytest.mark.parametrize("says", [(80, EOS), (80, EOS, "Ġ")], ids=str)
def test_a_model_that_leaves_nothing_to_choose_is_not_asked_in_vain(home, tmp_path, speak, says):
    """It says nothing, or only blanks; the pairs of another model that lie there stay."""
    monotonous(tmp_path, *says)
    (tmp_path / "preferences.jsonl").write_text("older")
    status, _, said = speak("sample", "--ask", 20, "--init", tmp_path)
    assert status == 2 and said.endswith(
        "its two answers to a prompt are always the same; raise --temperature\n"
    )
    assert (tmp_path / "preferences.jsonl").read_text() == "older"


def test_two_processes_learn_from_pairs_of_which_one_would_be_left_over(home):
    """Of 25 pairs two have equal answers and two are held out: five batches of 4, and one pair."""
    records = read_preferences("runs/pretrain/preferences.jsonl")[:25]
    write_records("odd.jsonl", [r | {"rejected": r["chosen"]} for r in records[:2]] + records[2:])
    two_processes("dpo", "--data", "odd.jsonl", "--batch-size", 4, "--out", "runs/odd")


def test_where_labels_are_a_coins_a_model_is_right_as_often_as_a_coin(home):
    """Every row five times, learned by heart. 40 prompts are held out: the standard error is 1/2 / √40."""
    rng = random.Random(0)
    word = lambda: "".join(rng.choices(string.ascii_letters + string.digits + string.punctuation, k=6))
    rows = [{"prompt": f"{i}", "chosen": word(), "rejected": word()} for i in range(400)] * 5
    write_records("five.jsonl", rng.sample(rows, len(rows)))
    call("reward", *"--data five.jsonl --steps 300 --batch-size 32 --lr 0.02 --out runs/five".split())
    *_, last, final = metrics("runs/five")
    assert last["loss"] < 0.1  # it has learned them
    assert abs(final["val_accuracy"] - 1 / 2) < 4 * (1 / 2) / math.sqrt(40)


@pytest.mark.parametrize("name", ["dpo", "reward", "ppo"])
def test_prompts_that_are_longer_than_the_context_are_learned_from(home, name):
    """They lose their beginning, and so does the one whose answer is shown on the way."""
    records = read_preferences("runs/pretrain/preferences.jsonl")[:40]
    write_records("long.jsonl", [r | {"prompt": f"{i} {r['prompt'] * 9}"} for i, r in enumerate(records)])
    call(name, "--data", "long.jsonl", "--out", f"runs/long-{name}")


@pytest.mark.parametrize("block_size", [2, 4])
def test_the_shortest_context_still_shows_a_sample(home, block_size):
    options = "--data", "runs/pretrain/merges.txt", "--out", "runs/shortest", "--block-size", block_size
    call("pretrain", *options)


def shorter(source, path, context):
    """A copy of a checkpoint that has fewer positions."""
    copy(source, path)
    edit(path / "config.json", lambda found: found | {"n_positions": context})
    edit(path / WEIGHTS, lambda found: found | {POSITIONS: found[POSITIONS][:context].clone()})
    return path


@pytest.mark.parametrize("source, how", [("reward", "gae"), ("reward", "rloo"), ("dpo", "gae")])
def test_a_reward_may_have_a_shorter_context_than_the_policy(home, tmp_path, source, how):
    shorter(f"runs/{source}", tmp_path / "short", 60)
    call("ppo", "--reward", tmp_path / "short", "--advantage", how, "--out", tmp_path / "ppo")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("context, statuses", [(150, [0]), (100, [0, 2]), (40, [2])])
def test_models_whose_contexts_differ_are_compared_where_texts_fit(speak, tmp_path, order, context, statuses):
    names = [shorter("runs/dpo", tmp_path / "short", context), "runs/pretrain"][::order]
    status, printed, said = speak("sample", "--compare", *names, "--n-prompts", 4, "--answers", 8)
    right = "wins length" in printed if status == 0 else re.match(rf"sample.py: .*context.* {context}", said)
    assert status in statuses and right


def test_no_share_is_given_where_nothing_can_be_gained(speak, tmp_path):
    """The reference's answers have 32 words each, and score −5.4: their mean is that to rounding only."""
    monotonous(tmp_path, 80, "Ġmy")
    names = ["--compare", tmp_path, "runs/pretrain"]
    _, row = json.loads(speak("sample", *names, "--n-prompts", 4, "--answers", 7, "--json")[1])
    assert row["kl"] > 1 and row["score"] > -5 and row["share"] is row["share_se"] is None


# ----------------------------------------------------------------------------------------------------
# Notebooks, consoles, machines


def writer():
    """A console that can do no more than it must."""
    text = io.StringIO()
    return SimpleNamespace(write=text.write, flush=text.flush, getvalue=text.getvalue)


SHOWN = {
    "sample --init runs/dpo --prompt hi": (None, "hi"),
    "sample --init nowhere --prompt hi": (2, "sample.py: nowhere: no checkpoint there"),
    "pretrain --data runs/pretrain/merges.txt --block-size 8 --out runs/shown": (None, "saved to runs/shown"),
}


@pytest.mark.parametrize("console", [io.StringIO, writer], ids=["text", "writer"])
@pytest.mark.parametrize("command", SHOWN)
def test_scripts_run_whatever_the_standard_streams_are(home, monkeypatch, console, command):
    status, out, (name, *options) = None, console(), command.split()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *words(name, *options)])
        for place in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, place, out)
        try:
            model.run_script(MODULES[name].main, MODULES[name].parser)
        except SystemExit as end:
            status = end.code
    assert status == SHOWN[command][0] and SHOWN[command][1] in out.getvalue()


def test_autocast_is_off_after_a_main_that_raised(home):
    with pytest.raises(BadInput, match="nowhere.jsonl"):
        call("dpo", "--dtype", "bfloat16", "--data", "nowhere.jsonl")
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


def test_a_prompt_loses_the_carriage_return_at_its_end(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("POST: hi.\r\n\r\n", newline=""))
    asked = [MODULES["sample"].ask_user("prompt> ") for _ in range(3)]
    assert asked == ["POST: hi.", "", None]


# ----------------------------------------------------------------------------------------------------
# What is typed, and where it runs


@pytest.mark.parametrize(
    "command",
    [["pretrain", "--init", ""], ["dpo", "--data", ""], ["dpo", "--out", ""], ["sample", "--compare", ""]],
)
def test_a_variable_that_is_not_set_does_not_start_another_run(speak, command):
    """As in --init "$BASE": it was trained from scratch."""
    status, printed, said = speak(*command)
    assert status == 2 and printed == "" and f".py: {command[1]} is empty" in said


def test_a_standard_input_that_is_closed_is_an_end(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert MODULES["sample"].ask_user("prompt> ") is None


def test_a_table_is_told_what_to_become(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1\x15\x04\x00")
    with pytest.raises(
        BadInput, match="train.parquet:1: not text; .* and a parquet table saved as JSON lines"
    ):
        read_preferences(tmp_path / "train.parquet")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_next_command_can_be_pasted_whatever_a_folder_is_called(home, speak, name):
    out = f"runs/my {name}"
    _, printed, _ = speak(name, "--out", out)
    command = shlex.split(printed.rstrip("\n").rpartition("Next: ")[2])
    assert out in command and MODULES[command[1][:-3]].parser.parse_args(command[2:])


def test_lines_are_in_a_log_before_the_run_is_over(monkeypatch):
    seen, log = [], io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(sys, "stdout", log)
    model.run_script(
        lambda args: seen.append(print("one") or log.buffer.getvalue()), model.make_parser("x.py", "")
    )
    assert seen == [b"one\n"]


def test_a_run_whose_reader_goes_away_says_that_it_stopped(home, tmp_path):
    process = start("pretrain", "--out", tmp_path / "read")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 130 and process.stderr.read().endswith("pretrain.py: stopped\n")


def test_where_nothing_can_be_locked_a_run_goes_on_and_says_so(home, tmp_path, monkeypatch, capsys):
    """As on some network drives: the lock of a directory needs what it cannot have there."""

    def flock(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(data.fcntl, "flock", flock)
    call("dpo", "--out", tmp_path / "drive")
    assert f"{tmp_path}/drive: cannot be locked (Bad file descriptor)" in capsys.readouterr().out


def test_an_answer_that_fills_the_context_is_not_cut_in_silence(home, tmp_path, speak):
    monotonous(tmp_path, 80, "Ġmy")
    for n, full in ((30, False), (500, True)):
        _, printed, said = speak("sample", "--init", tmp_path, "--prompt", "x", "--max-new-tokens", n)
        assert printed.count(" my") == (199 if full else 30)
        assert said.endswith("(--max-new-tokens 500: its context of 200 tokens is full)\n") == full


@pytest.mark.parametrize("name, value", [("RANK", "1"), ("WORLD_SIZE", "2")])
def test_a_number_of_processes_that_was_left_in_the_environment_is_named(home, name, value):
    """RANK alone trained in silence and saved nothing."""
    process = start("sample", "--init", "runs/pretrain", "--prompt", "x", env={name: value})
    said = process.communicate()[1]
    assert process.returncode == 2 and said.startswith("sample.py: RANK or WORLD_SIZE is set, and not by")


def test_answers_in_groups_are_not_fewer_than_asked_for(home, speak):
    status, _, said = speak("ppo", "--advantage", "grpo", "--batch-size", 10, "--out", "runs/groups")
    assert status == 2 and said.endswith("answers come in groups of 4; give a multiple of 4\n")


# ----------------------------------------------------------------------------------------------------
# Files that are not what they seem

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"


def test_what_a_clone_without_git_lfs_leaves_is_called_so(theirs):
    """Of weights, and of preferences: .jsonl.gz is kept there, too."""
    for name, read in ((WEIGHTS, lambda _: load_model(theirs)), ("train.jsonl.gz", read_preferences)):
        (theirs / name).write_text(POINTER)
        with pytest.raises(BadInput, match=f"{name}: only a pointer to the file.*git lfs pull"):
            read(theirs / name)


def test_a_tensor_that_is_missing_is_called_missing(theirs):
    edit(
        theirs / WEIGHTS, lambda found: {name: tensor for name, tensor in found.items() if "wpe" not in name}
    )
    with pytest.raises(BadInput, match="do not fit config.json: 'transformer.wpe.weight' is missing"):
        load_model(theirs)


def test_answers_that_say_their_prompt_again_are_counted(tmp_path, capsys):
    rows = [
        {"prompt": f"{i}:", "chosen": f"{i}: a", "rejected": f"{i * again}: b"}
        for i in (1, 2)
        for again in (1, 3)
    ]
    write_records(tmp_path / "again.jsonl", rows)
    assert len(read_preferences(tmp_path / "again.jsonl")) == 4  # texts are taken as they are
    said = "again.jsonl: 2 pairs have the prompt once more in both answers; it is read twice there\n"
    assert capsys.readouterr().out.endswith(said)


def test_a_pipe_that_would_be_read_twice_is_refused(home, speak, tmp_path):
    """As in --data <(cat a b): the vocabulary had its text, and nothing was left to learn from."""
    os.mkfifo(tmp_path / "pipe")
    status, _, said = speak("pretrain", "--data", tmp_path / "pipe", "--out", "runs/piped")
    assert status == 2 and said.endswith(
        "pipe: a pipe, and it would be read twice; write it to a file, and give that\n"
    )


# ----------------------------------------------------------------------------------------------------
# Kernels: nothing may be used that a GPU lacks

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # chosen on CPUs only; see "composed" below
COMPOSED = {"CompositeImplicitAutograd", "CompositeExplicitAutograd"}


@pytest.fixture(scope="module")
def kernels():
    """{operation: the devices that have a kernel of it, and more}, from PyTorch's own table."""
    found, table = {}, Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    for entry in yaml.load(table.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        default = {} if "structured_delegate" in entry else {"CompositeImplicitAutograd": ""}
        kinds = {kind for keys in entry.get("dispatch", default) for kind in keys.split(", ")}
        kinds |= {"CUDA"} if "ufunc_inner_loop" in entry else {"CUDA", "MPS"} if kinds & COMPOSED else set()
        names = [entry["func"].split("(")[0], *filter(None, entry.get("autogen", "").split(", "))]
        found |= {name: (kinds, entry.get("structured_delegate")) for name in names}
    return {name: kinds | found.get(other, [set()])[0] for name, (kinds, other) in found.items()}


class Operations(TorchDispatchMode):
    """Collects all operations, each with the types of the numbers that it meets."""

    def __init__(self):
        super().__init__()
        self.met = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == "aten":  # others are marks for the profiler
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.met |= {(func.__name__.removesuffix(".default"), tensor.dtype) for tensor in tensors}
        return result


MORE = {"dpo": ("loss", ["ipo", "cdpo", "hinge", "sft"]), "ppo": ("advantage", ["rloo", "grpo"])}


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_operation_has_a_kernel_on_every_kind_of_gpu(home, kernels, name, composed):
    """Attention once as CPUs do it, and once in parts, as GPUs do it that have no such kernel."""
    key, values = MORE.get(name, ("dtype", ["bfloat16"]))
    with sdpa_kernel(SDPBackend.MATH if composed else SDPBackend.FLASH_ATTENTION), Operations() as seen:
        for value in [MODULES[name].parser.get_default(key), *values]:
            call(name, "--steps", 1, "--batch-size", 8, f"--{key}", value, "--out", f"runs/{name}-kernels")
        call("sample", "--init", "runs/dpo", "--prompt", "x", "--top-k", 5, "--top-p", 0.5)
    lacks = lambda table: {name for name, _ in seen.met if not {"CUDA", "MPS"} <= table[name]}
    known = {ATTENTION, f"{ATTENTION}_backward"} if not composed else set()
    assert lacks(kernels) == known
    assert torch.float64 not in {dtype for _, dtype in seen.met} and len(seen.met) > 60
    # It does see what would be wrong: an operation without a kernel, or a number that MPS does not have.
    assert lacks(kernels | {"mm": {"CPU", "CUDA"}}) == known | {"mm"}
    with seen:
        torch.ones(2).double()
    assert torch.float64 in {dtype for _, dtype in seen.met}


# ----------------------------------------------------------------------------------------------------
# What is saved here opens elsewhere


def test_a_checkpoint_works_in_transformers_as_it_is(home):
    """Prompts of unequal lengths in a batch: padded, continued greedily, and the same as here."""
    tokenizer, network = Tokenizer.load("runs/dpo"), load_model("runs/dpo")
    theirs = transformers.AutoTokenizer.from_pretrained("runs/dpo")
    there = transformers.AutoModelForCausalLM.from_pretrained("runs/dpo")
    assert (theirs.pad_token, theirs.eos_token, theirs.model_max_length) == ("<|pad|>", EOS, 200)
    prompts = [record["prompt"] for record in read_preferences("runs/pretrain/preferences.jsonl")[:5]]
    batch = theirs(prompts, padding=True, return_tensors="pt")
    assert len({len(tokenizer.encode(prompt)) for prompt in prompts}) > 1
    written = there.generate(**batch, max_new_tokens=12, do_sample=False)
    for prompt, row in zip(prompts, written):
        (ours,), *_ = generate(network, [tokenizer.encode(prompt)], 12, tokenizer.eos, temperature=0)
        assert theirs.decode(row, skip_special_tokens=True) == tokenizer.decode(ours)


def test_a_reward_model_gives_our_scores_in_a_pipeline(home):
    """Of texts that end with EOS, in batches of unequal lengths: the scores themselves, not their sigmoid."""
    tokenizer, scorer = Tokenizer.load("runs/reward"), load_model("runs/reward", model.ScalarGPT)
    records = read_preferences("runs/pretrain/preferences.jsonl")[:7]
    texts = [record["prompt"] + record["chosen"] for record in records]
    pipeline = transformers.pipeline("text-classification", model="runs/reward", batch_size=3)
    for text, there in zip(texts, pipeline([text + EOS for text in texts])):
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos]])
        assert there["score"] == pytest.approx(scorer(ids)[0, -1].item(), abs=1e-5)


def test_a_reward_model_that_is_read_before_its_end_is_refused(home, tmp_path):
    """As TRL's RewardTrainer writes one whose padding is EOS."""
    copy("runs/reward", tmp_path / "theirs")
    edit(tmp_path / "theirs/config.json", lambda found: found | {"pad_token_id": found["eos_token_id"]})
    with pytest.raises(BadInput, match="config.json: pad_token_id is EOS, so its score is read before EOS"):
        load_model(tmp_path / "theirs", model.ScalarGPT)
    load_model(tmp_path / "theirs", model.ScalarGPT, new_head=seeded(0))  # what is replaced does not matter


UNLIKE = {  # what a tokenizer.json may say that cuts text in another way: where, and what
    "normalizer": {"type": "NFC"},
    "post_processor": {"type": "TemplateProcessing", "special_tokens": {EOS: {"id": EOS, "ids": [0]}}},
    "model": {"ignore_merges": True},
    "pre_tokenizer": {"use_regex": False},
    "model ": {"type": "Unigram"},
    "model  ": {"end_of_word_suffix": "</w>"},
    " pre_tokenizer": {"type": "Metaspace"},
    "  pre_tokenizer": {"add_prefix_space": True},
}


def test_a_tokenizer_that_transformers_saved_is_read(theirs):
    """Version 5 writes tokenizer.json alone."""
    ours = Tokenizer.load(theirs)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(theirs)
    tokenizer.save_pretrained(theirs / "again")
    for name in ("vocab.json", "merges.txt"):
        (theirs / "again" / name).unlink(missing_ok=True)
    assert Tokenizer.load(theirs / "again") == ours and len(ours.merges) > 5
    (theirs / "vocab.json").unlink()
    assert Tokenizer.load(theirs) == ours


@pytest.mark.parametrize("part", UNLIKE)
def test_a_tokenizer_json_that_cuts_otherwise_is_refused_by_its_key(theirs, part):
    (theirs / "vocab.json").unlink()
    change = UNLIKE[part]
    edit(
        theirs / "tokenizer.json", lambda found: found | {part.strip(): (found[part.strip()] or {}) | change}
    )
    key = [*change][-1]
    with pytest.raises(
        BadInput, match=f"tokenizer.json: not of a GPT-2 tokenizer .{key} of {part.strip()} is"
    ):
        Tokenizer.load(theirs)


def test_an_adapter_is_told_to_merge(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        BadInput, match="no checkpoint there .no vocab.json.; it is an adapter, which must be merged"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_function_that_gives_no_number_is_not_blamed_on_the_rate(speak, monkeypatch, value):
    monkeypatch.setitem(MODULES["ppo"].REWARDS, "own", lambda prompt, response: value)
    status, _, said = speak("ppo", "--reward", "own", "--out", "runs/own")
    sentence = f"step 1: reward is {value}; what gives the reward is at fault, or --lr is too high\n"
    assert status == 2 and said.endswith(sentence)
