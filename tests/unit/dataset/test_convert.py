"""dataset/convert.py, convert_forms.py, convert_text.py"""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset import load_dataset, read_records
from mlx_qlora.dataset.convert import FORM_NAMES, Conversion, Converted, convert_file
from mlx_qlora.dataset.convert_text import chunks
from mlx_qlora.errors import ConfigError, DataError, MlxQloraError, StorageError
from tests.chat_tokenizers import shared_tokenizer

quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
LETTERS = st.characters(exclude_categories=["Cs", "Cn", "Cc"])
LINE = st.text(LETTERS, min_size=1, max_size=20).filter(lambda text: text.strip() and not text.isspace())
PAIRS = st.lists(st.tuples(LINE, LINE), min_size=1, max_size=5)


def convert(path: Path, output: Path | None = None, **how: object) -> tuple[list[dict], Converted]:
    output = output or path.with_name("out.jsonl")
    output.unlink(missing_ok=True)
    result = convert_file(path, output, Conversion(**how))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    assert result.rows == len(rows)
    return rows, result


def saved(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline=""
    )
    return path


def chat(*contents: str, system: str | None = None) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def as_csv(pairs: list[tuple[str, str]], delimiter: str, names: tuple[str, str]) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([names, *pairs])
    return file.getvalue()


def filled(tree: object, question: str, answer: str) -> object:
    if isinstance(tree, dict):
        return {key: filled(value, question, answer) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled(value, question, answer) for value in tree]
    return {"{q}": question, "{a}": answer}.get(tree, tree)


def written(form: str, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """(file name, content) of the pairs in a form."""
    if form in (",", ";", "\t"):
        return ("a.tsv" if form == "\t" else "a.csv"), as_csv(pairs, form, ("Pergunta", "Resposta"))
    if form == "alpaca":
        return "a.json", json.dumps([{"instruction": q, "input": "", "output": a} for q, a in pairs])
    if form == "squad":
        paragraphs = [
            {
                "context": "Um texto.",
                "qas": [{"id": "1", "question": q, "answers": [{"text": a, "answer_start": 0}]}],
            }
            for q, a in pairs
        ]
        return "a.json", json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": paragraphs}]})
    said = [{"type": "text", "text": "{q}"}]
    lines = {
        "flat squad": {"question": "{q}", "context": "c", "answers": {"text": ["{a}"], "answer_start": [0]}},
        "sharegpt": {"conversations": [{"from": "human", "value": "{q}"}, {"from": "gpt", "value": "{a}"}]},
        "openai": {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "{a}"}]},
        "completion": {"prompt": "{q}", "completion": "{a}"},
    }
    return "a.jsonl", "\n".join(json.dumps(filled(lines[form], q, a)) for q, a in pairs)


SAME = ["alpaca", "squad", "sharegpt", "openai"]
FORMS = [",", ";", "\t", "alpaca", "squad", "flat squad", "sharegpt", "openai", "completion"]


@quick
@given(pairs=PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_out_as_the_conversations_that_went_in(tmp_path, form, pairs):
    rows, _ = convert(saved(tmp_path, *written(form, pairs)))
    assert rows == [chat(q, a) for q, a in pairs]


@pytest.mark.parametrize(
    ("form", "found"), [(",", "table"), ("flat squad", "squad"), *((name, name) for name in SAME)]
)
def test_it_says_which_form_it_found_and_the_same_form_may_be_asked_for(tmp_path, form, found):
    path = saved(tmp_path, *written(form, [("a", "b")]))
    rows, result = convert(path)
    assert result.form == found
    assert convert(path, form=found)[0] == rows


MARKS = [("P:", "R:"), ("Q:", "A:"), ("Pergunta:", "Resposta:"), ("**Question 3:**", "**Answer:**")]
BODY = LINE.map(str.strip).filter(lambda text: ":" not in text and text.splitlines() == [text] and text)


@quick
@given(
    pairs=st.lists(
        st.tuples(BODY, st.lists(BODY, min_size=1, max_size=3).map("\n\n".join)), min_size=1, max_size=4
    )
)
@pytest.mark.parametrize(("asks", "answers"), MARKS)
def test_questions_and_answers_in_text_come_out_with_all_their_lines(tmp_path, asks, answers, pairs):
    text = "\n\n".join(f"{asks} {q}\n{answers} {a}" for q, a in pairs)
    rows, result = convert(saved(tmp_path, "a.txt", text))
    assert result.form == "qa-text"
    assert rows == [chat(q, a) for q, a in pairs]


def test_text_without_both_marks_is_plain_text_and_words_before_the_first_are_told(tmp_path):
    assert convert(saved(tmp_path, "a.txt", "P: sem resposta"))[1].form == "text"
    rows, result = convert(saved(tmp_path, "b.md", "# Título\n\nP: a\nR: b\n"))
    assert rows == [chat("a", "b")]
    assert result.notes == ["1 line(s) before the first question were left out"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("P: a\nR: b\nP: c\n\nP: d\nR: e", "a.txt:3: it has no answer"),
        ("R: b\nP: c\nR: d", "a.txt:1: it is an answer without a question"),
        ("P: a\nR: b\nR: c", "a.txt:1: it has a second answer in line 3"),
        ("P:\nR: b", "a.txt:1: its question is empty"),
    ],
)
def test_a_question_without_its_answer_is_a_bad_row_at_its_line(tmp_path, text, why):
    with pytest.raises(DataError) as caught:
        convert(saved(tmp_path, "a.txt", text))
    assert why in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


