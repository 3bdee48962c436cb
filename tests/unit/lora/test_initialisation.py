"""lora/initialisation.py: what each way to begin is for."""

import mlx.core as mx
import pytest

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.lora.adapter import adapter_tensors, set_adapter_tensors
from mlx_qlora.lora.attach import attach
from mlx_qlora.lora.initialisation import attach_initialised
from mlx_qlora.lora.merge import merged_weight
from mlx_qlora.quantization.dense import unpacked
from mlx_qlora.weights.loader import load_base
from tests.checkpoints import make_checkpoint, tensors_of

TOKENS = mx.array([[1, 5, 9, 33, 2, 60, 7, 8, 100, 3]])
NAMES = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tiny_llama_folder, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("init") / "base", "llama-untied", tiny_llama_folder)


def loaded(folder, scheme="int4", **options):
    return load_base(
        ModelConfig(path=str(folder), dtype="float32"), QuantizationConfig(scheme=scheme, **options)
    )


def initialised(folder, scheme="int4", *, quantization=None, **lora):
    base = loaded(folder, scheme, **(quantization or {}))
    attach_initialised(base, LoraConfig(**{"rank": 8, "target_modules": NAMES, **lora}), seed=0)
    base.model.eval()
    return base


def layers(base):
    return {
        path: module
        for path, module in base.model.named_modules()
        if "lora_a" in module and not path.endswith("embed_tokens")
    }


def frozen_weight(layer) -> mx.array:
    return unpacked(layer.linear, mx.zeros(0)).astype(mx.float32)


def sixteen_bit(folder) -> dict[str, mx.array]:
    return {name: array.astype(mx.float32) for name, array in tensors_of(folder).items()}


@pytest.mark.parametrize(
    ("scheme", "variant"), [("int2", "lora"), ("int4", "rslora"), ("nf4", "dora"), ("mxfp4", "dora")]
)
def test_loftq_brings_every_weight_nearer_to_its_sixteen_bits(folder, scheme, variant):
    base, wanted = initialised(folder, scheme, init="loftq", variant=variant), sixteen_bit(folder)
    for path, layer in layers(base).items():
        weight, frozen = wanted[f"{path}.weight"], frozen_weight(layer)
        lost = mx.linalg.norm(weight - frozen)
        left = mx.linalg.norm(weight - merged_weight(layer, frozen))
        assert (left < 0.95 * lost).item(), path


def test_loftq_takes_as_much_as_any_update_of_that_rank_can(folder):
    base, wanted = initialised(folder, "int2", init="loftq", rank=16), sixteen_bit(folder)
    for path, layer in layers(base).items():
        weight, frozen = wanted[f"{path}.weight"], frozen_weight(layer)
        values = mx.linalg.svd(weight - frozen, compute_uv=False, stream=mx.cpu)
        left = mx.linalg.norm(weight - merged_weight(layer, frozen)).item()
        assert left == pytest.approx(mx.linalg.norm(values[16:]).item(), rel=1e-3)


@pytest.mark.parametrize(("scheme", "variant"), [("int2", "dora"), ("int4", "lora")])
def test_loftq_begins_nearer_to_the_logits_of_the_sixteen_bit_model(folder, scheme, variant):
    wanted = loaded(folder, "none").model(TOKENS)
    options = {"quantization": {"keep_embeddings": True, "keep_lm_head": True}, "rank": 32}
    options["target_modules"] = (*NAMES, "k_proj", "up_proj")
    quantized = initialised(folder, scheme, **options)
    corrected = initialised(folder, scheme, init="loftq", variant=variant, **options)
    before = mx.linalg.norm(quantized.model(TOKENS) - wanted)
    after = mx.linalg.norm(corrected.model(TOKENS) - wanted)
    assert (after < 0.6 * before).item()


def test_with_dora_loftq_begins_at_the_very_same_function(folder):
    plain, dora = (initialised(folder, "int2", init="loftq", variant=v) for v in ("lora", "dora"))
    wanted, got = plain.model(TOKENS), dora.model(TOKENS)
    assert mx.abs(got - wanted).max().item() < 1e-5 * mx.abs(wanted).max().item()


