import errno
import json
import math
import platform
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as M
from data import Tokenizer, documents, pad_rows
from model import GPT, BadInput, Cache, Config, Muon, ScalarGPT, generate, load_model, orthogonalize, save_model
from model import filter_logits, read_safetensors, safetensors_bytes, set_lr, token_log_probs, write_files

CONFIG = Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4)
EOS = 60
NO_TEXT = SimpleNamespace(eos=EOS, pad=59, files=dict)  # a tokenizer without files


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():  # larger than at birth, so that an error in any part shows in the logits
        p.data += 0.2 * torch.randn_like(p)
    return model


TOKENS = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(1))

# ----------------------------------------------------------------------------------------------------
# The model is GPT-2


@torch.no_grad()
def test_our_checkpoint_opens_in_transformers(gpt, tmp_path):
    from transformers import GPT2LMHeadModel

    save_model(gpt, NO_TEXT, tmp_path)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.allclose(theirs.eval()(TOKENS).logits, gpt(TOKENS), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 1e-4)])
def test_their_checkpoint_opens_here(tmp_path, dtype, atol):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = vars(CONFIG) | {"activation_function": "gelu_new"}  # as GPT-2 has it
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert torch.allclose(theirs.float().eval()(TOKENS).logits, ours(TOKENS), atol=atol)
    save_model(ours, NO_TEXT, tmp_path)  # and out again: its activation goes with it
    assert torch.equal(load_model(tmp_path)(TOKENS), ours(TOKENS))


@torch.no_grad()
def test_scalar_checkpoint_opens_in_transformers_with_the_same_scores(tmp_path):
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(0)
    ours = ScalarGPT(CONFIG)
    save_model(ours, NO_TEXT, tmp_path)
    theirs, info = GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.num_labels == 1
    tokens = TOKENS.clone().clamp(max=58)
    lengths = [40, 25, 7]
    for row, n in zip(tokens, lengths):
        row[n:] = 59
    expected = torch.stack([ours(tokens)[i, n - 1] for i, n in enumerate(lengths)])
    assert torch.allclose(theirs.eval()(tokens).logits.squeeze(1), expected, atol=1e-4)
    assert torch.equal(load_model(tmp_path, ScalarGPT)(tokens), ours(tokens))


def test_tokenizer_files_open_in_transformers(tmp_path):
    from transformers import GPT2TokenizerFast

    texts = [p + r for p, r, _ in documents(100, seed=0)]
    ours = Tokenizer.train(texts, 400)
    save_model(GPT(Config(len(ours.vocab), 16, 8, 1, 1)), ours, tmp_path)
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert [theirs(t)["input_ids"] for t in texts[:20]] == [ours.encode(t) for t in texts[:20]]
    assert theirs.eos_token_id == ours.eos


@torch.no_grad()
def test_a_language_model_becomes_a_reward_model_with_a_new_head(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    scalar = load_model(tmp_path, ScalarGPT, new_head=True)
    assert torch.equal(scalar.transformer(TOKENS), gpt.transformer(TOKENS))
    assert scalar.score.weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.5)


