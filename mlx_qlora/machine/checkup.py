"""All that is found out about a machine, in the order it is told."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_qlora.machine import folders, hardware, hub, software
from mlx_qlora.machine.finding import Finding, gathered
from mlx_qlora.machine.system import System


def examine(system: System | None = None) -> list[Finding]:
    """Look at hardware, memory, software, folders and the hub; a few seconds, and nothing is changed.

    Args:
        system: The one to ask; this machine's when not given.
    """
    system = system or System()
    return gathered(
        [
            ("chip", lambda: hardware.chip(system)),
            ("system", lambda: hardware.operating_system(system)),
            ("memory", lambda: hardware.memory(system)),
            ("memory limit", lambda: _memory_limit(system)),
            ("memory pressure", lambda: hardware.pressure(system)),
            ("swap", lambda: hardware.swap(system)),
            ("Python", lambda: software.python(system)),
            ("packages", lambda: software.packages()),
            ("backend", lambda: software.backend(system)),
            ("BLAS", lambda: software.blas(system)),
            ("compiler", lambda: software.compiler(system)),
            ("display", lambda: hardware.display(system)),
            ("folders", lambda: folders.folders()),
            ("hub", lambda: hub.hub()),
        ]
    )


def _memory_limit(system: System) -> Iterator[Finding]:
    from mlx_qlora.memory.monitor import SYSTEM_SHARE, device_limit_bytes

    return hardware.memory_limit(system, device_limit_bytes(), SYSTEM_SHARE)
