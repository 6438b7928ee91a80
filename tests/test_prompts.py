"""Prompts: what a row renders to, and the tokens of a chat under every kind of chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tale_ray.errors import TaskError
from tale_ray.records import Example
from tale_ray.tasks.prompts import chat_notes, digest_tokens, encode, render, render_rows
from tale_ray.tasks.spec import TaskSpec, load_task
from tale_ray.tasks.splits import row_digest

MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"})
DEMONSTRATION = Example(
    digest="d",
    messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}),
    reply="4",
    target="4",
)

NORMAL = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + NORMAL
)
DROPS_SYSTEM = (
    "{% for message in messages if message.role != 'system' %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}<|assistant|>"
)
DATED = (
    "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    "{{ today() }} {{ strftime_now('%A, %B %-d, %y %m') }} {{ date_string }}\n" + NORMAL
)
WRITES_BOS = "{{ bos_token }}" + NORMAL
THINKING = NORMAL + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
ALWAYS_THINKING = NORMAL + "<think>\n"
BROKEN = "{{ raise_exception('never') }}"


def make_tokenizer(template: str | None, *, adds_bos: bool = False, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, so that decoding gives the text back exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{character: index for index, character in enumerate(alphabet, start=2)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos or adds_eos:
        single = "<s> " * adds_bos + "$A" + " </s>" * adds_eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def text_of(tokenizer: PreTrainedTokenizerFast, *args: Any) -> str:
    text = tokenizer.decode(encode(tokenizer, *args))
    assert isinstance(text, str)
    return text


def make_spec(tmp_path: Path, **changes: Any) -> TaskSpec:
    content = {
        "name": "sums",
        "source": {"path": "csv", "data_files": "rows.csv"},
        "messages": [{"role": "user", "content": "{{ question }}"}],
        "reply": "It is {{ answer }}",
        "target": " {{ answer }} ",
        "answer": {"type": "number"},
        "max_new_tokens": 1,
        **changes,
    }
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_task(str(path))


def test_a_row_is_rendered_by_its_templates(tmp_path: Path) -> None:
    row = {"question": "1 + {{ x }} <b>&", "answer": 2}
    assert render(make_spec(tmp_path), row, "digest") == Example(
        digest="digest",
        messages=({"role": "user", "content": "1 + {{ x }} <b>&"},),  # rows are text: never templates, never HTML
        reply="It is 2",
        target="2",
    )


def test_rows_keep_their_order_and_get_their_digests(tmp_path: Path) -> None:
    rows = [{"question": "b", "answer": 1}, {"question": "a", "answer": 2}, {"question": "b", "answer": 1}]
    examples = render_rows(make_spec(tmp_path), rows)
    assert [example.digest for example in examples] == [row_digest(row) for row in rows]
    assert [example.target for example in examples] == ["1", "2", "1"]


def test_a_word_target_is_spelled_as_its_label(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, answer={"type": "word", "labels": ["True", "False"]})
    assert render(spec, {"question": "?", "answer": "TRUE"}, "d").target == "True"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"reply": "{{ anwser }}"}, ["`reply`", "'anwser' is undefined", "answer, broken, question"]),
        ({"reply": "{{ answer.text }}"}, ["`reply`", "text"]),
        ({"messages": [{"role": "user", "content": "{{ q }}"}]}, ["`messages[0].content`", "'q' is undefined"]),
        ({"reply": "{{ answer / 0 }}"}, ["`reply`", "ZeroDivisionError"]),
        ({"reply": "{{ ''.__class__.__mro__ }}"}, ["`reply`", "unsafe"]),
        ({"reply": "{{ question.append(1) }}"}, ["`reply`", "append"]),
        ({"target": "{{ question }}"}, ["'how many?'", "a number", "row d"]),
        ({"answer": {"type": "choice", "labels": ["A", "B"]}}, ["'2'", "labels A, B", "row d", "how many?"]),
        ({"group_by": "subject"}, ["group_by", "'subject'", "question, answer"]),
        *(
            ({field: value}, [f"`{name}`", "half a character", "\\ud83d", "correct"])
            for field, name, value in (
                ("reply", "reply", "{{ broken }}"),
                ("target", "target", "{{ broken }} {{ answer }}"),
                ("messages", "messages[0].content", [{"role": "user", "content": "{{ broken }}"}]),
                ("reply", "reply", r"{{ '\ud83d' }}"),
            )
        ),
    ],
)
def test_a_row_that_a_task_cannot_ask(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    spec = make_spec(tmp_path, **changes)
    with pytest.raises(TaskError) as error:
        render(spec, {"question": "how many?", "answer": 2, "broken": json.loads(r'"x \ud83d"')}, "d")
    for part in parts:
        assert part in str(error.value)


def test_templates_cannot_draw_at_random(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="random"):
        make_spec(tmp_path, reply="{{ [1, 2] | random }}")


def test_templates_cannot_change_a_row(tmp_path: Path) -> None:
    row = {"question": "?", "answer": 2, "choices": ["x"]}
    with pytest.raises(TaskError, match="SecurityError"):
        render(make_spec(tmp_path, reply="{{ choices.append('y') }}"), row, "d")
    assert row["choices"] == ["x"]


def test_arc_easy_letters_follow_the_position_of_the_option() -> None:
    row = {
        "id": "x",
        "question": "Which is a metal?",
        "choices": {"text": ["air", "iron", "ice", "oil", "ash"], "label": ["1", "2", "3", "4", "5"]},
        "answerKey": "2",
    }
    example = render(load_task("arc_easy"), row, "d")
    assert example.messages[1]["content"] == "Which is a metal?\n\nA. air\nB. iron\nC. ice\nD. oil\nE. ash"
    assert (example.reply, example.target) == ("B", "B")
    with pytest.raises(TaskError, match="`reply`"):
        render(load_task("arc_easy"), {**row, "answerKey": "C"}, "d")


def test_normal_chat_template() -> None:
    tokenizer = make_tokenizer(NORMAL, adds_bos=True)
    assert text_of(tokenizer, MESSAGES) == "<|system|>Be brief.<|end|>\n<|user|>1 + 1?<|end|>\n<|assistant|>"
    assert chat_notes(tokenizer) == ()


def test_demonstrations_stand_between_the_system_message_and_the_row() -> None:
    assert text_of(make_tokenizer(NORMAL), MESSAGES, [DEMONSTRATION]) == (
        "<|system|>Be brief.<|end|>\n<|user|>2 + 2?<|end|>\n<|assistant|>4<|end|>\n<|user|>1 + 1?<|end|>\n<|assistant|>"
    )


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_message_that_is_not_taken_is_folded(template: str) -> None:
    tokenizer = make_tokenizer(template)
    assert text_of(tokenizer, MESSAGES, [DEMONSTRATION]) == (
        "<|user|>Be brief.\n\n2 + 2?<|end|>\n<|assistant|>4<|end|>\n<|user|>1 + 1?<|end|>\n<|assistant|>"
    )
    assert text_of(tokenizer, MESSAGES[1:]) == "<|user|>1 + 1?<|end|>\n<|assistant|>"
    (note,) = chat_notes(tokenizer)
    assert "system message" in note


def test_dates_never_change() -> None:
    tokenizer = make_tokenizer(DATED)
    assert text_of(tokenizer, MESSAGES).splitlines()[0] == "26 Jul 2024 Friday, July 26, 24 07 26 Jul 2024"
    assert chat_notes(tokenizer) == ()


@pytest.mark.parametrize(
    "start", ["", "\n", "  {% if true %}x{% endif %}", "  \n", " y", "{#- c -#} ", "{%- if true %} z{% endif %}\n"]
)
def test_fixing_the_date_changes_nothing_else(start: str) -> None:
    plain = start + NORMAL
    dated = plain + "{{ strftime_now('') }}"
    assert text_of(make_tokenizer(dated), MESSAGES) == text_of(make_tokenizer(plain), MESSAGES)


def test_one_bos_token_only() -> None:
    tokenizer = make_tokenizer(WRITES_BOS, adds_bos=True)
    token_ids = encode(tokenizer, MESSAGES)
    assert token_ids[0] == tokenizer.bos_token_id
    assert token_ids.count(tokenizer.bos_token_id) == 1


def test_thinking_is_switched_off_or_said_to_stay() -> None:
    assert text_of(make_tokenizer(THINKING), MESSAGES).endswith("<|assistant|><think></think>")
    assert chat_notes(make_tokenizer(THINKING)) == ()
    (note,) = chat_notes(make_tokenizer(ALWAYS_THINKING))
    assert "thinking" in note


def test_without_a_chat_template_the_prompt_is_plain_and_special_tokens_are_the_tokenizers() -> None:
    tokenizer = make_tokenizer(None, adds_bos=True, adds_eos=True)
    assert text_of(tokenizer, MESSAGES) == "<s>Be brief.\n\n1 + 1?\nAnswer:"
    assert text_of(tokenizer, MESSAGES, [DEMONSTRATION]) == ("<s>Be brief.\n\n2 + 2?\nAnswer: 4\n\n1 + 1?\nAnswer:")
    assert text_of(make_tokenizer(None), MESSAGES[1:]) == "1 + 1?\nAnswer:"
    (note,) = chat_notes(tokenizer)
    assert "no chat template" in note


def test_a_chat_template_that_fails_on_everything() -> None:
    for call in (lambda tokenizer: encode(tokenizer, MESSAGES), chat_notes):
        with pytest.raises(TaskError, match=r"chat template fails.*never"):
            call(make_tokenizer(BROKEN))


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(TaskError, match="has no tokens"):
        encode(make_tokenizer("{{ '' }}"), MESSAGES)


def test_digest_of_tokens_tells_rows_apart() -> None:
    digests = {
        digest_tokens(rows)
        for rows in ([(1, 2), (3,)], [(1,), (2, 3)], [(12, 3)], [(1, 2, 3)], [(3,), (1, 2)], [(), ()], [])
    }
    assert len(digests) == 7
    assert digest_tokens(iter([(1, 2)])) == digest_tokens([(1, 2)])
