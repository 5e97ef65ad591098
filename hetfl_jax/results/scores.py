"""Which entry of a metrics line is the score, and how scores are written."""

from collections.abc import Sequence
from typing import TypeVar

from hetfl_jax.core.types import ACCURACY, Arguments

Told = TypeVar("Told", bound=Arguments)


def score_of(lines: Sequence[Arguments]) -> str:
    """The name of the score by which a run's models are judged; lines that do not say so have an accuracy.

    >>> score_of([{"round": 0, "score": "rmse", "rmse": {"a": 2.5}}]), score_of([{"round": 0}])
    ('rmse', 'accuracy')
    """
    return next((str(line["score"]) for line in lines if "score" in line), ACCURACY.name)


def evaluated(lines: Sequence[Told]) -> list[Told]:
    """The lines of rounds that were evaluated.

    >>> evaluated([{"round": 1}, {"round": 2, "accuracy": {"a": 0.5}}])
    [{'round': 2, 'accuracy': {'a': 0.5}}]
    """
    score = score_of(lines)
    return [line for line in lines if score in line]


def is_share(name: str) -> bool:
    """Whether a score is a share of 1, which people read in percent.

    >>> is_share("local_accuracy"), is_share("test_recovery"), is_share("rmse")
    (True, True, False)
    """
    return name.endswith(("accuracy", "recovery"))


def written(value: float | None, share: bool) -> str:
    """A score for people: a share in percent, anything else as a number, none as a dash.

    >>> written(0.5, True), written(12.3456, False), written(None, True)
    ('50.00%', '12.35', '-')
    """
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if share else f"{value:.4g}"
