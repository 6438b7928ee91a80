"""tale_ray: find the transformer layers that a task is better off without.

import tale_ray

run = tale_ray.search(model="bundled", task="boolean_synthetic", rows=200, local=True)
print(run.best.removed)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "open_run", "resume", "search"]


def __getattr__(name: str) -> Any:
    """Import the API on first use: workers and tools that need one room only do not pay for all of them."""
    if name in __all__:
        from tale_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'tale_ray' has no attribute {name!r}")
