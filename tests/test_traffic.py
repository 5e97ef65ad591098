"""What else is coded: statistics and a method's second tree, by an option; and what people see of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import bits
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, heterofl, ifca, scaffold
from hetfl_jax.models.costs import costs
from hetfl_jax.models.windows import flat
from hetfl_jax.parts import codec
from hetfl_jax.parts.compose import Slots
from hetfl_jax.results import tables
from hetfl_jax.run import ledger
from tests.contract import EXECUTORS, play
from tests.helpers import mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow


def uplink(family, name="qsgd", **args):
    args = {"levels": 7} | args if name == "qsgd" else args
    return Slots(uplink=codec.make(name, family, **args))


def of_scaffold(family, rounds=2, how="bucketed", **args):
    slots = uplink(family, **args) if args else None
    algorithm = scaffold.make(family, sgd(momentum=0.0), cohort=5, clients=12, slots=slots)
    return (algorithm, *play(algorithm, executor(how), toy_population(), rounds)[:2])


def test_the_second_tree_of_scaffold_is_coded_where_asked():
    family = mlp_family()
    wanted = of_scaffold(family, 1)[1].server
    plainly, fine = (of_scaffold(family, 1, levels=2**22, extra=extra) for extra in (False, True))
    assert worst(fine[1].server.slot, wanted.slot) < 1e-5
    assert worst(plainly[1].server.variables, wanted.variables) < 1e-5
    whole = 8 * costs(family).bytes
    for (algorithm, _, infos), extra in ((plainly, False), (fine, True)):
        coded = algorithm.price().up - (0 if extra else whole)
        np.testing.assert_array_equal(coded, (2 if extra else 1) * fedavg_bits(family, levels=2**22))
        items = infos[0].items
        np.testing.assert_array_equal(bits.total(items.seen.up), algorithm.price().up[items.level])
        np.testing.assert_array_equal(algorithm.price().plain[1], 2 * whole)


def fedavg_bits(family, **args):
    return fedavg.make(family, sgd(), cohort=5, slots=uplink(family, **args)).price().up


def test_error_feedback_of_the_second_tree_has_a_memory_of_its_own():
    """What was sent of the variates' changes and what is kept make up the clients' variates."""
    family = mlp_family()
    _, state, _ = of_scaffold(family, rounds=3, name="top_k", fraction=0.3, error_feedback=True, extra=True)
    assert {"error", "extra_error", "variate"} <= set(state.memory)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.memory["extra_error"])) > 1e-3
    kept = jax.tree.map(lambda v, e: (v - e).sum(0) / 12, state.memory["variate"], state.memory["extra_error"])
    assert worst(state.server.slot, kept["params"]) < 1e-5


def test_statistics_are_coded_where_asked_masked_as_dense():
    family, pop = mlp_family(norm="bn_tracked"), toy_population()
    slots = uplink(family, levels=7, statistics=True, error_feedback=True)
    algorithm = fedavg.make(family, sgd(), cohort=5, slots=slots)
    state, infos, _ = play(algorithm, executor("bucketed"), pop, 2)
    masked, _, _ = play(algorithm, executor(*EXECUTORS["vmapped"]), pop, 2)
    assert worst(state, masked) < 1e-4
    assert set(state.memory) == {"error", "batch_stats_error"}
    assert list(state.memory["batch_stats_error"]) == ["batch_stats"]
    numbers = [sum(leaf.size for leaf in jax.tree.leaves(shapes["batch_stats"])) for shapes in family.shapes]
    leaves = len(jax.tree.leaves(family.shapes[0]["batch_stats"]))
    coded = algorithm.price().up - fedavg_bits_of_params(family)
    np.testing.assert_array_equal(coded, 4 * np.array(numbers) + 32 * leaves)
    items = infos[0].items
    np.testing.assert_array_equal(bits.total(items.seen.up), algorithm.price().up[items.level])
    plainly = fedavg.make(family, sgd(), cohort=5, slots=uplink(family)).price().up
    np.testing.assert_array_equal(plainly - fedavg_bits_of_params(family), 32 * np.array(numbers))


def test_low_rank_keeps_thin_factors_whole_at_every_level_masked_as_dense():
    """Of a leaf [m, n] r rows of n numbers, also of the second tree; not the leaf's own shape."""
    family = mlp_family()
    arguments = {"name": "low_rank", "rank": 1, "extra": True}
    _, state, _ = of_scaffold(family, **arguments, error_feedback=True)
    _, masked, _ = of_scaffold(family, **arguments, error_feedback=True, how=EXECUTORS["vmapped"][0])
    assert worst(state, masked) < 1e-4
    assert {"factor", "extra_factor", "extra_error"} <= set(state.memory)
    full = {path[1:]: leaf.shape for path, leaf in flat(family.shapes[0]).items()}
    for name in ("factor", "extra_factor"):
        found = {path[1:]: leaf.shape for path, leaf in flat(state.memory[name]).items()}
        assert found
        assert found == {path: (12, 1, full[path][-1]) for path in found}


