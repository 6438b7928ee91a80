"""`tale-ray export`: a folder that is complete or absent, and a refusal with a remedy where there can be none."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from families import tiny_prompts
from filelock import FileLock
from folders import NUM_LAYERS, Material, Outcome, command, show
from folders import material_fixture as material_fixture
from oracles import next_logits, rebuild

import tale_ray
import tale_ray.model.export
from tale_ray.errors import ConfigError, ModelError, TaleRayError

FILES = {
    *("README.md", "config.json", "generation_config.json", "mergekit.yaml", "model.safetensors", "prune-layers.txt"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module", name="run")
def run_fixture(material: Material) -> Path:
    """A finished run whose final result has lost layers."""
    run = material.folder / "searched"
    outcome = material.search(run)
    assert outcome.code == 0, outcome.err
    return run


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refused(outcome: Outcome, *words: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert "Traceback" not in outcome.err
    for each in words:
        assert each in outcome.err, outcome.err


def test_a_result_becomes_a_checkpoint(run: Path, material: Material, tmp_path: Path) -> None:
    final = show(run)["final"]
    outcome = command("export", run, tmp_path / "out", "--pick", "final")
    assert outcome.code == 0, outcome.err
    assert names(tmp_path / "out") == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    assert f"{NUM_LAYERS - len(final['removed'])} of {NUM_LAYERS} layers" in outcome.out
    assert str(tmp_path / "out") in outcome.out
    full = tf.AutoModelForCausalLM.from_pretrained(material.model)
    cut, rebuilt = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), rebuild(full, final["removed"])
    for prompt in tiny_prompts(3):
        torch.testing.assert_close(next_logits(cut, prompt), next_logits(rebuilt, prompt), atol=1e-6, rtol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    test = show(run)["test"]["final"]
    assert f"{test['correct']}/{test['total']}" in card
    assert f"{final['correct']}/{final['total']}" in card
    assert json.loads((run / "run.json").read_text())["model"]["digest"] in card
    assert (tmp_path / "out" / "prune-layers.txt").read_text() == ",".join(map(str, sorted(final["removed"]))) + "\n"
    for name in ("README.md", "config.json", "mergekit.yaml"):
        assert str(material.folder) not in (tmp_path / "out" / name).read_text(), "no path of this machine"


@pytest.mark.parametrize("pick", ["best", "bsba", "selected", "1"])
def test_every_pick_is_the_round_that_show_names(
    run: Path, tmp_path: Path, pick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = show(run)
    expected = summary["rounds"][0] if pick == "1" else summary[pick]
    outcome = command("export", run, tmp_path / "out", "--pick", pick)
    if not expected["removed"]:
        refused(outcome, "is round 0, the full model", "pick another round with --pick")
    else:
        layers = json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"]
        assert layers == NUM_LAYERS - len(expected["removed"])


def test_the_python_api_does_the_same(run: Path, tmp_path: Path) -> None:
    folder = tale_ray.open_run(run).export(tmp_path / "out", pick=1, dtype="bfloat16", base_model="org/model")
    assert folder == tmp_path / "out"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "base_model: org/model" in (folder / "README.md").read_text()
    assert "model: org/model" in (folder / "mergekit.yaml").read_text()
    with pytest.raises(ConfigError, match="is no empty folder"):
        tale_ray.open_run(run).export(folder, pick=1)


def test_an_empty_folder_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert command("export", run, tmp_path / "out", "--pick", "1").code == 0
    assert names(tmp_path / "out") == FILES


def test_a_run_that_has_not_ended_is_exported_and_says_so(run: Path, tmp_path: Path) -> None:
    begun = Path(shutil.copytree(run, tmp_path / "begun"))
    last = sorted((begun / "rounds").iterdir())[-1]
    last.unlink()  # the rejected one
    shutil.rmtree(begun / "results")
    assert show(begun)["state"] == "interrupted"
    assert command("export", begun, tmp_path / "out", "--pick", "final").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**The search had not ended** when this was exported (it was interrupted" in card
    assert "not scored on test rows" in card
    refused(command("export", begun, tmp_path / "other", "--pick", "selected"), "has no selected round")


def test_a_moved_model_is_named(run: Path, material: Material, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = json.loads((moved / "run.json").read_text())
    manifest["config"]["model"]["model"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(manifest))
    out = tmp_path / "out"
    refused(command("export", moved, out, "--pick", "1"), f"no longer at {tmp_path / 'gone'}", "--model")
    refused(command("export", moved, out, "--pick", "1", "--model", material.other_model), "is not the one", "SHA-256")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing is left"
    assert command("export", moved, out, "--pick", "1", "--model", material.model).code == 0


def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_checkpoint(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tale_ray.model.export, "write_checkpoint", write_checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = tmp_path / "out"
    refused(command("export", run, tmp_path / "full"), "is no empty folder", "give another one, or empty it")
    refused(command("export", run, tmp_path / "full" / "file"), "is no empty folder")
    refused(command("export", run, tmp_path / "full" / "file" / "out", "--pick", "1"), "cannot be")
    refused(command("export", run, "s3://bucket/out"), "is no local folder")
    refused(command("export", run, "~nosuchuser/out"), "cannot be a folder")
    refused(command("export", tmp_path / "nothing", out), "is not a run")
    refused(command("export", run, out, "--pick", "0"), "is round 0, the full model, from which nothing is removed")
    refused(command("export", run, out, "--pick", "99"), "pick '99' is not a result of", "a round from 0 to")
    refused(command("export", run, out, "--pick", "wrst"), "choose best, bsba, final, selected, or a round")
    refused(command("export", run, out, "--push-to-hub", "a/b/c"), "'a/b/c' is no id of the hub", "OWNER/NAME")
    refused(command("export", run, out, "--base-model", "a b"), "'a b' is no id of the hub")
    refused(command("export", run, out, "--dtype", "int4"), "'int4' is not one of")
    refused(command("export", run, out, "--pick", "1", "--model", tmp_path / "no"), "does not exist")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_what_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_card(_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tale_ray.attempt.export.model_card", model_card)
    refused(command("export", run, tmp_path / "out", "--pick", "1"), "cannot be written", "No space left on device")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import tale_ray.attempt.export as export
export.prune_text = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # all but the last file is there
export.run_export(sys.argv[1], sys.argv[2], pick="1")
"""


