"""GPT-2 in and out, the cache, log-probabilities, sampling, optimizers, and checkpoints that lie."""

import argparse
import json
import math
import struct
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_args

import model as M
from data import BadInput, Tokenizer, batches, documents, pad_pairs, pad_rows, write_files
from model import GPT, Cache, Config, ScalarGPT, generate, load_model, save_model, token_log_probs
from model import filter_logits, final_scores, make_optimizers, number, read_safetensors
from model import safetensors_bytes, sample_texts, seeded, set_lr, token_values

CONFIG = Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4)
EOS = 60
NO_TEXT = SimpleNamespace(eos=EOS, pad=59, files=lambda **settings: {})  # a tokenizer without files


def grown(kind):
    """A model with larger weights than at birth, so that an error in any part shows in what it says."""
    model = kind(CONFIG, seeded("weights", 0))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=seeded("more", 0))
    return model


@pytest.fixture
def gpt():
    return grown(GPT)


@pytest.fixture
def scalar():
    return grown(ScalarGPT)


TOKENS = torch.randint(0, 61, (3, 40), generator=seeded(1))

# ----------------------------------------------------------------------------------------------------
# The model is GPT-2


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_our_checkpoint_opens_in_transformers(tmp_path, gpt, activation):
    from transformers import GPT2LMHeadModel

    ours = GPT(Config(**vars(CONFIG) | {"activation_function": activation}))
    ours.load_state_dict(gpt.state_dict())
    save_model(ours, NO_TEXT, tmp_path)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.allclose(theirs.eval()(TOKENS).logits, ours(TOKENS), atol=1e-4)
    assert torch.equal(load_model(tmp_path)(TOKENS), ours(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["whole", "without head"])
def test_their_checkpoint_opens_here(tmp_path, dtype, part):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = vars(CONFIG) | {"activation_function": "gelu_new"}  # as GPT-2 has it
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).to(dtype)
    (theirs if part == "whole" else theirs.transformer).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert torch.allclose(theirs.float().eval()(TOKENS).logits, ours(TOKENS), atol=1e-4)
    save_model(ours, NO_TEXT, tmp_path)  # and out again: its activation goes with it
    assert torch.equal(load_model(tmp_path)(TOKENS), ours(TOKENS))


@torch.no_grad()
def test_masks_and_a_head_of_its_own_as_in_old_files_are_passed_over(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48)
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = gpt.transformer.wte.weight
    write_files(tmp_path, {"model.safetensors": safetensors_bytes(tensors)})
    assert torch.equal(load_model(tmp_path)(TOKENS), gpt(TOKENS))


@torch.no_grad()
def test_scalar_checkpoint_opens_in_transformers_with_the_same_scores(scalar, tmp_path):
    from transformers import GPT2ForSequenceClassification

    save_model(scalar, NO_TEXT, tmp_path)
    theirs, info = GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.num_labels == 1
    lengths = [40, 25, 7]
    tokens = TOKENS.clamp(max=58)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    tokens[~mask] = 59
    found = theirs.eval()(tokens).logits.squeeze(1)
    assert torch.allclose(found, final_scores(scalar, tokens, mask), atol=1e-4)
    assert torch.equal(load_model(tmp_path, ScalarGPT)(tokens), scalar(tokens))


def test_tokenizer_files_open_in_transformers(tmp_path):
    from transformers import GPT2TokenizerFast

    texts = [document.prompt + document.response for document in documents(100, seed=0)]
    ours = Tokenizer.train(texts, 400)
    save_model(GPT(Config(len(ours.vocab), 16, 8, 1, 1)), ours, tmp_path)
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in texts[:20]] == [ours.encode(text) for text in texts[:20]]
    assert theirs.eos_token_id == ours.eos
    assert Tokenizer.load(tmp_path) == ours


def test_a_model_begins_as_gpt2_begins():
    """Radford et al.: N(0, 0.02), and smaller by √(2 layers) where a block adds to the stream."""
    model = GPT(Config(vocab_size=200, n_positions=64, n_embd=64, n_layer=8), seeded(0))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name
        else:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name
    tokens = torch.randint(0, 200, (4, 65), generator=seeded(0))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(200), abs=0.1)


def test_sizes_that_make_no_model_are_refused():
    with pytest.raises(BadInput, match="n_embd 32 is not a multiple of n_head 5"):
        Config(**vars(CONFIG) | {"n_head": 5})
    with pytest.raises(BadInput, match="'relu', not 'gelu'"):
        Config(9, activation_function="relu")


@torch.no_grad()
def test_a_shift_adds_the_same_to_every_score(scalar):
    before = scalar(TOKENS)
    scalar.shift(3.5)
    assert torch.allclose(scalar(TOKENS), before + 3.5, atol=1e-4)


# ----------------------------------------------------------------------------------------------------
# The cache


@torch.no_grad()
def test_the_future_is_hidden(gpt):
    changed = TOKENS.clone()
    changed[:, 20:] = 7
    assert torch.allclose(gpt(TOKENS)[:, :20], gpt(changed)[:, :20], atol=1e-5)
    assert not torch.allclose(gpt(TOKENS)[:, 20:], gpt(changed)[:, 20:], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[5, 7, 1, 27], [1] * 40, [1, 39], [39, 1], [13, 13, 14], [2, 38], [40]])
