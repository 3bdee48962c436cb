"""Quantizing as a whole: the same bytes as mlx-lm's conversion, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qlora.quantization.schemes import Scheme, scheme_named
from mlx_qlora.storage import sha256_of
from mlx_qlora.weights import stream
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint
from tests.checkpoints import CONFIGS, make_checkpoint, raw, tensors_of

REPOSITORY = Path(__file__).parents[2]
SLOW = pytest.mark.slow
INT8_G32 = Scheme("int8", "affine", 8, 32)
SCHEMES = {
    "int4-g64": scheme_named("int4"),
    "int8-g32": INT8_G32,
    "mxfp4": scheme_named("mxfp4"),
    "nvfp4": scheme_named("nvfp4"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_llama_folder):
    """Every architecture in two shards, bfloat16."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, name, tiny_llama_folder, num_shards=2) for name in CONFIGS}


def mlx_lm_converts(source, output, scheme):
    from mlx_lm.convert import convert

    convert(
        str(source),
        str(output),
        quantize=True,
        q_bits=scheme.bits,
        q_group_size=scheme.group_size,
        q_mode=scheme.mode,
    )
    return output


def same_model(ours, theirs):
    """The names whose tensors differ; config.json is compared whole."""
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    return [n for n in a if (a[n].dtype, a[n].shape, raw(a[n])) != (b[n].dtype, b[n].shape, raw(b[n]))]


def logits_of(folder):
    from mlx_lm import load

    model, _ = load(str(folder))
    return model(mx.array([[3, 5, 7, 11, 13]])).astype(mx.float32)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_result_is_bit_for_bit_what_mlx_lm_writes(
    architecture, scheme, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)  # a few rows at a time
    source = checkpoints[architecture]
    quantize_checkpoint(resolve_model(str(source)), tmp_path / "ours", scheme, shard_bytes=20_000)
    theirs = mlx_lm_converts(source, tmp_path / "theirs", scheme)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert same_model(tmp_path / "ours", theirs) == []
    assert mx.array_equal(logits_of(tmp_path / "ours"), logits_of(theirs)).item()


def test_a_float32_source_is_cast_to_the_type_its_config_names(tmp_path, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)
    source = make_checkpoint(tmp_path / "source", "llama-untied", tiny_llama_folder, dtype=mx.float32)
    quantize_checkpoint(resolve_model(str(source)), tmp_path / "ours", SCHEMES["int4-g64"])
    theirs = mlx_lm_converts(source, tmp_path / "theirs", SCHEMES["int4-g64"])
    assert same_model(tmp_path / "ours", theirs) == []
    assert tensors_of(tmp_path / "ours")["model.norm.weight"].dtype == mx.bfloat16


def test_the_configuration_keeps_what_mlx_lm_keeps(tmp_path, tiny_llama_folder):
    odd = {
        "_name_or_path": "x",
        "vision_config": {},
        "limits": [{"__float__": "-Infinity"}],
        "torch_dtype": None,
    }
    source = make_checkpoint(tmp_path / "source", "llama-tied", tiny_llama_folder, **odd)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    quantize_checkpoint(resolve_model(str(source)), tmp_path / "ours", SCHEMES["int4-g64"])
    theirs = mlx_lm_converts(source, tmp_path / "theirs", SCHEMES["int4-g64"])
    assert same_model(tmp_path / "ours", theirs) == []


def start(program, *arguments, **options):
    """A Python program in a process of its own, with this repository on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        **options,
    )


SLOWLY = """
import sys, time
from pathlib import Path
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint

def on_bytes(done, total):
    print(done / total, flush=True)
    time.sleep(0.02)

quantize_checkpoint(
    resolve_model(sys.argv[1]), Path(sys.argv[2]), scheme_named("int4"), on_bytes=on_bytes, shard_bytes=15_000
)
"""


def identities(folder):
    stats = {path.name: path.stat() for path in folder.glob("model-*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_files_of_a_clean_run(checkpoints, tmp_path):
    source, output = checkpoints["llama-untied"], tmp_path / "out"
    partial, kept, shares = tmp_path / "out.partial", {}, [0.01, 0.35, 0.4, 0.8, 1.0]
    for share in shares:
        process = start(SLOWLY, source, output)
        for line in process.stdout:
            if float(line) >= share:
                break
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if share < 1:
            assert not output.exists()
            assert kept.items() <= identities(partial).items()
            kept = identities(partial)
    assert len(kept) >= 2
    finish = start(SLOWLY, source, output)
    _, errors = finish.communicate(timeout=120)
    assert finish.returncode == 0, errors
    assert kept.items() <= identities(output).items()
    assert not partial.exists()
    quantize_checkpoint(
        resolve_model(str(source)), tmp_path / "clean", scheme_named("int4"), shard_bytes=15_000
    )
    digests = [
        {path.name: sha256_of(path) for path in folder.iterdir()} for folder in (output, tmp_path / "clean")
    ]
    assert digests[0] == digests[1]


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["mlx-qlora", *sys.argv[2:]]
runpy.run_module("mlx_qlora", run_name="__main__")
"""