def test_weights_of_another_shape_are_refused(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(BadInput, match="larger model|do not fit"):
        load_model(tmp_path)
    with pytest.raises(BadInput, match="no checkpoint"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"vocab_size": "many"}', "nonsense"])
def test_bad_configurations_and_tokenizers_are_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match="config.json: not a GPT-2 configuration"):
        load_model(tmp_path)
    (tmp_path / "vocab.json").write_text(content)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(BadInput, match="vocab.json: not a GPT-2 vocabulary|vocab.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(CONFIG)))
    with pytest.raises(BadInput, match="model.safetensors: cannot be read"):
        load_model(tmp_path)


# ----------------------------------------------------------------------------------------------------
# Cache, log-probabilities, sampling


@torch.no_grad()
def test_cached_equals_uncached_token_by_token(gpt):
    expected = gpt(TOKENS)
    cache = Cache(CONFIG, 3, 40, "cpu")
    got = [gpt.logits(gpt.transformer(TOKENS[:, :5], cache))]  # five at once, then one by one
    got += [gpt.logits(gpt.transformer(TOKENS[:, t : t + 1], cache)) for t in range(5, 40)]
    assert torch.allclose(torch.cat(got, dim=1), expected, atol=1e-5)


def test_wanted_places_and_their_gradients_are_the_same_as_among_all(gpt):
    wanted = torch.tensor([3, 39, 40, 77])
    weight = torch.randn(4, 32)
    runs = []
    for hidden in (gpt.transformer(TOKENS, wanted=wanted), gpt.transformer(TOKENS).view(120, 32)[wanted]):
        gpt.zero_grad()
        (hidden * weight).sum().backward()
        runs.append((hidden, [p.grad.clone() for p in gpt.parameters()]))
    assert torch.allclose(runs[0][0], runs[1][0], atol=1e-5)
    for some, every in zip(runs[0][1], runs[1][1]):
        assert torch.allclose(some, every, rtol=1e-4, atol=1e-4 * every.abs().max().item())


@torch.no_grad()
def test_the_future_is_hidden(gpt):
    changed = TOKENS.clone()
    changed[:, 20:] = 7
    assert torch.allclose(gpt(TOKENS)[:, :20], gpt(changed)[:, :20], atol=1e-5)
    assert not torch.allclose(gpt(TOKENS)[:, 20:], gpt(changed)[:, 20:], atol=1e-2)


@torch.no_grad()
def test_token_log_probs_equal_a_plain_loop(gpt):
    tokens, mask = pad_rows([[3, 4], [5]], [[6, 7, EOS], [8, EOS]])
    got = token_log_probs(gpt, tokens, mask)
    for row, n_prompt, n in ((0, 2, 5), (1, 1, 3)):
        for t in range(tokens.shape[1]):
            expected = 0.0
            if n_prompt <= t < n:
                expected = gpt(tokens[row : row + 1, :t])[0, -1].softmax(-1)[tokens[row, t]].log().item()
            assert got[row, t].item() == pytest.approx(expected, abs=1e-5)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]


def test_ragged_greedy_batch_equals_one_by_one(gpt):
    tokens, mask, _ = generate(gpt, PROMPTS, 12, EOS, temperature=0)
    for prompt, row, new in zip(PROMPTS, tokens, mask):
        text = list(prompt)
        for _ in range(12):  # no cache, no batch
            text.append(gpt(torch.tensor([text]))[0, -1].argmax().item())
            if text[-1] == EOS:
                break
        assert row[: len(prompt)].tolist() == prompt
        assert row[new].tolist() == text[len(prompt) :]


def test_rows_that_begin_alike_share_the_reading(gpt, monkeypatch):
    prompts = [[1, 2, 3, 4], [5, 6, 7], [1, 2, 3, 4], [1, 2, 3, 9, 8], [5, 6, 7]]  # two beginnings of three tokens
    alone = [generate(gpt, [prompt], 12, EOS, temperature=0) for prompt in prompts]
    read, forward = [], gpt.transformer.forward
    monkeypatch.setattr(gpt.transformer, "forward", lambda tokens, *a, **k: (read.append(tuple(tokens.shape)), forward(tokens, *a, **k))[1])
    tokens, mask, log_probs = generate(gpt, prompts, 12, EOS, temperature=0)
    assert read[:2] == [(2, 3), (5, 1)]
    for (one, one_new, one_log_probs), row, new, row_log_probs in zip(alone, tokens, mask, log_probs):
        assert row[new].tolist() == one[one_new].tolist()
        assert torch.allclose(row_log_probs[new], one_log_probs[one_new], atol=1e-5)


