"""Preferences: forms of records, files of them, what is held out, and the batches made of them."""

import contextlib
import gzip
import io
import itertools
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
from data import BadInput, canonical

SETTINGS = settings(max_examples=500, deadline=None, derandomize=True, database=None)
SPEAKS = "system messages tools history instruction input context question conversations".split()

# ----------------------------------------------------------------------------------------------------
# Forms of records


def said(role):
    return lambda text: {"role": role, "content": text}


USER, ASSISTANT, SYSTEM = said("user"), said("assistant"), said("system")
HI, HELLO, JOKE, BRIEF = USER("Hi."), ASSISTANT("Hello."), USER("Joke?"), SYSTEM("Be brief.")
HA, NO, CHAT = ASSISTANT("Ha."), ASSISTANT("No."), [HI, HELLO, JOKE]
FIRST = "\n\nHuman: Hi.\n\nAssistant:"  # the transcripts of [HI], of CHAT, and of [BRIEF, HI]
LONG = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Joke?\n\nAssistant:"
BRIEFED = "\n\nSystem: Be brief.\n\nHuman: Hi.\n\nAssistant:"
MORE = "\n\nHuman: Joke?\n\nAssistant: Ha."

ACCEPTED = {  # three texts, and all that gives them: a prompt (where there is one) and two answers
    ("A: ", "A: a\n", ""): [("A: ", "A: a\n", "")],  # texts are taken as they are
    (LONG, " Ha.", " No."): [
        (LONG, " Ha.", " No."),
        (f"{LONG} Ha.", f"{LONG} No."),
        (None, f"{LONG} Ha.", f"{LONG} No."),
        (CHAT, [HA], [NO]),
        ([*CHAT, HA], [*CHAT, NO]),
        ([], [*CHAT, HA], [*CHAT, NO]),
        (CHAT, [*CHAT, HA], [*CHAT, NO]),  # the prompt once more
        (CHAT, [HA], [*CHAT, NO]),
        ([HI], [HELLO, JOKE, HA], [HELLO, JOKE, NO]),  # both share turns after it
        ("Hi.", [HELLO, JOKE, HA], [*CHAT, NO]),
    ],
    (FIRST, " Ha.", " No."): [
        ("Hi.", [HA], [NO]),
        ("Hi.", [HI, HA], [HI, NO]),
        ([HI | {"name": None}], [HA | {"tool_calls": []}], [NO | {"parts": ""}]),
    ],
    (BRIEFED, " Ha.", " No."): [
        (f"{BRIEFED} Ha.", f"{BRIEFED} No."),
        ([BRIEF, HI], [HA], [NO]),
        ([BRIEF], [HI, HA], [HI, NO]),
        ([BRIEF, HI, HA], [BRIEF, HI, NO]),
    ],
    (FIRST, " Ha, yes.", " Ha, no."): [(f"{FIRST} Ha, yes.", f"{FIRST} Ha, no.")],
    (FIRST, " Ha.", " Ha. Ha."): [(f"{FIRST} Ha.", f"{FIRST} Ha. Ha.")],
    (FIRST, f" Hello.{MORE}", " No."): [(f"{FIRST} Hello.{MORE}", f"{FIRST} No."), ([*CHAT, HA], [HI, NO])],
    (FIRST, f" Hello.{MORE}", f" No.{MORE}"): [([*CHAT, HA], [HI, NO, JOKE, HA])],
    (FIRST, " Hello.", f" Hello.{MORE}"): [([HI], [HELLO], [HELLO, JOKE, HA])],
    (FIRST, f" Hello.{MORE}", f" Hello.{FIRST} No."): [([*CHAT, HA], [HI, HELLO, HI, NO])],
    (FIRST, " Ha.", " "): [([HI], [HA], [ASSISTANT("")])],
}


@pytest.mark.parametrize(
    "expected, parts", [(texts, parts) for texts in ACCEPTED for parts in ACCEPTED[texts]]
)
def test_every_accepted_form_gives_prompt_and_answers(expected, parts):
    record = dict(zip(("prompt", "chosen", "rejected")[-len(parts) :], parts))
    expected = dict(zip(("prompt", "chosen", "rejected"), expected))
    assert canonical(record) == expected
    assert canonical(canonical(record)) == expected
    for certainty in (0, 0.75, 1):
        assert canonical(record | {"certainty": certainty}) == expected | {"certainty": certainty}
    nothing = dict.fromkeys(SPEAKS[:5], None) | dict.fromkeys(SPEAKS[5:], [])
    assert canonical(record | nothing | {"id": 7, "score_chosen": 1.0}) == expected


