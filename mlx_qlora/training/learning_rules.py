"""Rules about what a run learnt: its rate, its length, and what it was validated on."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mlx_qlora.training.metrics import Entry, best_validation, events_named, mean_loss
from mlx_qlora.training.suggestion import RunFacts, Suggestion, counted, times, updates

MIN_RISE_NATS = 0.02
"""A validation that rose by less, or by less than 1 % of the best loss, is noise."""
MIN_FALL = 0.02
"""Share of the loss that the last quarter of a run must have taken off for a longer run to be worth it."""
SPIKE_WINDOW, SPIKE_FACTOR, MIN_SPIKES = 16, 2.0, 3
"""A loss over twice the median of the sixteen updates before, and half a nat above it, is a spike."""


def too_high_rate(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Updates were skipped, undone, or spiked; or the loss ended far above where it began."""
    steps, training = updates(entries), facts.config.training
    undone = events_named(entries, "RolledBack")
    skipped = [s for s in steps if s["skipped"]]
    spikes = _spikes([s for s in steps if not s["skipped"]])
    evidence = [f"the run went back {times(len(undone))}"] if undone else []
    evidence += [f"{counted(len(skipped), 'update')} skipped as not finite"] if skipped else []
    spikes = spikes if len(spikes) >= max(MIN_SPIKES, len(steps) // 100) else []
    if spikes:
        evidence.append(f"{len(spikes)} updates had over twice the loss of those before them")
    rise = _rise(steps)
    if rise is not None:
        evidence.append(f"the training loss rose from {rise[0]:.2f} to {rise[1]:.2f}")
    elif (rise := _undone(entries)) is not None:
        evidence.append(f"validation rose from {rise[0]:.2f}, the base's, to {rise[1]:.2f}")
    if not evidence:
        return None
    factor = min([0.5, *(back["learning_rate_factor"] for back in undone)])
    if rise is not None or spikes:
        factor = min(factor, 0.2)
    norm = median([s["grad_norm"] for s in steps if s["grad_norm"] is not None] or [0.0])
    assignments = [f"training.learning_rate={training.learning_rate * factor:.1e}"]
    first = min([s["step"] for s in skipped] + [b["to_step"] + 1 for b in undone] + spikes, default=None)
    if first is not None and first <= max(2 * training.warmup_steps, len(steps) // 10):
        assignments.append(f"training.warmup_steps={max(2 * training.warmup_steps, 10)}")
    reason = f"the learning rate is too high: {', '.join(evidence)}; the median gradient norm is {norm:.2g}"
    return Suggestion(topic="learning rate", reason=reason, assignments=tuple(assignments))


def overfitting(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Validation rose after its best while the training loss went on falling."""
    best, checked = best_validation(entries), _validations(entries)
    if best is None or best["step"] == checked[-1]["step"] or _stopped_early(entries):
        return None
    rise = checked[-1]["loss_nats"] - best["loss_nats"]
    steps = updates(entries)
    before = mean_loss((s["loss_nats"], s["target_tokens"]) for s in steps if s["step"] <= best["step"])
    since = mean_loss((s["loss_nats"], s["target_tokens"]) for s in steps if s["step"] > best["step"])
    if rise < max(MIN_RISE_NATS, 0.01 * best["loss_nats"]) or (best["step"] > 0 and not since < before):
        return None
    if best["step"] == 0:
        return Suggestion(
            topic="overfitting",
            reason=f"no update helped: validation rose {rise:.2f} above the base's {best['loss_nats']:.2f}",
            assignments=(f"training.learning_rate={facts.config.training.learning_rate / 5:.1e}",),
        )
    epoch = max(s["epoch"] for s in steps if s["step"] <= best["step"])
    return Suggestion(
        topic="overfitting",
        reason=(
            f"overfitting from epoch {epoch}: validation rose {rise:.2f} while the training loss fell "
            f"{before - since:.2f}; best is step {best['step']}, which is the one kept"
        ),
        assignments=("training.early_stopping_patience=2",),
    )


def still_learning(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Validation was still falling when the updates ran out."""
    checked, steps = _validations(entries), updates(entries)
    if len(checked) < 3 or not steps or _stopped_early(entries):
        return None
    last, best = checked[-1], best_validation(entries)
    quarter = [v for v in checked if v["step"] <= 0.75 * steps[-1]["step"]]
    if not quarter or best is None or best["step"] != last["step"] or last["step"] < steps[-1]["step"]:
        return None
    fall = quarter[-1]["loss_nats"] - last["loss_nats"]
    if fall < MIN_FALL * quarter[-1]["loss_nats"]:
        return None
    training = facts.config.training
    longer = (
        f"training.max_steps={2 * training.max_steps}"
        if training.max_steps
        else f"training.num_epochs={2 * training.num_epochs}"
    )
    reason = (
        f"validation was still falling: {quarter[-1]['loss_nats']:.3f} at step {quarter[-1]['step']}, "
        f"{last['loss_nats']:.3f} at the end"
    )
    return Suggestion(topic="length of the run", reason=reason, assignments=(longer,))


def no_validation(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Nothing was held out, so nothing says when to stop."""
    if not updates(entries) or events_named(entries, "Validated"):
        return None
    return Suggestion(
        topic="validation",
        reason="no row was held out: overfitting cannot be seen, and the last adapter is kept, not the best",
        assignments=(f"data.valid_fraction={0.1 if facts.config.data.valid_fraction < 0.1 else 0.2}",),
    )


def _validations(entries: Sequence[Entry]) -> list[Entry]:
    return [v for v in events_named(entries, "Validated") if v["loss_nats"] is not None]


def _stopped_early(entries: Sequence[Entry]) -> bool:
    return any(end["stopped_early"] for end in events_named(entries, "RunFinished"))


def _spikes(steps: Sequence[Entry]) -> list[int]:
    losses = [s["loss_nats"] for s in steps]
    found = []
    for at in range(SPIKE_WINDOW, len(losses)):
        usual = median(losses[at - SPIKE_WINDOW : at])
        if losses[at] > max(SPIKE_FACTOR * usual, usual + 0.5):
            found.append(steps[at]["step"])
    return found


def _undone(entries: Sequence[Entry]) -> tuple[float, float] | None:
    """Validation loss of the base and at the end, where training undid what the base knew.

    A rate that wrecks a model does so in its first updates: their mean shows no rise any more.
    """
    checked = _validations(entries)
    if not checked or checked[0]["step"] != 0:
        return None
    first, last = checked[0]["loss_nats"], checked[-1]["loss_nats"]
    return (first, last) if last > max(SPIKE_FACTOR * first, first + 0.5) else None


def _rise(steps: Sequence[Entry]) -> tuple[float, float] | None:
    """Mean loss of the first fifth and of the last, where it rose; None with too few updates to tell."""
    fifth = len(steps) // 5
    if fifth < 2:
        return None
    first, last = (
        mean_loss((s["loss_nats"], s["target_tokens"]) for s in part)
        for part in (steps[:fifth], steps[-fifth:])
    )
    return (first, last) if last > first + max(0.1, 0.02 * first) else None
