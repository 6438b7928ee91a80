"""Nothing secret is stored or said, nothing stored is run, and what a run trusts is written down."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from folders import Material, Outcome, command
from folders import material_fixture as material_fixture
from places import LocalPlace, Place, S3Place
from s3_server import S3Server

import tale_ray
from tale_ray.attempt.search import run_name
from tale_ray.store.documents import NAME

HF_TOKEN = "hf_" + "Qw3rTy" * 5
PASSWORD = "s3cr3tPassw0rd"
ACCESS_KEY = "AKIAPRETENDED12345678"
ENVIRONMENT = {"HF_TOKEN": HF_TOKEN, "WANDB_API_KEY": "w4nd8" * 8}
SECRETS = (HF_TOKEN, ENVIRONMENT["WANDB_API_KEY"], PASSWORD, ACCESS_KEY)

PACKAGE = Path(tale_ray.__file__).parent
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def stored_text(place: Place, folder: Path) -> dict[str, str]:
    """What every file of a run says; Parquet files uncompressed, with their metadata."""
    found = {}
    for name in place.names():
        data = place.read(name)
        if name.endswith(".parquet"):
            path = folder / "table.parquet"
            path.write_bytes(data)
            table = pq.read_table(path)
            found[name] = f"{table.schema.metadata} {table.to_pylist()}"
        else:
            found[name] = data.decode()
    return found


def leaks(texts: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, secret) for name, text in texts.items() for secret in SECRETS if secret in text]


def run_command(*arguments: Any, **environment: str) -> Outcome:
    """Call `tale-ray` as a process of its own, with secrets in its environment."""
    line = [sys.executable, "-m", "tale_ray", *map(str, arguments)]
    done = subprocess.run(
        line, env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--log-json",)], ids=["plain", "json"])
def test_a_search_on_s3_says_and_stores_nothing_secret(
    material: Material, s3_server: S3Server, tmp_path: Path, more: tuple[str, ...]
) -> None:
    place = S3Place(s3_server, f"{tmp_path.name}/run")
    uri = place.uri.replace("s3://", f"s3://{ACCESS_KEY}:{PASSWORD}@")
    searched = run_command(*material.arguments(uri, "--max-removed", "1"), *more)
    assert searched.code == 0, searched.err
    texts = stored_text(place, tmp_path)
    assert {"run.json", "attempts/attempt-0001.json", "rounds/round-0001.parquet"} <= texts.keys()
    resumed = run_command("resume", uri, "--max-removed", "2", *more)
    assert resumed.code == 0, resumed.err
    said = {
        "search": searched.out + searched.err,
        "resume": resumed.out + resumed.err,
        "show": (shown := run_command("show", uri)).out + shown.err,
        "doctor": (examined := run_command("doctor", "--run", uri)).out + examined.err,
        "refused": (refused := run_command("show", uri.replace("/run?", "/other?"))).out + refused.err,
    }
    assert leaks(texts | stored_text(place, tmp_path) | said) == []
    assert refused.code == 2


def test_a_local_search_stores_nothing_of_its_environment(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    searched = run_command(*material.arguments(run, "--max-removed", "1"))
    assert searched.code == 0, searched.err
    texts = stored_text(LocalPlace(run), tmp_path)
    assert leaks({**texts, "out": searched.out, "err": searched.err}) == []


def test_an_error_with_an_address_in_it_says_nothing_secret(material: Material) -> None:
    for uri in (f"nowhere://{ACCESS_KEY}:{PASSWORD}@host/run", f"s3://bucket/run?secret_key={PASSWORD}&no_option=1"):
        outcome = material.search(uri)
        assert outcome.code == 2
        assert leaks({"err": outcome.err, "out": outcome.out}) == []


def test_trust_in_code_of_a_model_is_asked_for_and_recorded(material: Material, tmp_path: Path) -> None:
    def trusted(run: Path) -> bool:
        value: bool = json.loads((run / "run.json").read_text())["config"]["model"]["trust_remote_code"]
        return value

    assert material.search(tmp_path / "plain", "--max-removed", "0").code == 0
    assert not trusted(tmp_path / "plain")
    assert command(*material.arguments(tmp_path / "trusting", "--max-removed", "0"), "--trust-remote-code").code == 0
    assert trusted(tmp_path / "trusting")


def test_nothing_that_is_stored_can_run_code() -> None:
    """No module reads pickles: storage may be written by others."""
    imported: dict[str, set[str]] = {}
    calls = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                names = set()
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "numpy.load", "np.load"):
                    calls.append(f"{path.name}: {ast.unparse(node)}")
            imported.setdefault(path.name, set()).update(names)
    assert {name: found & UNSAFE for name, found in imported.items() if found & UNSAFE} == {}
    assert calls == []


@pytest.mark.parametrize("task", ["lm-eval:arc/easy", "../../etc", "a b\n;rm -rf ~", "täsk", "..", "-x"])
def test_a_run_is_named_by_safe_characters(task: str) -> None:
    class Prepared:
        class spec:  # noqa: N801
            name = task

    name = run_name(Prepared, {"model": "x"})  # type: ignore[arg-type]
    assert NAME.fullmatch(name), name
    assert re.fullmatch(r"[A-Za-z0-9._-]+-[0-9a-f]{12}", name)
