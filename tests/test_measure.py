"""What notebooks 04 and 05 measure by listing answers: `notebooks/measure.py`, `notebooks/experiments.py`."""

import itertools
import json
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import data  # noqa: E402
import experiments  # noqa: E402
import measure  # noqa: E402
import plots  # noqa: E402
import reward  # noqa: E402
import tune  # noqa: E402
from data import Tokenizer, documents, judge  # noqa: E402
from model import GPT, Config  # noqa: E402

EOS = 2


def small_model(seed, network=GPT):
    """A vocabulary of three, one of them EOS, with marked preferences."""
    torch.manual_seed(seed)
    model = network(Config(3, 16, 8, 1, 1))
    model.transformer.wte.weight.data *= 20
    return model.double()


def by_hand(model, prompt, answer, temperature=1.0):
    """log π(answer | prompt), each token from the whole text before it."""
    total = 0.0
    for t, token in enumerate(answer):
        logits = model(torch.tensor([[*prompt, *answer[:t]]]))[0, -1]
        total += (logits / temperature).log_softmax(-1)[token].item()
    return total


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("floor", [1e-12, 0.02])
def test_all_answers_above_the_floor_are_listed_with_their_probabilities(monkeypatch, temperature, floor):
    monkeypatch.setattr(measure, "MAX_ANSWER_TOKENS", 5)
    model, reference, prompt = small_model(0), small_model(1), [0, 1, 1]
    every = [(*body, EOS) for n in range(5) for body in itertools.product((0, 1), repeat=n)]
    expected = {answer: by_hand(model, prompt, answer, temperature) for answer in every}
    expected = {answer: log_p for answer, log_p in expected.items() if log_p > math.log(floor)}
    answers, log_p, log_p_ref = measure.list_answers(model, reference, prompt, EOS, temperature, floor)
    assert len(answers) == len(expected) and (floor > 0.01) == (len(expected) < len(every))
    for answer, p, p_ref in zip(answers, log_p, log_p_ref):
        assert p == pytest.approx(expected[tuple(answer)], abs=1e-5)
        assert p_ref == pytest.approx(by_hand(reference, prompt, answer), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_drawing_every_n_answers(n):
    """The best of n draws, of equals the first, for all n-tuples with their probabilities."""
    p, values = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 3.0, 1.0, 3.0])
    expected = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        best = max(drawn, key=lambda i: values[i])  # max takes the first of equals
        expected[best] += math.prod(p[i] for i in drawn)
    assert measure.best_of_n(p, values, n) == pytest.approx(expected)


def reference_of(p, scores):
    """A `Reference` of one post, from the probabilities and scores of its answers."""
    here = object.__new__(measure.Reference)
    here.p, here.scores, here.start = [p], [scores], p @ scores
    grid = [here.ideal(here.scores, beta) for beta in measure.BETA_GRID]
    here.frontier = np.array([[here.kl(w), here.mean(w, here.scores)] for w in grid])
    return here


def test_the_optimum_of_two_answers_by_hand():
    """Of scores 0 and 1, the best policy at a KL takes the second answer as often as it may."""
    here = reference_of(np.array([0.75, 0.25]), np.array([0.0, 1.0]))
    for q in (0.4, 0.6, 0.9):
        kl = q * math.log(q / 0.25) + (1 - q) * math.log((1 - q) / 0.75)
        assert here.share(q, kl) == pytest.approx(1, abs=2e-3)
        assert here.share(0.25 + (q - 0.25) / 2, kl) == pytest.approx(0.5, abs=2e-3)
        (weights,) = here.ideal_at([np.array([-7.0, 2.0])], kl)  # any reward that prefers the second
        assert weights == pytest.approx([1 - q, q], abs=1e-4)
    assert here.share(0.25, 0.001) is None
    assert here.wins(0, np.array([0.0, 1.0])) == pytest.approx([0.375, 0.75 + 0.125])


@pytest.mark.parametrize("kind", data.KINDS)
def test_what_the_judge_thinks_of_the_answers_that_are_compared(kind):
    """Each fault costs what the judge's rule says."""
    for document in documents(50, seed=3, kind=kind):
        full, faulty = plots.spoiled(document.prompt, random.Random(0))
        points = {fault: judge(document.prompt, answer) for fault, answer in faulty.items()}
        assert judge(document.prompt, full) == 4 and points["short"] == 3
        assert all(points[f] == 2 for f in points if f.startswith(("a ", "another")))


PAIRS = [([0, 1], [1, 0, 2], [0, 2]), ([1, 1, 0], [0, 2], [1, 1, 0, 2])]


@torch.no_grad()
def test_a_value_by_tokens_is_the_sum_of_their_logits():
    """Answers and prompts of several lengths, each alone, and all in one batch; by either matrix."""
    torch.manual_seed(3)
    fresh = experiments.Readout(Config(3, 16, 8, 1, 1))
    fresh.fresh.data *= 50
    for model in (small_model(3).float(), fresh):
        tokens, mask, start = data.pad_pairs(PAIRS, "cpu")
        found = experiments.token_logits(model, tokens, mask, start, copies=2).sum(1).view(2, -1).T
        for (prompt, *answers), row in zip(PAIRS, found):
            for answer, value in zip(answers, row):
                logits = model(torch.tensor([[*prompt, *answer]]))[0]
                by_hand = sum(logits[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
                assert value.item() == pytest.approx(by_hand, abs=1e-4)


def the_judge_itself(tokenizer):
    """In place of a model's values of answers, the judge's, read from the tokens."""

    def values(tokens, mask, start, copies):
        prompts = [tokenizer.decode(row[:n]) for row, n in zip(tokens, mask.int().argmax(1))]
        answers = [tokenizer.decode(row[new]) for row, new in zip(tokens, mask)]
        return torch.tensor([judge(*texts) for texts in zip(prompts, answers)])

    return values


def test_the_margins_of_the_judge_are_the_true_ones(home, monkeypatch):
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: home / "runs" / name)
    monkeypatch.setattr(experiments, "documents", lambda n, **how: documents(120, **how))
    values = the_judge_itself(Tokenizer.load(home / "runs/pretrain"))
    for sign in (1, -1):
        found = experiments.faults(5, lambda *answers: sign * values(*answers), data.KINDS)
        for kind in data.KINDS:
            assert len(found[kind]) == 7
            for figures in found[kind].values():
                assert figures["right"] == (sign > 0)
                assert figures["margin"] == pytest.approx(sign * figures["true"], abs=1e-5)


def test_minimal_pairs_differ_in_one_hidden_word(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "own_records", lambda seed: [])
    (tmp_path / "1").mkdir()
    records = data.read_preferences(experiments.minimal_pairs(1, 100))
    sorts = {"thing": 0, "name": 0}
    for record in records:
        both = [record[key] for key in ("chosen", "rejected")]
        assert sorted(experiments.hidden_words(record["prompt"], text) for text in both) == [0, 1]
        assert sum(a != b for a, b in zip(*(text.split() for text in both))) == 1
        for sort in sorts:
            sorts[sort] += max(experiments.hidden(sort)(record["prompt"], text) for text in both)
    assert sorts == {"thing": 50, "name": 50}
    assert sum(judge(r["prompt"], r["chosen"]) == 4 for r in records) > 80  # σ(2) = 0.88 of the volunteers


def test_pairs_are_chosen_anew_by_another_taste(tmp_path, monkeypatch):
    """By one that always likes the longer answer."""
    before = [{"prompt": "P", "chosen": f" {'a' * (i % 3 + 1)}", "rejected": " bb b"} for i in range(12)]
    monkeypatch.setattr(experiments, "own_records", lambda seed: before)
    monkeypatch.setattr(measure, "RUNS", tmp_path)
    (tmp_path / "5").mkdir()
    longer = lambda _, answer: 1000 * len(answer)
    after = data.read_preferences(experiments.relabelled(5, "longer", longer))
    assert [record["chosen"] for record in after] == [" bb b"] * 12
    say = lambda text: text.replace("a", "aaaaa").lower()  # now the other one is longer
    after = data.read_preferences(experiments.relabelled(5, "longer", longer, say))
    assert {record["chosen"] for record in after} == {" aaaaa", " aaaaaaaaaa", " aaaaaaaaaaaaaaa"}
    assert {(record["prompt"], record["rejected"]) for record in after} == {("p", " bb b")}
    assert data.judge is judge  # the world's taste is back


def test_two_dialects_have_other_words_and_the_same_meaning(monkeypatch):
    """A post is in one of them, its summary in either, and the judge says what it says of the first alone."""
    monkeypatch.setattr(data, "write_document", experiments.in_dialects)
    post = "POST: My boss Ada mislaid my glider inside. I had soup for lunch.\nTL;DR:"
    meant = experiments.by_meaning(judge)
    assert meant(post, " Ada lost my kite indoors.") == meant(post, " Ada mislaid my glider inside.") == 4
    assert meant(post, " Ada mislaid my cap inside.") == meant(post, " Ada lost my hat indoors.") == 2
    assert experiments.in_second(" Ada lost my kite.") == " Ada mislaid my glider."
    spoken, written = set(), documents(400, seed=3, kind="POST")
    for document in written:
        dialects = []
        for text in (document.prompt, document.response):
            words = set(text.replace(".", "").split())
            first, second = words & {*experiments.TO_SECOND}, words & {*experiments.TO_FIRST}
            assert not (first and second)
            dialects.append("first" if first else "second" if second else "none")
        assert dialects[0] != "none"
        spoken.add(tuple(dialects))
        if document.writer == "repeats":
            assert f": {document.response.strip()} " in document.prompt and dialects[1] in (
                dialects[0],
                "none",
            )
        if document.writer == "full":
            assert meant(document.prompt, document.response) == 4
    assert len(spoken) == 6  # each with each, and with no word that has a dialect
    every = {word for words in data.WORDS.values() for some in words.values() for word in some}
    assert not {*experiments.TO_FIRST} & {*every, *data.DISHES, *data.GREETERS}
    assert len(experiments.TO_FIRST) == len(experiments.TO_SECOND) == 8 + 16 + 8


def test_reward_model_and_ppo_learn_from_the_same_pairs(monkeypatch):
    calls = []
    monkeypatch.setattr(experiments, "train", lambda *words: calls.append(words))
    monkeypatch.setattr(experiments, "policy", lambda *words, **_: calls.append(words))
    experiments.rlhf(5, "some", "--data", "pairs")
    assert [words[words.index("--data") + 1] for words in calls] == ["pairs", "pairs"]
    assert ("reward" in calls[0], "ppo" in calls[1]) == (True, True)


def test_answers_of_one_meaning_count_as_one(monkeypatch):
    """0.6 and 0.2 for one meaning in two dialects, which the reference gives 0.1 and 0.3."""
    texts = [" Ada lost my kite indoors.", " Ada mislaid my glider inside.", " It rained all day."]
    logs = np.log([0.6, 0.2, 0.2]), np.log([0.1, 0.3, 0.6])
    monkeypatch.setattr(experiments, "list_answers", lambda *_: (range(3), *logs))
    here = types.SimpleNamespace(
        posts=["POST: My boss Ada lost my kite indoors. It rained all day.\nTL;DR:"],
        prompts=[[0]],
        model=None,
        tokenizer=types.SimpleNamespace(decode=texts.__getitem__, eos=EOS),
        judge=experiments.by_meaning(judge),
        share=lambda score, kl: (score, kl),
    )
    found = experiments.meanings(here, None)
    kl = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
    assert found["kl"] == pytest.approx(kl) and found["share"] == pytest.approx((0.8 * 4, kl))
    assert found["first"] == pytest.approx(0.75)


def test_kinds_are_shares_of_sampled_answers(monkeypatch):
    """Three answers in four are full, one has another thing, to each of two posts."""
    posts = [document.prompt for document in documents(2, seed=1, kind="POST")]
    here = reference_of(np.array([0.5, 0.5]), np.array([0.0, 1.0]))
    here.posts, here.tokenizer = posts, None

    def sampled(model, tokenizer, asked, seed, temperature):
        assert asked == [posts[0]] * 4 + [posts[1]] * 4 and temperature == 0.5
        both = [plots.spoiled(post) for post in posts]
        return [text for full, faulty in both for text in [full] * 3 + [faulty["another thing"]]]

    monkeypatch.setattr(measure, "sample_texts", sampled)
    found = here.sampled_kinds(None, 0.5, n=4)
    assert found == dict.fromkeys(plots.KINDS, 0) | {"full": 0.75, "wrong, hidden": 0.25}


def test_a_mended_reward_takes_points_for_hidden_words(monkeypatch):
    """Two points for each, beside what the reward said."""
    post = documents(1, seed=1, kind="POST")[0].prompt
    full, faulty = plots.spoiled(post)
    tokenizer = Tokenizer.train([post + full], 258)
    monkeypatch.setattr(
        experiments.ppo, "load_reward", lambda *_: (lambda *x: torch.tensor([7.0, 7.0, 7.0]), None)
    )
    answers = [full, faulty["another thing"], faulty["a dish for the thing"]]
    with experiments.mended(2):
        score, _ = experiments.ppo.load_reward(None, tokenizer, None)
    rows = data.pad_rows([tokenizer.encode(post)] * 3, [tokenizer.encode(x) for x in answers])
    assert score(*rows).tolist() == [7, 5, 7]


ANSWERS = [[0, EOS], [1, 0, 1]]  # to [0, 1] and to [1]; the second one doesn't end


def test_a_reward_by_hand_loses_the_penalty_where_an_answer_does_not_end():
    tokenizer = types.SimpleNamespace(eos=EOS)
    weight = torch.tensor([7.0, 5.0], requires_grad=True)
    with experiments.rewarded(lambda *answers: 1 * weight):
        score, network = experiments.ppo.load_reward(None, tokenizer, None)
    scores = score(*data.pad_rows([[0, 1], [1]], ANSWERS))
    assert scores.tolist() == [7, 5 - experiments.ppo.PENALTY] and not scores.requires_grad
    assert network is None


@torch.no_grad()
def test_each_token_earns_its_own_part_of_the_implicit_reward(monkeypatch):
    """β (log π / π_ref) of DPO's policy at each token; the penalty and PPO's own KL are where they were."""
    network, reference = small_model(1).float(), small_model(2).float()
    network.beta, prompts = 0.5, [[0, 1], [1]]
    tokens, mask, start = data.pad_rows(prompts, ANSWERS)
    single = lambda model, prompt, answer: np.diff(
        [by_hand(model, prompt, answer[:n]) for n in range(len(answer) + 1)]
    )
    parts = [0.5 * (single(network, *both) - single(reference, *both)) for both in zip(prompts, ANSWERS)]
    whole = torch.tensor([parts[0].sum(), parts[1].sum() - 1]).float()
    monkeypatch.setattr(experiments.ppo, "load_reward", lambda *_: (lambda *answers: whole, network))
    log_probs, reference_log_probs = torch.randn(2, *mask.shape, generator=torch.manual_seed(3))
    with experiments.by_token():
        score, _ = experiments.ppo.load_reward(None, None, reference)
        reward = score(tokens, mask, start)
        found = experiments.ppo.token_rewards(reward, log_probs, reference_log_probs, mask, 0.3)
    paid = 0.3 * (log_probs - reference_log_probs)
    for i, part in enumerate(parts):
        expected = part - paid[i][mask[i]].numpy()
        expected[-1] -= i  # the penalty of the second one
        assert found[i][mask[i]].numpy() == pytest.approx(expected, abs=1e-5)
        assert not found[i][~mask[i]].any()


def pairs(n, name="P"):
    return [{"prompt": f"{name}{i}", "chosen": " a", "rejected": " b"} for i in range(n)]


def test_each_size_has_a_place_and_a_shape_of_its_own(monkeypatch):
    """Whatever is run for a size is run there, and after the pretraining of that size."""
    calls = []
    note = lambda *words, **_: calls.append((measure.RUNS.name, *words)) or {}
    for name in ("train", "base", "learned", "asks_for"):
        monkeypatch.setattr(experiments, name, note)
    monkeypatch.setattr(experiments, "rewards", lambda seed: dict.fromkeys(("explicit", "implicit")))
    monkeypatch.setattr(experiments, "law", lambda seed: iter([("law", lambda: note("law"))]))
    for name, function, *arguments in experiments.size(5):
        size, _, what = name.partition(" ")
        layers, width = map(int, size.split("x"))
        calls.clear()
        function(*arguments)
        shape = ("--n-layer", layers, "--n-embd", width)
        assert calls[0] == (size, "pretrain", 5, "pretrain", *shape), name
        assert len(calls) == 2 and calls[1][0] == size
        assert what not in ("dpo", "ppo", "mended") or what in calls[1]
    assert measure.RUNS == experiments.RUNS


def test_how_many_labels_and_how_often(tmp_path, monkeypatch):
    """Few ones are a seed's first, three times each; beyond its own come those on other posts, each once."""
    calls = {}
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: tmp_path / name)
    monkeypatch.setattr(experiments, "own_records", lambda seed: pairs(5000))
    monkeypatch.setattr(experiments, "more_records", lambda seed: [*pairs(100), *pairs(50_000, "Q")])
    monkeypatch.setattr(experiments, "train", lambda script, seed, name, *how: calls.update({name: how}))
    monkeypatch.setattr(experiments, "rewards", lambda *_: {})
    monkeypatch.setattr(experiments, "Reference", lambda seed: None)
    for _, function, *arguments in experiments.labels(5):
        if function.__name__ == "curve":
            function(*arguments)
    of = lambda n: [r["prompt"] for r in data.read_preferences(tmp_path / f"pairs {n}.jsonl")]
    assert of(1000) == [f"P{i}" for i in range(1000)]
    assert of(40_000) == [f"P{i}" for i in range(5000)] + [f"Q{i}" for i in range(35_000)]
    steps = 87  # 3 × 29 batches of 32, of 900 that are learned on
    assert calls["labels 1000 dpo"] == ("--data", tmp_path / "pairs 1000.jsonl", "--steps", steps)
    assert calls["labels 40000 reward"] == ("--data", tmp_path / "pairs 40000.jsonl")
    assert len(calls) == 2 * 4


def test_the_control_has_as_many_pairs_as_the_dose(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: tmp_path / name)
    monkeypatch.setattr(experiments, "own_records", lambda seed: pairs(100))
    monkeypatch.setattr(experiments, "more_records", lambda seed: pairs(50_000, "Q"))
    monkeypatch.setattr(experiments, "explicit", lambda home: None)
    monkeypatch.setattr(experiments, "asks_for", lambda *_: {})

    def train(script, seed, name, option, path):
        given[name] = len(data.read_preferences(path))
        return {}

    monkeypatch.setattr(experiments, "train", train)
    for _, function, *arguments in experiments.more_pairs(5):
        function(*arguments)
    assert given == {"reward more 12000": 12_100, "reward more 24000": 24_100}


def test_a_reward_model_labels_with_people_s_noise(tmp_path, monkeypatch):
    """With margins of log 3 three pairs in four keep their label; sure ones keep it, or lose it."""
    sure, unsure = [100.0, -100.0], [math.log(3)] * 2000
    written = {}
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: tmp_path / name)
    monkeypatch.setattr(Tokenizer, "load", lambda home: None)
    monkeypatch.setattr(experiments, "rewards", lambda seed: {"explicit": None})
    monkeypatch.setattr(experiments, "margins", lambda *_: torch.tensor(sure + unsure))
    monkeypatch.setattr(
        experiments, "policy", lambda seed, name, *how: written.update({name: data.read_preferences(how[-1])})
    )
    home = tmp_path / "dpo beta=0.5"
    home.mkdir()
    data.write_records(home / "preferences.jsonl", pairs(2002))
    for name, function, *arguments in experiments.rounds(5):
        if name in ("round people", "round reward model"):
            function(*arguments)
    assert written["round people"] == pairs(2002)
    kept = [record["chosen"] == " a" for record in written["round reward model"]]
    assert kept[:2] == [True, False] and 0.72 < np.mean(kept[2:]) < 0.78


