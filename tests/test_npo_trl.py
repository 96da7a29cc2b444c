"""The slot inside TRL: npo.py's loss, plain TRL without guides, several processes, resuming."""

import copy
import dataclasses
import json
import math
import statistics
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt")

import trl
from transformers import TrainerCallback

import grpo
import npo
import verifier
from commands import npo_trl
from commands.trl_trainer import NPOConfig, NPOTrainer
from plumbing.encode import config_of
from plumbing.guide_cache import GuideCache
from plumbing.model import Policy, auto_class
from plumbing.rollout import Completion, Group, Prompt
from plumbing.trl_data import load_processor, rewards_of, rows_of
from worlds import cards

FLAGS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 40,
    "learning_rate": 1e-3,
    "temperature": 1.3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_steps": 2,
}
NO_END = 10**9  # as the last guided step: all are guided


def lucky(completions, **_) -> list[float]:
    """Stands in for the accuracy where few answers must hold right and wrong ones."""
    return [float(zlib.crc32(c[0]["content"].encode()) % 3 == 0) for c in completions]


def asked(prompts, pictured: bool) -> list[Prompt]:
    """Eight prompts, with their cards as a picture or in words."""
    some = [prompts[row] for row in range(8)]
    if pictured:
        return some
    in_words = []
    for prompt, hand in zip(some, cards.hands("train")):
        text = f"{cards.question(hand)[:-1]} {' '.join(map(str, hand.digits))}."
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        in_words.append(Prompt(prompt.id, messages, [], prompt.gold))
    return in_words


def another(policy: Policy) -> Policy:
    """A policy that is a little different."""
    noise = torch.manual_seed(4)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    return policy


def guides_for(policy: Policy, some: list[Prompt]) -> GuideCache:
    """An answer to each prompt, taken for right; longer and shorter than what is sampled."""
    answers = {g.prompt.id: g.completions for g in policy.sample(some, 1, 60, 1.6, seed=4)}
    for (guide,) in answers.values():
        guide.source, guide.accuracy, guide.reward, guide.answer = "guide@40", 1.0, 1.0, "7"
    return GuideCache(answers, NO_END)


def trainer_of(
    kind,
    out,
    some,
    reward=lucky,
    callbacks=None,
    guides=None,
    path=cards.BASE,
    prepare=lambda model: model,
    watch=False,
    **flags,
):
    args = NPOConfig(output_dir=str(out), **FLAGS | flags)
    model = auto_class(config_of(path)).from_pretrained(path, dtype=torch.float32)
    if path == cards.BASE:
        model.base_model.visual.requires_grad_(False)
    return kind(
        model=prepare(model),
        args=args,
        reward_funcs=[reward],
        train_dataset=rows_of(some, for_text_model=path != cards.BASE),
        processing_class=load_processor(path),
        callbacks=callbacks,
        **({"guides": guides, "watch": watch} if issubclass(kind, NPOTrainer) else {}),
    )


