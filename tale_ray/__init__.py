"""tale_ray: find the transformer layers that a task is better off without.

    import tale_ray

    run = tale_ray.search(model="bundled", task="boolean_synthetic", rows=200, local=True)
    print(run.best.removed)

`tale_ray.search` is this function; the room of the same name is reached by its modules, `from tale_ray.search.driver
import Driver`. Importing the package imports neither torch nor Ray.
"""

from tale_ray.api import evaluate, open_run, open_study, resume, resume_study, search
from tale_ray.api_information import information
from tale_ray.api_several import compare, transfer
from tale_ray.api_tuning import finetune, synergy

__version__ = "0.1.0"
__all__ = [
    "compare",
    "evaluate",
    "finetune",
    "information",
    "open_run",
    "open_study",
    "resume",
    "resume_study",
    "search",
    "synergy",
    "transfer",
]