def test_loftq_leaves_a_layer_that_lost_nothing_as_it_begins_by_default(folder):
    options = {"skip_modules": ("v_proj",)}
    base = initialised(folder, init="loftq", quantization=options)
    plain = initialised(folder, quantization=options)
    changed, default = layers(base), layers(plain)
    for path, layer in changed.items():
        is_default = mx.array_equal(layer.lora_a, default[path].lora_a).item()
        assert is_default == path.endswith("v_proj"), path
        assert mx.any(layer.lora_b != 0).item() != path.endswith("v_proj"), path


def test_loftq_corrects_an_embedding_too(folder):
    base = initialised(folder, "int2", init="loftq", target_modules=("embed_tokens",))
    layer = base.model.model.embed_tokens
    weight = sixteen_bit(folder)["model.embed_tokens.weight"]
    frozen = unpacked(layer.embedding, mx.zeros(0)).astype(mx.float32)
    left = mx.linalg.norm(weight - merged_weight(layer, frozen))
    assert (left < 0.95 * mx.linalg.norm(weight - frozen)).item()


def test_loftq_without_sixteen_bit_weights_is_refused_with_the_way_round(folder, tmp_path):
    from mlx_qlora.quantization.schemes import SCHEMES
    from mlx_qlora.weights.source import resolve_model
    from mlx_qlora.weights.stream import quantize_checkpoint

    quantize_checkpoint(resolve_model(str(folder)), tmp_path / "int4", SCHEMES["int4"])
    with pytest.raises(ConfigError, match="stored quantized") as refused:
        initialised(tmp_path / "int4", init="loftq")
    assert "16-bit" in refused.value.run


def test_loftq_on_a_base_that_is_not_quantized_is_refused(folder):
    with pytest.raises(ConfigError, match="not quantized"):
        initialised(folder, "none", init="loftq")


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_rank_above_a_layers_size_is_refused(folder, init):
    with pytest.raises(ConfigError, match="32 directions, not 40"):
        initialised(folder, init=init, rank=40)


@pytest.mark.parametrize(("scheme", "variant"), [("none", "lora"), ("int4", "rslora")])
def test_pissa_leaves_the_function_exactly_as_it_is(folder, scheme, variant):
    wanted = loaded(folder, scheme).model(TOKENS)
    base = initialised(folder, scheme, init="pissa", variant=variant)
    assert mx.array_equal(base.model(TOKENS), wanted)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_pissa_begins_along_the_principal_directions_of_the_weight(folder, variant):
    base = initialised(folder, "int4", init="pissa", variant=variant)
    for path, layer in layers(base).items():
        weight = frozen_weight(layer)
        u, s, vt = mx.linalg.svd(weight, stream=mx.cpu)
        begun = layer.scale * (layer.lora_a @ layer.lora_b).T
        best = (u[:, :8] * s[:8]) @ vt[:8]
        assert mx.allclose(begun, best, atol=1e-3 * s[0].item()), path


def test_pissa_and_dora_do_not_go_together():
    with pytest.raises(ValueError, match="pissa goes with"):
        LoraConfig(variant="dora", init="pissa")


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_default_is_what_attach_does(folder, variant):
    config = LoraConfig(rank=4, variant=variant)
    one, other = loaded(folder), loaded(folder)
    attach_initialised(one, config, seed=3)
    attach(other.model, config, seed=3)
    first, second = adapter_tensors(one.model), adapter_tensors(other.model)
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_where_an_adapter_begins_is_a_function_of_weights_and_seed(folder, init):
    first, again = (adapter_tensors(initialised(folder, init=init).model) for _ in range(2))
    assert all(mx.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_what_a_checkpoint_restores_needs_no_decomposition(folder, init, monkeypatch):
    wanted = adapter_tensors(initialised(folder, init=init).model)
    monkeypatch.setattr("mlx_qlora.lora.initialisation.principal", None)
    base = loaded(folder)
    config = LoraConfig(rank=8, target_modules=NAMES, init=init)
    attach_initialised(base, config, 0, is_restored=True)
    set_adapter_tensors(base.model, wanted, where="here")
    restored = adapter_tensors(base.model)
    assert all(mx.array_equal(restored[name], wanted[name]) for name in wanted)


def test_progress_goes_to_the_end(folder):
    told = []
    base = loaded(folder)
    attach_initialised(base, LoraConfig(init="loftq"), 0, on_bytes=lambda *now: told.append(now))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
