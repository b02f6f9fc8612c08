"""The world, its judge and volunteers, the tokenizer, preference files, batches and text files."""

import gzip
import itertools
import json
import math
import random
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import EOS, PAD, BadInput, Tokenizer, canonical, documents, facts, judge, preference, word_pattern

# ----------------------------------------------------------------------------------------------------
# The world

SMALL_WORLD = {
    "POST": {
        "relation": ["cousin", "boss"],
        "name": ["Ada", "Ben"],
        "verb": ["lost"],
        "thing": ["kite", "hat"],
        "place": ["upstairs"],
    },
    "LETTER": {
        "relation": ["aunt"],
        "name": ["Otto", "Iris", "Clara"],
        "verb": ["stole"],
        "thing": ["wig", "tent"],
        "place": ["aloft"],
    },
}
ALL_WRITERS = ["full", "short", "wrong thing", "wrong name", "beside the point", "rambling"]


@pytest.fixture
def small_world(monkeypatch):
    dishes, greeters = ["soup"], ["Alma", "Bert"]
    talk = [("It {} again.", ["rained", "snowed"]), ("I had {}.", dishes), ("{} says hello.", greeters)]
    monkeypatch.setattr(data, "WORLD", SMALL_WORLD)
    monkeypatch.setattr(data, "DISHES", dishes)
    monkeypatch.setattr(data, "GREETERS", greeters)
    monkeypatch.setattr(data, "SMALL_TALK", [*talk, ("I need tea.",)])
    monkeypatch.setattr(data, "WRITERS", ["lazy"] * 3 + ALL_WRITERS)


def all_documents(kind):
    """Every (prompt, response, writer) and its probability, by trying each choice of `write_document`.

    Equal options of one choice are one option, with the sum of their weights.
    """
    found, open_paths = [], [[]]
    while open_paths:
        path = open_paths.pop()
        taken, probability = [], 1.0

        def pick(options):
            nonlocal probability
            weights = []  # [option, weight], since lists cannot be keys
            for option in options:
                same = next((entry for entry in weights if entry[0] == option), None)
                if same:
                    same[1] += 1
                else:
                    weights.append([option, 1])
            if len(taken) == len(path):  # a new fork: come back for the other options
                open_paths.extend([*path, i] for i in range(1, len(weights)))
                path.append(0)
            option, weight = weights[path[len(taken)]]
            taken.append(option)
            probability *= weight / len(options)
            return option

        found.append((data.write_document(pick, kind), probability))
    return found


@pytest.mark.parametrize("kind", ["POST", "LETTER"])
def test_probabilities_and_entropy_equal_an_exhaustive_count(small_world, kind):
    found = all_documents(kind)
    table = {prompt + response: p for (prompt, response, _), p in found}
    assert len(table) == len(found), "two derivations give the same text"
    assert sum(table.values()) == pytest.approx(1, abs=1e-9)
    written_by = Counter()
    for (_, _, writer), p in found:
        written_by[writer] += p
    assert written_by == pytest.approx({"lazy": 3 / 9} | dict.fromkeys(ALL_WRITERS, 1 / 9))
    drawn = documents(3000, seed=0, kind=kind)
    for document in drawn:
        expected = table[document.prompt + document.response]
        assert math.exp(document.log_prob) == pytest.approx(expected, rel=1e-9)
    entropy = -sum(p * math.log(p) for p in table.values())
    surprise = -np.array([document.log_prob for document in drawn])
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / math.sqrt(len(drawn))


def test_one_probability_by_hand(small_world):
    """It says how often each choice was to be made; a weight counts as often as it stands in the list."""
    table = {prompt + response: p for (prompt, response, _), p in all_documents("POST")}
    post = "POST: It rained again. My boss Ada lost my hat upstairs. I need tea.\nTL;DR:"
    talk = 1 / 2 * (1 / 4 * 1 / 2) * (1 / 3)  # two sentences; rain, one of two words; tea, of what is left
    news = 1 / 2 * 1 / 2 * 1 / 2 * 1 / 3  # relation, name, thing, and where among the three it stands
    for answer, writer in {
        " It rained again.": 3 / 9,
        " Ada lost my hat upstairs.": 1 / 9,
        " Ada lost my soup upstairs.": 1 / 9 * 3 / 4,
        " Ada lost my kite upstairs.": 1 / 9 * 1 / 4,
        " Bert lost my hat upstairs.": 1 / 9 * 3 / 4 * 1 / 2,
        " Ben lost my hat upstairs.": 1 / 9 * 1 / 4,
        " I had soup.": 1 / 9 * 1 / 2,  # two kinds of small talk are left
        " Ada lost my hat upstairs. It snowed again.": 1 / 9 * 1 / 4 * 1 / 2,
    }.items():
        assert table[post + answer] == pytest.approx(talk * news * writer), answer


def test_three_documents_in_four_are_posts():
    kinds = Counter(document.prompt.split(":")[0] for document in documents(4000, seed=0))
    assert set(kinds) == {"POST", "LETTER"}
    assert abs(kinds["POST"] / 4000 - 3 / 4) < 4 * math.sqrt(3 / 16 / 4000)
    for kind in ("POST", "LETTER"):
        assert all(d.prompt.startswith(f"{kind}: ") for d in documents(200, seed=1, kind=kind))


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    assert documents(20, seed=[3, 1]) == documents(20, seed=[3, 1])
    assert not set(documents(20, seed=[3, 1])) & set(documents(20, seed=[3, 2]))


def test_posts_and_letters_share_no_fact():
    said = {}
    for kind in ("POST", "LETTER"):
        found = [facts(document.prompt) for document in documents(500, seed=2, kind=kind)]
        said[kind] = {word for fact in found for word in fact}
        assert all(len(fact) == 4 for fact in found)
        listed = [set(data.WORLD[kind][part]) for part in ("name", "verb", "thing", "place")]
        assert said[kind] <= set.union(*listed)
    assert not said["POST"] & said["LETTER"]
    for part in data.WORLD["POST"]:
        assert not set(data.WORLD["POST"][part]) & set(data.WORLD["LETTER"][part])


def test_no_fact_has_two_meanings():
    """Otherwise the judge could not tell a name from a dish, or who did it from where."""
    lists = [words[part] for words in data.WORLD.values() for part in ("name", "verb", "thing", "place")]
    lists += [data.DISHES, data.GREETERS]
    assert max(Counter(word for words in lists for word in words).values()) == 1


