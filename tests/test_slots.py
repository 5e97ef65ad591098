"""What a slot may do: each contract with a method that needs it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import bits
from hetfl_jax.core.absent import HIGHEST
from hetfl_jax.core.random import CLIENT, purpose_key
from hetfl_jax.core.types import Cohort, Shard
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import depthfl, fedavg, feddyn, ifca, inclusivefl, qffl
from hetfl_jax.models.costs import costs
from hetfl_jax.models.families import view
from hetfl_jax.parts import choose, codec, drift, fair, merge, objective, select, server
from hetfl_jax.parts.compose import Slots, compose
from hetfl_jax.parts.select import Select
from hetfl_jax.run import ledger
from tests.contract import EXECUTORS, play, visits
from tests.helpers import context, exits_family, mlp_family, sgd, toy_population, worst

pytestmark = pytest.mark.slow

POW = Slots(select=choose.power_of_choice(2, 6), clients=12)


def losses_of(algorithm, state, population, level_of):
    """Mean loss of every client's own model on its own data, by hand."""
    found = []
    for client in range(12):
        rows = population.rows[population.offset[client] :][: int(population.size[client])]
        level = int(level_of(client))
        logits = algorithm.predict(algorithm.model(state, level), level, population.x[rows])[-1]
        found.append(float(objective.mean_cross_entropy(logits, population.y[rows], jnp.ones(len(rows), bool))))
    return np.array(found)


@pytest.mark.parametrize("inside", ["fedavg", "inclusivefl"])
def test_a_selection_asks_every_client_at_its_own_level(inside):
    """Power-of-Choice takes the two of its six candidates with the largest loss; what asking cost is counted."""
    population = toy_population()
    if inside == "fedavg":
        family = mlp_family()
        algorithm = fedavg.make(family, sgd(), cohort=2, slots=POW)
    else:
        family = exits_family(({"depth": 3}, {"depth": 2}), hidden=(8, 8, 8))
        algorithm = inclusivefl.make(family, sgd(), cohort=2, slots=POW)
    before = play(algorithm, executor("bucketed"), population, rounds=1)[0]
    _, infos, _ = play(algorithm, executor(*EXECUTORS["sharded8"]), population, rounds=2)
    asked, chosen = infos[1].asked, infos[1].items.ids.tolist()
    loss = losses_of(algorithm, before.server, population, lambda c: population.level[c])
    candidates = asked.ids[asked.valid]
    assert set(chosen) == set(candidates[np.argsort(-loss[candidates])[:2]].tolist())
    assert not infos[0].asked.valid.any(), "the first cohort is drawn without a score"
    price = costs(family)
    spent, items = ledger.spent(infos[1], price), infos[1].items
    levels = np.asarray(population.level)
    sizes = np.asarray(population.size)
    assert spent.down_bits == 8 * sum(int(price.bytes[levels[i]]) for i in candidates), "the chosen have the model"
    assert spent.up_bits == 8 * sum(int(price.bytes[levels[i]]) for i in chosen) + 32 * len(candidates)
    forward = sum(int(sizes[i] * price.macs[levels[i]]) for i in candidates)
    assert spent.client_macs == forward + sum(int(3 * 2 * sizes[i] * price.macs[levels[i]]) for i in chosen)
    assert items.seen.work[:, 1].sum() == 2 * sizes[chosen].sum()


def test_a_selection_inside_ifca_sees_the_server_once():
    """Its table is one for all members, also for those that nobody chose."""

    @chex.assert_max_traces(n=1)
    def choose_most(key, round, state, population, ask):
        table = ask(jnp.arange(12)).loss
        return Cohort(jax.lax.top_k(table, 4)[1], jnp.ones(4, bool)), state + 1

    counting = Select(lambda clients: jnp.int32(0), choose_most)
    algorithm = ifca.make(mlp_family(), sgd(), cohort=4, clusters=2, slots=Slots(select=counting, clients=12))
    state, _, compilations = play(algorithm, executor("bucketed"), toy_population())
    assert state.server.members.select.tolist() == [3, 3]
    assert compilations == [1, 1, 1]


def test_a_selection_remembers_what_it_saw():
    rule = Slots(select=choose.power_of_choice(3, 6, kind="rpow"), clients=12)
    state, infos, _ = play(
        fedavg.make(mlp_family(), sgd(), cohort=3, slots=rule), executor("bucketed"), toy_population()
    )
    wanted = np.full(12, HIGHEST)
    for info in infos:
        wanted[info.items.ids] = info.items.seen.tally.loss / info.items.seen.tally.examples
    np.testing.assert_allclose(state.server.select, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="needs the number of clients"):
        fedavg.make(mlp_family(), sgd(), cohort=3, slots=rule._replace(clients=0)).init(jax.random.key(0))


