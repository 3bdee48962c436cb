"""The loss measured in one pass of thirds is that of three models run apart."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_qlora.config import LoraConfig
from mlx_qlora.exchange.fuse_base import base_layer, stored_scheme, updates_of
from mlx_qlora.exchange.fuse_loss import measure_loss
from mlx_qlora.exchange.fuse_plan import layers_of
from mlx_qlora.exchange.fuse_sample import Sample
from mlx_qlora.exchange.fuse_weights import Target, fused_parts, restored_rows
from mlx_qlora.lora.attach import attach
from mlx_qlora.quantization.schemes import SCHEMES
from tests.tiny import ARCHITECTURES, VOCAB, target_modules, tiny_model


def adapted_model(name, *, bits=4, seed=0, size=0.1, **lora):
    model = tiny_model(name, bits=bits)
    attach(model, LoraConfig(**{"rank": 4, "target_modules": target_modules(name), **lora}), seed)
    noise = [
        (f"{path}.lora_b", size * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i)))
        for i, (path, layer) in enumerate(model.named_modules())
        if hasattr(layer, "lora_b")
    ]
    model.update(tree_unflatten(noise))
    mx.eval(model.parameters())
    return model.eval()


def sample(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (3, 12)).astype(np.int32)
    counted = rng.random((3, 12)) < 0.6
    counted[:, -1] = False
    return Sample(tokens, counted, is_validation=True)


def targets_of(model, scheme):
    updates = updates_of(model)
    return {
        path: Target(scheme, mx.float32, updates.get(path))
        for path, layer in layers_of(model).items()
        if path in updates or scheme != stored_scheme(layer)
    }


def fused_model(name, model, targets, **kept):
    """The model with dense weights, each what the target's format restores."""
    fused = tiny_model(name, **kept)
    modules = dict(model.named_modules())
    dense = []
    for path, target in targets.items():
        layer = base_layer(modules[path])
        parts = fused_parts(layer, target)
        is_embedding = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)
        weight = restored_rows(parts, target.scheme, 0, 10**9)
        made = (
            nn.Embedding(*weight.shape) if is_embedding else nn.Linear(*weight.shape[::-1], "bias" in layer)
        )
        made.weight = weight
        if "bias" in layer:
            made.bias = layer.bias
        dense.append((path, made))
    fused.update_modules(tree_unflatten(dense))
    return fused.eval()


def expected(base, adapted, fused, drawn):
    """relative error, KL, base's KL, agreement and the three losses, by NumPy in float64."""
    tokens_BT = mx.array(drawn.tokens_BT)
    logits = [np.array(m(tokens_BT).astype(mx.float32), np.float64) for m in (base, adapted, fused)]
    places = np.nonzero(drawn.counted_BT)
    following = drawn.tokens_BT[places[0], places[1] + 1]
    logs = []
    for each in logits:
        picked = each[places]
        logs.append(picked - np.log(np.exp(picked).sum(-1, keepdims=True)))
    b, a, f = logs
    raw = [each[places] for each in logits]
    kl = lambda p, q: float((np.exp(p) * (p - q)).sum(-1).mean())  # noqa: E731
    return {
        "relative_error": float(np.linalg.norm(raw[2] - raw[1]) / np.linalg.norm(raw[1])),
        "kl_nats": kl(a, f),
        "base_kl_nats": kl(a, b),
        "agreement": float((a.argmax(-1) == f.argmax(-1)).mean()),
        "base_loss_nats": float(-b[np.arange(len(b)), following].mean()),
        "adapted_loss_nats": float(-a[np.arange(len(a)), following].mean()),
        "fused_loss_nats": float(-f[np.arange(len(f)), following].mean()),
    }


@pytest.mark.parametrize("scheme", ["int4", "int3", None])
@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_the_figures_are_those_of_three_models_run_apart(name, scheme):
    model, base, drawn = adapted_model(name), tiny_model(name), sample()
    targets = targets_of(model, SCHEMES.get(scheme))
    fused = fused_model(name, model, targets)
    wanted = expected(base.eval(), copy.deepcopy(model), fused, drawn)
    comparison = measure_loss(model, targets, drawn)
    assert comparison.notes == []
    assert comparison.logits.num_tokens == drawn.counted_BT.sum()
    for figure, value in wanted.items():
        assert getattr(comparison.logits, figure) == pytest.approx(value, rel=2e-3, abs=3e-6), figure


def test_weights_that_keep_their_bits_lose_nothing():
    model = adapted_model("llama", bits=None)
    targets = {path: Target(None, mx.float32, update) for path, update in updates_of(model).items()}
    comparison = measure_loss(model, targets, sample())
    assert comparison.logits.relative_error < 1e-6
    assert comparison.logits.lost_share < 1e-6
    for loss in comparison.weights.values():
        assert loss.error < 1e-6
        assert loss.survived == pytest.approx(1, abs=1e-5)


def test_an_adapter_that_does_nothing_has_nothing_to_lose():
    model = adapted_model("llama", size=0.0)
    targets = targets_of(model, SCHEMES["int4"])
    comparison = measure_loss(model, targets, sample())
    assert comparison.logits.lost_share is None
    assert all(loss.error is None and loss.survived is None for loss in comparison.weights.values())


def test_without_a_sample_only_weights_are_compared():
    with_logits = adapted_model("llama")
    targets = targets_of(with_logits, SCHEMES["int4"])
    first = measure_loss(with_logits, targets, sample())
    alone = adapted_model("llama")
    second = measure_loss(alone, targets_of(alone, SCHEMES["int4"]), None)
    assert second.logits is None
    assert second.weights == first.weights


def test_progress_counts_layers_to_the_last():
    model, seen = adapted_model("llama"), []
    measure_loss(model, targets_of(model, SCHEMES["int4"]), sample(), lambda *step: seen.append(step))
    assert seen == [(n, 6) for n in range(1, 7)]


def test_the_arrays_of_every_block_are_forgotten():
    model = adapted_model("llama")
    measure_loss(model, targets_of(model, SCHEMES["int4"]), sample())
    assert all(array.size == 0 for _, array in tree_leaves(model.layers))


def tree_leaves(layers):
    from mlx.utils import tree_flatten

    return tree_flatten([layer.parameters() for layer in layers])


@pytest.mark.parametrize("kind", ["pair", "shared"])
def test_an_architecture_that_is_put_together_in_another_way_is_measured_by_its_weights(kind):
    model = adapted_model("llama")
    targets = targets_of(model, SCHEMES["int4"])
    if kind == "shared":
        model.model.layers = [model.layers[0], model.layers[0]]
        targets = {path: target for path, target in targets.items() if ".0." in path}
    else:
        block = model.layers[0]
        block.__class__ = type(
            "PairBlock", (type(block),), {"__call__": lambda *given, **_: (given[1], None)}
        )
    comparison = measure_loss(model, targets, sample())
    assert comparison.logits is None
    assert "logits are not measured" in comparison.notes[0]
    assert comparison.weights.keys() == targets.keys()
