"""``mlx-qlora infer`` and ``python -m mlx_qlora.infer``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.options import Offload, OffloadBudget, stored_as
from mlx_qlora.commands.output import Json, on_bytes, print_json, say
from mlx_qlora.errors import ConfigError


def infer(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Annotated[str | None, typer.Option(help="Base model; the adapter's own when not given.")] = None,
    adapter_path: Annotated[
        Path | None,
        typer.Option(help="Folder of the adapter; the newest in adapters/ when nothing is given."),
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="How to store the base: int4, int8, …, none.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    offload: Offload = False,
    offload_budget_gib: OffloadBudget = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Ask one question.

    Example: python -m mlx_qlora.infer "Quem fundou o clube?" --adapter-path adapters/farense
    """
    from mlx_qlora.inference.generate import Sampling, load_assistant

    text = sys.stdin.read().strip() if question == "-" else question
    if not text.strip():
        raise ConfigError("The question is empty.", run='python -m mlx_qlora.infer "Quem fundou o clube?"')
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if model is None and adapter_path is None:
        adapter_path = newest_adapter(Path("adapters"))
        say(f"adapter: {adapter_path}")
    assistant = load_assistant(
        model,
        adapter_path=adapter_path,
        quantization=stored_as(scheme, has_adapter=adapter_path is not None),
        revision=revision,
        trust_remote_code=trust_remote_code,
        offload=offload,
        offload_budget_gib=offload_budget_gib,
        on_bytes=on_bytes("Quantizing"),
    )
    for note in assistant.base.notes:
        say(note)
    answer = None
    for piece, so_far in assistant.stream(
        [{"role": "user", "content": text}], system=system, sampling=sampling
    ):
        answer = so_far
        if not as_json:
            print(piece, end="", flush=True)
    if as_json and answer is not None:
        print_json(asdict(answer))
    elif answer is not None:
        print()
        if answer.finish_reason == "length":
            say(f"(cut after {answer.generation_tokens} tokens; --max-tokens allows more)")


def newest_adapter(folder: Path) -> Path:
    """The adapter in `folder` that was written last.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(folder.glob("*/adapters.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(
            "There is no adapter to ask.",
            where=f"{folder}/",
            run='python -m mlx_qlora.infer "…" --adapter-path A   # or: --model M',
        )
    return found[-1].parent