def test_a_client_comes_twice_with_streams_tickets_and_rows_of_its_own():
    base = visits(mlp_family(), sgd(), cohort=2)

    def twice(rows, stream):
        def plan(*args):
            ids = jnp.array([3, 3])
            return base.plan(*args)._replace(ids=ids, level=ids * 0, row=rows, stream=stream, ticket=jnp.array([5, 6]))

        def client(told):
            reply = base.client(told)
            return reply._replace(report=reply.report._replace(up=reply.report.up * 0 + told.ticket))

        return base._replace(plan=plan, client=client, memory_rows=2)

    run, pop = executor("bucketed"), toy_population()
    state, infos, _ = play(twice(jnp.array([6, 7]), jnp.array([0, 1])), run, pop, rounds=1)
    kernel = state.memory["seen"]["params"]["dense_0"]["kernel"]
    assert kernel.shape[0] == 12, "play cuts the rows of two memories a client to twelve"
    assert np.abs(kernel[6] - kernel[7]).max() > 0, "other streams, other batches"
    assert not kernel[:6].any()
    assert not kernel[8:].any()
    assert infos[0].items.seen.up[:, 0].tolist() == [5, 6]
    state, infos, _ = play(twice(jnp.array([6, 7]), 0), run, pop, rounds=1)
    kernel = state.memory["seen"]["params"]["dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel[6], kernel[7])
    for rows, refused in ((jnp.array([6, 6]), 1), (jnp.array([6, 7]), 0), (None, 1)):
        _, infos, _ = play(twice(rows, 0), run, pop, rounds=1)
        assert infos[0].refused == refused


def test_a_selection_that_repeats_is_refused_where_clients_keep_memory():
    rule = Slots(select=choose.random_with_replacement(4))
    with pytest.raises(ValueError, match="may come twice, with client memory sum"):
        feddyn.make(mlp_family(), sgd(), cohort=4, clients_per_level=(6, 6), slots=rule).init(jax.random.key(0))
    _, infos, _ = play(fedavg.make(mlp_family(), sgd(), cohort=4, slots=rule), executor("bucketed"), toy_population())
    assert not any(info.refused for info in infos)


def test_clients_that_do_not_exist_are_left_out_and_counted():
    some = select.stateless(lambda key, population: Cohort(jnp.array([99, 2, -1]), jnp.ones(3, bool)))
    algorithm = fedavg.make(mlp_family(), sgd(), cohort=3, slots=Slots(select=some))
    state, infos, _ = play(algorithm, executor("bucketed"), toy_population(), rounds=1)
    assert (infos[0].refused, infos[0].numbers["clients"]) == (2, 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def two_levels():
    """The mean loss of the client's own level and of the smallest one inside it, half of the work each."""

    def loss(forward, batch, told):
        wide, _, stats = forward(batch.x)
        narrow, _, _ = forward(batch.x, level=1)
        values = [objective.mean_cross_entropy(z[-1], batch.labels, batch.valid) for z in (wide, narrow)]
        count = batch.valid.sum()
        own = jax.nn.one_hot(told.level if isinstance(told.level, int) else told.level.level, 2, dtype=jnp.int32)
        work = jnp.stack([(own + jnp.array([0, 1])) * count] * 2)
        hits = (wide[-1].argmax(-1) == batch.labels) & batch.valid
        return sum(values) / 2, objective.Aux(stats, hits.sum(), count, work)

    return objective.Objective(loss, work_levels=2)


def test_an_objective_runs_the_net_at_two_levels():
    family = mlp_family()
    algorithm = compose(family, local=sgd(), select=select.uniform(4), objective=two_levels())
    dense, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    masked, _, _ = play(algorithm, executor("vmapped"), toy_population())
    assert worst(dense, masked) < 1e-5
    items = infos[0].items
    sizes = np.asarray(toy_population().size)[items.ids]
    np.testing.assert_array_equal(items.seen.work[:, 0].sum(1), 2 * 2 * sizes)
    np.testing.assert_array_equal(items.seen.work[:, 1, 1], np.where(items.level == 1, 4, 2) * sizes)
    plainly, _, _ = play(compose(family, local=sgd(), select=select.uniform(4)), executor("bucketed"), toy_population())
    assert worst(dense.server, plainly.server) > 1e-3


@pytest.mark.parametrize("name", ["qsgd", "top_k"])
def test_a_codec_stands_between_change_and_merge(name):
    """Masked and dense agree, bits are those of the client's level, and the server's model is another one."""
    family = mlp_family()
    args = {"levels": 4} if name == "qsgd" else {"fraction": 0.3}
    rule = Slots(uplink=codec.make(name, family, error_feedback=True, **args))
    algorithm = fedavg.make(family, sgd(), cohort=5, slots=rule)
    dense, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    masked, _, _ = play(algorithm, executor("vmapped"), toy_population())
    assert worst(dense, masked) < 1e-5
    plainly, _, _ = play(fedavg.make(family, sgd(), cohort=5), executor("bucketed"), toy_population())
    assert worst(dense.server.variables, plainly.server.variables) > 1e-3
    items, price = infos[0].items, algorithm.price()
    np.testing.assert_array_equal(bits.total(items.seen.up), price.up[items.level])
    np.testing.assert_array_equal(bits.total(items.seen.down), 8 * costs(family).bytes[items.level])
    assert (price.up < price.down).all()


def test_a_downlink_sends_what_changed_since():
    """A codec that changes nothing is no codec; with four levels clients get another model than the server has."""
    family = mlp_family()
    plainly, _, _ = play(fedavg.make(family, sgd(), cohort=5), executor("bucketed"), toy_population())
    same = Slots(downlink=codec.make("top_k", family, error_feedback=True, fraction=1.0))
    found, _, _ = play(fedavg.make(family, sgd(), cohort=5, slots=same), executor("bucketed"), toy_population())
    assert worst(found.server.variables, plainly.server.variables) < 1e-6
    coarse = Slots(downlink=codec.make("qsgd", family, levels=4))
    algorithm = fedavg.make(family, sgd(), cohort=5, slots=coarse)
    found, infos, _ = play(algorithm, executor("bucketed"), toy_population())
    assert worst(found.server.downlink.params, found.server.variables["params"]) > 1e-4
    items = infos[1].items
    np.testing.assert_array_equal(bits.total(items.seen.down), algorithm.price().down[items.level])


def test_weights_of_a_merge_are_those_of_q_ffl():
    """One round against the equations, from the losses of the received model and the changes of each client."""
    family, pop = mlp_family(({"width": 1.0},)), toy_population(levels=1)
    pop = pop._replace(level=pop.level * 0)
    everyone = Slots(select=select.uniform(12))
    settings = sgd(momentum=0.0, clip_norm=0.0)
    algorithm = qffl.make(family, settings, cohort=12, q=2.0, slots=everyone)
    plainly = fedavg.make(family, settings, cohort=12, slots=everyone)
    start = algorithm.init(jax.random.key(0))[0]
    loss = losses_of(algorithm, start, pop, lambda c: 0)
    run, sent = executor("bucketed"), plainly.send(start, jnp.int32(0))

    @jax.jit
    def change(client):
        """As the round of ``play`` makes it, whose replies are weighed by examples."""
        key = jax.random.fold_in(purpose_key(jax.random.key(7), CLIENT, 0), client)
        shard = Shard(pop.x, pop.y, pop.rows, pop.offset[client], pop.size[client], pop.classes[client])
        total = plainly.client(context(0, shard, key=key, sent=sent)).total
        return jax.tree.map(lambda d: d / total.weight.sum(), total.delta)

    changes = [change(client) for client in range(12)]
    above, below = zip(
        *(fair.numerator_and_denominator(f, fair.squared_norm(d) / 0.01, 2.0, 0.1) for f, d in zip(loss, changes))
    )
    wanted = jax.tree.map(lambda *d: sum(a * v for a, v in zip(above, d)) / sum(below), *changes)
    found = play(algorithm._replace(init=lambda key: (start, {})), run, pop, rounds=1)[0].server.variables
    assert worst(jax.tree.map(jnp.subtract, found, start.variables), wanted) < 1e-5
    mean = qffl.make(family, settings, cohort=12, q=0.0, slots=everyone)
    unweighted = jax.tree.map(lambda *d: sum(d) / 12, *changes)
    found = play(mean._replace(init=lambda key: mean.init(jax.random.key(0))), run, pop, rounds=1)[0].server.variables
    assert worst(jax.tree.map(jnp.subtract, found, start.variables), unweighted) < 1e-6
    with pytest.raises(ValueError, match=r"q -1, allowed >= 0 \(method.args.q\)"):
        qffl.make(family, settings, cohort=2, q=-1)


@pytest.mark.parametrize("how", ["bucketed_each", "vmapped", "sharded8"])
def test_scalars_and_vectors_in_memory_and_context_are_kept_whole(how):
    family = mlp_family()

    def update(after, told, steps):
        counted = told.memory["visits"] + told.sent.context["step"].astype(jnp.float32)
        return {**told.memory, "visits": counted, "row": told.memory["row"].at[1].add(1.0)}, {}

    counting = drift.none()._replace(init=lambda params: {"visits": jnp.float32(0), "row": jnp.zeros(3)}, update=update)
    plain = server.optimizer()
    telling = plain._replace(context=lambda slot: {"step": jnp.int32(2)})
    algorithm = compose(family, local=sgd(), select=select.uniform(5), drift=counting, server=telling)
    state, infos, _ = play(algorithm, executor(*EXECUTORS[how]), toy_population())
    visits = np.bincount(np.concatenate([info.items.ids for info in infos]), minlength=12)
    np.testing.assert_array_equal(state.memory["visits"], 2 * visits)
    np.testing.assert_array_equal(state.memory["row"], visits[:, None] * np.array([0, 1, 0]))


@pytest.mark.parametrize("how", ["bucketed_each", "vmapped"])
def test_leaves_that_the_loss_does_not_reach_come_back_bit_for_bit(how):
    """DepthFL with one exit trained, under weight decay, kept momentum and FedDyn: the deep client's first exit."""
    family = exits_family(({"depth": 2}, {"depth": 1}))
    settings = sgd(weight_decay=0.1, keep_momentum=True)
    algorithm = depthfl.make(family, settings, cohort=6, clients_per_level=(12, 0), train_all=False)
    pop = toy_population()
    pop = pop._replace(level=pop.level * 0)
    state, _, _ = play(algorithm, executor(*EXECUTORS[how]), pop, rounds=1)
    rerun = play(algorithm, executor(*EXECUTORS[how]), pop, rounds=2)[0]
    first = jax.device_get(play(algorithm, executor("bucketed"), pop, rounds=1)[0]).server.variables["params"]
    np.testing.assert_array_equal(first["head_0"]["kernel"], rerun.server.variables["params"]["head_0"]["kernel"])
    assert worst(first["head_1"], rerun.server.variables["params"]["head_1"]) > 1e-4
    for name in ("sum", "momentum"):
        assert not any(leaf.any() for leaf in jax.tree.leaves(rerun.memory[name]["params"]["head_0"])), name
        assert any(leaf.any() for leaf in jax.tree.leaves(rerun.memory[name]["params"]["head_1"])), name
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.memory["sum"]["params"]["head_0"]))


