"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel links reference BLAS. The dynamic linker takes a symbol from the library that was loaded
first, so a real BLAS that is in the process before MLX is what MLX then calls. This module must therefore
run before ``mlx.core`` is imported, and imports nothing heavy itself.
"""

from __future__ import annotations

import ctypes
import os
import sys

SWITCH = "MLX_QLORA_BLAS"
"""Environment variable: ``off`` leaves MLX's own BLAS in place; a path or name loads that library."""

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libblis.so.4", "libmkl_rt.so.2")
_loaded: str | None = None


def load_system_blas() -> str | None:
    """Load the first BLAS this system has, and say which; None when there is none to load.

    Nothing happens off Linux, when ``mlx.core`` is imported already, or when the switch says ``off``.
    """
    global _loaded
    wanted = os.environ.get(SWITCH, "")
    if _loaded or not sys.platform.startswith("linux") or "mlx.core" in sys.modules or wanted == "off":
        return _loaded
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
    preloaded = os.environ.get("LD_PRELOAD", "")
    return _loaded is not None or any(name in preloaded for name in ("openblas", "blis", "mkl"))
