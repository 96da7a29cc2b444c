"""Sampling with vLLM: the interface of `policy.Policy.sample`, many times as fast on a GPU.  The one file that knows vLLM.

Three traps of sampling a Qwen3-VL with it are closed here:
- prompts go in with one `<|image_pad|>` an image (ids that are expanded already would be expanded twice), and the ids that
  vLLM made of them must be those that `policy.encode` makes;
- log-probs are the processed ones, of the distribution that is sampled at this temperature, not the raw ones;
- vision tokens are never sampled, as in `Policy.adjust`.

requirements-vllm.txt says how to install it, also on a CPU.
"""

import importlib.util
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process; all of these are read when vLLM is imported
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoConfig, AutoImageProcessor, GenerationConfig

from policy import VISION_TOKENS, Completion, Group, encode, load_tokenizer, placeholder_ids
from tasks import Prompt, UsageError

MAX_IMAGES = 16  # in one prompt
MAX_PROMPT = 32_768  # tokens, images included


def available() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VLLMSampler:
    def __init__(self, path: str, max_new_tokens: int, dtype: str = "auto"):
        """Loads a hub id or a checkpoint folder. `dtype` "auto" is bf16 on CUDA, fp32 elsewhere."""
        if not available():
            raise UsageError(
                "--sampler vllm: vllm is not installed; pip install -r requirements-vllm.txt, or take --sampler hf"
            )
        from vllm import LLM

        self.tokenizer = load_tokenizer(path)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        config = AutoConfig.from_pretrained(path)
        self.image_token_id = config.image_token_id
        never = {getattr(config, name) for name in VISION_TOKENS if getattr(config, name, None) is not None}
        self.allowed = [id for id in range(config.get_text_config().vocab_size) if id not in never]
        stop = GenerationConfig.from_pretrained(path).eos_token_id
        self.eos_token_ids = stop if isinstance(stop, list) else [stop]
        dtype = {"auto": "bfloat16" if torch.cuda.is_available() else "float32", "bf16": "bfloat16", "fp32": "float32"}[dtype]
        self.llm = LLM(
            model=str(path), dtype=dtype, seed=0, logprobs_mode="processed_logprobs", disable_log_stats=True,
            max_model_len=min(config.get_text_config().max_position_embeddings, MAX_PROMPT + max_new_tokens),
            limit_mm_per_prompt={"image": MAX_IMAGES, "video": 0}, enforce_eager=not torch.cuda.is_available(),
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
                allowed_token_ids=self.allowed, stop_token_ids=self.eos_token_ids,
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
            logprobs = [tokens[id].logprob for tokens, id in zip(output.logprobs, ids)]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            completions.append(Completion(prompt.id, ids, logprobs, text, finished=ids[-1] in self.eos_token_ids))
        return Group(prompt, inputs, completions)
