"""FjORD against numbers of its authors' code: residual nets of any blocks and widths, statistics for each rate."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.models import ResNet, families, windows
from hetfl_jax.parts import drift, merge, ordered, server
from hetfl_jax.parts.local import local
from tests.helpers import context, trained
from tests.vectors.discover import below, of_kind, read
from tests.vectors.official import images
from tests.vectors.test_depth_vectors import everything

pytestmark = pytest.mark.vectors

BLOCK = re.compile(r"(.+\.\d+)\.(conv1|bn1|conv2|bn2|shortcut\.0|shortcut\.1)\.(.+)")
PARTS = {"conv1": "1_conv", "bn1": "1_norm", "conv2": "2_conv", "bn2": "2_norm", "shortcut.0": "shortcut_conv",
         "shortcut.1": "shortcut_norm"}  # fmt: skip
FIRST = {"conv1": "stem_conv", "bn1": "stem_norm", "linear": "head"}


class Official:
    """A net of the official code as ours: one level a rate, the largest first."""

    def __init__(self, arrays, rates, image):
        self.rates = sorted((float(p) for p in rates), reverse=True)
        names = list(dict.fromkeys(m[1] for m in map(BLOCK.fullmatch, arrays) if m))
        self.blocks, hidden, counts = {}, [len(arrays["conv1.weight"])], [0]
        for name in names:
            if f"{name}.shortcut.0.weight" in arrays:
                hidden.append(len(arrays[f"{name}.conv1.weight"]))
                counts.append(0)
            self.blocks[name] = f"stage{len(hidden) - 1}_block{counts[-1]}"
            counts[-1] += 1
        net = ResNet(
            hidden=tuple(hidden), blocks=tuple(counts), classes=len(arrays["linear.weight"]), norm="bn_tiers",
            stem_bias="conv1.bias" in arrays,
        )  # fmt: skip
        levels = [{"width": p, "tiers": len(self.rates) - i} for i, p in enumerate(self.rates)]
        self.family = families.family(net, levels, jnp.zeros((1, *image)))

    def level(self, rate):
        return int(np.abs(np.asarray(self.rates) - float(rate)).argmin())

    def place(self, name):
        """Where an official array lives: (collection, layer, leaf, tier or None)."""
        if found := BLOCK.fullmatch(name):
            layer, leaf = f"{self.blocks[found[1]]}_{PARTS[found[2]]}", found[3]
        else:
            first, _, leaf = name.partition(".")
            layer = FIRST[first]
        if leaf.startswith("bn."):
            _, width, leaf = leaf.split(".")
            return "batch_stats", layer, {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf), int(width)
        return "params", layer, {"weight": "scale" if "norm" in layer else "kernel"}.get(leaf, leaf), None

    def tree(self, arrays):
        """Official arrays as variables of the full net."""
        out = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), self.family.shapes[0])
        for name, value in arrays.items():
            collection, layer, leaf, width = self.place(name)
            if leaf == "num_batches_tracked":
                continue
            if width is None:
                moved = {4: lambda v: v.transpose(2, 3, 1, 0), 3: lambda v: v[:, 0, 0], 2: lambda v: v.T}
                out[collection][layer][leaf] = moved.get(value.ndim, lambda v: v)(value)
                continue
            place = out[collection][layer][leaf]
            for row, rate in enumerate(reversed(self.rates)):
                if math.ceil(round(rate * place.shape[1], 6)) == width:
                    place[row, :width] = value
        return jax.tree.map(jnp.asarray, out)


def agree(found, wanted, tolerance):
    for path, value in windows.flat(wanted).items():
        np.testing.assert_allclose(windows.flat(found)[path], value, atol=tolerance, err_msg="/".join(path))


@pytest.mark.parametrize("name", of_kind("width/o5?_fjord_aggregate_*"))
def test_shells_are_averaged_over_those_that_hold_them(name):
    z = read(name)
    start = below(z, "original")
    net = Official(start, z["p_s"], (8, 8, start["conv1.weight"].shape[1]))
    fam, variables = net.family, net.tree(start)
    for rate in z["p_s"]:
        shapes = windows.flat(fam.shapes[net.level(rate)])
        for array, (out, into) in below(z, f"dims/p{float(rate)}").items():
            collection, layer, leaf, _ = net.place(array)
            shape = shapes[collection, layer, leaf].shape
            assert shape[-1] == out, array
            assert leaf != "kernel" or shape[-2] == into, array
    rule, step = merge.overlap_mean(fam), server.optimizer()

    @jax.jit
    def aggregate(variables, replies):
        totals = []
        for rate, (examples, whole) in zip(z["p_max"], replies, strict=True):
            level = net.level(rate)
            delta = jax.tree.map(jnp.subtract, *(windows.narrow(fam, v, level) for v in (whole, variables)))
            one = rule.lift(delta, context(level, everything(1)._replace(size=examples)))
            totals.append(one._replace(delta=windows.widen(fam, one.delta, level)))
        total = jax.tree.map(lambda *parts: sum(parts), *totals)
        return step.update(step.init(variables), variables, *rule.settle(total), jnp.bool_(True))[1]

    replies = [(jnp.int32(n), net.tree(below(z, f"client{i}"))) for i, n in enumerate(z["num_examples"])]
    after = aggregate(variables, replies)
    agree(after, net.tree(below(z, "aggregated")), 1e-6)
    held = windows.mask(fam, net.level(max(z["p_max"])), variables)
    for old, new, inside in zip(*map(jax.tree.leaves, (variables, after, held))):
        np.testing.assert_array_equal(np.asarray(old)[~inside], np.asarray(new)[~inside])


@pytest.mark.parametrize("name", of_kind("width/o5?_fjord_forward*"))
def test_every_rate_forward(name):
    z = read(name)
    start, x = below(z, "param"), images(z["x"])
    rates = sorted({float(m[1]) for m in (re.match(r"eval/p([\d.]+)/", k) for k in z) if m})
    assert rates
    net = Official(start, rates, x.shape[1:])
    variables = net.tree(start)
    for rate in rates:
        view = families.view(net.family, variables, net.level(rate))
        logits, after = jax.jit(lambda v: (view.apply(v, x)[0], view.apply(v, x, train=True)))(view.variables)  # noqa: B023
        np.testing.assert_allclose(logits[0], z[f"eval/p{rate}/logits"], atol=1e-5)
        np.testing.assert_allclose(after[0][0], z[f"train/p{rate}/logits"], atol=1e-5)
        changed = below(z, f"train/p{rate}/stats_changed")
        wanted = net.tree(start | changed)["batch_stats"]
        found = view.put(variables, {**view.variables, "batch_stats": after[1]})["batch_stats"]
        agree(found, wanted, 1e-5)
        assert any(k.endswith("running_mean") for k in changed)


@pytest.mark.parametrize("name", of_kind("width/o5?_fjord_step_*"))
def test_one_step(name):
    """The whole net is stepped there, also beyond the client's own rate, which nobody reads: ours ends at it."""
    z = read(name)
    start, x, y = below(z, "before"), images(z["x"]), jnp.asarray(z["y"].astype(np.int32))
    net = Official(start, z["p_s"], x.shape[1:])
    own, drawn = net.level(z["max_p"]), net.level(z["sampled_p"])
    distill = bool(z["know_distill"]) if "know_distill" in z else "teacher_logits" in z
    goal = ordered.ordered_dropout(
        net.family.levels, distill=distill, draw=lambda key, own, levels: jnp.int32(drawn)
    )  # fmt: skip
    settings = local(
        learning_rate=float(z["lr"]), momentum=float(z["momentum"]), weight_decay=float(z["weight_decay"]),
        batch_size=len(x), steps=1, shuffle=False,
    )  # fmt: skip
    variables = net.tree(start)
    view, shard = families.view(net.family, variables, own), everything(len(x), x, y, len(start["linear.weight"]))
    done = jax.jit(lambda: trained(settings, net.family, view, own, goal, drift.none(), shard)._asdict())()
    agree(done["variables"], windows.narrow(net.family, net.tree(below(z, "after")), own), 1e-5)
    loss = float(z["student_loss"])
    assert loss == pytest.approx(float(z["returned_loss"]), abs=1e-6)
    if distill:
        log_q = jax.nn.log_softmax(jnp.asarray(z["teacher_logits"]))
        loss += float(z["teacher_loss"]) + float((jnp.exp(log_q) * log_q).sum(-1).mean())
    assert float(done["tally"].loss) / len(x) == pytest.approx(loss, abs=1e-5)
    small = families.view(net.family, variables, drawn)
    logits = jax.jit(lambda v: small.apply(v, x, train=True)[0][0])(small.variables)
    np.testing.assert_allclose(logits, z["student_logits"], atol=1e-5)
    count = jax.nn.one_hot(drawn, net.family.levels) + distill * jax.nn.one_hot(own, net.family.levels)
    np.testing.assert_array_equal(done["work"], np.stack([count * len(x)] * 2))
