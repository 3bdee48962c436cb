"""Rules about what a run cost: rows that were lost, padding, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mlx_qlora.config import RunConfig
from mlx_qlora.presets import GIB
from mlx_qlora.training.metrics import Entry, events_named
from mlx_qlora.training.suggestion import RunFacts, Suggestion, counted, times, updates
from mlx_qlora.training.window import best_window

MIN_EMPTY = 0.25
"""Share of all positions that padding may take."""
MIN_SPEEDUP = 1.15
MIN_SLOWDOWN = 0.25
MIN_CUT = 0.01
"""Share of rows that may be cut before it is said."""
MIN_SWAP_BYTES = 256 * 1024**2
ROOMY = 0.6
"""A run that needs less of its budget leaves room."""


def cut_rows(_entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Rows were longer than the window."""
    lost, window = facts.cut_rows + facts.dropped_rows, facts.config.data.max_seq_length
    if facts.num_rows == 0 or lost / facts.num_rows < MIN_CUT:
        return None
    done = "cut" if facts.cut_rows else "dropped"
    return Suggestion(
        topic="cut rows",
        reason=f"{lost} of {facts.num_rows} rows ({lost / facts.num_rows:.0%}) were longer than {window} "
        f"tokens and {done}",
        assignments=(f"data.max_seq_length={2 * window}",),
    )


def unlabelled_rows(_entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Rows were read from which nothing can be learnt."""
    if facts.unlabelled_rows == 0:
        return None
    return Suggestion(
        topic="rows without a target",
        reason=f"{counted(facts.unlabelled_rows, 'row')} left out: the prompt fills the window of "
        f"{facts.config.data.max_seq_length} tokens, so no token of the answer is left to learn",
        assignments=(f"data.max_seq_length={2 * facts.config.data.max_seq_length}",),
    )


def empty_window(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Much of what was computed was padding, and another layout would compute less."""
    counted = [s for s in updates(entries) if s.get("positions")]
    positions = sum(s["positions"] for s in counted)
    if not positions or facts.window is None:
        return None
    empty = 1 - sum(s["tokens"] for s in counted) / positions
    found = best_window(facts.window, facts.config.data)
    if empty < MIN_EMPTY or found is None or found.factor < MIN_SPEEDUP:
        return None
    return Suggestion(
        topic="padding",
        reason=f"{empty:.0%} of the positions were padding; an epoch is {found.factor:.1f}× cheaper, by the "
        f"cost model of positions and attention, {found.effect}",
        assignments=(found.assignment,),
    )


def falling_speed(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Updates became slower, and memory was short."""
    steps = [s for s in updates(entries) if s["seconds"] > 0]
    if len(steps) < 12:
        return None
    quarter = len(steps) // 4
    first, last = (
        median(s["tokens"] / s["seconds"] for s in part) for part in (steps[:quarter], steps[-quarter:])
    )
    fall = 1 - last / first if first else 0.0
    swap = max(s["memory"]["swap_growth_bytes"] for s in steps)
    pressed = sorted({s["memory"]["pressure"] for s in steps if s["memory"].get("pressure")} - {"normal"})
    if fall < MIN_SLOWDOWN or not (swap >= MIN_SWAP_BYTES or pressed or _is_over_budget(entries)):
        return None
    signs = [f"swap grew {swap / GIB:.1f} GiB"] if swap >= MIN_SWAP_BYTES else []
    signs += [f"the system's memory pressure was {' and '.join(pressed)}"] if pressed else []
    signs += ["the footprint passed its budget"] if _is_over_budget(entries) else []
    return Suggestion(
        topic="swap",
        reason=f"tokens per second fell {fall:.0%} over the run ({first:.0f} → {last:.0f}) while "
        f"{', '.join(signs)}",
        assignments=_smaller(facts.config),
    )


def relieved(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """The trainer had to halve micro-batches: the next run may begin with them."""
    halved = [e for e in events_named(entries, "MemoryPressure") if e["action"].startswith("halved")]
    if not halved:
        return None
    training, count = facts.config.training, len(halved)
    size = max(1, training.batch_size >> count)
    worst = max(e["memory"]["footprint_bytes"] for e in events_named(entries, "MemoryPressure"))
    return Suggestion(
        topic="memory",
        reason=f"the micro-batch was halved {times(count)} for want of memory ({worst / GIB:.2f} GiB, with "
        f"{halved[-1]['budget_bytes'] / GIB:.2f} allowed); the updates stayed the same",
        assignments=(
            f"training.batch_size={size}",
            f"training.gradient_accumulation={training.gradient_accumulation * training.batch_size // size}",
        ),
    )


def room_left(entries: Sequence[Entry], facts: RunFacts) -> Suggestion | None:
    """Memory was left that would buy time."""
    steps, room = updates(entries), facts.room
    if room is None or not steps or _is_over_budget(entries):
        return None
    used = max(s["memory"]["footprint_bytes"] for s in steps)
    if used > ROOMY * room.budget_bytes:
        return None
    return Suggestion(
        topic="memory left",
        reason=f"the run took {used / GIB:.2f} of {room.budget_bytes / GIB:.2f} GiB; by the plan "
        f"{room.needed_bytes / GIB:.2f} GiB are enough to have {room.effect}",
        assignments=room.assignments,
    )


def _is_over_budget(entries: Sequence[Entry]) -> bool:
    return bool(events_named(entries, "MemoryPressure"))


def _smaller(config: RunConfig) -> tuple[str, ...]:
    """The same updates in less memory."""
    training = config.training
    if training.batch_size % 2 == 0:
        return (
            f"training.batch_size={training.batch_size // 2}",
            f"training.gradient_accumulation={training.gradient_accumulation * 2}",
        )
    if not training.gradient_checkpointing:
        return ("training.gradient_checkpointing=true",)
    return (f"data.max_seq_length={max(2, config.data.max_seq_length // 2)}",)
