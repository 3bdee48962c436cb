"""QLoRA on a Mac: quantize, train and use adapters in the memory you have, on MLX."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_qlora.blas import load_system_blas

if TYPE_CHECKING:
    from mlx_qlora.api import evaluate, generate, load, plan, quantize, stream, train
    from mlx_qlora.config import RunConfig, build_config, read_config
    from mlx_qlora.presets import preset
    from mlx_qlora.training.live_plot import LivePlot
    from mlx_qlora.weights.gguf import open_gguf

__version__ = "0.1.0"
__all__ = [
    "LivePlot",
    "RunConfig",
    "build_config",
    "evaluate",
    "generate",
    "load",
    "open_gguf",
    "plan",
    "preset",
    "quantize",
    "read_config",
    "stream",
    "train",
]

# MLX takes its matrix routines from whatever is loaded before it; no room is imported earlier than this.
load_system_blas()

# transformers is used for tokenizers only; that PyTorch is absent is no news to anybody here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {
    "LivePlot": "mlx_qlora.training.live_plot",
    "RunConfig": "mlx_qlora.config",
    "build_config": "mlx_qlora.config",
    "read_config": "mlx_qlora.config",
    "preset": "mlx_qlora.presets",
    "open_gguf": "mlx_qlora.weights.gguf",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "mlx_qlora.api")), name)