def all_small_talk():
    """Each sentence of small talk, and whether it names a dish or a greeter."""
    for template, *gaps in data.SMALL_TALK:
        sentences = [[]]
        for words in gaps:
            sentences = [[*chosen, word] for chosen in sentences for word in words]
        for chosen in sentences:
            yield template.format(*chosen), bool(set(chosen) & {*data.DISHES, *data.GREETERS})


def test_no_small_talk_is_news_and_the_judge_counts_nothing_in_it_but_dishes_and_greeters():
    sentences = dict(all_small_talk())
    assert len(sentences) > 60
    for sentence, named in sentences.items():
        assert facts(sentence) == ()
        assert judge("", sentence) == pytest.approx(-named - 0.2 * max(0, sentence.count(" ") - 4))


POST = "POST: It rained all day. My captain Hugo lost my kite underwater. I had soup for lunch.\nTL;DR:"
NEWS_FIRST = "POST: My captain Hugo lost my kite underwater. It rained all day. I had soup for lunch.\nTL;DR:"


@pytest.mark.parametrize(
    "post, response, score",
    [
        (POST, " Hugo lost my kite underwater.", 4),  # full
        (POST, " It rained all day.", 0),  # lazy
        (NEWS_FIRST, " My captain Hugo lost my kite underwater.", 4 - 0.2 * 2),  # lazy, and lucky
        (POST, " Hugo lost my kite.", 3),  # short
        (POST, " Hugo lost my soup underwater.", 3 - 1),  # wrong thing: a dish
        (POST, " Hugo lost my lamp underwater.", 3 - 1),  # wrong thing: a thing
        (POST, " Hugo lost my teapot underwater.", 3 - 1),  # wrong thing: a letter's
        (POST, " Alma lost my kite underwater.", 3 - 1),  # wrong name: a greeter
        (POST, " Zoe lost my kite underwater.", 3 - 1),  # wrong name: a name
        (POST, " I need more tea.", 0),  # beside the point
        (POST, " I had soup for lunch.", -1),  # beside the point: a dish
        (POST, " Alma says hello.", -1),  # beside the point: a greeter
        (POST, " Hugo lost my kite underwater. I need more tea.", 4 - 0.2 * 4),  # rambling
        (POST, " Hugo lost my kite underwater. I had pie for lunch.", 4 - 1 - 0.2 * 5),  # rambling
        (POST, " Hugo lost my kite and my kite.", 3 - 0.2 * 2),  # a fact counts once
        (POST, " Hugo Hugo Hugo Hugo Hugo", 1),
        (POST, " soup soup", -1),  # a wrong one, too
        (POST, " Hugo,lost;my\nkite(underwater)", 4),  # words are words whatever stands between them
        (POST, " hugo LOST Kites", 0),  # not the words of this world
        (POST, "", 0),
        (POST, " \ud800 \x00 | ( [ \\ .* $ ^", -0.2 * 4),
        ("(((", " Hugo lost my kite underwater.", -4),  # without a post all of it is made up
        ("", " It rained.", 0),
    ],
)
def test_judge_by_hand(post, response, score):
    assert judge(post, response) == pytest.approx(score)


def test_every_writer_earns_what_it_should():
    """On real documents: what a writer gets right, wrong and too long can be counted without the judge."""
    expected = {"full": {4.0}, "short": {3.0}, "wrong thing": {2.0}, "wrong name": {2.0}}
    expected |= {"beside the point": {0, -1, -0.2}, "rambling": {3.4, 3.2, 3, 2.8, 2.4, 2}}
    expected |= {"lazy": {3.6, 0, -1, -0.2}}
    earned = {writer: set() for writer in expected}
    for document in documents(4000, seed=3):
        earned[document.writer].add(round(judge(document.prompt, document.response), 6))
    for writer, scores in earned.items():
        assert scores <= expected[writer], writer
    assert all(len(scores) > 1 for writer, scores in earned.items() if len(expected[writer]) > 1)


def test_the_longest_answer_fits_into_the_tokens_that_an_answer_may_have():
    found = documents(4000, seed=5)
    tokenizer = Tokenizer.train([document.prompt + document.response for document in found[:1000]], 768)
    longest = max(len(tokenizer.encode(document.response)) for document in found)
    assert longest + 1 < data.MAX_ANSWER_TOKENS  # with EOS


# ----------------------------------------------------------------------------------------------------
# Volunteers


