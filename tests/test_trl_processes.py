"""TRL on several processes (gloo): npo.py's loss and gradient, one decision, kill -9 of ranks."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lucky
from safetensors.torch import load_file

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt")

from test_npo_trl import another, asked, guides_for
from test_trl_method import AUTO, EARLY, FLAGS, words_of

import grpo
import npo
import verifier
from plumbing.checkpoints import checkpoints
from plumbing.guide_cache import GuideCache
from plumbing.model import Policy
from worlds import cards

pytestmark = pytest.mark.slow
PATIENCE = 300  # seconds; a launch takes some 20
SETUP = f"""
import faulthandler, gc, json, os, signal, sys
faulthandler.dump_traceback_later({PATIENCE}, exit=True)
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
"""


LAUNCHER = """-m accelerate.commands.launch --config_file experiments/accelerate/two_cpus.yaml
    --main_process_port 0 --num_processes"""


def launch(script: Path, count: int, *words, check: bool = True, **more) -> str:
    """Runs a script on so many processes. Returns what it printed.

    To a file, not to a pipe: a process that outlives a kill of its launcher would keep a pipe open.
    A launch that hangs is ended and fails, and shows where it hung.
    """
    line = [sys.executable]
    if count > 1:
        line += LAUNCHER.split()
        line.append(str(count))
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    environment = os.environ | environment | more
    line += [str(script), *map(str, words)]
    with tempfile.TemporaryFile("w+") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(line, env=environment, cwd=ROOT, **streams)
        try:
            process.wait(PATIENCE + 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            process.wait()
        file.seek(0)
        told = file.read()
    hung = "Timeout (0:" in told or process.returncode == -signal.SIGABRT
    assert not hung, told[-6000:]
    if check is not None:
        assert (process.returncode == 0) == check, told[-3000:]
    return told


# ------------------------------------------------------------- one batch: loss and gradient, fp64

ONE_BATCH = """
import test_npo_trl as t
import transformers
from accelerate import PartialState
import trl
from plumbing.data import load_prompts
from plumbing.settings import RunConfig

torch.set_default_dtype(torch.float64)  # of TRL's rewards, too


