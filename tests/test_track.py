"""Live curves: what a tracker is told, by a stand-in; and wandb and trackio themselves, offline."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL, TINY

import grpo
from grpo import GRPOConfig
from plumbing import UsageError
from plumbing.track import Curve


class Recorder(SimpleNamespace):
    """A tracker that keeps what it is told."""

    def __init__(self):
        super().__init__(told=[])

    def init(self, **options):
        self.told.append(("init", options["name"], options["group"], options["config"]["seed"]))

    def log(self, numbers, step):
        self.told.append(("log", step, numbers))

    def finish(self, **how):
        self.told.append(("finish", how))


def test_steps_that_go_back_begin_another_curve(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    out, config = tmp_path / "auto", GRPOConfig(track="wandb", seed=7)
    curve = Curve(config, out)
    curve.log({"step": 1, "loss": 0.5, "note": "words are left out"})
    curve.log({"step": 2, "loss": 0.25})
    curve.log({"step": 1, "loss": 0.75, "rollbacks": 1})
    curve.close(failed=True)
    curve.close()
    assert recorder.told == [
        ("init", "auto from step 1", str(out), 7),
        ("log", 1, {"loss": 0.5}),
        ("log", 2, {"loss": 0.25}),
        ("finish", {"exit_code": 0}),
        ("init", "auto from step 1", str(out), 7),
        ("log", 1, {"loss": 0.75, "rollbacks": 1}),
        ("finish", {"exit_code": 1}),
    ]


def test_a_crash_closes_the_curve(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    monkeypatch.setattr("verifier.reward", lambda prompt, completion: float("nan"))
    config = GRPOConfig(track="trackio", out=str(tmp_path), steps=2, **TINY | {"eval_samples": 0})
    with pytest.raises(UsageError, match="the reward is nan"):
        grpo.train(config, tmp_path)
    assert [word for word, *_ in recorder.told] == ["init", "log", "finish"]  # step 0's evaluation


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--track wandb: not installed; pip install wandb"):
        Curve(GRPOConfig(track="wandb"), tmp_path)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_offline_resumed(command, tmp_path, name, monkeypatch):
    pytest.importorskip(name, reason=f"pip install {name}")
    for variable in ("WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["grpo.py", "--track", name, "--out", tmp_path / "run", *SMALL]
    command(*words, "--steps", "2")
    command(*words, "--steps", "4")
    if name == "wandb":
        assert len(list(Path(tmp_path, "wandb").glob("offline-run-*/*.wandb"))) == 2
        return
    import sqlite3

    (database,) = tmp_path.glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step, metrics from metrics").fetchall()
    steps = {(run, step) for run, step, metrics in found if "loss" in json.loads(metrics)}
    assert {step for _, step in steps} == {1, 2, 3, 4}
    assert {run for run, _ in steps} == {"run from step 0", "run from step 3"}
