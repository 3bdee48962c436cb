"""Room on the disks, and the right to write where models and adapters go."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_qlora.machine.finding import Finding
from mlx_qlora.machine.system import GIB
from mlx_qlora.storage import cache_root

SCARCE_BYTES, TOO_LITTLE_BYTES = 20 * GIB, 2 * GIB
"""A 7B model is 14 GB to fetch, and 4 GB quantized; with less than the second little can be done."""


def folders(working: Path | None = None) -> Iterator[Finding]:
    """The cache of quantized models, the hub's cache, and the folder one stands in.

    Args:
        working: That folder; the current one when not given.
    """
    from huggingface_hub import constants

    cache, hub = cache_root(), Path(constants.HF_HUB_CACHE)
    make_room = f"du -sh {_quoted(cache)}/*   # what is there can be deleted, and is made again"
    yield folder("cache", cache, make_room, "MLX_QLORA_CACHE")
    yield folder("hub cache", hub, "hf cache ls   # then: hf cache rm model/OWNER/NAME", "HF_HUB_CACHE")
    yield folder("this folder", working or Path.cwd(), "df -h .", None)


def folder(subject: str, path: Path, make_room: str, variable: str | None) -> Finding:
    """Whether one can write there, and how much room there is; nothing is created or left behind.

    Args:
        subject: What the folder is for.
        path: It need not be there yet.
        make_room: The command that shows what could be deleted.
        variable: The environment variable that moves it elsewhere.
    """
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    refused = why_not_writable(there)
    free = shutil.disk_usage(there).free
    facts = {"path": str(path), "free_bytes": free, "is_writable": refused is None}
    if refused is not None:
        owned = f'sudo chown -R "$(id -un)" {_quoted(there)}'
        mend = (
            f"{owned}   # or: export {variable}=FOLDER" if variable else "cd ~   # or another folder of yours"
        )
        return Finding(subject, "problem", f"{path} cannot be written to ({refused})", mend, facts)
    text = f"{path}, {free / GIB:.1f} GiB free"
    if free < TOO_LITTLE_BYTES:
        return Finding(subject, "problem", f"{text}: the disk is full", make_room, facts)
    if free < SCARCE_BYTES:
        return Finding(subject, "warning", f"{text}: little for models of 7B and more", make_room, facts)
    return Finding(subject, "ok", text, facts=facts)


def why_not_writable(path: Path) -> str | None:
    """Try to write a file in a folder; the reason when that fails. A full disk is none: it can be emptied."""
    if not path.is_dir():
        return "it is no folder"
    try:
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return None if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or 0).lower()


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