def test_sampled_log_probs_equal_scored_log_probs(gpt):
    tokens, mask, log_probs = generate(gpt, PROMPTS * 8, 20, EOS, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(token_log_probs(gpt, tokens, mask), log_probs, atol=1e-5)
    assert torch.equal(log_probs != 0, mask)


def test_eos_ends_a_row_and_counts(gpt):
    tokens, mask, _ = generate(gpt, PROMPTS, 20, EOS, temperature=0)
    eos = tokens[mask].mode().values.item()  # let a token that this model does write be the end
    tokens, mask, _ = generate(gpt, PROMPTS * 50, 20, eos)
    ended = 0
    for prompt, row, new in zip(PROMPTS * 50, tokens, mask):
        answer = row[new].tolist()
        assert eos not in answer[:-1] and 1 <= len(answer) <= 20
        assert answer[-1] == eos or len(answer) == 20
        assert new.nonzero()[0].item() == len(prompt)
        ended += answer[-1] == eos
    assert 0 < ended < 200


def test_seeded_sampling_repeats_itself(gpt):
    draw = lambda seed: generate(gpt, PROMPTS, 20, EOS, generator=torch.Generator().manual_seed(seed))[0].tolist()
    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_frequencies_follow_the_softmax(gpt, temperature):
    n = 20_000
    tokens, _, _ = generate(gpt, [[1, 2]] * n, 1, EOS, temperature, generator=torch.Generator().manual_seed(0))
    expected = (gpt(torch.tensor([[1, 2]]))[0, -1] / temperature).softmax(-1).detach().numpy()
    found = np.bincount(tokens[:, 2], minlength=61) / n
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-4)


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = lambda k, p: (filter_logits(logits, k, p) > -math.inf).squeeze(0).tolist()
    assert kept(0, 1.0) == [True, True, True, True]
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.5) == [True, False, False, False]
    assert kept(0, 0.6) == [True, True, False, False]  # the token that crosses the line stays
    assert kept(0, 0.01) == kept(0, 0.0) == [True, False, False, False]  # the likeliest always stays
    assert kept(3, 0.95) == [True, True, True, False]
    assert kept(99, 1.0) == [True, True, True, True]


def test_a_prompt_as_long_as_the_context_is_refused(gpt):
    with pytest.raises(BadInput, match="no room"):
        generate(gpt, [[1] * 48], 5, EOS)
    tokens, mask, _ = generate(gpt, [[1] * 47], 5, EOS)
    assert mask.sum() == 1  # one place was left


# ----------------------------------------------------------------------------------------------------
# The optimizer


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_orthogonalize_against_svd(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    inner = U.T @ orthogonalize(G).double() @ Vh.T  # diagonal of ones if it were the orthogonal factor
    assert (inner - inner.diag().diag()).abs().max() < 1e-3
    assert 0.6 < inner.diag().min() and inner.diag().max() < 1.25


def test_muon_step_moves_along_the_orthogonal_factor(gpt):
    optimizer = Muon(gpt, lr=0.1)
    p = gpt.transformer.h[0].mlp.c_fc.weight  # (128, 32)
    gpt(TOKENS).logsumexp(-1).mean().backward()
    before, G = p.detach().clone(), p.grad.clone()
    optimizer.step()
    update = (before - p.detach()).double() / (0.1 * math.sqrt(128 / 32))
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    assert ((update * (U @ Vh)).sum() / (update.norm() * (U @ Vh).norm())).item() > 0.95  # cosine


def test_everything_else_moves_as_torch_adamw_says(gpt):
    others = {n: p for n, p in gpt.named_parameters() if not (".h." in n and p.dim() == 2)}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} < set(others)
    copies = {n: p.detach().clone().requires_grad_() for n, p in others.items()}
    reference = torch.optim.AdamW(copies.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    optimizer = Muon(gpt, lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        gpt(TOKENS).logsumexp(-1).mean().backward()
        for n, p in others.items():
            copies[n].grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for n, p in others.items():
        assert torch.allclose(p, copies[n], atol=1e-5), n


def test_learning_rate_by_hand():
    optimizer = Muon(GPT(CONFIG), lr=1.0)
    rate = lambda step: (set_lr(optimizer, step, 110, warmup=10, final=0.1), optimizer.param_groups[0]["lr"])[1]
    assert [rate(0), rate(4), rate(10)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(60) == pytest.approx(0.55) and optimizer.param_groups[1]["lr"] == pytest.approx(0.275)


# ----------------------------------------------------------------------------------------------------
# safetensors


def test_safetensors_both_ways(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "t": torch.randn(4, 2).T}
    write_files(tmp_path, {"ours": safetensors_bytes(tensors)})
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], t) for n, t in tensors.items())
    half = {n: t.contiguous().to(torch.bfloat16) for n, t in tensors.items()}
    save_file(half, tmp_path / "theirs")
    assert all(torch.equal(t, half[n].float()) for n, t in read_safetensors(tmp_path / "theirs").items())