class Exact:  # in place of TRL's kernel, which adds up in fp32 whatever the weights are
    def apply(hidden, weight, bias, targets, temperature, *_):
        logprobs = (hidden @ weight.t() / temperature).log_softmax(dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy, None, None, None


trl.trainer.utils._ChunkedLogProbFunction = Exact
out, sharded, rows, shuffled = sys.argv[1], sys.argv[2] == "shard", int(sys.argv[3]), sys.argv[4]
some = t.asked(load_prompts(RunConfig())[0], True)
groups, guides, places = torch.load(out + "/answers.pt", weights_only=False)
losses, gradient, asked = [], {}, []


class Scripted(t.NPOTrainer):
    def _generate_single_turn(self, prompt_ids, *_):
        first = self.accelerator.process_index * len(prompt_ids)
        slots = [(row["prompt_id"], (first + i) % 4) for i, row in enumerate(self._asked)]
        asked.extend(slots)
        return [groups[id].completions[slot].token_ids for id, slot in slots], None

    def _compute_loss(self, *args):
        loss = super()._compute_loss(*args)
        losses.append(self.accelerator.gather(loss.detach()).mean().item())
        return loss


class Keep(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        for name, p in model.named_parameters():
            if p.grad is not None:
                full = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                gradient[name] = full.clone()


def double(model):
    model = model.double()
    if sharded:
        from torch.distributed.fsdp import fully_shard
        for layer in model.base_model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        type(model).is_distributed_loading_by_transformers = True  # no DDP around it
    return model


t.double = double
trainer = t.trainer_of(
    Scripted, out, [some[place] for place in places], prepare=double, callbacks=[Keep()],
    guides=guides, per_device_train_batch_size=rows, max_steps=1, gate=0.4, max_grad_norm=0.0,
    save_strategy="no", shuffle_dataset=shuffled == "shuffled", seed=5, learning_rate=0.0,
)
trainer.train()
kind = type(trainer.model_wrapped).__name__
ids = trainer.accelerator.gather_for_metrics(asked, use_gather_object=True)
if trainer.accelerator.is_main_process:
    taken = [sum(c.source != "policy" for c in mixed.completions) for _, mixed in trainer.groups]
    names = [own.prompt.id for own, _ in trainer.groups]
    torch.save((losses, gradient, kind, ids, taken, names), out + "/found.pt")
trainer.accelerator.wait_for_everyone()
del trainer  # as in npo_trl.run_method
gc.collect()
PartialState().destroy_process_group()
"""
CASES = {  # places in the data set, prompts with a guide, prompts whose answers are all alike
    "plain": ([0, 1, 2, 3], [0, 1, 2, 3], []),
    "three groups, so one spans the processes": ([0, 1, 2], [0, 1, 2], []),
    "a rank without any guide": ([2, 4, 0, 1], [2, 4], []),
    "a rank without signal": ([2, 4, 0, 1], [2, 4], [0, 1]),
    "shuffled": ([0, 1, 2, 3], [0, 2, 3], []),
}


class Recorder:
    """In an optimizer's place: keeps the gradient."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def step(self):
        named = self.policy.model.named_parameters()
        self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def zero_grad(self):
        pass


def by_npo(groups: dict, guides: GuideCache, ids: list[str]) -> tuple[float, dict, list]:
    """npo.py's loss and gradient, with TRL's 1e-4 beside the standard deviation."""
    policy = Policy(cards.BASE, dtype="fp64")
    # TRL's distribution: over the vision tokens, too
    policy.sampling_logprobs = lambda logits, temperature: (logits / temperature).log_softmax(-1)

    def advantages(rewards):
        rewards = rewards.double()
        spread = rewards.std(dim=1, keepdim=True) + 1e-4
        return (rewards - rewards.mean(dim=1, keepdim=True)) / spread

    mixed = []
    for id in ids:
        group = groups[id]
        group.encoded = policy.encode(group.prompt)
        mixed.append(npo.replace_slot(group, guides.answers.get(id, []), 0.4))
    config = grpo.GRPOConfig(temperature=1.3, max_grad_norm=1e9, micro_batch_size=5, group_size=4)
    recorder = Recorder(policy)
    stats = grpo.update(policy, recorder, mixed, config, advantages_of=advantages)
    taken = [sum(c.source != "policy" for c in group.completions) for group in mixed]
    return stats["loss"], recorder.gradient, taken


@pytest.fixture
def recorded(fresh, prompts, tmp_path, request):
    """Answers of another policy, and its guide's, with log-probs in fp64."""
    places, with_guide, alike = CASES[request.param]
    some, other = asked(prompts, True), another(fresh)
    groups = {g.prompt.id: g for g in other.sample(some, 4, 40, 1.6, seed=9)}
    for place in alike:
        group = groups[some[place].id]
        group.completions = [group.completions[0]] * 4
    for group in groups.values():
        for answer in group.completions:
            answer.behavior_logprobs = None  # the ratio starts at 1, as in TRL
            answer.accuracy = answer.reward = float(lucky(answer.text, ""))
    guides = guides_for(other, some)
    for answers in guides.answers.values():
        for answer in answers:
            answer.accuracy = answer.reward = float(lucky(answer.text, ""))
    guides.answers = {some[place].id: guides.answers[some[place].id] for place in with_guide}
    torch.save((groups, guides, places), tmp_path / "answers.pt")
    return groups, guides, places


@pytest.mark.parametrize(
    ("recorded", "count", "kind"),
    [
        ("plain", 1, "ddp"),
        ("plain", 2, "ddp"),
        ("plain", 4, "ddp"),
        ("plain", 2, "shard"),
        *((case, 2, "ddp") for case in [*CASES][1:]),
    ],
    indirect=["recorded"],
)
def test_loss_and_gradient_are_npos(recorded, count, kind, tmp_path, monkeypatch, request):
    groups, guides, places = recorded
    monkeypatch.setattr(verifier, "set_reward", lambda prompt, completion: None)
    script = tmp_path / "script.py"
    script.write_text(SETUP + ONE_BATCH)
    case = request.node.callspec.id
    shuffled = "shuffled" if "shuffled" in case else "in order"
    launch(script, count, tmp_path, kind, 4 * len(places) // count, shuffled)
    losses, gradient, wrapped, ids, taken, names = torch.load(
        tmp_path / "found.pt", weights_only=False
    )
    expected_class = {"ddp": "DistributedDataParallel", "shard": "FSDPQwen3VL"}[kind]
    assert wrapped.startswith(expected_class if count > 1 else "Qwen3VL")
    loss, expected, npos = by_npo(groups, guides, names)
    assert taken == npos and sum(taken) and len(names) == len(places)
    if shuffled == "shuffled":
        assert names != [groups_id for groups_id in groups][: len(places)]
    assert losses[0] == pytest.approx(loss, rel=1e-6)
    names = sorted(name for name in expected if expected[name].abs().max() > 0)
    mine = torch.cat([expected[name].flatten() for name in names])
    trls = torch.cat([gradient[name].flatten() for name in names])
    assert mine.norm() > 1e-3 and ((mine - trls).norm() / mine.norm()).item() < 1e-6


# ------------------------------------------------------- AutoNPO: one decision; kills of processes

METHOD = """
import zlib
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel
import autonpo, verifier
from conftest import lucky
from commands import npo_trl
from commands.trl_trainer import NPOTrainer
from plumbing import trl_run

verifier.is_correct = lucky
autonpo.EMA_STEPS, autonpo.MIN_SLICE = 2, 1
rank, seen = os.environ.get("RANK", "0"), []
pool = json.loads(os.environ.get("ANSWERS", "[]"))
owners = {"trainer": NPOTrainer, "engine": trl_run.Engine, "run": trl_run.TRLRun}


def scripted(self, prompt_ids, images, fields, count):
    first, found = self.accelerator.process_index * len(prompt_ids), []
    for place, ids in enumerate(prompt_ids, first):
        key = f"{self.state.global_step} {place % count} {ids}"
        found.append(pool[zlib.crc32(key.encode()) % len(pool)])
    return found, None


def remembers(original):
    def on_step_end(self, *args, **options):
        result = original(self, *args, **options)
        seen.append([self.rollbacks, args[1].global_step, self.memory])
        return result
    return on_step_end


def tells(original):
    def log(self, line):
        seen.append(line)
        original(self, line)
    return log


def dies(original, call, calls=[]):
    def killed(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    return killed


if pool:
    NPOTrainer._generate_single_turn = scripted
trl_run.TRLRun.on_step_end = remembers(trl_run.TRLRun.on_step_end)
trl_run.TRLRun.log = tells(trl_run.TRLRun.log)
destroy = PartialState.destroy_process_group


def destroyed_last(self, group=None):
    assert not [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
    return destroy(self, group)


PartialState.destroy_process_group = destroyed_last  # by a last holder, it may hang
owner, name, call, whom = os.environ.get("KILL", "run log 0 none").split()
if whom in (rank, "all"):
    setattr(owners[owner], name, dies(getattr(owners[owner], name), int(call)))
npo_trl.main()
if "SEEN" in os.environ:
    open(os.environ["SEEN"] + rank, "w").write(json.dumps(seen))
"""


@pytest.fixture
def method(tiny, tmp_path, fresh, prompts):
    """Runs the command on so many processes; returns the weights it ends with."""
    script = tmp_path / "method.py"
    script.write_text(SETUP + METHOD)
    other = another(fresh)
    other.eos_token_ids = [2, 7, 12]  # as in `tiny`
    groups = other.sample([prompts[row] for row in range(12)], 4, 14, 2.5, seed=3)
    answers = [c.token_ids for group in groups for c in group.completions if c.finished]
    assert len(answers) > 20
    answers = json.dumps(answers)

    def run(out: Path, count: int, flags: dict, check: bool = True, **environment):
        rows = FLAGS["per_device_train_batch_size"] // count
        given = {"model": tiny["model"], "per_device_train_batch_size": rows, "output_dir": out}
        words = words_of(given | flags)
        if "auto" in flags:
            environment["ANSWERS"] = answers
        told = launch(script, count, *words, check=check, **environment)
        newest = checkpoints(out)[-1] / "model.safetensors" if checkpoints(out) else None
        return load_file(newest) if check else told

    return run


def test_one_decision_for_all_and_as_on_one_process(method, tmp_path):
    for count in (1, 2):
        method(tmp_path / str(count), count, AUTO, SEEN=str(tmp_path / f"seen_{count}_"))
    one = json.loads((tmp_path / "seen_1_0").read_text())
    two = json.loads((tmp_path / "seen_2_0").read_text())
    assert two == json.loads((tmp_path / "seen_2_1").read_text())  # every rank the same
    made = [line for line in two if "autonpo/distance" in line]
    assert any(line["autonpo/distance"] for line in made) and two[-1][0] >= 1
    assert len(one) == len(two)
    for mine, theirs in zip(one, two):
        if isinstance(mine, list):
            assert mine[:2] == theirs[:2] and mine[2]["pool"] == theirs[2]["pool"]
            numbers = [m[2]["monitor"] for m in (mine, theirs)]
            past = [monitor.pop("entropies") for monitor in numbers]
            assert past[0] == pytest.approx(past[1], rel=1e-3)
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
        else:
            words = "autonpo/distance", "autonpo/probed", "autonpo/pass_rate", "autonpo/decision"
            assert [mine[word] for word in words] == [theirs[word] for word in words]
            for row, other in zip(mine["autonpo/table"], theirs["autonpo/table"], strict=True):
                assert row == pytest.approx(other, rel=1e-3)


KILLS = {  # once, each of scout, cache, replay, probe, rollback went with one killed and with all
    "all in the cache": (EARLY, "engine sample 2 all"),
    "one in the rollback": (AUTO, "run roll_back 1 1"),
}


@pytest.fixture(scope="module")
def whole():
    return {}


@pytest.mark.parametrize(("flags", "kill"), KILLS.values(), ids=KILLS)
def test_kill_9_of_one_and_of_all(method, whole, tmp_path, flags, kill):
    kind = "auto" in flags
    if kind not in whole:
        whole[kind] = method(tmp_path / "whole", 2, flags)
    told = method(tmp_path / "parts", 2, flags, check=False, KILL=kill)
    assert "SIGKILL" in told, told[-3000:]
    found = method(tmp_path / "parts", 2, flags)
    assert all(torch.equal(value, found[name]) for name, value in whole[kind].items())


def test_an_fsdp2_configuration_is_told_to_be_ddp_here(method, tmp_path):
    """accelerate makes DDP of it on CPUs; the first line says which class is trained."""
    told = method(tmp_path / "fsdp", 2, {"max_steps": 1}, check=None, ACCELERATE_USE_FSDP="true")
    line = next(line for line in told.splitlines() if str(tmp_path / "fsdp") in line)
    assert "MULTI_CPU x 2, DistributedDataParallel (not the FSDP of the configuration" in line


def test_a_mistake_ends_in_one_line_on_all_processes(method, tmp_path):
    told = method(tmp_path / "out", 2, {"max_steps": 2, "guide": "nowhere"}, check=False)
    assert told.count("error: --guide nowhere: is no guide") == 1
    reward = tmp_path / "mine.py"  # of the second process's answers alone
    reward.write_text(
        "import os\ndef paid(prompt, completion):\n"
        "    return None if os.environ['RANK'] == '1' else 0.5\n"
    )
    told = method(tmp_path / "paid", 2, {"max_steps": 2, "reward": f"{reward}:paid"}, check=False)
    assert told.count("the reward is None; it must be a finite number") == 1
