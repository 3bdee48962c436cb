"""training/prefix_cache.py, training/prefix_run.py: hidden states on disk, whole or computed again."""

import errno
import fcntl
import json
import resource
import shutil
import signal
import threading
from collections import namedtuple
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig, RunConfig, build_config
from mlx_qlora.dataset.batches import Batches, Layout
from mlx_qlora.dataset.records import Example
from mlx_qlora.errors import Interrupted, StorageError
from mlx_qlora.lora.attach import attach
from mlx_qlora.objective.loss import objective_for
from mlx_qlora.training import prefix_cache
from mlx_qlora.training.events import RunStarted, StepDone
from mlx_qlora.training.guard import StopRequest
from mlx_qlora.training.prefix_cache import HIDDEN, LOCK, MANIFEST, PrefixCache
from mlx_qlora.training.prefix_run import prefix_run
from mlx_qlora.training.run import train
from mlx_qlora.weights.loader import load_base

WIDTH = 8
KEY = {"model": "made up"}


def examples(count: int = 12, *, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 500, rng.integers(2, 60)).astype(np.int32) for _ in range(count)]
    return [Example(row, np.arange(len(row)) > 0, f"made:{i}") for i, row in enumerate(rows)]


class Computed:
    """Hidden states that are a function of the tokens before, and a record of what was asked for."""

    def __init__(self, *, fail_after: int | None = None) -> None:
        self.calls, self.fail_after = 0, fail_after

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        if self.calls == self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        return self.rows(tokens_BT)

    @staticmethod
    def rows(tokens_BT: mx.array) -> mx.array:
        return mx.sin(mx.cumsum(tokens_BT, axis=1)[..., None] * mx.arange(1, WIDTH + 1) / 7)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prefix_cache, "PART_BYTES", 1500)


def cache_in(folder, rows=None, *, key=None, dtype=mx.float32) -> PrefixCache:
    rows = examples() if rows is None else rows
    return PrefixCache(folder, key or KEY, [len(row.tokens) - 1 for row in rows], WIDTH, dtype)


def filled(folder, *, dtype=mx.float32) -> PrefixCache:
    cache = cache_in(folder, dtype=dtype)
    cache.fill(Computed(), examples())
    return cache


def content(folder) -> bytes:
    return (folder / HIDDEN).read_bytes()


LAYOUTS = [
    Layout(),
    Layout(may_concatenate=True, linear_cost=1e9),
    Layout(may_concatenate=True, row_capacity=64),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["side by side", "end to end", "packed"])
@pytest.mark.parametrize("is_halved", [False, True])
def test_every_position_of_every_batch_gets_its_own_hidden_state(tmp_path, layout, is_halved):
    rows, cache = examples(), filled(tmp_path)
    batches = Batches(rows, 4, 1, 3, layout)
    batches = (batches.halved() or batches) if is_halved else batches
    seen = []
    for batch in (b for step in range(batches.steps_per_epoch) for b in batches.step(step)):
        hidden = np.array(cache.gathered(batch))
        assert hidden.shape == (*batch.inputs_BT.shape, WIDTH)
        for row, tokens, numbers in zip(hidden, batch.inputs_BT, batch.examples, strict=True):
            at = 0
            for number in numbers:
                expected = rows[number].tokens[:-1]
                span = slice(at, at := at + len(expected))
                assert (tokens[span] == expected).all()
                np.testing.assert_array_equal(row[span], np.array(Computed.rows(mx.array(expected[None])))[0])
            assert np.abs(row[at:]).min(initial=1) > 0
            seen += numbers
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_each_type_comes_back_as_it_was_kept(tmp_path, dtype):
    cache = filled(tmp_path, dtype=dtype)
    (batch,) = Batches(examples()[:1], 1, 1, 0).step(0)
    tokens = examples()[0].tokens[:-1]
    hidden = cache.gathered(batch)
    assert hidden.dtype == dtype
    expected = Computed.rows(mx.array(tokens[None])).astype(dtype)
    assert mx.array_equal(hidden[:, : len(tokens)], expected)
    positions = sum(len(row.tokens) - 1 for row in examples())
    assert cache.num_bytes == len(content(tmp_path)) == positions * WIDTH * dtype.size


