"""The page of a run: one file of HTML, with its style and figures in it, no script, and nothing that is fetched.

Everything is escaped by the template; texts of models and tasks are made visible and cut first.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

import tale_ray
from tale_ray.records import RowAnswer
from tale_ray.results.held_out import RESULTS
from tale_ray.results.report import figures
from tale_ray.results.report.data import ReportData
from tale_ray.results.report.depth import depth, depth_mark
from tale_ray.results.report.latency import Measured
from tale_ray.results.report.prompts import Prompts
from tale_ray.results.report.texts import Excerpt, excerpt, visible
from tale_ray.results.report.verdict import ALPHA, verdict
from tale_ray.results.tables import (
    accuracy_text,
    count_text,
    difference_text,
    interval_text,
    layers_text,
    p_text,
    percent,
    points,
)

NUM_EXAMPLES = 10  # of wins, and of losses, that are shown of each result
PROMPT_CHARACTERS = 1_200
REPLY_CHARACTERS = 1_200


def render_page(data: ReportData, prompts: Prompts | None = None) -> str:
    """Return the report on a run as HTML; what it says in numbers is what `tale-ray show --json` says."""
    finding, sentence = verdict(data)
    folder = files("tale_ray.results.report")
    environment = Environment(
        loader=DictLoader({"template.html": (folder / "template.html").read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.filters |= {
        "accuracy": accuracy_text,
        "count": count_text,
        "difference": difference_text,
        "interval": interval_text,
        "layers": layers_text,
        "p": p_text,
        "percent": percent,
        "points": points,
        "measured": _measured,
        "shade": figures.shade,
    }
    return environment.get_template("template.html").render(
        data=data,
        summary=data.summary,
        finding=finding,
        sentence=sentence,
        style=(folder / "style.css").read_text(encoding="utf-8"),
        drawn=_drawn(data),
        results=RESULTS,
        alpha=ALPHA,
        num_examples=NUM_EXAMPLES,
        prompts=prompts or Prompts(),
        prompt_excerpt=lambda digest: _excerpt((prompts or Prompts()).texts.get(digest), PROMPT_CHARACTERS),
        reply_excerpt=_reply,
        cell_title=figures.cell_title,
        configuration=_configuration(data),
        transfer_heads=_transfer_heads(data),
        version=tale_ray.__version__,
    )


def _shown(value: Any) -> Any:
    """Return a value as a template prints it: texts with nothing invisible in them."""
    return visible(value) if type(value) is str else value


def _drawn(data: ReportData) -> dict[str, Any]:
    """Return the figures by name, those that there is something for."""
    summary, config = data.summary, data.config
    if data.pick is None or config is None:
        return {}
    baseline = summary["baseline"]["correct"] / summary["baseline"]["total"]
    floor = baseline - float(config.strategy.epsilon) if config.strategy.epsilon_mode == "baseline" else None
    removed = summary[data.pick]["removed"]
    final = summary["final"]["removed"]
    later = final[len(removed) :] if final[: len(removed)] == removed else []  # a beam may have ended elsewhere
    found: dict[str, Any] = {
        "layers": figures.layer_strip(summary["num_layers"], removed, later, config.strategy.keep_layers),
        "rows": {each.round: figures.row_strip(each) for each in data.row_by_row},
    }
    if len(data.trajectory[0].points) > 1:
        found["trajectory"] = figures.trajectory(data.trajectory, floor, summary["num_layers"])
        found["marks"] = {each.split: figures.legend_mark(each.split) for each in data.trajectory}
    if data.heat_map is not None:
        found["heat_map"] = figures.heat_map(data.heat_map)
    if data.information is not None:
        found["information"] = depth(data.information)
        found["information_marks"] = {"full model": depth_mark("full")}
        if data.information.pruned:
            found["information_marks"]["pruned model"] = depth_mark("pruned")
    return found


def _transfer_heads(data: ReportData) -> list[str]:
    """Return the heads of the columns of the matrix of transfer: each task, and how many of its rows are tested on."""
    if (found := data.transfer) is None:
        return []
    return [f"{task}, {count_text(found.baseline(task).total, 'test row')}" for task in found.tested_on]


def _excerpt(text: str | None, limit: int) -> Excerpt | None:
    return None if text is None else excerpt(text, limit)


def _reply(answer: RowAnswer) -> Excerpt:
    return excerpt(answer.reply, REPLY_CHARACTERS)


def _measured(found: Measured | None) -> str:
    """Return a measured value with what is read of it, four digits, and its quartiles."""
    if found is None:
        return "\u2013"
    if found.low is None or found.high is None:
        return _number(found.value)
    return f"{_number(found.value)} [{_number(found.low)}, {_number(found.high)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _configuration(data: ReportData) -> list[tuple[str, str, str]]:
    """Return the options of the run: section, name and value; those that are not set are left out."""
    if data.manifest is None:
        return []
    return [
        (section, name, value if isinstance(value, str) else json.dumps(value))
        for section, options in data.manifest.config.items()
        if isinstance(options, Mapping)
        for name, value in options.items()
        if value not in (None, [], False)
    ]
