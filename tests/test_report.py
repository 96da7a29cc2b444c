"""What a run shows when it ends, from made-up logs."""

import json

import pytest

from plumbing.report import first_reach, report
from plumbing.run import evaluations

CURVE = [
    {"step": step, "sampled_tokens": 100 * step + 7, "eval/accuracy": accuracy}
    for step, accuracy in ((0, 0.1), (5, 0.2), (10, 0.15), (15, 0.4), (20, 0.35))
]


@pytest.mark.parametrize(
    ("accuracy", "steps"),
    [(0.05, 0.0), (0.1, 0.0), (0.15, 2.5), (0.2, 5.0), (0.25, 12.0), (0.4, 15.0), (0.41, None)],
)
def test_first_reach_is_linear_between_evaluations(accuracy, steps):
    assert first_reach(CURVE, accuracy) == (pytest.approx(steps) if steps is not None else None)
    tokens = first_reach(CURVE, accuracy, "sampled_tokens")
    assert tokens == (pytest.approx(100 * steps + 7) if steps is not None else None)


def lines(*rows: tuple, every: int = 100) -> list[dict]:
    """Metrics with an evaluation each: (step, accuracy, rollbacks), `every` tokens per step."""
    keys = ("step", "eval/accuracy", "rollbacks")
    return [
        {"sampled_tokens": every * row[0], "loss": 0.1, "entropy": 0.3, "step_time": 1.5}
        | dict(zip(keys, row))
        for row in rows
    ]


def write(path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_start_does_not_count_towards_the_speed_up(tmp_path):
    """Both from step 40 at 4,000 tokens: to 0.5 the scout takes 8 steps, the replay 2 of 3."""
    write(tmp_path / "scout/metrics.jsonl", lines((40, 0.1), (48, 0.5)))
    write(tmp_path / "metrics.jsonl", lines((40, 0.1), (41, 0.2), (43, 0.8)))
    report(tmp_path, "NPO")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["to_goal/step"] == {"scout": 8.0, "guided": 2.0, "speed_up": 4.0}
    tokens = {"scout": 800.0, "guided": 200.0, "speed_up": 4.0}
    assert found["to_goal/sampled_tokens"] == tokens


def test_report_beside_a_scout(tmp_path, capsys):
    """To the scout's 0.5: 4 steps there; guided 2 of 3, for three times the tokens per step."""
    write(tmp_path / "scout/metrics.jsonl", lines((0, 0.1), (4, 0.5)))
    write(tmp_path / "metrics.jsonl", lines((0, 0.1), (1, 0.2), (3, 0.8), every=300))
    slot = {"step": 1, "question": "<image>Add?", "gold": "7", "pass_rate": 0.25, "policy": "6"}
    shown = {"guide": "so 7", "source": "guide@4", "reward": 0.1}
    write(tmp_path / "samples.jsonl", [slot | {"reward": 0.1}, slot | shown])
    report(tmp_path, "NPO")
    summary, text = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
    expected = {"scout": 4.0, "guided": 2.0, "speed_up": 2.0}
    assert summary["to_goal/step"] == pytest.approx(expected)
    expected = {"scout": 400.0, "guided": 600.0, "speed_up": 2 / 3}
    assert summary["to_goal/sampled_tokens"] == pytest.approx(expected)
    assert (summary["steps"], summary["updates"], summary["scout"]["steps"]) == (3, 3, 4)
    assert (summary["training_seconds"], summary["decisions"]) == (4.5, [])
    assert "from 0.100 to 0.800 held-out accuracy in 3 steps, 900 sampled tokens" in text
    assert "Steps to 0.500: 4.0 for the scout, 2.0 guided: 2.00x." in text
    assert "(step 1, pass-rate 0.25): <image>Add? Gold 7." in text and "guide@4   so 7" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_scout_that_gained_nothing_has_no_speed_up(tmp_path, capsys):
    """0.5001 after 0.5: noise, however soon the guided run is there."""
    write(tmp_path / "scout/metrics.jsonl", lines((0, 0.5), (4, 0.5001)))
    write(tmp_path / "metrics.jsonl", lines((0, 0.5), (1, 0.51)))
    write(tmp_path / "samples.jsonl", [])
    report(tmp_path, "NPO")
    text = capsys.readouterr().out
    assert "The scout gained too little to compare speeds." in text and "Steps to" not in text


def test_report_of_rollbacks(tmp_path, capsys):
    decision = {"step": 5, "autonpo/step": 4, "autonpo/decision": "back to 2", "rollbacks": 0}
    decision |= {"autonpo/distance": 2, "sampled_tokens": 450}
    stay = {"step": 3, "autonpo/step": 2, "autonpo/decision": "stay", "autonpo/distance": 0}
    stay["sampled_tokens"] = 210
    before, after = lines((0, 0.1), (2, 0.2), (4, 0.3)), lines((3, 0.4, 1), (4, 0.6, 1))
    rows = [
        line | {"autonpo/reward": 0.2}
        for line in before[:2] + [stay] + before[2:] + [decision] + after
    ]
    write(tmp_path / "metrics.jsonl", rows)
    assert [line["step"] for line in evaluations(tmp_path)] == [0, 2, 3, 4]
    report(tmp_path, "AutoNPO")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["updates"], len(summary["decisions"]), summary["eval/accuracy"]) == (5, 2, 0.6)
    assert "after step 4: back to 2" in capsys.readouterr().out
    write(tmp_path / "metrics.jsonl", [line | {"autonpo/reward": 0.2} for line in before])
    report(tmp_path, "AutoNPO")
    assert "No warning: this run was plain GRPO." in capsys.readouterr().out
