"""A model folder becomes a GGUF file that holds the same numbers, and says which it could not keep."""

import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

import mlx_qlora.exchange.gguf_plan as plan
from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError, ModelError, StorageError, WeightsError
from mlx_qlora.exchange.gguf_export import by_class, export_gguf
from mlx_qlora.exchange.gguf_layout import ARCHITECTURES
from mlx_qlora.weights import gguf_config
from mlx_qlora.weights.gguf import import_gguf, open_gguf
from mlx_qlora.weights.gguf_file import read_gguf
from mlx_qlora.weights.shards import read_tensors
from tests.conftest import save_tokenizer
from tests.gguf_files import KINDS, full_config, gguf_tensors, random_blocks, random_model, write_model

PRE = {"pre": "gpt-2", "name": "tiny"}


def save_folder(folder, config, tensors):
    folder.mkdir()
    save_tokenizer(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def float_folder(folder, kind, dtype=mx.float32, **changes):
    """A folder with the random model of that kind, and the model itself in float32."""
    config = full_config(kind, **changes)
    model = random_model(config)
    model.set_dtype(dtype)
    save_folder(folder, config, dict(tree_flatten(model.parameters())))
    model.set_dtype(mx.float32)
    return model


def quantized_folder(folder, kind, bits, group_size=32, dtype=mx.float16, mode="affine", **changes):
    """The same in mlx-lm's quantized layout; its tensors by name."""
    config = full_config(kind, intermediate_size=128, **changes)
    model = random_model(config)
    model.set_dtype(dtype)
    nn.quantize(model, group_size, bits, mode=mode)
    quantization = {"group_size": group_size, "bits": bits, "mode": mode}
    tensors = dict(tree_flatten(model.parameters()))
    save_folder(folder, {**config, "quantization": quantization}, tensors)
    return tensors


def dequantized(tensors, name, group_size, bits):
    parts = [tensors[f"{name}.{leaf}"] for leaf in ("weight", "scales", "biases")]
    wide = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
    return np.array(mx.dequantize(*wide, group_size, bits))


def test_what_can_be_exported_can_be_imported():
    assert set(ARCHITECTURES.values()) == set(gguf_config._ARCHITECTURES)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mixtral-old", "phi2-fused")])
def test_every_architecture_has_llama_cpps_names_and_layout(tmp_path, kind):
    config = full_config(kind)
    model = float_folder(tmp_path / "model", kind)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    found = open_gguf(tmp_path / "a.gguf").tensors
    expected = {**gguf_tensors(model, kind, config), **KINDS[kind].extra}
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-7, err_msg=name)
    assert result.architecture == KINDS[kind].arch
    assert all(tensor.is_exact or tensor.largest_error < 2e-7 for tensor in result.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_comes_back_from_the_import_as_it_was(tmp_path, kind):
    float_folder(tmp_path / "model", kind, mx.bfloat16)
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    import_gguf(tmp_path / "a.gguf", tmp_path / "back")
    before, after = (read_tensors(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert set(before) == set(after)
    for name, array in before.items():
        difference = np.abs(np.array(array.astype(mx.float32) - after[name].astype(mx.float32)))
        assert difference.max() <= (1e-7 if name.endswith("norm.weight") else 0), name


@pytest.mark.parametrize(("bits", "type_name"), [(4, "Q4_1"), (5, "Q5_1")])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_four_and_five_bits_go_and_come_back_bit_for_bit(tmp_path, bits, type_name, group_size, dtype):
    before = quantized_folder(tmp_path / "model", "llama", bits, group_size, dtype)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert result.file_type == type_name
    assert all(tensor.is_exact for tensor in result.tensors)
    import_gguf(tmp_path / "a.gguf", tmp_path / "back")
    after = read_tensors(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before)
    for name, array in before.items():
        if name.endswith((".scales", ".biases")):
            array = mx.repeat(array.astype(mx.float16), group_size // 32, axis=-1)
        assert mx.array_equal(array, after[name].astype(array.dtype)), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen2moe", "qwen3moe", "phi3", "gemma2"])
def test_packed_experts_and_fused_layers_keep_their_words(tmp_path, kind):
    changes = {"moe_intermediate_size": 64} if "moe" in kind else {}
    before = quantized_folder(tmp_path / "model", kind, 4, **changes)
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    import_gguf(tmp_path / "a.gguf", tmp_path / "back")
    after = read_tensors(tmp_path / "back" / "model.safetensors")
    packed = [name for name, array in before.items() if array.dtype == mx.uint32]
    kept = [
        name for name in packed if not name.endswith(("mlp.gate.weight", "moe.gate.weight", "_gate.weight"))
    ]
    assert len(kept) > len(packed) / 2
    assert all(mx.array_equal(before[name], after[name]) for name in kept)


def test_two_and_three_bits_take_the_smallest_format_that_holds_them(tmp_path):
    for bits in (2, 3):
        before = quantized_folder(tmp_path / str(bits), "llama", bits)
        result = export_gguf(tmp_path / str(bits), tmp_path / f"{bits}.gguf", **PRE)
        assert {t.gguf_type for t in result.tensors} <= {"F32", "Q4_0", "Q4_1"}
        assert all(tensor.is_exact for tensor in result.tensors)
        found = open_gguf(tmp_path / f"{bits}.gguf").tensors["blk.0.ffn_up.weight"]
        np.testing.assert_allclose(
            found, dequantized(before, "model.layers.0.mlp.up_proj", 32, bits), atol=1e-7
        )


def test_eight_bits_are_written_anew_and_the_error_is_the_measured_one(tmp_path):
    before = quantized_folder(tmp_path / "model", "llama", 8)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    said = {tensor.gguf_name: tensor for tensor in result.tensors}["blk.0.ffn_up.weight"]
    stored = dequantized(before, "model.layers.0.mlp.up_proj", 32, 8).astype(np.float64)
    change = open_gguf(tmp_path / "a.gguf").tensors["blk.0.ffn_up.weight"] - stored
    assert (said.gguf_type, said.is_exact) == ("Q8_0", False)
    assert said.relative_error == pytest.approx(np.linalg.norm(change) / np.linalg.norm(stored), rel=1e-3)
    assert said.largest_error == pytest.approx(np.abs(change).max(), rel=1e-3)
    assert 1e-3 < said.relative_error < 1e-2


def test_eight_bits_that_came_from_q8_0_are_the_same_bytes_again(tmp_path):
    raw = {"blk.0.ffn_up.weight": (random_blocks((96, 64), Type.Q8_0), Type.Q8_0)}
    write_model(tmp_path / "a.gguf", "llama", types=raw)
    import_gguf(tmp_path / "a.gguf", tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "b.gguf")
    one, two = (read_gguf(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.read(0, tensor.rows), two[name].read(0, tensor.rows))


def test_scales_that_float16_cannot_hold_are_rounded_and_said(tmp_path):
    quantized_folder(tmp_path / "model", "llama", 4, 64, mx.float32)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    said = {tensor.gguf_name: tensor for tensor in result.tensors}["blk.0.ffn_up.weight"]
    assert (said.gguf_type, said.is_exact) == ("Q4_1", False)
    assert 0 < said.relative_error < 1e-3


@pytest.mark.parametrize(("factor", "type_name"), [(1e-8, "F16"), (1e8, "BF16")])
def test_scales_beyond_float16_make_a_float_of_the_tensor(tmp_path, factor, type_name):
    tensors = quantized_folder(tmp_path / "model", "llama", 4, 64, mx.float32)
    for leaf in ("scales", "biases"):
        tensors[f"model.layers.0.mlp.up_proj.{leaf}"] *= factor
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), tensors)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    types = {tensor.gguf_name: tensor.gguf_type for tensor in result.tensors}
    assert types["blk.0.ffn_up.weight"] == type_name
    assert types["blk.1.ffn_up.weight"] == "Q4_1"


@pytest.mark.parametrize(
    ("mode", "group_size", "bits", "type_name"),
    [("mxfp4", 32, 4, "MXFP4"), ("mxfp8", 32, 8, "F16"), ("nvfp4", 16, 4, "F16")],
)
def test_small_floats_keep_every_number(tmp_path, mode, group_size, bits, type_name):
    before = quantized_folder(tmp_path / "model", "llama", bits, group_size, mode=mode)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert result.file_type == type_name
    assert all(tensor.is_exact for tensor in result.tensors)
    parts = [before[f"model.layers.1.mlp.down_proj.{leaf}"] for leaf in ("weight", "scales")]
    expected = mx.dequantize(*parts, None, group_size, bits, mode).astype(mx.float32)
    found = open_gguf(tmp_path / "a.gguf").tensors["blk.1.ffn_down.weight"]
    np.testing.assert_array_equal(found, np.array(expected))


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_nf4_becomes_the_nearest_float16(tmp_path, tiny_llama_folder, scheme):
    from mlx_qlora.api import quantize
    from mlx_qlora.quantization.dense import unpacked
    from mlx_qlora.weights.bitsandbytes_export import export_bitsandbytes
    from mlx_qlora.weights.codebook import load_codebooks
    from mlx_qlora.weights.source import resolve_model

    quantize(
        str(tiny_llama_folder),
        tmp_path / "nf4",
        build_config({"quantization": {"scheme": scheme}}, where="t").quantization,
    )
    result = export_gguf(tmp_path / "nf4", tmp_path / "a.gguf", **PRE)
    model = load_codebooks(resolve_model(str(tmp_path / "nf4")))
    expected = np.array(unpacked(model.layers[1].mlp.up_proj, mx.zeros((1,))))
    found = open_gguf(tmp_path / "a.gguf").tensors["blk.1.ffn_up.weight"]
    np.testing.assert_array_equal(found, expected.astype(np.float16).astype(np.float32))
    assert result.file_type == "F16"
    assert 0 < max(tensor.relative_error for tensor in result.tensors) < 1e-3
    export_bitsandbytes(resolve_model(str(tmp_path / "nf4")), tmp_path / "bnb")
    export_gguf(tmp_path / "bnb", tmp_path / "b.gguf", **PRE)
    one, two = (read_gguf(tmp_path / f"{name}.gguf").tensors for name in "ab")
    assert set(one) == set(two)
    for name, tensor in one.items():
        if name.startswith("blk."):  # bitsandbytes leaves the embedding as it is
            np.testing.assert_array_equal(tensor.read(0, tensor.rows), two[name].read(0, tensor.rows))


@pytest.mark.parametrize("type_name", plan.TYPES)
def test_any_type_may_be_asked_for_and_matrices_get_it(tmp_path, type_name):
    float_folder(tmp_path / "model", "llama", mx.bfloat16)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", type_name=type_name, **PRE)
    assert {t.gguf_type for t in result.tensors if "norm" not in t.name} == {type_name.upper()}
    assert {t.gguf_type for t in result.tensors if "norm" in t.name} == {"F32"}
    assert read_gguf(tmp_path / "a.gguf").metadata["general.file_type"] == {
        "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32
    }[type_name]  # fmt: skip
    lossless = type_name in ("f32", "bf16")
    assert all(tensor.is_exact for tensor in result.tensors) == lossless


def test_a_type_that_is_asked_for_keeps_codes_it_has_room_for(tmp_path):
    before = quantized_folder(tmp_path / "model", "llama", 4)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", type_name="q5_1", **PRE)
    assert all(tensor.is_exact for tensor in result.tensors)
    found = open_gguf(tmp_path / "a.gguf").tensors["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(found, dequantized(before, "model.layers.0.mlp.up_proj", 32, 4), atol=1e-7)


def test_rows_of_no_whole_blocks_become_float16_and_are_named(tmp_path):
    float_folder(tmp_path / "model", "llama", intermediate_size=100)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", type_name="q8_0", **PRE)
    odd = [tensor for tensor in result.tensors if tensor.reason]
    assert [tensor.gguf_name for tensor in odd] == [f"blk.{layer}.ffn_down.weight" for layer in (0, 1)]
    assert {tensor.gguf_type for tensor in odd} == {"F16"}
    assert "rows of 100" in odd[0].reason
    others = {tensor.gguf_type for tensor in result.tensors if "norm" not in tensor.name} - {"F16"}
    assert others == {"Q8_0"}


def test_numbers_too_large_for_the_type_are_refused_and_nothing_is_left(tmp_path):
    model = float_folder(tmp_path / "model", "llama")
    tensors = dict(tree_flatten(model.parameters()))
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), tensors)
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight holds numbers too large for F16"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", type_name="f16", **PRE)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", type_name="bf16", **PRE)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.scales", "model.norm.weight"])
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(tmp_path, name):
    tensors = quantized_folder(tmp_path / "model", "llama", 4)
    tensors[name] = mx.full(tensors[name].shape, float("nan"), mx.float16)
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), tensors)
    with pytest.raises(ModelError, match=rf"{name.rpartition('.')[0]}[\s\S]*not finite"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert not (tmp_path / "a.gguf").exists()


def test_a_missing_a_left_over_and_a_misshapen_tensor_are_all_named(tmp_path):
    tensors = quantized_folder(tmp_path / "model", "llama", 4)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = mx.zeros((2,))
    tensors["model.layers.0.mlp.up_proj.scales"] = mx.zeros((128, 1), mx.float16)
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), tensors)
    with pytest.raises(WeightsError, match="3 tensors") as failure:
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert all(name in str(failure.value) for name in ("model.norm.weight", "model.extra", "up_proj.scales"))


