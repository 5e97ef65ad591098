"""Points of a sweep: which configs it runs, from lists of values by dotted key."""

import ast
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hetfl_jax.core.types import Config
from hetfl_jax.run.config import check_key, complete, find_config
from hetfl_jax.run.values import fitted

Values = dict[str, Any]  #: by dotted key
LONGEST = 200  #: bytes of a point's name; file systems allow 255, and files beside it have longer ones


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  #: of its folder: ``train.learning_rate=0.1,run.seed=0``
    values: Values
    config: Config


def points(config: Config, over: Sequence[Mapping[str, Any]], folder: Path, method: Any = None) -> list[Point]:
    """The points of a sweep, all checked before any of them runs.

    Args:
      config: complete, what all of them share.
      over: what each changes of the config, by dotted key.
      folder: of the sweep; a point's run is in ``folder/name``.
      method: in place of the config's, as of ``train``.

    Raises:
      ValueError: no points, two with the same name, an unknown key, or a value of another kind.

    >>> from hetfl_jax.run.config import load_config
    >>> found = points(load_config("fedprox_mnist"), [{"train.learning_rate": 0.3}], Path("runs/s"))
    >>> found[0].name, found[0].config.train.learning_rate, found[0].config.run.folder
    ('train.learning_rate=0.3', 0.3, 'runs/s')
    """
    if not over:
        raise ValueError("a sweep of no points: need --over KEY=VALUE,... (over)")
    for number, values in enumerate(over):
        _check_values(number, values)
    made = [_point(config, dict(values), folder, method) for values in over]
    names = [point.name for point in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two points are called {twice!r}: need each once (over)")
    return made


def _check_values(number: int, values: Any) -> None:
    """A point changes something, but not where its run is written, and has a name that a folder can have.

    Raises:
      ValueError: no values, ``run.name`` or ``run.folder`` among them, or a name of more than 200 bytes.
    """
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"point {number} is {values!r}: need a dict of values by key, train.learning_rate (over)")
    if wrong := [key for key in values if key in ("run.name", "run.folder")]:
        raise ValueError(f"over {wrong[0]}: a sweep names its points itself, need another key (over)")
    name = name_of(values)
    if len(name.encode()) > LONGEST:
        raise ValueError(f"point {name[:60]}... has a name of {len(name.encode())} bytes, allowed {LONGEST} (over)")


def _point(config: Config, values: Values, folder: Path, method: Any) -> Point:
    """One point: its name, and the config with its values, complete; another method brings its own arguments."""
    blocks = config.to_dict()
    if "method.name" in values:
        blocks["method"]["name"] = values["method.name"]
        blocks = complete(blocks, tell=lambda text: None).to_dict()
    for key, value in values.items():
        check_key(blocks, key)
        _set(blocks, key.split("."), value, key)
    name = name_of(values)
    blocks["run"]["name"], blocks["run"]["folder"] = name, str(folder)
    return Point(name, values, complete(blocks, tell=lambda text: None, method=method))


def _set(blocks: Values, path: Sequence[str], value: Any, key: str) -> None:
    """Put a value at a path of nested dicts, of the kind of the one that is there."""
    for part in path[:-1]:
        blocks = blocks[part]
    before = blocks.get(path[-1])
    blocks[path[-1]] = value if before is None else fitted(value, before, key)


def name_of(values: Mapping[str, Any]) -> str:
    """A point's name, of which a folder can be called.

    >>> name_of({"train.learning_rate": 0.1, "data.source": "npz:a/b.npz"})
    'train.learning_rate=0.1,data.source=npz:a_b.npz'
    """
    return ",".join(f"{key}={value}" for key, value in values.items()).replace("/", "_").replace(" ", "")


