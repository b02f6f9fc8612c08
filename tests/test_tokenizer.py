"""The tokenizer: any text comes back, merges equal a slow reference, GPT-2's files go in and out."""

import json
import random
from collections import Counter

import pytest
import torch

import data
from data import EOS, PAD, BadInput, Tokenizer, word_pattern

HARD_TEXT = [
    "It's he'll THEY'RE 'twas I'm we've 'S",
    "naïve café Ünïcödé ßtraße ñandú",
    "x² + y² = ½ ¾ Ⅷ ④ ٣٤ 一二三 ੧",
    "日本語のテキスト 中文 한국어 ไทย हिन्दी",
    "🙂🙃 👩‍👩‍👧‍👦 🇨🇭 é à̂",
    "  two  spaces   three\n\n\nnewlines\t\ttabs \r\n end  ",
    "snake_case __init__ a_b 1_000 $9.99 --- ...!?",
    "\u00a0no-break\u2003em\u3000wide\u2028line\u0085next\x1cfs\x1fus  \x1f\x0bvt",
    "\x00\x01\x7f\xad\ufeff\ufffd",
    "",
]
VERSES = [
    "Hey diddle diddle, the cat and the fiddle, the cow jumped over the moon;",
    "the little dog laughed to see such sport, and the dish ran away with the spoon.",
    "Peter Piper picked a peck of pickled peppers. A peck of pickled peppers Peter Piper picked.",
    "If Peter Piper picked a peck of pickled peppers, where's the peck that Peter Piper picked?",
]
DOUBLED = ["aaa aaaa banana bananana " * 3, "xx xxx xxxxx " * 5, "\n" * 37, " " * 26]  # their pairs overlap
BLOCKS = [(0, 0x80), (0x80, 0x250), (0x370, 0x600), (0x2000, 0x2C00), (0x3000, 0xA000), (0x1F300, 0x1F700)]


def random_texts(n, seed):
    """Random strings from all over Unicode, surrogates left out."""
    rng = random.Random(seed)
    character = lambda: chr(rng.randrange(*rng.choice(BLOCKS)))
    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(VERSES * 2 + HARD_TEXT * 3, 500)


