"""What people see: the summary, the final table, and the plots."""

import datetime
import platform
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hetfl_jax.core.types import Arguments, Config, Line, Tier


def say(text: str, quiet: bool) -> None:
    """Print unless quiet."""
    if not quiet:
        print(text, flush=True)


def environment(devices: int) -> Line:
    """What the run ran on; results move by 1e-7 with the device count."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "hetfl_jax")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def headline(config: Config, clients: int) -> str:
    """One line on what is about to run."""
    active = config.method.args.get("cohort", "?")
    return (
        f"{config.method.name} on {config.data.source}: {config.family.net} {config.family.mix}, "
        f"{clients} clients ({config.data.split}), {active} a round, {config.train.rounds} rounds"
    )


def describe(about: Arguments) -> str:
    """One line on the partition."""
    size, held = about["size"], about["classes per client"]
    return (
        f"partition: {about['examples']} examples, {size['min']} to {size['max']} a client "
        f"(median {size['median']:g}), "
        f"{held['min']} to {held['max']} classes (median {held['median']:g})"
    )


def warn_failures(lines: Sequence[Line]) -> None:
    """Name the clients whose replies were left out."""
    for line in lines:
        if line["failed"]:
            clients = ", ".join(map(str, line["failed_ids"][:10]))
            rest = "; every client failed, the model is unchanged" if not line["clients"] else ""
            warnings.warn(
                f"round {line['round']}: {line['failed']} replies not finite, left out (clients {clients}){rest}",
                stacklevel=2,
            )


def _evaluated(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if "accuracy" in line]


#: scores that the table shows in columns of their own, in this order; further ``*_accuracy`` follow by name
_HIDDEN = ("accuracy", "local_accuracy", "validation_accuracy", "client_accuracy")


def table(
    tiers: Sequence[Tier], sizes: Mapping[str, tuple[float, int | None]], lines: Sequence[Line], best: int | None
) -> list[Line]:
    """One row a tier: accuracies at start, best and last round, what else was scored, size and cost."""
    points = _evaluated(lines)
    first, last = points[0], points[-1]
    chosen = next((p for p in points if p["round"] == best), last)
    scored = [k for k, v in last.items() if isinstance(v, dict) and k not in (*_HIDDEN, "loss", "items")]
    rows = []
    for tier in tiers:
        width, depth = sizes.get(tier.name, (None, None))
        row = {
            "level": tier.name,
            "width": width,
            "depth": depth,
            "start": first["accuracy"][tier.name],
            "last": last["accuracy"][tier.name],
            "best": chosen["accuracy"][tier.name],
            "local": last.get("local_accuracy", {}).get(tier.name),
            **{name.removesuffix("_accuracy"): last[name].get(tier.name) for name in scored},
            "shares": [n.removesuffix("_accuracy") for n in scored if n.endswith(("_accuracy", "_recovery"))],
            "parameters": tier.parameters,
            "macs": tier.macs,
            "bytes": tier.bytes,
        }
        rows.append(row)
    return rows


def totals(lines: Sequence[Line], best: int | None, sentence: str) -> Line:
    """Traffic and work of the whole run, against an all-full-size FedAvg with the same cohorts."""
    last = lines[-1]
    full = max(last["full_size_bytes"], 1)
    return {
        "rounds": last["round"],
        "best_round": best,
        "best_by": "validation" if "validation_accuracy" in _evaluated(lines)[-1] else "test",
        "down_bytes": last["down_bytes"],
        "up_bytes": last["up_bytes"],
        "full_size_bytes": last["full_size_bytes"],
        "traffic_ratio": last["down_bytes"] / full,
        "client_macs": last["client_macs"],
        "client_accuracy": _evaluated(lines)[-1].get("client_accuracy"),
        "failed": sum(line.get("failed", 0) for line in lines),
        "sentence": sentence,
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _size(row: Line) -> str:
    if row["width"] is None:
        return ""
    return f" (x{row['width']:g})" if not row["depth"] or row["width"] != 1 else f" (depth {row['depth']})"


def _score(name: str, value: float | None, row: Line) -> str:
    """A share in percent; what is no accuracy, a perplexity or a user's metric, as a number."""
    shares = ("start", "last", "best", "local")
    if name in shares or name in row["shares"]:
        return _percent(value)
    return "-" if value is None else f"{value:.4g}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.2f} MB"


