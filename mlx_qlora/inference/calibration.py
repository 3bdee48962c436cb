"""A number of bits per weight spent where the model's own answers need them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_qlora.config import DataConfig, ModelConfig, QuantizationConfig
from mlx_qlora.dataset import in_order, load_dataset
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.quantization.sensitivity import importances
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.target import Settled, settle

CALIBRATION_SCHEME = "int3"
"""Coarse enough for one layer's loss to be seen in the answers."""
MAX_ROWS = 32
"""Training rows that the answers are looked at on."""


def settle_by_answers(
    model: ModelConfig,
    quantization: QuantizationConfig,
    data: DataConfig,
    *,
    max_rows: int = MAX_ROWS,
    batch_size: int = 4,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Settled:
    """As `weights.target.settle`, with each layer's importance measured on the first training rows.

    The unquantized model is in memory meanwhile, and there is one pass over the rows for every layer: what
    the choice gains is worth minutes for a model of a billion parameters, and needs one that fits as it is.

    Args:
        quantization: With ``bits_per_weight``.
        data: Rows such as the model is used on; the loss has no part in it, so labels have none.
        on_bytes: Called with (bytes read, bytes to read) while weights are measured.

    Raises:
        ConfigError: there is no target, or it cannot be reached.
        ModelError: the model is quantized already.
        DataError: the data cannot be used.
    """
    if model.path is None or quantization.bits_per_weight is None:
        raise ConfigError(
            "Calibration is for a number of bits per weight.",
            where="quantization.bits_per_weight",
            run="mlx-qlora quantize MODEL --bits-per-weight 4.5 --calibration DATA --output DIR",
        )
    source = resolve_model(model.path, model.revision, model.trust_remote_code)
    if source.is_quantized:
        raise ModelError("This model is quantized already.", where=str(source.folder))
    base = load_base(model, QuantizationConfig(scheme="none"))
    rows = load_dataset(data, base.tokenizer, seed=0).train[:max_rows]
    base.model.eval()
    batches = [mx.array(batch.inputs_BT) for batch in in_order(rows, batch_size)]
    importance = importances(base.model, batches, scheme_named(CALIBRATION_SCHEME))
    del base
    mx.clear_cache()
    return settle(source, quantization, on_bytes=on_bytes, importance=importance)
