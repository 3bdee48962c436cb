"""A tokenizer's files may be anything; what comes of them is a tokenizer or one clear error."""

import shutil

import pytest

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.tokenizer import read_tokenizer


def test_it_is_mlx_lms_with_the_given_ends_of_text(tiny_llama_folder):
    tokenizer = read_tokenizer(tiny_llama_folder, [5, 7])
    assert tokenizer.decode(tokenizer.encode("o clube", add_special_tokens=False)) == "o clube"
    assert tokenizer.eos_token_ids == {2, 5, 7}  # its own too


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, "", "[]", "{", '{"model": 3}', "null"])
def test_files_that_are_none_are_a_model_error(tiny_llama_folder, tmp_path, name, content):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    (folder / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", '{"model": 3}'):  # a key that nobody knows does no harm
        read_tokenizer(folder)
        return
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        read_tokenizer(folder)
