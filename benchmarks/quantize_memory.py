"""Peak memory and time of quantizing a checkpoint: ours, and mlx-lm's conversion.

    python benchmarks/quantize_memory.py --gigabytes 3

A bfloat16 Llama of about that size is made in a temporary folder and removed at the end. Each run is a
process of its own; they alternate. Peak memory is the kernel's ru_maxrss of that process, which counts
file-backed pages too. The two results must be identical, tensor by tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "data" / "demo" / "model"
HIDDEN, INTERMEDIATE, VOCAB = 2048, 5632, 32_000
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)


@dataclass(frozen=True)
class Cost:
    """What one process took."""

    seconds: float
    peak_rss_bytes: int
    """Includes file-backed pages."""


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint, in 10^9 bytes.")] = 3.0,
    repetitions: Annotated[int, typer.Option(help="Runs of each; the table has their medians.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure both, check that the results are identical, print a table."""
    with tempfile.TemporaryDirectory(prefix="quantize_memory_") as temporary:
        result = measure(Path(temporary), gigabytes, repetitions)
    if as_json:
        print(json.dumps(result))
    else:
        print_table(result)
    if result["different_tensors"]:
        raise SystemExit(f"{len(result['different_tensors'])} tensors differ")


def measure(folder: Path, gigabytes: float, repetitions: int) -> dict:
    """Run everything; medians over the repetitions."""
    source, ours, theirs = folder / "source", folder / "ours", folder / "theirs"
    in_process(sys.executable, __file__, "generate", str(source), str(gigabytes))
    commands = {
        "interpreter": [sys.executable, "-c", "import mlx.core, mlx_lm.convert"],
        "ours": [sys.executable, "-m", "mlx_qlora", "quantize", str(source), "--output", str(ours),
                 "--bits", "4", "--group-size", "64", "--json"],
        "mlx_lm": [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path",
                   str(theirs), "-q", "--q-group-size", "64", "--q-bits", "4"],
    }  # fmt: skip
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, command in commands.items():
            for output in {"ours": [ours], "mlx_lm": [theirs]}.get(name, []):
                shutil.rmtree(output, ignore_errors=True)
            costs[name].append(in_process(*command))
    medians = {name: asdict(median(runs)) for name, runs in costs.items()}
    base = medians["interpreter"]["peak_rss_bytes"]
    mine, other = medians["ours"], medians["mlx_lm"]
    return {
        "source_bytes": size_of(source),
        "result_bytes": size_of(ours),
        "repetitions": repetitions,
        **medians,
        "rss_ratio": mine["peak_rss_bytes"] / other["peak_rss_bytes"],
        "rss_above_interpreter_ratio": (mine["peak_rss_bytes"] - base) / (other["peak_rss_bytes"] - base),
        "seconds_ratio": mine["seconds"] / other["seconds"],
        "different_tensors": differences(ours, theirs),
    }


def in_process(*command: str) -> Cost:
    """Run a command to its end in a process of its own; what it prints goes to stderr."""
    started = time.perf_counter()
    child = os.posix_spawn(
        command[0], command, {**os.environ, "HF_HUB_OFFLINE": "1"}, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)]
    )
    _, status, usage = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"exit code {code}: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(time.perf_counter() - started, usage.ru_maxrss * unit)


def median(costs: list[Cost]) -> Cost:
    """Median of each figure."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        round(statistics.median(cost.peak_rss_bytes for cost in costs)),
    )


def generate(folder: Path, gigabytes: float) -> None:
    """A random bfloat16 Llama, one file per layer, tensors made one by one."""
    import mlx.core as mx

    num_layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": num_layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    square, up, down = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    parts = {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down,
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    files = [
        {f"model.layers.{i}.{part}.weight": shape for part, shape in parts.items()} for i in range(num_layers)
    ]
    ends = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    files.append({f"{name}.weight": shape for name, shape in ends.items()})
    weight_map = {}
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: (0.02 * mx.random.normal(s)).astype(mx.bfloat16) for name, s in shapes.items()}
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def differences(ours: Path, theirs: Path) -> list[str]:
    """Tensors that only one has, or whose type, shape or bytes differ."""
    import mlx.core as mx

    loaded = []
    for folder in (ours, theirs):
        files = sorted(folder.glob("model*.safetensors"))
        loaded.append({name: array for file in files for name, array in mx.load(str(file)).items()})
    a, b = loaded
    different = sorted(a.keys() ^ b.keys())
    for name in sorted(a.keys() & b.keys()):
        x, y = a.pop(name), b.pop(name)
        if x.dtype != y.dtype or x.shape != y.shape or not mx.array_equal(x.view(mx.uint8), y.view(mx.uint8)):
            different.append(name)
    return different


def size_of(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def print_table(result: dict) -> None:
    """For a person."""
    source, written = result["source_bytes"] / 1e9, result["result_bytes"] / 1e9
    table = Table(title=f"Quantizing {source:.2f} GB to {written:.2f} GB, 4 bits in groups of 64")
    for column in ("process", "peak RSS (MiB)", "above the interpreter (MiB)", "seconds"):
        table.add_column(column, justify="left" if column == "process" else "right")
    base = result["interpreter"]["peak_rss_bytes"]
    for name, label in {"interpreter": "imports only", "ours": "mlx_qlora", "mlx_lm": "mlx-lm"}.items():
        peak = result[name]["peak_rss_bytes"]
        mib = (f"{peak / 2**20:.0f}", f"{(peak - base) / 2**20:.0f}")
        table.add_row(label, *mib, f"{result[name]['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"Peak RSS counts file-backed pages. Median of {result['repetitions']}.")
    console.print(f"Tensors that differ: {len(result['different_tensors'])}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["generate"]:
        generate(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        typer.run(main)
