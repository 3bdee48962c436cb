"""Fusing as a whole: the folder computes what base and adapter do, and says beforehand what it loses."""

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_qlora.__main__ import load_command, run
from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.errors import AdapterError, ConfigError, StorageError
from mlx_qlora.exchange import fuse_write
from mlx_qlora.exchange.fuse import LossError, Measuring, fuse
from mlx_qlora.exchange.fuse_base import find_base, lazy_model
from mlx_qlora.exchange.fuse_plan import FuseFormat
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, read_adapter_info, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.weights.bitsandbytes_export import export_bitsandbytes
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.source import resolve_model
from tests.checkpoints import make_checkpoint, raw, tensors_of

REPOSITORY = Path(__file__).parents[2]
DEQUANTIZED = FuseFormat(dequantize=True, dtype="float32")
TOKENS = [[3, 5, 7, 11, 13, 17, 19, 2, 4]]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
PHI3 = {"model_type": "phi3", "rope_scaling": None, "tie_word_embeddings": False}
TARGETS = ("q_proj", "v_proj", "down_proj")
STORAGE_ERROR = {
    "none": 0.005,
    "int3": 0.36,
    "int8": 0.013,
    "mxfp4": 0.32,
    "mxfp8": 0.06,
    "nvfp4": 0.25,
    "nf4": 0.20,
    "nf4-dq": 0.21,
}
"""What storing fused weights may do to the logits of a model of random weights: a tenth above measured."""


def make_adapter(folder, model, quantization="int4", *, size=0.02, template="", targets=TARGETS, **lora):
    """An adapter with a B that does something, for the base stored so."""
    config = ModelConfig(path=str(model))
    stored = QuantizationConfig(scheme=quantization) if isinstance(quantization, str) else quantization
    base = find_base(config, stored)
    module, _ = base.model()
    settings = LoraConfig(**{"rank": 4, "target_modules": targets, **lora})
    attach(module, settings, 0)
    noise = [
        (f"{path}.lora_b", size * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i)))
        for i, (path, layer) in enumerate(module.named_modules())
        if "lora_b" in layer
    ]
    module.update(tree_unflatten(noise))
    info = AdapterInfo(
        model=config,
        quantization=stored,
        lora=settings,
        fingerprint=base.fingerprint,
        chat_template=template,
        chat_template_sha256=text_sha256(template),
    )
    save_adapter(folder, adapter_tensors(module), info, len(module.layers))
    return folder


def adapted_logits(adapter, dtype="float32"):
    model = load_assistant(adapter_path=adapter, dtype=dtype).model
    return model(mx.array(TOKENS)).astype(mx.float32)


def logits_of(folder):
    """By mlx-lm alone."""
    from mlx_lm import load

    return load(str(folder))[0](mx.array(TOKENS)).astype(mx.float32)


def apart(a, b):
    """Relative error."""
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_llama_folder):
    root = tmp_path_factory.mktemp("checkpoints")
    kinds = {"llama-untied": {}, "llama-tied": {}, "qwen2": {}, "gemma2": {}, "phi3": PHI3}
    return {
        name: make_checkpoint(
            root / name, "llama-untied" if name == "phi3" else name, tiny_llama_folder, num_shards=2, **config
        )
        for name, config in kinds.items()
    }


