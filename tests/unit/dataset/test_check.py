"""dataset/check.py, check_findings.py, check_language.py, check_report.py, row_table.py, text_signs.py"""

import json
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.config import DataConfig, TrainingConfig
from mlx_qlora.dataset import load_dataset
from mlx_qlora.dataset.check_report import DataCheck, check_data
from mlx_qlora.dataset.finding import Finding
from mlx_qlora.dataset.records import Record
from mlx_qlora.dataset.row_table import RowTable, normalised
from mlx_qlora.errors import ConfigError, DataError
from tests.chat_tokenizers import shared_tokenizer, tokenizer_named

COMMON = "Quem não venceu a partida número {} do clube?"


def pairs(*numbers: int, answer: str = "Foi o time {}, com dois gols.") -> list[dict[str, str]]:
    return [{"question": COMMON.format(n), "answer": answer.format(n)} for n in numbers]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def check(path: Path, tokenizer=None, **config: object) -> DataCheck:
    return check_data(DataConfig(path=str(path), **config), TrainingConfig(), tokenizer)


def finding(found: DataCheck, code: str, split: str | None = "train") -> Finding:
    (one,) = [f for f in found.findings if f.code == code and f.split == split]
    return one


def codes(found: DataCheck, *severities: str) -> list[str]:
    return [f.code for f in found.findings if f.severity in (severities or ("problem", "warning"))]


def test_good_data_has_nothing_to_mend(tmp_path):
    for name, numbers in (("train", range(20)), ("valid", range(20, 25)), ("test", range(25, 30))):
        write(tmp_path / f"{name}.jsonl", pairs(*numbers))
    found = check(tmp_path, shared_tokenizer("chatml"))
    assert found.findings == ()
    assert found.is_usable
    assert {name: split.rows for name, split in found.splits.items()} == {"train": 20, "valid": 5, "test": 5}
    assert found.splits["train"].schema == "question"
    assert found.language.code == "pt"


def test_tokens_and_updates_are_those_of_the_run(tmp_path):
    write(tmp_path / "train.jsonl", pairs(*range(21)))
    write(tmp_path / "valid.jsonl", pairs(30))
    tokenizer = shared_tokenizer("chatml")
    for limit in (512, 60):
        config = DataConfig(path=str(tmp_path), max_seq_length=limit)
        report = load_dataset(config, tokenizer, seed=0).report.splits["train"]
        found = check(tmp_path, tokenizer, max_seq_length=limit)
        train = found.splits["train"]
        assert (train.tokens, train.target_tokens) == (report.tokens, report.target_tokens)
        assert found.epoch.tokens == report.tokens
        assert (found.epoch.rows, found.epoch.updates) == (21, 6)  # 11 micro-batches of 2, two to an update


def test_rows_held_out_for_validation_are_no_part_of_an_epoch(tmp_path):
    path = write(tmp_path / "rows.jsonl", pairs(*range(40)))
    config = DataConfig(path=str(path))
    found = check(path, shared_tokenizer("chatml"))
    assert found.epoch.rows == len(load_dataset(config, shared_tokenizer("chatml"), seed=0).train) == 36
    assert "no_validation_file" in codes(found, "note")


def test_without_a_tokenizer_lengths_are_characters_and_tokens_an_estimate(tmp_path):
    rows = pairs(*range(10))
    found = check(write(tmp_path / "rows.jsonl", rows))
    lengths = sorted(len(row["question"]) + len(row["answer"]) for row in rows)
    assert found.unit == "characters"
    assert found.splits["train"].lengths["max"] == lengths[-1]
    assert found.splits["train"].characters == sum(lengths)
    assert found.splits["train"].tokens is None
    assert found.epoch.is_estimate
    assert found.epoch.tokens == pytest.approx(0.9 * sum(lengths) / 3.2, rel=0.05)


def test_rows_said_twice_are_counted_with_the_line_they_repeat(tmp_path):
    rows = [*pairs(1, 2, 3), *pairs(2), "", *pairs(1)]
    found = check(write(tmp_path / "rows.jsonl", rows))
    assert codes(found) == ["duplicates"]
    duplicates = finding(found, "duplicates")
    assert duplicates.count == 2
    assert duplicates.first == ("rows.jsonl:4 as rows.jsonl:2", "rows.jsonl:6 as rows.jsonl:1")


