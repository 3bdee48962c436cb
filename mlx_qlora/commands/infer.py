"""``mlx-qlora infer`` and ``python -m mlx_qlora.infer``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_qlora.commands.options import Backend, Hostfile, Hosts, Offload, OffloadBudget, stored_as
from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say
from mlx_qlora.errors import ConfigError, MlxQloraError

if TYPE_CHECKING:
    from mlx_qlora.inference.generate import Answer, Sampling
    from mlx_qlora.inference.sharded_question import Question, RankReport
    from mlx_qlora.training.launcher import Launcher


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
    processes: Annotated[
        int, typer.Option(help="Ranks on this machine that share the model between them.", min=1)
    ] = 1,
    hosts: Hosts = None,
    hostfile: Hostfile = None,
    backend: Backend = "ring",
    sharding: Annotated[
        str, typer.Option(help="What ranks share: tensor (each layer), pipeline (the layers), or auto.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Ask one question.

    Example: python -m mlx_qlora.infer "Quem fundou o clube?" --adapter-path adapters/farense

    With --processes or --hosts the model is spread over several ranks, each of which reads and holds only its
    part: for models larger than one Mac.
    """
    from mlx_qlora.inference.generate import Sampling

    text = sys.stdin.read().strip() if question == "-" else question
    if not text.strip():
        raise ConfigError("The question is empty.", run='python -m mlx_qlora.infer "Quem fundou o clube?"')
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    launcher = _launcher(processes, hosts, hostfile, backend, sharding, offload=offload)
    if model is None and adapter_path is None:
        adapter_path = newest_adapter(Path("adapters"))
        say(f"adapter: {adapter_path}")
    options: dict[str, Any] = {
        "model": model,
        "adapter_path": adapter_path,
        "quantization": stored_as(scheme, has_adapter=adapter_path is not None),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    reports: list[RankReport] = []
    if launcher is None:
        options |= {"offload": offload, "offload_budget_gib": offload_budget_gib}
        pieces = _answered_here(options, text, system, sampling)
    else:
        from mlx_qlora.inference.sharded_question import Question

        asked = [{"role": "user", "content": text}]
        told = Question(messages=asked, **options, system=system, sampling=sampling, sharding=sharding)
        pieces = _answered_on_ranks(told, launcher, reports)
    answer = _shown(pieces, as_json=as_json)
    if as_json and answer is not None:
        ranks = {"ranks": [asdict(report) for report in reports]} if reports else {}
        print_json(asdict(answer) | ranks)
    elif answer is not None:
        print()
        if answer.finish_reason == "length":
            say(f"(cut after {answer.generation_tokens} tokens; --max-tokens allows more)")


def _shown(pieces: Iterator[tuple[str, Answer]], *, as_json: bool) -> Answer | None:
    """Print the pieces as they come, or none of them; the whole answer."""
    answer = None
    try:
        for piece, so_far in pieces:
            answer = so_far
            if not as_json:
                print(piece, end="", flush=True)
    except MlxQloraError:
        if answer is not None and not as_json:
            print()  # what went wrong stands on a line of its own
        raise
    return answer


def _answered_here(
    options: dict[str, Any], text: str, system: str | None, sampling: Sampling
) -> Iterator[tuple[str, Answer]]:
    from mlx_qlora.inference.generate import load_assistant

    assistant = load_assistant(**options, on_bytes=on_bytes("Quantizing"))
    for note in assistant.base.notes:
        say(note)
    yield from assistant.stream([{"role": "user", "content": text}], system=system, sampling=sampling)


def _answered_on_ranks(
    question: Question, launcher: Launcher, reports: list[RankReport]
) -> Iterator[tuple[str, Answer]]:
    """The answer of several ranks; `reports` gets what each of them held."""
    from mlx_qlora.inference.sharded_watch import SharedAnswer
    from mlx_qlora.training.distributed_messages import Connection

    shared = SharedAnswer(question, launcher, Connection, on_note=say, on_bytes=on_bytes("Quantizing"))
    with closing(shared.stream()) as pieces:
        yield from pieces
    reports += shared.reports
    for report in reports:
        say(
            f"rank {report.rank} ({report.sharding}): weights {gigabytes(report.weights_bytes)}, "
            f"peak {gigabytes(report.peak_memory_bytes)}"
        )


def _launcher(
    processes: int, hosts: str | None, hostfile: Path | None, backend: str, sharding: str, *, offload: bool
) -> Launcher | None:
    """How ranks are started; None where this process answers."""
    is_here = hosts is None and hostfile is None and processes == 1 and backend == "ring"
    choices = ("auto",) if is_here else ("auto", "tensor", "pipeline")
    if sharding not in choices:
        raise ConfigError(
            f"There is no sharding {sharding} {'of one process' if is_here else 'over ranks'}.",
            where="--sharding",
            run=f"mlx-qlora infer … --processes 2 --sharding {'tensor' if is_here else '|'.join(choices)}",
        )
    if is_here:
        return None
    if offload:
        raise ConfigError(
            "--offload is for one process; ranks hold their parts in memory.",
            where="--offload",
            run="mlx-qlora infer … --processes 2   # or --offload alone",
        )
    from mlx_qlora.commands.infer_rank import COMMAND
    from mlx_qlora.training.distributed_hosts import launcher_for

    return launcher_for(processes, hosts=hosts, hostfile=hostfile, backend=backend, command=COMMAND)


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
