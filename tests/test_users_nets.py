"""Nets of users: what their calls are told, what they return, and which of their parameters belong to a class."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hetfl_jax.models import build, families
from hetfl_jax.models.adapter import adapt, not_understood
from hetfl_jax.models.classes import class_axes, with_class_axes
from hetfl_jax.parts import merge
from hetfl_jax.run.config import load_config
from hetfl_jax.run.federation import Own
from hetfl_jax.run.federation import build as federation

FLAGS = ("train", "training", "is_training", "is_train")
OPPOSITE = ("deterministic", "inference", "use_running_average")


@pytest.mark.parametrize("name", FLAGS + OPPOSITE)
def test_a_call_is_told_whether_it_trains_by_any_usual_name(name):
    class Told(nn.Module):
        """A net whose outputs are 1 while its one argument, which has no default, says that it trains."""

    def call(self, x, **flags):
        (flag,) = flags.values()
        return jnp.full((x.shape[0], 2), flag != (name in OPPOSITE), jnp.float32)

    kinds = dict.fromkeys(("self", "x"), inspect.Parameter.POSITIONAL_ONLY) | {name: inspect.Parameter.KEYWORD_ONLY}
    call.__signature__ = inspect.Signature([inspect.Parameter(*item) for item in kinds.items()])
    Told.__call__ = call
    net = adapt(Told())
    x = jnp.ones((3, 4))
    assert net.apply({}, x, train=True)[0].all()
    assert not net.apply({}, x)[0].any()
    assert not net.init(jax.random.key(0), x)
    assert not not_understood(Told())


def test_an_argument_that_nobody_passes_is_said(tmp_path):
    class Moody(nn.Module):
        classes: int = 3

        @nn.compact
        def __call__(self, x, train=False, mood="calm"):
            return nn.Dense(self.classes)(x)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    small = ("family.mix=a1", "data.clients=4", "data.validation=0.0", "method.args.cohort=2", "train.devices=1")
    config = load_config("heterofl_digits", *small, f"run.folder={tmp_path}")
    with pytest.warns(UserWarning, match=r"net Moody: argument 'mood' of its call keeps its default.*\(family.net\)"):
        federation(config, Own(net=Moody(), data=(x, y, x, y)))


def test_an_nnx_net_is_told_whether_it_trains():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x, deterministic=True):
            return self.layer(x) * 0 + (not deterministic)

    net = adapt(nnx.bridge.to_linen(Two))
    variables = net.init(jax.random.key(0), jnp.ones((3, 4)))
    assert net.apply(variables, jnp.ones((3, 4)), train=True)[0].all()
    assert not net.apply(variables, jnp.ones((3, 4)))[0].any()


def test_exits_are_a_tuple_and_nothing_else():
    """[B, S, C] of a sequence net is one exit; a tuple, and a list, of [B, C] are several."""

    class Sequence(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(x[..., None].astype(jnp.float32))

    class Several(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [nn.Dense(5)(x), nn.Dense(5)(x)]

    for net, x, shape in (
        (Sequence(), jnp.zeros((2, 7), jnp.int32), (1, 2, 7, 5)),
        (Several(), jnp.zeros((2, 7)), (2, 2, 5)),
    ):
        adapted = adapt(net)
        assert adapted.apply(adapted.init(jax.random.key(0), x), x)[0].shape == shape


class Head(nn.Module):
    """A net that has as many hidden units as classes, and names neither."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(int(6 * self.width), name="hidden")(x))
        return nn.Dense(6, name="head")(x)


class Soft(nn.Module):
    """A net whose every output depends on every class."""

    @nn.compact
    def __call__(self, x):
        return nn.log_softmax(nn.Dense(6)(x))


def test_the_class_axis_is_found_from_the_program():
    for classes, hidden in ((6, 6), (5, 8), (2, 2), (1, 3)):

        class Hard(nn.Module):
            width: float = 1.0

            @nn.compact
            def __call__(self, x, classes=classes, hidden=hidden):
                x = nn.relu(nn.Dense(hidden, name="hidden")(x))
                return nn.Dense(classes, name="head")(x)

        found = class_axes(families.family(Hard(), [{}], jnp.zeros((1, classes))))
        wanted = {("params", "head", "kernel"): 1, ("params", "head", "bias"): 0}
        assert found == wanted if classes > 1 else set(found) >= set(wanted)


def test_the_axis_of_a_net_that_names_its_classes_is_the_same():
    named = families.family(build("mlp", hidden=(3,), classes=3), [{}], jnp.zeros((1, 3)))
    axes = {path: window.class_axis for path, window in named.windows.items() if window.class_axis >= 0}
    assert axes == class_axes(named)
    assert with_class_axes(named) is named


def test_exits_have_class_axes_of_their_own():
    fam = families.family(build("mlp", hidden=(4, 4), classes=4), [{"depth": 2}, {"depth": 1}], jnp.zeros((1, 4)))
    axes = {path: window.class_axis for path, window in fam.windows.items() if window.class_axis >= 0}
    assert axes == class_axes(fam)


def test_a_merge_by_class_counts_the_rows_of_a_net_that_names_nothing():
    """Entries of a class count for the clients that hold it alone, as with the field ``classes``."""
    fam = families.family(Head(), [{"width": 1.0}, {"width": 0.5}], jnp.zeros((1, 4)))
    rule = merge.overlap_mean(fam, by_examples=False, class_rows=True)
    delta = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[0])
    weight, rows = jnp.array([2.0, 0.0]), jnp.zeros((2, 6)).at[0].set(jnp.array([2.0, 1, 0, 2, 0, 0]))
    _, coverage = rule.settle(merge.Total(delta, weight, rows))
    assert coverage["params"]["head"]["bias"].tolist() == [2, 1, 0, 2, 0, 0]
    assert coverage["params"]["head"]["kernel"][3].tolist() == [2, 1, 0, 2, 0, 0]
    assert (coverage["params"]["hidden"]["kernel"] == 2).all()


def test_a_net_without_class_rows_is_refused_where_they_count():
    fam = families.family(Soft(), [{}], jnp.zeros((1, 4)))
    merge.overlap_mean(fam)
    with pytest.raises(ValueError, match=r"net Soft has no parameter that belongs to one class alone.*family.net"):
        merge.overlap_mean(fam, class_rows=True)
