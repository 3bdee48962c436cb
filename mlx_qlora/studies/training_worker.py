"""One training run, or one base model put on the scales, in a process of its own.

``python -m mlx_qlora.studies.training_worker``, see `mlx_qlora.inference.worker`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlx_qlora.errors import ModelError, listed
from mlx_qlora.inference.worker import Said, work

if TYPE_CHECKING:
    from mlx_qlora.config import RunConfig
    from mlx_qlora.weights.loader import BaseModel


@dataclass(frozen=True, kw_only=True)
class BaseFigures:
    """A base model as it is stored in one scheme."""

    folder: str
    stored_as: str
    """The scheme that it was quantized to and its groups; the type of its weights where it was not."""
    dtype: str
    """Of activations, and of what is not quantized."""
    num_parameters: int
    bytes_on_disk: int
    """Of the weight files."""
    bytes_in_memory: int
    """Of all its arrays, loaded: more than on disk where 16-bit weights are computed with in float32."""


def weigh(run: dict[str, Any], tell: Said) -> BaseFigures:
    """Load the base of a run, quantized if it is to be; the copy stays in the user's cache.

    Args:
        run: A RunConfig as JSON.
        tell: Told ``bytes`` (done, total) while it is being quantized.

    Raises:
        MemoryBudgetError: a run on it cannot fit.
        ModelError: no layer can have the scheme.
        MlxQloraError: it cannot be found, read or quantized.
    """
    from mlx.utils import tree_flatten

    from mlx_qlora.config import build_config
    from mlx_qlora.inference.comparison import float_type
    from mlx_qlora.training.planning import admitted
    from mlx_qlora.weights.loader import load_base
    from mlx_qlora.weights.shards import read_checkpoint

    config = build_config(run)
    admitted(config, is_begun=False, force=False)  # before a model is read that cannot be trained here
    base = load_base(
        config.model, config.quantization, on_bytes=lambda done, total: tell("bytes", [done, total])
    )
    _check_is_stored_so(base, config)
    files = {info.file for info in read_checkpoint(base.folder).values()}
    scheme = base.scheme
    return BaseFigures(
        folder=str(base.folder),
        stored_as=f"{scheme.name}, groups of {scheme.group_size}" if scheme else float_type(base.folder),
        dtype=base.dtype,
        num_parameters=base.num_parameters,
        bytes_on_disk=sum(file.stat().st_size for file in files),
        bytes_in_memory=sum(array.nbytes for _, array in tree_flatten(base.model.parameters())),
    )


def train(run: dict[str, Any], adapter_path: str, tell: Said) -> None:
    """Train, or go on from the newest checkpoint; what is to be known of it stands in its metrics.jsonl.

    Args:
        run: A RunConfig as JSON.
        tell: Told each ``event``.

    Raises:
        MlxQloraError: the run cannot be done; Interrupted after SIGTERM or Ctrl-C.
    """
    from mlx_qlora.config import build_config
    from mlx_qlora.training.distributed_events import event_message
    from mlx_qlora.training.run import train as train_here

    train_here(
        build_config(run),
        adapter_path,
        resume=True,
        observers=[lambda event: tell("event", event_message(event))],
    )


def _check_is_stored_so(base: BaseModel, config: RunConfig) -> None:
    """Refuse a scheme that fits no layer: it would be the base as it is, under another name.

    Raises:
        ModelError: with the reasons.
    """
    from mlx_qlora.quantization.dense import is_quantized
    from mlx_qlora.quantization.policy import recipe_of
    from mlx_qlora.weights.plan import plan_quantization
    from mlx_qlora.weights.stream import SHARD_BYTES

    recipe = recipe_of(config.quantization)
    if recipe is None or any(is_quantized(layer) for _, layer in base.model.named_modules()):
        return
    plan = plan_quantization(base.source, recipe, (), SHARD_BYTES)
    reasons = listed(list(dict.fromkeys(layer.reason for layer in plan.skipped)), limit=3)
    raise ModelError(f"No layer of this model can be stored so:\n{reasons}", where=str(base.source.folder))


def _do(task: dict[str, Any], tell: Said) -> dict[str, Any]:
    if task["adapter_path"] is None:
        return asdict(weigh(task["run"], tell))
    train(task["run"], task["adapter_path"], tell)
    return {}


if __name__ == "__main__":
    work(_do)
