"""Files that a kill, a power cut or a second process leaves whole, and damage that is told.

A directory belongs to one process at a time. A file is replaced in one act, once its new text is
on the disk; a line that was appended is on the disk, too.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from plumbing import UsageError

LOCK = "lock"  # the file that is locked; it names the process
LONGEST_LINE = 1 << 28  # bytes; no command writes a longer one
LOCKS = {}  # of this process: each lock's inode, with its open file


def inode(path: Path) -> tuple[int, int] | None:
    """What a file keeps when its directory is moved."""
    found = path.stat() if path.is_file() else None
    return found and (found.st_dev, found.st_ino)


def is_locked(out: Path) -> bool:
    """Whether the directory is this process's own."""
    return inode(out / LOCK) in LOCKS


def lock(out: Path) -> None:
    """Keeps other processes out of a directory. The kernel frees it, however this one ends."""
    file = open(out / LOCK, "a+")  # noqa: SIM115, it stays open
    if is_locked(out):
        file.close()
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise UsageError(
            f"--out {out}: {file.read() or 'another process'} writes there now; let it end, or "
            "choose another --out"
        ) from error
    except OSError as error:  # a network file system without locks
        tqdm.write(f"{out}: cannot be locked ({error.strerror}); start no second command on it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename} ({' '.join(sys.argv)})")
    file.flush()
    LOCKS[inode(out / LOCK)] = file


def make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"--out {out}: is a file, not a directory; choose another one") from error


def on_disk(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_aside(path: Path, text: str) -> None:
    """Replaces a text file in one act: a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    on_disk(aside)
    aside.rename(path)


def json_lines(lines: Iterable[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def append(path: Path, lines: Iterable[dict]) -> None:
    """Adds lines of JSON to a file."""
    with open(path, "a") as file:
        file.write(json_lines(lines))
    on_disk(path)


def read_jsonl(path: str | Path, *numbers: str) -> list[dict]:
    """All whole lines; a last line that a kill cut short does not count.

    Args:
        numbers: names of whole numbers that every line must hold.
    """
    path, found = Path(path), []
    if not path.is_file():
        return found
    with open(path, "rb") as file:
        for count, text in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if not text.endswith(b"\n") and len(text) < LONGEST_LINE:
                break
            try:
                found.append(json.loads(text))
                if not isinstance(found[-1], dict):
                    raise ValueError("it is no object")
                if missing := [name for name in numbers if type(found[-1].get(name)) is not int]:
                    raise ValueError(f"it has no whole number {missing[0]!r}")
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{path}: is not JSON lines (line {count}: {error}); mend it or move it away, "
                    "and the same command goes on"
                ) from error
    return found


def seal_of(stored: dict, *more) -> str:
    """A hash of an object, but for its own "seal", and of what belongs to it."""
    rest = {name: value for name, value in stored.items() if name != "seal"}
    return hashlib.sha256(json.dumps([rest, *more]).encode()).hexdigest()[:32]


def is_sealed(stored: dict, *more) -> bool:
    """Whether it is as it was written; what is made by hand may do without a seal."""
    return stored.get("seal") in (None, seal_of(stored, *more))


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """Half of each file's SHA-256; as many files at once as there are cores."""

    def hashed(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]

    with ThreadPoolExecutor() as pool:
        return list(pool.map(hashed, paths))
