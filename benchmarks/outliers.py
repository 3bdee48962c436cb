"""LLM.int8's idea on affine weights: the worst columns in 16 bits, against as many bytes spent otherwise.

    python benchmarks/outliers.py --model data/demo/model --data data/demo/club
    python benchmarks/outliers.py --model data/demo/model --data data/demo/club --plant 20

Some input features are far larger than the rest, and what a weight of theirs loses in quantization counts so
many times more. Dettmers et al. 2022 (arXiv:2208.07339) multiply these columns, those with an activation of
6 or more, in 16 bits. Here calibration on the training rows chooses columns of every linear layer, in three
ways: by that threshold; the 1/32 of a layer's columns with the largest activations; the 1/32 that lose
most, E[x²] · ‖w − ŵ‖². A kept column is no part of its group: the group's mean stands in its place.

1/32 of the columns in 16 bits cost half a bit a weight: as much as groups of 32 instead of 64 do. Beside it
stand each layer's own bits, for as many bytes, chosen by what the weights lose (as `weights.target` does), or
by what that does to the model's answers on the training rows (`quantization.sensitivity.importances`).

Printed is the mean Kullback-Leibler divergence from the float model in nats per labelled token of the test
rows (else of the validation rows), and its standard error over rows. Weights are quantized and unpacked again
in float32: what is compared is the arithmetic of the formats, not the speed of a kernel. `--plant F`
multiplies one input feature in 64 of every layer behind a norm by F and divides its weights by F: the
same function in float, with outliers as large language models have them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx_qlora  # noqa: F401  # before MLX: it brings a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.config import DataConfig, QuantizationConfig
from mlx_qlora.dataset import in_order, load_dataset
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.quantization.policy import read_scheme
from mlx_qlora.quantization.schemes import Scheme, scheme_named
from mlx_qlora.quantization.sensitivity import MeasuredLayer, Option, choose, importances, there_and_back

THRESHOLD = 6.0
"""Of an activation, in LLM.int8."""
KEPT_SHARE = 32
"""One column in so many."""
INDEX_BYTES = 2
"""Of a kept column's number."""
WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass
class Inputs:
    """What a layer was given in calibration, by input feature."""

    largest: mx.array
    """|x|, at most."""
    energy: mx.array
    """Sum of x²."""


@dataclass(frozen=True)
class Result:
    """One way to store the model."""

    name: str
    bits_per_weight: float
    """Of the layers that are quantized."""
    kept_columns: int
    divergence_nats: float
    standard_error: float


