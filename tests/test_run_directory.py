"""A run directory that is damaged, changed, or in use ends in one line, and nothing is lost."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, cards_file, lucky
from test_command_line import GRPO, contents, one_line_error

import grpo
from commands import evaluate, exgrpo
from commands.benchmarks import literal
from grpo import GRPOConfig
from plumbing import UsageError, data, files
from plumbing.checkpoints import (
    checked,
    checkpoint_path,
    checkpoint_state,
    checkpoints,
    remove_checkpoint,
    step_of,
)
from plumbing.command import command_line, start_over
from plumbing.files import LOCK, lock, read_jsonl
from plumbing.model import Policy
from plumbing.run import Run
from worlds import cards, staircase


@pytest.fixture(autouse=True)
def _by_chance(monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)


def train(out: Path, config: GRPOConfig, **flags) -> None:
    grpo.train(dataclasses.replace(config, out=str(out), **flags), out)


@pytest.fixture(scope="module")
def config(tiny) -> GRPOConfig:
    return GRPOConfig(**tiny | {"save_every": 1, "eval_every": 100, "steps": 3})


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory) -> tuple[Path, Path]:
    """A run of two steps, and one of three."""
    two, three = (tmp_path_factory.mktemp("run") / name for name in ("two", "three"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        train(two, config, steps=2)
        train(three, config)
    return two, three


@pytest.fixture
def out(runs, tmp_path) -> Path:
    """A copy of the run after two steps, to damage."""
    return shutil.copytree(runs[0], tmp_path / "run")


# ---------------------------------------------------------------------- J: damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def edited(**values):
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def written(text: str | bytes):
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("optimizer.pt", cut, "optimizer.pt is not what was saved"),
        ("optimizer.pt", written(""), "optimizer.pt is not what was saved"),
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("state.json", written(""), "state.json: Expecting value"),
        ("state.json", cut, "state.json: .*delimiter|state.json: Unterminated"),
        ("state.json", written(b"\0" * 90), "state.json: "),
        ("state.json", written("[2, 40]"), "state.json: "),
        ("state.json", written("[" * 9999), "state.json: "),
        ("state.json", written('{"step": 2}'), "state.json: 'sampled_tokens'"),
        ("state.json", edited(sampled_tokens=7), "state.json: it was changed"),
        ("state.json", edited(seal=None, step=1), "its state.json is of step 1"),
        ("model.safetensors", cut, "model.safetensors is not what was saved"),
        ("model.safetensors", flip, "model.safetensors is not what was saved"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("config.json", written("{}"), "config.json is not what was saved"),
        ("tokenizer_config.json", Path.unlink, "tokenizer_config.json is missing"),
        ("generation_config.json", edited(eos_token_id=2), "generation_config.json is not what"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_what_resumes(out, config, name, damage, reason):
    newest, before = checkpoint_path(out, 2), (out / "metrics.jsonl").read_bytes()
    damage(newest / name)
    with pytest.raises(UsageError) as caught:
        train(out, config)
    told = rf"checkpoint {newest} is damaged \(({reason}).*\); move it away, and the same command "
    assert re.fullmatch(f"{told}goes on from step 1", str(caught.value))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_moved_away_the_run_goes_on_from_the_one_before(out, runs, config):
    cut(checkpoint_path(out, 2) / "optimizer.pt")
    checkpoint_path(out, 2).rename(out / "broken")
    train(out, config)
    shutil.rmtree(out / "broken")
    assert contents(out) == contents(runs[1])


def test_without_state_json_a_checkpoint_is_left_out_and_never_the_last(out, runs, config, capsys):
    """Trained weights are not step 0: the run would start over from them, and drop its logs."""
    (checkpoint_path(out, 2) / "state.json").unlink()
    train(shutil.copytree(out, out.with_name("again")), config)
    assert "step_000002: has no state.json and is left out" in capsys.readouterr().out
    assert contents(out.with_name("again")) == contents(runs[1])
    (checkpoint_path(out, 1) / "state.json").unlink()
    before = contents(out)
    with pytest.raises(UsageError, match="step_000002 is damaged .state.json is missing.*step 1"):
        train(out, config)
    assert contents(out) == before
    shutil.rmtree(checkpoint_path(out, 1))
    with pytest.raises(UsageError, match="is missing.; move it away, .* command starts over"):
        train(out, config)


def test_a_damaged_guide_or_start_is_another_runs(out, config, tmp_path):
    flip(checkpoint_path(out, 2) / "model.safetensors")
    files.LOCKS.clear()  # as in a process of its own
    path = str(checkpoint_path(out, 2))
    with pytest.raises(UsageError, match="is damaged .*; take another one"):
        train(tmp_path / "other", config, start=path)
    (checkpoint_path(out, 1) / "optimizer.pt").unlink()  # it is not needed there
    train(tmp_path / "third", config, start=str(checkpoint_path(out, 1)), steps=2)


BROKEN_LINES = [
    (b"\0" * 200, "utf-32|Expecting value|codec"),
    (b'{"step": 1, "rew', "Invalid control character"),
    (b"[1]", "it is no object"),
    (b"null", "it is no object"),
    (b'{"reward": 0.5}', "it has no whole number 'step'"),
    (b'{"step": "1"}', "it has no whole number 'step'"),
    (b'{"step": 1, "text": "\xff"}', "can't decode"),
    (b"[" * 99999, "recursion"),
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES)
def test_a_damaged_log_is_named_with_its_line(out, config, name, line, reason):
    lines = (out / name).read_bytes().splitlines(keepends=True)
    (out / name).write_bytes(lines[0] + line + b"\n" + b"".join(lines[1:]))
    message = rf"{out / name}: is not JSON lines \(line 2: .*({reason}).*; mend it or move it away"
    with pytest.raises(UsageError, match=message) as caught:
        train(out, config)
    assert "\n" not in str(caught.value)
    assert len(checkpoints(out)) == 2 and (out / name).read_bytes().count(b"\n") == len(lines) + 1


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 50)
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"text": "' + 60 * "x" + '"}\n')
    with pytest.raises(UsageError, match=r"a.jsonl: is not JSON lines \(line 2"):
        read_jsonl(tmp_path / "a.jsonl")


def test_nothing_is_removed_before_what_replaces_it_is_saved(config, tmp_path, monkeypatch):
    """Else a kill in between takes a distance from AutoNPO's next table."""
    removed = []

    def remove(path: Path) -> None:
        newest = checked(checkpoints(tmp_path)[-1], optimizer=True)
        assert step_of(newest) == run.step and step_of(path) < run.step - 2
        removed.append(step_of(path))
        remove_checkpoint(path)

    monkeypatch.setattr("plumbing.run.remove_checkpoint", remove)
    with Run(
        dataclasses.replace(config, keep="none", out=str(tmp_path)), tmp_path, keep_back=2
    ) as run:
        for run.step in range(1, 6):
            run.save()
    assert removed == [1, 2]


