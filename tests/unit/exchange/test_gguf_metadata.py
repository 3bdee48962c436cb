"""config.json goes into GGUF's metadata and comes back; what llama.cpp computes otherwise is refused."""

import json

import numpy as np
import pytest

from mlx_qlora.errors import ModelError
from mlx_qlora.exchange.gguf_layout import interleaved, is_kept_in_float32, layout_of
from mlx_qlora.exchange.gguf_metadata import describe, llama3_divisors
from mlx_qlora.exchange.gguf_writer import GgufEntry, encode_header, write_data
from mlx_qlora.weights.gguf_config import config_of
from mlx_qlora.weights.gguf_convert import _head_order
from mlx_qlora.weights.gguf_file import read_gguf
from mlx_qlora.weights.gguf_tensors import Type
from mlx_qlora.weights.source import ModelSource
from tests import gguf_files
from tests.gguf_files import KINDS, LLAMA3, full_config

NOT_SAID = {"model_type", "rope_scaling", "rms_norm_eps", "layer_norm_eps", "num_hidden_layers"}


def described(folder, config):
    layout = layout_of(ModelSource(folder, str(folder), None, config))
    return describe(layout, "config.json"), layout


@pytest.mark.parametrize("kind", KINDS)
def test_what_config_json_says_comes_back_from_the_import(tmp_path, kind):
    config = full_config(kind)
    said, layout = described(tmp_path, config)
    tensors = {"token_embd.weight": np.zeros((config["vocab_size"], 1), np.float32), **said.tensors}
    names = ["output.weight"] if not config.get("tie_word_embeddings", True) else []
    names += [f"blk.0.{name}.bias" for name in ("attn_q", "ffn_up") if config.get("attention_bias")]
    tensors |= dict.fromkeys(names, np.zeros((1,), np.float32))
    entries = [GgufEntry(name, Type.F32, array.shape) for name, array in tensors.items()]
    entries += [GgufEntry(f"filler.{index}", Type.F32, (1,)) for index in range(8)]
    with (tmp_path / "a.gguf").open("wb") as file:
        file.write(encode_header({"general.architecture": layout.architecture, **said.metadata}, entries))
        for entry in entries:
            write_data(file, entry, iter([tensors.get(entry.name, np.zeros(1, np.float32)).tobytes()]))
    back = config_of(read_gguf(tmp_path / "a.gguf"))
    kept = {key: value for key, value in config.items() if key not in NOT_SAID and key in back}
    assert len(kept) > 7
    assert {key: back[key] for key in kept} == kept
    scaling = dict(config.get("rope_scaling") or {})
    found = dict(back.get("rope_scaling") or {})
    assert found.pop("type", None) == (scaling.pop("type", None) or scaling.get("rope_type"))
    for key in scaling.keys() - {"rope_type"}:
        assert found[key] == pytest.approx(scaling[key])


def test_llama_3_divisors_are_those_of_llama_cpps_converter():
    expected = gguf_files.llama3_divisors(128, 500000.0)
    assert 1 < len(set(expected.tolist())) < 64
    np.testing.assert_allclose(llama3_divisors(128, 500000.0, LLAMA3), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("qwen2", {"rope_traditional": True}, "rope_traditional"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' has no counterpart"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' has no counterpart"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100; llama.cpp takes 32"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "some layers have no experts"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "some layers have no experts"),
        (
            "qwen3",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16}},
            "'beta_fast': 16",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0] * 8}},
            "long_factor has 1 numbers, not 8",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path, kind, changes, said):
    with pytest.raises(ModelError, match="cannot run this") as failure:
        described(tmp_path, full_config(kind, **changes))
    assert said in str(failure.value)


def test_what_differs_for_long_texts_only_is_noted(tmp_path):
    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    said, _ = described(tmp_path, full_config("mistral", **sliding))
    assert "beyond 8 tokens" in said.notes[0]
    assert "short factors" in described(tmp_path, full_config("phi3-long"))[0].notes[0]
    assert not described(tmp_path, full_config("llama"))[0].notes


def test_longrope_scales_attention_as_mlx_lm_does(tmp_path):
    said, _ = described(tmp_path, full_config("phi3-long"))
    expected = np.sqrt(1 + np.log(512 / 128) / np.log(128))
    assert said.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(expected)


def test_a_model_with_a_vision_part_is_described_by_its_text_model(tmp_path):
    text = full_config("gemma3")
    config = {"model_type": "gemma3", "text_config": {**text}, "vocab_size": text["vocab_size"]}
    said, layout = described(tmp_path, json.loads(json.dumps(config)))
    assert said.metadata == described(tmp_path, text)[0].metadata
    name = "language_model.model.layers.3.self_attn.q_proj.weight"
    assert layout.name_of(name) == "blk.3.attn_q.weight"


def test_interleaving_is_the_imports_order_reversed():
    order = interleaved(24, 8)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, *range(8, 24)][:8] + order.tolist()[8:]
    np.testing.assert_array_equal(np.arange(24)[order][_head_order(24, 8)], np.arange(24))


def test_interleaved_rows_keep_to_their_heads():
    np.testing.assert_array_equal(interleaved(24, 8) // 8, np.arange(24) // 8)


def test_rows_are_interleaved_for_llama_alone_and_not_where_they_are_already(tmp_path):
    query = "model.layers.0.self_attn.q_proj.weight"
    assert described(tmp_path, full_config("llama"))[1].rows_per_head(query, 64) == 16
    assert described(tmp_path, full_config("qwen2"))[1].rows_per_head(query, 64) is None
    turned = described(tmp_path, full_config("llama", rope_traditional=True))[1]
    assert turned.rows_per_head(query, 64) is None
    with pytest.raises(ValueError, match="no whole number of 4 heads"):
        described(tmp_path, full_config("llama"))[1].rows_per_head(query, 60)


def test_vectors_and_routers_are_kept_in_float32():
    assert is_kept_in_float32("blk.0.attn_norm.weight", (64,))
    assert is_kept_in_float32("blk.0.ffn_gate_inp_shexp.weight", (1, 64))
    assert is_kept_in_float32("blk.0.ffn_gate_inp.weight", (4, 64))
    assert not is_kept_in_float32("blk.0.ffn_gate.weight", (4, 64))


def test_gemma_3_says_both_of_its_rotary_bases_and_its_pattern(tmp_path):
    own = {"rope_theta": 1e6, "rope_local_base_freq": 500.0, "sliding_window_pattern": 3}
    said = described(tmp_path, full_config("gemma3", **own))[0].metadata
    assert (said["gemma3.rope.freq_base"], said["gemma3.rope.freq_base_swa"]) == (1e6, 500.0)
    assert said["gemma3.attention.sliding_window_pattern"] == 3
    assert said["gemma3.attention.sliding_window"] == 16
