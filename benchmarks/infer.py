"""One answer with an adapter from the command line, ours and mlx-lm's, on the same int4 model.

    python benchmarks/infer.py --repetitions 5

`python -m mlx_qlora.infer` and `python -m mlx_lm generate` take turns, each in a process of its own, at
temperature 0, with one adapter that `mlx-qlora train` made. Cases: the demo's model after a short training
and a question of its data; a random Llama in float32 with a short prompt and with one of about 600 tokens.
On the random model both must give the same text.

Printed are medians and their ratios to mlx-lm's: seconds from the start of the process to the first text it
prints and to its end, and tokens per second after the first, by each one's own report. `+blas` is ours with a
system BLAS, as installed; mlx-lm loads none. The demo's scales are bfloat16: mlx-lm computes in it, we, on a
CPU, in float32.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pairing import Figures, compared, environment, finished, in_turn, print_table

from mlx_qlora.blas import blas_is_fast

DEMO = Path(__file__).parents[1] / "data" / "demo"
QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many altogether?"
)
HEADING = "=" * 10 + "\n"
"""What mlx-lm writes above and below its text."""


@dataclass(frozen=True)
class Case:
    """A model and a question to it."""

    question: str
    max_tokens: int
    hidden: int | None = None
    """Of a random model; None is the demo's."""
    layers: int = 8


CASES = {
    "demo": Case("Qual é o ano de fundação do Valbruma?", max_tokens=64),
    "short-prompt": Case(QUESTION, max_tokens=128, hidden=512),
    "long-prompt": Case(" ".join([QUESTION] * 20), max_tokens=32, hidden=512),
}


def main(
    case: Annotated[list[str] | None, typer.Option(help="Cases to run; all when not given.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Answers of each side.")] = 5,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens to generate; the case's own when not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure both, check that both answer the same, print."""
    if unknown := set(case or ()) - CASES.keys():
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    sides = ["mlx_lm", "ours", *(["ours+blas"] if blas_is_fast() else [])]
    results = {}
    with tempfile.TemporaryDirectory(prefix="infer_") as temporary:
        for name in case or CASES:
            chosen = CASES[name]
            model, adapter = prepared(chosen, Path(temporary))
            texts: dict[str, str] = {}
            arguments = ["--model", str(model), "--adapter-path", str(adapter),
                         "--max-tokens", str(max_tokens or chosen.max_tokens)]  # fmt: skip
            measure = partial(answer, chosen.question, arguments, texts)
            results[name] = {
                "case": asdict(chosen),
                "sides": compared(in_turn(sides, repetitions, measure, name), sides[0]),
                "texts": texts,
            }
            if not as_json:
                show(name, results[name])
    if as_json:
        print(json.dumps(results))
    if other := [n for n, r in results.items() if CASES[n].hidden and len(set(r["texts"].values())) > 1]:
        raise SystemExit(f"the sides' texts differ: {', '.join(other)}")


def prepared(case: Case, folder: Path) -> tuple[Path, Path]:
    """The int4 model and an adapter for it, made once."""
    name = "demo" if case.hidden is None else f"random-{case.hidden}-{case.layers}"
    model, adapter = folder / name, folder / f"{name}-adapter"
    if adapter.exists():
        return model, adapter
    if case.hidden is None:
        finished([sys.executable, "-m", "mlx_qlora", "quantize", str(DEMO / "model"), "--output", str(model)])
    else:
        script = Path(__file__).with_name("random_llama.py")
        finished([sys.executable, str(script), str(model), str(case.hidden), str(case.layers)])
    settings = ["training.num_epochs=3"]
    if case.hidden is not None:  # so little that its answers do not end at once
        settings = ["training.max_steps=1", "training.learning_rate=1e-4", "data.max_valid_examples=2"]
    finished([
        sys.executable, "-m", "mlx_qlora", "train", "--config", str(DEMO / "run.yaml"), "--model", str(model),
        "--data", str(DEMO / "club"), "--adapter-path", str(adapter), *[f"--set={one}" for one in settings],
    ])  # fmt: skip
    return model, adapter


def answer(question: str, arguments: Sequence[str], texts: dict[str, str], side: str) -> Figures:
    """One side's figures; its text is left in `texts`."""
    surroundings = environment(has_blas="+blas" in side)
    if side == "mlx_lm":
        command = [
            sys.executable,
            "-m",
            "mlx_lm",
            "generate",
            "--prompt",
            question,
            "--temp",
            "0",
            *arguments,
        ]
        done = finished(command, surroundings, heading=HEADING)
        text, _, report = done.output.removeprefix(HEADING).rpartition(HEADING)
        if not (found := re.search(r"Generation: (\d+) tokens, ([\d.]+) tokens", report)):
            raise SystemExit(f"mlx-lm reported no speed:\n{done.output}")
        tokens, speed = found.groups()
    else:
        command = [sys.executable, "-m", "mlx_qlora.infer", question, *arguments]
        done = finished(command, surroundings)
        said = json.loads(finished([*command, "--json"], surroundings).output)
        text, tokens, speed = done.output, said["generation_tokens"], said["tokens_per_second"]
    texts[side] = text.strip()
    return {
        "first_text_seconds": done.first_output_seconds,
        "seconds": done.seconds,
        "tokens_per_second": float(speed),
        "generation_tokens": float(tokens),
        "process_peak_bytes": float(done.peak_rss_bytes),
    }


def show(name: str, result: dict[str, Any]) -> None:
    """For a person."""
    columns = {
        "first_text_seconds": ("first text (s)", 1.0, 2),
        "seconds": ("whole (s)", 1.0, 2),
        "tokens_per_second": ("tokens/s", 1.0, 1),
        "generation_tokens": ("tokens", 1.0, 0),
        "process_peak_bytes": ("process (MiB)", 2.0**20, 0),
    }
    print_table(name, result["sides"], columns)


if __name__ == "__main__":
    typer.run(main)
