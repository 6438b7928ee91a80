"""Replies and the answers read from them: worked examples of the rules, and properties over all replies."""

import random
import threading
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_ray.errors import TaskError
from tale_ray.tasks.answers import cut_reply, is_correct, is_settled, parse_answer, parse_target
from tale_ray.tasks.spec import AnswerSpec

CHOICE = AnswerSpec(type="choice", labels=("A", "B", "C", "D", "E"))
WORD = AnswerSpec(type="word", labels=("True", "False"))
NUMBER = AnswerSpec(type="number")
REGEX = AnswerSpec(type="regex", pattern=r"answer is (\w+)?")
MATH = AnswerSpec(type="math")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", "A"),
        (" B", "B"),
        ("\n\tC", "C"),
        ("(D)", "D"),
        ("[E]", "E"),
        ('"A"', "A"),
        ("“B”", "B"),
        ("**C**", "C"),
        ("A.", "A"),
        ("A) mass", "A"),
        ("A cat", "A"),
        ("A1", "A"),
        ("A1 or B", "A"),
        ("B_x", "B"),
        ("A\u200b", "A"),
        ("The answer is C.", "C"),
        ("The answer is (C), not B", "C"),
        ("I say: _D_", "D"),
        ("Answer B", "B"),
        ("Because", None),
        ("A\u0301ngel", None),  # Á as two characters
        ("Ángel: B", "B"),
        ("Apple, so D", "D"),
        ("CAB", None),
        ("a", None),
        ("F", None),
        ("1", None),
        ("答案是B。", None),  # no space around: it does not stand alone
        ("答案：B", "B"),
        ("", None),
        ("   ", None),
    ],
)
def test_choice(reply: str, expected: str | None) -> None:
    assert parse_answer(CHOICE, reply) == expected


def test_choice_of_longer_labels() -> None:
    spec = AnswerSpec(type="choice", labels=("1", "12", "A", "A+", "café"))
    for reply, expected in [
        ("12", "12"),
        ("1", "1"),
        ("13", None),
        ("1.", "1"),
        ("A+", "A+"),
        ("A", "A"),
        ("it is A+ indeed", "A+"),
        ("cafe\u0301", "café"),
        ("un cafe\u0301 noir", "café"),
    ]:
        assert parse_answer(spec, reply) == expected


@given(label=st.sampled_from(CHOICE.labels), tail=st.text())
def test_a_reply_that_starts_with_a_label_and_no_letter_is_that_choice(label: str, tail: str) -> None:
    assert parse_answer(CHOICE, f"{label}\n{tail}") == label


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("True", "True"),
        (" true.", "True"),
        ("FALSE", "False"),
        ("It is false, not true", "False"),
        ("**False**", "False"),
        ("_true_", "True"),
        ("untrue", None),
        ("Trues and false", "False"),
        ("truefalse", None),
        ("", None),
    ],
)
def test_word(reply: str, expected: str | None) -> None:
    assert parse_answer(WORD, reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("18", "18"),
        ("The answer is 18.", "18"),
        ("3 + 4 = 7", "7"),
        ("it costs $1,234.50 in all", "1234.50"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("-\\$5", "-5"),
        ("−7", "-7"),
        ("+7", "7"),
        ("pages 5-7", "7"),
        (".5", ".5"),
        ("6.02e23", "6.02e23"),
        ("-1E-3", "-1e-3"),
        ("about 2.5 × 10^6", "2.5e6"),
        ("2 \\times 10^{-3}", "2e-3"),
        ("1,2,3", "3"),
        ("12,345,678", "12345678"),
        ("1234,567", "567"),
        ("1,2345", "2345"),
        ("5kg of x2", "2"),
        ("4\n#### 18\n\nQuestion: 20 and 30", "18"),
        ("1\n####18", "18"),
        ("#### **1,000**", "1000"),
        ("#### $70,000", "70000"),
        ("#### -3", "-3"),
        ("#### Step 1\nso \\boxed{9} of 10", "9"),
        ("#### Answer: 6", "6"),
        ("\\boxed{42} and 7", "42"),
        ("\\boxed{1} then \\boxed{2}, see 3", "2"),
        ("\\boxed{x = 1{,}234}", "1234"),
        ("\\boxed{12\\,345 \\text{ m}}", "12345"),
        ("\\boxed{\\text{none}} 4", "4"),
        ("\\boxed{15", "15"),
        ("\\boxed{} 8", "8"),
        ("1e99999999999999999999999", None),
        ("no number", None),
        ("", None),
        ("-", None),
        ("٣", "٣"),  # digits of any script are digits
    ],
)
def test_number(reply: str, expected: str | None) -> None:
    assert parse_answer(NUMBER, reply) == expected


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("4710109.0", "4,710,109", True),
        ("4710109", "4710109.0", True),
        ("1e3", "1000", True),
        ("0.10", ".1", True),
        ("-0", "0", True),
        ("٣", "3", True),
        ("-6.5e+16", "-65000000000000000.0", True),
        ("10000000000000000001", "10000000000000000000", False),  # equal as floats
        ("1e999999999999", "1e999999999998", False),
        ("3", "-3", False),
        (None, "3", False),
        ("3", "three", False),
    ],
)
def test_numbers_are_compared_exactly(prediction: str | None, target: str, expected: bool) -> None:
    assert is_correct(NUMBER, prediction, target) is expected


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=4), words=st.text(alphabet="abc ,.\n"))
def test_a_number_written_with_separators_is_read_back(value: Decimal, words: str) -> None:
    prediction = parse_answer(NUMBER, f"{words} \\boxed{{{value:,}}} 5")
    assert is_correct(NUMBER, prediction, str(value))


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_as_python_writes_it_equals_itself(value: float) -> None:
    assert is_correct(NUMBER, parse_answer(NUMBER, f"#### {value}"), parse_target(NUMBER, str(value)))


