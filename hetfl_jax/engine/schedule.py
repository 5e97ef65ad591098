"""What a TPU's compiler planned: cycles, collectives and the dearest operations in the text of a scheduled program."""

import re
from collections.abc import Callable
from typing import NamedTuple

Trips = Callable[[str], float | None]  #: how often a loop runs, by its path of scopes; ``None`` where that is not known

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
          "s64": 8, "u64": 8}  # fmt: skip
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_PATH = re.compile(r'op_name="([^"]*)"')


class Operation(NamedTuple):
    """One operation of the schedule; the largest ``cycles`` sort first."""

    cycles: float  #: of all its runs
    shape: str
    path: str  #: scopes that it was made in


class Schedule(NamedTuple):
    """A program as it is scheduled on one chip."""

    cycles: float
    collectives: tuple[tuple[str, int], ...]  #: kind and bytes of each
    dearest: tuple[Operation, ...]
    once: tuple[str, ...]  #: loops that were counted once, since nobody knows how often they run


def read(text: str, trips: Trips, most: int = 8) -> Schedule:
    """The schedule in a compiled program's text; of a branch the side with more cycles counts.

    Cycles are the compiler's own estimates (``estimated_cycles``); divided by the clock (``topology.GENERATIONS``) they
    are seconds. A loop's cycles are multiplied by its trip count.

    Args:
      text: of a program that was compiled for a TPU; other compilers write no cycles.
      trips: how often a loop runs, for loops whose count the compiler does not know.
      most: operations to list.

    >>> text = '''ENTRY %main (p: f32[2]) -> f32[2] {
    ...   %w = f32[2] while(%p), condition=%c, body=%b, metadata={op_name="f/loop/while"}
    ...   %r = f32[2]{0} all-reduce(%w), backend_config={"estimated_cycles":"7"}
    ... }
    ... %b (p: f32[2]) -> f32[2] {
    ...   ROOT %a = f32[2] add(%p, %p), metadata={op_name="f/loop/body"}, backend_config={"estimated_cycles":"5"}
    ... }'''
    >>> found = read(text, lambda path: 3 if "loop" in path else None)
    >>> found.cycles, found.collectives, found.dearest[0].cycles
    (22.0, (('all-reduce', 8),), 15.0)
    """
    bodies, entry = _computations(text)
    found: list[Operation] = []
    once: list[str] = []

    def walk(name: str, times: float) -> float:
        total = 0.0
        for line in bodies.get(name, []):
            path = match[1] if (match := _PATH.search(line)) else ""
            if " while(" in line:
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                count = float(known[1]) if known else trips(path)
                if count is None:
                    once.append(path)
                total += walk(_named(line, "body"), times * (1 if count is None else count))
            elif " conditional(" in line:
                total += max((_alone(bodies, side) for side in _branches(line)), default=0.0) * times
            elif " call(" in line:
                total += walk(_named(line, "to_apply"), times)
            elif own := _CYCLES.search(line):
                total += times * int(own[1])
                shape = re.search(r"= (\S+)", line)
                found.append(Operation(times * int(own[1]), shape[1][:60] if shape else "", path[-90:]))
        return total

    cycles = walk(entry, 1.0)
    return Schedule(cycles, _collectives(text), tuple(sorted(found, reverse=True)[:most]), tuple(once))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    r"""Lines of each computation by its name, and the entry's name.

    >>> _computations("ENTRY %main (p: f32[]) -> f32[] {\n  ROOT %a = f32[] add(%p, %p)\n}")
    ({'main': ['  ROOT %a = f32[] add(%p, %p)']}, 'main')
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"^\s*(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.strip() == "}":
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _named(line: str, role: str) -> str:
    """The computation that a line calls in a role.

    >>> _named("%w = f32[2] while(%p), condition=%c, body=%b.1", "body")
    'b.1'
    """
    match = re.search(rf"{role}=%?([\w.\-]+)", line)
    return match[1] if match else ""


def _branches(line: str) -> list[str]:
    """The computations of a conditional's sides.

    >>> _branches("conditional(%i, %x), branch_computations={%one, %two}")
    ['one', 'two']
    >>> _branches("conditional(%p, %x), true_computation=%yes, false_computation=%no")
    ['yes', 'no']
    """
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)


def _alone(bodies: dict[str, list[str]], name: str) -> float:
    """Cycles of a computation's own operations, without those that it calls."""
    return float(sum(int(own[1]) for line in bodies.get(name, []) if (own := _CYCLES.search(line))))


def _collectives(text: str) -> tuple[tuple[str, int], ...]:
    """Collectives that the chip waits for, each channel once, with the bytes that come out."""
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.splitlines()):
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if match:
            channel = re.search(r"channel_id=(\d+)", line)
            sizes = [_nbytes(kind, dims) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
            key = f"{match[2]}{channel[1]}{match[1]}" if channel else str(number)
            found[key] = (match[2], max(sizes, default=0) if match[3] else sum(sizes))
    return tuple(found.values())


def _nbytes(kind: str, dims: str) -> int:
    """Bytes of an array as the text writes it.

    >>> _nbytes("bf16", "8,128"), _nbytes("f32", "")
    (2048, 4)
    """
    size = _BYTES.get(kind, 0)
    for extent in filter(None, dims.split(",")):
        size *= int(extent)
    return size
