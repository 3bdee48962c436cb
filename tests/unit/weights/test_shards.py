"""Broken weight files are refused with a WeightsError; what is accepted agrees with the file."""

import json
import math
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_qlora.errors import WeightsError
from mlx_qlora.weights.shards import (
    DTYPE_BYTES,
    DTYPES,
    INDEX,
    read_checkpoint,
    read_header,
    read_rows,
)
from tests.checkpoints import raw, save_sharded, write_safetensors

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {
    "layers.0.weight": mx.arange(24, dtype=mx.float32).reshape(4, 6).astype(mx.bfloat16),
    "layers.0.bias": mx.arange(6, dtype=mx.float32),
    "layers.1.packed": mx.arange(12, dtype=mx.uint32).reshape(2, 2, 3),
    "scalar": mx.array(3.5, dtype=mx.float16),
    "flags": mx.array([True, False, True, True, False, False]),
}


def written(path: Path, tensors=None) -> Path:
    mx.save_safetensors(str(path), tensors or TENSORS, metadata={"format": "pt"})
    return path


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "model.safetensors")


def accepted_or_refused(path: Path) -> bool:
    """Whether the header is accepted; what is accepted fits the file, and MLX reads the same from it."""
    try:
        infos = read_header(path)
    except WeightsError as error:
        assert str(path) in str(error)
        return False
    size = path.stat().st_size
    for name, info in infos.items():
        assert info.name == name
        assert info.num_bytes == math.prod(info.shape) * DTYPE_BYTES[info.dtype]
        assert 8 < info.start <= info.start + info.num_bytes <= size
    arrays = mx.load(str(path))
    assert {n: (i.shape, DTYPES.get(i.dtype, mx.uint8)) for n, i in infos.items()} == {
        n: (a.shape, a.dtype) for n, a in arrays.items()
    }
    mx.eval(arrays)
    return True


def test_a_sound_file_is_read_as_mlx_reads_it(file):
    assert accepted_or_refused(file)
    assert read_header(file).keys() == TENSORS.keys()


@FEW
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6)
)
def test_flipped_bytes_are_refused_or_harmless(flips, tmp_path):
    path = written(tmp_path / "flipped.safetensors")
    data = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for where, mask in flips:
        data[int(where * header_end)] ^= mask
    path.write_bytes(data)
    accepted_or_refused(path)


@FEW
@given(keep=st.floats(0, 1, exclude_max=True))
@example(keep=0.0)
@example(keep=0.9999)
def test_a_file_cut_anywhere_is_refused(keep, tmp_path):
    path = written(tmp_path / "cut.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert not accepted_or_refused(path)


@pytest.mark.parametrize("extra", [1, 8, 4096])
def test_bytes_after_the_last_tensor_are_refused(file, extra):
    file.write_bytes(file.read_bytes() + bytes(extra))
    with pytest.raises(WeightsError, match=f"{extra} bytes after the last tensor"):
        read_header(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
numbers = st.sampled_from([0, 1, 2, 4, 8, 24, 48, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1.0, True, "4"])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BYTES, "F8", "bf16", "", None, 3, ["F32"], {}]) | json_values,
        "shape": st.lists(numbers, max_size=4) | st.lists(st.integers(0, 4), max_size=3) | json_values,
        "data_offsets": st.tuples(numbers, numbers) | st.lists(numbers, max_size=3) | json_values,
    },
)


@FEW
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "", "\ud800", "__metadata__"]), entries | json_values)
    | json_values,
    data=st.binary(max_size=64),
)
def test_any_header_is_refused_or_right(header, data, tmp_path):
    accepted_or_refused(write_safetensors(tmp_path / "edited.safetensors", header, data))


