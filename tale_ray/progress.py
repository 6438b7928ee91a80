"""How a search goes, on stderr: a live line on a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tale_ray.attempt.finetune import ModelMerged, TrainingOpened
from tale_ray.attempt.search import LoadingStarted, ModelLoaded, RowsPrepared, RunOpened
from tale_ray.attempt.study import SeedStarted
from tale_ray.attempt.synergy import StageStarted, SynergyOpened
from tale_ray.attempt.transfer import CellScored
from tale_ray.records import Measurement, Round, Score
from tale_ray.results.tables import count_text, removal_text
from tale_ray.search.driver import (
    HeldOutScored,
    ModelMeasured,
    RoundFinished,
    RoundSelected,
    ScoringStarted,
    SearchEnded,
)
from tale_ray.search.history import History
from tale_ray.search.pool import ScoringAdvanced, UnitDoubled, UnitRetried, WorkersChanged
from tale_ray.search.scheduler import Scoring
from tale_ray.store.uris import strip_credentials
from tale_ray.tuning.records import Evaluated, StepDone, TrainingBegun, TrainingEnded

PLAIN_INTERVAL_SECONDS = 10.0


class Display:
    """Shows the events of an attempt. A context: logs of the package go to the same place while it is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} candidate-rows"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[leader]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._scoring: Scoring | None = None  # what the bar shows
        self._bar: TaskID | None = None
        self._started_at = 0.0
        self._started_with = 0
        self._last_line_at = 0.0
        self._logs = _LogLines(self._say)

    def __enter__(self) -> "Display":
        logger = logging.getLogger("tale_ray")
        logger.addHandler(self._logs)
        logger.setLevel(logging.INFO)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        logging.getLogger("tale_ray").removeHandler(self._logs)

    def show(self, event: Any) -> None:
        """Show one event of an attempt."""
        match event:
            case SeedStarted(seed, seeds):
                self._say(f"seed {seed}, {seeds.index(seed) + 1} of {len(seeds)}")
            case SynergyOpened(study):
                self._say(f"study: {study}")
            case StageStarted(seed, stage, number, total):
                self._say(f"stage {number} of {total}: seed {seed}, {stage}")
            case RowsPrepared(task, counts, notes):
                self._say(
                    f"task {task}: " + ", ".join(count_text(count, f"{split} row") for split, count in counts.items())
                )
                for note in notes:
                    self._say(f"note: {note}")
            case LoadingStarted():
                self._say("loading the model")
            case ModelLoaded(info):
                self._say(
                    f"model: {info.family}, {count_text(info.num_layers, 'layer')}, {info.dtype} on {info.device}, "
                    f"loaded in {info.load_seconds:.1f} s"
                )
                for note in info.notes:
                    self._say(f"note: {note}")
            case RunOpened(run, attempt, history):
                if attempt == 0:
                    progress = "finished; nothing is left to do"
                elif history is not None and history.rounds:
                    progress = f"attempt {attempt} goes on after round {history.final.number}"
                else:
                    progress = f"attempt {attempt}"
                self._say(f"run {strip_credentials(run)}: {progress}")
            case ScoringStarted(scoring, _, done_cells, total_cells):
                self._start(scoring, done_cells, total_cells)
                if done_cells:
                    self._say(f"{scoring.scope}: {done_cells} of {total_cells} candidate-rows are there")
            case ScoringAdvanced():
                self._advance(event)
            case ModelMeasured(_, measurement):
                self._say(_measurement_line(measurement))
            case RoundFinished(entry, history):
                self._say(_round_line(entry, history))
            case UnitRetried(unit, scope, reason):
                self._say(f"unit {unit} of {scope} is tried again: {_last_line(reason)}")
            case UnitDoubled(unit, scope, late, seconds):
                self._say(
                    f"unit {unit} of {scope} has been with {late} for {seconds:.0f} s; another worker gets it, too"
                )
            case WorkersChanged(worker, num_workers, lost_because):
                change = "joined" if lost_because is None else f"is lost ({_last_line(lost_because)})"
                self._say(f"{worker} {change}; {count_text(num_workers, 'worker')}")
            case SearchEnded(reason):
                self._say(f"search ended: {reason}")
            case RoundSelected(entry, score):
                self._say(f"round {entry.number} is selected, on select rows: {_accuracy(score)}")
            case HeldOutScored(name, score):
                self._say(f"{name} on test rows: {_accuracy(score)}")
            case CellScored(searched_on, tested_on, score):
                self._say(f"{searched_on or 'uncut'}, tested on {tested_on}: {_accuracy(score)}")
            case TrainingOpened(out, is_finished):
                self._say(f"training {out}: {'finished; nothing is left to do' if is_finished else 'under way'}")
            case TrainingBegun(info, step, steps, num_trainable, num_parameters):
                self._say(
                    f"model: {info.family}, {info.dtype} on {info.device}; {num_trainable:,} parameters are trained, "
                    f"beside {num_parameters:,}"
                )
                self._say(f"training goes on after step {step} of {steps}" if step else f"training for {steps} steps")
            case StepDone(step, steps, loss):
                if time.monotonic() - self._last_line_at >= PLAIN_INTERVAL_SECONDS:
                    self._last_line_at = time.monotonic()
                    self._say(f"step {step} of {steps}: loss {loss:.4f}")
            case Evaluated(found):
                self._say(f"step {found.step}: loss on select rows {found.loss:.4f}, {100 * found.exact:.1f}% right")
            case TrainingEnded(found):
                self._say(f"training ended after step {found.step}: the weights after step {found.best_step} are kept")
            case ModelMerged(folder, _):
                self._say(f"merged: {folder}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _start(self, scoring: Scoring, done_cells: int, total_cells: int) -> None:
        if self._bar is not None:
            self._live.remove_task(self._bar)
        self._scoring = scoring
        self._started_at = self._last_line_at = time.monotonic()
        self._started_with = done_cells
        self._bar = self._live.add_task(scoring.scope, total=total_cells, completed=done_cells, rate="", leader="")

    def _advance(self, event: ScoringAdvanced) -> None:
        if event.scoring != self._scoring:  # an evaluation, which does not tell of its start
            self._start(event.scoring, event.done_cells, event.total_cells)
        now = time.monotonic()
        rate = (event.done_cells - self._started_with) / max(now - self._started_at, 1e-9)
        leader = ""
        if event.leader is not None and event.leader.layer is not None:
            leader = f"best: layer {event.leader.layer}, {event.leader.correct}/{event.leader.seen}"
        if self._bar is not None:
            self._live.update(self._bar, completed=event.done_cells, rate=f"{rate:.1f}/s", leader=leader)
        if not self._console.is_terminal and now - self._last_line_at >= PLAIN_INTERVAL_SECONDS:
            self._last_line_at = now
            left = (event.total_cells - event.done_cells) / rate if rate else float("inf")
            self._say(
                f"{event.scoring.scope}: {event.done_cells}/{event.total_cells} candidate-rows, {rate:.1f}/s, "
                f"{left:.0f} s left, {count_text(event.num_workers, 'worker')}{'; ' + leader if leader else ''}"
            )


def _round_line(entry: Round, history: History) -> str:
    score = _accuracy(entry.score)
    if entry.removed_layer is None:
        return f"baseline: {score}"
    verdict = "removed" if entry.committed else "kept, its removal falls below the floor"
    before = history.rounds[entry.number - 1].removed if entry.number > 1 else None
    removal = removal_text(entry.removed_layer, entry.removed, before)
    return f"round {entry.number}: layer {removal} {verdict}, {score}"


def _measurement_line(measurement: Measurement) -> str:
    probe = measurement.probe
    count, size = len(probe.layers), count_text(probe.span, "layer")
    is_block = probe.measure == "angular_distance"
    of_what = count_text(count, f"block of {size}", f"blocks of {size}") if is_block else count_text(count, "layer")
    return (
        f"measured: {probe.measure.replace('_', ' ')} of {of_what} on "
        f"{count_text(measurement.num_rows, 'row')} in {measurement.seconds:.1f} s"
    )


def _accuracy(score: Score) -> str:
    return f"{score.correct}/{score.total} = {100 * score.accuracy:.1f}%"


def _last_line(text: str) -> str:
    """Return the line of a traceback that says what happened."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else text


class _LogLines(logging.Handler):
    """Says each record on one line; rich's own handler would break lines at 80 characters in a file."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._write = say

    def emit(self, record: logging.LogRecord) -> None:
        self._write(strip_credentials(self.format(record)))
