"""What cannot be done is refused in words, exit 2, before a model is loaded, with nothing written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import NUM_LAYERS, Material, Outcome, command, task_text, write_rows
from folders import material_fixture as material_fixture

import tale_ray
import tale_ray.cluster.worker
from tale_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing may load a model here, and what is written by accident is written where it is seen."""

    def load_model(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tale_ray.cluster.worker, "load_model", load_model)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    *before, last = outcome.err.strip().splitlines()
    assert last.startswith(("tale-ray: ", "Error: ")), outcome.err
    assert len(before) <= 3, "a refusal is short"
    for each in words:
        assert each in last, outcome.err


OPTIONS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--rows", "0"], ("rows 0 is too small", "at least 1", "leave the option out")),
    (["--rows", "-1"], ("rows -1 is too small",)),
    (["--rows", "many"], ("'many' is not a valid int",)),
    (["--epsilon", "-0.1"], ("epsilon '-0.1' is out of range", "from 0 to 1", "such as 0.08")),
    (["--epsilon", "1.5"], ("epsilon '1.5' is out of range",)),
    (["--epsilon", "NaN"], ("epsilon 'NaN' is out of range",)),
    (["--epsilon", "inf"], ("epsilon 'inf' is out of range",)),
    (["--epsilon", "some"], ("epsilon 'some' is not a number", "write a decimal from 0 to 1")),
    (["--splits", "search=0.9,test=0.2"], ("sum to 1.1", "at most 1", "lower one")),
    (["--splits", "search=-0.5"], ("share of the search split '-0.5' is out of range",)),
    (["--splits", "train=0.5"], ("'train=0.5' is not NAME=SHARE", "shots, search, select, test, finetune")),
    (["--splits", "search=0,test=1"], ("leave no search rows", "give search a share above 0")),
    (["--splits", "search=0.001"], ("the search split of task tiny is empty", "100 rows times a share of 0.001")),
    (["--remove", "99"], ("layer 99 cannot be removed", f"the model has {NUM_LAYERS} layers, numbered 0 to 5")),
    (["--keep-layers", "6"], ("layer 6 cannot be kept",)),
    (["--remove", "0,1,2,3,4,5"], ("all 6 layers cannot be removed", "keeps at least one")),
    (["--remove", "3,3"], ("remove 3,3: a layer is named twice", "name each once")),
    (["--remove", "-3"], ("layer -3 does not exist", "numbered from 0")),
    (["--remove", "three"], ("remove 'three' is not a list of layers", "such as 3,7")),
    (["--remove", "3", "--keep-layers", "3"], ("layer 3 is in remove and in keep layers", "out of one")),
    (["--max-removed", "-1"], ("max removed -1 is too small",)),
    (["--max-removed", "1", "--remove", "2,3"], ("remove names 2 layers but max removed is 1",)),
    (["--workers", "0"], ("workers 0 is too small",)),
    (["--workers", "2"], ("local runs one worker, not 2", "leave out local")),
    (["--address", "auto"], ("local and address 'auto' exclude each other",)),
    (["--gpus-per-worker", "9"], ("9 GPUs per worker are asked for", "this machine shows", "ask for fewer")),
    (["--gpus-per-worker", "-1"], ("gpus per worker -1 is too small",)),
    (["--batch-bytes", "big"], ("size 'big' is not understood",)),
    (["--batch-bytes", "9" * 400], ("is too large", "at most")),
    (["--time-limit", "9" * 400], ("time limit inf is too large", "leave the option out")),
    (["--time-limit", "99999999d"], ("is too large: it is at most 315360000 seconds",)),
    (["--wait-resources", "9" * 400], ("wait resources inf is too large",)),
    (["--wait-resources", "long"], ("duration 'long' is not understood",)),
    (["--time-limit", "0"], ("time limit 0.0 is too small",)),
    (["--dtype", "int4"], ("'int4' is not one of 'auto', 'float32'",)),
    (["--strategy", "greedy"], ("strategy 'greedy' is not known", "choose one of tale, beam, sleb, block_influence")),
    (["--strategy", "slep"], ("strategy 'slep' is not known", "did you mean sleb?")),
    (["--strategy", "contiguous"], ("strategy contiguous needs max removed", "give --max-removed N")),
    (["--strategy", "contiguous", "--max-removed", "6"], ("max removed 6 is too large", "the model has 6 layers")),
    (["--calibration", "x.txt"], ("strategy tale measures nothing", "leave it out")),
    (["--strategy", "sleb", "--calibration", "x.txt"], ("calibration file 'x.txt' cannot be read", "name a text file")),
    (["--epsilon-mode", "last"], ("'last' is not one of 'baseline', 'current'",)),
    (["--resume", "must"], ("holds no run to go on with", "leave out --resume must")),
    (["--data-root", "nowhere", "--task", "boolean_expressions"], ("data root nowhere is not a folder",)),
    (["--task", "boolean_sinthetic"], ("task 'boolean_sinthetic' is not known (did you mean boolean_synthetic?)",)),
    (["--task", "nothing.yaml"], ("task file nothing.yaml does not exist",)),
    (["--task", "lm-eval:"], ("names no task", "lm-eval:NAME")),
    (["--task", "lm-eval:arc_easy", "--include-path", "nowhere"], ("include path nowhere is not a folder",)),
    (["--task", "lm-eval:arc_easy", "--splits", "shots=0.1,search=0.5"], ("leave out the shots share",)),
    (["--model", "./nowhere"], ("model folder ./nowhere does not exist", "give an existing folder")),
    (["--model", ""], ("model '' is empty",)),
    (["--gguf", "weights.gguf"], ("GGUF file weights.gguf is not in",)),
    (["--run", "~nosuchuser/run"], ("run '~nosuchuser/run' cannot be reached", "choose another --run")),
    (["--run", "x" * 300], (f"{'x' * 300} cannot be read", "File name too long")),
    (["--model", "~nosuchuser/model"], ("model folder ~nosuchuser/model does not exist",)),
    (["--model", f"./{'x' * 300}"], (f"model folder ./{'x' * 300} does not exist",)),
    (["--gguf", "x" * 300], ("is not in",)),
    (["--task", "~nosuchuser/task.yaml"], ("task file ~nosuchuser/task.yaml does not exist",)),
    (["--task", "x" * 300], (f"task '{'x' * 300}' is not known",)),
    (["--data-root", "~nosuchuser", "--task", "boolean_expressions"], ("data root ~nosuchuser is not a folder",)),
    (["--data-root", "x" * 300, "--task", "boolean_expressions"], ("is not a folder",)),
    (["--config", "~nosuchuser/options.yaml"], ("cannot be read",)),
    (["--config", "nowhere.yaml"], ("config file nowhere.yaml cannot be read",)),
    (["--no-such-option"], ("No such option",)),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[" ".join(options)[:60] for options, _ in OPTIONS])
