"""An adapter becomes a GGUF LoRA: A and B transposed, queries and keys in llama.cpp's order."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.__main__ import load_command, run
from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import AdapterError, ConfigError, StorageError
from mlx_qlora.exchange.gguf_adapter import export_gguf_adapter
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.weights.gguf import open_gguf
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.source import resolve_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save(folder, base, *, scheme="none", system_prompt=None, **lora):
    """An adapter with random A and B; its tensors."""
    settings = LoraConfig(**{"rank": 4, "alpha": 6.0, "target_modules": ALL, **lora})
    model = skeleton(resolve_model(str(base)))
    attach(model, settings, seed=0)
    names = sorted(adapter_tensors(model).items())
    tensors = {name: mx.random.normal(a.shape, key=mx.random.key(i)) for i, (name, a) in enumerate(names)}
    info = AdapterInfo(
        model=ModelConfig(path=str(base)),
        quantization=QuantizationConfig(scheme=scheme),
        lora=settings,
        system_prompt=system_prompt,
        fingerprint="sha256:0",
        chat_template="",
        chat_template_sha256=text_sha256(""),
    )
    save_adapter(folder, tensors, info, 2)
    return tensors


def test_a_and_b_are_transposed_and_query_and_key_rows_interleaved(tmp_path, tiny_llama_folder):
    tensors = save(tmp_path / "adapter", tiny_llama_folder)
    result = export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    file = open_gguf(tmp_path / "a.gguf")
    assert len(file.tensors) == len(tensors) == 28
    assert (result.layers, result.rank, result.alpha, result.architecture) == (14, 4, 6.0, "llama")
    names = {"self_attn.v_proj": "attn_v", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    for path, name in names.items():
        a, b = (np.array(tensors[f"model.layers.1.{path}.{leaf}"]).T for leaf in ("lora_a", "lora_b"))
        heads = {"attn_q": 4, "attn_k": 2}.get(name)
        if heads:
            b = b.reshape(heads, 2, -1, 4).swapaxes(1, 2).reshape(b.shape)
        np.testing.assert_array_equal(file.tensors[f"blk.1.{name}.weight.lora_a"], a)
        np.testing.assert_array_equal(file.tensors[f"blk.1.{name}.weight.lora_b"], b)


def test_the_file_says_what_llama_cpp_asks_of_an_adapter(tmp_path, tiny_llama_folder):
    save(tmp_path / "club", tiny_llama_folder, scheme="int4", system_prompt="Be brief.")
    result = export_gguf_adapter(tmp_path / "club", tmp_path / "a.gguf")
    metadata = open_gguf(tmp_path / "a.gguf").metadata
    assert metadata == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "club",
        "general.base_model.count": 1,
        "general.base_model.0.name": "tiny-llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert "int4" in result.notes[0]
    assert "'Be brief.'" in result.notes[1]


def test_the_scale_of_rslora_is_in_alpha(tmp_path, tiny_llama_folder):
    save(tmp_path / "adapter", tiny_llama_folder, variant="rslora")
    result = export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert result.alpha == pytest.approx(6.0 / 2 * 4)  # llama.cpp divides by the rank, rsLoRA by its root


@pytest.mark.parametrize(("type_name", "step"), [("f16", 2**-10), ("bf16", 2**-7)])
def test_sixteen_bit_adapters_are_rounded_once(tmp_path, tiny_llama_folder, type_name, step):
    tensors = save(tmp_path / "adapter", tiny_llama_folder)
    export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", type_name=type_name)
    expected = np.array(tensors["model.layers.0.mlp.up_proj.lora_a"]).T
    found = open_gguf(tmp_path / "a.gguf").tensors["blk.0.ffn_up.weight.lora_a"]
    np.testing.assert_allclose(found, expected, rtol=step, atol=1e-7)
    with pytest.raises(ConfigError, match="not as q8_0"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "b.gguf", type_name="q8_0")


def test_an_adapter_of_mlx_lm_needs_its_base_named(tmp_path, tiny_llama_folder):
    save(tmp_path / "adapter", tiny_llama_folder)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    del settings["mlx_qlora"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="not made by mlx_qlora"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    result = export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=str(tiny_llama_folder))
    assert result.layers == 14


def test_dora_is_refused_with_fuse_as_the_way(tmp_path, tiny_llama_folder):
    save(tmp_path / "dora", tiny_llama_folder, variant="dora")
    with pytest.raises(AdapterError, match="llama.cpp has no DoRA") as failure:
        export_gguf_adapter(tmp_path / "dora", tmp_path / "a.gguf")
    assert "mlx-qlora fuse" in str(failure.value)
    assert not (tmp_path / "a.gguf").exists()


def change(folder, **changes):
    path = folder / "adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    tensors |= changes
    mx.save_safetensors(str(path), {name: array for name, array in tensors.items() if array is not None})


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("model.layers.0.mlp.up_proj.m", mx.zeros((128,)), "no DoRA"),
        ("model.layers.0.mlp.up_proj.lora_a", None, "it has lora_b, not lora_a and lora_b"),
        ("model.layers.0.mlp.up_proj.lora_a", mx.zeros((64, 5)), "do not fit 64 → 128 and rank 4"),
        ("model.layers.0.mlp.up_proj.lora_a", mx.full((64, 4), float("nan")), "not finite"),
        ("model.layers.9.mlp.up_proj.lora_a", mx.zeros((64, 4)), "not lora_a and lora_b"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, tiny_llama_folder, name, array, said):
    save(tmp_path / "adapter", tiny_llama_folder)
    change(tmp_path / "adapter", **{name: array})
    with pytest.raises(AdapterError) as failure:
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert said in str(failure.value)


def test_an_embedding_is_refused_as_no_linear_layer(tmp_path, tiny_llama_folder):
    save(tmp_path / "adapter", tiny_llama_folder)
    parts = {"model.embed_tokens.lora_a": mx.zeros((320, 4)), "model.embed_tokens.lora_b": mx.zeros((4, 64))}
    change(tmp_path / "adapter", **parts)
    with pytest.raises(AdapterError, match="of the kind Embedding; llama.cpp adapts linear ones"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")


@pytest.mark.parametrize("parameters", [{"rank": 4, "scale": 0.0}, {"rank": 0, "scale": 1.0}, {"rank": 4}, 7])
def test_a_scale_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, tiny_llama_folder, parameters):
    save(tmp_path / "adapter", tiny_llama_folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_parameters": parameters}))
    with pytest.raises(AdapterError, match="rank and scale cannot be used"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")


def test_full_fine_tuning_and_broken_files_are_refused(tmp_path, tiny_llama_folder):
    save(tmp_path / "adapter", tiny_llama_folder)
    path = tmp_path / "adapter" / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "fine_tune_type": "full"}))
    with pytest.raises(AdapterError, match="low rank only, not 'full'"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    path.write_text("{")
    with pytest.raises(AdapterError, match="configuration cannot be read"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=str(tiny_llama_folder))
    path.write_text(before)
    (tmp_path / "adapter" / "adapters.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match="does not load"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")


def test_an_output_that_is_there_is_not_touched(tmp_path, tiny_llama_folder):
    save(tmp_path / "adapter", tiny_llama_folder)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(StorageError, match="something here already"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_the_command_writes_a_model_and_an_adapter(tmp_path, tiny_llama_folder, capsys):
    command = load_command("export-gguf")
    save(tmp_path / "adapter", tiny_llama_folder)
    model = [str(tiny_llama_folder), "--output", str(tmp_path / "m.gguf"), "--pre", "gpt-2"]
    assert run(command, [*model, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert said["peak_memory_bytes"] > 0
    assert {tensor["gguf_type"] for tensor in said["tensors"]} == {"BF16", "F32"}
    adapter = ["--adapter-path", str(tmp_path / "adapter"), "--output", str(tmp_path / "a.gguf")]
    assert run(command, [*adapter, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 14


def test_the_command_says_each_class_of_tensors_and_the_next_step(tmp_path, tiny_llama_folder, capsys):
    command = load_command("export-gguf")
    save(tmp_path / "adapter", tiny_llama_folder)
    model = [str(tiny_llama_folder), "--output", str(tmp_path / "m.gguf"), "--pre", "gpt-2"]
    assert run(command, [*model, "--type", "q8_0"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "BF16 as F32, the same numbers: 5 tensors" in printed.err
    assert "BF16 as Q8_0, relative error at most" in printed.err
    assert f"llama-cli -m {tmp_path / 'm.gguf'}" in printed.err
    adapter = ["--adapter-path", str(tmp_path / "adapter"), "--output", str(tmp_path / "a.gguf")]
    assert run(command, adapter) == 0
    assert f"--lora {tmp_path / 'a.gguf'}" in capsys.readouterr().err


def test_the_command_refuses_with_code_2_and_the_next_step(tmp_path, tiny_llama_folder, capsys):
    command = load_command("export-gguf")
    assert run(command, ["--output", str(tmp_path / "a.gguf")]) == 2
    assert "neither a model nor an adapter" in capsys.readouterr().err
    assert run(command, [str(tiny_llama_folder), "--output", str(tmp_path / "a.gguf")]) == 2
    assert "--pre gpt-2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
