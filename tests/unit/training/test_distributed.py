"""training/distributed.py: what ranks do together, in real rings on this machine."""

import json
import os
import subprocess
import sys
import textwrap

import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.objective.evaluate import Evaluation
from mlx_qlora.training.distributed import ALONE, fingerprint_of
from mlx_qlora.training.launcher import free_ports

needs_ring = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring")

BEGIN = """
import json, math, sys
import mlx.core as mx
import numpy as np
from mlx_qlora.training.distributed import RankError, Ranks, fingerprint_of
ranks = Ranks(mx.distributed.init(strict=True, backend="ring"), local_rank=0, num_local=1, most_local=1)
rank, said = ranks.rank, {}
"""


def on_ring(tmp_path, size: int, script: str) -> list[dict]:
    """What each of `size` processes left in `said`."""
    hostfile = tmp_path / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    code = BEGIN + textwrap.dedent(script) + "\nprint(json.dumps(said))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    return [json.loads(process.communicate(timeout=120)[0]) for process in processes]


EXCHANGES = """
from mlx_qlora.objective.evaluate import Evaluation
from mlx_qlora.training import distributed

said["table"] = ranks.table(rank + 0.1, 1e300, math.inf).tolist()
said["total"], said["highest"] = ranks.total(0.1, rank), ranks.highest(rank, -rank)
said["share"] = list(ranks.share(range(7)))

distributed.BUCKET_BYTES = 64  # so that the sums come in several exchanges
tree = {"a": [mx.full((3, 5), float(rank + 1)), mx.full((), 2.0)], "b": mx.full((40,), 1.5, mx.bfloat16)}
summed = ranks.summed(tree)
said["summed"] = [*[x.tolist() for x in (*summed["a"], summed["b"])], str(summed["b"].dtype)]
mx.random.seed(rank)
noise = {"x": mx.random.normal((1000,))}
said["noise"] = fingerprint_of(ranks.summed(noise))
noise["x"][rank] = math.nan
said["nan"] = int(mx.isnan(ranks.summed(noise)["x"]).sum().item())

evaluations = [Evaluation(2.0, 30), Evaluation(math.nan, 0), Evaluation(4.0, 10)]
whole = ranks.together(evaluations[rank])
said["evaluation"] = [whole.loss_nats, whole.target_tokens]

own = {"w": mx.array([[-0.0, math.nan], [1e-45, 3.0]]), "n": mx.array(7, mx.uint64)}
own["h"] = mx.ones((3,), mx.bfloat16)
got = ranks.tensors_from_first(own if rank == 0 else None)
said["tensors"] = [fingerprint_of(got), fingerprint_of(own), str(got["n"].dtype), list(got["n"].shape)]
said["value"] = ranks.value_from_first({"a": [1, None, "é"]} if rank == 0 else None)
said["nothing"] = len(ranks.bytes_from_first(b"" if rank == 0 else None))
said["exchanges"], said["is_waiting"] = ranks.waiting.exchanges, ranks.waiting.since is not None

ranks.check_same(configuration="same", data="same")
try:
    ranks.check_same(configuration="same", data="same" if rank != 2 else "other")
except RankError as error:
    said["refused"] = error.what
"""


@needs_ring
def test_ranks_sum_share_and_hand_on_to_the_bit(tmp_path):
    """One ring of three for all exchanges: to start one takes longer than all they do."""
    told = on_ring(tmp_path, 3, EXCHANGES)
    assert [t["share"] for t in told] == [[0, 3, 6], [1, 4], [2, 5]]
    for said in told:
        assert said["table"] == [[rank + 0.1, 1e300, np.inf] for rank in range(3)]
        assert said["total"] == [0.1 + 0.1 + 0.1, 3]
        assert said["highest"] == [2, 0]
        assert said["summed"] == [[[6.0] * 5] * 3, 6.0, [4.5] * 40, "mlx.core.bfloat16"]
        assert said["noise"] == told[0]["noise"]
        assert said["nan"] == 3
        assert said["evaluation"] == [(60 + 40) / 40, 40]
        assert said["tensors"] == [said["tensors"][1]] * 2 + ["mlx.core.uint64", []]
        assert said["value"] == {"a": [1, None, "é"]}
        assert said["nothing"] == 0
        assert said["exchanges"] > 15
        assert not said["is_waiting"]
        assert "data: on rank 2 it is not rank 0's" in said["refused"]
        assert "configuration" not in said["refused"]


TURNS = """
import time
ranks.local_rank, ranks.num_local, ranks.most_local = [(0, 2, 2), (1, 2, 2), (0, 1, 2)][rank]
with ranks.in_turn():
    said["waited_for"], said["from"] = ranks.waiting.exchanges, time.time()
    time.sleep(0.3)
    said["to"] = time.time()
ranks.meet()
"""


@pytest.mark.slow
@needs_ring
def test_the_ranks_of_one_machine_take_turns_and_other_machines_do_not_wait(tmp_path):
    first, second, elsewhere = on_ring(tmp_path, 3, TURNS)
    assert second["from"] >= first["to"]
    assert [said["waited_for"] for said in (first, second, elsewhere)] == [0, 1, 0]


def test_a_process_on_its_own_changes_nothing():
    tree = {"a": mx.ones((2,))}
    evaluation = Evaluation(0.1, 3)
    assert ALONE.is_first
    assert ALONE.summed(tree) is tree
    assert ALONE.together(evaluation) is evaluation
    assert ALONE.total(0.1, 2) == ALONE.highest(0.1, 2) == [0.1, 2]
    assert ALONE.value_from_first([1]) == [1]
    assert ALONE.waiting.exchanges == 0


def test_a_fingerprint_tells_names_and_bits_apart():
    one = {"a": mx.array([1.0, 2.0]), "b": mx.array(0.0)}
    assert fingerprint_of(one) == fingerprint_of(dict(reversed(one.items())))
    prints = {
        fingerprint_of(one),
        fingerprint_of({"a": one["a"], "c": one["b"]}),
        fingerprint_of({"a": one["a"], "b": mx.array(-0.0)}),
        fingerprint_of({"a": mx.array([2.0, 1.0]), "b": one["b"]}),
    }
    assert len(prints) == 4
