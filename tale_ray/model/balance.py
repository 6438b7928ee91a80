"""How layers are dealt to the stages of a pipeline: by bytes. Pure; knows neither weights nor devices."""

from collections.abc import Sequence

from tale_ray.errors import ConfigError


def balance(layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, num_stages: int) -> tuple[int, ...]:
    """Return the stage of each layer, so that the largest stage is as small as it can be.

    Stages are contiguous, numbered from 0, and each holds a layer at least. Of all such ways the one whose later
    stages are as full as they may be: what is to spare is the first stage's, where the batches come from.

    Args:
        layer_bytes: of each layer's weights.
        first_bytes: of what the first stage holds beside its layers: the embedding.
        last_bytes: of what the last one does: final norm and head.
        num_stages: of the pipeline.

    Raises:
        ConfigError: there are more stages than layers, or none.
    """
    num_layers = len(layer_bytes)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            f"{num_stages} pipeline stages cannot be made of {num_layers} layers: a stage holds one at least; "
            f"ask for 1 to {num_layers}"
        )
    needed = [first_bytes + layer_bytes[0], *layer_bytes[1:]]
    needed[-1] += last_bytes  # the embedding and the head are as good as part of the outermost layers
    too_few, enough = max(needed) - 1, sum(needed)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if _deal(needed, num_stages, middle) else (middle, enough)
    stages = _deal(needed, num_stages, enough)
    assert stages, "everything fits where everything fits into one stage"
    return stages


def _deal(needed: Sequence[int], num_stages: int, most_bytes: int) -> tuple[int, ...]:
    """Return the stages of at most so many bytes, filled from the last one; empty if layers are left over.

    No layer alone takes more.
    """
    stages: list[int] = []
    above = len(needed)  # the layers from here on are dealt
    for stage in reversed(range(num_stages)):
        bottom = above - 1
        while bottom > stage and sum(needed[bottom - 1 : above]) <= most_bytes:  # one layer is left for each below
            bottom -= 1
        stages += [stage] * (above - bottom)
        above = bottom
    return () if above else tuple(reversed(stages))