def test_options(material: Material, tmp_path: Path, options: list[str], words: tuple[str, ...]) -> None:
    for dry in ([], ["--dry-run"]):
        assert_refused(material.search(tmp_path / "run", *options, *dry), *words)
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "cwd"], "nothing is written"


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


TASK_FILES: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "unknown column": (lambda text: changed(text, "{{ question }}", "{{ passage }}"), ("passage", "question")),
    "bad template": (
        lambda text: changed(text, "{{ question }}", "{{ question "),
        ("messages[0].content", "correct it"),
    ),
    "unknown key": (lambda text: text + "shot: 5\n", ("key `shot` is not known", "correct or remove it")),
    "missing key": (lambda text: changed(text, "max_new_tokens: 1\n", ""), ("key `max_new_tokens` is missing",)),
    "no YAML": (lambda text: text + "answer: [\n", ("is not valid YAML",)),
    "empty": (lambda text: "", ("it is a mapping",)),
    "no such data": (lambda text: changed(text, "rows.jsonl", "gone.jsonl"), ("gone.jsonl does not exist",)),
    "empty data": (lambda text: changed(text, "rows.jsonl", "empty.jsonl"), ("holds no rows", "at least one")),
    "bad data": (lambda text: changed(text, "rows.jsonl", "tiny.yaml"), ("cannot be read as json",)),
}