def test_a_second_opening_computes_nothing(tmp_path):
    filled(tmp_path)
    again = cache_in(tmp_path)
    assert (again.missing_bytes, again.num_damaged) == (0, 0)
    computed = Computed()
    again.fill(computed, examples())
    assert computed.calls == 0


@pytest.mark.parametrize("place", [0, 0.4, 1], ids=["first byte", "middle", "last byte"])
def test_a_flipped_bit_is_noticed_and_only_its_part_is_computed_again(tmp_path, place):
    whole = filled(tmp_path)
    before = content(tmp_path)
    damaged = bytearray(before)
    damaged[int(place * (len(before) - 1))] ^= 1
    (tmp_path / HIDDEN).write_bytes(damaged)
    again = cache_in(tmp_path)
    assert again.num_damaged == 1
    assert 0 < again.missing_bytes < whole.num_bytes
    again.fill(Computed(), examples())
    assert content(tmp_path) == before
    assert cache_in(tmp_path).missing_bytes == 0


def spoil_manifest(folder):
    (folder / MANIFEST).write_text("{]")


def change_digest(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parts"][0] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))


def cut(folder):
    (folder / HIDDEN).write_bytes(content(folder)[:-3])


def remove_hidden(folder):
    (folder / HIDDEN).unlink()


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [spoil_manifest, change_digest, cut, remove_hidden, remove_manifest])
def test_whatever_is_damaged_or_gone_is_computed_again_to_the_same_bytes(tmp_path, damage):
    filled(tmp_path)
    before = content(tmp_path)
    damage(tmp_path)
    again = cache_in(tmp_path)
    assert again.missing_bytes > 0
    again.fill(Computed(), examples())
    assert content(tmp_path) == before
    assert cache_in(tmp_path).missing_bytes == 0


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_killed_computation_goes_on_where_it_was(tmp_path, calls):
    whole = Computed()
    cache_in(tmp_path / "whole").fill(whole, examples())
    killed = cache_in(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.fill(Computed(fail_after=calls), examples())
    torn = tmp_path / "killed" / f".{MANIFEST}.123.tmp"
    torn.write_text("{")
    again, rest = cache_in(tmp_path / "killed"), Computed()
    assert again.num_damaged == 0
    again.fill(rest, examples())
    assert not torn.exists()
    assert rest.calls == whole.calls - calls
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_cache_of_something_else_is_not_believed(tmp_path):
    filled(tmp_path)
    other = cache_in(tmp_path, key={"model": "another"})
    assert other.missing_bytes == other.num_bytes


def test_progress_counts_bytes_up_to_all_of_them(tmp_path):
    said = []
    cache = cache_in(tmp_path)
    cache.fill(Computed(), examples(), on_bytes=lambda *at: said.append(at))
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    assert said[-1] == (cache.num_bytes, cache.num_bytes)
    assert len(said) > 1


def test_a_stop_keeps_what_is_done_and_names_the_command(tmp_path):
    stop, cache = StopRequest(), cache_in(tmp_path)
    with pytest.raises(Interrupted) as stopped:
        cache.fill(
            Computed(),
            examples(),
            on_bytes=lambda *_: stop.ask(signal.SIGTERM),
            stop=stop,
            run="mlx-qlora train --resume",
        )
    assert stopped.value.exit_code == 143
    assert stopped.value.run == "mlx-qlora train --resume"
    assert 0 < cache_in(tmp_path).missing_bytes < cache.num_bytes


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    cache = cache_in(tmp_path / "not" / "there")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, cache.num_bytes))
    cache.check_room()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, cache.num_bytes - 1))
    with pytest.raises(StorageError, match="the disk has") as error:
        cache.check_room()
    assert "cache_frozen_prefix=false" in error.value.run
    assert not (tmp_path / "not").exists()


