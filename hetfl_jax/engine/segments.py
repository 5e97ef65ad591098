"""Rows of client memory in sparse files, so that a kill at any moment loses nothing.

Changed rows go to an open segment: one sparse file a level, a row at its client's own place. A commit writes an index,
which says for every client the segment of its newest row, under the number of the round whose checkpoint follows. Rows
of a segment that no index names were never committed: they are dropped when a run goes on from a checkpoint. Segments
of which less than half is still in use are emptied into the open one, so the files stay within about twice the rows.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_NEVER = -1
_BYTES = 4  # of a float32


class Segments:
    """The newest row of every client that ever had one.

    A row is the client's memory as one float32 vector; its length is that of the client's level.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = Segments(folder, level=np.array([0, 1, 1]), sizes=np.array([4, 2]))
    >>> rows.write(2, np.array([1.0, 2.0]))
    >>> rows.commit(10, checkpoints=[])
    >>> rows.write(2, np.array([8.0, 9.0]))  # a round that no checkpoint follows
    >>> again = Segments(folder, np.array([0, 1, 1]), np.array([4, 2]))
    >>> again.restore(10)
    >>> again.clients(), again.read(2).tolist(), again.read(0)
    ([2], [1.0, 2.0], None)
    """

    def __init__(self, folder: Path, level: np.ndarray, sizes: np.ndarray):
        """Start with no rows; whatever ``folder`` holds is used only by ``restore``.

        Args:
          folder: need not exist; it is made with the first row.
          level: [N] int, of each client, fixed for the whole run.
          sizes: [L] int, float32 entries of a row of each level; 0 keeps nothing of that level's clients.
        """
        self.folder, self.level, self.sizes = folder, np.asarray(level), np.asarray(sizes)
        self.place = np.empty(self.level.size, np.int64)
        for number in range(self.sizes.size):
            owners = np.flatnonzero(self.level == number)
            self.place[owners] = np.arange(owners.size)
        self.index = np.full(self.level.size, _NEVER, np.int32)
        self.written = np.zeros(0, np.int64)  #: rows that were ever written to each segment
        self.open = self._next()

    def clients(self) -> list[int]:
        """Clients that have a row, in rising order."""
        return np.flatnonzero(self.index != _NEVER).tolist()

    def read(self, client: int) -> np.ndarray | None:
        """The client's row [sizes[level]] as a read-only map of the file, or ``None`` if it was never written."""
        if self.index[client] == _NEVER or not self.sizes[self.level[client]]:
            return None
        level, size = self.level[client], int(self.sizes[self.level[client]])
        path = self._file(self.index[client], level)
        return np.memmap(path, np.float32, "r", offset=int(self.place[client]) * size * _BYTES, shape=(size,))

    def write(self, client: int, row: np.ndarray) -> None:
        """Put a row into the open segment; it counts from the next ``commit`` on.

        Args:
          row: [sizes[level]] of the client's level; it is cast to float32.

        Raises:
          OSError: the disk is full; what was committed is untouched.
        """
        level = self.level[client]
        path = self._file(self.open, level)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = int((self.level == level).sum())
            with path.open("wb") as file:
                file.truncate(rows * int(self.sizes[level]) * _BYTES)
        with path.open("r+b") as file:
            file.seek(int(self.place[client]) * int(self.sizes[level]) * _BYTES)
            file.write(np.ascontiguousarray(row, np.float32).data)
        if self.open >= self.written.size:
            self.written = np.pad(self.written, (0, self.open + 1 - self.written.size))
        self.written[self.open] += self.index[client] != self.open
        self.index[client] = self.open

    def commit(self, round: int, checkpoints: Sequence[int]) -> None:
        """Make the rows so far those of ``round``; what neither it nor another checkpoint needs is removed.

        Files are written through to the disk before the index is renamed into place: a kill leaves either the old
        state or the new one.

        Args:
          round: of the checkpoint that follows.
          checkpoints: rounds whose checkpoints are still there.
        """
        live = np.bincount(self.index[self.index != _NEVER], minlength=self.written.size)
        for segment in np.flatnonzero((live > 0) & (2 * live < self.written)).tolist():
            if segment != self.open:
                for client in np.flatnonzero(self.index == segment).tolist():
                    row = self.read(client)
                    assert row is not None
                    self.write(client, np.array(row))
        for path in self.folder.glob(f"segment_{self.open}_*"):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "index.partial"
        with partial.open("wb") as file:
            np.savez(file, index=self.index, written=self.written)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._index(round))
        self._prune({*checkpoints, round})
        self.open = self._next()

    def restore(self, round: int) -> None:
        """Take the rows that belong to ``round``'s checkpoint; indices of later rounds are removed.

        Raises:
          ValueError: they are not there, or belong to another number of clients.
        """
        if not self._index(round).exists():
            have = ", ".join(map(str, sorted(self._rounds()))) or "none"
            raise ValueError(f"{self.folder} has no client memory of round {round}; it has {have} (train.store)")
        with np.load(self._index(round)) as file:
            index, written = file["index"], file["written"]
        if index.shape != self.index.shape:
            raise ValueError(f"{self.folder} is of {index.size} clients, not {self.index.size} (train.store)")
        self.index, self.written = index, written
        self._prune({r for r in self._rounds() if r <= round})
        self.open = self._next()

    def _prune(self, rounds: set[int]) -> None:
        """Remove indices of other rounds than these, and segments that no index names."""
        needed = set(np.unique(self.index).tolist())
        for round in self._rounds():
            if round not in rounds:
                self._index(round).unlink()
                continue
            with np.load(self._index(round)) as file:
                needed |= set(np.unique(file["index"]).tolist())
        for path in self.folder.glob("segment_*"):
            if int(path.name.split("_")[1]) not in needed:
                path.unlink()

    def _next(self) -> int:
        """A number that no segment has or had."""
        taken = [int(path.name.split("_")[1]) for path in self.folder.glob("segment_*")]
        return max([*taken, self.written.size - 1], default=-1) + 1

    def _rounds(self) -> list[int]:
        """Rounds that have an index."""
        return [int(path.stem.split("_")[1]) for path in self.folder.glob("index_*.npz")]

    def _index(self, round: int) -> Path:
        return self.folder / f"index_{round}.npz"

    def _file(self, segment: int, level: int) -> Path:
        return self.folder / f"segment_{segment}_level_{level}.f32"
