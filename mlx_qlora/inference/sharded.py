"""A frozen base spread over ranks, each with a part of it: mlx-lm's own tensor or pipeline sharding.

Tensor: every rank has some heads and hidden units of every layer; two sums a layer go over all ranks.
Pipeline: every rank has some layers, and hands its hidden states to the next. Embedding, norms and head are
on every rank either way. A weight is cut as it is read, so no rank ever holds more than one whole.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.errors import AdapterError, ModelError, listed
from mlx_qlora.lora.layers import LoRALinear, linear_shape
from mlx_qlora.quantization.dense import is_codebook, is_quantized

TENSOR, PIPELINE, AUTO = "tensor", "pipeline", "auto"
SHARDINGS = (AUTO, TENSOR, PIPELINE)

FUSE = "mlx-qlora fuse --adapter-path A --output DIR   # then: mlx-qlora infer … --model DIR --processes N"

_NUMBER = r"\.\d+\."
_BY_OUTPUTS = (AllToShardedLinear, QuantizedAllToShardedLinear)
_BY_INPUTS = (ShardedToAllLinear, QuantizedShardedToAllLinear)

_SUMMED = ("o_proj", "out_proj", "down_proj", "wo", "w2", "dense")
"""How layers are called that mlx-lm cuts along their inputs."""


class RowShardedLoRA(nn.Module):
    """A low-rank layer whose inputs are spread over ranks; one sum over all carries base and update.

    y = Σ_ranks (x_r W_rᵀ + scale · (x_r A_r) B) + bias, with x_r the inputs this rank has, and W_r and A_r
    the columns and rows that belong to them.

    Attributes:
        part: The summand of this rank, a layer without bias.
    """

    def __init__(self, part: LoRALinear, bias: mx.array | None, group: Any) -> None:
        super().__init__()
        self.part = part
        self.group = group
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self.part(x), group=self.group)
        return y + self.bias if "bias" in self else y


def shard(model: nn.Module, group: Any, sharding: str = AUTO) -> str:
    """Leave of `model`, whose weights are not read yet, this rank's part, its adapter's included.

    Args:
        group: MLX's, of all ranks.
        sharding: tensor, pipeline, or auto: tensor where mlx-lm has it for the architecture, else pipeline.

    Returns:
        What was done: tensor or pipeline.

    Raises:
        ModelError: mlx-lm cannot spread this architecture so, or not over so many ranks.
        AdapterError: the adapter cannot be cut as its layers are.
    """
    possible = shardings_of(model)
    chosen = (possible[0] if possible else None) if sharding == AUTO else sharding
    if chosen not in possible:
        raise _unable(model, sharding)
    if chosen == TENSOR:
        _shard_tensors(model, group)
    else:
        _keep_layers(model, group)
    return chosen


def shardings_of(model: nn.Module) -> tuple[str, ...]:
    """The ways that mlx-lm has for a model's architecture, the better one first."""
    ways = ((TENSOR, hasattr(model, "shard")), (PIPELINE, hasattr(getattr(model, "model", None), "pipeline")))
    return tuple(name for name, is_there in ways if is_there)


def read_part(model: nn.Module) -> None:
    """Read this rank's part of the weights, one at a time: a whole one is there only until it is cut."""
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
        mx.clear_cache()  # it would keep the memory of what was cut off


def architectures(sharding: str) -> list[str]:
    """Model types that mlx-lm can spread so over ranks, read from its source."""
    from mlx_lm.utils import MODEL_REMAPPING

    spec = find_spec("mlx_lm.models")
    folders = spec.submodule_search_locations if spec is not None else None
    sign = re.compile(r"^    def shard\(" if sharding == TENSOR else r"\(PipelineMixin\b", re.MULTILINE)
    own = {
        path.stem
        for folder in folders or ()
        for path in Path(folder).glob("*.py")
        if sign.search(path.read_text(encoding="utf-8"))
    }
    return sorted(own | {name for name, other in MODEL_REMAPPING.items() if other in own})


def _unable(model: nn.Module, sharding: str) -> ModelError:
    kind, ways = getattr(model, "model_type", type(model).__module__), shardings_of(model)
    wanted = (TENSOR, PIPELINE) if sharding == AUTO else (sharding,)
    lines = [f"{way}: {', '.join(architectures(way))}" for way in wanted]
    how = "" if sharding == AUTO else f" by {sharding}"
    run = (
        f"mlx-qlora infer … --sharding {ways[0]}"
        if ways
        else "mlx-qlora infer … --offload   # one machine; layers that do not fit stay in their files"
    )
    raise ModelError(f"mlx-lm cannot spread {kind} over ranks{how}. It can:\n{listed(lines)}", run=run)


def _keep_layers(model: nn.Module, group: Any) -> None:
    inner: Any = model.model
    num_layers = len(inner.layers)
    if num_layers < group.size():
        raise ModelError(f"{num_layers} layers cannot be shared among {group.size()} ranks.")
    inner.pipeline(group)


def _shard_tensors(model: nn.Module, group: Any) -> None:
    _check_formats(model)
    updates = _without_updates(model)
    counts, uneven = _counts(model), _uneven(model, group.size())
    stored = {path: update.linear.weight for path, update in updates.items()}
    sharded: Any = model
    try:
        sharded.shard(group)
    except ValueError as error:
        raise _indivisible(model, group.size(), uneven or [str(error)]) from None
    _check_counts(model, counts, group.size())
    del counts  # it holds the layers that were cut, and each is to be forgotten once its update is back
    for path, update in updates.items():
        _put_back(model, path, update, stored.pop(path), group)