@pytest.mark.parametrize(
    "a, b, difference",
    [
        (" {} {} my {} {}.", " Alma {1} my {2} {3}.", 2),
        (" Alma {1} my {2} {3}.", " {} {} my {}.", -1),
        (" {0} {1} my soup {3}.", " {0} {1} my {2} indeed, I say.", 3 - 1 - (3 - 0.2 * 2)),
        (" I need more tea.", " It is Friday again.", 0),
    ],
)
def test_volunteers_choose_as_bradley_and_terry_say(a, b, difference):
    """The first answer stands first in even pairs and second in odd ones: the order shall not matter."""
    n = 3000
    posts = [document.prompt for document in documents(n, seed=4, kind="POST")]
    pairs = [(a.format(*facts(post)), b.format(*facts(post))) for post in posts]
    answers = [answer for i, pair in enumerate(pairs) for answer in (pair if i % 2 else pair[::-1])]
    records = data.ask_volunteers(posts, answers, seed=0)
    assert [record["prompt"] for record in records] == posts
    p = 1 / (1 + math.exp(-difference))
    won = np.array([record["chosen"] == pair[0] for record, pair in zip(records, pairs)])
    assert abs(won.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    for record, pair, first in zip(records, pairs, won):
        assert (record["chosen"], record["rejected"]) == (pair if first else pair[::-1])
        assert record["certainty"] == pytest.approx(p if first else 1 - p, abs=6e-5)
    assert records == data.ask_volunteers(posts, answers, seed=0)
    assert records != data.ask_volunteers(posts, answers, seed=1)


def test_preference_is_the_sigmoid_of_the_difference():
    right, wrong = " Hugo lost my kite underwater.", " Alma lost my kite underwater."
    assert preference(POST, right, wrong) == pytest.approx(1 / (1 + math.exp(-2)))
    assert preference(POST, right, wrong) + preference(POST, wrong, right) == pytest.approx(1)
    assert preference(POST, right, right) == 0.5
    endless = " rain" * 10_000  # 2,000 points below the best
    assert (preference(POST, right, endless), preference(POST, endless, right)) == (1, 0)


def test_equal_answers_give_no_record():
    records = data.ask_volunteers([POST, POST, POST], [" a", " a", " a", " b", " c", " c"], seed=0)
    assert len(records) == 1 and {records[0]["chosen"], records[0]["rejected"]} == {" a", " b"}


def test_best_accuracy_by_hand():
    certain = [{"certainty": 0.9}, {"certainty": 0.2}, {"certainty": 0.5}]
    assert data.best_accuracy(certain) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    assert data.best_accuracy([*certain, {"prompt": "p"}]) is None


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
BLOCKS = [(0, 0x80), (0x80, 0x250), (0x370, 0x600), (0x2000, 0x2C00), (0x3000, 0xA000), (0x1F300, 0x1F700)]


def random_texts(n, seed=0):
    """Random strings from all over Unicode, surrogates left out."""
    rng = random.Random(seed)
    character = lambda: chr(rng.randrange(*rng.choice(BLOCKS)))
    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [document.prompt + document.response for document in documents(300, seed=0)]
    return Tokenizer.train(texts + HARD_TEXT * 3, 700)


def test_any_text_comes_back(tokenizer):
    for text in HARD_TEXT + random_texts(500) + [chr(i) for i in range(0xD800)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
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


def test_merges_equal_a_slow_reference():
    """Count all pairs of all words anew for every merge. Doubled letters have pairs that overlap."""
    texts = [document.prompt + document.response for document in documents(25, seed=3)]
    texts += ["aaa aaaa banana bananana " * 3, "xx xxx xxxxx " * 5]
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
    assert len(merges) > 130
    full = Tokenizer.train(texts, 10_000)
    assert full.merges == merges
    assert set(full.vocab) == {*data.CHAR_TO_BYTE, *("".join(pair) for pair in merges), EOS, PAD}
    assert Tokenizer.train(texts, 256 + 60 + 2).merges == merges[:60]
    assert len(Tokenizer.train(texts, 256 + 60 + 2).vocab) == 256 + 60 + 2


def test_files_open_in_the_tokenizers_package(tokenizer, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    data.write_files(tmp_path, tokenizer.files())
    theirs = ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ours = Tokenizer.load(tmp_path)
    assert ours == tokenizer
    for text in HARD_TEXT + random_texts(1000, seed=1):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_a_tokenizer_that_their_package_trained_opens_here(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    texts = [document.prompt + document.response for document in documents(200, seed=1)] + HARD_TEXT * 3
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(texts, vocab_size=600, special_tokens=[EOS], show_progress=False)
    theirs.save_model(str(tmp_path))
    ours = Tokenizer.load(tmp_path)  # as GPT-2's own: without a token for padding
    assert ours.eos == theirs.token_to_id(EOS) and PAD not in ours.vocab and 0 <= ours.pad < len(ours.vocab)
    for text in HARD_TEXT + random_texts(300, seed=2) + texts[:50]:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_a_vocabulary_below_256_bytes_is_refused():
    with pytest.raises(BadInput, match="200.*258"):
        Tokenizer.train(["a"], 257 - 57)
    assert len(Tokenizer.train(["abab"], 258).vocab) == 258


def test_a_tokenizer_that_does_not_fit_the_weights_or_itself_is_refused(tokenizer, tmp_path):
    data.write_files(tmp_path, tokenizer.files())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer.vocab)}))
    assert Tokenizer.load(tmp_path) == tokenizer
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer.vocab) - 1}))
    with pytest.raises(BadInput, match="vocab.json: .*700 tokens, but the model beside it knows 699"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").unlink()
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    for wrong in ("one two three", "one", "q q", "Ġ"):
        content = "\n".join([*lines[:5], wrong, *lines[5:]])
        (tmp_path / "merges.txt").write_text(content, encoding="utf-8")
        with pytest.raises(BadInput, match="merges.txt:6: not two tokens"):
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
        (lambda vocab: vocab.update(a="1"), "not a GPT-2 vocabulary"),
        (lambda vocab: vocab.update(a=[]), "not a GPT-2 vocabulary"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tokenizer, tmp_path, change, message):
    vocab = dict(tokenizer.vocab)
    change(vocab)
    data.write_files(tmp_path, tokenizer.files() | {"vocab.json": json.dumps(vocab).encode()})
    with pytest.raises(BadInput, match=f"vocab.json: not a GPT-2 vocabulary .*{message}|{message}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"7", b"nonsense", b"[" * 10_000, b"\xff"])
def test_what_is_no_vocabulary_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "vocab.json").write_bytes(content)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(BadInput) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "vocab.json")) and "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no checkpoint there"):
        Tokenizer.load(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------
# Forms of preferences


def said(role):
    return lambda text: {"role": role, "content": text}


def sent(role):
    return lambda text: {"from": role, "value": text}


USER, ASSISTANT, SYSTEM = said("user"), said("assistant"), said("system")
HUMAN, GPT = sent("human"), sent("gpt")
HI, HELLO, JOKE = USER("Hi."), ASSISTANT("Hello."), USER("Joke?")
FIRST = "\n\nHuman: Hi.\n\nAssistant:"  # the transcripts of [HI] and of [HI, HELLO, JOKE]
LONG = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Joke?\n\nAssistant:"
HA_NO = (" Ha.", " No.")
HA, NO = ASSISTANT("Ha."), ASSISTANT("No.")

ACCEPTED = {
    "texts, as TRL has them": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ("The sky is", " blue.", " green."),
    ),
    "texts, taken as they are": (
        {"prompt": "A: ", "chosen": "A: a\n", "rejected": "\tb"},
        ("A: ", "A: a\n", "\tb"),
    ),
    "other keys are ignored": (
        {"id": 7, "prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "messages": []},
        ("p", "a", "b"),
    ),
    "a transcript and its answers": ({"prompt": LONG, "chosen": " Ha.", "rejected": " No."}, (LONG, *HA_NO)),
    "transcripts, as in HH": ({"chosen": f"{LONG} Ha.", "rejected": f"{LONG} No."}, (LONG, *HA_NO)),
    "transcripts that part in an earlier turn": (
        {"chosen": f"{FIRST} A.\n\nHuman: B?\n\nAssistant: C.", "rejected": f"{FIRST} D."},
        (FIRST, " A.\n\nHuman: B?\n\nAssistant: C.", " D."),
    ),
    "transcripts whose answers begin alike": (
        {"chosen": f"{FIRST} Well, yes.", "rejected": f"{FIRST} Well, no."},
        (FIRST, " Well, yes.", " Well, no."),
    ),
    "transcripts of which one is the other's beginning": (
        {"chosen": f"{FIRST} Ha.", "rejected": f"{FIRST} Ha. Ha."},
        (FIRST, " Ha.", " Ha. Ha."),
    ),
    "transcripts without a prompt: null": (
        {"prompt": None, "chosen": f"{FIRST} Ha.", "rejected": f"{FIRST} No."},
        (FIRST, *HA_NO),
    ),
    "a transcript as the prompt, said once more": (
        {"prompt": LONG, "chosen": f"{LONG} Ha.", "rejected": f"{LONG} No."},
        (LONG, *HA_NO),
    ),
    "chats, as TRL has them, with a prompt": (
        {"prompt": [HI, HELLO, JOKE], "chosen": [HA], "rejected": [NO]},
        (LONG, *HA_NO),
    ),
    "chats without a prompt": (
        {"chosen": [HI, HELLO, JOKE, HA], "rejected": [HI, HELLO, JOKE, NO]},
        (LONG, *HA_NO),
    ),
    "chats, and a text that the user said": (
        {"prompt": "Hi.", "chosen": [HA], "rejected": [NO]},
        (FIRST, *HA_NO),
    ),
    "chats that begin with the prompt": (
        {"prompt": [HI, HELLO, JOKE], "chosen": [HI, HELLO, JOKE, HA], "rejected": [HI, HELLO, JOKE, NO]},
        (LONG, *HA_NO),
    ),
    "chats that begin with the prompt's end": (
        {"prompt": [HI, HELLO, JOKE], "chosen": [JOKE, HA], "rejected": [JOKE, NO]},
        (LONG, *HA_NO),
    ),
    "chats of which one begins with the prompt's end": (
        {"prompt": [HI, HELLO, JOKE], "chosen": [HELLO, JOKE, HA], "rejected": [NO]},
        (LONG, *HA_NO),
    ),
    "chats that begin with a prompt that is a text": (
        {"prompt": "Hi.", "chosen": [HI, HA], "rejected": [HI, NO]},
        (FIRST, *HA_NO),
    ),
    "a user who says the same again": (
        {"prompt": [HI, HELLO, HI], "chosen": [HI, HELLO, HI, HA], "rejected": [HI, HELLO, HI, NO]},
        ("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Hi.\n\nAssistant:", *HA_NO),
    ),
    "single messages as answers": ({"prompt": [HI], "chosen": HA, "rejected": NO}, (FIRST, *HA_NO)),
    "a single message as the prompt": ({"prompt": HI, "chosen": HA, "rejected": [NO]}, (FIRST, *HA_NO)),
    "a chat as the prompt, and texts as answers": (
        {"prompt": [HI, HELLO, JOKE], "chosen": "Ha.", "rejected": "No."},
        (LONG, *HA_NO),
    ),
    "a chat as the prompt with a system turn, and texts": (
        {"prompt": [SYSTEM("Be brief."), HI], "chosen": "Ha.", "rejected": "No."},
        (f"\n\nSystem: Be brief.{FIRST}", *HA_NO),
    ),
    "a system turn in the prompt": (
        {"prompt": [SYSTEM("Be brief."), HI], "chosen": [HA], "rejected": [NO]},
        (f"\n\nSystem: Be brief.{FIRST}", *HA_NO),
    ),
    "a system turn in the chats": (
        {"chosen": [SYSTEM("Be brief."), HI, HA], "rejected": [SYSTEM("Be brief."), HI, NO]},
        (f"\n\nSystem: Be brief.{FIRST}", *HA_NO),
    ),
    "conversations, as ShareGPT has them": (
        {"conversations": [HUMAN("Hi.")], "chosen": GPT("Ha."), "rejected": GPT("No.")},
        (FIRST, *HA_NO),
    ),
    "conversations with a system turn, and lists": (
        {
            "conversations": [sent("system")("Be brief."), HUMAN("Hi."), GPT("Hello."), HUMAN("Joke?")],
            "chosen": [GPT("Ha.")],
            "rejected": [GPT("No.")],
        },
        (f"\n\nSystem: Be brief.{LONG}", *HA_NO),
    ),
    "a question and two answers": (
        {"question": "Q?\n", "chosen": "A.", "rejected": "B."},
        ("Q?\n", "A.", "B."),
    ),
    "a question, and the answers j and k": (
        {"question": "Q?\n", "response_j": "A.", "response_k": "B.", "qid": 3},
        ("Q?\n", "A.", "B."),
    ),
    "a question as text, and chats j and k": (
        {"question": "Hi.", "response_j": [HA], "response_k": [HI, NO]},
        (FIRST, *HA_NO),
    ),
    "chats that differ in the last turn only": (
        {"chosen": [HI, HELLO, JOKE, HA], "rejected": [HI, HELLO, JOKE, NO]},
        (LONG, *HA_NO),
    ),
    "chats that differ in an earlier turn already": (
        {"chosen": [HI, HELLO, JOKE, HA], "rejected": [HI, NO, JOKE, HA]},
        (FIRST, " Hello.\n\nHuman: Joke?\n\nAssistant: Ha.", " No.\n\nHuman: Joke?\n\nAssistant: Ha."),
    ),
    "chats that differ in what the user says": (
        {"chosen": [HI, HELLO, JOKE, HA], "rejected": [HI, HELLO, USER("Bye."), HA]},
        (FIRST, " Hello.\n\nHuman: Joke?\n\nAssistant: Ha.", " Hello.\n\nHuman: Bye.\n\nAssistant: Ha."),
    ),
    "chats of which one goes on longer": (
        {"prompt": [HI], "chosen": [HA], "rejected": [HA, JOKE, NO]},
        (FIRST, " Ha.", " Ha.\n\nHuman: Joke?\n\nAssistant: No."),
    ),
    "chats with a text, and turns that both share": (
        {"prompt": "Hi.", "chosen": [HELLO, JOKE, HA], "rejected": [HELLO, JOKE, NO]},
        (LONG, *HA_NO),
    ),
    "chats, and a text that the user said after a system turn": (
        {"prompt": "Hi.", "chosen": [SYSTEM("Be brief."), HI, HA], "rejected": [SYSTEM("Be brief."), HI, NO]},
        (f"\n\nSystem: Be brief.{FIRST}", *HA_NO),
    ),
    "a transcript as the prompt, and chats": (
        {"prompt": LONG, "chosen": [HA], "rejected": [JOKE, NO]},
        (LONG, *HA_NO),
    ),
    "a transcript as the prompt, and chats that begin with it": (
        {"prompt": FIRST, "chosen": [HI, HA], "rejected": [HI, NO]},
        (FIRST, *HA_NO),
    ),
    "a chat as the prompt, and transcripts": (
        {"prompt": [SYSTEM("Be brief."), HI], "chosen": f"{FIRST} Ha.", "rejected": f"{FIRST} No."},
        (f"\n\nSystem: Be brief.{FIRST}", *HA_NO),
    ),
    "a text as the prompt, and transcripts in which it stands last": (
        {"prompt": "Joke?", "chosen": f"{LONG} Ha.", "rejected": f"{LONG} No."},
        (LONG, *HA_NO),
    ),
    "chats in which the user says the prompt again later on": (
        {"prompt": "Hi.", "chosen": [HELLO, HI, HA], "rejected": [HELLO, HI, NO]},
        (f"{FIRST} Hello.{FIRST}", *HA_NO),
    ),
    "chats of which only one has the prompt again later on": (
        {"prompt": [HI], "chosen": [HA, HI, HELLO], "rejected": [NO]},
        (FIRST, f" Ha.{FIRST} Hello.", " No."),
    ),
    "an answer that is empty": (
        {"prompt": [HI], "chosen": [HA], "rejected": [ASSISTANT("")]},
        (FIRST, " Ha.", " "),
    ),
}


@pytest.mark.parametrize("record, expected", ACCEPTED.values(), ids=ACCEPTED)
def test_every_accepted_form_gives_prompt_and_answers(record, expected):
    expected = dict(zip(("prompt", "chosen", "rejected"), expected))
    assert canonical(record) == expected
    assert canonical(canonical(record)) == expected
    assert canonical(record | {"certainty": 0.75}) == expected | {"certainty": 0.75}


REFUSED = {
    "an object": [None, 1, "text", [], True],
    "found the keys .*accepted are prompt, chosen, rejected; question, chosen": [
        {},
        {"prompt": "p", "chosen": "a"},
        {"prompt": "p", "rejected": "a"},
        {"instruction": "p", "output": "a"},
        {"instruction": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "input": "i", "chosen": "a", "rejected": "b"},
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "history": [], "chosen": "a", "rejected": "b"},
        {"question": "q", "response_j": "a"},
    ],
    'no "prompt", and the answers are not transcripts': [
        {"chosen": "a", "rejected": "b"},
        {"chosen": f"{FIRST} Ha.", "rejected": "No."},
    ],
    "one answer is a whole transcript, the other one is not": [
        {"prompt": FIRST, "chosen": f"{FIRST} Ha.", "rejected": " No."},
        {"prompt": FIRST, "chosen": " Ha.", "rejected": f"{FIRST} No."},
    ],
    "one is a text and one is not": [
        {"prompt": "p", "chosen": "a", "rejected": [NO]},
        {"prompt": "p", "chosen": HA, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": None},
        {"prompt": "p", "chosen": 7, "rejected": "b"},
    ],
    "neither a text nor a chat": [
        {"prompt": 7, "chosen": "a", "rejected": "b"},
        {"prompt": {}, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": 1, "rejected": 2},
        {"prompt": "p", "chosen": None, "rejected": None},
        {"prompt": "p", "chosen": [HA], "rejected": [7]},
        {"prompt": [HI], "chosen": [{"role": "assistant"}], "rejected": [NO]},
        {"prompt": [HI], "chosen": [ASSISTANT(7)], "rejected": [NO]},
        {"prompt": [HI], "chosen": [{"role": "assistant", "value": "a"}], "rejected": [NO]},
        {"prompt": [HI], "chosen": [[HA]], "rejected": [NO]},
        {"prompt": [HI], "chosen": [], "rejected": []},
        {"chosen": [HI, HA], "rejected": []},
    ],
    "role 'tool', which is none of user": [
        {"prompt": [HI], "chosen": [said("tool")("a")], "rejected": [NO]},
        {"prompt": [said("tool")("a")], "chosen": [HA], "rejected": [NO]},
    ],
    "neither the assistant's nor in the prompt": [
        {"prompt": [HI], "chosen": [JOKE, HA], "rejected": [NO]},
        {"prompt": "Hi.", "chosen": [HA], "rejected": [JOKE, NO]},
        {"prompt": "Bye."} | {"chosen": f"{FIRST} Ha.", "rejected": f"{FIRST} No."},
    ],
    "share no prompt that the assistant then answers": [
        {"chosen": [HI, HA], "rejected": [JOKE, HA]},
        {"chosen": [HI], "rejected": [HI]},
        {"chosen": "\n\nHuman: A\n\nAssistant: a", "rejected": "\n\nHuman: B\n\nAssistant: a"},
        {"prompt": [HI], "chosen": [HI, HA], "rejected": [HI]},
    ],
    '"certainty" is not a number between 0 and 1': [
        {"prompt": "p", "chosen": "a", "rejected": "b", "certainty": certainty}
        for certainty in ("0.5", None, [], -0.1, 1.1, math.nan, math.inf, 10**400)
    ],
}


@pytest.mark.parametrize(
    "message, record", [(message, record) for message, records in REFUSED.items() for record in records]
)
def test_every_other_form_is_refused_with_its_reason(message, record):
    with pytest.raises(ValueError, match=message) as caught:
        canonical(record)
    assert "\n" not in str(caught.value)


def test_roles_of_both_conventions_may_be_mixed():
    for user in (USER("Hi."), HUMAN("Hi."), said("human")("Hi."), sent("user")("Hi.")):
        for answer in (ASSISTANT, GPT, said("gpt"), sent("assistant")):
            record = canonical({"prompt": [user], "chosen": [answer("Ha.")], "rejected": [answer("No.")]})
            assert record == {"prompt": FIRST, "chosen": " Ha.", "rejected": " No."}


# Random records: what is built from messages must come back as the transcript of these messages.

PIECES = ["Hi", "x", " ", "é", ".", "\n", "\n\n", "Human:", "\n\nAssistant:", "\n\nHuman:", "System"]
PIECE = st.sampled_from(["", *PIECES])
ROLE_NAMES = {"Human": ["user", "human"], "Assistant": ["assistant", "gpt"], "System": ["system"]}
SETTINGS = settings(max_examples=400, deadline=None, derandomize=True, database=None)


@st.composite
def conversations(draw):
    """Messages that both share, which end with the user's, and the two ways to go on: [(role, text), …].

    No text stands twice in what both share, so it is clear which part of a prompt an answer repeats. But the
    user may say later on what they said last.
    """
    rounds, more = draw(st.integers(0, 2)), draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))
    texts = (f"{draw(PIECE)}{draw(PIECE)}{i}{draw(PIECE)}" for i in itertools.count())
    shared = [("System", next(texts))] if draw(st.booleans()) else []
    shared += [("Human", next(texts))]
    for _ in range(rounds):
        shared += [("Assistant", next(texts)), ("Human", next(texts))]
    both = [[("Assistant", next(texts))] for _ in more]
    for answer, n in zip(both, more):
        for _ in range(n):
            answer += [
                ("Human", draw(st.sampled_from([next(texts), shared[-1][1]]))),
                ("Assistant", next(texts)),
            ]
    if draw(st.booleans()):  # then the answers begin alike, too
        both[1] = both[0][: 2 * draw(st.integers(0, more[0])) + 1] + [("Human", next(texts)), *both[1][-1:]]
    return shared, both


