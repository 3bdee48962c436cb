"""Predicted memory of a training run: numbers in, bytes by part out. Pure; needs no MLX.

What stays (weights, low-rank tensors, optimizer state) follows from shapes and is exact. What a micro-batch
takes besides is a sum of sizes that follow from shapes too, each times a constant: how many arrays of that
size are alive at the peak. `benchmarks/memory_model.py` measures runs, fits the constants and tests them on
runs of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from mlx_qlora.errors import ConfigError

GIB = 1024**3
MIB = 1024**2

CACHE_SHARE = 8
"""MLX keeps freed buffers up to the budget over this (`limits.memory_limits`); on a GPU only."""

_MAC_SHARES = ((36 * GIB, 2 / 3), (None, 3 / 4))
"""Of a Mac's memory that its GPU may use, as Metal's recommendedMaxWorkingSetSize reports it."""

Phase = Literal["loss", "backward", "update"]


@dataclass(frozen=True)
class Step:
    """The sizes of one micro-batch, in bytes unless said otherwise.

    A layer's sizes are those of its largest kind, for all positions of the micro-batch, in the type of the
    activations; scores and logits are float32.
    """

    num_layers: int
    """Layers that keep something for the backward pass: those from the first adapted one on."""
    is_checkpointed: bool
    hidden: int
    """One array of hidden states."""
    outputs: int
    """What the linear layers of one decoder layer put out, together."""
    adapter_inputs: int
    """What the adapters of one layer keep of their inputs."""
    dropped_inputs: int
    """The same once more for each adapter, where dropout gives each its own."""
    scores: int
    """Attention scores that exist at once: of a block of queries, or of all."""
    are_scores_kept: bool
    """Whether each layer keeps them for the backward pass: where attention is not made block by block."""
    logits: int
    """Of a chunk and the next, which MLX may begin early; of all positions where the head cannot be split
    off."""
    is_head_plain: bool
    """Whether logits are hidden · Wᵀ and nothing else."""
    head: int
    """An unpacked head that is kept for all chunks."""
    head_float32: int
    """The head as float32, kept or not."""
    unpacked: int
    """The piece of the head that is unpacked, or laid out, at once; 0 where all of it is kept."""


@dataclass(frozen=True)
class Constants:
    """How many arrays of each size are alive at the peak: fitted, and none below 0."""

    layer_outputs: float = 1.0
    layer_inputs: float = 1.0
    layer_dropped: float = 1.0
    layer_scores: float = 1.0
    checkpoint: float = 1.0
    work_outputs: float = 1.0
    work_scores: float = 1.0
    loss_logits: float = 1.0
    loss_generic: float = 1.0
    loss_head: float = 1.0
    loss_unpacked: float = 1.0
    heap: float = 0.1
    """Of all these, once more: freed pieces of the C library's heap between live ones; not on a GPU."""
    head_heap: float = 0.1
    """Of the head in float32, for the same reason."""
    layer_bytes: float = 1.0 * MIB
    """What a layer takes besides: its part of the step's graph, its modules."""
    interpreter_bytes: float = 150.0 * MIB
    """Python, MLX, mlx-lm, the tokenizer's library and the report's, before any array."""


CONSTANTS = Constants(
    layer_outputs=1.24,
    layer_inputs=2.2,
    layer_dropped=1.58,
    layer_scores=5.16,
    checkpoint=2.29,
    work_outputs=0.0,
    work_scores=2.06,
    loss_logits=2.92,
    loss_generic=2.28,
    loss_head=0.92,
    loss_unpacked=11.39,
    heap=0.0,
    head_heap=0.14,
    layer_bytes=2.77 * MIB,
    interpreter_bytes=149.35 * MIB,
)
"""By `python benchmarks/memory_model.py --fit`, on Linux."""

CONSTANT_NAMES = tuple(field.name for field in fields(Constants))


def phase_terms(step: Step) -> dict[Phase, dict[str, float]]:
    """Sizes of what a phase of the step takes, by the constant that goes with each."""
    layer = {
        "layer_outputs": step.outputs,
        "layer_inputs": step.adapter_inputs,
        "layer_dropped": step.dropped_inputs,
        "layer_scores": step.scores if step.are_scores_kept else 0,
    }
    # Checkpointed, a layer keeps its input, and the rest comes back while it is its turn.
    kept = 0 if step.is_checkpointed else step.num_layers
    states = {"checkpoint": step.num_layers * step.hidden if step.is_checkpointed else 0}
    return {
        "backward": {
            **{name: max(kept, 1) * size for name, size in layer.items()},
            **states,
            "work_outputs": step.outputs,
            "work_scores": step.scores,
        },
        "loss": {
            **{name: kept * size for name, size in layer.items()},
            **states,
            "loss_logits": step.logits,
            "loss_generic": 0 if step.is_head_plain else step.logits,
            "loss_head": step.head,
            "loss_unpacked": step.unpacked,
        },
    }


