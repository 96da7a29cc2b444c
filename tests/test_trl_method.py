"""NPO and AutoNPO in one TRL command: where it goes, where it goes back to, its resumes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import lucky
from safetensors.torch import load_file

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt")

import autonpo
import verifier
from commands import npo_trl
from commands.trl_trainer import NPOConfig, NPOTrainer
from grpo import GRPOConfig
from plumbing import trl_run
from plumbing.checkpoints import checkpoint_state, checkpoints, step_of
from plumbing.data import load_prompts
from plumbing.guide_cache import load_guide_cache
from plumbing.model import Policy
from plumbing.run import current_lineage, read_jsonl, rows_of_step
from plumbing.settings import RunConfig
from worlds import cards

FLAGS = {
    "dataset": "cards",
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "temperature": 1.7,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_steps": 2,
}
EARLY = {"intervention": "early", "scout_steps": 3, "max_steps": 4}
# Everything is a mistake, nothing is progress, any entropy will do: see tests/test_autonpo.py
AUTO = {
    "auto": True,
    "max_steps": 8,
    "mistake_pass_rate": 0.9,
    "max_distance": 4,
    "patience": 1,
    "min_gain": 5.0,
    "entropy_drop": -9.0,
    "probe_prompts": 8,
    "probe_samples": 2,
    "confirm_pass_rate": 0.0,
    "cooldown": 3,
    "keep": "none",
}


@pytest.fixture
def run(monkeypatch, tiny):
    """Runs the command in this process, with a verifier that is easy to please."""
    monkeypatch.setattr("verifier.is_correct", lucky)
    monkeypatch.setattr("verifier.reward", verifier.reward)  # puts it back after --reward
    monkeypatch.setattr(autonpo, "EMA_STEPS", 2)
    monkeypatch.setattr(autonpo, "MIN_SLICE", 1)

    def command(out: Path, **flags) -> dict[str, torch.Tensor]:
        words = words_of({"model": tiny["model"], "output_dir": out} | flags)
        monkeypatch.setattr(sys, "argv", ["npo_trl.py", *words])
        npo_trl.main()
        return weights(out)

    return command


def words_of(flags: dict) -> list[str]:
    """A command line of FLAGS and these; where there is a guide, it answers five times."""
    guided = flags.keys() & {"intervention", "auto", "guide"}
    flags = FLAGS | ({"guide_samples": 5} if guided else {}) | flags
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(out)[-1] / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def logged(out: Path) -> list[dict]:
    return read_jsonl(out / "metrics.jsonl")


def test_early_is_a_scout_its_answers_and_the_same_steps_again(run, tmp_path, capsys):
    found = run(tmp_path / "early", **EARLY)
    scout, replay = logged(tmp_path / "early/scout"), logged(tmp_path / "early")
    assert [line["step"] for line in scout] == [1, 2, 3]
    assert [line["step"] for line in replay] == [1, 2, 3, 4]
    # the same prompts and draws: the policy's own answers are the scout's until the first update
    assert replay[0]["accuracy"] == scout[0]["accuracy"]
    assert replay[0]["completions/mean_length"] == scout[0]["completions/mean_length"]
    assert replay[0]["rewards/accuracy/mean"] > replay[0]["accuracy"]
    assert replay[0]["npo/distance"] == 2 and "npo/guide_frac" not in replay[3]
    assert all(line["npo/guide_ratio_max"] != 1 for line in replay if line.get("npo/guide_frac"))
    header, *lines = read_jsonl(tmp_path / "early/guide.jsonl")
    assert len({line["row"] for line in lines}) == len(lines) == 6 and header["guide_step"] == 3
    spent = checkpoint_state(checkpoints(tmp_path / "early/scout")[-1])["sampled_tokens"]
    own = sum(8 * line["completions/mean_length"] for line in scout)
    assert spent == header["guide_sampled_tokens"] == own
    spent += sum(line["sampled_tokens"] for line in lines)
    assert replay[0]["sampled_tokens"] > spent > own
    assert "NO x 1, Qwen3VLForConditionalGeneration" in capsys.readouterr().out

    again = run(tmp_path / "given", guide=tmp_path / "early/guide.jsonl", max_steps=4)
    assert same(found, again)  # so it went back to the base, all of it
    assert not same(found, run(tmp_path / "grpo", max_steps=4))


def test_the_recorded_logprobs_are_the_trainers(run, tmp_path, tiny, base, prompts):
    """The guide's answers under its checkpoint, by another forward."""
    run(tmp_path, **EARLY)
    guide = Policy(tmp_path / "scout/checkpoints/step_000003")
    # TRL's distribution: over the vision tokens, too
    guide.sampling_logprobs = lambda logits, heat: (logits / heat).log_softmax(dim=-1)
    config = RunConfig(model=tiny["model"], dataset="cards")
    config.max_new_tokens = 16
    cache = load_guide_cache(tmp_path / "guide.jsonl", config)
    assert len(cache.answers) > 2
    for row in range(len(prompts)):
        for answer in cache.answers.get(prompts.id_of(row), []):
            values, _ = guide.logprobs([(guide.encode(prompts[row]), answer.token_ids)], 1.7)
            assert values[0].tolist() == pytest.approx(answer.behavior_logprobs, abs=2e-5)