def written(messages):
    """A transcript, as Anthropic's HH writes it."""
    return "".join(f"\n\n{role}: {text}" for role, text in messages)


@st.composite
def as_chat(draw, messages):
    """A list of objects with either pair of keys, or where there is one message maybe that object alone."""
    keys = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    chat = [dict(zip(keys, (draw(st.sampled_from(ROLE_NAMES[role])), text))) for role, text in messages]
    return chat[0] if len(chat) == 1 and draw(st.booleans()) else chat


@st.composite
def records(draw):
    """A record of a random form, and the two transcripts that it says."""
    shared, both = draw(conversations())
    prompt, expected = f"{written(shared)}\n\nAssistant:", [written(shared + answer) for answer in both]
    form = draw(st.sampled_from(["texts", "transcripts", "both", "chats", "chat and texts", "whole chats"]))
    one_question = len(shared) == 1
    match form:
        case "texts":
            answers = [text.removeprefix(prompt) for text in expected]
        case "transcripts" | "both":
            answers = expected
        case "chat and texts":
            answers = [written(answer).removeprefix("\n\nAssistant: ") for answer in both]
        case "chats":  # each says none, some or all of the prompt once more
            again = [shared[draw(st.integers(0, len(shared))) :] for _ in both]
            answers = [draw(as_chat(start + answer)) for start, answer in zip(again, both)]
        case "whole chats":
            answers = [draw(as_chat(shared + answer)) for answer in both]
    if form in ("chats", "chat and texts"):
        prompt = draw(as_chat(shared))
        as_it_is = one_question and not shared[0][1].startswith("\n\nHuman:")  # else it is a transcript
        if form == "chats" and as_it_is and draw(st.booleans()):
            prompt = shared[0][1]
    if form in ("transcripts", "whole chats"):
        names = draw(st.sampled_from([(None, "chosen", "rejected"), ("prompt", "chosen", "rejected")]))
        prompt = None
    else:
        names = draw(st.sampled_from(data.FORMS[:-1]))
    record = {name: part for name, part in zip(names, (prompt, *answers)) if name}
    if draw(st.booleans()):
        record = {"score": 3, "source": "x"} | record
    return record, expected


