"""Train the bundled model: a Llama of 12 layers and 1.9 million parameters that evaluates boolean expressions.

    python tools/train_bundled.py                  train, save to tale_ray/model/bundled, then evaluate
    python tools/train_bundled.py --evaluate       evaluate what is there

The model is made to be searched. Stochastic depth (Huang et al., 2016) trains it to survive the loss of layers, and
training stops well before it is perfect, so that some removals help, some change little and some hurt.

It learns the very prompts of the built-in task `boolean_synthetic`: messages and reply come from its task file. None of
the task's rows is trained on. Schedules depend on the step alone, never on the clock.

Axes: B rows of a batch, S positions, H hidden size, V vocabulary, P partial values, N positions that have them.
"""

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch
import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tale_ray.tasks.boolean import LEAF_WEIGHTS, Expression, draw_expression, draw_num_leaves, generate_rows

ROOT: Final = Path(__file__).resolve().parent.parent
TASK: Final[dict[str, Any]] = yaml.safe_load(
    (ROOT / "tale_ray/tasks/builtin/boolean_synthetic.yaml").read_text(encoding="utf-8")
)
JINJA: Final = SandboxedEnvironment(undefined=StrictUndefined)

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
EXPRESSION_WORDS: Final = ("True", "False", "not", "and", "or", "(", ")", "is")

NUM_LAYERS: Final = 12
HIDDEN_SIZE: Final = 128
BATCH_EXPRESSIONS: Final = 32
CONVERSATIONS_PER_ROW: Final = 8
CURRICULUM: Final = ((0.1, {1: 1, 2: 2}), (0.3, {2: 1, 3: 2}), (1.0, LEAF_WEIGHTS))  # until this share of the steps
FEW_SHOT_PERIOD: Final = 10  # every tenth batch holds conversations of up to `MAX_SHOTS` demonstrations
MAX_SHOTS: Final = 5
DROP_PROBABILITY: Final = 0.05
DROP_RAMP: Final = 0.4  # it grows to that probability over this share of the steps
LEARNING_RATE: Final = 1.2e-3
WARMUP_STEPS: Final = 50
AUXILIARY_LAYER: Final = 7
AUXILIARY_WEIGHT: Final = 1.0
EVALUATION_ROWS: Final = 400
IGNORED: Final = -100