@pytest.mark.parametrize("what", TASK_FILES)
def test_task_files(material: Material, tmp_path: Path, what: str) -> None:
    change, words = TASK_FILES[what]
    folder = tmp_path / "task"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", [{"question": f"t{number}", "answer": "t5"} for number in range(3, 40)])
    (folder / "empty.jsonl").write_text("")
    (folder / "tiny.yaml").write_text(change(task_text("tiny")))
    assert_multiline_refused(material.search(tmp_path / "run", "--task", folder / "tiny.yaml"), *words)
    assert not (tmp_path / "run").exists()


def assert_multiline_refused(outcome: Outcome, *words: str) -> None:
    """As `assert_refused`, where a parser's own words of several lines are part of the message."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("tale-ray: ")
    assert "Traceback" not in outcome.err
    for each in words:
        assert each in outcome.err


def without(folder: Path, source: Path, *names: str) -> Path:
    """A copy of a model's folder without some files."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in names:
            (folder / path.name).symlink_to(path)
    return folder


def test_model_folders(material: Material, tmp_path: Path) -> None:
    def refused(folder: Path, *words: str) -> None:
        assert_refused(material.search(tmp_path / "run", "--model", folder), *words)
        assert not (tmp_path / "run").exists()

    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    refused(without(tmp_path / "a", material.model, *tokenizer), "has no tokenizer", "copy the tokenizer's files")
    refused(without(tmp_path / "b", material.model, "model.safetensors"), "has no weights")
    refused(without(tmp_path / "c", material.model, "config.json"), "has no config.json")
    encoder = without(tmp_path / "d", material.model, "config.json")
    fields = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 6}
    (encoder / "config.json").write_text(json.dumps(fields))
    refused(encoder, "BertForMaskedLM", "only decoder models", "choose another model")
    broken = without(tmp_path / "e", material.model, "config.json")
    (broken / "config.json").write_text("{")
    refused(broken, "config.json is not JSON", "copy the checkpoint again")
    refused(material.model / "config.json", "is a file", "give the folder")


