"""The real scripts, as a user starts them, on a model of a few thousand weights. Seconds, not minutes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import MAX_ANSWER_TOKENS, Tokenizer
from model import ScalarGPT, final_scores, generate, load_model
from sample import frontier, optimal_weights, win_rate

ROOT = Path(__file__).parent.parent


def start(where, script, *options, status=0):
    """Run a script in the folder `where`; returns what it printed."""
    command = [sys.executable, ROOT / script, *map(str, options)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def last_metrics(directory):
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The README's chain, in small."""
    where = tmp_path_factory.mktemp("user")
    tiny = ["--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--block-size", 96]
    start(where, "pretrain.py", "--steps", 60, "--batch-size", 16, *tiny)
    start(where, "dpo.py", "--pairs", 300, "--steps", 4, "--batch-size", 32)
    start(where, "reward.py", "--practice", 4, "--steps", 4, "--batch-size", 32)
    start(where, "ppo.py", "--steps", 2, "--batch-size", 32)
    return where


def test_pretraining_leaves_a_checkpoint_and_its_figures(runs):
    final = last_metrics(runs / "runs/pretrain")
    assert final["final"] is True and final["val_loss"] > final["entropy"] > 0 and final["seconds"] > 0
    first = json.loads((runs / "runs/pretrain/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > final["val_loss"]  # it has learned something
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        assert (runs / "runs/pretrain" / name).stat().st_size > 0


def test_dpo_leaves_pairs_a_checkpoint_and_its_figures(runs):
    pairs = [json.loads(line) for line in (runs / "runs/preferences.jsonl").read_text().splitlines()]
    assert 250 < len(pairs) <= 300 and all(p["chosen"] != p["rejected"] for p in pairs)
    final = last_metrics(runs / "runs/dpo")
    assert final["final"] is True and 0 < final["val_accuracy"] <= 1
    assert final["val_loss"] == pytest.approx(math.log(2), abs=0.1)  # four steps do not lead far


@pytest.mark.parametrize("loss", ["ipo", "cdpo", "hinge"])
def test_every_loss_runs_on_a_file_of_the_users_own(runs, loss):
    out = start(runs, "dpo.py", "--data", "runs/preferences.jsonl", "--loss", loss, "--steps", 2, "--out", f"runs/{loss}")
    assert "held-out pairs" in out and (runs / "runs" / loss / "model.safetensors").exists()


def test_the_same_seed_gives_the_same_figures(runs):
    for out in ("runs/a", "runs/b"):
        start(runs, "dpo.py", "--data", "runs/preferences.jsonl", "--steps", 3, "--out", out)
    assert (runs / "runs/a/model.safetensors").read_bytes() == (runs / "runs/b/model.safetensors").read_bytes()


def test_reward_leaves_a_checkpoint_with_mean_0_on_the_references_answers(runs):
    final = last_metrics(runs / "runs/reward")
    assert final["final"] is True and 0 < final["val_accuracy"] < 1 and final["val_loss"] > 0
    assert 0.5 < final["best_accuracy"] < 1
    tokenizer, reference = Tokenizer.load(runs / "runs/pretrain"), load_model(runs / "runs/pretrain")
    model = load_model(runs / "runs/reward", ScalarGPT)
    assert model.config.n_layer == reference.config.n_layer + 1
    posts = [json.loads(line)["prompt"] for line in (runs / "runs/preferences.jsonl").read_text().splitlines()]
    prompts = [tokenizer.encode(post) for post in posts for _ in range(4)]
    tokens, mask, _ = generate(reference, prompts, MAX_ANSWER_TOKENS, tokenizer.eos)
    with torch.no_grad():
        scores = final_scores(model, tokens, mask)
    few = len(posts) // 10  # the shift was measured on so many answers
    assert abs(scores.mean().item()) < 4 * scores.std().item() * math.sqrt(1 / few + 1 / len(scores))


def test_ppo_starts_as_the_reference_and_logs_every_figure(runs):
    lines = [json.loads(line) for line in (runs / "runs/ppo/metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["kl"]) < 1e-4
    explained = (ROOT / "ppo.py").read_text().split('"""')[1]
    for name in lines[0].keys() - {"step", "beta"}:
        assert f"    {name} " in explained, f"{name} is logged but not explained"
    assert {"final", "reward", "kl", "explained_variance", "seconds"} == set(lines[-1])


@pytest.mark.parametrize(
    "options",
    [
        ["--advantage", "rloo"],
        ["--advantage", "grpo"],
        ["--target-kl", 1.0],
        ["--reward", "length"],
        ["--data", "runs/preferences.jsonl", "--beta", 0],
    ],
)
def test_every_option_of_ppo_runs(runs, options):
    out = start(runs, "ppo.py", "--steps", 2, "--batch-size", 16, "--out", "runs/option", *options)
    assert "held-out prompts: score" in out
    assert last_metrics(runs / "runs/option")["final"] is True


def test_adaptive_beta_falls_while_the_kl_is_below_its_target(runs):
    start(runs, "ppo.py", "--steps", 2, "--batch-size", 16, "--target-kl", 1.0, "--out", "runs/target")
    first, second = [json.loads(line) for line in (runs / "runs/target/metrics.jsonl").read_text().splitlines()[:2]]
    assert first["beta"] == 0.4
    assert second["beta"] == pytest.approx(0.4 * (1 - 0.1 * 0.2))  # KL was 0, so the largest step down


def test_compare_prints_a_table_and_json(runs):
    small = ["--prompts", 4, "--answers", 16]
    table = start(runs, "sample.py", "--compare", *small)
    assert all(name in table for name in ("runs/pretrain", "runs/dpo", "runs/ppo", "POST:"))
    reference, dpo, ppo = json.loads(start(runs, "sample.py", "--compare", "--json", *small))
    assert {"checkpoint", "score", "kl", "optimal_score", "share", "win_rate", "length"} <= set(dpo)
    assert reference["share"] is None and abs(reference["kl"]) < 1e-4 and reference["win_rate"] == 0.5


def test_one_prompt_and_the_loop(runs):
    one = start(runs, "sample.py", "--prompt", r"POST: Hello.\nTL;DR:", "--temperature", 0)
    assert one.startswith("POST: Hello.\nTL;DR:")
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--init", "runs/pretrain", "--top-k", "5"],
        cwd=runs, input="It is\n\nMy\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "It is" in done.stdout and "My" in done.stdout


@pytest.mark.parametrize(
    "command, message",
    [
        (["dpo.py", "--init", "nowhere"], "nowhere"),
        (["dpo.py", "--data", "nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["reward.py", "--init", "nowhere"], "nowhere"),
        (["ppo.py", "--reward", "nowhere"], "nowhere"),
        (["ppo.py", "--reward", "runs/dpo"], "runs/dpo: a language model, not a reward model"),
        (["ppo.py", "--data", "nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["sample.py", "--init", "nowhere", "--prompt", "x"], "nowhere"),
        (["sample.py", "--init", "runs/pretrain", "--prompt", "word " * 200], "leaves no room"),
        (["pretrain.py", "--vocab-size", "10"], "too small"),
    ],
)
def test_bad_input_ends_in_one_sentence(runs, command, message):
    printed = start(runs, *command, status=2)
    assert message in printed.splitlines()[-1] and "Traceback" not in printed


@pytest.mark.parametrize("script", ["dpo.py", "reward.py", "ppo.py"])
def test_a_handful_of_pairs_is_refused(runs, script):
    few = (runs / "runs/preferences.jsonl").read_text().splitlines()[:5]
    (runs / "few.jsonl").write_text("\n".join(few))
    assert "few.jsonl: 5" in start(runs, script, "--data", "few.jsonl", status=2)
    (runs / "enough.jsonl").write_text("\n".join((runs / "runs/preferences.jsonl").read_text().splitlines()[:20]))
    start(runs, script, "--data", "enough.jsonl", "--steps", 1, "--batch-size", 8, "--out", "runs/enough")


def test_data_can_be_looked_at(tmp_path):
    assert start(tmp_path, "data.py").count("TL;DR:") >= 6


# ----------------------------------------------------------------------------------------------------
# The optimum that `--compare` holds the models against


def test_frontier_against_a_known_optimum():
    """Rewards N(0, 1) under the reference: π* is N(1/β, 1), so its reward is 1/β and its KL 1/(2β²)."""
    scores = np.random.default_rng(0).normal(size=(64, 4096))
    betas, kls, rewards = frontier(scores)
    assert np.all(np.diff(kls) >= 0)
    for kl in (0.1, 0.5, 1.0):
        assert np.interp(kl, kls, rewards) == pytest.approx(math.sqrt(2 * kl), rel=0.02)


def test_optimal_weights_and_win_rate_by_hand():
    scores = np.array([[0.0, 1.0]])
    w = optimal_weights(scores, beta=1 / math.log(3))
    assert w.tolist() == [pytest.approx([1 / 4, 3 / 4])]
    # answer 0 ties one and loses one: 1/4; answer 1 wins one and ties one: 3/4
    assert win_rate(scores, scores) == pytest.approx(0.5)
    assert win_rate(scores, scores, w) == pytest.approx(1 / 4 * 1 / 4 + 3 / 4 * 3 / 4)