def test_cached_equals_uncached_in_pieces_of_any_size(gpt, sizes):
    """Several new tokens at once, after others: each of them sees all the old ones and its own past."""
    cache = Cache(CONFIG)
    assert cache.length == 0
    got = [gpt.head(gpt.transformer(piece, cache)) for piece in TOKENS.split(sizes, dim=1)]
    assert cache.length == 40
    assert torch.allclose(torch.cat(got, dim=1), gpt(TOKENS), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0, 2, 1], [1], [0, 1, 2]])
def test_a_cache_keeps_and_repeats_rows(gpt, rows):
    cache = Cache(CONFIG)
    gpt.transformer(TOKENS[:, :9], cache)
    cache.take(torch.tensor(rows))
    more = torch.randint(0, 61, (len(rows), 6), generator=seeded(2))
    got = gpt.head(gpt.transformer(more, cache))
    whole = torch.cat([TOKENS[rows, :9], more], dim=1)
    assert torch.allclose(got, gpt(whole)[:, 9:], atol=1e-5)
    cache.take(torch.arange(len(rows)) == len(rows) - 1)  # a mask of rows will do as well
    last = gpt.head(gpt.transformer(more[-1:, :2], cache))
    assert torch.allclose(last, gpt(torch.cat([whole[-1:], more[-1:, :2]], dim=1))[:, -2:], atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# What a model says of given tokens

PAIRS = [
    ([3, 4, 9, 2], [6, 7, EOS], [8, EOS]),
    ([5, 1, 1], [EOS], [9, 9, 9, 9, EOS]),
    ([7, 3, 5, 1, 8, 2], [4], [4, 4]),
]
TEXTS = [prompt + answer for which in (1, 2) for prompt, answer in ((p[0], p[which]) for p in PAIRS)]
ANSWER_STARTS = [len(pair[0]) for pair in PAIRS] * 2
EVERY_START = [(start, copies) for start in (1, 2, 3) for copies in (1, 2)]


def one_by_one(model, text):
    """What the model's head says after each token, each time from the whole text up to there, alone."""
    return [model(torch.tensor([text[: t + 1]]))[0, -1] for t in range(len(text))]


@pytest.mark.parametrize("start, copies", EVERY_START)
def test_token_log_probs_equal_a_plain_loop(gpt, start, copies):
    gpt = gpt.double()
    tokens, mask, first = pad_pairs(PAIRS)
    assert first == 3  # so there are no other starts
    got = token_log_probs(gpt, tokens, mask, start, copies)
    expected = torch.zeros(tokens.shape)
    for row, (text, begin) in enumerate(zip(TEXTS, ANSWER_STARTS)):
        said = one_by_one(gpt, text)
        for t in range(begin, len(text)):
            expected[row, t] = said[t - 1].softmax(-1)[text[t]].log().item()
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(got != 0, mask)


@pytest.mark.parametrize("start, copies", EVERY_START)
def test_final_scores_equal_a_plain_loop(scalar, start, copies):
    tokens, mask, _ = pad_pairs(PAIRS)
    got = final_scores(scalar.double(), tokens, mask, start, copies)
    expected = torch.stack([one_by_one(scalar, text)[-1] for text in TEXTS])
    assert torch.allclose(got.double(), expected, atol=1e-5)
    assert got.std() > 0.1


def test_many_answers_to_one_prompt_equal_rows_read_apart(gpt, scalar):
    prompt, answers = [3, 4, 9, 2], [[6, EOS], [EOS], [8, 8, 1, EOS], [6, 5], [7, 7, 7, 7, EOS]]
    tokens, mask, start = pad_rows([prompt] * len(answers), answers)
    for model, say in ((gpt, token_log_probs), (scalar, final_scores)):
        got = say(model.double(), tokens, mask, start, copies=len(answers))
        assert torch.allclose(got, say(model, tokens, mask), atol=1e-5)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_token_values_equal_a_plain_loop(scalar, start):
    """The value at an answer's token was said before it, when only the tokens to its left were there."""
    tokens, mask, _ = pad_pairs(PAIRS)
    got = token_values(scalar.double(), tokens, mask, start)
    expected = torch.zeros(tokens.shape)
    for row, (text, begin) in enumerate(zip(TEXTS, ANSWER_STARTS)):
        expected[row, begin : len(text)] = torch.stack(one_by_one(scalar, text)[begin - 1 : -1]).float()
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("kind, say", [(GPT, token_log_probs), (ScalarGPT, final_scores)])
def test_gradients_of_pairs_read_together_equal_those_of_rows_read_apart(kind, say, start):
    model = grown(kind).double()
    tokens, mask, _ = pad_pairs(PAIRS)
    weights = torch.randn(say(model, tokens, mask).shape, generator=seeded(0))
    found = []
    for how in ({"start": 1}, {"start": start, "copies": 2}):
        model.zero_grad()
        (say(model, tokens, mask, **how) * weights).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, apart in found[0].items():
        assert apart.abs().max() > 0, name
        assert torch.allclose(apart, found[1][name], rtol=1e-4, atol=1e-5 * apart.abs().max().item()), name


@pytest.mark.parametrize("start, copies", EVERY_START)
def test_a_score_is_the_last_answer_tokens_and_no_others(scalar, monkeypatch, start, copies):
    tokens, mask, _ = pad_pairs(PAIRS)
    read, head = [], scalar.head

    def remember(hidden):
        hidden.retain_grad()
        read.append(hidden)
        return head(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(scalar, "head", remember)
        scores = final_scores(scalar, tokens, mask, start, copies)
    scores.sum().backward()
    ends = torch.tensor([len(text) - 1 for text in TEXTS])
    counted = read[0].grad.abs().sum(-1) > 0  # where another answer of the head would change the score
    assert torch.equal(counted, torch.arange(start - 1, tokens.shape[1]) == ends[:, None])
    assert torch.allclose(scores, scalar(tokens)[torch.arange(6), ends], atol=1e-5)
    changed = torch.where(torch.arange(tokens.shape[1]) > ends[:, None], 33, tokens)  # after the end
    assert not torch.equal(changed, tokens)
    assert torch.allclose(final_scores(scalar, changed, mask, start, copies), scores, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# Sampling

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
NEVER = -1  # no token has this id


@torch.no_grad()
def slowly(gpt, prompt, n, eos=EOS):
    """The likeliest continuation: no cache, no batch."""
    text = list(prompt)
    while len(text) < min(len(prompt) + n, CONFIG.n_positions):
        text.append(gpt(torch.tensor([text]))[0, -1].argmax().item())
        if text[-1] == eos:
            break
    return text[len(prompt) :]


def read_shapes(gpt, monkeypatch):
    """A list that will hold the shape of all that the transformer reads."""
    shapes, forward = [], gpt.transformer.forward

    def remember(tokens, *how):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *how)

    monkeypatch.setattr(gpt.transformer, "forward", remember)
    return shapes


@pytest.mark.parametrize("temperature", [0, 1e-9])
def test_ragged_greedy_batch_equals_one_by_one(gpt, temperature):
    tokens, mask, _ = generate(gpt, PROMPTS, 12, EOS, temperature)
    for prompt, row, new in zip(PROMPTS, tokens, mask):
        assert row[: len(prompt)].tolist() == prompt
        assert row[new].tolist() == slowly(gpt, prompt, 12)
        assert new.nonzero()[0].item() == len(prompt)


def test_rows_that_begin_alike_share_the_reading(gpt, monkeypatch):
    prompts = [[1, 2, 3, 4], [5, 6, 7], [1, 2, 3, 4], [1, 2, 3, 9, 8], [5, 6, 7]]  # two beginnings of three
    alone = [slowly(gpt, prompt, 12) for prompt in prompts]
    shapes = read_shapes(gpt, monkeypatch)
    tokens, mask, _ = generate(gpt, prompts, 12, EOS, temperature=0)
    assert shapes[:2] == [(2, 3), (5, 1)]
    assert [row[new].tolist() for row, new in zip(tokens, mask)] == alone


def test_rows_that_ended_are_dropped_and_the_others_do_not_notice(gpt, monkeypatch):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 60, size=rng.integers(1, 8)).tolist() for _ in range(40)]
    endless = [slowly(gpt, prompt, 20, NEVER) for prompt in prompts]
    eos = max(range(61), key=lambda token: sum(token in text[:10] for text in endless))
    expected = [text[: text.index(eos) + 1] if eos in text else text for text in endless]
    assert 10 < sum(len(text) < 20 for text in expected) < 40
    shapes = read_shapes(gpt, monkeypatch)
    tokens, mask, _ = generate(gpt, prompts, 20, eos, temperature=0)
    assert [row[new].tolist() for row, new in zip(tokens, mask)] == expected
    assert shapes[1] == (40, 1) and shapes[-1][0] < 20  # more than half of the rows were gone


