"""Which layer gets which format, and why one is kept."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.config import QuantizationConfig, build_config, difference, parse_assignment, to_yaml
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.policy import (
    BY_SCHEME,
    Recipe,
    decide_all,
    is_named,
    read_scheme,
    recipe_of,
    spelled,
    uniform_near,
)
from mlx_qlora.quantization.schemes import SCHEMES, scheme_named
from tests.tiny import tiny_llama, tiny_model

INT4, INT6, INT8 = (scheme_named(f"int{bits}") for bits in (4, 6, 8))


class Model(nn.Module):
    """Two layers that can be quantized, one too narrow, and one that cannot be."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.wide = nn.Linear(128, 8, bias=True)
        self.narrow = nn.Linear(48, 8)
        self.norm = nn.RMSNorm(64)


class Choosy(Model):
    """It has a say in its own quantization."""

    @staticmethod
    def quant_predicate(path, _module):
        return {"embed": {"group_size": 32, "bits": 8}, "wide": False}.get(path, True)


def test_every_layer_that_can_be_quantized_is_decided_about():
    decisions = decide_all(Model(), INT4)
    assert {path: decision.scheme for path, decision in decisions.items()} == {
        "embed": INT4,
        "wide": INT4,
        "narrow": None,
    }
    assert "48 inputs" in decisions["narrow"].reason
    assert "64" in decisions["narrow"].reason
    assert decisions["wide"].reason is None


def test_a_narrow_layer_is_quantized_when_the_group_divides_it():
    assert decide_all(Model(), scheme_named("nvfp4"))["narrow"].scheme == scheme_named("nvfp4")


def test_the_model_s_own_wishes_are_followed_and_kept_as_it_says_them():
    decisions = decide_all(Choosy(), INT4)
    eight = decisions["embed"]
    assert (eight.scheme.mode, eight.scheme.bits, eight.scheme.group_size) == ("affine", 8, 32)
    assert eight.own == {"group_size": 32, "bits": 8}
    assert decisions["wide"].scheme is None
    assert decisions["wide"].reason == "the architecture keeps it"


def test_the_model_s_wishes_do_not_make_a_layer_fit():
    assert decide_all(Choosy(), INT4)["narrow"].scheme is None


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["lm_head"], {"lm_head"}),
        (["k_proj"], {"model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"}),
        (["model.layers.*.mlp.up_proj"], {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}),
        (["layers.1.mlp"], {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        (["proj", "head", "nothing"], set()),
    ],
)
def test_skipped_layers_are_exactly_those_named(skip, kept):
    decisions = decide_all(tiny_llama(bits=None), INT4, skip)
    assert {path for path, decision in decisions.items() if decision.scheme is None} == kept
    assert {decision.reason for decision in decisions.values()} <= {None, "asked to be skipped"}


def test_a_decision_needs_no_weights():
    model = Model()
    model.wide.weight = mx.zeros((1 << 20, 1 << 20), dtype=mx.bfloat16)  # 2 TiB, never evaluated
    assert decide_all(model, INT4)["wide"].scheme == INT4


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp", True),
        ("model.layers.1.mlp", "mlp", True),
        ("model.layers.1.mlp", "layers.1", True),
        ("model.layers.11.mlp", "layers.1", False),
        ("model.layers.1.mlp", "lp", False),
        ("model.layers.1.mlp", "*.1.*", True),
        ("model.layers.1.mlp", "MLP", False),
    ],
)
def test_a_name_is_a_path_an_end_a_part_or_a_pattern(path, name, expected):
    assert is_named(path, name) is expected


# ---------------------------------------------------------------- mixed recipes


def decided(model, **keys):
    """Path → name of the scheme, by a configuration with these keys."""
    return {
        path: spelled(d.scheme)
        for path, d in decide_all(model, recipe_of(QuantizationConfig(**keys))).items()
    }


def those(schemes, name):
    return {path for path, scheme in schemes.items() if scheme == name}


def test_an_override_gives_the_layers_it_names_their_own_scheme_and_its_name_is_the_reason():
    decisions = decide_all(
        tiny_llama(bits=None), recipe_of(QuantizationConfig(overrides={"*.down_proj": "int8"}))
    )
    for path, decision in decisions.items():
        if path.endswith("down_proj"):
            assert (decision.scheme, decision.rule) == (INT8, "overrides '*.down_proj'")
            assert decision.own == {"group_size": 64, "bits": 8, "mode": "affine"}
        else:
            assert (decision.scheme, decision.rule, decision.own) == (INT4, BY_SCHEME, None)


def test_of_two_overrides_the_later_one_wins_and_the_order_is_part_of_the_configuration():
    one, other = {"*": "int8", "v_proj": "int6"}, {"v_proj": "int6", "*": "int8"}
    assert those(decided(tiny_llama(bits=None), overrides=one), "int6")
    assert not those(decided(tiny_llama(bits=None), overrides=other), "int6")
    first, second = ({"quantization": {"overrides": each}} for each in (one, other))
    assert build_config(first) != build_config(second)
    assert difference(build_config(first), build_config(second))