def _check_formats(model: nn.Module) -> None:
    names = sorted({m.mode for _, m in model.named_modules() if is_quantized(m) and is_codebook(m)})
    if names:
        raise ModelError(
            f"mlx-lm cannot cut layers stored as {', '.join(names)}; it can cut MLX's own formats.",
            run=_instead(model, "mlx-qlora infer … --scheme int4"),
        )


def _instead(model: nn.Module, otherwise: str) -> str:
    return "mlx-qlora infer … --sharding pipeline" if PIPELINE in shardings_of(model) else otherwise


def _counts(model: nn.Module) -> dict[tuple[str, str], tuple[nn.Module, int]]:
    """The whole numbers that modules hold beside their arrays: heads, groups, sizes."""
    return {
        (path, name): (module, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int
    }


def _check_counts(model: nn.Module, before: dict[tuple[str, str], tuple[nn.Module, int]], size: int) -> None:
    """Refuse what mlx-lm has divided with a remainder: half a head would be computed without a word."""
    wrong = sorted(
        {
            f"{name} of {re.sub(_NUMBER, '.', path)}: {value}"
            for (path, name), (module, value) in before.items()
            if getattr(module, name) != value and getattr(module, name) * size != value
        }
    )
    if wrong:
        raise _indivisible(model, size, wrong)


def _uneven(model: nn.Module, size: int) -> list[str]:
    """What so many ranks cannot share of the linear layers, each kind of layer said once."""
    problems = {}
    for path, layer in model.named_modules():
        name = re.sub(r"^.*\.\d+\.", "", path)
        if not isinstance(layer, nn.Linear | nn.QuantizedLinear) or name == path:
            continue  # what is outside of the blocks stays whole
        num_in, num_out = linear_shape(layer)
        step = layer.group_size if isinstance(layer, nn.QuantizedLinear) else 1
        if name.endswith(_SUMMED):
            is_even = num_in // step % size == 0
            count = f"{num_in // step} groups of {step} inputs" if step > 1 else f"{num_in} inputs"
        else:
            is_even, count = num_out % size == 0, f"{num_out} outputs"
        if not is_even:
            problems[name] = f"{name}: {count}"
    return sorted(problems.values())


def _indivisible(model: nn.Module, size: int, problems: list[str]) -> ModelError:
    numbers = [int(n) for text in problems for n in re.findall(r": (\d+)", text)]
    common = gcd(*numbers) if numbers else 1
    fits = [n for n in range(2, size) if common % n == 0]
    fewer = f"mlx-qlora infer … --processes {fits[-1]}" if fits else "mlx-qlora infer … --offload"
    return ModelError(
        f"{size} ranks cannot share evenly:\n{listed(problems, limit=6)}", run=_instead(model, fewer)
    )


def _without_updates(model: nn.Module) -> dict[str, LoRALinear]:
    """Take the low-rank layers off, so that mlx-lm meets the layers it knows."""
    updates = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    others = sorted({type(m).__name__.removesuffix("Linear") for m in updates.values()} - {"LoRA"})
    if others:
        raise AdapterError(
            f"An adapter with {', '.join(others)} needs whole weights and cannot be spread over ranks.",
            run=FUSE,
        )
    _replace(model, {path: update.linear for path, update in updates.items()})
    return updates


def _replace(model: nn.Module, modules: dict[str, Any]) -> None:
    model.update_modules(tree_unflatten(list(modules.items())))


def _put_back(model: nn.Module, path: str, update: LoRALinear, stored: mx.array, group: Any) -> None:
    """Give a low-rank update back to its layer, cut as the layer was.

    Args:
        stored: The layer's weight before it was cut, as it is stored.
    """
    layer = dict(model.named_modules())[path]
    num_in, num_out = update.lora_a.shape[0], update.lora_b.shape[1]
    whole = layer is update.linear and layer.weight.shape == stored.shape
    wrapped: nn.Module = update
    if isinstance(layer, _BY_OUTPUTS):
        rows = _share(num_out, group)
        _check_cut(path, layer.weight, stored[_share(stored.shape[0], group)])
        update.linear, update.lora_b = layer, update.lora_b[:, rows]
    elif isinstance(layer, _BY_INPUTS):
        _check_cut(path, layer.weight, stored[:, _share(stored.shape[1], group)])
        update.linear, update.lora_a = _without_sum(layer), update.lora_a[_share(num_in, group)]
        wrapped = RowShardedLoRA(update, layer.get("bias"), group)
    elif not whole:
        raise _uncut(path)
    _replace(model, {path: wrapped})


def _share(count: int, group: Any) -> slice:
    size = count // group.size()
    return slice(group.rank() * size, (group.rank() + 1) * size)


def _check_cut(path: str, cut: mx.array, expected: mx.array) -> None:
    """Refuse a layer that mlx-lm has cut in another way than in equal pieces one after the other."""
    if not mx.array_equal(cut, expected).item():
        raise _uncut(path)
    mx.clear_cache()


def _uncut(path: str) -> AdapterError:
    return AdapterError(
        "The layer is cut into pieces that the adapter's update cannot follow.", where=path, run=FUSE
    )


def _without_sum(layer: Any) -> nn.Module:
    """This rank's product alone, of a layer that would sum it over all."""
    if isinstance(layer, ShardedToAllLinear):
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = layer.weight
        return linear
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    quantized = nn.QuantizedLinear(layer.group_size, 8, bias=False, **settings)  # of placeholders, never read
    for name in ("weight", "scales", "biases"):
        quantized[name] = layer.get(name)
    return quantized
