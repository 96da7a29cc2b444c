"""What a user meets: one command, one run directory, resume after a kill, and one clear line for each mistake."""

import dataclasses
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
from conftest import ROOT, SMALL, cards_file

import cards
from policy import Policy
from run import read_jsonl

# The base is right too rarely for a test: this verifier calls a third of its answers right. All else is the real command.
LUCKY = """
import sys, zlib, verifier, {script}, command
verifier.is_correct = lambda response, gold, choices=None: zlib.crc32(response.encode()) % 3 == 0
command.command_line({script}.{config}, {script}.main)
"""
FLAGS = [*SMALL, "--temperature", "1.5", "--max-new-tokens", "48", "--lr", "1e-3", "--steps", "6"]
GRPO = ["-c", LUCKY.format(script="grpo", config="GRPOConfig"), *FLAGS]
NPO = ["-c", LUCKY.format(script="npo", config="NPOConfig"), *FLAGS, "--scout-steps", "4", "--guide-samples", "4"]


def contents(out: Path) -> dict:
    """What must be the same whenever the same command ran to its end: weights, metrics but for times, samples, caches."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.name in ("model.safetensors", "guide.jsonl", "samples.jsonl"):
            found[str(path.relative_to(out))] = path.read_bytes().replace(str(out).encode(), b"OUT")
        if path.name == "metrics.jsonl":
            lines = [{k: v for k, v in line.items() if not k.startswith(("time/", "step_time"))} for line in read_jsonl(path)]
            found[str(path.relative_to(out))] = lines
    return found


def test_grpo_stopped_and_resumed_is_grpo_in_one_piece(command, tmp_path):
    """4 steps == 2 + resume + 2, bit for bit; and the flags that were used stand in config.json."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command(*GRPO, "--steps", 4, "--out", whole)
    command(*GRPO, "--steps", 2, "--out", parts)
    done = command(*GRPO, "--steps", 4, "--out", parts)
    assert "resumed at step 2" in done.stdout
    assert contents(whole) == contents(parts)
    assert [line["step"] for line in read_jsonl(parts / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    moved = (whole / "checkpoints/step_000004/model.safetensors").read_bytes()
    assert moved != (cards.BASE / "model.safetensors").read_bytes()
    config = json.loads((whole / "config.json").read_text())
    assert (config["lr"], config["prompts_per_step"], config["clip_high"]) == (1e-3, 2, 0.28)
    again = command(*GRPO, "--steps", 4, "--out", parts)  # all done: says so, changes nothing
    assert "held-out accuracy" in again.stdout and contents(whole) == contents(parts)


def killed_when(words: list, condition, out: Path) -> None:
    """Starts the command and sends SIGKILL as soon as `condition()` holds."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before it was killed: {process.stderr.read().decode()[-2000:]}"
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_three_times_and_resumed_is_the_same_run(command, tmp_path):
    """SIGKILL in the scout's checkpoint write, while the guide cache grows, and in the guided run; then to the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command(*NPO, "--out", whole)
    words = [*NPO, "--out", killed]
    slow = "import time, torch; save = torch.save; torch.save = lambda *a: (time.sleep(5), save(*a))\n"  # time to be hit
    slowly = ["-c", NPO[1].replace("command.command_line", slow + "command.command_line"), *words[2:]]
    killed_when(slowly, lambda: (killed / "scout/checkpoints/step_000002.tmp/state.json").exists(), killed)
    assert not (killed / "scout/checkpoints/step_000002").exists()
    killed_when(words, lambda: len(read_jsonl(killed / "guide.jsonl.partial")) > 2, killed)
    killed_when(words, lambda: len(read_jsonl(killed / "metrics.jsonl")) > 4, killed)
    command(*words)
    assert contents(killed) == contents(whole)
    assert max(line.get("npo/guide_frac", 0) for line in read_jsonl(whole / "metrics.jsonl")) > 0  # it was guided
    assert (whole / "scout/checkpoints/step_000002/model.safetensors").read_bytes() != (
        cards.BASE / "model.safetensors"
    ).read_bytes()
    assert json.loads((killed / "summary.json").read_text())["sampled_tokens"] > 0
    assert (killed / "curves.png").stat().st_size > 10_000


def test_ctrl_c_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, *map(str, [*GRPO, "--steps", 50, "--out", out])]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit that it is ignored
    )  # fmt: skip
    while len(read_jsonl(out / "metrics.jsonl")) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130 and "the same command resumes from" in text and "Traceback" not in text