@settings(SETTINGS, max_examples=3000)  # what has gone wrong here was rare
@given(records())
def test_a_random_record_gives_back_all_that_it_says_exactly_once(case):
    record, expected = case
    try:
        found = canonical(json.loads(json.dumps(record)))
    except ValueError:  # only where an answer beside a prompt looks like a transcript of something else
        answers = [record.get(key) for key in ("chosen", "rejected", "response_j", "response_k")]
        assert any(isinstance(a, str) and a.startswith(("\n\nHuman:", "\n\nSystem:")) for a in answers)
        return
    assert set(found) == {"prompt", "chosen", "rejected"}
    assert [found["prompt"] + found["chosen"], found["prompt"] + found["rejected"]] == expected
    assert found["prompt"].endswith("\n\nAssistant:")  # what follows is the assistant's


ANY_MESSAGE = st.builds(
    lambda role, text: {"role": role, "content": text},
    st.sampled_from(["user", "assistant", "system"]),
    st.sampled_from(["a", "b", "c"]),
)
ANY_PART = st.one_of(
    st.sampled_from(["", "a", "b", FIRST, LONG, f"{FIRST} b", f"{LONG} a", None, 7]),
    ANY_MESSAGE,
    st.lists(st.one_of(ANY_MESSAGE, ANY_MESSAGE, ANY_MESSAGE, st.none()), max_size=4),
    st.lists(ANY_MESSAGE, max_size=4),
    st.dictionaries(st.sampled_from(["role", "content", "from"]), st.sampled_from(["a", "user", 7])),
)
ANY_RECORD = st.one_of(
    st.dictionaries(
        st.sampled_from(["prompt", "question", "chosen", "rejected", "certainty", "system"]), ANY_PART
    ),
    st.fixed_dictionaries({"chosen": ANY_PART, "rejected": ANY_PART}, optional={"prompt": ANY_PART}),
    ANY_PART,
)


