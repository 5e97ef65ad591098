"""The progress bar: round, loss, score, rounds/s and ETA; a line an evaluation where there is no terminal."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from hetfl_jax.core.types import Line
from hetfl_jax.results.scores import evaluated, is_share, score_of


class Bar(Protocol):
    """What is told how far a run is, as a context."""

    def __enter__(self) -> "Bar":
        """Begin."""
        ...

    def __exit__(self, *_: Any) -> None:
        """End."""
        ...

    def advance(self, round: int, line: Line | None = None) -> None:
        """``round`` rounds are done; ``line`` is the newest metrics line, if there is one."""
        ...


def _bar(name: str, texts: Sequence[str], shown: bool) -> RichProgress:
    """A bar on stderr: its name, how many of how many, some texts, the time that is left.

    Args:
      name: at the left; may read fields of the task.
      texts: columns, templates over the task's fields.
      shown: else nothing is drawn.
    """
    columns = (TextColumn(name), MofNCompleteColumn(), BarColumn(), *map(TextColumn, texts), TimeRemainingColumn())
    return RichProgress(*columns, console=Console(stderr=True), disable=not shown)


class Progress:
    """A bar over rounds, as a context; one line an evaluation where stderr is no terminal.

    >>> with Progress(rounds=10, done=0, quiet=True) as bar:
    ...     bar.advance(1, {"round": 1, "train_loss": 0.5})
    """

    def __init__(self, rounds: int, done: int, quiet: bool):
        """Start at ``done`` of ``rounds``; ``quiet`` shows nothing at all."""
        shown = sys.stderr.isatty() and not quiet
        self._bar = _bar("round", ("{task.fields[scores]}", "{task.fields[rate]}"), shown)
        self._task = self._bar.add_task("", total=rounds, completed=done, scores="compiling", rate="")
        self._done = done
        self._lines = not shown and not quiet

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, round: int, line: Line | None = None) -> None:
        """``round`` rounds are done since the run began; ``line`` is the newest metrics line, if there is one."""
        task = self._bar.tasks[0]
        elapsed = task.elapsed or 0.0
        rate = f"{(round - self._done) / elapsed:.2f} rounds/s" if elapsed else ""
        scores = task.fields["scores"]
        if line is not None:
            loss = line["train_loss"]
            scores = "loss -" if loss is None else f"loss {loss:.3f}"
            name = score_of([line])
            value = next(iter(line[name].values())) if name in line else None
            if value is not None:
                scores += f" {name} {100 * value:.1f}%" if is_share(name) else f" {name} {value:.4g}"
        self._bar.update(self._task, completed=round, scores=scores, rate=rate)
        if self._lines and line is not None and evaluated([line]):
            print(f"round {round} of {task.total:g}: {scores}", file=sys.stderr, flush=True)


class Whole:
    """One bar over the rounds of all points of a sweep, which threads may move at once.

    >>> with Whole(points=2, rounds=20, quiet=True) as bar:
    ...     bar.of_point().advance(5)
    ...     bar.ended("seed=0: done")
    """

    def __init__(self, points: int, rounds: int, quiet: bool):
        """Start at nothing.

        Args:
          points: how many there are.
          rounds: of all points together, 0 where that is not known.
          quiet: show nothing.
        """
        shown = sys.stderr.isatty() and not quiet
        self._bar = _bar("{task.fields[points]} points, rounds", (), shown)
        self._points, self._ended, self._lines = points, 0, not shown and not quiet
        self._task = self._bar.add_task("", total=rounds, points=f"0/{points}")

    def __enter__(self) -> "Whole":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def of_point(self) -> "OfPoint":
        """What one point is told to move."""
        return OfPoint(lambda rounds: self._bar.advance(self._task, rounds))

    def ended(self, text: str) -> None:
        """A point is over; ``text`` says which, and how, where there is no terminal."""
        self._ended += 1
        self._bar.update(self._task, points=f"{self._ended}/{self._points}")
        if self._lines:
            print(f"point {self._ended} of {self._points}: {text}", file=sys.stderr, flush=True)


class OfPoint:
    """The part of a bar that is one point's."""

    def __init__(self, move: Callable[[int], None]):
        """``move`` is told by how many rounds it goes on."""
        self._move, self._done = move, 0

    def __enter__(self) -> "OfPoint":
        return self

    def __exit__(self, *_: Any) -> None:
        """Leave the bar to the other points."""

    def advance(self, round: int, line: Line | None = None) -> None:
        """``round`` rounds are done."""
        self._move(round - self._done)
        self._done = round
