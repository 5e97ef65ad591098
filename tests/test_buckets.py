"""Buckets by cost: the partition is the cheapest of all, the platform's best is found, and what runs is counted."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.throughput import common
from hetfl_jax.core import platform
from hetfl_jax.core.platform import Platform
from hetfl_jax.core.types import Account, Info, Seen
from hetfl_jax.data.population import population
from hetfl_jax.engine.buckets import Work, at_once, best, seconds
from hetfl_jax.engine.chunks import MOST
from hetfl_jax.engine.constants import CONSTANTS, Constants
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import heterofl
from hetfl_jax.models.costs import costs
from hetfl_jax.run import ledger
from hetfl_jax.run.buckets import holds
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import prepare
from hetfl_jax.run.mix import parse_buckets, parse_mix
from tests.helpers import mlp_family, sgd

FIVE = "a1-b1-c1-d1-e1"
BATCH, STEPS, COHORT = 20, 3, 100
FREE = Constants(launch=0.0, rate=1e9, program=0.0)


def work(macs=(16e6, 4e6, 1e6), share=None, **changes):
    share = share or [1 / len(macs)] * len(macs)
    return Work(**{**dict(macs=list(macs), share=share, layers=2, items=30, steps=5.0, rounds=100), **changes})


def benchmark(net, mix=FIVE, rounds=100, cohort=COHORT):
    """The rounds of ``experiments.throughput.round``."""
    fam = common.family(net, mix)
    price = costs(fam)
    shares = np.asarray(parse_mix(mix).proportions, float)
    return Work((price.macs * 3.0 * BATCH).tolist(), (shares / shares.sum()).tolist(), int(price.layers[0]), cohort,
                STEPS, rounds)  # fmt: skip


def partitions(levels):
    """All ways to cut a sorted list of levels into runs."""
    for cuts in product([False, True], repeat=levels - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [levels]
        yield [tuple(range(a, b)) for a, b in zip([0, *ends[:-1]], ends)]


@pytest.mark.parametrize("seed", range(8))
def test_no_partition_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    macs = np.sort(10 ** rng.uniform(5, 9, 4))[::-1]
    device = Constants(10 ** rng.uniform(-6, -3), 10 ** rng.uniform(9, 13), 10 ** rng.uniform(-2, 1))
    asked = work(macs, rng.dirichlet(np.ones(4)).tolist(), items=int(rng.integers(1, 60)))
    found = best(asked, np.ones((4, 4), bool), device, 32)
    cost = lambda groups: sum(seconds(asked, g, at_once(asked, g, device, 32), device) for g in groups)  # noqa: E731
    assert sorted(level for bucket in found for level in bucket.levels) == [0, 1, 2, 3]
    assert cost([b.levels for b in found]) == pytest.approx(min(cost(groups) for groups in partitions(4)))


@pytest.mark.parametrize(
    ("what", "device", "groups"),
    [
        (work(), FREE, [(0,), (1,), (2,)]),
        (work(), FREE._replace(program=1e9), [(0, 1, 2)]),
        (work(), FREE._replace(launch=1.0), [(0, 1, 2)]),
        (work(rounds=1), FREE._replace(program=0.2), [(0,), (1, 2)]),
        (work(rounds=100_000), FREE._replace(program=0.2), [(0,), (1,), (2,)]),
        (work([5e6]), FREE._replace(launch=1.0), [(0,)]),
        (work([1e6, 16e6, 4e6]), FREE, [(1,), (2,), (0,)]),
        (work(share=[1.0, 0.0, 0.0]), FREE._replace(program=1e-9), [(0, 1, 2)]),
    ],
)
def test_table_of_choices(what, device, groups):
    """Nothing to save: apart. Programs or launches that cost: together, the small ones first; long runs less so."""
    assert [bucket.levels for bucket in best(what, np.ones((len(what.macs),) * 2, bool), device, 30)] == groups


def test_a_level_joins_only_one_that_holds_it():
    mix = parse_mix("a4x1-b4x1-a2x1")  # neither of the last two holds the other
    found = best(work([16e6, 4e6, 8e6]), holds(mix), FREE._replace(program=1e9), 30)
    assert [bucket.levels for bucket in found] == [(0, 2, 1)]
    apart = best(work([4e6, 8e6]), holds(mix)[1:, 1:], FREE._replace(program=1e9), 30)
    assert [bucket.levels for bucket in apart] == [(1,), (0,)]


@pytest.mark.parametrize(
    ("net", "rounds", "groups"),
    [("cnn", 100, "a-b-c-de"), ("cnn", 10_000, "each"), ("preresnet_1112", 1_000, "each"), ("mlp", 20, "abcde")],
)
def test_a_cpu_takes_todays_best(net, rounds, groups):
    """One client at a time: only multiply-adds and compiling count. ``compare`` has a-b-c-de written for the CNN."""
    mix = parse_mix(FIVE)
    found = best(benchmark(net, rounds=rounds), holds(mix), CONSTANTS["cpu"], 1)
    assert all(bucket.clients == 1 for bucket in found)
    assert tuple(b.levels for b in found) == (parse_buckets(groups, mix) or tuple((i,) for i in range(5)))


@pytest.mark.parametrize("name", ["heterofl_digits", "fjord_digits"])
def test_short_runs_keep_their_buckets(name):
    """Those that their configs stated before ``auto`` was there: one bucket."""
    lab = prepare(load_config(name, "train.devices=1"))
    assert lab.config.train.buckets == "auto"
    assert lab.buckets == (tuple(range(lab.federation.family.levels)),)


def drawn(asked, rng):
    """An ``Info`` of one drawn round of the benchmark."""
    levels = len(asked.macs)
    level = rng.choice(levels, asked.items, p=asked.share)
    seen = np.zeros((asked.items, 2, levels), np.int32)
    seen[np.arange(asked.items), :, level] = STEPS * BATCH
    there = np.ones(asked.items, bool)
    ids = np.arange(asked.items)
    return Info(Account(ids, level, there, there, Seen((), seen, (), ())), (), {}, {}, device=0)


def counted(net, platform_name, mix=FIVE, draws=50):
    asked = benchmark(net, mix, rounds=10_000)
    found = best(asked, holds(parse_mix(mix)), CONSTANTS[platform_name], MOST)
    ran = np.zeros((2, len(asked.macs)), int)
    for bucket in found:
        ran[:, list(bucket.levels)] = [[bucket.levels[0]], [bucket.clients]]
    price = costs(common.family(net, mix))
    settings, size, rng = sgd(batch_size=BATCH, epochs=1), np.full(COHORT, STEPS * BATCH), np.random.default_rng(0)
    each = [ledger.executed(drawn(asked, rng)._replace(ran=ran), price, settings, size) for _ in range(draws)]
    return float(np.mean(each))


@pytest.mark.parametrize("net", ["cnn", "conv", "preresnet_1112"])
@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_five_widths_execute_little_more_than_they_need(net, kind):
    """Cohort 100, levels drawn anew every round, in a run so long that compiling hardly counts."""
    assert 1 <= counted(net, kind) <= 1.35


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_an_mlp_runs_full_size_on_an_accelerator(kind):
    """Its layers are launches: a bucket a level takes twice the time, and even so more than 1.35 of what is needed."""
    asked, device = benchmark("mlp", rounds=10_000), CONSTANTS[kind]
    found = best(asked, holds(parse_mix(FIVE)), device, MOST)
    assert [bucket.levels for bucket in found] == [(0, 1, 2, 3, 4)]
    assert counted("mlp", kind, draws=10) == pytest.approx(2.66, abs=0.1)
    one, each = (
        sum(seconds(asked, levels, at_once(asked, levels, device, MOST), device) for levels in groups)
        for groups in ([range(5)], [[level] for level in range(5)])
    )
    assert each > 2 * one


def test_what_ran_is_counted_by_hand():
    """Two buckets; a chunk is as long as its longest client and always full, a batch always full."""
    fam = mlp_family()
    price, settings = costs(fam), sgd(batch_size=4, epochs=1)
    size = np.array([4, 8, 3, 4])
    level = np.array([0, 0, 1, 1])
    seen = np.zeros((4, 2, 2), np.int32)
    seen[np.arange(4), :, level] = size[:, None]
    items = Account(np.arange(4), level, np.array([True] * 4), None, Seen((), seen, (), ()))
    large, small = (int(m) for m in price.macs)
    needed = 3 * ((4 + 8) * large + (3 + 4) * small)
    info = Info(items, (), {}, {}, ran=np.array([[0, 1], [2, 1]]))
    assert ledger.executed(info, price, settings, size) == round(3 * (16 * large + 8 * small) / needed, 4)
    together = info._replace(ran=np.array([[0, 0], [4, 4]]))
    assert ledger.executed(together, price, settings, size) == round(3 * 4 * 8 * large / needed, 4)
    assert ledger.executed(info._replace(device=np.array([0, 1, 0, 1])), price, settings, size) == round(
        3 * (2 * 12 * large + 8 * small) / needed, 4
    )


@pytest.mark.parametrize(("name", "chunk", "ran"), [
    ("bucketed", 1, [[0, 1], [1, 1]]), ("bucketed", 3, [[0, 1], [3, 3]]), ("chunked", 2, [[0, 0], [2, 2]]),
    ("vmapped", 0, [[0, 0], [6, 6]]), ("debugging", 0, [[0, 1], [1, 1]]),
])  # fmt: skip
def test_every_executor_says_how_it_ran(name, chunk, ran):
    fam, key = mlp_family(), jax.random.key(0)
    pop = population(np.ones((12, 6), np.float32), np.zeros(12, int), np.arange(12), [2] * 6, level=[0, 1] * 3,
                     levels=2, classes=3)  # fmt: skip
    algorithm = heterofl.make(fam, sgd(), cohort=6, proportions=(1, 1))
    run = executor(name, chunk)
    state, pop, key = run.place((start(algorithm, device_store(), 6, key), pop, key))
    _, info = make_round(algorithm, run, device_store())(state, pop, key)
    assert np.asarray(info.ran).tolist() == ran


def test_the_platform_is_asked_while_a_program_is_made():
    seen = []
    fn = platform.made_for(Platform("tpu", 5), lambda x: (seen.append(platform.current()), x)[1])
    jax.jit(fn)(jnp.ones(2))
    assert seen == [Platform("tpu", 5)]
    assert platform.current() == Platform("cpu")
    assert executor("bucketed", platform=Platform("gpu")).kind() == Platform("gpu")
    with pytest.raises(RuntimeError), platform.during(Platform("gpu")):
        raise RuntimeError
    assert platform.current().name == "cpu", "also after an error"
