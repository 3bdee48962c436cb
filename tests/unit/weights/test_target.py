"""A number of bits per weight becomes overrides; folders with several schemes load in mlx-lm and here."""

import json

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_qlora.config import ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.policy import recipe_of
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.quantization.sensitivity import there_and_back
from mlx_qlora.weights import target
from mlx_qlora.weights.loader import load_base
from mlx_qlora.weights.plan import plan_quantization
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import SHARD_BYTES, quantize_checkpoint
from mlx_qlora.weights.target import settle
from tests.checkpoints import make_checkpoint, tensors_of

TARGETS = st.floats(3.2, 9.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("target") / "llama"
    return resolve_model(str(make_checkpoint(folder, "llama-untied", tiny_llama_folder)))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


def planned_bits(source, config):
    plan = plan_quantization(source, recipe_of(config), (), SHARD_BYTES)
    return 8 * plan.output_bytes / plan.num_parameters


def quantized(source, folder, **keys):
    recipe = recipe_of(QuantizationConfig(**keys))
    quantize_checkpoint(source, folder, recipe)
    return folder


def logits(model):
    return model(mx.array([[3, 5, 7, 11, 200]])).astype(mx.float32)


# ---------------------------------------------------------------- several schemes in one folder


@pytest.mark.parametrize(
    "architecture", ["llama-tied", "llama-untied", "qwen2", "gemma2", "qwen3_moe", "mixtral"]
)
def test_a_mixed_folder_is_the_same_model_in_mlx_lm_and_here(tmp_path, tiny_llama_folder, architecture):
    from mlx_lm.utils import load_model

    folder = make_checkpoint(tmp_path / "model", architecture, tiny_llama_folder)
    # mxfp4 among affine layers, another group size, and layers that are kept.
    keys = {
        "overrides": {
            "*.down_proj": "int8",
            "*.0.*.k_proj": "int6-g32",
            "*.1.*.q_proj": "mxfp4",
            "v_proj": "none",
        },
        "keep_lm_head": True,
    }
    mixed = quantized(resolve_model(str(folder)), tmp_path / "mixed", **keys)
    theirs, config = load_model(mixed)
    ours = load_base(ModelConfig(path=str(mixed), dtype="bfloat16"), QuantizationConfig()).model
    assert mx.array_equal(logits(theirs), logits(ours)).item()
    layers = dict(theirs.named_modules())
    entries = {path: entry for path, entry in config["quantization"].items() if isinstance(entry, dict)}
    assert {layers[path].bits for path in entries if path.endswith("down_proj")} == {8}
    assert layers["model.layers.0.self_attn.k_proj"].group_size == 32
    assert layers["model.layers.1.self_attn.q_proj"].mode == "mxfp4"
    assert not hasattr(layers["model.layers.0.self_attn.v_proj"], "scales")
    assert layers["model.layers.0.self_attn.o_proj"].bits == 4


def test_each_layer_of_a_mixed_folder_holds_what_its_scheme_makes_of_it(source, tmp_path):
    mixed = quantized(source, tmp_path / "mixed", overrides={"*.down_proj": "int8", "*.1.*": "int3-g32"})
    stored, exact = tensors_of(mixed), tensors_of(source.folder)
    for name, bits, group in (
        ("model.layers.0.mlp.down_proj", 8, 64),
        ("model.layers.1.mlp.down_proj", 3, 32),
        ("model.layers.0.mlp.up_proj", 4, 64),
    ):
        expected = mx.quantize(exact[f"{name}.weight"], group, bits)
        found = [stored[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        assert all(mx.array_equal(a, b).item() for a, b in zip(expected, found, strict=True))


def test_what_is_skipped_and_why_is_in_the_result(source, tmp_path):
    keys = {
        "overrides": {"v_proj": "none"},
        "keep_lm_head": True,
        "keep_embeddings": True,
        "skip_modules": ("q_proj",),
    }
    result = quantize_checkpoint(source, tmp_path / "out", recipe_of(QuantizationConfig(**keys)))
    reasons = {layer.layer: layer.reason for layer in result.skipped}
    assert reasons["lm_head"] == "keep_lm_head"
    assert reasons["model.embed_tokens"] == "keep_embeddings"
    assert reasons["model.layers.0.self_attn.v_proj"] == "overrides 'v_proj'"
    assert reasons["model.layers.1.self_attn.q_proj"] == "asked to be skipped"
    assert len(reasons) == 6


# ---------------------------------------------------------------- the target


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None)
@given(bits=TARGETS)
def test_the_target_is_kept_as_stored_and_only_the_target_is_gone(source, memory, bits):
    config = QuantizationConfig(bits_per_weight=bits)
    found = settle(source, config, memory=memory)
    assert found.bits_per_weight <= bits
    assert planned_bits(source, found.config) == found.bits_per_weight
    assert found.config.bits_per_weight is None
    assert found.config.model_copy(update={"overrides": ()}) == QuantizationConfig()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None)
@given(one=TARGETS, other=TARGETS)
def test_a_larger_target_never_has_more_error(source, memory, one, other):
    small, large = (
        settle(source, QuantizationConfig(bits_per_weight=bits), memory=memory)
        for bits in sorted((one, other))
    )
    assert large.error <= small.error


def test_the_choice_is_no_worse_than_the_best_single_scheme_of_that_size(source, memory):
    for bits in (3, 4, 5, 6):
        uniform = scheme_named(f"int{bits}")
        size = planned_bits(source, QuantizationConfig(scheme=uniform.name))
        found = settle(source, QuantizationConfig(bits_per_weight=size), memory=memory)
        tensors = tensors_of(source.folder)
        errors = 0.0
        for path in found.chosen:
            weight = tensors[f"{path}.weight"].reshape(-1, tensors[f"{path}.weight"].shape[-1])
            lost = weight.astype(mx.float32) - there_and_back(weight, uniform)
            errors += lost.square().sum().item()
        assert found.error <= errors * 1.0001
        assert found.error > 0


def test_the_folder_that_is_written_has_the_bits_that_were_promised(source, tmp_path):
    found = settle(source, QuantizationConfig(bits_per_weight=5.0))
    result = quantize_checkpoint(source, tmp_path / "out", recipe_of(found.config))
    stored = sum(array.nbytes for array in tensors_of(result.path).values())
    assert 8 * stored / result.num_parameters == result.bits_per_weight == found.bits_per_weight
    assert 4.5 < found.bits_per_weight <= 5.0
    assert len({name for _, name in found.config.overrides}) > 1


def test_a_second_search_finds_the_same_and_one_on_top_of_the_answer_changes_nothing(source):
    config = QuantizationConfig(bits_per_weight=4.7)
    found = settle(source, config)
    assert settle(source, config).config == found.config
    again = settle(source, found.config.model_copy(update={"bits_per_weight": 4.7}))
    assert again.config == found.config
    assert again.chosen == {}


def test_what_is_said_by_name_is_not_up_for_choice(source):
    keys = {
        "skip_modules": ("k_proj",),
        "overrides": {"v_proj": "int8", "o_proj": "none"},
        "keep_lm_head": True,
    }
    found = settle(source, QuantizationConfig(bits_per_weight=8, **keys))
    assert found.config.overrides[:2] == (("v_proj", "int8"), ("o_proj", "none"))
    assert all(
        name not in path for path in found.chosen for name in ("k_proj", "v_proj", "o_proj", "lm_head")
    )
    assert "model.layers.0.self_attn.q_proj" in found.chosen
    plan = plan_quantization(source, recipe_of(found.config), (), SHARD_BYTES)
    schemes = {job.name: job.scheme for shard in plan.shards for job in shard}
    assert schemes["model.layers.0.self_attn.v_proj.weight"] == scheme_named("int8")
    assert schemes["model.layers.0.self_attn.k_proj.weight"] is None
    for path, option in found.chosen.items():
        assert schemes[f"{path}.weight"] == option.scheme


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma2"])
def test_what_an_architecture_asks_for_is_not_up_for_choice(tmp_path, tiny_llama_folder, architecture):
    folder = make_checkpoint(tmp_path / "model", architecture, tiny_llama_folder)
    source = resolve_model(str(folder))
    found = settle(source, QuantizationConfig(bits_per_weight=5))
    assert planned_bits(source, found.config) == found.bits_per_weight <= 5
    if architecture == "qwen3_moe":  # the router has 8 bits, and stacked experts choose as one layer
        assert "model.layers.0.mlp.gate" not in found.chosen
        assert "model.layers.0.mlp.switch_mlp.up_proj" in found.chosen


def test_an_important_layer_gets_more_bits_and_the_target_is_kept(source):
    path = "model.layers.0.mlp.up_proj"
    plain = settle(source, QuantizationConfig(bits_per_weight=4.7))
    informed = settle(source, QuantizationConfig(bits_per_weight=4.7), importance={path: 1e9})
    assert informed.chosen[path].scheme.bits == 8 > plain.chosen[path].scheme.bits
    assert informed.bits_per_weight <= 4.7


def test_inputs_change_which_layers_get_more_bits(source):
    path = "model.layers.0.mlp.up_proj"
    plain = settle(source, QuantizationConfig(bits_per_weight=4.7))
    # Its outputs lose much more than its weight does: only one input feature is ever used.
    weight = tensors_of(source.folder)[f"{path}.weight"].astype(mx.float32)
    lost = (weight - there_and_back(weight, scheme_named("int4"))).square().sum(axis=0) / weight.square().sum(
        axis=0
    )
    inputs = mx.zeros((4, weight.shape[1]))
    inputs[:, mx.argmax(lost).item()] = 1
    informed = settle(source, QuantizationConfig(bits_per_weight=4.7), {path: inputs})
    assert informed.chosen[path].scheme.bits >= plain.chosen[path].scheme.bits
    assert informed.chosen[path].error != plain.chosen[path].error


def test_measurements_are_kept_for_another_target_and_only_believed_when_they_fit(
    source, tmp_path, monkeypatch
):
    first = settle(source, QuantizationConfig(bits_per_weight=4.7), memory=tmp_path)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(target, "measure", lambda *_: pytest.fail("measured again"))
        assert settle(source, QuantizationConfig(bits_per_weight=4.7), memory=tmp_path) == first
        settle(source, QuantizationConfig(bits_per_weight=6), memory=tmp_path)
    for damage in ("{", "[]", "{}", json.dumps({"model.embed_tokens": [1]})):
        file.write_text(damage)
        assert settle(source, QuantizationConfig(bits_per_weight=4.7), memory=tmp_path) == first
    settle(source, QuantizationConfig(bits_per_weight=4.7, group_size=32), memory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_measurements_are_not_taken_for_those_of_other_weights_or_with_calibration(
    source, tmp_path, tiny_llama_folder
):
    def search(model, memory=None, **calibration):
        return settle(model, QuantizationConfig(bits_per_weight=4.7), memory=memory, **calibration).chosen

    other = resolve_model(str(make_checkpoint(tmp_path / "other", "llama-untied", tiny_llama_folder, seed=1)))
    memory, important = tmp_path / "memory", {"model.layers.0.mlp.up_proj": 1e9}
    informed = search(source, memory, importance=important)
    assert search(source, memory) == search(source) != informed
    assert search(other, memory) == search(other) != search(source)
    assert search(source, memory, importance=important) == informed


def test_progress_ends_where_it_should(source):
    seen = []
    settle(source, QuantizationConfig(bits_per_weight=5), on_bytes=lambda *pair: seen.append(pair))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_target_out_of_reach_says_what_can_be_reached_and_it_can(source):
    with pytest.raises(ConfigError, match="cannot be reached") as refused:
        settle(source, QuantizationConfig(bits_per_weight=2))
    assert refused.value.where == "quantization.bits_per_weight"
    nearest = float(refused.value.run.split("--bits-per-weight ")[1].split()[0])
    assert settle(source, QuantizationConfig(bits_per_weight=nearest)).bits_per_weight <= nearest


@pytest.mark.parametrize("keys", [{}, {"scheme": "none", "bits_per_weight": 4}])
def test_without_a_target_there_is_nothing_to_settle(source, keys):
    with pytest.raises(ConfigError):
        settle(source, QuantizationConfig(**keys))


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "mxfp8", "nf4", "nf4-dq"])
def test_a_scheme_of_another_kind_is_among_the_candidates(source, scheme):
    found = settle(source, QuantizationConfig(scheme=scheme, bits_per_weight=5))
    assert planned_bits(source, found.config) == found.bits_per_weight <= 5