TEXTS = {"prompt": "p", "chosen": "a", "rejected": "b"}
TALK = {"prompt": [HI], "chosen": [HA], "rejected": [NO]}
TRANSCRIPTS = {"chosen": f"{FIRST} Ha.", "rejected": f"{FIRST} No."}
REFUSED = {
    "write an object": [None, 1, "text", [], True],
    "found the keys .*; what is said goes under prompt, chosen, rejected$": [
        {},
        {"prompt": "p", "chosen": "a"},
        TEXTS | {"chosen": None},
        {"response_j": "a", "response_k": "b"},
    ],
    "neither three texts, nor conversations, nor two transcripts without a prompt$": [
        {"chosen": "a", "rejected": "b"},
        TRANSCRIPTS | {"rejected": "No."},
        TRANSCRIPTS | {"prompt": [HI]},
        TALK | {"prompt": FIRST},
        TALK | {"chosen": "Ha.", "rejected": "No."},
        TEXTS | {"rejected": [NO]},
        TEXTS | {"chosen": 7},
        TEXTS | {"prompt": 7},
    ],
    'the answers say the "prompt" once more; leave it out$': [
        TRANSCRIPTS | {"prompt": "Hi."},
        TRANSCRIPTS | {"prompt": FIRST},
    ],
    '"prompt" is neither a text nor a list': [TALK | {"prompt": HI}, TALK | {"prompt": 7}],
    '"chosen" is neither a text nor a list': [TALK | {"chosen": HA}, TALK | {"chosen": [[HA]]}],
    '"rejected" is neither a text nor a list': [TALK | {"rejected": 7}, TALK | {"rejected": [NO, "No."]}],
    '"chosen" has a message whose "content" is not a text$': [
        TALK | {"chosen": [{"role": "assistant"}]},
        TALK | {"chosen": [ASSISTANT([{"type": "text", "text": "Ha."}])]},
    ],
    '"prompt" has a message whose "parts" is not a text$': [TALK | {"prompt": [HI | {"parts": ["x"]}]}],
    '"rejected" has a message whose "tool_calls" is not a text$': [
        TALK | {"rejected": [NO | {"tool_calls": [{"name": "f"}]}]},
        TALK | {"rejected": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    ],
    '"chosen" has a message whose "from" is not a text$': [
        TALK | {"chosen": [{"from": "gpt", "value": "a"}]}
    ],
    "\"chosen\" has the role 'tool', not one of user, system, assistant$": [
        TALK | {"chosen": [HA, said("tool")("a")]}
    ],
    '"chosen" has the role ': [TALK | {"chosen": [said(role)("a")]} for role in (None, 7, [], {})],
    "the prompt is empty, or the answers share none$": [
        TEXTS | {"prompt": "\n\nHuman: \n\nAssistant:"},
        TALK | {"prompt": [USER(" ")]},
        TALK | {"prompt": []},
        TRANSCRIPTS | {"rejected": "\n\nHuman: Bye.\n\nAssistant: No."},
        {"chosen": "\n\nHuman: Hi.", "rejected": "\n\nHuman: Hi."},
    ],
    "the answers do not go on from one prompt with a turn of the assistant$": [
        TALK | {"chosen": [JOKE, HA]},
        TALK | {"rejected": []},
        TALK | {"chosen": [HI], "rejected": [HI]},
        {"prompt": CHAT, "chosen": [JOKE, HA], "rejected": [HELLO, JOKE, NO]},
        {"chosen": [HI, HA], "rejected": [JOKE, HA]},
        {"chosen": [HI, HA], "rejected": []},
    ],
    "the prompt is empty$": [record | {"prompt": text} for record in (TEXTS, TALK) for text in ("", " \n")],
    "both answers are empty$": [
        TEXTS | {"chosen": "", "rejected": " \n"},
        TALK | {"chosen": [ASSISTANT("")], "rejected": [ASSISTANT(" ")]},
        {"chosen": FIRST, "rejected": f"{FIRST} "},
    ],
    '"certainty" is not a number between 0 and 1$': [
        TEXTS | {"certainty": certainty}
        for certainty in ("0.5", None, [], -0.1, 1.1, math.nan, math.inf, 10**400)
    ],
}
REFUSED |= {  # but "messages" beside a prompt are what it and an answer say, as in UltraFeedback
    f'"{key}" would be lost': [
        record | {key: ["x"]} for record in (TEXTS, TALK, TRANSCRIPTS, {})[2 * (key == "messages") :]
    ]
    for key in SPEAKS
}


@pytest.mark.parametrize("message, record", [(text, record) for text in REFUSED for record in REFUSED[text]])
def test_every_other_form_is_refused_with_its_reason(message, record):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        canonical(record)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------
# Random records: what is built from messages must come back as the transcript of these messages

NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
PIECE = st.sampled_from(["", "Hi", " ", "é", "\n\n", "Human:", "\n\nAssistant: ", "\n\nHuman:", "System"])
VALUE = st.sampled_from([None, "", [], {}, "x", [1], {"a": "b"}])  # the first four hold nothing
OTHERS = st.dictionaries(st.sampled_from([*SPEAKS, "id", "source"]), VALUE, max_size=2)
IN_MESSAGE = st.dictionaries(st.sampled_from(["tool_calls", "parts"]), VALUE, max_size=1)


def written(messages):
    """A transcript, as Anthropic's HH writes it."""
    return "".join(f"\n\n{NAMES[message['role']]}: {message['content']}" for message in messages)


@st.composite
def random_records(draw):
    """A record of a random form, the two transcripts that it says, and the keys for which to refuse it.

    No two messages have the same text.
    """
    texts = (f"{draw(PIECE)}{draw(PIECE)}{i}{draw(PIECE)}" for i in itertools.count())
    talk = lambda *roles: [said(role)(next(texts)) for role in roles]
    more = lambda: draw(st.integers(0, 2))
    shared = talk(*["system"] * draw(st.booleans()), "user", *["assistant", "user"] * more())
    answers = [talk("assistant", *["user", "assistant"] * more()) for _ in range(2)]
    if draw(st.booleans()):  # then the answers begin alike, too
        answers[1] = answers[0][: 2 * more() + 1] + talk("user", *["assistant", "user"] * more())
    expected = [written(shared + answer) for answer in answers]
    others, in_message = draw(OTHERS), draw(IN_MESSAGE)
    match draw(st.sampled_from(["texts", "transcripts", "conversations"])):
        case "texts":
            prompt = f"{written(shared)}\n\nAssistant:"
            answers, in_message = [text.removeprefix(prompt) for text in expected], {}
        case "transcripts":
            prompt, answers, in_message = None, expected, {}
        case "conversations":
            cut = draw(st.integers(0, len(shared)))  # the prompt may end anywhere in what both share
            prompt, again = shared[:cut], [draw(st.sampled_from([0, cut])) for _ in answers]
            answers = [shared[start:] + answer for start, answer in zip(again, answers)]
            if cut == 1 and prompt[0]["role"] == "user" and not prompt[0]["content"].startswith("\n\n"):
                prompt = draw(st.sampled_from([prompt, prompt[0]["content"]]))
            answers[0] = [*answers[0][:-1], answers[0][-1] | in_message]
    record = others | {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    if not prompt and draw(st.booleans()):
        del record["prompt"]
    refused = {key for key in SPEAKS if others.get(key)} - ({"messages"} if prompt else set())
    return record, expected, refused | {key for key in in_message if in_message[key]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("preferences") / "pairs.jsonl"


@settings(SETTINGS, max_examples=1500)  # what has gone wrong here was rare
@given(random_records())
def test_a_random_record_gives_back_all_that_it_says_exactly_once(path, case):
    """Its other keys, where they hold something, are a reason to refuse it, or are named as ignored."""
    record, expected, refused = case
    path.write_text(json.dumps(record))
    if refused:
        with pytest.raises(BadInput) as caught:
            data.read_preferences(path)
        assert any(f'"{key}"' in str(caught.value) for key in refused)
        return
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        (found,) = data.read_preferences(path)
    assert set(found) == {"prompt", "chosen", "rejected"}
    assert [found["prompt"] + found["chosen"], found["prompt"] + found["rejected"]] == expected
    assert found["prompt"].endswith("\n\nAssistant:")  # what follows is the assistant's
    others = {key for key in record if key not in ("prompt", "chosen", "rejected")}
    named = set(printed.getvalue().rstrip("\n").rpartition("ignored in them: ")[2].split(", ")) - {""}
    assert {key for key in others if record[key]} <= named <= others
    assert canonical(found) == found


ANY_TEXT = st.sampled_from(["", " ", "a", "b", FIRST, LONG, f"{FIRST} b", f"{LONG} a", "\n\nHuman: "])
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": ANY_TEXT})
ODD_VALUE = st.sampled_from(["user", "system", "a", 7, 0.5, None, [], {}])
ODD_MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), ODD_VALUE)
ANY_CHAT = st.lists(MESSAGE, max_size=4)
ANY_PART = st.one_of(
    ANY_TEXT,
    ANY_CHAT,
    st.lists(st.one_of(MESSAGE, MESSAGE, ODD_MESSAGE, ODD_VALUE), max_size=4),
    st.one_of(ODD_MESSAGE, ODD_VALUE),
)
ANY_RECORD = st.one_of(
    *(
        st.fixed_dictionaries({"chosen": part, "rejected": part}, optional={"prompt": part})
        for part in (ANY_TEXT, ANY_CHAT, ANY_PART)
    ),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "certainty", "system"]), ANY_PART),
    ANY_PART,
)


