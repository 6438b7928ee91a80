"""What is remembered: one run, one folder. Imports neither torch nor ray."""

from tale_ray.store.documents import AttemptRecord, Lease, Manifest
from tale_ray.store.lease import HolderState, holder_state
from tale_ray.store.run import RunReader, RunWriter
from tale_ray.store.tables import AnswerSheet, StoredRound

__all__ = [
    "AnswerSheet",
    "AttemptRecord",
    "HolderState",
    "Lease",
    "Manifest",
    "RunReader",
    "RunWriter",
    "StoredRound",
    "holder_state",
]
