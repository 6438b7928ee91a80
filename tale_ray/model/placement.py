"""Where a model's weights are to lie. Knows nothing of how they get there."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The devices of the pipeline stages, in order: `("cpu",)`, `("cuda:0", "cuda:1")`. One device, one stage."""

    devices: tuple[str, ...] = ("cpu",)
    shares_weights: bool = False  # with other processes of this machine, on the CPU
    is_streamed: bool = False  # layers stay in their files and come to the first device one at a time
    num_members: int = 1  # of the gang of processes that split the weights; each has one device

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that hold weights."""
        return len({device for device in self.devices if device.startswith("cuda")})


ON_CPU = Placement()


def worker_placement(gpus_per_worker: int, *, is_alone: bool, num_members: int = 1) -> Placement:
    """Return the placement on the first GPUs that a process sees, or on the CPU: with others, unless it `is_alone`.

    Of a gang it is that of each member, which has one GPU or none.
    """
    if not gpus_per_worker:
        return Placement(shares_weights=not is_alone and num_members == 1, num_members=num_members)
    return Placement(
        devices=tuple(f"cuda:{gpu}" for gpu in range(gpus_per_worker // num_members)), num_members=num_members
    )
