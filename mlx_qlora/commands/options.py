"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import say
from mlx_qlora.config import QuantizationConfig

Offload = Annotated[
    bool, typer.Option("--offload", help="Leave layers that do not fit in memory in their files.")
]
OffloadBudget = Annotated[
    float | None,
    typer.Option(help="Memory for the weights then, in GiB; 60 % of what is left when not given."),
]
Hosts = Annotated[
    str | None,
    typer.Option(help="One rank on each machine, this one first: mac1,mac2 or mac1=10.0.0.1,…"),
]
Hostfile = Annotated[
    Path | None, typer.Option(help="Instead of --hosts: a file of mlx.distributed_config's.")
]
Backend = Annotated[
    str, typer.Option(help="ring (TCP), or jaccl (RDMA over Thunderbolt 5; needs --hostfile).")
]


def stored_as(scheme: str | None, *, has_adapter: bool) -> QuantizationConfig | None:
    """How the base is stored: ``--scheme``; an adapter's own; USE_QUANTIZATION and QUANTIZATION_BITS.

    Returns:
        None: by the adapter, or as the checkpoint is.
    """
    if scheme is not None:
        return QuantizationConfig(scheme=scheme)
    if has_adapter:
        return None
    from mlx_qlora.quantization.environment import quantization_from_environment

    found = quantization_from_environment()
    for note in found.notes if found else ():
        say(note)
    return found.config if found else None
