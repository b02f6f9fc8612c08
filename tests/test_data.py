import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import EOS, Tokenizer, batches, documents, facts, judge, pad_rows, word_pattern, write_document
import model
from model import BadInput

# ----------------------------------------------------------------------------------------------------
# The world

SMALL_WORLD = {
    "relation": ["cousin"],
    "name": ["Ada", "Ben"],
    "friend": ["Alma"],
    "verb": ["lost", "found"],
    "thing": ["kite", "hat"],
    "place": ["upstairs"],
    "talk": [("It {} again.", ["rained", "snowed"]), ("{} says hello.", "friend"), ("I need tea.",)],
}


def all_documents():
    """Every document there is and its probability, by trying every choice that `write_document` offers."""
    found, open_paths = [], [[]]
    while open_paths:
        path = open_paths.pop()
        taken, probability = [], 1.0

        def pick(options):
            nonlocal probability
            if len(taken) == len(path):  # a new fork: come back for the other options
                open_paths.extend([*path, i] for i in range(1, len(options)))
                path.append(0)
            taken.append(path[len(taken)])
            probability /= len(options)
            return options[taken[-1]]

        prompt, response = write_document(pick)
        found.append((prompt + response, probability))
    return found


def test_entropy_equals_an_exhaustive_count(monkeypatch):
    monkeypatch.setattr(data, "WORLD", SMALL_WORLD)
    found = all_documents()
    table = dict(found)
    assert len(table) == len(found), "two derivations give the same text"
    assert sum(table.values()) == pytest.approx(1, abs=1e-9)
    drawn = documents(4000, seed=0)
    for prompt, response, log_prob in drawn:
        assert math.exp(log_prob) == pytest.approx(table[prompt + response], rel=1e-9)
    entropy = -sum(p * math.log(p) for p in table.values())
    surprise = np.array([-log_prob for *_, log_prob in drawn])
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / math.sqrt(len(drawn))


def test_shifted_posts_are_longer_and_about_people_who_never_made_news():
    usual, shifted = documents(300, seed=0), documents(300, seed=0, shifted=True)
    assert not {facts(p)["name"] for p, *_ in usual} & {facts(p)["name"] for p, *_ in shifted}
    sentences = lambda prompt: prompt.count(". ") + 1
    assert max(sentences(p) for p, *_ in usual) == 4 and {sentences(p) for p, *_ in shifted} == {5}


POST = "POST: It rained all day. My cousin Hugo lost my kite upstairs.\nTL;DR:"


@pytest.mark.parametrize(
    "response, score",
    [
        (" Hugo lost my kite.", 3.0),
        (" My cousin Hugo lost my kite upstairs.", 3.0 - 0.15 * 3),  # seven words
        (" Ada lost my kite.", 1 + 1 - 1),
        (" Hugo lost my hat.", 1 + 1 - 1),
        (" Hugo found my kite and my kite.", 1 - 1 + 1 - 0.15 * 3),  # a fact counts once
        (" It rained all day.", 0.0),
        ("", 0.0),
        (" \ud800 \x00 | ( [ \\", -0.15 * 2),
    ],
)
def test_judge_by_hand(response, score):
    assert judge(POST, response) == pytest.approx(score)


def test_judge_needs_no_post():
    assert judge("(((", " Hugo lost my kite.") == -3.0  # three invented facts


def test_no_small_talk_is_news():
    for prompt, response, _ in documents(500, seed=1):
        news = [s for s in prompt[6:-7].split(". ") if facts(s)]
        assert len(news) == 1 and facts(prompt) == facts(news[0])


def test_volunteers_choose_as_bradley_and_terry_say(tmp_path):
    checkpoint = tmp_path / "pretrain"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").touch()

    def answer(prompts):  # the right answer (score 3) first, then one with a wrong name (score 1)
        right = [" {name} {verb} my {thing}.".format(**facts(p)) for p in prompts]
        return [r if i % 2 == 0 else " Alma" + r[r.index(" ", 1) :] for i, r in enumerate(right)]

    path = data.collect_preferences(checkpoint, answer, n=3000)
    records = data.read_preferences(path)
    p = 1 / (1 + math.exp(-2))
    right_won = np.mean([judge(r["prompt"], r["chosen"]) == 3 for r in records])
    assert abs(right_won - p) < 4 * math.sqrt(p * (1 - p) / 3000)
    assert {r["certainty"] for r in records} == {round(p, 4), round(1 - p, 4)}
    assert data.best_accuracy(records) == pytest.approx(p, abs=1e-4)



