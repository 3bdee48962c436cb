"""weights/verification.py: a folder that was written here is what was written, or is named."""

import pytest

from mlx_qlora.errors import WeightsError
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.storage import read_json, write_json
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from mlx_qlora.weights.verification import verify_folder


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    source = resolve_model(str(tiny_llama_folder))
    quantize_checkpoint(source, tmp_path / "out", scheme_named("int4"), shard_bytes=15_000)
    return tmp_path / "out"


def flip(path, share):
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


def test_a_whole_folder_and_one_that_is_not_ours_say_nothing(folder, tiny_llama_folder):
    assert verify_folder(folder) == ()
    assert verify_folder(tiny_llama_folder) == ()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_one_bit_in_any_shard_is_found(folder, share):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    flip(shards[1], share)
    with pytest.raises(WeightsError, match=shards[1].name) as error:
        verify_folder(folder)
    assert shards[0].name not in error.value.what
    assert str(folder) in str(error.value)


def test_a_shard_that_is_gone_is_damage(folder):
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(WeightsError, match=gone.name):
        verify_folder(folder)


def test_a_small_file_that_was_edited_is_said_and_used(folder):
    flip(folder / "tokenizer_config.json", 0.5)
    (said,) = verify_folder(folder)
    assert "tokenizer_config.json" in said


def test_an_older_manifest_names_small_files_without_digests(folder):
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, {**manifest, "files": sorted(manifest["files"])})
    flip(folder / "tokenizer_config.json", 0.5)
    assert verify_folder(folder) == ()
