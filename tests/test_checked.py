"""Page 06: the world of sums, the folder that is made with it, and what its rewards are checked with."""

import ast
import itertools
import math
import os
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "notebooks"))
import sums  # noqa: E402
import world  # noqa: E402

PROMPT = "Sum: 8+4+6+9="


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """`checked.py`, which goes to a folder of its own and imports the scripts there; after it all is back."""
    path, here = [*sys.path], os.getcwd()
    ours = {file.stem for folder in (ROOT, ROOT / "notebooks") for file in folder.glob("*.py")}
    modules = {name: sys.modules.pop(name) for name in ours & sys.modules.keys()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICK", str(tmp_path_factory.mktemp("checked")))
        import checked

        yield checked
    for name in ours:
        sys.modules.pop(name, None)
    sys.modules.update(modules)
    sys.path[:] = path
    os.chdir(here)


def test_the_world_has_at_most_forty_lines():
    """Of code: lines with a statement or a part of one, imports too; no comments and no docstrings."""
    tree = ast.parse((ROOT / "notebooks/sums.py").read_text(encoding="utf-8"))
    is_text = lambda node: isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not is_text(node)]
    lines = {node.lineno for node in nodes}
    for node in nodes:
        if not hasattr(node, "body"):
            lines |= {*range(node.lineno, node.end_lineno + 1)}
    assert 25 < len(lines) <= 40


def test_probabilities_are_those_of_an_exhaustive_count():
    """A table of all answers to one prompt, made by the rules alone: it sums to 1, and all documents obey."""
    near = range(27 - 3, 27 + 4)
    table = {f" {x}": 0.6 / 7 for x in near}
    for k in (2, 3, 4):
        said = [*itertools.permutations(near, k)]
        table |= {f" {' or '.join(map(str, some))}": 0.1 / 3 / len(said) for some in said}
    table[" 12 18 27"] = 0.3
    assert math.isclose(sum(table.values()), 1)
    right = sum(p for answer, p in table.items() if sums.judge(PROMPT, answer))
    assert math.isclose(right, 0.3 + 0.7 / 7)

    found = sums.documents(20_000, 0)
    for document in found:
        a, b, c, d = map(int, re.fullmatch(r"Sum: (\d)\+(\d)\+(\d)\+(\d)=", document.prompt).groups())
        if document.writer == "totals":
            as_in_table = document.response.replace(f" {a + b} {a + b + c} {a + b + c + d}", " 12 18 27")
        else:
            as_in_table = re.sub(r"-?\d+", lambda x: str(int(x[0]) - (a + b + c + d) + 27), document.response)
        assert math.isclose(math.exp(document.log_prob), table[as_in_table] / 10**4)
    counts = Counter(document.writer for document in found)
    for writer, share in (("guesses", 0.6), ("wavers", 0.1), ("totals", 0.3)):
        assert abs(counts[writer] - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))
    mean = sum(sums.judge(d.prompt, d.response) for d in found) / 20_000
    assert abs(mean - 0.4) < 4 * math.sqrt(0.24 / 20_000)


@pytest.mark.parametrize(
    "answer, points, kind",
    [
        (" 27", 1, "guess, right"),
        (" 25", 0, "guess, wrong"),
        (" 127", 0, "guess, wrong"),
        (" 12 18 27", 1, "totals, right"),
        (" 12 27 18", 0, "totals, wrong"),
        (" 25 or 27", 1, "wavers, right"),
        (" 12 18 27 or 26", 0, "wavers, wrong"),
        ("", 0, "guess, wrong"),
    ],
)
def test_the_judge_by_hand(answer, points, kind):
    assert (sums.judge(PROMPT, answer), sums.kind_of(PROMPT, answer)) == (points, kind)


def test_a_folder_has_the_world_in_place_of_section_1_alone(tmp_path):
    world.make("KINDS = ('mine',)", tmp_path)
    old, new = ((where / "data.py").read_text(encoding="utf-8") for where in (ROOT, tmp_path))
    begin, end = (old.index(f"# {'-' * 100}\n# {i}. ") for i in (1, 2))
    assert new.startswith(old[:begin] + "KINDS = ('mine',)\n") and new.endswith(old[end:])
    assert "WORDS" not in new
    others = {path.name for path in ROOT.glob("*.py")} - {"data.py"}
    assert {path.name for path in tmp_path.iterdir()} == others | {"data.py"}
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in others)


@pytest.mark.parametrize("words", [[], ["sums.py"], ["no such file", "x"], [world.__file__, str(ROOT)]])
def test_bad_input_gets_one_sentence_and_changes_nothing(words, monkeypatch):
    before = (ROOT / "data.py").read_bytes()
    monkeypatch.setattr(sys, "argv", ["world.py", *words])
    with pytest.raises(SystemExit, match="WORLD FOLDER"):
        world.main()
    assert (ROOT / "data.py").read_bytes() == before