def test_pairs_are_collected_once_for_each_model_and_a_file_of_ones_own_stays(tmp_path):
    weights, path = tmp_path / "pretrain" / "model.safetensors", tmp_path / "preferences.jsonl"
    weights.parent.mkdir()
    asked = []

    def answer(prompts):
        asked.append(len(prompts))
        return [f" {len(asked)} {i}." for i in range(len(prompts))]

    for content, times in ((b"one", 1), (b"one", 1), (b"two", 2), (b"two", 2)):
        weights.write_bytes(content)  # the time of writing does not count, what was written does
        assert data.collect_preferences(weights.parent, answer, n=10) == path
        assert len(asked) == times
        assert data.read_preferences(path)[0]["chosen"].startswith(f" {times} ")
    for own in ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "no JSON", ""):
        path.write_text(own)
        data.collect_preferences(weights.parent, answer, n=10)
        assert len(asked) == 2 and path.read_text() == own


# ----------------------------------------------------------------------------------------------------
# The tokenizer

HARD_TEXT = [
    "It's he'll THEY'RE 'twas I'm we've 'S",
    "naïve café Ünïcödé ßtraße ñandú",
    "x² + y² = ½ ¾ Ⅷ ④ ٣٤ 一二三 ੧",
    "日本語のテキスト 中文 한국어 ไทย हिन्दी",
    "🙂🙃 👩‍👩‍👧‍👦 🇨🇭 é à̂",
    "  two  spaces   three\n\n\nnewlines\t\ttabs \r\n end  ",
    "snake_case __init__ a_b 1_000 $9.99 --- ...!?",
    "\u00a0no-break\u2003em\u3000wide\u2028line\u0085next\x1cfs\x1fus\x0bvt",
    "\x00\x01\x7f\xad\ufeff\ufffd",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [p + r for p, r, _ in documents(300, seed=0)] + HARD_TEXT * 3
    return Tokenizer.train(texts, 700)


def random_texts(n, seed=0):
    """Random strings from all over Unicode, surrogates left out."""
    rng = random.Random(seed)
    blocks = [(0, 0x80), (0x80, 0x250), (0x370, 0x600), (0x2000, 0x2C00), (0x3000, 0xA000), (0x1F300, 0x1F700)]
    return ["".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(40))) for _ in range(n)]