@pytest.mark.parametrize(
    "intervention", ["late", pytest.param("early+late", marks=pytest.mark.slow)]
)
def test_late_goes_back_to_the_plateau(run, tmp_path, intervention):
    flags = {"intervention": intervention, "plateau_start": 3, "plateau_end": 6, "max_steps": 6}
    run(tmp_path, **flags, scout_steps=2, save_steps=4, keep="none")
    scout, replay = logged(tmp_path / "scout"), logged(tmp_path)
    assert [line["step"] for line in scout] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in replay] == [4, 5, 6]
    assert replay[0]["accuracy"] == scout[3]["accuracy"]
    assert replay[0]["npo/distance"] == 2
    header = read_jsonl(tmp_path / "guide.jsonl")[0]
    assert (header["guide_step"], header["prompts"]) == (6, 6)
    early = intervention == "early+late"
    assert (tmp_path / "scout/scout").is_dir() == early
    assert any(line.get("npo/guide_frac") for line in scout) == early
    kept = [step_of(path) for path in checkpoints(tmp_path / "scout")]
    assert kept == ([3, 6] if early else [0, 3, 6])


class Killed(BaseException):
    pass


def kill(monkeypatch, owner, name: str, call: int, after: bool = False):
    """The process ends in (or after) the so many-th call of a function."""
    original, calls = getattr(owner, name), []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) < call:
            return original(*args, **options)
        if after and len(calls) == call:
            original(*args, **options)
        raise Killed

    monkeypatch.setattr(owner, name, dies)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {}


