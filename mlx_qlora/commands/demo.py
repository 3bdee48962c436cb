"""``mlx-qlora demo``: the whole job on the embedded model."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say
from mlx_qlora.config import RunConfig, build_config, read_config
from mlx_qlora.errors import ConfigError
from mlx_qlora.storage import remove_folder

DEMO = Path(__file__).parents[2] / "data" / "demo"


def demo(
    adapter_path: Annotated[Path, typer.Option(help="Where the adapter goes; replaced each time.")] = Path(
        "adapters/demo"
    ),
    as_json: Json = False,
) -> None:
    """Quantize the embedded model, train it on the embedded data, and ask it questions in unseen wording.

    Example: mlx-qlora demo

    The same code as any run: data/demo/run.yaml is its configuration. The club it learns about is invented.
    """
    started = time.perf_counter()
    config = demo_config()
    from mlx_qlora.dataset import read_conversations
    from mlx_qlora.inference.exact_match import exact_match
    from mlx_qlora.inference.generate import load_assistant
    from mlx_qlora.memory.monitor import MemoryMonitor
    from mlx_qlora.training.display import ProgressDisplay
    from mlx_qlora.training.run import train

    monitor = MemoryMonitor()
    questions = read_conversations(Path(str(config.data.path)) / "test.jsonl")

    say(f"1/4  Quantize {_short(config.model.path)} to {config.quantization.scheme}")
    untrained = load_assistant(
        config.model.path, quantization=config.quantization, on_bytes=on_bytes("     Quantizing")
    )
    say(f"     {_size_line(untrained)}")

    say(f"2/4  Ask {len(questions)} questions about a club it has never heard of")
    before = exact_match(untrained, questions)
    say(f"     {before.share:.0%} answered exactly")

    say(f"3/4  Train a rank-{config.lora.rank} adapter on {_short(config.data.path)}")
    remove_folder(adapter_path)
    with closing(ProgressDisplay(config.training.steps_per_report)) as display:
        run = train(config, adapter_path, observers=[display])

    say("4/4  Ask the same questions again, in wording the training never showed")
    after = exact_match(load_assistant(adapter_path=adapter_path), questions)
    say(f"     {after.share:.0%} answered exactly")
    shown = _telling_example(before, after)
    result = {
        "exact_match_before": before.share,
        "exact_match_after": after.share,
        "num_questions": len(questions),
        "question": questions[shown][-2]["content"],
        "expected": after.expected[shown],
        "answer_before": before.answers[shown],
        "answer_after": after.answers[shown],
        "steps": run.finished.steps,
        "tokens_per_second": run.finished.tokens_per_second,
        "peak_memory_bytes": max(run.finished.peak_memory_bytes, monitor.peak_footprint_bytes),
        "seconds": time.perf_counter() - started,
        "adapter_path": adapter_path,
    }
    if as_json:
        print_json(result)
    else:
        _show(result)


def demo_config() -> RunConfig:
    """The configuration of the embedded run, its paths made absolute.

    Raises:
        ConfigError: the package was installed without the repository's ``data/`` folder.
    """
    if not (DEMO / "run.yaml").is_file():
        raise ConfigError(
            "The embedded model is part of the repository, and this is an installed package.",
            where=str(DEMO),
            run="git clone the repository, then: make demo",
        )
    paths = {"model": {"path": str(DEMO / "model")}, "data": {"path": str(DEMO / "club")}}
    return build_config(read_config(DEMO / "run.yaml"), paths, where=str(DEMO / "run.yaml"))


def _telling_example(before: Any, after: Any) -> int:
    """A question that training made the difference for; the first one if there is none."""
    from mlx_qlora.inference.exact_match import normalised

    for index, (old, new, expected) in enumerate(
        zip(before.answers, after.answers, after.expected, strict=True)
    ):
        if normalised(new) == normalised(expected) != normalised(old):
            return index
    return 0


def _show(result: dict[str, Any]) -> None:
    print(f"\nQuestion  {result['question']}")
    print(f"Before    {result['answer_before']}")
    print(f"After     {result['answer_after']}")
    print(
        f"\nExact match on {result['num_questions']} unseen wordings: "
        f"{result['exact_match_before']:.0%} → {result['exact_match_after']:.0%}   "
        f"({result['seconds']:.0f} s, peak {gigabytes(result['peak_memory_bytes'])})"
    )
    print(
        f'\nAsk it yourself:\n  .venv/bin/python -m mlx_qlora.infer "{result["question"]}" '
        f"--adapter-path {result['adapter_path']}"
    )


def _size_line(assistant: Any) -> str:
    base = assistant.base
    before = sum(path.stat().st_size for path in base.source.folder.glob("*.safetensors"))
    now = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
    return f"{base.num_parameters / 1e6:.2f} M parameters: {gigabytes(before)} → {gigabytes(now)}"


def _short(path: str | None) -> str:
    return str(Path(str(path)).relative_to(DEMO.parents[1]))
