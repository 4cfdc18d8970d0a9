"""What was asked of a journal: `journal.json`, and `journal_2.json`, `journal_3.json`, … of sweeps that grew it.

Each file is one request: the identity of a sweep and its axes. None is ever replaced; of two processes that write the
same one the first wins. All requests of a journal agree on everything but how much is measured, so that what one of
them measured counts for the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rlvr_landscape_analysis.schema import JOURNAL_FILE, numbered

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import JsonObject, digest, publish
from rlvr_landscape_plugin.store.cells import Extent

Agrees = Callable[[JsonObject], Extent]
"""The extent of an earlier request. Raises `StoreError` where it measured something else than is asked for now."""

GREW_FROM = "grew_from"
"""Key of a later request: the earlier ones, so that a lost file is written again."""
AXES = "axes"
"""Key of a request beside its identity. The axes are written out: a configuration does not say which coordinates it
became."""


class Requests:
    """The requests of one journal, with the present one among them or, as long as nothing was measured for it, after
    them."""

    def __init__(self, root: Path, asked: JsonObject, extent: Extent, agrees: Agrees | None) -> None:
        """Reads them; writes the first one. Raises `StoreError` where `asked` does not agree with one of them."""
        self._root, self._agrees = root, agrees
        self._asked: JsonObject = json.loads(json.dumps(asked))
        self._extent = extent
        self.earlier: list[JsonObject] = []
        self.extents: list[Extent] = []
        """Of each earlier request, and of the present one if it is the last."""
        self._restore()
        self._read()
        if not self.earlier:
            self.register()

    @property
    def number(self) -> int:
        """Of the present request, from 1."""
        return next((n for n, request in enumerate(self.earlier, 1) if self._is_ours(request)), len(self.earlier) + 1)

    @property
    def axes(self) -> list[dict[str, list[object]]]:
        """Those of every request, in order."""
        return [request[AXES] for request in self.everything]

    @property
    def everything(self) -> list[JsonObject]:
        """Every request, the present one included."""
        return self.earlier if self.registered else [*self.earlier, self._asked]

    @property
    def registered(self) -> bool:
        """Whether the present request is written down."""
        return any(map(self._is_ours, self.earlier))

    def _is_ours(self, request: JsonObject) -> bool:
        return not differences(request, self._asked)

    @property
    def first(self) -> Extent:
        """How much the first request asked for."""
        return self.extents[0] if self.extents else self._extent

    def identities(self) -> set[str]:
        """The digests that files of this journal may carry; reads the requests again."""
        self._read()
        return {digest({key: value for key, value in r.items() if key != AXES}) for r in self.everything}

    def register(self) -> None:
        """Write the present request down, if it is not yet."""
        while not self.registered:
            self._write(len(self.earlier) + 1, self._asked | ({GREW_FROM: self.earlier} if self.earlier else {}))
            self._read()

    def _write(self, number: int, request: JsonObject) -> None:
        text = json.dumps(request, indent=1, sort_keys=True)
        publish(self._file(number), lambda scratch: scratch.write_text(text))

    def _restore(self) -> None:
        """Write earlier requests again whose files are gone."""
        last = max((int(path.stem.rpartition("_")[2]) for path in self._root.glob("journal_[0-9]*.json")), default=1)
        if last > 1 and not all(self._file(number).exists() for number in range(1, last)):
            for number, request in enumerate(_load(self._file(last)).get(GREW_FROM, []), 1):
                self._write(number, request | ({GREW_FROM: []} if number > 1 else {}))

    def _file(self, number: int) -> Path:
        return self._root / numbered(JOURNAL_FILE, number)

    def _read(self) -> None:
        while (path := self._file(len(self.earlier) + 1)).exists():
            request = {key: value for key, value in _load(path).items() if key != GREW_FROM}
            extent = self._extent
            if not self._is_ours(request):
                if self._agrees is None:
                    refuse(path, request, self._asked)
                else:
                    extent = self._agrees(request)
            self.earlier.append(request)
            self.extents.append(extent)


def _load(path: Path) -> JsonObject:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(
            f"{path} is not readable JSON ({error}); move it away and run the same command again "
            "(every file here says by itself which sweep it belongs to)"
        ) from error


def refuse(path: Path, there: JsonObject, asked: JsonObject) -> None:
    """Raise `StoreError` naming every key in which two requests differ; returns where there is none."""
    if found := differences(there, asked):
        listed = "\n".join(f"  {key}: {old!r} there, {new!r} asked for" for key, old, new in found)
        raise StoreError(
            f"{path.parent} holds a sweep of another configuration; choose another output directory, or go back to "
            f"what its {path.name} says:\n{listed}"
        )


def differences(old: object, new: object, prefix: str = "") -> list[tuple[str, object, object]]:
    """(key, old value, new value) for each value of two JSON objects that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [found for key in keys for found in differences(old.get(key), new.get(key), f"{prefix}.{key}")]
    return [] if old == new else [(prefix.lstrip("."), old, new)]
