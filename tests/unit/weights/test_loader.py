"""A base model in memory: quantized once, found again, in the type it computes in."""

import json
import os
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError, ModelError, WeightsError
from mlx_qlora.quantization.policy import Recipe
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.storage import cache_root
from mlx_qlora.weights.loader import cache_folder, load_base, settled, source_fingerprint
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.source import fingerprint, resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.checkpoints import make_checkpoint, save_sharded, tensors_of

INT4, INT8 = scheme_named("int4"), scheme_named("int8")


@pytest.fixture
def model(tmp_path, tiny_llama_folder):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path, scheme="int4", dtype="auto", on_bytes=None, **quantization):
    return load_base(
        ModelConfig(path=str(path), dtype=dtype), QuantizationConfig(scheme=scheme, **quantization), on_bytes
    )


def float_types(base):
    arrays = (array for _, array in tree_flatten(base.model.parameters()))
    return {array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)}


def logits(model):
    return model(mx.array([[3, 5, 7, 11]])).astype(mx.float32)


def test_a_model_is_quantized_once_and_found_again(model, cache):
    seen = []
    first = load(model, on_bytes=lambda *s: seen.append(s))
    assert seen
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    again = load(model, on_bytes=lambda *_: pytest.fail("quantized again"))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before
    assert first.folder == again.folder
    assert first.folder.parent == cache
    assert mx.array_equal(logits(first.model), logits(again.model)).item()


def test_the_loaded_model_is_mlx_lm_s(model):
    from mlx_lm.utils import load_model

    base = load(model, dtype="bfloat16")
    theirs, _ = load_model(base.folder)
    assert mx.array_equal(logits(base.model), logits(theirs)).item()
    assert base.scheme == INT4
    assert base.num_parameters == sum(array.size for array in tensors_of(model).values())
    assert base.tokenizer.decode(base.tokenizer.encode("o clube")) == "o clube"


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_on_a_cpu_everything_is_float32_scales_included(model, scheme):
    if mx.default_device() != mx.cpu:
        pytest.skip("this device computes bfloat16 itself")
    base = load(model, scheme)
    assert float_types(base) == {mx.float32}
    assert base.dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", ["int4", "mxfp4", "none"])
def test_the_type_asked_for_is_the_type_of_every_float(model, scheme, dtype):
    base = load(model, scheme, dtype)
    assert float_types(base) == {getattr(mx, dtype)}
    assert base.dtype == dtype


def test_a_model_kept_as_it_is_is_not_copied(model, cache):
    base = load(model, "none", "bfloat16")
    assert (base.folder, base.scheme) == (model, None)
    assert not cache.exists()
    assert base.fingerprint == fingerprint(model)


def test_a_quantized_model_is_taken_as_it_is(model, tmp_path, cache):
    quantize_checkpoint(resolve_model(str(model)), tmp_path / "int8", INT8)
    base = load(tmp_path / "int8", "int4")
    assert (base.folder, base.scheme) == (tmp_path / "int8", None)
    assert base.config["quantization"]["bits"] == 8
    assert not cache.exists()


def test_a_quantized_copy_has_its_source_s_fingerprint(model, tmp_path):
    quantize_checkpoint(resolve_model(str(model)), tmp_path / "copy", INT4)
    assert source_fingerprint(tmp_path / "copy") == fingerprint(model) == source_fingerprint(model)
    assert load(tmp_path / "copy").fingerprint == load(model).fingerprint == fingerprint(model)


@pytest.mark.parametrize("manifest", [None, "[]", "{", "3", "{}"])
def test_without_a_manifest_the_fingerprint_is_the_files_own(model, tmp_path, manifest):
    quantize_checkpoint(resolve_model(str(model)), tmp_path / "copy", INT4)
    (tmp_path / "copy" / MANIFEST).unlink()
    if manifest is not None:
        (tmp_path / "copy" / MANIFEST).write_text(manifest)
    assert source_fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "copy") != fingerprint(model)


def test_each_scheme_and_each_source_has_a_copy_of_its_own(model, tmp_path):
    source = resolve_model(str(model))
    other = resolve_model(str(shutil.copytree(model, tmp_path / "elsewhere" / "model")))
    folders = [
        cache_folder(source, "a", INT4, ()),
        cache_folder(source, "a", INT8, ()),
        cache_folder(source, "a", scheme_named("mxfp4"), ()),
        cache_folder(source, "a", INT4, ("lm_head",)),
        cache_folder(source, "b", INT4, ()),
        cache_folder(other, "a", INT4, ()),
    ]
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {cache_root()}
    assert cache_folder(source, "a", INT4, ("x", "y")) == cache_folder(source, "a", INT4, ("y", "x"))


def test_each_part_of_a_recipe_has_a_copy_of_its_own(model):
    source = resolve_model(str(model))
    recipes = [
        Recipe(INT4),
        Recipe(INT4, overrides=(("a", INT8), ("b", None))),
        Recipe(INT4, overrides=(("b", None), ("a", INT8))),
        Recipe(INT4, keep_lm_head=True),
        Recipe(INT4, keep_embeddings=True),
        Recipe(INT4, sensitive_scheme=INT8),
        Recipe(INT4, keep_sensitive=True),
    ]
    assert len({cache_folder(source, "a", recipe, ()) for recipe in recipes}) == len(recipes)


