"""A plan as a table for a person. Takes the plan alone, so that it can show nothing that JSON does not have."""

from tale_ray.attempt.gpus import BYTES_SHARE, CALL_SECONDS, FLOPS_SHARE, FREE_SHARE, GPUS
from tale_ray.attempt.plan import Plan
from tale_ray.attempt.plan_effort import Effort
from tale_ray.results.tables import count_text


def plan_text(plan: Plan) -> str:
    """Return the plan under headings, with what it assumes."""
    weights, memory, batch = plan.weights, plan.memory, plan.micro_batch
    lines = [
        f"{plan.task} on {plan.model}: {plan.family}, {count_text(plan.num_layers, 'layer')}, {plan.dtype}",
        f"rows       {plan.rows} to search on, {_count(plan.tokens)} tokens, the longest row {plan.longest_row}, "
        f"{count_text(plan.max_new_tokens, 'new token')} at most",
        f"           tokens are {plan.tokens_counted}",
        f"weights    {bytes_text(weights.total_bytes)}: embedding {bytes_text(weights.first_bytes)}, layers "
        f"{_layers(weights.layer_bytes)}, norm and head {bytes_text(weights.last_bytes)}",
        f"worker     {_worker(plan)}",
        *(
            f"  {f'GPU {at}' if plan.gpus_per_worker else 'RAM  '}    layers {stage.layers[0]} to {stage.layers[1]}: "
            f"{bytes_text(stage.weight_bytes)} of weights, {bytes_text(stage.peak_bytes)} at the peak"
            for at, stage in enumerate(plan.stages)
        ),
        f"memory     {bytes_text(memory.budget_bytes)} to work in at most; at the peak activations "
        f"{bytes_text(memory.activation_bytes)}, KV cache of prefixes {bytes_text(memory.prefix_cache_bytes)}, "
        f"of replies {bytes_text(memory.reply_cache_bytes)}, states for later rounds {bytes_text(memory.state_bytes)}, "
        f"kept by the allocator {bytes_text(memory.spare_bytes)}",
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
    lines += [
        f"or         {other.gpus_per_worker} GPUs per worker: the first round in about "
        f"{duration_text(other.first_round_seconds)}, {other.first_round_gpu_hours:.2g} GPU hours instead of "
        f"{plan.first_round_gpu_hours or 0:.2g}"
        for other in plan.alternatives
    ]
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join([*lines, *_assumptions(plan)])


def _worker(plan: Plan) -> str:
    if not plan.gpus_per_worker:
        how = "streamed: its layers stay in their files" if plan.is_streamed else "the weights fit"
        return f"no GPU, {bytes_text(plan.free_bytes)} of RAM free: {how}"
    card = f"{plan.gpu or 'of which only the memory is known'}, {bytes_text(plan.free_bytes)} free on each"
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
    seconds = "" if effort.seconds is None else f", about {duration_text(effort.seconds)}"
    return f"{_count(effort.layer_applications)} layer applications{units}, {_flops(effort.flops)}{seconds}"


def _layers(sizes: tuple[int, ...]) -> str:
    least, most = min(sizes), max(sizes)
    each = bytes_text(most) if least == most else f"{bytes_text(least)} to {bytes_text(most)}"
    return f"{each} each ({bytes_text(sum(sizes))})"


def bytes_text(size: float) -> str:
    """Return a number of bytes as a person reads it."""
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


def duration_text(seconds: float | None) -> str:
    """Return a duration as a person reads it."""
    if seconds is None:
        return "not known"
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
