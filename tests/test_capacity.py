"""Capacity levels: published sizes, windows, and masked execution equal to dense execution for every net and norm."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Within
from hetfl_jax.models import build, families, windows
from hetfl_jax.models.costs import costs
from hetfl_jax.models.families import family
from tests.helpers import worst

pytestmark = pytest.mark.slow

FIVE = [{"width": 0.5**i} for i in range(5)]

# HeteroFL, table of sizes: parameters, "FLOPs" as its code counts them, megabytes (2^20), levels a to e.
PUBLISHED = {
    ("conv", (28, 28, 1)): (
        [1_556_874, 391_370, 98_922, 25_274, 6_594],
        [80_504_320, 20_493_056, 5_306_752, 1_418_432, 400_480],
        [5.94, 1.49, 0.38, 0.10, 0.03],
    ),
    ("preresnet_1112", (32, 32, 3)): (
        [9_622_090, 2_408_746, 603_802, 151_762, 38_350],
        [330_246_144, 83_334_144, 21_219_840, 5_498_112, 1_471_104],
        [36.71, 9.19, 2.30, 0.58, 0.15],
    ),
    ("preresnet18", (32, 32, 3)): (
        [11_172_170, 2_796_714, 701_018, 176_178, 44_510],
        [557_656_064, 140_416_000, 35_604_992, 9_151_744, 2_413_184],
        [42.62, 10.67, 2.67, 0.67, 0.17],
    ),
}


def official_flops(module, image):
    """The official counter: multiply-adds of convolutions and linear layers, conv bias adds, twice the elements
    for a norm, each module's number added once per named parameter (so weight and bias count it twice)."""
    total = 0

    def count(run, args, kwargs, context):
        nonlocal total
        out = run(*args, **kwargs)
        layer = context.module
        counted = isinstance(layer, nn.Conv | nn.Dense) or "norm" in layer.name
        if context.method_name != "__call__" or not counted:
            return out
        elements = math.prod(out.shape[1:])
        if isinstance(layer, nn.Conv | nn.Dense):
            fan_in = (
                math.prod(layer.kernel_size) * args[0].shape[-1] if isinstance(layer, nn.Conv) else args[0].shape[-1]
            )
            bias_adds = elements * (layer.use_bias and isinstance(layer, nn.Conv))
            total += (elements * fan_in + bias_adds) * (1 + layer.use_bias)
        else:
            total += 2 * 2 * elements
        return out

    def forward():
        # The root module has no name, so it is told apart from the norms by calling it outside the interceptor.
        variables = module.init(jax.random.key(0), jnp.zeros((1, *image)))
        with nn.intercept_methods(lambda run, a, k, c: count(run, a, k, c) if c.module.name else run(*a, **k)):
            return module.apply(variables, jnp.zeros((1, *image)))

    jax.eval_shape(forward)
    return total


@pytest.mark.parametrize(("net", "image"), PUBLISHED, ids=lambda v: v if isinstance(v, str) else "")
def test_sizes_equal_the_published_table(net, image):
    parameters, flops, megabytes = PUBLISHED[net, image]
    fam = family(build(net), FIVE, jnp.zeros((1, *image)))
    found = costs(fam)
    assert found.parameters.tolist() == parameters
    assert [round(float(b), 2) for b in found.bytes / 2**20] == megabytes
    assert [official_flops(build(net, width=level["width"]), image) for level in FIVE] == flops


def test_fedavg_nets_have_the_published_sizes():
    assert costs(family(build("cnn"), FIVE[:1], jnp.zeros((1, 28, 28, 1)))).parameters[0] == 1_663_370
    assert costs(family(build("mlp"), FIVE[:1], jnp.zeros((1, 784)))).parameters[0] == 159_010
    tutorial = costs(family(build("tutorial_cnn"), FIVE[:1], jnp.zeros((1, 24, 24, 3))))
    assert tutorial.parameters[0] == 1_068_298


CASES = [
    pytest.param(net, norm, id=f"{net}-{norm}")
    for net, norms in {
        "mlp": ("none", "ln", "gn", "bn"),
        "cnn": ("none", "gn"),
        "tutorial_cnn": ("none",),
        "conv": ("bn", "in", "ln", "gn", "none", "bn_tracked"),
        "preresnet_1112": ("bn", "gn"),
        "resnet18_exits": ("bn_tracked",),
    }.items()
    for norm in norms
]


@pytest.mark.parametrize(("net", "norm"), CASES)
def test_masked_equals_dense(net, norm):
    """Training loss and gradients, new statistics and evaluation, at every level."""
    hidden = {"mlp": (16, 8), "cnn": (8, 16, 16), "conv": (8, 16), "preresnet_1112": (8, 8, 16, 16)}.get(net, (8, 16))
    hidden = (8, 8, 16, 8) if net == "tutorial_cnn" else hidden
    levels = [{"width": w} for w in (1.0, 0.5)] + ([] if norm == "gn" else [{"width": 0.25}])
    if net == "resnet18_exits":  # width and depth together
        levels = [{"width": 1.0, "depth": 2}, {"width": 0.5, "depth": 2}, {"width": 0.5, "depth": 1}]
    module = build(net, hidden=hidden, classes=3, norm=norm, scaler=norm != "bn_tracked", lowering="lax")
    x = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    y, valid = jnp.array([0, 1, 2, 0, 1]), jnp.array([True, True, True, True, False])
    fam = family(module, levels, x[:1])
    variables = families.init(fam, jax.random.key(1))
    noise = lambda v: v + 0.1 * jax.random.normal(jax.random.key(2), v.shape)  # noqa: E731
    variables["params"] = jax.tree.map(noise, variables["params"])

    # Inside the full shape everywhere; inside every larger shape for one net, since compilation is what this costs.
    bases = range(fam.levels) if (net, norm) == ("conv", "bn") else (0,)

    @jax.jit
    def everything(variables, number):
        views = [families.view(fam, variables, Within(base, number)) for base in bases]
        return [_outcome(fam, view, x, y, valid, base) for base, view in enumerate(views)]

    for level in range(fam.levels):
        wanted = jax.jit(lambda v, at=level: _outcome(fam, families.view(fam, v, at), x, y, valid, at))(variables)
        masked = everything(variables, jnp.int32(level))
        for base in bases[: level + 1]:
            for dense, other in zip(wanted, masked[base], strict=True):
                # both at full shape, zero outside the window
                largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(dense))
                assert worst(dense, other) < 3e-5 * max(1.0, largest), (net, norm, level, base)