def test_sampled_log_probs_equal_scored_log_probs(gpt):
    tokens, mask, log_probs = generate(gpt, PROMPTS * 8, 20, EOS, generator=seeded(0))
    assert torch.allclose(token_log_probs(gpt, tokens, mask), log_probs, atol=1e-5)
    assert torch.equal(log_probs != 0, mask)


@torch.no_grad()
def test_log_probs_are_of_the_distribution_that_was_drawn_from(gpt):
    """At another temperature and among the three likeliest tokens: their softmax, of three numbers."""
    tokens, mask, log_probs = generate(gpt, PROMPTS * 8, 10, EOS, 0.7, top_k=3, generator=seeded(0))
    logits = gpt(tokens) / 0.7
    for row, t in mask.nonzero().tolist():
        top = logits[row, t - 1].topk(3)
        place = top.indices.tolist().index(tokens[row, t].item())  # it is one of the three
        expected = top.values.softmax(0)[place].log().item()
        assert log_probs[row, t].item() == pytest.approx(expected, abs=1e-4)


def test_eos_ends_a_row_and_counts(gpt):
    tokens, mask, _ = generate(gpt, PROMPTS, 20, NEVER, temperature=0)
    eos = tokens[mask].mode().values.item()  # let a token that this model does write be the end
    tokens, mask, _ = generate(gpt, PROMPTS * 50, 20, eos, generator=seeded(0))
    ended = 0
    for prompt, row, new in zip(PROMPTS * 50, tokens, mask):
        answer = row[new].tolist()
        assert eos not in answer[:-1] and 1 <= len(answer) <= 20
        assert answer[-1] == eos or len(answer) == 20
        assert new.nonzero().squeeze(1).tolist() == list(range(len(prompt), len(prompt) + len(answer)))
        assert not row[len(prompt) + len(answer) :].any()  # what follows is padding
        ended += answer[-1] == eos
    assert 0 < ended < 200


@pytest.mark.parametrize("most", [1, 2, 7, 45, 100])
def test_each_row_gets_as_many_new_tokens_as_asked_for_or_as_fit(gpt, most):
    """A short prompt beside a long one does not get more, and only the context gives fewer."""
    tokens, mask, log_probs = generate(gpt, PROMPTS, most, NEVER, generator=seeded(0))
    assert mask.sum(1).tolist() == [min(most, 48 - len(prompt)) for prompt in PROMPTS]
    assert tokens.shape == mask.shape == log_probs.shape == (4, min(7 + most, 48))


