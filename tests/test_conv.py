"""The convolution of our own against ``lax.conv_general_dilated`` and its gradients."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import platform
from hetfl_jax.models import build
from hetfl_jax.models.conv import conv, depthwise_conv, examples_at_once, lowered, max_pool
from hetfl_jax.models.layers import conv_layer, dense_layer

pytestmark = pytest.mark.slow

NHWC = ("NHWC", "HWIO", "NHWC")
PADDINGS = ("SAME", "VALID", ((0, 2), (3, 1)))


def reference(x, w, stride, padding, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=NHWC, feature_group_count=groups
    )


def results(run, x, w):
    """Value and gradients under a fixed random cotangent."""
    out, pull = jax.vjp(run, x, w)
    return (out, *pull(jax.random.normal(jax.random.key(2), out.shape)))


def assert_same(*cases):
    """Values and gradients of (ours, theirs, x, w) to 1e-5 relative to the largest entry; one program for all cases."""
    both = jax.jit(lambda arrays: [(results(o, x, w), results(t, x, w)) for (o, t, *_), (x, w) in zip(cases, arrays)])
    for found, wanted in both([(x, w) for *_, x, w in cases]):
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("lowering", ["canonical", "rows"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
def test_equal_to_lax_with_gradients(lowering, kernel):
    x = jax.random.normal(jax.random.key(0), (2, 8, 9, 4))
    w = jax.random.normal(jax.random.key(1), (kernel, kernel, 4, 3))
    assert_same(
        *(
            (partial(conv, strides=s, padding=p, lowering=lowering), partial(reference, stride=s, padding=p), x, w)
            for s, p in itertools.product((1, 2, 3), PADDINGS)
        )
    )


@pytest.mark.parametrize("lowering", ["canonical", "rows"])
@pytest.mark.parametrize("height", [1, 2, 4])
def test_images_smaller_than_the_kernel(lowering, height):
    """Rows of the kernel that meet nothing are left out, and have a gradient of zero."""
    x = jax.random.normal(jax.random.key(0), (2, height, 2, 4))
    w = jax.random.normal(jax.random.key(1), (5, 3, 4, 3))
    paddings = (((2, 2), (1, 1)), ((4, 4), (1, 2)), ((0, 5), (3, 0)), ((6, 5), (5, 1)))

    def theirs(x, w, stride, padding):  # of padding beyond a kernel's reach, XLA:CPU's own gradient is wrong
        return reference(jnp.pad(x, ((0, 0), *padding, (0, 0))), w, stride, "VALID")

    assert_same(
        *(
            (partial(conv, strides=s, padding=p, lowering=lowering), partial(theirs, stride=s, padding=p), x, w)
            for s, p in itertools.product((1, 2, 3), paddings)
        )
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_few_input_channels_are_padded_without_effect(channels):
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, channels))
    w = jax.random.normal(jax.random.key(1), (3, 3, channels, 5))
    ours = partial(conv, strides=2, padding="SAME", lowering="canonical")
    assert_same((ours, partial(reference, stride=2, padding="SAME"), x, w))


@pytest.mark.parametrize("lowering", ["canonical", "rows", "lax"])
def test_vmap_with_kernels_of_their_own(lowering):
    x = jax.random.normal(jax.random.key(0), (3, 2, 6, 6, 4))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4, 5))
    gradient = jax.grad(lambda w, x: jnp.sum(jnp.sin(conv(x, w, 1, "SAME", lowering))))
    one_by_one = jnp.stack([gradient(w[i], x[i]) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(gradient)(w, x), one_by_one, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 6])
def test_depthwise_is_a_grouped_convolution(batch):
    """A batch of six goes in two parts."""
    x = jax.random.normal(jax.random.key(0), (batch, 8, 9, 4))
    w = jax.random.normal(jax.random.key(1), (3, 3, 1, 4))
    assert_same(
        *(
            (partial(depthwise_conv, strides=s, padding=p), partial(reference, stride=s, padding=p, groups=4), x, w)
            for s, p in itertools.product((1, 2, 3), PADDINGS)
        )
    )


def test_errors_name_the_value_and_what_is_allowed():
    x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    with pytest.raises(ValueError, match="'fast' is not one of auto, canonical, rows, lax"):
        conv(x, w, lowering="fast")
    with pytest.raises(ValueError, match="dilation"):
        lowered("lax")(x, w, (1, 1), "SAME", rhs_dilation=(2, 2))
    with pytest.raises(ValueError, match="feature_group_count 2 is not 1 or 4"):
        lowered("lax")(jnp.ones((1, 4, 4, 4)), w, (1, 1), "SAME", feature_group_count=2)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.as_users
def test_max_pool_sends_the_gradient_to_the_first_largest_entry(size):
    """Against reduce_window and its gradient, ties and rows that fill no window included."""
    x = jnp.round(jax.random.normal(jax.random.key(0), (3, *size, 4)) * 2)

    def reference(v):
        return jax.lax.reduce_window(v, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    wanted, back = jax.vjp(reference, x)
    found, ours = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(found, wanted)
    g = jax.random.normal(jax.random.key(1), wanted.shape)
    np.testing.assert_array_equal(ours(g)[0], back(g)[0])


def test_a_kernel_gradient_in_parts_is_the_whole_one():
    """Large enough to be cut: 6 examples of 5.3 MB of patches."""
    x = jax.random.normal(jax.random.key(0), (6, 48, 48, 64))
    w = jax.random.normal(jax.random.key(1), (3, 3, 64, 32))
    assert examples_at_once((6, 48, 48, 32), w.shape, 4) == 1
    assert examples_at_once((6, 12, 12, 32), w.shape, 4) == 6
    assert examples_at_once((6, 48, 48, 16), (3, 3, 64, 16), 4) == 6
    wanted, found = (
        jax.jit(jax.grad(lambda w, f=f: jnp.sin(f(x, w)).sum()))(w)
        for f in (partial(reference, stride=1, padding="SAME"), partial(conv, lowering="canonical"))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("window", [2, 3])
def test_both_max_pools_send_a_tie_to_the_first(window):
    """A TPU takes the other one; whole numbers make many ties, and rows and columns are left over."""
    x = jnp.round(jax.random.normal(jax.random.key(0), (2, 11, 8, 3)))
    found = {}
    for kind in platform.KINDS:
        with platform.during(platform.Platform(kind)):
            out, pull = jax.vjp(lambda x: max_pool(x, window), x)
            found[kind] = out, *pull(jnp.arange(float(out.size)).reshape(out.shape))
    for kind in ("gpu", "tpu"):
        for a, b in zip(found[kind], found["cpu"], strict=True):
            np.testing.assert_array_equal(a, b)


def test_each_platform_has_its_lowerings():
    x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
    names = {}
    for kind in platform.KINDS:
        with platform.during(platform.Platform(kind)):
            jaxpr = jax.make_jaxpr(lambda x, w: max_pool(conv(x, w)))(x, w).jaxpr
            names[kind] = {equation.primitive.name for equation in jaxpr.eqns}
    assert {"conv_general_dilated", "reduce_window_max"} <= names["tpu"]
    assert "dot_general" in names["gpu"]
    assert "custom_vjp_call" in names["cpu"]


def test_a_pool_before_bias_and_relu_is_one_after_them():
    """The CNN: the same start values, outputs and gradients as its layers in their usual order."""
    net, x = build("cnn", hidden=(4, 6, 8)), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))

    class Usual(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, features in enumerate((4, 6)):
                x = max_pool(nn.relu(conv_layer(x, features, 5, name=f"conv_{i}")))
            x = nn.relu(dense_layer(x.transpose(0, 3, 1, 2).reshape(2, -1), 8, name="dense_2"))
            return dense_layer(x, 10, name="head")

    found, wanted = (jax.jit(m.init)(jax.random.key(1), x) for m in (net, Usual()))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

    def loss(variables, module):
        return (module.apply(variables, x) ** 2).sum()

    both = jax.jit(lambda v: [jax.value_and_grad(loss)(v, module) for module in (net, Usual())])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *both(found))
