"""What a run shows while it goes: a bar on a terminal, plain lines off it."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.presets import GIB
from mlx_qlora.training.events import (
    Event,
    MemoryPressure,
    Noted,
    RolledBack,
    RunFinished,
    RunStarted,
    Saved,
    StepDone,
    Validated,
)
from mlx_qlora.training.metrics import mean_loss


class ProgressDisplay:
    """An observer that shows a run: a bar per epoch on a terminal, plain lines off it. No colours.

    Args:
        steps_per_report: Updates between two lines; loss and speed are means over as many.
        stream: Where to; standard error when not given.
        is_terminal: Whether it can draw a bar; asked of the stream when not given.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        steps_per_report: int,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps_per_report, self.stream = steps_per_report, stream or sys.stderr
        self.is_terminal = self.stream.isatty() if is_terminal is None else is_terminal
        self._budget_bytes = 0
        self._clock = clock
        self._recent: deque[StepDone] = deque(maxlen=steps_per_report)
        self._run: RunStarted | None = None
        self._began: float | None = None
        self._steps_timed = 0
        self._pressure_step: int | None = None
        self._bar: Any = None
        self._epoch = 0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case Validated():
                self._say(f"Val loss {event.loss_nats:.4f} (step {event.step})")
            case Saved():
                self._say(f"✓ Checkpoint saved (step {event.step})")
                if event.is_best and event.step > 0:  # before the first update there is nothing to keep
                    self._say(f"✓ Best model saved (step {event.step})")
            case RolledBack():
                self._roll_back(event)
            case MemoryPressure():
                self._press(event)
            case Noted():
                self._say(f"! {event.text}")
            case RunFinished():
                self._finish(event)

    def close(self) -> None:
        """Leave the terminal's cursor on a line of its own; for a run that ends by an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _start(self, event: RunStarted) -> None:
        self._run, self._budget_bytes = event, event.budget_bytes
        self._recent.clear()
        self._began, self._steps_timed, self._pressure_step = None, 0, None
        share = event.trainable_parameters / max(event.total_parameters, 1)
        self._say(
            f"Training {_count(event.trainable_parameters)} of {_count(event.total_parameters)} parameters "
            f"({share:.2%}) on {event.num_examples} examples: "
            f"{event.total_steps} steps, {event.steps_per_epoch} an epoch"
        )
        for note in event.notes:
            self._say(f"  {note}")

    def _step(self, event: StepDone) -> None:
        if self._began is None:
            self._began = self._clock() - event.seconds
        self._steps_timed += 1
        self._recent.append(event)
        if event.skipped:
            self._say(f"! Update {event.step} skipped: {event.diagnosis or 'loss or gradient is not finite'}")
        if self.is_terminal:
            self._draw(event)
        elif event.step % self.steps_per_report == 0 or event.step == self._total_steps:
            total = f"/{self._total_steps}" if self._run else ""
            epochs = f"/{self._num_epochs}" if self._run else ""
            self._say(f"step {event.step}{total}  epoch {event.epoch}{epochs}  {'  '.join(self._figures())}")

    def _draw(self, event: StepDone) -> None:
        if self._bar is None or event.epoch != self._epoch:
            self._new_bar(event)
        self._bar.set_postfix_str(" ".join(self._figures(speed_unit="tok/s")), refresh=False)
        self._bar.update(event.step - self._first_step_of(event.epoch) - self._bar.n)

    def _new_bar(self, event: StepDone) -> None:
        self.close()
        self._epoch, first = event.epoch, self._first_step_of(event.epoch)
        length = min(self._run.steps_per_epoch, self._total_steps - first) if self._run else None
        self._bar = tqdm(
            total=length,
            initial=event.step - 1 - first,
            desc=f"Epoch {event.epoch}/{self._num_epochs}",
            postfix=" ".join(self._figures(speed_unit="tok/s")),
            file=self.stream,
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def _figures(self, speed_unit: str = "tokens/s") -> list[str]:
        last = self._recent[-1]
        speed = sum(s.tokens for s in self._recent) / max(sum(s.seconds for s in self._recent), 1e-9)
        parts = [
            f"loss {mean_loss((s.loss_nats, s.target_tokens) for s in self._recent if not s.skipped):.3f}",
            f"{speed:.0f} {speed_unit}",
            f"lr {last.learning_rate:.1e}",
            f"{last.memory.footprint_bytes / GIB:.1f}/{self._budget_bytes / GIB:.1f} GiB",
        ]
        if self._run and self._began is not None:
            pace = (self._clock() - self._began) / self._steps_timed  # includes validation and saving
            parts.append(f"ETA {duration((self._total_steps - last.step) * pace)}")
        return parts

    def _roll_back(self, event: RolledBack) -> None:
        self._recent.clear()
        self._say(
            f"! Back from step {event.from_step} to step {event.to_step}: updates were not finite. "
            f"The learning rate is now {event.learning_rate_factor:g} of the configured one"
        )

    def _press(self, event: MemoryPressure) -> None:
        last = self._pressure_step
        if last is not None and event.step - last < self.steps_per_report:
            return
        self._pressure_step = event.step
        self._say(
            f"! Memory {event.memory.footprint_bytes / GIB:.1f} GiB of {event.budget_bytes / GIB:.1f} GiB"
            f"{_system_state(event.memory)} (step {event.step}): {event.action}"
        )

    def _finish(self, event: RunFinished) -> None:
        self.close()
        if event.stopped_early:
            self._say(f"Stopped early at step {event.steps}: step {event.best_step} stayed the best")

    def _say(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self.is_terminal:
            tqdm.write(text, file=self.stream)  # keeps the bar below
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    @property
    def _total_steps(self) -> int:
        return self._run.total_steps if self._run else 0

    @property
    def _num_epochs(self) -> int:
        return -(-self._run.total_steps // self._run.steps_per_epoch) if self._run else 0

    def _first_step_of(self, epoch: int) -> int:
        return (epoch - 1) * self._run.steps_per_epoch if self._run else 0


def _system_state(memory: MemorySample) -> str:
    pressure = f", system pressure {memory.pressure}" if memory.pressure not in (None, "normal") else ""
    swap = f", swap grew {memory.swap_growth_bytes / GIB:.1f} GiB" if memory.swap_growth_bytes else ""
    return pressure + swap


def _count(number: int) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
