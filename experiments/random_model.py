"""A model of a public size with random weights, to measure time and memory without a download.

    python -m experiments.random_model 2b runs/random-2b

writes a `save_pretrained` folder with the shapes of Qwen3-VL-2B, and 64 pictured questions, and
prints the ordinary command that runs on them. Its log has the seconds of every step; on a GPU it
also tells the memory of its longest micro-batch.

- Weights: bf16, normal with std 0.02. Each of 151,936 tokens is about as likely as any other.
- Tokenizer: that of the cards world, filled up to Qwen's vocabulary. It does not know most words of
  a question, so a question is a few tokens and the 196 of its picture of 448 x 448 pixels.
- Answers are noise, but groups have signal: one token in ten reads as a box, and half of the boxes
  are right, so about half of the answers are. One token in LENGTH ends an answer.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from plumbing.checkpoints import SHARD
from plumbing.encode import VISION_TOKENS
from worlds import cards

VOCABULARY, QUESTIONS, PIXELS, BOX_EVERY = 151_936, 64, 448, 10
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOWER = ("hidden_size", "intermediate_size", "depth", "num_heads", "deepstack_visual_indexes")
SMALL_TOWER, LARGE_TOWER = (1024, 4096, 24, 16, (5, 11, 17)), (1152, 4304, 27, 16, (8, 16, 24))
SIZES = {  # from the config.json of Qwen3-VL-*-Instruct: TEXT, TOWER, tied embeddings
    "8b": ((4096, 12288, 36, 32), LARGE_TOWER, False),
    "4b": ((2560, 9728, 36, 32), SMALL_TOWER, True),
    "2b": ((2048, 6144, 28, 16), SMALL_TOWER, True),
    "tiny": ((64, 96, 2, 8), (64, 96, 2, 2, (0,)), False),  # for tests
}


def config_of(size: str) -> Qwen3VLConfig:
    """A public size's configuration, with the token ids of the cards world."""
    text, tower, tied = SIZES[size]
    text, tower = dict(zip(TEXT, text)), dict(zip(TOWER, tower))
    tower["out_hidden_size"] = text["hidden_size"]
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY}
    text |= {"max_position_embeddings": 262_144}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text |= {"rope_parameters": rope | {"mrope_section": [24, 20, 20]}}
    base = Qwen3VLConfig.from_pretrained(cards.BASE)
    text |= {name: getattr(base.text_config, name) for name in ("eos_token_id", "pad_token_id")}
    ids = {name: getattr(base, name) for name in VISION_TOKENS}
    return Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **ids)


def write_parts(out: Path) -> None:
    """The cards world's tokenizer with a full vocabulary, and its processors for real pictures."""
    shutil.copytree(cards.BASE, out, ignore=shutil.ignore_patterns("README.md", "*.safetensors"))
    path = out / "tokenizer.json"
    stored = json.loads(path.read_text())
    words = stored["model"]["vocab"]
    for id in range(len(words), VOCABULARY):
        box = "" if id % BOX_EVERY else f" \\boxed{{{id // BOX_EVERY % 2}}}"
        words[f" {id}{box}"] = id
    path.write_text(json.dumps(stored))
    for path in out.glob("*preprocessor_config.json"):  # Qwen3-VL's own limits, in pixels
        size = {"shortest_edge": 1 << 16, "longest_edge": 1 << 24}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"size": size}))


def write_questions(out: Path) -> None:
    with open(out / "questions.jsonl", "w") as file:
        for number, hand in enumerate(cards.hands("train")[:QUESTIONS]):
            picture = f"{number}.png"  # a path from the data file's folder on
            cards.draw(hand).resize((PIXELS, PIXELS)).save(out / picture)
            row = {"problem": cards.question(hand), "images": [picture], "answer": "1"}
            file.write(json.dumps(row) + "\n")


def main(
    size: tyro.conf.Positional[Literal["2b", "4b", "8b", "tiny"]],
    out: tyro.conf.Positional[Path],
    length: int = 2000,
) -> None:
    """Writes a model with random weights, and questions to ask it.

    Args:
        size: Whose shapes.
        out: The folder; it must not exist yet.
        length: Mean number of tokens in an answer, if --max-new-tokens allows it.
    """
    if out.exists():
        raise SystemExit(f"error: {out} exists; remove it, or choose another folder")
    write_parts(out)
    write_questions(out)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # on a CPU it takes minutes
        model = AutoModelForImageTextToText.from_config(config_of(size), dtype=torch.bfloat16)
    stop = range(VOCABULARY - round(VOCABULARY / length), VOCABULARY)
    model.generation_config.eos_token_id = [model.config.text_config.eos_token_id, *stop]
    model.save_pretrained(out, max_shard_size=SHARD)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters. Measure with\n")
    print(f"    python npo.py --model {out} --dataset {out}/questions.jsonl --out {out}-npo \\")
    short = " --max-new-tokens 48" * (size == "tiny")  # on a CPU
    print(f"        --steps 4 --scout-steps 2 --eval-prompts 16 --eval-every 100{short}")


if __name__ == "__main__":
    tyro.cli(main)
