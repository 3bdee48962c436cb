"""`mlx-qlora export-bitsandbytes`: what it prints, and how it fails."""

import json

from mlx_qlora.__main__ import load_command, run


def test_an_nf4_folder_becomes_one_for_bitsandbytes(tiny_llama_folder, tmp_path, capsys):
    ours, theirs = tmp_path / "nf4", tmp_path / "bnb"
    quantized = [str(tiny_llama_folder), "--scheme", "nf4-dq", "--output", str(ours), "--skip", "v_proj"]
    assert run(load_command("quantize"), quantized) == 0
    capsys.readouterr()
    command = load_command("export-bitsandbytes")
    assert run(command, [str(ours), "--output", str(theirs), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == sum(path.stat().st_size for path in theirs.iterdir())
    assert sorted(said["unpacked"]) == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    settings = json.loads((theirs / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] is True
    assert run(command, [str(ours), "--output", str(theirs)]) == 2
    assert "something here already" in capsys.readouterr().err


def test_a_model_without_nf4_says_how_to_make_one(tiny_llama_folder, tmp_path, capsys):
    command = load_command("export-bitsandbytes")
    assert run(command, [str(tiny_llama_folder), "--output", str(tmp_path / "out")]) == 2
    assert "--scheme nf4-dq" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
