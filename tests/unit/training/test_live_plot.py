"""training/live_plot.py and live_figure.py: what a notebook shows of a run while it goes."""

import io
import math
import string
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from mlx_qlora.errors import ConfigError
from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.presets import GIB
from mlx_qlora.training import live_plot
from mlx_qlora.training.events import (
    MemoryPressure,
    Noted,
    RolledBack,
    RunFinished,
    RunStarted,
    StepDone,
    Validated,
)
from mlx_qlora.training.live_figure import LABELS, Curves, LiveFigure
from mlx_qlora.training.live_plot import TIME_SHARE, LivePlot, can_display_pictures
from mlx_qlora.training.metrics import METRICS, MetricsLog

MEMORY = MemorySample(
    mlx_active_bytes=GIB,
    mlx_cache_bytes=0,
    mlx_peak_bytes=GIB,
    footprint_bytes=3 * GIB // 2,
    system_available_bytes=4 * GIB,
    swap_growth_bytes=0,
)


def started(*, first_step=0, total_steps=10, notes=()) -> RunStarted:
    return RunStarted(
        first_step=first_step,
        total_steps=total_steps,
        steps_per_epoch=5,
        num_examples=20,
        trainable_parameters=1_500_000,
        total_parameters=3_000_000_000,
        budget_bytes=8 * GIB,
        notes=notes,
    )


def step_done(step: int, loss: float = 2.0, **fields) -> StepDone:
    defaults = {
        "step": step,
        "epoch": (step - 1) // 5 + 1,
        "loss_nats": loss,
        "target_tokens": 10,
        "tokens": 100,
        "tokens_seen": 100 * step,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "seconds": 0.5,
        "memory": MEMORY,
        "skipped": math.isnan(loss),
    }
    return StepDone(**{**defaults, **fields})


def validated(step: int, loss: float) -> Validated:
    return Validated(step=step, loss_nats=loss, target_tokens=40, is_best=False, seconds=2.0)


def finished(folder, *, stopped_early=False) -> RunFinished:
    return RunFinished(
        steps=10,
        tokens=1000,
        train_loss_nats=1.0,
        val_loss_nats=1.5,
        best_step=5,
        stopped_early=stopped_early,
        skipped_updates=0,
        seconds=65.0,
        tokens_per_second=15.0,
        peak_memory_bytes=GIB,
        adapter_path=folder,
    )


class Clock:
    """Seconds that pass when a test says so, or by as much as each look at it takes."""

    def __init__(self, per_look: float = 0.0) -> None:
        self.now, self.per_look = 0.0, per_look

    def __call__(self) -> float:
        self.now += self.per_look
        return self.now


@pytest.fixture(autouse=True, scope="module")
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def shown(events, plot):
    """Everything that is displayed while a plot is told the events."""
    with capture_output() as captured:
        for event in events:
            plot(event)
    return captured.outputs


def texts(outputs):
    return [each.data["text/plain"] for each in outputs if "image/png" not in each.data]


def images(outputs):
    return [each for each in outputs if "image/png" in each.data]


def test_one_picture_and_one_text_are_shown_and_replaced(tmp_path):
    run = [started(), validated(0, 3.0), *(step_done(step) for step in range(1, 11)), finished(tmp_path)]
    outputs = shown(run, LivePlot(is_notebook=True))
    for kind in (images(outputs), [each for each in outputs if "image/png" not in each.data]):
        assert [each.update for each in kind] == [False] + [True] * (len(kind) - 1)
        assert len({each.transient["display_id"] for each in kind}) == 1
    picture = images(outputs)[-1]
    assert picture.data["image/png"].startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture.data["image/png"][16:24])
    size = picture.metadata["image/png"]
    assert width / size["width"] == pytest.approx(height / size["height"], abs=0.01)
    assert "step 10/10" in size["alt"]
    assert "3.0000, step 0" in size["alt"]
    assert texts(outputs)[-1].endswith("Finished after 10 steps in 1:05.")


