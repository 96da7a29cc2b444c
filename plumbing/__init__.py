"""What you need to run the method, but not to understand it. Read rollout.py, skip the rest.

rollout         the nouns: Prompt, Completion, Group, Sample
encode          texts and pictures to token ids
notation        how answers are written: one notation, exact numbers, units
sympy_process   math-verify where it can hang nothing
settings        flags that every command shares, their defaults and checks
metrics         numbers out of groups; the step's log line
lora            adapters that are trained in place of the weights
model           the network: sampling and log-probabilities
data            prompts from an embedded world or any data set
checkpoints     the only place that writes or removes one
vllm_sampler    the only place that knows vLLM
memory          what a configuration takes, before and at the start of a run
command         flags in, exit code out
run             the run directory, its seeds and its resume
guide_cache     guide.jsonl
figures         the pictures of signal_theory.py
report          curves, summary, and the last words of a run
"""


class UsageError(Exception):
    """Something that the user can mend. The message, shown without a traceback, says how."""