@pytest.mark.parametrize("limit", [100, pytest.param(5_000, marks=SLOW), pytest.param(30_000, marks=SLOW)])
def test_a_full_disk_is_one_clear_error_and_the_same_command_goes_on(limit, checkpoints, tmp_path):
    source, output = checkpoints["qwen2"], tmp_path / "out"
    process = start(
        LIMITED,
        limit,
        "quantize",
        source,
        "--output",
        output,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: The disk is full" in errors
    assert f"at: {output}.partial" in errors
    assert "Traceback" not in errors
    assert not output.exists()
    quantize_checkpoint(resolve_model(str(source)), output, scheme_named("int4"))
    theirs = mlx_lm_converts(source, tmp_path / "theirs", scheme_named("int4"))
    assert same_model(output, theirs) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], scheme_named("int4")),
        (["--scheme", "mxfp4"], scheme_named("mxfp4")),
        (["--scheme", "int8", "--group-size", "32"], INT8_G32),
        (["--mode", "nvfp4"], scheme_named("nvfp4")),
        (["--bits", "3"], scheme_named("int3")),
    ],
)
def test_the_command_takes_a_scheme_or_its_parts_and_reports_one_object(
    options, expected, checkpoints, tmp_path, capsys
):
    from mlx_qlora.__main__ import main

    source, output = checkpoints["llama-untied"], tmp_path / "out"
    command = ["quantize", str(source), "--output", str(output), "--skip", "lm_head", "--json", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlx-qlora", *command])
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
    assert not code
    report = json.loads(capsys.readouterr().out)
    written = tensors_of(output)
    assert report["output"] == str(output)
    assert report["skipped"] == [{"layer": "lm_head", "reason": "asked to be skipped"}]
    assert report["bytes"] == sum(array.nbytes for array in written.values())
    assert report["bits_per_weight"] == 8 * report["bytes"] / report["num_parameters"]
    assert report["peak_memory_bytes"] > 10 * 1024**2
    assert report["seconds"] > 0
    assert json.loads((output / "config.json").read_text())["quantization"] == expected.config()


GENERATE = """
import json, sys
from pathlib import Path
import mlx.core as mx
from tests.checkpoints import make_checkpoint
make_checkpoint(
    Path(sys.argv[1]), sys.argv[3], Path(sys.argv[2]), num_shards=3, **json.loads(sys.argv[4])
)
"""
MEASURED = """
import os, resource, sys
from pathlib import Path
import mlx_lm.utils
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.weights.source import resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint

unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
source = resolve_model(sys.argv[1])
before = peak()
quantize_checkpoint(source, Path(sys.argv[2]), scheme_named("int4"))
print(peak() - before)
"""


MANY_LAYERS = {
    "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32_000, "num_hidden_layers": 13,
    "num_attention_heads": 16, "head_dim": 64,
}  # fmt: skip
LARGE_EXPERTS = {  # stacked, the experts of one projection are 240 MiB
    "hidden_size": 2048, "intermediate_size": 7680, "num_hidden_layers": 1, "num_attention_heads": 16,
    "head_dim": 128, "num_local_experts": 8,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"), [("llama-untied", MANY_LAYERS), ("mixtral", LARGE_EXPERTS)]
)
def test_memory_stays_far_below_the_model_s_size(architecture, config, tmp_path, tiny_llama_folder):
    made = start(GENERATE, tmp_path / "source", tiny_llama_folder, architecture, json.dumps(config))
    assert made.wait(300) == 0, made.communicate()[1]
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert size > 500e6
    process = start(MEASURED, tmp_path / "source", tmp_path / "out")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert int(printed) < 256 * 1024**2
