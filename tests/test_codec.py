"""Codecs: what arrives, what is kept, how many bits; masked as dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core import bits
from hetfl_jax.core.types import ClientContext, Within
from hetfl_jax.models import build, families, windows
from hetfl_jax.parts import codec as codecs
from hetfl_jax.parts import message, ranks, sparse

pytestmark = pytest.mark.slow

KEY = jax.random.key(3)
WIDTH_AND_DEPTH = ({"depth": 2, "width": 1.0}, {"depth": 2, "width": 0.5}, {"depth": 1, "width": 0.5})


def mlp(levels=({"width": 1.0}, {"width": 0.5}), hidden=(4,), features=3, classes=10):
    return families.family(build("mlp", hidden=hidden, classes=classes), levels, jnp.zeros((1, features)))


def linear(features=4, classes=2):
    return mlp(({},), (), features, classes)


def deep():
    return mlp(WIDTH_AND_DEPTH, (8, 8), 6, 3)


def conv():
    module = build("conv", hidden=(8, 8), classes=3)
    levels = ({"width": 1.0}, {"width": 0.5}, {"width": 0.25})
    return families.family(module, levels, jnp.zeros((1, 8, 8, 1)))


ALL = {
    "none": lambda fam: codecs.none(fam),
    **{
        f"qsgd_{scope}_{scaling}_{length}": lambda fam, scope=scope, scaling=scaling, length=length: codecs.qsgd(
            fam, 3, scope, scaling, length
        )
        for scope, scaling, length in (
            ("tensor", "l2", "fixed"), ("layer", "max", "elias"), ("whole", "shrunk", "joint"),
        )
    },
    "uniform": lambda fam: codecs.uniform(fam, 3),
    "signs": lambda fam: codecs.signs(fam),
    "top_k": lambda fam: codecs.top_k(fam, 0.3),
    "random_k": lambda fam: codecs.random_k(fam, 0.3),
    "drive": lambda fam: codecs.drive(fam),
    "drive_nearest": lambda fam: codecs.drive(fam, unbiased=False),
    "low_rank": lambda fam: codecs.low_rank(fam, 2),
    "top_k_feedback": lambda fam: codecs.error_feedback(codecs.top_k(fam, 0.3)),
    "low_rank_feedback": lambda fam: codecs.error_feedback(codecs.low_rank(fam, 1)),
    "signs_ef21": lambda fam: codecs.error_feedback(codecs.signs(fam), ef21=True),
}  # fmt: skip


def change(fam, seed=0, scale=1.0):
    """A random full change."""
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape) * scale, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, fam.shapes[0]["params"])


def cut(fam, tree, level):
    return windows.narrow(fam, {"params": tree}, level)["params"]


def context(level):
    return ClientContext(KEY, jnp.int32(0), level, None, (), (), {})


def start(codec, fam, level=0):
    memory = codec.init(change(fam))
    return {name: windows.narrow(fam, part, level) for name, part in memory.items()}


def send(codec, fam, delta, level=0, key=KEY, memory=None):
    memory = start(codec, fam, level) if memory is None else memory
    return jax.jit(lambda key, d, m: codec.encode(key, d, context(level), m))(key, delta, memory)


def count(parts):
    return int(bits.total(np.asarray(parts)))


def close(a, b, atol=1e-6):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "make",
    [
        lambda fam: codecs.none(fam),
        lambda fam: codecs.qsgd(fam, 2**22),
        lambda fam: codecs.qsgd(fam, 2**22, "whole", "max"),
        lambda fam: codecs.top_k(fam, 1.0),
        lambda fam: codecs.random_k(fam, 1.0),
        lambda fam: codecs.low_rank(fam, 8),
    ],
    ids=["none", "qsgd", "qsgd_max", "top_k", "random_k", "low_rank"],
)
@pytest.mark.parametrize("level", [0, 2])
def test_nothing_is_lost_at_the_finest(make, level):
    fam = deep()
    delta = cut(fam, change(fam, scale=0.1), level)
    close(send(make(fam), fam, delta, level)[0], delta)


def test_a_change_of_low_rank_is_sent_as_it_is():
    fam = mlp(({},), (24,), 20, 3)
    rng = np.random.default_rng(0)
    delta = change(fam)
    low = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 24))
    delta["dense_0"]["kernel"] = jnp.asarray(low, jnp.float32)
    sent = send(codecs.low_rank(fam, 3), fam, delta)[0]
    close(sent, delta, 1e-5)


def test_a_direction_of_low_rank_comes_back_after_a_message_of_zero():
    fam = mlp(({},), (24,), 20, 3)
    codec = codecs.low_rank(fam, 2)
    _, memory, _ = send(codec, fam, jax.tree.map(jnp.zeros_like, change(fam)))
    close(memory, codec.init(change(fam)), 0)
    assert float(jnp.abs(send(codec, fam, change(fam), memory=memory)[0]["dense_0"]["kernel"]).sum()) > 1


@pytest.mark.parametrize("name", [n for n in ALL if n != "none"])
def test_zero_arrives_as_zero(name):
    fam = deep()
    codec = ALL[name](fam)
    zero = jax.tree.map(jnp.zeros_like, cut(fam, change(fam), 1))
    sent, *_ = send(codec, fam, zero, 1)
    close(sent, zero, 0)


UNBIASED = {
    "qsgd_1": lambda fam: codecs.qsgd(fam, 1),
    "qsgd_whole": lambda fam: codecs.qsgd(fam, 5, "whole"),
    "qsgd_max": lambda fam: codecs.qsgd(fam, 2, "layer", "max"),
    "uniform_1": lambda fam: codecs.uniform(fam, 1),
    "uniform_3": lambda fam: codecs.uniform(fam, 3),
    "random_k": lambda fam: codecs.random_k(fam, 0.3),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_many_messages_is_the_change(name):
    fam = mlp()
    codec, delta, draws = UNBIASED[name](fam), cut(fam, change(fam, 1), 1), 4000
    encode = jax.jit(jax.vmap(lambda key: codec.encode(key, delta, context(1), {})[0]))
    sent = encode(jax.random.split(KEY, draws))
    for got, want in zip(jax.tree.leaves(sent), jax.tree.leaves(delta), strict=True):
        got = np.asarray(got, np.float64)
        error = got.std(0, ddof=1) / np.sqrt(draws)
        assert (np.abs(got.mean(0) - want) <= 5 * error + 1e-6).all()


def test_drive_keeps_the_product_and_nearly_the_mean():
    fam = mlp(({},), (16,), 16, 3)
    codec, delta = codecs.drive(fam), change(fam, 2)
    encode = jax.jit(jax.vmap(lambda key: codec.encode(key, delta, context(0), {})[0]))
    sent = encode(jax.random.split(KEY, 1000))
    for got, want in zip(jax.tree.leaves(sent), jax.tree.leaves(delta), strict=True):
        axes = tuple(range(1, got.ndim))
        np.testing.assert_allclose((got * want).sum(axes), (want**2).sum(), rtol=1e-4)
    kernel, want = sent["dense_0"]["kernel"], delta["dense_0"]["kernel"]
    assert float(jnp.linalg.norm(kernel.mean(0) - want) / jnp.linalg.norm(want)) < 0.06
    nearest = jax.vmap(lambda key: codecs.drive(fam, unbiased=False).encode(key, delta, context(0), {})[0])
    far = jnp.linalg.norm(nearest(jax.random.split(KEY, 20))["dense_0"]["kernel"] - want, axis=(1, 2))
    assert (far < jnp.linalg.norm(kernel[:20] - want, axis=(1, 2))).all()


@pytest.mark.parametrize(
    "inner",
    [
        lambda fam: codecs.top_k(fam, 0.1),
        lambda fam: codecs.random_k(fam, 0.2, unbiased=False),
        lambda fam: codecs.signs(fam),
        lambda fam: codecs.qsgd(fam, 2, scaling="shrunk"),
        lambda fam: codecs.drive(fam, unbiased=False),
        lambda fam: codecs.low_rank(fam, 1),
    ],
    ids=["top_k", "random_k", "signs", "qsgd", "drive", "low_rank"],
)
def test_what_was_sent_and_what_is_kept_make_up_all_changes(inner):
    fam = mlp()
    codec = codecs.error_feedback(inner(fam))
    encode = jax.jit(lambda key, d, m: codec.encode(key, d, context(1), m)[:2])
    memory, deltas, sent = start(codec, fam, 1), [], []
    for turn in range(8):
        deltas.append(cut(fam, change(fam, turn, 0.1), 1))
        message, memory = encode(jax.random.fold_in(KEY, turn), deltas[-1], memory)
        sent.append(message)
    add = lambda *leaves: sum(leaves)  # noqa: E731
    close(jax.tree.map(add, *sent, memory["error"]["params"]), jax.tree.map(add, *deltas))


def test_the_estimate_of_ef21_goes_to_a_change_that_stays():
    fam = mlp()
    codec, delta = codecs.error_feedback(codecs.top_k(fam, 0.3), ef21=True), change(fam)
    memory, distances = start(codec, fam), []
    encode = jax.jit(lambda d, m: codec.encode(KEY, d, context(0), m)[:2])
    for _ in range(5):
        sent, memory = encode(delta, memory)
        close(sent, memory["estimate"]["params"], 0)
        distances.append(sum(float(((u - v) ** 2).sum()) for u, v in zip(*map(jax.tree.leaves, (sent, delta)))))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-10


def inside(fam, tree, level, base):
    """A full tree of parameters at the shape of ``base``, zero outside the level."""
    small = windows.narrow(fam, {"params": tree}, base)
    return jax.tree.map(lambda v, own: jnp.where(own, v, 0), small, windows.mask(fam, level, small, base))["params"]


@pytest.mark.parametrize(
    ("make", "name"),
    [(deep, name) for name in ALL if name not in ("drive_nearest", "low_rank_feedback")] + [(conv, "top_k")],
)
def test_masked_is_dense(make, name):
    """At every level inside the largest shape: bit for bit, dead entries zero, as many bits."""
    fam = make()
    codec, full, noise = ALL[name](fam), change(fam, 4), change(fam, 5, 0.1)
    memory = codec.init(full)
    memory |= {n: {"params": jax.tree.map(jnp.add, p["params"], noise)} for n, p in memory.items() if "params" in p}
    dense = []
    for level in range(fam.levels):
        own = {n: windows.narrow(fam, p, level) for n, p in memory.items()}
        dense.append(send(codec, fam, cut(fam, full, level), level, memory=own))
    masked = jax.jit(lambda d, m, n: codec.encode(KEY, d, context(Within(0, n)), m))
    for level in range(fam.levels):
        kept = {n: {"params": inside(fam, p["params"], level, 0)} if "params" in p else p for n, p in memory.items()}
        got, want = masked(inside(fam, full, level, 0), kept, jnp.int32(level)), dense[level]
        assert count(got[2]) == count(want[2])
        wanted, found = windows.flat(want[:2]), windows.flat(got[:2])
        assert set(wanted) <= set(found)
        for path, leaf in found.items():
            other = wanted.get(path, np.zeros((0,) * leaf.ndim))
            grown = np.pad(other, [(0, a - b) for a, b in zip(leaf.shape, other.shape)])
            np.testing.assert_array_equal(leaf, grown, err_msg=f"{path} {level}")


def test_levels_may_differ_under_one_program():
    """A traced level, vmapped: two clients of different levels inside one shape."""
    fam = mlp()
    delta = inside(fam, change(fam), 1, 0)
    for name in ("qsgd_layer_max_elias", "top_k", "drive", "low_rank"):
        codec = ALL[name](fam)
        encode = lambda n, codec=codec: codec.encode(KEY, delta, context(Within(0, n)), start(codec, fam))  # noqa: E731
        rows = jax.jit(jax.vmap(encode))(jnp.arange(2))[2]
        assert name.endswith("elias") or count(rows[0]) > count(rows[1])


@pytest.mark.parametrize("ends", [None, (0, 0), (2**31 - 1, 2**31 - 1), (2**30, 5), (1_050_000_000, 1_060_000_000)])
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_the_largest_are_those_of_a_stable_sort_with_any_ends(ends, decimals):
    """``decimals`` 0 has many equal scores; of these the first are chosen. Ends may be wrong or in the wrong order."""
    rng = np.random.default_rng(decimals)
    score = np.where(rng.random((30, 40)) < 0.1, -1, np.abs(rng.normal(size=(30, 40))).round(decimals) * 3)
    score = score.astype(np.float32)
    order = np.argsort(-score.ravel(), kind="stable")
    given = None if ends is None else jnp.array(ends, jnp.int32)
    choose = jax.jit(lambda count: ranks.largest(jnp.asarray(score), count, given))
    for count in (1, 2, 57, 600, (score >= 0).sum()):
        want = np.zeros(score.size, bool)
        want[order[:count]] = True
        np.testing.assert_array_equal(np.asarray(choose(count)).ravel(), want)


BITS = {  # kernels of [3, 4] and [4, 10] with biases; at level 1 of [3, 2] and [2, 10]
    "none": (lambda fam: codecs.none(fam), [66 * 32, 38 * 32]),
    "qsgd": (lambda fam: codecs.qsgd(fam, 1), [66 * 2 + 4 * 32, 38 * 2 + 4 * 32]),
    "qsgd_layer": (lambda fam: codecs.qsgd(fam, 10, "layer"), [66 * 5 + 2 * 32, 38 * 5 + 2 * 32]),
    "qsgd_joint": (lambda fam: codecs.qsgd(fam, 5, "whole", length="joint"), [229 + 32, 132 + 32]),
    "uniform": (lambda fam: codecs.uniform(fam, 3), [66 * 3 + 4 * 64, 38 * 3 + 4 * 64]),
    "signs": (lambda fam: codecs.signs(fam), [66 + 4 * 32, 38 + 4 * 32]),
    "top_k": (lambda fam: codecs.top_k(fam, 0.1), [2 * 36 + 34 + 4 * 38 + 36, 35 + 33 + 2 * 37 + 36]),
    "random_k": (lambda fam: codecs.random_k(fam, 1.0), [12 * 36 + 4 * 34 + 40 * 38 + 360, 210 + 66 + 740 + 360]),
    "drive": (lambda fam: codecs.drive(fam), [16 + 4 + 64 + 16 + 128, 8 + 2 + 32 + 16 + 128]),
    "low_rank": (lambda fam: codecs.low_rank(fam, 1), [32 * (7 + 4 + 14 + 10), 32 * (5 + 2 + 12 + 10)]),
    "low_rank_2": (lambda fam: codecs.low_rank(fam, 2), [32 * (12 + 4 + 28 + 10), 32 * (6 + 2 + 20 + 10)]),
    "feedback": (lambda fam: codecs.error_feedback(codecs.signs(fam)), [194, 166]),
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits_by_hand(name):
    fam = mlp()
    make, want = BITS[name]
    assert message.bits(fam, make(fam)) == want
    assert count(send(make(fam), fam, cut(fam, change(fam), 1), 1)[2]) == want[1]


def test_bits_of_elias_by_hand():
    """Levels 0 4 0 2 0 0 1 4, distances 2 2 3 1; in one scope the two zeros of the bias come before them."""
    fam = linear()
    kernel = jnp.array([[0, 1], [0, -0.5], [0, 0], [0.25, 1]], jnp.float32)
    delta = {"head": {"kernel": kernel, "bias": jnp.zeros(2)}}
    for scope, distances in (("tensor", 3 + 3 + 3 + 1 + 32), ("whole", 6 + 3 + 3 + 1)):
        sent, _, length = send(codecs.qsgd(fam, 4, scope, "max", "elias"), fam, delta)
        close(sent, delta, 0)
        assert count(length) == 32 + distances + 6 + 3 + 1 + 6 + 4


def test_many_bits_are_counted_exactly():
    """2^27 entries of 32 bits in digits of 2^15; an Elias code that is summed in more than one row."""
    module = build("mlp", hidden=(), classes=2**14)
    fam = families.family(module, [{}], jax.ShapeDtypeStruct((1, 2**13), jnp.float32))
    assert message.bits(fam, codecs.none(fam)) == [32 * (2**27 + 2**14)]
    ones = jnp.ones((3 << 20) + 1)
    part = sparse.Part(ones.shape, np.array([ones.size]), ones, None, 0, 0, KEY)
    assert count(sparse.elias_bits(part, ones, 0, -1)[0]) == 3 * ones.size


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("zip", {}, "codec zip, allowed none, qsgd, .* low_rank (uplink.name)"),
        ("qsgd", {"bits": 3}, "bits of qsgd, allowed levels, scope, scaling, length (uplink.args.bits)"),
        ("qsgd", {}, "qsgd without levels, allowed levels, scope, scaling, length (uplink.args.levels)"),
        ("none", {"levels": 1}, "levels of none, allowed none (uplink.args.levels)"),
        ("qsgd", {"levels": 0}, "quantisation levels 0, allowed 1..2^24 (uplink.args.levels)"),
        ("qsgd", {"levels": 2.0}, "quantisation levels 2.0, allowed 1..2^24 (uplink.args.levels)"),
        ("qsgd", {"levels": 2, "scope": "row"}, "scope row, allowed tensor, layer, whole (uplink.args.scope)"),
        ("qsgd", {"levels": 2, "scaling": "l1"}, "scaling l1, allowed l2, max, shrunk (uplink.args.scaling)"),
        ("qsgd", {"levels": 2, "length": "zip"}, "length zip, allowed fixed, joint, elias (uplink.args.length)"),
        ("uniform", {"bits": 17}, "bits 17, allowed 1..16 (uplink.args.bits)"),
        ("top_k", {"fraction": 0.0}, "fraction 0.0, allowed 0 < fraction <= 1 (uplink.args.fraction)"),
        ("random_k", {"fraction": 1.5}, "fraction 1.5, allowed 0 < fraction <= 1 (uplink.args.fraction)"),
        ("low_rank", {"rank": 0}, "rank 0, allowed 1..4, the highest of a leaf (uplink.args.rank)"),
        ("low_rank", {"rank": 5}, "rank 5, allowed 1..4, the highest of a leaf (uplink.args.rank)"),
        ("none", {"statistics": True}, "statistics true, but the net tracks none: need false (uplink.statistics)"),
        ("none", {"error_feedback": "ef"}, "error feedback ef, allowed false, true, ef21 (uplink.error_feedback)"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(name, args, message):
    pattern = "".join("\\" + c if c in "()^" else c for c in message)
    with pytest.raises(ValueError, match=pattern) as caught:
        codecs.make(name, mlp(), **args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "args"), [("top_k", {"fraction": 0.1}), ("random_k", {"fraction": 0.1}),
                                            ("signs", {})])  # fmt: skip
def test_a_sparsifier_alone_is_warned_of_once(name, args):
    with pytest.warns(UserWarning, match=f"{name} without error feedback") as caught:
        codecs.make(name, mlp(), **args)
    assert len(caught) == 1
    for feedback, memory in ((True, "error"), ("ef21", "estimate")):
        assert list(codecs.make(name, mlp(), error_feedback=feedback, **args).init(change(mlp()))) == [memory]


def test_error_feedback_gets_a_contraction():
    fam = mlp()
    delta = change(fam)
    zero = {"error": {"params": jax.tree.map(jnp.zeros_like, delta)}}
    for name, args, plain in (
        ("qsgd", {"levels": 1}, codecs.qsgd(fam, 1, scaling="shrunk")),
        ("random_k", {"fraction": 0.2}, codecs.random_k(fam, 0.2, unbiased=False)),
        ("drive", {}, codecs.drive(fam, unbiased=False)),
    ):
        codec = codecs.make(name, fam, error_feedback=True, **args)
        close(send(codec, fam, delta, memory=zero)[0], send(plain, fam, delta, memory={})[0], 0)


def test_memory_is_float32_trees_of_the_parameters():
    fam = conv()
    for name, make in ALL.items():
        memory = make(fam).init(change(fam))
        for kind, part in memory.items():
            if kind == "factor":  # of low_rank, with feedback or not: r numbers a column of each leaf
                assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(part))
                continue
            assert list(part) == ["params"], name
            assert jax.tree.map(lambda v: (v.shape, v.dtype), part["params"]) == jax.tree.map(
                lambda s: (s.shape, jnp.dtype(jnp.float32)), fam.shapes[0]["params"]
            )
