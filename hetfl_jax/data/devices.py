"""What clients compute and send with: classes of devices, log-normal draws, or a table; and when they are online.

Speeds are multiply-adds a second of local training. Of a class of devices they are a share, ``efficiency``, of the
peak rate of its processor: cores times float32 multiply-adds of a cycle times clock, from memory of the makers' sheets.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

MEGA = 1e6
COLUMNS = ("client", "macs_per_s", "memory_mb", "up_mbps", "down_mbps")
TIMES = ("client", "online_s", "offline_s", "period_s")
DAY = 86_400.0


class Profile(NamedTuple):
    """The devices of all clients; infinite memory or bandwidth sets no limit."""

    macs_per_s: np.ndarray  #: [N] float64 > 0, multiply-adds a second
    memory_mb: np.ndarray  #: [N] float64 > 0
    up_mbps: np.ndarray  #: [N] float64 > 0, 10^6 bits a second that a client sends
    down_mbps: np.ndarray  #: [N] float64 > 0, likewise receives


class Times(NamedTuple):
    """When clients are online: intervals of a period that repeats; what a client lacks of S is empty, at infinity."""

    online: np.ndarray  #: [N, S] float64 seconds, ascending
    offline: np.ndarray  #: [N, S] float64 seconds, the ends
    period: np.ndarray  #: [N] float64 seconds


class Class(NamedTuple):
    """A class of devices."""

    peak: float  #: float32 multiply-adds a second
    memory_mb: float
    up_mbps: float
    down_mbps: float
    source: str


_MOBILE, _HOME, _WIRE = (9.0, 30.0), (30.0, 70.0), (1000.0, 1000.0)  #: Mbit/s up and down

#: peak = sum over cores of GHz * 1e9 * multiply-adds a cycle: 4 of Cortex-A53/A55/A72/A510 (one 128-bit unit), 8 of
#: A76/A710 (two), 16 of X2 (four) and of AVX2 (two of 256 bits). Mbit/s are rounded medians of mobile and fixed lines
#: worldwide for 2022, from memory of Ookla's Speedtest Global Index; the server's is gigabit Ethernet.
CLASSES: Mapping[str, Class] = MappingProxyType({
    "phone_2016": Class(64.0e9, 3_000, *_MOBILE, "Snapdragon 625: 8 Cortex-A53 at 2.0 GHz"),
    "phone_2019": Class(78.4e9, 6_000, *_MOBILE, "Snapdragon 730: 2 Cortex-A76 at 2.2, 6 Cortex-A55 at 1.8 GHz"),
    "phone_2022": Class(136.8e9, 8_000, *_MOBILE, "Snapdragon 8 Gen 1: X2 at 3.0, 3 A710 at 2.5, 4 A510 at 1.8 GHz"),
    "pi_3": Class(22.4e9, 1_000, *_HOME, "Raspberry Pi 3 B+: 4 Cortex-A53 at 1.4 GHz, 1 GB"),
    "pi_4": Class(24.0e9, 4_000, *_HOME, "Raspberry Pi 4 B: 4 Cortex-A72 at 1.5 GHz, 4 GB"),
    "pi_5": Class(76.8e9, 8_000, *_HOME, "Raspberry Pi 5: 4 Cortex-A76 at 2.4 GHz, 8 GB"),
    "jetson_nano": Class(118.0e9, 4_000, *_HOME, "NVIDIA Jetson Nano: 128 Maxwell cores at 0.92 GHz, 4 GB"),
    "laptop": Class(192.0e9, 16_000, *_HOME, "4 cores with AVX2 at 3.0 GHz, 16 GB"),
    "server": Class(1280.0e9, 256_000, *_WIRE, "32 cores with AVX2 at 2.5 GHz, 256 GB"),
})  # fmt: skip
PHONES = "phone_2016:1,phone_2019:2,phone_2022:1"


def _need(fine: bool, message: str, key: str = "devices.args") -> None:
    if not fine:
        raise ValueError(f"{message} ({key})")


def classes(size: np.ndarray, seed: int, *, mix: str = PHONES, efficiency: float = 0.1, spread: float = 0.0) -> Profile:
    """Devices of the classes in ``CLASSES``, in the proportions of ``mix``, to clients at random.

    Args:
      size: [N] examples of every client.
      mix: ``name:how often`` by commas, e.g. ``phone_2019:3,laptop:1``.
      efficiency: share of the peak rate that training reaches, 0 < e <= 1; an assumption, not a measurement.
      spread: standard deviation of the logarithm of each client's own factor of its speed; 0 for none.

    Raises:
      ValueError: a class that there is not, or a value out of range.

    >>> sorted(classes(np.ones(4), 0, mix="pi_4:1,laptop:1").macs_per_s.tolist())
    [2400000000.0, 2400000000.0, 19200000000.0, 19200000000.0]
    """
    parts = [part.partition(":") for part in mix.split(",")]
    for name, _, count in parts:
        _need(name in CLASSES, f"class {name!r} is not one of {', '.join(CLASSES)}", "devices.args.mix")
        fine = count.isdigit() and int(count) > 0
        _need(fine, f"class {name!r} with {count!r}: need a whole number > 0, as in {PHONES}", "devices.args.mix")
    _need(0 < efficiency <= 1, f"efficiency {efficiency}, allowed 0 < e <= 1", "devices.args.efficiency")
    _need(0 <= spread < math.inf, f"spread {spread}, allowed >= 0", "devices.args.spread")
    rng, clients = np.random.default_rng([seed, 21]), size.size
    often = np.cumsum([int(count) for *_, count in parts])
    kind = np.searchsorted(often, (np.arange(clients) + 0.5) * often[-1] / clients)
    chosen = [CLASSES[parts[k][0]] for k in rng.permutation(kind)]
    own = np.exp(spread * rng.standard_normal(clients))
    columns = ([getattr(one, name) for one in chosen] for name in ("memory_mb", "up_mbps", "down_mbps"))
    return Profile(efficiency * own * np.asarray([one.peak for one in chosen]), *map(np.asarray, columns))


def lognormal(
    size: np.ndarray,
    seed: int,
    *,
    macs_per_s: float = 5e9,
    speed_spread: float = 1.0,
    memory_mb: float = 4_000.0,
    memory_spread: float = 0.0,
    up_mbps: float = 9.0,
    down_mbps: float = 30.0,
    bandwidth_spread: float = 0.5,
    speed_with_data: float = 0.0,
    bandwidth_with_data: float = 0.0,
    speed_with_bandwidth: float = 0.0,
) -> Profile:
    """Log-normal speeds, memories and bandwidths: ``median * exp(spread * z)`` with standard normal, correlated z.

    The amount of data enters by the normal score of its rank, ties at random, so that a correlation of 1 puts clients
    in the order of their examples. Both bandwidths of a client share one z; memory goes with speed.

    Args:
      size: [N] examples of every client.
      macs_per_s, memory_mb, up_mbps, down_mbps: medians, > 0.
      speed_spread, memory_spread, bandwidth_spread: standard deviations of the logarithm, >= 0.
      speed_with_data, bandwidth_with_data, speed_with_bandwidth: correlations of the z, -1..1.

    Raises:
      ValueError: a value out of range, or correlations that no three quantities can have.

    >>> fast = lognormal(np.array([5, 20, 10]), 0, speed_with_data=1.0)
    >>> np.argsort(fast.macs_per_s).tolist()
    [0, 2, 1]
    """
    medians = {"macs_per_s": macs_per_s, "memory_mb": memory_mb, "up_mbps": up_mbps, "down_mbps": down_mbps}
    for name, value in medians.items():
        _need(0 < value < math.inf, f"{name} {value:g}, allowed > 0 and finite", f"devices.args.{name}")
    spreads = {"speed": speed_spread, "memory": memory_spread, "bandwidth": bandwidth_spread}
    for name, value in spreads.items():
        _need(0 <= value < 20, f"{name}_spread {value:g}, allowed 0 <= s < 20", f"devices.args.{name}_spread")
    given = {"speed_with_data": speed_with_data, "bandwidth_with_data": bandwidth_with_data}
    given["speed_with_bandwidth"] = speed_with_bandwidth
    for name, value in given.items():
        _need(-1 <= value <= 1, f"{name} {value:g}, allowed -1..1", f"devices.args.{name}")
    root = _root(np.array([
        [1, speed_with_data, bandwidth_with_data],
        [speed_with_data, 1, speed_with_bandwidth],
        [bandwidth_with_data, speed_with_bandwidth, 1],
    ]))  # fmt: skip
    rng = np.random.default_rng([seed, 22])
    z = root @ np.stack([_scores(size, rng), *rng.standard_normal((2, size.size))])
    speed, memory, band = (np.exp(spread * row) for spread, row in zip(spreads.values(), (z[1], z[1], z[2])))
    return Profile(macs_per_s * speed, memory_mb * memory, up_mbps * band, down_mbps * band)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The lower triangle whose product with its transpose is ``matrix``; also where that is singular.

    Args:
      matrix: [3, 3] correlations.

    Raises:
      ValueError: no three quantities have these correlations.

    >>> _root(np.array([[1.0, 1.0], [1.0, 1.0]])).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    out, wrong = np.zeros_like(matrix), "correlations that no three quantities can have"
    for i in range(len(matrix)):
        for j in range(i + 1):
            rest = matrix[i, j] - out[i, :j] @ out[j, :j]
            if i == j:
                _need(rest > -1e-9, wrong, "devices.args.speed_with_data")
                out[i, i] = math.sqrt(max(rest, 0.0))
            elif out[j, j] > 1e-9:
                out[i, j] = rest / out[j, j]
            else:
                _need(
                    abs(rest) < 1e-9, "correlations that no three quantities can have", "devices.args.speed_with_data"
                )
    return out


def _scores(size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N] normal scores of ranks: the normal quantiles of ``(rank + 1/2) / N``.

    Args:
      size: [N] numbers; equal ones are ranked at random.
      rng: for that.
    """
    from statistics import NormalDist

    rank = np.empty(size.size)
    rank[np.lexsort((rng.random(size.size), size))] = np.arange(size.size)
    return np.array([NormalDist().inv_cdf((r + 0.5) / size.size) for r in rank])


