"""Job files: what they may say, what is refused before any cluster is asked, and the command that they become."""

import shlex
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from folders import command

from tale_ray.api import make_config
from tale_ray.cli import cli
from tale_ray.config import SearchConfig
from tale_ray.credentials import is_secret_name, is_secret_value
from tale_ray.errors import ConfigError
from tale_ray.job_file import EXCLUDES, Job, read_job_file

JOBS = Path(__file__).resolve().parent.parent / "jobs"
SEARCH = {"model": "bundled", "task": "boolean_synthetic", "run": "/shared/runs/one"}


def job(**changes: Any) -> Job:
    return Job(**{"search": SEARCH, **changes})


def searching(**options: Any) -> Job:
    return job(search={**SEARCH, **options})


def write(folder: Path, values: Any) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def searched(entrypoint: str) -> SearchConfig:
    """The configuration that the command line makes of an entrypoint."""
    python, dash_m, package, search, *arguments = shlex.split(entrypoint)
    assert (python, dash_m, package, search) == ("python", "-m", "tale_ray", "search")
    search_command = cli.commands["search"]
    context = click.Context(search_command, parent=click.Context(cli, **cli.context_settings))  # as on the command line
    search_command.parse_args(context, list(arguments))
    options = {name: value for name, value in context.params.items() if value is not None}
    for name in ("dry_run", "log_json", "seeds"):  # not about the search itself
        options.pop(name, None)
    return make_config(**options)


# What a job file becomes.


def test_the_command_asks_for_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("TALE_RAY_DATA_ROOT", raising=False)
    options: dict[str, Any] = {
        "rows": 40,
        "epsilon": 0.05,
        "splits": {"search": 0.5, "test": "0.25"},
        "remove": [3, 7],
        "keep_layers": "0,1",
        "exhaustive": True,
        "trust_remote_code": False,
        "time_limit": "2h",
        "batch_bytes": "1GiB",
        "workers": 2,
        "gpus_per_worker": None,
    }
    described = searching(**options)
    given = {name: value for name, value in options.items() if value is not None}
    assert searched(described.entrypoint) == make_config(**SEARCH, **given)


def test_what_is_in_a_path_is_not_read_by_the_shell() -> None:
    described = job(search={**SEARCH, "task": "/data/my task; rm -rf $HOME.yaml"})
    assert "'--task=/data/my task; rm -rf $HOME.yaml'" in described.entrypoint
    assert searched(described.entrypoint).task.task == "/data/my task; rm -rf $HOME.yaml"


def test_a_study_is_a_job_too() -> None:
    assert "--seeds=0,1,2" in searching(seeds=[0, 1, 2]).entrypoint
    assert "--seeds=0,1" in searching(seeds="0,1").entrypoint


def test_a_job_may_log_json() -> None:
    assert "--log-json" in shlex.split(searching(log_json=True).entrypoint)
    assert "--log-json" not in searching(log_json=False).entrypoint
    with pytest.raises(ConfigError, match="log_json 'yes' is not true or false"):
        searching(log_json="yes")


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("/shared/runs/arc", "arc"),
        ("/shared/runs/arc/", "arc"),
        ("s3://bucket/runs/arc-1?region=eu-west-1&endpoint_override=http://h/x", "arc-1"),
    ],
)
def test_submissions_are_named_after_the_run(run: str, name: str) -> None:
    described = searching(run=run)
    assert described.name == name
    assert described.run == run


def test_a_stopped_job_has_time_to_store_what_it_has() -> None:
    assert job().sent_runtime_env == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    own = job(runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "5", "HF_HOME": "/hf"}})
    assert own.sent_runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "5", "HF_HOME": "/hf"}