def test_any_record_is_three_texts_or_refused_in_one_sentence():
    outcomes = Counter()

    @settings(SETTINGS, max_examples=2000)
    @given(ANY_RECORD)
    @example({"chosen": f"{FIRST}\n\nHuman: b", "rejected": f"{FIRST} c"})
    def check(record):
        try:
            found = canonical(record)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert all(isinstance(found[key], str) for key in ("prompt", "chosen", "rejected"))
            assert re.search("[a-z]", re.sub("Human|Assistant", "", found["prompt"]))  # somebody said a word
            assert canonical(found) == found
            outcomes["accepted"] += 1

    check()
    assert min(outcomes["refused"], outcomes["accepted"]) > 20


# ----------------------------------------------------------------------------------------------------
# Preference files


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_arrays_and_gzip_are_read_alike(tmp_path, bom, end):
    expected = [{"prompt": FIRST, "chosen": " Ha.", "rejected": " No."}] * 2
    one = json.dumps(TALK)
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


def test_written_records_are_read_again_whatever_they_say(path, capsys):
    odd = ["naïve 日本 🙂", "two\n\nlines\r\n", '"quoted" \\ {braces}', "\u2028\x85\x1c\x00", "\ufeff\ufffd"]
    records = [{"prompt": text, "chosen": " a", "rejected": f" {text}", "certainty": 1 / 3} for text in odd]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]  # as others write them
    path.write_bytes("\n".join(lines).encode())
    assert data.read_preferences(path) == records
    records.append({"prompt": "half \ud800", "chosen": "\ud800", "rejected": "\udfff"})
    data.write_records(path, records)
    assert data.read_preferences(path) == records
    assert len(path.read_bytes().splitlines()) == len(records)
    assert capsys.readouterr().out == ""  # nothing ignored, nothing to say


