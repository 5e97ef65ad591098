"""Simulated time in what people see: the totals of a run, and what its levels took."""

from collections.abc import Sequence

from hetfl_jax.core.types import Line

#: of a round's line, where time is simulated: what its items of each level took
BY_LEVEL = ("level_seconds", "level_macs", "level_bytes")


def summed(lines: Sequence[Line]) -> Line:
    """Hours of the run and of the devices, late replies, and what each level took, where time was simulated.

    Args:
      lines: of metrics.

    >>> part = {"level_seconds": {"a": 3.0}, "level_macs": {"a": 10}, "level_bytes": {"a": 8}}
    >>> summed([{"round": 1, "simulated_seconds": 4.0, "late": 1, **part}])["level_seconds"], summed([{"round": 1}])
    ({'a': 3.0}, {})
    """
    told = [line for line in lines if BY_LEVEL[0] in line]
    if not told:
        return {}
    sums = {part: {k: sum(line[part][k] for line in told) for k in told[0][part]} for part in BY_LEVEL}
    return {
        "simulated_seconds": told[-1]["simulated_seconds"],
        "late": sum(line["late"] for line in told),
        **sums,
    }


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(12.3456), duration(5400)
    ('12.35 s', '1.50 h')
    """
    return f"{seconds:.4g} s" if seconds < 600 else f"{seconds / 3600:,.2f} h"


def sentence(summary: Line) -> str:
    """What is said of simulated time, a line a level; nothing where there is none.

    Args:
      summary: with what ``summed`` returns.

    >>> parts = {"level_seconds": {"a": 7200.0}, "level_macs": {"a": 3e12}, "level_bytes": {"a": 5e6}}
    >>> print(sentence({"simulated_seconds": 5400.0, "late": 1, **parts}).strip())
    simulated time 1.50 h, 1 late replies left out; devices worked 2.00 h:
      a: 2.00 h, 3e+03 GMACs, 5.00 MB
    """
    if "simulated_seconds" not in summary:
        return ""
    seconds, macs, moved = (summary[part] for part in BY_LEVEL)
    late = f", {summary['late']} late replies left out" if summary["late"] else ""
    text = f"\nsimulated time {duration(summary['simulated_seconds'])}{late}; "
    text += f"devices worked {duration(sum(seconds.values()))}:"
    for name in seconds:
        work = f"{macs[name] / 1e9:,.3g} GMACs, {moved[name] / 1e6:,.2f} MB"
        text += f"\n  {name}: {duration(seconds[name])}, {work}"
    return text