def batch_of(trainer: NPOTrainer, *places: int) -> dict:
    """Generated and scored: a group of 4 for each of these places in the data set."""
    trainer.model.train()
    torch.manual_seed(1)
    rows = [trainer.train_dataset[place] for place in places for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("pictured", [True, False])
@pytest.mark.parametrize("is_correction", [True, False])
def test_loss_and_gradient_of_a_mixed_batch_are_npos(
    base, fresh, prompts, tmp_path, pictured, is_correction
):
    mine, some = copy.deepcopy(base), asked(prompts, pictured)
    # TRL's distribution: over the vision tokens, too
    mine.sampling_logprobs = lambda logits, temperature: (logits / temperature).log_softmax(dim=-1)
    flags = {"guides": guides_for(another(fresh), some), "is_correction": is_correction}
    check_loss_and_gradient(mine, trainer_of(NPOTrainer, tmp_path, some, gate=0.4, **flags), some)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_of_text_models_too(folder, prompts, tmp_path, name):
    mine, some = Policy(folder(name)), asked(prompts, False)
    flags = {"guides": guides_for(another(Policy(folder(name))), some), "path": folder(name)}
    check_loss_and_gradient(mine, trainer_of(NPOTrainer, tmp_path, some, gate=0.4, **flags), some)


def check_loss_and_gradient(mine: Policy, trainer: NPOTrainer, some: list[Prompt]) -> None:
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_of(trainer, 0, 1)
    assert 0 < len(trainer._taken) < 3 and all(row % 4 == 3 for row in trainer._taken)
    trainer._compute_loss(trainer.model, dict(batch)).backward()

    real = zip(batch["completion_ids"], batch["completion_mask"].bool())
    answers = [ids[mask].tolist() for ids, mask in real]
    encoded = [mine.encode(prompt) for prompt in some[:2]]
    pairs = [(encoded[row // 4], tokens) for row, tokens in enumerate(answers)]
    logprobs, mask = mine.logprobs(pairs, 1.3)
    old = logprobs.detach().clone()
    for row, guide in trainer._taken.items():
        assert answers[row] == guide.token_ids
        if trainer.args.is_correction:
            old[row, : len(guide.token_ids)] = torch.tensor(guide.behavior_logprobs)
    loss, _ = grpo.clipped_policy_loss(logprobs, old, batch["advantages"], mask)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, mine.parameters())])
    theirs = dict(trainer.model.named_parameters())
    names = [name for name, p in mine.model.named_parameters() if p.requires_grad]
    of_trl = torch.cat([theirs[name].grad.flatten() for name in names])
    assert (gradient - of_trl).norm() <= 1e-5 * gradient.norm() and gradient.norm() > 1e-3
    value = trainer._compute_loss(trainer.model, batch_of(trainer, 0, 1)).item()
    assert value == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)


def test_rewards_and_advantages_are_the_mixed_groups(fresh, prompts, tmp_path):
    some = asked(prompts, True)
    guides = guides_for(another(fresh), some)
    texts = {guide.text for (guide,) in guides.answers.values()}
    guides.answers = {some[1].id: guides.answers[some[1].id]}

    def guided(completions, **_) -> list[float]:
        return [float(c[0]["content"] in texts) for c in completions]

    trainer = trainer_of(NPOTrainer, tmp_path, some, guided, guides=guides)
    batch = batch_of(trainer, 0, 1)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    expected = grpo.group_advantages(rewards).flatten().tolist()
    assert batch["advantages"].tolist() == pytest.approx(expected, rel=1e-3)  # std + 1e-4, + 1e-6
    logged = trainer._metrics["train"]
    assert logged["npo/guide_frac"] == [0.5] and logged["accuracy"] == [0.0]
    trainer.guides.until, trainer.state.global_step = 6, 5
    batch_of(trainer, 1)
    assert list(trainer._taken) == [3]
    trainer.state.global_step = 6  # six steps are done: the next one is the seventh
    batch_of(trainer, 1)
    assert not trainer._taken


def test_a_step_without_signal_moves_no_weight(prompts, tmp_path):
    """Rewards of 0.1 each: their mean in fp32 is not 0.1, and AdamW forgets how small that is."""
    some = asked(prompts, True)

    def always(completions, **_) -> list[float]:
        return [0.1] * len(completions)

    moved = {}
    for watch in (False, True):
        trainer = trainer_of(
            NPOTrainer,
            tmp_path,
            some,
            always,
            watch=watch,
            max_steps=2,
            weight_decay=0.0,
            num_generations=7,
            per_device_train_batch_size=7,
            save_strategy="no",
        )
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        now = trainer.model.state_dict()
        moved[watch] = max((now[name] - start[name]).abs().max().item() for name in start)
    assert moved[True] == 0 and moved[False] > 1e-4  # TRL's own


