"""Will it fit?  What a run takes in completions, in GPU memory and on disk, from the model's configuration alone.

    python npo.py --model Qwen/Qwen3-VL-8B-Instruct --dry-run

Nothing is loaded: parameters are counted by formula, and the public sizes of Qwen3-VL need no hub. Lines with a star are
estimates from above, not measurements.
"""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, Qwen3VLConfig

import cards
from policy import VOCABULARY_CHUNK, whole_model
from tasks import UsageError

GIB = 2**30
CARDS_GB = (24, 48, 80, 141)  # of 10^9 bytes; drivers report a little more. Without a GPU here the last one is planned for
BYTES = {"bf16": 2, "auto": 2, "fp32": 4}  # of a weight, and of its gradient; LoRA's own are always fp32
OPTIMIZER_BYTES = {"bf16": 2 + 2 * 4 / 256, "fp32": 8}  # two moments; in bf16 of 8 bits, with a fp32 scale for each 256
RESERVE = 2 * GIB  # CUDA's context, and holes that the allocator cannot use
VLLM_OWN = 2 * GIB  # of vLLM's share, what is neither weights nor keys and values
LOGITS_COPIES = 4  # of fp32 logits, alive at once in temperature, mask, softmax and gradient; experiments/memory.py sees 3

SMALL_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": (5, 11, 17)}
LARGE_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": (8, 16, 24)}
PUBLIC = {  # from their config.json: hidden size, MLP, layers, query heads, tied embeddings, vision tower
    "Qwen/Qwen3-VL-8B-Instruct": (4096, 12288, 36, 32, False, LARGE_TOWER),
    "Qwen/Qwen3-VL-4B-Instruct": (2560, 9728, 36, 32, True, SMALL_TOWER),
    "Qwen/Qwen3-VL-2B-Instruct": (2048, 6144, 28, 16, True, SMALL_TOWER),
}


def public_config(name: str) -> Qwen3VLConfig | None:
    """The configuration of a model in `PUBLIC`; None for any other name."""
    if name not in PUBLIC:
        return None
    hidden, mlp, layers, heads, tied, tower = PUBLIC[name]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "max_position_embeddings": 262_144, "rope_parameters": rope}  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=tower | {"out_hidden_size": hidden}, tie_word_embeddings=tied)


def model_config(name: str) -> Qwen3VLConfig:
    """Of "cards", a name in `PUBLIC`, a `save_pretrained` folder or a hub id; UsageError where there is none to be had."""
    try:
        config = public_config(name) or AutoConfig.from_pretrained(whole_model(cards.BASE if name == "cards" else name))
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name}: no configuration can be loaded ({str(error).strip().splitlines()[0]}); give a "
                         f"save_pretrained folder, a hub id, or one known here: {', '.join(PUBLIC)}") from error  # fmt: skip
    if config.model_type != "qwen3_vl":
        raise UsageError(f"--model {name}: is a {config.model_type}; the plan is for a Qwen3-VL")
    return config


def linears(text) -> list[tuple[int, int]]:
    """(in, out) of the linear maps of a language layer: q, k, v, o, gate, up, down."""
    hidden, mlp = text.hidden_size, text.intermediate_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]