def test_keys_that_are_ignored_are_named_once(path, capsys):
    records = [TEXTS | {"id": 1}, TEXTS, TEXTS | {"id": 2, "messages": [HI], "\x1b[2J": 0}]
    data.write_records(path, records)
    assert data.read_preferences(path) == [TEXTS] * 3
    assert capsys.readouterr().out == f"{path}: 3 pairs; ignored in them: id, messages, \\x1b[2J\n"


GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", ": no preferences in it; write one object on each line"),
        (b" \n\n", ": no preferences in it"),
        (b"[]", ": no preferences in it"),
        (b'{"prompt": "p", "chosen": "a"}\n', ":1: found the keys prompt, chosen; what is said goes"),
        (b'{"a\\nb\\u001b[2J": 1}\n', r":1: found the keys a b\\x1b\[2J; what is said goes"),
        (GOOD + b"\n" + GOOD.replace(b'"b"', b"7"), ":3: neither three texts"),
        (GOOD + GOOD + b"nonsense\n", ":3: not JSON .*write one object on each line"),
        (GOOD + GOOD + b"7\n", ":3: write an object"),
        (GOOD + GOOD + b"[" * 10_000 + b"\n", ":3: "),
        (b"[1]\n", ": record 1: write an object"),
        (b"[" + GOOD + b"," + GOOD.replace(b"chosen", b"best") + b"]", ": record 2: found the keys"),
        (b"[1, 2\n", r": starts with \[ but is no JSON array"),
        (b"[" * 10_000, r": starts with \[ but is no JSON array"),
        (b'{"chosen": [{"role": [], "content": "a"}], "rejected": []}\n', ':1: "chosen" has the role'),
        (GOOD + b"\xff\n", ":2: not UTF-8 text"),
    ],
)
def test_bad_preference_files_are_refused_in_one_sentence(path, content, message):
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"^{path}{message}") as caught:
        data.read_preferences(path)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------