@pytest.fixture(scope="module")
def lossy(checkpoints, tmp_path_factory):
    """An adapter so small that MLX's own rounding to int4 loses it."""
    return make_adapter(tmp_path_factory.mktemp("lossy") / "adapter", checkpoints["llama-untied"], size=0.01)


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        *((name, "lora") for name in ("llama-untied", "llama-tied", "qwen2", "gemma2", "phi3")),
        ("qwen2", "dora"),
        ("llama-untied", "rslora"),
    ],
)
def test_a_dequantized_model_computes_what_base_and_adapter_do(architecture, variant, checkpoints, tmp_path):
    targets = ("qkv_proj", "o_proj", "gate_up_proj") if architecture == "phi3" else TARGETS
    adapter = make_adapter(
        tmp_path / "adapter", checkpoints[architecture], size=0.3, variant=variant, targets=targets
    )
    result = fuse(adapter, tmp_path / "out", DEQUANTIZED)
    assert apart(logits_of(tmp_path / "out"), adapted_logits(adapter)) < 1e-5
    assert result.loss.logits.relative_error < 1e-5
    assert result.loss.logits.base_kl_nats > 1e-2
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["none", "int3", "int8", "mxfp4", "mxfp8", "nvfp4", "nf4", "nf4-dq"])
def test_every_stored_format_is_fused_exactly_and_again_in_itself(scheme, checkpoints, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama-tied"], scheme, size=0.3)
    fuse(adapter, tmp_path / "exact", DEQUANTIZED)
    wanted = adapted_logits(adapter)
    assert apart(logits_of(tmp_path / "exact"), wanted) < 1e-5
    result = fuse(adapter, tmp_path / "again", accept_loss=True)
    before, after = tensors_of(result.base_folder), tensors_of(tmp_path / "again")
    kinds = [{name: (a.dtype, a.shape) for name, a in each.items()} for each in (before, after)]
    assert kinds[0] == kinds[1]
    for name, array in before.items():
        path, _, leaf = name.rpartition(".")
        is_same = raw(array) == raw(after[name])
        assert is_same if path not in result.loss.layers else (leaf != "weight" or not is_same), name
    found = load_assistant(str(tmp_path / "again"), dtype="float32").model(mx.array(TOKENS))
    assert apart(found, wanted) < STORAGE_ERROR[scheme]


def test_a_bitsandbytes_folder_is_fused(checkpoints, tmp_path):
    from mlx_qlora.quantization.schemes import scheme_named
    from mlx_qlora.weights.stream import quantize_checkpoint

    source = resolve_model(str(checkpoints["llama-untied"]))
    quantize_checkpoint(source, tmp_path / "nf4", scheme_named("nf4-dq"))
    export_bitsandbytes(resolve_model(str(tmp_path / "nf4")), tmp_path / "bnb")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "bnb", "none", size=0.3)
    fuse(adapter, tmp_path / "exact", DEQUANTIZED)
    assert apart(logits_of(tmp_path / "exact"), adapted_logits(adapter)) < 1e-5
    result = fuse(adapter, tmp_path / "again", accept_loss=True)
    assert result.schemes["nf4-dq-g64"] == 14
    again = load_assistant(str(tmp_path / "again"), dtype="float32").model(mx.array(TOKENS))
    assert apart(again, adapted_logits(adapter)) < 0.3


def test_a_model_imported_from_gguf_is_fused(material, tmp_path):
    file = material / "gguf" / "stories260k" / "stories260K-q8_0.gguf"
    adapter = make_adapter(tmp_path / "adapter", file, "none", size=0.3, targets=("q_proj", "v_proj"))
    fuse(adapter, tmp_path / "exact", DEQUANTIZED)
    assert apart(logits_of(tmp_path / "exact"), adapted_logits(adapter)) < 1e-5
    result = fuse(adapter, tmp_path / "again")
    assert result.loss.logits.lost_share < 0.01