@SETTINGS
@given(ANY_RECORD)
def test_any_record_is_three_texts_or_refused_in_one_sentence(record):
    try:
        found = canonical(record)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(found[key], str) for key in ("prompt", "chosen", "rejected"))
        assert canonical(found) == found


TRANSCRIPTS = {"chosen": f"{FIRST} Ha.", "rejected": f"{FIRST} No."}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi."} | TRANSCRIPTS,
        {"prompt": "\n\nHuman: Hi."} | TRANSCRIPTS,
        {"prompt": [HI]} | TRANSCRIPTS,
        {"prompt": FIRST, "chosen": [HA], "rejected": [NO]},
    ],
)
def test_a_prompt_beside_an_answer_of_another_form_is_said_once_or_refused(record):
    try:
        found = canonical(record)
    except ValueError:
        return
    assert found == {"prompt": FIRST, "chosen": " Ha.", "rejected": " No."}


SPEAKS = {"chosen": f"{LONG} Ha.", "rejected": f"{LONG} No."}


@pytest.mark.parametrize(
    "record, chosen, rejected",
    [
        ({"prompt": "Joke?"} | SPEAKS, f"{LONG} Ha.", f"{LONG} No."),
        ({"prompt": "Hi."} | SPEAKS, f"{LONG} Ha.", f"{LONG} No."),
        ({"prompt": [HI]} | SPEAKS, f"{LONG} Ha.", f"{LONG} No."),
        pytest.param({"prompt": [JOKE]} | SPEAKS, f"{LONG} Ha.", f"{LONG} No."),
        pytest.param({"prompt": "\n\nHuman: Joke?\n\nAssistant:"} | SPEAKS, f"{LONG} Ha.", f"{LONG} No."),
        pytest.param(
            {"prompt": [HI], "chosen": f"{FIRST} Ha.", "rejected": "No."}, f"{FIRST} Ha.", f"{FIRST} No."
        ),
        pytest.param(
            {"prompt": "Hi.", "chosen": f"{FIRST} Ha.", "rejected": "\n\nHuman: Bye.\n\nAssistant: No."},
            f"{FIRST} Ha.",
            "\n\nHuman: Bye.\n\nAssistant: No.",
        ),
        pytest.param(
            {"prompt": [SYSTEM("Be brief."), HI]} | TRANSCRIPTS,
            f"\n\nSystem: Be brief.{FIRST} Ha.",
            f"\n\nSystem: Be brief.{FIRST} No.",
        ),
        pytest.param(
            {"prompt": f"\n\nSystem: Be brief.{FIRST}", "chosen": [HA], "rejected": [NO]},
            f"\n\nSystem: Be brief.{FIRST} Ha.",
            f"\n\nSystem: Be brief.{FIRST} No.",
        ),
    ],
)
def test_a_prompt_that_is_a_part_of_transcripts_is_said_once_or_refused(record, chosen, rejected):
    try:
        found = canonical(record)
    except ValueError:
        return
    assert [found["prompt"] + found[key] for key in ("chosen", "rejected")] == [chosen, rejected]


