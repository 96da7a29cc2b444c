"""A function of the user's own: what --reward and --dataset name as FILE.py:NAME."""

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from plumbing import UsageError


def is_function(spec: str) -> bool:
    """Whether a flag's value names a function in a file."""
    return spec.rpartition(":")[0].endswith(".py")


@functools.cache  # its file is run once in a process
def load_function(flag: str, spec: str, *parameters: str) -> Callable:
    """The function NAME of FILE.py. It may import what lies beside its file.

    Args:
        flag: for messages. parameters: what it is called with, by position.

    Raises:
        UsageError: there is no such file or function, it has other parameters, or its file fails;
            later, the function fails.
    """
    path, _, name = spec.rpartition(":")
    asked = f"{flag} {spec}: "
    if not is_function(spec) or not Path(path).is_file():
        raise UsageError(f"{asked}give a file that is there and a name, as my_file.py:my_function")
    sys.path.append(str(Path(path).resolve().parent))
    module_spec = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses look themselves up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise failed(asked, path, error) from error
    function, wanted = getattr(module, name, None), f"def {name}({', '.join(parameters)})"
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise UsageError(f"{asked}{path} must have {wanted} ({error})") from error

    @functools.wraps(function)
    def called(*given):
        try:
            return function(*given)
        except Exception as error:
            raise failed(asked, path, error) from error

    return called


def failed(asked: str, path: str, error: BaseException) -> UsageError:
    """The first line of what a file or a function raised, and which of its lines led there."""
    places, said = traceback.extract_tb(error.__traceback__), str(error).split("\n")[0]
    place = [place for place in places if Path(place.filename).name == Path(path).name] or places
    where = f"line {place[-1].lineno} of {Path(place[-1].filename).name}"
    return UsageError(f"{asked}{type(error).__name__}: {said} ({where})")