def test_rows_that_differ_in_case_accents_and_punctuation_are_near_duplicates_only(tmp_path):
    changed = {
        "question": COMMON.format(1).upper().replace("Ã", "A").rstrip("?"),
        "answer": pairs(1)[0]["answer"],
    }
    found = check(write(tmp_path / "rows.jsonl", [*pairs(1, 2), changed]))
    near = finding(found, "near_duplicates")
    assert (near.count, near.first) == (1, ("rows.jsonl:3 as rows.jsonl:1",))
    assert "duplicates" not in codes(found)


@pytest.mark.parametrize(("one", "other"), [("2+3", "2-3"), ("1.5", "15"), ("R$ 10", "10"), ("a b", "ab")])
def test_texts_that_mean_another_thing_are_not_normalised_to_the_same(one, other):
    assert normalised(one) != normalised(other)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_normalising_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)
    assert normalised(f"  {text}  ") == normalised(text)


def test_answers_that_differ_to_one_question_are_told_but_no_warning(tmp_path):
    rows = [*pairs(1, 2), *pairs(1, answer="Ninguém venceu, nem o time {}.")]
    found = check(write(tmp_path / "rows.jsonl", rows))
    assert finding(found, "other_answers").first == ("rows.jsonl:3 as rows.jsonl:1",)
    assert codes(found) == []


def test_rows_and_prompts_of_valid_and_test_that_stand_in_train_are_leaks(tmp_path):
    write(tmp_path / "train.jsonl", pairs(*range(10)))
    write(tmp_path / "valid.jsonl", [*pairs(20, 3), *pairs(4, answer="Outra resposta: {}.")])
    write(tmp_path / "test.jsonl", pairs(30, 31))
    found = check(tmp_path)
    assert finding(found, "leaked_rows", "valid").first == ("valid.jsonl:2",)
    assert finding(found, "leaked_prompts", "valid").first == ("valid.jsonl:2", "valid.jsonl:3")
    assert not [f for f in found.findings if f.split == "test"]
    assert found.is_usable


def test_a_window_that_is_too_short_is_named_with_its_percentile_and_what_is_lost(tmp_path):
    long = {"question": COMMON.format(1), "answer": "palavra " * 120}
    path = write(tmp_path / "rows.jsonl", [*pairs(*range(2, 11)), long])
    tokenizer = shared_tokenizer("chatml")
    found = check(path, tokenizer, max_seq_length=128)
    cut = finding(found, "too_long")
    assert (cut.severity, cut.count) == ("warning", 1)
    assert "the 90.0th percentile" in cut.what
    train = found.splits["train"]
    whole = check(path, tokenizer, max_seq_length=4096).splits["train"]
    assert train.tokens + train.lost_tokens == whole.tokens
    # A cut row ends in an EOS of its own, in place of a token of the answer.
    assert train.target_tokens + train.lost_targets == whole.target_tokens
    assert "--set data.max_seq_length=" in cut.run
    longer = int(cut.run.split("max_seq_length=")[1].split()[0])
    assert longer < 4096
    assert "too_long" not in codes(check(path, tokenizer, max_seq_length=longer), "warning", "note")
    assert finding(found, "very_long_answers").first == ("rows.jsonl:10",)


def test_a_row_whose_question_fills_the_window_has_no_labels_and_is_a_problem(tmp_path):
    rows = [*pairs(1), {"question": "palavra " * 200, "answer": "sim, foi"}]
    path = write(tmp_path / "rows.jsonl", rows)
    found = check(path, shared_tokenizer("chatml"), max_seq_length=100)
    problem = finding(found, "no_labels")
    assert (problem.severity, problem.count) == ("problem", 1)
    assert problem.first[0].startswith("rows.jsonl:2: its prompt fills the window")
    with pytest.raises(DataError, match="fills the window"):
        load_dataset(DataConfig(path=str(path), max_seq_length=100), shared_tokenizer("chatml"), seed=0)
    skipping = check(path, shared_tokenizer("chatml"), max_seq_length=100, skip_bad_rows=True)
    assert skipping.is_usable
    assert finding(skipping, "no_labels").severity == "warning"


