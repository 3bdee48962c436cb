"""memory/limits.py"""

import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_qlora.memory import limits as limits_module
from mlx_qlora.memory.limits import CACHE_SHARE, memory_limits

MIB = 1024**2


def limits() -> tuple[int, int]:
    memory, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    return memory, cache


@pytest.fixture(autouse=True)
def known_limits():
    """A memory limit of 2048 MiB and a cache limit of 512 MiB; the machine's own afterwards."""
    before = mx.set_memory_limit(2048 * MIB), mx.set_cache_limit(512 * MIB)
    yield
    mx.set_memory_limit(before[0])
    mx.set_cache_limit(before[1])


def test_limits_are_set_inside_and_restored_after():
    with memory_limits(800 * MIB, 50 * MIB):
        assert limits() == (800 * MIB, 50 * MIB)
    assert limits() == (2048 * MIB, 512 * MIB)


def test_limits_are_restored_after_an_exception():
    with pytest.raises(ZeroDivisionError), memory_limits(800 * MIB, 50 * MIB):
        raise ZeroDivisionError
    assert limits() == (2048 * MIB, 512 * MIB)


def test_the_cache_takes_a_fixed_share_of_the_budget_unless_said_otherwise():
    with memory_limits(800 * MIB):
        assert limits() == (800 * MIB, 800 * MIB // CACHE_SHARE)


def test_a_cache_limit_of_zero_turns_the_cache_off():
    with memory_limits(800 * MIB, 0):
        assert limits()[1] == 0


def test_without_a_budget_nothing_changes():
    with memory_limits(None):
        assert limits() == (2048 * MIB, 512 * MIB)


def test_limits_are_only_ever_lowered():
    with memory_limits(10_000 * MIB, 9000 * MIB):
        assert limits() == (2048 * MIB, 512 * MIB)
    assert limits() == (2048 * MIB, 512 * MIB)


def test_limits_nest():
    with memory_limits(800 * MIB, 50 * MIB):
        with memory_limits(400 * MIB, 20 * MIB):
            assert limits() == (400 * MIB, 20 * MIB)
        assert limits() == (800 * MIB, 50 * MIB)


def test_the_memory_limit_is_restored_when_the_cache_limit_is_refused(monkeypatch):
    def refuse(_limit: int) -> int:
        raise ValueError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(mx, "set_cache_limit", refuse)
        with pytest.raises(ValueError, match="refused"), memory_limits(800 * MIB, 50 * MIB):
            pass
    assert limits() == (2048 * MIB, 512 * MIB)


def test_the_wired_limit_is_never_touched(monkeypatch):
    monkeypatch.setattr(mx, "set_wired_limit", lambda _: pytest.fail("the wired limit was set"))
    with memory_limits(800 * MIB):
        pass


@pytest.mark.parametrize(("held", "calls"), [(500, [1, 32]), (300, [])], ids=["tight", "roomy"])
def test_freed_arrays_go_back_to_the_system_only_where_memory_is_tight(monkeypatch, held, calls):
    said: list[int] = []
    monkeypatch.setattr(limits_module, "_map_arrays_from", lambda size: said.append(size // MIB))
    monkeypatch.setattr(limits_module.mx, "get_active_memory", lambda: held * MIB)
    with memory_limits(800 * MIB):
        assert said == calls[:1]
    assert said == calls


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_a_freed_array_leaves_the_process_where_memory_is_tight():
    """In a process of its own, since the C library's heap remembers."""
    script = """
import mlx.core as mx
from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.memory.monitor import footprint_bytes
MIB = 1024**2
keep = mx.ones((64 * MIB,)); mx.eval(keep)
with memory_limits(300 * MIB, 0):
    before = footprint_bytes()
    arrays = [mx.zeros((MIB,)) + n for n in range(20)]; mx.eval(arrays)
    between = [bytes(100_000) for _ in range(20)]
    del arrays
    print((footprint_bytes() - before) // MIB)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12  # of 80