def test_an_override_can_keep_layers_and_name_another_group_size():
    schemes = decided(tiny_llama(bits=None), overrides={"layers.0": "none", "layers.1.mlp": "int4-g32"})
    assert those(schemes, "none") == {p for p in schemes if ".0." in p}
    assert those(schemes, "int4-g32") == {p for p in schemes if ".1.mlp." in p}


def test_a_name_to_skip_wins_over_an_override():
    schemes = decided(tiny_llama(bits=None), skip_modules=["v_proj"], overrides={"*": "int8"})
    assert those(schemes, "none") == {p for p in schemes if p.endswith("v_proj")}


def test_an_override_that_does_not_fit_says_which_one_and_why():
    decision = decide_all(Model(), Recipe(INT4, overrides=(("narrow", INT8),)))["narrow"]
    assert decision.scheme is None
    assert "48 inputs" in decision.reason
    assert "'narrow'" in decision.reason


def test_an_override_changes_the_bits_an_architecture_asks_for_but_not_what_it_keeps():
    decisions = decide_all(Choosy(), Recipe(INT4, overrides=(("*", INT6),)))
    assert decisions["embed"].scheme == INT6
    assert decisions["embed"].rule == "overrides '*'"
    assert (decisions["wide"].scheme, decisions["wide"].reason) == (None, "the architecture keeps it")


def test_overrides_that_name_nothing_are_all_refused_with_the_names_near_them():
    keys = {"overrides": {"*.down_proy": "int8", "layers.9.*": "int8", "*.v_proj": "int6"}}
    with pytest.raises(ConfigError, match=r"2 override\(s\)") as refused:
        decided(tiny_llama(bits=None), **keys)
    said = str(refused.value)
    assert "*.down_proy: matches no layer; near: down_proj" in said
    assert "layers.9.*: matches no layer" in said
    assert "v_proj: matches" not in said
    assert refused.value.where == "quantization.overrides"


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_kept_and_where_it_is_the_embedding_too_that(tied):
    decisions = decide_all(tiny_llama(bits=None, tied=tied), Recipe(INT4, keep_lm_head=True))
    kept = {path: d.reason for path, d in decisions.items() if d.scheme is None}
    expected = (
        {"model.embed_tokens": "keep_lm_head (it is the head too)"} if tied else {"lm_head": "keep_lm_head"}
    )
    assert kept == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "cohere"])
def test_the_head_of_an_architecture_is_found_without_its_name(name):
    decisions = decide_all(tiny_model(name, bits=None), Recipe(INT4, keep_lm_head=True))
    kept = {path for path, decision in decisions.items() if decision.scheme is None}
    assert kept == ({"lm_head"} if name in ("llama", "mistral", "phi3") else {"model.embed_tokens"})


def test_what_stands_outside_of_the_blocks_and_makes_no_logits_is_no_head():
    model = Deep()
    model.project = nn.Linear(64, 64)
    model.positions = nn.Embedding(32, 64)
    kept = {p for p, d in decide_all(model, Recipe(INT4, keep_lm_head=True)).items() if d.scheme is None}
    assert kept == {"head"}


def test_keeping_embeddings_quantizes_linear_layers_only():
    model = tiny_llama(bits=None, tied=False)
    schemes = decided(model, keep_embeddings=True)
    assert those(schemes, "none") == {"model.embed_tokens"}
    assert schemes["lm_head"] == "int4"


class Deep(nn.Module):
    """Sixteen blocks of three layers, an embedding and a head."""

    def __init__(self, second="down_proj"):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = [self.block(second) for _ in range(16)]
        self.head = nn.Linear(64, 100)

    @staticmethod
    def block(second):
        block = nn.Module()
        block.v_proj, block.up_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        setattr(block, second, nn.Linear(64, 64))
        return block


def test_sensitive_layers_are_those_of_the_first_and_last_eighth_and_each_third_between_and_the_head():
    schemes = decided(Deep(), sensitive_scheme="int6")
    blocks = {0, 1, 4, 7, 10, 13, 14, 15}
    expected = {f"layers.{i}.{name}" for i in blocks for name in ("v_proj", "down_proj")} | {"head"}
    assert those(schemes, "int6") == expected
    assert those(schemes, "int4") == set(schemes) - expected
    assert those(decided(Deep(), sensitive_scheme="none"), "none") == expected


def test_what_is_said_of_a_layer_by_name_comes_before_its_being_sensitive():
    decisions = decide_all(
        Deep(), recipe_of(QuantizationConfig(sensitive_scheme="int8", overrides={"layers.0.*": "int3"}))
    )
    assert spelled(decisions["layers.0.v_proj"].scheme) == "int3"
    assert decisions["layers.1.v_proj"].rule == "sensitive_scheme"


