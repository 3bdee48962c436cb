"""The whole job on a real pretrained model and real data sets: quantize, train, validate, infer."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

CLI = [sys.executable, "-m", "mlx_qlora"]


def run(*arguments: str) -> dict:
    done = subprocess.run([*CLI, *arguments, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quantized(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("stories") / "int4"
    source = material / "stories260k" / "hf"
    result = run("quantize", str(source), "--output", str(output), "--bits", "4", "--group-size", "64")
    # 172 is no multiple of 64, so these layers cannot be grouped: they stay and are listed.
    assert {row["layer"].rsplit(".", 1)[-1] for row in result["skipped"]} == {"down_proj"}
    assert 4 < result["bits_per_weight"] < 32
    return output


def data_folder(material: Path, name: str, tmp_path: Path) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    if name == "wwdc25":
        for split in ("train", "valid"):
            source = material / "datasets" / "mlx-examples" / f"wwdc25_{split}.jsonl"
            rows = source.read_text(encoding="utf-8").splitlines()
            (folder / f"{split}.jsonl").write_text("\n".join(rows[:120]) + "\n", encoding="utf-8")
    else:
        rows = (material / "datasets" / "faquad" / "faquad_qa.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "train.jsonl").write_text("\n".join(rows[:200]) + "\n", encoding="utf-8")
        (folder / "valid.jsonl").write_text("\n".join(rows[200:230]) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wwdc25", "faquad"])
def test_forty_steps_lower_the_validation_loss_and_the_adapter_answers(name, material, quantized, tmp_path):
    data, adapter = data_folder(material, name, tmp_path), tmp_path / "adapter"
    settings = [
        "data.max_seq_length=256",
        "data.skip_bad_rows=true",
        "data.max_valid_examples=12",
        "training.max_steps=40",
        "training.learning_rate=3e-3",
        "training.warmup_steps=4",
        "training.steps_per_validation=20",
        "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    ]
    sets = [part for setting in settings for part in ("--set", setting)]
    result = run(
        "train", "--model", str(quantized), "--data", str(data), "--adapter-path", str(adapter), *sets
    )
    assert result["steps"] == 40
    losses = [
        row["loss_nats"]
        for row in map(json.loads, (adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if row["event"] == "Validated"
    ]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.05
    assert result["val_loss_nats"] == pytest.approx(min(losses))
    answer = run("infer", "O que é um sistema?", "--adapter-path", str(adapter), "--max-tokens", "12")
    assert 0 < answer["generation_tokens"] <= 12


def test_the_adapter_gives_the_same_logits_in_mlx_lm_as_here(tiny_llama_folder, tmp_path):
    from mlx_lm import load

    import mlx_qlora as mq

    rows = [{"prompt": f"pergunta {i}?", "completion": f"resposta {i}"} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    quantized, adapter = tmp_path / "int4", tmp_path / "adapter"
    run("quantize", str(tiny_llama_folder), "--output", str(quantized))
    run(
        "train", "--model", str(quantized), "--data", str(data), "--adapter-path", str(adapter),
        "--set", "training.max_steps=4", "--set", "training.learning_rate=0.02",
    )  # fmt: skip
    tokens = mx.array([[3, 7, 11, 5]])
    ours, _ = mq.load(adapter_path=adapter)
    theirs, _ = load(str(quantized), adapter_path=str(adapter))
    theirs.set_dtype(mx.float32)  # ours computes in float32 on a CPU
    base, _ = mq.load(str(quantized))
    assert mx.allclose(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
    assert not mx.allclose(ours(tokens), base(tokens), rtol=1e-4, atol=1e-3)
