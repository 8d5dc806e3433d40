"""The working folder of an unfinished collection: one file per episode, which a later run picks up where it was
left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastflow.atomic import atomic_write
from fastflow.errors import UserError

__all__ = ["Parts", "write_json"]

_SETTINGS = "settings.json"


class Parts:
    """Episodes collected so far.

    Args:
        folder: where they are; made if absent.
        settings: what determines every episode, apart from its split and number. JSON-able.
        restart: start anew if the folder holds episodes of other settings.

    Raises:
        UserError: the folder holds episodes of other settings and `restart` is False, or it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, restart: bool) -> None:
        self._folder = folder
        path = folder / _SETTINGS
        found = _read_json(path)
        if found != settings and folder.exists():
            if not restart and found is not None:
                old, new = _flat(found), _flat(settings)
                different = [
                    f"{k} ({old.get(k)}, now {new.get(k)})" for k in sorted(old | new) if old.get(k) != new.get(k)
                ]
                raise UserError(
                    f"{folder} holds an unfinished collection with another {', '.join(different)}; "
                    "finish it with its own settings, or pass --overwrite to start anew"
                )
            shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot make this folder ({error.strerror})") from error
        if not path.exists():
            write_json(path, settings)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from collecting into the same folder, where the system has file locks.

        Raises:
            UserError: another process holds the lock.
        """
        try:
            import fcntl
        except ImportError:
            yield
            return
        with open(self._folder / _SETTINGS, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self._folder}: another process is collecting this dataset") from error
            except OSError:
                # Some network file systems have no locks; then it is up to the user.
                pass
            yield

    def has(self, split: str, episode: int, num_rows: int) -> bool:
        """Whether an episode is here, complete and readable."""
        try:
            rows = self._read(split, episode)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            # Absent, or cut short by a power failure: it is collected again.
            return False
        return bool(rows) and all(len(array) == num_rows for array in rows.values())

    def write(self, split: str, episode: int, rows: dict[str, np.ndarray]) -> None:
        """Adds an episode.

        Raises:
            UserError: the disk is full; the episodes before are kept.
        """
        # Not flushed one by one: what a power failure cuts short is collected again.
        with atomic_write(self._path(split, episode), sync=False) as temporary:
            np.savez(temporary, **rows)  # type: ignore[arg-type]

    def join(self, split: str, num_episodes: int, path: Path) -> None:
        """Writes the first `num_episodes` episodes of a split as one compressed npz, in constant memory.

        The same episodes give the same bytes.

        Raises:
            UserError: the disk is full; `path` is what it was.
        """
        keys = {key: array.dtype for key, array in self._read(split, 0).items()}
        with (
            atomic_write(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive,
        ):
            for key, dtype in keys.items():
                shape = self._shape(split, num_episodes, key)
                # A fixed date, as numpy.savez writes.
                member = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                member.compress_type = zipfile.ZIP_DEFLATED
                member.external_attr = 0o600 << 16
                with archive.open(member, "w", force_zip64=True) as file:
                    header = io.BytesIO()
                    np.lib.format.write_array_header_1_0(
                        header,
                        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
                    )
                    file.write(header.getvalue())
                    for i in range(num_episodes):
                        with np.load(self._path(split, i), allow_pickle=False) as part:
                            file.write(np.ascontiguousarray(part[key]).data.cast("B"))

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder)

    def _shape(self, split: str, num_episodes: int, key: str) -> tuple[int, ...]:
        num_rows = 0
        rest: tuple[int, ...] = ()
        for i in range(num_episodes):
            # The header alone is read.
            with zipfile.ZipFile(self._path(split, i)) as part, part.open(f"{key}.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, _ = np.lib.format.read_array_header_1_0(file)
                num_rows, rest = num_rows + shape[0], shape[1:]
        return (num_rows, *rest)

    def _path(self, split: str, episode: int) -> Path:
        return self._folder / f"{split}-{episode:06d}.npz"

    def _read(self, split: str, episode: int) -> dict[str, np.ndarray]:
        # Opened here, because numpy leaves it open if it is damaged.
        with open(self._path(split, episode), "rb") as file, np.load(file, allow_pickle=False) as part:
            return {key: part[key] for key in part.files}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of the inner dictionary beside the others."""
    inner = [value for value in settings.values() if isinstance(value, dict)]
    return {k: v for part in (settings, *inner) for k, v in part.items() if not isinstance(v, dict)}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes `content` as readable JSON, in one step."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
