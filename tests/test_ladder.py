"""The import ladder by rooms, and methods that know of no device."""

import ast
import re
from pathlib import Path

import hetfl_jax

ROOT = Path(hetfl_jax.__file__).parent
#: what each room may import besides itself, as DESIGN's rooms have it
ROOMS = {
    "core": set(),
    "models": {"core"},
    "data": {"core"},
    "engine": {"core"},
    "parts": {"core", "models"},
    "clusters": {"core", "models", "parts"},
    "methods": {"core", "models", "parts", "clusters"},
    "results": {"core"},
    "run": {"core", "models", "data", "engine", "parts", "clusters", "methods", "results"},
}
DEVICE_WORDS = ("device", "mesh", "shard_map", "pmap", "vmap", "psum", "donate", "jit")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hetfl_jax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hetfl_jax."))


def test_rooms_import_only_from_lower_rooms():
    found = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if path.parent != ROOT}
    assert found == set(ROOMS)
    for path in ROOT.glob("*/**/*.py"):
        here = path.relative_to(ROOT).parts[0]
        others = set(imports(path)) - {here}
        assert others <= ROOMS[here], f"{path.relative_to(ROOT)} imports {others - ROOMS[here]}"


def test_the_root_is_an_index_and_an_entry():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_methods_and_parts_say_nothing_of_devices_or_client_axes():
    for folder, allowed in (("methods", ()), ("parts", ("vmap",))):
        for path in (ROOT / folder).glob("*.py"):
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not names & (set(DEVICE_WORDS) - set(allowed)), path


#: what belongs to a method, and is nobody else's to know
WORDS = re.compile(
    r"\b(judged|clusters?|correction|sel|restarts?|parent|scaffold|feddyn|transformer|assignment|momentum)\b"
)


def strings(path):
    """String constants of a file without its docstrings."""
    tree = ast.parse(path.read_text())
    held = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, held) and ast.get_docstring(n) is not None}
    return [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    ]


def test_generic_files_know_no_method():
    """``run/keys.py`` alone names what a config may hold."""
    paths = [path for room in ("run", "results", "engine", "core") for path in (ROOT / room).glob("*.py")]
    for path in (*paths, ROOT / "parts" / "compose.py"):
        if path.name != "keys.py":
            assert not [text for text in strings(path) if WORDS.search(text)], path
    assert WORDS.search("momentum of")


def test_files_and_functions_stay_small():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno - len((ast.get_docstring(node) or "").splitlines())
                most = 100 if node.name in ("compose", "bank") else 60
                assert body <= most, f"{path.relative_to(ROOT)}: {node.name} has {body} lines"
