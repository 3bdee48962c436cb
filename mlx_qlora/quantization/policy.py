"""Which layer gets which format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn

from mlx_qlora.quantization.schemes import Scheme, checked


@dataclass(frozen=True)
class Decision:
    """What happens to one layer that could be quantized."""

    scheme: Scheme | None
    """None keeps it as it is."""
    reason: str | None = None
    """Why it is kept."""
    own: Mapping[str, Any] | None = None
    """What the model itself asks for, as it says it; mlx-lm writes it into config.json."""


def decide_all(model: nn.Module, scheme: Scheme, skip_modules: Sequence[str] = ()) -> dict[str, Decision]:
    """A decision for every layer of an unquantized model that MLX can quantize, by path.

    The rule is mlx-lm's: the last dimension must be whole groups, and the model's own
    ``quant_predicate`` may keep a layer or give it other bits. `skip_modules` comes on top.
    """
    predicate: Callable[[str, nn.Module], Any] | None = getattr(model, "quant_predicate", None)
    return {
        path: _decide(path, module, scheme, skip_modules, predicate)
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }


def _decide(
    path: str,
    module: nn.Module,
    scheme: Scheme,
    skip_modules: Sequence[str],
    predicate: Callable[[str, nn.Module], Any] | None,
) -> Decision:
    if any(is_named(path, name) for name in skip_modules):
        return Decision(None, "asked to be skipped")
    width = module.weight.shape[-1]
    if width % scheme.group_size:
        return Decision(None, f"its {width} inputs are no multiple of the group of {scheme.group_size}")
    own = predicate(path, module) if predicate is not None else True
    if isinstance(own, Mapping):
        wanted = Scheme("own", own.get("mode", "affine"), own["bits"], own["group_size"])
        return Decision(checked(wanted), own=own)
    return Decision(scheme) if own else Decision(None, "the architecture keeps it")


def is_named(path: str, name: str) -> bool:
    """Whether `name` is the path, its end after a dot, a part of it, or a pattern that matches it."""
    return path == name or path.endswith(f".{name}") or f".{name}." in f".{path}." or fnmatchcase(path, name)
