"""The contracts of the library: read this file first.

A federated round is: **plan** who gets what, run **client** for each of them, **sum** the replies, let the
**server** use the sum. Every type here is a NamedTuple of arrays or of pure functions.

Axis names used in shape comments: ``N`` clients in the population, ``K`` work items of a round, ``L`` capacity
levels, ``C`` classes, ``M`` examples in the pool, ``n`` examples held by clients, ``B`` batch, ``E`` exits.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.core.devices import Devices as Devices

Array = jax.Array
PyTree = Any
Config = Any  #: an ``ml_collections.ConfigDict`` of blocks, see ``run.keys``
Arguments = Mapping[str, Any]  #: arguments by name
Line = dict[str, Any]  #: values by name, fit for JSON: of a round, or of a row of a table


class Views(NamedTuple):
    """Other ways to see the pool's examples, shared by all clients: pixels moved, labels renamed (``data.views``)."""

    pixels: Array  #: [V, P] int32, view v shows at place p what the pool has at ``pixels[v, p]``
    labels: Array  #: [V, C] int32, view v calls class c ``labels[v, c]``


class Population(NamedTuple):
    """One pool of examples and, in CSR form, which of them each client holds; no per-client copies.

    Client ``i`` holds the pool rows ``rows[offset[i] : offset[i] + size[i]]``. Build it with
    ``hetfl_jax.data.population``, which checks every range (JAX clamps bad gathers silently), and pass it to
    jitted functions as an argument: a pool that is closed over becomes program text.
    """

    x: Array  #: [M, ...] examples as stored, e.g. uint8 images
    y: Array  #: [M] int32 labels; of sequences [M, S], -1 where there is none
    rows: Array  #: [n] int32 pool rows, client after client
    offset: Array  #: [N] int32 first position of a client in ``rows``
    size: Array  #: [N] int32 examples per client
    level: Array  #: [N] int32 capacity level of the client, 0 is the largest
    classes: Array  #: [N, C] bool, labels that occur among the client's training examples
    view: Array | PyTree = ()  #: [N] int32 how the client sees its examples, where there are views
    views: Views | PyTree = ()
    levels: tuple[tuple[()], ...] = ()  #: a () for each level that ``level`` counts, so that tracing knows how many
    devices: Devices | tuple[()] = ()  #: of the clients, where time is simulated


class Shard(NamedTuple):
    """What one client sees of the population: the shared pool (left out where it travels apart) and its own row."""

    x: Array | PyTree
    y: Array | PyTree
    rows: Array | PyTree
    offset: Array  #: int32 scalar
    size: Array  #: int32 scalar
    classes: Array  #: [C] bool
    view: Array | PyTree = ()  #: int32 scalar
    views: Views | PyTree = ()


class Within(NamedTuple):
    """A traced level that runs masked inside the shape of a larger, static one.

    ``Within(0, jnp.int32(2))`` is level 2 inside the full model: entries beyond its window are zero.
    """

    base: int  #: the level whose shapes are used
    level: Array  #: int32 scalar, a level contained in ``base``


Level = int | Within  #: how a client is told its level: dense at its true shape, or masked inside a larger one


class Batch(NamedTuple):
    """Examples of one step."""

    x: Array  #: [B, ...] input of the net: prepared, and augmented while training
    labels: Array  #: [B] int32, or float targets; [B, S] of sequences
    valid: Array  #: [B] bool, the rest fills the batch up


class Tally(NamedTuple):
    """Sums over all examples seen, float32 scalars.

    >>> ACCURACY.of(Tally(jnp.float32(1.5), jnp.float32(3), jnp.float32(4))).item()
    0.75
    """

    loss: Array
    correct: Array
    examples: Array


def _share_of_hits(tally: Tally) -> Array:
    return tally.correct / jnp.maximum(tally.examples, 1)


