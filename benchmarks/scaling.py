"""How the cost of one exhaustive round grows with rows, layers, prompt, demonstrations and new tokens.

    python benchmarks/scaling.py --threads 2

Random Llamas, scored through `Scorer` directly. Beside the measured seconds stand the layer applications that the
scorer counted and those that the formulae give, the required FLOPs (see `flops.py`), and what the published procedure
would take: a few forwards timed, times their number.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import published
import random_models
import torch
from circumstances import circumstances
from flops import Shape, gemm_rate, required

from tale_ray.engine.score import Scorer
from tale_ray.records import PromptRow, WorkUnit
from tale_ray.tasks.spec import AnswerSpec

HERE = Path(__file__).parent
SHOT_TOKENS = 64
_ANSWER = AnswerSpec(type="regex", pattern=r"(t)\d*[0-4]\W*$")
_PUBLISHED_FORWARDS = 8  # timed at each point, at least


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One round to be scored: all candidates on all rows."""

    rows: int = 50
    layers: int = 12
    prompt_tokens: int = 32  # of each row's own
    shots: int = 0  # of 64 tokens each, the same before every row
    new_tokens: int = 1
    hidden_size: int = 128

    @property
    def prefix_tokens(self) -> int:
        """Tokens that all prompts begin with."""
        return self.shots * SHOT_TOKENS

    @property
    def applications(self) -> int:
        """Layer applications by the formulae of one round of S candidates.

        Sweep, per row and once for the prefix: (S-1) + S(S-1)/2. Every later step, per row: S(S-1).
        """
        sweep = (self.layers - 1) + self.layers * (self.layers - 1) // 2
        steps = (self.new_tokens - 1) * self.layers * (self.layers - 1)
        return self.rows * (sweep + steps) + (sweep if self.shots else 0)


AXES: dict[str, tuple[Point, ...]] = {
    "rows": tuple(Point(rows=rows) for rows in (50, 100, 200, 400, 800)),
    "layers": tuple(Point(layers=layers) for layers in (6, 12, 24, 48)),
    "prompt_tokens": tuple(Point(rows=16, prompt_tokens=tokens) for tokens in (32, 64, 128, 256, 512, 1024)),
    "shots": tuple(Point(hidden_size=256, shots=shots) for shots in (0, 1, 2, 3, 4, 5)),
    "new_tokens": tuple(Point(rows=16, hidden_size=256, new_tokens=tokens) for tokens in (1, 2, 4, 8, 16, 32, 64, 128)),
}


def measure(point: Point, repeats: int) -> dict[str, Any]:
    """Return what one point took: the median of some rounds, each by a scorer that remembers nothing."""
    loaded = random_models.loaded(random_models.random_llama(point.layers, point.hidden_size, max_tokens=2048))
    generator = torch.Generator().manual_seed(0)
    prefix, *_ = random_models.random_words(1, point.prefix_tokens, generator)
    rows = [
        PromptRow((*prefix, *own), "t")
        for own in random_models.random_words(point.rows, point.prompt_tokens, generator)
    ]
    unit = WorkUnit(0, "round-0001", "search", (), tuple(range(point.layers)), tuple(range(point.rows)))
    seconds = []
    for _ in range(repeats):
        scorer = Scorer(loaded)
        warm_up = replace(unit, split="test", candidates=(0,), rows=(0,))  # finds out what the model fits
        scorer.score(warm_up, rows[:1], _ANSWER, point.new_tokens, "")
        started = time.perf_counter()
        result = scorer.score(unit, rows, _ANSWER, point.new_tokens, "")
        seconds.append(time.perf_counter() - started)
    needed = required(Shape.of(loaded.model.config), [unit], [row.token_ids for row in rows], point.new_tokens)
    return {
        **asdict(point),
        "prefix_share": point.prefix_tokens / (point.prefix_tokens + point.prompt_tokens),
        "seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "most_seconds": max(seconds),
        "layer_applications": result.layer_applications,
        "applications_by_formula": point.applications,
        "required_flops": needed.total,
        "gemm_rate": gemm_rate(),
        **published_cost(loaded.model, loaded.tokenizer, rows, point),
    }


def published_cost(model: Any, tokenizer: Any, rows: Sequence[PromptRow], point: Point) -> dict[str, Any]:
    """Return what a round takes as published, from some whole replies of candidates in the middle."""
    procedure = published.Published(
        model, tokenizer, [published.Question(row.token_ids, row.target) for row in rows], _ANSWER, point.new_tokens
    )
    procedure.count((0,), [0])
    timed = procedure.forwards, procedure.seconds
    for layer in itertools.cycle(range(point.layers)):
        procedure.count((layer,), [layer % point.rows])
        if procedure.forwards - timed[0] >= _PUBLISHED_FORWARDS:
            break
    forwards, seconds = procedure.forwards - timed[0], procedure.seconds - timed[1]
    in_all = point.rows * point.layers * point.new_tokens
    return {"published_seconds": seconds / forwards * in_all, "published_forwards_timed": forwards}


def measure_axes(axes: Sequence[str], repeats: int, quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return what all points of some axes took; `quick` leaves out all but the two smallest of each."""
    found: dict[str, Any] = {}
    for axis in axes:
        for point in AXES[axis][: 2 if quick else None]:
            measured = measure(point, repeats)
            found.setdefault(axis, []).append(measured)
            ratio = measured["published_seconds"] / measured["seconds"]
            tell(f"{axis} {getattr(point, axis)}: {measured['seconds']:.2f} s, published {ratio:.0f} times as long")
    return found


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--only", type=click.Choice(list(AXES)), multiple=True, help="Measure these axes only.")
@click.option("--quick", is_flag=True, help="The two smallest points of each axis, to try it out.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "measured" / "scaling.json")
def main(threads: int, repeats: int, only: tuple[str, ...], quick: bool, out: Path) -> None:
    """Measure how the cost of a round grows."""
    torch.set_num_threads(threads)
    about = circumstances(threads)
    axes = measure_axes(only or list(AXES), repeats, quick, lambda line: click.echo(line, err=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"circumstances": about, "axes": axes}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