def test_a_prompt_as_long_as_the_context_is_refused(gpt):
    for prompts in ([[1] * 48], [[1], [1] * 48], [[1] * 60]):
        with pytest.raises(BadInput, match="leaves no room in a context of 48"):
            generate(gpt, prompts, 5, EOS)
    _, mask, _ = generate(gpt, [[1] * 47], 5, EOS)
    assert mask.sum() == 1  # one place was left


def test_seeded_sampling_repeats_itself(gpt):
    once = lambda seed: generate(gpt, PROMPTS, 20, EOS, generator=seeded(seed))[0].tolist()
    assert once(0) == once(0) != once(1)


def chi_square_is_small(found, expected):
    """Pearson's statistic of counts has mean df and variance 2 df: five standard deviations are allowed.

    What is expected fewer than five times is counted together.
    """
    rare = expected < 5
    found = np.append(found[~rare], found[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    found, expected = found[expected > 0], expected[expected > 0]
    df = len(expected) - 1
    statistic = ((found - expected) ** 2 / expected).sum()
    return statistic < df + 5 * math.sqrt(2 * df) + 5


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_frequencies_follow_the_softmax(gpt, temperature):
    n = 20_000
    tokens, _, _ = generate(gpt, [[1, 2]] * n, 2, NEVER, temperature, generator=seeded(0))
    expected = (gpt(torch.tensor([[1, 2]]))[0, -1] / temperature).softmax(-1)
    assert chi_square_is_small(np.bincount(tokens[:, 2], minlength=61), n * expected.numpy())
    first = tokens[:, 2].mode().values.item()  # and the second token, after the most frequent first one
    second = tokens[tokens[:, 2] == first, 3]
    expected = (gpt(torch.tensor([[1, 2, first]]))[0, -1] / temperature).softmax(-1)
    assert chi_square_is_small(np.bincount(second, minlength=61), len(second) * expected.numpy())
    other = expected.roll(1).numpy()  # the test can fail
    assert not chi_square_is_small(np.bincount(second, minlength=61), len(second) * other)


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.5, 0.25]]).log()

    def kept(k, p):
        kept_in_order, kept_shuffled = (filter_logits(logits.clone(), k, p) > -math.inf).tolist()
        assert [kept_shuffled[i] for i in (2, 3, 1, 0)] == kept_in_order  # each row by itself
        return kept_in_order

    assert kept(0, 1.0) == [True, True, True, True]
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.49) == [True, False, False, False]
    assert kept(0, 0.6) == [True, True, False, False]  # the token that crosses the line stays
    assert kept(0, 0.01) == kept(0, 0.0) == [True, False, False, False]  # the likeliest always stays
    assert kept(3, 0.95) == [True, True, True, False]
    assert kept(2, 0.7) == [True, True, False, False]  # of those two, the first alone has mass 2/3
    assert kept(2, 0.6) == [True, False, False, False]
    assert kept(99, 1.0) == [True, True, True, True]
    equal = filter_logits(torch.zeros(1, 4), 0, 0.5)  # two of four have that mass already
    assert (equal > -math.inf).sum() == 2
    filtered = filter_logits(logits, 3, 0.95)
    assert torch.equal(filtered[filtered > -math.inf], logits[filtered > -math.inf])  # what stays, stays so


def test_texts_are_continued_in_their_order_whatever_their_length():
    texts = [document.prompt + document.response for document in documents(50, seed=0)]
    tokenizer = Tokenizer.train(texts, 300)
    gpt = GPT(Config(len(tokenizer.vocab), 48, 16, 1, 2), seeded(0))
    gpt.transformer.wte.weight.data *= 30
    prompts = ["It", "It rained all day", "My cousin", "I", "It rained", "I had soup for", "The"]
    found = sample_texts(gpt, tokenizer, prompts, ("x",), 6, batch_size=3, temperature=0)
    for prompt, text in zip(prompts, found):
        tokens, mask, _ = generate(gpt, [tokenizer.encode(prompt)], 6, tokenizer.eos, temperature=0)
        assert text == tokenizer.decode(tokens[mask])
    assert len(set(found)) > 3


# ----------------------------------------------------------------------------------------------------
# The optimizers


def test_a_frozen_parameter_and_the_mean_gradient_of_two_processes(monkeypatch):
    """The other process has three times the gradient and three times the tokens: (1 · g + 3 · 3g) / 4."""
    network, learned = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1, bias=False)
    for p in network.parameters():
        p.requires_grad_(False)
    learned.weight.grad = torch.tensor([[0.04, 0.0]])
    both = torch.nn.Sequential(network, learned)
    monkeypatch.setattr(M, "WORLD_SIZE", 2)
    other = iter([torch.tensor([[0.36, 0.0]]), 3.0])  # that one's gradient times its weight, and the weight
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(next(other)))
    before = learned.weight.detach().clone()
    M.update([both], [torch.optim.SGD(learned.parameters(), lr=1.0)], weight=1)
    assert torch.allclose(before - learned.weight, torch.tensor([[0.1, 0.0]]))
    assert network.weight.grad is None


MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.mark.parametrize("kind", [GPT, ScalarGPT])
def test_muon_has_the_matrices_inside_the_blocks_and_adamw_all_the_rest(kind):
    model = kind(CONFIG)
    muon, adamw = make_optimizers(model, lr=0.5)
    assert type(muon) is M.Muon and type(adamw) is torch.optim.AdamW
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adamw)]
    assert sorted(held[0]) == sorted(f"transformer.h.{i}.{name}" for i in range(3) for name in MATRICES)
    assert sorted(held[0] + held[1]) == sorted(names.values())  # each once
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} < set(held[1])
    assert ("score.weight" in held[1]) == (kind is ScalarGPT)
    assert {group["lr"] for group in muon.param_groups} == {0.5}
    assert {group["lr"] for group in adamw.param_groups} == {0.25}


def test_without_a_gradient_nothing_moves(gpt):
    """That is, no weight decay."""
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    optimizers = make_optimizers(gpt, lr=0.5)
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in gpt.named_parameters():
        assert torch.equal(p, before[name]), name


def surprise(gpt):
    """A loss on fixed tokens."""
    return F.cross_entropy(gpt(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


def matrix(rows, columns, singular_values, seed=0):
    """U S Vᵀ with random U and V, in float64: (U, S, Vᵀ, and their product)."""
    generator = seeded("matrix", seed)
    S, k = torch.tensor(singular_values, dtype=torch.float64), len(singular_values)
    U, V = (torch.randn(n, k, dtype=torch.float64, generator=generator) for n in (rows, columns))
    U, V = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
    return U, S, V.T, U * S @ V.T


def five_times(s):
    """What Jordan's polynomial makes of singular values, applied five times to the numbers themselves."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("rows, columns", [(24, 24), (24, 96), (96, 24)])
def test_singular_values_become_the_polynomial_of_themselves(rows, columns):
    """Those of two decades and more; both matrices at once, as all of a network's are."""
    spread = [1.0, 0.7, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.001, 1e-4, 0.0]
    both = [matrix(rows, columns, spread, seed=1), matrix(columns, rows, spread[::-1], seed=2)]
    for (U, S, Vh, _), x in zip(both, M.orthogonalize([x.float() * 37 for *_, x in both])):
        wanted = five_times(S / S.norm())
        assert x.dtype == torch.float32
        assert torch.allclose(x.double(), U * wanted @ Vh, atol=1e-3)
        assert all(0.68 <= w <= 1.21 for w, s in zip(wanted, S / S.norm()) if s >= 0.002)  # as it promises
        assert wanted[S / S.norm() < 1e-3].max() < 0.5  # and what it doesn't


def test_muon_takes_the_steps_of_pytorchs_own_within_the_rounding_of_bfloat16():
    """Five steps, and changing gradients, so that the momentum counts, on matrices of three shapes."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with PyTorch 2.9")
    shapes = [(48, 16), (16, 16), (16, 64), (64, 16)]
    even = [0.5 + 0.03 * i for i in range(16)]  # well conditioned
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    optimizers = M.Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.0)
    for step in range(5):
        for optimizer, parameters in zip(optimizers, (ours, theirs)):
            for i, p in enumerate(parameters):
                p.grad = matrix(*p.shape, even, seed=(i, step))[-1].float()
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert ((a - b).norm() / b.norm()).item() < 0.02
        assert b.norm().item() > 0.1 * math.sqrt(16)  # further than one step would


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_muon_stays_in_the_direction_of_a_gradient_of_rank_1(autocast):
    """In bfloat16 it does not: 85% of its norm is rounding, and lies elsewhere."""
    u, v = torch.randn(64, generator=seeded(1)), torch.randn(128, generator=seeded(2))
    p = torch.nn.Parameter(torch.zeros(64, 128))
    p.grad = torch.outer(u, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        M.Muon([p], lr=1.0).step()
    direction = torch.outer(u, v) / (u.norm() * v.norm())
    along = (p.detach() * direction).sum()
    assert -1.21 < along < -0.68
    assert (p.detach() - along * direction).norm() < 1e-3 * abs(along)


def test_taller_matrices_take_longer_steps_and_those_without_a_gradient_none():
    """× √(rows / columns), so that their outputs move as much as those of square ones."""
    tall, wide, frozen = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 16), (16, 64), (16, 16)))
    tall.grad = matrix(64, 16, [1.0])[-1].float()
    wide.grad = matrix(16, 64, [1.0])[-1].float()
    M.Muon([tall, wide, frozen], lr=0.5).step()
    one = five_times(torch.tensor(1.0)).item()
    assert tall.norm().item() == pytest.approx(0.5 * 2 * one, rel=1e-4)
    assert wide.norm().item() == pytest.approx(0.5 * one, rel=1e-4)
    assert frozen.norm() == 0


def test_everything_else_moves_as_adam_says(gpt):
    """Kingma and Ba 2015, written out, at half the rate."""
    _, adamw = make_optimizers(gpt, lr=0.02)
    others = {name: p for name, p in gpt.named_parameters() if not name.endswith(MATRICES)}
    assert len(others) == 2 + 2 + 3 * (4 + 4)  # two embeddings, the last norm; per block 4 biases, 2 norms
    state = {name: (p.detach().double(), torch.zeros(()), torch.zeros(())) for name, p in others.items()}
    for step in range(1, 5):
        gpt.zero_grad()
        surprise(gpt).backward()
        for name, (x, m, v) in state.items():
            g = others[name].grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            x = x - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            state[name] = x, m, v
        adamw.step()
    for name, p in others.items():
        assert torch.allclose(p.double(), state[name][0], atol=2e-5), name


def test_both_together_learn(gpt):
    optimizers, before = make_optimizers(gpt, lr=0.02), surprise(gpt).item()
    for _ in range(30):
        gpt.zero_grad()
        surprise(gpt).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert surprise(gpt).item() < 0.3 * before


def test_learning_rate_by_hand():
    optimizers = make_optimizers(GPT(CONFIG), lr=1.0)

    def rates(step, **how):
        set_lr(optimizers, step, steps=110, warmup=10, **how)
        return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    assert rates(0) == pytest.approx([0.1, 0.05])
    assert rates(4) == pytest.approx([0.5, 0.25])
    assert rates(9) == rates(10) == pytest.approx([1.0, 0.5])
    assert rates(60) == pytest.approx([0.5, 0.25])
    assert rates(109) == pytest.approx([0.01, 0.005])
    assert rates(60, final=0.1) == pytest.approx([0.55, 0.275])
    assert rates(109, final=0.1) == pytest.approx([0.109, 0.0545])
    assert rates(0, final=0.1) == pytest.approx([0.1, 0.05])  # it starts over from the full rate


# ----------------------------------------------------------------------------------------------------
# Checkpoints


@torch.no_grad()
def test_a_language_model_becomes_a_reward_model_with_a_new_head(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    with pytest.raises(BadInput, match="a language model, not a reward model"):
        load_model(tmp_path, ScalarGPT)
    scalar = load_model(tmp_path, ScalarGPT, new_head=seeded(0))
    assert torch.equal(scalar.transformer(TOKENS), gpt.transformer(TOKENS))
    assert scalar.score.weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.5)


@torch.no_grad()
def test_a_reward_model_keeps_its_head_or_gets_a_new_one_and_is_no_language_model(scalar, tmp_path):
    save_model(scalar, NO_TEXT, tmp_path)
    assert torch.equal(load_model(tmp_path, ScalarGPT).score.weight, scalar.score.weight)
    fresh = load_model(tmp_path, ScalarGPT, new_head=seeded(0))
    assert not torch.equal(fresh.score.weight, scalar.score.weight)
    assert torch.equal(fresh.transformer(TOKENS), scalar.transformer(TOKENS))
    with pytest.raises(BadInput, match="a reward model, not a language model"):
        load_model(tmp_path)


def test_pairs_of_the_model_that_was_there_before_are_put_aside(gpt, tmp_path):
    (tmp_path / "preferences.jsonl").write_text("{}\n")
    save_model(gpt, NO_TEXT, tmp_path)
    names = ["config.json", "model.safetensors", "preferences.jsonl.old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / names[-1]).read_text() == "{}\n"


def reconfigure(directory, **changes):
    """Change a checkpoint's config.json."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 64},
        {"n_embd": 16},
        {"n_layer": 2},
        {"n_layer": 4},
        {"vocab_size": 60},
        {"vocab_size": 62},
        {"n_positions": 47},
    ],
)
def test_weights_of_another_shape_are_refused(gpt, tmp_path, changes):
    save_model(gpt, NO_TEXT, tmp_path)
    load_model(tmp_path)
    reconfigure(tmp_path, **changes)
    with pytest.raises(BadInput, match="the weights do not fit config.json") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_and_missing_weights_are_refused(gpt, tmp_path):
    with pytest.raises(BadInput, match="nowhere: no checkpoint there .*run pretrain.py"):
        load_model(tmp_path / "nowhere")
    save_model(gpt, NO_TEXT, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="model.safetensors: "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"7", b"null", b'{"vocab_size": "many"}', b"nonsense", b"\xff\xfe", b"[" * 10_000],
)
def test_bad_configurations_are_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match="config.json: not a GPT-2 configuration") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_type", "llama"),
        ("n_head", 5),
        ("n_head", 0),
        ("n_layer", "three"),
        ("n_layer", None),
        ("n_embd", [32]),
        ("n_embd", math.inf),
        ("activation_function", "relu"),
        ("activation_function", ["gelu"]),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 64),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_a_configuration_of_another_network_is_refused(gpt, tmp_path, name, value):
    save_model(gpt, NO_TEXT, tmp_path)
    reconfigure(tmp_path, n_inner=4 * 32)
    load_model(tmp_path)
    reconfigure(tmp_path, **{name: value})
    with pytest.raises(
        BadInput, match=r"config.json: .*" + ("llama" if name == "model_type" else name)
    ) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**12},
        {"n_layer": 10**6},
        {"n_positions": 10**12},
        {"n_embd": 10**9, "n_inner": 4 * 10**9},
        {"n_layer": 0},
        {"n_embd": -4, "n_inner": -16},
        {"vocab_size": 10**30},
    ],
)
def test_a_configuration_that_asks_for_more_than_there_is_costs_no_memory(gpt, tmp_path, changes):
    save_model(gpt, NO_TEXT, tmp_path)
    reconfigure(tmp_path, **changes)
    with pytest.raises(BadInput, match="do not fit config.json"):
        load_model(tmp_path)


