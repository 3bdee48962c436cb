"""dataset/rows.py and dataset/records.py"""

import json

import pytest

from mlx_qlora.dataset import rows as rows_module
from mlx_qlora.dataset.records import COLUMN_NAMES, Record, read_conversations, read_records
from mlx_qlora.errors import DataError


def file_of(tmp_path, *lines: object, name: str = "train.jsonl"):
    """A file of these lines: bytes as they are, text in UTF-8, anything else as JSON."""
    path = tmp_path / name
    path.write_bytes(b"\n".join(_as_bytes(line) for line in lines) + b"\n")
    return path


def _as_bytes(line: object) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)).encode()


def pair(question="Quem?", answer="Valbruma.", **others) -> dict:
    return {"question": question, "answer": answer, **others}


def chat(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def turns_of(record: Record) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record.messages]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (chat(("user", "Oi"), ("assistant", "Olá")), [("user", "Oi"), ("assistant", "Olá")]),
        (
            chat(("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")),
            [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")],
        ),
        ({"prompt": "P", "completion": " C\n"}, [("user", "P"), ("assistant", " C\n")]),
        (pair("Q", "A"), [("user", "Q"), ("assistant", "A")]),
        ({"instruction": "I", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        ({"instruction": "I", "input": "D", "output": "O"}, [("user", "I\n\nD"), ("assistant", "O")]),
        ({"instruction": "I", "input": " ", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        ({"instruction": "I", "input": None, "output": "O"}, [("user", "I"), ("assistant", "O")]),
    ],
)
def test_each_way_to_write_a_row_becomes_turns(tmp_path, row, turns):
    (record,), bad = read_records(file_of(tmp_path, row), {})
    assert turns_of(record) == turns
    assert not bad


def test_a_row_of_plain_text_is_kept_as_it_stands(tmp_path):
    assert read_records(file_of(tmp_path, {"text": " a\n"}), {}) == (
        [Record("train.jsonl:1", text=" a\n")],
        [],
    )


def test_columns_can_have_names_of_their_own_and_others_beside_them(tmp_path):
    path = file_of(tmp_path, {"id": 1, "pergunta": "Q", "resposta": "A", "answer": "not this one"})
    (record,), bad = read_records(path, {"question": "pergunta", "answer": "resposta"})
    assert turns_of(record) == [("user", "Q"), ("assistant", "A")]
    assert not bad


def test_a_renamed_column_decides_between_two_schemas_that_both_fit(tmp_path):
    path = file_of(tmp_path, {"prompt": "no", "completion": "no", "question": "Q", "resposta": "A"})
    (record,), _ = read_records(path, {"answer": "resposta"})
    assert turns_of(record) == [("user", "Q"), ("assistant", "A")]


def test_a_file_has_one_schema_that_of_its_first_row_which_shows_one(tmp_path):
    path = file_of(tmp_path, {"other": 1}, pair(), {"text": "T"}, {"prompt": "P", "completion": "C"}, pair())
    records, bad = read_records(path, {})
    assert [record.source for record in records] == ["train.jsonl:2", "train.jsonl:5"]
    assert [line.split(": ")[0] for line in bad] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:4"]
    assert "question" in bad[1]


def test_a_file_without_any_known_column_says_which_there_are_and_which_are_needed(tmp_path):
    with pytest.raises(DataError) as error:
        read_records(file_of(tmp_path, {"pergunta": "Q", "resposta": "A"}), {})
    for said in ("pergunta", "resposta", "question/answer", "messages", "data.columns", "train.jsonl"):
        assert said in str(error.value)


def test_an_empty_file_has_no_records_and_no_complaints(tmp_path):
    assert read_records(file_of(tmp_path, "", "  "), {}) == ([], [])


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_rows_are_named_by_their_line_in_the_file_blank_ones_counted(tmp_path, line_end, bom):
    lines = [b"", _as_bytes(pair()), b" \t", b"", b"{", _as_bytes(pair("é\u2028\x85")), b""]
    if bom:
        lines[0] = _as_bytes(pair())
    (path := tmp_path / "t.jsonl").write_bytes(bom + line_end.join(lines))
    records, bad = read_records(path, {})
    assert [record.source for record in records] == (["t.jsonl:1"] if bom else []) + [
        "t.jsonl:2",
        "t.jsonl:6",
    ]
    assert [line.split(": ")[0] for line in bad] == ["t.jsonl:5"]
    assert records[-1].messages[0]["content"] == "é\u2028\x85"


BAD_ROWS = [
    (b"{", "not JSON"),
    (b"{'question': 1}", "not JSON"),
    (b'{"question": "q", "answer": "a"} {}', "not JSON"),
    ([pair()], "a JSON list, not an object"),
    ("7", "a JSON int, not an object"),
    ("null", "a JSON NoneType, not an object"),
    (pair(question=3), "'question' is a int, not text"),
    (pair(answer=None), "'answer' is a NoneType, not text"),
    (pair(answer={"text": "a"}), "'answer' is a dict, not text"),
    (pair(answer=["a"]), "'answer' is a list, not text"),
    (pair(answer=""), "'answer' is empty"),
    (pair(question=" \n\t"), "'question' is empty"),
    (pair(answer="a\x00b"), "NUL"),
    (rb'{"question": "q\ud800", "answer": "a"}', "half of a surrogate pair"),
    (rb'{"question": "q", "answer": "\udc00\ud800"}', "half of a surrogate pair"),
    (b'{"question": "caf\xe9", "answer": "a"}', "not UTF-8 (byte 18)"),
    (b'{"question": "q", "question": "r", "answer": "a"}', "the key 'question' twice"),
    (b'{"question": "q", "answer": "a", "x": {"y": 1, "y": 2}}', "the key 'y' twice"),
    ({"question": "q"}, "no 'answer'"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b', "answer": "a"}', "nested too deeply"),
    (b'{"question": ' + b"9" * 5000 + b', "answer": "a"}', "not JSON"),
    (b"\x00", "not JSON"),
    ("\ufeff" + json.dumps(pair()), "not JSON"),
]


@pytest.mark.parametrize(("row", "why"), BAD_ROWS, ids=[why for _, why in BAD_ROWS])
def test_a_bad_row_is_told_by_file_and_line_and_the_others_are_read(tmp_path, row, why):
    records, bad = read_records(file_of(tmp_path, pair("1"), row, pair("3")), {})
    assert [record.source for record in records] == ["train.jsonl:1", "train.jsonl:3"]
    assert len(bad) == 1
    assert bad[0].startswith("train.jsonl:2: ")
    assert why in bad[0]
    assert len(bad[0]) < 200


BAD_CONVERSATIONS = [
    ({"messages": "Oi"}, "no list of turns"),
    ({"messages": []}, "no list of turns"),
    ({"messages": None}, "no list of turns"),
    ({"messages": ["Oi"]}, "turn 1 is no object"),
    ({"messages": [{"content": "Oi"}]}, "turn 1 has the role None"),
    (chat(("user", "Oi"), ("robot", "Olá")), "turn 2 has the role 'robot'"),
    ({"messages": [{"role": ["user"], "content": "Oi"}]}, "turn 1 has the role ['user']"),
    ({"messages": [{"role": {"a": 1}, "content": "Oi"}]}, "turn 1 has the role {'a': 1}"),
    (chat(("user", "Oi"), ("assistant", "")), "content of turn 2' is empty"),
    (chat(("user", None), ("assistant", "Olá")), "content of turn 1' is a NoneType"),
    (chat(("user", [{"type": "text", "text": "Oi"}]), ("assistant", "Olá")), "turn 1' is a list, not text"),
    (chat(("user", "Oi")), "no assistant turn"),
    (chat(("user", "Oi"), ("assistant", "Olá"), ("user", "E?")), "ends with a turn of 'user'"),
]


@pytest.mark.parametrize(("row", "why"), BAD_CONVERSATIONS, ids=[why for _, why in BAD_CONVERSATIONS])
def test_a_bad_conversation_is_told_by_its_turn(tmp_path, row, why):
    good = chat(("user", "Oi"), ("assistant", "Olá"))
    records, bad = read_records(file_of(tmp_path, good, row), {})
    assert len(records) == 1
    assert len(bad) == 1
    assert why in bad[0]


def test_a_line_over_the_limit_is_refused_unread_and_the_next_one_counted_on(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    just = _as_bytes(pair(answer="x" * (99 - len(_as_bytes(pair(answer=""))))))
    assert len(just) == 99
    path = file_of(tmp_path, just, pair(answer="x" * 1000), pair(answer="x" * 75), pair("fim"))
    records, bad = read_records(path, {})
    assert [record.source for record in records] == ["train.jsonl:1", "train.jsonl:4"]
    assert [line.split(" MB")[0] for line in bad] == [
        "train.jsonl:2: it is longer than 0",
        "train.jsonl:3: it is longer than 0",
    ]


def test_csv_rows_of_several_lines_are_named_by_the_first(tmp_path):
    lines = ["question,answer", '"Quem?\n\nE ""onde""?",Ali', "", "b,c", '"x\ny"', "d,e"]
    path = file_of(tmp_path, *lines, name="t.csv")
    records, bad = read_records(path, {})
    assert [(record.source, turns_of(record)[0][1]) for record in records] == [
        ("t.csv:2", 'Quem?\n\nE "onde"?'),
        ("t.csv:6", "b"),
        ("t.csv:9", "d"),
    ]
    assert bad == ["t.csv:7: it has 1 columns; the header has 2"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv_from_any_spreadsheet_is_read(tmp_path, delimiter, line_end, bom):
    rows = [["question", " answer "], ["Quê?", "Assim, sim; e não"], ["E?", "É"]]
    lines = [delimiter.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in rows]
    if delimiter == ";":
        lines[1] = '"Quê?";"Assim, sim; e não"'
    (path := tmp_path / "t.csv").write_bytes((bom + line_end.join(lines)).encode())
    records, bad = read_records(path, {})
    assert not bad
    assert [(record.source, record.messages[1]["content"]) for record in records] == [
        ("t.csv:2", "Assim, sim; e não"),
        ("t.csv:3", "É"),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"a,b,c", "3 columns; the header has 2"),
        (b'"a"b,c', "not CSV"),
        (b"caf\xe9,c", "not UTF-8"),
        (b",c", "'question' is empty"),
        (b"a\x00,c", "NUL"),
    ],
)
def test_a_bad_csv_row_is_told_and_the_next_one_is_read(tmp_path, line, why):
    records, bad = read_records(file_of(tmp_path, "question,answer", line, "d,e", name="t.csv"), {})
    assert [record.source for record in records] == ["t.csv:3"]
    assert len(bad) == 1
    assert bad[0].startswith("t.csv:2: ")
    assert why in bad[0]


def test_a_csv_quote_that_is_never_closed_is_told_by_the_line_it_was_opened_on(tmp_path):
    path = file_of(tmp_path, "question,answer", "a,b", '"c,d', "e,f", name="t.csv")
    records, bad = read_records(path, {})
    assert [record.source for record in records] == ["t.csv:2"]
    assert bad == ["t.csv:3: it is not CSV: unexpected end of data"]


def test_a_csv_header_with_a_name_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="'question' twice"):
        read_records(file_of(tmp_path, "question,question,answer", "a,b,c", name="t.csv"), {})


def test_a_json_array_is_read_as_rows_named_by_their_lines(tmp_path):
    first, second, third = json.dumps(pair("1")), json.dumps(pair("2"), indent=2), json.dumps(pair("3"))
    text = f"\ufeff[\n{first},\n\n{second} ,7,\n{third}]\n"
    (path := tmp_path / "t.json").write_text(text, encoding="utf-8")
    records, bad = read_records(path, {})
    assert [(record.source, turns_of(record)[0][1]) for record in records] == [
        ("t.json:2", "1"),
        ("t.json:4", "2"),
        ("t.json:8", "3"),
    ]
    assert bad == ["t.json:7: it is a JSON int, not an object"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "a"} {"text": "b"}]', "broken"),
        ('[{"text": "a"}', "broken"),
        ('[\n{"text": "a"},\n{"text": \n', "3: it is not JSON, and what follows"),
        ('[\n{"text": "a"},\n' + "[" * 100_000, "3: it is not JSON, and what follows"),
    ],
)
def test_a_broken_json_array_is_told_by_the_line_it_breaks_at(tmp_path, text, said):
    (path := tmp_path / "t.json").write_text(text)
    try:
        _, bad = read_records(path, {})
    except DataError as error:
        bad = [str(error)]
    assert len(bad) == 1
    assert said in bad[0]


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    records, bad = read_records(file_of(tmp_path, pair("1"), pair("2"), name="t.json"), {})
    assert [record.source for record in records] == ["t.json:1", "t.json:2"]
    assert not bad