def test_the_last_picture_is_drawn_when_a_run_ends_by_an_exception():
    plot = LivePlot(is_notebook=True, clock=Clock(per_look=0.02))

    def stopped():
        with plot:
            shown([started(), *(step_done(step) for step in range(1, 5))], plot)
            raise KeyboardInterrupt

    with capture_output() as captured, pytest.raises(KeyboardInterrupt):
        stopped()
    assert "step 4/10" in images(captured.outputs)[-1].data["text/plain"]
    with capture_output() as captured:
        plot.close()
    assert captured.outputs == []  # once is enough


def test_drawing_takes_no_more_than_its_share_of_the_time(monkeypatch):
    clock, draw, display = Clock(), LiveFigure.png, live_plot._shown

    def slow_png(figure, curves):
        clock.now += 0.2
        return draw(figure, curves)

    def slow_display(*shown):
        clock.now += 0.01
        return display(*shown)

    monkeypatch.setattr(LiveFigure, "png", slow_png)
    monkeypatch.setattr(live_plot, "_shown", slow_display)
    plot = LivePlot(is_notebook=True, clock=clock)
    with capture_output() as captured:
        plot(started(total_steps=150))
        begun = clock.now
        for step in range(1, 151):
            clock.now += 0.5
            plot(step_done(step))
    taken, allowed = plot.seconds_spent, TIME_SHARE * (clock.now - begun)
    first_picture = 0.22
    assert taken <= allowed + first_picture
    assert taken > allowed / 2  # and it is not idle where it need not be
    assert clock.now == pytest.approx(begun + 150 * 0.5 + taken)  # nothing goes uncounted
    assert len(images(captured.outputs)) >= 2


def test_updates_that_take_long_are_each_drawn():
    clock = Clock()
    plot = LivePlot(is_notebook=True, clock=clock)
    outputs = []
    for event in [started(), *(step_done(step) for step in range(1, 6))]:
        clock.now += 100
        outputs.append(len(images(shown([event], plot))))
    assert outputs == [1] * 6


def test_a_resumed_run_is_drawn_from_its_beginning(tmp_path):
    log = MetricsLog(tmp_path / METRICS)
    for event in [started(), validated(0, 3.0), *(step_done(step, 2.0) for step in range(1, 5))]:
        log(event)
    plot = LivePlot(adapter_path=tmp_path, is_notebook=True)
    shown([started(first_step=4), step_done(5)], plot)
    assert list(plot._curves.steps) == [1, 2, 3, 4, 5]
    assert list(plot._curves.validated_steps) == [0]
    shown([started()], plot)  # begun anew: what the folder holds is of another run
    assert list(plot._curves.steps) == []


def test_what_a_roll_back_has_undone_is_not_drawn():
    plot = LivePlot(is_notebook=True)
    events = [started(), validated(0, 3.0), *(step_done(step) for step in range(1, 5)), validated(4, 9.0)]
    outputs = shown(
        [*events, step_done(5, math.nan), RolledBack(from_step=5, to_step=2, learning_rate_factor=0.5)], plot
    )
    assert list(plot._curves.steps) == [1, 2]
    assert list(plot._curves.validated_steps) == [0]
    with capture_output() as captured:
        plot.close()
    assert "Back from step 5 to step 2" in texts([*outputs, *captured.outputs])[-1]


def test_what_a_person_should_know_stands_below_the_picture(tmp_path):
    pressure = [
        MemoryPressure(step=step, memory=MEMORY, budget_bytes=GIB, action="cleared the cache")
        for step in (2, 3)
    ]
    run = [
        started(notes=("a note",)),
        step_done(1, math.nan, diagnosis="micro-batch 1"),
        step_done(2),
        *pressure,
        Noted(step=3, text="a tracker failed"),
        finished(tmp_path, stopped_early=True),
    ]
    text = texts(shown(run, LivePlot("pt", is_notebook=True)))[-1]
    assert "a note" in text
    assert "1 500 000 de 3 000 000 000 parâmetros (0.05 %)" in text
    assert "Passo 1 pulado: micro-batch 1" in text
    assert text.count("cleared the cache") == 1  # not once an update
    assert "! a tracker failed" in text
    assert text.endswith("Parou antes do fim, após 10 passos: o passo 5 continuou o melhor.")


