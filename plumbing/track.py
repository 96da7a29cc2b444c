"""Live curves in wandb or trackio, for --track. metrics.jsonl stays the truth.

Both want steps that only grow. So a run that resumes, or whose steps go back at a rollback, begins
another curve of the same group.
"""

import importlib
from pathlib import Path

from plumbing import UsageError


class Curve:
    """What is logged of one run directory; without --track nothing is."""

    def __init__(self, config, out: Path):
        self.config, self.out, self.step = config, out, None
        self.library = None
        if config.track:
            try:
                self.library = importlib.import_module(config.track)
            except ImportError as error:
                name = config.track
                raise UsageError(f"--track {name}: not installed; pip install {name}") from error

    def log(self, line: dict) -> None:
        """Adds a line of metrics.jsonl: its numbers, at its step."""
        if not self.library:
            return
        if self.step is None or line["step"] < self.step:
            self.close()
            name, flags = f"{self.out.name} from step {line['step']}", vars(self.config)
            try:
                self.library.init(project="npo", group=str(self.out), name=name, config=flags)
            except Exception as error:  # no key, no network
                said = f"--track {self.config.track}: {str(error).splitlines()[0]}"
                raise UsageError(f"{said}; log in there, or set WANDB_MODE=offline") from error
        self.step = line["step"]
        numbers = {n: value for n, value in line.items() if isinstance(value, int | float)}
        numbers.pop("step")  # which both know by itself
        self.library.log(numbers, step=self.step)

    def close(self, failed: bool = False) -> None:
        """Ends the curve, so that what was logged is uploaded; a later line begins another."""
        if self.library and self.step is not None:
            how = {"exit_code": int(failed)} if self.config.track == "wandb" else {}
            self.library.finish(**how)
            self.step = None
