"""Sampling with vLLM: same interface as `Policy.sample`, many times as fast on a GPU.

Four traps of sampling a Qwen3-VL with it are closed here:
- prompts go in with one `<|image_pad|>` per image (expanded ids would be expanded twice), and the
  ids that vLLM makes of them must be those that `encode` makes;
- log-probs are the processed ones, of the distribution that is sampled at this temperature;
- vision tokens are never sampled, as in `Policy.sampling_logprobs`;
- stale weights: after every update `sync` hands vLLM the trainer's weights, in this process and
  without a file, empties every cache, and compares weights and the log-probs of a probe.

requirements-gpu.txt says how to install it, also on a CPU.
"""

import gc
import json
import math
import os
import re
from collections import Counter

# all of these are read when vLLM is imported
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from plumbing.data import PromptSet
from plumbing.encode import (
    MAX_IMAGES,
    config_of,
    encode,
    image_parts,
    load_tokenizer,
    placeholder_ids,
    stop_ids,
    vision_token_ids,
)
from plumbing.lora import merged_weights
from plumbing.model import Policy
from plumbing.rollout import Completion, Group, Prompt

MAX_PROMPT = 32_768  # tokens, images included
PROBE_TOKENS = 16
SUBMISSION = 1024  # sequences that vLLM gets at once: it queues them, and waits for no chunk's end
FUSED = {"q|k|v": "qkv", "gate|up": "gate_up"}  # layers of ours that are one in vLLM
# Mean difference on the probe, in nats per token. Of one token in bf16 0.5 to 0.7 is normal.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class VLLMSampler:
    def __init__(
        self, path: str, max_new_tokens: int, dtype="fp32", max_prompt=MAX_PROMPT, memory=0.9
    ):
        """Loads a hub id or a checkpoint folder of a whole model.

        Args:
            dtype: "fp32" or "bf16".
            max_prompt: tokens in the longest prompt, images included.
            memory: share of the GPU for its weights and cache.
        """
        from vllm import LLM

        self.tokenizer = load_tokenizer(path)
        self.image_processor, self.image_token_id = image_parts(path)
        config = config_of(path)
        self.never_sampled = set(vision_token_ids(config))
        self.eos_token_ids = stop_ids(path, self.tokenizer)
        on_gpu, positions = torch.cuda.is_available(), config.get_text_config()
        pictures = None
        if parts := self.image_processor:  # memory is set aside for the largest one that can come
            side = parts.patch_size * parts.merge_size * math.ceil(max_prompt**0.5)
            largest = {"count": MAX_IMAGES, "width": side, "height": side}
            pictures = {"image": largest, "video": 0}
        self.on_gpu, self.asleep = on_gpu, False
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self.llm = LLM(
            model=str(path),
            dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
            seed=0,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            trust_remote_code=False,
            max_model_len=min(positions.max_position_embeddings, max_prompt + max_new_tokens),
            limit_mm_per_prompt=pictures,
            max_num_seqs=256,
            max_num_batched_tokens=4096 if on_gpu else None,  # its default on a large GPU: 16,384
            gpu_memory_utilization=memory,
            enforce_eager=not on_gpu,
            enable_chunked_prefill=on_gpu,  # the CPU build cannot combine it with seeds
            enable_sleep_mode=on_gpu,
        )
        # bytes of weights and cache; torch counts them on while vLLM sleeps
        self.held = torch.cuda.memory_allocated() - before if on_gpu else 0

    def sleep(self) -> None:
        """Leaves the GPU to the update: weights go to the CPU, the cache is dropped.

        Level 1. Level 2 drops the weights, and with them buffers of Qwen3-VL that no sync restores.
        """
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self) -> None:
        """Gives its memory back: vLLM's pool for sleeping takes one engine at a time."""
        self.llm.llm_engine.engine_core.shutdown()

    def wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()  # after it has emptied torch's own cache
            self.asleep = False

    def sample(
        self,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Group]:
        """P groups of G completions; the same seed and prompts give the same ones."""
        from vllm import SamplingParams

        self.wake()
        asked, settings = [], []
        for number, prompt in enumerate(prompts):
            ids = placeholder_ids(prompt, self.tokenizer, self.image_token_id)
            images = {"multi_modal_data": {"image": prompt.images}} if prompt.images else {}
            asked.append({"prompt_token_ids": ids} | images)
            settings.append(
                SamplingParams(
                    n=group_size,
                    temperature=temperature,
                    top_p=1.0,
                    top_k=0,
                    logprobs=0,
                    detokenize=False,  # `_group` decodes whole answers
                    max_tokens=max_new_tokens,
                    logit_bias=dict.fromkeys(self.never_sampled, float("-inf")),
                    stop_token_ids=self.eos_token_ids,
                    seed=(seed + number * group_size) % 2**62,  # vLLM adds the slot's number
                )
            )
        answers = self.llm.generate(asked, settings, use_tqdm=False)
        return [self._group(prompt, answer) for prompt, answer in zip(prompts, answers)]

    def _group(self, prompt: Prompt, answer) -> Group:
        encoded = encode(prompt, self.tokenizer, self.image_processor, self.image_token_id)
        if answer.prompt_token_ids != encoded.token_ids:
            raise RuntimeError(
                f"prompt {prompt.id}: vLLM read {len(answer.prompt_token_ids)} tokens where the "
                f"trainer reads {len(encoded.token_ids)}; the two count its images differently. "
                "Is the checkpoint's image processor the one that vLLM loads?"
            )
        completions = []
        for output in answer.outputs:
            ids = list(output.token_ids)
            if vision := set(ids) & self.never_sampled:
                raise RuntimeError(
                    f"prompt {prompt.id}: vLLM sampled the vision token {min(vision)}, "
                    "which no training forward can read"
                )
            logprobs = [tokens[id].logprob for tokens, id in zip(output.logprobs, ids)]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            stopped = ids[-1] in self.eos_token_ids
            completions.append(
                Completion(prompt.id, ids, logprobs, text, finished=stopped, exact=False)
            )
        return Group(prompt, encoded, completions)

    # ------------------------------------------------------------------------------------ sync

    def sync(self, policy: Policy, probe: list[Prompt], temperature: float) -> None:
        """Gives vLLM the policy's weights.

        `difference` is then the largest one between both sides' log-probs on the probe, in nats
        per token.

        Raises:
            RuntimeError: they differ by more than rounding explains: vLLM samples another policy.
        """
        self.wake()
        weights = {"weights_iterator": merged_weights(policy.model)}
        self.llm.collective_rpc("reload_weights", kwargs=weights)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: keys and values of the old weights")
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self._compare_weights(policy)
        groups = self.sample(probe, 1, PROBE_TOKENS, temperature, seed=0)
        rows = [(group.encoded, c) for group in groups for c in group.completions]
        with torch.no_grad():
            asked = [(encoded, c.token_ids) for encoded, c in rows]
            logprobs, mask = policy.logprobs(asked, temperature)  # (B, T)
        theirs = torch.tensor([value for _, c in rows for value in c.behavior_logprobs])
        ours = logprobs[mask].float().cpu()
        differences = (ours - theirs).abs()
        worst, mean = differences.argmax(), differences.mean().item()
        self.difference = differences[worst].item()
        if not mean <= TOLERANCE.get(policy.dtype, TOLERANCE[torch.float32]):
            raise RuntimeError(
                "vLLM does not have the trainer's weights: of a token of the probe its log-prob is "
                f"{theirs[worst]:.4f}, the trainer's {ours[worst]:.4f}, and the mean difference is "
                f"{mean:.4f}. The sync failed; use --sampler hf, and report it"
            )

    def _compare_weights(self, policy: Policy) -> None:
        """Bit by bit: in bf16 a step is too small to show on the probe.

        Of every weight that vLLM holds in our layout: k_proj.weight is some of the rows of its
        qkv_proj.weight. `compared` is their share. The CPU build packs the linear layers, so that
        embeddings, head and norms are left.
        """
        found = []
        theirs = self.llm.apply_model(lambda model: dict(model.named_parameters()))[0]
        prefix, rows = "language_model." if self.image_processor else "", Counter()
        for name, weight in merged_weights(policy.model):
            place = name.replace("model.language_model.", "language_model.model.", 1)
            place = place.replace("model.visual.", "visual.", 1)
            place = prefix + place if place == "lm_head.weight" else place
            for parts, fused in FUSED.items():  # q, k, v lie below each other there
                place = re.sub(rf"\.({parts})_proj\.", f".{fused}_proj.", place)
            first = rows[place]
            rows[place] += len(weight)
            other = theirs.get(place, weight[:0])[first : first + len(weight)].to(weight.device)
            found.append(other.shape == weight.shape)  # not if packed, or a tied head
            if not found[-1]:
                continue
            if (differ := other != weight).any():
                raise RuntimeError(
                    f"vLLM does not have the trainer's weights: {name} holds "
                    f"{other[differ][0].item()} there and {weight[differ][0].item()} here. "
                    "The sync failed; use --sampler hf, and report it"
                )
        self.compared = sum(found) / len(found)