def parameters(model: Qwen3VLConfig) -> dict[str, int]:
    """Parameters part by part, then "language", "vision", "total"; "adapters": of LoRA of rank 1 on all of `linears`."""
    text, vision = model.text_config, model.vision_config
    table = text.vocab_size * text.hidden_size
    layer = sum(narrow * wide for narrow, wide in linears(text))
    layer += sum(wide for _, wide in linears(text)[:4]) if text.attention_bias else 0
    layer += 2 * text.hidden_size + 2 * text.head_dim  # RMSNorms: before attention and MLP, and of each query and key
    language = {"embeddings": table, "layers": text.num_hidden_layers * layer, "last norm": text.hidden_size,
                "head": 0 if model.tie_word_embeddings else table}  # tied, it is the embeddings  # fmt: skip
    width, mlp = vision.hidden_size, vision.intermediate_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2  # of a patch
    # everything has biases: two LayerNorms, qkv, output projection, two layers of MLP
    block = 2 * 2 * width + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width
    square = width * vision.spatial_merge_size**2  # values that are merged into one token
    merger = (square + 1) * square + (square + 1) * vision.out_hidden_size
    tower = {"patches": (values + 1) * width, "positions": vision.num_position_embeddings * width,
             "blocks": vision.depth * block, "merger": 2 * width + merger,  # normalised first; deepstack's: merged first
             "deepstack": len(vision.deepstack_visual_indexes) * (2 * square + merger)}  # fmt: skip
    both = {"language": sum(language.values()), "vision": sum(tower.values())}
    adapters = text.num_hidden_layers * sum(narrow + wide for narrow, wide in linears(text))
    return language | tower | both | {"total": sum(both.values()), "adapters": adapters}


def fixed_bytes(model: Qwen3VLConfig, config) -> dict[str, int]:
    """Parameters that are "trained"; bytes of "weights", "gradients", "optimizer", and of a checkpoint's weights, "saved"."""
    count, kind = parameters(model), "fp32" if config.lora or config.dtype == "fp32" else "bf16"  # of what is trained
    adapters, whole = config.lora * count["adapters"], BYTES[config.dtype] * count["total"]
    trained = adapters or count["language"] + (count["vision"] if config.train_vision else 0)
    own = BYTES["fp32"] * adapters
    return {"trained": trained, "weights": whole + own, "gradients": BYTES[kind] * trained,
            "optimizer": int(OPTIMIZER_BYTES[kind] * trained), "saved": own or whole}  # fmt: skip


def cache_bytes(model: Qwen3VLConfig, config) -> int:
    """Keys and values of one token, in all layers."""
    text = model.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * BYTES[config.dtype]


def layer_bytes(model: Qwen3VLConfig, config, tokens: int, keys: int, pairs: int) -> int:
    """What autograd keeps of one language layer, for so many tokens that attend to so many keys, in so many pairs.

    Two RMSNorms and the query and key norms: the input as fp32, the normalised values, and the output. The attention: its
    output twice, the mask, and keys and values of all heads (PyTorch shares none under a mask). The MLP: gate, its activation,
    up, and their product. LoRA: each linear map's input once more, as fp32.
    """
    text, size = model.text_config, BYTES[config.dtype]
    queries, shared = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    token = (2 * text.hidden_size + queries + shared) * (4 + 2 * size) + 2 * queries * size + 4 * text.intermediate_size * size
    token += 4 * sum(narrow + config.lora for narrow, _ in linears(text)) if config.lora else 0
    return tokens * token + (keys * 2 * queries + pairs) * size


def block_bytes(model: Qwen3VLConfig, config, patches: int) -> int:
    """The same of one vision block, with what is there only once: fp32 copies for rotary embeddings, and the mergers."""
    vision, size, width = model.vision_config, BYTES[config.dtype], model.vision_config.hidden_size
    once = 24 * width + (1 + len(vision.deepstack_visual_indexes)) * size * (3 * width + vision.out_hidden_size)
    return patches * (size * (9 * width + 2 * vision.intermediate_size) + once)


def activation_bytes(model: Qwen3VLConfig, config, checkpointing: bool) -> int:
    """Of one micro-batch's forward and backward, but for its keys and values and its logits; an estimate from above.

    Without checkpointing autograd keeps all of every language layer; with it each one's input, and all of the one that is being
    computed again. Gradients add a layer: they are as large as what they are gradients of, one layer at a time.
    """
    text, vision, size = model.text_config, model.vision_config, BYTES[config.dtype]
    rows, group, prompt, length = config.micro_batch_size, config.group_size, config.max_prompt_tokens, config.max_new_tokens
    prompts = math.ceil(rows / group) + (rows % group > 0 and group % rows > 0)  # at most, in `rows` rows of the batch
    tokens, pairs = prompts * prompt + rows * length, prompts * prompt**2 + rows * length * (prompt + length)
    layer = layer_bytes(model, config, tokens, tokens + rows * prompt, pairs)
    block = block_bytes(model, config, prompts * prompt * vision.spatial_merge_size**2)  # as if prompts were images alone
    between = text.num_hidden_layers + len(vision.deepstack_visual_indexes) + 2  # deepstack's sums, embeddings, last norm
    language = (2 if checkpointing else text.num_hidden_layers + 1) * layer + between * tokens * text.hidden_size * size
    if config.train_vision and not config.lora:
        return language + (vision.depth + 1) * block
    return max(language, block)  # a frozen tower is done, and forgotten, before


