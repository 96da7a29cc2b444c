"""Further commands, each run with `python -m commands.NAME` (or `accelerate launch -m`).

luffy, exgrpo, rlep   the paper's rivals: other sources for the same slot
evaluate              a checkpoint on eight benchmarks (benchmarks.py is their table)
merge                 a checkpoint of LoRA adapters as an ordinary model
npo_trl               NPO and AutoNPO with TRL taking the steps, for many GPUs
"""
