"""What is true of memory now: MLX's, the process's and the system's."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import psutil

GIB = 1024**3

SYSTEM_SHARE = 0.9
"""Of all memory, where no GPU says what it may use: at the limit itself a process is killed, not warned."""

Pressure = Literal["normal", "warning", "critical"]

# Apple's dispatch/source.h (DISPATCH_MEMORYPRESSURE_*); the kernel publishes the same numbers by sysctl.
_PRESSURE_LEVELS: dict[int, Pressure] = {1: "normal", 2: "warning", 4: "critical"}


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """One look at memory; all sizes in bytes."""

    mlx_active_bytes: int
    """Arrays that are alive."""
    mlx_cache_bytes: int
    """Freed buffers that MLX keeps to use again."""
    mlx_peak_bytes: int
    """The most that was active at once since the process started; excludes the cache."""
    footprint_bytes: int
    """What the system charges this process for: resident memory on Linux (excludes a CUDA device's own
    memory), the physical footprint on macOS (what Activity Monitor shows; includes Metal's buffers)."""
    system_available_bytes: int
    """What all processes together could still get without swapping; of the host, not of a container."""
    swap_growth_bytes: int
    """Swap in use on the whole system, above what it was when the monitor started; never negative."""
    gpu_limit_bytes: int | None = None
    """Metal's recommended working set, about two thirds of a Mac's memory; None on CPU builds."""
    pressure: Pressure | None = None
    """What macOS says about the whole system; None elsewhere."""

    @property
    def needed_bytes(self) -> int:
        """What the process needed at MLX's peak: the peak, and all that is not MLX's."""
        outside = max(0, self.footprint_bytes - self.mlx_active_bytes - self.mlx_cache_bytes)
        return outside + self.mlx_peak_bytes

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


class MemoryMonitor:
    """Samples memory, and remembers the largest footprint and where swap stood at the start."""

    def __init__(self) -> None:
        self._largest_sample = 0
        self._swap_at_start = system_memory()[1]
        self._gpu_limit = gpu_limit_bytes()

    def sample(self) -> MemorySample:
        """Memory now; cheap enough for every training step."""
        footprint = footprint_bytes()
        self._largest_sample = max(self._largest_sample, footprint)
        available, swap = system_memory()
        return MemorySample(
            mlx_active_bytes=mx.get_active_memory(),
            mlx_cache_bytes=mx.get_cache_memory(),
            mlx_peak_bytes=mx.get_peak_memory(),
            footprint_bytes=footprint,
            system_available_bytes=available,
            swap_growth_bytes=max(0, swap - self._swap_at_start),
            gpu_limit_bytes=self._gpu_limit,
            pressure=pressure(),
        )

    @property
    def peak_footprint_bytes(self) -> int:
        """The largest footprint since the process started, between samples too where the system keeps it."""
        return max(self._largest_sample, footprint_bytes(), _kept_peak_bytes())

    def budget_bytes(self, memory_budget_gib: float | None) -> int:
        """The footprint a run should stay under: the given one, else this device's own limit."""
        return round(memory_budget_gib * GIB) if memory_budget_gib else device_limit_bytes()


def device_limit_bytes() -> int:
    """Metal's recommended working set, else nine tenths of the memory this machine or container has."""
    limit = gpu_limit_bytes()
    if limit is not None:
        return limit
    return round(SYSTEM_SHARE * min([psutil.virtual_memory().total, *_cgroup_limits()]))


def gpu_limit_bytes() -> int | None:
    """Metal's recommended working set; None when MLX has no Metal device."""
    if not mx.metal.is_available():
        return None
    limit = mx.device_info().get("max_recommended_working_set_size")
    return None if limit is None else int(limit)


def footprint_bytes() -> int:
    """Memory the system charges this process for, now."""
    if sys.platform == "darwin":
        usage = _rusage()
        return usage.ri_phys_footprint if usage else psutil.Process().memory_info().rss
    # /proc/self/statm: pages of size, resident, shared, …
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _page_bytes()


def system_memory() -> tuple[int, int]:
    """Available memory and used swap of the whole system, in bytes."""
    if sys.platform == "darwin":
        return psutil.virtual_memory().available, psutil.swap_memory().used
    kib = _kib_fields("/proc/meminfo")  # psutil reads this file twice and vmstat besides
    return kib["MemAvailable"] * 1024, (kib.get("SwapTotal", 0) - kib.get("SwapFree", 0)) * 1024


def pressure() -> Pressure | None:
    """The system's memory pressure; None where it is not told."""
    if sys.platform != "darwin":
        return None
    level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    failed = _libc().sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else _PRESSURE_LEVELS.get(level.value)


def _kept_peak_bytes() -> int:
    if sys.platform == "darwin":
        usage = _rusage()
        return usage.ri_lifetime_max_phys_footprint if usage else 0
    # Not ru_maxrss: a child process starts with its parent's.
    return _kib_fields("/proc/self/status").get("VmHWM", 0) * 1024


def _kib_fields(path: str) -> dict[str, int]:
    """The lines ``Name:   123 kB`` of a file under /proc."""
    fields = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value[:-3])
    return fields


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Memory limits on this process's control group and its ancestors, versions 1 and 2; none off Linux."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _limits_along(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_along(root / "memory", path, "memory.limit_in_bytes")
    return limits


def _limits_along(mount: Path, path: str, file: str) -> list[int]:
    group = mount / path.lstrip("/")
    limits = []
    # In a container the path may be the host's, and only the mount's own root is there.
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(mount):
            break
        try:
            text = (folder / file).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit():  # not "max"
            limits.append(int(text))
    return limits


@cache
def _page_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE")


class _RusageInfoV4(ctypes.Structure):
    """``struct rusage_info_v4`` of Apple's sys/resource.h."""

    _fields_ = [
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("times_wakeups_pageins_wired_resident", ctypes.c_uint64 * 7),
        ("ri_phys_footprint", ctypes.c_uint64),
        ("start_exit_children_disk_qos_billed_writes", ctypes.c_uint64 * 20),
        ("ri_lifetime_max_phys_footprint", ctypes.c_uint64),
        ("instructions_energy_interval_runnable", ctypes.c_uint64 * 6),
    ]


_RUSAGE_INFO_V4 = 4


def _rusage() -> _RusageInfoV4 | None:
    # psutil's USS walks every memory region, which takes milliseconds, and leaves out compressed pages.
    usage = _RusageInfoV4()
    failed = _libc().proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(usage))
    return None if failed else usage


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
