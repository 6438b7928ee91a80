"""The training loop: steps, evaluations, checkpoints. One process, or several that share the rows of every step.

Knows nothing of Ray, runs or command lines. Several processes are told apart by torch.distributed: each computes its
part of a step's rows, gradients are summed, and all take the same step. The loss of a step is the mean over all its
reply tokens, so neither batches nor processes change it, but for rounding.

Axes: B rows of a batch, T tokens, V vocabulary.
"""

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from tale_ray.errors import StoreError, TaleRayError
from tale_ray.tasks.replies import TrainingRow
from tale_ray.tuning.adapter import TunedModel
from tale_ray.tuning.batches import IGNORED, Batch, count_reply_tokens, make_batch, step_rows, step_seed
from tale_ray.tuning.checkpoint import read_checkpoint, save_checkpoint
from tale_ray.tuning.options import TuningOptions
from tale_ray.tuning.records import Evaluated, Evaluation, Progress, StepDone, TrainingEnded

_BETAS = (0.9, 0.999)
PAUSE = 50.0  # between checkpoints, in times of what one takes: they cost 2% of the time at most


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def own(self, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """Return this process's part of some rows."""
        return list(rows[self.rank :: self.size])

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up tensors over all processes, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, found in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(found.view_as(tensor))


class Trainer:
    """An adapter, its optimizer and how far it is.

    Args:
        tuned: the model with a fresh adapter.
        rows: to learn from.
        select: to choose the weights to keep by; empty: the last ones are kept.
        options: of the training.
        folder: where the checkpoint is; only the first process writes it.
        start: the progress of a training that has not begun.
        place: this process among those that train together.
    """

    def __init__(
        self,
        tuned: TunedModel,
        rows: Sequence[TrainingRow],
        select: Sequence[TrainingRow],
        options: TuningOptions,
        folder: Path,
        start: Progress,
        place: Place,
    ) -> None:
        self._tuned, self._rows, self._options, self._folder, self._place = tuned, rows, options, folder, place
        self._select = sorted(select, key=len)
        self._device = next(iter(tuned.parameters.values())).device
        self._keeps = "logits_to_keep" in inspect.signature(tuned.model.get_base_model().forward).parameters
        self._steps = options.num_steps(len(rows))
        self._optimizer = torch.optim.AdamW(
            tuned.parameters.values(), lr=options.learning_rate, betas=_BETAS, weight_decay=options.weight_decay
        )
        self._best = tuned.copy()
        self._evaluated_at: int | None = None  # the step after which the select rows were, or would have been
        self._saved_at, self._save_seconds = -math.inf, 0.0
        self.progress = start
        self._restore()

    def run(self) -> Iterator[StepDone | Evaluated | TrainingEnded]:
        """Train to the end from wherever the checkpoint is.

        Closing the generator stores everything that is done.

        Raises:
            TaleRayError: a loss or a gradient is not finite.
        """
        while self.progress.ended is None:
            if self._is_due():
                event = self._conclude()
                if event is not None:
                    yield event
                continue
            loss = self._step()
            if time.perf_counter() - self._saved_at >= PAUSE * self._save_seconds:  # when is all that the clock decides
                self._save()
            try:
                yield StepDone(self.progress.step, self._steps, loss)
            except GeneratorExit:
                self._save()
                raise
        if self._select:
            self._tuned.restore(self._best)
        elif not all(parameter.isfinite().all() for parameter in self._tuned.parameters.values()):
            raise _diverged(f"a weight after step {self.progress.step} is no finite number")
        self._tuned.model.eval()
        yield TrainingEnded(self.progress)

    def _is_due(self) -> bool:
        """Return whether the select rows are to be evaluated before the next step."""
        step = self.progress.step
        is_place = step in (0, self._steps) or step % self._options.eval_interval(self._steps) == 0
        return is_place and step != self._evaluated_at

    def _conclude(self) -> Evaluated | None:
        """Evaluate the select rows, if there are any, decide whether to go on, and store everything."""
        step, patience = self.progress.step, self._options.patience
        self._evaluated_at = step
        event = self._evaluate() if self._select else None
        is_last = step == self._steps
        if is_last or (patience is not None and self.progress.num_stale >= patience):
            kept = self.progress.best_step if self._select else step
            self.progress = replace(self.progress, ended="steps" if is_last else "patience", best_step=kept)
        self._save()
        return event

    def _step(self) -> float:
        """Take one step and return its loss."""
        options, number = self._options, self.progress.step
        started, cpu_started = time.perf_counter(), time.process_time()
        positions = step_rows(options.seed, number, len(self._rows), options.rows_per_step)
        rows = [self._rows[position] for position in positions]
        num_tokens = count_reply_tokens(rows)
        torch.manual_seed(step_seed(options.seed, number, self._place.rank))
        self._tuned.model.train()
        total = torch.zeros((), dtype=torch.float32, device=self._device)
        for first in range(0, len(rows), options.batch_size):
            if own := self._place.own(rows[first : first + options.batch_size]):
                loss = self._loss_sum(make_batch(own, self._device))[0] / num_tokens
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not say
                total += loss.detach()
        parameters = list(self._tuned.parameters.values())
        self._place.sum([total, *(_gradient(parameter) for parameter in parameters)])
        _check_finite(f"the loss of step {number + 1}", total)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        _check_finite(f"the gradient's norm of step {number + 1}", norm)
        for group in self._optimizer.param_groups:
            group["lr"] = options.rate(number, self._steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.progress = replace(
            self.progress,
            step=number + 1,
            losses=(*self.progress.losses, total.item()),
            seconds=self.progress.seconds + time.perf_counter() - started,
            cpu_seconds=self.progress.cpu_seconds + time.process_time() - cpu_started,
        )
        return total.item()

    @torch.no_grad()
    def _evaluate(self) -> Evaluated:
        """Evaluate the select rows, and remember the weights if they are the best so far."""
        self._tuned.model.eval()
        found = torch.zeros(2, dtype=torch.float64, device=self._device)
        for first in range(0, len(self._select), self._options.batch_size):
            if own := self._place.own(self._select[first : first + self._options.batch_size]):
                loss, exact = self._loss_sum(make_batch(own, self._device))
                found += torch.tensor([loss.item(), exact], device=self._device)
        self._place.sum([found])
        _check_finite(f"the loss on select rows after step {self.progress.step}", found[0])
        since = self.progress.evaluations[-1].step if self.progress.evaluations else 0
        recent = self.progress.losses[since:]
        evaluation = Evaluation(
            step=self.progress.step,
            loss=found[0].item() / count_reply_tokens(self._select),
            exact=found[1].item() / len(self._select),
            train_loss=sum(recent) / len(recent) if recent else None,
        )
        best = self.progress.best
        self.progress = replace(self.progress, evaluations=(*self.progress.evaluations, evaluation))
        if best is None or evaluation.loss < best.loss:
            self._best = self._tuned.copy()
            self.progress = replace(self.progress, best_step=evaluation.step)
        return Evaluated(evaluation)

    def _loss_sum(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Return the summed loss of a batch's reply tokens, and how many rows have the likeliest token everywhere."""
        kept = {"logits_to_keep": batch.num_kept} if self._keeps else {}
        output = self._tuned.model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT, use_cache=False, **kept)
        logits_BTV = output.logits[:, -batch.num_kept :].float()
        labels_BT = batch.labels_BT
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        right_BT = (logits_BTV.argmax(-1) == labels_BT) | (labels_BT == IGNORED)
        return loss, int(right_BT.all(1).sum())

    def _save(self) -> None:
        if self._place.rank:
            return
        started = time.perf_counter()
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._tuned.parameters.items():
            state: dict[str, Any] = self._optimizer.state[parameter]
            tensors[f"now/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in state.items()}
            tensors[f"best/{name}"] = self._best[name]
        save_checkpoint(self._folder, self.progress, tensors)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started

    def _restore(self) -> None:
        """Go on from the checkpoint, if there is one of this very training."""
        progress, tensors = read_checkpoint(self._folder)
        if progress is None or progress.digest != self.progress.digest:
            return
        try:
            self._restore_tensors(tensors)
        except torch.OutOfMemoryError:  # a RuntimeError, too
            raise
        except (KeyError, RuntimeError) as error:  # of torch, where shapes differ
            raise StoreError(
                f"the checkpoint in {self._folder} was changed ({error}): delete it to train from the beginning, or "
                "put back a copy"
            ) from error
        self.progress = replace(progress, facts=self.progress.facts)
        if progress.evaluations:
            self._evaluated_at = progress.evaluations[-1].step

    def _restore_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        self._tuned.restore(parts.pop("now"))
        best = parts.pop("best")
        self._best = {name: best[name] for name in self._tuned.parameters}
        for name, parameter in self._tuned.parameters.items():
            state = {key: values[name] for key, values in parts.items()}
            self._optimizer.state[parameter] = {
                key: value if key == "step" else value.to(self._device) for key, value in state.items()
            }


def _check_finite(name: str, value: torch.Tensor) -> None:
    if not value.isfinite():
        raise _diverged(f"{name} is {value.item()}")


def _diverged(what: str) -> TaleRayError:
    return TaleRayError(
        f"{what}: training does not converge; lower --learning-rate, or choose --dtype float32 or bfloat16"
    )


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the gradient, zeros where no row of this process had a part in it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
