"""Making OGBench's datasets locally, with the scripted policies that come with its package.

The files have the names, keys and types of the published ones and the same recipe, other random draws: results
compare in distribution. `fastflow.data.load_dataset` and OGBench's own loader read them.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fastflow._version import __version__
from fastflow.collect.manipulation import ManipulationCollector
from fastflow.collect.parts import Parts, write_json
from fastflow.collect.pointmaze import PointMazeCollector
from fastflow.collect.recipes import Recipe, collectable_names, recipe_for
from fastflow.envs import DATASET_DIR, dataset_name, import_ogbench, is_published, nearest
from fastflow.errors import UserError, missing_extra

__all__ = ["Recipe", "collect", "collectable_names", "recipe_for"]

_SPLITS = ("train", "val")


def collect(
    name: str,
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    episodes: int | None = None,
    val_episodes: int | None = None,
    seed: int = 0,
    noise: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Collects a dataset into `<dataset_dir>/<dataset>.npz` and `<dataset>-val.npz`, as OGBench publishes them.

    Each file holds, for N rows: observations [N, O], actions [N, A], qpos [N, Q] and qvel [N, V] float32, terminals
    [N] bool (true at the last row of each episode, which is no transition), and for scenes and puzzles button_states
    [N, B] int64. `<dataset>.npz.json` beside them says how they were made.

    An interrupted collection goes on at the next call with the same arguments: finished episodes wait in a hidden
    folder beside the files. Every episode has its own seed, drawn from (`seed`, split, number), so that the files are
    the same bit for bit, interrupted or not; and the first episodes are the same for any `episodes`.

    Args:
        name: one of `collectable_names()`, such as "cube-single-play-v0", or the name of an environment trained on it,
            such as "cube-single-play-singletask-task2-v0".
        dataset_dir: folder of the files, made if absent. Default: OGBench's own, ~/.ogbench/data.
        episodes: training episodes; default as published.
        val_episodes: validation episodes; default a tenth of `episodes`, at least one.
        seed: non-negative.
        noise: action noise instead of the published one (see `Recipe.noise`).
        overwrite: replace existing files, once the new ones are complete.
        progress: show a progress bar, if stderr is a terminal.

    Returns:
        The paths of the training and the validation file.

    Raises:
        UserError: unknown name or one without a scripted policy; a number out of range; existing files without
            `overwrite`; an unfinished collection with other settings; a full disk.
        MissingExtra: the "rl" extra is not installed.
        KeyboardInterrupt: passed on; finished episodes are kept.
    """
    recipe = _checked_recipe(name, noise)
    episodes = recipe.episodes if episodes is None else _checked_count("episodes", episodes)
    val_episodes = max(1, episodes // 10) if val_episodes is None else _checked_count("val_episodes", val_episodes)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed: expected a non-negative integer, got {seed!r}")

    folder = Path(dataset_dir if dataset_dir is not None else DATASET_DIR).expanduser()
    paths = {"train": folder / f"{recipe.dataset}.npz", "val": folder / f"{recipe.dataset}-val.npz"}
    working_folder = folder / f".{recipe.dataset}.collect"
    # The training file is written last, so that a run interrupted between the two may go on.
    done = [paths["train"]] if working_folder.exists() else list(paths.values())
    existing = [str(path) for path in done if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)}: exists; pass --overwrite to replace it")

    import_ogbench()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise missing_extra("rl", "tqdm") from error
    settings = {
        "dataset": recipe.dataset,
        "seed": seed,
        "noise": recipe.noise,
        "rows_per_episode": recipe.steps,
        "random_action": recipe.random_action,
        "versions": _versions(),
    }
    parts = Parts(working_folder, settings, restart=overwrite)
    with parts.lock():
        wanted = [("train", i) for i in range(episodes)] + [("val", i) for i in range(val_episodes)]
        missing = [(split, i) for split, i in wanted if not parts.has(split, i, recipe.steps)]
        with tqdm(
            desc=recipe.dataset,
            total=len(wanted),
            initial=len(wanted) - len(missing),
            unit="episode",
            disable=not (progress and sys.stderr.isatty()),
        ) as bar:
            if missing:
                collector = _make_collector(recipe)
                for split, i in missing:
                    parts.write(split, i, collector.episode(_episode_seed(seed, split, i)))
                    bar.update()
            bar.set_postfix_str("writing the files")
            parts.join("val", val_episodes, paths["val"])
            write_json(
                folder / f"{recipe.dataset}.npz.json",
                {**settings, "episodes": episodes, "val_episodes": val_episodes},
            )
            parts.join("train", episodes, paths["train"])
        parts.remove()
    return paths["train"], paths["val"]


def _episode_seed(seed: int, split: str, episode: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(_SPLITS.index(split), episode))


def _make_collector(recipe: Recipe) -> PointMazeCollector | ManipulationCollector:
    if recipe.env_id.startswith("pointmaze"):
        return PointMazeCollector(recipe)
    return ManipulationCollector(recipe)


def _checked_recipe(name: str, noise: float | None) -> Recipe:
    recipe = recipe_for(name)
    if recipe is None:
        if is_published(name):
            raise UserError(
                f"{name}: OGBench's package has no scripted policy for it (its data come from trained policies); "
                "training downloads it instead"
            )
        suggestion = nearest(dataset_name(name), collectable_names())
        raise UserError(f"{name}: no dataset of this name can be collected{suggestion}")
    if noise is None:
        return recipe
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not (math.isfinite(noise) and noise >= 0):
        raise UserError(f"noise: expected a non-negative number, got {noise!r}")
    return replace(recipe, noise=float(noise))


def _checked_count(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{argument}: expected a positive integer, got {value!r}")
    return value


def _versions() -> dict[str, Any]:
    # Of everything whose new release may change an episode.
    versions = {"fastflow": __version__, "python": platform.python_version()}
    for package in ("gymnasium", "mujoco", "numpy", "ogbench", "scipy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions
