import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from conftest import ROOT, call, contents, copy, start, weights
from data import (
    ASKED,
    BEST,
    COMPARED,
    HELD_OUT,
    KINDS,
    LABELLED,
    MAX_ANSWER_TOKENS,
    BadInput,
    Tokenizer,
    documents,
)
from data import ask_volunteers, encode_pairs, judge, kind_of, printable, read_preferences
from dpo import pair_log_probs
from model import generate, load_model, seeded, token_log_probs
from sample import frontier, measure, optimal_weights, standard_errors, wins
from test_runs import TORCHRUN

EXAMPLE = documents(1, [0, HELD_OUT], KINDS[0])[0].prompt
SMALL = ["--n-prompts", 4, "--answers", 16]
KEYS = {"score", "kl", "optimal_score", "share", "win_rate", "length"}


# ----------------------------------------------------------------------------------------------------
# The optimum, and the errors


def test_frontier_against_a_known_optimum():
    """Rewards N(0, 1) under the reference: π* is N(1/β, 1), so its reward is 1/β and its KL 1/(2β²)."""
    scores = np.random.default_rng(0).normal(size=(64, 4096))
    kls, rewards = (x.mean(1) for x in frontier(scores))
    assert np.all(np.diff(kls) >= 0)
    for kl in (0.1, 0.5, 1.0):
        assert np.interp(kl, kls, rewards) == pytest.approx(math.sqrt(2 * kl), rel=0.02)


def test_the_optimal_weights_and_wins_by_hand():
    scores = np.array([[0.0, 1.0]])
    w = optimal_weights(scores, beta=1 / math.log(3))
    assert w.tolist() == [pytest.approx([1 / 4, 3 / 4])]
    # answer 0 ties one and loses one: 1/4; answer 1 wins one and ties one: 3/4
    assert wins(scores, scores).tolist() == [[1 / 4, 3 / 4]]
    assert wins(np.array([[5.0, -5.0]]), scores).tolist() == [[1, 0]]


def test_the_bootstrap_finds_the_standard_error_of_a_mean():
    """For n independent N(0, σ²) the standard error of the mean is σ/√n; of twice the mean, twice that."""
    x = np.random.default_rng(1).normal(scale=3, size=400)
    mean, twice = standard_errors(lambda some: [x[some].mean(), 2 * x[some].mean()], 400, resamples=4000)
    assert mean == pytest.approx(x.std() / math.sqrt(400), rel=0.05)
    assert mean == pytest.approx(3 / math.sqrt(400), rel=0.15) and twice == pytest.approx(2 * mean)


# ----------------------------------------------------------------------------------------------------
# Comparing


@pytest.fixture
def compared(speak):
    """A function that compares the finished runs and gives the rows."""

    def run(*options):
        status, printed, said = speak("sample", "--compare", "--json", *SMALL, *options)
        assert status == 0, said
        return json.loads(printed)

    return run


def test_compare_prints_a_table_and_a_few_answers(speak):
    status, table, _ = speak("sample", "--compare", *SMALL)
    assert status == 0 and all(
        name in table for name in ("runs/pretrain", "runs/dpo", "runs/ppo", "POST:", "±")
    )


def test_compare_gives_each_figure_with_its_standard_error(compared):
    reference, dpo, ppo = compared()
    assert KEYS | {f"{key}_se" for key in KEYS} | {"checkpoint"} == dpo.keys() == ppo.keys()
    assert reference["share"] is None and abs(reference["kl"]) < 1e-4 and reference["win_rate"] == 0.5
    assert reference["score"] == pytest.approx(reference["optimal_score"], abs=1e-3)