def test_a_sixteen_bit_output_is_the_exact_sum_rounded_once(checkpoints, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama-untied"], size=0.3)
    fuse(adapter, tmp_path / "exact", DEQUANTIZED)
    result = fuse(adapter, tmp_path / "half", FuseFormat(dequantize=True))
    exact, half = tensors_of(tmp_path / "exact"), tensors_of(tmp_path / "half")
    assert {array.dtype for array in half.values()} == {mx.bfloat16}
    assert all(mx.array_equal(half[name], exact[name].astype(mx.bfloat16)).item() for name in exact)
    assert result.schemes == {"bfloat16": 16}


def test_what_is_said_beforehand_is_true_of_the_folder(lossy, tmp_path):
    """Measured anew from the two models on disk, by NumPy, on the same rows."""
    from mlx_qlora.exchange.fuse_sample import text_sample

    said = []
    fuse(lossy, tmp_path / "out", accept_loss=True, on_loss=said.append)
    adapted, fused = load_assistant(adapter_path=lossy), load_assistant(str(tmp_path / "out"))
    sample = text_sample(fused.tokenizer)
    places = np.nonzero(sample.counted_BT)
    logs = []
    for assistant in (adapted, fused):
        logits = np.array(assistant.model(mx.array(sample.tokens_BT)).astype(mx.float32), np.float64)[places]
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert said[0].logits.kl_nats == pytest.approx(kl, rel=1e-3)


def test_plain_rounding_to_int4_loses_a_small_update_and_is_refused(lossy, tmp_path):
    with pytest.raises(LossError, match="Nothing was written") as caught:
        fuse(lossy, tmp_path / "out", FuseFormat(compensate=False))
    assert caught.value.exit_code == 2
    for way in ("--bits 8", "--adapted-scheme int8", "--dequantize", "--accept-loss"):
        assert way in caught.value.run
    assert [path for path in tmp_path.iterdir() if path != lossy] == []


def test_mlx_lm_loses_the_same_update_without_a_word_and_ours_says_how_much(lossy, tmp_path):
    from mlx_lm import load
    from mlx_lm.tuner.lora import LoRALinear

    info = read_adapter_info(lossy)
    base = find_base(info.model, info.quantization).folder
    theirs, _ = load(str(base), adapter_path=str(lossy))
    fused = [(n, m.fuse()) for n, m in theirs.named_modules() if isinstance(m, LoRALinear)]
    theirs.update_modules(tree_unflatten(fused))
    wanted, bare = adapted_logits(lossy), load_assistant(str(base), dtype="float32").model(mx.array(TOKENS))
    theirs_lost = apart(theirs(mx.array(TOKENS)).astype(mx.float32), wanted) / apart(bare, wanted)
    said = []
    with pytest.raises(LossError):
        fuse(lossy, tmp_path / "out", FuseFormat(compensate=False), on_loss=said.append)
    loss = said[0]
    assert theirs_lost > 0.5
    assert loss.weights.error > 0.8
    assert loss.logits.lost_share > 0.3


@pytest.mark.parametrize(
    "form",
    [
        FuseFormat(quantization=QuantizationConfig(scheme="int8")),
        FuseFormat(adapted_scheme="int8"),
        FuseFormat(adapted_scheme="none"),
        FuseFormat(dequantize=True),
    ],
    ids=["--bits 8", "--adapted-scheme int8", "--adapted-scheme none", "--dequantize"],
)
def test_each_way_out_keeps_the_update(form, lossy, tmp_path):
    result = fuse(lossy, tmp_path / "out", form)
    wanted = adapted_logits(lossy)
    base = load_assistant(str(result.base_folder), dtype="float32").model(mx.array(TOKENS))
    fused = load_assistant(str(tmp_path / "out"), dtype="float32").model(mx.array(TOKENS))
    assert apart(fused, wanted) < 0.35 * apart(base, wanted)
    assert result.loss.logits.lost_share < 0.1
    assert result.loss.weights.survived == pytest.approx(1, abs=0.02)


def test_compensation_keeps_more_of_the_update_in_the_weights_at_the_same_size(lossy, tmp_path):
    plain = fuse(lossy, tmp_path / "plain", FuseFormat(compensate=False), accept_loss=True)
    ours = fuse(lossy, tmp_path / "ours", accept_loss=True)
    assert ours.bytes == plain.bytes
    assert abs(1 - ours.loss.weights.survived) < abs(1 - plain.loss.weights.survived)


@pytest.mark.slow
def test_a_faint_trained_update_is_kept_where_plain_rounding_loses_it(tmp_path):
    """Random weights show the opposite: the feedback is for updates that were learned."""
    from mlx_qlora.config import build_config, read_config
    from mlx_qlora.training.run import train

    demo = REPOSITORY / "data" / "demo"
    paths = {"model": {"path": str(demo / "model")}, "data": {"path": str(demo / "club")}}
    config = build_config(read_config(demo / "run.yaml"), paths, {"training": {"learning_rate": 3e-4}})
    train(config, tmp_path / "adapter")
    measuring = Measuring(data=str(demo / "club"))
    lost = {
        compensate: fuse(
            tmp_path / "adapter",
            tmp_path / f"out-{compensate}",
            FuseFormat(compensate=compensate),
            measuring=measuring,
            accept_loss=True,
        ).loss
        for compensate in (True, False)
    }
    assert lost[False].logits.lost_share > 0.3
    assert lost[True].logits.lost_share < 0.05
    ours = lost[True].logits
    assert ours.fused_loss_nats < ours.adapted_loss_nats + 0.02
    assert lost[False].logits.fused_loss_nats > ours.fused_loss_nats + 0.05


def test_without_logits_the_weights_decide(lossy, tmp_path):
    with pytest.raises(LossError, match="without a look at the logits"):
        fuse(lossy, tmp_path / "out", measuring=Measuring(logits=False))
    result = fuse(
        lossy,
        tmp_path / "out",
        FuseFormat(adapted_scheme="none", dtype="float32"),
        measuring=Measuring(logits=False),
    )
    assert result.loss.logits is None


def test_validation_rows_give_perplexities(checkpoints, tmp_path):
    rows = [{"prompt": f"o clube {i}", "completion": "venceu a partida"} for i in range(40)]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        chosen = rows[:30] if split == "train" else rows[30:]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama-untied"], size=0.3, template=TEMPLATE)
    loss = fuse(adapter, tmp_path / "out", measuring=Measuring(data=str(data))).loss
    assert loss.is_validation
    assert loss.logits.num_tokens > 30
    assert loss.logits.adapted_perplexity != loss.logits.base_perplexity
    few = fuse(adapter, tmp_path / "few", measuring=Measuring(data=str(data), max_tokens=2)).loss
    assert 0 < few.logits.num_tokens < loss.logits.num_tokens


def test_the_folder_says_where_it_comes_from_and_no_adapter_of_the_base_fits_it(checkpoints, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama-untied"], size=0.3, template=TEMPLATE)
    result = fuse(adapter, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"] == result.base == str(checkpoints["llama-untied"].resolve())
    assert manifest["adapter"]["path"] == str(adapter)
    assert manifest["base_fingerprint"] == read_adapter_info(adapter).fingerprint
    assert manifest["base_quantization"]["scheme"] == "int4"
    assert manifest["loss"]["logits"]["kl_nats"] == result.loss.logits.kl_nats
    fused = load_assistant(str(tmp_path / "out"))
    assert fused.tokenizer._tokenizer.chat_template == TEMPLATE
    with pytest.raises(AdapterError, match="other weights"):
        load_assistant(str(tmp_path / "out"), adapter_path=adapter)


def test_an_adapter_of_another_base_is_refused(checkpoints, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", checkpoints["llama-untied"])
    with pytest.raises(AdapterError, match="other weights"):
        fuse(adapter, tmp_path / "out", model=str(checkpoints["qwen2"]))
    with pytest.raises(AdapterError, match="no adapter here"):
        fuse(tmp_path, tmp_path / "out")


def test_wrong_wishes_are_refused_before_anything_is_read(lossy, tmp_path):
    with pytest.raises(ConfigError, match="no scheme 'int9'"):
        fuse(lossy, tmp_path / "out", FuseFormat(adapted_scheme="int9"))
    with pytest.raises(ConfigError, match="has no scheme"):
        FuseFormat(dequantize=True, adapted_scheme="int8")
    with pytest.raises(ConfigError, match="float64"):
        FuseFormat(dtype="float64")


def test_something_under_the_name_is_left_untouched(lossy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="something here already"):
        fuse(lossy, tmp_path / "out", DEQUANTIZED)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_disk_without_room_is_named_before_anything_is_measured(lossy, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fuse_write.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(StorageError, match="are needed"):
        fuse(lossy, tmp_path / "deep" / "out", DEQUANTIZED, on_loss=lambda _: pytest.fail("measured"))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_qlora.exchange.fuse import fuse
from mlx_qlora.exchange.fuse_plan import FuseFormat

def on_bytes(done, total):
    if done * 2 >= total:
        os.kill(os.getpid(), signal.SIGKILL)

form = FuseFormat(dequantize=True)
fuse(Path(sys.argv[1]), Path(sys.argv[2]), form, on_bytes=on_bytes, shard_bytes=100_000)
"""


def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_cleans_up(lossy, tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(lossy), str(tmp_path / "out")], cwd=REPOSITORY, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    seen = []
    fuse(lossy, tmp_path / "out", DEQUANTIZED, on_bytes=lambda *s: seen.append(s), shard_bytes=100_000)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_the_command_prints_one_object_and_all_else_elsewhere(lossy, tmp_path, capsys):
    command = load_command("fuse")
    arguments = ["--adapter-path", str(lossy), "--output"]
    assert run(command, [*arguments, str(tmp_path / "out"), "--bits", "8", "--json"]) == 0
    said = capsys.readouterr()
    values = json.loads(said.out)
    assert values["schemes"] == {"int8-g64": 16}
    assert values["loss"]["logits"]["lost_share"] < 0.1
    first = values["loss"]["layers"]["model.layers.0.self_attn.q_proj"]
    assert first["delta_survived"] == pytest.approx(1, abs=0.1)
    assert "lost of what the adapter does" in said.err
    assert run(command, [*arguments, str(tmp_path / "no"), "--plain-rounding", "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: This format loses" in said.err
    assert "--accept-loss" in said.err
    assert not (tmp_path / "no").exists()


MEASURED = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_qlora.exchange.fuse import Measuring, fuse
from mlx_qlora.exchange.fuse_plan import FuseFormat

mx.set_cache_limit(0)
dequantize = sys.argv[3] == "dequantize"
fuse(Path(sys.argv[1]), Path(sys.argv[2]), FuseFormat(dequantize=dequantize), accept_loss=True)
print(mx.get_peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["again", "dequantize"])
def test_the_peak_is_that_of_a_few_tensors_whatever_the_model_has(kind, tiny_llama_folder, tmp_path):
    """By MLX's own count of array bytes: five times the layers take less than one layer more."""
    peaks = []
    sizes = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64}
    for layers in (2, 10):
        model = make_checkpoint(
            tmp_path / f"model{layers}", "llama-untied", tiny_llama_folder, num_hidden_layers=layers, **sizes
        )
        adapter = make_adapter(tmp_path / f"adapter{layers}", model)
        adapter_bytes = (adapter / "adapters.safetensors").stat().st_size
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(adapter), str(tmp_path / f"out{layers}"), kind],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.splitlines()[-1]) - 3 * adapter_bytes)
    block_bytes = 4 * (4 * 256 * 256 + 3 * 256 * 704)
    assert peaks[1] - peaks[0] < block_bytes


def test_a_lazy_model_reads_nothing(checkpoints):
    before = mx.get_active_memory()
    model, config = lazy_model(checkpoints["llama-untied"])
    assert config["model_type"] == "llama"
    assert mx.get_active_memory() - before < 10_000
    del model
