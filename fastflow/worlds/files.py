"""Transitions of a world as npz files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow.atomic import atomic_write
from fastflow.data import open_npz, read_array
from fastflow.envs import DATASET_DIR
from fastflow.errors import UserError
from fastflow.settings import WorldSettings
from fastflow.worlds import make_world
from fastflow.worlds.base import World, from_trajectories

__all__ = ["collect", "load_transitions", "transitions_of"]


def collect(
    name: str,
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    transitions: int = 1_000_000,
    seed: int = 0,
    policy: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes transitions that a world's behaviour policy collects to `<dataset_dir>/<name>.npz`.

    Args:
        name: of the world.
        dataset_dir: folder; by default OGBench's, ~/.ogbench/data.
        transitions: rows.
        seed: of starts, behaviour and transitions.
        policy: a named policy of the world that acts, without noise, in place of the behaviour.
        overwrite: replace an existing file.

    Returns:
        The file: observations, actions, next_observations, next_actions (what the collecting policy did next), rewards
        (of the world's first task), masks and terminals, float32.

    Raises:
        UserError: an unknown world or policy, no rows, an existing file, a folder that cannot be written.
    """
    world = make_world(name)
    path = Path(DATASET_DIR if dataset_dir is None else dataset_dir).expanduser() / f"{name}.npz"
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; pass --overwrite to replace it")
    try:
        rows = world.transitions(transitions, torch.Generator().manual_seed(seed), policy)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot make this folder ({error.strerror})") from error
    with atomic_write(path) as temporary:
        np.savez(temporary, **{key: value.numpy() for key, value in rows.items()})  # type: ignore[arg-type]
    return path


def transitions_of(world: World, settings: WorldSettings[Any]) -> dict[str, Tensor]:
    """The transitions that a run is trained on: a file's, or what the world's behaviour policy collects.

    Raises:
        UserError: a file that does not fit.
    """
    if settings.dataset_path is not None:
        return load_transitions(settings.dataset_path.expanduser(), world)
    return world.transitions(settings.transitions, torch.Generator().manual_seed(settings.data_seed))


def load_transitions(path: Path, world: World) -> dict[str, Tensor]:
    """Transitions of a world from an npz file: rows as `save_transitions` writes them, or trajectories in OGBench's
    format, whose rows then know the next action too.

    Raises:
        UserError: no such file, a missing key, other widths than the world's, a state that is not finite.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    widths = {"observations": world.state_dim, "actions": world.action_dim}
    arrays: dict[str, Tensor] = {}
    with open_npz(path) as file:
        rows = "next_observations" in file.files
        names = ["observations", "actions", "next_observations", "masks"] if rows else [*widths, "terminals"]
        if rows and "next_actions" in file.files:
            names.append("next_actions")
        for name in names:
            array = read_array(file, path, name)
            width = widths.get(name.removeprefix("next_"))
            if width is not None and array.shape[1:] != (width,):
                raise UserError(
                    f"{path}: {name!r}: expected rows of {width} numbers, as {world.name} has, got shape "
                    f"{list(array.shape)}"
                )
            if arrays and len(array) != len(arrays["observations"]):
                raise UserError(
                    f"{path}: {name!r}: expected {len(arrays['observations'])} rows like 'observations', got "
                    f"{len(array)}"
                )
            arrays[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if rows:
        return arrays
    try:
        return from_trajectories(*(arrays[name] for name in names))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
