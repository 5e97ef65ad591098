"""Runs whose seeds change how much data there is share programs, and give what they give alone."""

import jax
import numpy as np
import pytest

from hetfl_jax import load_config
from hetfl_jax.results.folder import leaves
from hetfl_jax.run import room
from hetfl_jax.run.federation import build
from hetfl_jax.run.lab import evaluate_tiers, prepare
from hetfl_jax.run.programs import Shared

SEEDS = range(4)


def config(seed, *changes):
    small = ("data.clients=12", "method.args.cohort=4", "select.args.candidates=8", "family.hidden=(8,)")
    return load_config("loss_and_data", *small, "train.steps=2", "train.devices=1", f"run.seed={seed}", *changes)


def played(lab, rounds=2):
    """Scores after some rounds, and what they cost."""
    state, lines = lab.start(), []
    for _ in range(rounds):
        state, info = lab.step(state, lab.population, lab.key)
        lines.append(jax.device_get((info.items.ids, info.items.seen, info.numbers)))
    return leaves(evaluate_tiers(lab, state)), lines


def test_seeds_of_other_data_share_programs_and_give_what_they_give_alone():
    shared = Shared()
    labs = sorted((prepare(config(seed)) for seed in SEEDS), key=lambda lab: -lab.population.x.shape[0])
    assert len({lab.population.x.shape for lab in labs}) == len(SEEDS), "every seed has other data"
    for alone in labs:  # the one with most data first: the others fit in
        beside = prepare(alone.config, shared=shared)
        wanted, lines = played(alone)
        found, others = played(beside)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, abs=1e-5), name
        for one, other in zip(lines, others):
            np.testing.assert_array_equal(one[0], other[0])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one[1:], other[1:])
    assert shared.count() == 1


def test_who_has_which_level_makes_no_program():
    shared = Shared()
    for order in ("by_data", "shuffled", "against_data"):
        prepare(config(0, f"capacity.order={order}"), shared=shared)
    assert shared.count() == 1


def test_where_an_empty_batch_would_count_lengths_stay():
    """Batch statistics collected before evaluation, a choice of models, and sequences."""
    assert room.needed(build(load_config("heterofl_digits:quick"))) is None
    bare = build(load_config("heterofl_digits:quick", "family.norm=none"))
    assert room.needed(bare) is not None
    assert room.needed(build(load_config("heterofl_digits:quick", "family.norm=none", "method.name=ifca"))) is None
    assert room.needed(bare._replace(train=bare.train._replace(y=bare.train.y[:, None]))) is None


def test_added_rows_belong_to_nobody():
    fed = build(config(0))
    needs = room.needed(fed)
    large = room.Room(*(length + 7 for length in needs))
    found = room.placed(fed, large)
    assert room.needed(found) == large
    assert found.train.size.tolist() == fed.train.size.tolist()
    assert int(found.test.size.sum()) == int(fed.test.size.sum())
    own = np.asarray(fed.test.size)[fed.test_batches :]
    np.testing.assert_array_equal(np.asarray(found.test.size)[large.test_batches :], own)
    first, count = fed.train.offset[3], fed.train.size[3]
    np.testing.assert_array_equal(found.train.x[found.train.rows[first : first + count]],
                                  fed.train.x[fed.train.rows[first : first + count]])  # fmt: skip
