"""`tale-ray doctor`: what it finds, what it advises, and that it comes to an end where nothing answers."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from folders import Material, command
from folders import material_fixture as material_fixture

from tale_ray.attempt import doctor
from tale_ray.attempt.doctor import Check, check_cluster, check_storage
from tale_ray.cluster.machine import installed_versions, parse_gpus

ANSWER = {
    "nodes": [{"address": "10.0.0.1", "resources": {"CPU": 8.0}}],
    "resources": {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**33},
    "free": {"CPU": 6.0, "GPU": 2.0},
    "versions": installed_versions(),
    "gpus": [{"name": "H100", "total_mib": 81920, "used_mib": 1024}],
}
MOST_SECONDS = 20.0


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_machine_without_problems(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    asked = ("--run", run, "--model", material.model, "--task", material.task)
    outcome = command("doctor", *asked)
    assert outcome.code == 0, outcome.out
    assert [line.split()[:2] for line in outcome.out.splitlines()] == [
        ["ok", each] for each in ("versions:", "cluster:", "storage:", "lease:", "model:", "data:")
    ]
    assert "100 rows" in outcome.out
    assert not run.exists(), "nothing is left behind"
    found = command("doctor", *asked, "--json").json
    assert [check["ok"] for check in found] == [True] * 6
    assert found[0].keys() == {"name", "found", "remedy", "ok"}


def test_problems_have_remedies_and_exit_code_1(material: Material, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = ("--run", tmp_path / "file" / "run", "--model", tmp_path / "nowhere", "--task", tmp_path / "none.yaml")
    outcome = command("doctor", *asked)
    assert outcome.code == 1
    found = {check["name"]: check for check in command("doctor", *asked, "--json").json}
    for name in ("storage", "model", "data"):
        assert not found[name]["ok"]
        assert found[name]["remedy"]
    assert outcome.out.count("problem ") == outcome.out.count("\n        -> ") == 3


def test_what_a_run_folder_holds_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert all(check.is_ok for check in check_storage(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("_")] == ["run.json"]
    assert not list(tmp_path.glob("_tmp-*"))


def test_a_cluster_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = by_name(check_cluster("head:6379", ANSWER))
    assert all(check.is_ok for check in found.values())
    assert found["resources"].found == "8 CPU (6 free), 2 GPU (2 free), 8.0 GiB of memory"
    assert found["GPU 0"].found == "H100, 80 GiB, 79 GiB free"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=token" in str(by_name(check_cluster("head:6379", ANSWER))["authentication"].remedy)


def test_problems_of_a_cluster_are_told() -> None:
    others = {**installed_versions(), "torch": "1.0", "tale-ray": None}
    answer = {**ANSWER, "versions": others, "resources": {}, "gpus": [{**ANSWER["gpus"][0], "used_mib": 70000}]}  # type: ignore[index]
    found = by_name(check_cluster("head:6379", answer))
    assert "torch 1.0 (here" in found["cluster versions"].found
    assert "tale-ray missing" in found["cluster versions"].found
    for name in ("cluster versions", "resources", "GPU 0"):
        assert found[name].remedy
    untold = {name: value for name, value in ANSWER.items() if name not in ("versions", "gpus")}
    assert "could not tell" in by_name(check_cluster("head:6379", untold))["cluster versions"].found


def test_a_refused_token_is_explained() -> None:
    error = "the Ray cluster at head:6379 asks for a token, and RAY_AUTH_TOKEN ... does not hold the right one"
    (check,) = check_cluster("head:6379", {"error": error})
    assert (check.name, check.is_ok) == ("authentication", False)
    assert "401" in check.found
    assert "RAY_AUTH_TOKEN" in str(check.remedy)


def test_gpus_are_read_from_nvidia_smi() -> None:
    assert parse_gpus("NVIDIA H100, 81559, 4\nNVIDIA GB10, [N/A], [N/A]\n") == [
        {"name": "NVIDIA H100", "total_mib": 81559, "used_mib": 4}
    ]


def test_it_ends_where_nothing_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that takes connections and says nothing, for the cluster; storage that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(doctor, "CLUSTER_SECONDS", 6.0)
        monkeypatch.setattr(doctor, "STORAGE_SECONDS", 1.0)
        end = threading.Event()
        with mock.patch.object(doctor, "check_storage", side_effect=lambda run: [end.wait()]):
            started = time.monotonic()
            outcome = command("doctor", "--address", address, "--run", tmp_path / "run")
        end.set()
    assert time.monotonic() - started < MOST_SECONDS
    assert outcome.code == 1
    assert "problem address: " in outcome.out
    assert "did not answer within 1 s" in outcome.out


@pytest.mark.ray
def test_a_real_cluster_is_examined(ray_address: str, tmp_path: Path) -> None:
    """As a command, with the token, without one, and with a wrong one."""

    def diagnose(**environment: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "tale_ray", "doctor", "--address", ray_address, "--json"],
            env={**os.environ, "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout, done.stderr
        return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}

    code, found = diagnose()
    assert code == 0, found
    assert found["authentication"]["found"] == "the cluster takes our token"
    assert found["cluster versions"]["found"] == "the same as here"
    assert found["address"]["found"] == f"{ray_address} answers, 1 node"
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        code, found = diagnose(**wrong)
        assert code == 1
        assert "refuses our token (401)" in found["authentication"]["found"]