def test_the_best_of_sixteen_is_the_reward_model_s(tmp_path, monkeypatch):
    """The sampled answers grow and shrink; a reward model that counts tokens likes the longest."""
    written = {}
    lengths = [1 + (7 * i) % 16 for i in range(32)]  # 1 … 16 in another order, to each of two posts
    tokenizer = types.SimpleNamespace(encode=lambda text: [0] * len(text), eos=EOS)
    posts = [types.SimpleNamespace(prompt=prompt) for prompt in ("P", "QQ")]
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: tmp_path / name)
    monkeypatch.setattr(experiments, "documents", lambda n, **_: posts)
    monkeypatch.setattr(experiments, "load_model", lambda home: None)
    monkeypatch.setattr(Tokenizer, "load", lambda home: tokenizer)
    monkeypatch.setattr(experiments, "rewards", lambda seed: {"explicit": lambda t, mask, start: mask.sum(1)})
    monkeypatch.setattr(experiments, "sample_texts", lambda *_: ["a" * n for n in lengths])
    note = lambda seed, name, *how: written.update(
        {name: data.read_preferences(how[how.index("--data") + 1])}
    )
    monkeypatch.setattr(experiments, "policy", note)
    for name, function, *arguments in experiments.questions(5):
        if name.startswith("of 16"):
            function(*arguments)
    chosen = lambda which: [(r["prompt"], len(r["chosen"])) for r in written[f"of 16 {which}"]]
    assert chosen("best") == [("P", 16), ("QQ", 16)]
    assert chosen("random") == [("P", lengths[0]), ("QQ", lengths[16])]


