"""The process of one rank that answers with others: ``python -m mlx_qlora.commands.infer_rank``.

No command of its own: a launcher starts it for ``mlx-qlora infer --processes`` or ``--hosts``.
"""

from __future__ import annotations

import os
import socket
import sys

from mlx_qlora.inference.sharded_rank import RankProcess
from mlx_qlora.training.distributed_messages import CONTROL, TOKEN, Connection, Message
from mlx_qlora.training.launcher import end_with_parent

COMMAND = (sys.executable, "-m", "mlx_qlora.commands.infer_rank")


def main() -> int:
    """Answer as the rank that the environment says, and tell who watches how it ended.

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
    messages: list[Message] = []
    while not messages:
        messages = connection.received()
    RankProcess(connection, messages[0]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
