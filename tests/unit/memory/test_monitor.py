"""memory/monitor.py"""

import ctypes
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import psutil
import pytest

from mlx_qlora.memory import monitor as monitor_module
from mlx_qlora.memory.monitor import SYSTEM_SHARE, MemoryMonitor
from mlx_qlora.presets import GIB

MIB = 1024**2
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_arrays_that_are_alive_are_counted_as_active_and_freed_ones_are_not():
    monitor = MemoryMonitor()
    before = monitor.sample().mlx_active_bytes
    array = mx.zeros((8, MIB))
    mx.eval(array)
    during = monitor.sample()
    assert during.mlx_active_bytes - before >= 32 * MIB
    assert during.mlx_peak_bytes >= during.mlx_active_bytes
    del array
    assert monitor.sample().mlx_active_bytes - before < 32 * MIB


def test_the_footprint_grows_by_the_memory_that_is_touched():
    monitor = MemoryMonitor()
    before = monitor.sample().footprint_bytes
    block = np.ones(64 * MIB, np.uint8)
    grown = monitor.sample().footprint_bytes - before
    assert 60 * MIB < grown < 80 * MIB, block.nbytes


@on_linux
def test_the_footprint_is_what_psutil_calls_resident():
    assert MemoryMonitor().sample().footprint_bytes == pytest.approx(
        psutil.Process().memory_info().rss, abs=4 * MIB
    )


@on_linux
def test_the_available_memory_is_what_psutil_says():
    available = MemoryMonitor().sample().system_available_bytes
    assert available == pytest.approx(psutil.virtual_memory().available, abs=256 * MIB)


@on_linux
def test_swap_in_use_is_what_is_there_less_what_is_free(monkeypatch):
    kib = {"MemAvailable": 7, "SwapTotal": 100, "SwapFree": 60}
    monkeypatch.setattr(monitor_module, "_kib_fields", lambda _: kib)
    assert monitor_module.system_memory() == (7 * 1024, 40 * 1024)