def test_a_comparison_of_two_models_by_hand(compared, monkeypatch):
    """Sixteen posts with known answers, worked out without `frontier`, `wins` and the bootstrap.

    The reference's two answers to post i score 0 and d, where d is i / 4 + 1, and the policy's both score d
    at a KL of log 2. There the optimum is the policy that always gives the better one: it earns d, too. So
    the share is 1, and each answer wins against one of the two and ties with the other: 3/4.
    """
    d = np.arange(16) / 4 + 1

    def fake(policy, reference, tokenizer, posts, k, temperature, generator):
        same = policy is reference
        scores = np.stack([0 * d if same else d, d], axis=1)
        kls = np.zeros((16, 2)) if same else np.full((16, 2), math.log(2))
        return [["a", "b"]] * 16, scores, kls, np.stack([d, d + 2], axis=1)

    monkeypatch.setattr("sample.measure", fake)
    reference, policy = compared("--compare", "runs/pretrain", "runs/dpo", "--n-prompts", 16, "--answers", 2)
    assert reference["score"] == pytest.approx(d.mean() / 2) and policy["score"] == pytest.approx(d.mean())
    assert policy["kl"] == pytest.approx(math.log(2)) and policy["kl_se"] == pytest.approx(0, abs=1e-6)
    assert policy["optimal_score"] == pytest.approx(d.mean(), rel=1e-3)
    assert policy["share"] == pytest.approx(1, rel=1e-3) and policy["share_se"] < 1e-3
    assert reference["win_rate"] == 0.5 and policy["win_rate"] == 0.75
    assert policy["length"] == pytest.approx(d.mean() + 1)
    # Another post has another d, so the error of a mean over posts is sd / √16.
    assert policy["score_se"] == pytest.approx(d.std() / 4, rel=0.1)
    assert reference["score_se"] == pytest.approx(d.std() / 8, rel=0.1)


def test_half_of_the_gain_is_a_share_of_a_half(compared, monkeypatch):
    """As above, with a policy that gives the worse answer once in four: it gains half, at the same KL.

    Of each post, whatever it is worth: so the share is the same, whichever posts are drawn.
    """
    d = np.arange(16) / 4 + 1

    def fake(policy, reference, tokenizer, posts, k, temperature, generator):
        scores = [0.0, 0.0, 2.0, 2.0] if policy is reference else [0.0, 2.0, 2.0, 2.0]
        kl = 0.0 if policy is reference else math.log(2)
        return [["a"] * 4] * 16, d[:, None] * np.array([scores]), np.full((16, 4), kl), np.ones((16, 4))

    monkeypatch.setattr("sample.measure", fake)
    _, policy = compared("--compare", "runs/pretrain", "runs/dpo", "--n-prompts", 16)
    assert policy["share"] == pytest.approx((1.5 - 1) / (2 - 1), rel=1e-3) and policy["share_se"] < 1e-3


def test_answers_are_measured_once_more_by_hand(home):
    """Scores, log-ratios and lengths of four answers to each of two posts, answer by answer."""
    tokenizer = Tokenizer.load("runs/pretrain")
    policy, reference = load_model("runs/dpo"), load_model("runs/pretrain")
    posts = [document.prompt for document in documents(2, seed=5, kind=KINDS[0])]
    how = {"temperature": 0.7, "generator": seeded(0)}
    texts, scores, log_ratios, lengths = measure(policy, reference, tokenizer, posts, 4, **how)
    how = {"temperature": 0.7, "generator": seeded(0)}
    for i, post in enumerate(posts):
        ids = tokenizer.encode(post)
        tokens, mask, _ = generate(policy, [ids] * 4, MAX_ANSWER_TOKENS, tokenizer.eos, **how)
        for j in range(4):
            answer = tokens[j][mask[j]]
            given = torch.tensor([[*ids, *answer.tolist()]])
            with torch.no_grad():
                warm, cold = (
                    model(given)[0, len(ids) - 1 : -1].double() / heat
                    for model, heat in ((policy, 0.7), (reference, 1.0))
                )
            ratio = (warm.log_softmax(-1) - cold.log_softmax(-1)).gather(1, answer[:, None]).sum().item()
            assert texts[i][j] == tokenizer.decode(answer) and lengths[i, j] == len(answer)
            assert log_ratios[i, j] == pytest.approx(ratio, abs=1e-3)
            assert scores[i, j] == judge(post, texts[i][j])


def test_the_same_model_twice_has_the_same_figures(compared):
    _, one, two = compared("--compare", "runs/pretrain", "runs/dpo", "runs/dpo")
    assert one == two


