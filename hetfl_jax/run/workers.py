"""Which points of a sweep run when: one a device, or several at once on each."""

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from hetfl_jax.core import machine, platform
from hetfl_jax.results.progress import Whole
from hetfl_jax.run.evaluate import Metric
from hetfl_jax.run.given import Own
from hetfl_jax.run.lab import Lab, prepare
from hetfl_jax.run.lockstep import Lockstep, Seat, alone
from hetfl_jax.run.points import Point
from hetfl_jax.run.programs import Shared, fixed
from hetfl_jax.run.standing import DONE, FAILED, Ended, Standing
from hetfl_jax.run.stop import Stopped
from hetfl_jax.run.train import completed_for, play

MOST = 64  #: points at once where the config does not say


class Waiting:
    """Points that nobody has begun, for several workers.

    >>> Waiting([]).take()
    []
    """

    def __init__(self, points: Sequence[Point]):
        """All of them, in their order."""
        self._points, self._kinds, self._lock = list(points), dict[str, str](), threading.Lock()

    def take(self, like: Point | None = None, count: int = 1) -> list[Point]:
        """The next points, up to ``count``; those like ``like`` differ from it in numbers and seeds only."""
        with self._lock:
            kind = like and self._kind(like)
            found = [point for point in self._points if kind is None or self._kind(point) == kind][:count]
            self._points = [point for point in self._points if all(point is not other for other in found)]
        return found

    def _kind(self, point: Point) -> str:
        """What is fixed in a point's programs, as text."""
        if point.name not in self._kinds:
            self._kinds[point.name] = fixed(point.config)
        return self._kinds[point.name]

    def put_back(self, points: Sequence[Point]) -> None:
        """They come next."""
        with self._lock:
            self._points = [*points, *self._points]


def run_all(points: Sequence[Point], run: Callable[[Waiting, jax.Device | None], bool], stop: threading.Event) -> None:
    """Every point: one worker a device where each point has one, else one worker.

    Args:
      run: runs the next points on a device; whether there were any.
      stop: once it is set no further point begins.
    """
    waiting = Waiting(points)
    alone = any(point.config.train.devices > 1 or point.config.train.executor == "debugging" for point in points)
    devices = [None] if alone else jax.local_devices()

    def work(device: jax.Device | None) -> None:
        while not stop.is_set() and run(waiting, device):
            pass

    if len(devices) == 1:
        work(devices[0])
    else:
        in_threads([partial(work, device) for device in devices[: len(points)]], stop)


def in_threads(tasks: Sequence[Callable[[], Any]], stop: threading.Event) -> None:
    """Run all of them, each in a thread; what one fails with stops the others at their next round.

    Raises:
      BaseException: that, such as an error of a full disk, or an interrupt.

    >>> found = []
    >>> in_threads([lambda n=n: found.append(n) for n in range(3)], threading.Event())
    >>> sorted(found)
    [0, 1, 2]
    """
    lost: list[BaseException] = []

    def run(task: Callable[[], Any]) -> None:
        try:
            task()
        except BaseException as error:
            lost.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if lost:
        raise lost[0]


def at_once(lab: Lab, said: set[str]) -> int:
    """How many points like this one run at once on a device: as the config says, or 1 on a CPU, else what fits.

    Args:
      said: why points run one after the other, where they have to; a reason that is new is told.
    """
    asked = lab.config.train.points_at_once or (1 if platform.current().name == "cpu" else 0)
    why = alone(lab.federation.algorithm, lab.executor, lab.store)
    if why is None:
        return asked or fitting(lab, machine.device_memory())
    if asked != 1 and why not in said:
        said.add(why)
        warnings.warn(f"points run one after the other: {why}", stacklevel=2)
    return 1