def test_a_mixed_recipe_is_loaded_quantized_once_and_found_again(model):
    keys = {"overrides": {"down_proj": "int8", "v_proj": "none"}}
    base = load(model, **keys)
    assert base.model.layers[0].mlp.down_proj.bits == 8
    assert base.model.layers[0].mlp.up_proj.bits == 4
    assert not hasattr(base.model.layers[0].self_attn.v_proj, "scales")
    assert load(model, on_bytes=lambda *_: pytest.fail("quantized again"), **keys).folder == base.folder
    assert load(model).folder != base.folder


def test_a_target_is_measured_once_and_then_a_plain_choice(model):
    base = load(model, bits_per_weight=6.0)
    stored = sum(array.nbytes for array in tensors_of(base.folder).values())
    assert 5 < 8 * stored / base.num_parameters <= 6.0
    again = load(model, on_bytes=lambda *_: pytest.fail("measured again"), bits_per_weight=6.0)
    assert again.folder == base.folder
    config = settled(ModelConfig(path=str(model)), QuantizationConfig(bits_per_weight=6.0))
    assert load(model, **config.model_dump(exclude={"scheme"})).folder == base.folder
    target = QuantizationConfig(bits_per_weight=6.0)
    assert settled(ModelConfig(path=str(base.folder)), target) == QuantizationConfig()


def test_a_changed_weight_is_quantized_anew(model):
    before = load(model)
    tensors = tensors_of(model)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    mx.eval(tensors)
    save_sharded(model, tensors, 1)
    after = load(model)
    assert after.folder != before.folder
    assert after.fingerprint != before.fingerprint
    assert not mx.array_equal(logits(after.model), logits(before.model)).item()


def test_skipped_modules_stay_unquantized(model):
    base = load(model, skip_modules=["k_proj"])
    attention = base.model.layers[0].self_attn
    assert not hasattr(attention.k_proj, "scales")
    assert hasattr(attention.q_proj, "scales")


def test_a_type_the_model_keeps_is_not_cast(tmp_path, tiny_llama_folder, monkeypatch):
    from mlx_lm.models import llama

    monkeypatch.setattr(llama.Model, "cast_predicate", lambda _self, path: "norm" not in path, raising=False)
    folder = make_checkpoint(tmp_path / "fp32", "llama-tied", tiny_llama_folder, dtype=mx.float32)
    base = load(folder, "int4", "float16")
    types = {name: array.dtype for name, array in tree_flatten(base.model.parameters())}
    assert types["model.norm.weight"] == mx.float32
    assert types["model.layers.0.mlp.up_proj.scales"] == mx.float16


def test_no_model_is_a_config_error():
    with pytest.raises(ConfigError, match="no model"):
        load_base(ModelConfig(), QuantizationConfig())


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.99])
def test_a_bit_that_flipped_in_the_cache_is_found_said_and_mended(model, share):
    first = load(model)
    shard = first.folder / "model.safetensors"
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[9 + int(share * (len(data) - 9))] ^= 1
    shard.write_bytes(data)
    again = load(model)
    assert again.folder == first.folder
    assert any("made anew" in note and "model.safetensors" in note for note in again.notes)
    assert shard.read_bytes() == whole
    assert load(model).notes == ()


def test_a_bit_that_flipped_in_a_folder_of_the_user_s_is_an_error_and_nothing_is_touched(model, tmp_path):
    shutil.copytree(load(model).folder, tmp_path / "own")
    shard = tmp_path / "own" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(WeightsError, match=r"checksum differs.*model\.safetensors"):
        load(tmp_path / "own", scheme="none")
    assert shard.read_bytes() == bytes(data)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("config.json", None),
        ("tokenizer.json", None),
        (MANIFEST, None),
        (MANIFEST, 100),
        ("model.safetensors", None),
        ("model.safetensors", 100),
    ],
)
def test_a_damaged_copy_in_the_cache_is_made_again(model, name, size):
    first = load(model)
    if size is None:
        (first.folder / name).unlink()
    else:
        os.truncate(first.folder / name, size)
    again = load(model)
    assert again.folder == first.folder
    assert mx.array_equal(logits(again.model), logits(first.model)).item()


def test_a_changed_configuration_is_no_reason_to_stop(model):
    before = load(model)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 77.0}))
    after = load(model)
    assert after.config["rope_theta"] == 77.0
    assert after.fingerprint == before.fingerprint


def test_a_quantized_model_mlx_lm_cannot_read_is_a_model_error(model):
    path = model / "config.json"
    changed = {**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}
    path.write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="mlx-lm cannot load the model: KeyError: 'quant_method'"):
        load(model)


def test_a_broken_tokenizer_is_a_model_error(model):
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        load(model)


def test_a_quantized_model_whose_tensors_do_not_fit_is_a_model_error(model, tmp_path):
    quantize_checkpoint(resolve_model(str(model)), tmp_path / "copy", INT4)
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="mlx-lm cannot load"):
        load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"MLX_QLORA_CACHE": "/c"}, "/c"),
        ("darwin", {"MLX_QLORA_CACHE": "/c"}, "/c"),
        ("linux", {}, "/home/ana/.cache/mlx_qlora"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/mlx_qlora"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/home/ana/Library/Caches/mlx_qlora"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_such_things(platform, environment, expected, monkeypatch):
    for name in ("MLX_QLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/ana", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert str(cache_root()) == expected
