"""``hetfl cite``: the papers of what a run was made of, from ``methods/papers.bib``."""

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from hetfl_jax.results.reading import gather

_NAMES = re.compile(r"^  names = \{(.*)\},\n", re.MULTILINE)
#: parts that nobody needs to cite, or whose paper is cited with something else
COMMON = frozenset({
    "net:linear", "net:logistic", "net:mlp", "split:iid", "split:natural", "split:per_group", "split:domains",
    "split:lognormal_dirichlet", "select:uniform", "select:weighted", "select:loss_and_data", "optimizer:sgd",
})  # fmt: skip


class Paper(NamedTuple):
    """An entry of the table."""

    names: tuple[str, ...]  #: kind:value of what it is the paper of
    text: str  #: BibTeX


def papers() -> list[Paper]:
    """All entries of the table, in its order.

    >>> next(paper.text.partition(",")[0] for paper in papers() if "method:heterofl" in paper.names)
    '@inproceedings{diao2021heterofl'
    """
    text = (resources.files("hetfl_jax.methods") / "papers.bib").read_text(encoding="utf-8")
    entries = ["@" + part.strip() + "\n" for part in re.split(r"^@", text, flags=re.MULTILINE)[1:]]
    found = []
    for entry in entries:
        names = _NAMES.search(entry)
        assert names is not None, entry
        found.append(Paper(tuple(names[1].split()), _NAMES.sub("", entry)))
    return found


def cite(folder: str | Path) -> str:
    """BibTeX of the method, the data and the parts of a run, or of all points of a sweep.

    Above each entry stands what it is the paper of; parts without a known paper are named at the end.

    Args:
      folder: of a run that has been started, or of a sweep.

    Raises:
      ValueError: the folder holds no run, or no point of it has been started.

    >>> cite("nowhere")
    Traceback (most recent call last):
      ...
    ValueError: nowhere holds no run and no sweep: ...
    """
    points = [p for p in gather([folder])[0][0].points if p.config]
    if not points:
        raise ValueError(f"{folder}: no point has been started, so that nothing is known of its parts (RUN)")
    names = list(dict.fromkeys(name for point in points for name in parts(point.config)))
    return bibtex(names)


def bibtex(names: list[str]) -> str:
    """Entries of what is named, and what has none.

    Args:
      names: kind:value, as ``parts`` yields them.

    >>> text = bibtex(["method:ifca", "net:mlp", "split:mine"])
    >>> text.splitlines()[0], text.splitlines()[-1]
    ('% method:ifca', '% no paper known here of split:mine')
    """
    found = [(paper, [name for name in names if name in paper.names]) for paper in papers()]
    texts = [f"% {', '.join(used)}\n{paper.text}" for paper, used in found if used]
    known = {name for paper, _ in found for name in paper.names} | COMMON
    rest = [name for name in names if name not in known]
    return "\n".join(texts) + (f"\n% no paper known here of {', '.join(rest)}\n" if rest else "")


def parts(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config is made of, as kind:value.

    Args:
      config: by dotted key.

    >>> list(parts({"method.name": "fedavg", "family.norm": "none", "data.source": "npz:/data/cifar10.npz"}))
    ['software:hetfl_jax', 'software:jax', 'method:fedavg', 'source:cifar10']
    """
    yield from ("software:hetfl_jax", "software:jax")
    kinds = {"method": "method.name", "select": "select.name", "adversary": "adversary.name", "net": "family.net",
             "norm": "family.norm", "split": "data.split", "optimizer": "train.optimizer"}  # fmt: skip
    for kind, key in kinds.items():
        if config.get(key, "none") != "none":
            yield f"{kind}:{config[key]}"
    for way in ("uplink", "downlink"):
        if config.get(f"{way}.name", "none") != "none":
            yield f"codec:{config[f'{way}.name']}"
            yield from (f"codec:{how}" for how in ("error_feedback", "ef21") if config.get(f"{way}.{how}"))
    if config.get("devices.concurrency"):
        yield "clock:concurrency"
    yield from _arguments(config)
    yield f"source:{_source(config)}"
    if (groups := str(config.get("data.groups", "none")).partition(":")[0]) != "none":
        yield f"groups:{groups}"


def _arguments(config: Mapping[str, Any]) -> Iterator[str]:
    """Arguments of the method that are on and have a paper of their own."""
    told = {name.removeprefix("method.args."): v for name, v in config.items() if name.startswith("method.args.")}
    known = {name.partition(":")[2] for paper in papers() for name in paper.names if name.startswith("arg:")}
    yield from (f"arg:{name}" for name in told if name in known and told[name])
    server = told.get("server_optimizer.name", "sgd")
    if server != "sgd":
        yield from ("arg:server_optimizer", f"optimizer:{server}")


def _source(config: Mapping[str, Any]) -> str:
    """The data by its name; of a file, the data set whose name is in the file's.

    >>> _source({"data.source": "npz:/data/CIFAR-10.npz"}), _source({"data.source": "digits"})
    ('cifar10', 'digits')
    """
    kind, _, where = str(config.get("data.source", "")).partition(":")
    if not where:
        return kind
    stem = Path(where).stem.lower().replace("-", "").replace("_", "")
    known = {name.partition(":")[2] for paper in papers() for name in paper.names if name.startswith("source:")}
    inside = [name for name in known if name.replace("_", "") in stem]
    return max(inside, key=len) if inside else Path(where).stem
