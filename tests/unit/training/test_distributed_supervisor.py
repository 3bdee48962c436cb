"""training/supervisor.py and training/launcher.py, with ranks that are real processes and do little."""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError, Interrupted, MlxQloraError
from mlx_qlora.memory.monitor import MemoryMonitor
from mlx_qlora.storage import sha256_of
from mlx_qlora.training import distributed_hosts
from mlx_qlora.training import launcher as launchers
from mlx_qlora.training.distributed import RankError
from mlx_qlora.training.distributed_events import event_message, event_of
from mlx_qlora.training.distributed_hosts import launcher_for, places_of
from mlx_qlora.training.distributed_messages import Connection
from mlx_qlora.training.events import MemoryPressure, RunFinished, RunStarted, StepDone
from mlx_qlora.training.launcher import HostsLauncher, LocalLauncher, Place
from mlx_qlora.training.supervisor import Patience, train_on_ranks

CONFIG = build_config({"model": {"path": "none"}, "data": {"path": "none"}})
QUICK = Patience(hello=6.0, joining=1.5, heartbeat=1.5, exchange=1.5, last_words=0.5)

# A rank that speaks as ours do, without the mathematics.
BEGIN = """
import json, os, socket, sys, time
rank = int(os.environ["MLX_RANK"])
host, port = os.environ["MLX_QLORA_CONTROL"].split(":")
link = socket.create_connection((host, int(port)))
def tell(**message): link.sendall(json.dumps(message).encode() + b"\\n")
def hello(**other):
    tell(**{"rank": rank, "token": os.environ["MLX_QLORA_TOKEN"], "pid": os.getpid(), **other})
def state(phase, exchanges=0, is_waiting=False): tell(phase=phase, exchanges=exchanges, is_waiting=is_waiting)
def fine(seconds, **other):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state("training", **other); time.sleep(0.1)
def finish(): tell(ending="finished", steps=1, adapter_sha256=os.environ["DIGEST"] if rank == 0 else None)
EVENT = json.loads(os.environ["EVENT"])
"""
WELL = "hello(); link.recv(9999); fine(0.3)\nif rank == 0: tell(event='RunFinished', fields=EVENT)\nfinish()"


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Run scripts as ranks over an adapter that is there; they say how it ended."""
    adapter = tmp_path / "adapter" / "adapters.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"an adapter")
    event = dict.fromkeys(RunFinished.__dataclass_fields__, 1) | {"adapter_path": str(adapter.parent)}
    monkeypatch.setenv("DIGEST", sha256_of(adapter))
    monkeypatch.setenv("EVENT", json.dumps(event))

    def run(*scripts, **options):
        launcher = LocalLauncher(
            len(scripts), commands=[(sys.executable, "-c", BEGIN + script) for script in scripts]
        )
        notes = []
        options = {"max_restarts": 0, "patience": QUICK, "on_note": notes.append, **options}
        finished = train_on_ranks(CONFIG, adapter.parent, launcher, **options)
        return finished, notes

    run.adapter = adapter
    return run


def test_ranks_that_end_well_give_rank_0s_result(ranks):
    seen = []
    finished, notes = ranks(WELL, WELL, observers=[seen.append])
    assert seen == [finished]
    assert isinstance(finished.adapter_path, Path)
    assert notes == []


def test_the_last_word_of_a_rank_that_is_gone_already_is_heard(ranks):
    slow = WELL.replace("finish()", "time.sleep(0.2); finish()")
    assert ranks(slow, WELL, observers=[lambda _event: time.sleep(0.8)])[1] == []


def test_what_an_observer_raises_is_not_taken_for_a_rank_that_is_lost(ranks):
    def full(_event):
        raise OSError("a pipe nobody reads")

    with pytest.raises(OSError, match="a pipe nobody reads"):
        ranks(WELL, WELL, observers=[full])


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("hello(); fine(0.2); time.sleep(60)", "no sign of life"),
        ("hello(); fine(0.2); os._exit(0)", "ended without a word"),
        ("hello(); fine(0.2); os.abort()", "ended without a word (signal 6)"),
        ("print('a reason'); sys.exit(3)", "a reason"),
        ("hello(); state('joining'); time.sleep(60)", "did not join"),
        (
            "hello(); tell(ending='fault', what='ValueError: no', trace='line 1'); time.sleep(60)",
            "ValueError: no",
        ),
        ("hello(); link.recv(9999); link.sendall(b'nonsense\\n'); time.sleep(60)", "ended without a word"),
        (
            "hello(); link.recv(9999); tell(event='RunFinished', fields={}); time.sleep(60)",
            "ended without a word",
        ),
    ],
)
def test_what_a_rank_can_do_wrong_is_named(script, said, ranks):
    began = time.monotonic()
    with pytest.raises(RankError) as failed:
        ranks("hello(); fine(60)", script)
    assert "rank 1" in failed.value.what
    assert said in failed.value.what
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_who_cannot_say_which_rank_it_is_did_not_start(ranks):
    strangers = [
        "time.sleep(60)",
        "hello(token='a guess'); time.sleep(60)",
        "time.sleep(2); hello(rank=0); time.sleep(60)",
        "hello(rank=-1); time.sleep(60)",
        "link.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n'); time.sleep(60)",
        "try: link.sendall(b'x' * 5_000_000)\nexcept OSError: pass\ntime.sleep(60)",
    ]
    with pytest.raises(RankError, match="rank 1, 2, 3, 4, 5, 6 did not start"):
        ranks("hello(); fine(60)", *strangers)


def test_the_rank_that_failed_by_itself_is_named_and_not_one_that_lost_it(ranks):
    lost = (
        "hello(); tell(ending='fault', what='RuntimeError: [ring] connection lost', trace=''); time.sleep(9)"
    )
    with pytest.raises(RankError, match=r"rank 1 ended without a word \(signal 6\)"):
        ranks(lost, "hello(); time.sleep(0.1); os.abort()")


@pytest.mark.slow
def test_ranks_that_only_wait_for_each_other_are_a_broken_link(ranks):
    waits = "hello(); fine(60, exchanges=7, is_waiting=True)"
    with pytest.raises(RankError, match="all ranks waited for each other"):
        ranks(waits, waits)


@pytest.mark.slow
def test_a_rank_that_computes_for_long_while_the_other_waits_is_left_alone(ranks):
    computes = "hello(); fine(2.5, exchanges=7)\ntell(event='RunFinished', fields=EVENT); finish()"
    waits = "hello(); fine(2.5, exchanges=7, is_waiting=True); finish()"
    assert ranks(computes, waits)[1] == []


def test_a_fault_is_tried_again_and_a_mistake_is_not(ranks, tmp_path):
    once = f"p = {str(tmp_path / 'once')!r}\nif not os.path.exists(p): open(p, 'w').close(); os.abort()\n"
    _, notes = ranks(WELL, once + WELL, max_restarts=1)
    assert len(notes) == 1
    assert "from the beginning (1 of 1)" in notes[0]
    error = "hello(); tell(ending='error', what='No model.', where='x', run='y', exit_code=2); time.sleep(9)"
    with pytest.raises(MlxQloraError) as refused:
        ranks("hello(); fine(60)", error, max_restarts=5)
    assert (refused.value.exit_code, refused.value.what, refused.value.run) == (2, "No model.", "y")
    assert "rank 1" in refused.value.where


def test_a_users_mistake_counts_more_than_what_follows_from_it(ranks):
    follows = "hello(); tell(ending='fault', what='RuntimeError: peer lost', trace=''); time.sleep(9)"
    error = "hello(); time.sleep(0.15); tell(ending='error', what='Full.', where=None, run=None, exit_code=2)"
    with pytest.raises(MlxQloraError, match=r"Full\.") as refused:
        ranks(follows, error)
    assert not isinstance(refused.value, RankError)


def test_an_interrupted_rank_ends_the_run_although_others_only_lost_it(ranks):
    lost = "hello(); tell(ending='fault', what='RuntimeError: peer lost', trace=''); time.sleep(9)"
    stopped = "hello(); tell(ending='interrupted', what='Stopped.', where=None, run=None, signal=15)"
    with pytest.raises(Interrupted) as interrupted:
        ranks(lost, stopped + "; time.sleep(9)", max_restarts=3)
    assert interrupted.value.exit_code == 143


def test_a_success_is_believed_only_with_the_adapter_on_disk(ranks):
    ranks.adapter.write_bytes(b"another")
    with pytest.raises(RankError, match="is not the adapter it saved"):
        ranks(WELL, WELL)
    ranks.adapter.unlink()
    with pytest.raises(RankError, match="there is no"):
        ranks(WELL, WELL)


def test_a_rank_whose_children_are_left_is_ended_with_them(ranks, tmp_path):
    pids = tmp_path / "pids"
    child = (
        "import subprocess\n"
        "p = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(str(p.pid))\n"
    )
    with pytest.raises(RankError):
        ranks("hello(); fine(60)", child + "hello(); os.abort()")
    until = time.monotonic() + 5
    while Path(f"/proc/{pids.read_text()}/cmdline").exists() and time.monotonic() < until:
        if not Path(f"/proc/{pids.read_text()}/cmdline").read_bytes():  # a zombie that init has not yet taken
            break
        time.sleep(0.05)
    assert time.monotonic() < until


def test_a_message_arrives_whole_in_pieces_and_several_at_once():
    left, right = socket.socketpair()
    one, other = Connection(left), Connection(right)
    long = threading.Thread(target=one.send, args=[{"a": "é" * 50_000}])  # more than a socket takes at once
    long.start()
    got = []
    while not got:
        got += other.received()
    long.join()
    one.send({"b": 1.5})
    one.send({})
    while len(got) < 3:
        got += other.received()
    assert got == [{"a": "é" * 50_000}, {"b": 1.5}, {}]
    left.sendall(b"[1]\n")
    with pytest.raises(ValueError, match="no object"):
        other.received()
    one.close()
    with pytest.raises(EOFError):
        other.received()
    other.close()


def test_events_come_back_as_they_were():
    sample = MemoryMonitor().sample()
    numbers = dict.fromkeys(("step", "epoch", "target_tokens", "tokens", "tokens_seen"), 3)
    rates = dict.fromkeys(("learning_rate", "grad_norm", "seconds"), 0.1)
    counts = dict.fromkeys(list(RunStarted.__dataclass_fields__)[:-1], 5)
    for event in (
        StepDone(**numbers, **rates, loss_nats=0.1 + 0.2, memory=sample),
        MemoryPressure(step=1, memory=sample, budget_bytes=2, action="é"),
        RunStarted(**counts, notes=("one", "two")),
    ):
        assert event_of(json.loads(json.dumps(event_message(event), default=str))) == event
    lost = StepDone(**numbers, **rates, loss_nats=float("nan"), memory=sample, skipped=True)
    again = event_of(json.loads(json.dumps(event_message(lost))))
    assert again.loss_nats != again.loss_nats
    with pytest.raises(ValueError, match="no event"):
        event_of({"event": "Path", "fields": {}})


def test_places_count_the_ranks_of_each_machine():
    here, there = Place("a", "127.0.0.1"), Place("b", "127.0.0.1")
    launcher = LocalLauncher(4, places=[here, there, here, here])
    assert [launcher.on_machine(rank) for rank in range(4)] == [(0, 3, 3), (0, 1, 3), (1, 3, 3), (2, 3, 3)]


def test_hosts_name_machines_or_links_and_the_first_is_this_one():
    assert places_of("localhost, me@mac2=127.0.0.9") == [
        Place("127.0.0.1", socket.gethostbyname("localhost")),
        Place("me@mac2", "127.0.0.9"),
    ]
    for hosts, why in (
        ("localhost", "at least two"),
        ("mac1=203.0.113.7,localhost", "must be this machine"),
        ("localhost,mac2=10.0.0.2", "cannot reach localhost"),
        ("localhost,no-such-host.invalid", "has no address"),
    ):
        with pytest.raises(ConfigError, match=why):
            places_of(hosts)


def test_a_hostfile_of_mlx_is_read_and_a_broken_one_is_refused(tmp_path):
    path = tmp_path / "hosts.json"
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"], "rdma": []}, {"ssh": "mac2", "ips": ["10.0.0.2"]}]
    for tree in (hosts, {"backend": "ring", "hosts": hosts}):
        path.write_text(json.dumps(tree))
        assert launcher_for(hostfile=path).places == (
            Place("localhost", "127.0.0.1"),
            Place("mac2", "10.0.0.2"),
        )
    for broken in ("{", "[]", "[1, 2]", json.dumps(hosts[:1]), '{"hosts": 5}'):
        path.write_text(broken)
        with pytest.raises(ConfigError):
            launcher_for(hostfile=path)


def test_options_that_do_not_go_together_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--processes is for"):
        launcher_for(2, hosts="a,b")
    with pytest.raises(ConfigError, match="no backend"):
        launcher_for(2, backend="carrier-pigeon")
    monkeypatch.setattr(distributed_hosts.mx.distributed, "is_available", lambda _backend: True)
    with pytest.raises(ConfigError, match="RDMA"):
        launcher_for(hosts="a,b", backend="jaccl")


def test_mlx_launch_is_given_hosts_ports_and_the_way_back(tmp_path):
    """By mlx.launch itself, with a command that only says what it was given."""
    here = Place("127.0.0.1", "127.0.0.1")
    launcher = HostsLauncher([here, here])
    launcher.command = (
        sys.executable,
        "-c",
        "import os\n"
        "given = [os.environ[key] for key in ('MLX_RANK', 'MLX_QLORA_CONTROL')]\n"
        "print(*given, open(os.environ['MLX_HOSTFILE']).read())",
    )
    started = launcher.start(tmp_path, "127.0.0.1:5", "secret")
    until = time.monotonic() + 30
    while started.codes() == [None] and time.monotonic() < until:
        time.sleep(0.1)
    told = started.last_lines(0)
    started.kill()
    assert "0 127.0.0.1:5" in told
    assert "1 127.0.0.1:5" in told
    ports = {address for node in json.loads(told.splitlines()[0].split(" ", 2)[2]) for address in node}
    assert len(ports) == 2


def test_ports_are_fresh_each_time():
    assert len(set(launchers.free_ports(8))) == 8
    assert len({launchers.random_ports(2)[0] for _ in range(20)}) > 5
    assert os.environ.get("MLX_RANK") is None