def outside_terms(work: Workload, *, is_on_gpu: bool) -> dict[str, float]:
    """Sizes of what the process takes besides its arrays, by constant; `heap` counts the step's arrays."""
    return {
        "interpreter_bytes": 1,
        "layer_bytes": work.num_layers,
        "head_heap": 0 if is_on_gpu else work.step.head_float32,
    }


@dataclass(frozen=True)
class Workload:
    """One training run as numbers."""

    weights_bytes: int
    """The frozen base as it is loaded."""
    lora_bytes: int
    """All trained tensors, once."""
    optimizer_bytes: int
    step: Step
    num_layers: int
    """Of the model, adapted or not."""
    num_micro_batches: int
    """Per update: with more than one, gradients are summed."""


@dataclass(frozen=True)
class Budget:
    """What a run may take, and where that is known from."""

    num_bytes: int
    source: str
    keeps_buffers: bool = False
    """Whether MLX keeps freed buffers there: on a GPU."""


@dataclass(frozen=True)
class Plan:
    """Predicted bytes at the largest moment of a run."""

    parts: dict[str, int]
    """By part; they add up to `peak_bytes`."""
    phase: Phase
    """When the peak is reached: in the loss, the backward pass or the update."""
    budget: Budget

    @property
    def peak_bytes(self) -> int:
        """The most the process takes, freed buffers that MLX keeps included."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """The same without what MLX can give back."""
        return self.peak_bytes - self.parts["cache"]

    @property
    def fits(self) -> bool:
        """Whether the run stays within its budget."""
        return self.needed_bytes <= self.budget.num_bytes


def plan_memory(work: Workload, budget: Budget, constants: Constants = CONSTANTS) -> Plan:
    """Put a run's numbers together."""
    phases = phase_terms(work.step)
    phase = max(phases, key=lambda name: _total(phases[name], constants))
    terms = phases[phase]
    gradients = work.lora_bytes * (2 if work.num_micro_batches > 1 else 1)
    if (update := update_bytes(work)) > _total(terms, constants) + gradients:
        phase, terms, gradients = "update", {}, update
    sized = {name: round(getattr(constants, name) * size) for name, size in terms.items()}
    attention = sum(size for name, size in sized.items() if name.endswith("scores"))
    loss = sum(size for name, size in sized.items() if name.startswith("loss_"))
    outside = _total(outside_terms(work, is_on_gpu=budget.keeps_buffers), constants)
    if not budget.keeps_buffers:
        outside += constants.heap * sum(sized.values())
    parts = {
        "interpreter": round(outside),
        "weights": work.weights_bytes,
        "lora": work.lora_bytes + gradients,
        "optimizer": work.optimizer_bytes,
        "activations": sum(sized.values()) - attention - loss,
        "attention": attention,
        "loss": loss,
    }
    # Freed buffers are given back before an allocation passes the limit: the cache takes only what is left.
    room = max(0, budget.num_bytes - sum(parts.values()))
    cache = min(budget.num_bytes // CACHE_SHARE, sum(sized.values()), room) if budget.keeps_buffers else 0
    return Plan({**parts, "cache": cache}, phase, budget)


def update_bytes(work: Workload) -> int:
    """What the optimizer's update takes at its peak, beside tensors and state.

    Gradients, their clipped copy, new tensors, an intermediate result of the optimizer's formula, and its
    new state: MLX makes them all before it forgets the old ones.
    """
    return 4 * work.lora_bytes + work.optimizer_bytes


def _total(terms: dict[str, float], constants: Constants) -> float:
    return sum(getattr(constants, name) * size for name, size in terms.items())


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(G|GB|GIB|M|MB|MIB)?\s*", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Bytes of a machine's memory: ``8GB``, ``16``, ``512MB``. Memory is sold in powers of 1024.

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    num_bytes = 0.0
    if match is not None:
        unit = (match[2] or "G")[0].upper()
        num_bytes = float(match[1]) * (GIB if unit == "G" else MIB)
    if num_bytes < 1:
        raise ConfigError(f"{text!r} is no amount of memory.", where="--memory", run="… --memory 16GB")
    return round(num_bytes)


def mac_budget(memory_bytes: int) -> Budget:
    """What a Mac with this much memory lets its GPU use."""
    share = next(share for limit, share in _MAC_SHARES if limit is None or memory_bytes < limit)
    source = (
        f"a Mac with {memory_bytes / GIB:g} GB: its GPU may use {'2/3' if share < 0.7 else '3/4'} of that"
    )
    return Budget(round(memory_bytes * share), source, keeps_buffers=True)
