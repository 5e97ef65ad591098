"""``hetfl report``: folders of runs and sweeps to one page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hetfl_jax.data import partition
from hetfl_jax.data.partition import Partition
from hetfl_jax.results.page import Page, render
from hetfl_jax.results.reading import Point, gather


def report(folders: str | Path | Sequence[str | Path], output: str | Path = "report.html") -> Path:
    """Write one self-contained HTML page of runs and sweeps; it asks nothing of a network.

    Args:
      folders: of runs, of sweeps, or with runs below them; what their configs differ in becomes a column.
      output: the file; its links to the folders are relative to it.

    Returns:
      The file.

    Raises:
      ValueError: a folder that holds no run, nothing evaluated yet, or an output that cannot be written.

    >>> report("nowhere")
    Traceback (most recent call last):
      ...
    ValueError: nowhere holds no run and no sweep: ...
    """
    output = Path(output)
    sources, keys, values = gather([folders] if isinstance(folders, str | Path) else list(folders))
    points = [point for source in sources for point in source.points]
    if not any(point.lines for point in points):
        raise ValueError(f"{', '.join(str(s.folder) for s in sources)}: no round was evaluated yet (RUN_OR_SWEEP)")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"{output}: need a file in a folder that there is (--output)")
    output.write_text(render(Page(sources, keys, values, [class_counts(p) for p in points]), output), encoding="utf-8")
    return output


def class_counts(point: Point) -> np.ndarray | None:
    """[clients, classes] examples of a run's partition; ``None`` where it was not written.

    Raises:
      ValueError: the file is damaged.
    """
    path = point.folder / "partition.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return partition.class_counts(file["labels"], Partition(file["index"], file["size"]))
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error} (FOLDER)") from None
