"""What mkdocs calls while it builds the site: pages and pictures made from code and files, never written twice.

- ``experiments/**``: the README, figures and results of every experiment, as they lie in the repository;
- ``reference/**``: a page for every public module, the keys of a config, the commands, what every method costs;
- ``pictures/*.svg``: ``docs/pictures.py``, each light and dark;
- ``changelog.md``: CHANGELOG.md.
"""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "models", "data", "engine", "parts", "clusters", "methods", "results", "run")
SHOWN = {".md", ".png", ".json"}  #: of an experiment's folder


def on_config(config: Any) -> Any:
    """Put the pages that are made now where the navigation has a place for them."""
    for entry in config.nav:
        ((name, pages),) = entry.items()
        if name == "Reference":
            pages += reference_nav()
        if name == "Reproductions":
            pages += [f"experiments/{readme.parent.name}/README.md" for readme in readmes()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add every page and picture that is made now."""
    sys.path.insert(0, str(ROOT / "docs"))
    import generated
    import pictures

    made: dict[str, Any] = {"changelog.md": (ROOT / "CHANGELOG.md").read_text()}
    made |= {f"reference/{name}.md": text for name, text in generated.pages().items()}
    made |= {f"reference/{room}/{name}.md": module_page(room, name) for room in ROOMS for name in modules(room)}
    made |= {f"pictures/{name}.svg": drawn for name, drawn in pictures.draw_all().items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in SHOWN:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def readmes() -> list[Path]:
    """The README of every experiment but the benchmarks, which have a page of their own in the navigation."""
    return [path for path in sorted(ROOT.glob("experiments/*/README.md")) if path.parent.name != "throughput"]


def modules(room: str) -> list[str]:
    """Names of a room's public modules."""
    names = [path.stem for path in sorted((ROOT / "hetfl_jax" / room).glob("*.py"))]
    return [name for name in names if name != "__init__" or _has_code(room)]


def _has_code(room: str) -> bool:
    return bool((ROOT / "hetfl_jax" / room / "__init__.py").read_text().strip())


def module_page(room: str, name: str) -> str:
    """A page that mkdocstrings fills from the docstrings of one module."""
    module = f"hetfl_jax.{room}" + ("" if name == "__init__" else f".{name}")
    return f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n      show_submodules: false\n"


def reference_nav() -> list[Any]:
    """The part of the navigation that lists every module."""
    pages = [{"Config keys": "reference/config.md"}, {"Commands": "reference/cli.md"}]
    pages += [{"Methods and what they cost": "reference/methods.md"}, {"Names": "reference/names.md"}]
    listed = [{room: [f"reference/{room}/{name}.md" for name in modules(room)]} for room in ROOMS]
    return pages + [{"hetfl_jax": "reference/root.md"}] + listed
