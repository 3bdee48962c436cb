"""The originals as oracles: their configuration objects are understood, their errors are not exceeded."""

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.policy import recipe_of
from mlx_qlora.quantization.schemes import resolve
from mlx_qlora.quantization.sensitivity import there_and_back
from mlx_qlora.quantization.settings import quantization_from
from tests.tiny import tiny_llama

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bits_and_bytes():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains of kernels for other machines
        pytest.importorskip("torchao")
        from torchao import quantization
    return quantization


def linear(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    layer.weight.data = weight.clone()
    return layer


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def ours(weight, settings):
    """The weight as our scheme for these settings gives it back."""
    scheme = resolve(quantization_from(settings).config)
    return torch.tensor(np.array(there_and_back(mx.array(weight.float().numpy()), scheme)))


def error(exact, found):
    return ((exact.float() - found.float()).norm() / exact.float().norm()).item()


# ---------------------------------------------------------------- bitsandbytes


def test_a_bitsandbytes_config_in_four_bits(bits_and_bytes):
    written = bits_and_bytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    expected = QuantizationConfig(scheme="nf4-dq", keep_lm_head=True, keep_embeddings=True)
    for settings in (written, written.to_dict()):
        translation = quantization_from(settings)
        assert (translation.config, translation.dtype) == (expected, "bfloat16")
        assert any("bnb_4bit_quant_storage" in note for note in translation.notes)


def test_a_bitsandbytes_config_in_eight_bits(bits_and_bytes):
    written = bits_and_bytes(
        load_in_8bit=True, llm_int8_skip_modules=["lm_head"], llm_int8_enable_fp32_cpu_offload=True
    )
    translation = quantization_from(written)
    assert translation.config == QuantizationConfig(
        scheme="int8", skip_modules=("lm_head",), keep_embeddings=True
    )
    assert recipe_of(translation.config) is not None
    assert [any(word in n for n in translation.notes) for word in ("threshold", "offload")] == [True, True]


def test_the_shortest_bitsandbytes_config_works_and_says_what_it_became(bits_and_bytes):
    translation = quantization_from(bits_and_bytes(load_in_4bit=True))
    assert translation.config.scheme == "nf4"
    assert translation.dtype is None
    assert any("nf4 is taken" in note for note in translation.notes)


def test_a_bitsandbytes_config_that_says_nothing_keeps_the_model(bits_and_bytes):
    assert quantization_from(bits_and_bytes()).config == QuantizationConfig(scheme="none")


def test_every_key_a_bitsandbytes_config_writes_is_known(bits_and_bytes):
    for keys in ({}, {"load_in_4bit": True}, {"load_in_8bit": True}):
        quantization_from(bits_and_bytes(**keys).to_dict())


def test_other_methods_of_transformers_are_refused_with_the_nearest(bits_and_bytes):
    import transformers

    assert bits_and_bytes
    with pytest.raises(ConfigError, match="nearest is int4"):
        quantization_from(transformers.GPTQConfig(bits=4, dataset=["a"]))
    with pytest.raises(ConfigError, match="nearest is int8"):
        quantization_from(transformers.EetqConfig())


@pytest.mark.parametrize("seed", range(3))
def test_int8_is_closer_to_the_float_result_than_llm_int8_outliers_and_all(bits_and_bytes, seed):
    import bitsandbytes

    assert bits_and_bytes
    weight, inputs = gaussian(256, 512, seed), gaussian(64, 512, seed + 100) * 50
    inputs[:, [3, 77, 400]] *= 20  # outlier features, beyond the threshold
    layer = bitsandbytes.nn.Linear8bitLt(512, 256, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        theirs = layer(inputs.half())
    exact = inputs @ weight.T
    assert layer.weight.dtype == torch.int8
    assert 0 < error(exact, inputs @ ours(weight, {"load_in_8bit": True}).T) < error(exact, theirs) < 0.02


# ---------------------------------------------------------------- torchao


def test_torchao_s_objects_their_dumps_and_transformers_wrapping_say_the_same(torchao):
    import transformers
    from torchao.core.config import config_to_dict

    for written, expected in (
        (torchao.Int8WeightOnlyConfig(), {"scheme": "int8"}),
        (torchao.Int4WeightOnlyConfig(), {"scheme": "int4", "group_size": 128}),
        (torchao.Int4WeightOnlyConfig(group_size=64), {"scheme": "int4"}),
        (torchao.Int8DynamicActivationInt8WeightConfig(), {"scheme": "int8"}),
        (
            torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=torchao.PerGroup(32)),
            {"scheme": "int3", "group_size": 32},
        ),
        (
            torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
            {"scheme": "int4", "group_size": 32},
        ),
    ):
        config = QuantizationConfig(keep_embeddings=True, **expected)
        assert quantization_from(written).config == config, written
        assert quantization_from(config_to_dict(written)).config == config, written
        wrapped = quantization_from(transformers.TorchAoConfig(written))
        assert wrapped.config == config.model_copy(update={"keep_lm_head": True}), written


def test_torchao_s_other_configurations_are_refused_with_the_nearest(torchao):
    for written, nearest in (
        (torchao.Float8WeightOnlyConfig(), "mxfp8"),
        (torchao.Int4WeightOnlyConfig(group_size=256), "nearest: 128"),
        (torchao.IntxWeightOnlyConfig(weight_dtype=torch.int1), "nearest: 2"),
    ):
        with pytest.raises(ConfigError, match=nearest):
            quantization_from(written)


def test_torchao_s_configuration_by_module_becomes_overrides(torchao):
    q, path = torchao, "model.layers.0.self_attn.q_proj"
    per_module = q.FqnToConfig(
        {
            path: q.Int8WeightOnlyConfig(),
            "re:.*mlp\\..*": q.Int4WeightOnlyConfig(group_size=32),
            "re:.*down_proj": q.Int8WeightOnlyConfig(),  # the pattern before it says so first
            "_default": q.Int4WeightOnlyConfig(group_size=64),
        }
    )
    from mlx_qlora.quantization.policy import decide_all, spelled

    decisions = decide_all(tiny_llama(bits=None), recipe_of(quantization_from(per_module).config))
    schemes = {name: spelled(decision.scheme) for name, decision in decisions.items()}
    assert schemes[path] == "int8"
    assert schemes["model.layers.1.self_attn.q_proj"] == "int4"
    assert schemes["model.layers.1.mlp.up_proj"] == schemes["model.layers.1.mlp.down_proj"] == "int4-g32"
    assert schemes["model.embed_tokens"] == "none"
    alone = quantization_from(q.FqnToConfig({path: q.Int8WeightOnlyConfig()})).config
    decisions = decide_all(tiny_llama(bits=None), recipe_of(alone))
    assert [name for name, decision in decisions.items() if decision.scheme] == [path]


def test_a_pattern_that_a_path_pattern_cannot_say_is_refused(torchao):
    with pytest.raises(ConfigError, match="no counterpart"):
        quantization_from(torchao.FqnToConfig({r"re:layers\.(0|1)\..*": torchao.Int8WeightOnlyConfig()}))


def test_a_filter_for_torch_modules_is_refused_with_the_reason(torchao):
    translation = quantization_from(
        torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, _name: isinstance(module, torch.nn.Linear)
    )
    with pytest.raises(ConfigError, match=r"isinstance\(module, torch.nn.Linear\) is false"):
        translation.for_model(tiny_llama(bits=None))


def test_int8_loses_no_more_than_torchao_s(torchao):
    weight = gaussian(256, 512).bfloat16()
    layer = linear(weight)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    theirs = error(weight, layer.weight.dequantize())
    assert 0.001 < error(weight, ours(weight, torchao.Int8WeightOnlyConfig())) < theirs < 0.02


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_loses_about_as_much_as_torchao_s(torchao, group_size):
    weight = gaussian(256, 512).bfloat16()
    layer = linear(weight)
    settings = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=torchao.PerGroup(group_size),
        mapping_type=torchao.MappingType.ASYMMETRIC,
    )
    torchao.quantize_(layer, settings)
    theirs, own = error(weight, layer.weight.dequantize()), error(weight, ours(weight, settings))
    assert own == pytest.approx(theirs, rel=0.06)
    assert resolve(quantization_from(settings).config) == resolve(
        quantization_from(torchao.Int4WeightOnlyConfig(group_size=group_size)).config
    )