def test_a_disk_that_fills_is_said_clearly_and_what_was_written_stays(tmp_path):
    cache = cache_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (cache.num_bytes // 2, limits[1]))
        with pytest.raises(StorageError, match="disk is full") as error:
            cache.fill(Computed(), examples())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.__cause__.errno == errno.EFBIG
    again = cache_in(tmp_path)
    assert 0 < again.missing_bytes < cache.num_bytes
    again.fill(Computed(), examples())
    assert cache_in(tmp_path).missing_bytes == 0


def test_a_file_that_vanishes_while_it_is_used_is_an_error_not_zeros(tmp_path):
    cache = filled(tmp_path)
    (batch,) = Batches(examples(), 12, 1, 0).step(0)
    cut(tmp_path)
    with pytest.raises(StorageError, match="cut short"):
        cache.gathered(batch)
    remove_hidden(tmp_path)
    with pytest.raises(StorageError, match="cannot be read"):
        cache.gathered(batch)


def test_a_second_process_waits_and_then_finds_what_the_first_made(tmp_path):
    late, stop, computed = cache_in(tmp_path), StopRequest(), Computed()
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop.ask(signal.SIGTERM)
        with pytest.raises(Interrupted):
            late.fill(computed, examples(), stop=stop)
        waiting = threading.Thread(target=late.fill, args=(computed, examples()))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        shutil.copytree(filled_elsewhere(tmp_path), tmp_path, dirs_exist_ok=True, ignore=lambda *_: [LOCK])
    waiting.join(20)
    assert computed.calls == 0
    assert late.missing_bytes == 0


def filled_elsewhere(folder):
    other = folder.parent / "other"
    filled(other)
    return other


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"question": f"pergunta {i * 37}?", "answer": "resposta " * (i % 5 + 1)} for i in range(14)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def run_config(model, rows, **changes) -> RunConfig:
    training = {
        "cache_frozen_prefix": True,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "steps_per_checkpoint": 2,
        "steps_per_validation": 4,
    }
    tree = {
        "model": {"path": str(model)},
        "data": {"path": str(rows), "max_seq_length": 96},
        "lora": {"rank": 4, "num_layers": 1, "dropout": 0.2},
        "training": training,
    }
    return build_config(tree, changes)


@pytest.fixture
def own_prefixes(tmp_path, monkeypatch):
    """A place for caches that no other test has filled; quantized models stay where they are."""
    monkeypatch.setattr("mlx_qlora.training.prefix_run.cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "frozen-prefix"


def trained(config, folder, *, die_after=None, resume=False) -> tuple[bytes, list[str], list[float]]:
    """The adapter's bytes, the run's notes and the losses of its updates."""
    notes, losses = [], []

    def watch(event):
        if isinstance(event, RunStarted):
            notes.extend(event.notes)
        if isinstance(event, StepDone):
            losses.append(event.loss_nats)
            if event.step == die_after:
                raise KeyboardInterrupt

    train(config, folder, observers=[watch], resume=resume)
    return (folder / "adapters.safetensors").read_bytes(), notes, losses


@pytest.mark.slow
def test_made_anew_found_or_resumed_a_run_ends_with_the_same_bits(
    tiny_llama_folder, rows, tmp_path, own_prefixes
):
    config = run_config(tiny_llama_folder, rows)
    anew, notes, _ = trained(config, tmp_path / "anew")
    assert any("1 of 2 layers" in note and "to compute first" in note for note in notes)
    assert any("rounded from float32 to bfloat16" in note for note in notes)
    found, notes, _ = trained(config, tmp_path / "found")
    assert any("found from an earlier run" in note for note in notes)
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "killed", die_after=5)
    resumed, _, _ = trained(config, tmp_path / "killed", resume=True)
    assert anew == found == resumed
    (folder,) = own_prefixes.iterdir()
    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "lost", die_after=5)
    shutil.rmtree(folder)
    assert trained(config, tmp_path / "lost", resume=True)[0] == anew


@pytest.mark.usefixtures("own_prefixes")
@pytest.mark.parametrize(
    ("kept_as", "tolerance"), [(mx.float32, 2e-6), (mx.bfloat16, 2e-3)], ids=["float32", "bfloat16"]
)
def test_a_run_with_the_cache_has_the_losses_of_one_without(
    kept_as, tolerance, tiny_llama_folder, rows, tmp_path, monkeypatch
):
    plain = run_config(tiny_llama_folder, rows, training={"cache_frozen_prefix": False})
    _, notes, wanted = trained(plain, tmp_path / "plain")
    assert not any("frozen prefix" in note for note in notes)
    monkeypatch.setattr("mlx_qlora.training.run.prefix_run", partial(prefix_run, dtype=kept_as))
    _, notes, losses = trained(run_config(tiny_llama_folder, rows), tmp_path / "cached")
    assert any("rounded" in note for note in notes) == (kept_as == mx.bfloat16)
    np.testing.assert_allclose(losses, wanted, rtol=tolerance)