def test_foreign_folders_and_files_are_left_alone(out, runs, config):
    """Also those that end in .tmp; what a kill left of our own goes."""
    foreign = ["step_final", "best", "step_12", "step_0000001", "mine.tmp", "step_final.tmp"]
    for name in foreign:
        (out / "checkpoints" / name).mkdir()
        (out / "checkpoints" / name / "precious").touch()
    (out / "checkpoints/notes.tmp").write_text("precious")
    (out / "checkpoints/step_000003.tmp").mkdir()
    train(out, config, keep="none")
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {*foreign, "notes.tmp", "step_000003"}
    assert all((out / "checkpoints" / name / "precious").exists() for name in foreign)


@pytest.mark.parametrize("text", ["", '{"steps": 2', "[]", "\0\0"])
@pytest.mark.parametrize("name", ["config.json", "fingerprints.json"])
def test_damaged_records_of_the_run(out, config, name, text):
    (out / name).write_text(text)
    with pytest.raises(UsageError, match=rf"{out / name}: is not JSON .*mend it, or choose"):
        train(out, config)


def test_a_record_whose_values_are_texts_is_another_runs(out, config):
    edited(steps="2")(out / "config.json")
    with pytest.raises(UsageError, match="another configuration .steps 2 there and 3 here"):
        train(out, config)


