"""The progress bar: round, loss, score, rounds/s and ETA; a line an evaluation where there is no terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from hetfl_jax.core.types import Line
from hetfl_jax.results.scores import evaluated, is_share, score_of


class Progress:
    """A bar over rounds, as a context."""

    def __init__(self, rounds: int, done: int, quiet: bool):
        """Start at ``done`` of ``rounds``."""
        shown = sys.stderr.isatty() and not quiet
        self._bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[scores]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("", total=rounds, completed=done, scores="compiling", rate="")
        self._done = done
        self._lines = not shown and not quiet

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, round: int, line: Line | None = None) -> None:
        """``round`` rounds are done; ``line`` is the newest metrics line, if there is one."""
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
