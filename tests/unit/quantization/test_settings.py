"""Settings of bitsandbytes and torchao: what they become, what is said, what is refused, what is nearest."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.policy import decide_all, recipe_of
from mlx_qlora.quantization.settings import TORCHAO_NAMES, quantization_from
from tests.tiny import tiny_llama

# What BitsAndBytesConfig(load_in_4bit=True).to_dict() is: defaults and all.
DUMP = {
    "quant_method": "bitsandbytes",
    "_load_in_8bit": False,
    "_load_in_4bit": True,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "load_in_4bit": True,
    "load_in_8bit": False,
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def config(**keys):
    return QuantizationConfig(keep_embeddings=True, **keys)


def notes_with(translation, word):
    return [note for note in translation.notes if word in note]


class Dumped:
    """What has a to_dict, as transformers' configurations do."""

    def __init__(self, **keys):
        self.keys = keys

    def to_dict(self):
        return dict(self.keys)


# ---------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize(
    ("settings", "expected", "dtype"),
    [
        (NF4, {"scheme": "nf4", "keep_lm_head": True}, None),
        ({**NF4, "bnb_4bit_use_double_quant": True}, {"scheme": "nf4-dq", "keep_lm_head": True}, None),
        (
            {**NF4, "bnb_4bit_compute_dtype": "torch.bfloat16"},
            {"scheme": "nf4", "keep_lm_head": True},
            "bfloat16",
        ),
        ({**NF4, "bnb_4bit_compute_dtype": mx.float16}, {"scheme": "nf4", "keep_lm_head": True}, "float16"),
        ({**NF4, "bnb_4bit_compute_dtype": "float32"}, {"scheme": "nf4", "keep_lm_head": True}, "float32"),
        ({**NF4, "torch_dtype": "auto"}, {"scheme": "nf4", "keep_lm_head": True}, None),
        ({"load_in_4bit": True}, {"scheme": "nf4", "keep_lm_head": True}, None),
        ({"load_in_8bit": True}, {"scheme": "int8", "keep_lm_head": True}, None),
        ({"load_in_8bit": True, "dtype": "bfloat16"}, {"scheme": "int8", "keep_lm_head": True}, "bfloat16"),
        (
            {"load_in_8bit": True, "bnb_4bit_compute_dtype": "float16"},  # of four bits only
            {"scheme": "int8", "keep_lm_head": True},
            None,
        ),
        (
            {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "k_proj"]},
            {"scheme": "int8", "skip_modules": ("lm_head", "k_proj")},
            None,
        ),
        ({**NF4, "llm_int8_skip_modules": []}, {"scheme": "nf4"}, None),
        (DUMP, {"scheme": "nf4", "keep_lm_head": True}, None),
    ],
)
def test_what_is_written_for_bitsandbytes_has_its_scheme(settings, expected, dtype):
    for written in (settings, Dumped(**settings)):
        if written is not settings and settings.get("bnb_4bit_compute_dtype") == "float32":
            continue  # there it is the default, which nobody wrote
        translation = quantization_from(written)
        assert translation.config == config(**expected)
        assert translation.dtype == dtype


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"device_map": "auto"}, "share one memory"),
        ({"device_map": {"": 0}}, "share one memory"),
        ({"max_memory": {0: "8GB"}}, "mlx-qlora plan"),
        ({"low_cpu_mem_usage": True}, "one tensor at a time"),
        ({"llm_int8_enable_fp32_cpu_offload": True}, "share one memory"),
        ({"llm_int8_has_fp16_weight": True}, "frozen"),
        ({"llm_int8_threshold": 5.0}, "no integer product"),
        ({"llm_int8_threshold": 0}, "no integer product"),
        ({"bnb_4bit_use_double_quant": True}, "nothing in 8 bits"),
    ],
)
def test_what_has_no_meaning_in_eight_bits_is_accepted_with_one_line_that_says_what_happens(keys, says):
    plain, with_it = (
        quantization_from({"load_in_8bit": True}),
        quantization_from({"load_in_8bit": True, **keys}),
    )
    assert with_it.config == plain.config
    (key,) = keys
    (line,) = notes_with(with_it, key)
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"llm_int8_threshold": 6.0}, "nothing in 4 bits"),
        ({"llm_int8_enable_fp32_cpu_offload": True}, "no offload"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "packed the same way"),
        ({"device_map": "auto"}, "share one memory"),
    ],
)
def test_what_has_no_meaning_in_four_bits_is_accepted_with_one_line(keys, says):
    translation = quantization_from({**NF4, **keys})
    assert translation.config == quantization_from(NF4).config
    assert says in notes_with(translation, next(iter(keys)))[0]


def test_the_defaults_an_object_writes_out_are_not_commented_on():
    words = ("threshold", "offload", "fp16_weight", "quant_storage", "compute_dtype")
    assert not [note for note in quantization_from(DUMP).notes if any(word in note for word in words)]


def test_fp4_as_an_object_s_default_becomes_nf4_with_a_line_and_fp4_by_hand_is_refused_with_nf4():
    assert notes_with(quantization_from(DUMP), "nf4 is taken")
    with pytest.raises(ConfigError, match="nf4 is the nearest"):
        quantization_from({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})


