"""Offline datasets as tensors on one device, and the files that they come from.

Two kinds of npz file are read. A *raw* file, as OGBench publishes and `fastflow collect` makes, holds trajectories
without rewards: OGBench's own loader turns it into transitions for one task, which needs its simulator. A *transitions*
file, written by `save_transitions`, holds the result and needs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import http.client
import os
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow.atomic import atomic_write
from fastflow.collect.recipes import recipe_for
from fastflow.envs import DATASET_DIR, check_name, dataset_name, import_ogbench, is_published, make_env
from fastflow.errors import MissingExtra, UserError

__all__ = ["BEHAVIOUR_KEYS", "KEYS", "MIRROR", "Dataset", "load_dataset", "returns_to_go", "save_transitions"]

KEYS = ("observations", "actions", "next_observations", "rewards", "masks", "terminals")
"""What a batch and a dataset hold."""
BEHAVIOUR_KEYS = ("next_actions", "returns")
"""What they may hold besides, see `Dataset.with_behaviour`."""
MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets"
"""A copy of OGBench's datasets, for when their host is down."""

_VECTORS = ("observations", "actions", "next_observations", "next_actions")
# tanh-squashed policies have infinite density at exactly +-1; the FQL family of codes clips its datasets like this.
ACTION_LIMIT = 1.0 - 1e-5
_ACTION_SLACK = 1e-3
_DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 16  # rows
_WRITE_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC))
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """N transitions on one device.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: a key is missing or unknown, or shapes or devices disagree.
    """

    name: str
    """The environment's name."""
    tensors: dict[str, Tensor]
    """float32: observations [N, O], actions [N, A] inside (-1, 1), next_observations [N, O], rewards [N], masks [N]
    (0 where
    the value of the next state must not be used: the task is solved), terminals [N] (1 at the end of a trajectory);
    where they were asked for, next_actions [N, A] and returns [N]."""

    def __post_init__(self) -> None:
        if set(self.tensors) - set(BEHAVIOUR_KEYS) != set(KEYS):
            raise ValueError(f"tensors: expected the keys {', '.join(KEYS)}, got {', '.join(sorted(self.tensors))}")
        observations, actions = self.tensors["observations"], self.tensors["actions"]
        for key, tensor in self.tensors.items():
            if tensor.dtype != torch.float32:
                raise TypeError(f"tensors[{key!r}]: expected float32, got {tensor.dtype}")
            if key in _VECTORS and tensor.ndim != 2:
                raise ValueError(f"tensors[{key!r}]: expected [N, dim], got {list(tensor.shape)}")
            width = (
                actions.shape[1:]
                if key in ("actions", "next_actions")
                else observations.shape[1:]
                if key in _VECTORS
                else ()
            )
            expected = [observations.shape[0], *width]
            if list(tensor.shape) != expected:
                raise ValueError(f"tensors[{key!r}]: expected {expected}, got {list(tensor.shape)}")
            if tensor.device != observations.device:
                raise ValueError(f"tensors[{key!r}]: expected device {observations.device}, got {tensor.device}")

    def __len__(self) -> int:
        return self.tensors["observations"].shape[0]

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, {len(self)} transitions, observations {self.obs_dim}, actions {self.action_dim}, "
            f"{self.nbytes / 2**20:.1f} MiB on {self.device})"
        )

    @property
    def obs_dim(self) -> int:
        return self.tensors["observations"].shape[1]

    @property
    def action_dim(self) -> int:
        return self.tensors["actions"].shape[1]

    @property
    def device(self) -> torch.device:
        return self.tensors["observations"].device

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws transitions uniformly with replacement, on the dataset's device and without waiting for it.

        Args:
            batch_size: B, zero or more.
            generator: on the same device as the dataset.

        Returns:
            A dictionary of float32 tensors with the dataset's keys and leading dimension B.

        Raises:
            ValueError: `batch_size` is negative, `generator` is on another device, or the dataset is empty.
        """
        if batch_size < 0:
            raise ValueError(f"batch_size: expected zero or more, got {batch_size}")
        if generator.device.type != self.device.type:
            raise ValueError(f"generator: expected one on {self.device}, got one on {generator.device}")
        if batch_size and not len(self):
            raise ValueError("sample: the dataset is empty")
        index = torch.randint(max(len(self), 1), (batch_size,), generator=generator, device=self.device)
        return {key: tensor.index_select(0, index) for key, tensor in self.tensors.items()}

    def with_behaviour(self, keys: Sequence[str], discount: float) -> Dataset:
        """The dataset with what followed its transitions; itself if `keys` is empty.

        Args:
            keys: of `BEHAVIOUR_KEYS`. next_actions: the action of the next row; a trajectory's last row, whose next
                action nobody kept, has its own again. returns: see `returns_to_go`.
            discount: of the returns.

        Raises:
            ValueError: an unknown key.
        """
        unknown = set(keys) - set(BEHAVIOUR_KEYS)
        if unknown:
            raise ValueError(f"keys: expected some of {', '.join(BEHAVIOUR_KEYS)}, got {', '.join(sorted(unknown))}")
        if not keys:
            return self
        own, more = self.tensors, {}
        if "next_actions" in keys:
            following = own["actions"].roll(-1, 0)
            more["next_actions"] = torch.where(own["terminals"].bool().unsqueeze(-1), own["actions"], following)
        if "returns" in keys:
            rewards, masks, terminals = (own[key].double().cpu().numpy() for key in ("rewards", "masks", "terminals"))
            returns = returns_to_go(rewards, masks, terminals, discount)
            more["returns"] = torch.from_numpy(returns).float().to(self.device)
        return Dataset(self.name, own | more)

    def to(self, device: str | torch.device) -> Dataset:
        """The dataset on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        return Dataset(self.name, {key: tensor.to(device) for key, tensor in self.tensors.items()})


