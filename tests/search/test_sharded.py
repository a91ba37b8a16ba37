"""Shards answer as one index; a dead one is an error with its name or a told gap; what was saved comes back."""

import os
import signal
import threading
import time

import numpy as np
import pytest

import quernel
from quernel._errors import FormatError, QuernelError
from quernel.search import FlatIndex, FlinngIndex, Index, ShardedIndex, ShardError
from quernel.search._shard_workers import Shard

RNG = np.random.default_rng(0)
X = RNG.standard_normal((500, 8)).astype(np.float32)
Q = X[:40] + 0.05 * RNG.standard_normal((40, 8)).astype(np.float32)


def threads(index, n=3):
    return ShardedIndex(index, n, workers="threads")


def same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_flat_shards_answer_as_one(metric, n):
    # Repeated rows tie, and ties are ordered by when they were added.
    items = np.concatenate([X[:100], X[:100], X])
    same(threads(FlatIndex(8, metric), n).add(items).search(Q, 12), FlatIndex(8, metric).add(items).search(Q, 12))


def test_sets_are_dealt_like_vectors():
    sets = [np.unique(RNG.integers(0, 50, 8)) for _ in range(60)]
    alone, sharded = FlatIndex(metric="jaccard"), threads(FlatIndex(metric="jaccard"))
    same(sharded.add(sets[:7]).add(sets[7:]).search(sets[:9], 5), alone.add(sets).search(sets[:9], 5))


@pytest.mark.parametrize("chunks", [(500,), (1, 2, 497), (250, 250)])
def test_flinng_shards_answer_as_one_index_in_parts(chunks):
    options = {"n_tables": 16, "bits": 8, "n_rows": 2}
    alone = FlinngIndex(8, n_groups=60, n_parts=3, **options).add(X)
    sharded = threads(FlinngIndex(8, n_groups=20, **options))
    start = 0
    for size in chunks:
        sharded.add(X[start : start + size])
        start += size
    for k in (1, 5, 30):
        same(sharded.search(Q, k), alone.search(Q, k))


def test_an_item_that_a_shard_refuses_is_added_nowhere():
    sharded = threads(FlinngIndex(8, n_tables=4, bits=4, budget_bytes=40_000)).add(X[:100])
    before = sharded.search(Q, 3)
    with pytest.raises(QuernelError, match="budget_bytes"):
        sharded.add(np.tile(X, (40, 1)))
    assert len(sharded) == 100
    same(sharded.search(Q, 3), before)


class Dead:
    """A shard that fails like an actor whose process is gone."""

    def __getattr__(self, name):
        return lambda *arguments: (_ for _ in ()).throw(ShardError(1, "it was killed"))


def killed(index):
    index._workers._shards[1] = Dead()
    return index


def test_a_dead_shard_has_a_name_or_leaves_a_told_gap():
    index = killed(threads(FlatIndex(8)).add(X))
    with pytest.raises(ShardError, match="shard 1 does not answer: it was killed") as caught:
        index.search(Q, 3)
    assert caught.value.shard == 1
    answer = index.search(Q, 500, partial=True)
    assert answer.missing == (1,)
    found = np.unique(answer[1][answer[1] >= 0])
    np.testing.assert_array_equal(found, [i for i in range(500) if i % 3 != 1])
    with pytest.raises(ShardError, match="shard 1"):
        index.add(X[:5])
    assert len(index) == 500


def test_restore_brings_back_the_last_save_and_says_what_is_lost(tmp_path):
    index = threads(FlatIndex(8)).add(X[:300])
    index.save(tmp_path)
    index.remove([4, 5])
    index.add(X[300:], np.arange(1000, 1200))
    lost = killed(index).restore()
    # Slots 300 to 499 were added after the save; shard 1 had every third of them.
    np.testing.assert_array_equal(lost, [1000 + i - 300 for i in range(300, 500) if i % 3 == 1])
    alone = FlatIndex(8).add(X[:300]).add(X[300:], np.arange(1000, 1200))
    alone.remove([4, 5, *lost.tolist()])
    same(index.search(Q, 9), alone.search(Q, 9))
    index.add(X[lost - 700], lost)
    assert len(index) == 498


def test_restore_without_a_save_starts_empty():
    index = killed(threads(FlatIndex(8)).add(X))
    lost = index.restore()
    assert len(lost) == 167 and len(index) == 333
    assert index.search(Q, 3).missing == ()


def test_saving_again_leaves_one_generation_and_a_missing_shard_is_told(tmp_path):
    index = threads(FlatIndex(8)).add(X)
    index.save(tmp_path)
    index.add(X)
    index.save(tmp_path)
    (folder,) = tmp_path.glob("shards-*")
    same(Index.load(tmp_path).search(Q, 4), index.search(Q, 4))
    for file in (folder / "shard-00002").iterdir():
        file.unlink()
    (folder / "shard-00002").rmdir()
    with pytest.raises(FormatError, match="shard-00002: the folder of a shard is missing"):
        quernel.load(tmp_path)


