"""Settings that fit a Mac of a given size; each is a function that returns a tree of configuration keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

from mlx_qlora.errors import ConfigError

GIB = 1024**3


def mac_8gb() -> dict[str, Any]:
    """One short row at a time, checkpointed: a 7B model in int4 leaves little room beside itself."""
    return _preset(batch_size=1, gradient_accumulation=2, max_seq_length=256, gradient_checkpointing=True)


def mac_16gb() -> dict[str, Any]:
    """Two rows of 512 tokens, two micro-batches per update."""
    return _preset(batch_size=2, gradient_accumulation=2, max_seq_length=512, gradient_checkpointing=True)


def mac_32gb() -> dict[str, Any]:
    """Four rows of 1024 tokens per update; a 7B model's activations for them do not fit unless recomputed."""
    return _preset(batch_size=4, gradient_accumulation=1, max_seq_length=1024, gradient_checkpointing=True)


def auto() -> dict[str, Any]:
    """By this machine's memory alone; commands that know the model ask `training.planning.auto_preset`."""
    return PRESETS[name_for(psutil.virtual_memory().total)]()


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "mac-8gb": mac_8gb,
    "mac-16gb": mac_16gb,
    "mac-32gb": mac_32gb,
    "auto": auto,
}


def by_size() -> list[str]:
    """Names of the presets for one size of Mac each, the largest first."""
    return [name for name in reversed(PRESETS) if name != "auto"]


def name_for(total_memory_bytes: int) -> str:
    """The name of the preset for a machine with this much memory."""
    # A 16 GB machine reports slightly less than 16 GiB; 10 % of slack keeps it in its class.
    gib = total_memory_bytes / GIB
    if gib >= 32 * 0.9:
        return "mac-32gb"
    return "mac-16gb" if gib >= 16 * 0.9 else "mac-8gb"


def preset(name: str) -> dict[str, Any]:
    """The tree of the preset with this name.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}; there are {', '.join(PRESETS)}.", run="mlx-qlora presets"
        )
    return PRESETS[name]()


def _preset(
    *, batch_size: int, gradient_accumulation: int, max_seq_length: int, gradient_checkpointing: bool
) -> dict[str, Any]:
    return {
        "quantization": {"scheme": "int4"},
        "lora": {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "data": {"max_seq_length": max_seq_length},
        "training": {
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "learning_rate": 2.0e-4,
            "warmup_steps": 100,
            "num_epochs": 3,
            "gradient_checkpointing": gradient_checkpointing,
        },
    }