def test_a_kill_leaves_nothing_half_done_and_the_next_export_tidies_up(run: Path, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, run, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.export" / "model.safetensors").exists()
    assert command("export", run, tmp_path / "out", "--pick", "1").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert names(tmp_path / "out") == FILES


def test_two_exports_to_one_place_do_not_mix(run: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.export-lock"):
        refused(command("export", run, tmp_path / "out", "--pick", "1"), "is being written by another process")


class Hub:
    """Stands in for huggingface_hub.HfApi: notes what it is asked."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if Hub.error is not None:
            raise Hub.error
        Hub.asked.append(("create", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, **options: Any) -> None:
        Hub.asked.append(("upload", {**options, "names": names(Path(options["folder_path"]))}))


def test_it_is_uploaded_only_if_that_is_asked_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    assert command("export", run, tmp_path / "quiet", "--pick", "1").code == 0
    assert Hub.asked == []
    outcome = command("export", run, tmp_path / "out", "--pick", "1", "--push-to-hub", "cut")
    assert outcome.code == 0
    assert "uploaded to me/cut" in outcome.out
    (create, made), (upload, sent) = Hub.asked
    assert (create, upload) == ("create", "upload")
    assert made == {"repo_id": "cut", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"], sent["names"]) == ("me/cut", tmp_path / "out", FILES)


def test_a_hub_that_refuses_leaves_the_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "error", ValueError("401 Unauthorized\nmore"))
    outcome = command("export", run, tmp_path / "out", "--pick", "1", "--push-to-hub", "me/cut")
    assert outcome.code == 1
    assert "is complete, but it was not uploaded to me/cut (ValueError: 401 Unauthorized)" in outcome.err
    assert f"hf upload me/cut {tmp_path / 'out'}" in outcome.err
    assert names(tmp_path / "out") == FILES
    with pytest.raises(TaleRayError, match="not uploaded"):
        tale_ray.open_run(run).export(tmp_path / "again", 1, push_to_hub="me/cut")


def test_a_model_of_the_hub_is_named_by_its_id(run: Path, material: Material, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--tiny-llama" / "snapshots" / "0123"
    shutil.copytree(material.model, cache)
    assert command("export", run, tmp_path / "out", "--pick", "1", "--model", cache).code == 0
    assert "base_model: org/tiny-llama\n" in (tmp_path / "out" / "README.md").read_text()


def test_other_errors_keep_their_words(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_checkpoint(*_: Any, **__: Any) -> None:
        raise ModelError("the model is odd: choose another one")

    monkeypatch.setattr(tale_ray.model.export, "write_checkpoint", write_checkpoint)
    refused(command("export", run, tmp_path / "out", "--pick", "1"), "the model is odd: choose another one")
    assert list(tmp_path.iterdir()) == []
