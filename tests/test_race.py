"""What the README says about the race is what the committed file says, and so does the notebook."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from model import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import race  # noqa: E402

RESULTS = json.loads((ROOT / "notebooks/race.json").read_text())


def test_readme_and_notebook_quote_the_committed_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert race.table(RESULTS) in readme
    assert race.measured(RESULTS) in readme
    cells = json.loads((ROOT / "notebooks/04_rlhf_vs_dpo.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = "".join("".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", []))
    assert race.table(RESULTS) in printed


def test_the_file_has_what_the_race_promises():
    for seed in race.SEEDS:
        for method in ("dpo", "ppo"):
            names = [method if b == race.BETAS[method][2] else f"{method}-beta{b}" for b in race.BETAS[method]]
            assert len(names) >= 5 and all(f"seed{seed}/{name}" in RESULTS["judged"] for name in names)
            assert race.cost(RESULTS, seed, method)["seconds"] > 0
        reference = RESULTS["reference"][f"seed{seed}"]
        for name, row in RESULTS["judged"].items():  # nobody is above the optimum, to sampling error
            if name.startswith(f"seed{seed}/") and "temperature" not in name and "shifted" not in name:
                assert row["score"] <= np.interp(row["kl"], reference["kl"], reference["optimum"]) + 0.06, name


def test_best_of_n_by_hand():
    scores = np.array([[0.0, 1.0, 2.0, 3.0]])
    assert race.best_of_n(scores, 1) == pytest.approx(1.5)
    # two draws of four: the best is 0 in 1 of 16 cases, 1 in 3, 2 in 5, 3 in 7
    assert race.best_of_n(scores, 2) == pytest.approx((0 * 1 + 1 * 3 + 2 * 5 + 3 * 7) / 16)
    assert race.best_of_n(scores, 500) == pytest.approx(3)


def test_flops_by_hand():
    """One layer of one channel: 12 weights, 8 of them the MLP's; attention: 2 products with each of 5 tokens."""
    config = Config(vocab_size=7, n_positions=8, n_embd=1, n_layer=1, n_head=1)
    assert race.forward_flops(config, tokens=10, context=5, wanted=10, logits=False) == 10 * (2 * 12 + 2 * 2 * 5)
    assert race.forward_flops(config, tokens=10, context=5, wanted=3) == 10 * (2 * 4 + 2 * 2 * 5) + 3 * (2 * 8 + 2 * 7)
    pairs = [([1] * 6, [2] * 2, [3] * 2)]
    packed = race.forward_flops(config, 10, 4, 4)  # two answers share the prompt
    assert race.training_flops(config, pairs, "pairs", 0) == pytest.approx(packed)
    assert race.training_flops(config, pairs, "dpo", 3) == pytest.approx(packed + 3 * 3 * 64 * packed)


def test_a_coin_is_tossed_by_the_share_of_volunteers_that_was_asked_for(tmp_path):
    row = {"prompt": "POST: My cousin Hugo lost my kite upstairs.\nTL;DR:", "chosen": " Hugo lost my kite.", "rejected": " Emil lost my kite."}
    (tmp_path / "all").write_text("\n".join([json.dumps(row)] * 4000))
    race.relabel(tmp_path / "all", tmp_path / "half", seed=1, coin=0.5)
    kept = np.mean([json.loads(line)["chosen"] == row["chosen"] for line in (tmp_path / "half").read_text().splitlines()])
    p = 0.5 / (1 + math.exp(-2)) + 0.25  # the judge is two points apart
    assert abs(kept - p) < 4 * math.sqrt(p * (1 - p) / 4000)
