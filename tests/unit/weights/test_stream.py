"""Writing the quantized copy: whole or not there, and never over anything else."""

import errno
import json
import os
import shutil
import threading
from collections import namedtuple
from contextlib import suppress

import mlx.core as mx
import pytest

from mlx_qlora.errors import ModelError, StorageError, WeightsError
from mlx_qlora.quantization.schemes import scheme_named
from mlx_qlora.storage import sha256_of
from mlx_qlora.weights import output_folder, stream
from mlx_qlora.weights.output_folder import MANIFEST
from mlx_qlora.weights.shards import read_checkpoint
from mlx_qlora.weights.source import fingerprint, resolve_model
from mlx_qlora.weights.stream import quantize_checkpoint, raw_bytes
from tests.checkpoints import make_checkpoint, save_sharded, tensors_of

INT4, INT8 = scheme_named("int4"), scheme_named("int8")
SHARD = 15_000


class Stop(Exception):
    """As if the process had been killed here."""


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama_folder):
    root = tmp_path_factory.mktemp("source")
    return resolve_model(
        str(make_checkpoint(root / "model", "llama-untied", tiny_llama_folder, num_shards=2))
    )


@pytest.fixture(scope="module")
def clean(source, tmp_path_factory):
    """The files of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("clean") / "out"
    quantize_checkpoint(source, output, INT4, shard_bytes=SHARD)
    return files_of(output)


def files_of(folder):
    """Digests, not bytes: a difference must stay readable."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def stop_after(share):
    def on_bytes(done, total):
        if done >= share * total:
            raise Stop

    return on_bytes


def stopped(source, output, share=0.6, scheme=INT4):
    """An interrupted run; its .partial folder."""
    with pytest.raises(Stop):
        quantize_checkpoint(source, output, scheme, on_bytes=stop_after(share), shard_bytes=SHARD)
    assert not output.exists()
    return output.with_name("out.partial")