def returns_to_go(rewards: np.ndarray, masks: np.ndarray, terminals: np.ndarray, discount: float) -> np.ndarray:
    """Discounted returns G_i = r_i + discount m_i G_(i+1) of the rows of trajectories one behind the other.

    Where a trajectory ends though its task goes on (m = 1), its last reward is taken to go on for ever.

    Args:
        rewards, masks: [N]; masks are 0 where the task is solved. terminals: [N], 1 in a trajectory's last row.

    Returns:
        [N] float64.
    """
    returns = np.empty(len(rewards))
    following = 0.0
    for i in range(len(rewards) - 1, -1, -1):
        if terminals[i]:
            following = rewards[i] / (1 - discount)
        following = returns[i] = rewards[i] + discount * masks[i] * following
    return returns


def load_dataset(
    name: str,
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    dataset_path: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Dataset, Dataset | None]:
    """Loads the training and the validation data of an environment.

    Without `dataset_path`, the files are `<dataset_dir>/<dataset>.npz` and `<dataset>-val.npz`, downloaded by OGBench
    if absent. Everything is checked before it is used: keys, types, shapes, finite values, and that the file belongs
    to the environment. Actions are clipped to +-(1 - 1e-5).

    Args:
        name: an OGBench singletask name or one of fastflow's `pointmaze-arena-*` (`fastflow.envs.known_names()`).
        dataset_dir: folder of the datasets. Default: OGBench's own, ~/.ogbench/data.
        dataset_path: a raw npz with its `-val.npz` beside it, or a transitions npz (`save_transitions`), whose
            validation file is optional and which needs no simulator.
        device: where the tensors go.

    Returns:
        (training data, validation data or None if a transitions file has none).

    Raises:
        UserError: unknown name; absent, truncated or wrong file (the message names file and key); no network; no such
            device.
        MissingExtra: a raw file, and the "rl" extra is not installed.
    """
    check_name(name)
    device = _checked_device(device)
    if dataset_path is None:
        folder = Path(DATASET_DIR if dataset_dir is None else dataset_dir).expanduser()
        path = folder / f"{dataset_name(name)}.npz"
        if not (path.is_file() and _val_path(path).is_file()):
            _download(name, folder)
    elif dataset_dir is not None:
        raise UserError("give either a dataset folder or a dataset file, not both")
    else:
        path = Path(dataset_path).expanduser()
        if path.suffix != ".npz":
            raise UserError(f"{path}: expected a file whose name ends in .npz")
        if not path.is_file():
            raise UserError(f"{path}: no such file")

    val_path = _val_path(path)
    if _is_transitions(path):
        train = _load_transitions(name, path)
        val = _load_transitions(name, val_path) if val_path.is_file() else None
        if val is not None and (val.obs_dim, val.action_dim) != (train.obs_dim, train.action_dim):
            raise UserError(f"{val_path}: {val!r} does not fit {path}: {train!r}")
    else:
        if not val_path.is_file():
            raise UserError(f"{val_path}: no such file; OGBench's loader needs the validation file beside {path.name}")
        train, val = _load_raw(name, path, val_path)
    return train.to(device), None if val is None else val.to(device)


