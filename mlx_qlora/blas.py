"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel links reference BLAS. The dynamic linker takes a symbol from the library that was loaded
first, so a real BLAS that is in the process before MLX is what MLX then calls. This module must therefore
run before ``mlx.core`` is imported, and imports nothing heavy itself.

The same number of threads gives the same bits, run after run. One thread and several add in another order,
so a run that must resume bit by bit needs the number it started with.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

SWITCH = "MLX_QLORA_BLAS"
"""Environment variable: ``off`` leaves MLX's own BLAS in place; a path or name loads that library."""

# Fedora's libopenblas is the one without threads; there libopenblasp has them.
_LIBRARIES = (
    "libopenblasp.so.0",
    "libopenblas.so.0",
    "libopenblas.so",
    "libblis.so.4",
    "libblis.so",
    "libmkl_rt.so.2",
    "libmkl_rt.so",
)
_THREADS = "OPENBLAS_NUM_THREADS"
_loaded: str | None = None


def load_system_blas() -> str | None:
    """Load the first BLAS this system has, and say which; None when there is none to load.

    Nothing happens off Linux, with MLX's CUDA build, when ``mlx.core`` is imported or a BLAS preloaded
    already, or when the switch says ``off``.
    """
    global _loaded
    wanted = os.environ.get(SWITCH, "")
    is_too_late = "mlx.core" in sys.modules or _is_preloaded()
    if _loaded or not sys.platform.startswith("linux") or is_too_late or wanted == "off" or _is_cuda_build():
        return _loaded
    with _one_thread_per_core():
        for name in (wanted,) if wanted else _LIBRARIES:
            try:
                library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            if hasattr(library, "cblas_sgemm"):
                _loaded = name
                break
    return _loaded


def blas_is_fast() -> bool:
    """Whether matrix products in float32 run on a BLAS that was loaded here or preloaded by the user."""
    return _loaded is not None or _is_preloaded()


def _is_preloaded() -> bool:
    preloaded = os.environ.get("LD_PRELOAD", "")
    return any(name in preloaded for name in ("openblas", "blis", "mkl_rt"))


def _is_cuda_build() -> bool:
    """Whether the MLX that will be imported computes on an NVIDIA GPU; told by its files alone."""
    spec = find_spec("mlx")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any(next(Path(folder).parent.glob("mlx_cuda*"), None) is not None for folder in folders)


@contextmanager
def _one_thread_per_core() -> Iterator[None]:
    """While open, OpenBLAS starts a thread per physical core, unless the user has chosen a number.

    It reads the environment once, when it is loaded. Afterwards the variable is gone again: it would reach
    child processes and NumPy's own BLAS.
    """
    is_chosen = any(os.environ.get(name) for name in (_THREADS, "GOTO_NUM_THREADS", "OMP_NUM_THREADS"))
    if is_chosen or not (cores := physical_cores()):
        yield
        return
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(cores)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores this process may run on; 0 off Linux, or when it does not say."""
    if sys.platform != "linux":
        return 0
    try:
        cpus = os.sched_getaffinity(0)
        return len({(topology / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus})
    except OSError:
        return 0
