"""blas.py: a library for MLX, loaded before it or not at all."""

import json
import os
import subprocess
import sys

import pytest

REPORT = (
    "import json, sys; import mlx_qlora; from mlx_qlora import blas; print(json.dumps([blas._loaded, {}]))"
)


def loaded(extra: str = "None", **environment: str):
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(extra)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout)


def test_it_brings_mlx_not_with_it():
    assert loaded("'mlx.core' in sys.modules")[1] is False


def test_the_switch_turns_it_off():
    assert loaded("blas.blas_is_fast()", MLX_QLORA_BLAS="off") == [None, False]


def test_a_library_that_does_not_exist_is_passed_over():
    assert loaded(MLX_QLORA_BLAS="libnowhere.so.7")[0] is None


def test_a_library_without_matrix_products_is_not_taken():
    assert loaded(MLX_QLORA_BLAS="libm.so.6")[0] is None


def test_when_mlx_is_there_already_it_is_too_late():
    code = "import mlx.core, mlx_qlora.blas as blas; print(blas.load_system_blas(), blas.blas_is_fast())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]


def test_what_is_loaded_is_what_mlx_calls():
    if loaded()[0] is None:
        pytest.skip("this machine has no BLAS to load")
    code = (
        "{}; import mlx.core as mx, numpy as np, hashlib; "
        "a = mx.random.normal((512, 512), key=mx.random.key(0));"
        "print(hashlib.sha256(np.array(a @ a).tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True
        ).stdout
        for first in ("import mlx_qlora", "import mlx_qlora", "pass")
    }
    assert len(digests) == 2  # repeatable, and another order of additions than the reference's