def test_blocks_of_rows_make_no_difference(tmp_path, monkeypatch):
    quantized_folder(tmp_path / "model", "llama", 8)
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    monkeypatch.setattr(plan, "BLOCK_BYTES", 1)
    export_gguf(tmp_path / "model", tmp_path / "b.gguf", **PRE)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_memory_depends_on_the_block_and_not_on_the_tensor(tmp_path, monkeypatch, bits):
    changes = {"vocab_size": 32_000}
    if bits is None:
        float_folder(tmp_path / "model", "llama", mx.bfloat16, **changes)
    else:
        quantized_folder(tmp_path / "model", "llama", bits, **changes)
    export_gguf(tmp_path / "model", tmp_path / "first.gguf", **PRE)  # modules and tables that are made once
    monkeypatch.setattr(plan, "BLOCK_BYTES", 64 * 1024)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    peak_bytes = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
    tracemalloc.stop()
    largest = 32_000 * 64 * 4
    header = read_gguf(tmp_path / "a.gguf").data_start
    assert result.num_parameters > 2 * largest / 4  # the embedding and the head, each of that size
    assert peak_bytes < largest / 8 + 24 * header


def test_an_output_that_is_there_is_not_touched(tmp_path):
    float_folder(tmp_path / "model", "llama")
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(StorageError, match="something here already"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_what_a_killed_export_left_is_swept_away_and_nothing_else(tmp_path):
    float_folder(tmp_path / "model", "llama")
    for name in (".a.gguf.1.tmp", ".b.gguf.1.tmp"):
        (tmp_path / name).write_text("half")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.gguf.1.tmp", "a.gguf", "model"]


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    float_folder(tmp_path / "model", "llama")
    code = (
        "import sys; from pathlib import Path; from mlx_qlora.errors import StorageError\n"
        "from mlx_qlora.exchange.gguf_export import export_gguf\n"
        "try: export_gguf(sys.argv[1], Path(sys.argv[2]), pre='gpt-2')\n"
        "except StorageError as error: print(error)"
    )

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "a.gguf")]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limited, cwd=root, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert "The disk is full" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_progress_ends_at_all_the_bytes(tmp_path):
    float_folder(tmp_path / "model", "llama")
    seen = []
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", on_bytes=lambda *pair: seen.append(pair), **PRE)
    assert seen == sorted(seen)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(t.nbytes for t in read_tensors(tmp_path / "model/model.safetensors").values())
    )