def test_rows_that_cannot_be_used_are_a_problem_and_are_told_by_reason(tmp_path):
    bad = ["{broken", {"question": "?", "answer": ""}, {"question": "?", "answer": ""}, {"answer": "x"}]
    problem = finding(check(write(tmp_path / "rows.jsonl", [*pairs(1), *bad])), "bad_rows")
    assert (problem.severity, problem.count) == ("problem", 4)
    assert problem.first[0] == "rows.jsonl:3: 'answer' is empty   (2 so)"
    assert {line.split(":")[1] for line in problem.first} == {"2", "3", "5"}


def test_a_template_that_hides_its_answers_is_a_problem_with_the_way_out(tmp_path):
    counting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write(tmp_path / "rows.jsonl", pairs(1, 2))
    problem = finding(check(path, tokenizer_named("chatml"), prompt_template=counting), "unmaskable")
    assert problem.count == 2
    assert "data.loss_on=all" in problem.run
    assert check(path, tokenizer_named("chatml"), prompt_template=counting, loss_on="all").is_usable


def test_a_file_without_known_columns_is_a_problem_and_convert_is_named(tmp_path):
    found = check(write(tmp_path / "rows.jsonl", [{"frage": "a", "antwort": "b"}]))
    assert not found.is_usable
    assert "'antwort'" in finding(found, "unreadable").what
    assert "data convert" in finding(found, "unreadable").run


def test_renamed_columns_that_no_row_has_are_a_problem(tmp_path):
    found = check(write(tmp_path / "rows.jsonl", pairs(1, 2)), columns={"text": "texto"})
    assert "text: texto" in finding(found, "unused_columns", None).what
    with pytest.raises(ConfigError, match=r"data\.columns"):
        check(tmp_path / "rows.jsonl", columns={"frage": "x"})


def test_an_empty_file_has_nothing_to_train_on(tmp_path):
    assert codes(check(write(tmp_path / "rows.jsonl", []))) == ["nothing_to_train_on"]


