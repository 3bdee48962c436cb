"""Quantizing as a whole: the same bytes as mlx-lm's conversion, whatever happens on the way."""

import json

import mlx.core as mx
import pytest

from mlx_qlora.quantization.schemes import Scheme, scheme_named
from mlx_qlora.weights import stream
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.checkpoints import CONFIGS, make_checkpoint, raw, tensors_of

INT8_G32 = Scheme("int8", "affine", 8, 32)
SCHEMES = {
    "int4-g64": scheme_named("int4"),
    "int8-g32": INT8_G32,
    "mxfp4": scheme_named("mxfp4"),
    "nvfp4": scheme_named("nvfp4"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_llama_folder):
    """Every architecture in two shards, bfloat16."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, name, tiny_llama_folder, num_shards=2) for name in CONFIGS}


def mlx_lm_converts(source, output, scheme):
    from mlx_lm.convert import convert

    convert(
        str(source),
        str(output),
        quantize=True,
        q_bits=scheme.bits,
        q_group_size=scheme.group_size,
        q_mode=scheme.mode,
    )
    return output


def same_model(ours, theirs):
    """The names whose tensors differ; config.json is compared whole."""
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    return [n for n in a if (a[n].dtype, a[n].shape, raw(a[n])) != (b[n].dtype, b[n].shape, raw(b[n]))]


def logits_of(folder):
    from mlx_lm import load

    model, _ = load(str(folder))
    return model(mx.array([[3, 5, 7, 11, 13]])).astype(mx.float32)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_result_is_bit_for_bit_what_mlx_lm_writes(
    architecture, scheme, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)  # a few rows at a time
    source = checkpoints[architecture]
    quantize_checkpoint(resolve_model(str(source)), tmp_path / "ours", scheme, shard_bytes=20_000)
    theirs = mlx_lm_converts(source, tmp_path / "theirs", scheme)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert same_model(tmp_path / "ours", theirs) == []
    assert mx.array_equal(logits_of(tmp_path / "ours"), logits_of(theirs)).item()
