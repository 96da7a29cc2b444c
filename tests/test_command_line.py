"""What a user meets: one command, one directory, resume after a kill, one line per mistake."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, cards_file, lucky, save

import grpo
import npo
from grpo import GRPOConfig
from npo import NPOConfig
from plumbing import UsageError
from plumbing.checkpoints import checkpoints
from plumbing.command import command_line, flag_comments, open_directory, start_over
from plumbing.model import Policy
from plumbing.run import Run, read_jsonl
from plumbing.settings import MAY_CHANGE_ON_RESUME
from worlds import cards

# The base is right too rarely for a few steps, so its answers are judged by chance. All else is
# the real command.
LUCKY = """
import sys; sys.path.insert(0, "tests")
import {script}, verifier; from conftest import lucky; from plumbing.command import command_line
verifier.is_correct = lucky
command_line({script}.{config}, {script}.main)
"""
FLAGS = [*SMALL, "--temperature", "1.5", "--max-new-tokens", "48", "--lr", "1e-3", "--steps", "6"]
GRPO = ["-c", LUCKY.format(script="grpo", config="GRPOConfig"), *FLAGS]
NPO = ["-c", LUCKY.format(script="npo", config="NPOConfig"), *FLAGS, "--scout-steps", "4"]
NPO += ["--guide-samples", "4"]


@pytest.fixture
def by_chance(monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)


def contents(out: Path) -> dict:
    """What must be the same at the end: weights, samples, caches, metrics without times."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.name in ("model.safetensors", "guide.jsonl", "samples.jsonl"):
            found[name] = path.read_bytes()
        if path.name == "metrics.jsonl":
            timeless = [
                {key: value for key, value in line.items() if "time" not in key}
                for line in read_jsonl(path)
            ]
            found[name] = timeless
    return found


# ---------------------------------------------------------------------- resume