def test_exgrpo_does_not_go_on_without_its_experience(tiny, tmp_path):
    flags = tiny | {"save_every": 1, "eval_every": 100, "start_accuracy": 0.0, "out": str(tmp_path)}
    exgrpo.train(exgrpo.ExGRPOConfig(steps=2, **flags), tmp_path)
    assert len(read_jsonl(tmp_path / "experience.jsonl")) > 1
    for name in ("experience.jsonl", "metrics.jsonl"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(UsageError, match="are not those of step 2; bring them back"):
            exgrpo.train(exgrpo.ExGRPOConfig(steps=3, **flags), tmp_path)
        (tmp_path / name).write_bytes(content)
    exgrpo.train(exgrpo.ExGRPOConfig(steps=3, **flags), tmp_path)


# ---------------------------------------------------------------------- K: other data, another base


@pytest.fixture
def on_file(tmp_path, tiny) -> GRPOConfig:
    """A run of one step on a data file and a model's folder of its own."""
    cards_file(tmp_path / "hands.parquet", 12)
    model = shutil.copytree(tiny["model"], tmp_path / "model")
    flags = tiny | {"model": str(model), "dataset": str(tmp_path / "hands.parquet")}
    flags |= {"save_every": 1, "eval_every": 100, "out": str(tmp_path / "run")}
    return GRPOConfig(steps=1, **flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: cards_file(path / "hands.parquet", 12, {2: {"answer": "7"}}), "training"),
        (lambda path: cards_file(path / "hands.parquet", 12, {1: {"problem": "How many?"}}), "tra"),
        (lambda path: cards_file(path / "hands.parquet", 12, {11: {"answer": "7"}}), "held-out"),
        (lambda path: cards_file(path / "hands.parquet", 11), "training prompts .*, held-out"),
        (lambda path: cards_file(path / "hands.parquet", 12, {3: {"images": []}}), "training"),
        (lambda path: flip(path / "model/model.safetensors"), "base model"),
        (lambda path: edited(eos_token_id=2)(path / "model/generation_config.json"), "base model"),
        (lambda path: (path / "model/preprocessor_config.json").open("a").write(" "), "base model"),
        (lambda path: (path / "model/chat_template.jinja").open("a").write("!"), "tokenizer"),
        (lambda path: edited(x=1)(path / "model/tokenizer_config.json"), "tokenizer"),
        (
            lambda path: cards_file(
                path / "hands.parquet", 12, {3: {"images": [cards.draw(cards.hands("train")[4])]}}
            ),
            "training prompts",  # another picture of the same size
        ),
        (
            lambda path: (path / "model/processor_config.json").write_text(
                f'{{"image_processor": {(path / "model/preprocessor_config.json").read_text()}}}'
            ),
            "base model",
        ),
    ],
)
def test_what_changed_under_a_run_is_told_there_and_here(on_file, tmp_path, change, message):
    out = Path(on_file.out)
    grpo.train(on_file, out)
    before = contents(out)
    change(tmp_path)
    data._load_prompts.cache_clear()
    told = rf"holds a run with another configuration \({message}\S* .*there and .* here\); choose"
    with pytest.raises(UsageError, match=told) as caught:
        grpo.train(dataclasses.replace(on_file, steps=2), out)
    assert "\n" not in str(caught.value) and contents(out) == before


def test_the_same_data_by_another_path_goes_on_and_other_data_do_not(on_file, tmp_path):
    out = Path(on_file.out)
    grpo.train(on_file, out)
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "hands.parquet").rename(tmp_path / "moved/hands.parquet")
    grpo.train(dataclasses.replace(on_file, dataset=str(moved), steps=2), out)
    assert json.loads((out / "config.json").read_text())["dataset"] == str(moved)
    cards_file(tmp_path / "other.parquet", 12, {0: {"answer": "1"}})
    other = dataclasses.replace(on_file, dataset=str(tmp_path / "other.parquet"), steps=2)
    with pytest.raises(UsageError, match="training prompts hands.parquet-.* and other.parquet-"):
        grpo.train(other, out)
    assert json.loads((out / "config.json").read_text())["dataset"] == str(moved)
    (out / "fingerprints.json").unlink()
    with pytest.raises(UsageError, match=f"dataset {moved} there and .*other.parquet here"):
        grpo.train(other, out)


def test_what_never_began_may_change_its_data(on_file, tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.run.Policy", lambda *_: 1 / 0)
    for count in (12, 11):
        cards_file(tmp_path / "hands.parquet", count)
        data._load_prompts.cache_clear()
        with pytest.raises(ZeroDivisionError):
            grpo.train(on_file, Path(on_file.out))


# ---------------------------------------------------------------------- one process at a time


def held(out: Path) -> int:
    """The lock as another process holds it: of another open file."""
    file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT)
    os.write(file, b"process 4711 on elsewhere (grpo.py --seed 3)")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_second_process_is_told_which_is_the_first(tmp_path, config):
    (tmp_path / "run").mkdir()
    other = held(tmp_path / "run")
    message = (
        r"--out .*run: process 4711 on elsewhere \(grpo.py --seed 3\) writes there now; .*--out"
    )
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "run", config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    os.close(other)  # as the kernel does, however it ends
    train(tmp_path / "run", config, steps=1)
    assert f"process {os.getpid()} on " in (tmp_path / "run" / LOCK).read_text()
    train(tmp_path / "run", config, steps=2)  # one process may open it again


