"""Points of a sweep that run as one: each in a thread of its own, their programs as one with an axis of points.

A point's run is what it is alone; only where it calls a program does it wait until all others ask for the same one.
Then the arguments are stacked, the program runs under ``vmap``, and each point gets its row of what comes out. Rows
stay in the stack until something looks at them, so that a round's result is the next round's argument as it is.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Algorithm, PyTree
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.stores import Store
from hetfl_jax.run.programs import Programs


class Ask(NamedTuple):
    """What a point asks for."""

    name: Hashable
    fn: Callable[..., PyTree]
    args: tuple[PyTree, ...]
    reuse: bool


#: by program and argument: the points' arrays, and their stack
Stacked = dict[Hashable, tuple[tuple[Any, ...], jax.Array]]


class Stack:
    """An array of all points, [P, ...], and its copy on the host once somebody asked for it."""

    def __init__(self, array: jax.Array):
        """Of the device's array."""
        self.array = array
        self._host: np.ndarray | None = None

    def host(self) -> np.ndarray:
        """The values, fetched once for all points."""
        if self._host is None:
            self._host = np.asarray(self.array)
        return self._host


class Row:
    """One point's part of a ``Stack``, which jax and NumPy take for an array.

    >>> row = Row(Stack(jnp.arange(6).reshape(2, 3)), 1)
    >>> row.shape, np.asarray(row).tolist(), whole({"a": row})["a"].tolist(), int(row[0])
    ((3,), [3, 4, 5], [3, 4, 5], 3)
    """

    def __init__(self, stack: Stack, place: int):
        """Row ``place`` of the stack."""
        self.stack, self.place = stack, place
        self.shape, self.dtype, self.ndim = stack.array.shape[1:], stack.array.dtype, stack.array.ndim - 1

    def __jax_array__(self) -> jax.Array:
        """The row on the device."""
        return self.stack.array[self.place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The row on the host."""
        return np.array(self.stack.host()[self.place], dtype)

    def __getitem__(self, index: Any) -> jax.Array:
        """A part of the row on the device."""
        return self.__jax_array__()[index]

    def __int__(self) -> int:
        """The value of a scalar."""
        return int(np.asarray(self))

    def block_until_ready(self) -> "Row":
        """Wait for the program that makes the stack."""
        self.stack.array.block_until_ready()
        return self


def whole(values: PyTree) -> PyTree:
    """Rows taken out of their stacks; other leaves as they are.

    >>> whole((Row(Stack(jnp.array([5, 6])), 1), 0.1))
    (Array(6, dtype=int32), 0.1)
    """
    return jax.tree.map(lambda leaf: leaf.__jax_array__() if isinstance(leaf, Row) else leaf, values)


class Lockstep:
    """Where the threads of up to P points meet.

    >>> meeting, found = Lockstep(2), {}
    >>> def point(place):
    ...     found[place] = int(meeting.call(place, "twice", lambda x: 2 * x, (jnp.int32(place + 5),)))
    ...     meeting.leave(place)
    >>> threads = [threading.Thread(target=point, args=(place,)) for place in range(2)]
    >>> _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    >>> sorted(found.items())
    [(0, 10), (1, 12)]
    """

    def __init__(
        self, points: int, programs: dict[Hashable, Callable[..., PyTree]] | None = None,
        there: Iterable[int] | None = None,
    ):  # fmt: skip
        """For ``points`` points, of which those ``there`` have somebody; ``programs`` keeps what others compiled."""
        self.points = points
        self.lost: BaseException | None = None  #: what a program of all points failed with
        self._programs = {} if programs is None else programs
        self._there = set(range(points) if there is None else there)
        self._asked: dict[int, Ask] = {}
        self._stacked: Stacked = {}
        self._given: dict[int, Any] = {}
        self._turn = threading.Condition()

    def call(
        self, place: int, name: Hashable, fn: Callable[..., PyTree], args: tuple[PyTree, ...], reuse: bool = False
    ) -> PyTree:
        """What ``fn(*args)`` gives this point.

        Args:
          place: which point asks.
          name: the same for the same program.
          fn: traceable.
          args: trees of arrays and numbers.
          reuse: whether the arrays of the first argument are given away.

        Raises:
          Exception: what the program failed with, for all points.
        """
        with self._turn:
            self._asked[place] = Ask(name, fn, args, reuse)
            self._turn.notify_all()
            if not self._run_if_all_ask():
                self._turn.wait_for(lambda: place in self._given)
            given = self._given.pop(place)
        if isinstance(given, BaseException):
            raise given
        return given

    def leave(self, place: int) -> None:
        """A point has ended; the others no longer wait for it."""
        with self._turn:
            self._there.discard(place)
            self._run_if_all_ask()

    def _run_if_all_ask(self) -> bool:
        """Run what is asked for, once every point asks; points that ask for different things are run one by one."""
        if not self._there or set(self._asked) != self._there:
            return False
        asked, self._asked = self._asked, {}
        try:
            if len({ask.name for ask in asked.values()}) == 1:
                self._given.update(self._together(asked))
            else:
                self._given.update({place: ask.fn(*whole(ask.args)) for place, ask in asked.items()})
        except Exception as error:
            self.lost = error
            self._given.update(dict.fromkeys(asked, error))
        self._turn.notify_all()
        return True

    def _together(self, asked: Mapping[int, Ask]) -> PyTree:
        """Results by place. A place that nobody has any more goes on from its last row, or runs as the first point."""
        name, fn, args, reuse = asked[min(asked)]
        structure = jax.tree.structure(args)
        rows = [
            jax.tree.leaves(asked[place].args)
            if place in asked
            else [_at(leaf, place) for leaf in jax.tree.leaves(args)]
            for place in range(self.points)
        ]
        given_away = len(jax.tree.leaves(args[0])) if reuse else 0
        columns = [
            _column(leaves, {} if number < given_away else self._stacked, (name, number))
            for number, leaves in enumerate(zip(*rows, strict=True))
        ]
        axes = tuple(axis for _, axis in columns)
        known = (name, structure, axes)
        if known not in self._programs:

            def run(first: list[Any], rest: list[Any]) -> PyTree:
                return fn(*jax.tree.unflatten(structure, [*first, *rest]))

            over = jax.vmap(run, (list(axes[:given_away]), list(axes[given_away:])), axis_size=self.points)
            # An array that all points share is nobody's to give away.
            reused = bool(given_away) and all(axis == 0 for axis in axes[:given_away])
            self._programs[known] = jax.jit(over, donate_argnums=(0,) if reused else ())
        values = [value for value, _ in columns]
        found = self._programs[known](values[:given_away], values[given_away:])
        stacks = jax.tree.map(Stack, found)
        return {place: jax.tree.map(lambda stack, p=place: Row(stack, p), stacks) for place in asked}


def _at(leaf: Any, place: int) -> Any:
    """The row of another place in a leaf's stack; a leaf that is no row, as it is."""
    return Row(leaf.stack, place) if isinstance(leaf, Row) else leaf


def _column(
    leaves: tuple[Any, ...], stacked: Stacked | None = None, argument: Hashable = None
) -> tuple[Any, int | None]:
    """One leaf of all points as an argument, and its axis of points: none where all points have the same.

    Args:
      stacked: the last stack of each argument, used again while points give the same arrays, such as their data.
      argument: which one this is.

    >>> _column((0.1, 0.1)), _column((0.1, 0.2))[1]
    ((0.1, None), 0)
    """
    first = leaves[0]
    if all(leaf is first for leaf in leaves):
        return whole(first), None
    if not isinstance(first, jax.Array | Row):
        if all(leaf == first for leaf in leaves):
            return first, None
        return jnp.asarray(np.asarray(leaves, np.float32)), 0
    if isinstance(first, Row) and all(
        isinstance(leaf, Row) and leaf.stack is first.stack and leaf.place == place for place, leaf in enumerate(leaves)
    ):
        return first.stack.array, 0
    if stacked is None or any(isinstance(leaf, Row) for leaf in leaves):
        return jnp.stack([whole(leaf) for leaf in leaves]), 0
    if argument not in stacked or any(leaf is not other for leaf, other in zip(leaves, stacked[argument][0])):
        stacked[argument] = leaves, jnp.stack(leaves)
    return stacked[argument][1], 0


def alone(algorithm: Algorithm, executor: Executor, store: Store) -> str | None:
    """Why points of a method cannot run together; ``None`` where they can.

    >>> from hetfl_jax.engine.executors import executor
    >>> from hetfl_jax.engine.stores import device_store
    >>> alone(None, executor("debugging"), device_store())
    'nothing is compiled (train.executor)'
    """
    if not executor.jit:
        return "nothing is compiled (train.executor)"
    if executor.devices > 1:
        return "a point has several devices (train.devices)"
    if store.on_host:
        return "client memory is on the host (train.store)"
    return None if algorithm.between is None else "the method works on the host between rounds (method.name)"


class Seat:
    """A point's place in a lockstep, which is named once all points are built."""

    def __init__(self) -> None:
        """Nowhere yet."""
        self.programs: Programs | None = None  #: of the point, as they are alone
        self._meeting: Lockstep | None = None
        self._place = 0

    def take(self, meeting: Lockstep, place: int) -> None:
        """From now on the point's programs run with those of the others."""
        self._meeting, self._place = meeting, place

    def leave(self) -> None:
        """The point has ended."""
        if self._meeting is not None:
            self._meeting.leave(self._place)

    def _call(self, name: Hashable, fn: Callable[..., PyTree], *args: PyTree, reuse: bool = False) -> PyTree:
        if self._meeting is None:
            return fn(*args)
        return self._meeting.call(self._place, name, fn, args, reuse)

    def seated(self, programs: Programs, algorithm: Algorithm) -> Programs:
        """The programs as the point calls them."""
        self.programs = programs
        usual = programs.round.usual
        assert usual is not None

        def round(*args: PyTree) -> PyTree:
            return self._call("round", usual, *args, reuse=True)

        jitted: Any = getattr(usual, "jitted", usual)
        round.jitted, round._cache_size = jitted, jitted._cache_size  # type: ignore[attr-defined]
        return programs._replace(
            first=lambda key, clients, told: self._call(
                ("first", clients), lambda key, told: programs.first(key, clients, told), key, told
            ),
            round=programs.round._replace(usual=round),
            evaluate=lambda question, tier, *data: self._call(
                ("evaluate", question, tier), lambda *data: programs.evaluate(question, tier, *data), *data
            ),
            order=programs.order
            if algorithm.order is None
            else lambda *data: self._call("order", programs.order, *data),
            losses=lambda *data: self._call("losses", programs.losses, *data),
        )