def test_there_is_no_check_without_data(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        check(tmp_path / "rows.jsonl")


SIGNS = {
    "mojibake": "informaÃ§Ã£o",
    "replacement_character": "informa\ufffdo",
    "control_characters": "informa\x08ção",
    "decomposed_accents": unicodedata.normalize("NFD", "informação"),
    "markup": "uma&nbsp;linha<br>outra",
    "tiny_answers": "7",
}


@pytest.mark.parametrize("code", SIGNS)
def test_each_sign_of_damage_is_a_warning_at_its_line_and_no_other(tmp_path, code):
    path = write(
        tmp_path / "rows.jsonl", [*pairs(1, 2), {"question": COMMON.format(3), "answer": SIGNS[code]}]
    )
    found = check(path)
    assert codes(found) == [code]
    assert finding(found, code).first == ("rows.jsonl:3",)


@pytest.mark.parametrize(
    "text", ["NÃO HÁ AÇÃO", "preço < 10 e x > 2", "a & b; Â", "l'été à Nîmes", "linha\n\tcom tab"]
)
def test_ordinary_text_shows_no_sign_of_damage(tmp_path, text):
    assert codes(check(write(tmp_path / "rows.jsonl", [{"question": COMMON, "answer": text}]))) == []


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_control_tokens_in_a_turn_and_in_plain_text_are_noted_each_as_what_becomes_of_it(
    tmp_path, has_tokenizer
):
    tokenizer = shared_tokenizer("chatml") if has_tokenizer else None
    turns = write(
        tmp_path / "a.jsonl", [*pairs(1), {"question": COMMON, "answer": "o sinal <|im_end|> acaba"}]
    )
    texts = write(tmp_path / "b.jsonl", [{"text": "só texto"}, {"text": "antes<|im_end|>depois"}])
    assert finding(check(turns, tokenizer), "control_tokens_in_turns").first == ("a.jsonl:2",)
    assert finding(check(texts, tokenizer), "control_tokens_in_text").first == ("b.jsonl:2",)
    # As it is said: letters in a turn, the token in plain text.
    inner = tokenizer_named("chatml")
    end = inner.convert_tokens_to_ids("<|im_end|>")
    (row,) = load_dataset(
        DataConfig(path=str(write(tmp_path / "c.jsonl", [{"text": "a<|im_end|>b"}])), valid_fraction=0),
        inner,
        0,
    ).train
    assert list(row.tokens).count(end) == 2
    (row, _) = load_dataset(DataConfig(path=str(turns), valid_fraction=0), inner, 0).train[::-1]
    assert list(row.tokens).count(end) == 2  # the template's own, of two turns


def test_a_system_prompt_in_another_language_is_a_warning(tmp_path):
    path = write(tmp_path / "rows.jsonl", pairs(*range(9)))
    english, own = (
        "You are an assistant who answers with the facts.",
        "Você responde com uma frase, e não mais.",
    )
    warning = finding(check(path, system_prompt=english), "language_of_system_prompt", None)
    assert "rows are in Portuguese (certainty" in warning.what
    assert "is in English (certainty" in warning.what
    assert codes(check(path, system_prompt=own)) == []


def test_a_template_in_another_language_is_a_warning_with_and_without_a_tokenizer(tmp_path):
    path = write(tmp_path / "rows.jsonl", pairs(*range(9)))
    for tokenizer in (None, tokenizer_named("chatml")):
        english = check(path, tokenizer, prompt_template="Question: {question}\nAnswer: {answer}")
        assert codes(english) == ["language_of_template"]
        own = check(path, tokenizer, prompt_template="Pergunta: {question}\nResposta: {answer}")
        assert codes(own) == []


def test_it_is_plain_values_for_json(tmp_path):
    found = check(write(tmp_path / "rows.jsonl", [*pairs(1, 2), "{"])).as_dict()
    told = json.loads(json.dumps(found))
    assert told["usable"] is False
    assert told["language"]["name"] == "Portuguese"
    assert told["findings"][0]["severity"] == "problem"


def test_progress_goes_from_nothing_to_all_of_the_bytes(tmp_path):
    write(tmp_path / "train.jsonl", pairs(*range(9)))
    write(tmp_path / "valid.jsonl", pairs(*range(20, 25)))
    seen = []
    check_data(DataConfig(path=str(tmp_path)), TrainingConfig(), on_progress=lambda *at: seen.append(at))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert seen[-1] == (total, total)
    assert seen == sorted(set(seen))


def test_a_table_keeps_numbers_only():
    table = RowTable()
    for line in range(1, 1001):
        said = {"role": "user", "content": f"{line} " * 500}, {"role": "assistant", "content": "sim"}
        table.add(Record(f"f:{line}", said), line=line, length=1000, longest_answer=3)
    assert table.num_bytes == 40 * 1000


@pytest.mark.slow
def test_a_large_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(2500):
            row = {"question": COMMON.format(number), "answer": f"{number} venceu. " * 300}
            file.write(json.dumps(row) + "\n")
    size = path.stat().st_size
    assert size > 8 * 2**20
    check_data(
        DataConfig(path=str(write(tmp_path / "small.jsonl", pairs(1)))), TrainingConfig()
    )  # what stays
    tracemalloc.start()
    try:
        found = check(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.splits["train"].rows == 2500
    assert peak < 1.5 * 2**20, f"{peak / 2**20:.1f} MiB for a file of {size / 2**20:.0f} MiB"


def test_real_data_is_looked_through(material):
    folder = material / "datasets"
    found = check(folder / "alpaca-libre" / "alpaca_libre_tasks_v2.jsonl")
    bad = finding(found, "bad_rows")
    assert bad.count == 65
    assert sum("not JSON" in line for line in bad.first) >= 1
    assert found.splits["train"].rows + bad.count == 2294
    assert found.language.code == "en"
    assert check(folder / "faquad" / "faquad_qa.jsonl").language.code == "pt"