def test_a_file_that_cannot_be_opened_is_a_data_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"(?s)Cannot read.*none\.jsonl"):
        read_records(tmp_path / "none.jsonl", {})


def test_conversations_with_known_answers_are_read_or_refused_whole(tmp_path):
    path = file_of(tmp_path, pair("Q", "A"))
    assert read_conversations(path) == [
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    ]
    with pytest.raises(DataError, match=r"(?s)2 row\(s\).*train\.jsonl:2: .*train\.jsonl:1: no answer"):
        read_conversations(file_of(tmp_path, {"text": "T"}, "{"))
    with pytest.raises(DataError):
        read_conversations(file_of(tmp_path, ""))


def test_every_column_that_can_be_renamed_belongs_to_a_schema():
    assert set(COLUMN_NAMES) == {
        *("messages", "prompt", "completion", "question", "answer"),
        *("instruction", "input", "output", "text"),
    }


def test_faquad_is_read_by_its_questions_and_answers(material):
    path = material / "datasets" / "faquad" / "faquad_qa.jsonl"
    if not path.is_file():
        pytest.skip("FaQuAD is not among the material")
    records, bad = read_records(path, {})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert not bad
    assert [turns_of(record) for record in records] == [
        [("user", row["question"]), ("assistant", row["answer"])] for row in rows
    ]