def save_transitions(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes a dataset as an npz with the keys of a batch, which `load_dataset(dataset_path=...)` reads without a
    simulator.

    Args:
        dataset: on any device.
        path: ends in ".npz". It is replaced in one step; a failure leaves the old file as it was.

    Raises:
        UserError: wrong suffix, the folder does not exist, or the disk is full.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: expected a name that ends in .npz")
    with atomic_write(path) as temporary:
        np.savez(temporary, **{key: dataset.tensors[key].cpu().numpy() for key in KEYS})  # type: ignore[arg-type]


def _val_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-val.npz")


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device} was asked for, and PyTorch sees no CUDA GPU")
    return device


# Reading npz files


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    """The npz at `path`; whatever is wrong with the file becomes a UserError that names it."""
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a complete npz file (truncated, or another kind of file)")
        # Opened here, because numpy leaves it open if it is damaged.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            yield file
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_array(file: Any, path: Path, key: str) -> np.ndarray:
    """One array of an open npz, checked: numbers, one row at least, all finite.

    The checks run over pieces, so that they need no second copy.
    """
    if key not in file.files:
        raise UserError(f"{path}: the key {key!r} is missing; it has {', '.join(sorted(file.files)) or 'none'}")
    try:
        array = file[key]
    except _BROKEN as error:
        raise UserError(f"{path}: {key!r} cannot be read, it is damaged or holds objects ({error})") from error
    if array.dtype.kind not in "fiub":
        raise UserError(f"{path}: {key!r}: expected numbers, got dtype {array.dtype}")
    if array.ndim not in (1, 2):
        raise UserError(f"{path}: {key!r}: expected one or two dimensions, got shape {list(array.shape)}")
    if not array.size:
        raise UserError(f"{path}: {key!r}: expected at least one row, got shape {list(array.shape)}")
    if array.dtype.kind == "f":
        for i in range(0, len(array), _CHUNK):
            finite = np.isfinite(array[i : i + _CHUNK])
            if not finite.all():
                row = i + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
                raise UserError(f"{path}: {key!r}: NaN or infinite value in row {row}")
    return array


def _check_shape(path: Path, key: str, array: np.ndarray, ndim: int, num_rows: int | None = None) -> None:
    if array.ndim != ndim:
        raise UserError(f"{path}: {key!r}: expected {ndim} dimension(s), got shape {list(array.shape)}")
    if num_rows is not None and len(array) != num_rows:
        raise UserError(f"{path}: {key!r}: expected {num_rows} rows like 'observations', got {len(array)}")


def _check_float(path: Path, key: str, array: np.ndarray) -> None:
    if array.dtype.kind != "f":
        raise UserError(f"{path}: {key!r}: expected floating point numbers, got {array.dtype}")


def _check_actions(path: Path, actions: np.ndarray) -> None:
    # Clipping would hide actions in other units.
    low, high = actions.min(), actions.max()
    if low < -1.0 - _ACTION_SLACK or high > 1.0 + _ACTION_SLACK:
        raise UserError(f"{path}: 'actions': expected values in [-1, 1], got [{low:g}, {high:g}]")


def _check_flags(path: Path, key: str, array: np.ndarray) -> None:
    if array.dtype.kind != "b" and not np.isin(array, (0, 1)).all():
        raise UserError(f"{path}: {key!r}: expected only 0 and 1, got values in [{array.min()}, {array.max()}]")


def _is_transitions(path: Path) -> bool:
    with open_npz(path) as file:
        return "rewards" in file.files and "masks" in file.files


def _load_transitions(name: str, path: Path) -> Dataset:
    tensors: dict[str, Tensor] = {}
    with open_npz(path) as file:
        for key in KEYS:
            array = read_array(file, path, key)
            num_rows = len(tensors["observations"]) if tensors else None
            _check_shape(path, key, array, 2 if key in _VECTORS else 1, num_rows)
            if key in _VECTORS or key == "rewards":
                _check_float(path, key, array)
            else:
                _check_flags(path, key, array)
            if key == "actions":
                _check_actions(path, array)
            tensors[key] = _tensor(key, array)
    if tensors["next_observations"].shape != tensors["observations"].shape:
        shapes = [list(tensors[key].shape) for key in ("observations", "next_observations")]
        raise UserError(f"{path}: 'next_observations': expected shape {shapes[0]} like 'observations', got {shapes[1]}")
    return Dataset(name, tensors)


