"""The file of a job: which search runs on a cluster, how often it may be resubmitted, and what it needs there.

Everything in it is checked before any cluster is asked. Does not know how a job is submitted.

    search:                        options of `tale-ray search`, as in its --config file
      model: bundled
      task: boolean_synthetic
      run: /shared/runs/boolean    a folder or URI that every node sees
    attempts: 3                    times that `submit --wait` submits it; default 1
    runtime_env:                   what Ray gives to the job's processes
      working_dir: .               relative to this file, like py_modules
      env_vars: {HF_HOME: /shared/hf}
    entrypoint_num_cpus: 0         reserved for the driver, which computes nothing
    metadata: {team: language}     shown on the dashboard
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tale_ray.annotations import fits
from tale_ray.api import make_config
from tale_ray.credentials import find_secrets
from tale_ray.errors import ConfigError
from tale_ray.option_texts import check_seeds, parse_seeds, splits_text
from tale_ray.paths import existing

MAX_ATTEMPTS = 1000
STOP_SECONDS = 60  # between SIGTERM and SIGKILL when a job is stopped; Ray's own 3 s may be too few to write a file
EXCLUDES = (  # never sent with a working_dir
    ".git/",
    ".venv/",
    "__pycache__/",
    "/runs/",
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"),
    "!tale_ray/model/bundled/*",  # but for our own
)

_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_PLACES = {
    "address": "the job runs on the cluster that it is submitted to",
    "local": "the job runs on the workers of the cluster",
    "config": "write its options here",
    "dry_run": "use `tale-ray submit JOB --dry-run`",
}
_SECTIONS: Mapping[str, tuple[Any, str]] = {
    "search": (Mapping[str, Any], "options of `tale-ray search`, one `option: value` a line"),
    "attempts": (int, "a whole number"),
    "runtime_env": (Mapping[str, Any], "a mapping"),
    "entrypoint_num_cpus": (float, "a number of CPUs"),
    "metadata": (Mapping[str, str], "texts by name; write numbers in quotes"),
}
_RUNTIME_ENV: Mapping[str, tuple[Any, str]] = {
    "working_dir": (str, "a folder, or the URI of an archive"),
    "py_modules": (list[str], "a list of folders"),
    "pip": (list[str], "a list of requirements"),
    "excludes": (list[str], "a list of patterns, as in .gitignore"),
    "env_vars": (Mapping[str, str], "texts by name; write numbers in quotes"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One search to be run as a job."""

    search: Mapping[str, Any]
    attempts: int = 1
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    entrypoint_num_cpus: float = 0
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("search", self.search), ("runtime_env", self.runtime_env), ("metadata", self.metadata)):
            for secret in find_secrets(value, name):
                raise ConfigError(
                    f"{secret} looks like a secret, and whoever reaches the dashboard can read it: leave it out, and "
                    "set it in the environment of the nodes or in a token file there (for the hub: "
                    "~/.cache/huggingface/token, or the file that HF_TOKEN_PATH names)"
                )
        _check_search(self.search)
        if not 1 <= self.attempts <= MAX_ATTEMPTS:
            raise ConfigError(f"attempts {self.attempts} is out of range: give 1 to {MAX_ATTEMPTS}")
        if self.attempts > 1 and self.search.get("resume") == "never":
            raise ConfigError(f"attempts {self.attempts} and resume 'never' exclude each other: leave one out")
        if not self.entrypoint_num_cpus >= 0:
            raise ConfigError(f"entrypoint_num_cpus {self.entrypoint_num_cpus} is too small: 0 reserves nothing")

    @property
    def run(self) -> str:
        """The folder or URI of the run."""
        return str(self.search["run"])

    @property
    def name(self) -> str:
        """What the ids of its submissions begin with: the last part of the run's folder."""
        return _last_part(self.run)

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs, quoted for a shell."""
        return shlex.join(["python", "-m", "tale_ray", "search", *_arguments(self.search)])

    @property
    def sent_runtime_env(self) -> dict[str, Any]:
        """The runtime environment with what every job of ours has."""
        given = dict(self.runtime_env)
        sent = {**given, "env_vars": {_STOP_VARIABLE: str(STOP_SECONDS), **given.get("env_vars", {})}}
        if "working_dir" in given or "py_modules" in given:
            sent["excludes"] = [*EXCLUDES, *given.get("excludes", ())]
        return sent


def read_job_file(path: str) -> Job:
    """Return the job that a file describes; folders in it are looked for beside it.

    Raises:
        ConfigError: it cannot be read, has an unknown key, or a value breaks a rule.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"job file {path} cannot be read: {error}; it is YAML in UTF-8") from error
    try:
        values = _checked(values, _SECTIONS, "the job")
        if "search" not in values:
            raise ConfigError("search is missing: it holds the options of `tale-ray search`, its run among them")
        if "runtime_env" in values:
            values["runtime_env"] = _located(_checked(values["runtime_env"], _RUNTIME_ENV, "runtime_env"), path)
        return Job(**values)
    except ConfigError as error:
        raise ConfigError(f"job file {path}: {error}") from error


