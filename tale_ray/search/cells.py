"""Which (candidate, row) cells of a scoring nobody has scored or is scoring. Knows nothing of workers."""

from collections.abc import Callable, Iterable, Iterator, Sequence


class OpenCells:
    """The open cells, by row in the order in which rows are to be scored."""

    def __init__(self, candidates: Sequence[int | None], order: Sequence[int]) -> None:
        self._candidates = tuple(candidates)
        self._order = list(order)
        self._by_row: dict[int, set[int | None]] = {row: set(candidates) for row in order}
        self._rows_open = dict.fromkeys(candidates, len(self._order))

    def close(self, candidates: Iterable[int | None], rows: Sequence[int]) -> None:
        """Take cells out; those that are not open stay so."""
        for candidate in candidates:
            for row in rows:
                if candidate in self._by_row[row]:
                    self._by_row[row].remove(candidate)
                    self._rows_open[candidate] -= 1

    def open(self, candidate: int | None, rows: Iterable[int]) -> None:
        """Put cells back that were lost."""
        for row in rows:
            if candidate not in self._by_row[row]:
                self._by_row[row].add(candidate)
                self._rows_open[candidate] += 1

    def rows_open(self, candidates: Iterable[int | None]) -> int:
        """Return the rows that are open for the candidate with the most of them."""
        return max((self._rows_open[candidate] for candidate in candidates), default=0)

    def find(
        self,
        racing: frozenset[int | None],
        prefers: Callable[[int], bool],
        rows: Sequence[int] | None = None,
    ) -> Iterator[tuple[tuple[int | None, ...], int]]:
        """Yield (candidates, row) that share the first row's candidates: preferred rows, or others if there are none.

        Args:
            racing: the candidates that count.
            prefers: whether a row is wanted before others.
            rows: only these, in their order; None: all, in the order of the scoring.
        """
        chosen: set[int | None] | None = None
        rest: list[tuple[set[int | None], int]] = []
        for row in self._order if rows is None else rows:
            cells = self._by_row[row]
            if not cells or not (wanted := cells & racing):
                continue
            if not prefers(row):
                rest.append((wanted, row))
            elif chosen is None or wanted == chosen:
                chosen = wanted
                yield self._sorted(wanted), row
        if chosen is None and rest:
            chosen = rest[0][0]
            yield from ((self._sorted(chosen), row) for wanted, row in rest if wanted == chosen)

    def _sorted(self, chosen: set[int | None]) -> tuple[int | None, ...]:
        return tuple(candidate for candidate in self._candidates if candidate in chosen)
