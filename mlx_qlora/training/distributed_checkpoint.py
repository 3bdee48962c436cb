"""One run's checkpoints, for all of its ranks: rank 0 has the folder, the others are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from mlx_qlora.training.checkpoint import Checkpoint, CheckpointStore, Progress
from mlx_qlora.training.distributed import Ranks


class SharedCheckpoints:
    """What `CheckpointStore` does, by all ranks together: rank 0 reads and writes, all get the same.

    Where rank 0 fails, its error ends the run; the others wait for it until they are stopped.
    """

    def __init__(self, store: CheckpointStore, ranks: Ranks) -> None:
        self._store, self._ranks = store, ranks
        self.folder = store.folder

    def save(
        self, progress: Progress, adapter: Mapping[str, mx.array], optimizer: Mapping[str, mx.array]
    ) -> Path:
        """As `CheckpointStore.save`, on rank 0; nothing on the others."""
        if self._ranks.is_first:
            return self._store.save(progress, adapter, optimizer)
        return self._store.path_of(progress.step)

    def steps(self) -> list[int]:
        """As `CheckpointStore.steps`."""
        steps: list[int] = self._ranks.value_from_first(self._store.steps() if self._ranks.is_first else None)
        return steps

    def load_newest(self) -> tuple[Checkpoint, list[str]]:
        """As `CheckpointStore.load_newest`."""
        found, broken = self._store.load_newest() if self._ranks.is_first else (None, [])
        return self._from_first(found), self._ranks.value_from_first(broken)

    def load(self, step: int) -> Checkpoint:
        """As `CheckpointStore.load`."""
        return self._from_first(self._store.load(step) if self._ranks.is_first else None)

    def drop_after(self, step: int) -> None:
        """As `CheckpointStore.drop_after`, on rank 0; nothing on the others."""
        if self._ranks.is_first:
            self._store.drop_after(step)

    def _from_first(self, found: Checkpoint | None) -> Checkpoint:
        told = {"path": str(found.path), "progress": asdict(found.progress)} if found is not None else None
        told = self._ranks.value_from_first(told)
        adapter = self._ranks.tensors_from_first(found.adapter if found is not None else None)
        optimizer = self._ranks.tensors_from_first(found.optimizer if found is not None else None)
        return Checkpoint(Path(told["path"]), Progress(**told["progress"]), adapter, optimizer)
