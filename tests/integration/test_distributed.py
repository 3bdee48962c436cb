"""Several ranks train as one: the same numbers, and no fault of any of them is the end of a run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from mlx_qlora.config import build_config
from mlx_qlora.errors import Interrupted, MlxQloraError
from mlx_qlora.training.distributed import RankError, fingerprint_of
from mlx_qlora.training.events import MemoryPressure, RolledBack, StepDone, Validated
from mlx_qlora.training.launcher import HostsLauncher, LocalLauncher, Place
from mlx_qlora.training.run import train
from mlx_qlora.training.supervisor import train_on_ranks

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring")

NOTICED_SECONDS = 15
# 9 rows in updates of 4: the third has one row, so that all ranks but one are idle.
SETTINGS = {
    "quantization": {"scheme": "int4"},
    "lora": {"rank": 4},
    "data": {"max_seq_length": 96},
    "training": {
        "max_steps": 8,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "steps_per_validation": 4,
        "steps_per_checkpoint": 3,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine rows of unequal length, and three to validate on."""
    folder = tmp_path_factory.mktemp("ranks") / "data"
    folder.mkdir()
    rng = random.Random(1)
    for name, count in (("train", 9), ("valid", 3)):
        rows = [
            {
                "prompt": "clube " * rng.randint(1, 9) + f"{name} {i}?",
                "completion": "gol " * rng.randint(1, 8),
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(tiny_llama_folder, data):
    return build_config(SETTINGS, {"model": {"path": str(tiny_llama_folder)}, "data": {"path": str(data)}})


def changed(config, tree):
    return build_config(config.model_dump(mode="json"), tree)


class Seen:
    """What observers were told, and what was said of restarts."""

    def __init__(self, on_event=None):
        self.events, self.notes, self.on_event = [], [], on_event
        self.noticed_at = None

    def __call__(self, event):
        self.events.append(event)
        if self.on_event:
            self.on_event(event)

    def note(self, text):
        self.notes.append(text)
        self.noticed_at = self.noticed_at or time.monotonic()

    def losses(self):
        """Of each update and validation, the last word on each."""
        steps = {("step", e.step): e.loss_nats for e in self.events if isinstance(e, StepDone)}
        return steps | {("val", e.step): e.loss_nats for e in self.events if isinstance(e, Validated)}


def result(adapter: Path) -> dict[str, object]:
    """What decides how a run goes on, bit for bit: the adapter, and the newest checkpoint's tensors."""
    newest = max((adapter / "checkpoints").glob("step-*"))
    made: dict[str, object] = {"adapter": (adapter / "adapters.safetensors").read_bytes()}
    for path in newest.glob("*.safetensors"):  # their order in the file may be another after a resume
        arrays = mx.load(str(path))
        made |= {
            f"{path.name}/{k}": bytes(memoryview(v.reshape(-1).view(mx.uint8))) for k, v in arrays.items()
        }
    return made


def run_ranks(config, adapter, launcher=2, seen=None, **options):
    seen = seen or Seen()
    finished = train_on_ranks(config, adapter, launcher, observers=[seen], on_note=seen.note, **options)
    return finished, seen


@pytest.fixture(scope="module")
def quiet(config, tmp_path_factory):
    """An undisturbed run of so many ranks, made once."""
    made = {}

    def run(ranks):
        if ranks not in made:
            adapter = tmp_path_factory.mktemp("quiet") / "adapter"
            _, seen = run_ranks(config, adapter, ranks)
            assert not seen.notes
            made[ranks] = (adapter, seen)
        return made[ranks]

    return run


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The same run in one process."""
    seen, adapter = Seen(), tmp_path_factory.mktemp("alone") / "adapter"
    train(config, adapter, observers=[seen])
    return adapter, seen


class Rigged(LocalLauncher):
    """Ranks that write down their process ids, and one that does something else first."""

    def __init__(self, ranks, folder, *, rank=None, code=""):
        self.folder = folder
        begin = (
            "import os, pathlib, signal, sys, time\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "def once(name):\n"
            "    try: (folder / name).touch(exist_ok=False); return True\n"
            "    except FileExistsError: return False\n"
            "(folder / f'pid-{os.environ[\"MLX_RANK\"]}').write_text(str(os.getpid()))\n"
        )
        end = "from mlx_qlora.training.distributed_rank import main\nsys.exit(main())\n"
        scripts = [begin + (code if number == rank else "") + end for number in range(ranks)]
        super().__init__(ranks, commands=[(sys.executable, "-c", script) for script in scripts])

    def pid(self, rank):
        return int((self.folder / f"pid-{rank}").read_text())

    def send(self, rank, number):
        os.kill(self.pid(rank), number)


def assert_nobody_is_left(launcher):
    for rank in range(launcher.size):
        assert not psutil.pid_exists(launcher.pid(rank)), f"rank {rank} is still there"


def at_step(step, act):
    """An observer that acts once."""
    done = []

    def on_event(event):
        if isinstance(event, StepDone) and event.step == step and not done:
            done.append(time.monotonic())
            act()

    on_event.at = done
    return on_event


def assert_losses_agree(one, other):
    assert one.losses().keys() == other.losses().keys()
    for key, loss in one.losses().items():
        assert other.losses()[key] == pytest.approx(loss, abs=1e-5), key


def test_two_ranks_train_as_one_on_unequal_rows_and_an_idle_tail(quiet, alone):
    adapter, seen = quiet(2)
    assert_losses_agree(alone[1], seen)
    norms = [[e.grad_norm for e in run.events if isinstance(e, StepDone)] for run in (alone[1], seen)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    counts = [
        [(e.tokens, e.target_tokens) for e in run.events if isinstance(e, StepDone)]
        for run in (alone[1], seen)
    ]
    assert counts[0] == counts[1]
    names = [sorted(p.name for p in folder.iterdir()) for folder in (alone[0], adapter)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_killed_rank_is_noticed_and_the_run_ends_bit_identical(config, quiet, tmp_path):
    launcher = Rigged(2, tmp_path)
    seen = Seen(at_step(5, lambda: launcher.send(1, signal.SIGKILL)))
    finished, _ = run_ranks(config, tmp_path / "adapter", launcher, seen)
    assert seen.noticed_at - seen.on_event.at[0] < NOTICED_SECONDS
    (note,) = seen.notes
    assert "started again from step" in note
    assert finished.steps == 8
    assert result(tmp_path / "adapter") == result(quiet(2)[0])
    assert_nobody_is_left(launcher)


@pytest.mark.slow
def test_four_ranks_train_as_one(quiet, alone):
    assert_losses_agree(alone[1], quiet(4)[1])


@pytest.mark.slow
def test_a_run_of_so_many_ranks_is_repeatable_to_the_bit(config, quiet, tmp_path):
    run_ranks(config, tmp_path / "adapter", 4)
    assert result(tmp_path / "adapter") == result(quiet(4)[0])


@pytest.mark.slow
def test_a_stopped_rank_is_noticed(config, quiet, tmp_path):
    launcher = Rigged(2, tmp_path)
    seen = Seen(at_step(4, lambda: launcher.send(1, signal.SIGSTOP)))
    run_ranks(config, tmp_path / "adapter", launcher, seen)
    assert "rank 1 gave no sign of life" in seen.notes[0]
    assert seen.noticed_at - seen.on_event.at[0] < NOTICED_SECONDS
    assert result(tmp_path / "adapter") == result(quiet(2)[0])
    assert_nobody_is_left(launcher)


FAILS = """
from mlx_qlora.training.step import TrainStep
step_of = TrainStep.__call__
def failing(self, batches, step, rate):
    if step == 5 and once('failed'):
        raise ValueError('made to fail')
    return step_of(self, batches, step, rate)
TrainStep.__call__ = failing
"""
NEVER_JOINS = """
from mlx_qlora.training import distributed_rank
joined = distributed_rank.RankProcess._joined
def late(self):
    if once('late'):
        time.sleep(1000)
    return joined(self)
distributed_rank.RankProcess._joined = late
"""
NEVER_STARTS = "if once('absent'): time.sleep(1000)\n"
DIES_EARLY = "if once('dead'): os.abort()\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said", "rank"),
    [
        (FAILS, "ValueError: made to fail", 1),
        (FAILS, "ValueError: made to fail", 0),
        (NEVER_JOINS, "did not join the ring", 1),
        (NEVER_STARTS, "did not start", 1),
        (DIES_EARLY, "ended without a word (signal 6)", 0),
    ],
)
def test_a_rank_that_fails_or_never_joins_is_started_again(code, said, rank, config, quiet, tmp_path):
    launcher, began = Rigged(2, tmp_path, rank=rank, code=code), time.monotonic()
    _, seen = run_ranks(config, tmp_path / "adapter", launcher)
    (note,) = seen.notes
    assert f"rank {rank}" in note
    assert said in note
    if code in (NEVER_JOINS, NEVER_STARTS):
        assert seen.noticed_at - began < NOTICED_SECONDS + 5  # the start of the others comes before
    assert result(tmp_path / "adapter") == result(quiet(2)[0])
    assert_nobody_is_left(launcher)


@pytest.mark.slow
def test_a_rank_that_always_fails_ends_the_run_with_every_reason_and_a_whole_checkpoint(config, tmp_path):
    launcher = Rigged(2, tmp_path, rank=1, code=FAILS.replace("once('failed')", "True"))
    with pytest.raises(RankError) as failed:
        run_ranks(config, tmp_path / "adapter", launcher, max_restarts=1)
    assert failed.value.what.count("ValueError: made to fail") >= 2
    assert "--resume" in failed.value.run
    assert (tmp_path / "adapter" / "checkpoints" / "step-0000004" / "state.json").exists()
    assert_nobody_is_left(launcher)


def test_a_mistake_of_the_users_is_said_once_and_not_tried_again(config, tmp_path):
    launcher = Rigged(2, tmp_path)
    with pytest.raises(MlxQloraError) as refused:
        run_ranks(
            changed(config, {"data": {"path": str(tmp_path / "nothing")}}), tmp_path / "adapter", launcher
        )
    assert refused.value.exit_code == 2
    assert "nothing" in str(refused.value)
    assert_nobody_is_left(launcher)


@pytest.mark.slow
def test_a_sigterm_to_one_rank_stops_all_after_the_same_step(config, quiet, tmp_path):
    launcher = Rigged(2, tmp_path)
    seen = Seen(at_step(5, lambda: launcher.send(1, signal.SIGTERM)))
    with pytest.raises(Interrupted) as stopped:
        run_ranks(config, tmp_path / "adapter", launcher, seen)
    assert stopped.value.exit_code == 143
    last = max((tmp_path / "adapter" / "checkpoints").glob("step-*")).name
    # The step is told of before the ranks agree on signals: a quick one is seen after that very step.
    assert last in {"step-0000005", "step-0000006", "step-0000007"}
    assert f"Stopped after step {int(last[5:])} of" in str(stopped.value)
    assert_nobody_is_left(launcher)
    run_ranks(config, tmp_path / "adapter", 2, resume=True)
    assert result(tmp_path / "adapter") == result(quiet(2)[0])


POISONED = """
from mlx_qlora.objective.loss import Objective
nll_of, count = Objective.nll, [0]
def nll(self, inputs):
    value = nll_of(self, inputs)
    if self.model.training:
        count[0] += 1
        if count[0] in (5, 6, 7):
            value = value * float('nan')
    return value
Objective.nll = nll
"""


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_all_and_they_roll_back_together(config, tmp_path):
    launcher = Rigged(2, tmp_path, rank=1, code=POISONED)
    config = changed(config, {"training": {"gradient_accumulation": 1, "compile": False}})
    _, seen = run_ranks(config, tmp_path / "adapter", launcher)
    skipped = [e.step for e in seen.events if isinstance(e, StepDone) and e.skipped]
    assert len(skipped) == 3
    assert len([e for e in seen.events if isinstance(e, RolledBack)]) == 1
    assert not seen.notes
    weights = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    assert all(bool(mx.isfinite(value).all()) for value in weights.values())


COMES_APART = """
from mlx_qlora.training.distributed import Ranks, fingerprint_of
from mlx_qlora.training.step import TrainStep
from mlx_qlora.training.trainer import Trainer
from mlx_qlora.lora.adapter import adapter_tensors
from mlx.utils import tree_map
update_of, publish_of = TrainStep._update, Trainer._publish_best
def update(self, grad, rate):
    update_of(self, grad, rate)
    self.model.update(tree_map(lambda a: a * (1 + 2**-20), self.model.trainable_parameters()))
def publish(self):
    (folder / 'print').write_text(str(fingerprint_of(adapter_tensors(self.model))))
    publish_of(self)
TrainStep._update, Trainer._publish_best = update, publish
"""


@pytest.mark.slow
def test_ranks_that_round_differently_agree_again_at_each_checkpoint(config, tmp_path):
    launcher = Rigged(2, tmp_path, rank=1, code=COMES_APART)
    _, seen = run_ranks(config, tmp_path / "adapter", launcher)
    assert seen.notes == []
    newest = max((tmp_path / "adapter" / "checkpoints").glob("step-*"))
    kept = mx.load(str(newest / "adapter.safetensors"))
    assert float((tmp_path / "print").read_text()) == fingerprint_of(kept)


SHORT_OF_MEMORY = """
from mlx_qlora.training.trainer import Trainer
agreed_of = Trainer._agreed
def agreed(self, sample):
    self.budget_bytes = 1 if self.progress.step in (2, 3) else 1 << 60
    return agreed_of(self, sample)
Trainer._agreed = agreed
"""


@pytest.mark.slow
def test_memory_that_is_short_on_one_rank_halves_the_micro_batches_of_all(config, alone, tmp_path):
    launcher = Rigged(2, tmp_path, rank=1, code=SHORT_OF_MEMORY)
    _, seen = run_ranks(config, tmp_path / "adapter", launcher)
    actions = [event.action for event in seen.events if isinstance(event, MemoryPressure)]
    assert ["halved" in action for action in actions] == [False, True]
    assert_losses_agree(alone[1], seen)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(first, then, config, alone, tmp_path):
    """At the same place in the data, with the same losses."""
    adapter = tmp_path / "adapter"

    def run(ranks, seen, **options):
        if ranks == 1:
            train(config, adapter, observers=[seen], **options)
        else:
            run_ranks(config, adapter, ranks, seen, **options)

    seen, rest = Seen(at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))), Seen()
    with pytest.raises(Interrupted):
        run(first, seen)
    run(then, rest, resume=True)
    seen.on_event = None
    for event in rest.events:
        seen(event)
    assert_losses_agree(alone[1], seen)
    tokens = {e.step: e.tokens for e in alone[1].events if isinstance(e, StepDone)}
    assert {e.step: e.tokens for e in seen.events if isinstance(e, StepDone)} == tokens


CLI = [sys.executable, "-m", "mlx_qlora", "train", "--processes", "2"]


def started(config, tmp_path):
    """The command, with two ranks under way, as (process, ids of the ranks)."""
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [*CLI, "--config", str(tmp_path / "run.yaml"), "--adapter-path", str(tmp_path / "adapter")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path / "adapter" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and b"StepDone" in metrics.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process, [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def gone(pids, seconds=10):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = [
            p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
        ]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_ctrl_c_in_the_command_saves_stops_all_and_the_run_goes_on(config, tmp_path):
    config = changed(config, {"training": {"max_steps": 300}})
    process, ranks = started(config, tmp_path)
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the checkpoint is saved" in err
    assert "Traceback" not in err
    assert f"Run: mlx-qlora train --resume --adapter-path {tmp_path / 'adapter'}" in err
    assert gone(ranks, 1)


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_no_rank_outlives_a_supervisor_that_was_killed(is_stopped, config, tmp_path):
    process, ranks = started(changed(config, {"training": {"max_steps": 3000}}), tmp_path)
    if is_stopped and sys.platform == "linux":  # elsewhere nothing can end a stopped process but its parent
        os.kill(ranks[1], signal.SIGSTOP)
    process.kill()
    process.communicate()
    assert gone(ranks)


@pytest.mark.slow
def test_hosts_are_started_by_mlx_launch_and_a_death_it_hides_is_seen(config, quiet, tmp_path):
    here = Place("127.0.0.1", "127.0.0.1")  # mlx.launch takes this name without ssh
    pids = []

    def kill_one():
        ranks = [
            p.pid
            for p in psutil.process_iter(["cmdline"])
            if "mlx_qlora.training.distributed_rank" in (p.info["cmdline"] or [])
            and p.environ().get("MLX_RANK") == "1"
            and os.getpid() in [parent.pid for parent in p.parents()]
        ]
        pids.extend(ranks)
        os.kill(ranks[0], signal.SIGKILL)

    seen = Seen(at_step(5, kill_one))
    run_ranks(config, tmp_path / "adapter", HostsLauncher([here, here]), seen)
    assert len(seen.notes) == 1
    assert "rank 1" in seen.notes[0]
    assert seen.noticed_at - seen.on_event.at[0] < NOTICED_SECONDS
    assert result(tmp_path / "adapter") == result(quiet(2)[0])
    assert gone(pids, 1)
