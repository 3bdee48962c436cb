"""config_page.py"""

import json
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_qlora.config import RunConfig, build_config, read_config
from mlx_qlora.config_page import SCHEMA_NAME, commented_yaml, run_schema
from mlx_qlora.errors import ConfigError
from mlx_qlora.presets import PRESETS, preset

ROOT = Path(__file__).parents[2]
SCHEMA = run_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

words = st.text(st.characters(codec="utf-8"), max_size=30)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
run_configs = st.builds(
    lambda prompt, columns, overrides, modules, rate, skip, scheme: build_config(
        {
            "model": {"path": prompt or None},
            "quantization": {"scheme": scheme, "overrides": overrides, "skip_modules": skip},
            "lora": {"target_modules": modules},
            "data": {"system_prompt": prompt, "columns": columns},
            "training": {"learning_rate": rate},
        }
    ),
    prompt=words,
    columns=st.dictionaries(names, words, max_size=2),
    overrides=st.dictionaries(names, st.sampled_from(["int8", "none", "int6-g32"]), max_size=12),
    modules=st.lists(names, min_size=1, max_size=12),
    rate=st.floats(1e-12, 1e3),
    skip=st.lists(st.sampled_from(["null", "yes", "1e5", "~", "lm_head", "# x", "a: b"]), max_size=3),
    scheme=st.sampled_from(["int4", "none", "nf4"]),
)


@example(build_config({"data": {"system_prompt": "a\u2028b"}}))
@example(build_config({"data": {"system_prompt": "a\x85b", "columns": {"\u2029": "\n"}}}))
@settings(deadline=None, max_examples=30)
@given(run_configs)
def test_the_page_read_back_is_exactly_the_same_configuration(config):
    assert build_config(yaml.safe_load(commented_yaml(config))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_page_is_the_preset_and_fits_the_schema(name, tmp_path):
    config = build_config(preset(name))
    (tmp_path / "run.yaml").write_text(commented_yaml(config, preset=name), encoding="utf-8")
    tree = read_config(tmp_path / "run.yaml")
    assert build_config(tree) == config
    VALIDATOR.validate(tree)
    VALIDATOR.validate(preset(name))


def test_every_key_stands_there_once_below_what_it_means():
    lines = commented_yaml(RunConfig()).splitlines()
    described = [line for above, line in pairwise(lines) if above.lstrip().startswith("# ")]
    keys = [line.partition(":")[0] for line in described if line and not line.lstrip().startswith("#")]
    assert keys == [
        part for section, field in RunConfig.model_fields.items()
        for part in [section, *(f"  {key}" for key in field.annotation.model_fields)]
    ]  # fmt: skip


def test_a_comment_names_the_choices_and_the_default_where_the_value_is_another():
    text = commented_yaml(build_config({"training": {"batch_size": 7}}))
    assert "  # Default: 2\n  batch_size: 7\n" in text
    assert "  # One of: constant, linear, cosine.\n  lr_schedule: cosine\n" in text
    assert "None" not in text  # YAML says null


def test_no_line_of_the_page_is_wider_than_an_editor():
    assert max(map(len, commented_yaml(RunConfig()).splitlines())) <= 100


def test_the_first_line_tells_editors_where_the_schema_is():
    first, *_ = commented_yaml(RunConfig()).splitlines()
    assert first == f"# yaml-language-server: $schema={SCHEMA_NAME}"
    assert "yaml-language-server" not in commented_yaml(RunConfig(), schema=None)


def test_the_schema_is_one_and_describes_every_key():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for definition in SCHEMA["$defs"].values():
        assert all(value["description"] for value in definition["properties"].values())


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_fits_the_schema(path):
    VALIDATOR.validate(read_config(path))


@pytest.mark.parametrize(
    "tree",
    [
        {"lora": {"ranks": 8}},
        {"loar": {}},
        {"lora": {"rank": 0}},
        {"lora": {"rank": 2.5}},
        {"lora": {"dropout": 1.0}},
        {"lora": {"target_modules": []}},
        {"training": {"optimizer": "adagrad"}},
        {"training": {"learning_rate": 0}},
        {"quantization": {"overrides": {"v_proj": 8}}},
        {"data": {"max_seq_length": 1}},
        {"data": {"columns": {"question": 1}}},
        {"model": 3},
    ],
)
def test_what_the_schema_refuses_the_program_refuses_too(tree):
    assert not VALIDATOR.is_valid(tree)
    with pytest.raises(ConfigError):
        build_config(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"quantization": {"overrides": {"*.down_proj": "int8", "v_proj": None}}},
        {"training": {"max_steps": None, "compile": True}},
        {"data": {"columns": {"question": "pergunta"}}},
    ],
)
def test_what_the_program_takes_the_schema_takes_too(tree):
    build_config(tree)
    VALIDATOR.validate(tree)


def test_the_schema_in_the_docs_is_this_one():
    path = ROOT / "docs" / "run.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == SCHEMA, f"mlx-qlora init --schema > {path.name}"