class Score(NamedTuple):
    """By what a model is judged: a loss of each example, and one number from the sums over all of them."""

    name: str = "accuracy"  #: in metrics, table and plots; what ends in "accuracy" is a share, shown in percent
    #: (outputs [B, C], labels [B]) -> [B], the loss that ``Tally.loss`` sums
    each: Callable[[Array, Array], Array] = optax.softmax_cross_entropy_with_integer_labels
    of: Callable[[Tally], Array] = _share_of_hits
    least: bool = False  #: whether less is better


ACCURACY = Score()


class Cohort(NamedTuple):
    """The clients of a round."""

    ids: Array  #: [K] int32
    valid: Array  #: [K] bool
    stream: Array | int = 0  #: [K] int32, see ``Plan.stream``
    share: Array | tuple[()] = ()  #: [K] float32, see ``Plan.share``


class Plan(NamedTuple):
    """Who gets what this round. ``K`` is fixed; a cohort of random size marks the rest as not ``valid``."""

    ids: Array  #: [K] int32 client ids; a client may appear several times with different tickets
    valid: Array  #: [K] bool
    level: Array  #: [K] int32 capacity level of the item in this round
    ticket: PyTree = ()  #: leaves [K, ...], what distinguishes items of one client; ``()`` if nothing does
    stream: Array | int = 0  #: [K] int32, folded into the item's key; 0 leaves the key as it is
    row: Array | None = None  #: [K] int32 row of the client memory, default ``ids``; no two valid items share one
    notes: PyTree = ()  #: from the plan to the server, past the clients
    asked: "Account | tuple[()]" = ()  #: what a survey cost
    share: Array | tuple[()] = ()  #: [K] float32 how much a reply counts; ``()`` leaves that to the method
    known: PyTree = ()  #: leaves [K, ...], what the server weighs a reply with; nothing of it travels


class Items(NamedTuple):
    """A plan joined with the data and memory of its clients: what an executor gets. Leaves [K, ...]."""

    ids: Array
    key: Array
    valid: Array
    level: Array
    round: Array
    ticket: PyTree
    shard: Shard  #: x, y, rows and views are ``None`` here: the pool is shared and travels apart
    memory: PyTree
    share: Array | tuple[()] = ()  #: see ``Plan``
    known: PyTree = ()  #: see ``Plan``


class ClientContext(NamedTuple):
    """All that a client knows: what ``Algorithm.client`` and every slot on the client's side get."""

    key: Array
    round: Array  #: int32 scalar, from 0
    level: Level  #: an int (dense at its true shape) or a ``Within`` (masked inside a larger shape)
    shard: Shard | PyTree  #: ``()`` at the server
    ticket: PyTree
    sent: PyTree
    memory: PyTree
    received: Tally | tuple[()] = ()  #: of the received model on the client's own data, where a slot asks for it
    share: Array | tuple[()] = ()  #: how much the reply counts, see ``Plan``; only a merge reads this and the next
    known: PyTree = ()  #: what the server weighs the reply with, see ``Plan``


class Seen(NamedTuple):
    """What one item did and what it cost."""

    tally: Tally  #: of its local training
    work: Array  #: [2, L] int32 examples that went forward and backward through the net of each level
    down: Array  #: [3] int32, bits received, as ``core.bits`` counts them
    up: Array  #: [3] int32, bits sent
    received: Tally | tuple[()] = ()  #: of the received model before training, where the server weighs replies by it


class Account(NamedTuple):
    """Who did what; leaves [K, ...]. Summed exactly on the host."""

    ids: Array
    level: Array
    valid: Array
    ok: Array
    seen: Seen
    seconds: Array | tuple[()] = ()  #: float32 that the item took, where time is simulated
    late: Array | tuple[()] = ()  #: bool, whether its reply came too late to count


class Info(NamedTuple):
    """What a human wants of a round."""

    items: Account
    asked: Account | tuple[()]  #: of a survey before the round
    numbers: dict[str, Array]  #: named scalars: they go to metrics, TensorBoard and plots by name
    arrays: dict[str, Array]  #: further arrays by name, for ``Shown.line``
    device: Array | int = 0  #: [K] int32, which device ran each item; filled in by the engine
    refused: Array | int = 0  #: items of clients that do not exist, or that share a row of memory; likewise
    ran: Array | int = 0  #: see ``Outcome``; likewise


