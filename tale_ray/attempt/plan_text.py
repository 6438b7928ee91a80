"""A plan as a table for a person, and as a row among others. Takes the plan alone, so it shows nothing JSON lacks."""

from tale_ray.attempt.gpus import BYTES_SHARE, CALL_SECONDS, FLOPS_SHARE, FREE_SHARE, GPUS
from tale_ray.attempt.plan import Plan
from tale_ray.attempt.plan_effort import Effort
from tale_ray.results.tables import count_text

COLUMNS = ("GPUs per worker", "layers by GPU", "weights by GPU", "peak", "micro-batch", "first round", "search")


def plan_text(plan: Plan) -> str:
    """Return the plan under headings, with what it assumes."""
    weights, memory, batch = plan.weights, plan.memory, plan.micro_batch
    lines = [
        f"{plan.task} on {plan.model}: {plan.family}, {count_text(plan.num_layers, 'layer')}, {plan.dtype}",
        f"rows       {plan.rows} to search on, {_count(plan.tokens)} tokens, the longest row {plan.longest_row}, "
        f"{count_text(plan.max_new_tokens, 'new token')} at most",
        f"           tokens are {plan.tokens_counted}",
        f"weights    {_bytes(weights.total_bytes)}: embedding {_bytes(weights.first_bytes)}, layers "
        f"{_layers(weights.layer_bytes)}, norm and head {_bytes(weights.last_bytes)}",
        f"worker     {_worker(plan)}",
        *(
            f"  {f'GPU {at}' if plan.gpus_per_worker else 'RAM  '}    layers {stage.layers[0]} to {stage.layers[1]}: "
            f"{_bytes(stage.weight_bytes)} of weights, {_bytes(stage.peak_bytes)} at the peak"
            for at, stage in enumerate(plan.stages)
        ),
        f"memory     {_bytes(memory.budget_bytes)} to work in at most; at the peak activations "
        f"{_bytes(memory.activation_bytes)}, KV cache of prefixes {_bytes(memory.prefix_cache_bytes)}, of replies "
        f"{_bytes(memory.reply_cache_bytes)}, states for later rounds {_bytes(memory.state_bytes)}",
        f"batches    {count_text(batch.rows, 'row')} on {count_text(batch.lines, 'line')} of {batch.tokens} tokens, "
        f"{count_text(batch.nodes_at_once, 'candidate')} at once, "
        f"{count_text(batch.count, 'micro-batch', 'micro-batches')} a unit"
        + (f"; {batch.replies} replies are decoded together" if batch.replies else ""),
        f"baseline   {_effort(plan.baseline)}",
        f"a round    {_effort(plan.first_round)} (the first)",
        f"search     {_effort(plan.search)}, with {count_text(plan.rounds, 'round')} at most",
    ]
    if plan.workers > 1:
        lines.append(f"           {plan.workers} workers share it evenly, which the end of a round never quite does")
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join([*lines, *_assumptions(plan)])


def plan_row(plan: Plan) -> tuple[str, ...]:
    """Return the cells of `COLUMNS`."""
    gpus = "1, streamed" if plan.is_streamed else str(plan.gpus_per_worker)
    batch = plan.micro_batch
    return (
        gpus,
        ", ".join(f"{stage.layers[0]}-{stage.layers[1]}" for stage in plan.stages),
        ", ".join(f"{stage.weight_bytes / 2**30:.1f}" for stage in plan.stages) + " GiB",
        _bytes(plan.peak_bytes),
        f"{batch.rows} rows x {batch.nodes_at_once}" + (f", {batch.replies} replies" if batch.replies else ""),
        _duration(plan.first_round.seconds),
        _duration(plan.search.seconds),
    )


def _worker(plan: Plan) -> str:
    if not plan.gpus_per_worker:
        how = "streamed: its layers stay in their files" if plan.is_streamed else "the weights fit"
        return f"no GPU, {_bytes(plan.free_bytes)} of RAM free: {how}"
    card = f"{plan.gpu or 'of which only the memory is known'}, {_bytes(plan.free_bytes)} free on each"
    if plan.is_streamed:
        return f"1 GPU ({card}), streamed: the layers stay in their files, as the weights do not fit otherwise"
    rule = ", the fewest that hold the weights and the rows" if plan.is_recommended else ""
    streaming = "; streaming is not needed" + (", and not possible" if plan.cannot_stream else "")
    return f"{count_text(plan.gpus_per_worker, 'GPU')} ({card}){rule}{streaming}"


def _assumptions(plan: Plan) -> list[str]:
    lines = ["Work is counted from above: racing, and states that earlier rounds computed, save some of it."]
    if plan.gpus_per_worker:
        lines.append(f"{FREE_SHARE:.0%} of a card's memory is taken to be free. No plan was ever checked on a GPU.")
    if plan.gpu is not None:
        gpu = GPUS[plan.gpu]
        lines.append(
            f"Time is an estimate: {FLOPS_SHARE:.0%} of {gpu.flops_per_second / 1e12:g} TFLOP/s in bfloat16, "
            f"{BYTES_SHARE:.0%} of {gpu.bytes_per_second / 1e9:g} GB/s, {CALL_SECONDS * 1e3:g} ms a layer at least "
            f"({gpu.source})."
        )
    return lines


def _effort(effort: Effort) -> str:
    units = "" if effort.units is None else f" in about {count_text(effort.units, 'unit')}"
    seconds = "" if effort.seconds is None else f", about {_duration(effort.seconds)}"
    return f"{_count(effort.layer_applications)} layer applications{units}, {_flops(effort.flops)}{seconds}"


def _layers(sizes: tuple[int, ...]) -> str:
    least, most = min(sizes), max(sizes)
    each = _bytes(most) if least == most else f"{_bytes(least)} to {_bytes(most)}"
    return f"{each} each ({_bytes(sum(sizes))})"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _count(number: float) -> str:
    for unit in ("", " thousand", " million"):
        if number < 1000:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:,.1f} billion" if number >= 1 else f"{number:.3g} billion"


def _flops(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.1f} {unit}FLOP"
        number /= 1000
    return f"{number:.1f} PFLOP"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
