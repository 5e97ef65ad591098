"""Everything that people see of runs; ``hetfl_jax.results(folder)`` reads one back: ``reading.results``."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """The room, which is also the function of its name: ``hetfl_jax.results(folder)``."""

    def __call__(self, folder: str | Path) -> Any:
        """As ``reading.results``."""
        from hetfl_jax.results.reading import results

        return results(folder)


sys.modules[__name__].__class__ = _Room