class Reply(NamedTuple):
    """What one client returns."""

    total: PyTree  #: summed over clients, into row ``member`` of ``[members, ...]`` accumulators
    member: Array | int  #: which model of a bank was trained, 0 for ordinary methods
    memory: PyTree  #: the client's private state after the round, full shape at every level
    report: PyTree  #: small and stacked over items, same shapes at every level; ``Seen`` of composed methods


class Outcome(NamedTuple):
    """What an executor returns."""

    total: PyTree  #: leaves [members, ...] at full shape
    memory: PyTree  #: leaves [K, ...]
    report: PyTree  #: leaves [K, ...]
    ok: Array  #: [K] bool, the item was valid and its reply finite
    ran: Array | int = 0  #: [2, L] int32, of each level the level whose shape it ran at, and clients at once


class State(NamedTuple):
    """All that a run needs to go on, apart from its constant key."""

    server: PyTree
    memory: PyTree  #: leaves [N, ...], kept by a ``Store``
    round: Array  #: int32 scalar, rounds done


class Tier(NamedTuple):
    """A model that is offered and evaluated; most methods offer their levels."""

    name: str
    parameters: int
    bytes: int  #: of all its variables
    macs: int  #: multiply-adds of one example's forward pass
    models: int = 0  #: nets whose outputs are averaged, along a leading axis of its variables; 0: one net, no such axis


class Question(NamedTuple):
    """What evaluation asks of a model. The first of a method is its score; others have a name."""

    name: str  #: before the score's in metrics and table, "" of the first
    variables: Callable[[PyTree, PyTree, Level], PyTree]  #: (server, client memory, tier) -> what is evaluated
    #: (variables, tier, batch as stored, shard or None) -> outputs [B, C] by the name of a reading, "" the first
    read: Callable[[PyTree, Level, Batch, Shard | None], dict[str, Array]]
    memory: bool = False  #: whether ``variables`` needs the client memory
    #: (variables, memory of one client [memory_rows, ...], its training data, tier) -> what is evaluated on its test
    #: data; then nothing else is evaluated
    own: Callable[[PyTree, PyTree, Shard, Level], PyTree] | None = None
    further: tuple[str, ...] = ()  #: which readings besides the first are scored, of questions after the first


class Order(NamedTuple):
    """Models that are used in an order, which is chosen when they are evaluated."""

    each: Callable[[PyTree], PyTree]  #: server -> leaves [M, ...], each model alone as ``Question.read`` takes it
    by: Callable[[PyTree, Array], PyTree]  #: (server, numbers [M] of the models in their new order) -> server


class Choice(NamedTuple):
    """Several models, of which each client uses one."""

    models: int
    place: Callable[..., Array]  #: (server, losses [N, models], ids [N] or None) -> [N] which model is whose
    in_use: Callable[[PyTree], int]  #: (server) -> how many of the models there are yet


class Shown(NamedTuple):
    """What a method wants people to see besides numbers. Plain Python on the host."""

    #: (info, true group of each client or None) -> further fields of the round's metrics line
    line: Callable[[Info, PyTree], Line] = lambda info, groups: {}
    #: (last metrics line) -> a sentence under the table, "" for none
    sentence: Callable[[Line], str] = lambda line: ""
    #: (model of each test batch, true group of each) -> further scores
    placed: Callable[[PyTree, PyTree], dict[str, float]] = lambda placed, groups: {}
    #: (folder, metrics lines, server, mean training losses [N, models], groups or None) -> files drawn
    figures: Callable[..., list[Path]] | None = None
    #: (server before the first round) -> what to warn of, "" for nothing
    warning: Callable[[PyTree], str] = lambda server: ""


class Needs(NamedTuple):
    """What a selection takes at the server, for people."""

    bytes: int = 0  #: of its state and of a round's arrays
    what: str = ""  #: what they are
    instead: str = ""  #: what would do with less
    note: str = ""  #: what else one should know before a run


