"""Chip, operating system, and memory: how much there is, and how much is left."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator

import psutil

from mlx_qlora.machine.finding import Finding, Status
from mlx_qlora.machine.system import (
    GIB,
    MIB,
    System,
    parse_memory_pressure,
    parse_stall,
    parse_sw_vers,
    parse_swap_usage,
    parse_vm_stat,
)

LEAST_MACOS = 14
"""MLX's wheels need macOS 14. Source: ml-explore.github.io/mlx, Build and Install."""

LEAST_LEFT_BYTES = round(2.5 * GIB)
"""What macOS and its window server need beside the GPU's wired memory, at the least."""

_PRESSURE: dict[str, tuple[Status, str]] = {
    "1": ("ok", "normal"),
    "2": ("warning", "warning"),
    "4": ("problem", "critical"),
}
"""kern.memorystatus_vm_pressure_level; see `mlx_qlora.memory.monitor`."""

_STALL_PERCENT = 10.0
_TOP = {True: "top -o mem", False: "top -o %MEM"}


def chip(system: System) -> Iterator[Finding]:
    """What computes here. An Intel Mac has no backend in MLX."""
    if not system.is_mac:
        named = re.search(r"^model name\s*: (.*)$", system.read("proc/cpuinfo"), re.MULTILINE)
        name = named.group(1).strip() if named else platform.machine()
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        yield Finding(
            "chip",
            "ok",
            f"{name}, {_count(usable or 1, 'processor')}",
            facts={"name": name, "processors": usable},
        )
        return
    said = system.sysctl(
        "machdep.cpu.brand_string",
        "hw.optional.arm64",
        "hw.perflevel0.physicalcpu",
        "hw.perflevel1.physicalcpu",
    )
    name = said.get("machdep.cpu.brand_string", "unknown chip")
    fast, slow = said.get("hw.perflevel0.physicalcpu"), said.get("hw.perflevel1.physicalcpu")
    cores = f", {fast} performance and {slow} efficiency cores" if fast and slow else ""
    if said.get("hw.optional.arm64") == "1":
        yield Finding("chip", "ok", name + cores, facts={"name": name})
    else:
        yield Finding(
            "chip",
            "problem",
            f"{name} is no Apple silicon, and MLX has nothing for it; a Linux machine would do",
            "pip install mlx-qlora   # on a Mac with an M1 or newer, or on Linux",
            {"name": name},
        )


def operating_system(system: System) -> Iterator[Finding]:
    """Its name and version."""
    if not system.is_mac:
        text = f"{system.distribution() or platform.system()}, kernel {platform.release()}"
        yield Finding("system", "ok", text, facts={"name": text})
        return
    said = parse_sw_vers(system.output(["/usr/bin/sw_vers"]))
    version = said.get("ProductVersion", "")
    text = f"{said.get('ProductName', 'macOS')} {version} ({said.get('BuildVersion', '?')})"
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < LEAST_MACOS:
        yield Finding(
            "system",
            "problem",
            f"{text}: MLX needs macOS {LEAST_MACOS} or newer",
            "softwareupdate --list",
            {"name": text},
        )
    else:
        yield Finding("system", "ok", text, facts={"name": text})