def over_clients(spread: Mapping[str, float]) -> str:
    """One line on the distribution of the global model's accuracy over clients."""
    worst, best = _percent(spread["worst_tenth"]), _percent(spread["best_tenth"])
    return (
        f"global model on the clients' own test data: mean {_percent(spread['mean'])}, deviation "
        f"{100 * spread['deviation']:.2f} points, worst tenth {worst}, best tenth {best}"
    )


def render(rows: Sequence[Line], summary: Line) -> str:
    """The final table as text."""
    out = Table(
        title=f"after {summary['rounds']} rounds (best by {summary['best_by']} accuracy: round {summary['best_round']})"
    )
    fixed = ("level", "width", "depth", "start", "last", "best", "local", "parameters", "macs", "bytes", "shares")
    shown = ["start", "last", *(k for k, v in rows[0].items() if k not in fixed and v is not None), "best"]
    shown += ["local"] if rows[0]["local"] is not None else []
    titles = {"start": "untrained", "best": "best round"}
    for name in ("model", *(titles.get(key, key) for key in shown), "parameters", "MACs", "one way"):
        out.add_column(name, justify="left" if name == "model" else "right")
    for i, row in enumerate(rows):
        name = row["level"] + _size(row) + (" global" if i == 0 else "")
        scores = (_score(key, row[key], row) for key in shown)
        out.add_row(name, *scores, f"{row['parameters']:,}", f"{row['macs']:,}", _megabytes(row["bytes"]))
    buffer = StringIO()
    Console(file=buffer, width=130).print(out)
    ratio = summary["traffic_ratio"]
    text = (
        f"down {_megabytes(summary['down_bytes'])}, up {_megabytes(summary['up_bytes'])}; "
        f"all-full-size FedAvg: {_megabytes(summary['full_size_bytes'])} each way (ratio {ratio:.3f}); "
        f"client work {summary['client_macs'] / 1e9:,.1f} GMACs"
    )
    spread = f"\n{over_clients(summary['client_accuracy'])}" if summary["client_accuracy"] else ""
    spread += f"\n{summary['sentence']}" if summary["sentence"] else ""
    failures = f"\n{summary['failed']} replies were not finite and left out" if summary["failed"] else ""
    return buffer.getvalue() + text + spread + failures + "\n"


def list_files(folder: Path, files: Sequence[Path]) -> str:
    """Where everything was written."""
    others = ("checkpoints/", "tensorboard/")
    return f"written to {folder}/: " + ", ".join([*(str(f.relative_to(folder)) for f in files), *others])


def as_arrays(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """One float array a metric over the lines, nested names joined by a slash, NaN where a line lacks it."""
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
    """Mean and sample deviation over seeds of each level's last and best accuracy."""
    rows = []
    for level in zip(*tables):
        row: Line = {"level": level[0]["level"], "seeds": len(level)}
        for key in ("last", "best"):
            values = np.array([r[key] for r in level])
            row[key] = float(values.mean())
            row[f"{key}_deviation"] = float(values.std(ddof=1)) if len(level) > 1 else 0.0
        rows.append(row)
    return rows


def render_seeds(rows: Sequence[Line]) -> str:
    """``seed_table`` as text."""
    out = Table(title=f"mean and deviation over {rows[0]['seeds']} seeds")
    for name in ("level", "last", "best round"):
        out.add_column(name, justify="right")
    for row in rows:
        cells = (f"{100 * row[k]:.2f} +- {100 * row[k + '_deviation']:.2f}%" for k in ("last", "best"))
        out.add_row(row["level"], *cells)
    buffer = StringIO()
    Console(file=buffer, width=80).print(out)
    return buffer.getvalue()