def test_folders_are_beside_the_file_and_weights_stay_at_home(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    (tmp_path / "code").mkdir()
    kept = ["task.yaml", "tale_ray/model/bundled/model.safetensors", "tale_ray/cli.py", "deep/runs/kept.py"]
    left = [".git/HEAD", "runs/r/run.json", "weights/model.safetensors", "pytorch_model.bin", "x.gguf", "private/a"]
    for name in (*kept, *left):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text("x")
    runtime_env = {"working_dir": "code", "excludes": ["/private/"]}
    described = read_job_file(write(tmp_path, {"search": SEARCH, "runtime_env": runtime_env}))
    sent = described.sent_runtime_env
    assert sent["working_dir"] == str(tmp_path / "code")
    assert sent["excludes"] == [*EXCLUDES, "/private/"]
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.zip"
        create_package(sent["working_dir"], package, include_gitignore=True, excludes=sent["excludes"])
        names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert names == set(kept)


def test_an_archive_may_be_anywhere(tmp_path: Path) -> None:
    runtime_env = {"working_dir": "s3://bucket/code.zip", "py_modules": ["gs://bucket/more.zip"]}
    described = read_job_file(write(tmp_path, {"search": SEARCH, "runtime_env": runtime_env}))
    assert described.runtime_env == runtime_env


# What is refused.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1], "the job is not a mapping"),
        ({}, "search is missing"),
        ({"search": SEARCH, "atempts": 3}, r"key 'atempts' of the job is not known \(did you mean attempts\?\)"),
        ({"search": SEARCH, "runtime_env": {"conda": "x"}}, "key 'conda' of runtime_env is not known: write one of"),
        ({"search": SEARCH, "runtime_env": {"env_vars": {"A": 1}}}, "env_vars is .*write numbers in quotes"),
        ({"search": SEARCH, "runtime_env": {"working_dir": "nowhere"}}, "'nowhere' of runtime_env does not exist"),
        ({"search": SEARCH, "attempts": True}, "attempts is True: it is a whole number"),
        ({"search": SEARCH, "attempts": 0}, "attempts 0 is out of range"),
        ({"search": {**SEARCH, "resume": "never"}, "attempts": 2}, "attempts 2 and resume 'never' exclude each other"),
        ({"search": SEARCH, "entrypoint_num_cpus": -1}, "entrypoint_num_cpus -1 is too small"),
        ({"search": SEARCH, "metadata": {"year": 2025}}, "metadata is .*write numbers in quotes"),
        ({"search": {**SEARCH, "rows": "many"}}, "rows 'many' is not a whole number"),
        ({"search": {**SEARCH, "row": 3}}, "option 'row' is not known"),
        ({"search": {**SEARCH, "seeds": [0], "seed": 1}}, "seed 1 and seeds .* exclude each other"),
        ({"search": {**SEARCH, "address": "auto"}}, "search has address: leave it out; the job runs on the cluster"),
        ({"search": {**SEARCH, "local": True}}, "search has local: leave it out"),
        ({"search": {**SEARCH, "dry_run": True}}, "search has dry_run: leave it out; use `tale-ray submit JOB"),
        ({"search": {"model": "bundled", "task": "boolean_synthetic"}}, "search has no run: name a folder or URI"),
        ({"search": {**SEARCH, "run": "runs/x"}}, "run 'runs/x' is relative, and would be lost"),
        ({"search": {**SEARCH, "run": "~/x"}}, "run '~/x' is relative"),
        ({"search": {**SEARCH, "run": "/shared/a b"}}, "ends in 'a b', which names the job"),
        ({"search": {**SEARCH, "run": "/shared/.."}}, r"ends in '\.\.', which names the job"),
        ({"search": {**SEARCH, "run": "/"}}, "ends in '', which names the job"),
    ],
)
def test_what_a_job_cannot_be_is_refused(tmp_path: Path, values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"job file .*job.yaml: .*{words}"):
        read_job_file(write(tmp_path, values))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    for name in ("broken.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=f"job file .*{name} cannot be read"):
            read_job_file(str(tmp_path / name))


SECRET = "hf_" + "AbCdEfGhIjKlMnOp"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"runtime_env": {"env_vars": {"HF_TOKEN": "x"}}}, "runtime_env.env_vars.HF_TOKEN"),
        ({"runtime_env": {"env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}}}, "runtime_env.env_vars.AWS_SECRET_ACCESS_KEY"),
        ({"runtime_env": {"env_vars": {"GREETING": SECRET}}}, "runtime_env.env_vars.GREETING"),
        ({"runtime_env": {"pip": ["https://me:wonder@host/simple/p.whl"]}}, "runtime_env.pip"),
        ({"metadata": {"password": "x"}}, "metadata.password"),
        ({"metadata": {"note": f"use {SECRET}"}}, "metadata.note"),
        ({"search": {**SEARCH, "run": "s3://user:wonder@bucket/a run"}}, "search.run"),
    ],
)
def test_secrets_are_refused_and_not_repeated(values: Any, name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        job(**values)
    message = str(refused.value)
    assert message.startswith(f"{name} looks like a secret")
    assert "environment of the nodes or in a token file" in message
    assert SECRET not in message
    assert "wonder" not in message


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "apiKey", "API_KEY", "APIKEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "clientSecret", "RAY_AUTH_TOKEN"],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "RAY_AUTH_MODE", "OMP_NUM_THREADS", "KEYBOARD", "MONKEY", "MAX_TOKENS"],
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


def test_forms_of_secrets() -> None:
    assert is_secret_value("AKIA" + "A1" * 8)
    assert is_secret_value("-----BEGIN RSA PRIVATE KEY-----")
    assert not is_secret_value("hf_transfer")
    assert not is_secret_value("meta-llama/Llama-3.1-8B-Instruct")
    assert not is_secret_value("s3://bucket/runs/one?region=eu")


def test_a_switch_is_no_secret() -> None:
    described = job(runtime_env={"env_vars": {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}})
    assert described.runtime_env["env_vars"]["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"


# The files to copy from.


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_to_copy_from_are_valid(path: Path) -> None:
    described = read_job_file(str(path))
    config = searched(described.entrypoint)
    assert config.storage.run == described.run
    assert config.resources.address is None or config.resources.address != "auto"
    outcome = command("submit", path, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(described.entrypoint + "\n")


def test_there_is_one_for_each_size() -> None:
    gpus = {path.stem: read_job_file(str(path)).search.get("gpus_per_worker", 0) for path in JOBS.glob("*.yaml")}
    assert gpus == {"bundled": 0, "llama-3.1-8b-1gpu": 1, "llama-3.1-70b-4gpus": 4}


# The commands, as far as they need no cluster.


def test_an_address_is_that_of_a_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    path = write(tmp_path, {"search": SEARCH})
    missing = command("submit", path)
    assert (missing.code, missing.out) == (2, "")
    assert "address is missing" in missing.err
    wrong = command("status", "one-a1", "--address", "127.0.0.1:6379")
    assert wrong.code == 2
    assert "write http://HOST:8265" in wrong.err


def test_nobody_at_the_address_is_said_in_seconds() -> None:
    nobody = command("status", "one-a1", "--address", "http://127.0.0.1:1")
    assert nobody.code == 2
    assert "no Ray dashboard answers at http://127.0.0.1:1" in nobody.err


def test_more_attempts_need_somebody_who_waits(tmp_path: Path) -> None:
    outcome = command("submit", write(tmp_path, {"search": SEARCH}), "--attempts", 3, "--address", "http://127.0.0.1:1")
    assert outcome.code == 2
    assert "add --wait or --follow" in outcome.err
