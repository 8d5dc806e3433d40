"""Training states of the published JAX code of floq and FQL, read without JAX.

Two kinds of files hold one: the code's own `params_<step>.pkl`, read without an unpickler
(`fastflow.restricted_pickle`), and a flat npz with the names of flax and optax:

    modules_floq/mlp/Dense_0/kernel                    parameters, float32
    opt_state/0/mu/modules_floq/mlp/Dense_0/kernel     Adam's moments mu and nu of each
    opt_state/0/count, step                            updates, and that plus one, as the published code counts; int32
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastflow.atomic import atomic_write
from fastflow.errors import UserError
from fastflow.restricted_pickle import load_arrays

__all__ = ["JaxCheckpoint", "read_checkpoint", "write_checkpoint"]


@dataclasses.dataclass(frozen=True)
class JaxCheckpoint:
    """A training state of the published code.

    Attributes:
        updates: updates done, Adam's step count.
        parameters: arrays by flax's names, such as `modules_critic/value_net/Dense_0/kernel`.
        mu, nu: Adam's moments of each parameter under the same names.
    """

    updates: int
    parameters: dict[str, np.ndarray]
    mu: dict[str, np.ndarray]
    nu: dict[str, np.ndarray]


def read_checkpoint(path: str | os.PathLike[str]) -> JaxCheckpoint:
    """Reads `params_<step>.pkl` of the published code, or an npz as `export_run` writes it. Runs nothing of the file.

    Raises:
        UserError: the file is missing or damaged, or lacks an entry, which the message names.
        UnsafePickle: the pickle holds more than arrays in containers.
    """
    path = Path(path)
    flat = dict(_npz(path) if path.suffix == ".npz" else _flatten(_network(path, load_arrays(path))))
    groups: dict[str, dict[str, np.ndarray]] = {"": {}, "opt_state/0/mu/": {}, "opt_state/0/nu/": {}}
    for name, value in flat.items():
        prefix, found, module = name.partition("modules_")
        if found and prefix in groups:
            if not isinstance(value, np.ndarray):
                raise UserError(f"{path}: {name}: expected an array, got {type(value).__name__}")
            groups[prefix][found + module] = value
        elif name not in ("step", "opt_state/0/count"):
            raise UserError(f"{path}: {name}: expected parameters and the state of one Adam, got this entry too")
    parameters = groups.pop("")
    for prefix, moments in groups.items():
        for name in sorted({*parameters, *moments}):
            if name not in moments or name not in parameters:
                lacking = prefix + name if name not in moments else name
                raise UserError(f"{path}: {lacking}: expected, as there is the other, but the file has none")
            expected, came = parameters[name], moments[name]
            if expected.shape != came.shape or expected.dtype != came.dtype:
                raise UserError(
                    f"{path}: {prefix}{name}: expected {list(expected.shape)} {expected.dtype}, "
                    f"got {list(came.shape)} {came.dtype}"
                )
            if not np.isfinite(came).all():
                raise UserError(f"{path}: {prefix}{name}: expected finite numbers, got NaN or infinity")
    count = np.asarray(flat.get("opt_state/0/count", -1))
    if count.shape != () or count.dtype.kind not in "iu" or count < 0:
        raise UserError(f"{path}: opt_state/0/count: expected the number of updates, an integer, got {count}")
    return JaxCheckpoint(int(count), parameters, groups["opt_state/0/mu/"], groups["opt_state/0/nu/"])


def _network(path: Path, tree: Any) -> Any:
    """The part of a pickle's tree that holds the networks and their optimiser."""
    name = "the file"
    for key in ("agent", "network"):
        if not isinstance(tree, dict) or key not in tree:
            came = (
                f"a dict of {', '.join(map(str, tree)) or 'nothing'}" if isinstance(tree, dict) else type(tree).__name__
            )
            raise UserError(f"{path}: {name}: expected a dict with {key!r}, as floq and FQL save it, got {came}")
        tree, name = tree[key], f"{name}[{key!r}]"
    return tree


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists by their paths, those of the parameters without "params/"."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        yield prefix.removeprefix("params/"), tree
        return
    for key, value in items:
        yield from _flatten(value, f"{prefix}/{key}" if prefix else str(key))


def _npz(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield from file.items()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an npz of arrays, or a damaged one ({error})") from error


def write_checkpoint(path: str | os.PathLike[str], checkpoint: JaxCheckpoint) -> None:
    """Writes the npz, atomically.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    arrays = {"step": np.int32(checkpoint.updates + 1), "opt_state/0/count": np.int32(checkpoint.updates)}
    groups: dict[str, Mapping[str, np.ndarray]] = {
        "": checkpoint.parameters,
        "opt_state/0/mu/": checkpoint.mu,
        "opt_state/0/nu/": checkpoint.nu,
    }
    for prefix, group in groups.items():
        arrays |= {prefix + name: value for name, value in group.items()}
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)
