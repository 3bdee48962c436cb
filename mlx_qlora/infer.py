"""``python -m mlx_qlora.infer "pergunta"``: the same as ``mlx-qlora infer``."""

from __future__ import annotations

import sys

from mlx_qlora.__main__ import load_command, run


def main() -> None:
    """Entry point."""
    sys.exit(run(load_command("infer")))


if __name__ == "__main__":
    main()
