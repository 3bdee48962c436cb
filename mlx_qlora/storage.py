"""Files that are either whole or not there: temporary sibling, fsync, one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlx_qlora.errors import StorageError

if TYPE_CHECKING:
    import mlx.core as mx

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears under `path` only when it is whole and on disk.

    Raises:
        StorageError: the disk is full, read-only or gone; an older `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with said_clearly(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` for UTF-8 text."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: object) -> None:
    """`write_file` for JSON, keys as given, indented, ending in a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """`write_file` for safetensors."""
    import mlx.core as mx

    # Given a path, MLX hides why a write failed; a Python file keeps the error number.
    write_file(path, lambda file: mx.save_safetensors(file, dict(arrays), metadata=dict(metadata)))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill; when the context ends well, it becomes `path` by one rename.

    An older folder of that name is replaced. If anything fails it stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with said_clearly(path):
        remove_folder(temporary)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync_folder(temporary)
            _replace_folder(temporary, path)
            sync_folder(path.parent)
        finally:
            remove_folder(temporary)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing; their names are durable when this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder if it is there. A kill half-way leaves nothing under its own name."""
    if path.exists():
        doomed = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`."""
    for left_over in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_json(value: Any) -> Any:
    """`value` as JSON can say it: paths as text, numbers that are none as null."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Any:
    """The value in a JSON file; OSError or ValueError when it cannot be read."""
    return json.loads(path.read_bytes())


@contextmanager
def said_clearly(path: Path) -> Iterator[None]:
    """Turn an operating-system error into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageError(
                "The disk is full (or a size limit is reached); what was there before is untouched.",
                where=str(path),
                run="df -h   # make room, then run the same command again (train: with --resume)",
            ) from error
        raise StorageError(f"Cannot write: {error.strerror or error}.", where=str(path)) from error


def _replace_folder(new: Path, path: Path) -> None:
    if path.exists():
        remove_folder(path)
    new.rename(path)


def cache_root() -> Path:
    """``$MLX_QLORA_CACHE``, or the platform's folder for things that can be made again."""
    if explicit := os.environ.get("MLX_QLORA_CACHE"):
        return Path(explicit)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_qlora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_qlora"
