"""tale_ray: find the transformer layers that a task is better off without."""

__version__ = "0.1.0"