def fedavg_bits_of_params(family):
    return np.asarray(codec.message.bits(family, codec.qsgd(family, 7)))


def test_the_ratio_to_float32_is_that_of_the_messages():
    family, pop = mlp_family(), toy_population()
    slots = uplink(family)._replace(downlink=codec.make("uniform", family, bits=8))
    algorithm = fedavg.make(family, sgd(), cohort=5, slots=slots)
    _, infos, _ = play(algorithm, executor("bucketed"), pop, 1)
    price, price_list = algorithm.price(), costs(family)
    totals = ledger.spent(infos[0], price_list, plain=price.plain)
    level = infos[0].items.level
    whole = int(8 * price_list.bytes[level].sum())
    assert (totals.plain_down_bits, totals.plain_up_bits) == (whole, whole)
    assert totals.line()["up_ratio"] == price.up[level].sum() / whole
    assert totals.line()["down_ratio"] == price.down[level].sum() / whole
    plainly = fedavg.make(family, sgd(), cohort=5)
    _, infos, _ = play(plainly, executor("bucketed"), pop, 1)
    assert not ledger.spent(infos[0], price_list, plain=plainly.price().plain).ratios()
    old = {"down_bits": 64, "up_bits": 8, "client_macs": 1, "full_size_bits": 64}
    assert not ledger.saved(old).ratios()
    down, up = ifca.make(family, sgd(), cohort=4, clusters=2).price().plain
    np.testing.assert_array_equal((down, up), (16 * price_list.bytes, 8 * price_list.bytes))


def test_the_table_shows_the_ratio():
    line = {"round": 0, "accuracy": {"a": 0.5}, "down_bytes": 8, "up_bytes": 1, "up_ratio": 0.125, "client_macs": 1,
            "full_size_bytes": 8}  # fmt: skip
    summary = tables.totals([line, line | {"round": 1}], 1, "")
    assert summary["up_ratio"] == 0.125
    row = {"level": "a", "width": None, "depth": None, "start": 0.1, "last": 0.5, "best": 0.5, "local": None,
           "shares": [], "parameters": 2, "macs": 1, "bytes": 8}  # fmt: skip
    text = tables.render([row], summary)
    assert "up 0.00 MB (0.125 of float32)" in text
    assert "down 0.00 MB, up" in text


def test_what_a_client_keeps_outside_its_level_stays():
    family = mlp_family()
    slots = uplink(family, "top_k", fraction=0.1, error_feedback=True)
    make = lambda: heterofl.make(family, sgd(), cohort=12, proportions=(1, 1), slots=slots)  # noqa: E731
    with pytest.warns(UserWarning, match="stays until it has it again") as told:
        algorithm = make()
    assert len(told) == 1
    states = [play(algorithm, executor("bucketed"), toy_population(), n)[0] for n in (1, 2)]
    infos = play(algorithm, executor("bucketed"), toy_population(), 2)[1]
    before, after = (state.memory["error"]["params"]["dense_0"]["kernel"] for state in states)
    narrow = np.asarray(infos[1].items.ids)[np.asarray(infos[1].items.level) == 1]
    wide = np.asarray(infos[0].items.ids)[np.asarray(infos[0].items.level) == 0]
    both = np.intersect1d(narrow, wide)
    assert both.size
    assert np.abs(before[both][:, :, 4:]).max() > 0
    np.testing.assert_array_equal(before[both][:, :, 4:], after[both][:, :, 4:])
    assert np.abs(before[both][:, :, :4] - after[both][:, :, :4]).max() > 0


def test_what_does_not_fit_is_said_in_one_line():
    family = mlp_family()
    message = "extra true, but this method sends nothing besides the model: need false (uplink.extra)"
    with pytest.raises(ValueError, match=re.escape(message)):
        fedavg.make(family, sgd(), cohort=2, slots=uplink(family, extra=True)).price()
    tracked = mlp_family(norm="bn_tracked")
    with pytest.warns(UserWarning, match="statistics through top_k: a variance may fall below 0"):
        codec.make("top_k", tracked, error_feedback=True, statistics=True, fraction=0.1)
