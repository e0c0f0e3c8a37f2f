"""Data sets of the Hugging Face hub as files of records: hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from opsd.utils.errors import UserError, said

FORMS = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class HubPlace:
    """A split of a data set. config: a word that its files' paths also contain, or ""; revision: a commit."""

    name: str
    config: str
    split: str
    revision: str | None = None

    @classmethod
    def of(cls, place: str) -> HubPlace | None:
        """The split that `place` names; None if it does not start with hub:. Raises UserError for a malformed one."""
        if not place.startswith("hub:"):
            return None
        found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?:([\w.-]+)(?:@([\w./-]+))?", place)
        if not found:
            raise UserError(f"{place}: give hub:OWNER/NAME:SPLIT, or hub:OWNER/NAME:CONFIG:SPLIT")
        return cls(found[1], found[2] or "", found[3], found[4])

    def files(self) -> list[Path]:
        """The split's files, downloaded or cached, sorted by name. Raises UserError."""
        from huggingface_hub import snapshot_download

        patterns = [f"*{self.split}*{form}" for form in FORMS]
        which = {"repo_type": "dataset", "revision": self.revision, "allow_patterns": patterns}
        with said(f"dataset {self.name} cannot be fetched from the hub", "look at its name, or download it"):
            folder = Path(snapshot_download(self.name, **which))
        for form in FORMS:
            names = [file.relative_to(folder) for file in folder.rglob(f"*{form}")]
            if found := sorted(name for name in names if self._is_ours(name)):
                return [folder / name for name in found]
        raise UserError(
            f"dataset {self.name} has no {', '.join(FORMS)} file of a split {self.split!r}; download one and name it"
        )

    def pinned(self) -> str:
        """The same place with the commit that is its newest now."""
        commit = next(parent.name for parent in self.files()[0].parents if parent.parent.name == "snapshots")
        return f"hub:{self.name}:{f'{self.config}:' if self.config else ''}{self.split}@{commit}"

    def _is_ours(self, name: Path) -> bool:
        """Whether a file's path contains the split, and the configuration if there is one, as whole words."""
        held = [word for word in (self.split, self.config) if word]
        return all(re.search(rf"(?<![^/._-]){re.escape(word)}(?![^/._-])", str(name)) for word in held)


def pin(place: str) -> str:
    """A place on the hub with its commit; any other path unchanged. Raises UserError if it cannot be fetched."""
    found = HubPlace.of(place)
    return place if found is None else found.pinned()