def memory(system: System) -> Iterator[Finding]:
    """How much there is, and how much of it could be had without swapping."""
    if system.is_mac:
        total = int(system.sysctl("hw.memsize").get("hw.memsize", psutil.virtual_memory().total))
        pages = parse_vm_stat(system.output(["/usr/bin/vm_stat"]))
        available = sum(pages.get(name, 0) for name in ("free", "speculative", "inactive"))
        compressed = pages.get("occupied by compressor", 0)
        extra = f", {_gib(compressed)} compressed" if compressed > GIB // 2 else ""
    else:
        state = psutil.virtual_memory()
        total, available, extra = state.total, state.available, ""
    is_short = available < min(4 * GIB, total // 4)
    yield Finding(
        "memory",
        "warning" if is_short else "ok",
        f"{_gib(total)}, {_gib(available)} of it available{extra}"
        + ("; close what is not needed before training" if is_short else ""),
        _TOP[system.is_mac] if is_short else None,
        {"total_bytes": total, "available_bytes": available},
    )


def memory_limit(system: System, limit_bytes: int, share: float) -> Iterator[Finding]:
    """What a run may take: of a Mac, Metal's working set; elsewhere the control group's limit.

    Args:
        limit_bytes: `memory.monitor.device_limit_bytes`.
        share: The part of a limit that it calls usable off a Mac.
    """
    if not system.is_mac:
        total, allowed = psutil.virtual_memory().total, round(limit_bytes / share)
        if allowed < 0.99 * total:
            text = f"a control group allows {_gib(allowed)} of the machine's {_gib(total)}"
        else:
            text = "no control group limits memory"
        yield Finding(
            "memory limit",
            "ok",
            f"{text}; a run is planned for {_gib(limit_bytes)}",
            facts={
                "limit_bytes": limit_bytes,
                "control_group_bytes": allowed if allowed < 0.99 * total else None,
            },
        )
        return
    said = system.sysctl("hw.memsize", "iogpu.wired_limit_mb")
    total = int(said.get("hw.memsize", 0)) or psutil.virtual_memory().total
    wired_mib = int(said.get("iogpu.wired_limit_mb", 0))
    facts = {"limit_bytes": limit_bytes, "wired_limit_mib": wired_mib}
    text = f"the GPU may use {_gib(limit_bytes)} of {_gib(total)}"
    if wired_mib and total - wired_mib * MIB < LEAST_LEFT_BYTES:
        yield Finding(
            "GPU memory",
            "warning",
            f"{text}: iogpu.wired_limit_mb={wired_mib} leaves too little for macOS, which may panic",
            "sudo sysctl iogpu.wired_limit_mb=0   # macOS's own limit again",
            facts,
        )
    elif wired_mib:
        yield Finding(
            "GPU memory", "ok", f"{text}, by iogpu.wired_limit_mb={wired_mib} until a restart", None, facts
        )
    else:
        yield Finding(
            "GPU memory", "ok", f"{text}, macOS's own limit", raised_limit(total, limit_bytes), facts
        )


def raised_limit(total_bytes: int, limit_bytes: int) -> str | None:
    """The command that lets the GPU have more until the next restart; None where that is not safe.

    A sixth of memory, and 6 GiB at the least, stays for the rest: on Macs of 8 and 16 GB that is less than
    macOS's own limit gives.
    """
    raised = (total_bytes - max(total_bytes // 6, 6 * GIB)) // GIB * GIB
    if raised <= limit_bytes:
        return None
    return f"sudo sysctl iogpu.wired_limit_mb={raised // MIB}   # more for a large model, until a restart"


def pressure(system: System) -> Iterator[Finding]:
    """Whether the system is short of memory now."""
    if not system.is_mac:
        stalled = parse_stall(system.read("proc/pressure/memory"))
        if stalled is None:
            return
        is_short = stalled > _STALL_PERCENT
        yield Finding(
            "memory pressure",
            "warning" if is_short else "ok",
            f"processes waited for memory in {stalled:g} % of the last ten seconds",
            _TOP[False] if is_short else None,
            {"stalled_percent": stalled},
        )
        return
    key = "kern.memorystatus_vm_pressure_level"
    status, word = _PRESSURE.get(system.sysctl(key).get(key, ""), ("ok", "not told"))
    free = parse_memory_pressure(system.output(["/usr/bin/memory_pressure", "-Q"]))
    text = word + (f", {free} % free" if free is not None else "")
    if status != "ok":
        text += "; close other programs before training"
    yield Finding(
        "memory pressure",
        status,
        text,
        _TOP[True] if status != "ok" else None,
        {"level": word, "free_percent": free},
    )


def swap(system: System) -> Iterator[Finding]:
    """Swap in use: what is there already makes a run slow from its start."""
    if system.is_mac:
        usage = parse_swap_usage(system.sysctl("vm.swapusage").get("vm.swapusage", ""))
        memory_bytes = int(system.sysctl("hw.memsize").get("hw.memsize", 0))
    else:
        state = psutil.swap_memory()
        usage, memory_bytes = (state.total, state.used), psutil.virtual_memory().total
    if usage is None:
        return
    total, used = usage
    is_much = used > max(GIB, memory_bytes // 8)
    text = f"{_gib(used)} of {_gib(total)} in use" if total else "none"
    if is_much:
        text += "; a restart, or fewer programs, would make a run faster"
    yield Finding(
        "swap",
        "warning" if is_much else "ok",
        text,
        _TOP[system.is_mac] if is_much else None,
        {"total_bytes": total, "used_bytes": used},
    )


def display(system: System) -> Iterator[Finding]:
    """What to do when macOS ends a run for the sake of a smooth display.

    Source: github.com/ml-explore/mlx/issues/3267: work is killed only while a display is on.
    """
    if system.is_mac:
        yield Finding(
            "display",
            "ok",
            "if a run ends with “Impacting Interactivity”, macOS stopped it to keep the display smooth: "
            "go on with the display asleep",
            "pmset displaysleepnow   # right after: caffeinate -i mlx-qlora train --resume --adapter-path A",
        )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
