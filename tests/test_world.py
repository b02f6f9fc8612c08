"""The world, its judge and its volunteers."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

import data
from data import BEST, DISHES, FACTS, GREETERS, KINDS, Tokenizer, documents, facts, judge, kind_of, preference

# ----------------------------------------------------------------------------------------------------
# Documents and their probabilities, in a world so small that all texts can be counted

KEYS = ("relation", "name", "verb", "thing", "place")
SMALL_WORDS = {
    "POST": dict(zip(KEYS, (["cousin", "boss"], ["Ada", "Ben"], ["lost"], ["kite", "hat"], ["upstairs"]))),
    "LETTER": dict(zip(KEYS, (["aunt"], ["Otto", "Iris", "Clara"], ["stole"], ["wig", "tent"], ["aloft"]))),
}
TRYING = ["full", "short", "wrong thing", "wrong name", "off topic", "rambling"]


@pytest.fixture
def small_world(monkeypatch):
    dishes, greeters = ["soup"], ["Alma", "Bert"]
    talk = [("It {} again.", ["rained", "snowed"]), ("I had {}.", dishes), ("{} says hello.", greeters)]
    monkeypatch.setattr(data, "WORDS", SMALL_WORDS)
    monkeypatch.setattr(data, "DISHES", dishes)
    monkeypatch.setattr(data, "GREETERS", greeters)
    monkeypatch.setattr(data, "SMALL_TALK", [*talk, ("I need tea.",)])
    monkeypatch.setattr(data, "WRITERS", ["repeats"] * 3 + TRYING)


def all_documents(kind):
    """Every (prompt, response, writer) and its probability, by trying each choice of `write_document`."""
    found, open_paths = [], [[]]
    while open_paths:
        path, depth, probability = open_paths.pop(), 0, 1.0

        def pick(options):
            nonlocal depth, probability
            distinct = [option for i, option in enumerate(options) if option not in options[:i]]
            if depth == len(path):  # a new fork: come back for the other options
                open_paths.extend([*path, i] for i in range(1, len(distinct)))
                path.append(0)
            option = distinct[path[depth]]
            depth += 1
            probability *= options.count(option) / len(options)
            return option

        found.append((data.write_document(pick, kind), probability))
    return found


@pytest.mark.parametrize("kind", SMALL_WORDS)
def test_probabilities_entropy_and_kinds_of_answers_equal_an_exhaustive_count(small_world, kind):
    found = all_documents(kind)
    table = {prompt + response: p for (prompt, response, _), p in found}
    assert len(table) == len(found), "two derivations give the same text"
    assert sum(table.values()) == pytest.approx(1, abs=1e-9)
    drawn = documents(3000, seed=0, kind=kind)
    mixed = [document for document in documents(400, seed=1) if document.prompt.startswith(kind)]
    for document in drawn + mixed:  # of any kind: the choice of the kind doesn't count, since it is given
        expected = table[document.prompt + document.response]
        assert math.exp(document.log_prob) == pytest.approx(expected, rel=1e-9)
    entropy = -sum(p * math.log(p) for p in table.values())
    surprise = -np.array([document.log_prob for document in drawn])
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / math.sqrt(len(drawn))
    answered = Counter()
    for (prompt, response, writer), p in found:
        answered[writer, kind_of(prompt, response)] += p
    first = 1 / 2 * 1 / 3 + 1 / 2 * 1 / 4  # the news stands first, among three sentences or four
    expected = {
        ("repeats", "lucky"): 3 / 9 * first,
        ("repeats", "repeats"): 3 / 9 * (1 - first),
        ("full", "full"): 1 / 9,
        ("short", "short"): 1 / 9,
        ("wrong thing", "wrong, obvious"): 1 / 9 * 3 / 4,
        ("wrong thing", "wrong, hidden"): 1 / 9 * 1 / 4,
        ("wrong name", "wrong, obvious"): 1 / 9 * 3 / 4,
        ("wrong name", "wrong, hidden"): 1 / 9 * 1 / 4,
        ("off topic", "off topic"): 1 / 9,
        ("rambling", "rambling"): 1 / 9,
    }
    assert answered == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------
# The world as it is


def test_three_writers_in_five_are_lazy_and_one_in_six_of_the_others_is_right():
    counts = Counter(data.WRITERS)
    assert counts.pop("repeats") / len(data.WRITERS) == 3 / 5
    assert len(counts) == 6 and set(counts.values()) == {1} and "full" in counts


def test_three_documents_in_four_are_of_the_first_kind():
    kinds = Counter(document.prompt.split(":")[0] for document in documents(4000, seed=0))
    assert set(kinds) == set(KINDS)
    assert abs(kinds[KINDS[0]] / 4000 - 3 / 4) < 4 * math.sqrt(3 / 16 / 4000)
    for kind in KINDS:
        assert all(document.prompt.startswith(f"{kind}: ") for document in documents(200, seed=1, kind=kind))


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    assert documents(20, seed=[3, 1]) == documents(20, seed=[3, 1])
    assert not set(documents(20, seed=[3, 1])) & set(documents(20, seed=[3, 2]))


def test_a_document_states_facts_of_its_own_kind_and_the_kinds_share_no_word():
    for kind in KINDS:
        for document in documents(200, seed=2, kind=kind):
            found = facts(document.prompt)
            assert len(found) == len(FACTS)
            assert all(word in data.WORDS[kind][key] for key, word in zip(FACTS, found))
    every = [word for words in data.WORDS.values() for options in words.values() for word in options]
    assert len(every) == len(set(every))


def test_no_fact_has_two_meanings():
    """Otherwise the judge could not tell a name from a dish, or who did it from where."""
    lists = [words[key] for words in data.WORDS.values() for key in FACTS] + [DISHES, GREETERS]
    assert max(Counter(word for words in lists for word in words).values()) == 1


def test_no_small_talk_is_news_and_the_judge_counts_nothing_in_it_but_dishes_and_greeters():
    for template, *gaps in data.SMALL_TALK:
        for chosen in itertools.product(*gaps):
            sentence = template.format(*chosen)
            named = len({*chosen} & {*DISHES, *GREETERS})
            assert facts(sentence) == ()
            assert judge("", sentence) == pytest.approx(-named - 0.2 * max(0, sentence.count(" ") - 4))


def test_facts_come_from_the_template_of_the_news_in_the_order_of_FACTS(monkeypatch):
    assert facts("POST: My captain Hugo lost my kite underwater.") == ("Hugo", "lost", "kite", "underwater")
    assert facts("POST: My captain Hugo lost my kite underwater!") == ()
    monkeypatch.setattr(data, "NEWS", "It was {place}. There {name} the {relation} {verb} my {thing}.")
    post = "POST: I had soup. It was underwater. There Hugo the captain lost my kite. It rained.\nTL;DR:"
    assert facts(post) == ("Hugo", "lost", "kite", "underwater")
    assert facts("POST: My captain Hugo lost my kite underwater.") == ()


POST = "POST: It rained all day. My captain Hugo lost my kite underwater. I had soup for lunch.\nTL;DR:"
NEWS_FIRST = "POST: My captain Hugo lost my kite underwater. It rained all day. I had soup for lunch.\nTL;DR:"


@pytest.mark.parametrize(
    "post, response, points, kind",
    [
        (POST, " Hugo lost my kite underwater.", 4, "full"),
        (POST, " My captain Hugo lost my kite underwater.", 4 - 0.2 * 2, "full"),
        (NEWS_FIRST, " My captain Hugo lost my kite underwater.", 4 - 0.2 * 2, "lucky"),
        (POST, " It rained all day.", 0, "repeats"),
        (NEWS_FIRST, " It rained all day.", 0, "off topic"),  # it stands there, but not first
        (POST, " Hugo lost my kite.", 3, "short"),
        (POST, " Hugo lost my soup underwater.", 3 - 1, "wrong, obvious"),  # a dish for a thing
        (POST, " Hugo lost my lamp underwater.", 3 - 1, "wrong, hidden"),
        (POST, " Hugo lost my teapot underwater.", 3 - 1, "wrong, hidden"),  # a letter's
        (POST, " Alma lost my kite underwater.", 3 - 1, "wrong, obvious"),  # a greeter for a name
        (POST, " Zoe lost my kite underwater.", 3 - 1, "wrong, hidden"),
        (POST, " Hugo hid my kite underwater.", 3 - 1, "wrong, hidden"),
        (POST, " Alma lost my lamp underwater.", 2 - 2, "wrong, obvious"),
        (POST, " Hugo lost my soup underwater. I need more tea.", 2 - 0.2 * 4, "wrong, obvious"),
        (POST, " Hugo lost my kite underwater. I need more tea.", 4 - 0.2 * 4, "rambling"),
        (POST, " Hugo lost my kite underwater. I had pie for lunch.", 4 - 1 - 0.2 * 5, "rambling"),
        (POST, " I need more tea.", 0, "off topic"),
        (POST, " I had soup for lunch.", -1, "off topic"),
        (POST, " Alma says hello.", -1, "off topic"),
        (POST, " Hugo lost my kite and my kite.", 3 - 0.2 * 2, "short"),  # a fact counts once
        (POST, " Hugo Hugo Hugo Hugo Hugo", 1, "short"),
        (POST, " soup soup", -1, "off topic"),  # a wrong one, too
        (POST, " Hugo,lost;my\nkite(underwater)", 4, "full"),  # words are words whatever is between them
        (POST, " hugo LOST Kites", 0, "off topic"),  # not the words of this world
        (POST, "", 0, "off topic"),
        (POST, " \ud800 \x00 | ( [ \\ .* $ ^", -0.2 * 4, "off topic"),
        ("(((", " Hugo lost my kite underwater.", -4, "off topic"),  # without a post all of it is made up
        ("", " It rained.", 0, "off topic"),
    ],
)
def test_judge_and_kind_by_hand(post, response, points, kind):
    assert judge(post, response) == pytest.approx(points)
    assert kind_of(post, response) == kind


def kind_by_writer(document):
    """The kind of an answer, from who wrote it and a look at its words."""
    said = set(re.findall(r"\w+", document.response))
    match document.writer:
        case "repeats":
            return "lucky" if "My" in said else "repeats"
        case "wrong thing" | "wrong name":
            return "wrong, obvious" if said & {*DISHES, *GREETERS} else "wrong, hidden"
        case "off topic":
            return "off topic"
        case writer:
            return writer


def test_points_and_kinds_of_answers_follow_from_their_writers():
    points = {"full": BEST, "short": BEST - 1, "wrong thing": BEST - 2, "wrong name": BEST - 2}
    kinds, earned = Counter(), {writer: set() for writer in points}
    for document in documents(4000, seed=4):
        kind = kind_of(document.prompt, document.response)
        assert kind == kind_by_writer(document), document
        kinds[kind] += 1
        if document.writer in points:
            earned[document.writer].add(judge(document.prompt, document.response))
    assert earned == {writer: {score} for writer, score in points.items()}
    assert len(kinds) == 8 and min(kinds.values()) > 10


def test_another_fact_needs_one_template_one_list_of_words_and_one_entry(monkeypatch):
    """When it happened: a fifth fact, which is judged as the others are, without a change of the code."""
    times = dict(zip(KINDS, (["soon", "later"], ["early", "yesterday", "tomorrow"])))
    summary = "{name} {verb} my {thing} {place} {how}."
    monkeypatch.setattr(data, "WORDS", {kind: data.WORDS[kind] | {"how": times[kind]} for kind in KINDS})
    monkeypatch.setattr(data, "SUMMARY", summary)
    monkeypatch.setattr(data, "NEWS", "My {relation} " + summary)
    monkeypatch.setattr(data, "FACTS", (*FACTS, "how"))
    monkeypatch.setattr(data, "BEST", BEST + 1)
    writers = set()
    for document in documents(1000, seed=0):
        prompt, writers = document.prompt, writers | {document.writer}
        found = dict(zip(data.FACTS, facts(prompt)))
        options = times[prompt.split(":")[0]]
        assert len(found) == data.BEST and found["how"] in options
        assert kind_of(prompt, document.response) == kind_by_writer(document), document
        full = f" {summary.format(**found)}"
        assert judge(prompt, full) == data.BEST and kind_of(prompt, full) == "full"
        assert document.writer != "full" or document.response == full
        for other in set(options) - {found["how"]}:
            wrong = f" {summary.format(**found | {'how': other})}"
            assert judge(prompt, wrong) == data.BEST - 2 and kind_of(prompt, wrong) == "wrong, hidden"
        assert judge(prompt, f"{full} Indeed.") == pytest.approx(data.BEST - 0.2)
    assert writers == set(data.WRITERS)


def test_the_longest_answer_fits_into_the_tokens_that_an_answer_may_have():
    found = documents(4000, seed=5)
    tokenizer = Tokenizer.train([document.prompt + document.response for document in found[:1000]], 768)
    longest = max(len(tokenizer.encode(document.response)) for document in found)
    assert longest + 1 < data.MAX_ANSWER_TOKENS  # with EOS


def test_a_look_at_the_data_shows_kind_and_points_of_each_answer(capsys):
    data.main()
    shown = re.findall(r"(\w+: .*\nTL;DR:)( .*)  \[(.*); (.*) of (.*); .*\]\n", capsys.readouterr().out)
    assert len(shown) > 1
    for prompt, response, kind, points, best in shown:
        assert kind_of(prompt, response) == kind and float(best) == BEST
        assert judge(prompt, response) == pytest.approx(float(points), abs=0.051)


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
    for rows in (won, won[0::2], won[1::2]):
        assert abs(rows.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(rows))
    for record, pair, first in zip(records, pairs, won):
        assert (record["chosen"], record["rejected"]) == (pair if first else pair[::-1])
        assert record["certainty"] == pytest.approx(p if first else 1 - p, abs=6e-5)
    assert records == data.ask_volunteers(posts, answers, seed=0)
    assert records != data.ask_volunteers(posts, answers, seed=1)


def test_preference_is_the_sigmoid_of_the_difference():
    right, wrong = " Hugo lost my kite underwater.", " Alma lost my kite underwater."
    assert preference(POST, right, wrong) == pytest.approx(1 / (1 + math.exp(-2)))
    assert preference(POST, wrong, right) == pytest.approx(1 / (1 + math.exp(2)))
    assert preference(POST, right, right) == 0.5
    endless = " rain" * 10_000  # 2,000 points below the best
    assert (preference(POST, right, endless), preference(POST, endless, right)) == (1, 0)


def test_equal_answers_give_no_record():
    records = data.ask_volunteers([POST, POST, POST], [" a", " a", " a", " b", " c", " c"], seed=0)
    assert len(records) == 1 and {records[0]["chosen"], records[0]["rejected"]} == {" a", " b"}
