"""A checkpoint streamed into NF4 and loaded again: the same bytes however it is read, trained and asked."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ModelError
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.quantization import nf4
from mlx_qlora.quantization.nf4_layers import NF4Embedding, NF4Linear, quantized
from mlx_qlora.quantization.policy import Recipe
from mlx_qlora.quantization.schemes import Scheme, scheme_named
from mlx_qlora.storage import sha256_of
from mlx_qlora.weights import stream
from mlx_qlora.weights.codebook import has_codebooks
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.source import fingerprint, resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.checkpoints import make_checkpoint, raw, tensors_of
from tests.tiny import random_batch, with_lora

SCHEMES = {
    "nf4": scheme_named("nf4"),
    "nf4-dq": scheme_named("nf4-dq"),
    "nf4-dq-g32": Scheme("nf4-dq", "nf4-dq", 4, 32),
}
TOKENS = mx.array([[3, 5, 7, 11, 13]])


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama_folder):
    root = tmp_path_factory.mktemp("nf4")
    return resolve_model(
        str(make_checkpoint(root / "model", "llama-untied", tiny_llama_folder, num_shards=2))
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path, scheme="none", **model):
    return load_base(ModelConfig(path=str(path), **model), QuantizationConfig(scheme=scheme))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_stored_is_what_each_weight_quantizes_to(name, source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 8_000)  # seven rows at a time
    scheme = SCHEMES[name]
    result = quantize_checkpoint(source, tmp_path / "out", scheme, shard_bytes=15_000)
    before, stored = tensors_of(source.folder), tensors_of(tmp_path / "out")
    for path in [n.removesuffix(".weight") for n, array in before.items() if array.ndim == 2]:
        parts = quantized(before[f"{path}.weight"], scheme.group_size, scheme.mode)
        assert len(parts) == (4 if name.startswith("nf4-dq") else 2)
        for leaf, array in parts.items():
            kept = stored.pop(f"{path}.{leaf}")
            assert (kept.dtype, kept.shape, raw(kept)) == (array.dtype, array.shape, raw(array)), (path, leaf)
    assert stored.keys() == {n for n, array in before.items() if array.ndim == 1}
    kept = tensors_of(tmp_path / "out").values()
    assert result.bytes == sum(array.nbytes for array in kept)
    assert result.bits_per_weight == 8 * result.bytes / sum(array.size for array in before.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": scheme.group_size, "bits": 4, "mode": scheme.mode}


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(source, tmp_path):
    scheme = SCHEMES["nf4-dq"]
    quantize_checkpoint(source, tmp_path / "clean", scheme, shard_bytes=15_000)

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", scheme, on_bytes=stop, shard_bytes=15_000)
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "out.partial").glob("model-*.safetensors")}
    assert kept
    quantize_checkpoint(source, tmp_path / "out", scheme, shard_bytes=15_000)
    files = [{p.name: sha256_of(p) for p in (tmp_path / f).iterdir()} for f in ("out", "clean")]
    assert files[0] == files[1]
    assert kept.items() <= {p.name: p.stat().st_ino for p in (tmp_path / "out").iterdir()}.items()


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "qwen2", "gemma2"])
def test_a_loaded_model_computes_with_its_unpacked_weights(name, architecture, tmp_path, tiny_llama_folder):
    folder = make_checkpoint(
        tmp_path / "model", architecture, tiny_llama_folder, dtype=mx.float32, torch_dtype="float32"
    )
    base, plain = load(folder, name, dtype="float32"), load(folder, dtype="float32")
    weights = []
    for path, layer in base.model.named_modules():
        if isinstance(layer, NF4Linear | NF4Embedding):
            absmax = nf4.absmax_of(layer, layer.absmax, slice(None))
            weights.append((f"{path}.weight", nf4.unpack_words(layer.weight, absmax, name, mx.float32)))
    assert len(weights) == sum(array.ndim == 2 for array in tensors_of(folder).values())
    plain.model.load_weights(weights, strict=False)
    difference = mx.abs(base.model(TOKENS) - plain.model(TOKENS)).max()
    assert difference.item() <= 1e-5 * mx.abs(plain.model(TOKENS)).max().item()
    assert base.num_parameters == sum(array.size for array in tensors_of(folder).values())


def test_it_is_quantized_once_and_the_source_s_fingerprint_is_kept(source, cache):
    first, again = load(source.folder, "nf4-dq"), load(source.folder, "nf4-dq")
    assert first.folder == again.folder
    assert first.folder.parent == cache
    assert first.scheme == SCHEMES["nf4-dq"]
    assert first.fingerprint == fingerprint(source.folder)
    assert mx.array_equal(first.model(TOKENS), again.model(TOKENS)).item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scales_stay_exact_whatever_activations_are(dtype, source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", SCHEMES["nf4-dq"])
    stored, base = tensors_of(tmp_path / "out"), load(tmp_path / "out", dtype=dtype)
    loaded = dict(tree_flatten(base.model.parameters()))
    for name, array in loaded.items():
        if name.endswith("norm.weight"):
            assert array.dtype == getattr(mx, dtype)
        else:
            assert (array.dtype, raw(array)) == (stored[name].dtype, raw(stored[name])), name
    assert base.model(TOKENS).dtype == getattr(mx, dtype) == getattr(mx, base.dtype)


def test_some_layers_may_have_other_formats_or_none(source, tmp_path):
    recipe = Recipe(
        SCHEMES["nf4-dq"],
        skip_modules=("k_proj",),
        overrides=(("lm_head", scheme_named("int8")), ("v_proj", scheme_named("nf4"))),
    )
    quantize_checkpoint(source, tmp_path / "out", recipe)
    model = load(tmp_path / "out").model
    attention = model.layers[0].self_attn
    assert model.lm_head.mode == "affine"
    assert (attention.q_proj.mode, attention.v_proj.mode) == ("nf4-dq", "nf4")
    assert "absmax" not in attention.k_proj
    assert np.isfinite(np.array(model(TOKENS))).all()


def test_mlx_lm_refuses_the_folder_instead_of_computing_nonsense(source, tmp_path):
    from mlx_lm.utils import load_model

    for name in ("nf4", "nf4-dq"):
        quantize_checkpoint(source, tmp_path / name, SCHEMES[name])
        with pytest.raises(ValueError, match=r"absmax|Invalid quantization mode"):
            load_model(tmp_path / name)


def test_stacked_experts_are_refused_with_the_setting_that_helps(tmp_path, tiny_llama_folder):
    source = resolve_model(str(make_checkpoint(tmp_path / "moe", "mixtral", tiny_llama_folder)))
    with pytest.raises(ModelError, match="6 layers here are others \\(SwitchLinear\\)") as caught:
        quantize_checkpoint(source, tmp_path / "out", SCHEMES["nf4"])
    assert "{switch_mlp: int4}" in caught.value.run
    assert not (tmp_path / "out").exists()
    recipe = Recipe(SCHEMES["nf4"], overrides=(("switch_mlp", scheme_named("int4")),))
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert np.isfinite(np.array(load(tmp_path / "out").model(TOKENS))).all()


@pytest.mark.parametrize("change", ["num_hidden_layers", "a tensor"])
def test_tensors_that_do_not_fit_are_a_model_error(change, source, tmp_path):
    output = tmp_path / "out"
    quantize_checkpoint(source, output, SCHEMES["nf4-dq"])
    if change == "num_hidden_layers":
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps({**config, change: 3}))
    else:
        tensors = tensors_of(output)
        del tensors["model.layers.0.mlp.up_proj.offset"]
        mx.save_safetensors(str(output / "model.safetensors"), tensors)
        (output / "model.safetensors.index.json").unlink()
        (output / MANIFEST).unlink()  # its checksum would be the first to say so
    with pytest.raises(ModelError, match=r"do not fit config\.json"):
        load(output)


def test_other_folders_are_not_taken_for_nf4(source, tmp_path):
    shutil.copytree(source.folder, tmp_path / "copy")
    quantize_checkpoint(source, tmp_path / "int4", scheme_named("int4"))
    for folder in (tmp_path / "copy", tmp_path / "int4"):
        assert not has_codebooks(json.loads((folder / "config.json").read_text()))
    assert not has_codebooks({"quantization": "nf4"})


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_adapters_learn_on_it(name, source):
    model = with_lora(load(source.folder, name).model)
    objective, batch = objective_for(model), random_batch([12, 20])
    inputs = objective.prepared(batch)

    def nll(trained):
        model.update(trained)
        return objective.nll(inputs)

    losses = []
    with objective.active():
        for _ in range(6):
            value, grads = mx.value_and_grad(nll)(model.trainable_parameters())
            moved = {
                k: v - 2e-3 * grad
                for (k, v), (_, grad) in zip(
                    tree_flatten(model.trainable_parameters()), tree_flatten(grads), strict=True
                )
            }
            model.load_weights(list(moved.items()), strict=False)
            losses.append(value.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]
