"""What a fused model loses against base and adapter, measured before anything of it is written.

Shapes: B rows of the sample, T tokens, D hidden size, V vocabulary, N positions that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.exchange.fuse_base import base_layer
from mlx_qlora.exchange.fuse_compare import (
    NotComparableError,
    blocks_as,
    compare_in_thirds,
    forget,
    forgetting,
    giving,
    in_float32,
)
from mlx_qlora.exchange.fuse_sample import Sample
from mlx_qlora.exchange.fuse_weights import Target, WeightLoss, fused_parts, weight_loss
from mlx_qlora.objective.loss import number
from mlx_qlora.quantization.dense import dense_products

LOGIT_BYTES = 32 * 1024**2
"""Of float32 logits that are made at a time."""
NEGLIGIBLE_NATS = 1e-6
"""An adapter that changes the answers by less has no share to lose; float32 logits are no finer."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LogitLoss:
    """The fused model's answers beside those of base and adapter, over the sample's counted positions."""

    num_tokens: int
    relative_error: float
    """‖fused − adapted‖ / ‖adapted‖ over all logits."""
    kl_nats: float
    """Mean Kullback-Leibler divergence of the fused model's next token from the adapted base's."""
    base_kl_nats: float
    """The same of the base without its adapter: what there is to lose."""
    agreement: float
    """Share of positions with the same likeliest token."""
    base_loss_nats: float
    """Mean negative log-likelihood of the sample's own next tokens, of the base,"""
    adapted_loss_nats: float
    """of base and adapter, and"""
    fused_loss_nats: float
    """of the fused model."""

    @property
    def base_perplexity(self) -> float:
        """exp(loss) of the base on the sample's next tokens,"""
        return math.exp(min(self.base_loss_nats, 700.0))

    @property
    def adapted_perplexity(self) -> float:
        """of base and adapter, and"""
        return math.exp(min(self.adapted_loss_nats, 700.0))

    @property
    def fused_perplexity(self) -> float:
        """of the fused model."""
        return math.exp(min(self.fused_loss_nats, 700.0))

    @property
    def lost_share(self) -> float | None:
        """Divergence beside that of the base alone: 0 keeps the adapter, 1 is as if there were none."""
        return self.kl_nats / self.base_kl_nats if self.base_kl_nats > NEGLIGIBLE_NATS else None


@dataclass
class Comparison:
    """What is measured of a model that is being fused."""

    weights: dict[str, WeightLoss] = field(default_factory=dict)
    """Path → loss of each layer that is not copied."""
    logits: LogitLoss | None = None
    notes: list[str] = field(default_factory=list)


def measure_loss(
    model: nn.Module,
    targets: Mapping[str, Target],
    sample: Sample | None,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Compare the model that `targets` will make with `model`, whose arrays are used up.

    Args:
        model: Base with adapter, its arrays not read yet.
        targets: Path → what becomes of the layers that are not copied.
        sample: None measures the weights alone.
        on_progress: Called with (layers done, layers to do).
    """
    comparison = Comparison()
    modules = dict(model.named_modules())
    told = _Told(len(targets), on_progress)

    def on_loss(path: str, loss: WeightLoss) -> None:
        comparison.weights[path] = loss
        told.one()

    if sample is not None:
        compare_in_thirds(model, targets, on_loss)
        try:
            comparison.logits = _logit_loss(model, sample)
        except NotComparableError as error:
            comparison.notes.append(f"logits are not measured: {error}")
    for path, target in targets.items():
        if path not in comparison.weights:  # stacked, or never called
            layer = base_layer(modules[path])
            on_loss(path, weight_loss(layer, target, fused_parts(layer, target)))
            forget(modules[path])
    return comparison


@dataclass
class _Told:
    total: int
    on_progress: OnProgress | None
    done: int = 0

    def one(self) -> None:
        """Another part is done."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def _logit_loss(model: nn.Module, sample: Sample) -> LogitLoss:
    """Both passes: through the blocks with all rows, then from the last block's output to the logits."""
    in_float32(model)
    tokens_BT = mx.array(np.tile(sample.tokens_BT, (3, 1)))
    with dense_products(model):
        with blocks_as(model, forgetting) as seen:
            model(tokens_BT)
        hidden_BTD = seen.get("hidden")
        if hidden_BTD is None:
            raise NotComparableError("its last block is not the last that is called")
        totals = np.zeros(8)
        num_rows, width = sample.tokens_BT.shape
        step = max(1, LOGIT_BYTES // (12 * _vocabulary(model, tokens_BT, hidden_BTD)))
        for row in range(num_rows):
            same_row = mx.array([row, num_rows + row, 2 * num_rows + row])
            for first in range(0, width - 1, step):
                last = min(first + step, width - 1)
                counted = sample.counted_BT[row, first:last]
                if not counted.any():
                    continue
                hidden_3TD = hidden_BTD[same_row, first:last]
                with blocks_as(model, lambda *_: giving(hidden_3TD)):  # noqa: B023  # used up at once
                    logits_3TV = model(tokens_BT[same_row, first:last]).astype(mx.float32)
                places = mx.array(np.flatnonzero(counted))
                following = mx.array(sample.tokens_BT[row, first + 1 : last + 1])[places]
                totals += _sums(logits_3TV[:, places], following)
    return _mean(totals, sample.num_tokens)


def _sums(logits_3NV: mx.array, following_N: mx.array) -> np.ndarray:
    """What is summed over positions, in the order `_mean` takes it."""
    logs_3NV = logits_3NV - mx.logsumexp(logits_3NV, axis=-1, keepdims=True)
    base_NV, adapted_NV, fused_NV = logs_3NV
    likely_NV = mx.exp(adapted_NV)
    nll_3N = -mx.take_along_axis(
        logs_3NV, mx.broadcast_to(following_N[None, :, None], (3, following_N.size, 1)), -1
    )
    sums = [
        (logits_3NV[2] - logits_3NV[1]).square().sum(),
        logits_3NV[1].square().sum(),
        (likely_NV * (adapted_NV - fused_NV)).sum(),
        (likely_NV * (adapted_NV - base_NV)).sum(),
        (fused_NV.argmax(-1) == adapted_NV.argmax(-1)).sum(),
        *(nll.sum() for nll in nll_3N),
    ]
    mx.eval(sums)
    return np.array([number(each) for each in sums])


def _mean(totals: np.ndarray, num_tokens: int) -> LogitLoss:
    difference, size, *others = totals.tolist()
    kl, base_kl, *shares = (each / num_tokens for each in others)
    relative = math.sqrt(difference / size) if size else 0.0
    return LogitLoss(num_tokens, relative, max(kl, 0.0), max(base_kl, 0.0), *shares)


def _vocabulary(model: nn.Module, tokens_BT: mx.array, hidden_BTD: mx.array) -> int:
    """Logits of one position; their graph is made and not evaluated."""
    with blocks_as(model, lambda *_: giving(hidden_BTD[:3, :1])):
        logits: mx.array = model(tokens_BT[:3, :1])
    return int(logits.shape[-1])
