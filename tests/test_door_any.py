"""The door of data with whatever comes: admitted with its counts, or refused in one line."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hetfl_jax.data import partition
from hetfl_jax.data.door import admit, sample
from hetfl_jax.data.population import population
from hetfl_jax.data.sources import Source
from tests.doors import LINE, flat

quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))

KINDS = st.sampled_from([np.uint8, np.int8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64, bool])


@st.composite
def labels_of(draw, rows):
    """Labels of any kind, most of them fit to use."""
    kind = draw(st.sampled_from(["text", "few", "any", "float", "one-hot", "column"]))
    if kind == "text":
        return np.array(draw(st.lists(st.text(max_size=4), min_size=rows, max_size=rows)), str)
    if kind == "one-hot":
        width = draw(st.integers(1, 5))
        picked = np.array(draw(st.lists(st.integers(0, width - 1), min_size=rows, max_size=rows)), int)
        return np.eye(width)[picked].astype(draw(KINDS))
    if kind == "any":
        return draw(hnp.arrays(draw(KINDS), rows))
    if kind == "float":
        return draw(hnp.arrays(np.float64, rows, elements=st.floats(-3, 3)))
    y = np.array(draw(st.lists(st.integers(-2, 12), min_size=rows, max_size=rows)), int)
    return y[:, None] if kind == "column" else y


@st.composite
def examples_of(draw, rows):
    shape = draw(st.sampled_from([(3,), (5, 6), (5, 5, 3), (3, 6, 6), (2, 3, 4, 1), ()]))
    dtype = draw(KINDS)
    fine = st.floats(0, 1, width=16) if np.issubdtype(dtype, np.floating) else None
    elements = fine if draw(st.booleans()) else st.integers(0, 127) if fine is None and dtype is not bool else None
    return draw(hnp.arrays(dtype, (rows, *shape), elements=elements))


@st.composite
def source_of(draw):
    rows = draw(st.integers(0, 8))
    more = draw(st.sampled_from([0, 0, 0, 1]))
    x, y = draw(examples_of(rows)), draw(labels_of(rows + more))
    test = draw(st.integers(0, rows))
    writer = draw(st.none() | hnp.arrays(st.sampled_from([np.int64, np.float32, "U2"]), st.integers(0, 9)))
    return Source(x, y, x[:test], y[:test], writer)


def one_line(call):
    """What the call returns, or ``None`` after its one line."""
    try:
        return call()
    except ValueError as error:
        line = str(error)
    assert LINE.fullmatch(line), line
    return None


@quick
@given(source_of(), st.sampled_from([None, True, False]), st.booleans())
def test_every_source_is_admitted_with_its_counts_or_refused_in_one_line(source, images, regression):
    found = one_line(lambda: admit(source, images=images, regression=regression))
    if found is None:
        return
    new, table = found.source, found.labels_table
    assert len(new.x_train) == len(new.y_train) == len(source.y_train) >= 1
    assert len(new.x_test) == len(new.y_test) == len(source.y_test) >= 1
    assert new.x_train.size == np.asarray(source.x_train).size
    assert new.x_train.dtype in (np.uint8, np.float32)
    assert np.isfinite(new.x_train).all()
    assert new.writer is None or new.writer.shape == new.y_train.shape
    assert all("\n" not in note for note in found.notes)
    if regression:
        assert new.y_train.dtype == np.float32
        return
    assert new.y_train.dtype == new.y_test.dtype == np.int32
    assert new.y_train.ndim == 1
    assert new.y_train.min() >= 0
    y = np.asarray(source.y_train)
    counts = np.unique(y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y, return_counts=True)[1]
    assert sorted(np.unique(new.y_train, return_counts=True)[1].tolist()) == sorted(counts.tolist())
    assert (table is not None) == any("renumbered" in note for note in found.notes)
    if table is not None:
        assert sorted(table.values()) == list(range(len(table)))
    again = admit(new, images=False, classes=int(new.y_train.max()) + 1)
    assert again.source.y_train.tolist() == new.y_train.tolist()


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30).map(lambda y: np.array([0, *y])), KINDS)
def test_ordinary_labels_stay_exactly_as_they_are(y, dtype):
    if y.max() < 4 * np.unique(y).size and dtype is not bool:
        found = admit(flat(y.astype(dtype)))
        assert found.source.y_train.tolist() == y.tolist()
        assert found.labels_table is None


@quick
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.integers(-1, 10**6)))
def test_sequences_are_never_renumbered(tokens):
    found = one_line(lambda: admit(Source(tokens, tokens, tokens, tokens)))
    assert found is None or (found.source.y_train is tokens and found.labels_table is None)
    assert found is not None or tokens.max() < 0


@quick
@given(
    st.sampled_from(["iid", "shards", "dirichlet_per_class", "dirichlet_per_client", "natural"]),
    hnp.arrays(st.sampled_from([np.int8, np.int64, np.float32, bool]), st.integers(0, 30)) | labels_of(12),
    st.integers(-1, 8),
    st.floats(-0.1, 3) | st.sampled_from([0.0, 1e-300, np.nan, np.inf]),
    st.integers(-1, 3),
)
def test_every_split_gives_each_row_once_or_one_line(kind, labels, clients, number, seed):
    calls = {
        "iid": lambda: partition.iid(len(labels), clients, seed),
        "shards": lambda: partition.shards(labels, clients, clients // 2, seed),
        "dirichlet_per_class": lambda: partition.dirichlet_per_class(labels, clients, number, seed),
        "dirichlet_per_client": lambda: partition.dirichlet_per_client(labels, clients, number, seed),
        "natural": lambda: partition.natural(labels, seed, min(number, 1)),
    }
    part = one_line(calls[kind])
    if part is None:
        return
    rows = part.rows.tolist() + ([] if part.test_index is None else part.test_index.tolist())
    assert len(set(rows)) == len(rows)
    assert all(0 <= row < len(labels) for row in rows)
    assert part.size.sum() == part.rows.size
    assert kind == "natural" or part.size.size == clients
    if kind.startswith("dirichlet"):
        assert part.size.min() >= 1


@quick
@given(
    hnp.arrays(st.sampled_from([np.int64, np.uint8, np.float32]), st.integers(0, 6)),
    hnp.arrays(st.sampled_from([np.int64, np.float32]), hnp.array_shapes(min_dims=1, max_dims=2, max_side=3))
    | st.lists(st.integers(-1, 4), max_size=4).map(lambda v: np.array(v, int)),
    st.none() | hnp.arrays(st.sampled_from([np.int64, np.float32]), st.integers(0, 4)),
    st.integers(-1, 3),
)
def test_every_population_has_its_sizes_or_one_line(index, size, level, levels):
    y = np.arange(300) % 3
    found = one_line(lambda: population(np.zeros((300, 1)), y, index, size, level=level, levels=levels))
    if found is not None:
        assert found.size.tolist() == size.tolist()
        assert found.rows.tolist() == index.tolist()
        assert level is None or found.level.tolist() == level.tolist()


@quick
@given(st.integers(1, 200), st.integers(0, 220), st.integers(0, 5), st.integers(1, 7))
def test_a_sample_is_spread_in_proportion(rows, examples, seed, classes):
    y = np.sort(np.arange(rows) % classes)
    x = np.arange(rows)[:, None]
    found = sample(Source(x, y, x, y), examples, seed)
    taken = min(examples, rows) if examples else rows
    assert len(found.y_test) == len(found.y_train) == taken
    assert (np.diff(found.x_test[:, 0]) > 0).all()
    share = np.bincount(y, minlength=classes) * taken / rows
    assert np.abs(np.bincount(found.y_test, minlength=classes) - share).max() < 1 + 1e-9
