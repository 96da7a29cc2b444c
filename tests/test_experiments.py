"""The runner on small stand-ins for training commands, and the page that is made of its lines."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree as xml

import pytest
import torch

import grpo
from experiments import difficulty, lucky, method_figure, runs, staircase, tables, trl_early
from experiments.results import Result
from plumbing import data
from plumbing.command import read_flags
from plumbing.guide_cache import GuideCache
from plumbing.rollout import Completion
from worlds import cards

ROOT = runs.ROOT
# Writes metrics.jsonl as a run with one rollback would; exits with 3 if its seed is 7
COMMAND = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
out.mkdir(parents=True, exist_ok=True)
with open(out.parent / "order", "a") as file:
    file.write(out.name + "\\n")
if flags["--seed"] == "7":
    sys.exit("no luck\\nwith 7")
assert "--guide" not in flags or pathlib.Path(flags["--guide"]).is_dir()
lines = [{"step": 0, "sampled_tokens": 0, "eval/accuracy": 0.0123456}]
for step in range(1, 13):
    line = {"step": step, "sampled_tokens": 100 * step, "entropy": step, "loss": 0.0}
    lines.append(line | {"npo/guide_frac": 0.5, "npo/guide_ratio_max": 20.0 - step})
lines[-1]["eval/accuracy"] = 0.25
lines.append({"step": 11, "sampled_tokens": 1500, "entropy": 50, "loss": 0.0, "rollbacks": 1})
lines.append(lines[-1] | {"step": 12, "sampled_tokens": 1700, "eval/accuracy": 0.5})
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Two rows, "far" and "near", where near needs far; in a directory of their own."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    rows = [
        runs.Run("far", f"{script}"),
        runs.Run("near", f"{script} --guide {{runs}}/far-{{seed}}", "far"),
    ]
    monkeypatch.setattr(runs, "GROUPS", {"toy": ("toy", rows)})
    monkeypatch.setattr(runs, "RUNS", str(tmp_path))
    return tmp_path


def results(path) -> dict:
    return {(line["row"], line["seed"]): line for line in runs.read_jsonl(path)}


def test_a_group_runs_in_the_order_of_its_needs(group, capsys):
    path = group / "toy.jsonl"
    assert runs.make_all(runs.planned("toy", [3, 4]), path, jobs=2) == []
    assert set(results(path)) == {("far", 3), ("far", 4), ("near", 3), ("near", 4)}
    order = (group / "toy" / "order").read_text().split()
    assert order.index("far-3") < order.index("near-3")
    assert order.index("far-4") < order.index("near-4")
    assert "near, seed 4: accuracy 0.500" in capsys.readouterr().out


def test_a_result_line_by_hand(group):
    path = group / "toy.jsonl"
    runs.make_all(runs.planned("toy", [3]), path, jobs=1)
    line = results(path)["near", 3]
    assert line["evals"] == [[0, 0.01235, 0], [12, 0.5, 1700]]  # 0.25 at step 12 was undone
    assert line["updates"] == 14
    assert line["entropy"] == [[10, 5.5], [12, 50.0]]
    assert line["npo/guide_frac"] == round(10 * 0.5 / 12, 4)
    assert line["npo/guide_ratio_max"] == 19.0
    assert line["base"] == runs.base_model() and len(line["base"]) == 12
    assert line["command"].startswith(f"OMP_NUM_THREADS=1 python {group}/command.py --guide ")
    assert line["command"].endswith(f"--seed 3 --out {group}/toy/near-3")
    assert line["seconds"] >= 0 and line["commit"]


def test_a_failure_is_told_and_stops_only_what_needs_it(group, capsys):
    path = group / "toy.jsonl"
    failed = runs.make_all(runs.planned("toy", [7, 3]), path, jobs=2)
    assert [(run.row, run.seed) for run in failed] == [("far", 7), ("near", 7)]
    assert set(results(path)) == {("far", 3), ("near", 3)}
    told = capsys.readouterr().out
    assert "far, seed 7: FAILED with exit code 1" in told and "no luck\n  with 7" in told
    assert "near, seed 7: skipped, since far failed" in told


def test_only_what_has_no_line_runs_again_with_what_it_needs(group):
    path = group / "toy.jsonl"
    runs.make_all(runs.planned("toy", [3]), path, jobs=1)
    runs.make_all(runs.planned("toy", [3]), path, jobs=1)
    assert (group / "toy" / "order").read_text().split() == ["far-3", "near-3"]
    kept = path.read_text().splitlines()
    path.write_text(kept[0] + "\n")  # near's line is lost, and far's directory may be
    runs.make_all(runs.planned("toy", [3]), path, jobs=1)
    assert (group / "toy" / "order").read_text().split() == ["far-3", "near-3"] * 2
    lines = path.read_text().splitlines()
    assert lines[0] == kept[0] and [json.loads(line)["row"] for line in lines] == ["far", "near"]


def start(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["runs", *words])
    runs.main()


def test_main_mends_a_half_line_and_exits_with_an_error(group, monkeypatch):
    monkeypatch.setattr(runs, "HERE", group)
    (group / "toy.jsonl").write_text('{"row": "far", "se')
    with pytest.raises(SystemExit, match="not made: far 7, near 7"):
        start(monkeypatch, "toy", "--seeds", "3", "7", "--jobs", "1")
    assert set(results(group / "toy.jsonl")) == {("far", 3), ("near", 3)}


def test_main_does_not_mix_two_worlds(group, monkeypatch, capsys):
    monkeypatch.setattr(runs, "HERE", group)
    (group / "toy.jsonl").write_text('{"row": "far", "seed": 3, "base": "another"}\n')
    with pytest.raises(SystemExit):
        start(monkeypatch, "toy", "--seeds", "3")
    assert "toy.jsonl holds runs that started from another base" in capsys.readouterr().err
    assert not (group / "toy").exists()


def test_help_lists_the_groups(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "early: grpo, early, self, grpo-16" in shown and "compare: grpo, grpo-16, luffy" in shown


@pytest.mark.parametrize("group", runs.GROUPS)
def test_every_command_has_flags_that_exist(group):
    for run in runs.planned(group, [5]):
        python, *words = run.command.split()
        name = words.pop(0)
        name = words.pop(0) if name == "-m" else name.removesuffix(".py")
        module = __import__(name, fromlist=["main"])
        configs = [key for key in vars(module) if key.lower() == name.split(".")[-1] + "config"]
        config = read_flags(getattr(module, configs[0]), None, words)
        config.check()
        assert python == "python" and config.seed == 5
        assert run.out == config.out == f"experiments/runs/{group}/{run.row}-5"


@pytest.mark.parametrize("group", runs.GROUPS)
def test_needs_are_the_runs_that_a_command_reads(group):
    for run in runs.planned(group, [5]):
        read = re.findall(rf"--guide experiments/runs/{group}/(\S+)-5/checkpoints", run.command)
        assert read == ([run.needs] if run.needs else [])


def test_the_committed_page_is_that_of_the_committed_lines():
    assert (ROOT / "docs" / "results.md").read_text() == tables.results_page()


def table_after(text: str, heading: str, start: str) -> list[list[str]]:
    """The cells of the first table after a heading whose header begins like that."""
    found = text[text.index(heading) :]
    found = found[found.index(start) :].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]


def test_the_numbers_are_those_of_the_frozen_tables():
    """While the comparison's lines are those of the lax world, whose tables are frozen."""
    now = (ROOT / "docs" / "results.md").read_text()
    before = (ROOT / "docs" / "results_before.md").read_text()
    name = "## The comparison: where should guidance come from?"
    mine = table_after(now, name, "| method |")
    theirs = table_after(before, "### The paper's comparison", "| method |")
    frozen = {row[0]: row[1:11] for row in theirs}
    assert len(mine) == len(theirs) == 17
    for row in mine:
        assert row[1:11] == frozen[row[0]]


