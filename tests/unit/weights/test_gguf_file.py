"""A GGUF header is believed only where the file bears it out; a damaged one is refused in little memory."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from mlx_qlora.errors import MlxQloraError, ModelError
from mlx_qlora.weights.gguf import import_gguf, open_gguf
from mlx_qlora.weights.gguf_file import read_gguf
from tests.gguf_files import write_model

STRING, ARRAY, U32, BOOL = 8, 9, 4, 7
MUTATIONS = 2_400


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str, shape: list[int], kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def header(entries=(), tensors=(), *, version=3, num_entries=None, num_tensors=None, magic=b"GGUF") -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    return magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)


def with_data(head: bytes, num_bytes: int) -> bytes:
    return head + bytes(-len(head) % 32) + bytes(num_bytes)


def refused(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path, "llama")
    return path.read_bytes()


def test_a_file_is_read_as_gguf_pys_own_reader_reads_it(tmp_path, tiny):
    (tmp_path / "m.gguf").write_bytes(tiny)
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for found in theirs.tensors:
        mine = ours.tensors[found.name]
        assert (mine.type, mine.shape) == (found.tensor_type, tuple(map(int, reversed(found.shape))))
        assert (mine.start, mine.num_bytes) == (found.data_offset, found.n_bytes)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


def test_a_real_file_is_read_as_gguf_pys_own_reader_reads_it(tmp_path, material):
    path = material / "gguf/stories260k/stories260K-q4_k_m.gguf"
    test_a_file_is_read_as_gguf_pys_own_reader_reads_it(tmp_path, path.read_bytes())


def test_every_kind_of_metadata_is_read(tmp_path):
    numbers = [(0, "<B", 200), (1, "<b", -3), (2, "<H", 60000), (3, "<h", -300), (4, "<I", 2**32 - 1)]
    numbers += [(5, "<i", -7), (6, "<f", 0.5), (10, "<Q", 2**63), (11, "<q", -(2**60)), (12, "<d", 0.1)]
    entries = [entry(f"n{kind}", kind, struct.pack(form, value)) for kind, form, value in numbers]
    entries += [
        entry("yes", BOOL, b"\1"),
        entry("text", STRING, text("olá ∑")),
        entry("flags", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\1\0"),
        entry("words", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xff")),
        entry("nested", ARRAY, struct.pack("<IQIQ", ARRAY, 1, U32, 1) + struct.pack("<I", 9)),
    ]
    (tmp_path / "m.gguf").write_bytes(header(entries))
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    assert {f"n{kind}": value for kind, _, value in numbers}.items() <= metadata.items()
    assert (metadata["yes"], metadata["text"], metadata["words"]) == (True, "olá ∑", ["a", "\ufffd"])
    assert (metadata["flags"].tolist(), metadata["nested"][0].tolist()) == ([True, False], [9])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no GGUF"),
        (b"GG", "no GGUF"),
        (b"GGUF", "truncated"),
        (b"PK\3\4" + bytes(100), "not with b'GGUF'"),
        (header(version=1), "version 1"),
        (header(version=99), "version 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(num_tensors=2**63), "9223372036854775808 tensors"),
        (header(num_entries=2**40), "1099511627776 metadata entries"),
        (header([entry("k", STRING, text("x", 2**62))]), "bytes of k"),
        (header([text("k" * 70_000) + struct.pack("<II", U32, 1)]), "70000 bytes"),
        (header([entry("k", ARRAY, struct.pack("<IQ", U32, 2**61))]), "elements of k"),
        (header([entry("k", ARRAY, struct.pack("<IQ", STRING, 2**58))]), "elements of k"),
        (header([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50 + bytes(64))]), "nests lists"),
        (header([entry("k", 77, b"")]), "unknown type 77"),
        (header([entry("k", ARRAY, struct.pack("<IQ", 77, 1) + bytes(64))]), "unknown type 77"),
        (header([entry("k", U32, bytes(4))] * 2), "k occurs twice"),
        (header([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]), "no UTF-8"),
        (header([entry("general.alignment", U32, struct.pack("<I", 0))]), "power of two"),
        (header([entry("general.alignment", U32, struct.pack("<I", 48))]), "power of two"),
        (header([entry("general.alignment", U32, struct.pack("<I", 2**31))]), "power of two"),
        (header([entry("general.alignment", STRING, text("a"))]), "power of two"),
        (with_data(header(tensors=[tensor("t", [4, 4], 99)]), 64), "t: of the unknown type 99"),
        (with_data(header(tensors=[tensor("t", [4, 4])]), 60), "t: ends at byte"),
        (with_data(header(tensors=[tensor("t", [2**40, 2**40])]), 64), "t: ends at byte"),
        (with_data(header(tensors=[tensor("t", [4], offset=2**63)]), 64), "t: ends at byte"),
        (with_data(header(tensors=[tensor("t", [4], offset=8)]), 64), "no multiple of 32"),
        (with_data(header(tensors=[tensor("t", [0, 4])]), 64), "t: a row of 0"),
        (with_data(header(tensors=[tensor("t", [33], 8)]), 64), "no whole number of Q8_0"),
        (with_data(header(tensors=[tensor("t", [], dimensions=0)]), 64), "t has 0 dimensions"),
        (with_data(header(tensors=[tensor("t", [1] * 5)]), 64), "t has 5 dimensions"),
        (with_data(header(tensors=[tensor("t", [4], dimensions=2**32 - 1)]), 64), "dimensions"),
        (with_data(header(tensors=[tensor("a", [16]), tensor("b", [8], offset=32)]), 64), "b: overlaps a"),
        (with_data(header(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)]), 64), "a: occurs twice"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path, data, said):
    assert said in refused(tmp_path / "m.gguf", data)


def test_all_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = [tensor(f"t{i}", [4], 99 if i % 2 else 0, 32 * i) for i in range(4)]
    message = refused(tmp_path / "m.gguf", with_data(header(tensors=tensors), 32))
    assert all(f"t{i}: " in message for i in (1, 2, 3))


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "no.gguf", tmp_path):
        with pytest.raises(ModelError, match="Cannot read the GGUF file"):
            read_gguf(path)


def test_a_name_from_the_file_cannot_write_on_the_terminal(tmp_path):
    message = refused(tmp_path / "m.gguf", with_data(header(tensors=[tensor("\x1b[2J" * 50, [4], 99)]), 64))
    assert "\x1b" not in message
    assert len(message) < 500


def test_many_empty_texts_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_qlora.weights.gguf_file._MAX_STRINGS", 1000)
    words = struct.pack("<IQ", STRING, 1001) + bytes(8 * 1001)
    assert "more than 1000 texts" in refused(tmp_path / "m.gguf", header([entry("k", ARRAY, words)]))


def test_a_header_is_read_only_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_qlora.weights.gguf_file._MAX_HEADER_BYTES", 4096)
    data = header([entry("k", STRING, text("x" * 8000))])
    assert "more than its" in refused(tmp_path / "m.gguf", data)


def test_a_file_cut_anywhere_is_refused(tmp_path, tiny):
    path = tmp_path / "m.gguf"
    for length in np.linspace(0, len(tiny) - 1, 200, dtype=int):
        refused(path, tiny[:length])


def test_claims_take_no_memory(tmp_path, tiny):
    """Each 8-byte word of the header set to a huge number: no allocation follows a claim."""
    path, limit = tmp_path / "m.gguf", 4 * len(tiny)
    data_start = read_gguf_bytes(path, tiny).data_start
    words = range(8, data_start - 8, max(1, (data_start - 16) // 300))
    tracemalloc.start()
    try:
        for at in words:
            path.write_bytes(tiny[:at] + struct.pack("<Q", 2**38) + tiny[at + 8 :])
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read_gguf(path)
            except ModelError:
                pass
            assert tracemalloc.get_traced_memory()[1] - before < limit
    finally:
        tracemalloc.stop()


def read_gguf_bytes(path, data: bytes):
    path.write_bytes(data)
    return read_gguf(path)


def test_a_damaged_file_is_imported_or_refused_with_its_name(tmp_path, tiny):
    """Bits, bytes, words and stretches of a real file changed at random, most of them in its header."""
    damage_and_import(tmp_path, tiny, MUTATIONS)


@pytest.mark.slow
def test_a_damaged_file_of_llama_cpps_is_imported_or_refused_with_its_name(tmp_path, material):
    data = (material / "gguf/stories260k/stories260K-q4_k_m.gguf").read_bytes()
    damage_and_import(tmp_path, data, MUTATIONS)


def damage_and_import(tmp_path, data: bytes, mutations: int) -> None:
    path, rng = tmp_path / "m.gguf", np.random.default_rng(0)
    data_start = read_gguf_bytes(path, data).data_start
    outcomes = {"read": 0, "refused": 0}
    for index in range(mutations):
        path.write_bytes(mutated(data, data_start, rng))
        try:
            opened = open_gguf(path)
            for name in list(opened.tensors)[:2]:
                assert opened.tensors[name].size > 0
            if index % 40 == 0:
                import_gguf(path, tmp_path / f"out{index}")
            outcomes["read"] += 1
        except MlxQloraError as error:
            assert str(tmp_path) in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > mutations / 20, outcomes


def mutated(data: bytes, data_start: int, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, data_start - 8 if rng.random() < 0.9 else len(changed) - 8))
        match rng.integers(0, 5):
            case 0:
                changed[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                changed[at] = int(rng.integers(0, 256))
            case 2:
                value = int(rng.choice(np.array([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1], dtype=object)))
                changed[at : at + 8] = struct.pack("<Q", value)
            case 3:
                del changed[at : at + int(rng.integers(1, 64))]
            case _:
                changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
        if len(changed) < data_start + 16:
            break
    return bytes(changed)
