"""The folder of a model that is written: one writer at a time, whole or not there, small files copied."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

from mlx_qlora.errors import StorageError
from mlx_qlora.storage import read_json, remove_folder, said_clearly, write_file
from mlx_qlora.weights.shards import INDEX

MANIFEST = "mlx_qlora_manifest.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "*.py")


def copy_small_files(folder: Path, output: Path) -> list[Path]:
    """Copy tokenizer, templates and code of a model, not config.json, index and manifest; the originals."""
    candidates = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    copied = sorted(path for path in candidates if path.name not in ("config.json", INDEX, MANIFEST))
    for path in copied:
        write_file(output / path.name, partial(_copy, path))
    return copied


def _copy(path: Path, file: BinaryIO) -> None:
    with path.open("rb") as original:
        shutil.copyfileobj(original, file)


def is_finished(output: Path, digest: str) -> bool:
    """Whether this very plan was carried out here, every file is there and every shard has its size."""
    try:
        manifest = read_json(output / MANIFEST)
        is_whole = all((output / n).stat().st_size == e["bytes"] for n, e in manifest["shards"].items())
        is_whole = is_whole and all((output / name).is_file() for name in manifest["files"])
        return manifest["plan"] == digest and manifest["finished"] is True and is_whole
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def make_way(output: Path, replace_damaged: bool) -> None:
    """Remove a damaged copy, if that is allowed.

    Raises:
        StorageError: something is there, and it is not.
    """
    if replace_damaged:
        remove_folder(output)
    elif output.exists():
        raise StorageError(
            "There is something else here already, or a damaged copy; nothing was touched.",
            where=str(output),
            run="choose another --output, or remove this one",
        )


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Only one process writes an output; a second one waits, and then finds it finished."""
    with said_clearly(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = output.with_name(f".{output.name}.lock")
        file = _lock_file(lock)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            file.close()


def _lock_file(lock: Path) -> IO[str]:
    """The locked file that has the name now: one waited for may have been removed by who held it."""
    while True:
        file = lock.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()