def test_intervals_and_verdicts_by_hand():
    values = [1.0, 2.0, 4.0]  # mean 7/3, std 1.5275, t 4.303
    low, high = tables.bounds(values)
    assert low == pytest.approx(7 / 3 - 4.303 * 1.527525 / 3**0.5, abs=1e-5)
    assert tables.interval(values) == f"2.33 [{low:.2f}, {high:.2f}]"
    assert tables.verdict([0.1, 0.11, 0.12]) == "holds"
    assert tables.verdict([-0.1, -0.11, -0.12]) == "not confirmed"
    assert tables.verdict(values) == "undecided"
    assert tables.speed_verdict([1.9, 2.1, 2.2]) == "faster; consistent with 2.1"
    assert tables.speed_verdict([1.5, 1.51, 1.52]) == "faster, but by less"
    assert tables.speed_verdict([0.5, 0.51, 0.52]) == "slower"
    assert tables.speed_verdict([0.5, 1.5, 1.2]) == "undecided"


def test_student_t_has_the_known_quantiles():
    """P(|t| < T_975[n]) is 0.95 with n - 1 degrees of freedom, by integrating the density."""
    for seeds in range(2, len(tables.T_975)):
        free = seeds - 1
        x = torch.linspace(0, tables.T_975[seeds], 200_001, dtype=torch.float64)
        log_scale = torch.lgamma(torch.tensor([(free + 1) / 2, free / 2], dtype=torch.float64))
        scale = (log_scale[0] - log_scale[1]).exp() / (free * torch.pi) ** 0.5
        inside = 2 * torch.trapezoid(scale * (1 + x**2 / free) ** (-(free + 1) / 2), x)
        assert inside.item() == pytest.approx(0.95, abs=1e-4)


