"""LAG-WK, LAG-PS and gradient descent against the authors' code: iterates, who uploads when, and how often in all."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import State
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import lag
from hetfl_jax.models import families
from hetfl_jax.parts import objective
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import local
from tests.vectors.discover import of_kind, read

pytestmark = [pytest.mark.vectors, pytest.mark.slow]
KIND = "selection/lag_*"


class Linear(nn.Module):
    """``x' theta`` in float64."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, param_dtype=jnp.float64, name="head")(x)


def goal(each):
    """The mean of a loss of (score, label) over a worker's examples; labels are numbers."""
    of_outputs = lambda outputs, labels: each(outputs[:, 0], labels)  # noqa: E731
    value = lambda exits, active, labels, valid, context: (  # noqa: E731
        jnp.where(valid, of_outputs(exits[-1], labels), 0).sum() / valid.sum()
    )
    return objective.of_exits(value, score=objective.RMSE._replace(each=of_outputs), numbers=True)


def problem(z):
    """The file's examples worker by worker, their sizes, and the loss of one of them.

    It is ``log(1 + exp(-y f))`` if the sum at zero is ``n log 2``, whatever the labels (those of 0 have no gradient),
    or a multiple of ``(f - y)^2``, which the smoothness of the first worker tells.
    """
    mask = z.get("mask", np.ones(z["X"].shape[:2])) > 0
    x, y, size = z["X"][mask], z["y"].reshape(z["X"].shape[:2])[mask], mask.sum(1)
    assert not z["theta_wk"][0].any()
    if np.isclose(z["loss_wk"].ravel()[0], len(y) * np.log(2), rtol=1e-9):
        return x, y, size, lambda f, y: jnp.logaddexp(0, -y * f)
    largest = np.linalg.eigvalsh(x[: size[0]].T @ x[: size[0]])[-1]
    scale = float((z["L_m"].ravel()[0] - z.get("lam", 0.0)) / (2 * largest))
    return x, y, size, lambda f, y: scale * jnp.square(f - y)


def players(z, rule, **args):
    """(state before, one round, what minimises the sum) of a rule on the file's problem."""
    x, y, size, each = problem(z)
    workers, features = len(size), x.shape[1]
    people = population(x, y, np.arange(len(y)), size)._replace(y=jnp.asarray(y))
    fam = families.family(Linear(), [{}], jnp.zeros((1, features)))
    settings = local(learning_rate=float(z["alpha"]), batch_size=int(size.max()), full_batch=True)
    l2 = float(z["lam"]) if "lam" in z else 0.0
    algorithm = lag.make(
        fam, settings, clients=workers, rule=rule, window=int(z["D"]), l2=l2, smoothness=tuple(z["L_m"].ravel()),
        slots=Slots(objective=goal(each)), **args,
    )  # fmt: skip
    store, key = device_store(), jax.random.key(0)
    server, one = algorithm.init(key)
    start = {"head": {"kernel": jnp.zeros((features, 1))}}
    server = server._replace(variables={"params": start})
    one = {name: {"params": start} if name == "point" else part for name, part in one.items()}
    step = make_round(algorithm, executor("bucketed"), store)
    return State(server, store.init(one, workers), jnp.int32(0)), lambda state: step(state, people, key)


def seen(state, step):
    """The model before a round, and after it what was minimised and who uploaded."""
    theta = state.server.variables["params"]["head"]["kernel"][:, 0]
    after, info = step(state)
    return after, (theta, info.numbers["objective"], (info.items.seen.up > 0).any(-1))


def descend(z, rule, rounds, **args):
    """Iterates, values of the sum and upload masks of so many rounds, one program."""
    state, step = players(z, rule, **args)
    return jax.device_get(jax.lax.scan(lambda s, _: seen(s, step), state, length=rounds)[1])


def until(z, rule, target, most, **args):
    """Rounds and uploads until the sum is as near to the target as the file says."""
    state, step = players(z, rule, **args)
    near = float(z["accuracy"])

    def go(carry):
        state, rounds, sent, _ = carry
        state, (_, value, fired) = seen(state, step)
        return state, rounds + 1, sent + fired.sum(), value

    goes_on = lambda c: (jnp.abs(c[3] - target) >= near) & (c[1] < most)  # noqa: E731
    _, rounds, sent, _ = jax.lax.while_loop(goes_on, go, (state, 0, 0, jnp.inf))
    return int(rounds), int(sent)


RULES = {"wk": ("xi_wk", "upload_wk"), "ps": ("xi_ps", "upload_ps")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", of_kind(KIND))
def test_iterates_and_uploads(name, rule):
    z = read(name)
    if f"theta_{rule}" not in z:
        pytest.skip(f"{name} has no {rule}")
    with jax.enable_x64(True):
        xi, mask = (z[key] for key in RULES[rule])
        theta, value, fired = descend(z, rule, len(mask), xi=float(xi), lc_start=True)
    wanted = z[f"theta_{rule}"]
    np.testing.assert_array_equal(fired, mask > 0)
    np.testing.assert_allclose(theta, wanted, rtol=1e-12, atol=1e-14 * np.abs(wanted).max())
    np.testing.assert_allclose(value, z[f"loss_{rule}"].ravel(), rtol=1e-12)


@pytest.mark.as_users
@pytest.mark.parametrize("name", of_kind(KIND))
def test_uploads_until_the_loss_is_near(name):
    """Within 1 % of the authors' counts, which begin at 1 and add one for every 1,000 silent rounds."""
    z = read(name)
    target, workers = float(z["loss_gd_end"]), len(problem(z)[2])
    found, wanted = {}, {"gd": z["gd_iters"]}
    wanted |= {rule: z[f"iters_{rule}"] for rule in RULES if f"iters_{rule}" in z}
    with jax.enable_x64(True):
        for rule, rounds in wanted.items():
            args = {} if rule == "gd" else {"xi": float(z[f"xi_{rule}"]), "lc_start": True}
            found[rule] = until(z, rule, target, int(1.02 * rounds) + 50, **args)
            assert found[rule][0] == pytest.approx(float(rounds), rel=0.01, abs=2), rule
    assert found["gd"][1] == workers * found["gd"][0]
    for rule in set(found) - {"gd"}:
        total = float(z[f"total_uploads_{rule}"])
        assert found[rule][1] == pytest.approx(total, rel=0.01, abs=float(wanted[rule]) // 1000 + 1), rule