def test_outside_of_a_notebook_it_shows_plain_lines(capsys):
    assert not can_display_pictures()  # a shell, but no kernel
    plot = LivePlot(steps_per_report=2)
    with capture_output(stdout=False, stderr=False) as captured, plot:
        for event in [started(), *(step_done(step) for step in range(1, 5))]:
            plot(event)
    assert captured.outputs == []
    assert [line[:7] for line in capsys.readouterr().err.splitlines()[1:]] == ["step 2/", "step 4/"]


def test_without_matplotlib_it_shows_plain_lines(monkeypatch, shell):
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    assert can_display_pictures()
    monkeypatch.setattr(live_plot, "find_spec", lambda _name: None)
    assert not can_display_pictures()


def test_a_language_it_does_not_speak_is_refused():
    with pytest.raises(ConfigError, match="en and pt"):
        LivePlot("tlh")


def test_every_language_fills_in_the_same_figures():
    def fields(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english, *others = LABELS.values()
    for labels in others:
        assert {name: fields(text) for name, text in vars(labels).items()} == {
            name: fields(text) for name, text in vars(english).items()
        }


@given(
    losses=st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), min_size=1, max_size=120),
    seed=st.integers(0, 99),
)
def test_the_smooth_curve_is_the_mean_over_the_updates_around(losses, seed):
    weights = np.random.default_rng(seed).integers(1, 50, len(losses))
    curves = Curves()
    for step, (loss, tokens) in enumerate(zip(losses, weights, strict=True), start=1):
        entry = {"step": step, "loss_nats": loss, "skipped": math.isnan(loss), "target_tokens": int(tokens)}
        memory = {"footprint_bytes": 0, "mlx_peak_bytes": 0}
        curves.add_step({**entry, "learning_rate": 1e-4, "memory": memory})
    half = max(1, len(losses) // 40)
    for index, mean in enumerate(curves.smoothed()):
        around = slice(max(0, index - half), index + half + 1)
        pairs = [(x, w) for x, w in zip(losses[around], weights[around], strict=True) if not math.isnan(x)]
        expected = sum(x * w for x, w in pairs) / sum(w for _, w in pairs) if pairs else math.nan
        assert mean == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_a_picture_of_nothing_and_of_one_update_can_be_drawn():
    figure, curves = LiveFigure(LABELS["en"]), Curves()
    empty = figure.png(curves)
    curves.add_step({**vars(step_done(1)), "memory": vars(MEMORY)})
    one = figure.png(curves)
    curves.add_validation({"step": 1, "loss_nats": None})
    curves.add_step({**vars(step_done(2, math.nan)), "memory": vars(MEMORY)})
    assert len({empty, one, figure.png(curves)}) == 3
    purple = bytes.fromhex("CC79A7FF")  # the learning rate's: a line of one point would not be seen
    assert (pixels(empty).count(purple), pixels(one).count(purple) > 20) == (0, True)
    assert curves.best() is None


def test_what_a_line_showed_before_is_gone_from_the_next_picture():
    """The figure is used again and again; it draws what a new one would."""
    figure, curves = LiveFigure(LABELS["en"]), Curves()
    for step in range(1, 30):
        curves.add_step(
            {**vars(step_done(step, math.nan if step == 20 else 1 / step)), "memory": vars(MEMORY)}
        )
    figure.png(curves)
    curves.drop_after(10)
    assert pixels(figure.png(curves)) == pixels(LiveFigure(LABELS["en"]).png(curves))


def pixels(png):
    from PIL import Image

    return Image.open(io.BytesIO(png)).tobytes()
