"""Write the table of plans in docs/large-models.md, from the configurations in tests/data.

python tools/write_plans.py            write it
python tools/write_plans.py --check    exit 1 if what is there is out of date
"""

import sys
from pathlib import Path

import click

from tale_ray.api import make_config
from tale_ray.attempt.gpus import GPUS
from tale_ray.attempt.plan import Device, Plan, make_plan
from tale_ray.attempt.plan_text import bytes_text, duration_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "large-models.md"
BEGIN, END = "<!-- plans: written by tools/write_plans.py -->", "<!-- end of plans -->"
MODELS = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "lucie-7b": "Lucie-7B",
    "mistral-7b": "Mistral-7B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "llama-3.1-70b": "Llama-3.1-70B",
}
CARDS = ("L4", "A100-40GB", "A100-80GB")
ROWS, TOKENS, ROUNDS, NEW_TOKENS = 500, 120, 4, 256
COLUMNS = (
    *("model", "card", "K", "layers by GPU", "weights by GPU", "peak", "rows x candidates at once"),
    *("choices", "replies", "replies with more GPUs"),
)


def planned(model: str, card: str, max_new_tokens: int) -> Plan:
    """Return the plan of the workload on one worker."""
    configuration = ROOT / "tests" / "data" / "configurations" / f"{model}.json"
    config = make_config(model=str(configuration), task="arc_challenge", rows=ROWS, max_removed=ROUNDS)
    return make_plan(config, Device(gpu=GPUS[card], free_bytes=GPUS[card].free_bytes), TOKENS, max_new_tokens)


def cells(model: str, card: str) -> tuple[str, ...]:
    """Return a row of the table."""
    choices, replies = (planned(model, card, new_tokens) for new_tokens in (1, NEW_TOKENS))
    layers = [last - first + 1 for first, last in (stage.layers for stage in choices.stages)]
    weights = [stage.weight_bytes / 2**30 for stage in choices.stages]
    spread = f"{min(weights):.1f}" + (f" to {max(weights):.1f}" if max(weights) - min(weights) >= 0.05 else "")
    same_gpus = choices.gpus_per_worker == replies.gpus_per_worker
    cheapest = min(replies.alternatives, key=lambda other: other.first_round_gpu_hours, default=None)
    hours = replies.first_round_gpu_hours or 0.0
    cheaper = ""
    if cheapest is not None and cheapest.first_round_gpu_hours < hours:
        share = cheapest.first_round_gpu_hours / hours
        cheaper = f"K = {cheapest.gpus_per_worker}: {100 * share:.0f}% of the GPU hours"
    return (
        MODELS[model],
        card,
        str(choices.gpus_per_worker) + (" (streamed)" if choices.is_streamed else ""),
        ", ".join(map(str, layers)),
        f"{spread} GiB",
        bytes_text(choices.peak_bytes),
        f"{choices.micro_batch.rows} x {choices.micro_batch.nodes_at_once}",
        duration_text(choices.search.seconds),
        duration_text(replies.search.seconds) + ("" if same_gpus else f" (K = {replies.gpus_per_worker})"),
        cheaper,
    )


def table() -> str:
    """Return the table, in Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(model, card) for model in MODELS for card in CARDS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if the page is out of date.")
def main(check: bool) -> None:
    """Write the table of plans."""
    old = PAGE.read_text(encoding="utf-8")
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        click.echo(f"{PAGE.name} is out of date: run `make docs`", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
