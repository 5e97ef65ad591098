"""FedDyn, FedAvg, FedProx and SCAFFOLD on linear models against numbers of FedDyn's official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import State
from hetfl_jax.data.population import population
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round
from hetfl_jax.engine.stores import device_store
from hetfl_jax.methods import fedavg, feddyn, fedprox, scaffold
from hetfl_jax.models import build, families
from hetfl_jax.parts import drift, objective
from hetfl_jax.parts.local import local
from tests.helpers import trained
from tests.vectors.discover import of_kind, read
from tests.vectors.test_depth_vectors import everything

pytestmark = pytest.mark.vectors


def linear(features, classes):
    return families.family(build("mlp", hidden=(), classes=classes), [{}], jnp.zeros((1, features)))


def unflatten(theta, features, classes):
    cut = features * classes
    return {"head": {"kernel": jnp.asarray(theta[:cut].reshape(classes, features).T), "bias": jnp.asarray(theta[cut:])}}


def flatten(params):
    head = params["head"]
    kernel = np.moveaxis(np.asarray(head["kernel"]), -1, -2)
    return np.concatenate([kernel.reshape(*kernel.shape[:-2], -1), np.asarray(head["bias"])], -1)


@pytest.mark.parametrize("name", of_kind("depth/feddyn_client_step*"))
def test_a_client_of_feddyn(name):
    z = read(name)
    x, y = jnp.asarray(z["x"]), jnp.asarray(z["y"].astype(np.int32))
    features = x.shape[1]
    classes = len(z["theta"]) // (features + 1)
    fam = linear(features, classes)
    for case in sorted({key.split("/")[0] for key in z if key.endswith("/theta_after_one_step")}):
        for steps, key in ((1, "theta_after_one_step"), (5, "theta_after_five_steps")):
            view = families.view(fam, {"params": unflatten(z["theta"], features, classes)}, 0)
            settings = local(
                learning_rate=float(z[f"{case}/lr"]), batch_size=len(y), epochs=0, steps=steps, shuffle=False,
                weight_decay=float(z[f"{case}/weight_decay"]), clip_norm=10.0,
            )  # fmt: skip
            received = unflatten(z[f"{case}/server_params"], features, classes)
            rule = drift.feddyn(float(z[f"{case}/alpha"]))
            memory = {"sum": {"params": unflatten(z[f"{case}/local_param_list_row"], features, classes)}}
            # The file's client does not start from what the server sent.
            after, *_ = trained(
                settings, fam, view, 0, objective.cross_entropy(), rule, everything(len(y), x, y, classes),
                received={"params": received}, memory=memory,
            )  # fmt: skip
            np.testing.assert_allclose(flatten(after["params"]), z[f"{case}/{key}"], atol=1e-6, err_msg=case)
            if steps == 1:
                effective = (z["theta"] - flatten(after["params"])) / float(z[f"{case}/lr"])
                np.testing.assert_allclose(effective, z[f"{case}/effective_gradient"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", of_kind("depth/feddyn_rounds_*"))
@pytest.mark.parametrize("method", ["FedDyn", "FedAvg", "FedProx", "Scaffold"])
def test_rounds_with_partial_participation(name, method):
    z = read(name)
    if f"{method}/r1/sel" not in z:
        pytest.skip(f"{name} has no {method}")
    sizes = np.array([len(z[f"client{k}/y"]) for k in range(len(z["n_samples"]))])
    np.testing.assert_array_equal(sizes, z["n_samples"])
    clients, features = len(sizes), z["client0/x"].shape[1]
    classes = len(z["theta0"]) // (features + 1)
    fam = linear(features, classes)
    settings = local(
        learning_rate=float(z["lr"]), batch_size=int(sizes.max()), epochs=int(z["epochs"]), clip_norm=10.0,
        weight_decay=float(z["weight_decay"]), round_decay=float(z["lr_decay_per_round"]),
    )  # fmt: skip
    mean = float(sizes.mean())
    algorithm = {
        "FedDyn": lambda: feddyn.make(
            fam, settings, cohort=clients, clients_per_level=(clients,), feddyn_alpha=float(z["alpha"]),
            mean_examples=mean, keep_models=True,
        ),
        "FedAvg": lambda: fedavg.make(fam, settings, cohort=clients),
        "FedProx": lambda: fedprox.make(fam, settings, cohort=clients, proximal_weight=float(z["mu_fedprox"])),
        "Scaffold": lambda: scaffold.make(
            fam, settings, cohort=clients, clients=clients, mean_examples=mean, keep_models=True, authors_rate=True
        ),
    }[method]()  # fmt: skip
    x = np.concatenate([z[f"client{k}/x"] for k in range(clients)])
    y = np.concatenate([z[f"client{k}/y"] for k in range(clients)]).astype(np.int32)
    people = population(x, y, np.arange(len(y)), sizes, classes=classes)
    chosen = np.zeros((int(z["rounds"]), clients), bool)
    for r in range(len(chosen)):
        chosen[r, z[f"r{r + 1}/selected"]] = True
    usual = algorithm.plan

    def plan(key, round, server, population, survey):
        planned = usual(key, round, server, population, survey)
        return planned._replace(ids=jnp.arange(clients), valid=jnp.asarray(chosen)[round])

    store, key = device_store(), jax.random.key(0)
    begin, one = algorithm.init(key)
    theta = {"params": unflatten(z["theta0"], features, classes)}
    if one:
        one = {k: theta if k == "last" else v for k, v in one.items()}
    state = State(begin._replace(variables=theta), store.init(one, clients), jnp.int32(0))
    step = make_round(algorithm._replace(plan=plan), executor("bucketed"), store)
    for r in range(1, len(chosen) + 1):
        state, _ = step(state, people, key)
        more = algorithm.questions[1:]
        seen = {q.name: flatten(q.variables(state.server, state.memory, 0)["params"]) for q in more}
        now = flatten(state.server.variables["params"])
        close = {"atol": 2e-6, "err_msg": f"{method}, round {r}"}
        np.testing.assert_allclose(seen.get("sel", now), z[f"{method}/r{r}/sel"], **close)
        if method == "FedDyn":
            np.testing.assert_allclose(now, z[f"{method}/r{r}/cld"], **close)
            sums = flatten(state.memory["sum"]["params"])
            np.testing.assert_allclose(sums, z[f"{method}/r{r}/local_param_list"], **close)
            np.testing.assert_allclose(flatten(state.server.slot), sums.mean(0), atol=2e-6)
        if method == "Scaffold":
            own = flatten(state.memory["variate"]["params"])
            both = np.concatenate([own, flatten(state.server.slot)[None]])
            np.testing.assert_allclose(both, z[f"{method}/r{r}/state_param_list"], **close)
        if "last" in state.memory:
            np.testing.assert_allclose(seen["all"], z[f"{method}/r{r}/all"], **close)
            last = flatten(state.memory["last"]["params"])
            np.testing.assert_allclose(last, z[f"{method}/r{r}/clnt_params_list"], **close)