def test_any_text_comes_back(tokenizer):
    for text in HARD_TEXT + random_texts(500, seed=0) + [chr(i) for i in range(0xD800)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(torch.tensor(tokenizer.encode(VERSES[0]))) == VERSES[0]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"  # no text at all: half a character


def test_any_bytes_come_back(tokenizer):
    for byte, char in data.BYTE_TO_CHAR.items():
        assert data.CHAR_TO_BYTE[char] == byte and char in tokenizer.vocab
    assert len(data.CHAR_TO_BYTE) == 256
    assert tokenizer.decode([tokenizer.vocab[data.BYTE_TO_CHAR[b]] for b in b"caf\xc3"]) == "caf\ufffd"


def test_special_tokens_are_never_read_out_of_text_and_never_written(tokenizer):
    ids = tokenizer.encode(EOS + PAD)
    assert tokenizer.eos not in ids and tokenizer.pad not in ids and tokenizer.eos != tokenizer.pad
    assert tokenizer.decode([*ids, tokenizer.eos, tokenizer.pad]) == EOS + PAD


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    """A model may know more ids than its tokenizer: vocabularies are padded to round numbers."""
    size = len(tokenizer.vocab)
    ids = [size, *tokenizer.encode("The cat"), size + 99, *tokenizer.encode(" ran")]
    assert tokenizer.decode(ids) == "The cat ran"


def test_merges_equal_a_slow_reference():
    """Count all pairs of all words anew for every merge."""
    texts = VERSES + DOUBLED + HARD_TEXT * 2 + random_texts(60, seed=2)
    counted = Counter(word for text in texts for word in word_pattern().findall(text))
    words = [([data.BYTE_TO_CHAR[b] for b in word.encode()], n) for word, n in counted.items()]
    merges = []
    while True:
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        best = max(counts, key=lambda pair: (counts[pair], pair), default=None)
        if best is None or counts[best] < 2:  # no pair occurs twice: nothing left to learn
            break
        merges.append(best)
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    full = Tokenizer.train(texts, 10_000)
    assert full.merges == merges
    assert set(full.vocab) == {*data.CHAR_TO_BYTE, *("".join(pair) for pair in merges), EOS, PAD}
    some = len(merges) // 2
    half = Tokenizer.train(texts, 256 + some + 2)
    assert some > 50 and half.merges == merges[:some] and len(half.vocab) == 256 + some + 2


def test_files_open_in_the_tokenizers_package(tokenizer, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    data.write_files(tmp_path, tokenizer.files())
    theirs = ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ours = Tokenizer.load(tmp_path)
    assert ours == tokenizer and ours != Tokenizer.train(VERSES, 300)
    for text in VERSES + HARD_TEXT + random_texts(1000, seed=1):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_a_tokenizer_that_their_package_trained_opens_here(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer()
    texts = VERSES * 2 + HARD_TEXT * 3
    theirs.train_from_iterator(texts, vocab_size=500, special_tokens=[EOS], show_progress=False)
    theirs.save_model(str(tmp_path))
    ours = Tokenizer.load(tmp_path)  # as GPT-2's own: without a token for padding
    assert ours.eos == theirs.token_to_id(EOS) and PAD not in ours.vocab and 0 <= ours.pad < len(ours.vocab)
    for text in texts + random_texts(300, seed=2):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_a_vocabulary_below_256_bytes_and_two_special_tokens_is_refused():
    with pytest.raises(BadInput, match="257.*258"):
        Tokenizer.train(["abab"], 257)
    assert Tokenizer.train(["abab"], 258).merges == []


def test_merges_that_do_not_fit_the_vocabulary_are_refused(tokenizer, tmp_path):
    data.write_files(tmp_path, tokenizer.files())
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    for wrong in ("one two three", "one", "q q", "Ġ"):
        content = "\n".join([*lines[:5], wrong, *lines[5:]])
        (tmp_path / "merges.txt").write_text(content, encoding="utf-8")
        with pytest.raises(BadInput, match="merges.txt: .*merge 5 is not of two tokens"):
            Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_bytes("\r\n".join(lines).encode())  # saved on Windows
    assert Tokenizer.load(tmp_path) == tokenizer
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(BadInput, match="merges.txt: cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda vocab: vocab.pop("a"), "ids are not 0, 1, 2"),  # a gap
        (lambda vocab: vocab.update(a=vocab["b"]), "ids are not 0, 1, 2"),  # an id twice
        (lambda vocab: vocab.update({"zzz": vocab.pop("a")}), "'a' is missing"),
        (lambda vocab: vocab.update({"zzz": vocab.pop(EOS)}), "'<.endoftext.>' is missing"),
        (lambda vocab: vocab.update({"日本": len(vocab)}), "'日本' is not made of bytes"),
        (lambda vocab: vocab.update({"a b": len(vocab)}), "'a b' is not made of bytes"),  # a blank is Ġ
        (lambda vocab: vocab.update(a="1"), ""),
        (lambda vocab: vocab.update(a=[]), ""),
    ],
)
def test_a_damaged_vocabulary_is_refused(tokenizer, tmp_path, change, message):
    vocab = dict(tokenizer.vocab)
    change(vocab)
    data.write_files(tmp_path, tokenizer.files() | {"vocab.json": json.dumps(vocab).encode()})
    with pytest.raises(BadInput, match=f"vocab.json: not of a GPT-2 tokenizer .*{message}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"7", b"nonsense", b"[" * 10_000, b"\xff"])
def test_what_is_no_vocabulary_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "vocab.json").write_bytes(content)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(BadInput) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "vocab.json")) and "\n" not in str(caught.value)


def test_a_folder_without_a_vocabulary_is_no_checkpoint(tmp_path):
    with pytest.raises(BadInput, match="no checkpoint there .*run pretrain.py"):
        Tokenizer.load(tmp_path / "nowhere")
    for damaged in (
        "{}",
        '{"model": 7, "added_tokens": []}',
        '{"model": {"vocab": {}}, "added_tokens": 3}',
        "[",
    ):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(BadInput, match="tokenizer.json: not of a GPT-2 tokenizer"):
            Tokenizer.load(tmp_path)


def test_padding_is_never_the_end_of_a_text():
    """Or other programs would read a score before it. GPT-2 itself has no token for padding."""
    without = Tokenizer({token: i for i, token in enumerate([*data.CHAR_TO_BYTE, EOS])}, [])
    assert without.pad != without.eos and without.pad in without.vocab.values()
    assert "pad_token" not in json.loads(without.files()["tokenizer_config.json"])
