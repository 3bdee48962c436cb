"""Macs as their own commands describe them.

The texts are those of Apple's manual pages and of published transcripts of these commands; none was recorded
on a machine of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_qlora.machine.system import GIB, System

SYSCTL = {
    "machdep.cpu.brand_string": "Apple M1",
    "hw.optional.arm64": "1",
    "hw.perflevel0.physicalcpu": "4",
    "hw.perflevel1.physicalcpu": "4",
    "hw.memsize": str(16 * GIB),
    "iogpu.wired_limit_mb": "0",
    "kern.memorystatus_vm_pressure_level": "1",
    "vm.swapusage": "total = 2048.00M  used = 812.75M  free = 1235.25M  (encrypted)",
}
SW_VERS = "ProductName:\t\tmacOS\nProductVersion:\t\t15.5\nBuildVersion:\t\t24F74\n"
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              123456.
Pages active:                            289012.
Pages inactive:                          245678.
Pages speculative:                        12345.
Pages throttled:                              0.
Pages wired down:                        134567.
Pages purgeable:                          56789.
"Translation faults":                  98765432.
Pages copy-on-write:                     345678.
Pages zero filled:                      8765432.
Pages reactivated:                       234567.
Pages purged:                             45678.
File-backed pages:                       156789.
Anonymous pages:                         378901.
Pages stored in compressor:              123456.
Pages occupied by compressor:             45678.
Decompressions:                            5678.
Compressions:                             12345.
Pageins:                                  56789.
Pageouts:                                  1234.
Swapins:                                    123.
Swapouts:                                    45.
"""
MEMORY_PRESSURE = """\
The system has 17179869184 (1048576 pages with a page size of 16384).
System-wide memory free percentage: 57%
"""


def mac(vm_stat: str = VM_STAT, sw_vers: str = SW_VERS, **changed: str | None) -> System:
    """A 16 GB M1 at rest, with other answers of sysctl by their last part: ``memsize="8589934592"``.

    None takes an answer away: sysctl prints nothing for a name that it does not know.
    """
    said: dict[str, str | None] = {
        name: changed.get(name.rpartition(".")[2], value) for name, value in SYSCTL.items()
    }

    def output(command: Sequence[str]) -> str:
        program = command[0].rpartition("/")[2]
        if program == "sysctl":
            return "".join(f"{name}: {said[name]}\n" for name in command[1:] if said.get(name) is not None)
        return {"vm_stat": vm_stat, "sw_vers": sw_vers, "memory_pressure": MEMORY_PRESSURE}[program]

    return System("darwin", output)
