import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.dataset.records import RecordFile, read_records
from mlx_qlora.dataset.rows import BadRow, RowFile
from mlx_qlora.errors import DataError

ROWS = [
    {"messages": [{"role": "user", "content": "Quem venceu?"}, {"role": "assistant", "content": "Nós. 🎉"}]},
    {"prompt": "a\nb", "completion": 'c "d", e', "other": [1, 2.5, None, {"deep": [[]]}]},
    {"text": "plain, with commas; and\ttabs"},
]
FILES = {
    ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    ".csv": 'question,answer\r\n"linha 1\nlinha 2",sim\r\n"diz ""oi""",não\r\n'.encode(),
}
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(data: bytes, seed: int) -> bytes:
    """A file as disks, editors and hands leave it: bytes changed, cut, doubled, moved."""
    rng, changed = random.Random(seed), bytearray(data)
    pieces = [
        b"\x00", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"\r", b"\n", b'"', b"'", b"{", b"}",
        b"[", b"]", b",", b";", b":", b"\\", b"NaN", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000,
        b"null", b'"role":"user",', b'"prompt":1,', "\u2028".encode(), b"\xed\xa0\x80",
    ]  # fmt: skip
    for _ in range(rng.randint(1, 6)):
        begin = rng.randint(0, len(changed))
        end = min(len(changed), begin + rng.choice([0, 0, 1, 1, 2, 9, 40]))
        changed[begin:end] = rng.choice([rng.choice(pieces), changed[begin:end] * 2, b""])
    return bytes(changed[: rng.choice([None, None, len(changed) // 2])])


@quick
@given(suffix=st.sampled_from(sorted(FILES)), seed=st.integers(0, 2**32))
def test_whatever_happens_to_a_file_it_is_read_or_refused_and_never_crashes(tmp_path, suffix, seed):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(mutated(FILES[suffix], seed))
    try:
        records, bad = read_records(path, {})
    except DataError as error:
        str(error).encode("utf-8")  # it can be printed
        return
    for line in bad:
        line.encode("utf-8")
        name, number, _ = line.split(":", 2)
        assert name == path.name
        assert int(number) >= 1
        assert len(line) < 600, "a complaint must not repeat a whole row"
    for record in records:
        said = [record.text] if record.text is not None else [m["content"] for m in record.messages]
        assert all(text.strip() and "\x00" not in text for text in said)
        assert record.text is not None or record.messages[-1]["role"] == "assistant"
        "".join(said).encode("utf-8")


@quick
@given(data=st.binary(max_size=300), suffix=st.sampled_from(sorted(FILES)))
def test_any_bytes_are_read_or_refused(tmp_path, data, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    try:
        for line, row in RowFile(path):
            assert line >= 1
            assert isinstance(row, BadRow | dict)
    except DataError:
        pass


@pytest.mark.parametrize("suffix", sorted(FILES))
def test_a_row_that_was_read_is_the_row_that_was_written(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(FILES[suffix])
    rows = [row for _, row in RowFile(path)]
    if suffix == ".csv":
        assert rows == [
            {"question": "linha 1\nlinha 2", "answer": "sim"},
            {"question": 'diz "oi"', "answer": "não"},
        ]
    else:
        assert rows == ROWS


@pytest.mark.parametrize("suffix", sorted(FILES))
def test_all_bytes_are_counted_as_read_at_the_end(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(FILES[suffix])
    file = RowFile(path)
    list(file)
    assert file.bytes_read == len(FILES[suffix])


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a" * 1000}) + "\n", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.writelines([json.dumps({"text": "b" * 1000}) + "\n"] * 500)
    records = RecordFile(path, {})
    next(iter(records))
    assert records.rows.bytes_read < 5000


def test_a_csv_quote_that_is_never_closed_is_told_by_the_row_it_opens_in(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\n', encoding="utf-8")
    records, bad = read_records(path, {})
    assert [record.source for record in records] == ["rows.csv:2"]
    assert len(bad) == 1
    assert bad[0].startswith("rows.csv:3: it is not CSV")
