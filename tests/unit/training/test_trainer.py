"""training/trainer.py: the loop, with real models and injected surroundings."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import RunConfig, TrainingConfig
from mlx_qlora.dataset.batches import Batches, in_order
from mlx_qlora.dataset.records import Example
from mlx_qlora.errors import DivergenceError, Interrupted, MemoryBudgetError
from mlx_qlora.memory.monitor import MemoryMonitor
from mlx_qlora.objective.evaluate import Evaluation
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.training import trainer
from mlx_qlora.training.checkpoint import CheckpointStore, RunIdentity
from mlx_qlora.training.events import MemoryPressure, RolledBack, Saved, StepDone, Validated
from mlx_qlora.training.guard import StopRequest
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.trainer import Trainer
from tests.tiny import VOCAB, tiny_llama, with_lora


def examples(count: int, *, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, VOCAB, rng.integers(4, 40)).astype(np.int32) for _ in range(count)]
    return [Example(row, np.arange(len(row)) > 1, f"made:{i}") for i, row in enumerate(rows)]


class Run:
    """A trainer, with everything it said and published."""

    def __init__(self, folder, *, valid=4, dropout=0.3, observer=None, **config):
        defaults = {
            "max_steps": 8,
            "batch_size": 2,
            "warmup_steps": 1,
            "learning_rate": 1e-2,
            "steps_per_validation": 3,
            "steps_per_checkpoint": 2,
        }
        self.config = TrainingConfig(**{**defaults, **config})
        self.events, self.published, self.stop, self.observer = [], [], StopRequest(), observer
        self.model = with_lora(tiny_llama(), dropout=dropout)
        identity = RunIdentity(RunConfig(training=self.config), "base", "data")
        self.trainer = Trainer(
            objective_for(self.model),
            build_optimizer(self.config),
            Batches(examples(9), self.config.batch_size, self.config.gradient_accumulation, 0),
            list(in_order(examples(valid, seed=5), 2)) if valid else [],
            self.config,
            checkpoints=CheckpointStore(folder, identity, self.config.keep_checkpoints),
            publish=lambda tensors: self.published.append(dict(tensors)),
            emit=self.see,
            monitor=MemoryMonitor(),
            stop=self.stop,
        )

    def see(self, event):
        self.events.append(event)
        if self.observer:
            self.observer(self, event)

    def resumed(self):
        self.trainer.restore(self.trainer.checkpoints.load_newest()[0])
        return self

    def all(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def weights(self):
        return dict(tree_flatten(self.model.trainable_parameters()))


def equal(one, other):
    return one.keys() == other.keys() and all(mx.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("kill_after", [1, 3, 5, 7])
def test_a_resumed_run_ends_bit_for_bit_as_one_never_interrupted(tmp_path, kill_after):
    whole = Run(tmp_path / "whole")
    whole.trainer.run()

    def die(_run, event):
        if isinstance(event, StepDone) and event.step == kill_after:
            raise KeyboardInterrupt

    killed = Run(tmp_path / "killed", observer=die)
    with pytest.raises(KeyboardInterrupt):
        killed.trainer.run()
    again = Run(tmp_path / "killed").resumed()
    again.trainer.run()
    assert again.trainer.progress == whole.trainer.progress
    assert equal(again.published[-1], whole.published[-1])
    assert equal(again.weights(), whole.weights())


def test_a_stop_request_saves_and_names_the_command(tmp_path):
    def ask(run, event):
        if isinstance(event, StepDone) and event.step == 5:
            run.stop.ask(15)

    run = Run(tmp_path, observer=ask)
    with pytest.raises(Interrupted) as stopped:
        run.trainer.run()
    assert stopped.value.exit_code == 143
    assert "--resume" in stopped.value.run
    assert run.trainer.checkpoints.steps()[-1] == 5
    again = Run(tmp_path).resumed()
    again.trainer.run()
    whole = Run(tmp_path / "whole")
    whole.trainer.run()
    assert equal(again.published[-1], whole.published[-1])


def test_validation_follows_the_update_it_is_reported_for_and_comes_at_the_end(tmp_path):
    run = Run(tmp_path)
    run.trainer.run()
    assert [event.step for event in run.all(Validated)] == [0, 3, 6, 8]
    last_step = run.events.index(run.all(StepDone)[-1])
    assert run.events.index(run.all(Validated)[-1]) > last_step


def test_validating_more_often_changes_no_weight(tmp_path):
    rare, often = Run(tmp_path / "a", steps_per_validation=100), Run(tmp_path / "b", steps_per_validation=1)
    rare.trainer.run()
    often.trainer.run()
    assert equal(rare.weights(), often.weights())


def losses_in_order(monkeypatch, *losses: float) -> None:
    """Validations that come out so, one after the other: real ones cannot be made to."""
    results = iter(losses)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: Evaluation(next(results), 10))


def test_the_best_adapter_is_the_one_published_at_the_end(tmp_path, monkeypatch):
    losses_in_order(monkeypatch, 9, 5, 4, 3, 6, 3, 7, 8, 9)
    run = Run(tmp_path, steps_per_validation=1)
    run.trainer.run()
    assert run.trainer.progress.best_step == 3
    assert run.trainer.checkpoints.steps() == [3, 4, 6, 8]
    assert equal(run.published[-1], run.trainer.checkpoints.load(3).adapter)
    assert not equal(run.published[-1], run.weights())


def test_early_stopping_waits_for_its_patience(tmp_path, monkeypatch):
    losses_in_order(monkeypatch, 9, 8, 8.5, float("nan"), 7, 7, 7.1, 8, 6)
    run = Run(tmp_path, steps_per_validation=1, max_steps=50, early_stopping_patience=3)
    run.trainer.run()
    assert run.trainer.stopped_early
    assert (run.trainer.progress.best_step, run.trainer.progress.step) == (4, 7)


def test_an_epoch_is_every_example_once_and_the_number_of_steps_follows(tmp_path):
    run = Run(tmp_path, max_steps=None, num_epochs=2, batch_size=2, gradient_accumulation=2)
    run.trainer.run()
    steps = run.all(StepDone)
    assert [event.epoch for event in steps] == [1, 1, 1, 2, 2, 2]
    real = sum(len(example.tokens) for example in examples(9))
    assert sum(event.tokens for event in steps[:3]) == sum(event.tokens for event in steps[3:]) == real


class Poison:
    """Makes the norm's weight NaN before some updates and mends it after."""

    def __init__(self, steps, *, times=1):
        self.left = dict.fromkeys(steps, times)
        self.good = None

    def __call__(self, run, event):
        if self.good is None:
            self.good = run.model.model.norm.weight
        if not isinstance(event, StepDone | RolledBack):
            return
        upcoming = run.trainer.progress.step + 1
        poisoned = self.left.get(upcoming, 0) > 0
        if poisoned:
            self.left[upcoming] -= 1
        run.model.model.norm.weight = self.good * (mx.nan if poisoned else 1)


