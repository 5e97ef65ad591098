"""The README and the site: their Python runs, their figures and the tests they name exist."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python\n" in page.read_text()]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def blocks(page):
    """The Python of a page, one program from top to bottom; fences of another kind are not run."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name} block {number}", "exec"), names)
    if "logits" in names:
        assert float(re.search(r"([\d.]+)%", capsys.readouterr().out)[1]) > 80


@pytest.mark.parametrize("page", ["method", "selection", "codec"])
def test_a_method_of_the_how_to_pages_trains(page):
    """The ``make`` of a page goes through a round."""
    from hetfl_jax.engine.executors import executor
    from tests.contract import play
    from tests.helpers import mlp_family, sgd, toy_population

    names = {}
    for block in blocks(ROOT / "docs" / "howto" / f"{page}.md"):
        exec(block, names)
    told = {"clients": 12} if page == "selection" else {}
    for make in (names["make"], names.get("timid", names["make"])):
        _, infos, _ = play(make(mlp_family(), sgd(), cohort=4, **told), executor("bucketed"), toy_population(), 1)
        assert infos[0].numbers["clients"] == 4


def test_links_of_the_readme_exist_and_it_is_short():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (ROOT / target).exists(), target
    assert len(text.splitlines()) <= 120


def defined(path):
    """Names of the test functions of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("page", "least"), [("reliability", 30), ("faq", 10)])
def test_promises_name_tests_that_exist(page, least):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / f"{page}.md").read_text())
    assert len(named) >= least
    for file, test in named:
        assert test in defined(ROOT / file), f"{file}::{test}"


def test_every_row_of_the_reliability_page_names_a_test():
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| fault |", "| ---"))]
    assert [row for row in promises if "::test_" not in row] == []


NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.mark.parametrize(("page", "columns"), [("README.md", (3, 4)), ("docs/reproductions.md", (2, 3, 5))])
def test_figures_stand_in_the_experiment_that_they_link_to(page, columns):
    """No figure of a table is typed from elsewhere: each number is one of the linked experiment's README."""
    checked = 0
    for line in (ROOT / page).read_text().splitlines():
        linked = re.findall(r"\]\((experiments/[\w/]+\.md)", line)
        if not line.startswith("|") or not linked:
            continue
        known = set(NUMBER.findall(" ".join((ROOT / target).read_text() for target in linked)))
        cells = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell) for cell in line.strip("|").split("|")]
        for number in NUMBER.findall(" ".join(cells[column] for column in columns)):
            if len(number) > 1:  # single digits are words here: "one of 8"
                assert number in known, f"{number} of {cells[0].strip()} is not in {linked}"
                checked += 1
    assert checked > 5


def test_tutorials_are_stored_without_output_and_are_on_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    assert len(NOTEBOOKS) >= 4
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
        assert f"tutorials/{path.name}" in site


#: docstring lines over lines of code that each room reached, and the package as a whole
REACHED = {
    "core": 0.65, "models": 0.49, "data": 0.52, "parts": 0.66, "clusters": 0.56, "methods": 0.65,
    "engine": 0.61, "results": 0.53, "run": 0.35,
}  # fmt: skip
REACHED_TOGETHER = 0.53


def docstring_ratio(*rooms):
    """Lines of docstrings over lines of code, blank lines and comments of neither kind counted."""
    doc_lines = code_lines = 0
    for path in (path for room in rooms for path in (ROOT / "hetfl_jax" / room).glob("*.py")):
        lines, inside = path.read_text().splitlines(), set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                inside |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        doc_lines += sum(1 for number in inside if lines[number - 1].strip())
        said = [line.strip() for number, line in enumerate(lines, 1) if number not in inside]
        code_lines += sum(1 for line in said if line and not line.startswith("#"))
    return doc_lines / code_lines


@pytest.mark.parametrize("room", REACHED)
def test_docstrings_do_not_get_fewer(room):
    assert docstring_ratio(room) >= REACHED[room]


def test_docstrings_of_all_rooms_do_not_get_fewer():
    assert docstring_ratio(*REACHED) >= REACHED_TOGETHER