@pytest.mark.parametrize("where", [".", "scout"])
def test_fresh_does_not_move_away_what_somebody_writes(out, config, where):
    (out / where).mkdir(exist_ok=True)
    files.LOCKS.clear()
    other = held(out / where)
    with pytest.raises(UsageError, match="process 4711 .* writes there now"):
        start_over(dataclasses.replace(config, out=str(out)))
    assert out.is_dir()
    os.close(other)
    start_over(dataclasses.replace(config, out=str(out)))
    assert not out.exists()
    train(out, config, steps=1)  # with a lock of its own
    assert files.inode(out / LOCK) != files.inode(out.with_name("run.old") / LOCK)


def test_an_evaluation_is_one_processes_too(tmp_path):
    other = held(tmp_path)
    with pytest.raises(UsageError, match="process 4711 .* writes there now"):
        evaluate.main(evaluate.EvaluateConfig(out=str(tmp_path)))
    os.close(other)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fails)
    lock(tmp_path)
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
    assert files.is_locked(tmp_path)


def test_other_peoples_folders_get_no_lock(tmp_path, config):
    (tmp_path / "photo.png").touch()
    with pytest.raises(UsageError, match="holds files but no run"):
        train(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def waiting_until(condition, process: subprocess.Popen) -> None:
    import time

    while not condition():
        assert process.poll() is None, process.stdout.read()[-2000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_two_commands_at_once_and_a_polite_end(command, tmp_path):
    """The second gets a line; SIGTERM ends the first with the usual one, SIGKILL frees the lock."""
    words = [*GRPO, "--steps", "500", "--out", tmp_path / "run"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, **pipe)
    waiting_until(lambda: len(read_jsonl(tmp_path / "run/metrics.jsonl")) > 3, first)
    error = one_line_error(command(*words, check=False))
    assert re.search(rf"--out .*run: process {first.pid} on .* writes there now", error)
    first.send_signal(signal.SIGTERM)
    text = first.communicate()[0]
    assert first.returncode == 130 and "Traceback" not in text
    assert re.search(r"interrupted in step \d+; the same command resumes from .*step_00", text)
    again = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, **pipe)
    waiting_until(lambda: f"process {again.pid}" in (tmp_path / "run" / LOCK).read_text(), again)
    again.kill()
    again.communicate()
    command(*GRPO, "--steps", "500", "--fresh", "--help")  # nothing holds it
    lock(tmp_path / "run")


# ---------------------------------------------------------------------- a model's folder


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "model.safetensors: .*incomplete"),
        (written(""), "model.safetensors: .*header too small"),
        (
            written("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"),
            "Git LFS",
        ),
        (Path.unlink, "model.safetensors"),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path, damage, reason):
    model = shutil.copytree(cards.BASE, tmp_path / "model")
    damage(model / "model.safetensors")
    with pytest.raises(UsageError, match=f"model {model}: .*{reason}") as caught:
        Policy(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        "{}",
        "[]",
        '{"model_type": "qwen3_vl", "text_config": 5}',
        '{"model_type": "none"}',
        "[" * 9999,
    ],
)
def test_a_folder_that_is_no_model_ends_in_one_line(tmp_path, config):
    model = shutil.copytree(cards.BASE, tmp_path / "model")
    (model / "config.json").write_text(config)
    with pytest.raises(UsageError, match=f"model {model}: ") as caught:
        Policy(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if x %}", "cannot be rendered .Unexpected end of template"),
        ("{{ raise_exception('no') }}", "cannot be rendered .no."),
        ("{{ messages[0].content }}", "does not show the question"),  # one for texts alone
        ("hello", "does not show the question"),
    ],
)
def test_a_chat_template_that_does_not_show_a_row(tmp_path, template, reason):
    model = shutil.copytree(cards.BASE, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    told = f"the chat template {reason}.*; copy chat_template.jinja of the base model"
    with pytest.raises(UsageError, match=told) as caught:
        data.load_prompts(GRPOConfig(model=str(model), dataset="cards"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\0\0", '{"eos_token_id": [2, 7'])
def test_stop_tokens_that_cannot_be_read_are_not_guessed(tmp_path, text):
    model = shutil.copytree(cards.BASE, tmp_path / "model")
    (model / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match=f"model {model}: cannot be loaded .*generation_config"):
        Policy(model)


EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"
AUTO = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}
AUTO |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"}


@pytest.mark.parametrize("model_type", ["qwen3_vl", "somebodys_own"])
def test_a_folders_own_code_never_runs(tmp_path, monkeypatch, model_type):
    """Also where somebody says yes: transformers would ask."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = shutil.copytree(cards.BASE, tmp_path / "model")
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    (model / "evil.py").write_text(EVIL)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(EVIL + "def generate(*_): pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        more = {"model_type": model_type} if name == "config.json" else {}
        edited(auto_map=AUTO, **more)(model / name)
    if model_type == "qwen3_vl":
        Policy(model)
    else:
        with pytest.raises(UsageError, match=f"model {model}: "):
            Policy(model)
    assert not list(tmp_path.rglob("ran"))


def test_options_that_nest_too_deeply_are_none():
    assert literal("[" * 99_999) == [] and literal("['a', 'b']") == ["a", "b"]


# ---------------------------------------------------------------------- the system says no


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a/b"), "a/b: Read-only file system; noth"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), "c: Permission denied; nothing"),
        (OSError(errno.EDQUOT, "Quota"), "no space left on the disk of --out o; .* free some"),
        (OSError("first line\nsecond"), "first line; nothing finished is lost"),
        (OSError(), "OSError; nothing finished is lost"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, error, message):
    def fails(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["grpo.py", "--out", "o"])
    with pytest.raises(SystemExit, match=f"error: {message}") as exit:
        command_line(GRPOConfig, fails)
    assert "\n" not in str(exit.value) and "the same command resumes" in str(exit.value)


@pytest.mark.parametrize("flag", ["--out", "--dataset", "--guide", "--start"])
def test_a_name_that_is_too_long(script, tmp_path, flag):
    with pytest.raises(SystemExit, match="error: .*[Ff]ile name too long|error: .*no such") as exit:
        script("npo.py", "--out", tmp_path / "run", flag, tmp_path / (300 * "x"))
    assert "\n" not in str(exit.value)


def test_a_terminal_that_lacks_a_character(monkeypatch, tmp_path):
    with open(tmp_path / "shown", "w", encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        monkeypatch.setattr(sys, "argv", ["grpo.py"])
        command_line(GRPOConfig, lambda config: print("1.5 ± 0.2"))
    assert (tmp_path / "shown").read_text().endswith("\n1.5 ? 0.2\n")


def test_the_staircase_is_built_elsewhere_where_its_folder_is_read_only(tmp_path, monkeypatch):
    base = shutil.copytree(staircase.BASE, tmp_path / "installed/staircase_base")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != base.parent and access(path, mode))
    made = staircase.base_at(0.03, base)
    assert made.is_relative_to(tmp_path / "home/.cache/npo") and made == staircase.base_at(
        0.03, base
    )
    assert not (base.parent / "staircase_at").exists()
    Policy(made)


# ---------------------------------------------------------------------- power cuts


def test_all_of_a_checkpoint_is_on_the_disk_before_its_name_is(tmp_path, config, monkeypatch):
    """And a log's lines before the checkpoint that counts on them."""
    synced, renamed, rename = {}, [], Path.rename
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.name] = path.read_bytes()
        fsync(descriptor)

    def checked_rename(self, target):
        for file in self.iterdir() if self.is_dir() else []:
            known = synced.get(file.name) or synced.get(f"{file.name}.tmp")
            assert known == file.read_bytes(), f"{file} is not on the disk"
        if self.is_dir():
            assert synced["metrics.jsonl"] == (tmp_path / "run/metrics.jsonl").read_bytes()
        elif self.suffix == ".tmp":
            assert synced[self.name] == self.read_bytes(), f"{self} is not on the disk"
        renamed.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "rename", checked_rename)
    train(tmp_path / "run", config, steps=1)
    assert {"config.json", "fingerprints.json", "state.json", "step_000001"} <= {*renamed}
    assert checkpoint_state(checkpoint_path(tmp_path / "run", 1))["step"] == 1
