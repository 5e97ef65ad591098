"""Nets in each precision: what is rounded and what is not, masked against dense, and methods that must coincide."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Within
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg, fedprox, heterofl
from hetfl_jax.models import NETS, build, families
from hetfl_jax.models.adapter import adapt
from hetfl_jax.models.conv import conv, depthwise_conv
from hetfl_jax.models.precision import in_precision
from hetfl_jax.run.config import load_config
from hetfl_jax.run.federation import Own
from hetfl_jax.run.federation import build as federation
from tests.contract import play
from tests.helpers import LEVELS, conv_family, mlp_family, sgd, toy_population, worst

NAMED = ("float32", "tf32", "bfloat16")
#: by how much parameters may differ after three rounds that are equal but for the order of sums; a number near 1 that
#: is rounded to 8 bits moves by up to 2^-8
CLOSE = {"float32": 1e-6, "tf32": 1e-6, "bfloat16": 4e-3}
HALF = jnp.dtype("bfloat16")


def products(jaxpr, found=None):
    """Types of the operands of each product of two arrays, with the size of what comes out and its precision."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            kinds = {v.aval.dtype for v in equation.invars}
            found.append((kinds, equation.params["precision"]))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                products(inner, found)
    return found


def traced(net, x, **options):
    """The program of a training step's loss and gradients, and its results as shapes."""
    module = build(net, **options)
    net = in_precision(adapt(module), "bfloat16")
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def loss(params, rest, x, key):
        out, stats = net.apply({**rest, "params": params}, x, train=True, valid=jnp.ones(x.shape[0], bool), key=key)
        return out.sum(), (out, stats)

    rest = {name: part for name, part in variables.items() if name != "params"}
    of = jax.value_and_grad(loss, has_aux=True)
    args = (variables["params"], rest, x, jax.random.key(0))
    return jax.make_jaxpr(of)(*args), jax.eval_shape(of, *args)


INPUT = {
    "linear": (784,), "logistic": (20,), "mlp": (784,), "transformer": 8, "lstm": 8, "tutorial_cnn": (24, 24, 3),
    "alexnet": (96, 96, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_products_of_every_net_are_of_bfloat16_numbers(name):
    shape = INPUT.get(name, (32, 32, 3))
    x = jax.ShapeDtypeStruct((2, shape), jnp.int32) if isinstance(shape, int) else jnp.zeros((2, *shape))
    program, ((loss, (out, stats)), gradient) = traced(name, x, **({"classes": 11} if isinstance(shape, int) else {}))
    found = products(program.jaxpr)
    assert len(found) >= 2
    assert all(kinds == {HALF} for kinds, _ in found)
    for leaf in jax.tree.leaves((loss, out, stats, gradient)):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["bn_tracked", "bn_dual", "ln"])
def test_norms_take_moments_in_float32(kind):
    """1,000 rows of 256 and 258: their mean is no bfloat16 number, and 1,000 rows are not counted one by one in it."""
    net = build("conv", hidden=(4,), norm=kind, scaler=False, classes=3)
    rows, columns = jnp.arange(1000)[:, None, None, None], jnp.arange(4)[None, :, None, None]
    x = jnp.where((rows + columns) % 2, 1.0, 1.0078125) * jnp.ones((1000, 4, 4, 1))
    plain, half = adapt(net), in_precision(adapt(net), "bfloat16")
    variables = plain.init(jax.random.key(0), x)
    variables["params"]["conv_0"] = {"kernel": jnp.zeros((3, 3, 1, 4)).at[1, 1, 0].set(256.0), "bias": jnp.zeros(4)}
    wanted, found = (n.apply(variables, x, train=True, valid=jnp.ones(1000, bool)) for n in (plain, half))
    np.testing.assert_allclose(found[0], wanted[0], atol=0.05)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0.02)