def test_stopped_and_resumed_is_the_run_in_one_piece(by_chance, tiny, tmp_path, capsys):
    """4 steps == 2 + resume + 2, bit for bit; and the flags stand in config.json."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, steps in ((whole, 4), (parts, 2), (parts, 4)):
        grpo.train(GRPOConfig(out=str(out), steps=steps, **tiny), str(out))
    assert f"{parts}: steps 1-4, resumed at step 2" in capsys.readouterr().out
    assert contents(whole) == contents(parts)
    assert [line["step"] for line in read_jsonl(parts / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    trained = (whole / "checkpoints/step_000004/model.safetensors").read_bytes()
    assert trained != (cards.BASE / "model.safetensors").read_bytes()
    config = json.loads((whole / "config.json").read_text())
    assert (config["lr"], config["prompts_per_step"], config["clip_high"]) == (1e-3, 2, 0.28)
    grpo.main(GRPOConfig(out=str(parts), steps=4, **tiny))  # all done: changes nothing
    assert "held-out accuracy" in capsys.readouterr().out and contents(whole) == contents(parts)


def killed_when(words: list, condition) -> None:
    """Starts the command and sends SIGKILL as soon as `condition()` holds."""
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=-1) as process:
        until = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.001)
        process.kill()


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_the_same_run(command, tmp_path):
    """SIGKILL in the scout's checkpoint, in the guide cache, in the replay; then to the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command(*NPO, "--out", whole)
    words = [*NPO, "--out", killed]
    late = "import time, torch; save = torch.save\n"  # time to be hit
    late += "torch.save = lambda *words: (time.sleep(5), save(*words))\ncommand_line("
    slowly = ["-c", NPO[1].replace("command_line(", late), *words[2:]]
    half = killed / "scout/checkpoints/step_000002.tmp/model.safetensors"
    killed_when(slowly, half.exists)
    assert not half.parent.with_suffix("").exists()
    killed_when(words, lambda: len(read_jsonl(killed / "guide.jsonl")) > 3)
    assert len(read_jsonl(killed / "guide.jsonl")) < len(read_jsonl(whole / "guide.jsonl"))
    killed_when(words, lambda: len(read_jsonl(killed / "metrics.jsonl")) > 4)
    elsewhere = os.environ | {"PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    command(*words, env=elsewhere)
    assert contents(killed) == contents(whole)
    lines = read_jsonl(whole / "metrics.jsonl")
    assert max(line.get("npo/guide_frac", 0) for line in lines) > 0  # it was guided
    scout = (whole / "scout/checkpoints/step_000002/model.safetensors").read_bytes()
    assert scout != (cards.BASE / "model.safetensors").read_bytes()  # and had learnt
    assert json.loads((killed / "summary.json").read_text())["sampled_tokens"] > 0
    assert (killed / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, *map(str, [*GRPO, "--steps", 50, "--out", out])]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # background jobs inherit that the signal is ignored
    reset = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(words, cwd=ROOT, **pipe, **reset) as process:
        while len(read_jsonl(out / "metrics.jsonl")) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in text
    assert re.search(r"interrupted in step \d+; the same command resumes from .*/step_00", text)


def test_what_is_kept_of_the_checkpoints(by_chance, tiny, tmp_path, monkeypatch):
    """Of the scout what a late intervention needs, of the replay --keep's and the newest."""
    monkeypatch.setattr(Run, "evaluate", lambda *_: {"eval/accuracy": 0.0})
    out, late = tmp_path / "run", {"intervention": "early+late", "keep": "5"}
    late |= {"plateau_start": 3, "plateau_end": 4, "steps": 6, "scout_steps": 2}
    npo.intervene(NPOConfig(out=str(out), **late, **tiny), out)
    kept = [[path.name[-1] for path in checkpoints(where)] for where in (out / "scout", out)]
    assert kept == [["3", "4"], ["5", "6"]]
    assert all((path / "optimizer.pt").is_file() for path in out.glob("**/checkpoints/*"))


# ---------------------------------------------------------------------- the run directory


def entered(config) -> Path:
    """A directory as a run of some steps leaves it."""
    open_directory(config, Path(config.out))
    (Path(config.out) / "metrics.jsonl").touch()
    return Path(config.out)


def test_a_directory_takes_its_own_run_only(tmp_path):
    config = GRPOConfig(out=str(tmp_path / "run"), steps=20, lr=1e-3)
    out = entered(config)
    machine = {"keep": "40", "device": "cpu", "vllm_memory": 0.2, "micro_batch_size": 3}
    assert machine.keys() < set(MAY_CHANGE_ON_RESUME)
    open_directory(dataclasses.replace(config, steps=21, fresh=True, **machine), out)
    assert json.loads((out / "config.json").read_text())["steps"] == 21
    there = "holds a run with another configuration"
    for other, message in (
        ({"lr": 5e-4}, "lr 0.001 there and 0.0005 here.*--fresh"),
        ({"steps": 19, "seed": 3}, "steps 21 there and 19 here, seed 0 there and 3 here"),
        ({"temperature": 0.9, "dataset": "x"}, "dataset cards there and x here"),
    ):
        with pytest.raises(UsageError, match=f"{there} .*{message}"):
            open_directory(dataclasses.replace(config, **other), out)
    with pytest.raises(UsageError, match=f"{there} .of another method or version.; choose"):
        open_directory(NPOConfig(out=str(out), steps=21, lr=1e-3), out)
    with pytest.raises(UsageError, match="-out .*metrics.jsonl: is a file, not a directory"):
        open_directory(config, out / "metrics.jsonl")
    with pytest.raises(UsageError, match="is a file, not a directory; choose another"):
        open_directory(config, out / "metrics.jsonl" / "run")


def test_what_never_began_does_not_claim_a_directory(tmp_path):
    """As after a mistyped --model: config.json, and nothing else."""
    out = tmp_path / "run"
    open_directory(GRPOConfig(out=str(out), lr=1e-3), out)
    open_directory(NPOConfig(out=str(out)), out)
    assert json.loads((out / "config.json").read_text())["lr"] == 1e-4
    (out / "config.json").write_text('["prompts_per_step"]')
    with pytest.raises(UsageError, match="config.json: is not JSON .it is no object"):
        open_directory(NPOConfig(), out)
    (out / "config.json").write_text('{"steps": 2')
    for act in (lambda: open_directory(NPOConfig(), out), lambda: start_over(NPOConfig(out=out))):
        with pytest.raises(UsageError, match="config.json: is not JSON .*choose another --out"):
            act()


def test_starting_over_moves_the_run_away_and_removes_nothing(tmp_path):
    (tmp_path / "run.old").write_text("precious")
    for seed in (1, 2, 3):
        config = GRPOConfig(out=str(tmp_path / "run"), seed=seed, fresh=True)
        start_over(config)
        entered(config)
    names = ("run.old1", "run.old2", "run")
    seeds = [json.loads((tmp_path / n / "config.json").read_text())["seed"] for n in names]
    assert seeds == [1, 2, 3] and (tmp_path / "run.old").read_text() == "precious"
    inside = {"model": str(tmp_path / "run/checkpoints/x"), "dataset": "cards"}
    with pytest.raises(UsageError, match="--fresh: --model .*/x lies in --out"):
        start_over(GRPOConfig(out=str(tmp_path / "run"), **inside))
    with pytest.raises(UsageError, match="--fresh: --guide .* lies in --out"):
        start_over(NPOConfig(out=str(tmp_path / "run"), guide=str(tmp_path / "run/guide.jsonl")))
    assert (tmp_path / "run/metrics.jsonl").exists()


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.png").write_text("precious")
    shutil.copytree(cards.BASE, tmp_path / "model")  # it has a config.json, but not a run's
    for name in ("photos", "model"):
        config = GRPOConfig(out=str(tmp_path / name), fresh=True)
        start_over(config)
        with pytest.raises(UsageError, match="holds files but no run"):
            open_directory(config, tmp_path / name)
    assert (tmp_path / "photos/one.png").read_text() == "precious"
    assert (tmp_path / "model/model.safetensors").exists()


# ---------------------------------------------------------------------- what goes wrong


def one_line_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    every = done.stderr.replace("\r", "\n").splitlines()
    lines = [line for line in every if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("grpo.py --keep 40,x", "--keep 40,x: must be all, none, or steps as in 40,100"),
        (
            "npo.py --guide nowhere",
            "--guide nowhere: is no guide; give self, a",
        ),
        ("autonpo.py --max-distance 3", "--max-distance 3: must be at least 10"),
        ("commands/luffy.py --gamma 0", "--gamma 0.0: must be above 0"),
        ("commands/exgrpo.py --replay-frac 0.1", "--replay-frac 0.1: of --prompts-per-step 8"),
        ("commands/rlep.py --replays 3", "--min-correct 2: must be at least 3"),
    ],
)
def test_every_command_ends_a_mistake_in_one_line(script, tmp_path, words, message):
    with pytest.raises(SystemExit) as exit:
        script(*words.split(), "--out", tmp_path / "run")
    assert str(exit.value).startswith(f"error: {message}") and "\n" not in str(exit.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo.py", "-m commands.rlep"])
def test_a_mistake_in_a_process_of_its_own(command, tmp_path, name):
    words = [*name.split(), "--model", "no/such", "--dataset", "cards", "--out", tmp_path / "run"]
    done = command(*words, check=False)
    assert "model no/such: its tokenizer cannot be loaded" in one_line_error(done)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep": "sometimes"}, "--keep sometimes: must be all, none, or steps"),
        ({"keep": "40,,100"}, "--keep 40,,100"),
        ({"eval_every": 0}, "--eval-every 0: must be at least 1"),
        ({"save_every": 0}, "--save-every 0"),
        ({"eval_samples": -1}, "--eval-samples -1"),
        ({"lora": -1}, "--lora -1"),
        ({"lora": 3}, "--lora 3: needs peft; pip install -r requirements-gpu.txt"),
        ({"max_prompt_tokens": 0}, "--max-prompt-tokens 0"),
        ({"vllm_memory": 1.0}, "--vllm-memory 1.0: must be above 0 and below 1"),
        ({"sampler": "vllm"}, "--sampler vllm: vllm is not installed; .*--sampler hf"),
    ],
)
def test_bad_values(flags, message, monkeypatch):
    monkeypatch.setattr("plumbing.settings.installed", lambda package: False)
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**flags).check()
    monkeypatch.setattr("plumbing.settings.installed", lambda package: True)
    with pytest.raises(UsageError, match="--device cuda:1: .*CUDA_VISIBLE_DEVICES"):
        GRPOConfig(sampler="vllm", device="cuda:1").check()
    for keep in ("all", "none", "40", "40,100", "none,40"):
        GRPOConfig(keep=keep).check()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "full"), "error: no space left on the disk of --out o; .*resumes"),
        (UsageError("mend it"), "error: mend it"),
        (FloatingPointError("a weight"), "error: a weight"),
        (KeyboardInterrupt(), "130"),
    ],
)
def test_exit_codes(monkeypatch, error, code):
    def fails(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", "o"])
    with pytest.raises(SystemExit) as exit:
        command_line(GRPOConfig, fails)
    assert re.fullmatch(code, str(exit.value.code), re.DOTALL)


def test_a_run_that_diverges_keeps_its_last_checkpoint(by_chance, tiny, tmp_path):
    """Weights blown up by a huge learning rate."""
    config = GRPOConfig(out=str(tmp_path), steps=2, **tiny)
    grpo.train(config, tmp_path)
    saved = (tmp_path / "checkpoints/step_000002/model.safetensors").read_bytes()
    config = dataclasses.replace(config, steps=60, lr=1e30)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    message = r"step \d+: .*(nan|inf|not finite).* The last checkpoint is .*step_00000"
    with pytest.raises(UsageError, match=message):
        grpo.train(config, tmp_path)
    assert (tmp_path / "checkpoints/step_000002/model.safetensors").read_bytes() == saved


def test_a_reward_that_is_no_number_names_the_step(tiny, tmp_path, monkeypatch):
    """In step 3: after 4 evaluated answers, 8 in each of two steps, and 4 evaluated again."""
    seen = []

    def reward(prompt, completion):
        seen.append(completion)
        return len(completion.text) if len(seen) <= 24 else float("nan")

    monkeypatch.setattr("verifier.reward", reward)
    message = "step 3: prompt .*: the reward is nan; .*checkpoints/step_000002"
    with pytest.raises(UsageError, match=message):
        grpo.train(GRPOConfig(out=str(tmp_path), steps=6, **tiny), tmp_path)
    Policy(tmp_path / "checkpoints/step_000002")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("megabytes", [3, 7])  # full while weights, while an optimizer is written
def test_a_full_disk(command, tmp_path, megabytes):
    disk, size = tmp_path / "disk", f"size={megabytes}m"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        words = [*GRPO, "--steps", 4, "--save-every", 1, "--out", disk / "run"]
        # sometimes seen before it is written, sometimes not
        error = one_line_error(command(*words, check=False))
        assert re.search("no space left|a checkpoint takes .* GB, and .* are left", error)
        assert not list((disk / "run/checkpoints").glob("*.tmp"))
        assert len(checkpoints(disk / "run")) == megabytes // 5
        for path in checkpoints(disk / "run"):
            Policy(path)  # whole
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        command(*words)  # with room again the same command resumes
        lines = read_jsonl(disk / "run/metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(5))
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------- help, data, dry run


def test_help_explains_every_flag_under_a_heading(command):
    done = command("npo.py", "--help", env=os.environ | {"COLUMNS": "110"})
    assert "Near-Future Policy Optimization" in done.stdout
    assert done.stdout.count("not in our sources") >= 5
    headings = re.findall(r"╭─ (\w+) options", done.stdout)
    shared = ["model", "run", "length", "memory"]
    assert headings == [*shared, "batch", "update", "guide", "intervention"]
    shown = re.sub(r"[│\s]+", " ", done.stdout)
    for name, (_, text) in flag_comments(NPOConfig).items():
        assert re.search(f"--{name.replace('_', '-')}[ ,]", shown)
        assert text in shown


def test_a_local_data_set_and_model(base, tmp_path, capsys):
    """A checkpoint folder and a data file, as with any model and data of the hub."""
    long = 30 * "Start at 3 and add the cards. "
    cards_file(tmp_path / "hands.parquet", 14, {3: {"answer": ""}, 5: {"problem": long}})
    model, out = save(base, tmp_path / "model"), tmp_path / "run"
    flags = {"model": str(model), "dataset": str(tmp_path / "hands.parquet"), "out": str(out)}
    flags |= {"prompts_per_step": 2, "group_size": 3, "eval_prompts": 4, "max_new_tokens": 8}
    flags |= {"steps": 2, "scout_steps": 1, "guide_samples": 2, "max_prompt_tokens": 100}
    npo.main(NPOConfig(**flags))
    dropped = r"1 dropped: no verifiable gold \(row 3.*\), 1 dropped: over 100 tokens \(row 5\)"
    told = rf"hands.parquet, training: 8 prompts, 8 with pictures, {dropped}"
    assert re.search(told, capsys.readouterr().out)
    config = json.loads((out / "config.json").read_text())
    assert (config["lr"], config["keep"], config["micro_batch_size"]) == (1e-6, "none", 4)
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


def test_dry_run_writes_nothing(script, tmp_path, capsys):
    script("autonpo.py", "--dry-run", "--out", tmp_path / "run")
    shown = capsys.readouterr().out
    assert "8 prompts x 8 slots = 64 completions/step" in shown and "482,112 parameters" in shown
    assert not (tmp_path / "run").exists()