# Pairs of token ids, and which of them are held out

LETTERS = SimpleNamespace(encode=lambda text: [ord(c) - ord("a") + 1 for c in text], eos=0)  # a is 1, b is 2
CODES = ["".join(code) for code in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3)]


def test_pairs_are_cut_and_dropped_by_the_rule():
    records = [
        {"prompt": "abcdef", "chosen": "x", "rejected": "yz"},  # the end of the prompt stays
        {"prompt": "ab", "chosen": "x", "rejected": "y"},  # fits
        {"prompt": "abcdef", "chosen": "vwxyz", "rejected": "z"},  # the start of the answer stays
        {"prompt": "ab", "chosen": "same", "rejected": "same"},  # dropped: equal
        {"prompt": "ab", "chosen": "wxyza", "rejected": "wxyzb"},  # dropped: equal once cut
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


def load(path, prompts, batch_size=4):
    """`load_pairs` of a file with these prompts, each row with an answer of its own."""
    rows = [{"prompt": prompt, "chosen": code, "rejected": "no"} for prompt, code in zip(prompts, CODES)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows, *data.load_pairs(path, LETTERS, 8, batch_size)


def test_where_each_prompt_occurs_once_the_last_tenth_is_held_out(path, capsys):
    rows, pairs, kept, n_val = load(path, CODES[:49])
    assert n_val == 4 and kept == rows
    assert pairs == data.encode_pairs(LETTERS, rows, 8)[0]
    assert "45 pairs to learn from, 4 held out, 0 dropped" in capsys.readouterr().out
    assert load(path, CODES[:10_250])[-1] == 1024  # more than that would tell nothing more


def last_prompts(prompts, at_least):
    """The prompts that come last and have together so many rows."""
    chosen = []
    for prompt in reversed(prompts):
        if prompt not in chosen and sum(map(prompts.count, chosen)) < at_least:
            chosen.append(prompt)
    return chosen


@SETTINGS
@given(st.lists(st.sampled_from(CODES[:12]), min_size=20, max_size=60))
@example([code for code in CODES[:12] for _ in range(5)])  # each row five times
@example(CODES[:12] * 5)
@example(CODES[:1] * 30)
def test_no_prompt_is_on_both_sides(path, prompts):
    last = last_prompts(prompts, len(prompts) // 10)
    with contextlib.redirect_stdout(io.StringIO()):
        if sum(prompt in last for prompt in prompts) > len(prompts) / 2:  # there is little to learn from
            n = sum(prompt in last for prompt in prompts)
            with pytest.raises(BadInput, match=f"too few pairs .* to learn from, {n} held out"):
                load(path, prompts)
            return
        rows, pairs, kept, n_val = load(path, prompts)
    train, held_out = kept[:-n_val], kept[-n_val:]
    assert train == [row for row in rows if row["prompt"] not in last]
    assert held_out == [row for row in rows if row["prompt"] in last]
    assert n_val >= len(rows) // 10
    assert pairs == data.encode_pairs(LETTERS, kept, 8)[0]


def test_few_pairs_are_refused_and_equal_answers_are_dropped(path, capsys):
    assert load(path, CODES[:50], batch_size=50)[-1] == 5
    with pytest.raises(BadInput, match="50, of which 0 have equal answers.*not fewer than --batch-size"):
        load(path, CODES[:50], batch_size=51)
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in CODES[:21]]
    rows[7]["rejected"] = "yes"
    data.write_records(path, rows[:20])
    with pytest.raises(BadInput, match="20, of which 1 have equal answers.*give 20 or more"):
        data.load_pairs(path, LETTERS, 8, batch_size=4)
    data.write_records(path, rows)
    assert data.load_pairs(path, LETTERS, 8, batch_size=4)[1:] == (rows[:7] + rows[8:], 2)
    assert "18 pairs to learn from, 2 held out, 1 dropped" in capsys.readouterr().out


def test_best_accuracy_by_hand():
    certain = [{"certainty": 0.9}, {"certainty": 0.2}, {"certainty": 0.5}]
    assert data.best_accuracy(certain) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    assert data.best_accuracy([*certain, {"prompt": "p"}]) is None


# ----------------------------------------------------------------------------------------------------
# Batches


def test_batches_take_each_item_once_in_random_order():
    found = data.batches(1000, 32, np.random.default_rng(1))
    assert sorted(np.concatenate(found).tolist()) == list(range(1000))
    assert len(found) == math.ceil(1000 / 32) and max(map(len, found)) == 32
    again, other = (data.batches(1000, 32, np.random.default_rng(seed)) for seed in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(found, again))
    assert not all(np.array_equal(a, b) for a, b in zip(found, other))


def test_every_batch_has_all_kinds():
    """Of 3,000 items a third is of one kind: in batches of 30 that is 10 ± 2.6, as in any random sample."""
    found = data.batches(3000, 30, np.random.default_rng(0))
    counts = np.array([(rows < 1000).sum() for rows in found])
    assert counts.mean() == 10 and 2 < counts.std() < 3.2
    places = np.array([rows.mean() for rows in found])
    assert abs(np.corrcoef(places, range(100))[0, 1]) < 0.4  # nor do kinds come one after the other


@pytest.mark.parametrize("batch_size", [4, 16, 32])
def test_no_batch_is_less_than_half_full(batch_size):
    """Whatever is left at the end of a pass is shared out, for every number of items."""
    for n in range(batch_size, 40 * batch_size, 3):
        found = data.batches(n, batch_size, np.random.default_rng(n))
        assert sorted(np.concatenate(found).tolist()) == list(range(n))
        sizes = [len(rows) for rows in found]
        assert len(found) == math.ceil(n / batch_size) and max(sizes) <= batch_size <= 2 * min(sizes)


@pytest.mark.parametrize("steps, least, most", [(5, 0, 1), (32, 1, 1), (70, 2, 3)])
def test_batches_for_many_steps_are_passes_over_all_items(steps, least, most):
    found = data.batches(1000, 32, np.random.default_rng(0), steps)
    assert len(found) == steps
    times = np.bincount(np.concatenate(found), minlength=1000)
    assert (times.min(), times.max()) == (least, most)


def test_padding_and_mask_by_hand():
    row_of_a_file = np.array([3, 5, 6, 65_535], dtype=np.uint16)
    tokens, mask, start = data.pad_rows([[1, 2], row_of_a_file[:1]], [[4], row_of_a_file[1:]])
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 65_535]]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert start == 1 and tokens.dtype == torch.long and mask.dtype == torch.bool