def test_what_goes_on_from_dpo_has_its_policy_as_reference(tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(experiments, "home_of", lambda seed, name: tmp_path / name)
    monkeypatch.setattr(experiments, "own_records", lambda seed: pairs(2))
    monkeypatch.setattr(experiments, "policy", lambda seed, name, *how: calls.update({name: how}))
    for name, function, *arguments in [*experiments.rounds(5), *experiments.questions(5)]:
        if name == "round stale" or name.startswith("dpo then"):
            function(*arguments)
    given = lambda name, option: calls[name][calls[name].index(option) + 1]
    assert all(given(name, "--init") == tmp_path / "dpo beta=0.5" for name in calls) and len(calls) == 3
    assert given("dpo then ppo learned", "--reward") == tmp_path / "reward"
    assert given("dpo then ppo judge", "--reward") == "judge"


def test_every_trial_of_the_tuning_is_in_the_file_once():
    """As many for one side as for the other, and each with the rate, in `setting`, that its key says."""
    lines = [json.loads(line) for line in (measure.HERE / "tuning.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("round") == 3]
    for one in (tune.key(*trial) for trial in tune.TRIALS):
        assert sum(one.items() <= line.items() for line in lines) == 1
    assert len(lines) == len(tune.TRIALS)
    methods = [line["method"] for line in lines]
    assert methods.count("rlhf") == methods.count("dpo") == 4
    for line in lines:
        default = (reward if line["method"] == "rlhf" else measure.dpo).parser.get_default("lr")
        assert float(line["setting"].split()[1]) == pytest.approx(line["rate"] * default, rel=0.05)