def test_at_temperature_0_the_kl_is_the_surprise_of_the_likeliest_answer(home, compared):
    """A policy that always gives one answer has the KL −log π_ref(that answer), by the definition."""
    row = compared("--temperature", 0)[0]
    tokenizer, model = Tokenizer.load("runs/pretrain"), load_model("runs/pretrain")
    surprise = []
    for document in documents(4, [0, COMPARED], kind=KINDS[0]):
        ids, answer = tokenizer.encode(document.prompt), []
        while len(answer) < 32 and tokenizer.eos not in answer:
            log_probs = model(torch.tensor([ids + answer]))[0, -1].log_softmax(-1)
            answer.append(log_probs.argmax().item())
            surprise.append(-log_probs.max().item())
    assert row["kl"] == pytest.approx(sum(surprise) / 4, rel=1e-3)


def test_the_shift_is_to_the_second_kind_of_prompts(speak, compared):
    _, printed, _ = speak("sample", "--compare", *SMALL, "--shifted")
    for document in documents(4, [0, COMPARED], kind=KINDS[1]):
        assert document.prompt in printed
    assert compared("--shifted") != compared()


def test_the_table_has_the_kinds_of_answers_and_fits_into_95_columns(speak):
    """Below the figures one row a model says what share of its answers is of each kind."""
    _, printed, _ = speak("sample", "--compare", *SMALL)
    lines = printed.split("\n\n" + documents(1, [0, COMPARED], kind=KINDS[0])[0].prompt)[0].splitlines()
    assert max(map(len, lines)) <= 95 and f" {BEST} is perfect" in printed
    *_, titles, pretrain, dpo, ppo = lines
    tokenizer, model = Tokenizer.load("runs/dpo"), load_model("runs/dpo")
    prompts, answers = [d.prompt for d in documents(4, [0, COMPARED], kind=KINDS[0])], 4
    generator, counts = seeded("compared", 1), {}
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        tokens, mask, _ = generate(
            model, [ids] * answers, MAX_ANSWER_TOKENS, tokenizer.eos, generator=generator
        )
        for row, new in zip(tokens, mask):
            kind = kind_of(prompt, tokenizer.decode(row[new]))
            counts[kind] = counts.get(kind, 0) + 1
    assert dpo.startswith("runs/dpo ")
    at = len("checkpoint    ")
    for kind in [part.strip() for part in titles.strip().split("  ") if part]:
        width = len(kind) + 2
        assert dpo[at : at + width].strip() == f"{counts.get(kind, 0) / 16:.0%}", kind
        at += width


# ----------------------------------------------------------------------------------------------------
# Asking


def asked(name, *options):
    """The pairs of a new copy of the pretrained model, of which `sample.py --ask` was asked."""
    copy("runs/pretrain", f"runs/{name}")
    Path(f"runs/{name}/preferences.jsonl").unlink()
    call("sample", "--init", f"runs/{name}", "--ask", *options)
    return Path(f"runs/{name}/preferences.jsonl").read_bytes()


def test_asking_by_hand(home):
    """Two answers a prompt, prompts of similar length together, from the generator of that batch."""
    records = [json.loads(line) for line in asked("by-hand", 300, "--seed", 4).splitlines()]
    tokenizer, model = Tokenizer.load("runs/pretrain"), load_model("runs/pretrain")
    prompts = [d.prompt for d in documents(300, [4, ASKED], kind=KINDS[0])]
    rows = sorted([(len(tokenizer.encode(p)), i, p) for i, p in enumerate(p for p in prompts for _ in "12")])
    answers = {}
    for b in range(3):  # of 256, 256 and 88
        some, generator = rows[256 * b : 256 * (b + 1)], seeded("asked", 4, b)
        ids = [tokenizer.encode(prompt) for _, _, prompt in some]
        tokens, mask, _ = generate(model, ids, MAX_ANSWER_TOKENS, tokenizer.eos, generator=generator)
        answers |= {i: tokenizer.decode(row[new]) for (_, i, _), row, new in zip(some, tokens, mask)}
    assert records == ask_volunteers(prompts, [answers[i] for i in range(600)], ["volunteers", 4])
    with pytest.raises(BadInput, match="always the same; raise --temperature"):
        asked("likeliest", 20, "--temperature", 0)


def test_the_same_pairs_from_any_number_of_processes_and_others_from_another_seed(home):
    one, other = asked("one-asks", 300), asked("other-seed", 300, "--seed", 2)
    copy("runs/pretrain", "runs/two-ask")
    options = "sample", "--init", "runs/two-ask", "--ask", 300
    process = start(*options, env={"OMP_NUM_THREADS": "1"}, launcher=TORCHRUN)
    printed, said = process.communicate()
    assert process.returncode == 0 and printed.count("Next: python dpo.py --init runs/two-ask") == 1, said
    assert Path("runs/two-ask/preferences.jsonl").read_bytes() == one != other
    assert Path("runs/two-ask/preferences.jsonl.old").exists()