def test_a_cut_safetensors_file_is_refused(tmp_path):
    write_files(tmp_path, {"file": safetensors_bytes({"a": torch.randn(30)})})
    raw = (tmp_path / "file").read_bytes()
    for n in (0, 5, 20, len(raw) - 3):
        (tmp_path / "cut").write_bytes(raw[:n])
        with pytest.raises(BadInput, match="cut: not a whole safetensors file"):
            read_safetensors(tmp_path / "cut")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_files(tmp_path, {"file": safetensors_bytes({"a": torch.ones(3)}), "other": b"old"})
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(M.os, "fsync", lambda *a: (_ for _ in ()).throw(full))
    with pytest.raises(BadInput, match=r"No space left on device\); what was saved before is untouched"):
        write_files(tmp_path, {"other": b"new", "file": safetensors_bytes({"a": torch.zeros(3)})})
    assert read_safetensors(tmp_path / "file")["a"].tolist() == [1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
    assert (tmp_path / "other").read_bytes() == b"old"


def crafted(header, body=b""):
    """A safetensors file with any header, an object or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Q", 2**62) + b"{}",  # the header claims more than the file has
        struct.pack("<Q", 50) + b"{}",
        crafted(b"nonsense"),
        crafted(b"[" * 10_000),
        crafted([]),
        crafted({"a": 1}),
        crafted({"a": entry(0, 8, [3])}, bytes(8)),  # 3 numbers are 12 bytes
        crafted({"a": entry(0, 400, [100])}, bytes(8)),  # outside the file
        crafted({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),  # overlap
        crafted({"a": entry(4, 8, [1])}, bytes(8)),  # a gap
        crafted({"a": entry(0, 4, [1])}, bytes(8)),  # bytes that nobody names
        crafted({"a": entry(0, 4, [-1, -1])}, bytes(4)),
        crafted({"a": entry(0, 4, [1], "Q7")}, bytes(4)),
        crafted({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, raw):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(BadInput, match="file: not a whole safetensors file"):
        read_safetensors(tmp_path / "file")


def test_a_configuration_that_asks_for_more_than_there_is_costs_no_memory(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("vocab_size", 10**12), ("n_layer", 10**6), ("n_positions", 10**12)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(BadInput, match="larger model"):
            load_model(tmp_path)
    for name, value in (("model_type", "llama"), ("n_head", 5), ("n_layer", 0), ("activation_function", "relu")):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(BadInput, match="config.json"):
            load_model(tmp_path)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_kept_when_asked():
    """A block of 64 MB has 16,384 pages of 4 kB. Given back and taken again, the system must map each one anew."""
    program = """
import resource, sys, model
if sys.argv[1] == "kept":
    model.keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    root = Path(M.__file__).parent
    faults = {how: int(subprocess.check_output([sys.executable, "-c", program, how], cwd=root)) for how in ("kept", "given")}
    assert faults["kept"] < 20 < faults["given"], faults
