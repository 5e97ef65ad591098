"""LAG in rounds: what it equals, what it costs, what it refuses, and what people see."""

import re

import jax
import numpy as np
import pytest

from hetfl_jax.core import bits
from hetfl_jax.core.random import INIT, purpose_key
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import lag
from hetfl_jax.models import build, families
from hetfl_jax.models.costs import costs
from hetfl_jax.parts import choose, codec
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import local
from hetfl_jax.run import ledger
from hetfl_jax.run.config import load_config
from hetfl_jax.run.train import train
from tests.contract import EXECUTORS, play
from tests.helpers import conv_family, exits_family, mlp_family, sgd, worst

pytestmark = pytest.mark.slow
CLIENTS, EACH, FEATURES, RATE, ROUNDS = 12, 4, 6, 0.02, 12


def people(scale=1.0):
    """Twelve workers of four examples, the last of much larger smoothness."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(CLIENTS * EACH, FEATURES)).astype(np.float32)
    x[-EACH:] *= scale
    return population(x, rng.integers(0, 3, len(x)), np.arange(len(x)), np.full(CLIENTS, EACH), classes=3)


def linear():
    return families.family(build("linear", classes=3), [{}], np.zeros((1, FEATURES), np.float32))


def full(**changes):
    return local(**{"learning_rate": RATE, "batch_size": EACH, "full_batch": True} | changes)


def run(rounds=ROUNDS, settings=None, pop=None, how="bucketed_each", family=None, **args):
    args = {"clients": CLIENTS, "window": 4} | args
    algorithm = lag.make(family or linear(), settings or full(), **args)
    return play(algorithm, executor(*EXECUTORS[how]), pop or people(), rounds=rounds)


def sent(infos):
    return np.stack([(info.items.seen.up > 0).any(-1) for info in infos])


@pytest.fixture(scope="module")
def descent():
    return run(rule="gd")


def test_a_threshold_of_zero_is_gradient_descent(descent):
    state, infos, _ = run(xi=0.0)
    wanted, all_sent, _ = descent
    assert worst(state.server.variables, wanted.server.variables) < 1e-6
    assert sent(all_sent).all()
    losses = [float(info.numbers["objective"]) for info in all_sent]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose([info.numbers["objective"] for info in infos], losses, rtol=1e-5)


def test_gradient_descent_is_that_of_the_sum(descent):
    """Against one loop over all examples at once; l2 counts once for every worker."""
    pop, l2 = people(), 0.3
    state, infos, _ = run(rule="gd", l2=l2)
    fam = linear()
    start = purpose_key(jax.random.key(7), INIT)
    params = lag.make(fam, full(), clients=CLIENTS).init(start)[0].variables["params"]

    def total(p):
        log_p = jax.nn.log_softmax(pop.x @ p["head"]["kernel"] + p["head"]["bias"])
        squares = sum((v**2).sum() for v in jax.tree.leaves(p))
        return -log_p[np.arange(len(pop.y)), pop.y].sum() + CLIENTS * l2 / 2 * squares

    for info in infos:
        np.testing.assert_allclose(info.numbers["objective"], total(params), rtol=1e-5)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(total)(params))
    assert worst(state.server.variables["params"], params) < 1e-5


def test_who_does_not_send_costs_no_bits_upwards():
    pop = people(scale=3.0)
    state, infos, _ = run(pop=pop, rounds=20, settings=full(learning_rate=0.005))
    masks, price = sent(infos), costs(linear())
    assert masks[0].all()
    assert 0 < masks[1:].sum() < 0.7 * masks[1:].size
    assert masks[1:, -1].sum() > masks[1:, :-1].sum(0).mean(), "the roughest worker sends more often than the others do"
    for mask, info in zip(masks, infos):
        up = bits.total(info.items.seen.up)
        np.testing.assert_array_equal(up, np.where(mask, 8 * price.bytes[0], 0))
        np.testing.assert_array_equal(bits.total(info.items.seen.down), 8 * price.bytes[0])
        assert info.numbers["uploads"] == mask.sum()
        assert ledger.spent(info, price).up_bits == mask.sum() * 8 * price.bytes[0]
    assert np.isfinite(state.server.variables["params"]["head"]["kernel"]).all()


@pytest.mark.parametrize("rule", ["ps", "cyclic_iag"])
def test_who_is_not_asked_hears_and_computes_nothing(rule):
    smooth = tuple(np.full(CLIENTS, 8.0))
    _, infos, _ = run(rule=rule, smoothness=smooth, how="sharded8")
    masks = sent(infos)
    assert masks[0].all()
    if rule == "cyclic_iag":
        np.testing.assert_array_equal(masks[1:].argmax(1), np.arange(1, ROUNDS) % CLIENTS)
        assert (masks[1:].sum(1) == 1).all()
    else:
        assert 0 < masks[1:].sum() < masks[1:].size
    for mask, info in zip(masks, infos):
        np.testing.assert_array_equal(bits.total(info.items.seen.down) > 0, mask)
        np.testing.assert_array_equal(info.items.seen.work.sum((1, 2)), 2 * EACH * mask)
        assert info.items.seen.tally.examples.sum() == CLIENTS * EACH, "the loss is known of all"


def test_a_batch_of_all_examples_is_the_whole_gradient():
    """The extension for mini-batches, where the batch is everything: what it compares is what LAG-WK compares."""
    wanted, infos, _ = run()
    settings = local(learning_rate=RATE, batch_size=EACH, steps=1)
    state, again, _ = run(settings=settings, extension="same_batch")
    np.testing.assert_array_equal(sent(again), sent(infos))
    assert worst(state.server.variables, wanted.server.variables) < 1e-5
    assert (again[1].items.seen.work == 2 * infos[1].items.seen.work).all()


def test_mini_batches_are_compared_on_the_same_examples():
    """With noise the plain rule would make every worker upload; on one batch at both points few have to."""
    settings = local(learning_rate=0.005, batch_size=2, steps=1)
    _, infos, _ = run(settings=settings, extension="same_batch", rounds=20)
    assert 0 < sent(infos)[1:].mean() < 0.7


def test_one_local_step_on_the_mean_is_a_gradient():
    """The extension for local steps: with equal sizes and the rate times M n_k it is LAG-WK; else it runs any net."""
    wanted, infos, _ = run()
    settings = full(learning_rate=RATE * CLIENTS * EACH)
    state, again, _ = run(settings=settings, extension="local_steps")
    np.testing.assert_array_equal(sent(again), sent(infos))
    assert worst(state.server.variables, wanted.server.variables) < 1e-5
    deep = families.family(build("mlp", hidden=(5,), classes=3), [{}], np.zeros((1, FEATURES), np.float32))
    settings = local(learning_rate=0.05, batch_size=2, epochs=3, shuffle=False)
    _, lazy, _ = run(family=deep, settings=settings, extension="local_steps", rounds=20)
    assert 0 < sent(lazy)[1:].mean() < 1


BAD = [
    ({"rule": "pk"}, {}, "rule 'pk' is not one of wk, ps, gd, cyclic_iag, num_iag (method.args.rule)"),
    ({"extension": "more"}, {}, "extension 'more' is not one of none, same_batch, local_steps (method.args.extension)"),
    ({"xi": -0.5}, {}, "xi -0.5, allowed >= 0, or -1 for the paper's (method.args.xi)"),
    ({"l2": -1.0}, {}, "l2 -1.0, allowed >= 0 (method.args.l2)"),
    ({"window": 0}, {}, "window of 0 steps, allowed >= 1 (method.args.window)"),
    ({"server_learning_rate": -1.0}, {}, "server learning rate -1.0, allowed > 0 (method.args.server_learning_rate)"),
    ({"rule": "ps"}, {}, "no smoothness: need one number for each of 12 clients (method.args.smoothness)"),
    ({"rule": "ps", "smoothness": (1.0,)}, {}, "1 numbers for 12 clients: need one > 0 each (method.args.smoothness)"),
    ({"rule": "gd", "lc_start": True}, {}, "lc_start with rule 'gd': need wk or ps (method.args.lc_start)"),
    ({"rule": "ps", "extension": "local_steps"}, {}, "extension 'local_steps' with rule 'ps': need wk"),
    ({"settings": full(full_batch=False)}, {}, "lag with mini-batches, whose noise makes every worker upload: need"),
    ({"settings": full(epochs=2)}, {}, "lag sends gradients: need one local step of sgd without momentum"),
    ({"settings": full(momentum=0.9)}, {}, "lag sends gradients: need one local step of sgd without momentum"),
    ({"settings": full(full_batch=False), "extension": "same_batch"}, {}, "compares one mini-batch a round: need"),
    ({"settings": sgd(), "extension": "local_steps"}, {}, "with other steps every round: need train.shuffle=False"),
    ({"family": lambda: exits_family(({"depth": 2},))}, {}, "lag with net MLP, which is not linear in its parameters"),
    ({"family": mlp_family}, {}, "lag with 2 levels: need one, gradients are of the whole model (family.mix)"),
    ({"family": lambda: conv_family(({},), norm="bn_tracked")}, {}, "lag with batch statistics, which would travel"),
    ({}, {"select": choose.weighted(2)}, "lag fixes its select itself: select.name must be none (select.name)"),
    ({}, {"uplink": codec.signs(linear())}, "lag fixes its uplink itself: uplink.name must be none (uplink.name)"),
    ({"rule": "ps", "smoothness": tuple(np.ones(CLIENTS))}, {"downlink": codec.signs(linear())},
     "lag fixes its downlink itself: downlink.name must be none (downlink.name)"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "slots", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_said_in_one_line(args, slots, message):
    args = dict(args)
    family, settings = args.pop("family", linear)(), args.pop("settings", full())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        lag.make(family, settings, clients=CLIENTS, slots=Slots(**slots), **args)
    assert "\n" not in str(caught.value)


def test_a_run_finds_the_smoothness_and_draws_who_sent(tmp_path):
    changes = [
        "method.name=lag", "method.args.rule=ps", "family.net=linear", "family.norm=none", "family.scaler=False",
        "train.rounds=6", "train.epochs=1", "train.full_batch=True", "train.batch_size=1000", "train.momentum=0.0",
        "train.clip_norm=0.0", "train.weight_decay=0.0", "train.learning_rate=0.00005", f"run.folder={tmp_path}",
        "run.eval_every=6", "run.checkpoint_every=6",
    ]  # fmt: skip
    config = load_config("heterofl_digits:mix=a1,quick", *changes, tell=lambda text: None)
    result = train(config, quiet=True)
    assert (result.folder / "uploads.png").stat().st_size > 0
    uploads = result.metrics["uploads"][1:]
    assert uploads[0] == 10
    assert uploads.min() < 10
    assert "clients that uploaded in round 6" in result.summary["sentence"]
