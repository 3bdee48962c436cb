"""From a configuration and a model's config.json to a memory plan; no weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil

from mlx_qlora.config import RunConfig, build_config, merge_trees, parse_assignment
from mlx_qlora.dataset import Batches, load_dataset
from mlx_qlora.dataset.batches import Layout
from mlx_qlora.dataset.packing import padded_length
from mlx_qlora.errors import ConfigError, MemoryBudgetError, MlxQloraError
from mlx_qlora.memory.monitor import MemoryMonitor, gpu_limit_bytes
from mlx_qlora.memory.plan import GIB, Budget, Plan, Workload, mac_budget, plan_memory
from mlx_qlora.objective.loss import row_layout
from mlx_qlora.presets import by_size, name_for
from mlx_qlora.presets import preset as preset_tree
from mlx_qlora.training.model_shape import MicroBatch, planned_model, planned_objective, workload
from mlx_qlora.weights.offload_plan import WEIGHTS_SHARE
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.source import ModelSource, resolve_model
from mlx_qlora.weights.tokenizer import read_tokenizer

MAX_UPDATES_LOOKED_AT = 2000
"""The largest micro-batch is looked for in the first so many updates of each run."""


@dataclass(frozen=True)
class Work:
    """How much a run has to do, from its data."""

    num_examples: int
    steps_per_epoch: int
    num_steps: int
    tokens_per_epoch: int
    lengths: tuple[int, ...]
    """Tokens of each training example, cut to max_seq_length."""
    largest: MicroBatch


@dataclass(frozen=True)
class Change:
    """One setting that lowers the peak, on top of those before it."""

    assignments: tuple[str, ...]
    """As ``--set`` takes them."""
    peak_bytes: int
    fits: bool
    effect: str
    """What it changes about the run, for a person."""

    @property
    def options(self) -> str:
        """As typed."""
        return " ".join(f"--set {assignment}" for assignment in self.assignments)


@dataclass(frozen=True)
class RunPlan:
    """A run's memory, how much it has to do, and what these figures take for granted."""

    plan: Plan
    numbers: Workload
    config: RunConfig
    batch: MicroBatch
    work: Work | None
    notes: tuple[str, ...]
    memory_bytes: int | None = None
    """Of the Mac it was planned for; None: this device."""

    def changes(self) -> list[Change]:
        """What to change until it fits, in order of least harm; each on top of those before.

        They are planned one by one, so this takes seconds. The last does not fit when nothing helps.
        """
        changes: list[Change] = []
        now = self
        for assignments, effect in _candidates(self):
            if now.plan.fits:
                break
            tree = now.config.model_dump(mode="json")
            for assignment in assignments:
                tree = merge_trees(tree, parse_assignment(assignment))
            tried = plan_run(
                build_config(tree), memory_bytes=self.memory_bytes, work=_reworked(now.work, tree)
            )
            if tried.plan.needed_bytes < now.plan.needed_bytes:
                now = tried
                changes.append(Change(assignments, now.plan.peak_bytes, now.plan.fits, effect))
        return changes

    @property
    def line(self) -> str:
        """The prediction in one line."""
        plan = self.plan
        verdict = "fits" if plan.fits else "does not fit; the budget is watched"
        return (
            f"predicted peak memory {plan.needed_bytes / GIB:.2f} GiB "
            f"of {plan.budget.num_bytes / GIB:.2f} GiB ({plan.budget.source}): {verdict}"
        )

    def check(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            MemoryBudgetError: with what to change.
        """
        if self.plan.fits:
            return
        changes = self.changes()
        lines = [f"{c.options}   # {c.effect}: {c.peak_bytes / GIB:.2f} GiB" for c in changes]
        if not changes or not changes[-1].fits:
            lines.append("No setting makes it fit: a smaller model, or one quantized to fewer bits, would.")
        told = "\n".join(f"  {line}" for line in lines)
        raise MemoryBudgetError(
            f"This run needs about {self.plan.needed_bytes / GIB:.2f} GiB and may use "
            f"{self.plan.budget.num_bytes / GIB:.2f} GiB ({self.plan.budget.source}). "
            f"What helps, in order:\n{told}",
            run="mlx-qlora train … "
            + " ".join(c.options for c in changes)
            + "   # or --force to go on as it is",
        )


def plan_run(config: RunConfig, *, memory_bytes: int | None = None, work: Work | None = None) -> RunPlan:
    """Predict a run's peak memory from its configuration and the model's config.json.

    Args:
        memory_bytes: Plan for a Mac with this much memory instead of this device.
        work: What `work_of` says of the data; without it every row is taken to be full.

    Raises:
        ConfigError: there is no model, or the low-rank layers do not fit it.
        ModelError: there is no config.json, or it describes no model that mlx-lm knows.
    """
    notes: list[str] = []
    source = config_source(config)
    on_cpu = memory_bytes is None and mx.default_device() == mx.cpu
    model = planned_model(source, config, notes, on_cpu=on_cpu)
    objective = planned_objective(model, source, notes)
    batch = work.largest if work is not None else full_batch(config, _layout(model, config))
    if work is None:
        notes.append("every row is taken to be full: the data was not read")
    numbers = workload(objective, batch, config, on_cpu=on_cpu)
    budget = _budget(config, memory_bytes)
    if config.model.offload:
        numbers = _offloaded(numbers, config, budget)
        notes.append(f"offload: weights take at most {numbers.weights_bytes / GIB:.2f} GiB of memory")
    return RunPlan(plan_memory(numbers, budget), numbers, config, batch, work, tuple(notes), memory_bytes)


def work_of(config: RunConfig) -> Work | None:
    """The run's steps, tokens and largest micro-batch, where data is named and the model has a tokenizer.

    Raises:
        DataError: the data cannot be used.
    """
    source = config_source(config)
    if config.data.path is None or not any(source.folder.glob("tokenizer*")):
        return None
    dataset = load_dataset(config.data, read_tokenizer(source.folder), config.training.seed)
    training = config.training
    layout = _layout(skeleton(source), config)
    batches = Batches(
        dataset.train, training.batch_size, training.gradient_accumulation, training.seed, layout
    )
    num_steps = training.max_steps or training.num_epochs * batches.steps_per_epoch
    seen = [b for step in range(min(num_steps, MAX_UPDATES_LOOKED_AT)) for b in batches.step(step)]
    largest = max(seen, key=lambda b: (b.inputs_BT.size, b.inputs_BT.shape[1]))
    lengths = tuple(len(example.tokens) for example in dataset.train)
    return Work(
        num_examples=len(lengths),
        steps_per_epoch=batches.steps_per_epoch,
        num_steps=num_steps,
        tokens_per_epoch=sum(lengths),
        lengths=lengths,
        largest=MicroBatch(
            largest.inputs_BT.shape[0],
            largest.inputs_BT.shape[1],
            max(b.target_tokens for b in seen),
            largest.longest,
            largest.segments_BT is not None,
        ),
    )


def admitted(config: RunConfig, *, is_begun: bool, force: bool) -> RunPlan | None:
    """The plan of a run that may start; None where none can be made.

    Args:
        is_begun: The run has done steps already: then what it does counts, not what was predicted.
        force: Start it although it does not fit.

    Raises:
        MemoryBudgetError: it cannot fit; the message says what to change.
    """
    try:
        planned = plan_run(config)
        if not planned.plan.fits and (work := work_of(config)) is not None:
            planned = plan_run(config, work=work)  # the real rows may be shorter
    except MlxQloraError:
        return None  # what is wrong with the model or the data is said where it is loaded
    if not (force or is_begun):
        planned.check()
    return planned


def auto_preset(model: str | None, *, memory_bytes: int | None = None) -> str:
    """The name of the preset for a Mac with this much memory (None: this device's), or a smaller one.

    Smaller when this model would not fit: the plan says so. One that cannot be planned is not asked about.
    """
    names = by_size()
    names = names[names.index(name_for(memory_bytes or psutil.virtual_memory().total)) :]
    if model is None:
        return names[0]
    for name in names:
        try:
            config = build_config(preset_tree(name), {"model": {"path": model}})
            if plan_run(config, memory_bytes=memory_bytes).plan.fits:
                return name
        except MlxQloraError:
            return names[0]
    return names[-1]


def config_source(config: RunConfig) -> ModelSource:
    """The model's config.json, fetched from the hub if need be; its weights are not needed.

    Raises:
        ConfigError: there is no model.
        ModelError: there is no config.json, or it cannot be used.
    """
    model = config.model
    if model.path is None:
        raise ConfigError("There is no model.", run="mlx-qlora plan --model M …")
    return resolve_model(model.path, model.revision, model.trust_remote_code, needs_weights=False)


def full_batch(config: RunConfig, layout: Layout) -> MicroBatch:
    """The largest micro-batch there can be: every row as long as it may be."""
    length, rows = config.data.max_seq_length - 1, config.training.batch_size
    width = padded_length(length)
    if rows > 1 and layout.row_capacity is None and layout.concatenates([length] * rows):
        return MicroBatch(1, padded_length(length * rows), length * rows, width, is_shared=True)
    return MicroBatch(rows, width, length * rows, width, is_shared=layout.row_capacity is not None)


def _layout(model: nn.Module, config: RunConfig) -> Layout:
    """As `Objective.layout`, for a model that keeps examples apart: to find that out takes its weights."""
    return row_layout(model, config.data, may_concatenate=True, is_banded=True)


def _budget(config: RunConfig, memory_bytes: int | None) -> Budget:
    given = config.training.memory_budget_gib
    if memory_bytes is not None:
        mac = mac_budget(memory_bytes)
        return (
            replace(mac, num_bytes=round(given * GIB), source="training.memory_budget_gib") if given else mac
        )
    source = "training.memory_budget_gib" if given else "this device"
    return Budget(MemoryMonitor().budget_bytes(given), source, keeps_buffers=gpu_limit_bytes() is not None)


def _offloaded(numbers: Workload, config: RunConfig, budget: Budget) -> Workload:
    """With some layers in their files: all are recomputed then, and weights keep to their own budget."""
    given = config.model.offload_budget_gib
    allowed = round(given * GIB if given is not None else WEIGHTS_SHARE * budget.num_bytes)
    step = replace(numbers.step, is_checkpointed=True)
    return replace(numbers, weights_bytes=min(numbers.weights_bytes, allowed), step=step)


def _candidates(run: RunPlan) -> Iterator[tuple[tuple[str, ...], str]]:
    """Changes in order of least harm: the same updates, the same at more time, less data, less adapter."""
    training, lora, size = run.config.training, run.config.lora, run.config.training.batch_size
    accumulation = training.gradient_accumulation
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        pair = (f"training.batch_size={size}", f"training.gradient_accumulation={accumulation}")
        yield pair, "the same updates in smaller micro-batches"
    if not training.gradient_checkpointing:
        yield ("training.gradient_checkpointing=true",), "the same updates, about half as fast again"
    length = run.config.data.max_seq_length
    while length > 64:
        length //= 2
        yield (f"data.max_seq_length={length}",), _truncated(run.work, length)
    layers = lora.num_layers
    total = _num_layers(run)
    layers = total if layers == -1 else layers
    while layers > 4:
        layers //= 2
        yield (f"lora.num_layers={layers}",), f"adapts the last {layers} of {total} layers"
    rank = lora.rank
    while rank > 4:
        rank //= 2
        yield (f"lora.rank={rank}",), "a smaller adapter"
    if not run.config.model.offload:
        yield ("model.offload=true",), "layers are read from their files each time: the same numbers, slower"


def _truncated(work: Work | None, length: int) -> str:
    if work is None:
        return "rows that are longer would be cut"
    cut = sum(tokens > length for tokens in work.lengths)
    return f"{100 * cut / max(work.num_examples, 1):.0f} % of rows would be cut"


def _reworked(work: Work | None, tree: dict[str, Any]) -> Work | None:
    """The same data in smaller micro-batches, or cut shorter: an upper bound of the largest one."""
    if work is None:
        return None
    length, size = tree["data"]["max_seq_length"], tree["training"]["batch_size"]
    lengths = tuple(min(tokens, length) for tokens in work.lengths)
    positions = sorted((tokens - 1 for tokens in lengths), reverse=True)[:size]
    width = padded_length(max(positions))
    largest = MicroBatch(len(positions), width, min(sum(positions), work.largest.labels), width)
    if work.largest.is_shared and not tree["data"]["packing"]:
        largest = MicroBatch(1, padded_length(sum(positions)), largest.labels, width, is_shared=True)
    return replace(work, lengths=lengths, largest=largest)


def _num_layers(run: RunPlan) -> int:
    return len(skeleton(config_source(run.config)).layers)