KILLS = [  # where it is killed: early
    (EARLY, NPOTrainer, "_compute_loss", 2, False),  # in the scout
    (EARLY, NPOTrainer, "_save_checkpoint", 2, True),  # it is written, but does not count
    (EARLY, trl_run.Engine, "sample", 2, False),  # in the cache
    (EARLY, trl_run, "write_state", 5, False),  # in the replay, at its first save
    (EARLY, NPOTrainer, "_compute_loss", 6, False),  # in the replay
    (AUTO, trl_run.TRLRun, "ask", 1, False),  # in the probe
    (AUTO, trl_run.Engine, "logprobs", 2, False),  # among the older checkpoints
    (AUTO, trl_run.Engine, "sample", 2, False),  # in the cache
    (AUTO, trl_run.TRLRun, "roll_back", 1, False),
    (AUTO, trl_run.TRLRun, "_forget_after", 1, False),  # in the rollback, once it counts
    (AUTO, NPOTrainer, "_compute_loss", 7, False),  # in the replay
]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "owner", "name", "call", "after"), KILLS)
def test_killed_anywhere_the_same_command_goes_on(
    run, whole, tmp_path, monkeypatch, flags, owner, name, call, after
):
    kind = "auto" if "auto" in flags else "early"
    if kind not in whole:
        whole[kind] = run(tmp_path / "whole", **flags), logged(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill(patch, owner, name, call, after)
        with pytest.raises(Killed):
            run(tmp_path / "parts", **flags)
    found, lines = run(tmp_path / "parts", **flags), logged(tmp_path / "parts")
    expected, all_lines = whole[kind]
    assert same(found, expected)
    names = {"step", "rollbacks", "loss", "accuracy", "sampled_tokens", "autonpo/decision"}
    assert [{n: v for n, v in line.items() if n in names} for line in lines] == [
        {n: v for n, v in line.items() if n in names} for line in all_lines
    ]


def test_autonpo_rolls_back_and_goes_on(run, tmp_path):
    run(tmp_path, **AUTO)
    lines = logged(tmp_path)
    made = [line for line in lines if line.get("autonpo/distance")]
    assert made and made[0]["autonpo/step"] == made[0]["step"] - 1
    back = made[0]["autonpo/step"] - made[0]["autonpo/distance"]
    after = [line for line in lines if line.get("rollbacks") == 1 and "loss" in line]
    assert [line["step"] for line in after][:2] == [back + 1, back + 2]
    before = next(line for line in lines if line["step"] == back + 1)
    assert after[0]["accuracy"] == before["accuracy"]  # the same prompts and draws
    assert any(line.get("npo/guide_frac") for line in after)
    steps = [line["step"] for line in current_lineage(lines) if "loss" in line]
    assert steps == list(range(1, 9))
    for name in ("reward", "entropy", "pool"):
        assert f"autonpo/{name}" in lines[0]
    table = made[0]["autonpo/table"]
    assert len(table) > 1
    assert all(row["variance"] != 1 and 0 <= row["quality"] <= 1 for row in table)
    assert max(step_of(path) for path in checkpoints(tmp_path)) == 8
    with pytest.raises(SystemExit, match="holds a run with another configuration"):
        run(tmp_path, **AUTO | {"patience": 2})


@pytest.mark.slow
def test_trackers_are_told_all_of_it_and_see_steps_go_back(run, tmp_path, monkeypatch):
    told, original = [], npo_trl.make_trainer

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            told.append((state.global_step, logs))

    def make_trainer(*args):
        trainer = original(*args)
        trainer.add_callback(Tracker())
        return trainer

    monkeypatch.setattr(npo_trl, "make_trainer", make_trainer)
    run(tmp_path, **AUTO)
    trained = [(step, logs) for step, logs in told if "loss" in logs]
    assert [step for step, _ in trained] == [
        line["step"] for line in logged(tmp_path) if "loss" in line
    ]
    assert sorted(trained, key=lambda pair: pair[0]) != trained  # they go back
    for name in ("autonpo/reward", "npo/guide_frac", "npo/guide_ratio_mean", "accuracy"):
        assert any(name in logs for _, logs in trained)
    made = [logs for _, logs in told if "autonpo/distance" in logs]
    assert any(logs["autonpo/distance"] for logs in made) and "step" not in made[0]
    assert sum("train_runtime" in logs for _, logs in told) == 1 + len(made)  # nothing of loads


def test_lora(run, tmp_path):
    pytest.importorskip("peft", reason="pip install -r requirements-gpu.txt")
    flags = FLAGS | {"output_dir": tmp_path, "lora": 4, "learning_rate": 1e-2}
    with pytest.raises(FileNotFoundError):  # a checkpoint is the adapter alone
        run(tmp_path, **flags | EARLY)
    newest = load_file(checkpoints(tmp_path)[-1] / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in newest.items() if "lora_B" in name)
    replay, scout = logged(tmp_path), logged(tmp_path / "scout")
    assert replay[0]["accuracy"] == scout[0]["accuracy"] and replay[0]["npo/distance"] == 2


def test_autonpo_that_never_triggers_is_grpo(run, tmp_path):
    auto = run(tmp_path / "auto", **AUTO | {"patience": 100, "max_steps": 3, "keep": "all"})
    assert same(auto, run(tmp_path / "grpo", max_steps=3))
    assert [step_of(path) for path in checkpoints(tmp_path / "auto")] == [0, 2, 3]


def test_the_monitor_sees_what_autonpos_own_loop_sees(run, tmp_path, monkeypatch, tiny):
    """Entropy, reward and pool of the first step, out of its answers by another forward."""
    seen, original = [], trl_run.TRLRun.on_step_end

    def on_step_end(self, *args, **options):
        seen.append([group for group, _ in self.trainer.groups])
        return original(self, *args, **options)

    monkeypatch.setattr(trl_run.TRLRun, "on_step_end", on_step_end)
    run(tmp_path, **AUTO | {"patience": 100, "max_steps": 2})
    policy, prompts = Policy(tiny["model"]), load_prompts(RunConfig())[0]
    policy.sampling_logprobs = lambda logits, heat: (logits / heat).log_softmax(dim=-1)
    by_id = {prompts.id_of(row): row for row in range(len(prompts))}
    rows = [by_id[group.prompt.id] for group in seen[0]]
    answers = [
        (policy.encode(prompts[row]), c.token_ids)
        for row, group in zip(rows, seen[0])
        for c in group.completions
    ]
    values, mask = policy.logprobs(answers, 1.7)
    first = logged(tmp_path)[0]
    assert first["autonpo/entropy"] == pytest.approx(-values[mask].mean().item(), rel=1e-4)
    assert first["autonpo/reward"] == pytest.approx(first["reward"], abs=1e-6)
    failed = [row for row, group in zip(rows, seen[0]) if group.pass_rate <= 0.9]
    assert first["autonpo/pool"] == len(failed) and 0 < first["accuracy"] < 1
    config = GRPOConfig(prompts_per_step=2, seed=42)  # TRL's default
    assert rows == rows_of_step(len(prompts), 1, config)  # npo.py's


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"auto": True, "intervention": "early"}, "--auto: chooses its own rollbacks"),
        ({"auto": True, "logging_steps": 2}, "--logging_steps: with --auto a line a step"),
        ({"logging_steps": 0.5}, "--save_steps, --logging_steps: must be whole"),
        ({"guide": "self"}, "--guide self: works in npo.py only"),
        ({"max_steps": -1}, "--max_steps: is required"),
        ({"save_strategy": "no"}, "--save_strategy: a run goes back to whole checkpoints; leave"),
        ({"save_total_limit": 2}, "--save_total_limit: --keep says it; leave it out"),
        ({"num_iterations": 2}, "--num_iterations: here a step is one update on answers of its"),
        ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type: a run that goes back"),
        ({"reward_weights": "1"}, "--reward_weights: answers are paid by verifier.reward"),
        ({"scout_steps": 3}, "--scout_steps: has no effect in GRPO; leave it out, or say which"),
        ({"scout_steps": 3, "auto": True}, "--scout_steps: has no effect in AutoNPO"),
        ({"patience": 3, "intervention": "early"}, "--patience: has no effect in NPO"),
        ({"intervention": "early", "scout_steps": 0}, "--scout_steps 0: must be at least 1"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0: must be above 0"),
        ({"num_generations": 3}, "generation_batch_size \\(8\\) must be divisible"),
        ({"guide": "nowhere"}, "--guide nowhere: is no guide"),
        ({"gate": 1.2, "intervention": "early"}, "--gate 1.2: must be at least 0 and at most 1"),
        ({"slots": 4, "intervention": "early"}, "--slots 4: must be at least 1 and below 4"),
        (
            {"intervention": "late", "plateau_start": 2, "guide": cards.TEACHER},
            "--plateau_start 2: .*step_000002 does not exist",
        ),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(tmp_path, **{"max_steps": 3} | flags)


def test_interrupted_or_given_a_file_for_a_directory(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file"):
        run(tmp_path / "file", max_steps=1)

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(npo_trl, "run_method", ctrl_c)
    with pytest.raises(SystemExit, match="^interrupted; the same command resumes"):
        run(tmp_path / "out", max_steps=1)


@pytest.fixture
def asked_for(monkeypatch, run, tmp_path):
    """What the trainer would be made of; it is not made."""

    def found(**flags) -> dict:
        class Made(Exception):
            pass

        def made(**options):
            raise Made(options)

        monkeypatch.setattr(npo_trl, "NPOTrainer", made)
        with pytest.raises(Made) as told:
            run(tmp_path, **flags)
        return told.value.args[0]

    return found


def test_vision_tokens_are_never_sampled(asked_for, monkeypatch, base):
    """By transformers' option, and by vLLM's, which has no other; TRL checks that vLLM is there."""
    mine = {"max_steps": 1, "generation_kwargs": '{"min_new_tokens": 2}'}
    kept = asked_for(**mine)["args"].generation_kwargs
    assert kept == {"min_new_tokens": 2, "suppress_tokens": base.never_sampled}
    post_init = NPOConfig.__post_init__

    def with_vllm(self):
        post_init(self)
        self.use_vllm = True

    monkeypatch.setattr(NPOConfig, "__post_init__", with_vllm)
    kept = asked_for(**mine | {"fresh": True})["args"].generation_kwargs
    assert kept == {"min_new_tokens": 2, "logit_bias": dict.fromkeys(base.never_sampled, -100.0)}


def test_the_data_set_reaches_to_the_last_step_of_any_stage(asked_for):
    """Its rows are those of npo.py's steps, also of a scout that goes further than the rest."""
    flags = {"intervention": "early+late", "plateau_start": 2, "plateau_end": 3, "max_steps": 4}
    table = asked_for(**flags, scout_steps=5)["train_dataset"]
    prompts, _ = load_prompts(RunConfig(dataset="cards", model="cards"))
    config = GRPOConfig(prompts_per_step=2, seed=42)
    steps = [rows_of_step(len(prompts), step, config) for step in range(1, 6)]
    assert table["prompt_id"] == [prompts.id_of(row) for rows in steps for row in rows]


def test_a_cache_of_other_prompts_is_told(run, tmp_path, capsys):
    run(tmp_path / "run", **EARLY)
    path = tmp_path / "run/guide.jsonl"
    lines = read_jsonl(path)
    for what, value in (("dataset", "deck"), ("tokenizer", "0123")):
        changed = [lines[0] | {what: value}, *lines[1:]]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(SystemExit, match=f"error: guide cache .*made for another {what}"):
            run(tmp_path / what, guide=path, max_steps=3)


def test_bf16_computes_in_it_and_trains_fp32_weights(run, tmp_path):
    """In bf16 weights AdamW's steps of 1e-6 would be lost."""
    run(tmp_path, bf16=True, learning_rate=1e-6, max_steps=4, save_steps=1, keep="all")
    first, last = (load_file(path / "model.safetensors") for path in checkpoints(tmp_path)[::3])
    assert {value.dtype for value in last.values()} == {torch.float32}
    some = [name for name in last if name.endswith("q_proj.weight")]
    moved = torch.cat([(first[name] != last[name]).flatten() for name in some])
    assert moved.float().mean() > 0.5


def test_equal_rewards_of_any_size_have_no_advantage(run, tmp_path, monkeypatch):
    """TRL's rounding error in the mean of 100.1 would be an advantage of 0.1."""
    monkeypatch.setattr("verifier.reward", lambda prompt, completion: 100.1)
    found = run(tmp_path / "paid", max_steps=6)
    assert [line["grad_norm"] for line in logged(tmp_path / "paid")] == [0.0] * 6
    assert [line["reward"] for line in logged(tmp_path / "paid")] == pytest.approx([100.1] * 6)
    assert any(8 * line["accuracy"] % 4 for line in logged(tmp_path / "paid"))  # is no reward here
    base = load_file(cards.BASE / "model.safetensors")
    moved = (name for name, value in found.items() if not torch.equal(value, base[name]))
    assert all((found[name] - base[name]).abs().max() < 1e-4 for name in moved)  # weight decay


def test_other_flags_of_trls_are_refused_on_resume(run, tmp_path):
    run(tmp_path, max_steps=1, top_k=7)
    for other in ({"top_k": 9}, {"beta": 0.1, "top_k": 7}, {"adam_beta2": 0.5, "top_k": 7}):
        with pytest.raises(SystemExit, match=f"another configuration .*'{[*other][0]}'"):
            run(tmp_path, max_steps=2, **other)
    run(
        tmp_path, max_steps=2, top_k=7, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert [line["step"] for line in logged(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_told(run, tmp_path, name):
    run(tmp_path, max_steps=2)
    path = checkpoints(tmp_path)[-1] / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(SystemExit, match=f"error: checkpoint .*damaged \\({name} is not what"):
        run(tmp_path, max_steps=4)
    path.unlink()
    with pytest.raises(SystemExit, match=f"error: checkpoint .*damaged \\({name} is missing"):
        run(tmp_path, max_steps=4)


def test_asking_another_runs_guide_draws_no_numbers_of_the_run(run, tmp_path):
    """Stopped after the guide's answers, before the first checkpoint."""
    run(tmp_path / "scout", max_steps=3)
    guide = {"guide": checkpoints(tmp_path / "scout")[-1], "max_steps": 3}
    whole = run(tmp_path / "run", **guide)
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert same(whole, run(tmp_path / "run", **guide))


def test_a_rate_that_is_too_high_is_told(run, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: step .: the policy's probabilities are no number"):
        run(tmp_path / "sampled", learning_rate=1e30, max_steps=6)
    loss = NPOTrainer._compute_loss
    monkeypatch.setattr(NPOTrainer, "_compute_loss", lambda *a: loss(*a) * float("nan"))
    with pytest.raises(SystemExit, match="error: step 1: the gradient's norm is nan; try a lower"):
        run(tmp_path / "trained", max_steps=2)
    assert not checkpoints(tmp_path / "trained")


def test_answers_that_are_all_masked(run, tmp_path):
    run(tmp_path, mask_truncated_completions=True, max_completion_length=1, max_steps=1)
    assert logged(tmp_path)[0]["loss"] == 0.0


def test_an_own_reward_is_paid(run, tmp_path):
    path, out = tmp_path / "mine.py", tmp_path / "run"
    path.write_text(
        "def paid(prompt, completion):\n    return sum(completion.token_ids) % 97 / 10\n"
    )
    run(out, reward=f"{path}:paid", max_steps=4)
    for line in logged(out):
        assert line["rewards/reward/mean"] == pytest.approx(line["reward"])
    assert len({line["reward"] for line in logged(out)}) == 4
    assert any(line["grad_norm"] > 0 for line in logged(out))


def test_fresh_starts_over(run, tmp_path):
    run(tmp_path / "run", max_steps=1)
    run(tmp_path / "run", max_steps=2, learning_rate=2e-3, fresh=True)
    assert (tmp_path / "run.old").is_dir() and len(logged(tmp_path / "run")) == 2
