"""What the report and its suggestions know of a run besides its metrics."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_qlora.config import build_config, merge_trees, parse_assignment
from mlx_qlora.errors import MlxQloraError
from mlx_qlora.objective.segments import keeps_examples_apart
from mlx_qlora.training.cost_rules import ROOMY
from mlx_qlora.training.planning import RunPlan, plan_run
from mlx_qlora.training.report_sections import PlanSummary
from mlx_qlora.training.run_parts import Parts
from mlx_qlora.training.suggestion import Room, RunFacts
from mlx_qlora.training.trainer import Trainer
from mlx_qlora.training.window import Window

SPARE = 0.85
"""Of the budget that a suggested setting may take, by the plan."""

_UNLABELLED = "no token to learn"


def run_facts(trainer: Trainer, parts: Parts) -> RunFacts:
    """The facts of a run that has ended."""
    split = parts.dataset.report.splits["train"]
    return RunFacts(
        config=parts.config,
        num_rows=split.rows + split.dropped + len(split.bad),
        cut_rows=split.truncated,
        dropped_rows=split.dropped,
        unlabelled_rows=sum(_UNLABELLED in problem for problem in split.bad),
        window=Window(
            lengths=tuple(len(example.tokens) for example in parts.dataset.train),
            batch_size=parts.config.training.batch_size,
            layout=trainer.batches.layout,
            seed=parts.config.training.seed,
            may_pack=trainer.objective.keeps_examples_apart
            and keeps_examples_apart(trainer.objective.model, num_rows=2),
        ),
        room=_room(parts.planned, parts.monitor.peak_footprint_bytes),
    )


def plan_summary(planned: RunPlan | None) -> PlanSummary | None:
    """What the plan predicted, as the report tells it."""
    if planned is None:
        return None
    plan = planned.plan
    return PlanSummary(
        parts={name: size for name, size in plan.parts.items() if size},
        needed_bytes=plan.needed_bytes,
        budget_bytes=plan.budget.num_bytes,
        budget_source=plan.budget.source,
        phase=plan.phase,
        notes=planned.notes,
    )


def _room(planned: RunPlan | None, peak_bytes: int) -> Room | None:
    """The first setting that buys time with memory that this run left, and still fits."""
    if planned is None or peak_bytes > ROOMY * planned.plan.budget.num_bytes:
        return None
    for assignments, effect in _faster(planned):
        tree = planned.config.model_dump(mode="json")
        for assignment in assignments:
            tree = merge_trees(tree, parse_assignment(assignment))
        try:
            plan = plan_run(build_config(tree)).plan
        except MlxQloraError:
            return None
        if plan.needed_bytes <= SPARE * plan.budget.num_bytes:
            return Room(
                assignments=assignments,
                needed_bytes=plan.needed_bytes,
                budget_bytes=plan.budget.num_bytes,
                effect=effect,
            )
    return None


def _faster(planned: RunPlan) -> Sequence[tuple[tuple[str, ...], str]]:
    training = planned.config.training
    changes: list[tuple[tuple[str, ...], str]] = []
    if training.gradient_checkpointing:
        changes.append(
            (
                ("training.gradient_checkpointing=false",),
                "no layer computed twice, which takes a third of a step",
            )
        )
    # On a CPU a larger micro-batch is no faster.
    if training.gradient_accumulation % 2 == 0 and mx.default_device() != mx.cpu:
        halved, doubled = training.gradient_accumulation // 2, training.batch_size * 2
        pair = (f"training.batch_size={doubled}", f"training.gradient_accumulation={halved}")
        changes.append((pair, "the same updates in half as many micro-batches"))
    return changes
