"""A model and a micro-batch as the numbers that a memory plan wants; no weights are read or made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_qlora.blas import blas_is_fast
from mlx_qlora.config import RunConfig
from mlx_qlora.lora.attach import attach
from mlx_qlora.lora.embedding import LoRAEmbedding
from mlx_qlora.lora.layers import lora_layers
from mlx_qlora.memory.plan import Step, Workload
from mlx_qlora.objective.attention import BLOCK, MIN_TOKENS, covers
from mlx_qlora.objective.fused import UNPACKED_HEAD_BYTES, chunk_length
from mlx_qlora.objective.head import Head, SplitModel, split
from mlx_qlora.objective.loss import Objective
from mlx_qlora.quantization.dense import block_rows, is_quantized
from mlx_qlora.quantization.nf4_layers import SCALES, NF4Embedding, quantize_layers
from mlx_qlora.quantization.policy import decide_all, recipe_of, uniform_near
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.source import ModelSource

_MINIATURE_VOCABULARY = 64


@dataclass(frozen=True)
class MicroBatch:
    """The sizes of one micro-batch."""

    rows: int
    width: int
    labels: int
    longest: int
    """Positions of its longest example."""
    is_shared: bool = False
    """Whether a row holds several examples."""


def workload(objective: Objective, batch: MicroBatch, config: RunConfig, *, on_cpu: bool) -> Workload:
    """A run's numbers: exact bytes of what stays, and the sizes of a step."""
    model, training = objective.model, config.training
    trained = sum(a.nbytes for _, a in tree_flatten(model.trainable_parameters()))
    optimizer = build_optimizer(training)
    optimizer.init(model.trainable_parameters())
    return Workload(
        weights_bytes=sum(a.nbytes for _, a in tree_flatten(model.parameters())) - trained,
        lora_bytes=trained,
        optimizer_bytes=sum(a.nbytes for _, a in tree_flatten(optimizer.state)),
        step=_step(objective, batch, config, on_cpu=on_cpu),
        num_layers=len(model.layers),
        num_micro_batches=training.gradient_accumulation,
    )


def _step(objective: Objective, batch: MicroBatch, config: RunConfig, *, on_cpu: bool) -> Step:
    model = objective.model
    layers = list(model.layers)
    adapted = [number for number, layer in enumerate(layers) if lora_layers(layer)]
    array = batch.rows * batch.width * _float_bytes(model)  # of one feature
    adapters = max((lora_layers(layer) for layer in layers), key=len)
    inputs = [_features(adapter.linear)[0] for adapter in adapters]
    hidden = int(getattr(model.args, "hidden_size", 0)) or max(inputs)
    experts = int(getattr(model.args, "num_experts_per_tok", 0) or 1)
    is_blocked = objective.is_blocked and batch.width >= MIN_TOKENS
    heads = _heads(model)
    seen = min(BLOCK + batch.longest, batch.width) if is_blocked else batch.width
    per_query = 4 * batch.rows * heads * seen
    from_embedding = any(isinstance(m, LoRAEmbedding) for _, m in model.named_modules())
    first = 0 if from_embedding else min(adapted, default=len(layers))
    return Step(
        num_layers=len(layers) - first,
        is_checkpointed=config.training.gradient_checkpointing,
        hidden=array * hidden,
        outputs=array * max(_outputs(layer, experts) for layer in layers),
        adapter_inputs=array * sum(set(inputs)),
        dropped_inputs=array * sum(inputs) if config.lora.dropout else 0,
        scores=per_query * (BLOCK if is_blocked else batch.width),
        are_scores_kept=not is_blocked,
        **_head(objective, batch, on_cpu=on_cpu),
    )


def _head(objective: Objective, batch: MicroBatch, *, on_cpu: bool) -> dict[str, Any]:
    """What a `Step` says of the head."""
    parts, args = objective.parts, objective.model.args
    if parts is None or "weight" not in parts.head.module:
        logits = 4 * batch.rows * batch.width * int(getattr(args, "vocab_size", 0))
        return {"logits": logits, "is_head_plain": False, "head": 0, "head_float32": 0, "unpacked": 0}
    vocabulary, width = parts.head.module.weight.shape[0], _features(parts.head.module)[0]
    positions = min(batch.labels, 2 * chunk_length(vocabulary, objective.chunk_bytes))
    in_float32, is_plain = 4 * vocabulary * width, parts.head.is_plain_matmul
    is_kept = on_cpu and is_plain and blas_is_fast() and in_float32 <= UNPACKED_HEAD_BYTES
    is_unpacked = on_cpu and is_plain and (is_quantized(parts.head.module) or not blas_is_fast())
    return {
        "logits": 4 * positions * vocabulary,
        "is_head_plain": is_plain,
        "head": in_float32 if is_kept and is_quantized(parts.head.module) else 0,
        "head_float32": in_float32,
        "unpacked": 4 * width * min(vocabulary, block_rows(width)) if is_unpacked and not is_kept else 0,
    }


