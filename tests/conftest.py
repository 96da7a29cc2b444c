"""What tests share: the tiny base, prompts, made-up groups, a verifier that is easy to please."""

import copy
import json
import os
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that pytest -n can use all cores

import torch
import transformers

from plumbing import data
from plumbing.checkpoints import make_optimizer, save_checkpoint
from plumbing.encode import load_tokenizer
from plumbing.model import Policy
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt
from plumbing.settings import RunConfig
from worlds import cards

ROOT = Path(__file__).parent.parent

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WINDOW = {"sliding_window": 8, "query_pre_attn_scalar": 16}
CAPS = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
TEXT_MODELS = {  # name: its class of transformers, and what is its own
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {}),
    "gemma3": ("Gemma3TextConfig", WINDOW | LAYERS),
    "gemma2": ("Gemma2Config", WINDOW | CAPS),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
}
QUESTIONS = [
    "Start at 12 and add 8 5 3 9",
    "4 +8= 3",
    "27 +8= 35 +5= 40 +9= 49 and add the cards 1 2 3 4 5 6 7",
]
# A run of seconds: fields of a configuration, the same as flags, and with fields that let it learn
SIZES = {
    "prompts_per_step": 2,
    "group_size": 4,
    "eval_prompts": 4,
    "eval_samples": 1,
    "eval_every": 2,
    "save_every": 2,
    "max_new_tokens": 40,
    "micro_batch_size": 8,
}
SMALL = [word for name, n in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(n))]
TINY = SIZES | {"lr": 1e-3, "temperature": 1.7}


@pytest.fixture(scope="session")
def base() -> Policy:
    """The tiny base, for tests that do not change it."""
    return Policy(cards.BASE)


@pytest.fixture
def fresh(base) -> Policy:
    """A copy of it, to change."""
    return copy.deepcopy(base)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict:
    """TINY for the base with two digits as further stop tokens: answers have about 7 tokens."""
    path = tmp_path_factory.mktemp("model") / "stops_early"
    shutil.copytree(cards.BASE, path)
    stops = {"eos_token_id": [2, 7, 12], "pad_token_id": 0}  # <|im_end|>, "0" and "5"
    (path / "generation_config.json").write_text(json.dumps(stops))
    return TINY | {"model": str(path), "dataset": "cards", "max_new_tokens": 16}


@pytest.fixture(scope="session")
def prompts() -> data.PromptSet:
    """The cards world's training prompts."""
    return data.load_prompts(RunConfig())[0]


def in_words(text: str) -> Prompt:
    """A prompt without a picture."""
    parts = [{"type": "text", "text": text}, {"type": "text", "text": "\nBox it."}]
    return Prompt(text, [{"role": "user", "content": parts}], [], "7")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Makes the folder of a random model; its weights are large, so that all of it matters."""

    def make(name: str):
        path = tmp_path_factory.getbasetemp() / "text" / name
        if not path.is_dir():
            tokenizer = load_tokenizer(cards.BASE)
            tokenizer.chat_template = TEMPLATE
            size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4}
            size |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
            size |= {"vocab_size": len(tokenizer), "bos_token_id": None}
            size |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            kind, more = TEXT_MODELS[name]
            torch.manual_seed(3)
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, kind)(**size, **more)
            )
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture
def command():
    """Runs `python WORDS…` (a script, or -m and a module) from the repository root."""

    def run(*words, check: bool = True, **options) -> subprocess.CompletedProcess:
        line = [sys.executable, *map(str, words)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, **options)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def script(monkeypatch):
    """Runs a command as `python` does, but in this process, which has imported all it needs."""

    def run(*words) -> None:
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")

    return run


def lucky(response: str | None, gold: str, choices: list[str] | None = None) -> bool:
    """Stands in for `verifier.is_correct` where few answers must hold right and wrong ones."""
    return zlib.crc32(response.encode()) % 3 == 0


def save(policy: Policy, path: Path, step: int = 0, **state) -> Path:
    """A checkpoint of the policy with a new optimizer."""
    optimizer = make_optimizer(policy.parameters(), 1e-3, 0.0)
    save_checkpoint(policy, path, {"step": step, "sampled_tokens": 0} | state, optimizer)
    return path


def cards_file(path: Path, count: int, changes: dict[int, dict] | None = None) -> None:
    """Cards as a data set in geometry3k's schema, some rows with other values."""
    import datasets

    rows = [
        {
            "images": [cards.draw(hand)],
            "problem": f"<image>{cards.question(hand)}",
            "answer": hand.working,
        }
        | (changes or {}).get(number, {})
        for number, hand in enumerate(cards.hands("train")[:count])
    ]
    text, images = datasets.Value("string"), datasets.List(datasets.Image())
    kinds = datasets.Features(images=images, problem=text, answer=text)
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(path)


def group_of(accuracies: list[float], prompt_id: str = "p") -> Group:
    """A group of made-up completions of two tokens, whose rewards are 0.1 + 0.9 accuracy."""
    completions = [
        Completion(
            prompt_id, [7, i], [-0.5, -0.25], f"answer {i}", True, accuracy=a, reward=0.1 + 0.9 * a
        )
        for i, a in enumerate(accuracies)
    ]
    return Group(Prompt(prompt_id, [], [], "0"), EncodedPrompt([1, 2]), completions)
