import huggingface_hub
import pytest
from huggingface_hub import errors

from mlx_qlora.dataset.files import find_files
from mlx_qlora.errors import DataError

ROW = '{"text": "a"}\n'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose one data set is a folder; returns that folder and the patterns that were asked for."""
    folder, asked = tmp_path / "snapshot", []
    folder.mkdir()

    def snapshot_download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("clube/dados", "dataset")
        asked.extend(allow_patterns)
        return str(folder)

    class HfApi:
        def list_repo_files(self, name: str, *, repo_type: str) -> list[str]:
            assert (name, repo_type) == ("clube/dados", "dataset")
            return ["README.md", "data/train-00000-of-00001.parquet"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return folder, asked


@pytest.mark.parametrize("below", ["", "data"])
def test_a_data_set_on_the_hub_is_read_at_its_root_and_below_data(hub, below):
    folder, asked = hub
    (folder / below).mkdir(exist_ok=True)
    (folder / below / "train.jsonl").write_text(ROW)
    (folder / below / "validation.csv").write_text("text\na\n")
    files = find_files("clube/dados")
    assert {name: path.name for name, path in files.items()} == {
        "train": "train.jsonl",
        "valid": "validation.csv",
    }
    assert not any(pattern.endswith((".parquet", ".py", "*")) for pattern in asked), "only what is read"


@pytest.mark.usefixtures("hub")
def test_a_data_set_of_parquet_files_says_how_to_export_it():
    with pytest.raises(DataError, match="Parquet") as caught:
        find_files("clube/dados")
    assert "to_json('train.jsonl')" in str(caught.value.run)
    assert "clube/dados" in str(caught.value.run)


@pytest.mark.usefixtures("hub")
def test_a_data_set_without_any_known_file_says_what_there_is(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["README.md", "a.zip"])
    with pytest.raises(DataError, match=r"README\.md, a\.zip"):
        find_files("clube/dados")


def test_a_data_set_that_does_not_exist_is_not_called_unreachable(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(DataError, match="no such data set on the hub") as caught:
        find_files("clube/nada")
    assert "hf auth login" in str(caught.value.run)


def test_offline_a_data_set_that_is_not_cached_names_the_command_that_fetches_it(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="hub cannot be reached") as caught:
        find_files("clube/dados")
    assert str(caught.value.run).startswith("hf download clube/dados --repo-type dataset")


@pytest.mark.parametrize(
    "place", ["dados/treino.jsonl", "./dados", "/nada/aqui", "treino.csv", "a/b/c", "a.parquet"]
)
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(place, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder") as caught:
        find_files(place)
    assert place in str(caught.value)


def test_a_folder_of_several_files_without_a_train_file_is_not_guessed_at(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(ROW)
    with pytest.raises(DataError, match=r"there is a\.jsonl, b\.jsonl"):
        find_files(str(tmp_path))


def test_a_validation_file_alone_is_not_trained_on(tmp_path):
    (tmp_path / "valid.jsonl").write_text(ROW)
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        find_files(str(tmp_path))
