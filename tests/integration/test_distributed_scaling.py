"""docs/SCALING.md says what benchmarks/scaling.py computes from the figures beside it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # it would be left set
        spec = importlib.util.spec_from_file_location("scaling", REPOSITORY / "benchmarks" / "scaling.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "scaling", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def found():
    return json.loads((DOCS / "scaling.json").read_text())


def test_the_tables_of_the_page_are_those_of_its_figures(scaling, found):
    assert scaling.tables(found) in (DOCS / "SCALING.md").read_text(encoding="utf-8")


def test_the_balance_is_what_the_sharding_does(scaling, found):
    assert scaling.balance() == found["balance"]


def test_one_rank_exchanges_nothing_and_more_ranks_than_rows_help_no_more(scaling):
    model, link = scaling.NAMED_MODELS["7B"], (1e-4, 1e9)
    assert scaling.exchange_seconds(1, 1e8, *link) == 0
    times = [scaling.update_seconds(n, 4, 512, model, link) for n in (1, 2, 4, 5, 8)]
    assert times[0] > times[1] > times[2] < times[3] < times[4]


@pytest.mark.parametrize(
    ("link", "ranks", "tokens"),
    [
        ("Thunderbolt bridge (20 Gbit/s)", 2, 30),
        ("Wi-Fi (300 Mbit/s)", 2, 1800),
        ("Thunderbolt bridge (20 Gbit/s)", 4, 100),
        ("Wi-Fi (300 Mbit/s)", 4, 5800),
    ],
)
def test_the_page_says_how_many_tokens_make_exchanges_a_tenth(scaling, link, ranks, tokens):
    model, speed = scaling.NAMED_MODELS["7B"], scaling.NOMINAL_LINKS[link]
    per_token = scaling.update_seconds(1, 1, 512, model, speed) / 512
    exchanges = scaling.exchange_seconds(ranks, 4 * model[3], *speed)
    assert 10 * ranks * exchanges / per_token == pytest.approx(tokens, rel=0.06)
    assert f"{tokens:,}" in (DOCS / "SCALING.md").read_text(encoding="utf-8")


def test_a_fit_finds_the_constants_that_made_its_figures(scaling):
    constants = [7e-11, 4e-10, 0.014]
    steps = []
    for hidden, layers in scaling.MODELS:
        for length in scaling.LENGTHS:
            work = scaling.token_work(hidden, layers, length)
            seconds = length * sum(c * w for c, w in zip(constants, work, strict=True))
            steps.append({"hidden": hidden, "layers": layers, "length": length, "seconds": seconds})
    hop, rate = 0.003, 5e6
    summed = {size: 2 * (hop + size / (2 * rate)) for size in scaling.EXCHANGED_BYTES}
    exchanges = [{"ranks": 2, "link": "loopback", "total": hop, "summed": summed}]
    fitted = scaling.fitted({"steps": steps, "exchanges": exchanges})
    assert fitted["compute"] == pytest.approx(constants, rel=1e-6)
    assert fitted["largest_error"] < 1e-6
    assert fitted["hops"]["loopback, 2 ranks"]["hop_seconds"] == pytest.approx(hop, rel=1e-2)
    assert fitted["hops"]["loopback, 2 ranks"]["bytes_per_second"] == pytest.approx(rate, rel=1e-6)