def test_any_text_comes_back(tokenizer):
    for text in HARD_TEXT + random_texts(500) + [chr(i) for i in range(0xD800)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_bytes_come_back(tokenizer):
    for byte, char in data.BYTE_TO_CHAR.items():
        assert data.CHAR_TO_BYTE[char] == byte and char in tokenizer.vocab
    assert len(data.CHAR_TO_BYTE) == 256
    assert tokenizer.decode([tokenizer.vocab[data.BYTE_TO_CHAR[b]] for b in b"caf\xc3"]) == "caf\ufffd"


def test_special_tokens_are_never_read_out_of_text(tokenizer):
    ids = tokenizer.encode("<|endoftext|><|pad|>")
    assert tokenizer.eos not in ids and tokenizer.pad not in ids and tokenizer.eos != tokenizer.pad


def test_merges_equal_a_slow_reference():
    texts = [p + r for p, r, _ in documents(40, seed=3)]
    words = [[data.BYTE_TO_CHAR[b] for b in w.encode()] for t in texts for w in word_pattern().findall(t)]
    merges = []
    for _ in range(60):  # count all pairs of all words anew for every merge
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    assert Tokenizer.train(texts, 256 + 60 + 2).merges == merges


def test_files_open_in_the_tokenizers_package(tokenizer, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    data.write_files(tmp_path, tokenizer.files())
    theirs = ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ours = Tokenizer.load(tmp_path)
    for text in HARD_TEXT + random_texts(1000, seed=1):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_a_vocabulary_below_256_bytes_is_refused():
    with pytest.raises(BadInput, match="258"):
        Tokenizer.train(["a"], 200)


# ----------------------------------------------------------------------------------------------------
# Preference files and batches


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no preferences"),
        (b'{"prompt": "p", "chosen": "a"}\n', ':1: "rejected" is missing'),
        (b'\n{"prompt": "p", "chosen": "a", "rejected": 7}\n', ':2: "rejected" is neither a text nor a list'),
        (b'{"prompt": "p", "chosen": "a", "rejected": "b"}\nnonsense\n', ":2: not JSON"),
        (b"[1]\n", "record 1: write an object"),
        (b"[1, 2\n", "no JSON array"),
        (b'{"chosen": "a", "rejected": "b"}\n', ':1: no "prompt" text'),
        (b'{"prompt": "p", "chosen": "a", "rejected": "b", "certainty": "x"}\n', ':1: "certainty" is not'),
        (b'{"chosen": [{"role": "user"}], "rejected": []}\n', ':1: "chosen" is a list, but not of'),
        (b"\n\xff\n", ":2: not UTF-8"),
    ],
)
def test_bad_preference_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        data.read_preferences(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
TURN = [{"role": "user", "content": "Joke?"}]
SAY = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
SAID = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Joke?\n\nAssistant:"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": SAID, "chosen": " Ha.", "rejected": " No."},
        {"chosen": SAID + " Ha.", "rejected": SAID + " No."},  # transcripts, as HH has them
        {"chosen": CHAT + TURN + SAY("Ha."), "rejected": CHAT + TURN + SAY("No.")},  # whole chats
        {"prompt": CHAT + TURN, "chosen": SAY("Ha."), "rejected": SAY("No.")},  # the prompt apart
        {"prompt": CHAT + TURN, "chosen": CHAT + TURN + SAY("Ha."), "rejected": CHAT + TURN + SAY("No.")},
    ],
)
def test_every_form_of_a_preference_is_the_same_pair(tmp_path, record):
    expected = [{"prompt": SAID, "chosen": " Ha.", "rejected": " No."}] * 2
    one = json.dumps(record)
    for name, content in (
        ("lines.jsonl", f"{one}\n\n{one}\n".encode()),
        ("array.json", f"[{one},\n{one}]".encode()),
        ("lines.jsonl.gz", data.gzip.compress(f"{one}\n{one}".encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert data.read_preferences(tmp_path / name) == expected


def test_transcripts_are_cut_at_the_last_turn_that_both_share():
    record = data.canonical({"chosen": SAID + " A.\n\nHuman: B?\n\nAssistant: C.", "rejected": SAID + " D."})
    assert record == {"prompt": SAID, "chosen": " A.\n\nHuman: B?\n\nAssistant: C.", "rejected": " D."}


def test_text_read_in_pieces_is_tokenized_as_a_whole(tokenizer, tmp_path):
    text = "".join(f"line {i},  spaced \n\n\t{'x' * (i % 7)}é\n" for i in range(400)) + EOS + "  two "
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(data.gzip.compress(b"three\n"))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    assert len(list(data.read_chunks(paths, size=100))) > 50
    small = lambda paths: read_chunks(paths, size=100)  # noqa: E731
    read_chunks, data.read_chunks = data.read_chunks, small
    try:
        ids = data.encode_files(tokenizer, paths, tmp_path / "tokens.bin")
    finally:
        data.read_chunks = read_chunks
    first, second = text.split(EOS)
    expected = tokenizer.encode(first) + [tokenizer.eos] + tokenizer.encode(second) + [tokenizer.eos]
    assert ids.tolist() == expected + tokenizer.encode("three\n") + [tokenizer.eos]


def test_missing_file_and_broken_gzip(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        data.read_preferences(tmp_path / "nothing.jsonl")
    whole = data.gzip.compress(b"text " * 100)
    for broken in (b"\x1f\x8b not gzip", whole[:20], whole[:12] + b"\xff\xff" + whole[14:]):
        (tmp_path / "broken.jsonl.gz").write_bytes(broken)
        with pytest.raises(BadInput, match="cannot be read"):
            data.read_preferences(tmp_path / "broken.jsonl.gz")


def test_pairs_are_cut_and_dropped_by_the_rule(tokenizer):
    block = 16
    long = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    records = [
        {"prompt": long, "chosen": " yes", "rejected": " no"},
        {"prompt": "p", "chosen": " same", "rejected": " same"},  # dropped: equal
        {"prompt": "p", "chosen": long + " 1", "rejected": long + " 2"},  # dropped: equal once cut
    ]
    pairs, kept = data.encode_pairs(tokenizer, records, block)
    assert kept == records[:1]
    prompt, chosen, rejected = pairs[0]
    assert chosen == tokenizer.encode(" yes") + [tokenizer.eos]
    assert rejected == tokenizer.encode(" no") + [tokenizer.eos]
    room = block - max(len(chosen), len(rejected))
    assert prompt == tokenizer.encode(long)[-room:]  # the end of the prompt stays


def test_batches_take_each_item_once_and_keep_lengths_together():
    lengths = np.random.default_rng(0).integers(5, 50, size=1000)
    found = batches(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(found).tolist()) == list(range(1000))
    waste = 1 - lengths.sum() / sum(len(rows) * lengths[rows].max() for rows in found)
    assert waste < 0.1  # in random order it is about 0.43


def test_padding_and_mask_by_hand():
    tokens, mask = pad_rows([[1, 2], [3]], [[4], [5, 6, 7]])
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert tokens.dtype == torch.long


def test_written_text_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    data.write_text(path, json.dumps([1]))
    monkeypatch.setattr(model.os, "fsync", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(BadInput, match="full"):
        data.write_text(path, "half")
    assert path.read_text() == "[1]"
