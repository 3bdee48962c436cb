"""A run's loss, learning rate and memory, drawn in a notebook while it goes."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_qlora.errors import ConfigError
from mlx_qlora.presets import GIB
from mlx_qlora.training.display import ProgressDisplay, duration
from mlx_qlora.training.events import (
    Event,
    MemoryPressure,
    Noted,
    RolledBack,
    RunFinished,
    RunStarted,
    StepDone,
    Validated,
)
from mlx_qlora.training.live_figure import HEIGHT_INCHES, LABELS, WIDTH_INCHES, Curves, LiveFigure
from mlx_qlora.training.metrics import METRICS, events_named, mean_loss, read_metrics

TIME_SHARE = 0.01
"""Of a run's time that showing it may take, but for the first two pictures and the last."""

SECONDS_BETWEEN_LINES = 0.5
"""The line below the picture is replaced no more often: nobody reads faster."""

MAX_MESSAGES = 20
"""So many of the newest messages stay below the picture; all of them are in metrics.jsonl."""


class LivePlot:
    """An observer that shows a run in a notebook: a picture and a few lines below it, replaced as it goes.

    It works wherever a cell can display pictures (Jupyter, VS Code, Colab). Elsewhere, or without matplotlib,
    it shows what `ProgressDisplay` does. However the run ends, its last picture stays.

    Showing takes at most `TIME_SHARE` of the run's time: the slower the drawing, the rarer the pictures.
    Drawn whatever they cost are an empty one at the start, that of the first update, and the last.

    Args:
        language: ``en`` or ``pt``: what the picture and the lines say. The run's own notes are in English.
        adapter_path: The run's. If it is resumed, what it did before is drawn too.
        steps_per_report: Loss and speed are means over so many updates; outside of a notebook there is a line
            for each so many.
        is_notebook: Whether cells can display pictures; found out when not given.
        clock: Seconds that only grow.

    Raises:
        ConfigError: there is no such language.
    """

    def __init__(
        self,
        language: str = "en",
        adapter_path: str | Path | None = None,
        *,
        steps_per_report: int = 10,
        is_notebook: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if language not in LABELS:
            raise ConfigError(f"LivePlot speaks {' and '.join(LABELS)}, not {language!r}.")
        self.labels, self._clock = LABELS[language], clock
        self._adapter_path = Path(adapter_path) if adapter_path is not None else None
        is_shown = can_display_pictures() if is_notebook is None else is_notebook
        self._plain = None if is_shown else ProgressDisplay(steps_per_report)
        self._recent: deque[StepDone] = deque(maxlen=steps_per_report)
        self._figure: LiveFigure | None = None
        self._picture: Any = None
        self._text: Any = None
        self._begin(None)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._plain is not None:
            self._plain(event)
            return
        began = self._clock()
        self._take(event)
        if isinstance(event, RunStarted | RunFinished):
            self._show()
        elif self._run is not None:
            self._show_in_time(began)
        if self._began is not None:
            self._spent += self._clock() - began

    def close(self) -> None:
        """Draw what is not drawn yet; for a run that ends by an exception."""
        if self._plain is not None:
            self._plain.close()
        elif self._is_stale and self._run is not None:
            self._show()

    def __enter__(self) -> LivePlot:
        """Itself; `close` is called at the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def seconds_spent(self) -> float:
        """What showing this run has taken since its first update."""
        return self._spent

    def _begin(self, run: RunStarted | None) -> None:
        """Forget the run before: one plot may be given to several, one after the other."""
        self._run = run
        self._curves = Curves()
        self._messages: deque[str] = deque(maxlen=MAX_MESSAGES)
        self._opening: list[str] = []
        self._closing = ""
        self._recent.clear()
        self._began: float | None = None
        self._spent, self._drawing_costs = 0.0, 0.0
        self._text_at, self._steps_done, self._pressure_step = -math.inf, 0, -math.inf
        self._is_stale = False

    def _take(self, event: Event) -> None:
        self._is_stale = True
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case Validated():
                self._curves.add_validation(asdict(event))
            case RolledBack():
                self._roll_back(event)
            case MemoryPressure():
                self._press(event)
            case Noted():
                self._messages.append(f"! {event.text}")
            case RunFinished():
                self._finish(event)

    def _start(self, event: RunStarted) -> None:
        self._begin(event)
        self._picture = self._text = None  # a cell of its own
        self._opening = [
            self.labels.beginning.format(
                trained=_spaced(event.trainable_parameters),
                parameters=_spaced(event.total_parameters),
                share=100 * event.trainable_parameters / max(event.total_parameters, 1),
                examples=event.num_examples,
                steps=event.total_steps,
                per_epoch=event.steps_per_epoch,
            )
        ]
        if event.notes:
            self._opening += [self.labels.notes, *(f"  {note}" for note in event.notes)]
        if self._adapter_path is not None and event.first_step > 0:
            entries = read_metrics(self._adapter_path / METRICS)
            for entry in events_named(entries, "StepDone"):
                self._curves.add_step(entry)
            for entry in events_named(entries, "Validated"):
                self._curves.add_validation(entry)

    def _step(self, event: StepDone) -> None:
        if self._began is None:
            self._began = self._clock() - event.seconds
            self._drawing_costs = 0.0  # that of the empty picture was of imports and fonts
        self._curves.add_step(asdict(event))
        self._recent.append(event)
        self._steps_done += 1
        if event.skipped:
            why = event.diagnosis or self.labels.skipped
            self._messages.append(self.labels.update_skipped.format(step=event.step, why=why))

    def _roll_back(self, event: RolledBack) -> None:
        self._curves.drop_after(event.to_step)
        self._recent.clear()
        factor = event.learning_rate_factor
        self._messages.append(
            self.labels.rolled_back.format(from_step=event.from_step, to_step=event.to_step, factor=factor)
        )

    def _press(self, event: MemoryPressure) -> None:
        if event.step - self._pressure_step < (self._recent.maxlen or 1):
            return
        self._pressure_step = event.step
        memory, budget = event.memory.footprint_bytes / GIB, event.budget_bytes / GIB
        self._messages.append(
            self.labels.pressure.format(memory=memory, budget=budget, step=event.step, action=event.action)
        )

    def _finish(self, event: RunFinished) -> None:
        text = self.labels.stopped_early if event.stopped_early else self.labels.ended
        self._closing = text.format(
            steps=event.steps, best_step=event.best_step, time=duration(event.seconds)
        )

    def _show_in_time(self, now: float) -> None:
        """Everything, or else the text alone, if the run's time so far pays for it."""
        if self._began is None:
            return
        may_spend = TIME_SHARE * (now - self._began)
        if self._spent + self._drawing_costs <= may_spend:
            self._show()
        elif now - self._text_at >= SECONDS_BETWEEN_LINES and self._spent <= may_spend:
            self._show_text()

    def _show(self) -> None:
        self._draw()
        self._show_text()

    def _draw(self) -> None:
        began = self._clock()
        self._figure = self._figure or LiveFigure(self.labels)
        png = self._figure.png(self._curves)
        size = {"width": round(96 * WIDTH_INCHES), "height": round(96 * HEIGHT_INCHES)}
        said = "  ".join(filter(None, [self._line(), self._best()])) or self.labels.loss
        self._picture = _shown(
            self._picture, {"image/png": png, "text/plain": said}, {"image/png": {**size, "alt": said}}
        )
        self._drawing_costs, self._is_stale = self._clock() - began, False

    def _show_text(self) -> None:
        lines = [*self._opening, *self._messages, self._closing or self._line()]
        self._text = _shown(self._text, {"text/plain": "\n".join(filter(None, lines))}, {})
        self._text_at = self._clock()

    def _line(self) -> str:
        """Where the run stands, in one line; nothing before its first update."""
        if not self._recent or self._run is None or self._began is None:
            return ""
        run, last = self._run, self._recent[-1]
        pace = (self._clock() - self._began) / self._steps_done  # includes validation and saving
        return self.labels.line.format(
            step=last.step,
            steps=run.total_steps,
            epoch=last.epoch,
            epochs=-(-run.total_steps // run.steps_per_epoch),
            loss=mean_loss((s.loss_nats, s.target_tokens) for s in self._recent if not s.skipped),
            speed=sum(s.tokens for s in self._recent) / max(sum(s.seconds for s in self._recent), 1e-9),
            rate=last.learning_rate,
            memory=last.memory.footprint_bytes / GIB,
            budget=run.budget_bytes / GIB,
            left=duration((run.total_steps - last.step) * pace),
        )

    def _best(self) -> str:
        best = self._curves.best()
        return self.labels.best.format(step=best[0], loss=best[1]) if best else ""


def can_display_pictures() -> bool:
    """Whether this is a cell of a notebook, and matplotlib is installed."""
    interactive = sys.modules.get("IPython")  # not imported here: a notebook has it loaded
    shell = interactive.get_ipython() if interactive is not None else None
    return hasattr(shell, "kernel") and find_spec("matplotlib") is not None


def _spaced(number: int) -> str:
    """Digits in groups of three with spaces between, which reads the same in every language."""
    return f"{number:,}".replace(",", " ")


def _shown(handle: Any, data: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """`data` in the place of what `handle` showed, or in a new one."""
    if handle is None:
        from IPython.display import display

        return display(data, metadata=metadata, raw=True, display_id=True)
    handle.update(data, metadata=metadata, raw=True)
    return handle
