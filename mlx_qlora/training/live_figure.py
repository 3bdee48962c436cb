"""The picture of a run under way: one figure, made once, whose curves are replaced."""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_qlora.presets import GIB

# Okabe and Ito's colours, as in training.plots.
_BLUE, _SKY, _VERMILION, _GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
_PURPLE, _GREY = "#CC79A7", "#767676"

WIDTH_INCHES, HEIGHT_INCHES, DPI = 9.6, 4.4, 120


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the picture and the line below it say in one language."""

    loss: str
    each: str
    smoothed: str
    validation: str
    best: str
    skipped: str
    rate: str
    memory: str
    footprint: str
    peak: str
    updates: str
    beginning: str
    line: str
    ended: str
    stopped_early: str
    rolled_back: str
    update_skipped: str
    pressure: str
    notes: str


LABELS = {
    "en": Labels(
        loss="Loss, nats per target token",
        each="train, each update",
        smoothed="train, smoothed",
        validation="validation",
        best="★ best validation: {loss:.4f}, step {step}",
        skipped="skipped (not finite)",
        rate="Learning rate",
        memory="Memory, GiB",
        footprint="process",
        peak="MLX peak",
        updates="optimizer updates",
        beginning="{trained} of {parameters} parameters ({share:.2f} %) are trained on {examples} "
        "examples: {steps} steps, {per_epoch} an epoch",
        line="step {step}/{steps}  epoch {epoch}/{epochs}  loss {loss:.3f}  {speed:.0f} tokens/s  "
        "lr {rate:.1e}  memory {memory:.2f}/{budget:.1f} GiB  {left} left",
        ended="Finished after {steps} steps in {time}.",
        stopped_early="Stopped early after {steps} steps: step {best_step} stayed the best.",
        rolled_back="! Back from step {from_step} to step {to_step}: updates were not finite. "
        "The learning rate is now {factor:g} of the configured one",
        update_skipped="! Update {step} skipped: {why}",
        pressure="! Memory {memory:.2f} of {budget:.2f} GiB (step {step}): {action}",
        notes="The run says:",
    ),
    "pt": Labels(
        loss="Perda, nats por token-alvo",
        each="treino, cada passo",
        smoothed="treino, suavizado",
        validation="validação",
        best="★ melhor validação: {loss:.4f}, passo {step}",
        skipped="pulado (não finito)",
        rate="Taxa de aprendizado",
        memory="Memória, GiB",
        footprint="processo",
        peak="pico do MLX",
        updates="passos do otimizador",
        beginning="{trained} de {parameters} parâmetros ({share:.2f} %) são treinados com {examples} "
        "exemplos: {steps} passos, {per_epoch} por época",
        line="passo {step}/{steps}  época {epoch}/{epochs}  perda {loss:.3f}  {speed:.0f} tokens/s  "
        "taxa {rate:.1e}  memória {memory:.2f}/{budget:.1f} GiB  faltam {left}",
        ended="Terminou após {steps} passos, em {time}.",
        stopped_early="Parou antes do fim, após {steps} passos: o passo {best_step} continuou o melhor.",
        rolled_back="! Voltou do passo {from_step} ao passo {to_step}: havia passos não finitos. "
        "A taxa de aprendizado agora é {factor:g} da configurada",
        update_skipped="! Passo {step} pulado: {why}",
        pressure="! Memória {memory:.2f} de {budget:.2f} GiB (passo {step}): {action}",
        notes="O treino informa (em inglês):",
    ),
}


def _numbers() -> array[float]:
    return array("d")


@dataclass
class Curves:
    """What has been measured so far, by update; NaN where an update was skipped."""

    steps: array[float] = field(default_factory=_numbers)
    losses: array[float] = field(default_factory=_numbers)
    tokens: array[float] = field(default_factory=_numbers)
    rates: array[float] = field(default_factory=_numbers)
    footprints: array[float] = field(default_factory=_numbers)
    peaks: array[float] = field(default_factory=_numbers)
    validated_steps: array[float] = field(default_factory=_numbers)
    validation_losses: array[float] = field(default_factory=_numbers)

    def add_step(self, entry: Mapping[str, Any]) -> None:
        """Add one update: the fields of a StepDone, as `read_metrics` gives them."""
        loss = math.nan if entry["skipped"] or entry["loss_nats"] is None else entry["loss_nats"]
        self.steps.append(entry["step"])
        self.losses.append(loss)
        self.tokens.append(entry["target_tokens"])
        self.rates.append(entry["learning_rate"])
        self.footprints.append(entry["memory"]["footprint_bytes"] / GIB)
        self.peaks.append(entry["memory"]["mlx_peak_bytes"] / GIB)

    def add_validation(self, entry: Mapping[str, Any]) -> None:
        """Add one validation: the fields of a Validated."""
        loss = entry["loss_nats"]
        self.validated_steps.append(entry["step"])
        self.validation_losses.append(math.nan if loss is None or not math.isfinite(loss) else loss)

    def drop_after(self, step: int) -> None:
        """Forget what a roll-back has undone."""
        _cut(sum(s <= step for s in self.steps), self._of_updates())
        _cut(sum(s <= step for s in self.validated_steps), (self.validated_steps, self.validation_losses))

    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation, the first of equals."""
        pairs = zip(self.validation_losses, self.validated_steps, strict=True)
        finite = [(loss, step) for loss, step in pairs if not math.isnan(loss)]
        loss, step = min(finite, default=(math.nan, -1))
        return (int(step), loss) if finite else None

    def smoothed(self) -> np.ndarray:
        """Centred, token-weighted mean of the losses over a twentieth of the run; NaN values do not count."""
        losses, weights = np.array(self.losses), np.array(self.tokens)
        weights = np.where(np.isfinite(losses), weights, 0.0)
        half = max(1, len(losses) // 40)
        ends = np.clip(np.arange(len(losses)) + half + 1, 0, len(losses))
        begins = np.clip(np.arange(len(losses)) - half, 0, len(losses))
        total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(losses) * weights)])
        weight = np.concatenate([[0.0], np.cumsum(weights)])
        share = weight[ends] - weight[begins]
        mean = np.full(len(losses), np.nan)
        return np.divide(total[ends] - total[begins], share, out=mean, where=share > 0)

    def _of_updates(self) -> tuple[array[float], ...]:
        return (self.steps, self.losses, self.tokens, self.rates, self.footprints, self.peaks)