def test_model_and_task_have_to_be_named(material: Material) -> None:
    assert_refused(command("search", "--local", "--task", material.task), "model is missing: name it with --model")
    assert_refused(command("search", "--local", "--model", material.model), "task is missing: name it with --task")
    assert_refused(command("evaluate", "--local", "--model", material.model), "task is missing")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "5"}, "rows '5' is not a whole number"),
        ({"workers": 1.5}, "workers 1.5 is not a whole number"),
        ({"local": "yes"}, "local 'yes' is not true or false"),
        ({"remove": 5}, "remove 5 is not a list of layers"),
        ({"keep_layers": [None]}, "keep layers: layer None is not a whole number"),
        ({"splits": 1}, "splits 1 are no shares by name"),
        ({"model": 7}, "model 7 is not a text"),
        ({"time_limit": float("inf")}, "time limit inf is too large"),
    ],
)
def test_types_in_python(material: Material, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tale_ray.search(**{"model": material.model, "task": material.task, "local": True, **options})


CONFIG_FILES = {
    "epsilom: 0.1": ("option 'epsilom' is not known (did you mean epsilon?)", "max_removed"),
    "config: other.yaml": ("option 'config' is not known",),
    "max-removed: 3": ("option 'max-removed' is not known (did you mean max_removed?)",),
    "[1, 2]": ("is not a mapping", "one `option: value` a line"),
    "": ("is not a mapping",),
    "epsilon: 2": ("epsilon '2' is out of range",),
    "rows: many": ("'many' is not a valid int",),
    "rows: 2.5": ("option rows is 2.5", "a whole number"),
    "seed: true": ("option seed is True", "a whole number"),
    "exhaustive: 'no'": ("option exhaustive is 'no'", "true or false"),
    "local: 1": ("option local is 1", "true or false"),
    "revision: 1.10": ("option revision is 1.1", "a text", "quotes"),
    "run: yes": ("option run is True", "a text", "quotes"),
    "task: [boolq, arc_easy]": ("option task is ['boolq', 'arc_easy']", "a text"),
    "dtype: {a: b}": ("option dtype is {'a': 'b'}", "a text"),
    "epsilon: true": ("option epsilon is True", "a text or a number"),
    "batch_bytes: [1, 2]": ("option batch_bytes is [1, 2]", "a text or a number"),
    "remove: 2.5": ("option remove is 2.5", "a list of layers"),
    "splits: [0.5, 0.5]": ("option splits is [0.5, 0.5]", "a text or shares by name"),
    "splits: {search: 0.5, train: 0.5}": ("'train=0.5' is not NAME=SHARE", "shots, search, select"),
    "remove: {3: 7}": ("option remove is {3: 7}", "a list of layers"),
    "remove: [1, 1]": ("remove 1,1: a layer is named twice",),
    "\xff\xfe": ("cannot be read",),
}


@pytest.mark.parametrize("text", CONFIG_FILES)
def test_config_files(material: Material, tmp_path: Path, text: str) -> None:
    (tmp_path / "options.yaml").write_bytes(text.encode("latin-1"))
    options = [option for option in material.arguments(tmp_path / "run") if option not in ("--epsilon", "0.1")]
    assert_refused(command(*options, "--config", tmp_path / "options.yaml"), *CONFIG_FILES[text])
    assert not (tmp_path / "run").exists()


def test_run_folders_that_cannot_be_used(material: Material, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        for dry in ([], ["--dry-run"]):
            assert_refused(material.search(run, *dry), str(run))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for dry in ([], ["--dry-run"]):
        outcome = material.search(other, *dry)
        assert_refused(outcome, "is not a run folder: it holds thesis.tex", "choose another --run")
    assert_refused(material.search(other, "--resume", "never"), "is not empty and --resume never", "another --run")
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    assert_refused(material.search("gopher://host/run"), "cannot be reached")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_run_folder_without_permission(material: Material, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for dry in ([], ["--dry-run"]):
        assert_refused(material.search(locked / "run", *dry), "cannot be written", "change its permissions")


@pytest.mark.parametrize("name", ["show", "resume", "evaluate"])
def test_what_is_no_run(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        arguments = ["evaluate", "--run", folder] if name == "evaluate" else [name, folder]
        assert_refused(
            command(*arguments), f"{str(folder)!r} is not a run: run.json is missing there", "check the path"
        )
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("run", ["~nosuchuser/run", "a\0b", "\udcff", "s3://a\0b", "x" * 300])
@pytest.mark.parametrize("name", ["show", "resume", "evaluate"])
def test_addresses_that_no_run_can_have(name: str, run: str) -> None:
    arguments = ["evaluate", "--run", run] if name == "evaluate" else [name, run]
    assert_refused(command(*arguments), "cannot be re", "check the path" if len(run) == 300 else "choose another --run")


def test_evaluations(material: Material) -> None:
    model = ("evaluate", "--local", "--model", material.model, "--task", material.task)
    assert_refused(command(*model, "--pick", "best"), "pick 'best' is a result of a run: name the run")
    assert_refused(command(*model, "--remove", "6"), "layer 6 cannot be removed")
    assert_refused(command(*model, "--split", "shots"), "'shots' is not one of 'search', 'select', 'test', 'all'")
    assert_refused(
        command(*model, "--splits", "search=1", "--split", "test"),
        "split test of task tiny is empty",
        "give it a share with --splits",
    )


def test_tasks() -> None:
    assert_refused(command("tasks", "show", "boolk"), "task 'boolk' is not known")


def test_commands() -> None:
    assert_refused(command("serch"), "No such command 'serch'")
    assert command().code == 2
    assert command("--help").code == command("search", "-h").code == command("--version").code == 0