ENGINE: dict[tuple, VLLMSampler] = {}  # at most one: a second would find the GPU full


def engine_of(policy: Policy, config) -> VLLMSampler:
    """The process's vLLM, for models with the policy's shapes; made anew where they differ."""
    shapes = policy.model.config.to_diff_dict()
    shapes.pop("_name_or_path", None)
    shapes = json.dumps(shapes, sort_keys=True, default=str)  # a hub's file has another order
    key = (shapes, config.max_prompt_tokens, config.max_new_tokens)
    if key not in ENGINE:
        while ENGINE:
            ENGINE.popitem()[1].close()
        gc.collect()
        torch.cuda.empty_cache()
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[policy.dtype]
        longest = config.max_new_tokens, dtype, config.max_prompt_tokens
        ENGINE[key] = VLLMSampler(policy.base_path, *longest, config.vllm_share)
    return ENGINE[key]


def at_once(config, usual: int) -> int:
    """How many sequences are sampled at a time outside of a step; transformers has no queue."""
    return SUBMISSION if config.sampler == "vllm" else usual


def sampler_of(policy: Policy, config, prompts: PromptSet) -> Policy | VLLMSampler:
    """What samples for a policy: itself, or vLLM with its weights. Both have `sample`."""
    if config.sampler == "hf":
        return policy
    engine = engine_of(policy, config)
    engine.sync(policy, [prompts[row] for row in range(min(2, len(prompts)))], config.temperature)
    return engine
