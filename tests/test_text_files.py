"""Text files: read in pieces, encoded, written whole or not at all; and what a terminal may show."""

import bz2
import gzip
import os
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
from data import EOS, BadInput, Tokenizer, word_pattern

# ----------------------------------------------------------------------------------------------------
# Reading


def test_text_read_in_pieces_is_tokenized_as_a_whole(tmp_path, monkeypatch):
    text = "".join(f"line {i},  spaced \n\n\t{'x' * (i % 7)}é\n" for i in range(400)) + EOS + "  two "
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n"))
    pieces = list(data.read_chunks(tmp_path / "a.txt", size=100))
    assert "".join(pieces) == text == data.read_text(tmp_path / "a.txt")
    assert len(pieces) > 50 and max(map(len, pieces)) < 150
    whole = data.read_chunks
    monkeypatch.setattr(data, "read_chunks", lambda path: whole(path, size=100))
    tokenizer = Tokenizer.train([text[:2000]], 300)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    ids = data.encode_files(tokenizer, paths, tmp_path / "tokens.bin")
    first, second = text.split(EOS)
    expected = tokenizer.encode(first) + [tokenizer.eos] + tokenizer.encode(second) + [tokenizer.eos]
    assert ids.tolist() == expected + tokenizer.encode("three\n") + [tokenizer.eos]


@pytest.mark.parametrize(
    "space",
    [
        ["\n\n", "\t", "\r\n", "\x0b", "\x85", "\xa0", "\u2028", "\u3000"],
        ["\x1c", "\x1d", "\x1e", "\x1f"],  # white space for Python, not for GPT-2
    ],
)
def test_pieces_cut_no_word(tmp_path, space):
    rng = random.Random(0)
    for i in range(300):
        text = "".join(rng.choice(["a", "'s", "7", "!", "é", EOS, " ", "\n", *space]) for _ in range(60))
        (tmp_path / "text").write_bytes(text.encode())
        pieces = list(data.read_chunks(tmp_path / "text", size=i % 9 + 1))
        assert "".join(pieces) == text
        words = [word for piece in pieces for word in word_pattern().findall(piece)]
        assert words == word_pattern().findall(text)


def test_only_the_byte_order_mark_at_the_beginning_is_left_out(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo")
    assert data.read_text(tmp_path / "text") == "one\n\ufefftwo"


@pytest.mark.parametrize("content", [b"", b"x", b"one\ntwo\n"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_as_a_file_is(content, pack):
    source, target = os.pipe()
    os.write(target, pack(content))
    os.close(target)
    assert data.read_text(f"/dev/fd/{source}") == content.decode()
    os.close(source)


TEXT = b"Twinkle, twinkle, little star, how I wonder what you are!\n" * 9
NOT_UTF8 = "not UTF-8 text; give UTF-8, .*gzip"


@pytest.mark.parametrize(
    "content, message",
    [
        (TEXT + b"caf\xe9\n" + TEXT, f":10: {NOT_UTF8}"),
        (gzip.compress(TEXT + b"\xff"), f":10: {NOT_UTF8}"),
        (TEXT.decode().encode("utf-16"), f":1: {NOT_UTF8}"),
        (bz2.compress(TEXT), f":[1-9]: {NOT_UTF8}"),
        (b"\x1f\x8b no gzip", ": cannot be read "),
        (gzip.compress(TEXT)[:30], ": cannot be read "),
        (gzip.compress(TEXT)[:12] + b"\xff\xff" + gzip.compress(TEXT)[14:], ": cannot be read "),
    ],
)
def test_what_is_no_text_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(BadInput, match=f"^{tmp_path}/text{message}") as caught:
        data.read_text(tmp_path / "text")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BadInput, match=r"nothing.txt: cannot be read \(No such file or directory\)$"):
        data.read_text(tmp_path / "nothing.txt")
    with pytest.raises(BadInput, match=r": cannot be read \(Is a directory\)$"):
        data.read_text(tmp_path)


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_token_files_hold_any_id_of_the_vocabulary(tmp_path, size, dtype):
    """A vocabulary of 2¹⁶ tokens fits two bytes, one more does not."""
    many = SimpleNamespace(vocab=range(size), eos=size - 1, encode=lambda text: [len(text)] if text else [])
    (tmp_path / "text").write_text("four")
    ids = data.encode_files(many, [tmp_path / "text"] * 2, tmp_path / "tokens.bin")
    assert ids.dtype == dtype and ids.tolist() == [4, size - 1] * 2


# ----------------------------------------------------------------------------------------------------
# Writing


def read_all(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("fail_at", [1, 2])
def test_written_files_are_whole_or_not_there(tmp_path, monkeypatch, fail_at):
    """The disk is full at the first or at the second file. A None puts a file aside, once all is written."""
    data.write_files(tmp_path, {"a.json": b"old a", "b": b"old b"})
    assert read_all(tmp_path) == {"a.json": b"old a", "b": b"old b"}
    calls, full = [], OSError(28, "No space left on device")

    def fails(descriptor):
        calls.append(descriptor)
        if len(calls) >= fail_at:
            raise full

    monkeypatch.setattr(data.os, "fsync", fails)
    with pytest.raises(OSError) as caught:
        data.write_files(tmp_path, {"a.json": b"new a", "b": None, "c": b"new c"})
    assert caught.value is full and len(calls) == fail_at
    assert read_all(tmp_path) == {"a.json": b"old a", "b": b"old b"}  # and no other file, such as *.tmp
    with pytest.raises(OSError):
        data.write_records(tmp_path / "a.json", [{"n": 1}])
    assert read_all(tmp_path) == {"a.json": b"old a", "b": b"old b"}
    monkeypatch.undo()
    data.write_files(tmp_path, {"a.json": b"new a", "b": None, "c": b"new c", "d": None})
    assert read_all(tmp_path) == {"a.json": b"new a", "c": b"new c", "b.old": b"old b"}


def test_the_last_of_several_files_is_away_while_the_others_change(tmp_path, monkeypatch):
    """A kill at any of the renames leaves no new file beside an old last one."""
    old, new = ({name: f"{age} {name}".encode() for name in "abc"} for age in ("old", "new"))
    for stop_at in range(3):
        data.write_files(tmp_path, old)
        seen, replace = [], data.os.replace

        def killed(source, target):
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(Path(target).name)
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(data.os, "replace", killed)
            data.write_files(tmp_path, new)
        assert seen == list("abc")[:stop_at]
        assert read_all(tmp_path) == {name: (new if name in seen else old)[name] for name in "ab"}


# ----------------------------------------------------------------------------------------------------
# The terminal


def test_of_all_characters_the_controls_are_escaped_and_no_others():
    """Controls (Cc), halves of characters (Cs), and what Unicode made to turn the direction of text."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    escaped = 0
    for char in map(chr, range(0x110000)):
        harmful = unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n"
        harmful |= unicodedata.bidirectional(char) in turning or char in "\u200e\u200f\u061c"
        expected = char.encode("unicode_escape").decode() if harmful else char
        assert data.printable(f"a{char}b") == f"a{expected}b", hex(ord(char))
        escaped += harmful
    assert escaped == 65 - 2 + 2048 + 9 + 3