def test_a_new_field_of_the_configuration_is_saved_and_read_by_its_name(gpt, tmp_path, monkeypatch):
    """Whatever its place among the others. At its default the network is still a GPT-2, and else not."""

    @dataclass
    class Wider(Config):
        n_experts: int = 1

    monkeypatch.setattr(M, "Config", Wider)
    save_model(GPT(Wider(**vars(CONFIG))), NO_TEXT, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    config = Wider(n_experts=3, **vars(CONFIG))
    save_model(GPT(config), NO_TEXT, tmp_path)
    assert load_model(tmp_path).config == config
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["n_experts"], saved["model_type"]) == (3, "changed-gpt2")
    monkeypatch.undo()
    with pytest.raises(BadInput, match="the network is 'changed-gpt2', here it is 'gpt2'"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change", ["no positions", "norms without a bias", "one matrix more", "a second head", "as many weights"]
)
def test_a_network_with_other_weights_does_not_say_that_it_is_a_gpt2(gpt, tmp_path, change):
    assert M.model_type(gpt) == "gpt2"
    match change:
        case "no positions":
            del gpt.transformer.wpe
        case "norms without a bias":
            gpt.transformer.ln_f = torch.nn.LayerNorm(32, bias=False)
        case "one matrix more":
            gpt.transformer.h[0].mlp.gate = torch.nn.Linear(32, 128)
        case "a second head":
            gpt = ScalarGPT(CONFIG)
            gpt.doubt = torch.nn.Linear(32, 1, bias=False)
        case "as many weights":
            gpt = ScalarGPT(CONFIG)
            gpt.doubt = torch.nn.Linear(32, 1, bias=False)
            gpt.transformer.ln_f = torch.nn.LayerNorm(32, bias=False)
    save_model(gpt, NO_TEXT, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "changed-gpt2"


def test_the_strength_of_an_implicit_reward_travels_with_the_checkpoint(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    assert load_model(tmp_path).beta is None
    save_model(gpt, NO_TEXT, tmp_path, beta=0.25)
    assert load_model(tmp_path).beta == 0.25


def test_a_directory_opens_as_what_it_is(gpt, scalar, tmp_path):
    for network, name in ((gpt, "a"), (scalar, "b")):
        (tmp_path / name).mkdir()
        save_model(network, NO_TEXT, tmp_path / name)
        assert type(load_model(tmp_path / name, network=None)) is type(network)


# ----------------------------------------------------------------------------------------------------
# safetensors


def test_safetensors_both_ways(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "t": torch.randn(4, 2).T, "s": torch.randn(())}
    write_files(tmp_path, {"ours": safetensors_bytes(tensors)})
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = read_safetensors(tmp_path / "ours")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        there = {n: t.contiguous().to(dtype) for n, t in tensors.items()}
        there["mask"] = torch.tensor([[0, 1], [255, 7]], dtype=torch.uint8)
        save_file(there, tmp_path / "theirs", metadata={"format": "pt"})
        found = read_safetensors(tmp_path / "theirs")
        assert found.keys() == there.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, there[name].float()), name


def test_a_cut_safetensors_file_is_refused(tmp_path):
    raw = safetensors_bytes({"a": torch.randn(30)})
    for n in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:n])
        with pytest.raises(BadInput, match="cut: not a whole safetensors file"):
            read_safetensors(tmp_path / "cut")