@FEW
@given(
    name=st.sampled_from(list(TENSORS)),
    key=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=numbers | st.lists(numbers, max_size=3) | st.sampled_from(list(DTYPE_BYTES)),
)
def test_one_edited_header_entry_is_refused_or_right(name, key, value, tmp_path):
    path = written(tmp_path / "entry.safetensors")
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header[name][key] = value
    accepted_or_refused(write_safetensors(path, header, data[end:]))


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"not json", b"", "no JSON"),
        (b"[" * 100_000, b"", "no JSON"),
        (b"[1, 2]", b"", "no JSON object"),
        (b'{"a": NaN}', b"", "no JSON"),
        ('{"__metadata__": {}}'.encode("utf-16"), b"", "no JSON"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', b"", "no JSON"),
        (b'{"__metadata__": {"a": "\\ud800"}}', b"", "no JSON"),
        ({"__metadata__": {"a": 1}}, b"", "table of texts"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "unknown type"),
        ({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8), "unknown type 'F64'"),
        ({"a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, bytes(1), "unknown type"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4), "natural number"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), r"4 bytes, but .* takes 8"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4), "truncated"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, bytes(3), "begins at byte"),
        (
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            bytes(6),
            "begins at byte",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_says_what_is_wrong(header, data, says, tmp_path):
    with pytest.raises(WeightsError, match=says):
        read_header(write_safetensors(tmp_path / "broken.safetensors", header, data))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 101])
def test_an_absurd_header_length_is_refused_without_reading_it(length, tmp_path):
    path = write_safetensors(tmp_path / "absurd.safetensors", b"{}" + b" " * 98, length=length)
    with pytest.raises(WeightsError, match="claims"):
        read_header(path)


def test_every_broken_tensor_is_listed(tmp_path):
    header = {f"t{i}": {"dtype": "F32", "shape": [i], "data_offsets": [0, 1]} for i in range(3)}
    with pytest.raises(WeightsError) as caught:
        read_header(write_safetensors(tmp_path / "broken.safetensors", header, bytes(1)))
    assert all(f"t{i}: " in str(caught.value) for i in range(3))


@pytest.mark.parametrize("make", ["folder", "dangling link"])
def test_what_is_no_file_is_a_weights_error(make, tmp_path):
    path = tmp_path / "model.safetensors"
    if make == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="Cannot read"):
        read_header(path)


@FEW
@given(
    dtype=st.sampled_from(sorted(set(DTYPES) - {"BOOL"})),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_rows_are_the_file_s_own(dtype, shape, data, tmp_path):
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    content = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    header = {
        "before": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": dtype, "shape": shape, "data_offsets": [3, 3 + size]},
    }
    info = read_header(write_safetensors(tmp_path / "x.safetensors", header, b"abc" + content))["x"]
    first = data.draw(st.integers(0, shape[0] - 1))
    last = data.draw(st.integers(first + 1, shape[0]))
    rows = read_rows(info, first, last)
    row = size // shape[0]
    assert (rows.dtype, rows.shape) == (DTYPES[dtype], (last - first, *shape[1:]))
    assert raw(rows) == content[first * row : last * row]


def test_a_sharded_checkpoint_is_read_as_one(tmp_path):
    save_sharded(tmp_path, TENSORS, 3)
    infos = read_checkpoint(tmp_path)
    assert infos.keys() == TENSORS.keys()
    assert len({info.file for info in infos.values()}) == 3


def test_missing_shards_are_named(tmp_path):
    save_sharded(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 file\(s\).*\n  model-00002-of-00003"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_sharded(tmp_path, TENSORS, 2)
    written(tmp_path / "model-extra.safetensors", {"scalar": TENSORS["scalar"]})
    with pytest.raises(WeightsError, match="scalar: in .* and again in"):
        read_checkpoint(tmp_path)


def test_a_tensor_that_is_not_where_the_index_puts_it_is_refused(tmp_path):
    save_sharded(tmp_path, TENSORS, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="ghost: the index puts it in"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("../secret.safetensors", "points outside of model/"),
        ("/etc/passwd", "points outside of model/"),
        ("sub/model.safetensors", "points outside of model/"),
        ("..", "points outside of model/"),
        ("", "points outside of model/"),
        ("a\0b", "not there"),
        ("a" * 300, "not there"),
    ],
)
def test_an_index_cannot_reach_outside_of_its_folder(target, says, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    written(tmp_path / "secret.safetensors")
    written(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"scalar": target}}))
    with pytest.raises(WeightsError, match=says):
        read_checkpoint(folder)


@FEW
@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values}))
def test_a_broken_index_is_a_weights_error_or_harmless(index, tmp_path):
    written(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    try:
        assert read_checkpoint(tmp_path).keys() == TENSORS.keys()
    except WeightsError:
        pass


def test_a_folder_without_weights_is_a_weights_error(tmp_path):
    with pytest.raises(WeightsError, match="no safetensors"):
        read_checkpoint(tmp_path)