# --- prompts ---------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that has one token for every word of the task's prompts."""
    instructions = [message["content"] for message in TASK["messages"] if message["role"] == "system"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*instructions, *EXPRESSION_WORDS, *(f" {word}" for word in EXPRESSION_WORDS)],
        trainers.BpeTrainer(
            vocab_size=1024,  # never reached: merging ends when every word is one token
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def conversation(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the task's messages for the last row, with reply, after the other rows as demonstrations."""
    messages = [message for message in TASK["messages"] if message["role"] == "system"]
    for row in rows:
        messages += [
            {"role": message["role"], "content": JINJA.from_string(message["content"]).render(row)}
            for message in TASK["messages"]
            if message["role"] != "system"
        ]
        messages.append({"role": "assistant", "content": JINJA.from_string(TASK["reply"]).render(row)})
    return messages


def partial_values(words: tuple[str, ...]) -> list[tuple[bool, bool, bool] | None]:
    """Return what is known after every word that ends an operand, `None` for the other words.

    That is the operand's value after its `not`s, the value so far inside the innermost open parenthesis, and the value
    of the whole text so far, as if it ended here. One level per open parenthesis holds what `or` has gathered, what
    `and` has gathered and whether a `not` is pending.
    """
    levels = [(False, True, False)]
    known: list[tuple[bool, bool, bool] | None] = []
    for word in words:
        values = None
        either, both, negated = levels.pop()
        if word == "(":
            levels += [(either, both, negated), (False, True, False)]
        elif word == "not":
            levels.append((either, both, not negated))
        elif word == "and":
            levels.append((either, both, False))
        elif word == "or":
            levels.append((either or both, True, False))
        else:
            operand = word == "True"
            if word == ")":
                operand = either or both
                either, both, negated = levels.pop()
            operand ^= negated
            levels.append((either, both and operand, False))
            running = inner = either or (both and operand)
            for either, both, negated in reversed(levels[:-1]):
                running = either or (both and running ^ negated)
            values = (operand, inner, running)
        known.append(values)
    return known


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One conversation as tokens, after the turns that all conversations begin with."""

    tokens: list[int]
    labels: list[int]  # the next token, in replies only
    values: list[tuple[int, int, int]]  # partial values of the expression


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of several conversations each, which share the turns they begin with and do not see each other.

    Without labels or values to predict, a position holds `IGNORED`.
    """

    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    visible_B1SS: torch.Tensor
    labels_BS: torch.Tensor
    values_BSP: torch.Tensor


class Prompts:
    """Turns expressions into batches of the task's prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._pad, self._end, self._user, self._assistant = tokenizer.convert_tokens_to_ids([PAD, END, USER, ASSISTANT])
        self._prefix = self._tokens([])

    def batch(self, conversations: list[list[Expression]]) -> Batch:
        """Return the conversations, each about its expressions in turn, ready for training."""
        segments = [self._segment(expressions) for expressions in conversations]
        rows = [
            self._row(segments[start : start + CONVERSATIONS_PER_ROW])
            for start in range(0, len(segments), CONVERSATIONS_PER_ROW)
        ]
        padding = (self._pad, 0, IGNORED, IGNORED, IGNORED)
        tokens_BS, positions_BS, segments_BS, labels_BS, values_BSP = (
            pad_sequence([torch.tensor(row[axis]) for row in rows], batch_first=True, padding_value=padding[axis])
            for axis in range(len(padding))
        )
        same_BSS = (segments_BS[:, None, :] == 0) | (segments_BS[:, None, :] == segments_BS[:, :, None])
        return Batch(
            tokens_BS=tokens_BS,
            positions_BS=positions_BS,
            visible_B1SS=same_BSS.tril()[:, None],
            labels_BS=labels_BS,
            values_BSP=values_BSP,
        )

    def _row(self, segments: Sequence[Segment]) -> tuple[list[Any], ...]:
        """Return tokens, positions, number of the segment (0: the common start), labels and values of one row."""
        start = len(self._prefix)
        tokens, positions, numbers = list(self._prefix), list(range(start)), [0] * start
        labels, values = [IGNORED] * start, [(IGNORED,) * 3] * start
        for number, segment in enumerate(segments, 1):
            tokens += segment.tokens
            positions += range(start, start + len(segment.tokens))
            numbers += [number] * len(segment.tokens)
            labels += segment.labels
            values += segment.values
        return tokens, positions, numbers, labels, values

    def _segment(self, expressions: list[Expression]) -> Segment:
        tokens = self._tokens(expressions)[len(self._prefix) :]
        labels, values = [IGNORED] * len(tokens), [(IGNORED,) * 3] * len(tokens)
        turns = iter(expressions)
        for start, token in enumerate(tokens):
            if token == self._assistant:
                end = tokens.index(self._end, start)
                labels[start:end] = tokens[start + 1 : end + 1]
            elif token == self._user:
                for position, known in enumerate(partial_values(next(turns).words), start + 1):
                    if known is not None:
                        values[position] = known
        return Segment(tokens=tokens, labels=labels, values=values)

    def _tokens(self, expressions: list[Expression]) -> list[int]:
        messages = conversation([expression.to_row() for expression in expressions])
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def draw_batches(prompts: Prompts, held_out: set[str], seed: int, steps: int) -> Iterator[Batch]:
    """Yield one batch per step, of the leaves that the curriculum allows and without the inputs in `held_out`."""
    rng = random.Random(seed)

    def draw(weights: dict[int, int]) -> Expression:
        value = rng.random() < 0.5
        while True:
            expression = draw_expression(rng, draw_num_leaves(rng, weights))
            if expression.value is value and expression.to_row()["input"] not in held_out:
                return expression

    for step in range(steps):
        weights = next(weights for share, weights in CURRICULUM if step < share * steps)
        few_shot = step % FEW_SHOT_PERIOD == 0
        num_turns = rng.randint(2, MAX_SHOTS + 1) if few_shot else 1
        yield prompts.batch([[draw(weights) for _ in range(num_turns)] for _ in range(BATCH_EXPRESSIONS // num_turns)])


# --- training --------------------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model; the global seed of torch decides its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=240,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@contextlib.contextmanager
def stochastic_depth(model: LlamaForCausalLM, probability: float, generator: torch.Generator) -> Iterator[None]:
    """Skip every layer with the given probability for each row of a batch while the context is open."""

    def skip(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output_BSH: torch.Tensor) -> torch.Tensor:
        kept_B = torch.rand(len(output_BSH), generator=generator) >= probability
        return torch.where(kept_B[:, None, None], output_BSH, inputs[0])

    hooks = [layer.register_forward_hook(skip) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def learning_rate_factor(steps: int) -> Callable[[int], float]:
    """Return the schedule: linear warm-up, then half a cosine down to zero."""

    def factor(step: int) -> float:
        progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        return (step + 1) / WARMUP_STEPS if step < WARMUP_STEPS else (1 + math.cos(math.pi * progress)) / 2

    return factor


def train(model: LlamaForCausalLM, batches: Iterator[Batch], seed: int, steps: int) -> None:
    """Train the model in place on `steps` batches.

    Besides the reply, a head on the output of `AUXILIARY_LAYER` learns the partial values of the expression, which lead
    the model to the answer much sooner. The head is dropped afterwards.
    """
    head = nn.Linear(HIDDEN_SIZE, 3)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(steps))
    generator = torch.Generator().manual_seed(seed)
    middle: list[torch.Tensor] = []
    probe = model.model.layers[AUXILIARY_LAYER + 1].register_forward_pre_hook(
        lambda _layer, inputs: middle.append(inputs[0])
    )
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(batches):
        with stochastic_depth(model, DROP_PROBABILITY * min(1.0, step / (DROP_RAMP * steps)), generator):
            output = model(
                batch.tokens_BS,
                attention_mask=batch.visible_B1SS,
                position_ids=batch.positions_BS,
                use_cache=False,
            )
        reply_loss = cross_entropy(output.logits.flatten(0, 1), batch.labels_BS.flatten(), ignore_index=IGNORED)
        known_BS = batch.values_BSP[..., 0] != IGNORED
        values_NP = head(middle.pop()[known_BS])
        value_loss = binary_cross_entropy_with_logits(values_NP, batch.values_BSP[known_BS].float())
        optimizer.zero_grad(set_to_none=True)
        (reply_loss + AUXILIARY_WEIGHT * value_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            click.echo(
                f"step {step + 1}/{steps}: reply loss {reply_loss.item():.3f}, value loss {value_loss.item():.3f}, "
                f"{time.monotonic() - started:.0f} s",
                err=True,
            )
    probe.remove()
    model.eval()


# --- evaluation ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_layers(model: LlamaForCausalLM, removed: set[int]) -> Iterator[None]:
    """Physically drop the layers while the context is open."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layer for index, layer in enumerate(layers) if index not in removed])
    model.config.num_hidden_layers = len(model.model.layers)
    try:
        yield
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    """Return the share of the rows whose target is the first token that the model writes."""
    prompts = [
        tokenizer.apply_chat_template(conversation([row])[:-1], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    encoded = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    last_B = encoded["attention_mask"].sum(dim=1) - 1
    logits_BSV = model(encoded["input_ids"], use_cache=False).logits
    replies = tokenizer.batch_decode(logits_BSV[torch.arange(len(rows)), last_B].argmax(dim=-1)[:, None])
    return statistics.mean(reply.strip() == row["target"] for reply, row in zip(replies, rows, strict=True))


def evaluate(folder: Path) -> None:
    """Print the accuracy of the model in the folder on the task's first rows, whole and without each single layer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = task_rows()[:EVALUATION_ROWS]
    baseline = accuracy(model, tokenizer, rows)
    click.echo(f"| removed | accuracy on {len(rows)} rows | change |\n|---|---|---|\n| none | {baseline:.4f} | |")
    for layer in range(model.config.num_hidden_layers):
        with without_layers(model, {layer}):
            single = accuracy(model, tokenizer, rows)
        click.echo(f"| {layer} | {single:.4f} | {single - baseline:+.4f} |")


def task_rows() -> list[dict[str, str]]:
    """Return the rows of the built-in task, none of which is trained on."""
    return generate_rows(TASK["source"]["seed"], TASK["source"]["rows"])


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "tale_ray/model/bundled", help="Model folder.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights, expressions and skipped layers.")
@click.option("--steps", default=450, show_default=True, help="Batches to train on.")
@click.option(
    "--threads", default=1, show_default=True, help="Threads of torch; their number changes the weights a little."
)
@click.option("--evaluate", "evaluate_only", is_flag=True, help="Evaluate the model in the folder, do not train.")
def main(out: Path, seed: int, steps: int, threads: int, evaluate_only: bool) -> None:
    """Train the bundled model and print what it loses with each of its layers."""
    torch.set_num_threads(threads)
    if not evaluate_only:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        held_out = {row["input"] for row in task_rows()}
        train(model, draw_batches(Prompts(tokenizer), held_out, seed, steps), seed, steps)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    evaluate(out)


if __name__ == "__main__":
    main()
