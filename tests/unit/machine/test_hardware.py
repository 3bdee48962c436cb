"""machine/hardware.py"""

import pytest

from mlx_qlora.machine import hardware
from mlx_qlora.machine.system import GIB, MIB, System
from tests.macs import VM_STAT, mac

SHORT = VM_STAT.replace("123456.", "   876.").replace("245678.", " 30321.").replace("45678.", "287654.")
LINUX = System("linux")


def only(findings):
    (finding,) = findings
    return finding


def test_a_mac_says_its_chip_and_version():
    assert only(hardware.chip(mac())).text == "Apple M1, 4 performance and 4 efficiency cores"
    assert only(hardware.operating_system(mac())).text == "macOS 15.5 (24F74)"


def test_an_intel_mac_is_a_problem():
    intel = mac(brand_string="Intel(R) Core(TM) i7", arm64=None, physicalcpu=None)
    found = only(hardware.chip(intel))
    assert (found.status, found.text.startswith("Intel(R) Core(TM) i7 is no Apple silicon")) == (
        "problem",
        True,
    )


def test_a_macos_without_a_wheel_is_a_problem():
    old = mac(sw_vers="ProductName:\tmacOS\nProductVersion:\t13.6.1\nBuildVersion:\t22G313\n")
    found = only(hardware.operating_system(old))
    assert found.status == "problem"
    assert "macOS 14 or newer" in found.text
    assert found.run == "softwareupdate --list"


def test_available_memory_of_a_mac_is_what_could_be_had_without_swapping():
    found = only(hardware.memory(mac()))
    assert found.status == "ok"
    assert found.facts == {"total_bytes": 16 * GIB, "available_bytes": (123456 + 12345 + 245678) * 16384}


def test_little_memory_is_a_warning_with_a_command():
    found = only(hardware.memory(mac(vm_stat=SHORT)))
    assert (found.status, found.run) == ("warning", "top -o mem")
    assert "4.4 GiB compressed" in found.text


@pytest.mark.parametrize(
    ("wired", "status", "run"),
    [
        (0, "ok", None),  # 10 GiB would leave six to the rest, and macOS gives more than that already
        (12288, "ok", None),
        (14336, "warning", "sudo sysctl iogpu.wired_limit_mb=0   # macOS's own limit again"),
    ],
)
def test_a_raised_gpu_limit_that_starves_macos_is_a_warning(wired, status, run):
    limit = wired * MIB or round(10.67 * GIB)
    found = only(hardware.memory_limit(mac(wired_limit_mb=str(wired)), limit, 0.9))
    assert (found.status, found.run) == (status, run)
    assert found.facts == {"limit_bytes": limit, "wired_limit_mib": wired}


@pytest.mark.parametrize(
    ("total", "limit", "raised"), [(8, 5.33, None), (16, 10.67, None), (32, 21.33, 26), (64, 48, 53)]
)
def test_more_gpu_memory_is_offered_only_where_six_gib_and_a_sixth_stay(total, limit, raised):
    command = hardware.raised_limit(total * GIB, round(limit * GIB))
    assert command == (
        f"sudo sysctl iogpu.wired_limit_mb={raised * 1024}   # more for a large model, until a restart"
        if raised
        else None
    )


@pytest.mark.parametrize(("level", "status"), [("1", "ok"), ("2", "warning"), ("4", "problem")])
def test_pressure_is_what_the_kernel_says(level, status):
    found = only(hardware.pressure(mac(memorystatus_vm_pressure_level=level)))
    assert found.status == status
    assert "57 % free" in found.text
    assert (found.run is None) == (status == "ok")


def test_much_swap_is_a_warning():
    assert only(hardware.swap(mac())).status == "ok"
    full = mac(swapusage="total = 6144.00M  used = 5000.00M  free = 1144.00M  (encrypted)")
    assert only(hardware.swap(full)).status == "warning"


def test_the_display_s_watchdog_is_told_of_on_a_mac_only():
    assert "Impacting Interactivity" in only(hardware.display(mac())).text
    assert list(hardware.display(LINUX)) == []


def test_this_machine_says_what_it_is():
    for check in (hardware.chip, hardware.operating_system, hardware.memory, hardware.swap):
        found = only(check(System()))
        assert found.text
    memory = only(hardware.memory(LINUX)).facts
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]


def test_a_control_group_s_limit_is_told_apart_from_the_machine_s_memory(monkeypatch):
    memory = type("Memory", (), {"total": 64 * GIB})()
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: memory)
    limited = only(hardware.memory_limit(LINUX, round(0.9 * 8 * GIB), 0.9))
    assert limited.text == (
        "a control group allows 8.0 GiB of the machine's 64.0 GiB; a run is planned for 7.2 GiB"
    )
    free = only(hardware.memory_limit(LINUX, round(0.9 * 64 * GIB), 0.9))
    assert (free.facts["control_group_bytes"], limited.facts["control_group_bytes"]) == (None, 8 * GIB)


@pytest.mark.parametrize(("share", "status"), [("0.00", "ok"), ("42.00", "warning")])
def test_linux_waiting_for_memory_is_a_warning(tmp_path, share, status):
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/memory").write_text(f"some avg10={share} avg60=0.00 avg300=0.00 total=0\n")
    assert only(hardware.pressure(System("linux", root=tmp_path))).status == status


def test_a_kernel_without_pressure_figures_is_not_mentioned(tmp_path):
    assert list(hardware.pressure(System("linux", root=tmp_path))) == []