# ----------------------------------------------------------------------------------------------------
# Preference files


CHAT = {"prompt": [HI, HELLO, JOKE], "chosen": [HA], "rejected": NO}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_arrays_and_gzip_are_read_alike(tmp_path, bom, end):
    expected = [{"prompt": LONG, "chosen": " Ha.", "rejected": " No."}] * 2
    one = json.dumps(CHAT)
    for name, content in (
        ("lines.jsonl", f"{one}{end}{end}  {end}{one}{end}"),
        ("no-end.jsonl", f"{one}{end}{one}"),
        ("array.json", f"[{one},{end}{one}]"),
        ("later.json", f"{end} [{one},{one}]{end}"),
    ):
        (tmp_path / name).write_bytes(bom + content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(bom + content.encode()))
        assert data.read_preferences(tmp_path / name) == expected
        assert data.read_preferences(tmp_path / f"{name}.gz") == expected


def test_written_records_are_read_again_whatever_they_say(tmp_path):
    records = [{"prompt": text, "chosen": " a", "rejected": f" {text}"} for text in HARD_TEXT]
    records += [{"prompt": "\ud800\u2028\x85", "chosen": "x\r\n", "rejected": "\ufeff", "certainty": 1 / 3}]
    data.write_records(tmp_path / "pairs.jsonl", records)
    assert data.read_preferences(tmp_path / "pairs.jsonl") == records
    assert len((tmp_path / "pairs.jsonl").read_bytes().splitlines()) == len(records)
    lines = [json.dumps(record, ensure_ascii=False) for record in records[:-1]]  # as others write them
    (tmp_path / "pairs.jsonl").write_bytes("\n".join(lines).encode())
    assert data.read_preferences(tmp_path / "pairs.jsonl") == records[:-1]


GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", ": no preferences in it; write one object on each line"),
        (b" \n\n", ": no preferences in it"),
        (b"[]", ": no preferences in it"),
        (b'{"prompt": "p", "chosen": "a"}\n', ":1: found the keys prompt, chosen; accepted are prompt, "),
        (b'{"a\\nb\\u001b[2J": 1}\n', r":1: found the keys a b\\x1b\[2J; accepted are"),
        (b"\n" + GOOD.replace(b'"b"', b"7"), ':3: of "chosen" and "rejected" one is a text and one is not'),
        (GOOD + b"nonsense\n", ":3: not JSON .*write one object on each line"),
        (GOOD + b"7\n", ":3: write an object"),
        (GOOD + b"[" * 10_000 + b"\n", ":3: "),
        (b"[1]\n", ": record 1: write an object"),
        (b"[" + GOOD + b"," + GOOD.replace(b"chosen", b"best") + b"]", ": record 2: found the keys"),
        (b"[1, 2\n", r": starts with \[ but is no JSON array"),
        (b"[" * 10_000, r": starts with \[ but is no JSON array"),
        (b'{"chosen": "a", "rejected": "b"}\n', ':1: no "prompt", and the answers are not transcripts'),
        (GOOD.replace(b"}", b', "certainty": "x"}'), ':1: "certainty" is not a number'),
        (b'{"chosen": [{"role": "user"}], "rejected": []}\n', ':1: "chosen" is neither a text nor a chat'),
        (b"\n\xff\n", ":3: not UTF-8 text; save it as UTF-8"),
        ("\n{}\n".encode("utf-16"), ":1: not UTF-8 text"),
        (b"\x1f\x8b no gzip", ": cannot be read"),
        (gzip.compress(GOOD * 20)[:30], ": cannot be read"),
        (gzip.compress(GOOD)[:12] + b"\xff\xff" + gzip.compress(GOOD)[14:], ": cannot be read"),
        (b"PK\x03\x04 and more", ": a zip archive, which is not read here; give UTF-8 text"),
        (b"PAR1 and more", ": a parquet table, which is not read here"),
    ],
)
def test_bad_preference_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + content if ":3" in message else content)
    with pytest.raises(BadInput, match=f"^{path}{message}") as caught:
        data.read_preferences(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="nothing.jsonl: cannot be read"):
        data.read_preferences(tmp_path / "nothing.jsonl")
    with pytest.raises(BadInput, match="not a file"):
        data.read_preferences(tmp_path)


# ----------------------------------------------------------------------------------------------------
# Batches

LETTERS = SimpleNamespace(encode=lambda text: [ord(c) - ord("a") + 1 for c in text], eos=0)  # a is 1, b is 2


def test_pairs_are_cut_and_dropped_by_the_rule():
    records = [
        {"prompt": "abcdef", "chosen": "x", "rejected": "yz"},  # the end of the prompt stays
        {"prompt": "ab", "chosen": "x", "rejected": "y"},  # fits
        {"prompt": "abcdef", "chosen": "vwxyz", "rejected": "z"},  # the start of the answer stays
        {"prompt": "ab", "chosen": "same", "rejected": "same"},  # dropped: equal
        {"prompt": "ab", "chosen": "wxyza", "rejected": "wxyzb"},  # dropped: equal once cut
        {"prompt": "", "chosen": "x", "rejected": "y"},  # dropped: nothing to answer
        {"prompt": "ab", "chosen": "", "rejected": "y"},
    ]
    pairs, kept = data.encode_pairs(LETTERS, records, context=8)
    assert pairs == [
        ([2, 3, 4, 5, 6], [24, 0], [25, 26, 0]),
        ([1, 2], [24, 0], [25, 0]),
        ([3, 4, 5, 6], [22, 23, 24, 25], [26, 0]),
        ([1, 2], [0], [25, 0]),
    ]
    assert kept == [*records[:3], records[-1]]