@on_linux
def test_a_peak_between_two_samples_is_not_missed():
    code = (
        "import numpy as np; from mlx_qlora.memory.monitor import MemoryMonitor as M\n"
        "m = M(); before = m.sample().footprint_bytes; block = np.ones(96 << 20, np.uint8); del block\n"
        "print(before, m.sample().footprint_bytes, m.peak_footprint_bytes)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after, peak = map(int, out.split())
    assert after - before < 48 * MIB
    assert 90 * MIB < peak - before < 130 * MIB


@on_linux
def test_the_peak_of_the_parent_process_is_not_inherited():
    block = np.ones(256 * MIB, np.uint8)
    code = "from mlx_qlora.memory.monitor import MemoryMonitor as M; print(M().peak_footprint_bytes)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < block.nbytes


def test_swap_that_was_in_use_before_does_not_count_and_growth_is_never_negative(monkeypatch):
    swap = iter([5 * GIB, 7 * GIB, 3 * GIB])
    monkeypatch.setattr(monitor_module, "system_memory", lambda: (GIB, next(swap)))
    monitor = MemoryMonitor()
    assert [monitor.sample().swap_growth_bytes for _ in range(2)] == [2 * GIB, 0]


def test_a_sample_is_json_with_every_field():
    sample = MemoryMonitor().sample()
    assert json.loads(json.dumps(sample.as_dict())) == {
        name: getattr(sample, name) for name in sample.__dataclass_fields__
    }


@on_linux
def test_a_sample_takes_less_than_a_millisecond():
    monitor, seconds = MemoryMonitor(), []
    for _ in range(50):
        started = time.perf_counter()
        monitor.sample()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1e-3  # the minimum: other processes only add


def test_the_budget_is_the_given_one_in_powers_of_1024():
    assert MemoryMonitor().budget_bytes(1.5) == 3 * 2**29


def test_without_a_given_budget_the_gpu_working_set_is_the_limit(monkeypatch):
    monkeypatch.setattr(monitor_module.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        monitor_module.mx, "device_info", lambda: {"max_recommended_working_set_size": 11 * GIB}
    )
    assert MemoryMonitor().budget_bytes(None) == 11 * GIB
    assert MemoryMonitor().sample().gpu_limit_bytes == 11 * GIB


@pytest.mark.parametrize("limits", [[], [9223372036854771712]], ids=["none", "version 1's word for none"])
def test_without_gpu_and_container_the_machine_is_the_limit(monkeypatch, limits):
    monkeypatch.setattr(monitor_module.mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(monitor_module, "_cgroup_limits", lambda: limits)
    assert MemoryMonitor().budget_bytes(None) == round(SYSTEM_SHARE * psutil.virtual_memory().total)


def test_a_container_limit_below_the_machine_is_the_limit(monkeypatch):
    monkeypatch.setattr(monitor_module.mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(monitor_module, "_cgroup_limits", lambda: [GIB, 2**62])
    assert MemoryMonitor().budget_bytes(None) == round(SYSTEM_SHARE * GIB)


def cgroup(tmp_path, own: str, **files: str):
    for name, text in files.items():
        path = tmp_path / "fs" / name.replace("__", "/")
        path = path.with_name(path.name.replace("-", "."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    return monitor_module._cgroup_limits(tmp_path / "fs", tmp_path / "own")


def test_version_2_limits_of_the_group_and_its_ancestors_are_read(tmp_path):
    files = {"a__b__memory-max": "100\n", "a__memory-max": "max\n", "memory-max": "300\n"}
    assert cgroup(tmp_path, "0::/a/b\n", **files) == [100, 300]


def test_version_1_limits_are_read_from_the_memory_controller(tmp_path):
    files = {"memory__a__memory-limit_in_bytes": "100\n", "cpu__a__memory-limit_in_bytes": "7\n"}
    assert cgroup(tmp_path, "4:cpu,memory:/a\n3:cpu:/a\n", **files) == [100]


def test_in_a_container_that_does_not_see_its_own_path_the_root_is_read(tmp_path):
    assert cgroup(tmp_path, "0::/docker/abc\n", **{"memory-max": "300\n"}) == [300]


def test_nothing_is_read_outside_of_the_mount(tmp_path):
    (tmp_path / "memory.max").write_text("1\n")
    assert cgroup(tmp_path, "0::/a\n", **{"memory-max": "300\n"}) == [300]


class FakeMac(SimpleNamespace):
    """The two calls of libSystem, as Apple's headers describe them."""

    def proc_pid_rusage(self, _pid, flavour, pointer):
        assert flavour == 4
        # struct rusage_info_v4: 16 bytes of uuid, then 64-bit numbers; 7 is the footprint, 28 its peak.
        numbers = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))
        for index in range(35):
            numbers[2 + index] = index * MIB
        return self.error

    def sysctlbyname(self, name, old, *_):
        assert name == b"kern.memorystatus_vm_pressure_level"
        ctypes.cast(old, ctypes.POINTER(ctypes.c_int))[0] = self.level
        return self.error


@pytest.fixture
def mac(monkeypatch):
    fake = FakeMac(error=0, level=1)
    monkeypatch.setattr(monitor_module.sys, "platform", "darwin")
    monkeypatch.setattr(monitor_module, "_libc", lambda: fake)
    return fake


@pytest.mark.usefixtures("mac")
def test_on_a_mac_the_footprint_is_the_physical_one_and_the_kernel_keeps_its_peak():
    assert monitor_module.footprint_bytes() == 7 * MIB
    assert monitor_module._kept_peak_bytes() == 28 * MIB
    assert ctypes.sizeof(monitor_module._RusageInfoV4) == 16 + 35 * 8


def test_on_a_mac_that_refuses_the_footprint_resident_memory_is_taken(mac):
    mac.error = -1
    assert monitor_module.footprint_bytes() > 10 * MIB
    assert monitor_module._kept_peak_bytes() == 0


@pytest.mark.parametrize(("level", "said"), [(1, "normal"), (2, "warning"), (4, "critical"), (3, None)])
def test_on_a_mac_the_pressure_level_has_a_name(mac, level, said):
    mac.level = level
    assert monitor_module.pressure() == said


def test_pressure_that_cannot_be_read_is_none(mac):
    mac.error = -1
    assert monitor_module.pressure() is None


@on_linux
def test_off_a_mac_there_is_no_pressure_level():
    assert MemoryMonitor().sample().pressure is None


def test_without_a_gpu_that_says_it_a_run_may_take_nine_tenths_of_the_smallest_limit(monkeypatch):
    monkeypatch.setattr(monitor_module, "gpu_limit_bytes", lambda: None)
    monkeypatch.setattr(monitor_module, "_cgroup_limits", lambda: [10 * MIB, 20 * MIB])
    assert MemoryMonitor().budget_bytes(None) == 9 * MIB
    assert MemoryMonitor().budget_bytes(2.0) == 2 * GIB  # told is told
    monkeypatch.setattr(monitor_module, "gpu_limit_bytes", lambda: 5 * MIB)
    assert MemoryMonitor().budget_bytes(None) == 5 * MIB
