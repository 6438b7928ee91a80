"""A result of a run as a checkpoint with its model card, on disk or at the hub: complete or absent."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from filelock import FileLock, Timeout

from tale_ray.attempt.evaluate import pruned_round
from tale_ray.config import ModelSection, SearchConfig
from tale_ray.errors import ConfigError, TaleRayError
from tale_ray.model.digest import check_model, model_folder
from tale_ray.records import Round
from tale_ray.results.held_out import compare_sheets, comparison_json
from tale_ray.results.model_card import MERGEKIT_FILE, PRUNE_FILE, CardFacts, mergekit_text, model_card, prune_text
from tale_ray.results.summary import summarize
from tale_ray.store.layout import round_scope
from tale_ray.store.reader import RunReader

ExportDType: TypeAlias = Literal["checkpoint", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written, and where."""

    folder: Path
    round: int
    removed: tuple[int, ...]  # in the order of their removal
    num_layers: int  # of the full model
    dtype: str
    num_parameters: int
    num_bytes: int  # of all files
    code_files: tuple[str, ...]
    pushed: str | None  # the hub's id


def run_export(
    run: str,
    out: str | os.PathLike[str],
    *,
    pick: str = "best",
    model: str | None = None,
    dtype: ExportDType = "checkpoint",
    base_model: str | None = None,
    push_to_hub: str | None = None,
) -> Exported:
    """Write a result of a run, finished or not, as a checkpoint that plain transformers loads.

    Args:
        run: its folder or URI.
        out: a folder that is empty or absent; it is complete or absent, whatever happens.
        pick: best, bsba, final, selected, or the number of a committed round.
        model: where the run's model lies now.
        dtype: of the weights; `checkpoint` is the one that they are stored in.
        base_model: the model's id at the hub, for the card, where a folder was searched.
        push_to_hub: id of a repository to upload to; it is made, private, if there is none.

    Raises:
        UsageError: there is no such run or result, it removes nothing, its model is gone or another one, or `out`
            cannot be written.
        TaleRayError: `out` is written, but was not uploaded.
    """
    for repository in (base_model, push_to_hub):
        _check_id(repository)
    place = _checked_place(Path(out))
    reader = RunReader(run)
    manifest = reader.manifest()
    config = SearchConfig.from_json(manifest.config)
    picked = pruned_round(reader, pick, "use the model as it is, or")
    section = found_model(config.model, model, reader.uri)
    with becoming(place) as folder:
        from tale_ray.model.export import write_checkpoint  # torch is wanted in this process only now

        written = write_checkpoint(section, picked.removed, folder, digest=manifest.model["digest"], dtype=dtype)
        known = base_model or hub_id(config.model, section)
        name = known or Path(section.model).name
        facts = CardFacts(
            summary=summarize(reader),
            config=config,
            pick=pick,
            round=picked.number,
            model=name,
            base_model=known,
            digest=manifest.model["digest"],
            searched_dtype=manifest.model["dtype"],
            dtype=written.dtype,
            num_parameters=written.num_parameters,
            full_parameters=written.full_parameters,
            search_comparison=_search_comparison(reader, picked),
            versions=manifest.versions,
            license=written.license,
            code_files=written.code_files,
            notes=written.notes,
        )
        texts = {
            "README.md": model_card(facts),
            MERGEKIT_FILE: mergekit_text(name, picked.removed, written.num_layers, written.dtype),
            PRUNE_FILE: prune_text(picked.removed),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    exported = Exported(
        folder=place,
        round=picked.number,
        removed=picked.removed,
        num_layers=written.num_layers,
        dtype=written.dtype,
        num_parameters=written.num_parameters,
        num_bytes=num_bytes,
        code_files=written.code_files,
        pushed=None,
    )
    return exported if push_to_hub is None else replace(exported, pushed=push(place, push_to_hub))


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a repository of the hub, which is made, private, if there is none; return its id.

    Raises:
        TaleRayError: the hub is out of reach, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo_id = str(api.create_repo(repository, private=True, exist_ok=True).repo_id)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Layers removed by tale-ray")
    except Exception as error:  # whatever the hub's client raises: the folder is complete
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise TaleRayError(
            f"{folder} is complete, but it was not uploaded to {repository} ({type(error).__name__}: {first}): log in "
            f"with `hf auth login`, then `hf upload {repository} {folder}`"
        ) from error
    return repo_id


def found_model(section: ModelSection, model: str | None, run: str) -> ModelSection:
    """Return where a run's model lies: where it was, or in the folder `model`.

    Raises:
        ConfigError: it is not there any more.
        ModelError: what is there is no model.
    """
    found = section if model is None else replace(section, model=os.fspath(model))
    if model is None and Path(found.model).is_absolute() and model_folder(found.model) is None:
        raise ConfigError(f"the model of {run} is no longer at {found.model}: say with --model where it is now")
    check_model(found)
    return found


def _check_id(repository: str | None) -> None:
    if repository is None:
        return
    from huggingface_hub.errors import HFValidationError  # most commands need nothing of the hub
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public, but not said so

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no id of the hub ({error}): write it as OWNER/NAME") from None


def hub_id(searched: ModelSection, section: ModelSection) -> str | None:
    """Return the hub's id of a model: as it was given, or told by its folder in the hub's cache."""
    for model in (searched.model, section.model):
        if model != "bundled" and not Path(model).is_absolute() and model_folder(model) is None:
            return model
        for part in Path(model).parts:
            if part.startswith("models--"):
                return part.removeprefix("models--").replace("--", "/")
    return None


def _search_comparison(reader: RunReader, picked: Round) -> dict[str, object] | None:
    """Return how the round compares with the full model on the search rows, if their answers are stored."""
    full, cut = (reader.answers(round_scope(number)) for number in (0, picked.number))
    comparison = compare_sheets(cut, full)
    return None if comparison is None else comparison_json(comparison)


def _checked_place(out: Path) -> Path:
    """Return the absolute path of a folder to be.

    Raises:
        ConfigError: there is something else already, or no folder can be there.
    """
    if "://" in str(out) or ":/" in str(out):
        raise ConfigError(f"{out} is no local folder, and models are loaded from those: give one, and copy it")
    try:
        place = out.expanduser().resolve()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(f"{out} is there and is no empty folder: give another one, or empty it")
    except (OSError, RuntimeError) as error:  # RuntimeError: the ~ of nobody
        raise ConfigError(f"{out} cannot be a folder ({error}): give another one") from None
    return place


@contextlib.contextmanager
def becoming(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside `place` that becomes it when the block ends well, and is deleted when it does not.

    What a killed process left is deleted by the next one.

    Raises:
        ConfigError: another process writes there, or it cannot be written.
    """
    folder, lock = (place.with_name(f".{place.name}.{end}") for end in ("export", "export-lock"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir()
                yield folder
                folder.replace(place)
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # there only if something was raised
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ConfigError(f"{place} is being written by another process: wait for it, or give another one") from None
    except OSError as error:
        raise ConfigError(f"{place} cannot be written ({error}): make room, or give another folder") from error
