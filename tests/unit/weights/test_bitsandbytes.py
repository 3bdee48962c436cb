"""bitsandbytes' checkpoints: what is written is read to the bit, what is broken is named."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ModelError, StorageError, WeightsError
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.nf4_layers import NF4Linear
from mlx_qlora.quantization.policy import Recipe
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.weights.bitsandbytes import STATE, EightBits, FourBits
from mlx_qlora.weights.bitsandbytes_export import export_bitsandbytes
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.checkpoints import make_checkpoint, raw, save_sharded, tensors_of

TOKENS = mx.array([[3, 5, 7, 11, 13]])
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama_folder):
    root = tmp_path_factory.mktemp("bnb")
    return resolve_model(str(make_checkpoint(root / "model", "qwen2", tiny_llama_folder)))


@pytest.fixture(scope="module", params=["nf4", "nf4-dq"])
def exported(request, source, tmp_path_factory):
    """(our folder, bitsandbytes' folder, mode)."""
    root = tmp_path_factory.mktemp("exported")
    quantize_checkpoint(source, root / "ours", scheme_named(request.param))
    export_bitsandbytes(resolve_model(str(root / "ours")), root / "theirs", shard_bytes=30_000)
    return root / "ours", root / "theirs", request.param


def load(path):
    return load_base(ModelConfig(path=str(path)), QuantizationConfig(scheme="int4"))


def test_codes_and_scales_come_back_to_the_bit(exported):
    ours, theirs, mode = exported
    a, b = load(ours), load(theirs)
    assert len(list(theirs.glob("model-*.safetensors"))) > 1
    layers = {path: layer for path, layer in a.model.named_modules() if isinstance(layer, NF4Linear)}
    assert len(layers) == 14
    read = dict(b.model.named_modules())
    for path, layer in layers.items():
        assert (read[path].mode, read[path].group_size) == (mode, 64)
        for name, array in layer.parameters().items():
            assert raw(read[path][name]) == raw(array), (path, name)
    assert type(b.model.model.embed_tokens) is nn.Embedding
    # The embedding is rounded to 16 bits, all else is the same.
    assert (
        mx.abs(a.model(TOKENS) - b.model(TOKENS)).max().item() < 0.02 * mx.abs(b.model(TOKENS)).max().item()
    )
    assert b.scheme is None
    assert b.fingerprint == load(theirs).fingerprint


def test_the_layout_is_that_of_transformers(exported):
    _, theirs, mode = exported
    tensors = tensors_of(theirs)
    config = json.loads((theirs / "config.json").read_text())
    assert "quantization" not in config
    settings = config["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["load_in_4bit"] is True
    assert settings["bnb_4bit_use_double_quant"] is (mode == "nf4-dq")
    assert tensors[UP].shape == (128 * 64 // 2, 1)
    assert tensors[UP].dtype == mx.uint8
    state = json.loads(bytes(np.array(tensors[f"{UP}{STATE}nf4"])))
    assert (state["shape"], state["blocksize"], state["dtype"]) == ([128, 64], 64, "bfloat16")
    assert (f"{UP}.nested_absmax" in tensors) is (mode == "nf4-dq")
    assert tensors["model.embed_tokens.weight"].dtype == mx.bfloat16
    assert (theirs / "tokenizer.json").is_file()


def test_layers_in_other_formats_are_unpacked_and_listed(tmp_path, tiny_llama_folder):
    source = resolve_model(str(make_checkpoint(tmp_path / "model", "llama-untied", tiny_llama_folder)))
    recipe = Recipe(scheme_named("nf4"), overrides=(("v_proj", scheme_named("int8")), ("k_proj", None)))
    quantize_checkpoint(source, tmp_path / "ours", recipe)
    kept = export_bitsandbytes(resolve_model(str(tmp_path / "ours")), tmp_path / "theirs")
    attention = "model.layers.{}.self_attn.{}_proj"
    assert sorted(kept) == sorted(["lm_head", *(attention.format(i, p) for i in (0, 1) for p in "kv")])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == kept
    stored, before = tensors_of(tmp_path / "theirs"), tensors_of(source.folder)
    assert raw(stored[f"{kept[1]}.weight"]) != b""
    for path in kept:
        weight = before[f"{path}.weight"].astype(mx.float32)
        assert mx.abs(stored[f"{path}.weight"] - weight).max() < 0.16 * mx.abs(weight).max()
    load(tmp_path / "theirs")


def test_only_a_folder_with_nf4_layers_is_written_and_only_to_a_new_place(source, exported, tmp_path):
    with pytest.raises(ModelError, match="no NF4 layers"):
        export_bitsandbytes(source, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="something here already"):
        export_bitsandbytes(resolve_model(str(exported[0])), tmp_path / "out")


def four_bits(num_rows, width, block, *, double=False):
    weight = mx.random.normal((num_rows, width), key=mx.random.key(4))
    packed, absmax = nf4.quantize(weight, block)
    scales = nf4.quantize_absmax(absmax)
    return FourBits(
        packed,
        scales.codes if double else absmax,
        tuple(scales[1:]) if double else None,
        (num_rows, width),
        block,
        "nf4",
        mx.float32,
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "width", "block", "group_size"),
    [(6, 128, 64, 64), (6, 96, 64, 32), (5, 72, 64, 8), (3, 256, 128, 128), (4, 100, 64, None)],
)
def test_blocks_that_span_rows_keep_every_value(num_rows, width, block, group_size, double):
    weight = four_bits(num_rows, width, block, double=double)
    made = weight.layer(nn.Linear(width, num_rows, bias=False))
    if group_size is None:  # a row is no whole number of words: it is unpacked
        assert made is None
        return
    layer, tensors = made
    layer.load_weights(list(tensors.items()), strict=True)
    assert layer.group_size == group_size
    assert layer.mode == ("nf4-dq" if double and group_size == block else "nf4")
    identity = mx.eye(width)
    assert mx.array_equal(layer(identity).T, weight.dense()).item()


@pytest.mark.parametrize(("width", "group_size"), [(256, 128), (192, 64), (96, 32), (40, None)])
def test_int8_rows_keep_their_codes(width, group_size):
    rng = np.random.default_rng(0)
    codes = mx.array(rng.integers(-127, 128, (5, width)).astype(np.int8))
    weight = EightBits(codes, mx.array(rng.random(5).astype(np.float32)), mx.float32)
    made = weight.layer(nn.Linear(width, 5, bias=False))
    if group_size is None:
        assert made is None
        return
    layer, tensors = made
    layer.load_weights(list(tensors.items()), strict=True)
    assert layer.group_size == group_size
    unpacked = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=group_size, bits=8)
    assert mx.abs(unpacked - weight.dense()).max().item() < 1e-6
    steps = mx.round((unpacked - layer.biases[:, :1]) / layer.scales[:, :1])
    assert mx.array_equal(steps.astype(mx.int32) - 128, codes.astype(mx.int32)).item()


def changed(exported, tmp_path, change):
    folder = shutil.copytree(exported[1], tmp_path / "changed")
    tensors = tensors_of(folder)
    change(tensors)
    mx.eval(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_sharded(folder, tensors, 1)
    return folder


def with_state(**other):
    def change(tensors):
        name = f"{UP}{STATE}nf4"
        state = {**json.loads(bytes(np.array(tensors[name]))), **other}
        tensors[name] = mx.array(np.frombuffer(json.dumps(state).encode(), np.uint8))

    return change


def cut(leaf):
    def change(tensors):
        tensors[UP + leaf] = tensors[UP + leaf].reshape(-1)[:-1]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{UP}.absmax"), "there is no 'absmax'"),
        (lambda t: t.pop(UP), "there is no"),
        (cut(""), "the weight has 4095 elements, not 4096"),
        (cut(".absmax"), "absmax has 127 elements, not 128"),
        (lambda t: t.update({f"{UP}.quant_map": t[f"{UP}.quant_map"] * 2}), "quant_map is not that of nf4"),
        (with_state(blocksize=48), "blocks of 48"),
        (with_state(blocksize=0), "blocks of 0"),
        (with_state(shape=[128]), "shape \\[128\\]"),
        (with_state(shape="x"), "invalid literal"),
        (with_state(dtype="int3"), "there is no 'int3'"),
        (with_state(quant_type="nf3"), "codes of the kind"),
        (
            lambda t: t.update({f"{UP}{STATE}nf4": mx.array([123], dtype=mx.uint8)}),
            "Expecting property name",
        ),
    ],
)
def test_a_broken_weight_is_named(exported, tmp_path, change, says):
    folder = changed(exported, tmp_path, change)
    with pytest.raises(WeightsError, match=says) as caught:
        load(folder)
    assert UP in str(caught.value)
    assert caught.value.where == str(folder)


def test_another_nested_map_is_kept_exactly_in_float32(exported, tmp_path):
    if exported[2] != "nf4-dq":
        pytest.skip("without double quantization there is no such map")

    def change(tensors):
        name = f"{UP}.nested_quant_map"
        values = np.array(tensors[name])
        values[0] = -1  # as old versions have it
        tensors[name] = mx.array(values)

    layer = load(changed(exported, tmp_path, change)).model.layers[0].mlp.up_proj
    before = load(exported[1]).model.layers[0].mlp.up_proj
    assert (layer.mode, before.mode) == ("nf4", "nf4-dq")
    absmax = nf4.absmax_of(before, before.absmax, slice(None))
    is_lowest = before.absmax == 0
    assert mx.array_equal(mx.where(is_lowest, absmax, layer.absmax), absmax).item()
    assert is_lowest.sum().item() == (layer.absmax != absmax).sum().item()
