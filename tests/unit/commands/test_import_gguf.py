"""`mlx-qlora import-gguf`: what it prints, and how it fails."""

import json

import pytest
from gguf import GGMLQuantizationType as Type
from typer.main import get_command_from_info
from typer.models import CommandInfo

from mlx_qlora.__main__ import run
from mlx_qlora.commands.import_gguf import import_gguf
from tests.gguf_files import full_config, gguf_tensors, random_blocks, random_model, write_gguf


@pytest.fixture
def command():
    return get_command_from_info(
        CommandInfo(name="import-gguf", callback=import_gguf),
        pretty_exceptions_short=True,
        rich_markup_mode=None,
    )


@pytest.fixture
def file(tmp_path):
    config = full_config("llama", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    tensors = gguf_tensors(random_model(config), "llama", config)
    types = {
        "blk.0.ffn_up.weight": (random_blocks((256, 256), Type.Q6_K), Type.Q6_K),
        "blk.0.ffn_down.weight": (random_blocks((256, 256), Type.Q4_K), Type.Q4_K),
    }
    write_gguf(tmp_path / "m.gguf", "llama", config, tensors, types, {})
    return tmp_path / "m.gguf"


def test_json_says_for_each_tensor_what_became_of_it(command, file, tmp_path, capsys):
    assert run(command, [str(file), "--output", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tensors = {tensor["gguf_name"]: tensor for tensor in said["tensors"]}
    assert tensors["blk.0.ffn_up.weight"] == {
        "name": "model.layers.0.mlp.up_proj.weight",
        "gguf_name": "blk.0.ffn_up.weight",
        "gguf_type": "Q6_K",
        "stored": "affine 8-bit, groups of 32, F16 scales",
        "is_exact": False,
    }
    assert tensors["blk.0.ffn_down.weight"]["is_exact"]
    assert sum(not tensor["is_exact"] for tensor in tensors.values()) == 1
    assert said["bytes"] < (tmp_path / "out" / "model.safetensors").stat().st_size < said["bytes"] + 5000
    assert said["bits_per_weight"] == pytest.approx(said["bytes"] * 8 / said["num_parameters"])
    assert {"architecture", "output", "peak_memory_bytes", "seconds"} <= set(said)


def test_a_person_reads_which_tensors_were_rounded(command, file, tmp_path, capsys):
    assert run(command, [str(file), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "quantized anew: model.layers.0.mlp.up_proj.weight (Q6_K as affine 8-bit" in printed.err
    assert "Q4_K as affine 4-bit, groups of 32, F32 scales, the same numbers: 1 tensors" in printed.err
    assert f"Run: mlx-qlora train --model {tmp_path / 'out'}" in printed.err


def test_a_file_that_is_not_there_ends_with_2_and_the_next_step(command, tmp_path, capsys):
    assert run(command, [str(tmp_path / "no.gguf"), "--output", str(tmp_path / "out")]) == 2
    assert "Run: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
