"""Sequences of tokens: windows, the Transformer's sub-models, and how they are judged."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hetfl_jax.core.types import Within
from hetfl_jax.data import preprocess, sources
from hetfl_jax.data.population import batches, population
from hetfl_jax.engine.executors import executor
from hetfl_jax.methods import fedavg
from hetfl_jax.models import build, families
from hetfl_jax.run import federation, nets
from hetfl_jax.run.cli import config_of
from hetfl_jax.run.evaluate import evaluator
from hetfl_jax.run.mix import parse_mix
from tests.helpers import sgd

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

WIDTHS = ({"width": 1.0}, {"width": 0.5}, {"width": 0.25})


def small(levels=WIDTHS, **fields):
    given = {"hidden": (12, 12), "embedding": 16, "heads": 2, "length": 6, "classes": 9, "dropout": 0.2} | fields
    return families.family(build("transformer", **given), levels, jnp.zeros((1, 6), jnp.int32))


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "text.npz"
    np.savez(path, train=np.arange(23) % 9, test=np.arange(21) % 9)
    return path


def test_windows_of_a_stream(stream):
    found = sources.text(str(stream), length=4, rows=2, test_rows=3)
    assert found.x_train.tolist() == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, -1], [2, 3, 4, 5], [6, 7, 8, 0], [1, 2, 3, -1],
    ]  # fmt: skip
    assert found.writer.tolist() == [0, 0, 0, 1, 1, 1]
    # A batch of three is one place of all rows.
    assert found.x_test[:3].tolist() == [[0, 1, 2, 3], [7, 8, 0, 1], [5, 6, 7, 8]]
    np.testing.assert_array_equal(found.y_test, found.x_test)
    assert len(sources.text(str(stream), length=4, rows=2, test_rows=1, test_tokens=8).x_test) == 2
    for wrong in ({"rows": 24}, {"length": 0}, {"test_tokens": 99}):
        with pytest.raises(ValueError, match="allowed"):
            sources.text(str(stream), **({"length": 4, "rows": 2, "test_rows": 3} | wrong))


def test_tokens_are_hidden_and_absent_ones_stay():
    x = jnp.tile(jnp.arange(2000), (2, 1)).at[:, 1900:].set(-1)
    prepare = preprocess.tokens("corrupt:0.15", 5000)
    one, other = prepare(x, jax.random.key(0)), prepare(x, jax.random.key(1))
    assert (one[:, 1900:] == -1).all()
    assert 0.13 < (one[:, :1900] == 5000).mean() < 0.17
    assert (one != other).any()
    assert (one[0] != one[1]).any()
    np.testing.assert_array_equal(prepare(x, None), prepare(x, None))
    with pytest.raises(ValueError, match=r"corrupt:2.*allowed none or corrupt"):
        preprocess.tokens("corrupt:2", 10)


def test_parameters_per_level_are_the_published_ones():
    """HeteroFL's counts at 33,279 tokens (width_family.md, table 1.2)."""
    levels = [{"width": 0.5**i} for i in range(5)]
    fam = families.family(build("transformer", classes=33_279), levels, jnp.zeros((1, 64), jnp.int32))
    found = [sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) for shapes in fam.shapes]
    assert found == [19_263_999, 9_107_967, 4_435_455, 2_200_575, 1_108_479]


def test_the_largest_level_of_a_mix_may_be_narrow():
    """The global model of a mix that begins with b is half as wide in all its fields."""
    config = config_of([f"--config={ROOT}/configs/heterofl_wikitext2.py:mix=b1"])
    fields = nets.net_fields(config, parse_mix("b1"), 33_279)
    fam = families.family(build(fields.pop("net"), **fields), [{"width": 1.0}], jnp.zeros((1, 64), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(fam.shapes[0]["params"])) == 9_107_967


def test_layers_start_equal_and_a_short_window_is_whole():
    fam = small()
    variables = families.init(fam, jax.random.key(0))
    first, second = (variables["params"][f"layer_{i}"] for i in range(2))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, second)))
    assert float(first["query"]["kernel"].std()) > 0
    apply = families.apply_at(fam, 0)
    short = jnp.array([[3, 1, 4, 1]])
    whole, _ = apply(variables, short)
    filled, _ = apply(variables, jnp.pad(short, ((0, 0), (0, 2)), constant_values=-1))
    np.testing.assert_allclose(filled[:, :, :4], whole, atol=1e-6)


def test_masked_equals_dense_with_dropout():
    fam = small()
    variables = families.init(fam, jax.random.key(0))
    x, key = jax.random.randint(jax.random.key(1), (3, 6), 0, 9), jax.random.key(2)

    def logits(level):
        view = families.view(fam, variables, level)
        return view.apply(view.variables, x, train=True, key=key)[0]

    masked = jax.jit(lambda level: logits(Within(0, level)))
    for level in (1, 2):
        np.testing.assert_allclose(masked(level), logits(level), atol=2e-5)
    assert float(jnp.abs(masked(0) - masked(1)).max()) > 0.1


def test_every_position_is_judged():
    """Loss, accuracy and perplexity of windows against a loop over them; rounds train on them."""
    fam = small(({"width": 1.0},), dropout=0.0)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (14, 6)).astype(np.int32)
    x[[3, 7, 11], 4:] = -1
    train = population(x, x, np.arange(8), np.array([4, 4]), classes=9)
    assert train.classes[0].tolist() == [c in x[:4] for c in range(9)]
    test = batches(population(train.x, train.y, np.arange(8, 14), np.array([6]), classes=9), 2, order=np.arange(6))
    algorithm = fedavg.make(fam, sgd(), cohort=2)
    run = executor("bucketed")
    judge = evaluator(algorithm, run, test_batches=3, statistics_batch=2, eval_batch=2)
    server = algorithm.init(jax.random.key(0))[0]
    scores = jax.device_get(judge(0, 0, server, (), train, batches(train, 2), test))
    logits, _ = families.apply_at(fam, 0)(server.variables, jnp.asarray(x[8:]))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[-1], jnp.maximum(x[8:], 0))
    there = x[8:] >= 0
    assert scores["loss"] == pytest.approx(float(np.asarray(loss)[there].mean()), abs=1e-5)
    assert scores["accuracy"] == pytest.approx(
        float((np.asarray(logits[-1].argmax(-1)) == x[8:])[there].mean()), abs=1e-6
    )
    by_batch = [np.exp(np.asarray(loss)[i : i + 2][there[i : i + 2]].mean()) for i in (0, 2, 4)]
    assert scores["perplexity"] == pytest.approx(np.mean(by_batch), rel=1e-5)


def test_a_field_that_a_net_has_not_is_named():
    with pytest.raises(ValueError, match=r"net 'lenet' has no field 'exits'.*family.exits"):
        build("lenet", exits=False)


def test_what_the_transformer_does_not_take():
    for wrong, message in (
        ({"norm": "bn"}, "allowed ln"),
        ({"heads": 3}, "embedding 16 with 3 heads"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"length": 4}, "at most 4 tokens"),
        ({"embedding": 6, "heads": 3}, "not 3 equal heads"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**wrong)
    fam = small(({"depth": 2}, {"depth": 1}), exits=False)
    with pytest.raises(ValueError, match="only at its true shape"):
        families.apply_at(fam, Within(0, jnp.int32(1)))


def test_sequences_have_no_label_to_rename():
    source = sources.Source(*np.zeros((4, 2, 5), int))
    with pytest.raises(ValueError, match=r"groups 'labels:2' of sequences: need one class an example \(data.groups\)"):
        federation.views_of("labels:2", source, clients=4, classes=5)