def fitting(lab: Lab, memory: int) -> int:
    """How many points like this one fit into a device's memory, by what the compiler says that a round takes.

    The examples are there once, for all points. Four fifths of the memory are used, by at most ``MOST`` points.

    Args:
      memory: bytes.
    """
    state = jax.eval_shape(lab.start)
    takes: Any = lab.step
    found = takes.jitted.lower(state, lab.population, lab.key).compile().memory_analysis()
    shared = lab.population.x.nbytes + lab.population.y.nbytes
    each = found.temp_size_in_bytes + found.output_size_in_bytes
    return max(1, min(MOST, int(0.8 * memory - shared) // max(each, 1)))


class Built(NamedTuple):
    """A point that may run."""

    point: Point
    lab: Lab
    seat: Seat
    began: float


class Worker(NamedTuple):
    """What runs points, whatever becomes of them."""

    plan: Standing
    own: Own
    metrics: Mapping[str, Metric] | None
    shared: Shared
    whole: Whole
    stop: threading.Event

    def next(self, waiting: Waiting, device: jax.Device | None) -> bool:
        """Run the next point, with others that share its programs if several run at once; whether there was any."""
        built = self.built(first := waiting.take(), device)
        if not built:
            return bool(first)
        one = built[0]
        if (count := at_once(one.lab, self.shared.said)) > 1:
            built += self.built(waiting.take(one.point, count - 1), device)
            waiting.put_back([other.point for other in built if other.seat.programs is not one.seat.programs])
            built = [other for other in built if other.seat.programs is one.seat.programs]
        if len(built) == 1:
            self.run(one)
        else:
            self.together(built, device)
        return True

    def built(self, points: Sequence[Point], device: jax.Device | None) -> list[Built]:
        """Those that can be built; one at a time builds and traces, so that the next one finds its programs."""
        found = []
        for point in points:
            began, seat = time.perf_counter(), Seat()
            try:
                with self.plan.lock:
                    lab = prepare(point.config, self.own, self.metrics, self.shared, device, seat)
                    self.plan.programs = self.shared.count()
            except Exception as error:  # the other points go on
                self.failed(point, error, began)
            else:
                found.append(Built(point, lab, seat, began))
        return found

    def together(self, built: list[Built], device: jax.Device | None) -> None:
        """Run points as one; one after the other where a program of all of them fails, as one that does not fit."""
        programs, before = id(built[0].seat.programs), self.shared.together
        points = max([len(built), *(size for kind, size in before if kind == programs)])  # compiled already
        meeting = Lockstep(points, self.shared.together.setdefault((programs, points), {}), range(len(built)))
        for place, one in enumerate(built):
            one.seat.take(meeting, place)
        left: list[Point] = []
        in_threads([partial(self.run, one, meeting, left) for one in built], self.stop)
        if left and not self.stop.is_set():
            why = " ".join(str(meeting.lost).split())[:300]
            warnings.warn(f"{len(left)} points run one after the other: {why}", stacklevel=2)
            for one in self.built(left, device):
                self.run(one)

    def run(self, one: Built, meeting: Lockstep | None = None, left: list[Point] | None = None) -> None:
        """One point; with a meeting in which a program fails, the point is ``left`` to be run again."""
        folder = self.plan.folder / one.point.name
        kept = folder / "checkpoints"
        going_on = self.plan.full and kept.exists() and any(kept.iterdir())
        try:
            result = play(
                one.lab, folder, partial(completed_for, self.own.method), resume=going_on, overwrite=not going_on,
                quiet=True, stop=self.stop, bar=self.whole.of_point(), light=not self.plan.full,
            )  # fmt: skip
        except Stopped:
            return
        except Exception as error:  # the other points go on
            if meeting is not None and left is not None and error is meeting.lost:
                left.append(one.point)
            else:
                self.failed(one.point, error, one.began)
            return
        finally:
            one.seat.leave()
        self.plan.end(Ended(one.point, DONE, result, None, round(time.perf_counter() - one.began, 3)))
        first = result.table[0]
        score = f": {first['level']} {first['last']:.4g}" if first["last"] is not None else ""
        self.whole.ended(f"{one.point.name}{score}")

    def failed(self, point: Point, error: Exception, began: float) -> None:
        """Take down what a point failed with."""
        text = " ".join(str(error).split())[:300] or type(error).__name__
        self.plan.end(Ended(point, FAILED, None, text, round(time.perf_counter() - began, 3)))
        self.whole.ended(f"{point.name} failed: {text}")