@pytest.mark.parametrize("is_correction", [True, False])
def test_several_updates_on_a_batch(fresh, prompts, tmp_path, is_correction):
    """TRL then computes old log-probs: the guide's answer keeps its own, with IS correction."""
    some = asked(prompts, True)
    guides = guides_for(fresh, some)
    flags = {"num_iterations": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    flags |= {"guides": guides, "is_correction": is_correction, "gate": 1.0}
    trainer = trainer_of(NPOTrainer, tmp_path, some, **flags)
    batch = batch_of(trainer, 1)
    (guide,), old = guides.answers[some[1].id], batch["old_per_token_logps"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    fields = {name: batch[name] for name in names}
    with torch.no_grad():
        own, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, old.shape[1], **fields
        )
    count, real = len(guide.token_ids), batch["completion_mask"].bool()
    expected = torch.tensor(guide.behavior_logprobs) if is_correction else own[3, :count]
    assert torch.allclose(old[3, :count], expected, atol=1e-5) and "guide_logprobs" not in batch
    assert torch.allclose(old[:3][real[:3]], own[:3][real[:3]], atol=1e-5)


def test_an_edited_replace_slot_sees_the_whole_group(fresh, prompts, tmp_path, monkeypatch):
    """Prompts, options, texts; in a batch of a prompt with a picture and one without."""
    messages = asked(prompts, False)[0].messages
    some = [Prompt("words", messages, [], "B", ["41", "55"]), asked(prompts, True)[0]]
    lent, seen = Completion("words", [7, 8, 2], None, "27 \\boxed{55}", True), {}

    def first_slot(group: Group, guide, gate: float) -> Group:
        seen[group.prompt.id] = group
        (first,) = guide or [lent]
        return Group(group.prompt, group.encoded, [first, *group.completions[1:]])

    monkeypatch.setattr(npo, "replace_slot", first_slot)
    guides = guides_for(fresh, some[1:])
    flags = {"guides": guides, "max_completion_length": 28}
    trainer = trainer_of(NPOTrainer, tmp_path, some, rewards_of(named(some), [2])[0], **flags)
    batch = batch_of(trainer, 0, 1)
    assert trainer._taken == {0: lent, 4: guides.answers[some[1].id][0]}
    assert batch["guide_logprobs"][0].isnan().all()  # none recorded: the policy's own are taken
    assert (batch["advantages"][0] > 0).item()  # "55" is option B
    for prompt in some:
        group = seen[prompt.id]
        assert group.prompt.messages == prompt.messages
        assert (group.prompt.gold, group.prompt.choices) == (prompt.gold, prompt.choices)
        assert [i.tobytes() for i in group.prompt.images] == [i.tobytes() for i in prompt.images]
        assert group.encoded.token_ids == fresh.encode(prompt).token_ids
    sampled = zip(batch["completion_ids"], batch["completion_mask"].bool())
    rows = [ids[mask].tolist() for ids, mask in sampled]
    answers = [answer for prompt in some for answer in seen[prompt.id].completions]
    answers[0::4] = [lent, trainer._taken[4]]
    assert [answer.token_ids for answer in answers] == rows
    del answers[0::4]
    for answer in answers:
        assert answer.text == fresh.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.finished is (answer.token_ids[-1] == 2)
        assert answer.reward == answer.accuracy  # this trainer's only reward
    assert {answer.finished for answer in answers} == {True, False}


def named(some: list[Prompt]):
    return {prompt.id: prompt for prompt in some}.__getitem__


def test_rewards_are_the_verifiers(monkeypatch):
    """An option's letter is right, a cut answer is not; an edited reward sees all of the answer,
    and the data set's row; each answer is paid once."""
    said = "\\boxed{A}", "\\boxed{55}", "\\boxed{55}", "55"
    columns = {
        "prompts": [[{"role": "user", "content": "Start at 27."}]] * 4,
        "completions": [[{"role": "assistant", "content": text}] for text in said],
        "completion_ids": [[7, 2], [7, 8, 5], [7, 8], [7, 2]],
        "prompt_id": ["p"] * 4,
        "trainer_state": None,  # TRL gives more than columns
    }
    options = ["41", "55"]
    prompt = Prompt("p", [], [], "B", options, row={"level": 3})
    accuracy, reward = rewards_of(named([prompt]), [2, 5])
    assert accuracy(**columns) == [0.0, 1.0, 0.0, 0.0]
    assert reward(**columns) == pytest.approx([0.1, 1.0, 0.0, 0.0])
    accuracy, reward = rewards_of(named([dataclasses.replace(prompt, gold="A")]), [2])
    assert accuracy(**columns) == [1.0, 0.0, 0.0, 0.0]
    paid = []

    def edited(prompt, completion) -> float:
        completion.accuracy = float(completion.text == "55")
        paid.append(completion.text)
        return len(completion.token_ids) + prompt.row["level"] / 4

    monkeypatch.setattr(verifier, "reward", edited)
    accuracy, reward = rewards_of(named([prompt]), [2])
    assert accuracy(**columns) == [0.0, 0.0, 0.0, 1.0]
    columns["completion_ids"][1] = [7, 9, 6, 2]  # the guide's, which takes a slot
    assert reward(**columns) == [2.75, 4.75, 2.75, 2.75] and len(paid) == 5
    assert accuracy(**columns) == [0.0, 0.0, 0.0, 1.0] and len(paid) == 5


def test_the_processor_encodes_as_the_policy_does(base):
    """Pictures of several sizes, none, and two in one prompt, padded on the left."""
    wide, high = (Image.new("RGB", size, "#b3202c") for size in ((160, 64), (64, 224)))
    some = []
    for images in ([wide], [], [high, wide]):
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "Start at 27."}]
        some.append(Prompt("p", [{"role": "user", "content": parts}], images, "27"))
    processor = load_processor(cards.BASE)
    texts = [processor.apply_chat_template(p.messages, add_generation_prompt=True) for p in some]
    images = [prompt.images or None for prompt in some]
    found = processor(images=images, text=texts, padding=True, return_tensors="pt")
    encoded = [base.encode(prompt) for prompt in some]
    pixels = torch.cat([one.pixel_values for one in encoded if one.pixel_values is not None])
    assert torch.equal(found["pixel_values"], pixels)
    ids, masks = found["input_ids"], found["attention_mask"].bool()
    assert torch.equal(found["mm_token_type_ids"], (ids == base.image_token_id).long())
    for one, row, mask in zip(encoded, ids, masks):
        assert row[mask].tolist() == one.token_ids and mask[-len(one.token_ids) :].all()


