"""Reference pages that are made from the package: config keys, commands, names, and what every method costs."""

import argparse
import ast
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import jax

from hetfl_jax import methods
from hetfl_jax.core import tree
from hetfl_jax.core.types import Tally
from hetfl_jax.engine.executors import executor
from hetfl_jax.engine.rounds import make_round, start
from hetfl_jax.engine.stores import device_store
from hetfl_jax.run import cli, federation
from hetfl_jax.run.config import config_names, load_config
from hetfl_jax.run.keys import KEYS

#: what a method needs to be tried on a small MLP, besides the defaults of a config
TRIED: dict[str, tuple[str, ...]] = {
    "cfl": (),
    "depthfl": ("family.mix=3x1-2x1",),
    "fjord": ("family.mix=w1x1-w0.5x1", "method.args.distill=False"),
    "heterofl": ("family.mix=a1-b1",),
    "inclusivefl": ("family.mix=3x1-2x1",),
    "lag": (
        "family.net=linear",
        "train.full_batch=True",
        "train.batch_size=1000",
        "train.learning_rate=0.001",
        "train.epochs=1",
    ),
    "sheterofl": ("family.mix=a1-b1",),
    "splitmix": ("family.mix=w0.5x1", "method.args.budgets=2-1"),
}
SMALL = (
    "data.source=digits", "data.clients=10", "family.net=mlp", "family.hidden=(16,16,16)",
    "train.batch_size=20", "data.examples=400",
)  # fmt: skip


def pages() -> dict[str, str]:
    """Text of each page by its name below ``reference/``."""
    return {
        "index": INDEX,
        "config": config_page(),
        "cli": cli_page(),
        "methods": methods_page(),
        "names": names_page(),
        "root": "# hetfl_jax\n\n::: hetfl_jax\n    options:\n      show_root_heading: false\n      members: true\n",
    }


INDEX = """# Reference

Everything below this page is made from the package when the site is built.

- [Config keys](config.md): every key, its default, unit and allowed values.
- [Commands](cli.md): `hetfl` and its arguments.
- [Methods and what they cost](methods.md): arguments of every method, and its bytes, memory and passes, measured.
- [Names](names.md): configs, nets, norms, sources, splits, selections, codecs, optimisers.
- The package, room by room. A room imports only from the rooms above it in this list: `core`, `models`, `data` and
  `engine`, `parts`, `clusters`, `methods`, `results`, `run`. `hetfl_jax.core.types` has the contracts: read it first.
"""


def config_page() -> str:
    """Every key of a config, block by block."""
    lines = ["# Config keys", "", "Set any of them by `--config.BLOCK.KEY=VALUE`, or in `hetfl_jax.load_config`. "
             "`hetfl config NAME` prints a whole config with the same explanations.", ""]  # fmt: skip
    for block, keys in KEYS.items():
        lines += [f"## {block}", "", "| key | default | meaning |", "|---|---|---|"]
        for name, key in keys.items():
            default = "{}" if key.default == {} else repr(key.default)
            lines.append(f"| `{block}.{name}` | `{default}` | {_cell(key.meaning)} |")
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    """``hetfl --help`` and that of every command."""
    parser = cli._parser()
    lines = ["# Commands", "", "`python -m hetfl_jax` is `hetfl`.", "", *_help(parser)]
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for name, sub in commands.choices.items():
        lines += [f"## hetfl {name}", "", *_help(sub)]
    return "\n".join(lines)


def _help(parser: argparse.ArgumentParser) -> list[str]:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)  # the same on every terminal
    return ["```text", parser.format_help().rstrip(), "```", ""]


def names_page() -> str:
    """What ``hetfl list`` prints, as a table."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as said:
        cli._list(argparse.Namespace(), [])
    rows = [line.split(maxsplit=1) for line in said.getvalue().splitlines()]
    table = [f"| {kind} | {', '.join(f'`{name}`' for name in names.split(', '))} |" for kind, names in rows]
    configs = [f"## {name}\n\n```text\n{_lab_note(name)}\n```\n" for name in config_names()]
    return "\n".join(
        ["# Names", "", "`hetfl list` prints this.", "", "| kind | names |", "|---|---|", *table, "",
         "# Configs", "", "Each config begins with a note: source, commands, published figures.", "", *configs]
    )  # fmt: skip


def _lab_note(name: str) -> str:
    path = Path(__file__).parents[1] / "configs" / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def methods_page() -> str:
    """Costs and arguments of every method."""
    lines = ["# Methods and what they cost", "", COSTS, "",
             "| method | models at the server | client memory | down | up | passes before training |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| [`{name}`](#{name}) | " + " | ".join(cost(name)) + " |" for name in methods.names()]
    for name in methods.names():
        make = methods.find(name)
        module = inspect.getmodule(make)
        lines += ["", f"## {name}", "", inspect.getdoc(module) or "", "",
                  f"Module: [`hetfl_jax.methods.{name}`](methods/{name}.md).", "",
                  "| argument (`method.args`) | default |", "|---|---|"]  # fmt: skip
        for argument, parameter in methods.arguments(make).items():
            default = "needed, or told by the run" if parameter.default is parameter.empty else f"`{_shown(parameter)}`"
            lines.append(f"| `{argument}` | {default} |")
    return "\n".join(lines) + "\n"


COSTS = """What each method says it costs before anything runs, on a small MLP. Memory and messages are those of a
client at the largest level, in sizes of the model it trains (1 is FedAvg, in float32): what it keeps between rounds,
what it receives, what it sends. "Passes before training" are forward passes over all of its examples besides those of
training, one for each model that is compared or judged. `ifca` has two models here, `cfl` room for eight;
`splitmix` has two base nets, each half as wide, and a client with budget 2 trains both, an item each."""


def cost(name: str) -> list[str]:
    """Cells of a method's row: its price, and the shapes of a round."""
    cohort = ("method.args.cohort=4",) if "cohort" in methods.arguments(methods.find(name)) else ()
    config = load_config("fedavg_mnist", f"method.name={name}", *SMALL, *cohort, *TRIED.get(name, ()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = federation.build(config)
    algorithm, key, store = made.algorithm, jax.random.key(0), device_store()
    assert algorithm.price is not None
    price, parameters = algorithm.price(), 32 * int(made.costs.parameters[0])
    judged = price.compared
    if algorithm.between is None:  # else a part of the round is on the host, which shapes cannot pass
        state = jax.eval_shape(lambda: start(algorithm, store, made.partition.size.size, key))
        _, info = jax.eval_shape(make_round(algorithm, executor("bucketed"), store), state, made.train, key)
        judged = judged or (1 if isinstance(info.items.seen.received, Tally) else 0)
    memory = algorithm.memory_rows * tree.nbytes(jax.eval_shape(algorithm.init, key)[1]) * 8
    sizes = (memory, int(price.down[0]), int(price.up[0]))
    return [str(algorithm.members), *(_number(size / parameters) for size in sizes), str(judged)]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def _shown(parameter: inspect.Parameter) -> str:
    return re.sub(r"^mappingproxy\((.*)\)$", r"\1", repr(parameter.default))


def _cell(text: Any) -> str:
    return re.sub(r"<([^>]*)>", r"&lt;\1&gt;", str(text)).replace("|", "\\|")