@quick
@given(
    text=st.lists(
        st.sampled_from(
            [
                "# Título",
                "## Parte\n",
                "Uma frase. Outra frase!",
                "palavra " * 30,
                "x" * 120,
                "",
                "```\na\n\nb\n```",
                "- item",
            ]
        ),
        max_size=20,
    ).map("\n\n".join),
    size=st.integers(50, 200),
)
def test_pieces_of_a_text_fit_and_lose_no_letter(text, size):
    pieces = [piece for _, piece in chunks(text, size)]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= size for piece in pieces)


def test_a_heading_goes_with_what_it_stands_above_and_code_stays_whole():
    text = "Primeiro parágrafo, com palavras.\n\n## Parte\n\n" + "Segundo. " * 8 + "\n\n```\na\n\nb\n```"
    pieces = list(chunks(text, 90))
    assert [(line, piece.split("\n")[0]) for line, piece in pieces] == [
        (1, "Primeiro parágrafo, com palavras."),
        (3, "## Parte"),
        (7, "```"),
    ]
    assert pieces[-1][1] == "```\na\n\nb\n```"


def test_the_context_goes_before_the_question_only_where_it_is_asked_for(tmp_path):
    path = saved(tmp_path, *written("squad", [("Quem?", "Nós.")]))
    rows, result = convert(path)
    assert rows == [chat("Quem?", "Nós.")]
    assert result.notes == ["the context of 1 row(s) was left out; --context puts it before the question"]
    rows, result = convert(path, with_context=True)
    assert rows == [chat("Um texto.\n\nQuem?", "Nós.")]
    assert result.notes == []


def test_columns_are_known_by_the_names_people_use_or_are_told(tmp_path):
    path = saved(tmp_path, "a.csv", "id;Questão;RESPOSTA;Sistema\n1;a;b;Seja breve.\n2;c;d;\n")
    rows, result = convert(path)
    assert rows == [chat("a", "b", system="Seja breve."), chat("c", "d")]
    assert "question is 'Questão', answer is 'RESPOSTA'" in result.found
    path = saved(tmp_path, "b.csv", "frage,antwort\na,b\n")
    with pytest.raises(DataError, match="no form that is known"):
        convert(path)
    assert convert(path, columns={"question": "frage", "answer": "antwort"})[0] == [chat("a", "b")]
    with pytest.raises(ConfigError, match="frage"):
        convert(path, columns={"frage": "question"})


def test_an_instructions_input_follows_it(tmp_path):
    path = saved(tmp_path, "a.json", [{"instruction": "Traduza:", "input": "cat", "output": "gato"}])
    assert convert(path)[0] == [chat("Traduza:\n\ncat", "gato")]


def test_what_follows_the_last_answer_is_left_off_and_told(tmp_path):
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
             {"from": "human", "value": "c"}]  # fmt: skip
    rows, result = convert(saved(tmp_path, "a.jsonl", {"conversations": turns}))
    assert rows == [chat("a", "b", system="S")]
    assert "1 conversation(s) went on after the last answer" in result.notes[0]


BAD = [
    ({"conversations": [{"from": "alien", "value": "a"}]}, "'alien', who is unknown"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "no answer to learn from"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "something that is not text"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "calls a tool"),
    (
        {"question": "a", "context": "c", "answers": {"text": [], "answer_start": []}},
        "no answer (is_impossible)",
    ),
    ({"question": "a", "answer": " "}, "'answer' is empty"),
    ({"question": "a", "answer": ["b"]}, "'answer' is a list, not text"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_a_bad_row_is_told_by_line_and_left_out_only_where_that_is_asked_for(tmp_path, row, why):
    good = dict(zip(row, _good(row), strict=True))
    path = saved(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [good, row, good])))
    with pytest.raises(DataError) as caught:
        convert(path)
    assert "a.jsonl:2: " in str(caught.value)
    assert why in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    rows, result = convert(path, skip_bad_rows=True)
    assert len(rows) == 2
    assert len(result.bad) == 1


