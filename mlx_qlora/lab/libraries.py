"""Libraries that only the lab needs, imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mlx_qlora.errors import ConfigError

HINT = "pip install 'mlx-qlora[lab]'"


def lab_library(module: str) -> Any:
    """A module of scikit-learn, scipy or matplotlib.

    Raises:
        ConfigError: its package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise ConfigError(f"The lab needs {package}, which is not installed.", run=HINT) from error