def identities(folder):
    """What changes when a weight file is written anew."""
    stats = {path.name: path.stat() for path in folder.glob("model-*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_stopped_run_goes_on_and_ends_with_the_same_files(source, clean, tmp_path, share):
    partial = stopped(source, tmp_path / "out", share)
    before = identities(partial)
    assert bool(before) == (share > 0)
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == clean
    assert before.items() <= identities(tmp_path / "out").items()
    assert not partial.exists()


def test_progress_of_a_resumed_run_counts_what_is_there(source, tmp_path):
    stopped(source, tmp_path / "out", 0.6)
    seen = []
    quantize_checkpoint(source, tmp_path / "out", INT4, on_bytes=lambda *s: seen.append(s), shard_bytes=SHARD)
    total = sum(info.num_bytes for info in read_checkpoint(source.folder).values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.9999])
def test_a_finished_shard_that_was_damaged_is_made_again(source, clean, tmp_path, shard, where):
    output = tmp_path / "out"
    partial = stopped(source, output, 0.6)
    before = identities(partial)
    names = sorted(before)
    data = bytearray((partial / names[shard]).read_bytes())
    data[int(where * len(data))] ^= 1
    (partial / names[shard]).write_bytes(data)
    quantize_checkpoint(source, output, INT4, shard_bytes=SHARD)
    assert files_of(output) == clean
    after = identities(output)
    assert {name for name in names if after[name] == before[name]} == {*names} - {names[shard]}


def test_a_finished_shard_that_is_gone_is_made_again_and_the_others_stay(source, clean, tmp_path):
    partial = stopped(source, tmp_path / "out", 0.6)
    before = identities(partial)
    (partial / min(before)).unlink()
    del before[min(before)]
    assert before
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == clean
    assert before.items() <= identities(tmp_path / "out").items()


@pytest.mark.parametrize("wrong", ["", "[]", "{", '{"plan": 3}', '{"plan": "x", "shards": []}'])
def test_a_broken_manifest_means_a_fresh_start(source, clean, tmp_path, wrong):
    partial = stopped(source, tmp_path / "out")
    before = identities(partial)
    (partial / MANIFEST).write_text(wrong)
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == clean
    assert not before.items() & identities(tmp_path / "out").items()


def test_a_manifest_of_another_form_means_a_fresh_start(source, clean, tmp_path):
    partial = stopped(source, tmp_path / "out")
    manifest = json.loads((partial / MANIFEST).read_text())
    (partial / MANIFEST).write_text(json.dumps({**manifest, "shards": ["a"]}))
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == clean


def test_another_scheme_starts_afresh(source, clean, tmp_path):
    partial = stopped(source, tmp_path / "out", scheme=INT8)
    before = identities(partial)
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == clean
    assert not before.items() & identities(tmp_path / "out").items()


def test_what_a_killed_process_left_half_written_does_not_stay(source, clean, tmp_path):
    partial = stopped(source, tmp_path / "out")
    (partial / f".{MANIFEST}.1.tmp").write_text("{")
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == clean


def test_a_finished_result_is_returned_at_once(source, tmp_path):
    first = quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    before = identities(tmp_path / "out")
    again = quantize_checkpoint(
        source, tmp_path / "out", INT4, on_bytes=lambda *_: pytest.fail("worked"), shard_bytes=SHARD
    )
    assert identities(tmp_path / "out") == before
    assert (first.path, first.bytes, first.skipped) == (again.path, again.bytes, again.skipped)


@pytest.mark.parametrize(
    "other",
    [
        "a file",
        "a folder",
        "an empty folder",
        "another scheme",
        "a cut shard",
        "no config.json",
        "no tokenizer.json",
    ],
)
def test_something_else_under_the_name_is_left_untouched(source, tmp_path, other):
    output = tmp_path / "out"
    if other == "a file":
        output.write_text("mine")
    elif other.endswith("folder"):
        output.mkdir()
        if other == "a folder":
            (output / "mine.txt").write_text("mine")
    else:
        quantize_checkpoint(source, output, INT8 if other == "another scheme" else INT4, shard_bytes=SHARD)
        if other.startswith("no "):
            (output / other.removeprefix("no ")).unlink()
        if other == "a cut shard":
            shard = min(output.glob("*.safetensors"))
            os.truncate(shard, shard.stat().st_size - 1)
    before = output.read_text() if output.is_file() else files_of(output)
    with pytest.raises(StorageError, match="something else here already") as caught:
        quantize_checkpoint(source, output, INT4, shard_bytes=SHARD)
    assert caught.value.where == str(output)
    assert (output.read_text() if output.is_file() else files_of(output)) == before
    assert not output.with_name("out.partial").exists()


def test_a_damaged_folder_of_our_own_is_made_again(source, clean, tmp_path):
    output = tmp_path / "out"
    quantize_checkpoint(source, output, INT4, shard_bytes=SHARD)
    os.truncate(min(output.glob("*.safetensors")), 100)
    (output / "tokenizer.json").unlink()
    quantize_checkpoint(source, output, INT4, shard_bytes=SHARD, replace_damaged=True)
    assert files_of(output) == clean
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = identities(output)
    quantize_checkpoint(source, output, INT4, shard_bytes=SHARD, replace_damaged=True)
    assert identities(output) == before


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_no_lock_is_left_behind(source, tmp_path, share):
    with suppress(Stop):
        quantize_checkpoint(source, tmp_path / "out", INT4, on_bytes=stop_after(share), shard_bytes=SHARD)
    assert not list(tmp_path.glob(".*"))


def test_a_lock_whose_file_was_removed_is_not_believed(tmp_path):
    lock = tmp_path / "lock"
    locked, done = [], threading.Event()
    first = output_folder._lock_file(lock)

    def wait():
        locked.append(output_folder._lock_file(lock))
        done.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not done.wait(0.3)
    lock.unlink()  # as the first writer does, still holding it
    first.close()
    assert done.wait(30)
    waiting.join()
    assert os.path.samestat(os.fstat(locked[0].fileno()), lock.stat())
    locked[0].close()


def test_too_little_room_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StorageError, match=r"0\.00 GB free, and 0\.07 GB are needed"):
        quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_room_for_what_is_there_already_is_not_asked_for_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SPARE_BYTES", 0)
    partial = stopped(source, tmp_path / "out", 0.9)
    there = sum(path.stat().st_size for path in partial.glob("model-*.safetensors"))
    whole = sum(array.nbytes for array in tensors_of(source.folder).values())
    assert there > 20_000
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(whole, 0, 60_000))
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "The disk is full"), (errno.EDQUOT, "The disk is full"), (errno.EROFS, "Cannot write"),
     (errno.EIO, "Cannot write")],
)  # fmt: skip
def test_a_disk_that_fails_under_a_shard_is_a_storage_error_and_keeps_the_finished_ones(
    source, clean, tmp_path, monkeypatch, number, says
):
    calls, fsync = [], os.fsync

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # of the third shard; each has three
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match=says):
        quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not (tmp_path / "out").exists()
    before = identities(tmp_path / "out.partial")
    assert len(before) == 2
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    assert before.items() <= identities(tmp_path / "out").items()
    assert files_of(tmp_path / "out") == clean


