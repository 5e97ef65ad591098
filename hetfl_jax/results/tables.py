"""What people see: the summary, the final table, and the plots."""

import datetime
import platform
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hetfl_jax.core.types import Arguments, Config, Line, Tier
from hetfl_jax.results import fairness, of_time
from hetfl_jax.results.scores import evaluated, is_share, score_of, written


def say(text: str, quiet: bool) -> None:
    """Print unless quiet, and at once.

    >>> say("ready", quiet=False)
    ready
    """
    if not quiet:
        print(text, flush=True)


def environment(devices: int) -> Line:
    """What the run ran on, for ``environment.json``: command, date (UTC), device, precision of products, versions.

    Args:
      devices: over how many the run is spread; results move by 1e-7 with it.

    >>> [name for name in environment(1) if name.startswith("jax")]
    ['jax', 'jaxlib']
    """
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "hetfl_jax")
    return {
        **command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def command() -> dict[str, str]:
    """The command line of this process as ``{"command": "hetfl ..."}``, if it is one of ``hetfl``; else nothing."""
    name = Path(sys.argv[0])
    is_ours = name.name == "hetfl" or (name.name == "__main__.py" and name.parent.name == "hetfl_jax")
    return {"command": shlex.join(["hetfl", *sys.argv[1:]])} if is_ours else {}


def headline(config: Config, named: Arguments, clients: int) -> str:
    """One line on what is about to run.

    Args:
      config: resolved.
      named: names of method, source, net and split.
      clients: of the population.

    >>> from ml_collections import ConfigDict
    >>> blocks = {"method": {"args": {"cohort": 5}}, "family": {"mix": "a1-b1"}, "train": {"rounds": 9}}
    >>> named = {"method": "fedavg", "source": "digits", "net": "mlp", "split": "iid"}
    >>> headline(ConfigDict(blocks), named, 20)
    'fedavg on digits: mlp a1-b1, 20 clients (iid), 5 a round, 9 rounds'
    """
    active = config.method.args.get("cohort", "?")
    return (
        f"{named['method']} on {named['source']}: {named['net']} {config.family.mix}, "
        f"{clients} clients ({named['split']}), {active} a round, {config.train.rounds} rounds"
    )


def describe(about: Arguments) -> str:
    """One line on the partition, from ``data.partition.summary``.

    >>> size, held = dict(min=3, max=9, median=5), {"min": 1, "max": 2, "median": 2}
    >>> describe({"examples": 60, "size": size, "classes per client": held})
    'partition: 60 examples, 3 to 9 a client (median 5), 1 to 2 classes (median 2)'
    """
    size, held = about["size"], about.get("classes per client")
    text = (
        f"partition: {about['examples']} examples, {size['min']} to {size['max']} a client (median {size['median']:g})"
    )
    return text + (f", {held['min']} to {held['max']} classes (median {held['median']:g})" if held else "")


def warn_failures(lines: Sequence[Line]) -> None:
    """Name the clients whose replies were left out, in one warning for each round that had some.

    Args:
      lines: of metrics, with ``failed``, ``failed_ids`` and ``clients`` (how many replies counted).

    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     warn_failures([{"round": 2, "failed": 1, "failed_ids": [7], "clients": 9}])
    >>> str(said[0].message)
    'round 2: 1 replies not finite, left out (clients 7)'
    """
    for line in lines:
        if line["failed"]:
            clients = ", ".join(map(str, line["failed_ids"][:10]))
            rest = "; every client failed, the model is unchanged" if not line["clients"] else ""
            warnings.warn(
                f"round {line['round']}: {line['failed']} replies not finite, left out (clients {clients}){rest}",
                stacklevel=2,
            )


#: what the column is, said where it stands below the one of the whole test set
_LOCAL = (
    "local: on each client's own test data, as the client sees it; a method that masks the classes a client does not "
    "hold\nis scored with the mask, and test examples of those classes count as wrong"
)
#: before the score's name: what the table shows in columns of its own, or not at all; others follow by name
_APART = ("", "local_", "validation_", "client_")


def table(
    tiers: Sequence[Tier], sizes: Mapping[str, tuple[float, int | None]], lines: Sequence[Line], best: int | None
) -> list[Line]:
    """One row a tier: scores at start, best and last round, what else was scored, size and cost.

    Args:
      tiers: the models that are offered, with parameters, bytes and multiply-adds.
      sizes: width and depth of each tier that is a level, by name.
      lines: of metrics, at least one of them evaluated.
      best: the best round; the last evaluated one takes its place where it was not evaluated.

    Returns:
      Rows of plain values for ``table.json``; ``shares`` names those that are shown in percent.

    >>> tier = Tier("a", parameters=10, bytes=40, macs=9)
    >>> lines = [{"round": n, "accuracy": {"a": score}} for n, score in ((0, 0.1), (5, 0.7), (10, 0.6))]
    >>> row = table([tier], {"a": (1.0, None)}, lines, best=5)[0]
    >>> row["start"], row["best"], row["last"], row["local"], row["macs"]
    (0.1, 0.7, 0.6, None, 9)
    """
    points, score = evaluated(lines), score_of(lines)
    first, last = points[0], points[-1]
    chosen = next((p for p in points if p["round"] == best), last)
    apart = {f"{place}{score}" for place in _APART} | {"loss", "items", *of_time.BY_LEVEL}
    scored = [k for k, v in last.items() if isinstance(v, dict) and k not in apart]
    shares = [name.removesuffix("_accuracy") for name in scored if is_share(name)]
    rows = []
    for tier in tiers:
        width, depth = sizes.get(tier.name, (None, None))
        row = {
            "level": tier.name,
            "width": width,
            "depth": depth,
            "start": first[score][tier.name],
            "last": last[score][tier.name],
            "best": chosen[score][tier.name],
            "local": last.get(f"local_{score}", {}).get(tier.name),
            **{name.removesuffix(f"_{score}"): last[name].get(tier.name) for name in scored},
            "shares": [*(("start", "last", "best", "local") if is_share(score) else ()), *shares],
            "parameters": tier.parameters,
            "macs": tier.macs,
            "bytes": tier.bytes,
        }
        rows.append(row)
    return rows


def totals(lines: Sequence[Line], best: int | None, sentence: str) -> Line:
    """Traffic and work of the whole run, against an all-full-size FedAvg with the same cohorts.

    Args:
      lines: of metrics; bytes and multiply-adds are sums since the start.
      best: the best round.
      sentence: what the method says under the table, "" for nothing.

    Returns:
      What ``table.json`` holds beside the rows: bytes each way, ``traffic_ratio`` (bytes down over those of FedAvg at
      full size), ``client_macs``, ``failed`` (replies that were not finite), and the score over clients.

    >>> line = {"round": 9, "accuracy": {"a": 0.5}, "client_macs": 10**9}
    >>> found = totals([line | {"down_bytes": 30, "up_bytes": 30, "full_size_bytes": 120}], best=9, sentence="")
    >>> found["traffic_ratio"], found["best_by"], found["failed"]
    (0.25, 'test', 0)
    """
    last, score, scored = lines[-1], score_of(lines), evaluated(lines)[-1]
    full = max(last["full_size_bytes"], 1)
    return {
        "rounds": last["round"],
        "score": score,
        "best_round": best,
        "best_by": "validation" if f"validation_{score}" in scored else "test",
        "down_bytes": last["down_bytes"],
        "up_bytes": last["up_bytes"],
        **{name: last[name] for name in ("down_ratio", "up_ratio") if name in last},
        "full_size_bytes": last["full_size_bytes"],
        "traffic_ratio": last["down_bytes"] / full,
        "client_macs": last["client_macs"],
        f"client_{score}": scored.get(f"client_{score}"),
        "failed": sum(line.get("failed", 0) for line in lines),
        "sentence": sentence,
        **of_time.summed(lines),
    }


def _size(row: Line) -> str:
    """What the table says of a level's size after its name.

    >>> _size({"width": 0.5, "depth": None}), _size({"width": 1.0, "depth": 2}), _size({"width": None})
    (' (x0.5)', ' (depth 2)', '')
    """
    if row["width"] is None:
        return ""
    return f" (x{row['width']:g})" if not row["depth"] or row["width"] != 1 else f" (depth {row['depth']})"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.2f} MB"


