"""The metrics of a search, exported by Ray where it exports its own: counted from the events of the driver.

The only tag is the run's name. A metric that cannot be recorded is given up on; the search goes on.
"""

import logging

from ray.util.metrics import Counter, Gauge, Histogram

from tale_ray.search.driver import RoundFinished, ScoringStarted, UnitStored
from tale_ray.search.pool import ScoringAdvanced, UnitDoubled, UnitRetried, WorkersChanged

logger = logging.getLogger("tale_ray.cluster")

UNIT_SECONDS_BOUNDARIES = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
_TAGS = ("run",)


class SearchMetrics:
    """The metrics of one search by this process, which is connected to a cluster."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._works = True
        self._units = Counter("tale_ray_units", "Units that are stored.", _TAGS)
        self._candidate_rows = Counter("tale_ray_candidate_rows", "(Candidate, row) pairs in stored units.", _TAGS)
        self._retries = Counter("tale_ray_unit_retries", "Units that were lost and tried again.", _TAGS)
        self._doubles = Counter("tale_ray_units_doubled", "Late units that were given to a second worker.", _TAGS)
        self._lost = Counter("tale_ray_workers_lost", "Workers that were lost.", _TAGS)
        self._rounds = Counter("tale_ray_rounds", "Rounds that are stored, the baseline too.", _TAGS)
        self._workers = Gauge("tale_ray_workers", "Workers that have joined and are there.", _TAGS)
        self._round = Gauge("tale_ray_round", "The round that is being scored; 0 is the baseline.", _TAGS)
        self._open = Gauge("tale_ray_cells_open", "(Candidate, row) pairs of the scoring that are not known.", _TAGS)
        self._seconds = Histogram(
            "tale_ray_unit_seconds", "What a unit took its worker.", UNIT_SECONDS_BOUNDARIES, _TAGS
        )

    def note(self, event: object) -> None:
        """Record what an event says. Never raises: after the first failure nothing is recorded any more."""
        if not self._works:
            return
        try:
            self._record(event)
        except Exception as error:  # noqa: BLE001  no metric is worth a search
            self._works = False
            logger.warning("the metrics of this search are not recorded any more: %s", error)

    def _record(self, event: object) -> None:
        match event:
            case UnitStored():
                self._units.inc(tags=self._tags)
                self._candidate_rows.inc(event.candidate_rows, tags=self._tags)
                self._seconds.observe(event.seconds, tags=self._tags)
            case ScoringStarted():
                self._open.set(event.total_cells - event.done_cells, tags=self._tags)
                self._round.set(len(event.history.rounds), tags=self._tags)
            case ScoringAdvanced():
                self._open.set(event.total_cells - event.done_cells, tags=self._tags)
                self._workers.set(event.num_workers, tags=self._tags)
            case RoundFinished():
                self._rounds.inc(tags=self._tags)
            case UnitRetried():
                self._retries.inc(tags=self._tags)
            case UnitDoubled():
                self._doubles.inc(tags=self._tags)
            case WorkersChanged():
                self._workers.set(event.num_workers, tags=self._tags)
                if event.lost_because is not None:
                    self._lost.inc(tags=self._tags)