def test_a_quantized_model_is_not_quantized_again(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", INT8)
    with pytest.raises(ModelError, match="quantized already"):
        quantize_checkpoint(resolve_model(str(tmp_path / "out")), tmp_path / "twice", INT4)
    assert not (tmp_path / "twice").exists()


def test_broken_weights_leave_nothing(source, tmp_path):
    folder = shutil.copytree(source.folder, tmp_path / "model")
    shard = max(folder.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(WeightsError):
        quantize_checkpoint(resolve_model(str(folder)), tmp_path / "out", INT4)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_weight_that_changed_meanwhile_starts_afresh(source, tmp_path):
    folder = shutil.copytree(source.folder, tmp_path / "model")
    stopped(resolve_model(str(folder)), tmp_path / "out", 0.9)
    tensors = tensors_of(folder)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    mx.eval(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_sharded(folder, tensors, 1)
    changed = resolve_model(str(folder))
    quantize_checkpoint(changed, tmp_path / "out", INT4, shard_bytes=SHARD)
    quantize_checkpoint(changed, tmp_path / "at_once", INT4, shard_bytes=SHARD)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "at_once")


def test_a_second_writer_waits_and_finds_it_finished(source, clean, tmp_path):
    first_is_in, second_may_start = threading.Event(), threading.Event()
    seconds_bytes = []

    def slowly(done, _total):
        if done and not first_is_in.is_set():
            first_is_in.set()
            assert second_may_start.wait(30)

    first = threading.Thread(
        target=quantize_checkpoint,
        args=(source, tmp_path / "out", INT4, (), slowly),
        kwargs={"shard_bytes": SHARD},
    )
    second = threading.Thread(
        target=quantize_checkpoint,
        args=(source, tmp_path / "out", INT4, (), lambda *seen: seconds_bytes.append(seen)),
        kwargs={"shard_bytes": SHARD},
    )
    first.start()
    assert first_is_in.wait(30)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    second_may_start.set()
    first.join(60)
    second.join(60)
    assert seconds_bytes == []
    assert files_of(tmp_path / "out") == clean


def test_the_result_says_where_it_came_from(source, tmp_path):
    result = quantize_checkpoint(source, tmp_path / "out", INT4, ["lm_head"], shard_bytes=SHARD)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source_fingerprint"] == fingerprint(source.folder)
    assert manifest["source"] == source.name
    assert manifest["finished"] is True
    assert manifest["scheme"] == INT4.config()
    assert manifest["skipped"] == [{"layer": "lm_head", "reason": "asked to be skipped"}]
    assert manifest["skip_modules"] == ["lm_head"]
    assert manifest["shards"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in (tmp_path / "out").glob("*.safetensors")
    }
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {MANIFEST, *manifest["shards"], *manifest["files"]}
    written = tensors_of(tmp_path / "out").values()
    assert result.bytes == sum(array.nbytes for array in written)
    assert result.num_parameters == sum(array.size for array in tensors_of(source.folder).values())
    assert result.bits_per_weight == 8 * result.bytes / result.num_parameters


def test_the_index_names_every_tensor_and_the_tokenizer_is_copied(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", INT4, shard_bytes=SHARD)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    infos = read_checkpoint(tmp_path / "out")
    assert index["weight_map"] == {name: info.file.name for name, info in infos.items()}
    assert index["metadata"]["total_size"] == sum(info.num_bytes for info in infos.values())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8", "uint32", "int64", "bool_"])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5)])
def test_raw_bytes_are_what_safetensors_stores(dtype, shape, tmp_path):
    array = (mx.random.normal(shape) * 4).astype(getattr(mx, dtype))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"x": array})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert raw_bytes(array) == data[len(data) - array.nbytes :]
    columns = array.T
    assert raw_bytes(columns) == raw_bytes(mx.contiguous(columns))