def test_without_guides_it_is_trl_bit_by_bit(fresh, prompts, tmp_path):
    some = asked(prompts, True)
    (guide,) = guides_for(fresh, some[:1]).answers.values()
    nobodys = GuideCache({"another prompt": guide}, NO_END)
    kinds = {
        "trl": (trl.GRPOTrainer, None),
        "none": (NPOTrainer, None),
        "no": (NPOTrainer, nobodys),
    }
    found = {}
    for name, (kind, guides) in kinds.items():
        trainer = trainer_of(kind, tmp_path / name, some, guides=guides, max_steps=3)
        trainer.train()
        found[name] = trainer.model.state_dict()
    start = load_file(cards.BASE / "model.safetensors")
    assert any(not torch.equal(found["trl"][name], start[name]) for name in start)
    for name in ("none", "no"):
        assert all(torch.equal(found[name][key], value) for key, value in found["trl"].items())


def test_resumed_through_trl_is_the_same_run(base, prompts, tmp_path):
    some = asked(prompts, True)
    flags = {"guides": guides_for(base, some), "max_steps": 4}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    whole = trainer_of(NPOTrainer, tmp_path / "whole", some, **flags)
    whole.train()
    trainer_of(NPOTrainer, tmp_path / "parts", some, callbacks=[Stop()], **flags).train()
    resumed = trainer_of(NPOTrainer, tmp_path / "parts", some, **flags)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def words(out: Path, **flags) -> list[str]:
    flags = FLAGS | {"max_steps": 2, "output_dir": out} | flags
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["npo_trl.py", *arguments])
    npo_trl.main()


def test_the_command_takes_a_plain_checkpoint_as_guide_and_goes_on(
    command, monkeypatch, capsys, tmp_path
):
    # the teacher's answers are longer
    flags = words(tmp_path, max_completion_length=80, guide_samples=2)
    done = command("-m", "commands.npo_trl", *flags, "--guide", cards.TEACHER)
    cache = tmp_path / "guide.jsonl"
    assert "guide@0 solved" in done.stdout and len(cache.read_text().splitlines()) == 1 + 4
    assert "'loss'" in done.stdout and "'npo/guide_frac': '1'" in done.stdout
    Policy(tmp_path / "checkpoints/step_000002")  # can be a guide, or be evaluated
    more = "--guide", cards.TEACHER, "--max_steps", "4", "--guided_until", "3"
    with pytest.raises(SystemExit, match="holds a run with another configuration"):
        main(monkeypatch, *flags, *map(str, more))
    main(monkeypatch, *flags, *map(str, more[:4]))
    assert "to step 4" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/step_000004/model.safetensors").is_file()