def over_clients(spread: Mapping[str, Any], score: str = "accuracy") -> str:
    """One line on the distribution of the global model's score over clients.

    Args:
      spread: mean, deviation, worst_tenth and best_tenth, as ``run.evaluate.over_clients`` makes them.
      score: its name; of shares the deviation is in points of percent.

    >>> print(over_clients({"mean": 0.5, "deviation": 0.1, "worst_tenth": 0.25, "best_tenth": 0.75}))
    global model on the clients' own test data: mean 50.00%, deviation 10.00 points, worst tenth 25.00%, best tenth
    75.00%
    """
    share = is_share(score)
    mean, worst, best = (written(spread[name], share) for name in ("mean", "worst_tenth", "best_tenth"))
    deviation = f"{100 * spread['deviation']:.2f} points" if share else written(spread["deviation"], share)
    return (
        f"global model on the clients' own test data: mean {mean}, deviation {deviation}, worst tenth {worst}, best "
        f"tenth {best}"
    )


def _of_float32(ratio: float | None) -> str:
    """What is said of coded messages.

    >>> _of_float32(0.1567), _of_float32(None)
    (' (0.157 of float32)', '')
    """
    return "" if ratio is None else f" ({ratio:.3g} of float32)"


def render(rows: Sequence[Line], summary: Line) -> str:
    """The final table as text, with the lines under it: traffic, work, clients' own scores, failures.

    Args:
      rows: of ``table``, at least one; the first is the global model.
      summary: of ``totals``.

    >>> lines = [{"round": 5, "accuracy": {"a": 0.7}, "client_macs": 10**9}]
    >>> lines[0] |= {"down_bytes": 10**6, "up_bytes": 10**6, "full_size_bytes": 4 * 10**6}
    >>> rows = table([Tier("a", parameters=10, bytes=40, macs=9)], {"a": (1.0, None)}, lines, best=5)
    >>> print(render(rows, totals(lines, 5, "")).splitlines()[-1])
    down 1.00 MB, up 1.00 MB; all-full-size FedAvg: 4.00 MB each way (ratio 0.250); client work 1.0 GMACs
    """
    score, by = summary["score"], summary["best_by"]
    heading = "" if is_share(score) else f"test {score} "
    rounds, best_round = summary["rounds"], summary["best_round"]
    out = Table(title=f"{heading}after {rounds} rounds (best by {by} {score}: round {best_round})")
    fixed = ("level", "width", "depth", "start", "last", "best", "local", "parameters", "macs", "bytes", "shares")
    shown = ["start", "last", *(k for k, v in rows[0].items() if k not in fixed and v is not None), "best"]
    shown += ["local"] if rows[0]["local"] is not None else []
    titles = {"start": "untrained", "best": "best round"}
    for name in ("model", *(titles.get(key, key) for key in shown), "parameters", "MACs", "one way"):
        out.add_column(name, justify="left" if name == "model" else "right")
    for i, row in enumerate(rows):
        name = row["level"] + _size(row) + (" global" if i == 0 else "")
        scores = (written(row[key], key in row["shares"]) for key in shown)
        out.add_row(name, *scores, f"{row['parameters']:,}", f"{row['macs']:,}", _megabytes(row["bytes"]))
    buffer = StringIO()
    Console(file=buffer, width=max(130, 16 * len(out.columns)), force_jupyter=False).print(out)
    ratio = summary["traffic_ratio"]
    ways = ("down", "up")
    down, up = (_megabytes(summary[f"{way}_bytes"]) + _of_float32(summary.get(f"{way}_ratio")) for way in ways)
    text = (
        f"down {down}, up {up}; "
        f"all-full-size FedAvg: {_megabytes(summary['full_size_bytes'])} each way (ratio {ratio:.3f}); "
        f"client work {summary['client_macs'] / 1e9:,.1f} GMACs"
    )
    own = summary[f"client_{score}"]
    told = [over_clients(own, score), fairness.sentence(own)] if own else []
    spread = "".join(f"\n{line}" for line in told if line)
    spread += f"\n{summary['sentence']}" if summary["sentence"] else ""
    if is_share(score) and any(row["local"] is not None and row["local"] < row["last"] for row in rows):
        spread += f"\n{_LOCAL}"
    spread += of_time.sentence(summary)
    failures = f"\n{summary['failed']} replies were not finite and left out" if summary["failed"] else ""
    return buffer.getvalue() + text + spread + failures + "\n"