def test_regex_takes_the_first_group_in_any_case() -> None:
    assert parse_answer(REGEX, "So the Answer is blue; the answer is red") == "blue"
    assert parse_answer(REGEX, "the answer is !") is None
    assert parse_answer(REGEX, "blue") is None
    assert is_correct(REGEX, "BLUE", "blue")
    assert not is_correct(REGEX, "blues", "blue")


def test_choice_and_word_equality() -> None:
    assert is_correct(CHOICE, "A", "A")
    assert not is_correct(CHOICE, "a", "A")
    assert not is_correct(CHOICE, None, "A")
    assert is_correct(WORD, "True", "true")


@pytest.mark.parametrize(
    ("spec", "target", "expected"),
    [(CHOICE, "B", "B"), (WORD, "TRUE", "True"), (NUMBER, "1,000", "1,000"), (REGEX, "x", "x"), (MATH, "x^2", "x^2")],
)
def test_targets_that_a_reply_can_equal(spec: AnswerSpec, target: str, expected: str) -> None:
    assert parse_target(spec, target) == expected


@pytest.mark.parametrize(
    ("spec", "target", "rule"),
    [
        (CHOICE, "F", "labels A, B"),
        (CHOICE, "b", "labels"),
        (WORD, "maybe", "True, False"),
        (NUMBER, "many", "a number"),
        (REGEX, "", "not empty"),
    ],
)
def test_targets_that_no_reply_can_equal(spec: AnswerSpec, target: str, rule: str) -> None:
    with pytest.raises(TaskError, match=rule) as error:
        parse_target(spec, target)
    assert repr(target) in str(error.value)


@given(reply=st.text(alphabet="ABab TrueFals0123.,-+e#{}\\boxd$(×^*\n") | st.text())
def test_no_reply_breaks_a_parser(reply: str) -> None:
    for spec in (CHOICE, WORD, NUMBER, REGEX):
        prediction = parse_answer(spec, reply)
        assert prediction is None or prediction
        is_correct(spec, prediction, "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        "111,",
        "1.",
        "1e",
        "-",
        "#",
        "#### ",
        "#### *",
        "\\boxed{",
        "{",
        "}",
        "A",
        "a ",
        " ",
        "(",
        "1 × 10^",
        "\n",
    ],
)
def test_time_is_linear_in_the_reply(piece: str) -> None:
    reply = piece * (400_000 // len(piece)) + "!"
    start = time.process_time()
    for spec in (CHOICE, WORD, NUMBER, REGEX):
        parse_answer(spec, reply)
    assert time.process_time() - start < 10  # quadratic time would be hours


def test_replies_are_never_evaluated() -> None:
    for spec in (CHOICE, WORD, NUMBER):
        assert parse_answer(spec, "__import__('os').getcwd()") is None


def test_math_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(TaskError, match="pip install math-verify"):
        parse_answer(MATH, "\\boxed{1}")


def test_math() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert parse_answer(MATH, "nothing at all") is None
    prediction = parse_answer(MATH, "thus \\boxed{\\frac{1}{2}} of them")
    assert prediction == "\\boxed{\\frac{1}{2}}"
    assert is_correct(MATH, prediction, "0.5")
    assert is_correct(MATH, prediction, "\\frac{2}{4}")
    assert not is_correct(MATH, prediction, "2")
    elsewhere: list[bool] = []
    thread = threading.Thread(target=lambda: elsewhere.append(is_correct(MATH, prediction, "\\frac{2}{4}")))
    thread.start()
    thread.join()
    assert elsewhere == [True]


def test_order_of_labels_does_not_matter() -> None:
    shuffled = AnswerSpec(type="choice", labels=tuple(random.Random(0).sample(CHOICE.labels, 5)))
    for reply in ("B", "it is D", "E or A", "none"):
        assert parse_answer(shuffled, reply) == parse_answer(CHOICE, reply)


PIECES = st.sampled_from(
    ["A", "B", "A b", "tr", "True", "False", "not", " ", ".", ",", "x", "\n", "(", "1", "é", "A-1"]
)


@given(st.lists(PIECES, max_size=6).map("".join), st.lists(PIECES, max_size=4).map("".join))
def test_a_settled_reply_answers_the_same_whatever_follows(reply: str, more: str) -> None:
    for answer in (
        AnswerSpec(type="choice", labels=("A", "B", "A b", "A-1", "A. x")),
        AnswerSpec(type="word", labels=("True", "False", "not true", "é")),
    ):
        if is_settled(answer, reply):
            assert parse_answer(answer, reply) is not None
            assert parse_answer(answer, reply + more) == parse_answer(answer, reply)


@pytest.mark.parametrize(
    ("answer", "reply", "settled"),
    [
        (CHOICE, "A", False),
        (CHOICE, "A.", True),
        (CHOICE, "The answer is B, ", True),
        (CHOICE, "The answer is", False),
        (CHOICE, "", False),
        (WORD, "that is true.", True),
        (WORD, "truest.", False),
        (NUMBER, "42. ", False),
        (REGEX, "answer is 4 ", False),
        (AnswerSpec(type="number", stop=("\n\n",)), "42\n\n", True),
    ],
)
def test_when_a_reply_is_settled(answer: AnswerSpec, reply: str, settled: bool) -> None:
    assert is_settled(answer, reply) is settled


def test_a_reply_ends_before_its_first_stop_string() -> None:
    answer = AnswerSpec(type="number", stop=("Question:", "\n\n"))
    assert cut_reply(answer, "42\n\nQuestion: 43") == "42"
    assert cut_reply(answer, "42 Question: 43\n\n") == "42 "
    assert cut_reply(answer, "42\n") == "42\n"