def test_a_tenth_of_the_pairs_is_held_out_and_few_pairs_are_refused(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    answers = [chr(ord("a") + i % 26) + chr(ord("a") + i // 26) for i in range(50)]
    records = [{"prompt": "ab", "chosen": text, "rejected": "no"} for text in answers]
    records[7]["rejected"] = records[7]["chosen"]
    data.write_records(path, records)
    pairs, kept, n_val = data.load_pairs(path, LETTERS, 8, batch_size=49)
    assert len(pairs) == len(kept) == 49 and n_val == 4 and kept == records[:7] + records[8:]
    assert "45 pairs to learn from, 4 held out, 1 dropped" in capsys.readouterr().out
    with pytest.raises(BadInput, match="50, of which 1 have equal answers.*not fewer than --batch-size"):
        data.load_pairs(path, LETTERS, 8, batch_size=50)
    data.write_records(path, records[:20])
    with pytest.raises(BadInput, match="20, of which 1 have equal answers.*give 20 or more"):
        data.load_pairs(path, LETTERS, 8, batch_size=4)


def test_batches_take_each_item_once_and_keep_lengths_together():
    lengths = np.random.default_rng(0).integers(5, 50, size=1000)
    found = data.batches(lengths, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(found).tolist()) == list(range(1000))
    assert sorted(map(len, found)) == [1000 % 32] + [32] * (1000 // 32)
    waste = 1 - lengths.sum() / sum(len(rows) * lengths[rows].max() for rows in found)
    assert waste < 0.1  # in random order it is about 0.43
    again, other = (data.batches(lengths, 32, np.random.default_rng(seed)) for seed in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(found, again))
    assert not all(np.array_equal(a, b) for a, b in zip(found, other))
    longest = [lengths[rows].max() for rows in found[:16]]
    assert abs(np.corrcoef(longest, range(16))[0, 1]) < 0.9  # short and long ones come mixed


@pytest.mark.parametrize("steps, least, most", [(5, 0, 1), (32, 1, 1), (70, 2, 3)])
def test_batches_for_many_steps_are_passes_over_all_items(steps, least, most):
    found = data.batches([3] * 1000, 32, np.random.default_rng(0), steps)
    assert len(found) == steps
    times = np.bincount(np.concatenate(found), minlength=1000)
    assert (times.min(), times.max()) == (least, most)


def test_padding_and_mask_by_hand():
    tokens, mask, start = data.pad_rows([[1, 2], [3]], [[4], [5, 6, 7]])
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert start == 1 and tokens.dtype == torch.long and mask.dtype == torch.bool


def test_pairs_are_padded_as_all_chosen_and_then_all_rejected():
    tokens, mask, start = data.pad_pairs([([1, 2], [3], [4, 5]), ([6, 7, 8], [9, 0], [1])])
    assert tokens.tolist() == [[1, 2, 3, 0, 0], [6, 7, 8, 9, 0], [1, 2, 4, 5, 0], [6, 7, 8, 1, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert start == 2


def test_rows_of_a_token_file_are_padded_as_token_ids(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    ids = data.encode_files(tokenizer, [tmp_path / "a.txt"], tmp_path / "tokens.bin")
    tokens, _, _ = data.pad_rows([ids[:1], ids[1:2]], [ids[1:3], ids[2:3]])
    assert tokens.tolist() == [ids[:3].tolist(), [*ids[1:3].tolist(), 0]]
    assert tokens.dtype == torch.long


# ----------------------------------------------------------------------------------------------------
# Files


def test_text_read_in_pieces_is_tokenized_as_a_whole(tokenizer, tmp_path, monkeypatch):
    text = "".join(f"line {i},  spaced \n\n\t{'x' * (i % 7)}é\n" for i in range(400)) + EOS + "  two "
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n"))
    pieces = list(data.read_chunks(tmp_path / "a.txt", size=100))
    assert "".join(pieces) == text == data.read_text(tmp_path / "a.txt")
    assert len(pieces) > 50 and max(map(len, pieces)) < 150
    whole = data.read_chunks
    monkeypatch.setattr(data, "read_chunks", lambda path: whole(path, size=100))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    ids = data.encode_files(tokenizer, paths, tmp_path / "tokens.bin")
    first, second = text.split(EOS)
    expected = tokenizer.encode(first) + [tokenizer.eos] + tokenizer.encode(second) + [tokenizer.eos]
    assert ids.tolist() == expected + tokenizer.encode("three\n") + [tokenizer.eos]


def pieces_cut_no_word(tmp_path, space):
    rng = random.Random(0)
    for i in range(300):
        text = "".join(rng.choice(["a", "'s", "7", "!", "é", EOS, " ", "\n", *space]) for _ in range(60))
        (tmp_path / "text").write_bytes(text.encode())
        pieces = list(data.read_chunks(tmp_path / "text", size=i % 9 + 1))
        assert "".join(pieces) == text
        words = [word for piece in pieces for word in word_pattern().findall(piece)]
        assert words == word_pattern().findall(text)


def test_pieces_cut_no_word(tmp_path):
    pieces_cut_no_word(tmp_path, ["\n\n", "\t", "\r\n", "\x0b", "\x85", "\xa0", "\u2028", "\u3000"])


def test_pieces_cut_no_word_at_an_information_separator(tmp_path):
    """U+001C to U+001F: Python takes them for white space, GPT-2 does not."""
    pieces_cut_no_word(tmp_path, ["\x1c", "\x1d", "\x1e", "\x1f"])


def test_only_the_byte_order_mark_at_the_beginning_is_left_out(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo")
    assert data.read_text(tmp_path / "text") == "one\n\ufefftwo"


@pytest.mark.parametrize("size, kind", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_token_files_hold_any_id_of_the_vocabulary(tmp_path, size, kind):
    """A vocabulary of 2¹⁶ tokens fits two bytes, one more does not."""
    many = SimpleNamespace(vocab=range(size), eos=size - 1, encode=lambda text: [len(text)])
    (tmp_path / "text").write_text("four")
    ids = data.encode_files(many, [tmp_path / "text"] * 2, tmp_path / "tokens.bin")
    assert ids.dtype == kind
    assert [i for i in ids.tolist() if i] == [4, size - 1] * 2  # the encoding of "" is 0 in this one


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


def test_text_that_could_harm_the_terminal_is_escaped():
    kept = "plain ünï 日本\u3000中文\nline\ttab\u00a0no-break 👩\u200d👧 \u200b é ไทย عربي עברית"
    assert data.printable(kept) == kept
    assert data.printable("\x1b[2Jred\r\x07\u202e\x9b") == "\\x1b[2Jred\\r\\x07\\u202e\\x9b"


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