def list_files(folder: Path, files: Sequence[Path]) -> str:
    """Where everything was written, in one line.

    >>> list_files(Path("runs/a"), [Path("runs/a/table.json")])
    'written to runs/a/: table.json, checkpoints/, tensorboard/'
    """
    others = ("checkpoints/", "tensorboard/")
    return f"written to {folder}/: " + ", ".join([*(str(f.relative_to(folder)) for f in files), *others])


def as_arrays(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """One float array a metric over the lines, nested names joined by a slash, NaN where a line lacks it.

    >>> as_arrays([{"round": 1, "accuracy": {"a": 0.5}}, {"round": 2}])
    {'accuracy/a': array([0.5, nan]), 'round': array([1., 2.])}
    """
    flat = [_flat(line) for line in lines]
    names = sorted({name for line in flat for name in line})
    return {name: np.array([line.get(name, np.nan) for line in flat], np.float64) for name in names}


def _flat(line: Line, prefix: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            out[prefix + name] = value
    return out


def seed_table(tables: Sequence[Sequence[Line]]) -> list[Line]:
    """Mean and sample deviation (n - 1) over seeds of each level's last and best score; of a score that is none, none.

    Args:
      tables: of ``table``, one for each seed, with the same levels.

    >>> one = [{"level": "a", "last": 0.5, "best": 0.6, "shares": ["last"]}]
    >>> row = seed_table([one, [one[0] | {"last": 0.7}]])[0]
    >>> round(row["last"], 3), round(row["last_deviation"], 3), row["seeds"]
    (0.6, 0.141, 2)
    """
    rows = []
    for level in zip(*tables):
        row: Line = {"level": level[0]["level"], "seeds": len(level), "share": "last" in level[0]["shares"]}
        for key in ("last", "best"):
            values = np.array([np.nan if r[key] is None else r[key] for r in level])
            row[key] = float(values.mean())
            row[f"{key}_deviation"] = float(values.std(ddof=1)) if len(level) > 1 else 0.0
        rows.append(row)
    return rows


def render_points(keys: Sequence[str], rows: Sequence[Line]) -> str:
    """The rows of a sweep as text: swept keys, then level, last score and best.

    Args:
      keys: dotted, one column each.
      rows: of ``table``, each with the values of the keys.

    >>> row = {"run.seed": 3, "level": "a", "last": 0.9, "best": 0.95, "shares": ["last", "best"]}
    >>> "90.00%" in render_points(["run.seed"], [row])
    True
    """
    out = Table(title=f"{len(rows)} rows")
    for key in keys:
        out.add_column(key)
    for name in ("level", "last", "best round"):
        out.add_column(name, justify="right")
    for row in rows:
        cells = (written(row[name], name in row["shares"]) for name in ("last", "best"))
        out.add_row(*(str(row.get(key, "")) for key in keys), row["level"], *cells)
    buffer = StringIO()
    Console(file=buffer, width=120, force_jupyter=False).print(out)
    return buffer.getvalue()


def render_seeds(rows: Sequence[Line]) -> str:
    """``seed_table`` as text, with the deviation behind each mean.

    >>> rows = [{"level": "a", "seeds": 2, "share": True}]
    >>> rows[0] |= {"last": 0.9512, "last_deviation": 0.004, "best": 0.96, "best_deviation": 0.0}
    >>> "95.12 +- 0.40%" in render_seeds(rows)
    True
    """
    out = Table(title=f"mean and deviation over {rows[0]['seeds']} seeds")
    for name in ("level", "last", "best round"):
        out.add_column(name, justify="right")
    for row in rows:
        share = row["share"]
        pairs = ((row[k], row[k + "_deviation"]) for k in ("last", "best"))
        cells = (f"{written(mean, share).rstrip('%')} +- {written(apart, share)}" for mean, apart in pairs)
        out.add_row(row["level"], *cells)
    buffer = StringIO()
    Console(file=buffer, width=80, force_jupyter=False).print(out)
    return buffer.getvalue()
