"""The runner and the plan on small stand-ins for training commands; the worlds' numbers, the
figure of the method, and the runs through TRL."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
import torch
from safetensors.torch import save_file

import grpo
from experiments import difficulty, method_figure, runs, trl_early
from experiments.plan import GROUPS, ROWS, Run
from plumbing import data
from plumbing.command import read_flags
from plumbing.guide_cache import GuideCache
from plumbing.rollout import Completion
from worlds import cards

ROOT = runs.ROOT
# Writes metrics.jsonl as a run with one rollback would, or with --steps one whose part B is learnt,
# half as fast with seed 24; exits with an error if its seed is 7
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
if "--steps" in flags:
    rate = 0.04 if flags["--seed"] == "24" else 0.08
    lines = [
        {"step": step, "sampled_tokens": step, "entropy": 1.0, "loss": 0.0, "eval/accuracy": 0.5}
        | {"eval/accuracy_b": rate * step}
        for step in range(0, int(flags["--steps"]) + 1, 2)
    ]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
for line in lines:
    (out / f"checkpoints/step_{line['step']:06d}").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A group of rows that need each other, in a directory of their own."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    rows = [
        Run("toy/far", f"{script}"),
        Run("toy/near", f"{script} --guide {{toy/far@12}}"),
        Run("toy/last", f"{script} --guide {{toy/near@11}}"),
        Run("toy/sibling", f"{script} --steps {{steps}}", 20, (6, 14, 20)),
        Run("toy/chosen", f"{script} --guide {{toy/sibling>.16}}"),
        Run("toy/never", f"{script} --guide {{toy/sibling>.90}}"),
    ]
    monkeypatch.setattr(runs, "GROUPS", {"toy": (rows, range(3, 5), "toy")})
    monkeypatch.setattr(runs, "ROWS", {run.row: run for run in rows})
    monkeypatch.setattr(runs, "RUNS", str(tmp_path))
    monkeypatch.setattr(runs, "HERE", tmp_path)
    return tmp_path


def made(folder, seeds, *names: str, jobs=1) -> list:
    chosen = [runs.ROWS[f"toy/{name}"] for name in names]
    return runs.make_all(runs.planned(chosen, seeds), folder / "toy.jsonl", jobs)


def order(folder) -> list[str]:
    return (folder / "toy" / "order").read_text().split()


def results(folder) -> dict:
    return {(line["row"], line["seed"]): line for line in runs.read_jsonl(folder / "toy.jsonl")}


def test_a_group_runs_in_the_order_of_its_needs(toy, capsys):
    assert made(toy, [3, 4], "far", "near", jobs=2) == []
    assert set(results(toy)) == {(f"toy/{row}", seed) for row in ("far", "near") for seed in (3, 4)}
    assert order(toy).index("far-3") < order(toy).index("near-3")
    assert order(toy).index("far-4") < order(toy).index("near-4")
    assert "toy/near, seed 4: accuracy 0.500" in capsys.readouterr().out


def test_a_result_line_by_hand(toy):
    made(toy, [3], "far", "near")
    line = results(toy)["toy/near", 3]
    assert line["evals"] == [[0, 0.01235, 0], [12, 0.5, 1700]]  # 0.25 at step 12 was undone
    assert line["updates"] == 14
    assert line["entropy"] == [[10, 5.5], [12, 50.0]]
    assert line["npo/guide_frac"] == round(10 * 0.5 / 12, 4)
    assert line["npo/guide_ratio_max"] == 19.0
    guide = f"--guide {toy}/toy/far-3/checkpoints/step_000012"
    words = f"python {toy}/command.py {guide} --seed 3 --out {toy}/toy/near-3"
    assert line["command"] == f"OMP_NUM_THREADS=1 {words}"
    assert line["seconds"] >= 0 and line["commit"] and "guide_b" not in line


def test_a_run_grows_until_part_b_is_learnt_and_its_checkpoint_is_chosen_by_b(toy):
    made(toy, [3, 4], "sibling", "chosen")
    assert order(toy).count("sibling-3") == 2  # 0.08 x 6 is below 0.90, 0.08 x 14 is not
    assert order(toy).count("sibling-4") == 3  # 0.04 x 20 never is
    lines = results(toy)
    assert " --steps 14 --seed 23 " in lines["toy/sibling", 3]["command"]
    assert lines["toy/sibling", 3]["evals"][-1] == [14, 0.5, 14, 1.12]
    for seed, step, b in ((3, 4, 0.32), (4, 6, 0.24)):  # above .16, which is 0.08 x 2 and 0.04 x 4
        line = lines["toy/chosen", seed]
        assert f"/toy/sibling-{seed}/checkpoints/step_{step:06d} " in line["command"]
        assert line["guide_b"] == b


def test_a_grown_run_goes_on_from_where_it_was(toy):
    made(toy, [4], "sibling")  # 6, 14, 20
    (toy / "toy.jsonl").unlink()
    made(toy, [4], "sibling")  # 20 alone
    assert order(toy) == ["sibling-4"] * 4


def test_a_finished_run_is_not_started_for_its_checkpoints(toy):
    made(toy, [3], "far")
    (toy / "toy" / "far-3" / "summary.json").write_text("{}")
    made(toy, [3], "near")
    assert order(toy) == ["far-3", "near-3"]


def test_a_run_without_its_guide_is_left_out_for_good(toy, capsys):
    assert made(toy, [4], "never") == []
    line = results(toy)["toy/never", 4]
    assert line["left_out"] == "toy/sibling: part B never above .90" and "evals" not in line
    assert "toy/never, seed 4: left out: toy/sibling: part B" in capsys.readouterr().out
    count = len(order(toy))
    assert made(toy, [4], "never") == [] and len(order(toy)) == count


def test_a_failure_is_told_and_stops_only_what_needs_it(toy, capsys):
    failed = made(toy, [7, 3], "far", "near", jobs=2)
    assert [(run.row, run.seed) for run in failed] == [("toy/far", 7), ("toy/near", 7)]
    assert set(results(toy)) == {("toy/far", 3), ("toy/near", 3)}
    told = capsys.readouterr().out
    assert "toy/far, seed 7: FAILED with exit code 1" in told and "no luck\n  with 7" in told
    assert "toy/near, seed 7: skipped, since toy/far failed" in told


def test_only_what_has_no_line_runs_again_with_all_that_it_needs(toy):
    made(toy, [3], "last")
    assert order(toy) == ["far-3", "near-3", "last-3"]
    assert set(results(toy)) == {("toy/last", 3)}  # only what was asked for has a line
    made(toy, [3], "last")
    assert len(order(toy)) == 3
    made(toy, [3], "far", "near")
    assert order(toy)[3:] == ["far-3", "near-3"]
    lines = (toy / "toy.jsonl").read_text().splitlines()
    (toy / "toy.jsonl").write_text(lines[1] + "\n")  # far's is kept
    made(toy, [3], "far", "near", "last")
    assert order(toy)[5:] == ["far-3", "near-3", "last-3"]
    now = (toy / "toy.jsonl").read_text().splitlines()
    assert now[0] == lines[1]
    assert [json.loads(line)["row"] for line in now] == ["toy/far", "toy/near", "toy/last"]


def start(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["runs", *words])
    runs.main()


def test_main_mends_a_half_line_and_exits_with_an_error(toy, monkeypatch):
    (toy / "toy.jsonl").write_text('{"row": "far", "se')
    with pytest.raises(SystemExit, match="not made: toy/far 7, toy/near 7"):
        start(monkeypatch, "toy", "--rows", "far", "near", "--seeds", "3", "7", "--jobs", "1")
    assert set(results(toy)) == {("toy/far", 3), ("toy/near", 3)}


def test_main_takes_the_reported_seeds_and_some_rows(toy, monkeypatch):
    start(monkeypatch, "toy", "--rows", "near")
    assert set(results(toy)) == {("toy/near", 3), ("toy/near", 4)}


def test_main_names_the_rows_of_a_group(toy, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, "toy", "--rows", "nearer", "near")
    assert "--rows nearer: toy has " in capsys.readouterr().err


def test_main_does_not_mix_two_worlds(toy, monkeypatch, capsys):
    (toy / "toy.jsonl").write_text('{"row": "toy/far", "seed": 3, "base": "another"}\n')
    with pytest.raises(SystemExit):
        start(monkeypatch, "toy", "--seeds", "3")
    assert "toy.jsonl holds runs that started from another base" in capsys.readouterr().err
    assert not (toy / "toy").exists()


def test_the_base_is_that_of_the_world():
    found = {run.row: runs.base_model(run) for run in ROWS.values()}
    assert len({found["cards/40"], found["lax/40"], found["plateau/near"]}) == 3
    assert found["rivals/luffy"] == found["cards/40"] and len(found["cards/40"]) == 12
    assert found["autonpo/staircase-auto"] == found["one/near"] == found["plateau/near"]


def test_the_commit_is_dirty_if_more_than_result_lines_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    (tmp_path / "experiments").mkdir()
    for name in ("experiments/cards.jsonl", "npo.py"):
        (tmp_path / name).write_text("before")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True)
    clean = runs.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "experiments/cards.jsonl").write_text("after")
    assert runs.commit() == clean
    (tmp_path / "npo.py").write_text("after")
    assert runs.commit() == f"{clean}-dirty"


def test_help_lists_the_groups(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "plateau, seeds 10 to 21, staircase.jsonl: start, sibling, near, far" in shown
    assert "autonpo, seeds 10 to 15, autonpo.jsonl: cards-auto" in shown


def test_how_far_the_weights_went_by_hand(tmp_path):
    for step in range(20, 201, 20):
        weights = {"a": torch.full((3,), step / 20.0), "b": torch.tensor([[0.0, step / 10.0]])}
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        save_file(weights, tmp_path / f"checkpoints/step_{step:06d}/model.safetensors")
    found = runs.moved(tmp_path)["moved"]
    assert len(found) == 9 + 7 + 5 and found[0][:2] == [20, 20] and found[-1][:2] == [100, 100]
    for _, distance, norm in found:  # three weights by 1 and one by 2 in each 20 steps
        assert norm == pytest.approx(distance / 20 * 7**0.5, abs=1e-5)


def test_the_dynamics_keep_the_undone_steps_and_every_decision(tmp_path):
    lines = [{"step": 0, "eval/accuracy": 0.5}]
    lines += [{"step": s, "reward": s / 8, "entropy": 1 / s, "loss": 0.0} for s in (1, 2, 3)]
    lines.append({"step": 4, "autonpo/decision": "back", "autonpo/step": 3, "autonpo/distance": 2})
    lines.append({"step": 2, "rollbacks": 1, "reward": 0.5, "entropy": 0.125, "loss": 0.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs.dynamics(tmp_path)
    assert found["decisions"] == [{"step": 3, "distance": 2}]
    assert found["steps"] == [
        [1, 0, 0.125, 1.0],
        [2, 0, 0.25, 0.5],
        [3, 0, 0.375, 0.33333],
        [2, 1, 0.5, 0.125],
    ]


# ---- The plan ------------------------------------------------------------------------------------


SHAPES = {tuple(re.findall(r"^\S+|--\S+", run.command)): row for row, run in ROWS.items()}


@pytest.mark.parametrize("row", SHAPES.values())
def test_every_command_has_flags_that_exist(row, tmp_path):
    run, another = runs.with_seed(ROWS[row], 5), tmp_path / "step_000060"
    another.mkdir()
    (another / "state.json").write_text('{"step": 60, "sampled_tokens": 0}')
    command = runs.TAKEN.sub(str(another), run.command).replace("{steps}", "90")
    python, *words = command.split()
    name = words.pop(0)
    name = words.pop(0) if name == "-m" else name.removesuffix(".py")
    module = __import__(name, fromlist=["main"])
    configs = [key for key in vars(module) if key.lower() == name.split(".")[-1] + "config"]
    config = read_flags(getattr(module, configs[0]), None, words)
    config.check()
    assert python == "python" and "{" not in command
    assert config.seed == 5 + ROWS[row].shift
    assert run.out == config.out == f"experiments/runs/{row}-5"


def test_rows_come_after_what_they_need_and_groups_hold_their_own():
    seen = set()
    for name, (rows, seeds, _) in GROUPS.items():
        for run in rows:
            assert run.row.startswith(f"{name}/") and run.row not in seen
            assert {row for row, _ in runs.needs(run)} <= seen
            seen.add(run.row)
        assert not {*range(50, 60)} & {*seeds}  # these are for looking


def test_checkpoints_that_are_taken_are_saved():
    """--save-every and --eval-every of the row that they are taken from."""
    for run in ROWS.values():
        for row, sign, value in runs.TAKEN.findall(run.command):
            steps = re.search(r"--steps (\S+)", ROWS[row].command)[1]
            every = int((re.findall(r"--save-every (\d+)", ROWS[row].command) or ["20"])[0])
            if sign == "@":
                assert int(value) <= int(steps) and (int(value) % every == 0 or value == steps)
            else:
                assert f"--eval-every {every} " in ROWS[row].command + " "


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


# ---- The worlds ----------------------------------------------------------------------------------


def test_lucky_answers_are_counted_by_their_working(monkeypatch, tmp_path):
    prompts = data.world_prompts("cards_lax", 2, "train")
    right, slips, twice = (prompts.rows[row].working for row in (3, 5, 8))
    slips = slips.replace("= ", "= 1", 1)
    answers = {prompts[row].id: text for row, text in ((3, right), (5, slips), (8, twice))}
    made = {id: [Completion(id, [7], None, f"{text} box", True)] for id, text in answers.items()}
    monkeypatch.setattr(runs, "load_guide_cache", lambda *_: GuideCache(made, 40, 99, {}))
    assert runs.lucky(tmp_path) == {"verified": 3, "lucky": 1}


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


# ---- Through TRL ---------------------------------------------------------------------------------


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