def test_a_shard_of_another_save_is_refused(tmp_path):
    threads(FlatIndex(8)).add(X[:90]).save(tmp_path / "one")
    index = threads(FlatIndex(8)).add(X)
    index.save(tmp_path / "two")
    (here,), (there,) = (tmp_path / name for name in ("two",)), tuple((tmp_path / "one").glob("shards-*"))
    (mine,) = here.glob("shards-*")
    for file in (there / "shard-00000").iterdir():
        (mine / "shard-00000" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match="not those that the whole index knows"):
        Index.load(tmp_path / "two")


def test_saving_deletes_nothing_but_the_generation_that_it_replaces(tmp_path):
    (tmp_path / "shards-backup").mkdir()
    (tmp_path / ("shards-" + 16 * "0")).mkdir()
    index = threads(FlatIndex(8)).add(X)
    index.save(tmp_path)
    index.save(tmp_path)
    names = {p.name for p in tmp_path.glob("shards-*")}
    assert {"shards-backup", "shards-" + 16 * "0"} < names and len(names) == 3


def test_a_restore_that_fails_half_way_is_finished_by_the_next(tmp_path):
    index = threads(FlatIndex(8)).add(X[:300])
    index.save(tmp_path)
    index.remove([1, 2])
    index.add(X[300:320], np.arange(1000, 1020))
    index._workers._shards[1] = index._workers._shards[2] = Dead()
    restart = index._workers.restart

    def refused(shard, folder):
        if shard == 2:
            raise ShardError(2, "no machine is left")
        restart(shard, folder)

    index._workers.restart = refused
    with pytest.raises(ShardError, match="shard 2 does not answer: no machine") as caught:
        index.restore()
    first = [1000 + i - 300 for i in range(300, 320) if i % 3 == 1]
    np.testing.assert_array_equal(caught.value.lost, first)
    answer = index.search(Q, 400, partial=True)
    assert answer.missing == (2,) and 1 not in answer[1] and not np.isin(first, answer[1]).any()
    index._workers.restart = restart
    second = [1000 + i - 300 for i in range(300, 320) if i % 3 == 2]
    np.testing.assert_array_equal(index.restore(), second)
    alone = FlatIndex(8).add(X[:300]).add(X[300:320], np.arange(1000, 1020))
    alone.remove([1, 2, *first, *second])
    same(index.search(Q, 9), alone.search(Q, 9))
    index.add(X[[300]], [first[0]])


def test_a_save_that_cannot_be_read_loses_nothing(tmp_path):
    index = threads(FlatIndex(8)).add(X[:300])
    index.save(tmp_path)
    (folder,) = tmp_path.glob("shards-*/shard-00001")
    folder.rename(tmp_path / "away")
    killed(index)
    with pytest.raises(ShardError, match="shard 1 does not answer"):
        index.restore()
    assert len(index) == 300
    (tmp_path / "away").rename(folder)
    assert not len(index.restore())
    same(index.search(Q, 9), FlatIndex(8).add(X[:300]).search(Q, 9))


def served_while_added(index, rounds=60):
    """Search in one thread while another adds; return what was wrong."""
    wrong = []
    done = threading.Event()
    start = set(index.ids.tolist())

    def search():
        while not done.is_set():
            try:
                scores, ids = index.search(X[:20], 5)
            except Exception as error:
                wrong.append(repr(error))
                return
            if not start <= set(index.ids.tolist()):
                wrong.append("an id of the start was gone")
            if not (ids[:, 0] == np.arange(20)).all() or (np.diff(scores, axis=1) > 0).any():
                wrong.append("an item of the start was not found first")

    searching = [threading.Thread(target=search) for _ in range(2)]
    for thread in searching:
        thread.start()
    for i in range(rounds):
        rows = slice(100 + 5 * i, 105 + 5 * i)
        index.add(X[rows], np.arange(500)[rows])
    done.set()
    for thread in searching:
        thread.join()
    return wrong


@pytest.mark.parametrize("index", [FlatIndex(8), FlinngIndex(8, n_groups=64, n_tables=16, bits=6, n_rows=2)])
def test_items_are_added_while_others_search(index):
    sharded = threads(index).add(X[:100])
    assert served_while_added(sharded) == []
    wanted = threads(index).add(X[:400], np.arange(400))
    assert len(sharded) == 400
    same(sharded.search(Q, 5), wanted.search(Q, 5))


def test_after_close_whatever_is_asked_is_an_error_with_its_reason(tmp_path):
    index = threads(FlatIndex(8)).add(X[:20])
    index.save(tmp_path)
    index.close()
    index.close()
    for ask in (
        lambda: index.search(Q, 3),
        lambda: index.search(Q, 3, partial=True),
        lambda: index.add(X[:1]),
        lambda: index.remove([0]),
        lambda: index.save(tmp_path),
        lambda: index.nbytes,
        index.restore,
    ):
        with pytest.raises(QuernelError, match="this sharded index was closed"):
            ask()
    assert len(index) == 20
    assert len(Index.load(tmp_path)) == 20