def _outcome(fam, view, x, y, valid, base):
    def loss(params):
        exits, stats = view.apply({**view.variables, "params": params}, x, train=True, valid=valid)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(exits), y[None, :, None], 2)[:, :, 0]
        return -jnp.where(view.active[:, None] & valid, chosen, 0).sum(), (exits, stats)

    (value, (exits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(view.variables["params"])
    logits, _ = view.apply(view.variables, x, valid=valid)
    tracked = {"batch_stats": stats} if "batch_stats" in fam.shapes[0] else {}
    tracked = view.cut(tracked) if tracked else tracked
    full = windows.widen(fam, {"params": gradient, **tracked}, base)
    return value, jnp.where(valid[:, None], exits[0], 0), jnp.where(valid[:, None], logits[0], 0), full


class Truncated(nn.Module):
    """A net whose depth is a field: an exit a layer; deeper layers are absent at lower levels."""

    depth: int = 3
    classes: int = 4

    @nn.compact
    def __call__(self, x):
        exits = []
        for i in range(self.depth):
            x = nn.relu(nn.Dense(5, name=f"layer_{i}")(x))
            exits.append(nn.Dense(self.classes, name=f"exit_{i}")(x))
        return tuple(exits)


def test_a_depth_cut_is_a_window_of_zeros():
    fam = family(Truncated(), [{"depth": 3}, {"depth": 1}], jnp.zeros((1, 2)), masked=False)
    assert fam.exits.tolist() == [3, 1]
    assert fam.windows["params", "layer_2", "kernel"].extents.tolist() == [[5, 5], [0, 0]]
    assert fam.windows["params", "exit_0", "kernel"].class_axis == 1
    variables = families.init(fam, jax.random.key(0))
    small = windows.narrow(fam, variables, 1)
    assert set(small["params"]) == {"layer_0", "exit_0"}
    wide = windows.widen(fam, small, 1)
    assert worst(wide["params"]["layer_2"], jax.tree.map(jnp.zeros_like, wide["params"]["layer_2"])) == 0
    changed = windows.overlay(fam, variables, jax.tree.map(jnp.zeros_like, small), 1)
    np.testing.assert_array_equal(changed["params"]["layer_2"]["kernel"], variables["params"]["layer_2"]["kernel"])
    assert (changed["params"]["layer_0"]["kernel"] == 0).all()
    x = jax.random.normal(jax.random.key(1), (3, 2))
    shallow = families.view(fam, variables, 1).apply(small, x)[0]
    deep = families.view(fam, variables, 0).apply(variables, x)[0]
    np.testing.assert_array_equal(shallow, deep[:1])
    with pytest.raises(ValueError, match="runs only at its true shape"):
        families.view(fam, variables, Within(0, jnp.int32(1))).apply(variables, x)


@pytest.mark.parametrize("net", ["width", "depth"])
def test_spread_is_the_sum_of_weighted_masks(net):
    """Widths and depths, with and without a weight per class."""
    if net == "width":
        fam = family(build("conv", hidden=(4, 8), classes=3), FIVE[:3], jnp.zeros((1, 8, 8, 1)))
    else:
        fam = family(Truncated(), [{"depth": 3}, {"depth": 2}, {"depth": 1}], jnp.zeros((1, 2)), masked=False)
    weights = jnp.array([2.0, 3.0, 0.5])
    for path, window in fam.windows.items():
        masks = [windows.mask_leaf(fam, path, level) for level in range(3)]
        wanted = sum(w * m for w, m in zip(weights, masks))
        np.testing.assert_allclose(windows.spread(fam, path, weights), wanted, rtol=1e-6)
        if window.class_axis >= 0:
            along = jax.random.uniform(jax.random.key(0), (3, int(window.extents[0, window.class_axis])))
            place = [-1 if axis == window.class_axis else 1 for axis in range(window.extents.shape[1])]
            wanted = sum(a.reshape(place) * m for a, m in zip(along, masks))
            np.testing.assert_allclose(windows.spread(fam, path, weights, along), wanted, rtol=1e-6)


def test_a_level_outside_the_global_one_is_refused():
    with pytest.raises(ValueError, match="level 1 has params/dense_0/bias of shape \\(8,\\), not inside \\(4,\\)"):
        family(build("mlp", hidden=(8,)), [{"width": 0.5}, {"width": 1.0}], jnp.zeros((1, 3)))


def test_gn_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 groups, which do not divide a layer of 2 channels"):
        build("conv", hidden=(8, 16), norm="gn", width=0.25)
    with pytest.raises(ValueError, match="norm 'batch' is not one of bn"):
        build("conv", norm="batch")
    with pytest.raises(ValueError, match="net 'vgg' is not one of linear, logistic, mlp"):
        build("vgg")
