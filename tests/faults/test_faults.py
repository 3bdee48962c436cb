"""Every experiment in its smallest form; `python -m tests.faults` tries each fault as often as it says."""

import pytest

from tests.faults.experiments import ALL
from tests.faults.harness import QUICK, Bench, make_data

CHEAP = ("lines", "control", "config")
LONG = ("commands", "writes")


def _marks(name):
    if name in CHEAP:
        return []
    return [pytest.mark.slow, pytest.mark.long] if name in LONG else [pytest.mark.slow]


NAMES = [pytest.param(name, marks=_marks(name)) for name in ALL]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost(name, tiny_llama_folder, tmp_path):
    bench = Bench(tiny_llama_folder, make_data(tmp_path / "data"), tmp_path)
    rows = ALL[name](bench, QUICK)
    assert sum(row.tried for row in rows) > 0
    assert [problem for row in rows for problem in row.lost] == []
