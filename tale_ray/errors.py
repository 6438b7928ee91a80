"""The errors of tale_ray, one family, mapped to exit codes in one place.

    TaleRayError                     1   the run failed
    ├── UsageError (ValueError)      2   a request that cannot be met; the message says value, rule and remedy
    │   ├── ConfigError                  an option
    │   ├── TaskError                    a task file, its rows or its prompts
    │   ├── ModelError                   a model that cannot be loaded or searched
    │   ├── StoreError                   a run folder: damaged, of another run, not writable
    │   │   └── LeaseHeld                somebody else is writing to it
    │   └── InfeasibleError              resources that no node has
    ├── Interrupted                 75   stopped, everything finished is stored; `tale-ray resume` goes on
    │   ├── LeaseLost                    somebody else took the run over
    │   └── StorageAway                  the storage failed again and again
    ├── BaselineZero                 1   the full model answers no row correctly
    ├── PoisonUnit                   1   a unit of work failed on every try
    └── WorkersLost                  1   every worker died again and again

Every error carries one message and nothing else, so each survives pickling between processes.
"""


class TaleRayError(Exception):
    """Base of all errors that tale_ray raises on purpose."""

    exit_code = 1


class UsageError(TaleRayError, ValueError):
    """The request cannot be met as it was made."""

    exit_code = 2


class ConfigError(UsageError):
    """An option has a value that the rules do not allow."""


class TaskError(UsageError):
    """A task file, its rows or its prompts cannot be used."""


class ModelError(UsageError):
    """A model cannot be loaded, or its layers cannot be removed."""


class StoreError(UsageError):
    """A run folder cannot be used as it is."""


class LeaseHeld(StoreError):
    """Another process is writing to the run folder."""


class InfeasibleError(UsageError):
    """The cluster can never, or did not in time, give what was asked for."""


class Interrupted(TaleRayError):
    """The run stopped before its end; what was finished is stored."""

    exit_code = 75


class LeaseLost(Interrupted):
    """Another process took the run over; nothing more may be written."""


class StorageAway(Interrupted):
    """The storage could not be written to after several tries."""


class BaselineZero(TaleRayError):
    """The full model answered no search row correctly: there is nothing to protect."""


class PoisonUnit(TaleRayError):
    """One unit of work failed on every try that it was given."""


class WorkersLost(TaleRayError):
    """Every worker died again and again, so that no unit can be finished."""