def _cut(count: int, columns: Iterable[array[float]]) -> None:
    for column in columns:
        del column[count:]


class LiveFigure:
    """Draws `Curves`; made once, so that a picture costs little more than its pixels. Needs matplotlib."""

    def __init__(self, labels: Labels) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Not pyplot: that would change the backend of a notebook. No layout engine: it draws twice.
        self._labels = labels
        self._figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI)
        self._canvas = FigureCanvasAgg(self._figure)
        grid = self._figure.add_gridspec(
            2,
            2,
            width_ratios=(1.9, 1),
            left=0.05,
            right=0.985,
            top=0.92,
            bottom=0.115,
            hspace=0.45,
            wspace=0.24,
        )
        self._loss: Any = self._figure.add_subplot(grid[:, 0])
        self._rate: Any = self._figure.add_subplot(grid[0, 1])
        self._memory: Any = self._figure.add_subplot(grid[1, 1])
        self._best = self._loss.set_title("", loc="right", fontsize=9, color=_GREY)
        self._lines = {**self._loss_lines(), **self._other_lines()}
        panels: tuple[Any, ...] = (self._loss, self._rate, self._memory)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            panel.set_axisbelow(True)
            panel.tick_params(labelsize=9)
            panel.xaxis.get_major_locator().set_params(integer=True, nbins=8 if panel is self._loss else 5)
            panel.yaxis.get_major_locator().set_params(nbins=7 if panel is self._loss else 5)

    def png(self, curves: Curves) -> bytes:
        """The picture, `WIDTH_INCHES` × `HEIGHT_INCHES` at `DPI`."""
        steps, losses = np.array(curves.steps), np.array(curves.losses)
        skipped = steps[np.isnan(losses)]
        best = curves.best()
        best_step, best_loss = ([best[0]], [best[1]]) if best else ([], [])
        for name, x, y in (
            ("each", steps, losses),
            ("smoothed", steps, curves.smoothed()),
            ("validation", np.array(curves.validated_steps), np.array(curves.validation_losses)),
            ("best", best_step, best_loss),
            ("skipped", skipped, np.full(len(skipped), 0.02)),
            ("rate", steps, np.array(curves.rates)),
            ("footprint", steps, np.array(curves.footprints)),
            ("peak", steps, np.array(curves.peaks)),
        ):
            self._lines[name].set_data(x, y)
        for name in ("smoothed", "rate", "footprint", "peak"):
            self._lines[name].set_marker("o" if len(steps) == 1 else "")  # one point is no line
        self._lines["skipped"].set_label(self._labels.skipped if len(skipped) else "_")
        self._best.set_text(self._labels.best.format(step=best[0], loss=best[1]) if best else "")
        self._set_limits(curves)
        self._loss.legend(frameon=False, fontsize=9, loc="upper right")
        file = io.BytesIO()
        self._canvas.print_png(file, pil_kwargs={"compress_level": 3})
        return file.getvalue()

    def _loss_lines(self) -> dict[str, Any]:
        panel, labels = self._loss, self._labels
        panel.set_title(labels.loss, loc="left", fontsize=11)
        panel.set_xlabel(labels.updates, fontsize=9)
        (each,) = panel.plot([], [], color=_SKY, alpha=0.6, linewidth=0.9, label=labels.each)
        (smoothed,) = panel.plot([], [], color=_BLUE, linewidth=2, label=labels.smoothed)
        (validation,) = panel.plot(
            [], [], color=_VERMILION, marker="o", markersize=5, linestyle="--", linewidth=1.2,
            label=labels.validation,
        )  # fmt: skip
        (best,) = panel.plot(
            [],
            [],
            color=_GREEN,
            marker="*",
            markersize=15,
            markeredgecolor="white",
            linestyle="none",
            zorder=5,
        )
        (skipped,) = panel.plot(
            [], [], color=_PURPLE, marker="x", linestyle="none", transform=panel.get_xaxis_transform()
        )
        return {
            "each": each,
            "smoothed": smoothed,
            "validation": validation,
            "best": best,
            "skipped": skipped,
        }

    def _other_lines(self) -> dict[str, Any]:
        labels = self._labels
        self._rate.set_title(labels.rate, loc="left", fontsize=11)
        self._rate.yaxis.set_major_formatter(
            lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0"
        )
        (rate,) = self._rate.plot([], [], color=_PURPLE, linewidth=1.5)
        self._memory.set_title(labels.memory, loc="left", fontsize=11)
        self._memory.set_xlabel(labels.updates, fontsize=9)
        (footprint,) = self._memory.plot([], [], color=_BLUE, linewidth=1.5, label=labels.footprint)
        (peak,) = self._memory.plot(
            [], [], color=_VERMILION, linestyle="--", linewidth=1.5, label=labels.peak
        )
        self._memory.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper right", borderpad=0)
        return {"rate": rate, "footprint": footprint, "peak": peak}

    def _set_limits(self, curves: Curves) -> None:
        last = max([*curves.steps[-1:], *curves.validated_steps[-1:], 1.0])
        first = min([*curves.steps[:1], *curves.validated_steps[:1], last - 1])
        margin = 0.02 * (last - first)
        for panel in (self._loss, self._rate, self._memory):
            panel.set_xlim(first - margin, last + margin)
        losses = np.array([*curves.losses, *curves.validation_losses])
        losses = losses[np.isfinite(losses)]
        low, high = (losses.min(), losses.max()) if losses.size else (0.0, 1.0)
        room = 0.06 * (high - low) or 0.5
        self._loss.set_ylim(low - room, high + room)
        self._rate.set_ylim(0, 1.15 * max(curves.rates, default=0.0) or 1.0)
        # Room for the legend above the lines.
        self._memory.set_ylim(0, 1.45 * max((*curves.footprints, *curves.peaks), default=0.0) or 1.0)
