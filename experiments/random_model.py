"""A model of a public size with random weights, to measure time and memory without a download.

    python -m experiments.random_model 2B runs/random-2B

writes a `save_pretrained` folder with the shapes of Qwen3-VL-2B, and 64 pictured questions. It
prints the ordinary command to run on them. Seconds per step are in the lines of that command, and in
its metrics.jsonl; on a GPU it also begins by telling the memory of its longest micro-batch.

- Weights: bf16, normal with std 0.02, so that a token is one of 151,936 about alike.
- Tokenizer: that of the cards world, filled up to Qwen's vocabulary. Questions are read as few
  tokens (most words are unknown to it), pictures as the 196 tokens of 448 x 448 pixels.
- Answers are noise, but groups have signal. Every tenth token reads as a box, and half of the boxes
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
SMALL_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24}
SMALL_TOWER |= {"deepstack_visual_indexes": [5, 11, 17]}
LARGE_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27}
LARGE_TOWER |= {"deepstack_visual_indexes": [8, 16, 24]}
TINY_TOWER = {"hidden_size": 64, "intermediate_size": 96, "depth": 2, "num_heads": 2}
TINY_TOWER |= {"deepstack_visual_indexes": [0]}
SIZES = {  # of Qwen3-VL-*-Instruct: width, MLP, layers, query heads, tied embeddings, vision tower
    "8B": (4096, 12288, 36, 32, False, LARGE_TOWER),
    "4B": (2560, 9728, 36, 32, True, SMALL_TOWER),
    "2B": (2048, 6144, 28, 16, True, SMALL_TOWER),
    "tiny": (64, 96, 2, 8, False, TINY_TOWER),  # for tests
}


def config_of(size: str) -> Qwen3VLConfig:
    """A public size's configuration, with the cards world's special tokens."""
    hidden, mlp, layers, heads, tied, tower = SIZES[size]
    base = Qwen3VLConfig.from_pretrained(cards.BASE)
    text = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": 262_144}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text |= {"rope_parameters": rope | {"mrope_section": [24, 20, 20]}}
    text |= {name: getattr(base.text_config, name) for name in ("eos_token_id", "pad_token_id")}
    ids = {name: getattr(base, name) for name in VISION_TOKENS}
    tower = tower | {"out_hidden_size": hidden}
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


def write_questions(path: Path) -> None:
    import datasets

    image = datasets.List(datasets.Image())
    kinds = datasets.Features(
        images=image, problem=datasets.Value("string"), answer=datasets.Value("string")
    )
    rows = [
        {
            "images": [cards.draw(hand).resize((PIXELS, PIXELS))],
            "problem": cards.question(hand),
            "answer": "1",
        }
        for hand in cards.hands("train")[:QUESTIONS]
    ]
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(path)


def main(
    size: tyro.conf.Positional[Literal["2B", "4B", "8B", "tiny"]],
    out: tyro.conf.Positional[Path],
    length: int = 2000,
) -> None:
    """Writes a model with random weights and questions to ask it.

    Args:
        size: Whose shapes.
        out: The folder; it must not exist yet.
        length: Mean tokens of an answer.
    """
    if out.exists():
        raise SystemExit(f"error: {out} exists; remove it, or choose another folder")
    write_parts(out)
    write_questions(out / "questions.parquet")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # the 8B: minutes on a CPU
        model = AutoModelForImageTextToText.from_config(config_of(size), dtype=torch.bfloat16)
    stop = range(VOCABULARY - round(VOCABULARY / length), VOCABULARY)
    model.generation_config.eos_token_id = [model.config.text_config.eos_token_id, *stop]
    model.save_pretrained(out, max_shard_size=SHARD)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters. Measure with\n")
    print(f"    python npo.py --model {out} --dataset {out}/questions.parquet --out {out}-npo \\")
    print("        --steps 4 --scout-steps 2 --eval-prompts 16 --eval-every 100")


if __name__ == "__main__":
    tyro.cli(main)
