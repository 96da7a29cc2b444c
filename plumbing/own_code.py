"""A function of the user's own: what --reward and --dataset name as FILE.py:NAME."""

import importlib.util
import inspect
import sys
from pathlib import Path

from plumbing import UsageError


def is_function(spec: str) -> bool:
    """Whether a flag's value names a function in a file."""
    return spec.rpartition(":")[0].endswith(".py")


def load_function(flag: str, spec: str, *parameters: str):
    """The function NAME of FILE.py. It may import what lies beside its file.

    Args:
        flag: for messages. parameters: what it is called with, by position.

    Raises:
        UsageError: there is no such file or function, it has other parameters, or its file fails.
    """
    path, _, name = spec.rpartition(":")
    asked = f"{flag} {spec}: "
    if not is_function(spec) or not Path(path).is_file():
        raise UsageError(f"{asked}there is no such file; give it as my_file.py:my_function")
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
        inspect.signature(function).bind(*parameters)
    except (AttributeError, TypeError) as error:
        wanted = f"def {name}({', '.join(parameters)})"
        raise UsageError(f"{asked}{error}; {path} must have {wanted}") from error
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"{asked}{path} fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.pop(0)
    return function