def generate_bytes(model: Qwen3VLConfig, config) -> tuple[int, int]:
    """Of transformers' `generate`, for all sequences of a batch at once: (keys and values, what else it needs)."""
    rows = config.prompts_per_step * max(config.group_size, getattr(config, "guide_samples", 0))
    keys, seen = rows * (config.max_prompt_tokens + config.max_new_tokens), config.prompts_per_step * config.max_prompt_tokens
    reading = layer_bytes(model, config, seen, seen, seen * config.max_prompt_tokens)
    images = block_bytes(model, config, seen * model.vision_config.spatial_merge_size**2)
    writing = layer_bytes(model, config, 0, keys, keys) + LOGITS_COPIES * 4 * rows * model.text_config.vocab_size
    return keys * cache_bytes(model, config), max(reading, images, writing)


def plan(config, card_bytes: int, model: Qwen3VLConfig | None = None) -> dict:
    """What a run holds on a card of so many bytes.

    Returns "rows": (what, bytes while the policy is updated, and while it samples); "total": the larger sum of the two;
    "sequences" of full length that vLLM's share has room for (None without vLLM); "missing": bytes too few, 0 if it fits.
    """
    model = model or model_config(config.model)
    size, token, fixed = BYTES[config.dtype], cache_bytes(model, config), fixed_bytes(model, config)
    whole, prompt, length = size * parameters(model)["total"], config.max_prompt_tokens, config.max_new_tokens
    rows = [(name, fixed[name], 0 if name == "gradients" else fixed[name]) for name in ("weights", "gradients", "optimizer")]
    checkpointing, sequences, short = config.gradient_checkpointing == "on", None, 0
    if config.sampler == "vllm":
        share = int(config.vllm_memory * card_bytes)
        rows.append((f"vLLM, {config.vllm_memory:g} of the card", share, share))
        sequences = max(0, share - whole - VLLM_OWN) // ((prompt + length) * token)
        short = max(0, whole + VLLM_OWN + (prompt + length) * token - share)
    else:
        keys, others = generate_bytes(model, config)
        rows += [("generate: keys and values *", 0, keys), ("generate: activations, logits *", 0, others)]
    if hasattr(config, "max_distance"):
        rows.append(("AutoNPO: an older checkpoint", 0, whole))
    chunk = min(VOCABULARY_CHUNK, config.micro_batch_size * length) * model.text_config.vocab_size
    head = 0 if config.lora else size * model.text_config.vocab_size * model.text_config.hidden_size
    # the prompt's, copied to each row, and their gradients; without checkpointing the completion's stay, too
    cached = config.micro_batch_size * (2 * prompt + (0 if checkpointing else length)) * token
    rows += [
        (f"activations, {'' if checkpointing else 'not '}checkpointed *", activation_bytes(model, config, checkpointing), 0),
        ("logits of a chunk, head's gradient *", chunk * (LOGITS_COPIES * 4 + size) + head, 0),
        ("keys and values of prompts *", cached, 0),
        ("CUDA's own, and holes *", RESERVE, RESERVE),
    ]
    total = max(sum(column) for column in list(zip(*rows))[1:])
    return {"rows": rows, "total": total, "sequences": sequences, "missing": max(0, total - card_bytes) + short}


