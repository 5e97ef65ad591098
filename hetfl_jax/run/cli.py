"""The command line: ``hetfl train | eval | plot | export``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from hetfl_jax.core import machine

DEFAULT_CONFIG = "configs/heterofl_digits.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors are one line on stderr and exit code 2."""
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    wants_config = given.command == "train"
    if rest and not (wants_config and all(r.startswith("--config") for r in rest)):
        parser.error(f"unknown argument {rest[0]!r}")
    machine.use_all_cores()
    machine.use_cache()
    try:
        given.run(given, rest)
    except KeyboardInterrupt:
        print("hetfl: stopped; go on with --resume", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())[:300]
        if jax.process_count() == 1 and "RESOURCE_EXHAUSTED" in text:
            print(
                "hetfl: the device's memory is full: --resume with a smaller train.clients_per_chunk (least: 1), or "
                f"start over with a smaller run.eval_batch_size: {text}",
                file=sys.stderr,
            )
            return 2
        if jax.process_count() == 1:
            raise
        # The others wait for a process that is gone; leaving them in an orderly way would wait for it too.
        print(
            f"hetfl: a process of the run was lost, start all again with --resume: {text}", file=sys.stderr, flush=True
        )
        os._exit(3)
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, OSError) as error:
        if os.environ.get("HETFL_TRACEBACK"):
            raise
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        print(f"hetfl: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hetfl", allow_abbrev=False, description="Federated learning with heterogeneous clients."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any, list[str]], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, f"Train from --config=FILE[:args] (default {DEFAULT_CONFIG}).")
    train.epilog = "Any value of the config is set by --config.BLOCK.KEY=VALUE, e.g. --config.train.rounds=10."
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete what the run's folder holds")
    train.add_argument("--dry-run", action="store_true", help="print memory, programs and cost without training")
    train.add_argument("--profile", action="store_true", help="trace one round and print where its time went")
    train.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts: the first one's address, or auto")
    train.add_argument("--processes", type=int, help="several hosts: how many")
    train.add_argument("--process", type=int, help="several hosts: the number of this one, from 0")
    train.add_argument("--seeds", metavar="A..B", help="one run a seed, then mean and deviation")
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
            sub.add_argument("--level", required=True, help="level letter, e.g. c")
            sub.add_argument("--cluster", type=int, help="which of several models, from 0 (IFCA, CFL)")
            sub.add_argument("--output", type=Path, help="file to write (default: FOLDER/level_X.npz)")
    return parser


def load_config(arguments: Sequence[str]) -> Any:
    """The config that ``--config=FILE[:args]`` and ``--config.KEY=VALUE`` describe.

    Raises:
      ValueError: an unknown key or a value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = [f"--config={DEFAULT_CONFIG}", *arguments]

    def parse(given: Sequence[str]) -> Any:
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["hetfl", *given])
        values(["hetfl", *given])
        return holder.value

    try:
        _check_keys(parse([a for a in arguments if a.startswith("--config=")]), arguments)
        return parse(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # An error inside the config file comes wrapped in its traceback; its last line is the message.
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        text = lines[-1].partition("Error: ")[2] or lines[-1] if "Traceback" in str(error) else " ".join(lines)
        raise ValueError(text) from error


def _check_keys(config: Any, arguments: Sequence[str]) -> None:
    """Every ``--config.KEY`` must name a value that the config has."""
    for argument in arguments:
        name = argument.removeprefix("--config").partition("=")[0].removeprefix(".")
        place = config
        for key in filter(None, name.split(".")):
            if not hasattr(place, "keys") or key not in place:
                allowed = ", ".join(place.keys()) if hasattr(place, "keys") else "nothing below it"
                raise ValueError(f"unknown config key {name!r}: {key!r} is not one of {allowed}")
            place = place[key]


def _train(given: argparse.Namespace, rest: list[str]) -> None:
    from hetfl_jax.results import report
    from hetfl_jax.results.folder import write_json
    from hetfl_jax.run import train as run

    config = load_config(rest)
    machine.connect(given.coordinator, given.processes, given.process)
    options = {"resume": given.resume, "overwrite": given.overwrite, "trace": given.profile}
    if given.resume and given.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if given.dry_run:
        from hetfl_jax.run.dryrun import describe

        print(describe(config))
        return
    if not given.seeds:
        run.train(config, **options)
        return
    _, rows = run.over_seeds(config, _seeds(given.seeds), **options)
    folder = Path(config.run.folder) / config.run.name
    if not machine.is_first():
        return
    write_json(folder / "seeds.json", rows)
    print(report.render_seeds(rows) + f"written to {folder / 'seeds.json'}")


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("..")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise ValueError(f"--seeds {text!r}: allowed A..B with A <= B, e.g. 0..4")
    return list(range(int(first), int(last or first) + 1))


def _eval(given: argparse.Namespace, rest: list[str]) -> None:
    from hetfl_jax.run.export import evaluate_run

    print(evaluate_run(given.folder, given.round))


def _plot(given: argparse.Namespace, rest: list[str]) -> None:
    from hetfl_jax.run.export import plot_run

    print("\n".join(map(str, plot_run(given.folder))))


def _export(given: argparse.Namespace, rest: list[str]) -> None:
    from hetfl_jax.run.export import export_level

    print(export_level(given.folder, given.level, given.round, given.output, given.cluster))


if __name__ == "__main__":
    sys.exit(main())
