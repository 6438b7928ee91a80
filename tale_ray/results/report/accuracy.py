"""Correct rows of all, as a report shows them: read from a file of results, with its interval."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tale_ray.errors import StoreError
from tale_ray.results.statistics import Interval, wilson_interval
from tale_ray.store.documents import check_fields


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Correct rows of all, and the Wilson 95% interval of their share."""

    correct: int
    total: int
    interval: Interval
    invalid: int  # replies from which no answer could be read; 0 if that is not stored

    @property
    def share(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.correct / self.total


def read_accuracy(score: Mapping[str, Any], path: str, remedy: str) -> Accuracy:
    """Return the accuracy of a stored score: `correct` of `total` rows, and `invalid` if that is stored.

    Raises:
        StoreError: names the file, what is wrong with it, and the remedy.
    """
    found = {"invalid": 0, **score}
    check_fields(found, {"correct": int, "total": int, "invalid": int}, path, remedy)
    correct, total = found["correct"], found["total"]
    if not 0 <= correct <= total or not total:
        raise StoreError(f"{path} was changed: {correct} of {total} rows are no score; {remedy}")
    return Accuracy(correct, total, wilson_interval(correct, total), found["invalid"])
