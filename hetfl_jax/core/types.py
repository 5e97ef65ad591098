"""The contracts of the library: read this file first.

A federated round is: **plan** who gets what, run **client** for each of them, **sum** the replies, let the
**server** use the sum. Every type here is a NamedTuple of arrays or of pure functions.

Axis names used in shape comments: ``N`` clients in the population, ``K`` work items of a round, ``L`` capacity
levels, ``C`` classes, ``M`` examples in the pool, ``n`` examples held by clients, ``B`` batch, ``E`` exits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any


class Views(NamedTuple):
    """Other ways to see the pool's examples, shared by all clients: pixels moved, labels renamed."""

    pixels: Array  #: [V, P] int32, view v shows at place p what the pool has at ``pixels[v, p]``
    labels: Array  #: [V, C] int32, view v calls class c ``labels[v, c]``


class Population(NamedTuple):
    """One pool of examples and, in CSR form, which of them each client holds; no per-client copies.

    Client ``i`` holds the pool rows ``index[offset[i] : offset[i] + size[i]]``. Build it with
    ``hetfl_jax.data.population``, which checks every range (JAX clamps bad gathers silently), and pass it to
    jitted functions as an argument: a pool that is closed over becomes program text.
    """

    x: Array  #: [M, ...] examples as stored, e.g. uint8 images
    y: Array  #: [M] int32 labels; of sequences [M, S], -1 where there is none
    index: Array  # type: ignore[assignment]  #: [n] int32 pool rows, client after client
    offset: Array  #: [N] int32 first position of a client in ``index``
    size: Array  #: [N] int32 examples per client
    level: Array  #: [N] int32 capacity level of the client, 0 is the largest
    classes: Array  #: [N, C] bool, labels that occur among the client's training examples
    view: Array | Any = ()  #: [N] int32 how the client sees its examples, where there are views
    views: Views | Any = ()


class Shard(NamedTuple):
    """What one client sees of the population: the shared pool (left out where it travels apart) and its own row."""

    x: Array | Any
    y: Array | Any
    index: Array | Any  # type: ignore[assignment]
    offset: Array  #: int32 scalar
    size: Array  #: int32 scalar
    classes: Array  #: [C] bool
    view: Array | Any = ()  #: int32 scalar
    views: Views | Any = ()


class Within(NamedTuple):
    """A traced level that runs masked inside the shape of a larger, static one."""

    base: int  #: the level whose shapes are used
    level: Array  #: int32 scalar, a level contained in ``base``


Level = int | Within  #: how a client is told its level: dense at its true shape, or masked inside a larger one


class Plan(NamedTuple):
    """Who gets what this round. ``K`` is fixed; a cohort of random size marks the rest as not ``valid``."""

    ids: Array  #: [K] int32 client ids; a client may appear several times with different tickets
    valid: Array  #: [K] bool
    level: Array  #: [K] int32 capacity level of the item in this round
    sent: PyTree  #: the same for all items
    ticket: PyTree  #: leaves [K, ...], what distinguishes items of one client; ``()`` if nothing does
    #: (the first leaf is folded into the item's key, 0 leaves it as it is)


class Items(NamedTuple):
    """A plan joined with the data and memory of its clients: what an executor gets. Leaves [K, ...]."""

    ids: Array
    key: Array
    valid: Array
    level: Array
    ticket: PyTree
    shard: Shard  #: x, y, index and views are ``None`` here: the pool is shared and travels apart
    memory: PyTree


class Reply(NamedTuple):
    """What one client returns."""

    total: PyTree  #: summed over clients, into row ``member`` of ``[members, ...]`` accumulators
    member: Array | int  #: which model of a bank was trained, 0 for ordinary methods
    memory: PyTree  #: the client's private state after the round, full shape at every level
    report: PyTree  #: small and stacked over items, same shapes at every level


class Outcome(NamedTuple):
    """What an executor returns."""

    total: PyTree  #: leaves [members, ...] at full shape
    memory: PyTree  #: leaves [K, ...]
    report: PyTree  #: leaves [K, ...]
    ok: Array  #: [K] bool, the item was valid and its reply finite


class State(NamedTuple):
    """All that a run needs to go on, apart from its constant key."""

    server: PyTree
    memory: PyTree  #: leaves [N, ...], kept by a ``Store``
    round: Array  #: int32 scalar, rounds done


class Algorithm(NamedTuple):
    """A federated learning method as pure functions. ``compose`` fills them from parts; they may be hand-written.

    ``init(key) -> (server, memory)`` with ``memory`` of ONE client, ``()`` if stateless.

    ``plan(key, round, server, population, survey) -> Plan``; ``survey(fn, sent, ids)`` asks clients something
    through the executor and stacks the answers of ``fn(key, sent, shard)``.

    ``client(key, sent, level, ticket, shard, memory) -> Reply`` for one client, no client axis in sight. ``level`` is a
    Python int (dense execution at its true shape) or a ``Within`` (masked execution inside a larger shape).

    ``widen(total, level)`` brings a total of the static level's shape to full shape.

    ``server(server, plan, total, report, ok) -> (server, info)``. Items that are padding, absent or not finite add
    nothing to ``total`` and arrive as ``ok`` false.

    ``model(server, level, member=0) -> variables`` and ``predict(variables, level, x, shard=None) -> [E, B, C]``
    serve evaluation, of a client's own data if ``shard`` is given; ``statistics(variables, level, x, valid)`` returns
    the statistics of one batch where the net collects them only before evaluation, else it is ``None``.

    ``judge(sent, level, shard) -> (loss, correct, examples)``: sums over all of a client's examples, before training.

    Where a client has a choice of ``models`` > 1, ``place(server, losses, ids) -> [N]`` says which one is whose, given
    the clients' training losses [N, models]. Every item of a round receives ``broadcast`` times a model's bytes and
    sends ``messages`` times them.

    ``others(server, memory) -> {name: server}`` are further models that evaluation looks at, as servers that hold them.

    ``between`` is work on the host between rounds (e.g. splitting a cluster).
    """

    levels: int
    members: int
    init: Callable[..., tuple[PyTree, PyTree]]
    plan: Callable[..., Plan]
    client: Callable[..., Reply]
    widen: Callable[[PyTree, int], PyTree]
    server: Callable[..., tuple[PyTree, PyTree]]
    model: Callable[..., PyTree]
    predict: Callable[..., Array]
    statistics: Callable[..., PyTree] | None = None
    judge: Callable[..., Any] | None = None
    models: int = 1
    broadcast: int = 1
    messages: int = 1
    place: Callable[..., Array] | None = None
    others: Callable[[PyTree, PyTree], dict[str, PyTree]] = lambda server, memory: {}
    between: "Between | None" = None


class Between(NamedTuple):
    """Work on the host after some rounds, on more than a round usually reports.

    When ``needed(info)``, the round is run once more from the same state by ``collecting``, with the same randomness;
    its ``server`` leaves the state alone and hands out what it collected as info. Then
    ``decide(server, collected, ask) -> (server, info)`` makes the state after the round from the one before;
    ``ask(fn, sent, ids)`` asks clients as a survey does. ``base`` is the method whose models these are.
    """

    needed: Callable[[PyTree], bool]
    collecting: Algorithm
    decide: Callable[..., tuple[PyTree, PyTree]]
    base: Algorithm