def test_the_method_figure():
    """Its numbers are grpo.py's own; it is the committed one, well-formed and small."""
    drawn = method_figure.method_figure()
    assert (ROOT / "docs" / "figures" / "method.svg").read_text() == drawn
    texts = [" ".join(part.itertext()) for part in xml.fromstring(drawn).iter() if part.text]
    slot = json.loads((ROOT / "experiments" / "replaced_slot.json").read_text())
    mixed = torch.tensor([[*slot["rewards"][:-1], slot["guide_reward"]]])
    expected = [f"{a:+.3f}".replace("-", "−") for a in grpo.group_advantages(mixed)[0].tolist()]
    assert expected == ["−0.354"] * 7 + ["+2.475"]
    assert [text for text in texts if re.fullmatch(r"[+−]\d\.\d{3}", text)] == expected
    assert sum(answer == slot["gold"] for answer in slot["boxed"]) <= method_figure.GATE * 8
    assert slot["guide_boxed"] == slot["gold"]
    assert (method_figure.end("27 +8= 35 +5= 40"), method_figure.end("40")) == ("… 40", "40")
    assert "prefers-color-scheme: dark" in drawn and len(drawn.encode()) < 10_000


# ------------------------------------------------------------------- the worlds, and the law


def test_where_runs_reach_their_goals_by_hand():
    def of(*evals) -> Result:
        return Result.of({"evals": [list(line) for line in evals], "entropy": []})

    runs = [of((0, 0.0, 50), (10, 0.2, 150), (20, 0.6, 300)), of((0, 0.0, 0), (30, 0.1, 90))]
    assert tables.to_goals(runs, [0.5, 0.4], "step") == ([17.5, 30], 1)  # the second never does
    assert tables.to_goals(runs, [0.1, 0.05], "sampled_tokens") == ([100.0, 45.0], 0)
    known = {"grpo": [runs[0]], "early": [of((0, 0.3, 0), (60, 0.7, 9), (70, 0.8, 10))]}
    assert tables.at_window(known, "early", "grpo") == [[0.7], [0.6]]


def test_lucky_answers_are_counted_by_their_working(monkeypatch):
    prompts = data.world_prompts("cards_lax", 2, "train")
    right, slips, twice = (prompts.rows[row].working for row in (3, 5, 8))
    slips = slips.replace("= ", "= 1", 1)
    answers = {prompts[row].id: text for row, text in ((3, right), (5, slips), (8, twice))}
    made = {id: [Completion(id, [7], None, f"{text} box", True)] for id, text in answers.items()}
    monkeypatch.setattr(lucky.npo, "go_ahead", lambda config, out: "guide")
    cache = GuideCache(made, 40, 99, {"prompts": 320})
    monkeypatch.setattr(lucky.npo, "ask_guide", lambda *_: cache)
    line = lucky.counted("cards_lax", 4)
    assert (line["verified"], line["lucky"], line["prompts"], line["seed"]) == (3, 1, 320, 4)


