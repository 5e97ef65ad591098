"""Client memory on the device, in host memory and in files: the same rows, and none lost by a kill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import tree
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.segments import Segments
from hetfl_jax.engine.stores import Packing, device_store, file_store, host_store, packed_device_store
from hetfl_jax.methods import depthfl, fedavg, heterofl
from hetfl_jax.models import windows
from hetfl_jax.models.costs import costs
from hetfl_jax.results.folder import Checkpoints
from hetfl_jax.run import train as run
from hetfl_jax.run.cli import config_of
from hetfl_jax.run.lab import prepare
from tests.contract import play
from tests.helpers import exits_family, mlp_family, sgd, toy_population, worst
from tests.test_configs import ROOT

pytestmark = pytest.mark.slow

STORES = {"file": file_store, "host": host_store}


def depth_run(store_of, rounds=3, how=("bucketed",), between=lambda store, round: None):
    family, population, key = exits_family(), toy_population(), jax.random.key(7)
    algorithm = depthfl.make(family, sgd(), cohort=5, clients_per_level=(6, 6))
    one = jax.eval_shape(algorithm.init, key)[1]
    store = store_of(Packing(np.asarray(population.level), windows.memory_extents(family, one)))
    runs = executor(*how)
    state, people, key = runs.place((start(algorithm, store, 12, key), population, key))
    step = make_round(algorithm, runs, store)
    for round in range(rounds):
        state, info = step(state, people, key)
        between(store, round + 1)
        # Over a mesh, jit keeps a second entry for the state as a round returns it; nothing compiles after that.
        assert step._cache_size() <= (1 if runs.mesh is None else 2)
    return state, info, store


@pytest.mark.parametrize(("name", "how"), [("host", ("bucketed",)), ("file", ("bucketed", 1, 4))], ids=["host", "file"])
def test_same_rounds_as_on_the_device(name, how, tmp_path):
    algorithm = depthfl.make(exits_family(), sgd(), cohort=5, clients_per_level=(6, 6))
    wanted, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    state, info, store = depth_run(
        lambda packing: STORES[name](tmp_path, packing), how=how, between=lambda store, round: store.commit(round, [])
    )
    assert worst(state.server, wanted.server) < 1e-6
    assert worst(store.gather((), np.arange(12)), wanted.memory) < 1e-6
    assert info.numbers["train_loss"] == pytest.approx(infos[-1].numbers["train_loss"], rel=1e-5)
    kernel = wanted.memory["sum"]["params"]["dense_1"]["kernel"]
    assert not kernel[np.asarray(toy_population().level) == 1].any()


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_packed_on_the_device_are_those_of_the_whole_store(devices):
    """Twelve clients in turn of two levels; over eight devices both arrays are padded to eight rows."""
    one = {"sum": {"params": exits_family().shapes[0]["params"]}}
    algorithm = depthfl.make(exits_family(), sgd(), cohort=5, clients_per_level=(6, 6))
    wanted, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    how = ("bucketed", 0, devices)
    state, info, store = depth_run(lambda packing: packed_device_store(packing, one), how=how)
    assert worst(state.server, wanted.server) < 1e-6
    assert info.numbers["train_loss"] == pytest.approx(infos[-1].numbers["train_loss"], rel=1e-5)
    rows = {name: next(iter(parts.values())).shape[0] for name, parts in state.memory.items()}
    assert rows == dict.fromkeys(("level_0", "level_1"), 8 if devices == 8 else 6)
    if devices == 1:
        assert worst(store.gather(state.memory, jnp.arange(12)), wanted.memory) < 1e-6
        assert tree.nbytes(state.memory) == 4 * 6 * sum(costs(exits_family()).parameters)


def test_rows_are_as_large_as_their_clients_level():
    family, level = exits_family(), np.array([0, 1, 1])
    packing = Packing(level, windows.memory_extents(family, {"sum": {"params": family.shapes[0]["params"]}}))
    assert packing.sizes().tolist() == costs(family).parameters.tolist()


@pytest.mark.parametrize("name", STORES)
def test_a_kill_between_scatter_and_checkpoint_loses_nothing(name, tmp_path):
    """Rows scattered after a commit are not seen by a run that goes on from it; those before it are all there."""
    packing, one = Packing(np.array([0, 1, 1]), ([(2, 2)], [(1, 2)])), {"sum": np.zeros((2, 2), np.float32)}

    def opened():
        store = STORES[name](tmp_path, packing)
        store.init(one, 3)
        return store

    def rows(*values):
        return {"sum": np.stack([np.full((2, 2), v, np.float32) for v in values])}

    store, everyone = opened(), np.arange(3)
    store.scatter((), np.array([0, 1]), np.array([True, True]), rows(1, 2))
    store.commit(1, [])
    committed = store.gather((), everyone)
    store.scatter((), np.array([0, 2]), np.array([True, True]), rows(7, 8))
    store.commit(2, [1])  # the kill comes before the checkpoint of round 2
    store.scatter((), np.array([1]), np.array([True]), rows(9))
    again = opened()
    again.restore(1)
    np.testing.assert_array_equal(again.gather((), everyone)["sum"], committed["sum"])
    assert committed["sum"][:, 0, 0].tolist() == [1, 2, 0]
    assert committed["sum"][1].tolist() == [[2, 2], [0, 0]], "outside its level a client has no row"
    with pytest.raises(ValueError, match="no client memory of round 2; it has 1"):
        again.restore(2)


def test_files_are_sparse_and_stay_small(tmp_path):
    """A client that never took part costs nothing, and rows that were replaced are given back."""
    clients, size = 10_000, 4096
    files = Segments(tmp_path, np.zeros(clients, int), np.array([size]))

    def used():
        return sum(path.stat().st_blocks * 512 for path in tmp_path.glob("segment_*"))

    for round in range(1, 31):
        for client in range(round % 3, 30, 3):
            files.write(client, np.full(size, round, np.float32))
        files.commit(round, [round - 1])
    assert used() < 3 * 30 * size * 4 < 0.01 * clients * size * 4
    assert [files.read(client)[0] for client in range(3)] == [30, 28, 29]
    assert files.read(30) is None


def test_a_full_disk_leaves_what_was_committed(tmp_path, monkeypatch):
    files = Segments(tmp_path, np.zeros(2, int), np.array([3]))
    files.write(0, np.ones(3, np.float32))
    files.commit(1, [])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hetfl_jax.engine.segments.os.fsync", full)
    files.write(0, np.zeros(3, np.float32))
    with pytest.raises(OSError, match="No space left"):
        files.commit(2, [1])
    monkeypatch.undo()
    again = Segments(tmp_path, np.zeros(2, int), np.array([3]))
    again.restore(1)
    assert again.read(0).tolist() == [1, 1, 1]


def tiny(tmp_path, name, **changes):
    config = config_of([f"--config={ROOT}/configs/depthfl_cifar10.py:source=digits,quick"])
    config.data.mean, config.data.std, config.data.augment = (0.3,), (0.4,), "none"
    config.family.update(net="mlp", hidden=(6, 6), norm="none", mix="2x1-1x1")
    config.data.examples, config.method.args.cohort = 400, 4
    config.train.update(rounds=4, epochs=1, steps=1)
    config.run.update(folder=str(tmp_path), name=name, eval_every=2, checkpoint_every=1, keep=2)
    for key, value in changes.items():
        config.train[key] = value
    return config


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Killed after the rows of round 3 were committed and before its checkpoint was."""
    whole = run.train(tiny(tmp_path, "whole", store="file"), quiet=True)
    save = Checkpoints.save

    def killed(self, round, *rest):
        if round == 3:
            raise KeyboardInterrupt
        save(self, round, *rest)

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train(tiny(tmp_path, "cut", store="file"), quiet=True)
    monkeypatch.undo()
    again = run.train(tiny(tmp_path, "cut", store="file"), quiet=True, resume=True)
    assert worst(again.params, whole.params) == 0
    assert {"ensemble", "sel"} <= set(again.table[0])
    assert again.metrics["correction"][-1] == whole.metrics["correction"][-1] > 0
    with pytest.raises(ValueError, match=r"cannot resume .*train\.store was 'file', now 'host'"):
        run.train(tiny(tmp_path, "cut", store="host"), quiet=True, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": "tape"}, "'tape' is not one of device, host, file"),
        ({"store": "host"}, r"client memory of 10 clients needs .* GB in store 'host', which has 0\.0: use 'file'"),
    ],
)
def test_stores_that_do_not_fit_are_named(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("hetfl_jax.core.machine.host_memory", lambda: 10)
    with pytest.raises(ValueError, match=message):
        prepare(tiny(tmp_path, "none", **change))


def test_memory_that_is_not_float32_stays_on_the_device(tmp_path):
    store = file_store(tmp_path, Packing(np.zeros(2, int), ([()],)))
    with pytest.raises(ValueError, match="must be float32"):
        store.init({"visits": jnp.int32(0)}, 2)
    assert device_store().init({"visits": jnp.int32(0)}, 2)["visits"].shape == (2,)


def test_levels_drawn_by_default_are_not_packed():
    """HeteroFL draws them anew each round unless it is told otherwise, so every row is of full size."""
    config = config_of([f"--config={ROOT}/configs/heterofl_digits.py:quick"])
    assert config.method.args.assignment == "dynamic"
    fam, told = mlp_family(), {"cohort": 4, "proportions": (2, 1)}
    assert heterofl.make(fam, sgd(), **told).drawn == heterofl.make(fam, sgd(), assignment="dynamic", **told).drawn
    assert heterofl.make(fam, sgd(), **told).drawn == (2, 1)
    assert heterofl.make(fam, sgd(), assignment="fixed", **told).drawn == fedavg.make(fam, sgd(), cohort=4).drawn == ()
