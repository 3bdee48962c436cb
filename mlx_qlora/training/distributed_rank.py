"""The process of one rank: ``python -m mlx_qlora.training.distributed_rank``, started by a launcher.

It is told what to train over its connection to the supervisor, says that it is alive over it, and says how it
ended. When the connection closes, the supervisor is gone and the process ends at once.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qlora.errors import Interrupted, MlxQloraError
from mlx_qlora.training.distributed_messages import (
    CONTROL,
    TOKEN,
    Connection,
    Message,
)
from mlx_qlora.training.launcher import end_with_parent

if TYPE_CHECKING:
    from mlx_qlora.training.distributed import Ranks
    from mlx_qlora.training.events import Event, RunFinished

HEARTBEAT_SECONDS = 1.0
JOIN_SECONDS = 60.0
"""A rank that is still joining then, with nobody to stop it, ends itself."""


def main() -> int:
    """Train as the rank that the environment says, and tell the supervisor how it ended.

    Returns:
        An exit code; nobody relies on it.
    """
    end_with_parent()
    rank = int(os.environ["MLX_RANK"])
    host, _, port = os.environ[CONTROL].rpartition(":")
    connection = Connection(socket.create_connection((host, int(port)), timeout=10))
    connection.socket.settimeout(None)
    # The token is for this process, not for what it starts.
    connection.send({"rank": rank, "token": os.environ.pop(TOKEN), "pid": os.getpid()})
    process = RankProcess(connection, _job(connection))
    process.run()
    return 0


class RankProcess:
    """What one rank does, and what it says of itself meanwhile.

    Args:
        job: What to train: the keys that `Supervisor` sends.
    """

    def __init__(self, connection: Connection, job: Message) -> None:
        self.connection, self.job = connection, job
        self.phase = "starting"
        self._ranks: Ranks | None = None

    def run(self) -> None:
        """Train, and send how it ended: the last thing the supervisor hears."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)
        for task in (self._beat, self._listen):
            threading.Thread(target=task, daemon=True).start()
        try:
            ending = self._finished(self._train())
        except Interrupted as error:
            ending = {"ending": "interrupted", **_told(error), "signal": error.exit_code - 128}
        except MlxQloraError as error:
            ending = {"ending": "error", **_told(error), "exit_code": error.exit_code}
        except BaseException as error:  # whatever it is, the supervisor decides what follows
            ending = {"ending": "fault", "what": f"{type(error).__name__}: {error}", "trace": _trace()}
        self.connection.send(ending)

    def _train(self) -> RunFinished:
        ranks = self._joined()
        from mlx_qlora.config import build_config
        from mlx_qlora.training.run import train

        job, self._ranks = self.job, ranks
        self._enter("preparing")
        return train(
            build_config(job["config"]),
            job["adapter_path"],
            resume=job["resume"],
            force=job["force"],
            observers=[self._observe],
            on_bytes=self._on_bytes if ranks.is_first else None,
            ranks=ranks,
        ).finished

    def _joined(self) -> Ranks:
        self._enter("joining")
        # Only a thread outside Python can end this process here: MLX keeps the interpreter to itself.
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
        import mlx.core as mx

        from mlx_qlora.training.distributed import Ranks

        group = mx.distributed.init(strict=True, backend=self.job["backend"])
        faulthandler.cancel_dump_traceback_later()
        keys = ("local_rank", "num_local", "most_local")
        return Ranks(group, **{key: self.job[key] for key in keys})

    def _finished(self, finished: RunFinished) -> Message:
        from mlx_qlora.lora.adapter import WEIGHTS
        from mlx_qlora.storage import sha256_of

        ending: Message = {"ending": "finished", "steps": finished.steps}
        if self._ranks is not None and self._ranks.is_first:
            ending["adapter_sha256"] = sha256_of(Path(self.job["adapter_path"]) / WEIGHTS)
        return ending

    def _observe(self, event: Event) -> None:
        if self.phase != "training":
            self._enter("training")
        if self._ranks is not None and self._ranks.is_first:
            from mlx_qlora.training.distributed_events import event_message

            self.connection.send(event_message(event))

    def _on_bytes(self, done: int, total: int) -> None:
        self.connection.send({"bytes": [done, total]})

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.connection.send(self._state())

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            try:
                self.connection.send(self._state())
            except OSError:
                _end()

    def _state(self) -> Message:
        waiting = self._ranks.waiting if self._ranks is not None else None
        return {
            "phase": self.phase,
            "exchanges": waiting.exchanges if waiting is not None else 0,
            "is_waiting": waiting is not None and waiting.since is not None,
        }

    def _listen(self) -> None:
        while True:
            try:
                for message in self.connection.received():
                    os.kill(os.getpid(), int(message["stop"]))
            except (OSError, EOFError, ValueError, KeyError):
                _end()


def _job(connection: Connection) -> Message:
    messages: list[Message] = []
    while not messages:
        messages = connection.received()
    return messages[0]


def _told(error: MlxQloraError) -> Message:
    return {"what": error.what, "where": error.where, "run": error.run}


def _trace() -> str:
    return traceback.format_exc(limit=-12)


def _interrupt(number: int, _frame: Any) -> None:
    """Before the trainer has its own handlers; nothing was computed that a checkpoint does not have."""
    raise Interrupted("Stopped before training went on.", signal_number=number)


def _end() -> None:
    """Without clean-up, which may wait for other ranks; rank 0's files are whole at any time."""
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
