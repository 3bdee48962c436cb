"""lora/adapter.py"""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import AdapterError
from mlx_qlora.lora.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterInfo,
    adapter_tensors,
    check_quantization,
    load_adapter,
    read_adapter_info,
    save_adapter,
    set_adapter_tensors,
    text_sha256,
)
from mlx_qlora.lora.layers import lora_layers
from tests.tiny import tiny_llama, with_lora

TOKENS = mx.array([[1, 5, 9, 33, 2]])


def info(**lora: object) -> AdapterInfo:
    return AdapterInfo(
        model=ModelConfig(path="owner/base"),
        quantization=QuantizationConfig(),
        lora=LoraConfig(**{"rank": 4, **lora}),
        fingerprint="sha256:base",
        chat_template="{{ messages }}",
        chat_template_sha256=text_sha256("{{ messages }}"),
    )


def saved(folder, **lora: object) -> mx.array:
    """Save an adapter of a tiny model; its logits."""
    model = with_lora(tiny_llama(layers=3), **lora).eval()
    save_adapter(folder, adapter_tensors(model), info(**lora), num_layers=3)
    return model(TOKENS)


def is_close(one: mx.array, other: mx.array) -> bool:
    """The same but for the order of sums."""
    return mx.abs(one - other).max().item() <= 1e-5 * mx.abs(other).max().item()


CHOICES = [
    {},
    {"variant": "rslora", "target_modules": ("q_proj", "down_proj")},
    {"target_modules": ("embed_tokens", "v_proj")},
    {"target_modules": ("q_proj", "down_proj"), "num_layers": 2},
    {"target_modules": ("lm_head", "q_proj")},
    {"target_modules": ("model.layers.0.mlp.*", "model.layers.2.*.q_proj")},
]


@pytest.mark.parametrize("lora", CHOICES)
def test_mlx_lm_loads_it_and_computes_the_same_logits(tmp_path, lora):
    expected = saved(tmp_path, **lora)
    theirs = load_adapters(tiny_llama(layers=3), str(tmp_path)).eval()
    assert mx.array_equal(theirs(TOKENS), expected)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("lora", [{}, {"target_modules": ("lm_head", "o_proj"), "num_layers": 2}])
