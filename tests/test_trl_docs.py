"""The listing of docs/trl.md, as a reader would run it."""

import re

import pytest
import torch
from conftest import ROOT

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt")

import trl
from test_npo_trl import asked, guides_for, lucky, trainer_of

from commands.trl_trainer import NPOTrainer
from plumbing.model import Policy
from plumbing.trl_data import prompt_of


def test_public_hooks_do_what_the_trainer_does(prompts, tmp_path, folder):
    text = (ROOT / "docs/trl.md").read_text()
    (listing,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    written, path = {}, folder("qwen3")
    exec(listing, written)
    some = asked(prompts, False)
    guides = guides_for(Policy(path), some)
    options = {"path": path, "max_steps": 3, "gate": 0.5, "temperature": 0.9}
    mine = trainer_of(
        NPOTrainer, tmp_path / "1", some, guides=guides, is_correction=False, **options
    )
    told = {prompt.id: guides.answers[prompt.id][0].token_ids for prompt in some}
    guide = {row["prompt"][-1]["content"]: told[row["prompt_id"]] for row in mine.train_dataset}
    seen = []

    def is_right(question, text):
        seen.append(lucky([[{"content": text}]])[0])
        return seen[-1]

    theirs = trainer_of(trl.GRPOTrainer, tmp_path / "2", some, **options)
    theirs.rollout_func = written["rollout_with"](guide, is_right, gate=0.5)
    start = {name: value.clone() for name, value in mine.model.state_dict().items()}
    for trainer in (mine, theirs):
        torch.manual_seed(3)
        trainer.train()
    found, other = mine.model.state_dict(), theirs.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in found.items())
    assert any(not torch.equal(value, start[name]) for name, value in found.items())
    fractions = [line.get("npo/guide_frac") for line in mine.state.log_history[:3]]
    assert 0 < sum(fractions) < 3 and len({*seen}) == 2 and prompt_of(mine.train_dataset[0]).gold
