"""Checkpoints: everything a run needs to go on, whole or absent, and checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.config import RunConfig, build_config, difference
from mlx_qlora.errors import CheckpointError, MlxQloraError, listed
from mlx_qlora.storage import (
    new_folder,
    read_json,
    remove_folder,
    said_clearly,
    sha256_of,
    sweep,
    write_json,
    write_tensors,
    write_text,
)
from mlx_qlora.weights.shards import read_tensors

FORMAT_VERSION = 1
ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{7,})")

# Keys that change what is shown or kept, never what is computed. Paths are covered by fingerprints.
_FREE_KEYS = (
    "model.path",
    "model.offload",
    "model.offload_budget_gib",
    "data.path",
    "training.steps_per_report",
    "training.keep_checkpoints",
    "training.memory_budget_gib",
    "training.report_samples",
    "training.trackers",
    "training.tracker_project",
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. With the weights and the optimizer state, it decides all that follows."""

    step: int = 0
    """Updates done; epoch and place in the epoch follow from it."""
    tokens: int = 0
    """Real tokens read so far, prompts included."""
    epoch_nll: float = 0.0
    """Summed loss of the current epoch's updates, in nats, over `epoch_target_tokens`."""
    epoch_target_tokens: int = 0
    validated_step: int = -1
    """The last update a validation was made after."""
    best_step: int = 0
    best_loss: float | None = None
    validations_without_best: int = 0
    learning_rate_factor: float = 1.0
    """Halved by each roll-back."""
    rollbacks: int = 0
    bad_in_a_row: int = 0
    """Updates skipped since the last good one."""
    skipped_updates: int = 0
    halvings: int = 0
    """How often the micro-batch was halved for want of memory."""


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint must share with the run that continues it."""

    config: RunConfig
    base_fingerprint: str
    data_fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    progress: Progress
    adapter: dict[str, mx.array]
    optimizer: dict[str, mx.array]


def saved_steps(folder: Path) -> list[int]:
    """The steps a ``checkpoints/`` folder has checkpoints of, oldest first; whole or not."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("step-*")]
    return sorted(int(match.group(1)) for match in names if match)


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: ``checkpoints/`` of the adapter.
        identity: Of the run; stored in each checkpoint and compared when one is loaded.
        keep: How many of the newest are kept; the best is kept besides.
    """

    def __init__(self, folder: Path, identity: RunIdentity, keep: int) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(
        self, progress: Progress, adapter: Mapping[str, mx.array], optimizer: Mapping[str, mx.array]
    ) -> Path:
        """Publish a checkpoint by one rename, move the pointers, then delete what is too old.

        Raises:
            StorageError: it could not be written; the older ones are untouched.
        """
        path = self.path_of(progress.step)
        with new_folder(path) as partial:
            write_tensors(partial / ADAPTER, adapter, {"format": "mlx"})
            write_tensors(partial / OPTIMIZER, optimizer, {"format": "mlx"})
            files = {name: sha256_of(partial / name) for name in (ADAPTER, OPTIMIZER)}
            write_json(partial / STATE, sealed(self._state(progress, files)))
        write_text(self.folder / "latest", f"{path.name}\n")
        if progress.best_loss is not None:
            write_text(self.folder / "best", f"{self.path_of(progress.best_step).name}\n")
        self._prune(progress)
        return path

    def path_of(self, step: int) -> Path:
        """The folder of the checkpoint after update `step`."""
        return self.folder / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, oldest first."""
        return saved_steps(self.folder)

    def load_newest(self) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint that is whole, and why newer ones were passed over.

        Raises:
            CheckpointError: there is none, or it belongs to another run (the differences are listed).
        """
        sweep(self.folder)
        broken: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step), broken
            except CheckpointError as error:
                if error.where != str(self.path_of(step)):
                    raise
                broken.append(f"{self.path_of(step).name}: {error.what}")
        raise CheckpointError(
            "There is no checkpoint to resume from." + (f"\n{listed(broken)}" if broken else ""),
            where=f"{self.folder}/",
            run="mlx-qlora train …   # without --resume starts the run",
        )

    def load(self, step: int) -> Checkpoint:
        """The checkpoint after update `step`, verified.

        Raises:
            CheckpointError: it is broken (`where` is its folder) or belongs to another run.
        """
        path = self.path_of(step)
        try:
            state = unsealed(read_json(path / STATE))
            damaged = [n for n, digest in state["files"].items() if sha256_of(path / n) != digest]
            if damaged:
                raise ValueError(f"checksum of {', '.join(damaged)} differs")
            progress = Progress(**state["progress"])
            tensors = {name: read_tensors(path / name) for name in (ADAPTER, OPTIMIZER)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MlxQloraError) as error:
            raise CheckpointError(f"damaged ({error})", where=str(path)) from None
        self._check_identity(state, path)
        return Checkpoint(path, progress, tensors[ADAPTER], tensors[OPTIMIZER])

    def drop_after(self, step: int) -> None:
        """Delete checkpoints of later updates: broken ones, or those a roll-back undoes."""
        for later in self.steps():
            if later > step:
                remove_folder(self.path_of(later))

    def _state(self, progress: Progress, files: dict[str, str]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "progress": asdict(progress),
            "files": files,
            "base_fingerprint": self.identity.base_fingerprint,
            "data_fingerprint": self.identity.data_fingerprint,
            "config": self.identity.config.model_dump(mode="json"),
        }

    def _check_identity(self, state: dict[str, Any], path: Path) -> None:
        saved = build_config(state["config"], where=str(path / STATE))
        differences = [
            line
            for line in difference(saved, self.identity.config)
            if not line.startswith(tuple(f"{key}:" for key in _FREE_KEYS))
        ]
        if state["base_fingerprint"] != self.identity.base_fingerprint:
            differences.append("the base model's weights are others")
        if state["data_fingerprint"] != self.identity.data_fingerprint:
            differences.append("the training data, as tokens, is another")
        if differences:
            raise CheckpointError(
                f"The checkpoint belongs to another run:\n{listed(differences)}",
                where=str(path / STATE),
                run=f"mlx-qlora train --resume --adapter-path {self.folder.parent}   "
                "# goes on as it was begun; or choose another --adapter-path",
            )

    def _prune(self, progress: Progress) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], progress.step}
        if progress.best_loss is not None:
            kept.add(progress.best_step)
        with said_clearly(self.folder):
            for step in steps:
                if step not in kept:
                    remove_folder(self.path_of(step))


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with a digest of itself."""
    return {**state, "sha256": _digest(state)}


def unsealed(state: dict[str, Any]) -> dict[str, Any]:
    """`state` without its digest; ValueError when they do not agree."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    if state["sha256"] != _digest(content):
        raise ValueError("checksum of the state differs")
    return content


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