def remedies(config, card_bytes: int, model: Qwen3VLConfig) -> list[tuple[str, dict]]:
    """What to change until it fits, each on top of the last, what helps most first, other models last: (flag, plan with it)."""
    options = dict(micro_batch_size=1, lora=config.lora or 64, gradient_checkpointing="on", dtype="bf16", train_vision=False)
    options |= {key: max(1, getattr(config, key) // 2) for key in ("prompts_per_step", "max_new_tokens", "max_prompt_tokens")}
    done, now = [], plan(config, card_bytes, model)
    for name in ("", *PUBLIC):
        if name and now["missing"] and parameters(public_config(name))["total"] < parameters(model)["total"]:
            model = public_config(name)
            now = plan(config, card_bytes, model)
            done.append((f"--model {name}", now))
        length = config.group_size * (config.max_prompt_tokens + config.max_new_tokens)  # of one group, the least for vLLM
        least = BYTES[config.dtype] * parameters(model)["total"] + VLLM_OWN + length * cache_bytes(model, config)
        options["vllm_memory"] = math.ceil(20 * least / card_bytes) / 20
        while options and now["missing"]:
            tried = {key: SimpleNamespace(**vars(config) | {key: value}) for key, value in options.items()}
            plans = {key: plan(other, card_bytes, model) for key, other in tried.items()}
            key = min(plans, key=lambda key: plans[key]["missing"])
            if plans[key]["missing"] >= now["missing"]:
                break
            now, config, value = plans[key], tried[key], options.pop(key)
            switch = f"--no-{key}" if value is False else f"--{key} {value}"
            done.append((switch.replace("_", "-"), now))
    return done


def stretches(config) -> list[tuple[str, int, int]]:
    """The GRPO runs of one command: (name, steps, answers that a guide gives for it beforehand, at most)."""
    method, guide = getattr(config, "intervention", ""), getattr(config, "guide", "")
    if method == "auto":
        return [("training", config.steps, 0)]  # what its rollbacks add is not known before
    late = method.endswith("late")
    ahead = config.plateau_end if late else getattr(config, "scout_steps", 0)
    before = [("scout", ahead, 0)] if ahead and not guide else []
    if method == "early+late" and not guide:
        before = stretches(SimpleNamespace(**vars(config) | {"intervention": "early", "steps": ahead}))
    start = config.plateau_start if late else 0
    until = getattr(config, "guided_until", 0) or (ahead if method and not guide else config.steps)
    asked = config.prompts_per_step * getattr(config, "guide_samples", 0) * (until - start)
    return [*before, ("replay" if late else "training", config.steps - start, 0 if guide.endswith(".jsonl") else asked)]


def completions(config) -> list[tuple[str, int]]:
    """All that is sampled, at most: (what, completions)."""
    batch, lines, evaluations = config.prompts_per_step * config.group_size, [], 0
    for name, steps, asked in stretches(config):
        lines += ([("its guide cache", asked)] if asked else []) + [(f"{name}, {steps} steps", steps * batch)]
        evaluations += 1 + math.ceil(steps / config.eval_every)
    lines.append((f"{evaluations} evaluations", evaluations * config.eval_prompts * config.eval_samples))
    if hasattr(config, "max_distance"):
        asked = config.probe_prompts * config.probe_samples + config.pool_size * config.guide_samples
        lines.append(("each rollback", asked + config.max_distance * batch))
    return lines


def disk_bytes(config, model: Qwen3VLConfig) -> dict[str, int]:
    """Checkpoints "kept" at most, with the one that is being written, and their bytes in "total"."""
    runs, fixed = stretches(config), fixed_bytes(model, config)
    late = getattr(config, "intervention", "").endswith("late")  # the step that it goes back to is needed, too
    most = {"all": math.inf, "needed": 1}.get(config.keep, 1 + len(config.keep.split(",")))
    kept = sum(min(most, math.ceil(steps / config.save_every)) for _, steps, _ in runs) + (config.keep != "all") * (1 + late)
    if hasattr(config, "max_distance"):  # AutoNPO keeps those that it can go back to, the start too
        kept = min(kept + 1, config.max_distance // config.save_every + 2)
    states = kept if config.save_optimizers == "all" else 1 + len(runs)
    return {"kept": kept, "total": kept * fixed["saved"] + states * fixed["optimizer"]}


def show(config) -> None:
    """Prints the plan, for the GPU that is here, or else for the largest of `CARDS_GB`."""
    model, prompts, some = model_config(config.model), config.prompts_per_step, config.micro_batch_size
    count, fixed, batch = parameters(model), fixed_bytes(model, config), prompts * config.group_size
    print(f"{config.model} in {config.dtype.replace('auto', 'bf16')}: {count['total']:,} parameters ({count['language']:,} "
          f"language, {count['vision']:,} vision), {fixed['trained']:,} trained\n")  # fmt: skip
    print(f"{prompts} prompts x {config.group_size} slots = {batch} completions/step = {math.ceil(batch / some)} micro-batches "
          f"of {some} -> {config.updates_per_batch} optimizer step(s)")  # fmt: skip
    print(
        f"at most {batch * config.max_new_tokens:,} tokens/step, and {prompts * config.max_prompt_tokens:,} of prompts; in all"
    )
    for what, number in completions(config):
        print(f"{number:12,} completions: {what}")
    name, card = f"none here; {CARDS_GB[-1]} GB", int(CARDS_GB[-1] * 1e9)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties("cuda" if config.device in ("auto", "cpu") else config.device)
        name, card = device.name, device.total_memory
    planned = plan(config, card, model)
    print(f"\n{'GiB':40}{'update':>10}{'sampling':>10}")
    for what, *columns in [*planned["rows"], ("together", *(sum(column) for column in list(zip(*planned["rows"]))[1:]))]:
        print(f"{what:40}" + "".join(f"{value / GIB:10.1f}" if value else f"{'-':>10}" for value in columns))
    other = "off" if config.gradient_checkpointing == "on" else "on"
    print(f"{f'card ({name})':50}{card / GIB:10.1f}")
    print(f"* estimated from above, not measured; activations with --gradient-checkpointing {other}: "
          f"{activation_bytes(model, config, other == 'on') / GIB:.1f}")  # fmt: skip
    if config.sampler == "vllm":
        print(f"vLLM's share has room for {planned['sequences']} sequences of full length at a time, beside its own weights")
    too_few = f"DOES NOT FIT: {planned['missing'] / GIB:.1f} GiB too few. What helps, in this order, each on top of the last:"
    print(too_few if planned["missing"] else "fits")
    for switch, then in remedies(config, card, model):
        verdict = f"{then['missing'] / GIB:.1f} too few" if then["missing"] else "fits"
        print(f"  {switch:36} -> {then['total'] / GIB:6.1f} GiB, {verdict}")
    fitting = [f"{size} GB" for size in CARDS_GB if not plan(config, int(size * 1e9), model)["missing"]]
    print(f"of cards of {', '.join(map(str, CARDS_GB))} GB, it fits on: {', '.join(fitting) or 'none'}\n")
    disk, folder = disk_bytes(config, model), Path(config.out).resolve()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    print(f"checkpoint: {fixed['saved'] / 1e9:.1f} GB of weights, {fixed['optimizer'] / 1e9:.1f} GB of optimizer state; "
          f"at most {disk['kept']} at a time: {disk['total'] / 1e9:.1f} GB; free for --out: {free / 1e9:.1f} GB")  # fmt: skip
    if disk["total"] > free:
        lower = ["--keep needed", "a larger --save-every"] * (config.keep == "all" and not hasattr(config, "max_distance"))
        lower += ["--save-optimizers last"] * (config.save_optimizers == "all") + ["--lora 64"] * (not config.lora)
        print(f"DISK TOO SMALL: {(disk['total'] - free) / 1e9:.1f} GB too few; take {' or '.join([*lower, 'another disk'])}")
