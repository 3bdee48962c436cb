"""machine/system.py: the words of the system's own commands"""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.machine import system as module
from mlx_qlora.machine.system import (
    GIB,
    MIB,
    System,
    command_output,
    parse_memory_pressure,
    parse_stall,
    parse_sw_vers,
    parse_swap_usage,
    parse_sysctl,
    parse_vm_stat,
)
from tests.macs import MEMORY_PRESSURE, SW_VERS, VM_STAT, mac

PARSERS = [
    parse_memory_pressure, parse_stall, parse_sw_vers, parse_swap_usage, parse_sysctl, parse_vm_stat
]  # fmt: skip


def test_vm_stat_gives_bytes_by_name_in_the_page_size_it_states():
    pages = parse_vm_stat(VM_STAT)
    assert pages["free"] == 123456 * 16384
    assert pages["wired down"] == 134567 * 16384
    assert pages["occupied by compressor"] == 45678 * 16384
    assert "Translation faults" not in pages
    intel = parse_vm_stat(VM_STAT.replace("16384", "4096"))
    assert intel["free"] * 4 == pages["free"]


def test_sysctl_leaves_out_what_it_does_not_know_and_keeps_colons_in_values():
    assert parse_sysctl("a.b: 1\nc: x: y\nnonsense\n") == {"a.b": "1", "c": "x: y"}


def test_sw_vers_gives_name_version_and_build():
    expected = {"ProductName": "macOS", "ProductVersion": "15.5", "BuildVersion": "24F74"}
    assert parse_sw_vers(SW_VERS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("total = 2048.00M  used = 812.75M  free = 1235.25M  (encrypted)", (2048 * MIB, 812.75 * MIB)),
        ("total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)", (0, 0)),
        ("total = 6,00G  used = 1,50G  free = 4,50G", (6 * GIB, 1.5 * GIB)),  # a comma, in other locales
        ("used = 1.00M", None),
    ],
)
def test_swap_is_read_in_its_own_units(text, expected):
    assert parse_swap_usage(text) == expected


def test_memory_pressure_gives_the_free_percentage():
    assert parse_memory_pressure(MEMORY_PRESSURE) == 57


def test_stalls_are_those_of_some_process_in_ten_seconds():
    text = "some avg10=12.50 avg60=3.00 avg300=0.10 total=1\nfull avg10=1.00 avg60=0 avg300=0 total=1\n"
    assert parse_stall(text) == 12.5


@pytest.mark.parametrize("parse", PARSERS)
@settings(max_examples=30)
@given(text=st.text())
def test_no_text_breaks_a_parser(parse, text):
    parse(text)


def test_a_command_that_is_not_there_or_hangs_says_nothing(monkeypatch):
    monkeypatch.setattr(module, "COMMAND_SECONDS", 0.2)
    assert command_output(["/nowhere/sysctl"]) == ""
    assert command_output([sys.executable, "-c", "import time; time.sleep(30)"]) == ""


def test_what_a_command_printed_before_it_failed_counts():
    assert (
        command_output([sys.executable, "-c", "print('a: 1', flush=True); raise SystemExit(1)"]) == "a: 1\n"
    )


def test_only_a_mac_is_asked_by_sysctl():
    assert mac().sysctl("hw.memsize", "hw.unknown") == {"hw.memsize": str(16 * GIB)}
    assert System("linux", mac().output).sysctl("hw.memsize") == {}


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ('ID=debian\nPRETTY_NAME="Debian 12"', "sudo apt install g++"),
        ('ID=ubuntu\nID_LIKE="debian"', "sudo apt install g++"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', "sudo dnf install gcc-c++"),
        ("ID=arch", "sudo pacman -S gcc"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"', "sudo zypper install gcc-c++"),
    ],
)
def test_a_package_is_installed_as_the_distribution_does(tmp_path, release, command):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text(release)
    found = System("linux", root=tmp_path)
    assert found.install("g++", "gcc-c++", "gcc", "gcc-c++") == command