def _good(row: dict) -> list:
    values = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "answers": {"text": ["b"], "answer_start": [0]},
    }
    return [values.get(key, "b") for key in row]


def test_nothing_is_overwritten(tmp_path):
    path, output = saved(tmp_path, "a.csv", "question,answer\na,b\n"), tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(StorageError, match="already"):
        convert_file(path, output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "latin-1", "utf-8-sig"])
def test_other_encodings_are_read_when_they_are_named(tmp_path, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes("Questão;Resposta\r\nQuem não é?;José\r\n".encode(encoding))
    assert convert(path, encoding=encoding)[0][0]["messages"][0]["content"] == "Quem não é?"


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.jsonl"])
def test_a_file_from_windows_is_refused_with_the_option_that_reads_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("Questão,Resposta\nQuem não é?,Ação\n".encode("cp1252"))
    with pytest.raises(DataError, match="--encoding cp1252"):
        convert(path)


def test_utf_16_is_known_by_its_first_bytes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("pergunta\tresposta\nQuem não é?\tNós\n".encode("utf-16"))
    rows, result = convert(path)
    assert rows == [chat("Quem não é?", "Nós")]
    assert "UTF-16" in result.notes[0]


@pytest.mark.parametrize(
    ("source", "output", "how", "why"),
    [
        ("no.csv", "out.jsonl", {}, "no such file"),
        ("a.xlsx", "out.jsonl", {}, "ends in .csv"),
        ("a.csv", "out.csv", {}, "must end in .jsonl"),
        ("a.csv", "out.jsonl", {"form": "xml"}, "--from xml"),
        ("a.csv", "out.jsonl", {"encoding": "klingon"}, "no encoding"),
        ("empty.csv", "out.jsonl", {}, "no row"),
        ("a.txt", "out.jsonl", {"form": "squad"}, "qa-text or text"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, source, output, how, why):
    for name in ("a.csv", "a.xlsx", "a.txt"):
        saved(tmp_path, name, "question,answer\na,b\n")
    saved(tmp_path, "empty.csv", "question,answer\n")
    with pytest.raises(MlxQloraError, match=why):
        convert(tmp_path / source, tmp_path / output, **how)
    assert not (tmp_path / output).exists()


@quick
@given(
    data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".txt", ".md"])
)
def test_any_bytes_are_converted_or_refused_and_never_crash(tmp_path, data, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    try:
        rows, _ = convert(path, skip_bad_rows=True)
    except MlxQloraError as error:
        str(error).encode("utf-8")
    else:
        assert rows


def test_every_row_that_is_written_can_be_trained_on(tmp_path):
    for form in FORMS:
        path = saved(tmp_path, *written(form, [(f"a {n}", f"b {n}") for n in range(5)]))
        convert(path)
        assert len(read_records(tmp_path / "out.jsonl", {})[0]) == 5
        data = DataConfig(path=str(tmp_path / "out.jsonl"), valid_fraction=0)
        assert len(load_dataset(data, shared_tokenizer("chatml"), seed=0).train) == 5
    assert set(FORM_NAMES) >= {"table", "alpaca", "squad", "sharegpt", "openai", "text", "qa-text"}


def test_real_files_are_converted_whole(material, tmp_path):
    folder = material / "datasets"
    faquad = [
        json.loads(line) for line in (folder / "faquad" / "faquad_qa.jsonl").read_text("utf-8").splitlines()
    ]
    rows, _ = convert(folder / "faquad" / "faquad_qa.jsonl", tmp_path / "a.jsonl", with_context=True)
    assert rows == [chat(f"{r['context'].strip()}\n\n{r['question']}", r["answer"]) for r in faquad]
    paragraphs = [
        {"context": r["context"], "qas": [{"question": r["question"], "answers": [{"text": r["answer"]}]}]}
        for r in faquad
    ]
    path = saved(tmp_path, "squad.json", {"data": [{"title": "FaQuAD", "paragraphs": paragraphs}]})
    assert convert(path, tmp_path / "b.jsonl", with_context=True)[0] == rows
    alpaca = folder / "alpaca-libre" / "alpaca_libre_tasks_v2.jsonl"
    with pytest.raises(DataError, match=r"65 row\(s\) cannot be converted"):
        convert(alpaca, tmp_path / "c.jsonl")
    assert len(convert(alpaca, tmp_path / "c.jsonl", skip_bad_rows=True)[0]) == 2294 - 65
