"""A server that the tests share, as a client finds it: a process of its own."""

from pathlib import Path

import pytest

from tests.served import Served, save_random_adapter, serving


@pytest.fixture(scope="session")
def adapter_folders(tiny_llama_folder, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of the tiny model, by name."""
    folder = tmp_path_factory.mktemp("served")
    return {
        name: save_random_adapter(tiny_llama_folder, folder / name, seed=seed)
        for seed, name in enumerate(("one", "two"), start=1)
    }


@pytest.fixture(scope="session")
def served(tiny_llama_folder, adapter_folders):
    """A server of the tiny model and both adapters, which no test stops."""
    pairs = [part for name, path in adapter_folders.items() for part in ("--adapter", f"{name}={path}")]
    with serving(tiny_llama_folder, *pairs, "--max-body-mib", 0.25) as running:
        yield running
        assert running.process.poll() is None, "".join(running.log)


__all__ = ["Served"]
