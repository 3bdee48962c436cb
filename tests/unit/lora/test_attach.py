"""lora/attach.py"""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.attach import attach, target_paths
from mlx_qlora.presets import preset
from tests.tiny import tiny_llama, tiny_model


def test_short_names_match_in_every_layer():
    paths = target_paths(tiny_llama(), LoraConfig(target_modules=("q_proj", "down_proj")))
    assert paths == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_path_patterns_match_whole_paths():
    config = LoraConfig(target_modules=("model.layers.1.*.v_proj", "model.layers.0.mlp.*"))
    assert target_paths(tiny_llama(), config) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_num_layers_counts_from_the_end():
    paths = target_paths(tiny_llama(layers=11), LoraConfig(target_modules=("q_proj",), num_layers=2))
    assert paths == ["model.layers.9.self_attn.q_proj", "model.layers.10.self_attn.q_proj"]


def test_the_head_can_be_adapted_too():
    paths = target_paths(tiny_llama(), LoraConfig(target_modules=("lm_head",), num_layers=1))
    assert paths == ["lm_head"]


def test_an_unmatched_name_lists_what_exists():
    with pytest.raises(ConfigError, match=r"qproj, wrong\..*q_proj") as error:
        target_paths(tiny_llama(), LoraConfig(target_modules=("q_proj", "qproj", "wrong")))
    assert error.value.where == "lora.target_modules"


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(ConfigError, match="2 layers, not 3"):
        target_paths(tiny_llama(), LoraConfig(num_layers=3))


def test_only_the_low_rank_matrices_are_trainable_and_the_output_is_unchanged():
    model, tokens = tiny_llama(), mx.array([[1, 2, 3]])
    before = model(tokens)
    paths = attach(model, LoraConfig(rank=4), seed=0)
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == {f"{path}.{part}" for path in paths for part in ("lora_a", "lora_b")}
    assert mx.array_equal(model(tokens), before)


def test_the_initial_matrices_are_a_function_of_the_seed():
    def initial(seed):
        model = tiny_llama()
        mx.random.seed(seed + 100)  # the global generator has no say
        attach(model, LoraConfig(), seed)
        return dict(tree_flatten(model.trainable_parameters()))

    first, again, other = initial(1), initial(1), initial(2)
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    names = [name for name in first if name.endswith("lora_a")]
    assert not any(mx.array_equal(first[name], other[name]) for name in names)
    assert not mx.array_equal(first[names[0]], first[names[-1]])


def test_the_presets_train_a_model_that_keeps_query_key_and_value_in_one_layer():
    names = tuple(preset("mac-8gb")["lora"]["target_modules"])
    paths = target_paths(tiny_model("phi3"), LoraConfig(target_modules=names))
    assert paths == ["model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"]
    both = LoraConfig(target_modules=("gate_proj", "up_proj", "down_proj"), num_layers=1)
    assert target_paths(tiny_model("phi3"), both) == [
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.gate_up_proj",
    ]


def test_a_part_alone_of_a_layer_in_one_piece_is_refused():
    with pytest.raises(ConfigError, match="q_proj"):
        target_paths(tiny_model("phi3"), LoraConfig(target_modules=("q_proj", "v_proj")))