def test_difficulty_by_hand(monkeypatch):
    """p = 0.5 for training prompts of four carries, else 0.25."""
    monkeypatch.setattr(difficulty, "Policy", lambda path: path)

    monkeypatch.setattr(difficulty, "right_texts", lambda policy, prompts: prompts)

    def chances(policy, prompts, config):
        return [0.5 if hand.carries == 4 else 0.25 for hand in prompts.rows]

    monkeypatch.setattr(difficulty, "exact_accuracies", chances)
    rows = {(r["split"], r["prompts"]): r for r in difficulty.rows("cards")}
    four, three = rows["training", "4 carries"], rows["held-out", "3 carries"]
    assert (four["pass@1"], four["pass@8"]) == (0.5, 1 - 0.5**8)
    assert (three["pass@1"], three["pass@8"]) == (0.25, pytest.approx(1 - 0.75**8))
    assert sum(r["count"] for key, r in rows.items() if key[1] != "all") == 2048 + 256
    assert rows["training", "all"]["count"] == 2048


def test_the_siblings_first_checkpoints_beyond_a_level_are_the_guides(monkeypatch):
    monkeypatch.setattr(staircase, "run", lambda *_: None)
    b = {0: 0.81, 5: 0.01, 10: 0.1521, 15: 0.1681, 20: 0.64, 25: 0.9216}  # q .39 at 10, .41 at 15
    lines = [{"step": step, "eval/accuracy_b": value} for step, value in b.items()]
    monkeypatch.setattr(staircase, "evaluations", lambda out: lines)
    near, far = staircase.guides(7).values()
    assert near[0].endswith("sibling-7/checkpoints/step_000015") and near[1] == pytest.approx(0.41)
    assert far[0].endswith("step_000025") and far[1] == pytest.approx(0.96)
    monkeypatch.setattr(staircase, "evaluations", lambda out: lines[:5])
    with pytest.raises(SystemExit, match="never borrows with probability 0.95"):
        staircase.guides(7)


# ------------------------------------------------------------------------------------ through TRL


def test_the_speed_up_through_trl_is_of_steps_to_grpos_own_accuracy(tmp_path):
    lines = []
    for seed, reached in ((3, 10), (4, 20)):
        grpo = [[0, 0.0, 0], [20, 0.1, 7], [40, 0.2, 9], [60, 0.3, 12]]
        early = [[0, 0.0, 0], [reached, 0.2, 8], [60, 0.5, 11]]
        for row, evals in (("grpo", grpo), ("early", early)):
            lines.append({"row": row, "seed": seed, "evals": evals, "entropy": []})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = trl_early.speed_up(tmp_path / "lines.jsonl", [3, 4])
    assert said.startswith("speed-up 3.00 [")
    assert "GRPO 0.300 [0.300, 0.300], NPO 0.500 [0.500, 0.500]; seeds 3, 4" in said
    one = trl_early.speed_up(tmp_path / "lines.jsonl", [3])
    assert one == "speed-up 4.00; at step 60 GRPO 0.300, NPO 0.500; seeds 3"


def test_trl_runs_are_evaluated_by_their_checkpoints(tmp_path, monkeypatch):
    shutil.copytree(cards.BASE, tmp_path / "checkpoints/step_000002")
    guided = {"npo/guide_frac": 0.5, "npo/guide_ratio_max": 1.25}
    lines = [{"step": 1, "entropy": 0.25, "sampled_tokens": 70} | guided]
    lines.append({"step": 2, "entropy": 0.75, "sampled_tokens": 150})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(trl_early, "exact_accuracies", lambda *_: [0.25, 0.5])
    assert trl_early.measured(tmp_path) == {
        "updates": 2,
        "evals": [[0, 0.375, 0], [2, 0.375, 150]],
        "entropy": [[2, 0.5]],
        "npo/guide_frac": 0.25,
        "npo/guide_ratio_max": 1.25,
    }
    commands = [run.command for run in trl_early.planned([5])]
    assert "--max_steps 140 " in commands[0] and "--scout_steps 40 --max_steps 60 " in commands[1]
    assert all("--seed 5 --output_dir experiments/runs/trl/" in command for command in commands)