def test_the_size_is_told_before_anything_is_computed(tiny_llama_folder, rows, tmp_path, own_prefixes):
    said = []
    train(
        run_config(tiny_llama_folder, rows, training={"max_steps": 1}),
        tmp_path / "run",
        observers=[lambda event: said.append(type(event).__name__)],
        on_prefix_bytes=lambda done, total: said.append((done, total)),
    )
    (folder,) = own_prefixes.iterdir()
    num_bytes = len(content(folder))
    assert said.index("RunStarted") < said.index((num_bytes, num_bytes)) < said.index("StepDone")


def test_another_scheme_or_other_tokens_are_another_cache(tiny_llama_folder, rows, tmp_path, own_prefixes):
    few = {"training": {"max_steps": 1}}
    trained(run_config(tiny_llama_folder, rows, **few), tmp_path / "a")
    changes = [{"quantization": {"scheme": "int8"}}, {"data": {"max_seq_length": 64, "skip_bad_rows": True}}]
    for number, change in enumerate(changes, start=2):
        trained(run_config(tiny_llama_folder, rows, **few, **change), tmp_path / str(number))
        assert len(list(own_prefixes.iterdir())) == number
    same = {"lora": {"rank": 2}, "data": {"packing": True}, "training": {"max_steps": 1, "batch_size": 1}}
    trained(run_config(tiny_llama_folder, rows, **same), tmp_path / "b")
    assert len(list(own_prefixes.iterdir())) == 3


def test_whatever_hidden_states_depend_on_makes_another_cache(tiny_llama_folder, tmp_path):
    def base_in(scheme):
        return load_base(ModelConfig(path=str(tiny_llama_folder)), QuantizationConfig(scheme=scheme))

    base, other = base_in("int4"), base_in("int8")
    attach(base.model, LoraConfig(num_layers=1), seed=0)
    objective = objective_for(base.model)

    def folder(base=base, data="data", **settings):
        return prefix_run(objective, base, examples(3), data, root=tmp_path, **settings).cache.folder

    assert folder() == folder()
    changed = [
        folder(replace(base, folder=other.folder)),
        folder(replace(base, config={**base.config, "rope_theta": 7.0})),
        folder(replace(base, fingerprint="another")),
        folder(data="other data"),
        folder(dtype=mx.float32),
    ]
    first = folder()
    base.model.freeze()  # nothing is trained: both layers are frozen
    changed.append(folder())
    assert len({first, *changed}) == 1 + len(changed)


def test_damage_is_told_in_the_notes_and_changes_nothing(tiny_llama_folder, rows, tmp_path, own_prefixes):
    config = run_config(tiny_llama_folder, rows)
    anew, _, _ = trained(config, tmp_path / "anew")
    (folder,) = own_prefixes.iterdir()
    damaged = bytearray(content(folder))
    damaged[100] ^= 64
    (folder / HIDDEN).write_bytes(damaged)
    again, notes, _ = trained(config, tmp_path / "again")
    assert any("1 damaged part" in note for note in notes)
    assert again == anew


@pytest.mark.usefixtures("own_prefixes")
def test_a_run_without_room_for_its_cache_does_not_begin(tiny_llama_folder, rows, tmp_path, monkeypatch):
    config = run_config(tiny_llama_folder, rows)
    load_base(config.model, config.quantization)  # is quantized already: that needs room too
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100))
    with pytest.raises(StorageError, match="the disk has"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_all_layers_are_adapted_the_run_says_so_and_trains_plainly(
    tiny_llama_folder, rows, tmp_path, own_prefixes
):
    everything = {"lora": {"num_layers": -1}, "training": {"max_steps": 2}}
    _, notes, losses = trained(run_config(tiny_llama_folder, rows, **everything), tmp_path / "all")
    assert any("nothing to cache" in note for note in notes)
    assert not own_prefixes.exists()
    everything["training"]["cache_frozen_prefix"] = False
    assert trained(run_config(tiny_llama_folder, rows, **everything), tmp_path / "plain")[2] == losses
