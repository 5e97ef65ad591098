"""The commands that read finished runs: ``hetfl report | compare | cite``."""

import argparse
from collections.abc import Callable
from pathlib import Path

Command = Callable[[str, Callable[[argparse.Namespace, list[str]], None], str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add the three to the command line.

    Args:
      command: (name, what runs it, help) -> the parser of the new command.
    """
    page = command("report", _report, "Write one HTML page of runs and sweeps.")
    page.add_argument("folders", nargs="+", metavar="RUN_OR_SWEEP", help="folders, e.g. runs/heterofl_digits")
    page.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the file (default: report.html)")
    pairs = command("compare", _compare, "Paired differences between runs over common seeds, against the first.")
    pairs.add_argument("folders", nargs="+", metavar="RUN_OR_SWEEP", help="folders; equal but for the seed: one group")
    pairs.add_argument("--metric", help="by its name in metrics.jsonl (default: the score)")
    pairs.add_argument("--confidence", type=float, default=0.95, help="of the interval (default: 0.95)")
    papers = command("cite", _cite, "Print the BibTeX of the method, the data and the parts of a run.")
    papers.add_argument("folder", type=Path, metavar="RUN", help="a run's or a sweep's folder")


def _report(given: argparse.Namespace, rest: list[str]) -> None:
    """Write the page and print its path."""
    from hetfl_jax.run.report import report

    print(f"written to {report(given.folders, given.output)}")


def _compare(given: argparse.Namespace, rest: list[str]) -> None:
    """Print the table of differences."""
    from hetfl_jax.results.compare import compare, render

    print(render(compare(given.folders, given.metric, given.confidence)), end="")


def _cite(given: argparse.Namespace, rest: list[str]) -> None:
    """Print the BibTeX entries."""
    from hetfl_jax.run.cite import cite

    print(cite(given.folder), end="")