def test_the_source_is_not_changed_and_nothing_of_it_stays_in_memory(source):
    before = {path: path.stat().st_mtime_ns for path in source.folder.iterdir()}
    settle(source, QuantizationConfig(bits_per_weight=5))
    mx.clear_cache()
    active = mx.get_active_memory()
    settle(source, QuantizationConfig(bits_per_weight=5))
    assert mx.get_active_memory() <= active + 4096
    assert {path: path.stat().st_mtime_ns for path in source.folder.iterdir()} == before


def test_the_mixed_model_computes_with_the_weights_its_schemes_give(source, tmp_path):
    found = settle(source, QuantizationConfig(bits_per_weight=5.0))
    folder = tmp_path / "out"
    quantize_checkpoint(source, folder, recipe_of(found.config))
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), QuantizationConfig())
    exact = load_base(
        ModelConfig(path=str(source.folder), dtype="float32"), QuantizationConfig(scheme="none")
    ).model
    unpacked = {
        f"{path}.weight": there_and_back(tensors_of(source.folder)[f"{path}.weight"], option.scheme)
        for path, option in found.chosen.items()
    }
    exact.load_weights(list(unpacked.items()), strict=False)
    assert set(unpacked) <= set(dict(tree_flatten(exact.parameters())))
    difference = mx.abs(logits(base.model) - logits(exact)).max().item()
    assert difference < 0.05 * mx.abs(logits(exact)).max().item()