def test_a_single_bad_update_is_skipped_and_counted(tmp_path):
    run = Run(tmp_path, valid=0, observer=Poison([4]))
    run.trainer.run()
    assert [event.step for event in run.all(StepDone) if event.skipped] == [4]
    assert run.trainer.progress.skipped_updates == 1
    assert not run.all(RolledBack)
    assert all(bool(mx.isfinite(value).all()) for value in run.weights().values())


def test_three_bad_updates_in_a_row_go_back_to_the_checkpoint_with_half_the_rate(tmp_path):
    run = Run(tmp_path, valid=0, observer=Poison([5, 6, 7]), lr_schedule="constant", steps_per_checkpoint=4)
    run.trainer.run()
    (back,) = run.all(RolledBack)
    assert (back.from_step, back.to_step, back.learning_rate_factor) == (7, 4, 0.5)
    rates = [event.learning_rate for event in run.all(StepDone)]
    assert rates[6] == pytest.approx(1e-2)
    assert rates[7:] == pytest.approx([5e-3] * 4)
    assert run.trainer.progress.step == 8
    assert run.trainer.checkpoints.load_newest()[0].progress.learning_rate_factor == 0.5


def test_a_run_that_never_recovers_ends_with_an_error_and_finite_checkpoints(tmp_path):
    run = Run(tmp_path, valid=0, observer=Poison([5, 6, 7], times=99), steps_per_checkpoint=4)
    with pytest.raises(DivergenceError, match="halved 5 times"):
        run.trainer.run()
    adapter = run.trainer.checkpoints.load_newest()[0].adapter
    assert all(bool(mx.isfinite(value).all()) for value in adapter.values())


def test_short_of_memory_a_run_halves_its_micro_batches_and_ends_with_the_same_weights(tmp_path):
    roomy = Run(tmp_path / "roomy", valid=0, dropout=0.0, batch_size=4)
    roomy.trainer.run()

    def mend(run, event):  # what halving achieves in a real run
        if isinstance(event, MemoryPressure) and run.trainer.batches.batch_size == 1:
            run.trainer.budget_bytes = 1 << 60

    tight = Run(tmp_path / "tight", valid=0, dropout=0.0, batch_size=4, memory_budget_gib=1e-6, observer=mend)
    tight.trainer.run()
    actions = [event.action for event in tight.all(MemoryPressure)]
    assert [("cache" in action, "halved" in action) for action in actions] == [
        (True, False),
        (False, True),
    ] * 2
    assert (tight.trainer.batches.batch_size, tight.trainer.batches.gradient_accumulation) == (1, 8)
    for name, weights in roomy.weights().items():
        size = mx.abs(weights).max().item()
        assert mx.abs(weights - tight.weights()[name]).max().item() < 1e-4 * size


def test_a_run_of_single_rows_that_stays_short_of_memory_saves_and_stops(tmp_path):
    run = Run(tmp_path, valid=0, batch_size=1, memory_budget_gib=1e-6)
    with pytest.raises(MemoryBudgetError, match="saved after step 4") as error:
        run.trainer.run()
    assert "--resume" in error.value.run
    assert run.trainer.checkpoints.steps()[-1] == 4


def test_halved_micro_batches_stay_halved_after_a_resume(tmp_path):
    def die(_run, event):
        if isinstance(event, StepDone) and event.step == 5:
            raise KeyboardInterrupt

    killed = Run(tmp_path, valid=0, batch_size=2, memory_budget_gib=1e-6, observer=die)
    with pytest.raises(KeyboardInterrupt):
        killed.trainer.run()
    assert (
        Run(tmp_path, valid=0, batch_size=2, memory_budget_gib=1e-6).resumed().trainer.batches.batch_size == 1
    )


def test_checkpoints_are_announced_when_they_are_there(tmp_path):
    def check(_run, event):
        if isinstance(event, Saved):
            assert (event.path / "state.json").is_file()

    run = Run(tmp_path, observer=check, valid=0)
    run.trainer.run()
    assert [event.step for event in run.all(Saved)] == [0, 2, 4, 6, 8]