def _linears(layer: nn.Module) -> list[nn.Module]:
    """The linear layers of a decoder layer, those of experts too."""
    return [m for _, m in layer.named_modules() if "weight" in m and m["weight"].ndim >= 2]


def _outputs(layer: nn.Module, experts_per_token: int) -> int:
    """Features that a layer's linear layers put out; a token goes through some of the experts only."""
    weights = [linear["weight"] for linear in _linears(layer)]
    return sum(w.shape[-2] * (experts_per_token if w.ndim == 3 else 1) for w in weights)


def _features(linear: nn.Module) -> tuple[int, int]:
    """(in, out), as stored in words or not."""
    out, stored = linear["weight"].shape[-2:]
    return (stored * 32 // linear.bits if is_quantized(linear) else stored), out


def _heads(model: nn.Module) -> int:
    args = model.args
    return int(getattr(args, "num_attention_heads", 0) or getattr(args, "n_heads", 0) or 1)


def _float_bytes(model: nn.Module) -> int:
    """Of an activation: the norms have its type."""
    flat = tree_flatten(model.layers[0].parameters())
    vectors = [a for path, a in flat if a.ndim == 1 and path.rpartition(".")[2] not in SCALES]
    return next((a.dtype.size for a in vectors if mx.issubdtype(a.dtype, mx.floating)), 4)


def planned_model(source: ModelSource, config: RunConfig, notes: list[str], *, on_cpu: bool) -> nn.Module:
    """The model as training has it: quantized, cast, with low-rank layers; none of its arrays evaluated."""
    model = skeleton(source)
    _quantize(model, source, config, notes)
    dtype = _dtype(source, config, on_cpu=on_cpu)
    may_cast = getattr(model, "cast_predicate", lambda _path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating) and path.rpartition(".")[2] not in SCALES
        return array.astype(dtype) if is_float and may_cast(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    for _, layer in model.named_modules():
        if isinstance(layer, NF4Embedding):
            layer.dtype = dtype
    attach(model, config.lora, config.training.seed)
    model.train()
    notes.append(f"activations in {str(dtype).removeprefix('mlx.core.')}")
    return model


def _quantize(model: nn.Module, source: ModelSource, config: RunConfig, notes: list[str]) -> None:
    stored = source.config.get("quantization") or source.config.get("quantization_config")
    if stored:
        settings = {"group_size": stored.get("group_size", 64), "bits": stored.get("bits", 4)}
        settings["mode"] = stored.get("mode", "affine")
        if "group_size" not in stored:
            notes.append("the model is quantized by others: 4 bits in groups of 64 are taken for granted")

        def wanted(path: str, module: nn.Module) -> dict[str, Any] | None:
            own = stored.get(path, settings)  # False keeps the layer
            return own if own and module.weight.shape[-1] % own["group_size"] == 0 else None

        quantize_layers(model, wanted)
        return
    planned = uniform_near(config.quantization)
    if planned != config.quantization:
        notes.append(
            f"{config.quantization.bits_per_weight:g} bits per weight are planned as {planned.scheme}"
        )
    if (recipe := recipe_of(planned)) is not None:
        decisions = decide_all(model, recipe)

        def decided(path: str, _module: nn.Module) -> dict[str, Any] | None:
            chosen = decisions[path].scheme if path in decisions else None
            return chosen.config() if chosen is not None else None

        quantize_layers(model, decided)


def _dtype(source: ModelSource, config: RunConfig, *, on_cpu: bool) -> mx.Dtype:
    """As `weights.loader` decides; the checkpoint's own type is what config.json says."""
    if config.model.dtype != "auto":
        return getattr(mx, config.model.dtype)
    if on_cpu:
        return mx.float32
    text = source.config.get("text_config") or {}
    named = source.config.get("torch_dtype") or source.config.get("dtype") or text.get("dtype") or "bfloat16"
    return {"float16": mx.float16, "float32": mx.float32}.get(str(named), mx.bfloat16)


def planned_objective(model: nn.Module, source: ModelSource, notes: list[str]) -> Objective:
    """The objective that training will find out, from the skeleton.

    How logits are made is tried on a copy with a small vocabulary whose layers pass their input on, so that
    next to nothing is computed.
    """
    parts = _parts(model, source)
    objective = Objective(model, parts, keeps_examples_apart=True, is_blocked=covers(model))
    notes += objective.notes
    return objective


def _parts(model: nn.Module, source: ModelSource) -> SplitModel | None:
    tree: dict[str, Any] = {**source.config, "vocab_size": _MINIATURE_VOCABULARY}
    if isinstance(tree.get("text_config"), dict):
        tree["text_config"] = {**tree["text_config"], "vocab_size": _MINIATURE_VOCABULARY}
    tree.pop("pad_token_id", None)
    miniature = skeleton(replace(source, config=tree))

    for layer in miniature.layers:
        layer.__class__ = type("Passing", (type(layer),), {"__call__": lambda _self, x, *_, **__: x})
    found = split(miniature)
    if found is None:
        return None
    module = model.model.embed_tokens if found.head.is_tied else model.lm_head
    return SplitModel(model.model, Head(module, found.head.is_tied, found.head.transform))