def read_table(path: Path, clients: int) -> Profile:
    r"""A CSV file with the header ``client,macs_per_s,memory_mb,up_mbps,down_mbps`` and a row for every client.

    Args:
      path: the file.
      clients: how many there are; each has one row, in any order.

    Raises:
      ValueError: another header, a client that is missing, twice or none of the population's, a value <= 0.

    Returns:
      The profile, its rows in the order of the clients.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "devices.csv"
    >>> _ = path.write_text("client,macs_per_s,memory_mb,up_mbps,down_mbps\n1,1e9,512,1,8\n0,2e9,1024,2,16\n")
    >>> read_table(path, 2).memory_mb.tolist()
    [1024.0, 512.0]
    """
    rows = _rows(path, COLUMNS, "devices.name")
    found: dict[int, list[float]] = {}
    for number, row in rows:
        client = _client(row[0], number, path, clients, "devices.name")
        _need(client not in found, f"{path} line {number}: client {client} again", "devices.name")
        found[client] = [_positive(v, name, number, path) for v, name in zip(row[1:], COLUMNS[1:])]
    missing = [client for client in range(clients) if client not in found]
    _need(
        not missing,
        f"{path} lacks {len(missing)} of {clients} clients: {', '.join(map(str, missing[:5]))}"
        + (", ..." if len(missing) > 5 else ""),
        "devices.name",
    )
    table = np.asarray([found[client] for client in range(clients)])
    return Profile(*table.T)


