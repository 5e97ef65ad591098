"""Results of single runs, kept in a folder: an experiment that was cut off goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hetfl_jax.results.folder import write_json

FOLDER = Path("runs/experiments")


def once(name: str, settings: Mapping[str, Any], run: Callable[[], Any]) -> Any:
    """What ``run`` gives, as JSON has it; read from the file of the same name and settings if there is one.

    Args:
      name: of the experiment.
      settings: all that the result depends on, but for the code.
    """
    about = json.loads(json.dumps(dict(settings), default=str))
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    path = FOLDER / name / f"{mark}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": about, "found": run()})
    return json.loads(path.read_text())["found"]
