"""A task in a few lines, for people."""

from tale_ray.tasks.spec import TaskSpec


def describe_task(spec: TaskSpec, num_rows: int | None) -> str:
    """Return source, rows, demonstrations, answer and metric of the task as a few lines of plain text.

    Args:
        spec: the task.
        num_rows: how many rows it has; None: nobody has read them.
    """
    shots = "carved out of the rows" if spec.shots is None else str(spec.shots)
    answer: str = spec.answer.type
    if spec.answer.harness is not None:
        shots, answer = "as the task chooses them", f"as filter {spec.answer.harness.filter} of the task reads it"
    if spec.answer.labels:
        answer += f" of {', '.join(spec.answer.labels)}"
    if spec.answer.pattern is not None:
        answer += f" {spec.answer.pattern}"
    if spec.answer.choices is not None:
        answer += f" of {spec.answer.choices}{', by the character' * spec.answer.normalised}"
    else:
        answer += f"; at most {spec.max_new_tokens} new token{'s' * (spec.max_new_tokens > 1)}"
    lines = {
        "source": str(spec.source),
        "rows": "all of the source; counted with --data-root" if num_rows is None else str(num_rows),
        "demonstrations": shots + (f", of the same {spec.group_by}" if spec.group_by else ""),
        "answer": answer,
        "metric": spec.metric,
    }
    header = f"{spec.name}: {spec.description}" if spec.description else spec.name
    return "\n".join([header, *(f"  {name:<14}  {text}" for name, text in lines.items())])
