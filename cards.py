"""The embedded world: add a row of digit cards that you see in a picture.

A *hand* is a start value and 6 to 8 digit cards. The prompt shows the cards as one image and asks, "Start at 27 and add
the cards." A solution repeats the start, names each card with the running total, and boxes the last total:

    27 +8= 35 +5= 40 \\boxed{40}

The base policy, a real Qwen3-VL of half a million parameters, was trained on demonstrations that know everything but one
thing: whenever adding a card carries into the next digit, they mostly *forget the carry* (27 +8= 25) and go on from the
wrong total. So right answers are rare, rarer with every carry, and what reinforcement learning finds on one
prompt helps on all others. `CARRY_RATE` is the sparsity of that signal.

A second, larger model in assets/teacher never learnt to forget a carry, and writes in another way, as teachers do: it stops at
every ten that it passes (27 +3= 30 +5= 35 for a card of 8). 85.5 % of its answers to held-out hands are right (`python evaluate.py --model
assets/teacher --benchmarks cards --samples 4`), but far from what the policy would say: LUFFY's source.

    OMP_NUM_THREADS=1 python cards.py build-base    # rebuilds assets/base, 7 minutes
    OMP_NUM_THREADS=2 python cards.py build-teacher # rebuilds assets/teacher, 13 minutes
    python cards.py show                            # three prompts with a demonstration each, and cards.png
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).parent / "assets"
BASE, TEACHER = ASSETS / "base", ASSETS / "teacher"
CARRY_RATE = 0.2  # chosen once, so that the base solves about 1 % of the prompts
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 2048, 256
MAX_START, MIN_CARDS, MAX_CARDS = 59, 6, 8
CARD_PX = 32  # = patch 16 x merge 2: each card becomes exactly one visual token
INKS = ("#1b1b1b", "#b3202c", "#1d4e9e", "#1f6f3d")


@dataclass(frozen=True)
class Hand:
    """A start value and the digits (1-9) on the cards, left to right."""

    start: int
    digits: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.start + sum(self.digits)

    @property
    def carries(self) -> int:
        """How many additions of the right solution carry out of the last digit."""
        return sum(total % 10 + digit > 9 for total, digit in self._additions())

    def _additions(self):
        total = self.start
        for digit in self.digits:
            yield total, digit
            total += digit


def deal(rng: random.Random, min_cards: int = MIN_CARDS, max_cards: int = MAX_CARDS, max_start: int = MAX_START) -> Hand:
    count = rng.randint(min_cards, max_cards)
    return Hand(rng.randint(0, max_start), tuple(rng.randint(1, 9) for _ in range(count)))


def hands(split: str) -> list[Hand]:
    """The 2,048 "train" or the 256 "held_out" hands: the same on every machine, without repeats, disjoint."""
    rng, seen = random.Random(20733), {}
    while len(seen) < TRAIN_PROMPTS + HELD_OUT_PROMPTS:
        seen.setdefault(deal(rng))
    every = list(seen)
    return {"train": every[:TRAIN_PROMPTS], "held_out": every[TRAIN_PROMPTS:]}[split]


def question(hand: Hand) -> str:
    return f"Start at {hand.start} and add the cards."


def messages(hand: Hand) -> list[dict]:
    content = [{"type": "image"}, {"type": "text", "text": question(hand)}]
    return [{"role": "user", "content": content}]


def draw(hand: Hand) -> Image.Image:
    """The row of cards, 32 x 32 px each; ink and position vary, but always alike for the same hand."""
    rng = random.Random(f"{hand.start}:{hand.digits}")
    image = Image.new("RGB", (CARD_PX * len(hand.digits), CARD_PX), "#2e6b4f")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=24)
    for place, digit in enumerate(hand.digits):
        left = place * CARD_PX
        pen.rounded_rectangle((left + 2, 1, left + CARD_PX - 3, CARD_PX - 2), 4, fill="white", outline="#888888")
        center = (left + CARD_PX // 2 + rng.randint(-2, 2), CARD_PX // 2 + rng.randint(-2, 2))
        pen.text(center, str(digit), fill=rng.choice(INKS), font=font, anchor="mm")
    return image


def demonstrate(hand: Hand, rng: random.Random, carry_rate: float = CARRY_RATE) -> str:
    """A worked solution that remembers each carry with probability `carry_rate`; at 1.0 it is always right."""
    total, words = hand.start, [str(hand.start)]
    for digit in hand.digits:
        carries = total % 10 + digit > 9
        total += digit
        if carries and rng.random() >= carry_rate:
            total -= 10
        words.append(f"+{digit}= {total}")
    return " ".join([*words, f"\\boxed{{{total}}}"])


def make_ten(hand: Hand) -> str:
    """The teacher's solution: always right, and a card that passes a ten is added in two steps, up to the ten and beyond it."""
    total, words = hand.start, [str(hand.start)]
    for digit in hand.digits:
        to_ten = 10 - total % 10
        for part in (to_ten, digit - to_ten) if digit > to_ten else (digit,):
            total += part
            words.append(f"+{part}= {total}")
    return " ".join([*words, f"\\boxed{{{total}}}"])


