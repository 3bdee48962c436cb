"""What a training run makes of its frozen layers: a cache of their hidden states, or a reason against one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.dataset.records import Example
from mlx_qlora.objective.loss import Objective
from mlx_qlora.objective.prefix import FrozenPrefix, NoPrefix, StoredPrefix, frozen_prefix
from mlx_qlora.storage import cache_root
from mlx_qlora.training.guard import StopRequest
from mlx_qlora.training.prefix_cache import OnBytes, PrefixCache, size_text
from mlx_qlora.weights.loader import BaseModel
from mlx_qlora.weights.source import fingerprint

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PrefixRun:
    """What one training run makes of its frozen layers."""

    objective: Objective
    """With the stored hidden states where there are any."""
    notes: list[str] = field(default_factory=list)
    """What a person should know: what is kept, how large it is, and where; or why nothing is."""
    cache: PrefixCache | None = None
    examples: Sequence[Example] = ()

    def fill(self, *, on_bytes: OnBytes | None, stop: StopRequest, run: str) -> None:
        """Compute what is missing; see `PrefixCache.fill`."""
        if self.cache is None or self.objective.prefix is None:
            return
        model, layers = self.objective.model, self.objective.prefix.layers
        was_training = model.training
        model.eval()
        try:
            with self.objective.active():
                self.cache.fill(layers.hidden, self.examples, on_bytes=on_bytes, stop=stop, run=run)
        finally:
            model.train(was_training)


def prefix_run(
    objective: Objective,
    base: BaseModel,
    examples: Sequence[Example],
    data_fingerprint: str,
    *,
    dtype: mx.Dtype | None = None,
    root: Path | None = None,
) -> PrefixRun:
    """Open the cache for the frozen layers of a run, or find out why there can be none.

    It lies in the user's cache, where the next run on the same base, data and depth finds it, and not in the
    folder that people ship.

    Args:
        dtype: The type hidden states are kept in; None: their own when it has 16 bits, which is exact, else
            bfloat16, which rounds each of a float32 model's to within 2⁻⁹ of itself. On the tiny models of
            seven architectures that moved the loss by at most 1e-4 and a gradient by at most 7e-3 of its
            largest element (tests/unit/objective/test_prefix.py holds 1e-3 and 2e-2 for all of them).
        root: The folder of all such caches.

    Raises:
        StorageError: the disk has no room for what is missing.
    """
    prefix = frozen_prefix(objective.model)
    if isinstance(prefix, NoPrefix):
        return PrefixRun(objective, [f"frozen prefix: {prefix.reason}"])
    sample = prefix.hidden(mx.array([[1]]))
    kept = dtype or (mx.bfloat16 if sample.dtype.size > 2 else sample.dtype)
    key = _key(prefix, base, data_fingerprint, sample.dtype, kept)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = (root or cache_root() / "frozen-prefix") / name
    lengths = [len(example.tokens) - 1 for example in examples]
    cache = PrefixCache(folder, key, lengths, sample.shape[-1], kept)
    cache.check_room()
    stored = StoredPrefix(prefix, sample.dtype, cache.gathered)
    notes = _notes(prefix, cache, sample.dtype)
    return PrefixRun(replace(objective, prefix=stored), notes, cache, examples)


def _key(
    prefix: FrozenPrefix, base: BaseModel, data_fingerprint: str, computed: mx.Dtype, kept: mx.Dtype
) -> dict[str, Any]:
    """All that hidden states depend on, to the last bit on one machine."""
    config = json.dumps(base.config, sort_keys=True, default=str)
    return {
        "format_version": FORMAT_VERSION,
        "base_fingerprint": base.fingerprint,
        "stored_weights_fingerprint": fingerprint(base.folder),  # quantized, in whatever scheme
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "data_fingerprint": data_fingerprint,
        "num_layers": prefix.num_layers,
        "computed_in": str(computed),
        "kept_in": str(kept),
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


def _notes(prefix: FrozenPrefix, cache: PrefixCache, computed: mx.Dtype) -> list[str]:
    missing = cache.missing_bytes
    state = f"{size_text(missing)} to compute first" if missing else "found from an earlier run"
    notes = [
        f"frozen prefix: {prefix.num_layers} of {len(prefix.model.layers)} layers, "
        f"{size_text(cache.num_bytes)} on disk ({state}); may be deleted between runs: {cache.folder}"
    ]
    if cache.num_damaged:
        notes.append(f"frozen prefix: {cache.num_damaged} damaged part(s) are computed again")
    if cache.dtype.size < computed.size:
        notes.append(
            f"frozen prefix: hidden states are rounded from {_name(computed)} to {_name(cache.dtype)}"
        )
    return notes


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