class Gradient(NamedTuple):
    """The gradient of a client's mean loss before training, over all of its examples."""

    of: Callable[[PyTree, Level, Shard], Array]  #: (sent, level, shard) -> [P] flat, at full shape
    parameters: np.ndarray  #: [L] entries that a client of each level holds


class Price(NamedTuple):
    """What an item of each level is expected to cost before anything runs. On the host."""

    down: np.ndarray  #: [L] int64 bits received
    up: np.ndarray  #: [L] int64 bits sent
    compared: int = 0  #: models that go forward through all of a client's examples before training
    note: str = ""  #: what else holds, for people
    needs: Needs = Needs()  #: of the selection
    items: float = 1.0  #: that a client of a round has, on average
    plain: tuple[np.ndarray, np.ndarray] | tuple[()] = ()  #: (down, up), were nothing coded and everything sent


class Algorithm(NamedTuple):
    """A federated learning method as pure functions. ``compose`` fills them from parts; they may be hand-written.

    ``init(key) -> (server, memory)`` with ``memory`` of ONE row of client memory, ``()`` if stateless; a client has
    ``memory_rows`` of them.

    ``plan(key, round, server, population, survey) -> Plan``. ``survey(fn, sent, ids, levels, valid)`` asks clients
    something through the executor and stacks the answers of ``fn(key, sent, level, shard)``: at the levels [K] through
    the buckets, or, without ``levels``, with level 0.

    ``send(server, round) -> sent``, the same for all items.

    ``client(context) -> Reply`` for one client, no client axis in sight.

    ``widen(total, level)`` brings a total of the static level's shape to full shape.

    ``server(server, plan, sent, total, report, ok) -> (server, info)``. Items that are padding, absent or not finite
    add nothing to ``total`` and arrive as ``ok`` false. ``info`` is an ``Info``.

    ``model(server, tier, member=0) -> variables``; ``predict(variables, tier, x, shard=None, valid=None)``, [E, B, C],
    of a client's own data if ``shard`` is given, of rows of which ``valid`` [B] says which are real;
    ``statistics(variables, tier, x, valid)`` returns the statistics of one batch where the net collects them only
    before evaluation, else it is ``None``. ``questions`` are what evaluation asks, the first of them the ``score``.
    ``tiers`` are the models that are offered, by default the levels.

    ``judge(sent, level, shard) -> Tally``: sums over all of a client's examples before training; ``gradient`` likewise.

    ``drawn`` says how often each level is drawn; it is empty where every client has its own level all along.

    ``clients`` is for how many it was made, 0 where that does not matter; another population is an error.

    A plan may name a client twice only with another ``stream``, ``ticket`` or, with memory, ``row``. Items that break
    this, and those of clients that do not exist, are left out and counted in ``Info.refused``; a run stops there.

    ``same_selection(server, other)`` is the first server with the other's memory of who took part.

    ``between`` is work on the host between rounds (e.g. splitting a cluster).
    """

    levels: int
    members: int
    init: Callable[..., tuple[PyTree, PyTree]]
    plan: Callable[..., Plan]
    send: Callable[[PyTree, Array], PyTree]
    client: Callable[[ClientContext], Reply]
    widen: Callable[[PyTree, int], PyTree]
    server: Callable[..., tuple[PyTree, PyTree]]
    model: Callable[..., PyTree]
    predict: Callable[..., Array]
    questions: tuple[Question, ...] = ()
    score: Score = ACCURACY
    statistics: Callable[..., PyTree] | None = None
    judge: Callable[[PyTree, Level, Shard], Tally] | None = None
    gradient: Gradient | None = None
    tiers: tuple[Tier, ...] = ()
    choice: Choice | None = None
    order: Order | None = None
    same_selection: Callable[[PyTree, PyTree], PyTree] = lambda server, other: server
    drawn: tuple[float, ...] = ()
    price: Callable[[], Price] | None = None
    memory_rows: int = 1
    clients: int = 0
    shown: Shown = Shown()
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
