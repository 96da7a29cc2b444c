"""Where rows come from: a data file, a folder, the hub, or a function of the user's own."""

import json
from pathlib import Path

from plumbing import UsageError
from plumbing.encode import first_line, is_lfs_pointer
from plumbing.own_code import is_function, load_function

HUB_CONFIGS = {"open-r1/DAPO-Math-17k-Processed": "en"}  # of data sets that have several
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def open_dataset(name: str):
    """The rows of the split "train": of a data file, a folder, or a hub id."""
    import datasets  # takes a second to import, and the cards do without

    if is_function(name):
        return table_of(name, load_function("--dataset", name)())
    kind = FILE_TYPES.get(Path(name).suffix)
    if kind and not Path(name).is_file():
        raise UsageError(f"--dataset {name}: there is no such file")
    if Path(name).is_file() and not kind:
        raise UsageError(f"--dataset {name}: cannot be read; only {', '.join(FILE_TYPES)} can")
    try:
        if kind:
            return datasets.load_dataset(kind, data_files=name, split="train")
        return datasets.load_dataset(name, HUB_CONFIGS.get(name), split="train")
    except Exception as error:  # datasets raises a dozen types for not there, no split, no network
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        if kind:
            reason = fault_of(Path(name), reason)
            raise UsageError(f"--dataset {name}: cannot be loaded ({reason})") from error
        raise UsageError(
            f"--dataset {name}: cannot be loaded ({type(error).__name__}: {reason}); check the "
            'name and that it has a split "train". Without a network, give a data file or a '
            "folder, or set HF_HOME to the cache of a machine that has loaded it"
        ) from error


def table_of(name: str, rows):
    """What a function returned, as a data set: a list of dicts, a row each."""
    import datasets

    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"--dataset {name}: must return a list of dicts, a row each")
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    for key, values in columns.items():
        if len({frozenset(value) for value in values if isinstance(value, dict)}) > 1:
            raise UsageError(
                f"--dataset {name}: column {key} has dicts with different keys, which a table "
                "would fill up; keep each as text, by json.dumps"
            )
    try:
        return datasets.Dataset.from_dict(columns)
    except Exception as error:  # a column of several kinds
        raise UsageError(f"--dataset {name}: {first_line(error)}") from error


def fault_of(path: Path, reason: str) -> str:
    """What is wrong with a data file, where `datasets` does not say it well."""
    content = path.read_bytes()
    if not content.strip(b"[]{} \r\n") or "corresponds to no data" in reason:
        return "it holds no rows"
    if is_lfs_pointer(path):
        return "it is a Git LFS pointer; git lfs pull brings it"
    lines = content.splitlines() if path.suffix.startswith(".json") else []
    for number, line in enumerate([content] if content.lstrip()[:1] == b"[" else lines, 1):
        try:
            json.loads(line.strip() or "null")
        except ValueError as error:
            said = getattr(error, "msg", str(error))  # what is no UTF-8 has none
            hint = "; a backslash is written twice, as in \\\\frac" if "escape" in said else ""
            return f"line {number}: {said}{hint}"
    return reason
