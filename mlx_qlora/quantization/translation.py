"""What settings written for another library become here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import mlx.nn as nn

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError, listed

Filter = Callable[[Any, str], bool]
"""(module, its path) → whether it is quantized; torchao's ``filter_fn``."""

WHERE = "quantization_config"


@dataclass(frozen=True)
class Translation:
    """A configuration of ours, and what a person should know about how it came to be."""

    config: QuantizationConfig
    notes: tuple[str, ...] = ()
    """One line for each setting that does something else here, or nothing."""
    dtype: str | None = None
    """Type of activations that was asked for: a value of ``model.dtype``; None leaves that as it is."""
    filter_fn: Filter | None = None
    """Has to be asked about each layer of a model, with `for_model`."""

    def for_model(self, model: nn.Module) -> QuantizationConfig:
        """The configuration with the layers that the filter leaves out in ``skip_modules``.

        Args:
            model: Unquantized; its arrays are not evaluated, a skeleton is enough.

        Raises:
            ConfigError: the filter raises, or selects no layer.
        """
        if self.filter_fn is None or self.config.scheme == "none":
            return self.config
        layers = {path: m for path, m in model.named_modules() if hasattr(m, "to_quantized")}
        left_out = [path for path, module in layers.items() if not _selects(self.filter_fn, module, path)]
        if len(left_out) == len(layers):
            kinds = ", ".join(sorted({f"mlx.nn.{type(module).__name__}" for module in layers.values()}))
            raise ConfigError(
                f"The filter selects none of the {len(layers)} layers. Modules are {kinds} here, so "
                "isinstance(module, torch.nn.Linear) is false: ask for the name, or for mlx.nn.Linear.",
                where=f"filter_fn, asked about {', '.join(list(layers)[:3])}, …",
            )
        return self.config.model_copy(update={"skip_modules": (*self.config.skip_modules, *left_out)})


def _selects(filter_fn: Filter, module: Any, path: str) -> bool:
    try:
        return bool(filter_fn(module, path))
    except Exception as error:  # whatever a function of the user's raises
        raise ConfigError(
            f"The filter raises {type(error).__name__}: {error}", where=f"filter_fn, asked about {path}"
        ) from error


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The line that refuses a key, with the nearest one that exists."""
    near = get_close_matches(key, known, n=1)
    return f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else "")


def refuse(problems: Sequence[str], run: str | None = None) -> None:
    """Raise one error that lists all `problems`, if there are any.

    Raises:
        ConfigError: there are.
    """
    if problems:
        raise ConfigError(
            f"The quantization settings have {len(problems)} problem(s):\n{listed(problems)}",
            where=WHERE,
            run=run or 'mq.load(MODEL, quantization="int4")   # or int8, nf4, nf4-dq',
        )


def dtype_named(value: Any) -> str | None:
    """``torch.bfloat16``, ``mx.bfloat16`` or its name, as a value of ``model.dtype``; None says nothing.

    Raises:
        ValueError: activations cannot have that type.
    """
    if value is None or value == "auto":
        return None
    name = str(value).removeprefix("torch.").removeprefix("mlx.core.")
    name = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"{value} is no type of activations; there are bfloat16, float16, float32")
    return name


def skipped_names(value: Any) -> tuple[str, ...] | None:
    """Module names to skip; None says nothing.

    Raises:
        ValueError: it is no list of names.
    """
    if value is None:
        return None
    if isinstance(value, str | Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{value!r} is no list of module names")
    return tuple(value)
