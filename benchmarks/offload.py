"""A model of three times the memory there is: what it costs to leave its layers in their files.

    python benchmarks/offload.py

A random Llama in int4 answers and trains by `mlx-qlora infer` and `mlx-qlora train`, each as a process in a
Linux control group (root needed) with a third of the model's size, file cache included: resident, and with
--offload. The same again with as much memory as it likes: what reading costs where the system keeps the pages
of the files. The disk decides what it costs where it cannot, so the disk's own speed is printed too, and
whether all answers, and all trained adapters, are equal to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from control_group import KILLED, run_limited
from pairing import environment
from random_llama import DEMO_MODEL
from rich.console import Console
from rich.table import Table

MIB, GIB = 1024**2, 1024**3
UNLIMITED = 1024 * GIB
GROUP_SIZE, BITS = 64, 4
VOCABULARY = 8192
"""Small: on a CPU the head is unpacked for the loss, and with 32,000 rows that alone takes 250 MiB."""
BITS_PER_WEIGHT = BITS + 2 * 16 / GROUP_SIZE
QUESTION = "Conte até dez, devagar."


@dataclass(frozen=True)
class Side:
    """One way to run the model."""

    name: str
    limit_bytes: int
    is_offloaded: bool


@dataclass(frozen=True)
class Size:
    """How much is run."""

    limit_mib: int
    budget_mib: int
    tokens: int
    steps: int
    length: int


def main(
    limit_mib: Annotated[int, typer.Option(help="What a process may take.")] = 700,
    budget_mib: Annotated[int, typer.Option(help="What its weights may take.")] = 250,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 64.")] = 2048,
    times: Annotated[float, typer.Option(help="Size of the model, in limits.")] = 3.0,
    tokens: Annotated[int, typer.Option(help="To generate.")] = 4,
    steps: Annotated[int, typer.Option(help="To train, one row each.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure and print a table."""
    size = Size(limit_mib, budget_mib, tokens, steps, length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("Making the model …")
        layers = write_model(folder / "model", hidden, round(times * limit_mib * MIB))
        _write_data(folder / "data.jsonl", steps)
        limited, unlimited = limit_mib * MIB, UNLIMITED
        sides = [
            Side("resident, limited", limited, is_offloaded=False),
            Side("offload, limited", limited, is_offloaded=True),
            Side("resident, unlimited", unlimited, is_offloaded=False),
            Side("offload, unlimited", unlimited, is_offloaded=True),
        ]
        files = sorted((folder / "model").glob("*.safetensors"))
        results: dict[str, Any] = {
            "model_bytes": sum(file.stat().st_size for file in files),
            "layers": layers,
            "limit_bytes": limited,
            "budget_bytes": budget_mib * MIB,
            "disk_bytes_per_second": _disk_bytes_per_second(files),
            "sides": {side.name: measured(side, folder, size) for side in sides},
        }
    if as_json:
        print(json.dumps(results))
        return
    _print(results, size)


def measured(side: Side, folder: Path, size: Size) -> dict[str, Any]:
    """Answer and train on one side."""
    say(f"{side.name}: infer …")
    answer = _infer(side, folder, size)
    say(f"{side.name}: train …")
    run = _train(side, folder, size)
    return {"infer": answer, "train": run}


def _infer(side: Side, folder: Path, size: Size) -> dict[str, Any]:
    command = [QUESTION, "--model", str(folder / "model"), "--max-tokens", str(size.tokens), "--json"]
    command += ["--offload", "--offload-budget-gib", str(size.budget_mib / 1024)] if side.is_offloaded else []
    done = run_limited(_command("infer", command), side.limit_bytes, environment(has_blas=True))
    return _result(done, ("text", "tokens_per_second", "first_token_seconds", "generation_tokens"))


def _train(side: Side, folder: Path, size: Size) -> dict[str, Any]:
    adapter = folder / side.name.replace(", ", "-")
    settings: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "data.jsonl"), "max_seq_length": size.length, "valid_fraction": 0},
        "training": {
            "max_steps": size.steps,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "gradient_checkpointing": True,
        },
    }
    if side.is_offloaded:
        settings["model"] |= {"offload": True, "offload_budget_gib": size.budget_mib / 1024}
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    options = ["--config", str(config), "--adapter-path", str(adapter), "--force", "--json"]
    done = run_limited(_command("train", options), side.limit_bytes, environment(has_blas=True))
    keys = ("train_loss_nats", "seconds", "tokens_per_second", "peak_memory_bytes")
    result = _result(done, keys)
    if result["ended"] == "completed":
        weights = (adapter / "adapters.safetensors").read_bytes()
        result["adapter_sha256"] = hashlib.sha256(weights).hexdigest()
    return result


