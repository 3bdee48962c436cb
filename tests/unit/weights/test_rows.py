"""Rows come from the files where they can, and are right where they cannot."""

import math

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.weights.rows import Provenance, matrix_shape, num_rows
from mlx_qlora.weights.shards import lazy_tensors, read_header
from tests.checkpoints import raw

MIB = 1024**2
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(folder, shapes, dtype=mx.bfloat16):
    """Random tensors in a file; their lazy twins and what knows them."""
    path = folder / "model.safetensors"
    tensors = {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}
    mx.save_safetensors(str(path), tensors)
    lazy = lazy_tensors(path)
    return lazy, Provenance(read_header(path), lazy)


def as_matrix(array):
    return array.reshape(matrix_shape(array.shape))


def whole(rows, shape, block):
    pieces = [rows(i, min(i + block, num_rows(shape))) for i in range(0, num_rows(shape), block)]
    return mx.concatenate(pieces)


@FEW
@given(
    experts=st.integers(1, 4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    block=st.integers(1, 30),
)
def test_the_rows_of_a_stack_are_those_of_the_stack(experts, shape, block, tmp_path):
    lazy, provenance = made(tmp_path, {str(i): shape for i in range(experts)})
    with provenance.watching_stacks():
        stacked = mx.stack([lazy[str(i)] for i in range(experts)])
    read = whole(provenance.rows_of(stacked), stacked.shape, block)
    assert raw(read) == raw(as_matrix(stacked))


@FEW
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), block=st.integers(1, 40))
def test_the_rows_of_a_computed_tensor_are_its_own(shape, block, tmp_path):
    lazy, provenance = made(tmp_path, {"a": shape})
    computed = lazy["a"] * 2
    assert raw(whole(provenance.rows_of(computed), computed.shape, block)) == raw(as_matrix(computed))


def test_a_stack_of_two_types_has_the_wider_one(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3), mx.bfloat16), "b": mx.ones((2, 3))})
    lazy = lazy_tensors(path)
    provenance = Provenance(read_header(path), lazy)
    with provenance.watching_stacks():
        stacked = mx.stack([lazy["a"], lazy["b"]])
    assert provenance.rows_of(stacked)(0, 2).dtype == stacked.dtype == mx.float32


def test_a_scalar_is_one_row(tmp_path):
    lazy, provenance = made(tmp_path, {"a": ()})
    assert provenance.rows_of(lazy["a"])(0, 1).item() == lazy["a"].item()


def stack_of_two(lazy, **options):
    return mx.stack([lazy["a"], lazy["b"]], **options)


def changed_before(lazy):
    lazy["a"] += 1
    return stack_of_two(lazy)


def changed_after(lazy):
    stacked = stack_of_two(lazy)
    stacked += 1
    return stacked


def one_is_of_another_type(lazy):
    return mx.stack([lazy["a"], lazy["b"].astype(mx.float32)])


@pytest.mark.parametrize(
    "make",
    [
        lambda lazy: stack_of_two(lazy, axis=1),
        lambda lazy: stack_of_two(lazy, axis=-1),
        lambda lazy: mx.stack([lazy["a"], lazy["b"] * 2]),
        lambda lazy: mx.stack([stack_of_two(lazy), stack_of_two(lazy)]),
        lambda lazy: mx.stack(iter([lazy["b"], lazy["a"]])),
        changed_before,
        changed_after,
        one_is_of_another_type,
    ],
    ids=["axis 1", "last axis", "computed part", "stack of stacks", "iterator", "before", "after", "mixed"],
)
def test_any_other_stack_is_right_too(make, tmp_path):
    lazy, provenance = made(tmp_path, {"a": (3, 4), "b": (3, 4)})
    with provenance.watching_stacks():
        array = make(lazy)
    read = whole(provenance.rows_of(array), array.shape, 4)
    assert (read.dtype, raw(read)) == (array.dtype, raw(as_matrix(array)))


def test_a_tensor_changed_in_place_is_not_read_from_its_file(tmp_path):
    lazy, provenance = made(tmp_path, {"a": (3, 4)})
    before = raw(lazy["a"] + 0)
    lazy["a"] += 1
    read = provenance.rows_of(lazy["a"])(0, 3)
    assert raw(read) == raw(lazy["a"]) != before


def test_a_stack_is_never_in_memory_as_a_whole(tmp_path):
    lazy, provenance = made(tmp_path, {str(i): (1024, 512) for i in range(8)})  # 1 MiB each
    with provenance.watching_stacks():
        stacked = mx.stack(list(lazy.values()))
    rows, count = provenance.rows_of(stacked), num_rows(stacked.shape)
    del lazy, provenance, stacked
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for first in range(0, count, 256):
        mx.eval(rows(first, first + 256))
    assert mx.get_peak_memory() - before < MIB


def test_a_computed_tensor_is_let_go_with_its_last_rows(tmp_path):
    lazy, provenance = made(tmp_path, {"a": (1024, 512)})
    rows = provenance.rows_of(lazy["a"] * 2)
    del lazy, provenance
    before = mx.get_active_memory()
    mx.eval(rows(0, 512))
    assert mx.get_active_memory() - before > MIB / 2
    mx.eval(rows(512, 1024))
    assert mx.get_active_memory() - before < MIB / 2


def test_mlx_is_left_as_it_was(tmp_path):
    stack, (_, provenance) = mx.stack, made(tmp_path, {"a": (2,)})
    with pytest.raises(KeyError) as seen, provenance.watching_stacks():
        raise KeyError(mx.stack)
    assert seen.value.args[0] is not stack
    assert mx.stack is stack


@pytest.mark.parametrize(
    ("shape", "matrix"), [((), ()), ((3,), (3,)), ((2, 3), (2, 3)), ((4, 2, 3), (8, 3)), ((0, 4), (0, 4))]
)
def test_all_axes_but_the_last_are_rows(shape, matrix):
    assert matrix_shape(shape) == matrix
    assert num_rows(shape) == (matrix[0] if matrix else 1)
    assert math.prod(matrix) == math.prod(shape)
