"""nf4-dq from the 16-bit checkpoint to an answer: quantize, train, infer, by the commands people type."""

import json

import pytest

from mlx_qlora.lora.adapter import read_adapter_info
from mlx_qlora.quantization.nf4_layers import NF4Embedding, NF4Linear


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"quem venceu {i}?", "completion": "o clube venceu"} for i in range(6)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_an_adapter_is_trained_on_it_and_answers(scheme, tiny_llama_folder, data, tmp_path):
    import mlx_qlora as mq

    config = {
        "model": {"path": str(tiny_llama_folder)},
        "quantization": {"scheme": scheme},
        "data": {"path": str(data)},
        "training": {"max_steps": 1, "batch_size": 2},
    }
    run = mq.train(config, tmp_path / "adapter", observers=[])
    assert run.finished.steps == 1
    assert read_adapter_info(tmp_path / "adapter").quantization.scheme == scheme
    model, tokenizer = mq.load(adapter_path=tmp_path / "adapter")
    assert type(model.model.embed_tokens) is NF4Embedding
    assert type(model.layers[0].self_attn.q_proj.linear) is NF4Linear
    assert model.layers[0].mlp.up_proj.mode == scheme
    assert mq.generate(model, tokenizer, "quem venceu 1?", max_tokens=4)