def one_line_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grpo.py", "--group-size", "1"], "--group-size 1"),
        (["npo.py", "--gate", "1.5"], "--gate 1.5"),
        (["npo.py", "--model", "no/such-model", "--dataset", "cards"], "model no/such-model"),
        (["npo.py", "--dataset", "no/such-data"], "--dataset no/such-data"),
        (["npo.py", "--guide", "nowhere/guide.jsonl"], "--guide nowhere/guide.jsonl"),
        (["npo.py", "--guide", "nowhere"], "model nowhere"),
    ],
)
def test_bad_flags_end_in_one_line(command, tmp_path, words, message):
    assert message in one_line_error(command(*words, "--steps", 2, "--out", tmp_path / "run", check=False))


def test_a_mistyped_flag_does_not_claim_the_directory(command, tmp_path):
    out = tmp_path / "run"
    one_line_error(command(*GRPO, "--model", "no/such-model", "--dataset", "cards", "--out", out, check=False))
    command(*GRPO, "--steps", 1, "--out", out)
    (tmp_path / "file").write_text("")
    assert "a file stands" in one_line_error(command(*GRPO, "--out", tmp_path / "file" / "run", check=False))


def test_a_directory_with_another_run_or_with_other_files(command, tmp_path):
    out = tmp_path / "run"
    command(*GRPO, "--steps", 1, "--out", out)
    message = one_line_error(command(*GRPO, "--steps", 1, "--out", out, "--lr", "5e-4", check=False))
    assert "lr 0.001 there and 0.0005 here" in message and "--fresh" in message
    one_line_error(command(*NPO, "--out", out, check=False))  # the other method's
    command(*GRPO, "--steps", 1, "--out", out, "--lr", "5e-4", "--fresh")
    assert json.loads((out / "config.json").read_text())["lr"] == 5e-4
    assert json.loads((tmp_path / "run.old/config.json").read_text())["lr"] == 1e-3  # moved away, not deleted
    inside = out / "checkpoints/step_000001"
    message = one_line_error(command("grpo.py", "--model", inside, "--out", out, "--fresh", check=False))
    assert "lies in the run" in message and inside.is_dir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("precious")
    for fresh in ([], ["--fresh"]):
        message = one_line_error(command(*GRPO, "--out", tmp_path / "photos", *fresh, check=False))
        assert "holds files but no run" in message
    assert (tmp_path / "photos" / "one.png").read_text() == "precious"
    model = tmp_path / "model"  # it has a config.json, but not a run's
    shutil.copytree(cards.BASE, model)
    assert "holds files but no run" in one_line_error(command(*GRPO, "--out", model, "--fresh", check=False))
    assert (model / "model.safetensors").exists()


def test_a_run_that_diverges_keeps_its_last_checkpoint(command, tmp_path):
    """Weights blown up by a huge learning rate: stop, say the step, keep what was saved."""
    out = tmp_path / "run"
    command(*GRPO, "--steps", 2, "--out", out)
    saved = (out / "checkpoints/step_000002/model.safetensors").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(out, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"lr": 1e30}))
    message = one_line_error(command(*GRPO, "--steps", 60, "--lr", "1e30", "--out", other, check=False))
    assert "step " in message and "nan" in message and "checkpoints/step_" in message
    assert (other / "checkpoints/step_000002/model.safetensors").read_bytes() == saved


def test_a_reward_that_is_no_number_names_the_step_and_keeps_the_checkpoint(command, tmp_path):
    """A forker's reward returns nan in step 3: 4 evaluated answers, 8 in each of two steps, 4 evaluated again."""
    out, calls = tmp_path / "run", "import itertools; calls = itertools.count()\n"
    broken = calls + "verifier.reward = lambda accuracy, format: accuracy if next(calls) < 24 else float('nan')\n"
    script = GRPO[1].replace("command.command_line", broken + "command.command_line")
    message = one_line_error(command("-c", script, *FLAGS, "--out", out, check=False))
    assert "step 3: a reward is nan" in message and "checkpoints/step_000002" in message
    Policy(out / "checkpoints/step_000002", device="cpu")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("megabytes", [3, 7])  # full while the weights, and while the optimizer is written
