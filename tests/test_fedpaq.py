"""FedPAQ's special cases, its clock, and codecs in whole rounds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import bits
from hetfl_jax.core.types import Account, Seen
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, fedpaq
from hetfl_jax.parts import clock, codec, merge, select
from hetfl_jax.parts.compose import Slots, compose
from tests.contract import play
from tests.helpers import mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow
ONE = ({"width": 1.0},)


def rounds(make, **args):
    """Two rounds of equal clients."""
    pop = toy_population()
    return play(
        make(mlp_family(ONE), sgd(), cohort=5, **args), executor("bucketed"), pop._replace(level=pop.level * 0), 2
    )


def plain_mean(family, settings, *, cohort):
    rule = merge.overlap_mean(family, by_examples=False)
    return compose(family, local=settings, select=select.uniform(cohort), merge=rule)


def test_without_a_quantiser_it_is_fedavg_with_a_plain_mean():
    wanted, _, _ = rounds(plain_mean)
    found, infos, compilations = rounds(fedpaq.make, levels=0)
    assert worst(found.server.variables, wanted.server.variables) == 0
    assert compilations == [1, 1]
    huge, _, _ = rounds(fedpaq.make, levels=2**22)
    assert worst(huge.server.variables, wanted.server.variables) < 1e-6
    times = [float(info.numbers["simulated_time"]) for info in infos]
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["top_k", "low_rank"])
def test_codecs_at_their_finest_are_fedavg(name):
    args = {"top_k": {"fraction": 1.0}, "low_rank": {"rank": 6}}[name]
    wanted, _, _ = rounds(fedavg.make)
    rule = Slots(uplink=codec.make(name, mlp_family(ONE), error_feedback=True, **args))
    found, _, _ = rounds(fedavg.make, slots=rule)
    assert worst(found.server.variables, wanted.server.variables) < 1e-6
    assert worst(found.memory["error"], jax.tree.map(jnp.zeros_like, found.memory["error"])) < 1e-6


def test_a_round_lasts_as_long_as_its_slowest_client_and_all_uploads():
    rule = clock.Clock(shift=0.5, scale=2.0, bandwidth=100.0)
    work = jnp.zeros((3, 2, 2), jnp.int32).at[:, 1, 0].set(jnp.array([10, 30, 500]))
    up = jnp.asarray(bits.digits(np.array([2**20, 400, 10**9])))
    seen = Seen(None, work, up, up)
    items = Account(jnp.arange(3), jnp.zeros(3, jnp.int32), jnp.array([True, True, False]), None, seen)
    compute, upload = clock.durations(rule, items, jnp.array([8.0, 1.0, 0.0]))
    assert float(compute) == 10 * (0.5 + 8 / 2)
    assert float(upload) == pytest.approx((2**20 + 400) / 100)


def test_waits_are_exponential_and_of_the_client():
    algorithm, population = fedpaq.make(mlp_family(), sgd(), cohort=12), toy_population()
    server = algorithm.init(jax.random.key(0))[0]
    keys = jax.random.split(jax.random.key(1), 400)
    plans = jax.vmap(lambda key: algorithm.plan(key, jnp.int32(0), server, population, None))(keys)
    waits = np.asarray(plans.notes[1]).ravel()
    assert waits.mean() == pytest.approx(1, abs=5 / np.sqrt(waits.size))
    assert (waits > 2).mean() == pytest.approx(np.exp(-2), abs=5 * np.sqrt(0.12 / waits.size))


def test_a_codec_of_the_slots_takes_the_quantisers_place():
    family = mlp_family(ONE)
    rule = Slots(uplink=codec.make("uniform", family, bits=4))
    price = fedpaq.make(family, sgd(), cohort=5, slots=rule).price()
    assert price.up.tolist() == fedavg.make(family, sgd(), cohort=5, slots=rule).price().up.tolist()
    assert price.up[0] < price.down[0] / 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"levels": -1}, "quantisation levels -1, allowed 1..2^24 (method.args.levels)"),
        ({"scope": "row"}, "scope row, allowed tensor, layer, whole (method.args.scope)"),
        ({"shift": -1.0}, "shift -1.0, allowed >= 0 and finite (method.args.shift)"),
        ({"shift": 0.0, "scale": 0.0}, "shift 0.0 and scale 0.0: need one above 0 (method.args.shift)"),
        ({"ratio": 0.0}, "ratio 0.0, allowed > 0 and finite, or bandwidth > 0 (method.args.ratio)"),
        ({"bandwidth": -5.0}, "bandwidth -5.0, allowed >= 0 and finite (method.args.bandwidth)"),
        ({"cohort": 0}, "cohort of 0 clients, allowed >= 1 (method.args.cohort)"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fedpaq.make(mlp_family(ONE), sgd(), **{"cohort": 2, **args})
