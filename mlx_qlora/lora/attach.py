"""Put low-rank layers on the chosen linear layers of a model."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.layers import LoRALinear, lora_scale

_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def attach(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Freeze `model` and give its target layers a low-rank update.

    The initial A of each is a function of the seed and of the layer's place among them.

    Returns:
        The paths of the layers that were changed.

    Raises:
        ConfigError: a name in ``target_modules`` matches nothing, or there are fewer layers than asked for.
    """
    paths = target_paths(model, config)
    modules = dict(model.named_modules())
    root = mx.random.key(seed)
    keys = mx.random.split(root, len(paths))
    scale = lora_scale(config.alpha, config.rank)
    model.freeze()
    replacements = [
        (path, LoRALinear(modules[path], rank=config.rank, scale=scale, dropout=config.dropout, key=key))
        for path, key in zip(paths, keys, strict=True)
    ]
    model.update_modules(tree_unflatten(replacements))
    return paths


def target_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the linear layers that `config` names, in the model's order.

    Raises:
        ConfigError: as for `attach`.
    """
    linears = _linear_paths(model)
    unmatched = [name for name in config.target_modules if not any(_is_named(p, name) for p in linears)]
    if unmatched:
        short = sorted({path.rsplit(".", 1)[-1] for path in linears})
        raise ConfigError(
            f"No linear layer is called {', '.join(unmatched)}. This model has: {', '.join(short)}.",
            where="lora.target_modules",
            run=f"mlx-qlora train --set lora.target_modules=[{','.join(short[:3])}] …",
        )
    first = _first_layer(model, config.num_layers)
    chosen = [p for p in linears if any(_is_named(p, name) for name in config.target_modules)]
    return [path for path in chosen if (index := layer_index(path)) is None or index >= first]


def layer_index(path: str) -> int | None:
    """Which block a path belongs to; None outside of the blocks."""
    match = _LAYER_INDEX.search(path)
    return int(match.group(1)) if match else None


def _linear_paths(model: nn.Module) -> list[str]:
    found = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    return sorted(found, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)])


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}") or fnmatchcase(path, name)


def _first_layer(model: nn.Module, num_layers: int) -> int:
    if num_layers == -1:
        return 0
    total = len(model.layers)
    if num_layers > total:
        raise ConfigError(f"The model has {total} layers, not {num_layers}.", where="lora.num_layers")
    return total - num_layers
