"""Trains the two models of the cards world. Only needed to rebuild them.

The base learns from demonstrations that know everything but one thing: where adding a card carries
into the next digit, they *forget the carry* seven times in eight, and go on from the wrong total:

    \\boxed{27 +8= 25 +5= 20}

CARRY_RATE is how often they remember it, and so decides how sparse the reward is. The teacher
starts from the base and learns from solutions that are always right, but come to it in another way:
before the box, they stop at every ten that they pass (27 +3= 30 +5= 35 for a card of 8).

    OMP_NUM_THREADS=1 python -m worlds.build_cards base     # rebuilds cards_base
    OMP_NUM_THREADS=1 python -m worlds.build_cards teacher  # rebuilds cards_teacher, from the base
    python -m worlds.build_cards show  # three prompts with a demonstration each, and cards.png
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from worlds.cards import BASE, CARD_PX, TEACHER, Hand, deal, draw, hands, messages, question

CARRY_RATE = 0.12  # chosen once: GRPO takes about 100 steps to half of its level at step 200
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = {  # Qwen3VLConfig's names for the tokens that frame and stand for pictures
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
STEPS = [f" +{digit}= " for digit in range(10)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS.values()]


def demonstrate(hand: Hand, rng: random.Random, carry_rate: float = CARRY_RATE) -> str:
    """A solution that remembers each carry with probability `carry_rate`; at 1 it is right."""
    total, words = hand.start, [str(hand.start)]
    for digit in hand.digits:
        carries = total % 10 + digit > 9
        total += digit
        if carries and rng.random() >= carry_rate:
            total -= 10
        words.append(f"+{digit}= {total}")
    return f"\\boxed{{{' '.join(words)}}}"


def make_ten(hand: Hand) -> str:
    """The teacher's solution, always right. Before the box it stops at every ten it passes."""
    total, words = hand.start, [str(hand.start)]
    for digit in hand.digits:
        to_ten = 10 - total % 10
        for part in (to_ten, digit - to_ten) if digit > to_ten else (digit,):
            total += part
            words.append(f"+{part}= {total}")
    return " ".join([*words, f"\\boxed{{{hand.working}}}"])