def write_table(path: Path, profile: Profile) -> None:
    """The file that ``read_table`` reads.

    Args:
      path: of the file, which is overwritten.
      profile: of all clients.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "devices.csv"
    >>> write_table(path, Profile(*np.array([[1e9], [512.0], [1.0], [8.0]])))
    >>> path.read_text().splitlines()
    ['client,macs_per_s,memory_mb,up_mbps,down_mbps', '0,1000000000,512,1,8']
    """
    _write(path, COLUMNS, ((client, *row) for client, row in enumerate(zip(*profile))))


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    """A CSV file: a client and numbers in each row."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows([client, *(f"{v:.10g}" for v in values)] for client, *values in rows)


def read_times(path: Path, clients: int) -> Times:
    r"""A CSV file with the header ``client,online_s,offline_s,period_s``: a row for every interval of a client.

    Args:
      path: the file.
      clients: how many there are; each has a row at least, all of its rows one period.

    Raises:
      ValueError: another header, intervals that overlap or leave their period, a client without any.

    Returns:
      The intervals of each client, in ascending order.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "online.csv"
    >>> _ = path.write_text("client,online_s,offline_s,period_s\n1,1,2,10\n0,5,6,10\n0,0,2,10\n")
    >>> read_times(path, 2).online.tolist()
    [[0.0, 5.0], [1.0, inf]]
    """
    key = "devices.online"
    found: dict[int, list[tuple[float, float]]] = {client: [] for client in range(clients)}
    period = np.zeros(clients)
    for number, row in _rows(path, TIMES, key):
        client = _client(row[0], number, path, clients, key)
        start, end, length = (_number(v, name, number, path, key) for v, name in zip(row[1:], TIMES[1:]))
        fine = 0 <= start < end <= length < math.inf
        _need(fine, f"{path} line {number}: need 0 <= online_s < offline_s <= period_s, finite", key)
        same = period[client] in (0, length)
        _need(same, f"{path} line {number}: client {client} has period {length:g} and {period[client]:g}", key)
        period[client] = length
        found[client].append((start, end))
    never = [client for client, spans in found.items() if not spans]
    _need(not never, f"{path}: client {never[0] if never else ''} is never online", key)
    return times(list(found.values()), period, key)


def times(spans: list[list[tuple[float, float]]], period: np.ndarray, key: str = "devices.online") -> Times:
    """Intervals of clients as arrays.

    Args:
      spans: of each client, (online, offline) in seconds, in any order.
      period: [N] seconds after which they repeat.

    Raises:
      ValueError: two intervals of a client that overlap.

    >>> times([[(5, 6), (0, 2)], [(1, 2)]], np.array([10.0, 10.0])).online.tolist()
    [[0.0, 5.0], [1.0, inf]]
    """
    most = max(map(len, spans))
    out = np.full((2, len(spans), most), np.inf)
    for client, own in enumerate(spans):
        ordered = sorted(own)
        for before, after in pairwise(ordered):
            _need(before[1] <= after[0], f"client {client} comes online at {after[0]:g} s while it is online", key)
        out[:, client, : len(own)] = np.asarray(ordered, float).T
    return Times(*out, np.asarray(period, float))  # type: ignore[call-arg]


def write_times(path: Path, known: Times) -> None:
    """The file that ``read_times`` reads.

    Args:
      path: of the file, which is overwritten.
      known: of all clients.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "online.csv"
    >>> write_times(path, times([[(0, 2), (5, 6)]], np.array([10.0])))
    >>> path.read_text().splitlines()
    ['client,online_s,offline_s,period_s', '0,0,2,10', '0,5,6,10']
    """
    clients = enumerate(zip(known.online, known.offline, known.period))
    rows = ((k, s, e, period) for k, (starts, ends, period) in clients for s, e in zip(starts, ends) if np.isfinite(s))
    _write(path, TIMES, rows)


def daily(clients: int, seed: int, hours: float) -> Times:
    """Every client is online for so many hours in a row each day, from a time of its own.

    Args:
      clients: how many there are.
      seed: of the times, uniform over the day.
      hours: of a day, 0 < h <= 24.

    Raises:
      ValueError: hours outside 0..24.

    >>> daily(2, 0, 24.0).online.tolist()
    [[0.0], [0.0]]
    """
    _need(0 < hours <= 24, f"daily:{hours:g} hours, allowed 0 < h <= 24", "devices.online")
    if hours == 24:
        return times([[(0.0, DAY)]] * clients, np.full(clients, DAY))
    start = np.random.default_rng([seed, 23]).random(clients) * DAY
    spans = [[(s, e)] if e <= DAY else [(0.0, e - DAY), (s, DAY)] for s, e in zip(start, start + 3600 * hours)]
    return times(spans, np.full(clients, DAY))


def _rows(path: Path, columns: tuple[str, ...], key: str) -> list[tuple[int, list[str]]]:
    """Rows of a CSV file with these columns, with their line numbers."""
    _need(path.is_file(), f"no file {path}", key)
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: {error} ({key})") from None
    head = tuple(name.strip() for name in lines[0]) if lines else ()
    _need(head == columns, f"{path} begins with {','.join(head)[:60]!r}: need {','.join(columns)}", key)
    rows = [(number, row) for number, row in enumerate(lines[1:], 2) if row]
    for number, row in rows:
        _need(len(row) == len(columns), f"{path} line {number}: {len(row)} values, need {len(columns)}", key)
    return rows


def _client(text: str, number: int, path: Path, clients: int, key: str) -> int:
    known = text.strip().isdigit() and int(text) < clients
    _need(known, f"{path} line {number}: client {text!r}, allowed 0..{clients - 1}", key)
    return int(text)


def _number(text: str, name: str, number: int, path: Path, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path} line {number}: {name} {text!r}: need a number ({key})") from None


def _positive(text: str, name: str, number: int, path: Path) -> float:
    value = _number(text, name, number, path, "devices.name")
    fine = value > 0 and (name != "macs_per_s" or value < math.inf)
    _need(fine, f"{path} line {number}: {name} {text.strip()}, allowed > 0", "devices.name")
    return value


#: what ``devices.name`` may be, besides none and csv:<path>
GENERATORS: Mapping[str, Callable[..., Any]] = {"classes": classes, "lognormal": lognormal}
