"""Reference vectors are found by kind: every file of a kind runs through its handler."""

import fnmatch
import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ.get("HETFL_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))

#: Kinds whose method is not built yet, with the reason.
NOT_BUILT: dict[str, str] = {}


def present() -> list[str]:
    """Names of all vector files, such as ``width/o1a_heterofl_conv_full``."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.npz"))


def of_kind(pattern: str) -> list:
    """Parameters for one kind; none is no error."""
    return [pytest.param(name, id=name) for name in present() if fnmatch.fnmatch(name, pattern)]


def read(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose name starts with ``prefix/``, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in arrays.items() if key.startswith(prefix + "/")}
