"""blas.py: a library for MLX, loaded before it or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qlora import blas

REPOSITORY = Path(__file__).parents[2]
THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX brings a fast BLAS elsewhere")


def run(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own, with none of this session's BLAS settings."""
    clean = {k: v for k, v in os.environ.items() if k not in (*THREADS, blas.SWITCH, "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**clean, **environment},
    )
    return done.stdout.strip()


def loaded(extra: str = "None", **environment: str):
    """[the library that importing mlx_qlora loads, `extra`]."""
    code = "import json, os, sys; import mlx_qlora; from mlx_qlora import blas; "
    return json.loads(run(code + f"print(json.dumps([blas._loaded, {extra}]))", **environment))


@pytest.fixture(scope="module")
def library() -> str:
    """The BLAS of this machine."""
    name = loaded()[0]
    if name is None:
        pytest.skip("this machine has no BLAS to load, or MLX's CUDA build")
    return name


def test_it_brings_mlx_not_with_it():
    assert loaded("'mlx.core' in sys.modules")[1] is False


def test_the_switch_turns_it_off():
    assert loaded("blas.blas_is_fast()", MLX_QLORA_BLAS="off") == [None, False]


def test_a_library_that_does_not_exist_is_passed_over():
    code = "import mlx_qlora, mlx.core as mx; from mlx_qlora import blas; a = mx.ones((64, 64));"
    code += "print(blas._loaded, blas.blas_is_fast(), (a @ a).sum().item())"
    assert run(code, MLX_QLORA_BLAS="libnowhere.so.7") == f"None False {64.0**3}"


def test_a_library_without_matrix_products_is_not_taken():
    assert loaded(MLX_QLORA_BLAS="libm.so.6")[0] is None


def test_when_mlx_is_there_already_it_is_too_late():
    code = "import mlx.core, mlx_qlora.blas as blas; print(blas.load_system_blas(), blas.blas_is_fast())"
    assert run(code) == "None False"


def test_a_library_can_be_named(library):
    assert loaded("blas.blas_is_fast()", MLX_QLORA_BLAS=library) == [library, True]


def test_a_preloaded_library_is_used_as_it_is(library):
    assert loaded("blas.blas_is_fast()", LD_PRELOAD=library) == [None, True]


@pytest.mark.usefixtures("library")
def test_what_is_loaded_is_what_mlx_calls():
    code = (
        "{}; import mlx.core as mx, numpy as np, hashlib; "
        "a = mx.random.normal((512, 512), key=mx.random.key(0));"
        "print(hashlib.sha256(np.array(a @ a).tobytes()).hexdigest())"
    )
    digests = {run(code.format(first)) for first in ("import mlx_qlora", "import mlx_qlora", "pass")}
    assert len(digests) == 2  # repeatable, and another order of additions than the reference's


STEPS = """
import hashlib, sys
import mlx_qlora
import numpy as np
from mlx.utils import tree_flatten
from mlx_qlora.config import TrainingConfig
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.quantization.dense import dense_products
from mlx_qlora.training.optimizer import build_optimizer
from mlx_qlora.training.step import TrainStep
from tests.tiny import random_batch, tiny_llama, with_lora

model = with_lora(tiny_llama(), dropout=0.1)
config = TrainingConfig(compile=False)
with dense_products(model, enabled=True):
    step = TrainStep(objective_for(model), build_optimizer(config), config)
    for number in range(1, 4):
        step([random_batch([120, 90, 33], seed=number)], number, 1e-3)
digest = hashlib.sha256()
for _, array in tree_flatten([model.trainable_parameters(), step.optimizer.state]):
    digest.update(np.array(array).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.usefixtures("library")
def test_training_steps_are_the_same_bit_by_bit_in_another_process():
    assert run(STEPS) == run(STEPS)


def test_the_number_of_threads_reaches_the_library_and_no_child(library):
    if "openblas" not in library:
        pytest.skip("only OpenBLAS is told a number of threads")
    threads = "__import__('ctypes').CDLL(blas._loaded).openblas_get_num_threads()"
    report = f"[{threads}, os.environ.get('OPENBLAS_NUM_THREADS')]"
    assert loaded(report)[1] == [blas.physical_cores(), None]
    assert loaded(report, OPENBLAS_NUM_THREADS="1")[1] == [1, "1"]
    assert loaded(report, OMP_NUM_THREADS="1")[1] == [1, None]


@pytest.mark.parametrize(
    ("siblings", "cores"), [(["0-1", "0-1"], 1), (["0", "1"], 2)], ids=["two threads of a core", "two cores"]
)
def test_hardware_threads_of_one_core_count_once(monkeypatch, tmp_path, siblings, cores):
    for cpu, text in enumerate(siblings):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert blas.physical_cores(tmp_path) == cores
    assert blas.physical_cores(tmp_path / "nowhere") == 0


def test_the_cuda_build_of_mlx_keeps_its_own(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    code = "from mlx_qlora import blas; print(blas._loaded, blas._is_cuda_build())"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    assert run(code, PYTHONPATH=path).endswith("False")
    (tmp_path / "mlx_cuda_12-0.32.4.dist-info").mkdir()
    assert run(code, PYTHONPATH=path) == "None True"
