"""What can be read as a model, and what is refused with the next step to take."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.source import PATTERNS, fingerprint, resolve_model
from tests.checkpoints import save_sharded, tensors_of


@pytest.fixture
def model(tmp_path, tiny_llama_folder):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, **options) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder), **options)
    return str(caught.value)


def test_a_folder_is_itself_the_source(model):
    source = resolve_model(str(model))
    assert (source.folder, source.name, source.revision) == (model, str(model), None)
    assert source.config["model_type"] == "llama"
    assert not source.is_quantized


def test_a_relative_folder_is_named_by_its_absolute_path(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert resolve_model("model").name == str(model)


def test_the_configuration_is_read_as_mlx_lm_reads_it(model):
    from mlx_lm.utils import load_config

    edit_config(model, limits=[{"__float__": "Infinity"}])
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    config = resolve_model(str(model)).config
    assert config == load_config(model)
    assert config["eos_token_id"] == [2, 3]


def test_an_unknown_architecture_names_its_neighbours(model):
    edit_config(model, model_type="qwen2_mo")
    message = refused(model)
    assert "'qwen2_mo' is not known" in message
    assert "qwen2_moe" in message


@pytest.mark.parametrize("model_type", ["llama", "mistral", "lfm2-vl", "nemotron-nas", "qwen2_5_vl"])
def test_every_architecture_of_mlx_lm_is_known(model, model_type):
    edit_config(model, model_type=model_type)
    assert resolve_model(str(model)).config["model_type"] == model_type


@pytest.mark.parametrize("model_type", ["os.path", "../llama", "llama\0", "", "/etc"])
def test_a_strange_architecture_imports_nothing(model, model_type):
    edit_config(model, model_type=model_type)
    assert "is not known" in refused(model)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_local_experts", "encoder_layers"])
def test_a_configuration_of_a_million_layers_is_refused_before_they_are_built(model, key):
    edit_config(model, **{key: 10_000})
    resolve_model(str(model))
    edit_config(model, **{key: 10_001})
    assert f"{key} is 10001" in refused(model)
    edit_config(model, **{key: 2, "text_config": {key: 2**31}})
    assert "no model has so many" in refused(model)


def test_own_code_needs_trust(model):
    edit_config(model, model_type="mine", model_file="mine.py")
    assert "--trust-remote-code" in refused(model)
    assert resolve_model(str(model), trust_remote_code=True).config["model_file"] == "mine.py"


def test_own_code_needs_trust_even_under_a_known_name(model):
    edit_config(model, model_file="mine.py")
    assert "--trust-remote-code" in refused(model)


def test_automap_needs_trust_only_where_mlx_lm_lacks_the_architecture(model):
    edit_config(model, auto_map={"AutoModel": "modeling.Mine"})
    assert resolve_model(str(model)).name == str(model)
    edit_config(model, model_type="mine")
    assert "--trust-remote-code" in refused(model)
    assert "is not known" in refused(model, trust_remote_code=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_read(model, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    message = refused(model)
    assert f"pickled ({name})" in message
    assert "safetensors" in message


def test_pickled_weights_are_never_fetched():
    assert not any(
        pattern.endswith((".bin", ".pt", ".pth", ".py", ".pkl")) or pattern == "*" for pattern in PATTERNS
    )


def test_a_folder_without_weights_says_what_is_there(model):
    (model / "model.safetensors").unlink()
    assert "config.json, tokenizer.json" in refused(model)


def test_a_folder_without_a_configuration_is_no_model(model):
    (model / "config.json").unlink()
    assert "there is no config.json" in refused(model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"llama"', "{}", '{"model_type": 3}', '{"model_type": null}',
     "[" * 100_000, b"\xff\xfe"],
    ids=range(11),
)  # fmt: skip
@pytest.mark.parametrize("generation", [None, '{"eos_token_id": 2}', "[1]"])
def test_a_broken_configuration_is_a_model_error(model, text, generation):
    (model / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if generation:
        (model / "generation_config.json").write_text(generation)
    assert "config.json" in refused(model)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_damaged_configuration_is_read_or_refused(model, tiny_llama_folder, where, mask):
    data = bytearray((tiny_llama_folder / "config.json").read_bytes())
    data[int(where * len(data))] ^= mask
    (model / "config.json").write_bytes(data)
    try:
        resolve_model(str(model))
    except ModelError as error:
        assert str(model) in str(error)


@pytest.mark.parametrize("path", ["model.gguf", "some/where/model.Q4_K_M.gguf", "TheBloke/x.gguf"])
def test_a_gguf_file_that_is_not_there_is_refused(path):
    assert "no GGUF file here" in refused(path)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert "no model folder here" in refused(path)


def test_a_hub_model_that_is_not_in_the_cache_is_refused_offline(tmp_path):
    program = """
import sys
from mlx_qlora.errors import ModelError
from mlx_qlora.weights.source import resolve_model
try:
    resolve_model("mistralai/Mistral-7B-v0.1", revision="main")
except ModelError as error:
    print(error)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "not in the cache and the hub cannot be reached" in done.stdout
    assert "mistralai/Mistral-7B-v0.1 (revision main)" in done.stdout
    assert "Run: hf download mistralai/Mistral-7B-v0.1" in done.stdout


def test_a_hub_model_in_the_cache_needs_no_network(tmp_path, tiny_llama_folder):
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tiny_llama_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = (
        "from mlx_qlora.weights.source import *; s = resolve_model('some/model'); print(s.name, s.folder)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.stdout.split() == ["some/model", str(repository / "snapshots" / commit)], done.stderr


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_quantized_model_is_recognised(model, key):
    edit_config(model, **{key: {"group_size": 64, "bits": 4}})
    assert resolve_model(str(model)).is_quantized
    edit_config(model, **{key: None})
    assert not resolve_model(str(model)).is_quantized


def test_a_quantized_model_is_recognised_where_others_say_so(model):
    edit_config(model, text_config={"quantization_config": {"quant_method": "awq"}})
    assert resolve_model(str(model)).is_quantized
    edit_config(model, text_config={})
    assert not resolve_model(str(model)).is_quantized
    (model / "hf_quant_config.json").write_text("{}")
    assert resolve_model(str(model)).is_quantized


def test_the_fingerprint_does_not_depend_on_how_tensors_are_spread_over_files(model, tmp_path):
    for num_shards in (2, 5):
        folder = tmp_path / f"in-{num_shards}"
        folder.mkdir()
        save_sharded(folder, tensors_of(model), num_shards)
        assert fingerprint(folder) == fingerprint(model)


@pytest.mark.parametrize("change", ["first value", "last value", "type", "name", "shape", "one less"])
def test_the_fingerprint_changes_with(model, change):
    before = fingerprint(model)
    tensors = {name: mx.array(a) for name, a in tensors_of(model).items()}
    name = "model.embed_tokens.weight"
    if change == "first value":
        tensors[name][0, 0] += 1
    elif change == "last value":
        tensors[name][-1, -1] += 1
    elif change == "type":
        tensors[name] = tensors[name].view(mx.float16)
    elif change == "name":
        tensors["model.renamed.weight"] = tensors.pop(name)
    elif change == "shape":
        tensors[name] = tensors[name].reshape(-1, 32)
    else:
        del tensors[name]
    mx.eval(tensors)
    save_sharded(model, tensors, 1)
    assert fingerprint(model) != before
