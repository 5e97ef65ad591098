"""DivFL as a selection: the clients whose gradients represent those of all (Balakrishnan et al., ICLR 2022)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array, Cohort, Needs, Population
from hetfl_jax.parts import divfl as facility
from hetfl_jax.parts.choose import PICK, need, need_cohort, round_off
from hetfl_jax.parts.select import Ask, Select

GRADIENTS = ("stale", "full")
SHARES = ("method", *facility.BY)


class Diverse(NamedTuple):
    """What the server remembers of the clients' gradients."""

    table: Array  #: [N, P'] the latest gradient of each client, or its projection
    distance: Array  #: [N, N] between rows of the table
    known: Array  #: [N] bool, who ever sent a finite one
    represented: Array  #: mean distance of a client to the nearest one in the cohort
    error: Array  #: root mean square relative error of the projected gradients' norms, in the latest projection


def divfl(
    cohort: int, parameters: int, *, gradients: str = "stale", stochastic: float = 0.0, by: str = "method",
    dimensions: int = 0,
) -> Select:  # fmt: skip
    """The ``cohort`` that the greedy of facility location takes: small ``G(S) = sum_k min_{i in S} ||g_k - g_i||``.

    g_k is the gradient of client k's mean loss over all its examples, at the model as it is sent, all parameters flat;
    under levels, 0 where the client holds no entry (our extension). A gradient that is not finite is never chosen.

    | gradients | who sends them | cost |
    | --- | --- | --- |
    | stale | all clients once; then the cohort of a round before it trains | P numbers up and one pass each |
    | full | all clients in every round, before the choice | the same for all |

    Stale rows of clients that were not chosen stay as they are, so that few clients may be chosen again and again. A
    client that answers has the model, and does not receive it a second time for training.

    Args:
      parameters: P, of the full model.
      stochastic: share of all clients that each step of the greedy looks at, at random, and at least ``cohort`` of
        them (the paper's 0.1); 0 looks at all.
      by: how much a reply counts: as the ``method`` has it (FedAvg: n_k over the cohort, as the official trainer);
        ``examples`` n_k; ``alike``; ``clusters``, the share of all clients that it represents.
      dimensions: of a random projection that clients send in place of the P numbers (with the norm of the whole, which
        shows its error); 0 for none. Not in DivFL.

    Memory O(N P' + N^2) and time O(cohort N^2) at the server.

    Raises:
      ValueError: a value out of range, and (when the round is built) a cohort above the population.

    >>> divfl(2, parameters=5).init(3).table.shape
    (3, 5)
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")
    need(gradients in GRADIENTS, f"gradients {gradients!r}, allowed {', '.join(GRADIENTS)}", "gradients")
    need(by in SHARES, f"weights by {by!r}, allowed {', '.join(SHARES)}", "by")
    need(0 <= stochastic <= 1, f"stochastic {stochastic}, allowed 0..1", "stochastic")
    need(0 <= dimensions < parameters, f"{dimensions} dimensions, allowed 0..{parameters - 1}", "dimensions")
    width = dimensions or parameters

    def init(clients: int) -> Diverse:
        table, distance = jnp.zeros((clients, width), jnp.float32), jnp.zeros((clients, clients), jnp.float32)
        return Diverse(table, distance, jnp.zeros(clients, bool), jnp.float32(0), jnp.float32(0))

    def sent(row: Array) -> tuple[Array, Array]:
        """What a client sends: its gradient or a projection, and the norm of the whole."""
        small = facility.project(jax.random.key(0), row, dimensions) if dimensions else row
        return small, jnp.linalg.norm(row)

    def received(ids: Array, asked: Array, ask: Ask) -> tuple[Array, Array, Array]:
        """(rows [K, P'], which of them came, mean square relative error of their norms)."""
        rows, norm = ask.gradients(ids, asked, sent, dimensions + 1 if dimensions else 0)
        came = asked & jnp.isfinite(rows).all(1)
        off = jnp.square(jnp.linalg.norm(rows, axis=1) / jnp.where(norm > 0, norm, 1) - 1)
        return rows, came, jnp.where(came & (norm > 0), off, 0).sum() / jnp.maximum(came.sum(), 1)

    def choose(key: Array, round: Array, state: Diverse, population: Population, ask: Ask) -> tuple[Cohort, Diverse]:
        size, clients = population.size, population.size.shape[0]
        need_cohort(cohort, clients)
        there = size > 0
        asked = there if gradients == "full" else there & ~state.known
        rows, came, off = received(jnp.arange(clients, dtype=jnp.int32), asked, ask)
        table, known = jnp.where(came[:, None], rows, state.table), state.known | came
        distance = jax.lax.cond(came.any(), facility.distances, lambda table: state.distance, table)
        number = min(max(cohort, int(round_off(stochastic * clients))), clients)
        among = facility.some_remaining(jax.random.fold_in(key, PICK), number) if stochastic else None
        picks = facility.greedy(distance, cohort, among, there & known)
        # A mean of 1, so that a server that counts replies still does.
        there_are = picks.valid.sum()
        share = () if by == "method" else there_are * facility.shares(by, size, distance, picks.ids, picks.valid)
        represented = picks.cost[-1] / jnp.maximum((there & known).sum(), 1)
        error = jnp.where(came.any(), jnp.sqrt(off), state.error)
        if gradients == "stale":
            rows, again, off = received(picks.ids, picks.valid & ~came[picks.ids], ask)
            table, distance = facility.refreshed(table, distance, picks.ids, rows, again)
            error = jnp.where(again.any(), jnp.sqrt(off), error)
        return Cohort(picks.ids, picks.valid, share=share), Diverse(table, distance, known, represented, error)

    def info(state: Diverse) -> dict[str, Array]:
        numbers = {"distance_to_cohort": state.represented}
        return {**numbers, "projection_error": state.error} if dimensions else numbers

    return Select(init, choose, info=info, needs=partial(_needs, width))


def _needs(width: int, clients: int) -> Needs:
    """Table and distances, each twice: as they are kept, and as a round makes them anew."""

    def total(width: int) -> int:
        return 2 * 4 * clients * (width + clients)

    what = f"{clients:,} x {width:,} gradients and their {clients:,} x {clients:,} distances"
    small = 512
    less = f"select.args.dimensions={small} ({total(small) / 1e6:,.1f} MB)" if width > 2 * small else ""
    other = f"power_of_choice with kind=rpow ({4 * clients / 1e6:,.1f} MB)"
    return Needs(total(width), what, f"{less} or {other}" if less else other)
