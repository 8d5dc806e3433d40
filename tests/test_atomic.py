from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow.atomic import atomic_write
from fastflow.errors import UserError


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_follows_a_link(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    link.symlink_to(path)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and path.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_file_mode_is_the_usual_one(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "a") as temporary:
        temporary.touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_no_folder(tmp_path):
    path = tmp_path / "no" / "a.txt"
    with pytest.raises(UserError, match=r"a\.txt: cannot write"), atomic_write(path) as temporary:
        temporary.write_text("new")


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        (tmp_path / "other").read_text()


def write_text(path: Path) -> None:
    path.write_text("x" * 200_000)


def write_numpy(path: Path) -> None:
    np.savez(path, a=np.zeros(50_000))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("a", "w") as file:
        file.write(bytes(200_000))


def write_safetensors(path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file({"a": torch.zeros(50_000)}, path)


@pytest.fixture
def nearly_full_disk():
    """A limit on the size of files makes real writes fail as a full disk does, at a place of the writer's choosing."""
    resource = pytest.importorskip("resource")
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))


@pytest.mark.parametrize("write", [write_text, write_numpy, write_zip, write_safetensors])
def test_full_disk(tmp_path, nearly_full_disk, write):
    path = tmp_path / "a.npz"
    path.write_text("old")
    with pytest.raises(UserError, match=r"a\.npz.*disk is full.*old file is intact"), atomic_write(path) as temporary:
        write(temporary)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_checkpoints_may_be_read_by_whom_other_files_may(tmp_path):
    """safetensors makes files for their owner alone."""
    from safetensors.torch import save_file

    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.zeros(2)}, temporary)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "a.safetensors")]
    assert modes[0] == modes[1]
