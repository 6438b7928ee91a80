"""Training in several processes of Ray Train."""

import contextlib
from pathlib import Path

import pytest
import torch
from folders import Material
from folders import material_fixture as material_fixture
from test_ray import workers_of_this_session
from tuned import adapters, tune

from tale_ray.cluster.nodes import Nodes
from tale_ray.cluster.train import check_room
from tale_ray.config import ResourceSection
from tale_ray.errors import InfeasibleError
from tale_ray.tuning.checkpoint import read_progress
from tale_ray.tuning.records import Progress


@pytest.mark.parametrize(
    ("workers", "cpus", "is_elastic", "fits"),
    [(2, 2, False, True), (3, 2, False, False), (6, 1, False, True), (7, 1, False, False), (3, 2, True, True)],
)
def test_all_processes_have_to_fit_node_by_node(
    monkeypatch: pytest.MonkeyPatch, workers: int, cpus: int, is_elastic: bool, fits: bool
) -> None:
    """Two nodes of 3 CPUs hold two processes of 2 CPUs, though the cluster has 6."""
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 3.0}} for name in "ab"]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("tale_ray.cluster.train.has_autoscaler", lambda: is_elastic)
    monkeypatch.setattr("tale_ray.cluster.train.describe_cluster", lambda: "the cluster has 6 CPUs")
    resources = ResourceSection(workers=workers, cpus_per_worker=cpus)
    with contextlib.nullcontext() if fits else pytest.raises(InfeasibleError, match="ask for fewer --workers"):
        check_room(resources, Nodes(sees_drains=False))


@pytest.mark.ray
@pytest.mark.timeout(600)  # Ray Train imports a lot, in four processes
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # Ray's own, in this process
def test_two_workers_of_ray_train_come_to_what_one_process_does_though_one_is_killed(
    material: Material, tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--dropout", 0, "--json", "--steps", 300, "--eval-every", 100, "--patience", 0)
    alone = tune(material, tmp_path / "alone", *given)
    assert alone.code == 0, alone.err
    killed: list[int] = []
    names: list[str] = []

    def kill_one(folder: Path) -> Progress | None:
        progress = read_progress(folder)
        if progress is not None and 50 <= progress.step < 250 and not killed:
            victim = workers_of_this_session("ray::RayTrainWorker")[-1]
            victim.kill()
            killed.append(progress.step)
            names.extend(path.name for path in (folder / "ray").iterdir() if path.is_dir())
        return progress

    monkeypatch.setattr("tale_ray.tuning.checkpoint.read_progress", kill_one)
    arguments = (*given, "--workers", 2, "--address", ray_address)
    together = tune(material, tmp_path / "together", *arguments)
    assert together.code == 0, together.err
    assert len(killed) == 1, "the training was long enough to be disturbed"
    assert together.json["digest"] == alone.json["digest"]
    assert names == [f"tale-ray-finetune-{alone.json['digest'][:16]}"], "Ray Train goes on with what has this name"
    assert together.json["workers"] == 2
    assert together.json["losses"] == pytest.approx(alone.json["losses"], abs=1e-4)
    assert together.json["kept_step"] == alone.json["kept_step"]
    one, other = adapters(tmp_path / "alone"), adapters(tmp_path / "together")
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-3), name
    again = tune(material, tmp_path / "together", *arguments)
    assert again.json == together.json