def test_two_that_add_at_once_do_not_share_a_slot():
    index = threads(FlatIndex(8))
    adding = [threading.Thread(target=lambda i=i: [index.add(X[[j]], [j]) for j in range(i, 400, 4)]) for i in range(4)]
    for thread in adding:
        thread.start()
    for thread in adding:
        thread.join()
    np.testing.assert_array_equal(np.sort(index.ids), np.arange(400))
    np.testing.assert_array_equal(index.search(X[:400], 1)[1][:, 0], np.arange(400))


@pytest.mark.parametrize("index", [FlatIndex(8).add(X[:1]), ShardedIndex(FlatIndex(8), 1, workers="threads")])
def test_only_an_empty_plain_index_can_be_sharded(index):
    with pytest.raises(QuernelError, match="index must be an empty index"):
        threads(index)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


FLINNG = {"n_tables": 16, "bits": 8, "n_rows": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prototype", "alone"),
    [
        (FlatIndex(8), FlatIndex(8)),
        (FlinngIndex(8, n_groups=30, **FLINNG), FlinngIndex(8, n_groups=60, n_parts=2, **FLINNG)),
    ],
    ids=["flat", "flinng"],
)
def test_on_a_ray_cluster(cluster, tmp_path, prototype, alone):
    alone.add(X)
    index = ShardedIndex(prototype, 2).add(X[:250]).add(X[250:])
    same(index.search(Q, 6), alone.search(Q, 6))
    with pytest.raises(QuernelError, match="NaN"):
        index.add(np.full((1, 8), np.nan))
    index.save(tmp_path)
    # The process of one worker is killed, as a machine would lose it.
    os.kill(cluster.get(index._workers._actors[1].pid.remote()), signal.SIGKILL)
    _until_dead(index)
    with pytest.raises(ShardError, match="shard 1 does not answer"):
        index.search(Q, 6)
    assert index.search(Q, 6, partial=True).missing == (1,)
    assert not len(index.restore())
    same(index.search(Q, 6), alone.search(Q, 6))
    index.close()
    again = quernel.load(tmp_path)
    same(again.search(Q, 6), alone.search(Q, 6))
    again.close()


@pytest.mark.slow
def test_what_was_added_after_a_save_is_lost_with_its_worker(cluster, tmp_path):
    index = ShardedIndex(FlatIndex(8), 2).add(X)
    index.save(tmp_path)
    index.add(X[:3], [1000, 1001, 1002])
    os.kill(cluster.get(index._workers._actors[1].pid.remote()), signal.SIGKILL)
    _until_dead(index)
    # Slots 500 and 502 are of shard 0, which lives.
    assert index.restore().tolist() == [1001]
    index.remove([1000, 1002])
    same(index.search(Q, 6), FlatIndex(8).add(X).search(Q, 6))
    index.close()


def _until_dead(index, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not index.search(Q[:1], 1, partial=True).missing:
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("index", [FlatIndex(8), FlinngIndex(8, n_groups=64, n_tables=16, bits=6, n_rows=2)])
def test_a_ray_cluster_serves_while_items_are_added(cluster, index):
    sharded = ShardedIndex(index, 2).add(X[:100])
    assert served_while_added(sharded, rounds=20) == []
    assert len(sharded) == 200
    sharded.close()


@pytest.mark.slow
def test_more_shards_than_processors_are_refused_by_name(cluster, monkeypatch):
    monkeypatch.setattr("quernel.search._shard_workers.START_SECONDS", 40.0)
    with pytest.raises(ShardError, match=r"5 shards need a processor each, the cluster has 3"):
        ShardedIndex(FlatIndex(8), 5)
    # What was started is gone again: its processors are free.
    ShardedIndex(FlatIndex(8), 2).close()


@pytest.mark.slow
def test_a_shard_that_cannot_start_again_stays_a_gap_until_it_can(cluster, tmp_path, monkeypatch):
    index = ShardedIndex(FlatIndex(8), 3).add(X)
    index.save(tmp_path)
    # Another actor waits for a processor, and has the one of the shard that dies.
    other = cluster.remote(num_cpus=1)(Shard).remote(index._workers.description)
    ready = other.pid.remote()
    os.kill(cluster.get(index._workers._actors[1].pid.remote()), signal.SIGKILL)
    cluster.get(ready)
    with monkeypatch.context() as patch:
        patch.setattr("quernel.search._shard_workers.START_SECONDS", 5.0)
        with pytest.raises(ShardError, match=r"3 shards need a processor each, .* of which 0 are free"):
            index.restore()
    assert index.search(Q, 6, partial=True).missing == (1,)
    cluster.kill(other)
    (folder,) = tmp_path.glob("shards-*/shard-00001")
    folder.rename(tmp_path / "away")
    with pytest.raises(ShardError, match="shard 1 does not answer"):
        index.restore()
    assert index.search(Q, 6, partial=True).missing == (1,) and len(index) == 500
    (tmp_path / "away").rename(folder)
    assert not len(index.restore())
    same(index.search(Q, 6), FlatIndex(8).add(X).search(Q, 6))
    index.close()
