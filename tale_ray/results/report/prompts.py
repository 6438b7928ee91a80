"""What was asked: the prompts of a run's rows, which the run itself does not hold, found again by their digests.

Rows are read where that takes no network: generated, in files, or in a mirror of hub data sets. Does not know what is
done with them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from tale_ray.config import SearchConfig
from tale_ray.errors import TaskError
from tale_ray.store.documents import Manifest
from tale_ray.tasks.data import count_rows, load_rows
from tale_ray.tasks.harness import PREFIX as HARNESS
from tale_ray.tasks.prompts import render
from tale_ray.tasks.spec import load_task
from tale_ray.tasks.splits import row_digest


@dataclass(frozen=True, slots=True)
class Prompts:
    """The last message of each row's prompt, by digest; `note` says why some, or all, are missing."""

    texts: Mapping[str, str] = field(default_factory=dict)
    note: str | None = None


def find_prompts(manifest: Manifest, digests: Collection[str], data_root: str | None) -> Prompts:
    """Return the prompts of rows, demonstrations left out, as far as the task and its rows are to be had here.

    Nothing is raised: a report without prompts is a report, and its reader is told what was missing.
    """
    section = SearchConfig.from_json(manifest.config).task
    if section.task.startswith(HARNESS):
        return Prompts(note="Prompts of tasks of lm-evaluation-harness are not looked up.")
    try:
        spec = load_task(section.task)
        root = data_root or section.data_root
        if count_rows(spec, root) is None:
            return Prompts(note=f"The rows of {spec.name} are not on this machine: name their mirror with --data-root.")
        if changed := [key for key, value in spec.identity().items() if manifest.task.get(key) != value]:
            return Prompts(note=f"The task {spec.name} is no longer what was searched on: `{changed[0]}` has changed.")
        wanted = {digest: row for row in load_rows(spec, root) if (digest := row_digest(row)) in digests}
        examples = {digest: render(spec, row, digest) for digest, row in wanted.items()}
    except TaskError as error:  # what a prompt would add is not worth a report that fails
        return Prompts(note=f"The rows of the task cannot be read here: {error}")
    texts = {digest: example.messages[-1]["content"] for digest, example in examples.items()}
    missing = len(set(digests) - texts.keys())
    return Prompts(texts, f"{missing} of the rows are no longer among those of the task." if missing else None)
