"""The lab's data: scikit-learn's own small tables, and three sets of pictures from OpenML."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import numpy as np

from mlx_qlora.errors import ConfigError, DataError
from mlx_qlora.lab.libraries import lab_library

TABLES = {
    "iris": "load_iris",
    "wine": "load_wine",
    "breast-cancer": "load_breast_cancer",
    "digits": "load_digits",
}
"""Name → scikit-learn's loader of its own copy."""
OPENML = {"mnist": 554, "fashion-mnist": 40996, "cifar-10": 40927}
"""Name → number on openml.org."""
TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to test on; features have mean 0 and deviation 1 over the training rows."""

    name: str
    x_train: np.ndarray
    """(rows, features), float32."""
    y_train: np.ndarray
    """Class of each row, int32."""
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int


def load_rows(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a set, (rows, features) float32, and their classes.

    Raises:
        ConfigError: there is no set of that name, or scikit-learn is not installed.
        DataError: it is on OpenML, and OpenML cannot be reached.
    """
    if name in TABLES:
        x, y = getattr(lab_library("sklearn.datasets"), TABLES[name])(return_X_y=True)
    elif name in OPENML:
        x, y = _fetched(name)
    else:
        raise ConfigError(
            f"There is no data set {name!r}; there are {', '.join([*TABLES, *OPENML])}.", where="data set"
        )
    numbers = np.unique(y, return_inverse=True)[1]
    return np.asarray(x, np.float32), numbers.astype(np.int32)


def splits(name: str, num_folds: int, seed: int) -> Iterator[Split]:
    """Stratified folds: each row is tested on once.

    Raises:
        ConfigError, DataError: as `load_rows`.
    """
    x, y = load_rows(name)
    folds = lab_library("sklearn.model_selection").StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    for train, test in folds.split(x, y):
        yield _standardized(name, x, y, train, test)


def holdout(name: str, seed: int, test_share: float = 0.3, num_rows: int | None = None) -> Split:
    """One stratified split.

    Args:
        num_rows: Draw so many rows first; None takes all.

    Raises:
        ConfigError, DataError: as `load_rows`.
    """
    x, y = load_rows(name)
    selection = lab_library("sklearn.model_selection")
    rows = np.arange(len(y))
    if num_rows is not None and num_rows < len(y):
        rows, _ = selection.train_test_split(rows, train_size=num_rows, stratify=y, random_state=seed)
    train, test = selection.train_test_split(rows, test_size=test_share, stratify=y[rows], random_state=seed)
    return _standardized(name, x, y, train, test)


def _standardized(name: str, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Split:
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    # A pixel that is always 0 in training stays small should it not be 0 in a test.
    scaled = (x - mean) / np.where(deviation > 0, deviation, max(float(deviation.max()), 1e-12))
    return Split(name, scaled[train], y[train], scaled[test], y[test], int(y.max()) + 1)


def _fetched(name: str) -> tuple[np.ndarray, np.ndarray]:
    fetch = lab_library("sklearn.datasets").fetch_openml
    refused = lab_library("sklearn.datasets._openml").OpenMLError
    try:
        with _timeout(TIMEOUT_SECONDS), catch_warnings():
            simplefilter("ignore")  # that it tries again
            found = fetch(data_id=OPENML[name], as_frame=False, parser="liac-arff", n_retries=1, delay=0.2)
    except (OSError, refused) as error:  # no connection, a time-out, a status
        raise DataError(
            f"{name} comes from OpenML, which cannot be reached: {error}",
            where=f"openml.org, data set {OPENML[name]}",
            run="mlx-qlora lab networks   # with the tables that scikit-learn brings",
        ) from error
    return found.data, found.target


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """scikit-learn opens its connections without a time-out of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
