"""Which symbolic links in a folder of somebody else's are followed."""

import shutil

import pytest

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.links import check_links
from mlx_qlora.weights.source import resolve_model


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "private" / "id_rsa"
    file.parent.mkdir()
    file.write_text("secret")
    return file


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "models--ana--model" / "snapshots" / "0123"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize("name", ["added_tokens.json", "README.md", "tokenizer.model", ".hidden"])
@pytest.mark.parametrize("is_relative", [True, False])
def test_a_link_to_a_file_elsewhere_is_refused_by_name(folder, secret, name, is_relative):
    target = "../../../private/id_rsa" if is_relative else secret
    (folder / name).symlink_to(target)
    with pytest.raises(ModelError, match=name) as caught:
        check_links(folder)
    assert str(secret) in str(caught.value)


def test_a_link_to_a_link_counts_by_where_it_ends(folder, secret):
    (folder / "vocab.json").symlink_to(folder / "real.safetensors")
    (folder / "real.safetensors").symlink_to(secret)
    with pytest.raises(ModelError, match=r"vocab\.json"):
        check_links(folder)


def test_a_linked_folder_is_refused_too(folder, secret):
    (folder / "docs").symlink_to(secret.parent)
    with pytest.raises(ModelError, match="docs"):
        check_links(folder)


def test_the_hubs_own_cache_is_followed(folder):
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (folder / "config.json").symlink_to("../../blobs/abc")
    check_links(folder)


def test_blobs_of_another_repository_are_not_its_own(folder):
    blobs = folder.parents[2] / "models--eva--private" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "abc")
    with pytest.raises(ModelError, match=r"config\.json"):
        check_links(folder)


def test_blobs_are_followed_from_snapshots_alone(tmp_path):
    folder, blobs = tmp_path / "models" / "mine", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "abc")
    with pytest.raises(ModelError, match=r"config\.json"):
        check_links(folder)


def test_links_within_the_folder_and_to_tensors_are_followed(folder, secret):
    (folder / "chat_template.jinja").write_text("x")
    (folder / "template.jinja").symlink_to("chat_template.jinja")
    (folder / "model.safetensors").symlink_to(secret.with_name("model.safetensors"))
    check_links(folder)


def test_a_linked_model_folder_is_the_folder_it_links_to(tiny_llama_folder, tmp_path):
    (tmp_path / "link").symlink_to(tiny_llama_folder)
    assert resolve_model(str(tmp_path / "link")).folder == tiny_llama_folder.resolve()


def test_a_model_with_such_a_link_is_not_opened(tiny_llama_folder, secret, tmp_path):

    model = shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    resolve_model(str(model))
    (model / "added_tokens.json").symlink_to(secret)
    with pytest.raises(ModelError, match=r"added_tokens\.json"):
        resolve_model(str(model))
