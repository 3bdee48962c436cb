"""How the processes of the ranks are started and ended: on this machine, or on several by ``mlx.launch``."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qlora.training.distributed_messages import CONTROL, PARENT, TOKEN

RANK_COMMAND = (sys.executable, "-m", "mlx_qlora.training.distributed_rank")
LOG_LINES = 12

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    host: str
    """As ssh knows the machine; ranks with one host share its memory."""
    address: str
    """IPv4, where its neighbours in the ring reach it."""
    prefix: tuple[str, ...] = ()
    """Put before the command of a rank on this machine: ``ip netns exec …``."""


class Launcher(ABC):
    """Starts all ranks of one attempt. Use `LocalLauncher` or `HostsLauncher`."""

    backend = "ring"

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.places)

    @property
    def control_address(self) -> str:
        """Where every rank reaches this machine."""
        return self.places[0].address

    def on_machine(self, rank: int) -> tuple[int, int, int]:
        """Which of its machine's ranks this is, how many those are, and the most there are on any."""
        hosts = [place.host for place in self.places]
        counts = Counter(hosts)
        return hosts[:rank].count(hosts[rank]), counts[hosts[rank]], max(counts.values())

    @abstractmethod
    def start(self, folder: Path, control: str, token: str) -> Started:
        """Start every rank.

        Args:
            folder: For this attempt's own files: the hostfile, and what ranks write to their terminal.
            control: The supervisor's address, host:port.
            token: What a rank proves with that it was started here.
        """


class Started:
    """Processes under way: one for each rank, or one that stands for all.

    Each is the leader of a session of its own: Ctrl-C in the terminal reaches the supervisor alone, and all
    that a process started on this machine is ended with it.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
        self._processes, self._logs = processes, logs

    def codes(self) -> list[int | None]:
        """The exit code of each process, None while it runs."""
        return [process.poll() for process in self._processes]

    @property
    def is_one_for_all(self) -> bool:
        """Whether one process stands for all ranks; then its exit code says nothing of any."""
        return len(self._logs) == 1 and len(self._processes) == 1

    def kill(self) -> None:
        """End them all, stopped ones too, and wait until they are gone."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
                process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def last_lines(self, rank: int) -> str:
        """The end of what a rank wrote to its terminal; of all ranks where they cannot be told apart."""
        log = self._logs[0 if self.is_one_for_all else rank]
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-LOG_LINES:])


class LocalLauncher(Launcher):
    """Ranks on this machine, started here.

    Not by ``mlx.launch``: as children of the supervisor they are ended with it, stopped or not, each has a
    log and an exit of its own, and no shell, no pid file and no launcher stands between.

    Args:
        processes: Number of ranks.
        places: Where they run instead, for ranks in network namespaces of their own.
        commands: What each rank runs.
    """

    def __init__(
        self,
        processes: int,
        *,
        places: Sequence[Place] | None = None,
        commands: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__(places or [Place("localhost", "127.0.0.1")] * processes)
        self._commands = commands or [RANK_COMMAND] * processes

    def start(self, folder: Path, control: str, token: str) -> Started:
        """See `Launcher.start`."""
        hostfile = folder / "ring.json"
        hostfile.write_text(json.dumps([[f"{p.address}:{port}"] for p, port in self._ports()]))
        environment = {**os.environ, CONTROL: control, TOKEN: token, PARENT: str(os.getpid())}
        processes, logs = [], []
        for rank, (place, command) in enumerate(zip(self.places, self._commands, strict=True)):
            logs.append(folder / f"rank-{rank}.log")
            with logs[-1].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [*place.prefix, *command],
                        env={**environment, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        return Started(processes, logs)

    def _ports(self) -> list[tuple[Place, int]]:
        ports = free_ports(self.size) if not any(p.prefix for p in self.places) else random_ports(self.size)
        return list(zip(self.places, ports, strict=True))


class HostsLauncher(Launcher):
    """One rank on each of several machines, started over ssh by ``mlx.launch``. The first is this machine.

    Each needs this Python environment and the model and data under the same paths.

    Args:
        places: The machines, in the order of the ring.
        backend: ring (TCP), or jaccl where MLX has it (macOS 26.2, Thunderbolt 5).
        hostfile: As ``mlx.distributed_config`` writes it; jaccl needs one, since it names RDMA devices.
        command: What each rank runs.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        backend: str = "ring",
        hostfile: Path | None = None,
        command: Sequence[str] = RANK_COMMAND,
    ) -> None:
        super().__init__(places)
        self.backend, self._hostfile = backend, hostfile
        self.command = command

    def start(self, folder: Path, control: str, token: str) -> Started:
        """See `Launcher.start`."""
        hostfile = self._hostfile or folder / "hosts.json"
        if self._hostfile is None:
            entries = [{"ssh": place.host, "ips": [place.address]} for place in self.places]
            hostfile.write_text(json.dumps(entries))
        log = folder / "mlx.launch.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"),
                    *("--hostfile", str(hostfile), "--backend", self.backend),
                    *("--starting-port", str(random_ports(1)[0]), "--cwd", str(Path.cwd())),
                    *("--env", f"{CONTROL}={control}", "--env", f"{TOKEN}={token}"),
                    *("--", *self.command),
                ],
                stdin=subprocess.PIPE,  # kept open: at its end mlx.launch would spin
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Started([process], [log])


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def random_ports(count: int) -> list[int]:
    """Neighbouring ports on machines that cannot be asked; a run that meets a taken one starts again."""
    first = random.SystemRandom().randrange(20_000, 32_000 - count)  # below the range systems give out
    return list(range(first, first + count))


def end_with_parent() -> None:
    """On Linux the kernel ends a rank whose supervisor was killed, even a rank that is stopped."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)
