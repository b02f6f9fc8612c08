import math

import numpy as np
import pytest
import torch

import reward
from conftest import call, metrics
from data import MAX_ANSWER_TOKENS, Tokenizer, read_preferences
from model import Config, ScalarGPT, final_scores, generate, load_model, seeded
from reward import calibration, pair_scores, reward_loss

CONFIG = Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
PAIRS = [([1, 2, 3], [4, 10], [5, 6, 7, 10]), ([8], [9, 9, 10], [10])]  # 10 is EOS


@pytest.fixture
def model():
    return ScalarGPT(CONFIG, seeded(0))


def test_loss_by_hand():
    assert reward_loss(torch.tensor(1.0), torch.tensor(-1.0)).item() == pytest.approx(
        math.log(1 + math.exp(-2))
    )
    assert reward_loss(torch.tensor(3.0), torch.tensor(3.0)).item() == pytest.approx(math.log(2))


def test_the_gradient_of_the_loss():
    torch.manual_seed(0)
    scores = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(reward_loss, scores)


@torch.no_grad()
def test_the_score_is_the_last_tokens_of_each_row(model):
    scores = pair_scores(model, PAIRS, "cpu")
    for row, (prompt, *answers) in enumerate(PAIRS):
        for column, answer in enumerate(answers):
            alone = model(torch.tensor([prompt + answer]))[0]  # one row, no padding
            assert scores[row, column].item() == pytest.approx(alone[-1].item(), abs=1e-5)


@torch.no_grad()
def test_what_the_head_says_at_other_tokens_does_not_count(model):
    """The head is told to say 1,000 more wherever the answer has not ended yet, and after its end."""
    before, head = pair_scores(model, PAIRS, "cpu"), model.head
    tokens = torch.tensor([[1, 2, 3, 4, 10, 0, 0]])
    mask = torch.tensor([[False, False, False, True, True, False, False]])

    def elsewhere(hidden):
        scores = head(hidden)
        return scores + 1000 * (torch.arange(scores.shape[1]) != 4)

    model.head = elsewhere
    assert final_scores(model, tokens, mask).item() == pytest.approx(before[0, 0].item(), abs=1e-5)


@torch.no_grad()
def test_shift_adds_a_constant_to_every_score(model):
    tokens = torch.randint(0, 11, (4, 12))
    before = model(tokens)
    model.shift(-1.7)
    assert torch.allclose(model(tokens), before - 1.7, atol=1e-5)


def test_calibration_by_hand():
    sure = math.log(0.84 / 0.16)  # σ of it is 0.84
    margins = torch.tensor([sure] * 3 + [-sure] + [0.1, -0.1, 0.4, -0.4])  # σ of 0.4 is 0.599
    (low, low_right, low_n), (middle, _, middle_n), (high, high_right, high_n) = calibration(margins)
    assert (low_n, low_right) == (2, 0.5) and low == pytest.approx(1 / (1 + math.exp(-0.1)))
    assert (high_n, high_right) == (4, 0.75) and high == pytest.approx(0.84)
    assert middle_n == 2 and middle == pytest.approx(1 / (1 + math.exp(-0.4)))
    assert len(calibration(margins, bins=2)) == 2  # a half to three quarters, and up to 1


def test_ties_and_certainties_of_1_are_counted():
    """A margin of 0 is right in half; one of 50, of which σ is 1 in float32, belongs to the last bin."""
    assert calibration(torch.tensor([0.0, 50.0, 50.0])) == [(0.5, 0.5, 1), (1.0, 1.0, 2)]


def test_the_bins_of_calibration_reach_from_a_half_to_1():
    """Ten bins of equal width: certainties in their middles fall into one each."""
    certainty = torch.arange(10) / 20 + 0.525
    rows = calibration((certainty / (1 - certainty)).log())
    assert [n for *_, n in rows] == [1] * 10
    assert [c for c, *_ in rows] == pytest.approx(certainty.tolist(), abs=1e-5)