def test_a_model_without_layers_known_as_sensitive_is_refused_with_the_names_it_has():
    model = Deep(second="out")
    for block in model.layers:
        block.value = block.pop("v_proj")
    with pytest.raises(ConfigError, match="known as sensitive") as refused:
        decided(model, sensitive_scheme="int8")
    assert "embed, head, out, up_proj, value" in str(refused.value)


@given(
    overrides=st.lists(
        st.tuples(
            st.sampled_from(["*", "v_proj", "mlp", "layers.0", "*.1.*"]),
            st.sampled_from(["int3", "int8", "none"]),
        ),
        max_size=4,
    ),
    sensitive=st.none() | st.sampled_from(["int6", "none"]),
    head=st.booleans(),
    embeddings=st.booleans(),
)
def test_each_decision_has_a_rule_and_each_entry_in_config_json_is_its_scheme(
    overrides, sensitive, head, embeddings
):
    config = QuantizationConfig(
        overrides=tuple(overrides), sensitive_scheme=sensitive, keep_lm_head=head, keep_embeddings=embeddings
    )
    for decision in decide_all(TINY, recipe_of(config)).values():
        assert decision.rule
        assert (decision.reason is None) == (decision.scheme is not None)
        differs = decision.scheme not in (None, INT4)
        assert decision.own == (decision.scheme.config() if differs else None)


TINY = tiny_llama(bits=None)


# ---------------------------------------------------------------- as it is written


@pytest.mark.parametrize("name", [*SCHEMES, "int4-g32", "int8-g128", "int3-g128", "none"])
def test_a_spelled_scheme_is_read_back(name):
    assert spelled(read_scheme(name, "here")) == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int44", "Did you mean int4"),
        ("int4-g48", "not 48"),
        ("nvfp4-g64", "not 64"),
        ("int4-g0", "at least one"),
        ("", "no scheme"),
    ],
)
def test_a_scheme_that_is_none_is_refused_where_it_is_written(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        recipe_of(QuantizationConfig(overrides={"*.v_proj": text}))
    assert refused.value.where == "quantization.overrides '*.v_proj'"


def test_overrides_are_a_mapping_in_yaml_and_on_the_command_line_and_come_back():
    tree = parse_assignment('quantization.overrides={"*.v_proj": int8, b: null, a: int4-g32}')
    config = build_config(tree)
    assert config.quantization.overrides == (("*.v_proj", "int8"), ("b", "none"), ("a", "int4-g32"))
    assert "'*.v_proj': int8" in to_yaml(config)
    import yaml

    assert build_config(yaml.safe_load(to_yaml(config))) == config
    assert build_config(config.model_dump()) == config


def test_an_override_that_is_no_name_is_refused_by_its_key():
    with pytest.raises(
        ConfigError, match=r"quantization.overrides: .*v_proj: 8 is no scheme's name, such as int8"
    ):
        build_config(parse_assignment("quantization.overrides={v_proj: 8}"))


def test_two_judges_of_what_is_sensitive_are_refused():
    with pytest.raises(ConfigError, match="leave sensitive_scheme out"):
        build_config({"quantization": {"bits_per_weight": 4.5, "sensitive_scheme": "int8"}})


@pytest.mark.parametrize(
    "keys", [{"overrides": {"a": "int8"}}, {"sensitive_scheme": "int8"}, {"bits_per_weight": 4}]
)
def test_where_everything_is_kept_no_layer_can_have_a_scheme(keys):
    with pytest.raises(ConfigError, match="keeps the whole checkpoint"):
        recipe_of(QuantizationConfig(scheme="none", **keys))


def test_a_target_is_no_recipe_before_it_is_measured():
    with pytest.raises(ConfigError, match="measuring") as refused:
        recipe_of(QuantizationConfig(bits_per_weight=4.5))
    assert refused.value.where == "quantization.bits_per_weight"


def test_a_plain_configuration_is_a_plain_recipe():
    assert recipe_of(QuantizationConfig(skip_modules=("a",))) == Recipe(INT4, ("a",))
    assert recipe_of(QuantizationConfig(scheme="none")) is None
    assert Recipe(INT4).name == "int4"
    assert Recipe(INT4, keep_lm_head=True).name == "int4-mixed"


@pytest.mark.parametrize(
    ("target", "name"), [(2.0, "int2"), (4.5, "int4"), (4.6, "int5"), (6.6, "int8"), (12, "int8")]
)
def test_a_target_is_planned_as_the_narrowest_scheme_of_as_many_bits(target, name):
    config = QuantizationConfig(bits_per_weight=target, overrides={"v_proj": "int8"}, keep_lm_head=True)
    planned = uniform_near(config)
    assert recipe_of(planned).scheme == scheme_named(name)
    assert (planned.overrides, planned.keep_lm_head) == (config.overrides, True)
    assert uniform_near(planned) is planned