def test_a_second_round_asks_about_the_first_rounds_answers(home, speak):
    """Its pairs lie inside the aligned checkpoint; those of runs/pretrain stay as they are, byte for byte."""
    copy("runs/dpo", "runs/round1")
    before = contents("runs/pretrain")
    assert speak("sample", "--ask", 40, "--init", "runs/round1")[0] == 0
    call("dpo", "--init", "runs/round1", "--out", "runs/round2")
    assert contents("runs/pretrain") == before
    ours, first = (read_preferences(f"runs/{name}/preferences.jsonl") for name in ("round1", "pretrain"))
    assert 20 <= len(ours) <= 40
    assert {pair["prompt"] for pair in ours} <= {d.prompt for d in documents(40, [1, ASKED], kind=KINDS[0])}
    assert not [pair for pair in ours if pair in first]  # other answers
    assert not Path("runs/round2/preferences.jsonl").exists()
    assert weights("runs/round2") != weights("runs/round1") == weights("runs/dpo")


def test_asking_again_puts_the_older_file_aside_and_says_so(home, speak):
    older = asked("again", 30)
    status, printed, _ = speak("sample", "--ask", 20, "--init", "runs/again", "--seed", 9)
    assert (
        status == 0 and "runs/again/preferences.jsonl: the older file is now preferences.jsonl.old" in printed
    )
    assert Path("runs/again/preferences.jsonl.old").read_bytes() == older
    assert 0 < len(read_preferences("runs/again/preferences.jsonl")) <= 20


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_sampled(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != ("runs/pretrain", os.W_OK))
    monkeypatch.setattr(sample, "sample_texts", None)
    with pytest.raises(BadInput, match="cannot be written; copy runs/pretrain, and ask the copy"):
        call("sample", "--ask", 20)


# ----------------------------------------------------------------------------------------------------
# Talking and labelling


def test_one_prompt_and_the_loop(speak):
    status, printed, _ = speak("sample", "--prompt", r"POST: Hello.\nTL;DR:", "--temperature", 0)
    assert status == 0 and printed.startswith("POST: Hello.\nTL;DR:")
    long = "word " * 200
    status, printed, _ = speak(
        "sample", "--init", "runs/pretrain", "--top-k", 5, stdin=f"It is\n\n{long}\nMy\n"
    )
    assert status == 0 and "It is" in printed and "prompt> My" in printed
    assert "leaves no room" in printed  # and it goes on
    assert speak("sample", "--prompt", "")[2].endswith("an empty prompt: write a few words to go on from\n")


