"""How a search goes, on stderr: a live line on a terminal, plain lines elsewhere."""

import logging
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tale_ray.attempt.search import ModelLoaded, RowsPrepared, RunOpened
from tale_ray.records import Round
from tale_ray.search.driver import HeldOutScored, RoundFinished, ScoringStarted, SearchEnded
from tale_ray.search.pool import ScoringAdvanced, UnitRetried, WorkersChanged

PLAIN_INTERVAL_SECONDS = 10.0


class Display:
    """Shows the events of an attempt. A context: logs of the package go to the same place while it is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} rows"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[leader]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._started_at = 0.0
        self._started_with = 0
        self._last_line_at = 0.0
        self._handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)

    def __enter__(self) -> "Display":
        logger = logging.getLogger("tale_ray")
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        logging.getLogger("tale_ray").removeHandler(self._handler)

    def show(self, event: Any) -> None:
        """Show one event of an attempt."""
        match event:
            case RowsPrepared(task, counts, notes):
                self._say(f"task {task}: " + ", ".join(f"{count} {split} rows" for split, count in counts.items()))
                for note in notes:
                    self._say(f"note: {note}")
            case ModelLoaded(info):
                self._say(
                    f"model: {info.family}, {info.num_layers} layers, {info.dtype} on {info.device}, "
                    f"loaded in {info.load_seconds:.1f} s"
                )
                for note in info.notes:
                    self._say(f"note: {note}")
            case RunOpened(run, attempt, history):
                if attempt == 0:
                    self._say(f"{run} is finished; nothing is left to do")
                elif history is not None and history.rounds:
                    self._say(f"{run}: attempt {attempt} goes on after round {history.final.number}")
                else:
                    self._say(f"{run}: attempt {attempt}")
            case ScoringStarted():
                self._start(event)
            case ScoringAdvanced():
                self._advance(event)
            case RoundFinished(entry, history):
                self._say(_round_line(entry))
            case UnitRetried(unit, scope, reason):
                self._say(f"unit {unit} of {scope} is tried again: {_first_line(reason)}")
            case WorkersChanged(worker, num_workers, lost_because):
                change = "joined" if lost_because is None else f"is lost ({_first_line(lost_because)})"
                self._say(f"{worker} {change}; {num_workers} workers")
            case SearchEnded(reason):
                self._say(f"search ended: {reason}")
            case HeldOutScored(name, score):
                self._say(f"{name} on test rows: {score.correct}/{score.total} = {100 * score.accuracy:.1f}%")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _start(self, event: ScoringStarted) -> None:
        if self._bar is not None:
            self._live.remove_task(self._bar)
        self._started_at = self._last_line_at = time.monotonic()
        self._started_with = event.done_cells
        candidates = len(event.scoring.candidates)
        self._bar = self._live.add_task(
            f"{event.scoring.scope}, {candidates} candidate{'s' if candidates > 1 else ''}",
            total=event.total_cells,
            completed=event.done_cells,
            rate="",
            leader="",
        )
        if event.done_cells:
            self._say(f"{event.scoring.scope}: {event.done_cells} of {event.total_cells} candidate-rows are there")

    def _advance(self, event: ScoringAdvanced) -> None:
        now = time.monotonic()
        rate = (event.done_cells - self._started_with) / max(now - self._started_at, 1e-9)
        leader = ""
        if event.leader is not None and event.leader.layer is not None:
            leader = f"best so far: layer {event.leader.layer} with {event.leader.correct}/{event.leader.seen}"
        if self._bar is not None:
            self._live.update(self._bar, completed=event.done_cells, rate=f"{rate:.1f} rows/s", leader=leader)
        if not self._console.is_terminal and now - self._last_line_at >= PLAIN_INTERVAL_SECONDS:
            self._last_line_at = now
            left = (event.total_cells - event.done_cells) / rate if rate else float("inf")
            self._say(
                f"{event.scoring.scope}: {event.done_cells}/{event.total_cells} candidate-rows, {rate:.1f} rows/s, "
                f"{left:.0f} s left, {event.num_workers} workers{'; ' + leader if leader else ''}"
            )


def _round_line(entry: Round) -> str:
    score = f"{entry.score.correct}/{entry.score.total} = {100 * entry.score.accuracy:.1f}%"
    if entry.removed_layer is None:
        return f"baseline: {score}"
    verdict = "removed" if entry.committed else "kept, its removal falls below the floor"
    return f"round {entry.number}: layer {entry.removed_layer} {verdict}, {score}"


def _first_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else text
