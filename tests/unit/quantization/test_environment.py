"""USE_QUANTIZATION and QUANTIZATION_BITS: where they are looked for, what they mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.errors import ConfigError
from mlx_qlora.quantization.environment import quantization_from_environment


def scheme(folder, environ=None):
    found = quantization_from_environment(folder, environ or {})
    return found.config.scheme if found else None


def dotenv(folder, text):
    (folder / ".env").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"USE_QUANTIZATION": "", "QUANTIZATION_BITS": " "}, None),
        ({"USE_QUANTIZATION": "true"}, "int4"),
        ({"USE_QUANTIZATION": "TRUE", "QUANTIZATION_BITS": "8"}, "int8"),
        ({"USE_QUANTIZATION": "1", "QUANTIZATION_BITS": " 3 "}, "int3"),
        ({"USE_QUANTIZATION": "false"}, "none"),
        ({"USE_QUANTIZATION": "off", "QUANTIZATION_BITS": "8"}, "none"),
        ({"QUANTIZATION_BITS": "8"}, "int8"),
    ],
)
def test_the_variables_mean_a_scheme_in_the_environment_and_in_the_file(tmp_path, variables, expected):
    assert scheme(tmp_path, variables) == expected
    lines = [f"{name}={value}" for name, value in variables.items()]
    assert scheme(dotenv(tmp_path, "\n".join(lines))) == expected


def test_the_environment_wins_over_the_file_variable_by_variable(tmp_path):
    dotenv(tmp_path, "USE_QUANTIZATION=true\nQUANTIZATION_BITS=8\n")
    assert scheme(tmp_path, {"QUANTIZATION_BITS": "4"}) == "int4"
    assert scheme(tmp_path, {"USE_QUANTIZATION": "false"}) == "none"
    assert scheme(tmp_path, {"USE_QUANTIZATION": ""}) == "int8"


def test_the_note_says_which_value_came_from_where(tmp_path):
    dotenv(tmp_path, "QUANTIZATION_BITS=8")
    (note,) = quantization_from_environment(tmp_path, {"USE_QUANTIZATION": "true"}).notes
    assert "USE_QUANTIZATION=true (the environment)" in note
    assert f"QUANTIZATION_BITS=8 ({tmp_path / '.env'})" in note
    assert note.endswith("the scheme is int8")


def test_the_process_environment_and_the_working_folder_are_asked_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(dotenv(tmp_path, "USE_QUANTIZATION=true"))
    monkeypatch.delenv("USE_QUANTIZATION", raising=False)
    monkeypatch.setenv("QUANTIZATION_BITS", "6")
    assert quantization_from_environment().config.scheme == "int6"


@pytest.mark.parametrize(
    "line",
    [
        "QUANTIZATION_BITS=8",
        "export QUANTIZATION_BITS=8",
        "  QUANTIZATION_BITS = 8  ",
        'QUANTIZATION_BITS="8"',
        "QUANTIZATION_BITS='8' # bits",
        "QUANTIZATION_BITS=8 # bits",
        '# a comment\n\nnot a line of ours\nTOKEN="multi\nline"\nQUANTIZATION_BITS=8\r\nOTHER=a=b=c',
        "QUANTIZATION_BITS=4\nQUANTIZATION_BITS=8",
        "\ufeffQUANTIZATION_BITS=8",
    ],
)
def test_the_file_may_have_comments_quotes_export_and_other_programs_lines(tmp_path, line):
    assert scheme(dotenv(tmp_path, line)) == "int8"


@pytest.mark.parametrize(
    "line", ["# QUANTIZATION_BITS=8", "XQUANTIZATION_BITS=8", "QUANTIZATION_BITS=#8", "TOKEN=x"]
)
def test_a_line_that_is_not_about_it_says_nothing(tmp_path, line):
    assert scheme(dotenv(tmp_path, line)) is None


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"USE_QUANTIZATION": "maybe"}, "USE_QUANTIZATION is true or false, not 'maybe'"),
        ({"QUANTIZATION_BITS": "7"}, "one of 2, 3, 4, 5, 6, 8, not '7'"),
        ({"QUANTIZATION_BITS": "16"}, "not '16'"),
        ({"QUANTIZATION_BITS": "four"}, "not 'four'"),
        ({"QUANTIZATION_BITS": "9" * 5000}, "one of 2"),
        ({"QUANTIZATION_BITS": "४"}, "one of 2"),
        ({"USE_QUANTIZATION": "false", "QUANTIZATION_BITS": "x"}, "not 'x'"),
    ],
)
def test_a_value_that_is_neither_is_refused_where_it_is(tmp_path, variables, says):
    with pytest.raises(ConfigError, match=says) as refused:
        scheme(tmp_path, variables)
    assert refused.value.where == "the environment"
    dotenv(tmp_path, "\n".join(f"{name}={value}" for name, value in variables.items()))
    with pytest.raises(ConfigError, match=says) as refused:
        scheme(tmp_path)
    assert refused.value.where == str(tmp_path / ".env")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"#" * (1024**2 + 1)])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        scheme(tmp_path)
    assert refused.value.where == str(tmp_path / ".env")


def test_a_folder_called_dotenv_is_no_file(tmp_path):
    (tmp_path / ".env").mkdir()
    assert scheme(tmp_path) is None


@given(content=st.binary(max_size=200))
def test_any_file_gives_a_scheme_nothing_or_a_config_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / ".env").write_bytes(b"QUANTIZATION_BITS=" + content)
    try:
        found = scheme(folder)
    except ConfigError:
        return
    assert found in (None, "none", *(f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)))