@pytest.mark.parametrize("lowering", ["canonical", "rows", "lax"])
def test_convolutions_are_those_of_rounded_numbers(lowering):
    """In bfloat16 as in float32 of the same rounded inputs, to a few roundings, gradients too."""
    x, w = (jax.random.normal(jax.random.key(i), s).astype(HALF) for i, s in enumerate([(2, 5, 5, 4), (3, 3, 4, 32)]))
    z, v = x, jax.random.normal(jax.random.key(2), (3, 3, 1, 4)).astype(HALF)

    def both(x, w, z, v):
        out = conv(x, w, lowering=lowering), depthwise_conv(z, v)
        return sum((o.astype(jnp.float32) ** 2).mean() for o in out), out

    run = jax.value_and_grad(both, (0, 1, 2, 3), has_aux=True)
    (_, out), gradient = run(x, w, z, v)
    (_, wanted), exact = run(*(a.astype(jnp.float32) for a in (x, w, z, v)))
    for a, b in zip((*out, *gradient), (*wanted, *exact), strict=True):
        assert a.dtype == HALF
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=2**-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("precision", "asked"), [("float32", "HIGHEST"), ("tf32", "HIGH")])
@pytest.mark.parametrize("lowering", ["canonical", "rows", "lax"])
def test_products_of_float32_numbers_say_their_precision(precision, asked, lowering):
    """Gradients too, which are made after the net has run."""
    net = in_precision(adapt(build("conv", hidden=(4, 4), norm="none", lowering=lowering)), precision)
    x = jnp.ones((2, 8, 8, 1))
    variables = net.init(jax.random.key(0), x)
    of = jax.grad(lambda v: net.apply(v, x)[0].sum())
    found = products(jax.make_jaxpr(of)(variables).jaxpr)
    assert found
    for kinds, level in found:
        assert kinds == {jnp.dtype("float32")}
        assert {getattr(p, "name", p) for p in (level if isinstance(level, tuple) else (level,))} == {asked}
    assert net.apply(variables, x)[0].dtype == jnp.float32


@pytest.mark.parametrize("precision", NAMED)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_masked_is_dense(kind, precision):
    fam = mlp_family() if kind == "mlp" else conv_family(norm="bn", scaler=True)
    fam = families.computing_in(precision, fam)
    population = toy_population(image=kind == "conv")
    made = heterofl.make(fam, sgd(epochs=1), cohort=5, proportions=(1, 1))
    dense, masked = (play(made, run, population)[0].server.variables
                     for run in (executor("bucketed"), executor("bucketed", 0, 1, ((0, 1),))))  # fmt: skip
    assert worst(masked, dense) < CLOSE[precision]
    model = families.view(fam, families.init(fam, jax.random.key(0)), Within(0, jnp.int32(1)))
    small = families.view(fam, families.init(fam, jax.random.key(0)), 1)
    x = population.x[:5]
    outputs = [m.apply(m.variables, x)[0] for m in (model, small)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=4 * CLOSE[precision])


@pytest.mark.parametrize("precision", NAMED)
def test_methods_that_must_coincide_do(precision):
    """FedProx without its weight, HeteroFL of one level with equal clients, and chunks against clients one by one."""
    population = toy_population(clients=8, levels=1)
    population = population._replace(
        size=jnp.full(8, 6, jnp.int32), offset=jnp.arange(8, dtype=jnp.int32) * 4, classes=jnp.ones((8, 3), bool)
    )
    fam = families.computing_in(precision, mlp_family(LEVELS[:1]))
    final = lambda made, chunk=1: play(made, executor("bucketed", chunk), population)[0].server.variables  # noqa: E731
    plain = final(fedavg.make(fam, sgd(), cohort=4))
    assert worst(final(fedprox.make(fam, sgd(), cohort=4, proximal_weight=0.0)), plain) == 0
    assert worst(final(fedprox.make(fam, sgd(), cohort=4, proximal_weight=1.0)), plain) > 1e-4
    assert worst(final(heterofl.make(fam, sgd(), cohort=4, proportions=(1,))), plain) < CLOSE[precision]
    assert worst(final(fedavg.make(fam, sgd(), cohort=4), 4), plain) < CLOSE[precision]
    exact = play(fedavg.make(mlp_family(LEVELS[:1]), sgd(), cohort=4), executor("bucketed"), population)[0]
    apart = worst(plain, exact.server.variables)
    assert (1e-4 < apart < 0.05) if precision == "bfloat16" else apart < 1e-6


def test_a_config_says_it_and_a_net_of_the_users_follows():
    class Mine(nn.Module):
        classes: int = 3

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            self.sow("intermediates", "seen", x)
            return nn.Dense(self.classes, dtype=jnp.float32)(nn.relu(x))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    small = ("family.mix=a1", "data.clients=4", "data.validation=0.0", "method.args.cohort=2", "train.devices=1",
             "train.batch_size=5", "train.precision=bfloat16")  # fmt: skip
    fed = federation(load_config("heterofl_digits", *small), Own(net=Mine(), data=(x, y, x, y)))
    net, variables = fed.family.nets[0], families.init(fed.family, jax.random.key(0))
    found = products(jax.make_jaxpr(lambda v, x: net.apply(v, x, train=True))(variables, x).jaxpr)
    assert [kinds for kinds, _ in found] == [{HALF}, {jnp.dtype("float32")}]
    _, stats = net.apply(variables, x, train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, stats))} == {jnp.dtype("float32")}


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision 'half' is not one of auto, float32, tf32, bfloat16 \(train.prec"):
        federation(load_config("heterofl_digits", "train.precision=half"))
