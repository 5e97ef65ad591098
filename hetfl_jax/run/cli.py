"""The command line: ``hetfl train | config | list | eval | plot | export | report | compare | cite``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax

from hetfl_jax.core import machine
from hetfl_jax.core.types import Config
from hetfl_jax.run import finished
from hetfl_jax.run.config import as_text, config_names, load_config
from hetfl_jax.run.keys import KEYS
from hetfl_jax.run.stop import STOPPED, Stopped

DEFAULT_CONFIG = "heterofl_digits"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors are one line on stderr.

    Args:
      argv: arguments after ``hetfl``; by default those of this process.

    Returns:
      The exit code: 0, 2 for wrong input or a full device, 130 after an interrupt, 143 after SIGTERM. With
      ``HETFL_TRACEBACK`` in the environment wrong input raises instead, for debugging.
    """
    parser = _parser()
    given, rest = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    if rest and not (given.command in ("train", "config", "sweep") and all(r.startswith("--config") for r in rest)):
        parser.error(_unknown(next(r for r in rest if not r.startswith("--config")) if rest else "", given.command))
    machine.use_all_cores()
    machine.use_cache()
    try:
        given.run(given, rest)
    except KeyboardInterrupt:
        print("hetfl: stopped; go on with --resume", file=sys.stderr)
        return 130
    except Stopped as error:
        print(f"hetfl: {error}; go on with --resume", file=sys.stderr)
        return STOPPED
    except jax.errors.JaxRuntimeError as error:
        return _device_error(error)
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, OSError) as error:
        if os.environ.get("HETFL_TRACEBACK"):
            raise
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        print(f"hetfl: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--config FILE`` and ``--config.KEY VALUE`` as ``--config=FILE``: both ways of writing are understood.

    >>> _joined(["train", "--config", "fedavg_mnist", "--config.train.rounds", "3", "--resume"])
    ['train', '--config=fedavg_mnist', '--config.train.rounds=3', '--resume']
    """
    out: list[str] = []
    for argument in arguments:
        if out and out[-1].startswith("--config") and "=" not in out[-1] and not argument.startswith("-"):
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    return out


def _unknown(argument: str, command: str) -> str:
    """What to say of an argument that there is not: a key of the config is written with its block.

    >>> _unknown("--rounds=3", "train")
    "unknown argument '--rounds=3': did you mean --config.train.rounds?"
    """
    name = argument.lstrip("-").partition("=")[0].rpartition(".")[2]
    places = [f"--config.{block}.{name}" for block, keys in KEYS.items() if name in keys]
    hint = f": did you mean {' or '.join(places)}?" if places and command in ("train", "config", "sweep") else ""
    return f"unknown argument {argument!r}{hint}"


def _device_error(error: Exception) -> int:
    """A device that is full, or a process of the run that was lost, in one line; others are raised again.

    Returns:
      2, of a full device. Where a process was lost, this one ends at once with 3.
    """
    text = " ".join(str(error).split())[:300]
    if jax.process_count() == 1 and "RESOURCE_EXHAUSTED" in text:
        print(
            "hetfl: the device's memory is full: --resume with a smaller train.clients_per_chunk (least: 1), or "
            f"start over with a smaller run.eval_batch_size: {text}",
            file=sys.stderr,
        )
        return 2
    if jax.process_count() == 1:
        raise error
    # The others wait for a process that is gone; leaving them in an orderly way would wait for it too.
    print(f"hetfl: a process of the run was lost, start all again with --resume: {text}", file=sys.stderr, flush=True)
    os._exit(3)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    >>> try:
    ...     _Parser(prog="hetfl").parse_args(["--rounds"])
    ... except SystemExit as end:
    ...     print(end.code)
    2
    """

    def error(self, message: str) -> NoReturn:
        """Print the error and where help is."""
        self.exit(2, f"hetfl: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    """All commands with their options; each names the function that runs it."""
    parser = _Parser(prog="hetfl", allow_abbrev=False, description="Federated learning with heterogeneous clients.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace, list[str]], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, f"Train from --config=NAME_OR_FILE[:args] (default {DEFAULT_CONFIG}).")
    train.epilog = "Any value of the config is set by --config.BLOCK.KEY=VALUE, e.g. --config.train.rounds=10."
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete what the run's folder holds")
    train.add_argument("--dry-run", action="store_true", help="print memory, programs and cost without training")
    train.add_argument("--target", metavar="TPU", help="of --dry-run: compile for a topology, e.g. v5e:2x4")
    train.add_argument("--profile", action="store_true", help="trace one round and print where its time went")
    train.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts: the first one's address, or auto")
    train.add_argument("--processes", type=int, help="several hosts: how many")
    train.add_argument("--process", type=int, help="several hosts: the number of this one, from 0")
    train.add_argument("--seeds", metavar="A..B", help="one run a seed (0..4, or 0,2,5), then mean and deviation")
    many = command("sweep", _sweep, "Run a config at many points, which share programs.")
    many.add_argument("--over", action="append", default=[], metavar="KEY=V,V,...", help="values, of numbers also A..B")
    many.add_argument("--zip", action="store_true", help="first values of all lists, then second ones, ...: no product")
    many.add_argument(
        "--sweep", default="", metavar="NAME,...", help="sweep_NAME() of the config's file, their product"
    )
    many.add_argument("--resume", action="store_true", help="run what is missing")
    many.add_argument("--overwrite", action="store_true", help="delete what the sweep's folder holds")
    many.add_argument("--dry-run", action="store_true", help="print points, programs and cost without training")
    many.add_argument("--processes", type=int, default=1, help="hosts that share the points and the folder: how many")
    many.add_argument("--process", type=int, default=0, help="the number of this host, from 0")
    many.add_argument("--full", action="store_true", help="checkpoints and plots of every point")
    shown = command("config", _config, "Print a config, complete, with the meaning of every key.")
    shown.add_argument("file", nargs="?", default=DEFAULT_CONFIG, help="name or file, with :args")
    command("list", _list, "List configs, methods, nets, data sources, splits, codecs and selections.")
    for name, run, text in (
        ("eval", _eval, "Evaluate a checkpoint of a run."),
        ("plot", _plot, "Draw a run's plots again."),
        ("export", _export, "Write one sub-model as plain arrays."),
    ):
        sub = command(name, run, text)
        sub.add_argument("folder", type=Path, help="the run's folder, e.g. runs/heterofl_digits")
        if name != "plot":
            sub.add_argument("--round", type=int, help="which checkpoint (default: the best)")
        if name == "export":
            sub.add_argument("--tier", "--level", required=True, help="a level or another model offered: c, x0.5")
            sub.add_argument("--model", type=int, help="which of several models, from 0")
            sub.add_argument("--output", type=Path, help="file to write (default: FOLDER/level_X.npz)")
    finished.add_commands(command)
    return parser


def config_of(arguments: Sequence[str], target: str = DEFAULT_CONFIG) -> Config:
    """The config that ``--config=FILE[:args]`` and ``--config.KEY=VALUE`` describe, complete.

    Args:
      target: the config where no file is given.

    Raises:
      ValueError: an unknown key, a value of the wrong type, or two files.

    >>> config_of(["--config=heterofl_digits:mix=a1-e1", "--config.train.rounds=3"]).train.rounds
    3
    """
    files = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    changes = [a for a in arguments if a.startswith("--config.")]
    if odd := [a for a in arguments if a.removeprefix("--config=") == a and not a.startswith("--config.")]:
        raise ValueError(f"{odd[0]} needs a value: --config=NAME_OR_FILE[:args], or --config.BLOCK.KEY=VALUE")
    if len(files) > 1:
        raise ValueError(f"--config given {len(files)} times: {', '.join(files)}; need one")
    return load_config(files[0] if files else target, *changes)


def _train(given: argparse.Namespace, rest: list[str]) -> None:
    """Train, or with ``--dry-run`` say what training would take; with ``--seeds`` one run a seed."""
    from hetfl_jax.results import tables
    from hetfl_jax.results.folder import write_json
    from hetfl_jax.run import train

    config = config_of(rest)
    machine.connect(given.coordinator, given.processes, given.process)
    options = {"resume": given.resume, "overwrite": given.overwrite, "trace": given.profile}
    if given.resume and given.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if given.dry_run:
        print(_dry_run(config, given.target))
        return
    if given.target:
        raise ValueError(f"--target={given.target} is for --dry-run: nothing runs on devices that are not here")
    if not given.seeds:
        train.train(config, **options)
        return
    from hetfl_jax.run.sweep import over_seeds

    seeds = _seeds(given.seeds)
    if given.profile:
        raise ValueError("--profile of several runs: need one, without --seeds")
    _, rows = over_seeds(config, seeds, resume=given.resume, overwrite=given.overwrite)
    folder = Path(config.run.folder) / config.run.name
    if not machine.is_first():
        return
    write_json(folder / "seeds.json", rows)
    print(tables.render_seeds(rows) + f"written to {folder / 'seeds.json'}")


def _sweep(given: argparse.Namespace, rest: list[str]) -> None:
    """Run a sweep: the product (or with ``--zip`` the pairs) of ``--over``, times the points of ``--sweep``."""
    from hetfl_jax.run import points
    from hetfl_jax.run.sweep import describe, summary, sweep

    config = config_of(rest)
    target = next((a.removeprefix("--config=") for a in rest if a.startswith("--config=")), DEFAULT_CONFIG)
    if given.resume and given.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    lists = points.parse_over(given.over)
    over: list[points.Values] = (points.zipped if given.zip else points.product)(lists) if lists else []
    if given.sweep:
        named = points.generated(target, given.sweep.split(","))
        over = [{**first, **second} for first in named for second in over] if over else named
    if given.dry_run:
        print(describe(config, over))
        return
    options = {name: getattr(given, name) for name in ("resume", "overwrite", "full", "process", "processes")}
    print(summary(sweep(config, over, **options)))


def _dry_run(config: Config, target: str | None) -> str:
    """What a run would take on this machine, or on the TPU topology ``target``."""
    if target is None:
        from hetfl_jax.run.dryrun import describe

        return describe(config)
    from hetfl_jax.run import plan

    return plan.describe(plan.plan(config, target))


def _seeds(text: str) -> list[int]:
    """Seeds of ``A..B`` (both ends), ``A,B,C`` or ``A``.

    Raises:
      ValueError: another text, A > B, or a number twice.

    >>> _seeds("0..2"), _seeds("0,2,5"), _seeds("3")
    ([0, 1, 2], [0, 2, 5], [3])
    """
    first, dots, last = text.partition("..")
    if dots and first.isdigit() and last.isdigit() and int(first) <= int(last):
        return list(range(int(first), int(last) + 1))
    parts = text.split(",")
    if dots or not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"--seeds {text!r}: allowed A..B with A <= B, e.g. 0..4, or different numbers, e.g. 0,2,5")
    return [int(part) for part in parts]


def _config(given: argparse.Namespace, rest: list[str]) -> None:
    """Print the resolved config with the meaning of every key."""
    print(as_text(config_of(rest, given.file)))


def _list(given: argparse.Namespace, rest: list[str]) -> None:
    """Print the names that a config may use, a line for each kind."""
    from hetfl_jax import methods
    from hetfl_jax.data.sources import GENERATED
    from hetfl_jax.models import NETS
    from hetfl_jax.models.layers import NORMS
    from hetfl_jax.parts.codec import CODECS
    from hetfl_jax.parts.local import OPTIMIZERS
    from hetfl_jax.run.selections import SELECTIONS
    from hetfl_jax.run.slots import ADVERSARIES
    from hetfl_jax.run.splits import SPLITS

    sources = ("digits", *GENERATED, "npz:<path>", "text:<path>", "tfds:<name>")
    for name, values in {
        "configs": config_names(),
        "methods": methods.names(),
        "nets": NETS,
        "norms": NORMS,
        "sources": sources,
        "splits": SPLITS,
        "selections": SELECTIONS,
        "codecs": CODECS,
        "adversaries": ADVERSARIES,
        "optimizers": OPTIMIZERS,
    }.items():
        print(f"{name:12s}{', '.join(values)}")


def _eval(given: argparse.Namespace, rest: list[str]) -> None:
    """Print the scores of a checkpoint."""
    from hetfl_jax.run.export import evaluate_run

    print(evaluate_run(given.folder, given.round))


def _plot(given: argparse.Namespace, rest: list[str]) -> None:
    """Draw the plots again and print their paths."""
    from hetfl_jax.run.export import plot_run

    print("\n".join(map(str, plot_run(given.folder))))


def _export(given: argparse.Namespace, rest: list[str]) -> None:
    """Write a sub-model and print the file's path."""
    from hetfl_jax.run.export import export_level

    print(export_level(given.folder, given.tier, given.round, given.output, given.model))


if __name__ == "__main__":
    sys.exit(main())