def _tensor(key: str, array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array, dtype=np.float32)
    if key == "actions":
        np.clip(array, -ACTION_LIMIT, ACTION_LIMIT, out=array)
    return torch.from_numpy(array)


# Raw files


def _load_raw(name: str, path: Path, val_path: Path) -> tuple[Dataset, Dataset]:
    try:
        ogbench = import_ogbench()
    except MissingExtra as error:
        raise MissingExtra(
            f"{path} has no rewards, and computing them needs the simulator: {error} "
            "(or make a transitions file where the simulator is, with fastflow relabel)"
        ) from error
    from ogbench.relabel_utils import relabel_dataset

    env = make_env(name)
    try:
        for file in (path, val_path):
            _check_raw(name, file, env.unwrapped)
        splits = []
        for file in (path, val_path):
            split = ogbench.load_dataset(str(file), add_info=True)
            relabel_dataset(name, env, split)
            splits.append(Dataset(name, {key: _tensor(key, split.pop(key)) for key in KEYS}))
    finally:
        env.close()
    return splits[0], splits[1]


def _check_raw(name: str, path: Path, env: Any) -> None:
    """Checks a raw file against the environment, one array at a time."""
    num_rows: int | None = None
    widths = {
        "observations": env.observation_space.shape[0],
        "actions": env.action_space.shape[0],
        "qpos": env.model.nq,
    }
    if hasattr(env, "_cur_button_states"):
        widths["button_states"] = len(env._cur_button_states)
    with open_npz(path) as file:
        for key in ("observations", "actions", "terminals", "qpos", *(["button_states"] if len(widths) > 3 else [])):
            array = read_array(file, path, key)
            _check_shape(path, key, array, 1 if key == "terminals" else 2, num_rows)
            if key in widths and array.shape[1] != widths[key]:
                raise UserError(
                    f"{path}: {key!r}: expected {widths[key]} columns, as {name} has, got {array.shape[1]}: is it the "
                    "dataset of another environment?"
                )
            if key == "terminals":
                _check_flags(path, key, array)
                if not array[-1]:
                    raise UserError(f"{path}: 'terminals': expected the last row to end a trajectory")
                if array.all():
                    raise UserError(f"{path}: 'terminals': every row ends a trajectory, so there are no transitions")
            elif key != "button_states":
                _check_float(path, key, array)
            if key == "actions":
                _check_actions(path, array)
            num_rows = len(array)


# Downloading


def _download(name: str, folder: Path) -> None:
    """Downloads what is missing of a dataset, through OGBench; only complete files reach `folder`."""
    dataset = dataset_name(name)
    missing = [file for file in (f"{dataset}.npz", f"{dataset}-val.npz") if not (folder / file).is_file()]
    command = f"fastflow collect {dataset} --dataset-dir {folder}"
    if not is_published(name):
        raise UserError(f"{folder / missing[0]}: no such file, and it cannot be downloaded; make it with: {command}")
    can_collect = f", or make an equivalent one with: {command}" if recipe_for(dataset) else ""
    advice = f"download {' and '.join(missing)} from the mirror {MIRROR} into {folder}{can_collect}"
    try:
        ogbench = import_ogbench()
    except MissingExtra as error:
        raise MissingExtra(f"{folder / missing[0]}: no such file, and downloading it needs OGBench: {error}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{dataset}.", dir=folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write to this folder ({error.strerror})") from error
    timeout = socket.getdefaulttimeout()
    with temporary:
        for file in {f"{dataset}.npz", f"{dataset}-val.npz"} - set(missing):
            # OGBench skips what is there.
            Path(temporary.name, file).touch()
        try:
            # It sets no timeout of its own, and a host that is down would be waited for a long time.
            socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
            ogbench.download_datasets([dataset], temporary.name)
            # It does not close the files that it wrote, and their ends may not have been written out.
            gc.collect()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
                raise UserError(f"{folder}: cannot write the download ({error.strerror})") from error
            raise UserError(f"{dataset}: the download failed ({error}); {advice}") from error
        finally:
            socket.setdefaulttimeout(timeout)
        for file in missing:
            # A connection that closes early ends the download without an error.
            if not zipfile.is_zipfile(Path(temporary.name, file)):
                raise UserError(f"{dataset}: the download of {file} was cut short; {advice}")
        for file in missing:
            os.replace(Path(temporary.name, file), folder / file)