def test_what_is_kept_in_16_bits_is_said():
    assert notes_with(quantization_from(NF4), "embeddings and the output head stay in 16 bits")
    named = quantization_from({**NF4, "llm_int8_skip_modules": ["k_proj"]})
    assert notes_with(named, "embeddings stay in 16 bits")


def test_without_four_or_eight_bits_the_model_stays_as_it_is():
    for settings in ({"bnb_4bit_quant_type": "nf4"}, Dumped(**{**DUMP, "load_in_4bit": False})):
        translation = quantization_from(settings)
        assert translation.config == QuantizationConfig(scheme="none")
        assert notes_with(translation, "stays as it is")
    assert quantization_from({}).config == QuantizationConfig(scheme="none")
    assert quantization_from({"device_map": "auto"}).config == QuantizationConfig(scheme="none")


def test_two_types_are_one_here_and_that_is_said():
    translation = quantization_from({**NF4, "bnb_4bit_compute_dtype": "float16", "torch_dtype": "bfloat16"})
    assert translation.dtype == "float16"
    assert notes_with(translation, "float16 and bfloat16 are asked for")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "one of them"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "nf4, not 'int4'"),
        ({"load_in_4bit": "yes"}, "load_in_4bit: True or False, not 'yes'"),
        ({"load_in_4bit": 1}, "load_in_4bit: True or False, not 1"),
        ({**NF4, "bnb_4bit_compute_dtype": "int8"}, "bfloat16, float16, float32"),
        ({**NF4, "bnb_4bit_quant_storage": "q4"}, "uint8, int8"),
        ({"load_in_8bit": True, "llm_int8_threshold": "high"}, "not 'high'"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1}, "not negative"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, "not negative"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "no list of module names"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": [3]}, "no list of module names"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": 3}, "llm_int8_skip_modules"),
        ({"load_in_4bits": True}, "did you mean load_in_4bit?"),
        ({"bnb_4bit_quant_typ": "nf4"}, "did you mean bnb_4bit_quant_type?"),
        ({"lod_in_4bit": True, "scheme": "int4"}, "lod_in_4bit: no such setting"),
        ({"group_sise": 32}, "did you mean group_size?"),
        ({3: 4}, "3: no such setting"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(ConfigError) as refused:
        quantization_from(settings)
    assert says in str(refused.value)
    assert refused.value.where == "quantization_config"
    assert refused.value.run


def test_all_problems_are_said_at_once():
    settings = {
        "load_in_4bit": True,
        "load_in_8bit": True,
        "bnb_4bit_quant_type": "fp4",
        "divice_map": "auto",
    }
    with pytest.raises(ConfigError, match=r"3 problem\(s\)") as refused:
        quantization_from(settings)
    assert all(word in str(refused.value) for word in ("one of them", "nf4 is the nearest", "device_map"))


@given(
    st.dictionaries(
        st.sampled_from([*DUMP, "device_map", "scheme", "bits", "quant_type", "_type", "x"]),
        st.one_of(
            st.booleans(), st.none(), st.integers(-1, 9), st.sampled_from(["nf4", "int4", "torchao", ""])
        ),
        max_size=5,
    )
)
def test_any_dictionary_is_a_configuration_or_a_config_error(settings):
    try:
        translation = quantization_from(settings)
    except ConfigError:
        return
    assert isinstance(translation.config, QuantizationConfig)
    assert all("\n" not in note for note in translation.notes)


# ---------------------------------------------------------------- torchao, without it


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("Int8WeightOnly", {"scheme": "int8"}),
        ("Int8WeightOnlyConfig", {"scheme": "int8"}),
        ("int8_weight_only", {"scheme": "int8"}),
        ("Int4WeightOnly", {"scheme": "int4", "group_size": 128}),
        ("int4_weight_only", {"scheme": "int4", "group_size": 128}),
        ("Int8DynamicActivationInt8Weight", {"scheme": "int8"}),
        ("int8_dynamic_activation_int8_weight", {"scheme": "int8"}),
        ("Int8DynamicActivationInt4Weight", {"scheme": "int4", "group_size": 32}),
        ({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}, {"scheme": "int4"}),
        (
            {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": 32}},
            {"scheme": "int8", "group_size": 32},
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": "int4_weight_only",
                "quant_type_kwargs": {"group_size": 32},
            },
            {"scheme": "int4", "group_size": 32, "keep_lm_head": True},
        ),
        (
            {"quant_type": "Int8WeightOnly", "modules_to_not_convert": ["q_proj"]},
            {"scheme": "int8", "skip_modules": ("q_proj",)},
        ),
    ],
)
def test_what_is_written_for_torchao_has_its_scheme(settings, expected):
    assert quantization_from(settings).config == config(**expected)


def test_transformers_torchao_may_quantize_embeddings_too():
    settings = {"quant_type": "Int8WeightOnly", "include_input_output_embeddings": True}
    assert quantization_from(settings).config == QuantizationConfig(scheme="int8")