def test_scores_have_mean_0_on_the_references_answers(home):
    final = metrics("runs/reward")[-1]
    records = read_preferences("runs/pretrain/preferences.jsonl")
    sure = [max(r["certainty"], 1 - r["certainty"]) for r in records[-(len(records) // 10) :]]
    assert final["best_accuracy"] == pytest.approx(np.mean(sure))
    assert 0 < final["val_accuracy"] < 1 and 0.5 < final["best_accuracy"] < 1 and final["val_loss"] > 0
    tokenizer, reference = Tokenizer.load("runs/pretrain"), load_model("runs/pretrain")
    model = load_model("runs/reward", ScalarGPT)
    assert model.config == reference.config  # no block more
    posts = [record["prompt"] for record in read_preferences("runs/pretrain/preferences.jsonl")]
    prompts = [tokenizer.encode(post) for post in posts for _ in range(4)]
    tokens, mask, _ = generate(reference, prompts, MAX_ANSWER_TOKENS, tokenizer.eos, generator=seeded(0))
    with torch.no_grad():
        scores = final_scores(model, tokens, mask)
    few = len(posts) // 10  # the shift was measured on so many answers
    error = scores.std().item() * math.sqrt(1 / few + 1 / len(scores))
    assert abs(scores.mean().item()) < 4 * error


def test_the_shift_is_the_mean_over_answers_of_the_reference_to_the_held_out_posts(home, monkeypatch):
    """Over those very answers the mean is 0, not only to its standard error."""
    seen, real = [], reward.generate

    def watch(*how, **more):
        seen.append((how, real(*how, **more)))
        return seen[-1][1]

    monkeypatch.setattr(reward, "generate", watch)
    call("reward", "--out", "runs/reward-shifted", "--steps", 30)
    model, reference = load_model("runs/reward-shifted", ScalarGPT), load_model("runs/pretrain")
    scores = []
    for (asked, *_), (tokens, mask, _) in seen:
        assert all(torch.equal(a, b) for a, b in zip(asked.parameters(), reference.parameters()))
        with torch.no_grad():
            scores += [
                model(row[: new.nonzero().max() + 1][None])[0, -1].item() for row, new in zip(tokens, mask)
            ]
    posts = [record["prompt"] for record in read_preferences("runs/pretrain/preferences.jsonl")]
    tokenizer = Tokenizer.load("runs/pretrain")
    prompts = [tokenizer.decode(prompt) for (_, some, *_), _ in seen for prompt in some]
    assert sorted(prompts) == sorted(posts[-(len(posts) // 10) :])
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)


def test_the_held_out_figures_once_more_by_hand(home, capsys):
    """From the saved model, answer by answer. The shift adds the same to both, so it changes none of them."""
    call("reward", "--out", "runs/reward-by-hand")
    printed = capsys.readouterr().out
    tokenizer, model = Tokenizer.load("runs/reward-by-hand"), load_model("runs/reward-by-hand", ScalarGPT)
    pairs = read_preferences("runs/pretrain/preferences.jsonl")
    margins = []
    for pair in pairs[-(len(pairs) // 10) :]:
        score = {}
        for which in ("chosen", "rejected"):
            ids = tokenizer.encode(pair["prompt"]) + tokenizer.encode(pair[which]) + [tokenizer.eos]
            with torch.no_grad():
                score[which] = model(torch.tensor([ids]))[0, -1].item()
        margins.append(score["chosen"] - score["rejected"])
    mean = lambda numbers: sum(numbers) / len(numbers)
    last = metrics("runs/reward-by-hand")[-2]
    assert last["margin"] == pytest.approx(mean(margins), abs=1e-4)
    assert last["val_accuracy"] == pytest.approx(mean([m > 0 for m in margins]))
    assert last["val_loss"] == pytest.approx(mean([math.log(1 + math.exp(-m)) for m in margins]), abs=1e-4)
    assert metrics("runs/reward-by-hand")[-1]["val_loss"] == last["val_loss"]
    assert max(map(abs, margins)) > 1e-3  # or else all this says little
    table = printed[printed.index("how sure") : printed.index("val_accuracy")].splitlines()[1:-1]
    assert sum(int(row.split()[-1]) for row in table) == len(margins)


def test_one_pass_learns_from_every_pair_once_and_from_no_held_out_one(home, monkeypatch):
    seen, real = [], reward.pair_scores

    def watch(model, pairs, device):
        seen.extend(pairs if torch.is_grad_enabled() else [])
        return real(model, pairs, device)

    monkeypatch.setattr(reward, "pair_scores", watch)
    reward.main(
        reward.parser.parse_args(["--device", "cpu", "--batch-size", "16", "--out", "runs/reward-pass"])
    )
    tokenizer = Tokenizer.load("runs/reward-pass")
    pairs = read_preferences("runs/pretrain/preferences.jsonl")
    learned = pairs[: len(pairs) - len(pairs) // 10]
    texts = lambda pair: tuple(pair[key] for key in ("prompt", "chosen", "rejected"))
    assert sorted(tuple(map(tokenizer.decode, pair)) for pair in seen) == sorted(map(texts, learned))


def test_the_logged_loss_is_of_the_step_that_it_stands_at(home, monkeypatch):
    """−log σ(chosen − rejected), the mean over the batch, before that step is taken."""
    real, losses = reward.pair_scores, []

    def watch(model, pairs, device):
        scores = real(model, pairs, device)
        if torch.is_grad_enabled():
            losses.append(np.mean([math.log(1 + math.exp(b - a)) for a, b in scores.tolist()]))
        return scores

    monkeypatch.setattr(reward, "pair_scores", watch)
    call("reward", "--steps", 24, "--lr", 0.01, "--out", "runs/reward-logged")
    logged = {line["step"]: line["loss"] for line in metrics("runs/reward-logged")[:-1]}
    assert logged == {step: pytest.approx(losses[step - 1], abs=1e-5) for step in (10, 20, 24)}