def test_a_full_disk(command, tmp_path, megabytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        words = [*GRPO, "--steps", 4, "--save-every", 1, "--out", disk / "run"]
        assert "no space left" in one_line_error(command(*words, check=False))
        assert not list((disk / "run/checkpoints").glob("*.tmp"))
        done = sorted((disk / "run/checkpoints").glob("step_??????"))
        assert len(done) == megabytes // 4
        for path in done:
            Policy(path, device="cpu")  # whole
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        command(*words)  # with room again the same command goes on
        assert [line["step"] for line in read_jsonl(disk / "run/metrics.jsonl")] == list(range(5))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_help_explains_every_flag(command):
    """Each flag has words of its own beside it; a default that the sources do not give says so."""
    from npo import NPOConfig

    text = command("npo.py", "--help", env=os.environ | {"COLUMNS": "400"}).stdout
    assert "Near-Future Policy Optimization" in text and text.count("not specified by the paper") >= 5
    entries = re.split(r"\n│ --", text)[1:]  # one a flag, its words on the same line or the next
    words = {entry.split()[0].strip(","): re.sub(r"[│\s]+", " ", entry.split("(default")[0]) for entry in entries}
    for field in dataclasses.fields(NPOConfig):
        assert len(words[field.name.replace("_", "-")].split()) > 3, field.name


def test_a_local_data_set_and_model(command, tmp_path):
    """A checkpoint folder and a data file, as with any model and data of the hub."""
    cards_file(tmp_path / "hands.parquet", 14, {3: {"answer": ""}, 5: {"problem": 30 * "Start at 3 and add the cards. "}})
    Policy(cards.BASE, device="cpu").save(tmp_path / "model", {"step": 0, "sampled_tokens": 0})
    out = tmp_path / "run"
    done = command("npo.py", *SMALL, "--model", tmp_path / "model", "--dataset", tmp_path / "hands.parquet", "--steps", "2",
            "--scout-steps", "1", "--guide-samples", "2", "--max-prompt-tokens", "100", "--out", out)  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert "hands.parquet: 8 training prompts; 1 dropped: no verifiable gold, 1 dropped: over 100 tokens" in done.stdout
    assert (config["keep"], config["save_optimizers"], config["gradient_checkpointing"]) == ("needed", "last", "on")
    assert config["lr"] == 1e-6 and json.loads((out / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("intervention", ["late", "early+late"])
def test_what_is_kept_of_the_checkpoints(command, tmp_path, intervention):
    """Of the run that goes ahead the steps that a late intervention needs, of the replay the newest; one optimizer each."""
    out, words = (
        tmp_path / "run",
        ["--intervention", intervention, "--plateau-start", "2", "--plateau-end", "6", "--save-every", "1"],
    )
    done = command(*NPO, *words, "--keep", "needed", "--save-optimizers", "last", "--out", out)
    shutil.rmtree(out / "scout/scout", ignore_errors=True)  # of early+late
    found = {
        str(path.relative_to(out))
        for path in out.glob("**/checkpoints/*/*")
        if path.name in ("model.safetensors", "optimizer.pt")
    }
    assert found == {
        "scout/checkpoints/step_000002/model.safetensors", "scout/checkpoints/step_000006/model.safetensors",
        "scout/checkpoints/step_000006/optimizer.pt", "checkpoints/step_000006/model.safetensors", "checkpoints/step_000006/optimizer.pt",
    }  # fmt: skip
    assert "step_000002: holds no optimizer" in done.stdout and "moments start anew" in done.stdout


def test_dry_run(command, tmp_path):
    """Of a model whose weights nobody has here, and writes nothing."""
    done = command("npo.py", "--model", "Qwen/Qwen3-VL-8B-Instruct", "--dry-run", "--out", tmp_path / "run")
    assert "8,767,123,696" in done.stdout and not (tmp_path / "run").exists()
