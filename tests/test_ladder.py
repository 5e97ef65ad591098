"""The import ladder, and methods that know of no device."""

import ast
from pathlib import Path

import hetfl_jax

ROOT = Path(hetfl_jax.__file__).parent
#: layer of each file or folder; a file imports only from lower layers, or from its own folder
LAYERS = {
    "types": 0, "tree": 1, "random": 1, "machine": 1, "chunks": 1,
    "models": 2, "data": 2, "capacity": 3, "segments": 1, "store": 2, "runners": 2, "executors": 3, "engine": 4,
    "parts": 4, "compose": 5, "bank": 5, "splitting": 6, "methods": 7,
    "config": 8, "evaluate": 8, "clusters": 8, "federation": 8, "folder": 8, "progress": 8,
    "profile": 8, "report": 9, "client_memory": 9, "run": 10, "dryrun": 11, "export": 11, "cli": 12, "train": 13,
    "__init__": 14,
}  # fmt: skip
DEVICE_WORDS = ("device", "mesh", "shard_map", "pmap", "vmap", "psum", "donate", "jit")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hetfl_jax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hetfl_jax."))


def room(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_files_import_only_from_lower_layers():
    for path in ROOT.rglob("*.py"):
        here = room(path)
        for other in imports(path):
            if other != here:
                assert LAYERS[other] < LAYERS[here], f"{path.relative_to(ROOT)} imports {other}"


def test_methods_and_parts_say_nothing_of_devices_or_client_axes():
    for folder, allowed in (("methods", ()), ("parts", ("vmap",))):
        for path in (ROOT / folder).glob("*.py"):
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not names & (set(DEVICE_WORDS) - set(allowed)), path


def test_files_and_functions_stay_small():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in ("train", "compose", "bank"):
                body = node.end_lineno - node.lineno - len((ast.get_docstring(node) or "").splitlines())
                assert body <= 60, f"{path.relative_to(ROOT)}: {node.name} has {body} lines"
