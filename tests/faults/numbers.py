"""Numbers that are no numbers, where the data meets them: in the weights, the gradients, the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.config import build_config
from mlx_qlora.errors import DivergenceError
from mlx_qlora.objective.loss import LossInputs, Objective
from mlx_qlora.training.events import StepDone
from mlx_qlora.training.run import train
from tests.faults.harness import SETTINGS, Bench, Row, Scale

Change = Callable[[mx.array, mx.array], mx.array]
"""(the loss, whether the batch holds the token) → another loss."""


@mx.custom_function
def _with_bad_gradient(loss: mx.array, is_hit: mx.array) -> mx.array:
    return loss + 0 * is_hit


@_with_bad_gradient.vjp
def _bad_gradient(primals: Any, cotangent: mx.array, _output: Any) -> Any:
    loss, is_hit = primals
    return mx.where(is_hit, mx.array(math.inf), cotangent) * mx.ones_like(loss), mx.zeros_like(is_hit)


def _gradient_is_bad(loss: mx.array, is_hit: mx.array) -> mx.array:
    return _with_bad_gradient(loss, is_hit.astype(loss.dtype))


CHANGES: dict[str, Change] = {
    "NaN in the loss": lambda loss, is_hit: mx.where(is_hit, mx.array(math.nan), loss),
    "-Inf in the loss": lambda loss, is_hit: mx.where(is_hit, mx.array(-math.inf), loss),
    "Inf in the gradient, the loss finite": _gradient_is_bad,
    "logits all zero, as after a swallowed GPU error": lambda loss, is_hit: mx.where(
        is_hit, mx.stop_gradient(mx.array(5.0)), loss
    ),
}


def injected(bench: Bench, _scale: Scale) -> list[Row]:
    """Every batch with a certain token is bad: skipped and named; the run ends with finite weights."""
    expected = "skipped and named; rolled back when it goes on; finite weights at the end"
    row = Row("numbers", "NaN and Inf where a batch holds a certain token", expected)
    for often, token in _tokens(bench):
        for name, change in CHANGES.items():
            with _changed(token, change):
                row.note(_named(f"{name}, {often} token", _trained(bench, bench.folder / "adapter")))
        row.note(_named(f"NaN in the embedding, {often} token", _with_bad_embedding(bench, token)))
    return [row]


def _named(what: str, problem: str | None) -> str | None:
    return f"{what}: {problem}" if problem else None


def _tokens(bench: Bench) -> list[tuple[str, int]]:
    """A token of few batches, and one of nearly all."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(bench.model)
    text = (bench.data / "train.jsonl").read_text(encoding="utf-8")
    counts = {token: text.count(tokenizer.decode([token])) for token in set(tokenizer.encode(text))}
    ordered = sorted((token for token in counts if counts[token] > 1), key=lambda t: (counts[t], t))
    return [("a rare", ordered[len(ordered) // 8]), ("a frequent", tokenizer.encode("clube")[-1])]


@contextmanager
def _changed(token: int, change: Change) -> Iterator[None]:
    original = Objective.nll

    def nll(self: Objective, inputs: LossInputs) -> mx.array:
        is_hit = (inputs.inputs_BT == token).any()
        return change(original(self, inputs), is_hit) if self.model.training else original(self, inputs)

    Objective.nll = nll  # type: ignore[method-assign]
    try:
        yield
    finally:
        Objective.nll = original  # type: ignore[method-assign]


def _with_bad_embedding(bench: Bench, token: int) -> str | None:
    """The base itself holds a NaN, in the row of one token."""
    from tests.conftest import tiny_llama

    folder = bench.folder / f"bad-{token}"
    folder.mkdir(exist_ok=True)
    model = tiny_llama(folder)
    weights = mx.load(str(model / "model.safetensors"))
    table = np.array(weights["model.embed_tokens.weight"].astype(mx.float32))
    table[token] = math.nan
    weights["model.embed_tokens.weight"] = mx.array(table).astype(mx.bfloat16)
    mx.save_safetensors(str(model / "model.safetensors"), weights, metadata={"format": "pt"})
    return _trained(Bench(model, bench.data, bench.folder), bench.folder / "adapter", scheme="none")


def _trained(bench: Bench, adapter: Path, scheme: str = "int4") -> str | None:
    """Train; what is wrong with how it ended."""
    import shutil

    shutil.rmtree(adapter, ignore_errors=True)
    tree: dict[str, Any] = {"model": {"path": str(bench.model)}, "data": {"path": str(bench.data)}}
    for key, value in SETTINGS.items():
        room, name = key.split(".")
        tree.setdefault(room, {})[name] = value
    tree["quantization"] = {"scheme": scheme}
    events: list[Any] = []
    try:
        train(build_config(tree), adapter, observers=[events.append])
    except DivergenceError:
        pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    skipped = [event for event in events if isinstance(event, StepDone) and event.skipped]
    if not skipped:
        return "no update was skipped"
    if not all(event.diagnosis for event in skipped):
        return "an update was skipped without a word why"
    for path in [*adapter.glob("*.safetensors"), *adapter.glob("checkpoints/*/*.safetensors")]:
        for name, array in mx.load(str(path)).items():
            if not mx.isfinite(array).all().item():
                return f"{name} in {path.name} is not finite"
    return None
