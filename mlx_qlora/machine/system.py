"""What the system's own commands and files say, and how their words are read."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

KIB, MIB, GIB = 1024, 1024**2, 1024**3
COMMAND_SECONDS = 5.0
"""So long a command may take; the ones asked here take hundredths of it."""

_SIZE_UNITS = {"B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}


def command_output(command: Sequence[str]) -> str:
    """What a command of the system prints on stdout; nothing when it is not there, hangs or fails at once.

    What was printed before a failure counts: sysctl prints the names it knows and fails for the others.
    """
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class System:
    """An operating system that can be asked; tests put a recorded one in its place."""

    platform: str = sys.platform
    output: Callable[[Sequence[str]], str] = command_output
    root: Path = Path("/")
    """Where its files begin."""

    @property
    def is_mac(self) -> bool:
        """Whether this is macOS."""
        return self.platform == "darwin"

    def sysctl(self, *names: str) -> dict[str, str]:
        """Kernel settings by name; the ones it does not know are left out. Empty off macOS."""
        return parse_sysctl(self.output(["/usr/sbin/sysctl", *names])) if self.is_mac else {}

    def read(self, path: str) -> str:
        """The text of a file such as ``proc/meminfo``; empty when it is not there."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def install(self, debian: str, fedora: str, arch: str, suse: str) -> str:
        """The command that installs a package, by the distribution's own names for it."""
        names = set(
            " ".join(_os_release(self.read("etc/os-release"), key) for key in ("ID", "ID_LIKE")).split()
        )
        if names & {"fedora", "rhel", "centos"}:
            return f"sudo dnf install {fedora}"
        if "arch" in names:
            return f"sudo pacman -S {arch}"
        if names & {"suse", "opensuse"}:
            return f"sudo zypper install {suse}"
        return f"sudo apt install {debian}"

    def distribution(self) -> str:
        """A Linux system's name and version as it calls itself; empty elsewhere."""
        return _os_release(self.read("etc/os-release"), "PRETTY_NAME")


def parse_sysctl(text: str) -> dict[str, str]:
    """Lines of ``name: value``, as sysctl prints them when asked for names."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {name.strip(): value.strip() for name, separator, value in pairs if separator}


def parse_vm_stat(text: str) -> dict[str, int]:
    """Sizes in bytes by vm_stat's names, without the word pages: free, active, wired down, …

    Empty when the text is no vm_stat.
    """
    size = re.search(r"page size of (\d+) bytes", text)
    if size is None:
        return {}
    page_bytes = int(size.group(1))
    found = re.findall(r"^Pages ([^:\n]+):\s+(\d+)\.?\s*$", text, re.MULTILINE)
    return {name: int(pages) * page_bytes for name, pages in found}


def parse_sw_vers(text: str) -> dict[str, str]:
    """ProductName, ProductVersion, BuildVersion and what else sw_vers prints."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, separator, value in pairs if separator}


def parse_memory_pressure(text: str) -> int | None:
    """The percentage of memory that ``memory_pressure -Q`` calls free; None when it does not say."""
    found = re.search(r"memory free percentage:\s*(\d+)\s*%", text)
    return int(found.group(1)) if found else None


def parse_swap_usage(text: str) -> tuple[int, int] | None:
    """(total, used) bytes of swap, from sysctl's vm.swapusage; None when the text is none."""
    sizes = {
        name: round(float(number.replace(",", ".")) * _SIZE_UNITS[unit])
        for name, number, unit in re.findall(r"(total|used) = ([\d.,]+)([BKMGT])", text)
    }
    return (sizes["total"], sizes["used"]) if sizes.keys() == {"total", "used"} else None


def parse_stall(text: str) -> float | None:
    """Share of the last ten seconds in which a process waited for memory, in percent; Linux's PSI.

    Source: Documentation/accounting/psi.rst of the kernel.
    """
    found = re.search(r"^some avg10=([\d.]+)", text, re.MULTILINE)
    return float(found.group(1)) if found else None


def _os_release(text: str, key: str) -> str:
    found = re.search(rf"^{key}=(.*)$", text, re.MULTILINE)
    return found.group(1).strip().strip("\"'") if found else ""
