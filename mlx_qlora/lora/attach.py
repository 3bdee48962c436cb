"""Put low-rank layers on the chosen linear layers of a model, and on its embedding where that is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.dora import DoRALinear
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import LoRALinear, lora_scale
from mlx_qlora.lora.pissa import PiSSALinear

_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that some models keep in one piece (Phi-3). Named together, their parts mean the whole, so that the
presets train such a model too: one low-rank pair for all parts."""


def attach(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Freeze `model` and give its target layers a low-rank update.

    The initial A of each is a function of the seed and of the layer's place among them. What ``lora.init``
    makes of it needs the weights: see `attach_initialised`.

    Returns:
        The paths of the layers that were changed.

    Raises:
        ConfigError: a name in ``target_modules`` matches nothing, there are fewer layers than asked for, or
            an embedding is to get a variant that is for linear layers.
    """
    paths = target_paths(model, config)
    modules = dict(model.named_modules())
    root = mx.random.key(seed)
    keys = mx.random.split(root, len(paths))
    _check_embeddings([path for path in paths if _is_embedding(modules[path])], config)
    model.freeze()
    replacements = [
        (path, _low_rank(modules[path], config, key)) for path, key in zip(paths, keys, strict=True)
    ]
    model.update_modules(tree_unflatten(replacements))
    return paths


def _low_rank(module: nn.Module, config: LoraConfig, key: mx.array) -> nn.Module:
    scale = lora_scale(config.alpha, config.rank, config.variant)
    if _is_embedding(module):
        return LoRAEmbedding(module, rank=config.rank, scale=scale, key=key)
    layer = DoRALinear if config.variant == "dora" else PiSSALinear if config.init == "pissa" else LoRALinear
    return layer(module, rank=config.rank, scale=scale, dropout=config.dropout, key=key)


def _check_embeddings(paths: list[str], config: LoraConfig) -> None:
    choices = (("lora.variant", config.variant, "dora"), ("lora.init", config.init, "pissa"))
    for where, chosen, unfit in choices:
        if paths and chosen == unfit:
            raise ConfigError(
                f"{unfit} is for linear layers, and {', '.join(paths)} is an embedding.",
                where=where,
                run=f"mlx-qlora train --set {where}={'lora' if unfit == 'dora' else 'default'} …   "
                "# or leave the embedding out of lora.target_modules",
            )


def target_paths(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the layers that `config` names, in the model's order: linear ones, and embeddings.

    An embedding is named by itself (embed_tokens); a pattern with a wildcard means linear layers only.

    Raises:
        ConfigError: as for `attach`.
    """
    linears, embeddings = adaptable_paths(model)
    names = _with_fused(config.target_modules, linears)
    chosen = {
        name: [path for path in embeddings if _ends_in(path, name)]
        + [path for path in linears if _is_named(path, name)]
        for name in names
    }
    unmatched = [name for name, paths in chosen.items() if not paths]
    if unmatched:
        short = sorted({path.rsplit(".", 1)[-1] for path in linears})
        raise ConfigError(
            f"No linear layer is called {', '.join(unmatched)}. This model has: {', '.join(short)}.",
            where="lora.target_modules",
            run=f"mlx-qlora train --set lora.target_modules=[{','.join(short[:3])}] …",
        )
    first = _first_layer(model, config.num_layers)
    wanted = set().union(*chosen.values())
    paths = [path for path in (*embeddings, *linears) if path in wanted]
    return [path for path in paths if (index := layer_index(path)) is None or index >= first]


def _with_fused(names: Sequence[str], linears: Sequence[str]) -> Sequence[str]:
    """`names`, where all parts of a layer that this model keeps in one piece are that layer."""
    there = {path.rsplit(".", 1)[-1] for path in linears}
    for whole, parts in FUSED.items():
        if whole in there and not there & set(parts) and set(parts) <= set(names):
            names = [*(name for name in names if name not in parts), whole]
    return names


def layer_index(path: str) -> int | None:
    """Which block a path belongs to; None outside of the blocks."""
    match = _LAYER_INDEX.search(path)
    return int(match.group(1)) if match else None


def adaptable_paths(model: nn.Module) -> tuple[list[str], list[str]]:
    """Paths of the linear layers of `model` and of its embeddings, each in the model's order."""
    modules = model.named_modules()
    linears = [path for path, module in modules if isinstance(module, nn.Linear | nn.QuantizedLinear)]
    embeddings = [path for path, module in modules if _is_embedding(module)]
    return sorted(linears, key=_by_number), sorted(embeddings, key=_by_number)


def _by_number(path: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def _is_named(path: str, name: str) -> bool:
    return _ends_in(path, name) or fnmatchcase(path, name)


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _first_layer(model: nn.Module, num_layers: int) -> int:
    if num_layers == -1:
        return 0
    total = len(model.layers)
    if num_layers > total:
        raise ConfigError(f"The model has {total} layers, not {num_layers}.", where="lora.num_layers")
    return total - num_layers
