"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block(number, capsys):
    names = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    if "logits" in names:
        text = capsys.readouterr().out
        assert float(re.search(r"([\d.]+)%", text)[1]) > 80


def test_the_readme_method_trains(capsys):
    """The method of "Add a method" goes through a round."""
    from hetfl_jax.engine.executors import executor
    from tests.helpers import mlp_family, sgd, toy_population
    from tests.test_contract import play

    names = {}
    exec(next(block for block in BLOCKS if "small_first" in block), names)
    algorithm = names["make"](mlp_family(), sgd(), cohort=4)
    _, infos, _ = play(algorithm, executor("bucketed"), toy_population(), rounds=1)
    assert infos[0].numbers["clients"] == 4


def test_links_and_paths_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert "://" in target or (ROOT / target).exists(), target