def test_the_command_takes_a_text_model(monkeypatch, folder, tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = words(tmp_path / "out", max_completion_length=8, scout_steps=1, guide_samples=2)
    flags += ["--model", str(folder("gemma3")), "--intervention", "early"]
    main(monkeypatch, *flags, "--dataset", str(path))
    Policy(tmp_path / "out/checkpoints/step_000002")


def test_help_explains(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "a slot is replaced if the pass-rate is at most this" in text
    assert "answers to a prompt; not in our sources" in text
    assert "step to go back to" in text and "steps without a gain" in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_generate", None, "has no GRPOTrainer._generate"),
        ("_generate", lambda self, inputs: None, "GRPOTrainer._generate takes self, inputs, not"),
        ("__init__", lambda self, model, args: None, "GRPOTrainer takes no peft_config"),
    ],
)
def test_another_trl_is_one_sentence(monkeypatch, name, value, message):
    if value is None:
        monkeypatch.delattr(trl.GRPOTrainer, name)
    else:
        monkeypatch.setattr(trl.GRPOTrainer, name, value)
    with pytest.raises(ImportError, match=f"{message}.*tested with TRL 1.16 .with accelerate 1.15"):
        NPOTrainer()


def test_the_command_says_so_too(monkeypatch, tmp_path):
    monkeypatch.delattr(trl.GRPOTrainer, "_generate")
    with pytest.raises(SystemExit, match="^error: TRL .* has no GRPOTrainer._generate"):
        main(monkeypatch, *words(tmp_path))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="^error: --lora 2: needs peft"):
        main(monkeypatch, *words(tmp_path, lora=2))


def test_another_shape_is_one_sentence_too(prompts, tmp_path, monkeypatch):
    trainer = trainer_of(NPOTrainer, tmp_path, asked(prompts, False)[:2])
    original = trl.GRPOTrainer._generate
    monkeypatch.setattr(trl.GRPOTrainer, "_generate", lambda *a: original(*a)[:7])
    with pytest.raises(ImportError, match="GRPOTrainer._generate returns 7 values, not 8"):
        batch_of(trainer, 0)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_vllms_metrics_are_of_the_policys_own_rows(fresh, prompts, tmp_path, monkeypatch, mode):
    """What vLLM recorded is made up: half a nat below the trainer's, and for one row 2 above."""
    some = asked(prompts, True)
    guides = guides_for(another(fresh), some)
    trainer = trainer_of(NPOTrainer, tmp_path, some, guides=guides, gate=1.0)
    original = trl.GRPOTrainer._generate_single_turn

    def as_vllm(self, *args):
        self.use_vllm = False
        ids, _ = original(self, *args)
        self.use_vllm = True
        return ids, [[-0.5 if row else 2.0] * len(one) for row, one in enumerate(ids)]

    def zero(self, model, input_ids, *args, **options):
        return torch.zeros(input_ids.shape[0], args[1]), None, None

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", as_vllm)
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", zero)
    trainer.use_vllm, trainer.vllm_importance_sampling_clip_max = True, 3.0
    trainer.vllm_importance_sampling_mode = mode
    batch = batch_of(trainer, 0)
    (guide,) = guides.answers[some[0].id]
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(2.0)
    counts = batch["completion_mask"].sum(dim=1).tolist()[:3]
    mean = (2.0 * counts[0] + 0.5 * sum(counts[1:])) / sum(counts)
    assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(mean)
    ratios = [math.exp(-2.0)] * counts[0] + [math.exp(0.5)] * sum(counts[1:])
    if mode == "sequence_truncate":
        ratios = [math.exp(-2.0 * counts[0]), *(min(3, math.exp(0.5 * n)) for n in counts[1:])]
    of_ratio = [logged[f"sampling/importance_sampling_ratio/{n}"] for n in ("min", "mean", "max")]
    assert of_ratio == pytest.approx([min(ratios), statistics.fmean(ratios), max(ratios)])
    assert (batch["importance_sampling_ratio"][3] == 1).all() and trainer._taken == {3: guide}
    width = len(guide.token_ids)
    for name in ("old_per_token_logps", "sampling_per_token_logps"):
        assert batch[name][3, :width].tolist() == pytest.approx(guide.behavior_logprobs)
