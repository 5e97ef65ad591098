"""All that is to be measured on an accelerator, in one command for a short time on one.

    python -m experiments.throughput.accelerator --minutes 12 --out FOLDER
    python -m experiments.throughput.accelerator --minutes 5 --out FOLDER --tiny    (a CPU, to see that it runs)

Seven steps in the order of ``STEPS``; each is a process of its own, which is ended when the share of the time up to it
is used, so that what a step does not need goes to the next ones. A step is many cells. The row of a cell is written to
``FOLDER/STEP.jsonl`` as soon as it is measured, and ``FOLDER/summary.md`` after each step. The same command again goes
on with the cells that are missing; a cut-off loses one cell. A cell that fails is a row with its error.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.throughput.cells import STEPS, Cell
from hetfl_jax.core import machine

Row = dict[str, Any]
GRACE = 5.0  #: seconds that a process has to write what it measured


class Given(NamedTuple):
    """The command line."""

    minutes: float
    out: Path
    tiny: bool
    step: str  #: only this one, in this process
    seconds: float  #: of that step
    here: bool


def rows_of(out: Path, step: str) -> list[Row]:
    """What a step has measured; a line that a cut-off left half written counts as none."""
    file, found = out / f"{step}.jsonl", list[Row]()
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def run_step(name: str, out: Path, tiny: bool, seconds: float, cells: Sequence[Cell] | None = None) -> int:
    """Measure the cells of a step that have no row yet, as long as there is time; how many were measured."""
    end, file = time.monotonic() + seconds, out / f"{name}.jsonl"
    if file.exists() and not file.read_text().endswith("\n"):
        file.write_text(file.read_text() + "\n")  # a cut-off left half a line
    done = {row["cell"] for row in rows_of(out, name) if "error" not in row}
    measured = 0
    for cell in STEPS[name].cells(tiny) if cells is None else cells:
        if cell.name in done:
            continue
        if time.monotonic() >= end:
            break
        began = time.monotonic()
        try:
            found = cell.measure(end - time.monotonic())
        except Exception as error:
            found = [{"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}]
        took = round(time.monotonic() - began, 1)
        with file.open("a") as kept:
            for row in found:
                kept.write(json.dumps({"cell": cell.name, **row, "took s": took}) + "\n")
        measured += 1
    return measured


def apart(name: str, given: Given, seconds: float) -> None:
    """A step in a process of its own, ended when its time is over."""
    command = [sys.executable, "-m", "experiments.throughput.accelerator", "--out", str(given.out), "--step", name,
               "--seconds", str(seconds), *["--tiny"] * given.tiny]  # fmt: skip
    try:
        subprocess.run(command, timeout=seconds + GRACE, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: its time is over, one cell is lost", flush=True)


def shares(total: float) -> dict[str, float]:
    """Seconds from the start at which each step ends at the latest."""
    ends, used = {}, 0.0
    for name, step in STEPS.items():
        used += step.share
        ends[name] = total * used
    return ends


def summary(out: Path, given: Given) -> str:
    """All rows as tables of Markdown."""
    parts = [f"# {' '.join(['python -m experiments.throughput.accelerator', *sys.argv[1:]])}"]
    for name, step in STEPS.items():
        rows = rows_of(out, name)
        whole = len(STEPS[name].cells(given.tiny))
        done = len({row["cell"] for row in rows if "error" not in row})
        parts.append(f"## {name}: {step.meaning}\n\n{done} of {whole} cells.\n")
        good = [row for row in rows if "error" not in row]
        for kind in dict.fromkeys(tuple(row) for row in good):
            parts.append(table([row for row in good if tuple(row) == kind]))
        parts += [f"- {row['cell']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows of one kind in Markdown."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_shown(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def parse(arguments: Sequence[str] | None = None) -> Given:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="of all steps, > 0")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--step", choices=STEPS, default="", help="only this step, in this process")
    parser.add_argument("--seconds", type=float, default=1e9, help="of --step")
    parser.add_argument("--here", action="store_true", help="all steps in this process; none is ended from outside")
    given = Given(**vars(parser.parse_args(arguments)))
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes}, allowed > 0")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """All steps, or one."""
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.step:
        machine.use_cache()
        run_step(given.step, given.out, given.tiny, given.seconds)
        return
    began, ends = time.monotonic(), shares(60 * given.minutes)
    for name in STEPS:
        left = began + ends[name] - time.monotonic()
        if left <= 0:
            print(f"{name}: no time left", flush=True)
            continue
        run: Callable[..., Any] = run_step if given.here else apart
        run(name, *((given.out, given.tiny, left) if given.here else (given, left)))
        (given.out / "summary.md").write_text(summary(given.out, given))
        print(f"{name}: {len(rows_of(given.out, name))} rows after {time.monotonic() - began:.0f} s", flush=True)
    print(f"written to {given.out}/summary.md", flush=True)


if __name__ == "__main__":
    main()