def test_tensors_are_counted_by_class(tmp_path):
    quantized_folder(tmp_path / "model", "llama", 8, 64)
    result = export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    classes = {key: len(tensors) for key, tensors in by_class(result.tensors).items()}
    assert classes == {("F16", "F32", True): 5, ("affine 8-bit, groups of 64, F16 scales", "Q8_0", False): 16}
    assert result.bytes == (tmp_path / "a.gguf").stat().st_size
    assert result.bits_per_weight == pytest.approx(8.5, abs=0.1)


def test_an_architecture_that_we_cannot_export_is_named_with_those_we_can(tmp_path):
    folder = save_folder(tmp_path / "model", full_config("llama", model_type="stablelm"), {"a": mx.zeros(1)})
    with pytest.raises(ModelError, match="'stablelm' cannot be exported; these can: llama, mistral"):
        export_gguf(folder, tmp_path / "a.gguf")


def test_a_name_that_llama_cpp_would_misread_is_refused(tmp_path):
    float_folder(tmp_path / "model", "phi3")
    with pytest.raises(ModelError, match="takes 'my-phi3' for a Phi-3"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", pre="gpt-2", name="my-phi3")


def test_a_type_and_an_ending_that_do_not_exist_are_refused(tmp_path):
    float_folder(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match=r"no --type q4_k; there are auto, f32"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", type_name="q4_k")
    with pytest.raises(ConfigError, match="has to end in .gguf"):
        export_gguf(tmp_path / "model", tmp_path / "a.bin")


def test_a_licence_comes_from_the_card_or_the_caller(tmp_path):
    float_folder(tmp_path / "model", "llama")
    card = "---\nlicense: other\nlicense_name: my-terms\nlicense_link: https://example.org\n---\n# A model\n"
    (tmp_path / "model" / "README.md").write_text(card)
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    export_gguf(tmp_path / "model", tmp_path / "b.gguf", license_name="mit", **PRE)
    one, two = (read_gguf(tmp_path / f"{name}.gguf").metadata for name in "ab")
    keys = ("general.license", "general.license.name", "general.license.link")
    assert [one[key] for key in keys] == ["other", "my-terms", "https://example.org"]
    assert two["general.license"] == "mit"
    assert (one["general.name"], one["general.quantization_version"]) == ("tiny", gguf.GGML_QUANT_VERSION)


@pytest.mark.parametrize("text", ["", "---\n: :\n---\n", "---\n- a\n---\n", "no front matter"])
def test_a_card_without_a_licence_names_none(tmp_path, text):
    float_folder(tmp_path / "model", "llama")
    (tmp_path / "model" / "README.md").write_text(text)
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", **PRE)
    assert "general.license" not in read_gguf(tmp_path / "a.gguf").metadata
