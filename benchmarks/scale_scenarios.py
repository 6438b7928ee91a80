"""What is simulated: searches of a model of 8 billion parameters on one GPU per worker, and what they are to reach.

Unit times come from the model's arithmetic; they are not measured.
"""

from dataclasses import dataclass

from simulated import PaperModel, Workload
from unit_times import UnitTimes

from tale_ray.config import StrategySection

ROWS, LAYERS = 550, 32
LEAST_EFFICIENCY = {64: 0.90, 256: 0.75}
MOST_UNIT_MILLISECONDS = 1.0
MOST_COMMIT_MILLISECONDS = 50.0

# A layer of Llama-3.1-8B has 218 million parameters; half of an A100's 312 TFLOP/s in bfloat16, and its 2 TB/s.
_LAYER_FLOPS_PER_TOKEN = 2 * 218e6
_FLOPS = 156e12
_LAYER_SECONDS = 2 * 218e6 / 2e12
_STEP_SECONDS = 32 * 2 * _LAYER_SECONDS  # of a new token: weights are read, and as long again for launching kernels
_REPLY_ROWS = 256  # replies that are decoded together before they take longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A search to be simulated."""

    name: str
    says: str
    workload: Workload


def scenarios(num_layers: int = LAYERS, num_rows: int = ROWS) -> tuple[Scenario, ...]:
    """Return what is simulated; the first is that of the targets."""
    correct = PaperModel(num_layers)
    exhaustive = StrategySection(exhaustive=True)

    def times(tokens: int, new_tokens: int = 1) -> UnitTimes:
        steps = new_tokens - 1
        return UnitTimes(
            num_layers=num_layers,
            fixed_seconds=0.02 + steps * _STEP_SECONDS,
            layer_seconds=_LAYER_SECONDS,
            application_seconds=_LAYER_FLOPS_PER_TOKEN * tokens / _FLOPS,
            reply_seconds=steps * _STEP_SECONDS / _REPLY_ROWS,
            opening_seconds=2 * _LAYER_SECONDS,
            noise=0.1,
        )

    long, short, replies = times(2000), times(200), times(200, 256)
    return (
        Scenario(
            name="long",
            says="prompts of 2,000 tokens of their own, one new token, exhaustive",
            workload=Workload(num_rows=num_rows, times=long, correct=correct, strategy=exhaustive),
        ),
        Scenario(
            name="long race",
            says="the same, candidates that cannot win left out (the default)",
            workload=Workload(num_rows=num_rows, times=long, correct=correct),
        ),
        Scenario(
            name="short",
            says="prompts of 200 tokens, one new token, exhaustive",
            workload=Workload(num_rows=num_rows, times=short, correct=correct, strategy=exhaustive),
        ),
        Scenario(
            name="replies",
            says="prompts of 200 tokens, 256 new tokens, exhaustive",
            workload=Workload(
                num_rows=num_rows, times=replies, correct=correct, strategy=exhaustive, max_new_tokens=256
            ),
        ),
    )