def _result(done: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if done.returncode == KILLED:
        return {"ended": "killed by the kernel"}
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(done.args)}\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    notes = [line for line in done.stderr.splitlines() if "offload:" in line]
    return {"ended": "completed", **{key: found[key] for key in keys}, "notes": notes}


def write_model(folder: Path, hidden: int, model_bytes: int) -> int:
    """Write a Llama of about that size, one layer at a time; the number of layers."""
    import mlx.core as mx

    mlp = hidden * 11 // 4 // 64 * 64
    layers = max(1, round(model_bytes * 8 / BITS_PER_WEIGHT / (4 * hidden**2 + 3 * hidden * mlp)))
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "quantization": {"group_size": GROUP_SIZE, "bits": BITS},
    }
    folder.mkdir()
    mx.random.seed(0)
    norm = mx.ones((hidden,), mx.bfloat16)
    ends = _quantized("model.embed_tokens", VOCABULARY, hidden) | _quantized("lm_head", VOCABULARY, hidden)
    mx.save_safetensors(str(folder / "model-00000.safetensors"), {**ends, "model.norm.weight": norm})
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.input_layernorm.weight": norm, f"{at}.post_attention_layernorm.weight": norm}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors |= _quantized(f"{at}.self_attn.{name}", hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            tensors |= _quantized(f"{at}.mlp.{name}", mlp, hidden)
        tensors |= _quantized(f"{at}.mlp.down_proj", hidden, mlp)
        mx.save_safetensors(str(folder / f"model-{layer + 1:05d}.safetensors"), tensors)
    for file in DEMO_MODEL.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return layers


def _quantized(name: str, rows: int, columns: int) -> dict[str, Any]:
    """Random codes, and scales that give the weights a standard deviation of 1 / √columns."""
    import mlx.core as mx

    packed = mx.random.randint(0, 2**16, (rows, columns * BITS // 16)).astype(mx.uint16).view(mx.uint32)
    scale = (12 / (columns * (4**BITS - 1))) ** 0.5
    scales = mx.full((rows, columns // GROUP_SIZE), scale, mx.bfloat16)
    return {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": -scales * (2**BITS - 1) / 2}


def _write_data(path: Path, steps: int) -> None:
    row = json.dumps({"prompt": "Conte.", "completion": " ".join(map(str, range(1000)))})
    path.write_text(f"{row}\n" * max(steps, 8), encoding="utf-8")


def _disk_bytes_per_second(files: list[Path]) -> float:
    """Of one pass over the files, past the page cache where the system lets go of it."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started, total, block = time.perf_counter(), 0, bytearray(16 * MIB)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                total += count
    return total / (time.perf_counter() - started)


def _print(results: dict[str, Any], size: Size) -> None:
    title = (
        f"{results['model_bytes'] / MIB:,.0f} MiB of weights, {results['layers']} layers; limit "
        f"{size.limit_mib} MiB, of it weights {size.budget_mib} MiB; "
        f"disk {results['disk_bytes_per_second'] / MIB:,.0f} MiB/s"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "infer", "tokens/s", "train", "s/step", "peak MiB", "loss, nats"):
        table.add_column(column)
    for name, side in results["sides"].items():
        infer, train = side["infer"], side["train"]
        cells = [f"{infer['tokens_per_second']:.2f}" if "text" in infer else "–", train["ended"]]
        if "seconds" in train:
            cells += [f"{train['seconds'] / size.steps:.1f}", f"{train['peak_memory_bytes'] / MIB:.0f}"]
            cells += [f"{train['train_loss_nats']:.6f}"]
        table.add_row(name, infer["ended"], *cells)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for what, key in (("infer", "text"), ("train", "adapter_sha256")):
        values = [side[what][key] for side in results["sides"].values() if key in side[what]]
        verdict = "equal" if len(set(values)) == 1 else "DIFFERENT"
        console.print(f"{what}: {len(values)} completed, {key} {verdict}")


def _command(name: str, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "mlx_qlora", name, *options]


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