def test_pairs_are_padded_as_all_chosen_and_then_all_rejected():
    tokens, mask, start = data.pad_pairs([([1, 2], [3], [4, 5]), ([6, 7, 8], [9, 0], [1])])
    assert tokens.tolist() == [[1, 2, 3, 0, 0], [6, 7, 8, 9, 0], [1, 2, 4, 5, 0], [6, 7, 8, 1, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert start == 2


# ----------------------------------------------------------------------------------------------------
# What is said of a file


def test_what_is_cut_to_the_context_is_counted(capsys):
    """A context of 16: answers of 9 and 12 tokens with EOS keep 8, and prompts what then has room."""
    letters = lambda n: "".join(f" {i}" for i in range(n))
    rows = [(20, 11, 3), (4, 5, 8), (3, 2, 1), (9, 7, 2)]  # tokens of prompt, chosen and rejected
    records = [{"prompt": letters(p), "chosen": letters(c), "rejected": letters(r)} for p, c, r in rows]
    tokenizer = SimpleNamespace(encode=lambda text: text.split(), eos="end")
    pairs, kept = data.encode_pairs(tokenizer, records, 16)
    assert kept == records and pairs[0] == (
        [*map(str, range(12, 20))],
        [*map(str, range(8))],
        [*"012", "end"],
    )
    assert pairs[3][0] == [*map(str, range(1, 9))] and pairs[1][2] == [*map(str, range(8))]
    said = capsys.readouterr().out
    assert "2 answers are cut to fit the context, 16 tokens; the longest has 12\n" in said
    assert "2 prompts are cut to fit the context, 16 tokens; the longest has 20\n" in said


def test_texts_beside_conversations_and_the_name_of_the_end_are_said(path, capsys):
    texts = {"prompt": "Hi.", "chosen": "Ha.<|endoftext|>", "rejected": "No."}
    chat = {"prompt": [HI], "chosen": [HA], "rejected": [NO]}
    data.write_records(path, [texts, chat, chat])
    data.read_preferences(path)
    said = capsys.readouterr().out
    assert f"{path}: 2 of 3 prompts are conversations, with Human: and the like\n" in said
    assert (
        f"{path}: 1 pairs have <|endoftext|> in their texts; it is text there, and not the end of one\n"
        in said
    )
    data.write_records(path, [chat, chat])
    data.read_preferences(path)
    assert capsys.readouterr().out == ""
