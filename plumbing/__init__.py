"""What you need to run the method, but not to understand it. Read rollout.py, skip the rest.

rollout         the nouns: Prompt, Completion, Group, Sample
encode          texts and pictures to token ids
notation        how answers are written: one notation, exact numbers, units
sympy_process   math-verify where it can hang nothing
settings        flags that every command shares, their defaults and checks
metrics         numbers out of groups; the step's log line
files           what a kill, a power cut or a second process cannot harm
lora            adapters that are trained in place of the weights
attention       attention without a mask where none is needed
model           the network: sampling and log-probabilities
pictures        what a data set stores, as a person sees it
rows            a row of a data set: question, options, pictures, gold
sources         rows of a file, a folder, the hub or a user's function
data            prompts from an embedded world or any data set
exact           accuracy without sampling
checkpoints     the only place that writes or removes one
vllm_sampler    the only place that knows vLLM
memory          what a configuration takes, before and at the start of a run
own_code        a user's function, for --reward and --dataset
record          rollouts/: every answer of a step
track           live curves in wandb or trackio
fingerprints    what a run must find again when it goes on
command         flags in, exit code out
run             the run directory, its seeds and its resume
guide_cache     guide.jsonl
trl_data        prompts and rewards as TRL takes them
trl_run         the same directory where TRL takes the steps, on many processes
figures         the pictures of signal_theory.py
report          curves, summary, and the last words of a run
"""


class UsageError(Exception):
    """Something that the user can mend. The message, shown without a traceback, says how."""


class Unusable(Exception):
    """A row of a data set that cannot be asked or judged."""

    def __init__(self, reason: str, remedy: str = "", got=None):
        """`remedy` is what to do where this holds for all rows, `got` what is there instead."""
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy
        self.shown = "" if got is None else f": {type(got).__name__} {str(got)[:60]!r}"
