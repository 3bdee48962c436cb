"""lab/datasets.py and lab/libraries.py"""

import socket

import numpy as np
import pytest

from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.lab.datasets import OPENML, TABLES, holdout, load_rows, splits
from mlx_qlora.lab.libraries import lab_library

pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    ("name", "shape", "num_classes"),
    [("iris", (150, 4), 3), ("wine", (178, 13), 3), ("breast-cancer", (569, 30), 2),
     ("digits", (1797, 64), 10)],
)  # fmt: skip
def test_the_tables_are_scikit_learns(name, shape, num_classes):
    x, y = load_rows(name)
    assert x.shape == shape
    assert sorted(set(y.tolist())) == list(range(num_classes))


def test_folds_test_each_row_once_and_scale_by_training_rows_alone():
    found = list(splits("iris", 5, seed=0))
    assert sum(len(split.y_test) for split in found) == 150
    for split in found:
        assert len(split.y_train) + len(split.y_test) == 150
        assert split.x_train.mean(axis=0) == pytest.approx(np.zeros(4), abs=1e-5)
        assert split.x_train.std(axis=0) == pytest.approx(np.ones(4), abs=1e-4)
        assert np.bincount(split.y_test).tolist() == [10, 10, 10]
        assert np.abs(split.x_test.mean(axis=0)).max() > 1e-3


def test_a_holdout_is_the_seeds_and_has_the_share_asked_for():
    one, same, other = holdout("wine", 1), holdout("wine", 1), holdout("wine", 2)
    assert np.array_equal(one.x_test, same.x_test)
    assert not np.array_equal(one.x_test, other.x_test)
    assert len(one.y_test) == 54
    few = holdout("digits", 0, num_rows=200)
    assert len(few.y_train) + len(few.y_test) == 200


@pytest.mark.parametrize("name", OPENML)
def test_offline_the_pictures_are_an_error_that_says_what_works(name, monkeypatch, tmp_path):
    def refuse(*_args, **_keys):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))  # nothing fetched before
    before = socket.getdefaulttimeout()
    with pytest.raises(DataError, match="OpenML, which cannot be reached: .*no network") as caught:
        load_rows(name)
    assert "mlx-qlora lab networks" in str(caught.value)
    assert socket.getdefaulttimeout() == before


def test_a_set_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="no data set 'titanic'") as caught:
        load_rows("titanic")
    assert all(name in str(caught.value) for name in (*TABLES, *OPENML))


def test_a_library_that_is_missing_is_an_error_with_its_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match="needs scikit-learn") as caught:
        lab_library("sklearn.cluster")
    assert caught.value.run == "pip install 'mlx-qlora[lab]'"