def product(over: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Every combination, the last key fastest.

    Raises:
      ValueError: a key without values, or values that are no list.

    >>> product({"train.learning_rate": [0.1, 0.3], "run.seed": [0]})
    [{'train.learning_rate': 0.1, 'run.seed': 0}, {'train.learning_rate': 0.3, 'run.seed': 0}]
    """
    lists = _lists(over)
    return [dict(zip(lists, each)) for each in itertools.product(*lists.values())]


def zipped(over: Mapping[str, Sequence[Any]]) -> list[Values]:
    """The first values of all keys, then the second ones, and so on.

    Raises:
      ValueError: as ``product``, or lists that differ in length.

    >>> zipped({"train.learning_rate": [0.1, 0.3], "run.seed": [0, 1]})
    [{'train.learning_rate': 0.1, 'run.seed': 0}, {'train.learning_rate': 0.3, 'run.seed': 1}]
    """
    lists = _lists(over)
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
        raise ValueError(f"parallel lists of different lengths: {counts} (--zip)")
    return [dict(zip(lists, each)) for each in zip(*lists.values())]


def _lists(over: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Lists of values by key.

    Raises:
      ValueError: no dict, a value that is no list, or an empty list.
    """
    if not isinstance(over, Mapping):
        raise ValueError(f"over is a {type(over).__name__}: need a dict of lists by key, train.learning_rate (over)")
    for key, values in over.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
            raise ValueError(f"over {key} is a {type(values).__name__}: need a list of values (over)")
    lists = {key: list(values) for key, values in over.items()}
    if empty := next((key for key, values in lists.items() if not values), None):
        raise ValueError(f"over {empty}: an empty list, need at least one value (over)")
    return lists


def parse_over(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Lists of values from ``KEY=V1,V2,...`` or, of whole numbers, ``KEY=A..B``; commas within brackets stay.

    Raises:
      ValueError: a text without a key or values, or a key given twice.

    >>> parse_over(["run.seed=0..2", "family.mix=a1,a1-e1", "family.hidden=(8,),(16,16)"])
    {'run.seed': [0, 1, 2], 'family.mix': ['a1', 'a1-e1'], 'family.hidden': [(8,), (16, 16)]}
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.removeprefix("--").removeprefix("config.")
        if not equals or not key or not values:
            raise ValueError(f"--over {text!r}: need KEY=VALUE,VALUE,... such as train.learning_rate=0.01,0.1")
        if key in found:
            raise ValueError(f"--over {key} is given twice: need all its values in one list")
        first, dots, last = values.partition("..")
        if dots and first.lstrip("-").isdigit() and last.lstrip("-").isdigit():
            if int(first) > int(last):
                raise ValueError(f"--over {text!r}: allowed A..B with A <= B")
            found[key] = list(range(int(first), int(last) + 1))
        else:
            found[key] = [_value(part) for part in _split(values)]
    return found


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket.

    >>> _split("a,(1,2),[3]")
    ['a', '(1,2)', '[3]']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    """A Python literal, else the text itself.

    >>> _value("0.1"), _value("None"), _value("a1-e1")
    (0.1, None, 'a1-e1')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def generated(target: str, names: Sequence[str]) -> list[Values]:
    """The product of a config file's ``sweep_NAME()``, each of which yields dicts of dotted keys.

    A file with ``get_hyper(hyper)`` has the name ``hyper``.

    Args:
      target: of ``--config``: a name or a file.
      names: of the generators, without ``sweep_``.

    Raises:
      ValueError: a name that the file has not, with those that it has; a generator that yields nothing.
    """
    path = find_config(target.partition(":")[0])
    spec = importlib.util.spec_from_file_location("hetfl_jax_sweeps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    makers: dict[str, Callable[[], Iterable[Values]]] = {
        name.removeprefix("sweep_"): of
        for name, of in vars(module).items()
        if name.startswith("sweep_") and callable(of)
    }
    if hasattr(module, "get_hyper"):
        makers["hyper"] = lambda: module.get_hyper(Hyper)
    if wrong := [name for name in names if name not in makers]:
        raise ValueError(f"sweep {wrong[0]!r} is not one of {', '.join(makers) or 'none'} of {path} (--sweep)")
    lists = [[_without_prefix(values) for values in makers[name]()] for name in names]
    if empty := next((name for name, values in zip(names, lists) if not values), None):
        raise ValueError(f"sweep {empty!r} of {path} yields nothing (--sweep)")
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*lists)]


def _without_prefix(values: Mapping[str, Any]) -> Values:
    """Keys without a leading ``config.``, as other programs write them.

    >>> _without_prefix({"config.train.rounds": 3})
    {'train.rounds': 3}
    """
    return {key.removeprefix("config."): value for key, value in values.items()}


class Hyper:
    """What ``get_hyper(hyper)`` of a config may call: lists of points, as parameter sweeps have them.

    >>> rates, seeds = Hyper.sweep("train.learning_rate", [0.1, 0.3]), Hyper.fixed("run.seed", 0)
    >>> Hyper.product([rates, seeds]) == Hyper.zipit([rates, seeds])
    True
    """

    @staticmethod
    def sweep(name: str, values: Iterable[Any]) -> list[Values]:
        """One point a value."""
        return [{name: value} for value in values]

    @staticmethod
    def fixed(name: str, value: Any, length: int = 1) -> list[Values]:
        """The same value, ``length`` times.

        >>> Hyper.fixed("run.seed", 0, 2)
        [{'run.seed': 0}, {'run.seed': 0}]
        """
        return [{name: value}] * length

    @staticmethod
    def product(lists: Sequence[Iterable[Values]]) -> list[Values]:
        """Every combination."""
        return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*lists)]

    @staticmethod
    def zipit(lists: Sequence[Sequence[Values]]) -> list[Values]:
        """The first of all, then the second ones; a list of one stands for all."""
        length = max(map(len, lists))
        long = [list(each) * length if len(each) == 1 else list(each) for each in lists]
        return [{k: v for part in parts for k, v in part.items()} for parts in zip(*long, strict=True)]

    @staticmethod
    def chainit(lists: Sequence[Iterable[Values]]) -> list[Values]:
        """One list after the other.

        >>> Hyper.chainit([Hyper.sweep("run.seed", [0]), Hyper.sweep("run.seed", [7])])
        [{'run.seed': 0}, {'run.seed': 7}]
        """
        return [values for each in lists for values in each]