def test_an_empty_standard_input_is_an_end_and_no_error(home):
    command = [sys.executable, ROOT / "sample.py", "--init", "runs/dpo"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\nprompt> ")


def test_control_characters_are_escaped(speak):
    assert printable("plain ünï 日本\nline") == "plain ünï 日本\nline"
    assert printable("\x1b[2Jred\r\x07\u202e") == "\\x1b[2Jred\\r\\x07\\u202e"
    _, printed, _ = speak("sample", "--prompt", "red \x1b[31m")
    assert printed.startswith("red \\x1b[31m") and "\x1b" not in printed


def test_labelling_without_a_keyboard_keeps_what_was_chosen(speak):
    """The input ends after two choices: both are on the disk, with the prompt that was shown."""
    status, printed, _ = speak("sample", "--label", 5, "--out", "piped.jsonl", stdin="1\n2\n")
    assert status == 0 and "2 choices in piped.jsonl" in printed
    chosen = [json.loads(line) for line in Path("piped.jsonl").read_text().splitlines()]
    assert len(chosen) == 2
    for record in chosen:
        assert printable(record["prompt"]) in printed
    first, second = chosen
    assert printable(f"\n  1 {first['chosen']}\n  2 {first['rejected']}") in printed
    assert printable(f"\n  1 {second['rejected']}\n  2 {second['chosen']}") in printed


def test_labelling_takes_its_prompts_from_a_file(speak):
    Path("prompts.jsonl").write_text('{"prompt": "It is", "chosen": "a", "rejected": "b"}\n')
    how = ["--label", 5, "--out", "from-file.jsonl", "--data", "prompts.jsonl"]
    status, _, _ = speak("sample", *how, stdin="1\n")
    assert status == 0
    assert [json.loads(line)["prompt"] for line in Path("from-file.jsonl").open()] == ["It is"]
    status, _, said = speak("sample", *how, stdin="1\n")  # it has been labelled
    assert status == 2 and "no new prompt is left" in said


def test_a_person_labels_through_a_terminal_and_the_model_follows(home):
    """The person likes the shorter answer, skips one, quits, and comes again."""

    def session(keys, n):
        """Play a list of keys, "shorter" standing for the key of the shorter answer; then q."""
        master, slave = pty.openpty()
        command = [sys.executable, ROOT / "sample.py", "--label", n, "--out", "labels.jsonl"]
        command = [str(part) for part in [*command, "--max-new-tokens", 12]]
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        seen, answers, keys = "", "", list(keys)
        while True:
            try:
                seen += os.read(master, 4096).decode("utf-8", "replace")
            except OSError:  # the program has ended
                break
            if seen.endswith("q> "):
                key = keys.pop(0) if keys else "q"
                if "\r\n  1 " in seen:
                    answers = seen[seen.rindex("\r\n  1 ") :]
                if key == "shorter":
                    first, second = answers.split("\r\n  2 ")
                    key = "1" if len(first) - 6 <= len(second.split("\r\n[")[0]) else "2"
                seen = ""
                os.write(master, f"{key}\n".encode())
        assert process.wait() == 0
        return [json.loads(line) for line in Path("labels.jsonl").read_text().splitlines()]

    first = session(["shorter", "s", "nonsense", "shorter"], 10)
    assert len(first) == 2
    both = session(["shorter"] * 40, 40)
    assert len(both) == 42 and both[:2] == first
    assert len({record["prompt"] for record in both}) == 42
    shorter = [len(printable(r["chosen"])) <= len(printable(r["rejected"])) for r in both]
    assert sum(shorter) >= 41  # escapes on the screen may make one look longer
    call("dpo", "--data", "labels.jsonl", "--out", "runs/mine", "--steps", 150, "--beta", 0.05, "--lr", 5e-3)
    tokenizer = Tokenizer.load("runs/pretrain")
    pairs, _ = encode_pairs(tokenizer, both, 160)
    with torch.no_grad():
        mine, before = (
            pair_log_probs(load_model(f"runs/{name}"), pairs, "cpu") for name in ("mine", "pretrain")
        )
    chosen, rejected = (mine - before).unbind(1)  # the implicit reward, but for its factor
    assert (chosen > rejected).float().mean() > 0.85  # one pair in ten was held out


def test_talking_says_what_it_is_and_takes_an_example(speak):
    examples = [d.prompt for d in documents(3, [0, HELD_OUT], KINDS[0])]
    status, printed, _ = speak("sample", "--init", "runs/pretrain", "--temperature", 0.5, stdin="\n\n")
    assert status == 0 and printed.startswith("runs/pretrain, temperature 0.5, goes on from what you type.")
    assert "Ctrl-D ends." in printed and printed.count("prompt> ") == 3
    assert all(example in printed for example in examples)  # the first is shown, the next two are taken


def test_a_backslash_can_be_typed(speak):
    _, printed, _ = speak("sample", "--prompt", r"Let \\nu be\n\\nabla f", "--temperature", 0)
    assert printed.startswith("Let \\nu be\n\\nabla f")


def test_the_implicit_reward_word_by_word(speak):
    """The numbers of all tokens sum to β (log π − log π_ref) of the answer."""
    how = ["--init", "runs/dpo", "--words", "runs/pretrain", "--prompt", EXAMPLE, "--seed", 3]
    status, printed, _ = speak("sample", *how)
    found = [float(x) for x in re.findall(r"^ +'.*' +(-?\d+\.\d\d)", printed, flags=re.M)]
    tokenizer, policy, reference = (
        Tokenizer.load("runs/dpo"),
        load_model("runs/dpo"),
        load_model("runs/pretrain"),
    )
    ids = tokenizer.encode(EXAMPLE)
    tokens, mask, log_probs = generate(
        policy, [ids], MAX_ANSWER_TOKENS, tokenizer.eos, generator=seeded("talk", 3, 1)
    )
    with torch.no_grad():
        log_ratio = log_probs.sum() - token_log_probs(reference, tokens, mask).sum()
    assert status == 0 and len(found) == mask.sum()
    assert sum(found) == pytest.approx(policy.beta * log_ratio.item(), abs=0.006 * len(found))
    assert speak("sample", "--init", "runs/pretrain", *how[2:])[0] == 2  # it is not aligned


def test_how_many_labels_are_missing_is_said(speak):
    _, printed, _ = speak("sample", "--label", 2, "--out", "missing.jsonl", stdin="1\n2\n")
    assert printed.endswith("2 choices in missing.jsonl. 30 more are needed to learn from them\n")
    _, printed, _ = speak("sample", "--label", 30, "--out", "missing.jsonl", stdin="1\n" * 30)
    then = "python dpo.py --init runs/pretrain --data missing.jsonl --beta 0.1 --steps 30 --out runs/mine"
    assert printed.endswith(f"32 choices in missing.jsonl. Learn from them:\n    {then}\n")
    assert speak("dpo", *then.split()[2:])[0] == 0


def test_wins_are_counted_against_the_reference_at_temperature_1(compared, monkeypatch):
    """There its answers earn 1, and 2 at another temperature: these always win."""

    def fake(policy, reference, tokenizer, posts, k, temperature, generator):
        scores = [1.0, 1.0] if temperature == 1 else [2.0, 2.0]
        return [["a", "b"]] * 4, np.array([scores] * 4), np.zeros((4, 2)), np.ones((4, 2))

    monkeypatch.setattr("sample.measure", fake)
    (row,) = compared("--compare", "runs/pretrain", "--temperature", 0.5)
    assert row["win_rate"] == 1 and row["score"] == 2


def test_another_seed_samples_other_answers(compared):
    one, other = compared("--compare", "runs/dpo")[0], compared("--compare", "runs/dpo", "--seed", 2)[0]
    assert (one["score"], one["length"]) != (other["score"], other["length"])


def test_talking_obeys_its_options(speak):
    """The likeliest token alone is what is left by k = 1 and by p = 0. The same prompt is drawn anew."""
    said = {}
    for options in (["--temperature", 0], ["--top-k", 1], ["--top-p", 0], []):
        said[str(options)] = speak("sample", "--prompt", EXAMPLE, *options)[1]
    greedy, k, p, sampled = said.values()
    assert greedy == k == p != sampled
    _, printed, _ = speak("sample", stdin="It is\nIt is\n")
    first, second = re.findall(r"prompt> (It is.*?)(?=prompt> )", printed, flags=re.S)
    assert first != second


def test_bars_of_words_point_the_way_of_their_sign(home, monkeypatch, capsys):
    """β = 0.5 and log-ratios 2 and −1: 1 and −0.5, eight signs for each point."""
    logs = {"policy": torch.tensor([[0.0, -1.0, -3.0]]), "reference": torch.tensor([[0.0, -3.0, -2.0]])}
    monkeypatch.setattr(sample, "token_log_probs", lambda network, tokens, mask: logs[network.name])
    policy, reference = SimpleNamespace(name="policy", beta=0.5), SimpleNamespace(name="reference")
    mask = torch.tensor([[False, True, True]])
    sample.print_words(policy, reference, Tokenizer.load("runs/pretrain"), torch.tensor([[0, 34, 35]]), mask)
    found = [line.split()[-2:] for line in capsys.readouterr().out.splitlines()]
    assert found == [["1.00", "+" * 8], ["-0.50", "-" * 4]]


def test_labelling_ends_after_n_choices_on_prompts_of_its_own(speak):
    speak("sample", "--label", 2, "--out", "two.jsonl", stdin="1\n2\n1\n1\n")
    prompts = [record["prompt"] for record in read_preferences("two.jsonl")]
    own = [d.prompt for d in documents(6, [1, LABELLED], KINDS[0])]
    assert len(prompts) == 2 and {*prompts} <= {*own}
    _, printed, _ = speak("sample", "--label", 2, "--out", "none.jsonl", "--temperature", 0, stdin="1\n2\n")
    assert "0 choices in none.jsonl" in printed  # both answers are the likeliest one