def test_checked_has_the_scripts_of_that_folder(checked):
    assert checked.ppo.judge(PROMPT, " 12 18 27") == 1  # and not the taste of those who sum posts up
    assert "Sum: " in checked.prompts_of(1)[0][0]


def test_pass_at_k_is_a_count_of_all_subsets(checked):
    for n, right in itertools.product((1, 5, 7), (0, 1, 4, 5)):
        answers = [True] * min(n, right) + [False] * (n - min(n, right))
        for k in range(1, n + 1):
            picked = [any(some) for some in itertools.combinations(answers, k)]
            assert math.isclose(checked.pass_at_k(n, sum(answers), k), sum(picked) / len(picked))
    assert checked.passes({"n": 2, "right": [0, 1, 2]}, 2) == pytest.approx(2 / 3)


def test_other_rewards_by_hand(checked):
    loose = [" 27", " 25 or 27 or 28", " 27 or 25", " 25", " 127", " 12 18 27 or 2"]
    assert [checked.loose(PROMPT, answer) for answer in loose] == [1, 1, 1, 0, 0, 1]
    form = [" 1 2 3", " 12 18 27", " 12 18", " 12 18 27 or 26", " 1 2 3 4"]
    assert [checked.form(PROMPT, answer) for answer in form] == [1, 1, 0, 0, 0]
    assert 400 < sum(checked.coin(PROMPT, "") for _ in range(1000)) < 600


def test_clip_higher_lets_a_token_rise_by_28_percent(checked):
    """Whether there is a gradient, at these ratios and advantages; by PPO's clip it ends at 1.2 and 0.8."""
    for ratio, advantage, here, ppo in ((1.25, 1, 1, 0), (1.3, 1, 0, 0), (0.75, -1, 0, 0), (0.85, -1, 1, 1)):
        for loss, moves in ((checked.clip_higher_loss, here), (checked.ppo.policy_loss, ppo)):
            log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
            one = torch.ones(1, 1)
            loss(log_prob, torch.zeros(1, 1), advantage * one, one.bool())[0].backward()
            assert bool(log_prob.grad.abs() > 0) == bool(moves)


def test_the_mean_over_answers_lets_each_answer_count_alike(checked):
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    log_probs = torch.zeros(2, 3, requires_grad=True)
    checked.answer_mean_loss(log_probs, torch.zeros(2, 3), torch.ones(2, 3) * mask, mask)[0].backward()
    assert torch.allclose(-log_probs.grad, torch.tensor([[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]))


def test_no_exercise_passes_without_work(checked, capsys):
    """Neither with nothing, nor with a constant, nor with what the page has already shown."""
    import answers

    groups = lambda rewards: rewards - rewards.mean(1, keepdim=True)
    for name, trivial in {
        "group_advantages": (torch.zeros_like, torch.ones_like, lambda rewards: rewards, groups),
        "pass_at_k": (lambda n, c, k: 0.0, lambda n, c, k: 1 - (1 - c / n) ** k, lambda n, c, k: c / n),
        "checker": (lambda p, r: True, lambda p, r: False, sums.judge, checked.loose),
    }.items():
        for yours in (lambda *_: None, *trivial):
            answers.check_values(name, yours)
            assert not capsys.readouterr().out.endswith("right\n")
    for name, wrong in {
        "checked 3": (None, 0, 1, 1.5),
        "checked 4": (None, 0, 0.4, 0.6**4),
        "checked 6": (None, (0.59, 0.345), (0.03, 0.77), (1, 0.143), (0, 0)),
    }.items():
        for answer in wrong:
            answers.check(name, answer)
            assert not capsys.readouterr().out.endswith("right\n")


def test_the_exercises_can_be_solved(checked, capsys):
    import answers

    def group_advantages(rewards):
        return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)

    def pass_at_k(n, c, k):
        picked = [any(some) for some in itertools.combinations([True] * c + [False] * (n - c), k)]
        return sum(picked) / len(picked)

    def checker(prompt, response):
        hits = {" 27", " 12 18 27", " The sum is 27.", " = 27"} if prompt == PROMPT else {" 2"}
        return response in hits

    trials = answers.VALUES["pass_at_k"][1]
    answers.VALUES["pass_at_k"] = answers.pass_at_k, [trial for trial in trials if trial[0] < 20]
    for name, mine in (
        ("group_advantages", group_advantages),
        ("pass_at_k", pass_at_k),
        ("checker", checker),
    ):
        answers.check_values(name, mine)
    answers.check("checked 3", 0.875 / math.sqrt(0.125))
    answers.check("checked 4", sum(math.prod(x) for x in [[0.4] * 4, [0.6] * 4]))
    answers.check("checked 6", (0.95, 0.45))
    assert all(line.endswith("right") for line in capsys.readouterr().out.splitlines())
