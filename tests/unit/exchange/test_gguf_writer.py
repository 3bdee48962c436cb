"""What is written is what gguf-py and our own reader read."""

import io

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mlx_qlora.exchange.gguf_writer import GgufEntry, encode_header, write_data
from mlx_qlora.weights.gguf_file import read_gguf

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.count": 4_000_000_000,
    "a.real": 0.5,
    "a.texts": ["é", "", "▁the"],
    "a.reals": np.array([1.5, -2], np.float64),
    "a.counts": np.array([1, -2], np.int64),
}


def write(path, entries, arrays):
    with path.open("wb") as file:
        file.write(encode_header(METADATA, entries))
        for entry, array in zip(entries, arrays, strict=True):
            write_data(file, entry, iter([array[:1].tobytes(), array[1:].tobytes()]))


def test_both_readers_find_every_value_and_every_tensor(tmp_path):
    arrays = [np.arange(21, dtype=np.float32).reshape(3, 7), np.arange(102, dtype=np.uint8).reshape(3, 34)]
    entries = [GgufEntry("one", Type.F32, (3, 7)), GgufEntry("two", Type.Q8_0, (3, 32))]
    write(tmp_path / "a.gguf", entries, arrays)
    ours, theirs = read_gguf(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in METADATA.items():
        for found in (ours.metadata[key], theirs.fields[key].contents()):
            assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value
    for array, tensor, entry in zip(arrays, theirs.tensors, entries, strict=True):
        np.testing.assert_array_equal(tensor.data, array)
        own = ours.tensors[entry.name]
        assert (own.shape, own.type, own.num_bytes) == (entry.shape, entry.type, entry.num_bytes)
        np.testing.assert_array_equal(own.read(0, 3), array.view(np.uint8).reshape(3, -1))


def test_more_or_fewer_bytes_than_the_header_says_are_refused():
    for count in (3, 5):
        with pytest.raises(ValueError, match="the header says 16"):
            write_data(io.BytesIO(), GgufEntry("one", Type.F32, (4,)), iter([bytes(4 * count)]))