def test_frozen_layers_come_back_bit_for_bit_under_weight_decay():
    rule = compose(
        mlp_family(), local=sgd(weight_decay=0.1), select=select.uniform(5), drift=drift.frozen(["dense_0"])
    )  # fmt: skip
    one, three = (play(rule, executor("bucketed"), toy_population(), rounds=n)[0].server.variables for n in (1, 3))
    chex.assert_trees_all_equal(one["params"]["dense_0"], three["params"]["dense_0"])
    assert worst(one["params"]["head"], three["params"]["head"]) > 1e-3


def test_entries_outside_a_level_stay_without_decay():
    """A round of small clients alone leaves what is outside their window as it was, whatever the decay."""
    pop = toy_population()
    pop = pop._replace(level=pop.level * 0 + 1)
    rule = fedavg.make(mlp_family(), sgd(weight_decay=0.5), cohort=5)
    one, three = (play(rule, executor("vmapped"), pop, rounds=n)[0].server.variables["params"] for n in (1, 3))
    np.testing.assert_array_equal(one["dense_0"]["kernel"][:, 4:], three["dense_0"]["kernel"][:, 4:])
    assert worst(one["dense_0"]["kernel"][:, :4], three["dense_0"]["kernel"][:, :4]) > 1e-3


def test_a_ledger_sums_beyond_what_32_bits_hold():
    one = bits.digits(np.array([2**44, 2**33 + 1, 7]))
    assert int(bits.total(one).sum()) == 2**44 + 2**33 + 8
    assert bits.total(np.asarray(bits.traced(jnp.int32(2**31 - 1)))) == 2**31 - 1
    with pytest.raises(ValueError, match="allowed 0..2\\^45 - 1"):
        bits.digits(-1)


def test_a_view_knows_of_no_leaf_that_is_not_the_familys():
    family = mlp_family()
    small = view(family, {"params": family.nets[0].init(jax.random.key(0), jnp.zeros((1, 6)))["params"]}, 1)
    kept = small.cut({"params": small.variables["params"], "count": jnp.int32(4)})
    assert int(kept["count"]) == 4
    assert kept["params"]["dense_0"]["kernel"].shape == (6, 4)


def test_weights_by_examples_and_by_count():
    family = mlp_family()
    delta = jax.tree.map(lambda s: jnp.ones(s.shape), family.shapes[0])
    shard = toy_population()
    told = context(0, type("S", (), {"size": jnp.int32(7), "classes": shard.classes[0]})())
    rules = [merge.overlap_mean(family, by_examples=how) for how in (True, False)]
    assert [float(rule.lift(delta, told).weight[0]) for rule in rules] == [7, 1]