def build_tokenizer(asked: str, steps: list[str]):
    """Single digits, whole words, and ` +8= ` as one token: naming a card is a step by itself.

    Args:
        asked: a question; its words are in the vocabulary.
        steps: the world's other tokens, such as ` +8= `.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*"0123456789", *steps, "\\boxed{", "}", " ", ".", "\n", "user", "assistant"]
    pieces += [*dict.fromkeys(re.findall(r" ?[A-Za-z]+", asked)), "<unk>"]
    vocabulary = {piece: index for index, piece in enumerate(SPECIAL + pieces)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = Regex("|".join(map(re.escape, steps)) + r"|\\boxed\{| ?[A-Za-z]+|.|\n")
    core.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(tokenizer, tied: bool = True):
    """A Qwen3VLConfig of about 0.48 M parameters. `tied`: the output head is the embedding."""
    from transformers import Qwen3VLConfig

    text = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 3, "num_key_value_heads": 3}
    text |= {"head_dim": 32}  # the smallest that vLLM's attention on CPU accepts
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    text |= {"rope_parameters": rope | {"mrope_section": [8, 4, 4]}, "max_position_embeddings": 512}
    text |= {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 1}
    vision |= {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"out_hidden_size": 96, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0]}
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def lessons(solve: Callable[[Hand, random.Random], str], size: int, seed: int) -> Iterator[list]:
    """Endless batches of `size` (messages, picture, solution), of 2 to 8 cards, none held out."""
    rng, held_out = random.Random(f"demonstrations {seed}"), set(hands("held_out"))
    while True:
        dealt = []
        while len(dealt) < size:
            # starts up to 109: who forgets carries never climbs that high, but RL will
            if (hand := deal(rng, min_cards=2, max_start=109)) not in held_out:
                dealt.append(hand)
        yield [(messages(hand), draw(hand), solve(hand, rng)) for hand in dealt]


def encode(batch: list, tokenizer, processor, image_token_id: int) -> tuple:
    """What a Qwen3-VL reads, and what it should say.

    Args:
        batch: B tuples (messages, picture, solution) or (messages, picture, solution, soft), where
            soft[place] = {token: probability} holds at that place of the solution's tokens.
    Returns:
        the model's arguments, and targets (B, S, V): the probabilities of each token, given all
        before it; all 0 on the prompt and on the padding, where nothing is learnt.
    """
    import torch
    from torch.nn.functional import one_hot
    from torch.nn.utils.rnn import pad_sequence

    tokens, targets = [], []
    for asked, picture, solution, *soft in batch:
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        visual_tokens = picture.width * picture.height // CARD_PX**2
        text = text.replace("<|image_pad|>", "<|image_pad|>" * visual_tokens)
        prompt = tokenizer(text).input_ids
        answer = tokenizer(solution).input_ids + [tokenizer.eos_token_id]
        tokens.append(torch.tensor(prompt + answer))
        wanted = one_hot(tokens[-1], len(tokenizer)).float()
        wanted[: len(prompt)] = 0
        for place, chances in soft[0].items() if soft else ():
            ids = tokenizer.convert_tokens_to_ids(list(chances))
            wanted[len(prompt) + place] = 0
            wanted[len(prompt) + place, ids] = torch.tensor(list(chances.values()))
        targets.append(wanted)
    ids = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)
    pixels = processor([picture for _, picture, *_ in batch], return_tensors="pt")
    types = (ids == image_token_id).int()
    return {"input_ids": ids, "mm_token_type_ids": types, **pixels}, pad_sequence(targets, True)


def build(
    out: Path, tokenizer, config, batches: Iterator, seed: int, steps: int, dtype: str, start=None
):
    """Trains a Qwen3-VL, and saves it with its tokenizer and processors.

    AdamW, lr 2e-3 with 20 steps of warm-up and linear decay. The loss is the cross-entropy of the
    solution's tokens, less the entropy of the targets: 0 for a model that knows all there is.

    Args:
        out: Where the model goes.
        batches: One batch for each step, as `encode` takes it.
        dtype: Of the saved weights; training is in fp32.
        start: A model to start from, in place of random weights.
    """
    import torch
    from torch.nn.functional import kl_div
    from torch.optim.lr_scheduler import LambdaLR
    from tqdm import trange
    from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

    pictures = {"size": {"longest_edge": 1 << 20, "shortest_edge": 1024}}  # pixels
    pictures |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pictures |= {"merge_size": 2, "patch_size": 16, "temporal_patch_size": 2}
    processor = Qwen2VLImageProcessorPil(**pictures)
    torch.manual_seed(seed)
    if start:
        model = AutoModelForImageTextToText.from_pretrained(
            start, dtype=torch.float32, trust_remote_code=False
        )
    else:
        model = AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # the library's std of 0.02 is meant for widths in the thousands
                fan_in = parameter[0].numel() if "embed" not in name else parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    count = sum(weight.numel() for weight in weights)
    bar = trange(steps, desc=f"building {out.name} ({count:,} parameters)")
    for _, batch in zip(bar, batches):
        inputs, targets = encode(batch, tokenizer, processor, config.image_token_id)
        logprobs = model(**inputs).logits[:, :-1].log_softmax(-1)  # (B, S - 1, V)
        loss = kl_div(logprobs, targets[:, 1:], reduction="sum") / targets[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (model.to(getattr(torch, dtype)), tokenizer, processor):
        part.save_pretrained(out)
    video = {"video_processor_type": "Qwen3VLVideoProcessor"} | pictures  # vLLM insists on one
    (out / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")


def build_base(
    out: Path = BASE,
    seed: int = 0,
    steps: int = 1000,
    batch: int = 128,
    carry_rate: float = CARRY_RATE,
) -> None:
    """Trains the base on demonstrations that mostly forget the carry.

    Args:
        out: Where the base goes.
        seed: Of the initial weights and the demonstrations.
        steps: Training steps.
        batch: Demonstrations per step.
        carry_rate: How often a demonstration remembers a carry.
    """
    tokenizer = build_tokenizer(question(Hand(0, ())), STEPS)
    batches = lessons(lambda hand, rng: demonstrate(hand, rng, carry_rate), batch, seed)
    build(out, tokenizer, tiny_config(tokenizer), batches, seed, steps, "float32")


def build_teacher(out: Path = TEACHER, seed: int = 1, steps: int = 1500, batch: int = 64) -> None:
    """Trains the teacher, from the base on, on solutions that stop at every ten.

    Args:
        out: Where the teacher goes.
        seed: Of the hands.
        steps: Training steps.
        batch: Solutions per step.
    """
    tokenizer = build_tokenizer(question(Hand(0, ())), STEPS)
    batches = lessons(lambda hand, rng: make_ten(hand), batch, seed)
    build(out, tokenizer, tiny_config(tokenizer), batches, seed, steps, "bfloat16", BASE)


def show(out: Path = Path("cards.png")) -> None:
    """Prints three prompts with a demonstration each, and draws their pictures into one file."""
    rng, shown = random.Random(0), hands("train")[:3]
    width = max(draw(hand).width for hand in shown)
    sheet = Image.new("RGB", (width, CARD_PX * len(shown)), "white")
    for row, hand in enumerate(shown):
        sheet.paste(draw(hand), (0, CARD_PX * row))
        print(f"{hand.digits} {question(hand)} -> {hand.total}, {hand.carries} carries")
        print(f"  demonstration: {demonstrate(hand, rng)}")
    sheet.resize((sheet.width * 3, sheet.height * 3)).save(out)
    print(out)


if __name__ == "__main__":
    import tyro

    commands = {"base": build_base, "teacher": build_teacher, "show": show}
    tyro.extras.subcommand_cli_from_dict(commands)