def test_mlx_lm_loads_dora_and_computes_the_same(tmp_path, lora, bits):
    lora = {**lora, "variant": "dora"}
    model = with_lora(tiny_llama(layers=3, bits=bits), **lora).eval()
    for module in lora_layers(model):
        module.m = 1.3 * module.m
    save_adapter(tmp_path, adapter_tensors(model), info(**lora), num_layers=3)
    theirs = load_adapters(tiny_llama(layers=3, bits=bits), str(tmp_path)).eval()
    assert is_close(theirs(TOKENS), model(TOKENS))
    ours = tiny_llama(layers=3, bits=bits)
    load_adapter(ours, tmp_path, read_adapter_info(tmp_path), fingerprint="sha256:base")
    assert mx.array_equal(ours.eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_what_began_with_pissa_is_shipped_as_a_plain_adapter_of_twice_the_rank(tmp_path, variant):
    lora = {"variant": variant, "init": "pissa", "target_modules": ("q_proj", "down_proj")}
    model = with_lora(tiny_llama(layers=3), **lora).eval()  # its B has moved, its A has not
    save_adapter(tmp_path, adapter_tensors(model), info(**lora), num_layers=3)
    shipped = read_adapter_info(tmp_path)
    assert (shipped.lora.rank, shipped.lora.init, shipped.lora.variant) == (8, "default", variant)
    theirs = load_adapters(tiny_llama(layers=3), str(tmp_path)).eval()
    assert is_close(theirs(TOKENS), model(TOKENS))
    ours = tiny_llama(layers=3)
    load_adapter(ours, tmp_path, shipped, fingerprint="sha256:base")
    assert mx.array_equal(ours.eval()(TOKENS), theirs(TOKENS))
    assert not is_close(tiny_llama(layers=3)(TOKENS), model(TOKENS))


def test_a_checkpoint_keeps_what_pissa_began_with():
    model = with_lora(tiny_llama(), init="pissa", target_modules=("q_proj",))
    kept = adapter_tensors(model)
    assert {name.rpartition(".")[2] for name in kept} == {"lora_a", "lora_b", "initial_a", "initial_b"}
    other = with_lora(tiny_llama(), init="pissa", target_modules=("q_proj",), seed=5)
    assert not mx.array_equal(other(TOKENS), model(TOKENS))
    set_adapter_tensors(other, kept, where="here")
    assert mx.array_equal(other(TOKENS), model(TOKENS))


def test_a_loftq_adapter_is_kept_to_the_base_it_makes_up_for():
    check_quantization(info(init="loftq"), QuantizationConfig())
    check_quantization(info(), QuantizationConfig(scheme="int8"))
    with pytest.raises(AdapterError, match="scheme: int4 → int8"):
        check_quantization(info(init="loftq"), QuantizationConfig(scheme="int8"))


def test_an_adapter_from_before_there_were_variants_loads(tmp_path):
    expected, model = saved(tmp_path), tiny_llama(layers=3)
    tree = json.loads((tmp_path / CONFIG).read_text())
    for key in ("variant", "init"):
        del tree["mlx_qlora"]["lora"][key]
    (tmp_path / CONFIG).write_text(json.dumps(tree))
    load_adapter(model, tmp_path, read_adapter_info(tmp_path), fingerprint="sha256:base")
    assert mx.array_equal(model.eval()(TOKENS), expected)


@pytest.mark.parametrize("lora", CHOICES)
def test_it_comes_back_here_with_the_same_logits(tmp_path, lora):
    expected, model = saved(tmp_path, **lora), tiny_llama(layers=3)
    load_adapter(model, tmp_path, read_adapter_info(tmp_path), fingerprint="sha256:base")
    assert mx.array_equal(model.eval()(TOKENS), expected)
    assert not mx.allclose(tiny_llama(layers=3)(TOKENS), expected, atol=1e-3)


def test_another_base_is_refused_and_the_right_one_is_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(AdapterError, match="trained on owner/base") as error:
        load_adapter(tiny_llama(layers=3), tmp_path, read_adapter_info(tmp_path), fingerprint="sha256:other")
    assert "--model owner/base" in error.value.run


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    saved(tmp_path)
    tensors = mx.load(str(tmp_path / WEIGHTS))
    first, second, *_ = sorted(tensors)
    tensors["extra.lora_a"] = tensors.pop(first)
    tensors[second] = mx.zeros((3, 3))
    mx.save_safetensors(str(tmp_path / WEIGHTS), tensors)
    with pytest.raises(AdapterError) as error:
        load_adapter(tiny_llama(layers=3), tmp_path, read_adapter_info(tmp_path), fingerprint="sha256:base")
    for said in (f"{first}: missing", "extra.lora_a: not in the model", f"{second}: (3, 3)"):
        assert said in str(error.value)


def test_a_truncated_weight_file_is_an_error_that_names_it(tmp_path):
    saved(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapterError, match=r"adapters\.safetensors"):
        load_adapter(tiny_llama(layers=3), tmp_path, read_adapter_info(tmp_path), fingerprint="sha256:base")


def test_an_empty_folder_says_how_to_train(tmp_path):
    with pytest.raises(AdapterError, match="there is nothing") as error:
        read_adapter_info(tmp_path)
    assert "mlx-qlora train" in error.value.run


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mlx_qlora": {"lora": 3}}', "[" * 100_000, "null"])
def test_a_broken_configuration_is_an_adapter_error(tmp_path, text):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(AdapterError):
        read_adapter_info(tmp_path)


def test_an_adapter_of_another_tool_is_named_as_such(tmp_path):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"fine_tune_type": "lora"}))
    with pytest.raises(AdapterError, match="not made by mlx_qlora"):
        read_adapter_info(tmp_path)


def test_a_changed_chat_template_is_noticed(tmp_path):
    saved(tmp_path)
    tree = json.loads((tmp_path / CONFIG).read_text())
    tree["mlx_qlora"]["chat_template"] = "{{ other }}"
    (tmp_path / CONFIG).write_text(json.dumps(tree))
    with pytest.raises(AdapterError, match="template"):
        read_adapter_info(tmp_path)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    saved(tmp_path / "one")
    saved(tmp_path / "two")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_only_low_rank_tensors_are_shipped(tmp_path):
    saved(tmp_path)
    assert {name.rsplit(".", 1)[1] for name in mx.load(str(tmp_path / WEIGHTS))} == {"lora_a", "lora_b"}
    assert tree_flatten(tiny_llama().trainable_parameters())