class _Watched(nn.Linear):
    """A linear layer that notes what it is given."""

    def __call__(self, x: mx.array) -> mx.array:
        rows = mx.abs(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        seen = self.seen
        seen.largest, seen.energy = mx.maximum(seen.largest, rows.max(axis=0)), seen.energy + (rows**2).sum(0)
        return super().__call__(x)


def calibrated(model: nn.Module, batches: Sequence[Any]) -> dict[str, Inputs]:
    """Path of each linear layer → its inputs over `batches`."""
    layers = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    found = {}
    for path, layer in layers.items():
        width = layer.weight.shape[1]
        found[path] = Inputs(mx.zeros(width), mx.zeros(width))
        object.__setattr__(layer, "seen", found[path])
        layer.__class__ = _Watched
    for batch in batches:
        mx.eval(model(mx.array(batch.inputs_BT)))
    for layer in layers.values():
        layer.__class__ = nn.Linear
        object.__delattr__(layer, "seen")
    mx.eval([[each.largest, each.energy] for each in found.values()])
    return found


def plant(model: nn.Module, factor: float) -> None:
    """Make one feature in 64 behind each block's norms `factor` times larger; the function stays."""
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, layers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            width = norm.weight.shape[0]
            scale = mx.where(mx.arange(width) % 64 == 7, factor, 1.0)
            norm.weight = norm.weight * scale
            for layer in layers:
                layer.weight = layer.weight / scale


def kept_apart(weight: mx.array, scheme: Scheme, columns: np.ndarray) -> mx.array:
    """`weight` there and back, but for some columns, which 16 bits hold; they are no part of their groups."""
    out, width = weight.shape
    is_kept = mx.array(np.isin(np.arange(width), columns))
    groups = weight.reshape(out, -1, scheme.group_size)
    others = mx.logical_not(is_kept).reshape(1, -1, scheme.group_size)
    mean = (groups * others).sum(-1, keepdims=True) / mx.maximum(others.sum(-1, keepdims=True), 1)
    rest = mx.where(others, groups, mean).reshape(out, width)
    return mx.where(is_kept, weight.astype(mx.float16).astype(mx.float32), there_and_back(rest, scheme))


def by_threshold(_weight: mx.array, seen: Inputs, _scheme: Scheme) -> np.ndarray:
    """Columns with an activation of 6 or more."""
    return np.flatnonzero(np.array(seen.largest) >= THRESHOLD)


def by_activation(weight: mx.array, seen: Inputs, _scheme: Scheme) -> np.ndarray:
    """The 1/32 of columns with the largest activations."""
    return np.argsort(-np.array(seen.largest))[: weight.shape[1] // KEPT_SHARE]


def by_loss(weight: mx.array, seen: Inputs, scheme: Scheme) -> np.ndarray:
    """The 1/32 of columns that lose most: E[x²] · ‖w − ŵ‖²."""
    lost = ((weight - there_and_back(weight, scheme)) ** 2).sum(axis=0) * seen.energy
    return np.argsort(-np.array(lost))[: weight.shape[1] // KEPT_SHARE]


Choice = Callable[[mx.array, Inputs, Scheme], np.ndarray]


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, mx.array]) -> Iterator[None]:
    """The model with other weights, while this is open."""
    modules = dict(model.named_modules())
    before = {path: modules[path].weight for path in weights}
    for path, weight in weights.items():
        modules[path].weight = weight
    try:
        yield
    finally:
        for path, weight in before.items():
            modules[path].weight = weight


class Bench:
    """A model, its rows, and its answers in float."""

    def __init__(self, model: nn.Module, calibration: Sequence[Any], scored: Sequence[Any]) -> None:
        self.model, self.calibration, self.scored = model, calibration, scored
        self.inputs = calibrated(model, calibration)
        self.layers = {
            path: module.weight
            for path, module in model.named_modules()
            if hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
        }
        self.num_weights = sum(weight.size for weight in self.layers.values())
        self.expected = [self._answers(batch) for batch in scored]
        mx.eval(self.expected)
        tokens = [mx.array(batch.inputs_BT) for batch in calibration]
        self.importance = importances(model, tokens, scheme_named("int3"))

    def _answers(self, batch: Any) -> mx.array:
        logits = self.model(mx.array(batch.inputs_BT)).astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def result(self, name: str, weights: Mapping[str, mx.array], num_bytes: float, kept: int = 0) -> Result:
        """How far the model with these weights is from itself."""
        sums, tokens = [], []
        with replaced(self.model, weights):
            for batch, p in zip(self.scored, self.expected, strict=True):
                each = (mx.exp(p) * (p - self._answers(batch))).sum(-1) * mx.array(batch.mask_BT)
                sums += np.array(each.sum(-1)).tolist()
                tokens += batch.mask_BT.sum(-1).tolist()
        mean = sum(sums) / sum(tokens)
        spread = np.array(sums) - mean * np.array(tokens)  # of a ratio of sums, rows drawn at random
        error = float(np.sqrt((spread**2).sum())) / sum(tokens)
        return Result(name, 8 * num_bytes / self.num_weights, kept, mean, error)

    def plain(self, name: str) -> Result:
        """Every layer in one scheme."""
        scheme = read_scheme(name, "--bits")
        if scheme is None:
            raise SystemExit(f"{name} is no quantization")
        weights = {path: there_and_back(weight, scheme) for path, weight in self.layers.items()}
        return self.result(name, weights, scheme.stored_bytes(self.num_weights))

    def with_kept_columns(self, scheme: Scheme, name: str, choice: Choice) -> Result:
        """Every layer in one scheme, and some columns of the linear ones in 16 bits beside it."""
        weights, num_bytes, num_kept = {}, float(scheme.stored_bytes(self.num_weights)), 0
        for path, weight in self.layers.items():
            seen = self.inputs.get(path)  # the embedding is looked up: it has no inputs
            columns = choice(weight, seen, scheme) if seen is not None else np.zeros(0, int)
            weights[path] = kept_apart(weight, scheme, columns)
            num_bytes += len(columns) * (2 * weight.shape[0] + INDEX_BYTES)
            num_kept += len(columns)
        return self.result(f"{scheme.name} + {name}", weights, num_bytes, num_kept)

    def mixed(self, name: str, num_bytes: float, importance: Mapping[str, float]) -> Result:
        """Each layer's own bits in groups of 64, for so many bytes at most, as `settle` chooses."""
        schemes = [scheme_named(f"int{bits}") for bits in WIDTHS]
        measured = []
        for path, weight in self.layers.items():
            size, options = float((weight**2).sum().item()), []
            for scheme in schemes:
                lost = float(((weight - there_and_back(weight, scheme)) ** 2).sum().item())
                worth = importance.get(path, size)
                options.append(Option(scheme, scheme.stored_bytes(weight.size), worth * lost / size))
            measured.append(MeasuredLayer(path, tuple(options)))
        chosen = choose(measured, int(num_bytes))
        weights = {path: there_and_back(self.layers[path], chosen[path].scheme) for path in chosen}
        return self.result(name, weights, sum(option.stored_bytes for option in chosen.values()))


def results(bench: Bench, bits: int) -> list[Result]:
    """All ways of about as many bytes."""
    scheme = scheme_named(f"int{bits}")
    found = [bench.plain(scheme.name)]
    for name, choice in (
        ("columns ≥ 6", by_threshold),
        ("1/32 by activation", by_activation),
        ("1/32 by loss", by_loss),
    ):
        found.append(bench.with_kept_columns(scheme, name, choice))
    budget = found[-1].bits_per_weight * bench.num_weights / 8
    found.append(bench.plain(f"{scheme.name}-g32"))
    found.append(bench.mixed("own bits by weights", budget, {}))
    found.append(bench.mixed("own bits by answers", budget, bench.importance))
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or folder of an unquantized Llama")
    parser.add_argument("--data", required=True, help="folder or .jsonl file")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 3], choices=WIDTHS)
    parser.add_argument("--plant", type=float, default=None, help="factor of planted outliers")
    parser.add_argument("--rows", type=int, default=60, help="of each split, at most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    assistant = load_assistant(options.model, quantization=QuantizationConfig(scheme="none"), dtype="float32")
    if options.plant is not None:
        plant(assistant.model, options.plant)
    config = DataConfig(path=options.data, max_seq_length=256, valid_fraction=0.5)
    dataset = load_dataset(config, assistant.tokenizer, seed=0)
    calibration = list(in_order(dataset.train[: options.rows], 8))
    bench = Bench(
        assistant.model, calibration, list(in_order((dataset.test or dataset.valid)[: options.rows], 8))
    )
    largest = max(float(seen.largest.max().item()) for seen in bench.inputs.values())
    tables = {bits: [asdict(result) for result in results(bench, bits)] for bits in options.bits}
    if options.json:
        print(json.dumps({**vars(options), "largest_activation": largest, "results": tables}))
        return
    print(f"largest activation {largest:.1f}; {bench.num_weights} weights")
    for rows in tables.values():
        print(f"\n{'':28} {'bits':>6} {'kept':>5} {'KL, nats':>10} {'± se':>9}")
        for row in rows:
            print(
                f"{row['name']:28} {row['bits_per_weight']:6.3f} {row['kept_columns']:5} "
                f"{row['divergence_nats']:10.6f} {row['standard_error']:9.6f}"
            )


if __name__ == "__main__":
    main()
