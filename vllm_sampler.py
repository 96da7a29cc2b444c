"""Sampling with vLLM: the interface of `policy.Policy.sample`, many times as fast on a GPU.  The one file that knows vLLM.

Four traps of sampling a Qwen3-VL with it are closed here:
- prompts go in with one `<|image_pad|>` an image (ids that are expanded already would be expanded twice), and the ids that
  vLLM made of them must be those that `policy.encode` makes;
- log-probs are the processed ones, of the distribution that is sampled at this temperature, not the raw ones;
- vision tokens are never sampled, as in `Policy.adjust`;
- weights that stayed behind: `sync` gives vLLM the trainer's after every update, in this process and without a file, empties every
  cache, and compares weights, and the log-probs of both sides on a probe.

requirements-vllm.txt says how to install it, also on a CPU.
"""

import gc
import importlib.util
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process; all of these are read when vLLM is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoConfig

from large import merged_weights
from policy import VISION_TOKENS, Completion, Group, Policy, encode, image_parts, load_tokenizer, placeholder_ids, stop_ids
from tasks import MAX_IMAGES, Prompt, UsageError

MAX_PROMPT = 32_768  # tokens, images included
PROBE_TOKENS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats a token, largest on the probe; 0.3 is seen in bf16 with images


def available() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VLLMSampler:
    def __init__(self, path: str, max_new_tokens: int, dtype: str = "auto", max_prompt: int = MAX_PROMPT, memory: float = 0.9):
        """Loads a hub id or a checkpoint folder.

        Args:
            dtype: "auto" is bf16 on CUDA, fp32 elsewhere.
            max_prompt: tokens in the longest prompt, images included.
            memory: share of the card for its weights and cache.
        """
        if not available():
            raise UsageError(
                "--sampler vllm: vllm is not installed; pip install -r requirements-vllm.txt, or take --sampler hf"
            )
        from vllm import LLM

        self.tokenizer = load_tokenizer(path)
        self.image_processor, self.image_token_id = image_parts(path)
        config = AutoConfig.from_pretrained(path)
        self.never_sampled = {getattr(config, name) for name in VISION_TOKENS if getattr(config, name, None) is not None}
        self.eos_token_ids = stop_ids(path, self.tokenizer)
        dtype = {"auto": "bfloat16" if torch.cuda.is_available() else "float32", "bf16": "bfloat16", "fp32": "float32"}[dtype]
        self.llm = LLM(
            model=str(path), dtype=dtype, seed=0, logprobs_mode="processed_logprobs", disable_log_stats=True,
            max_model_len=min(config.get_text_config().max_position_embeddings, max_prompt + max_new_tokens),
            limit_mm_per_prompt={"image": MAX_IMAGES, "video": 0}, enforce_eager=not torch.cuda.is_available(),
            gpu_memory_utilization=memory, enable_chunked_prefill=torch.cuda.is_available(),  # the CPU build cannot, with seeds
        )  # fmt: skip

    def sample(self, prompts: list[Prompt], group_size: int, max_new_tokens: int, temperature: float, seed: int) -> list[Group]:
        """P groups of G completions, as `Policy.sample`; the same seed and prompts give the same ones."""
        from vllm import SamplingParams

        asked, settings = [], []
        for number, prompt in enumerate(prompts):
            ids = placeholder_ids(prompt, self.tokenizer, self.image_token_id)
            asked.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": prompt.images}} if prompt.images else {}))
            settings.append(SamplingParams(
                n=group_size, temperature=temperature, top_p=1.0, top_k=0, logprobs=0, max_tokens=max_new_tokens,
                logit_bias=dict.fromkeys(self.never_sampled, float("-inf")), stop_token_ids=self.eos_token_ids,
                seed=(seed + number * group_size) % 2**62,  # vLLM adds the slot's number
            ))  # fmt: skip
        answers = self.llm.generate(asked, settings, use_tqdm=False)
        return [self._group(prompt, answer) for prompt, answer in zip(prompts, answers)]

    def _group(self, prompt: Prompt, answer) -> Group:
        inputs = encode(prompt, self.tokenizer, self.image_processor, self.image_token_id)
        if answer.prompt_token_ids != inputs.token_ids:
            raise RuntimeError(f"prompt {prompt.id}: vLLM read {len(answer.prompt_token_ids)} tokens where the trainer reads "
                               f"{len(inputs.token_ids)}; its images would be counted otherwise. Is the checkpoint's image processor "
                               "the one that vLLM loads?")  # fmt: skip
        completions = []
        for output in answer.outputs:
            ids = list(output.token_ids)
            if vision := set(ids) & self.never_sampled:
                raise RuntimeError(
                    f"prompt {prompt.id}: vLLM sampled the vision token {min(vision)}, which no training forward can read"
                )
            logprobs = [tokens[id].logprob for tokens, id in zip(output.logprobs, ids)]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            completions.append(Completion(prompt.id, ids, logprobs, text, finished=ids[-1] in self.eos_token_ids))
        return Group(prompt, inputs, completions)

    # ------------------------------------------------------------------------------------------------------------ sync

    def sync(self, policy: Policy, probe: list[Prompt], temperature: float) -> None:
        """Gives vLLM the policy's weights; `difference` is then the largest of the two sides' log-probs on the probe, nats a token.

        Raises:
            RuntimeError: they differ by more than rounding explains, so that vLLM does not sample from the policy.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(policy.model)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: it holds keys and values of the old weights")
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self._compare_weights(policy)
        groups = self.sample(probe, 1, PROBE_TOKENS, temperature, seed=0)
        rows = [(group.inputs, c) for group in groups for c in group.completions]
        with torch.no_grad():
            logprobs, mask = policy.logprobs([(inputs, c.token_ids) for inputs, c in rows], temperature)  # (B, T)
        theirs = torch.tensor([value for _, c in rows for value in c.behavior_logprobs])
        ours = logprobs[mask].float().cpu()
        worst = (ours - theirs).abs().argmax()
        self.difference = (ours - theirs).abs()[worst].item()
        if not self.difference <= TOLERANCE.get(policy.dtype, TOLERANCE[torch.float32]):
            raise RuntimeError(f"vLLM does not have the trainer's weights: of a token of the probe its log-prob is {theirs[worst]:.4f}, "
                               f"the trainer's {ours[worst]:.4f}. The sync failed; take --sampler hf, and report it")  # fmt: skip

    def _compare_weights(self, policy: Policy) -> None:
        """Bit by bit, of the weights that vLLM keeps as they are. In bf16 a step is too small for the probe, but it is in the embeddings."""
        theirs = self.llm.apply_model(lambda model: dict(model.named_parameters()))[0]
        for name, weight in policy.model.state_dict().items():
            if name.endswith(("embed_tokens.weight", "layernorm.weight", "language_model.norm.weight")):
                other = theirs[name.replace("model.language_model.", "language_model.model.", 1)][: len(weight)].to(
                    weight.device
                )
                if (differ := other != weight).any():
                    raise RuntimeError(f"vLLM does not have the trainer's weights: {name} holds {other[differ][0].item()} there and "
                                       f"{weight[differ][0].item()} here. The sync failed; take --sampler hf, and report it")  # fmt: skip


ENGINE: dict[tuple, VLLMSampler] = {}  # at most one: a second would find the card full


def engine_of(policy: Policy, config) -> VLLMSampler:
    """The process's vLLM, for models with the policy's shapes; made anew only where they differ."""
    shapes = policy.model.config.to_diff_dict()
    key = (repr([shapes.get("text_config"), shapes.get("vision_config")]), config.max_prompt_tokens, config.max_new_tokens)
    if key not in ENGINE:
        ENGINE.clear()
        gc.collect()
        torch.cuda.empty_cache()
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[policy.dtype]
        ENGINE[key] = VLLMSampler(policy.base_path, config.max_new_tokens, dtype, config.max_prompt_tokens, config.vllm_memory)
    return ENGINE[key]