def test_activations_in_integers_are_said_not_to_be():
    assert notes_with(quantization_from("Int8DynamicActivationInt8Weight"), "no integer product")
    assert not notes_with(quantization_from("Int8WeightOnly"), "no integer product")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 256}}, "nearest: 128"),
        ({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 16}}, "nearest: 32"),
        ({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": "64"}}, "a number such as 64"),
        ({"_type": "Int4WeightOnlyConfig", "data": {}}, "data: no such setting"),
        ({"_type": 4}, "no dump of a torchao configuration"),
        (
            {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_data": "int7"}}},
            "not 7; nearest: 8",
        ),
        ({"quant_method": "torchao"}, "quant_type is not said"),
        ({"quant_type": "Int8WeightOnly", "modules_to_not_convert": "lm_head"}, "no list of module names"),
        ({"quant_type": "Int8WeightOnly", "quant_typ": 1}, "did you mean quant_type?"),
        ("Float8WeightOnly", "nearest is mxfp8"),
        ("Int4WeightOnyl", "nearest is Int4WeightOnly"),
        ("Int4WeightsOnly", "nearest is Int4WeightOnly"),
        ("int44", "Did you mean int4"),
        ({"quant_method": "gptq", "bits": 4}, "nearest is int4 with group_size 128"),
        ({"quant_method": "unheard_of"}, "nearest is int4 or int8"),
        (3, "not an object of type int"),
        (None, "not an object of type NoneType"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_nearest(settings, says):
    with pytest.raises(ConfigError) as refused:
        quantization_from(settings)
    assert says in str(refused.value)


def test_the_error_lists_the_names_there_are():
    with pytest.raises(ConfigError) as refused:
        quantization_from("UIntXWeightOnlyConfig")
    assert all(name in str(refused.value) for name in TORCHAO_NAMES)


# ---------------------------------------------------------------- ours


def test_our_own_words_are_taken_as_they_are():
    own = QuantizationConfig(scheme="mxfp4", skip_modules=("lm_head",))
    assert quantization_from(own).config is own
    assert quantization_from({"scheme": "mxfp4", "skip_modules": ["lm_head"]}).config == own
    assert quantization_from("int3").config == QuantizationConfig(scheme="int3")
    assert quantization_from("fp16").config == QuantizationConfig(scheme="fp16")
    assert quantization_from({"bits": 8, "group_size": 32}).config == QuantizationConfig(
        bits=8, group_size=32
    )
    with pytest.raises(ConfigError, match="bits"):
        quantization_from({"bits": "many"})


# ---------------------------------------------------------------- the filter


def schemes_by(filter_fn, settings="Int8WeightOnly", model=None):
    model = model or tiny_llama(bits=None)
    own = quantization_from(settings, filter_fn=filter_fn).for_model(model)
    return {path: d.scheme for path, d in decide_all(model, recipe_of(own)).items()}


def test_a_filter_decides_which_layers_are_quantized():
    schemes = schemes_by(lambda module, name: isinstance(module, nn.Linear) and "mlp" in name)
    assert {path for path, scheme in schemes.items() if scheme} == {p for p in schemes if ".mlp." in p}


def test_a_filter_may_choose_embeddings():
    schemes = schemes_by(lambda module, _name: isinstance(module, nn.Embedding))
    assert [path for path, scheme in schemes.items() if scheme] == ["model.embed_tokens"]


def test_a_filter_is_asked_with_the_module_and_its_path():
    model, asked = tiny_llama(bits=None), {}

    def remember(module, name):
        asked[name] = module
        return True

    schemes_by(remember, model=model)
    assert asked["model.layers.1.mlp.up_proj"] is model.layers[1].mlp.up_proj
    assert asked["lm_head"] is model.lm_head


def test_a_filter_in_the_dictionary_is_the_same():
    def only_mlp(_module, name):
        return "mlp" in name

    inside = quantization_from({"load_in_8bit": True, "filter_fn": only_mlp})
    beside = quantization_from({"load_in_8bit": True}, filter_fn=only_mlp)
    model = tiny_llama(bits=None)
    assert inside.for_model(model) == beside.for_model(model)
    assert set(inside.for_model(model).skip_modules) == {p for p in schemes_by(only_mlp) if "mlp" not in p}


def test_without_a_filter_a_model_changes_nothing():
    translation = quantization_from("int4")
    assert translation.for_model(tiny_llama(bits=None)) is translation.config


def test_a_filter_written_for_torch_modules_selects_nothing_and_that_is_an_error_that_says_why():
    class TorchLinear:
        """Stands for torch.nn.Linear: no module here is one."""

    with pytest.raises(ConfigError, match="selects none of the 16 layers") as refused:
        schemes_by(lambda module, _name: isinstance(module, TorchLinear))
    assert "mlx.nn.Linear" in str(refused.value)


def test_a_filter_that_raises_is_a_config_error_that_names_the_layer():
    with pytest.raises(ConfigError, match="ZeroDivisionError") as refused:
        schemes_by(lambda _module, _name: 1 / 0)
    assert refused.value.where == "filter_fn, asked about lm_head"
    with pytest.raises(ConfigError, match="is a function"):
        quantization_from("int8", filter_fn="mlp")