# ---------------------------------------------------------------------------------------------------------------------
# The tiny base and its teacher. Everything below is needed only to rebuild assets/base and assets/teacher.
# ---------------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip


def build_tokenizer():
    """Whole words, single digits, and ` +8= ` as one token, so that naming a card and adding it are separate steps."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*"0123456789", *(f" +{d}= " for d in range(10)), " \\boxed{", "}", " ", ".", "\n"]
    pieces += ["user", "assistant", "Start", " at", " and", " add", " the", " cards", "<unk>"]
    vocabulary = {piece: index for index, piece in enumerate(SPECIAL + pieces)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = Regex(r" \+\d= | \\boxed\{| ?[A-Za-z]+|.|\n")
    core.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(tokenizer, hidden: int = 96, layers: int = 3):
    """A Qwen3VLConfig, by default of under 0.5 M parameters; head_dim 32 is the smallest that vLLM's CPU attention accepts."""
    from transformers import Qwen3VLConfig

    text = dict(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4],
                         "mrope_interleaved": True},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, num_heads=1, patch_size=16, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=hidden, num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build_base(out: Path = BASE, seed: int = 0, steps: int = 1000, batch: int = 128, carry_rate: float = CARRY_RATE) -> None:
    """Trains the tiny base on demonstrations of 2 to 8 cards and all heights (AdamW 2e-3, linear decay).

    Args:
        out: Where the base goes.
        seed: Of the initial weights and the demonstrations.
        steps: Training steps.
        batch: Demonstrations a step.
        carry_rate: How often a demonstration remembers a carry.
    """
    tokenizer = build_tokenizer()
    build(out, tokenizer, tiny_config(tokenizer), lambda hand, rng: demonstrate(hand, rng, carry_rate), seed, steps, batch)


def build_teacher(out: Path = TEACHER, seed: int = 1, steps: int = 1000, batch: int = 128) -> None:
    """Trains the teacher, a larger model, in the same way on solutions that stop at every ten; saved in bf16.

    Args:
        out: Where the teacher goes.
        seed: Of the initial weights and the hands.
        steps: Training steps.
        batch: Solutions a step.
    """
    tokenizer = build_tokenizer()
    config = tiny_config(tokenizer, hidden=128, layers=4)
    build(out, tokenizer, config, lambda hand, rng: make_ten(hand), seed, steps, batch).bfloat16().save_pretrained(out)


def build(out: Path, tokenizer, config, solve, seed: int, steps: int, batch: int):
    """Trains a model on what `solve(hand, rng)` writes, saves it with its tokenizer and image processor, and returns it."""
    import torch
    from tqdm import trange
    from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    rng = random.Random(f"demonstrations {seed}")
    held_out = set(hands("held_out"))
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 1 << 20},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # the library's std of 0.02 is meant for widths in the thousands
            fan_in = parameter[0].numel() if "embed" not in name else parameter.shape[-1]
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
    bar = trange(steps, desc=f"building {out.name} ({sum(p.numel() for p in model.parameters()):,} parameters)")
    for _ in bar:
        dealt = []
        while len(dealt) < batch:
            # starts up to 109: who forgets the carry never climbs, and the base must know every height that RL will reach
            if (hand := deal(rng, 2, 8, max_start=109)) not in held_out:
                dealt.append(hand)
        prompts = [tokenizer.apply_chat_template(messages(h), tokenize=False, add_generation_prompt=True) for h in dealt]
        prompts = [p.replace("<|image_pad|>", "<|image_pad|>" * len(h.digits)) for p, h in zip(prompts, dealt)]
        prompts = [tokenizer(p).input_ids for p in prompts]
        answers = [tokenizer(solve(h, rng)).input_ids + [tokenizer.eos_token_id] for h in dealt]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers))
        ids = torch.full((batch, width), tokenizer.pad_token_id)
        labels = torch.full((batch, width), -100)
        for row, (p, a) in enumerate(zip(prompts, answers)):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
            labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
        pixels = processor([draw(h) for h in dealt], return_tensors="pt")
        types = (ids == model.config.image_token_id).int()
        loss = model(input_ids=ids, labels=labels, mm_token_type_ids=types, **pixels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer, processor):
        part.save_pretrained(out)
    kept = ("patch_size", "merge_size", "temporal_patch_size", "size", "image_mean", "image_std")
    video = {"video_processor_type": "Qwen3VLVideoProcessor"} | {
        name: value for name, value in processor.to_dict().items() if name in kept
    }
    (out / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")  # vLLM insists on one
    return model


def show(out: Path = Path("cards.png")) -> None:
    """Prints three prompts with a demonstration each, and draws their pictures into one file."""
    rng, shown = random.Random(0), hands("train")[:3]
    sheet = Image.new("RGB", (CARD_PX * MAX_CARDS, CARD_PX * len(shown)), "white")
    for row, hand in enumerate(shown):
        sheet.paste(draw(hand), (0, CARD_PX * row))
        print(
            f"{hand.digits} {question(hand)} -> {hand.total}, {hand.carries} carries\n  demonstration: {demonstrate(hand, rng)}"
        )
    sheet.resize((sheet.width * 3, sheet.height * 3)).save(out)
    print(out)


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"build-base": build_base, "build-teacher": build_teacher, "show": show})
