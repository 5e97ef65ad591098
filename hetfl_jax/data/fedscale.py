"""FedScale's two files of devices, brought to the tables that ``data.devices`` reads.

The capacity file has, for each device, ``computation`` (milliseconds that one example takes to go forward through a
reference net) and ``communication`` (kilobits a second, both ways). The behaviour file has ``active`` and ``inactive``
(seconds at which the device comes and goes) and ``finish_time`` (the period after which they repeat). Both are pickled
dicts by device; numbers, text, lists and dicts are read, anything else that a pickle may hold is refused.
"""

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hetfl_jax.data.devices import Profile, Times, times, write_table, write_times

REFERENCE_MACS = 300e6  #: of one example through MobileNetV2 at 224 x 224, the net that is assumed behind milliseconds


def convert(
    capacity: Path | str, behaviour: Path | str | None, folder: Path | str, clients: int, *,
    reference_macs: float = REFERENCE_MACS, memory_mb: float = math.inf,
) -> list[Path]:  # fmt: skip
    """Write ``devices.csv``, and ``online.csv`` where there is a behaviour file, for ``devices.name=csv:...``.

    Client i gets the i-th device of each file; where a file has fewer, it begins anew.

    Args:
      capacity, behaviour: FedScale's files.
      folder: where the tables go.
      clients: how many there are.
      reference_macs: multiply-adds behind ``computation``.
      memory_mb: of every device, which FedScale does not say; infinity sets no limit.

    Returns:
      The files.

    Raises:
      ValueError: a file that is not of this form, a value out of range.

    Source: FedScale (Lai et al., ICML 2022), its device traces.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "capacity").write_bytes(pickle.dumps({1: {"computation": 100.0, "communication": 2000.0}}))
    >>> [path] = convert(folder / "capacity", None, folder, clients=2, memory_mb=512.0)
    >>> path.read_text().splitlines()
    ['client,macs_per_s,memory_mb,up_mbps,down_mbps', '0,3000000000,512,2,2', '1,3000000000,512,2,2']
    """
    if clients < 1:
        raise ValueError(f"{clients} clients, allowed >= 1 (clients)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "devices.csv", profile(_read(capacity), clients, reference_macs, memory_mb))
    if behaviour is None:
        return [folder / "devices.csv"]
    write_times(folder / "online.csv", behaviours(_read(behaviour), clients))
    return [folder / "devices.csv", folder / "online.csv"]


def profile(devices: Mapping[Any, Any], clients: int, reference_macs: float, memory_mb: float) -> Profile:
    """The devices of a capacity file.

    Args:
      devices: ``computation`` and ``communication`` by device.
      clients: how many there are.
      reference_macs, memory_mb: as ``convert``.

    Raises:
      ValueError: a device without one of the two, or with a value <= 0.

    >>> profile({1: {"computation": 100.0, "communication": 2000.0}}, 1, 300e6, 512.0)[0].tolist()
    [3000000000.0]
    """
    rows = list(devices.items())
    table = np.empty((clients, 2))
    for client in range(clients):
        name, values = rows[client % len(rows)]
        table[client] = [_positive(values, key, name) for key in ("computation", "communication")]
    band = table[:, 1] / 1e3
    return Profile(reference_macs / (table[:, 0] / 1e3), np.full(clients, float(memory_mb)), band, band)


def behaviours(traces: Mapping[Any, Any], clients: int) -> Times:
    """When the devices of a behaviour file are online; one that goes before it comes was online from the start.

    Args:
      traces: ``active``, ``inactive`` and ``finish_time`` by device.
      clients: how many there are.

    >>> behaviours({7: {"finish_time": 100, "active": [10, 60], "inactive": [30, 80]}}, 1).online.tolist()
    [[10.0, 60.0]]
    """
    rows, spans, period = list(traces.items()), [], np.empty(clients)
    for client in range(clients):
        name, values = rows[client % len(rows)]
        period[client] = _positive(values, "finish_time", name)
        spans.append(_spans(values, float(period[client]), name))
    return times(spans, period, "behaviour")


def _spans(values: Mapping[str, Any], period: float, name: Any) -> list[tuple[float, float]]:
    try:
        events = sorted([(float(t), True) for t in values["active"]] + [(float(t), False) for t in values["inactive"]])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"device {name}: need lists of seconds 'active' and 'inactive' (behaviour)") from None
    spans, since = list[tuple[float, float]](), 0.0 if events and not events[0][1] else None
    for at, comes in events:
        if comes:
            since = at if since is None else since
        elif since is not None:
            spans, since = ([*spans, (since, min(at, period))] if at > since else spans), None
    if since is not None and since < period:
        spans.append((since, period))
    spans = [(start, end) for start, end in spans if 0 <= start < end <= period]
    if not spans:
        raise ValueError(f"device {name} is never online (behaviour)")
    return spans


def _positive(values: Any, key: str, name: Any) -> float:
    value = values.get(key) if isinstance(values, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"device {name}: {key} {value!r}, allowed > 0 and finite (capacity, behaviour)")
    return float(value)


class _Plain(pickle.Unpickler):
    """A pickle of numbers, text, lists and dicts; one that names a function or a class could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read(path: Path | str) -> Mapping[Any, Any]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path} (capacity, behaviour)")
    try:
        found = _Plain(io.BytesIO(path.read_bytes())).load()
    except Exception as error:
        raise ValueError(f"{path} is no pickle of plain values: {error} (capacity, behaviour)") from None
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} holds a {type(found).__name__}: need a dict of devices (capacity, behaviour)")
    return found
