"""What fusing loses, as one object, and how much of it is let through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_qlora.exchange.fuse_loss import LogitLoss
from mlx_qlora.exchange.fuse_weights import NOTHING_LOST, WeightLoss

MAX_LOST_SHARE = 0.1
"""A fused model that is further from base and adapter than this share of what the adapter does is refused:
mean Kullback-Leibler divergence beside that of the base alone."""

MAX_WEIGHT_ERROR = 0.5
"""The same where logits are not measured, of ‖Q(W + Δ) − (W + Δ)‖ / ‖Δ‖."""


@dataclass(frozen=True)
class FuseLoss:
    """What fusing loses, known before anything is written."""

    layers: Mapping[str, WeightLoss]
    """Path → loss of each layer with an update."""
    logits: LogitLoss | None
    is_validation: bool
    """Whether the logits are those of the user's validation rows."""
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> WeightLoss:
        """Of all layers with an update together."""
        return sum(self.layers.values(), NOTHING_LOST)

    @property
    def is_too_large(self) -> bool:
        """Whether it is above the threshold: `MAX_LOST_SHARE`, without logits `MAX_WEIGHT_ERROR`."""
        if self.logits is not None:
            return (self.logits.lost_share or 0.0) > MAX_LOST_SHARE
        return (self.weights.error or 0.0) > MAX_WEIGHT_ERROR

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON."""
        weights = self.weights
        logits = None
        if self.logits is not None:
            logits = {**asdict(self.logits), "lost_share": self.logits.lost_share}
        return {
            "weight_error": weights.error,
            "delta_survived": weights.survived,
            "delta_norm": weights.delta_squares**0.5,
            "layers": {
                path: {"weight_error": loss.error, "delta_survived": loss.survived}
                for path, loss in self.layers.items()
            },
            "logits": logits,
            "is_validation": self.is_validation,
            "max_lost_share": MAX_LOST_SHARE,
            "max_weight_error": MAX_WEIGHT_ERROR,
            "is_too_large": self.is_too_large,
            "notes": list(self.notes),
        }