def crafted(header, body=b""):
    """A safetensors file with any header, an object or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_is_crafted_here_would_open_if_it_told_the_truth(tmp_path):
    header = {"b": entry(4, 12, [1, 2]), "a": entry(0, 4, [])}
    (tmp_path / "file").write_bytes(crafted(header, struct.pack("<3f", 1, 2, 3)))
    found = read_safetensors(tmp_path / "file")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": 1, "b": [[2, 3]]}


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Q", 2**62) + b"{}",  # it claims more than the file has
        struct.pack("<Q", 3) + b"{}",
        crafted({"a": entry(0, 4, [1])}, bytes(3)),
        crafted(b"nonsense"),
        crafted(b"\xff\xff"),
        crafted(b"[" * 10_000),
        crafted([]),
        crafted({"a": 1}),
        crafted({"a": entry(0, 8, [3])}, bytes(8)),  # 3 numbers are 12 bytes
        crafted({"a": entry(0, 400, [100])}, bytes(8)),  # outside the file
        crafted({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),  # overlap
        crafted({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)),  # twice the same
        crafted({"a": entry(4, 8, [1])}, bytes(8)),  # a gap
        crafted({"a": entry(0, 4, [1])}, bytes(8)),  # bytes that nobody names
        crafted({"a": entry(0, 4, [-1, -1])}, bytes(4)),
        crafted({"a": entry(0, -4, [-1])}, bytes(4)),
        crafted({"a": entry(0, 4, [1.0])}, bytes(4)),
        crafted({"a": entry(0, 4, "1")}, bytes(4)),
        crafted({"a": entry(0, 4, [1], "Q7")}, bytes(4)),
        crafted({"a": entry(0, 4, [1], ["F32"])}, bytes(4)),
        crafted({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)),
        crafted({"a": entry("0", "4", [1])}, bytes(4)),
        crafted({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)),
        crafted({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, raw):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(BadInput, match="file: not a whole safetensors file"):
        read_safetensors(tmp_path / "file")


# ----------------------------------------------------------------------------------------------------
# Options, and shares of a batch


@pytest.mark.parametrize(
    "kind, low, high, accepted, refused",
    [
        (int, 1, None, {"1": 1, " 12 ": 12}, ["0", "-1", "1.5", "", "one", "nan", "inf", "9" * 400]),
        (int, 0, 10, {"0": 0, "10": 10, "1_0": 10}, ["11", "-1"]),
        (float, 0, None, {"0": 0.0, "1e-5": 1e-5, "2": 2.0}, ["-1e-9", "nan", "inf", "-inf", "1e999", "x"]),
        (float, 0, 1, {"1": 1.0, "0.5": 0.5}, ["1.0001", "nan"]),
    ],
)
def test_numbers_of_options_are_finite_and_between_both_bounds(kind, low, high, accepted, refused):
    parse = number(kind, low) if high is None else number(kind, low, high)
    assert parse.__name__ == kind.__name__  # argparse says "invalid int value: 'one'"
    for text, value in accepted.items():
        assert parse(text) == value and type(parse(text)) is kind
    for text in refused:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            parse(text)


def test_options_without_effect_are_refused():
    parser = argparse.ArgumentParser()
    parser.add_argument("--top-k", type=int, default=0)
    M.refuse(parser, parser.parse_args([]), ["top_k"], "here")
    with pytest.raises(BadInput, match="^--top-k has no effect here; leave it out$"):
        M.refuse(parser, parser.parse_args(["--top-k", "3"]), ["top_k"], "here")


def test_random_numbers_of_one_purpose_depend_on_its_name_and_numbers_alone():
    once = lambda *seed: torch.rand(4, generator=seeded(*seed)).tolist()
    assert once("weights", 1) == once("weights", 1)
    found = [once(*seed) for seed in (("weights", 1), ("weights", 2), ("head", 1), ("answers", 1, 2), (1, 2))]
    assert len(set(map(tuple, found))) == 5


def test_the_shares_of_all_processes_are_the_batch(monkeypatch):
    monkeypatch.setattr(M, "WORLD_SIZE", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(M, "RANK", rank)
        shares.append(M.shares([list(range(10))])[0])
        with pytest.raises(BadInput, match="a batch is too small to feed 3 processes"):
            M.shares([[1, 2, 3], [1, 2]])
    assert sorted(row for share in shares for row in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("processes", [2, 8])
def test_every_batch_of_every_data_size_feeds_every_process(monkeypatch, processes):
    monkeypatch.setattr(M, "WORLD_SIZE", processes)
    for n in range(20, 201):
        found = batches(n, 16, np.random.default_rng(n))
        each = []
        for rank in range(processes):
            monkeypatch.setattr(M, "RANK", rank)
            each.append(M.shares(found))
            assert min(map(len, each[-1])) >= 1
        for step, rows in enumerate(found):
            assert sorted(i for share in each for i in share[step]) == sorted(rows)


def one_of_two(monkeypatch, *theirs):
    """Let this process be one of two; `theirs` is what the other one adds, call by call."""
    monkeypatch.setattr(M, "WORLD_SIZE", 2)
    given = iter(theirs)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(next(given)))


def test_a_process_counts_by_the_tokens_that_it_has(monkeypatch):
    """This one has 1 token and gradient (1, 0); the other 3 tokens and gradient (5, 8)."""
    network = torch.nn.Linear(2, 1, bias=False)
    network(torch.tensor([1.0, 0.0])).backward()
    one_of_two(monkeypatch, 3 * torch.tensor([[5.0, 8.0]]), 3)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *how: None)
    idle = SimpleNamespace(param_groups=[{"params": [network.weight]}], step=lambda: 0, zero_grad=lambda: 0)
    M.update([network], [idle], weight=1)
    assert network.weight.grad.tolist() == [[(1 * 1 + 3 * 5) / 4, (1 * 0 + 3 * 8) / 4]]


def test_what_is_logged_is_the_mean_over_all_processes(monkeypatch, tmp_path):
    """This one has 1 token, loss 2 and figure 8; the other 3 tokens, loss 6 and figure 4."""
    run = M.Run(run_args(tmp_path), "mean", 1, [], [M.GPT(M.Config(8, 8, 8, 1, 1))], [])
    run.models = [GPT(Config(3, 4, 4, 1, 1), seeded(0))]
    for _ in run:
        one_of_two(monkeypatch, 3 * torch.tensor([6.0, 4.0]), 3)
        run.log(weight=torch.tensor(1), loss=2.0, figure=8.0)
    assert run.metrics == [{"step": 1, "loss": 5.0, "figure": 5.0}]


def test_no_token_without_probability_is_drawn(monkeypatch):
    """Not even where the uniform number is 0, the least that torch.rand gives."""
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.zeros(*size))
    token, log_prob = M.sample_token(torch.tensor([[-math.inf, 0.0, -math.inf]]), 1.0, 0, 1.0, None)
    assert token.tolist() == [1] and log_prob.tolist() == [0]


def test_a_long_gradient_is_cut_to_length_1():
    layer = torch.nn.Linear(2, 1, bias=False)
    before, layer.weight.grad = layer.weight.detach().clone(), torch.tensor([[3.0, 4.0]])
    M.update([layer], [torch.optim.SGD(layer.parameters(), lr=1.0)], weight=1)
    assert torch.allclose(before - layer.weight, torch.tensor([[0.6, 0.8]]), atol=1e-4)


def test_a_configuration_without_an_activation_has_gpt2_s(gpt, tmp_path):
    save_model(gpt, NO_TEXT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["activation_function"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).config.activation_function == "gelu_new"


def test_any_network_of_a_run_may_break_it(tmp_path):
    """The critic's weights, too, though no figure tells."""
    fine, broken = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    broken.weight.data.fill_(math.nan)
    run = M.Run(run_args(tmp_path), "two", 1, [], [fine, broken], [])
    with pytest.raises(BadInput, match="step 1: weights are NaN or infinite"):
        for _ in run:
            run.log(loss=1.0)


def test_autocast_sees_weights_that_change(tmp_path):
    args = run_args(tmp_path)
    args.dtype, args.device = "bfloat16", "cpu"
    with M.set_up(args):
        layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
        before = layer(x)
        layer.weight.data += 1
        assert (layer(x) - before).mean().item() == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("length", range(8))
def test_numbers_start_at_a_multiple_of_eight(length):
    raw = safetensors_bytes({"a" * (length + 1): torch.ones(1)})
    assert (8 + int.from_bytes(raw[:8], "little")) % 8 == 0
