"""Stacked adapters: each row's layer computes what the row's adapter computes alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import AdapterError
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.serving.row_lora import (
    RowAdapters,
    RowLoRAEmbedding,
    RowLoRALinear,
    attach_rows,
    read_updates,
)
from tests.tiny import tiny_llama, with_lora

FINGERPRINT = "sha256:base"


def info(**lora: object) -> AdapterInfo:
    return AdapterInfo(
        model=ModelConfig(path="owner/base"),
        quantization=QuantizationConfig(),
        lora=LoraConfig(**{"rank": 4, **lora}),
        fingerprint=FINGERPRINT,
        chat_template="{{ messages }}",
        chat_template_sha256=text_sha256("{{ messages }}"),
    )


def saved(folder, **lora: object) -> nn.Module:
    """Save an adapter of a tiny model; the adapted model."""
    seed = lora.pop("seed", 0)
    model = with_lora(tiny_llama(tied=True), seed=seed, **lora).eval()
    save_adapter(folder, adapter_tensors(model), info(**lora), num_layers=2)
    return model


CHOICES = [
    {"rank": 2, "alpha": 60.0},
    {"rank": 6, "alpha": 90.0, "variant": "rslora", "target_modules": ("down_proj", "v_proj"), "seed": 5},
    {"rank": 3, "alpha": 80.0, "target_modules": ("embed_tokens", "o_proj"), "num_layers": 1, "seed": 9},
]


@pytest.fixture
def stacked(tmp_path):
    """(model with the stacks of all, rows, each adapted model alone; the base first)."""
    alone = [tiny_llama(tied=True).eval()]
    model, rows, updates = tiny_llama(tied=True).eval(), RowAdapters(), []
    for number, choice in enumerate(CHOICES):
        alone.append(saved(tmp_path / str(number), **choice))
        folder = tmp_path / str(number)
        updates.append(read_updates(model, str(number), folder, info(**without_seed(choice)), **BASE_OF))
    attach_rows(model, updates, rows, mx.float32)
    return model, rows, alone


BASE_OF = {"fingerprint": FINGERPRINT}


def without_seed(choice: dict) -> dict:
    return {key: value for key, value in choice.items() if key != "seed"}


@pytest.mark.parametrize("adapters", [[0, 1, 2, 3], [3, 1, 1, 2, 0], [2, 2, 2], [0, 0], [3], [1]])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_each_row_has_the_logits_of_its_adapter_alone(stacked, adapters, num_tokens):
    model, rows, alone = stacked
    tokens = mx.random.randint(0, 97, (len(adapters), num_tokens), key=mx.random.key(len(adapters)))
    rows.set(adapters)
    together = np.array(model(tokens))
    for row, adapter in enumerate(adapters):
        expected = np.array(alone[adapter](tokens[row : row + 1]))[0]
        assert np.abs(together[row] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_adapters_differ_from_each_other_and_from_the_base(stacked):
    _, _, alone = stacked
    logits = [np.array(model(mx.array([[7, 8]]))) for model in alone]
    for first in range(len(logits)):
        for second in range(first):
            assert np.abs(logits[first] - logits[second]).max() > 1e-2


def test_memory_is_the_stacks_and_nothing_else(stacked):
    model, _, _ = stacked
    added = {
        path: array.nbytes
        for path, array in tree_flatten(model.parameters())
        if path.endswith(("stack_a", "stack_b"))
    }
    base_bytes = sum(array.nbytes for _, array in tree_flatten(tiny_llama(tied=True).parameters()))
    all_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert all_bytes - base_bytes == sum(added.values())
    # q_proj has only the rank of the first adapter, v_proj the largest of two: 4 of (64, rank), float32.
    assert added["model.layers.0.self_attn.q_proj.stack_a"] == 4 * 64 * 2 * 4
    assert added["model.layers.0.self_attn.v_proj.stack_a"] == 4 * 64 * 6 * 4


def test_a_layer_that_no_adapter_changes_stays_as_it_is(stacked):
    model, _, _ = stacked
    kinds = {path: type(module) for path, module in model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] is RowLoRALinear
    assert kinds["model.embed_tokens"] is RowLoRAEmbedding
    assert kinds["model.layers.0.mlp.up_proj"] is nn.QuantizedLinear


def test_stacks_have_the_type_of_the_activations(tmp_path):
    saved(tmp_path, rank=2)
    model = tiny_llama(tied=True, bits=None)
    model.set_dtype(mx.bfloat16)
    rows = RowAdapters()
    attach_rows(model, [read_updates(model, "a", tmp_path, info(rank=2), **BASE_OF)], rows, mx.bfloat16)
    rows.set([0, 1])
    assert model(mx.array([[1], [1]])).dtype == mx.bfloat16
    assert model.model.layers[0].self_attn.q_proj.stack_a.dtype == mx.bfloat16


def test_a_layer_that_sees_positions_one_after_the_other_still_finds_each_row():
    linear, rows = nn.Linear(8, 6, bias=False), RowAdapters()
    stack_a, stack_b = (mx.random.normal(s, key=mx.random.key(s[2])) for s in ((3, 8, 2), (3, 2, 6)))
    layer = RowLoRALinear(linear, stack_a, stack_b, rows)
    rows.set([2, 1])
    x = mx.random.normal((2, 5, 8), key=mx.random.key(1))
    flat = layer(x.reshape(10, 8)).reshape(2, 5, 6)
    assert mx.allclose(flat, layer(x), atol=1e-5)
    with pytest.raises(AdapterError, match="3 rows in a batch of 2"):
        layer(x[0, :3])


def test_reading_an_adapter_leaves_the_base_as_it_was(tmp_path):
    saved(tmp_path, rank=2)
    model = tiny_llama(tied=True)
    before = [(path, type(module)) for path, module in model.named_modules()]
    read_updates(model, "a", tmp_path, info(rank=2), **BASE_OF)
    assert [(path, type(module)) for path, module in model.named_modules()] == before


def test_an_adapter_of_another_base_is_refused_and_leaves_the_base_as_it_was(tmp_path):
    saved(tmp_path, rank=2)
    model = tiny_llama(tied=True)
    with pytest.raises(AdapterError, match="has other weights"):
        read_updates(model, "a", tmp_path, info(rank=2), fingerprint="sha256:other")
    assert not [m for _, m in model.named_modules() if "LoRA" in type(m).__name__]


def test_a_dora_adapter_is_refused_by_name_with_the_way(tmp_path):
    saved(tmp_path, rank=2, variant="dora")
    with pytest.raises(AdapterError, match=r"(?s)adapter friendly is a DoRA one.*fuse"):
        read_updates(tiny_llama(tied=True), "friendly", tmp_path, info(rank=2, variant="dora"), **BASE_OF)


def test_an_adapter_with_numbers_that_are_not_finite_is_refused_by_name(tmp_path):
    model = with_lora(tiny_llama(tied=True), rank=2)
    tensors = adapter_tensors(model)
    name = next(name for name in tensors if name.endswith("lora_b"))
    tensors[name] = tensors[name] * mx.inf
    save_adapter(tmp_path, tensors, info(rank=2), num_layers=2)
    with pytest.raises(AdapterError, match="adapter broken holds numbers that are not finite"):
        read_updates(tiny_llama(tied=True), "broken", tmp_path, info(rank=2), **BASE_OF)
