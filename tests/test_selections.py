"""Selections as a config names them: every one is made, tried and refused before anything compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Devices, Population, Tally
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import population
from hetfl_jax.run.config import changed, complete, load_config
from hetfl_jax.run.dryrun import describe
from hetfl_jax.run.selections import SELECTIONS, selection_of, sentences
from hetfl_jax.run.train import train
from tests.helpers import mlp_family

FAMILY = mlp_family()
KEY = jax.random.key(0)
WANTED = {
    "power_of_choice": dict(candidates=6),
    "loss_and_data": dict(candidates=9, data=1.0),
    "oort": dict(cap=8),
    "intermittent": dict(of="power_of_choice", candidates=5, kind="rpow"),
    "in_time": dict(of="weighted", limit=9.0),
}


def config(name="none", cohort=3, **args):
    devices = dict(name="lognormal" if name == "in_time" else "none")
    return complete(changed(select=dict(name=name, args=args), devices=devices, method=dict(args=dict(cohort=cohort))))


class Asked:
    """An ``ask`` whose answers depend on the client's id alone."""

    def __call__(self, ids, level=None, examples=0, valid=None):
        return Tally(jnp.sin(5.0 * ids), jnp.zeros(ids.shape), jnp.ones(ids.shape))

    def gradients(self, ids, valid=None, of=None, numbers=0):
        return jax.vmap(of)(jnp.sin(ids[:, None] * jnp.arange(1, 84.0)))


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_takes_distinct_clients_that_have_data(name):
    rule = selection_of(config(name, **WANTED.get(name, {})), FAMILY, 12)
    size = jnp.where(jnp.arange(12) % 4 == 1, 0, 5) if name != "uniform" else jnp.full(12, 5)
    there = Population(None, None, None, None, size, jnp.zeros(12, jnp.int32), None)
    if name == "in_time":
        there = there._replace(devices=Devices(*[jnp.ones(12)] * 3, seconds=jnp.arange(12.0)))
    cohort, _ = jax.jit(lambda: rule.choose(KEY, jnp.int32(0), rule.init(12), there, Asked()))()
    ids = np.asarray(cohort.ids)[np.asarray(cohort.valid)]
    assert len(ids) == 3
    assert (size[ids] > 0).all()
    if not rule.repeats:
        assert len(set(ids.tolist())) == 3
    if name == "intermittent":
        assert (ids < 6).all()
    if name == "in_time":
        assert (ids < 10).all()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("best", {}, "selection 'best' is not one of none, uniform, weighted, random_with_replacement, "
         "power_of_choice, loss_and_data, active, oort, divfl, intermittent, in_time (select.name)"),
        ("uniform", {"kind": 1}, "argument 'kind' is not one of cohort of uniform (select.args)"),
        ("power_of_choice", {}, "argument 'candidates' of power_of_choice is missing (select.args)"),
        ("power_of_choice", {"candidates": 2}, "2 candidates, allowed >= 3, the cohort (select.args.candidates)"),
        ("power_of_choice", {"candidates": 13}, "13 candidates, allowed 3..12 (select.args.candidates)"),
        ("power_of_choice", {"candidates": 6, "kind": "cpow"},
         "0 examples, allowed >= 1 with kind cpow (select.args.examples)"),
        ("weighted", {"cohort": 13}, "cohort of 13 clients, allowed 1..12 (select.args.cohort)"),
        ("divfl", {"cohort": 13}, "cohort of 13 clients, allowed 1..12 (select.args.cohort)"),
        ("intermittent", {}, "intermittent of None, allowed uniform, weighted, random_with_replacement, "
         "power_of_choice, loss_and_data, active, oort, divfl (select.args.of)"),
        ("intermittent", {"of": "weighted", "absent": 1.0}, "absent 1.0, allowed 0 <= a < 1 (select.args.absent)"),
        ("intermittent", {"of": "weighted", "candidates": 4},
         "argument 'candidates' is not one of cohort of weighted (select.args)"),
        ("oort", {"cap": 9, "durations": (1.0,) * 3, "preferred": 1.0},
         "3 durations, allowed 12 (select.args.durations)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_at_the_door(name, args, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        selection_of(config(name, **args), FAMILY, 12)
    assert str(error.value) == message


def test_what_a_selection_needs_is_said():
    oort = selection_of(config("oort", cap=5), FAMILY, 12).needs(10**6)
    assert sentences(oort) == [
        "no client has a speed here, so Oort's term for slow clients is off",
        "needs 24.0 MB at the server for 6 numbers for each of 1,000,000 clients; with less: uniform, which needs none",
    ]
    fast = selection_of(config("oort", cap=5, durations=(1.0,) * 12, preferred=2.0), FAMILY, 12)
    assert sentences(fast.needs(12)) == []
    inner = selection_of(config("intermittent", of="oort", cap=5), FAMILY, 12)
    assert inner.needs(12) == selection_of(config("oort", cap=5), FAMILY, 12).needs(12)
    assert sentences(selection_of(config("uniform"), FAMILY, 12).needs(10**6)) == []
    quick = "qffl_synthetic:quick"
    text = describe(load_config(quick, "select.name=divfl"))
    assert "10 x 610 gradients and their 10 x 10 distances" in text


def test_clients_without_examples_are_refused_with_a_method_that_needs_their_losses(tmp_path):
    x, y = np.zeros((6, 4), np.float32), np.array([0, 1] * 3)
    with pytest.raises(ValueError, match=r"1 clients hold no example \(first: client 1\); need >= 1 each"):
        population(x, y, np.arange(6), np.array([6, 0]))
    given = changed(
        method=dict(name="qffl", args=dict(cohort=1)), family=dict(net="linear"), run=dict(folder=str(tmp_path))
    )
    part = Partition(np.arange(6), np.array([3, 0, 3]))
    with pytest.raises(ValueError, match=r"client 1 has 0 rows in size: need >= 1 for each \(split\)"):
        train(given, data=(x, y, x, y), split=part, quiet=True)
