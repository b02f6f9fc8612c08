import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, metrics
from torch.autograd import gradcheck

import pretrain
from data import HELD_OUT, TRAINED, BadInput, Tokenizer, documents
from model import GPT, Config, load_model, seeded
from pretrain import next_token_loss

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
LINE = "one two three four fünf groß 七日 seven\n"  # letters of one, two and three bytes


def slow_loss(logits, tokens, mask):
    """Logits (B, T, V) at t are about the token at t + 1; all in Python numbers of 64 bits."""
    losses = []
    for b, t in mask.nonzero().tolist():
        row = logits[b, t - 1].tolist()
        losses.append(math.log(sum(math.exp(x) for x in row)) - row[tokens[b, t]])
    return sum(losses) / len(losses)


def test_the_loss_is_the_mean_surprise_under_the_mask():
    model = GPT(Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2), seeded(0))
    expected = slow_loss(model(TOKENS).double(), TOKENS, MASK)
    assert next_token_loss(model, TOKENS, MASK).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_model_that_knows_nothing_is_the_log_of_the_vocabulary():
    assert next_token_loss(
        lambda tokens: torch.zeros(*tokens.shape, 7), TOKENS, MASK
    ).item() == pytest.approx(math.log(7))


def test_the_gradient_of_the_loss(monkeypatch):
    """Against finite differences in float64, and against softmax − one-hot, over the number of tokens."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the loss itself casts to float32
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    loss = lambda logits: next_token_loss(lambda _: logits, TOKENS, MASK)
    assert gradcheck(loss, [logits])
    loss(logits).backward()
    expected = torch.zeros_like(logits)
    for b, t in MASK.nonzero().tolist():
        expected[b, t - 1] = logits.detach()[b, t - 1].softmax(0) / MASK.sum()
        expected[b, t - 1, TOKENS[b, t]] -= 1 / MASK.sum()
    assert torch.allclose(logits.grad, expected)


def test_the_first_token_is_given_and_never_guessed(home, monkeypatch):
    """Nor is padding: each batch asks for all tokens of its documents but the first."""
    seen, real = [], pretrain.next_token_loss

    def watch(model, tokens, mask):
        seen.append((tokens, mask))
        return real(model, tokens, mask)

    monkeypatch.setattr(pretrain, "next_token_loss", watch)
    call("pretrain", "--out", "runs/watched")
    tokenizer = Tokenizer.load("runs/watched")
    texts = []
    for tokens, mask in seen:
        assert not mask[:, 0].any()
        for row, guessed in zip(tokens, mask):
            ids = [row[0].item(), *row[guessed].tolist()]
            assert ids[-1] == tokenizer.eos and tokenizer.eos not in ids[:-1]
            texts.append(tokenizer.decode(ids))
    expected = documents(64, [1, TRAINED]) + documents(1024, [0, HELD_OUT])  # 8 steps of 8; the held-out ones
    assert sorted(texts) == sorted(d.prompt + d.response for d in expected)


def test_pretraining_leaves_a_checkpoint_and_its_figures(home):
    *logged, final = metrics("runs/pretrain")
    assert final["final"] is True and final["val_loss"] > final["entropy"] > 0 and final["seconds"] > 0
    assert logged[0]["loss"] > final["val_loss"]  # it has learned something
    assert logged[-1]["entropy"] == final["entropy"]  # beside the held-out loss
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        assert Path("runs/pretrain", name).stat().st_size > 0


def test_the_held_out_loss_and_the_entropy_beside_it(home):
    """Both once more: document by document, from the saved model, and from the source's own probabilities."""
    tokenizer, model = Tokenizer.load("runs/pretrain"), load_model("runs/pretrain")
    nats, tokens, n_bytes, surprise = 0.0, 0, 0, 0.0
    for prompt, response, _, log_prob in documents(1024, [0, HELD_OUT]):
        ids = torch.tensor(tokenizer.encode(prompt + response) + [tokenizer.eos])
        with torch.no_grad():
            log_probs = model(ids[None, :-1])[0].double().log_softmax(-1)
        nats -= log_probs[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        tokens += len(ids) - 1
        n_bytes += len(tokenizer.decode(ids[1:]).encode())
        surprise -= log_prob
    final = metrics("runs/pretrain")[-1]
    assert final["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert final["entropy"] == pytest.approx(surprise / tokens, rel=1e-9)
    assert final["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_pretraining_on_text_of_ones_own(home):
    """A text without any surprise: the loss must fall to almost nothing, in nats and in bits per byte."""
    Path("a.txt").write_text(LINE * 400, encoding="utf-8")
    Path("b.txt.gz").write_bytes(gzip.compress(LINE.encode() * 200))
    how = ["--block-size", 32, "--steps", 150, "--lr", 0.02]
    call("pretrain", "--data", "a.txt", "b.txt.gz", "--out", "runs/text", *how)
    tokenizer, model = Tokenizer.load("runs/text"), load_model("runs/text")
    ids = np.fromfile("runs/text/tokens.bin", dtype=np.uint16).astype(int)
    assert tokenizer.decode(ids) == LINE * 600 and (ids == tokenizer.eos).sum() == 2

    # The last tenth, in whole blocks, is held out.
    rows = len(ids) // 10 // 32
    held_out = torch.tensor(ids[-rows * 32 :]).view(rows, 32)
    with torch.no_grad():
        log_probs = model(held_out[:, :-1]).double().log_softmax(-1)
    nats = -log_probs.gather(2, held_out[:, 1:, None]).sum().item()
    texts = [tokenizer.decode(row[1:]) for row in held_out]
    assert "�" not in "".join(texts)  # no letter is cut in two
    n_bytes = sum(len(text.encode()) for text in texts)
    final = metrics("runs/text")[-1]
    assert final["val_loss"] == pytest.approx(nats / (rows * 31), rel=1e-3) and final["val_loss"] < 0.3
    assert final["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-3)
    assert final["entropy"] is None  # nobody knows it
    assert "bits_per_byte" in metrics("runs/text")[-2]


def test_a_stream_of_text_is_learned_from_everywhere_but_its_end(home, monkeypatch):
    """Blocks begin anywhere, none of them reaches into what is held out."""
    Path("numbers.txt").write_text(" ".join(str(i) for i in range(2000)), encoding="utf-8")
    seen, real = {True: [], False: []}, pretrain.next_token_loss

    def watch(model, tokens, mask):
        seen[torch.is_grad_enabled()] += [tuple(row) for row in tokens.tolist()]
        return real(model, tokens, mask)

    monkeypatch.setattr(pretrain, "next_token_loss", watch)
    call("pretrain", "--data", "numbers.txt", "--out", "runs/numbers", "--block-size", 16, "--steps", 20)
    ids = np.fromfile("runs/numbers/tokens.bin", dtype=np.uint16).tolist()
    starts = {tuple(ids[i : i + 16]): i for i in range(len(ids) - 15)}
    assert len(starts) == len(ids) - 15  # no block is there twice
    n_val = len(seen[False]) * 16
    assert [starts[row] for row in seen[False]] == list(range(len(ids) - n_val, len(ids), 16))
    assert 0.09 < n_val / len(ids) <= 0.1
    trained = [starts[row] for row in seen[True]]
    assert len(trained) == 160 and len({i % 16 for i in trained}) == 16
    assert max(trained) + 16 <= len(ids) - n_val


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("short.txt", b"too short", "short.txt: .* too few"),
        ("latin.txt", "fine\nça\n".encode("latin-1"), "latin.txt:2: not UTF-8"),
        ("missing.txt", None, "missing.txt: cannot be read"),
    ],
)
def test_text_that_will_not_do_is_named(home, name, content, said):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(BadInput, match=said):
        call("pretrain", "--data", name, "--out", "runs/named", "--block-size", 32)


def test_the_tokenizer_learns_from_the_beginning_of_a_text_and_from_nothing_held_out(home, monkeypatch):
    """Sixteen pieces of a long text; of the embedded world 4,000 documents that are learned from."""
    learned, train = [], Tokenizer.train
    monkeypatch.setattr(
        Tokenizer, "train", lambda texts, size: learned.append([*texts]) or train(learned[-1], size)
    )
    pieces = [f" piece{i}" * 40 for i in range(20)]
    monkeypatch.setattr(pretrain, "read_chunks", lambda path: iter(pieces))
    Path("any.txt").write_text("".join(pieces))
    call("pretrain", "--data", "any.txt", "--block-size", 8, "--steps", 1, "--out", "runs/pieces")
    call("pretrain", "--steps", 1, "--out", "runs/pieces")
    assert learned[0] == pieces[:16]
    assert learned[1] == [d.prompt + d.response for d in documents(8, [1, TRAINED])]


def test_the_last_block_before_the_held_out_part_is_learned_from_too(home, monkeypatch):
    """Of a text that has room for five beginnings each is drawn."""
    seen, real = set(), pretrain.next_token_loss

    def watch(model, tokens, mask):
        seen.update(tuple(row) for row in tokens.tolist() if torch.is_grad_enabled())
        return real(model, tokens, mask)

    monkeypatch.setattr(pretrain, "next_token_loss", watch)
    Path("few.txt").write_text("".join(map(chr, range(65, 86))))  # 21 letters and the end
    call("pretrain", "--data", "few.txt", "--block-size", 2, "--steps", 30, "--out", "runs/few-blocks")
    ids = np.fromfile("runs/few-blocks/tokens.bin", dtype=np.uint16).tolist()
    assert seen == {tuple(ids[i : i + 2]) for i in range(len(ids) - 2 - 1)}


def test_of_a_long_text_no_more_than_100_000_tokens_are_held_out(home, monkeypatch):
    monkeypatch.setattr(pretrain, "encode_files", lambda *how: np.zeros(2_000_000, np.uint16))
    Path("long.txt").write_text("long")
    args = pretrain.parser.parse_args(["--data", "long.txt", "--block-size", "64", "--out", "runs/long"])
    *_, held_out, _ = pretrain.load_files(args, np.random.default_rng(0))
    assert held_out.shape == (100_000 // 64, 64)
