"""A token for private clusters: whoever reaches a Ray port without one could run code."""

import os
import secrets
import sys


def protect_private_cluster() -> None:
    """Set a fresh token for a cluster that this process is about to start.

    Ray reads the mode when it is imported, so this comes before the first `import ray`; where Ray is imported
    already, or the environment says how to authenticate, nothing is changed.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
