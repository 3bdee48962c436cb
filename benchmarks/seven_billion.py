"""A 7B model trains in the memory of a small Mac: the presets, under a hard limit.

    python benchmarks/seven_billion.py --preset mac-8gb

A random model of Mistral-7B's shape in int4 (3.8 GiB of files, made once) takes two steps of the preset
through `mlx-qlora train`, in a Linux control group (root needed) with two thirds of the Mac's memory: 5.3 GiB
for 8 GB, 10.6 GiB for 16 GB. Every row fills the window. Printed: the peak of the process, what
`mlx-qlora plan` predicted, seconds. A CPU computes in float32, scales included: 0.4 GiB more than the
bfloat16 of a Mac. With a system BLAS and two cores a step of mac-8gb takes minutes; without one, hours.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from control_group import KILLED, run_limited
from rich.console import Console
from rich.table import Table

GIB = 1024**3
LIMITS_GIB = {"mac-8gb": 5.3, "mac-16gb": 10.6}
DEMO_MODEL = Path(__file__).parents[1] / "data" / "demo" / "model"
HIDDEN, MLP, LAYERS, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 32, 8, 128, 32_000
GROUP_SIZE, BITS = 64, 4


def main(
    preset: Annotated[list[str] | None, typer.Option(help="mac-8gb, mac-16gb; both when not given.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 2,
    accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches per step; the preset's own when not given.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Where the model is made, or found again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure the presets and print a table."""
    model = model or Path(tempfile.gettempdir(), "mlx_qlora-7b")
    if not (model / "config.json").exists():
        write_model(model)
    results = {name: measure(name, model, steps, accumulation) for name in preset or LIMITS_GIB}
    if as_json:
        print(json.dumps(results))
        return
    table = Table(title=f"Mistral-7B's shape, int4, {steps} steps", title_justify="left")
    for column in ("preset", "limit GiB", "peak GiB", "predicted GiB", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        sizes = [f"{result[key] / GIB:.2f}" for key in ("limit_bytes", "peak_bytes", "predicted_bytes")]
        table.add_row(name, *sizes, f"{result['seconds']:.0f}", f"{result['tokens_per_second']:.2f}")
    Console().print(table)


def measure(preset: str, model: Path, steps: int, accumulation: int | None) -> dict[str, Any]:
    """Plan and train one preset under its limit.

    Raises:
        SystemExit: the run did not come to its end.
    """
    limit_bytes = round(LIMITS_GIB[preset] * GIB)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        row = json.dumps({"prompt": "Conte até mil.", "completion": " ".join(map(str, range(1000)))})
        data.write_text(f"{row}\n" * 64, encoding="utf-8")
        run = ["--model", str(model), "--data", str(data), "--preset", preset]
        run += ["--set", f"training.max_steps={steps}", "--set", "data.valid_fraction=0"]
        run += ["--set", f"training.memory_budget_gib={LIMITS_GIB[preset]}"]
        run += ["--set", f"training.gradient_accumulation={accumulation}"] if accumulation else []
        plan = _object(run_limited([*_command("plan"), *run, "--json"], limit_bytes))
        say(f"{preset}: predicted {plan['peak_bytes'] / GIB:.2f} GiB; training …")
        trained = run_limited(
            [*_command("train"), *run, "--adapter-path", f"{folder}/adapter", "--force", "--json"],
            limit_bytes,
        )
    result = _object(trained)
    return {
        "limit_bytes": limit_bytes,
        "peak_bytes": result["peak_memory_bytes"],
        "predicted_bytes": plan["peak_bytes"],
        "predicted_parts": plan["parts"],
        "seconds": result["seconds"],
        "tokens_per_second": result["tokens_per_second"],
        "train_loss_nats": result["train_loss_nats"],
    }


def write_model(folder: Path) -> None:
    """Write the model a layer at a time, with the tokenizer of the embedded one."""
    import mlx.core as mx

    say(f"Making the model in {folder} …")
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    shards: dict[str, str] = {}
    for number, tensors in enumerate(_shards()):
        name = f"model-{number + 1:05d}.safetensors"
        mx.save_safetensors(str(folder / name), tensors, {"format": "mlx"})
        shards |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    for file in DEMO_MODEL.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    quantization = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization": quantization,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")  # last: the model is whole


def _shards() -> Iterator[dict[str, Any]]:
    import mlx.core as mx

    def norm() -> Any:
        return mx.ones((HIDDEN,), mx.bfloat16)

    yield _quantized("model.embed_tokens", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield (
            _quantized(f"{at}.self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN)
            | _quantized(f"{at}.self_attn.k_proj", KEY_HEADS * HEAD_DIM, HIDDEN)
            | _quantized(f"{at}.self_attn.v_proj", KEY_HEADS * HEAD_DIM, HIDDEN)
            | _quantized(f"{at}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
            | _quantized(f"{at}.mlp.gate_proj", MLP, HIDDEN)
            | _quantized(f"{at}.mlp.up_proj", MLP, HIDDEN)
            | _quantized(f"{at}.mlp.down_proj", HIDDEN, MLP)
            | {f"{at}.input_layernorm.weight": norm(), f"{at}.post_attention_layernorm.weight": norm()}
        )
    yield _quantized("lm_head", VOCABULARY, HIDDEN) | {"model.norm.weight": norm()}


def _quantized(name: str, rows: int, columns: int) -> dict[str, Any]:
    """Random codes, and scales that give the weights a standard deviation of 1 / √columns."""
    import mlx.core as mx

    packed = mx.random.randint(0, 2**16, (rows, columns * BITS // 16)).astype(mx.uint16).view(mx.uint32)
    scale = (12 / (columns * (4**BITS - 1))) ** 0.5
    scales = mx.full((rows, columns // GROUP_SIZE), scale, mx.bfloat16)
    biases = -scales * (2**BITS - 1) / 2
    return {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "mlx_qlora", name]


def _object(done: Any) -> dict[str, Any]:
    if done.returncode:
        reason = "killed at the memory limit" if done.returncode == KILLED else f"exit code {done.returncode}"
        raise SystemExit(f"{reason}: {' '.join(done.args)}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
