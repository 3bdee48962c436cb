"""The memory plan against measured runs: on runs its constants were fitted to, and on others.

    python benchmarks/memory_model.py                    # measures 58 runs; 12 are for testing
    python benchmarks/memory_model.py --measured runs.json   # the same figures again, without the runs

Each run is `mlx_qlora.training.run.train` on a random model, two updates, in a process of its own, after
another process has made the model and quantized it. Measured is the kernel's VmHWM: the most the process
had resident, interpreter included. What `mlx-qlora plan` reads off the configuration is compared with it.

    python benchmarks/memory_model.py --measured runs.json --fit   # prints new constants for memory/plan.py

The bytes of weights, low-rank tensors, optimizer state and of each array of a step are not fitted: they
follow from shapes. The constants in `memory/plan.py` say how many arrays of a size are alive at the peak, and
what the process takes beyond its arrays.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mlx_qlora.memory.plan import (
    CONSTANT_NAMES,
    Constants,
    Step,
    Workload,
    outside_terms,
    phase_terms,
    update_bytes,
)

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "data" / "demo" / "model"
MIB = 1024**2
NUM_FIT, NUM_TEST, NUM_DEEP = 44, 12, 2
"""Runs, in this order; the deep ones are for the fit."""
AIM = 0.01
"""The fit aims so much above what was measured: a run must not be let in that is then killed."""
STARTS = 12
UNITS_C = np.array([value if value > 1 else 1.0 for value in asdict(Constants()).values()])
"""About how large each constant is."""
WORK = 4e11
"""Multiplications and additions of one run, about: some seconds to half a minute on two cores."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 64, "final_logit_softcapping": 30.0},
    "phi3": {"tie_word_embeddings": False},
    "cohere": {"logit_scale": 0.25},
}
ATTENTION, ALL = (
    ["q_proj", "k_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
)


def run_tree(index: int) -> dict[str, Any]:
    """The model and the configuration of run `index`, a function of the index alone."""
    rng = np.random.default_rng([2026, index])
    one = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    is_wide = index % 11 == 5
    name = one("llama", "mistral") if is_wide else list(ARCHITECTURES)[index % len(ARCHITECTURES)]
    hidden = one(2048, 3072, 4096) if is_wide else int(one(256, 384, 512, 768, 1024))
    head = 64 if hidden < 2048 else 128
    heads = hidden // head
    layers = 2 if is_wide else int(rng.integers(2, 13))
    mlp = int(hidden * one(2.0, 2.75, 3.5, 4.0)) // 64 * 64
    vocabulary = 32_000 if is_wide else int(one(2_000, 8_000, 32_000, 64_000, 100_000))
    scheme = "int4" if is_wide else one("int4", "int4", "int8", "none")
    length, rows = (
        (256, 1) if is_wide else (int(one(64, 128, 256, 400, 512, 1024, 2048)), int(one(1, 2, 3, 4, 8)))
    )
    size = layers * (4 * hidden**2 + 3 * hidden * mlp) + vocabulary * hidden
    while 24 * size * length * rows > WORK and length * rows > 128:
        rows, length = (rows // 2, length) if rows > 1 else (1, length // 2)
    targets = one(ATTENTION, ATTENTION, ALL)
    if index >= NUM_FIT + NUM_TEST:  # deep, and always checkpointed
        name, hidden, head, heads, mlp, vocabulary = "llama", 1024, 64, 16, 2816, 8_000
        layers, length, rows, scheme = 24, 512, 1 + index % 2, "int4"
        is_wide, targets = True, ATTENTION
    if name == "phi3":
        targets = ["qkv_proj"] if targets is ATTENTION else ["qkv_proj", "o_proj", "down_proj"]
    return {
        "blas": index % 6 != 4,
        "model": {
            "model_type": name,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": int(heads // one(*[n for n in (1, 2, 4) if heads % n == 0])),
            "head_dim": head,
            "vocab_size": vocabulary,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
            "torch_dtype": "bfloat16",
            **ARCHITECTURES[name],
        },
        "run": {
            "quantization": {"scheme": scheme},
            "lora": {
                "rank": int(one(4, 8, 16, 64)),
                "target_modules": targets,
                "dropout": float(one(0.0, 0.0, 0.1)),
                "num_layers": int(one(-1, -1, -1, max(1, layers // 2))),
            },
            "data": {"max_seq_length": length, "valid_fraction": 0.0},
            "training": {
                "batch_size": rows,
                "gradient_accumulation": int(one(1, 2)),
                "max_steps": 2,
                "optimizer": one("adamw", "adamw", "sgd", "adafactor"),
                "gradient_checkpointing": bool(is_wide or rng.random() < 0.4),
            },
        },
    }


def make(folder: Path, tree: dict[str, Any]) -> None:
    """Write the random model, its quantized copy and rows that fill the whole length."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    import mlx_qlora  # noqa: F401  # before MLX computes: loads the BLAS
    from mlx_qlora.weights.loader import load_base

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    model_class, args_class = _get_classes(tree["model"])
    model = model_class(args_class.from_dict(tree["model"]))
    model.set_dtype(mx.bfloat16)
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(tree["model"]))
    words = "palavra um dois " * tree["run"]["data"]["max_seq_length"]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {words}"}) for i in range(40)))
    config = configuration(folder, tree)
    load_base(config.model, config.quantization)


def configuration(folder: Path, tree: dict[str, Any]) -> Any:
    """The run's configuration."""
    from mlx_qlora.config import build_config

    paths = {"model": {"path": str(folder)}, "data": {"path": str(folder / "rows.jsonl")}}
    return build_config(tree["run"], paths)


def train(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Train, and say what it took."""
    import mlx_qlora  # noqa: F401
    from mlx_qlora.training.events import StepDone
    from mlx_qlora.training.run import train as train_run

    peaks = [0]

    def watch(event: object) -> None:
        if isinstance(event, StepDone):
            peaks.append(event.memory.mlx_peak_bytes)

    started = time.perf_counter()
    run = train_run(configuration(folder, tree), folder / "adapter", observers=[watch])
    return {
        "measured_bytes": run.finished.peak_memory_bytes,
        "mlx_peak_bytes": max(peaks),
        "seconds": time.perf_counter() - started,
    }


def predict(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """What the plan says, from config.json alone."""
    import mlx_qlora  # noqa: F401
    from mlx_qlora.training.planning import plan_run

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree["model"]))
    predicted = plan_run(configuration(folder, tree)).plan
    return {"predicted_bytes": predicted.peak_bytes, "parts": predicted.parts, "phase": predicted.phase}


def numbers(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """What the plan is made of: exact bytes, and the sizes of a step."""
    import mlx_qlora  # noqa: F401
    from mlx_qlora.training.planning import plan_run

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree["model"]))
    return asdict(plan_run(configuration(folder, tree)).numbers)


def in_process(what: str, folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Do one of these in a process of its own."""
    environment = {**os.environ, "MLX_QLORA_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    if not tree["blas"]:
        environment["MLX_QLORA_BLAS"] = "off"
    command = [sys.executable, __file__, "--child", what, str(folder), json.dumps(tree)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{json.dumps(tree)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(index: int) -> dict[str, Any]:
    """Make, train and predict run `index`."""
    tree = run_tree(index)
    with tempfile.TemporaryDirectory(prefix="memory_model_") as temporary:
        folder = Path(temporary) / "model"
        in_process("make", folder, tree)
        return {"index": index, "tree": tree, **in_process("train", folder, tree)}


def predicted(run: dict[str, Any]) -> dict[str, Any]:
    """A measured run with its prediction."""
    with tempfile.TemporaryDirectory(prefix="memory_model_") as temporary:
        told = in_process("predict", Path(temporary) / "model", run["tree"])
    return {**run, **told, "ratio": told["predicted_bytes"] / run["measured_bytes"]}


def is_test(run: dict[str, Any]) -> bool:
    """Whether the constants were fitted without it."""
    return NUM_FIT <= int(run["index"]) < NUM_FIT + NUM_TEST


@dataclass(frozen=True)
class Sizes:
    """Measured runs as arrays: sizes by constant, in bytes; R runs, C constants."""

    by_phase_RC: tuple[np.ndarray, ...]
    outside_RC: np.ndarray
    fixed_R: np.ndarray
    """Weights, low-rank tensors, optimizer state."""
    gradients_R: np.ndarray
    update_R: np.ndarray
    process_R: np.ndarray
    """Measured."""
    arrays_R: np.ndarray
    """Measured: MLX's peak."""

    def error(self, constants_C: np.ndarray) -> float:
        """How far the plan is off, in both peaks; as `plan_memory` adds them up."""
        step_R = np.maximum.reduce([terms_RC @ constants_C for terms_RC in self.by_phase_RC])
        arrays_R = self.fixed_R + np.maximum(step_R + self.gradients_R, self.update_R)
        heap_R = constants_C[CONSTANT_NAMES.index("heap")] * step_R
        process_R = arrays_R + heap_R + self.outside_RC @ constants_C
        total = 0.0
        for told_R, seen_R, weight, below in (
            (process_R, self.process_R, 1.0, 4),
            (arrays_R, self.arrays_R, 0.2, 2),
        ):
            off_R = np.log(told_R / seen_R) - AIM
            total += weight * float(np.sum(off_R**2 * np.where(off_R < 0, below, 1)))
        # Of constants that do as well, the small ones.
        return total + 2e-5 * float(np.sum((constants_C / UNITS_C) ** 2))


def sizes(runs: list[dict[str, Any]]) -> Sizes:
    """What the plan makes of these runs' configurations, before any constant."""
    works = []
    for run in runs:
        with tempfile.TemporaryDirectory(prefix="memory_model_") as temporary:
            told = in_process("numbers", Path(temporary) / "model", run["tree"])
        works.append(Workload(**{**told, "step": Step(**told["step"])}))

    def matrix(terms: list[dict[str, float]]) -> np.ndarray:
        return np.array([[float(t.get(name, 0)) for name in CONSTANT_NAMES] for t in terms])

    phases = [phase_terms(work.step) for work in works]
    return Sizes(
        tuple(matrix([phase[name] for phase in phases]) for name in ("backward", "loss")),
        matrix([outside_terms(work, is_on_gpu=False) for work in works]),
        np.array([float(w.weights_bytes + w.lora_bytes + w.optimizer_bytes) for w in works]),
        np.array([float(w.lora_bytes * (2 if w.num_micro_batches > 1 else 1)) for w in works]),
        np.array([float(update_bytes(work)) for work in works]),
        np.array([float(run["measured_bytes"]) for run in runs]),
        np.array([float(run["mlx_peak_bytes"]) for run in runs]),
    )


def fit(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Constants for which the plan comes closest to these runs.

    The peak is a maximum over phases, so there is no closed form: from some random starts each constant, and
    pairs of them, are moved by ever smaller factors for as long as that helps.
    """
    measured = sizes(runs)
    found = [_descended(measured, np.random.default_rng(start)) for start in range(STARTS)]
    _, best_C = min(found, key=lambda pair: pair[0])
    return {name: float(f"{value:.4g}") for name, value in zip(CONSTANT_NAMES, best_C, strict=True)}


def _descended(measured: Sizes, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    best_C = UNITS_C * np.where(UNITS_C > 1, 1.0, rng.uniform(0, 3, len(UNITS_C)))
    least, factor = measured.error(best_C), 2.0
    while factor > 1.004:
        before = least
        moves = [{one: f} for one in rng.permutation(len(best_C)) for f in (factor, 1 / factor, 0.0)]
        pairs = (rng.choice(len(best_C), 2, replace=False) for _ in range(200))
        for move in [*moves, *({one: factor, other: 1 / factor} for one, other in pairs)]:
            tried_C = best_C.copy()
            for index, f in move.items():
                tried_C[index] = best_C[index] * f if best_C[index] else 0.3 * UNITS_C[index] * (f == 0)
            if (now := measured.error(tried_C)) < least * (1 - 1e-6):
                best_C, least = tried_C, now
        factor = factor if least < before else factor**0.6
    return least, best_C


def main(
    measured_in: Annotated[Path | None, typer.Option("--measured", help="JSON of runs made before.")] = None,
    with_fit: Annotated[bool, typer.Option("--fit", help="Fit the constants anew, and print them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure or read the runs, predict each, and compare."""
    if measured_in is not None:
        runs = json.loads(measured_in.read_text())["runs"]
    else:
        runs = [measured(index) for index in range(NUM_FIT + NUM_TEST + NUM_DEEP)]
    if with_fit:
        print(json.dumps(fit([run for run in runs if not is_test(run)]), indent=4))
        return
    runs = [predicted(run) for run in runs]
    if as_json:
        print(json.dumps({"runs": runs}))
        return
    for run in runs:
        kind = "test" if is_test(run) else "fit"
        print(
            f"{run['index']:3} {kind:4} {run['tree']['model']['model_type']:8} {run['phase']:8} "
            f"{run['predicted_bytes'] / MIB:7.0f} {run['measured_bytes'] / MIB:7.0f} MiB {run['ratio']:6.3f}"
        )


if __name__ == "__main__" and sys.argv[1:2] == ["--child"]:
    child, where, text = sys.argv[2:5]
    jobs = {"make": make, "train": train, "predict": predict, "numbers": numbers}
    print(json.dumps(jobs[child](Path(where), json.loads(text)) or {}))
elif __name__ == "__main__":
    typer.run(main)
