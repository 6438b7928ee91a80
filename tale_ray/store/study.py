"""A study in a folder: what it is, and where the run of each seed lies. The runs are ordinary ones."""

import re
from collections.abc import Sequence

from tale_ray.errors import StoreError
from tale_ray.store.documents import STUDY, StudyManifest, dump_json, load_study
from tale_ray.store.files import Files

SEED_FOLDER = re.compile(r"seed-(?P<seed>-?\d+)")


class StudyFolder:
    """The study at a folder or URI.

    Raises:
        StoreError: nothing can reach the address; from every method: something cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._files = Files(uri)

    @property
    def uri(self) -> str:
        """Where the study is, without credentials: for people, not for opening it again."""
        return self._files.shown

    def run(self, seed: int) -> str:
        """Return where the run of a seed is, to open it."""
        return seed_uri(self._uri, seed)

    def exists(self) -> bool:
        """Return whether a study has begun here."""
        return any(entry.name == STUDY for entry in self._files.list())

    def manifest(self) -> StudyManifest:
        """Return what the study is.

        Raises:
            StoreError: it is missing, damaged, or written by a newer version.
        """
        data = self._files.read(STUDY)
        if data is None:
            raise StoreError(
                f"{self.uri!r} is not a study: {STUDY} is missing there; check the path, or start a search"
            )
        return load_study(data, self._files.path(STUDY))

    def check(self, seeds: Sequence[int], resume: str) -> None:
        """Refuse a folder that `--resume` does not allow, that holds another study, or what is not a study.

        Raises:
            StoreError: names the folder, the rule and the remedy.
        """
        names = [entry.name for entry in self._files.list() if not entry.ignored]
        foreign = [name for name in names if name != STUDY and SEED_FOLDER.fullmatch(name) is None]
        if foreign:
            raise StoreError(f"{self.uri!r} is not the folder of a study: it holds {foreign[0]}; choose another --run")
        if resume == "never" and names:
            raise StoreError(f"{self.uri} is not empty and --resume never asks for a new study: choose another --run")
        if STUDY in names:
            stored = self.manifest().seeds
            if stored != list(seeds):
                raise StoreError(
                    f"{self.uri} holds a study of the seeds {_text(stored)}, asked for are {_text(seeds)}: choose "
                    f"another --run, or ask for --seeds {_text(stored)}"
                )
        elif resume == "must":
            raise StoreError(f"{self.uri} holds no study to go on with: check the path, or leave out --resume must")

    def write(self, manifest: StudyManifest) -> None:
        """Store what the study is, replacing what was there.

        Raises:
            StorageAway: the storage failed again and again.
        """
        self._files.write(STUDY, dump_json(manifest))


def seed_uri(study: str, seed: int) -> str:
    """Return where the run of a seed is in a study, by folder or URI."""
    folder, mark, options = study.partition("?") if "://" in study else (study, "", "")
    return f"{folder.rstrip('/')}/seed-{seed}{mark}{options}"


def _text(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds))
