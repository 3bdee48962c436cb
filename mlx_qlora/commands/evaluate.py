"""``mlx-qlora evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.options import Offload, OffloadBudget, stored_as
from mlx_qlora.commands.output import Json, on_bytes, print_json, say
from mlx_qlora.errors import DataError


def evaluate(
    data: Annotated[str, typer.Option(help="Folder, .jsonl or .csv file, or hub data set.")],
    model: Annotated[str | None, typer.Option(help="Base model; the adapter's own when not given.")] = None,
    adapter_path: Annotated[Path | None, typer.Option(help="Folder of the adapter.")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    scheme: Annotated[str | None, typer.Option(help="How to store the base: int4, int8, …, none.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 4,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per row, at most.", min=2)] = 512,
    exact: Annotated[
        bool, typer.Option("--exact-match", help="Also generate answers and compare them.")
    ] = False,
    offload: Offload = False,
    offload_budget_gib: OffloadBudget = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on without unusable rows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Token-weighted loss and perplexity of a base model, and of its adapter when one is given.

    Example: mlx-qlora evaluate --adapter-path adapters/farense --data data/farense --split test
    """
    from mlx_qlora.config import DataConfig
    from mlx_qlora.dataset import in_order, load_dataset
    from mlx_qlora.inference.generate import load_assistant
    from mlx_qlora.objective.evaluate import evaluate as loss_of

    assistant = load_assistant(
        model,
        adapter_path=adapter_path,
        quantization=stored_as(scheme, has_adapter=adapter_path is not None),
        offload=offload,
        offload_budget_gib=offload_budget_gib,
        on_bytes=on_bytes("Quantizing"),
    )
    for note in assistant.base.notes:
        say(note)
    config = DataConfig(
        path=data,
        max_seq_length=max_seq_length,
        skip_bad_rows=skip_bad_rows,
        system_prompt=assistant.adapter.system_prompt if assistant.adapter else None,
    )
    dataset = load_dataset(config, assistant.tokenizer, seed=0)
    rows = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}.get(split)
    if not rows:
        raise DataError(
            f"The data has no {split} rows.", where=data, run="mlx-qlora evaluate --split train …"
        )
    result = loss_of(assistant.model, in_order(rows, batch_size))
    values: dict[str, Any] = {
        "split": split,
        "rows": len(rows),
        "loss_nats": result.loss_nats,
        "perplexity": result.perplexity,
        "target_tokens": result.target_tokens,
    }
    if exact:
        values["exact_match"] = _exact_match(assistant, Path(data), split)
    if as_json:
        print_json(values)
        return
    say(f"{values['rows']} rows, {values['target_tokens']} target tokens")
    print(f"loss {result.loss_nats:.4f} nats per token, perplexity {result.perplexity:.3f}")
    if exact:
        print(f"exact match {values['exact_match']:.1%}")


def _exact_match(assistant: Any, data: Path, split: str) -> float:
    from mlx_qlora.dataset import read_conversations
    from mlx_qlora.inference.exact_match import exact_match

    path = data / f"{split}.jsonl" if data.is_dir() else data
    return exact_match(assistant, read_conversations(path)).share