def _checked(values: Any, known: Mapping[str, tuple[Any, str]], where: str) -> dict[str, Any]:
    """Return the entries of a mapping that have a value, each of a known name and kind."""
    if not fits(values, Mapping[str, Any]):
        raise ConfigError(f"{where} is not a mapping: write one `key: value` a line")
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"key {key!r} of {where} is not known{f' (did you mean {close[0]}?)' if close else ''}: "
                f"write one of {', '.join(known)}"
            )
        kind, words = known[key]
        if value is not None and not fits(value, kind):
            raise ConfigError(f"{key} is {value!r}: it is {words}; correct it")
    return {key: value for key, value in values.items() if value is not None}


def _located(runtime_env: dict[str, Any], path: str) -> dict[str, Any]:
    """Return a runtime environment whose folders are absolute.

    Raises:
        ConfigError: there is no such folder or file.
    """

    def locate(text: str) -> str:
        if "://" in text:
            return text
        found = existing(str(Path(path).absolute().parent / Path(text).expanduser()), Path.exists)
        if found is None:
            raise ConfigError(f"{text!r} of runtime_env does not exist beside the job file: correct the path")
        return str(found.resolve())

    located = dict(runtime_env)
    if "working_dir" in located:
        located["working_dir"] = locate(located["working_dir"])
    if "py_modules" in located:
        located["py_modules"] = [locate(module) for module in located["py_modules"]]
    return located


def _check_search(options: Mapping[str, Any]) -> None:
    """Refuse options that `tale-ray search` would refuse, or that have no sense in a job."""
    for name, remedy in _PLACES.items():
        if options.get(name):
            raise ConfigError(f"search has {name}: leave it out; {remedy}")
    values = {name: value for name, value in options.items() if value is not None and name not in _PLACES}
    if not isinstance(values.pop("log_json", False), bool):
        raise ConfigError(f"log_json {options['log_json']!r} is not true or false: write one")
    seeds = values.pop("seeds", None)
    if seeds is not None:
        check_seeds(parse_seeds(",".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)))
        if "seed" in values:
            raise ConfigError(f"seed {values['seed']!r} and seeds {seeds!r} exclude each other: leave one out")
    run = make_config(**values).storage.run
    if run is None:
        raise ConfigError("search has no run: name a folder or URI that every node sees, such as /shared/runs/NAME")
    if "://" not in run and not run.startswith("/"):
        raise ConfigError(
            f"run {run!r} is relative, and would be lost with the job's working folder: "
            "write an absolute path, or a URI, that every node sees"
        )
    name = _last_part(run)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"run {run!r} ends in {name!r}, which names the job: end it in letters, digits, '.', '_' and '-', "
            "at most 80, the first a letter or digit"
        )


def _last_part(run: str) -> str:
    """Return the name of a run's folder; the options of a URI are none of it."""
    place = run.partition("?")[0] if "://" in run else run
    return place.rstrip("/").rpartition("/")[2]


def _arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield options as they are written on the command line; `--run` is always among them."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, Mapping):
            yield f"{option}={splits_text(value)}"
        elif isinstance(value, list | tuple):
            yield f"{option}={','.join(map(str, value))}"
        elif value is not None and value is not False:
            yield f"{option}={value}"
