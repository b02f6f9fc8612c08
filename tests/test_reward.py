import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import GPT, Config, ScalarGPT, final_scores, load_model, save_model
from reward import calibration, find_look_alikes, look_alike, pair_scores, reward_loss

CONFIG = Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)
PAIRS = [([1, 2, 3], [4, 10], [5, 6, 7, 10]), ([8], [9, 9, 10], [10])]  # 10 is EOS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ScalarGPT(CONFIG)


def test_loss_by_hand():
    assert reward_loss(torch.tensor(1.0), torch.tensor(-1.0)).item() == pytest.approx(
        math.log(1 + math.exp(-2))
    )
    assert reward_loss(torch.tensor(3.0), torch.tensor(3.0)).item() == pytest.approx(math.log(2))


def test_the_score_is_read_at_the_last_token_of_each_row(model):
    final, summed = pair_scores(model, PAIRS, "cpu")
    for row, (prompt, *answers) in enumerate(PAIRS):
        for column, answer in enumerate(answers):
            alone = model(torch.tensor([prompt + answer]))[0]  # one row, no padding
            assert final[row, column].item() == pytest.approx(alone[-1].item(), abs=1e-5)
            assert summed[row, column].item() == pytest.approx(alone[len(prompt) :].sum().item(), abs=1e-5)
    tokens = torch.tensor([[1, 2, 3, 4, 10, 0, 0]])
    for plain in pair_scores(model, PAIRS, "cpu", plain=True):
        assert torch.allclose(plain, final, atol=1e-6)
    mask = torch.tensor([[False, False, False, True, True, False, False]])
    assert final_scores(model, tokens, mask).item() == pytest.approx(final[0, 0].item(), abs=1e-5)


@torch.no_grad()
def test_shift_adds_a_constant_to_every_score(model):
    tokens = torch.randint(0, 11, (4, 12))
    before = model(tokens)
    model.shift(-1.7)
    assert torch.allclose(model(tokens), before - 1.7, atol=1e-5)


@torch.no_grad()
def test_an_extra_block_starts_as_the_identity(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    save_model(gpt, SimpleNamespace(eos=10, pad=0, files=dict), tmp_path)
    tokens = torch.randint(0, 11, (4, 12))
    grown = load_model(tmp_path, ScalarGPT, extra_layers=1, new_head=True)
    assert grown.config.n_layer == 3
    assert torch.equal(grown.transformer(tokens), gpt.transformer(tokens))


def test_calibration_by_hand():
    sure = math.log(0.84 / 0.16)  # σ of it is 0.84
    margins = torch.tensor([sure] * 3 + [-sure] + [0.1, -0.1])
    (low, low_right, low_n), (high, high_right, high_n) = calibration(margins)
    assert (low_n, low_right) == (2, 0.5) and low == pytest.approx(1 / (1 + math.exp(-0.1)))
    assert (high_n, high_right) == (4, 0.75) and high == pytest.approx(0.84)


def test_look_alikes_differ_in_one_token_and_were_seen():
    answers = [[1, 2, 3, 10], [1, 5, 3, 10], [4, 2, 3, 10], [7, 8, 10]]
    seen = find_look_alikes(answers)
    rng = np.random.default_rng(0)
    found = {tuple(look_alike([1, 2, 3, 10], seen, rng)) for _ in range(50)}
    assert found == {(1, 5, 3, 10), (4, 2, 3, 10)}
    assert look_alike([7, 8, 10], seen, rng) is None
