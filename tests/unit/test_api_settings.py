"""mq.load with settings of other libraries and of the environment; mq.quantize with a target."""

import pytest

import mlx_qlora as mq
from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import ConfigError
from tests.checkpoints import make_checkpoint, tensors_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama_folder):
    return str(make_checkpoint(tmp_path_factory.mktemp("api") / "model", "llama-untied", tiny_llama_folder))


@pytest.fixture(autouse=True)
def nothing_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("USE_QUANTIZATION", raising=False)
    monkeypatch.delenv("QUANTIZATION_BITS", raising=False)
    return tmp_path


def widths(folder, **keys):
    """Short name → bits of the layers, and the lines that were said."""
    notes = []
    model, _ = mq.load(folder, on_note=notes.append, **keys)
    layers = dict(model.named_modules())
    names = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    names |= {name: f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}
    names |= {name: f"model.layers.0.mlp.{name}" for name in ("up_proj", "down_proj")}
    return {name: getattr(layers[path], "bits", 16) for name, path in names.items()}, notes


def test_bitsandbytes_settings_load_a_model_as_they_say(folder):
    bits, notes = widths(folder, quantization_config={"load_in_8bit": True, "device_map": "auto"})
    assert bits == {"embed_tokens": 16, "lm_head": 16} | dict.fromkeys(
        ("q_proj", "v_proj", "up_proj", "down_proj"), 8
    )
    assert any(note.startswith("device_map='auto': ") for note in notes)


def test_the_type_of_activations_is_the_compute_type(folder):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float16"}
    model, _ = mq.load(folder, quantization_config=settings, on_note=lambda _: None)
    import mlx.core as mx

    assert model(mx.array([[1, 2, 3]])).dtype == mx.float16


def test_torchao_settings_and_their_filter_load_a_model_as_they_say(folder):
    bits, _ = widths(
        folder, quantization_config="Int4WeightOnly", filter_fn=lambda _m, name: "down_proj" in name
    )
    assert {name for name, width in bits.items() if width == 4} == {"down_proj"}


def test_the_environment_is_asked_last(folder, nothing_said, monkeypatch):
    (nothing_said / ".env").write_text("QUANTIZATION_BITS=8")
    assert set(widths(folder)[0].values()) == {8}
    monkeypatch.setenv("QUANTIZATION_BITS", "4")
    bits, (note,) = widths(folder)
    assert set(bits.values()) == {4}
    assert "the environment" in note
    assert set(widths(folder, quantization="int6")[0].values()) == {6}
    assert set(widths(folder, quantization_config={"load_in_4bit": False})[0].values()) == {16}


def test_two_answers_to_one_question_are_refused(folder):
    with pytest.raises(ConfigError, match="give one of them"):
        mq.load(folder, quantization="int4", quantization_config={"load_in_8bit": True})
    with pytest.raises(ConfigError, match="there is none"):
        mq.load(folder, filter_fn=lambda *_: True)


def test_a_filter_needs_a_model_to_ask_about():
    with pytest.raises(ConfigError, match="name it"):
        mq.load(adapter_path="adapters/any", quantization="int8", filter_fn=lambda *_: True)


def test_a_target_is_reached_in_the_folder_that_is_written(folder, tmp_path):
    result = mq.quantize(folder, tmp_path / "out", QuantizationConfig(bits_per_weight=5.2))
    stored = sum(array.nbytes for array in tensors_of(tmp_path / "out").values())
    assert 4.7 < 8 * stored / result.num_parameters == result.bits_per_weight <= 5.2
