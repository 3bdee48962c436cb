"""Whether a model that was written here is still what was written."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_qlora.errors import WeightsError
from mlx_qlora.storage import read_json, sha256_of
from mlx_qlora.weights.output_folder import MANIFEST


def verify_folder(folder: Path) -> tuple[str, ...]:
    """Compare a folder's files with the checksums in its manifest; folders without one are left alone.

    All weights are read, several files at once: about as long as loading them takes, which then finds them
    in the system's cache.

    Returns:
        A line for each small file (tokenizer, template, config.json) that was changed: people edit these.

    Raises:
        WeightsError: a file with weights is damaged, or gone.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        shards = {str(name): str(entry["sha256"]) for name, entry in manifest["shards"].items()}
        files = _digests(manifest.get("files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
    with ThreadPoolExecutor(min(len(shards) + 1, os.cpu_count() or 1)) as pool:
        sound = list(pool.map(lambda item: _is_sound(folder / item[0], item[1]), shards.items()))
    damaged = [name for name, is_sound in zip(shards, sound, strict=True) if not is_sound]
    if damaged:
        raise WeightsError(
            f"Damaged since it was written (the checksum differs): {', '.join(damaged)}.",
            where=str(folder),
            run=f"rm -r {folder}   # then the command that made it",
        )
    changed = [name for name, digest in files.items() if not _is_sound(folder / name, digest)]
    return tuple(f"{folder / name} is not as it was written; it is used as it is" for name in changed)


def _is_sound(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError:
        return False


def _digests(files: Any) -> dict[str, str]:
    """Of small files; older manifests list only names."""
    return {str(name): str(digest) for name, digest in files.items()} if isinstance(files, dict) else {}
