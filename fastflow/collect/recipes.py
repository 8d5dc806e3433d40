"""What is collected under a dataset's name: OGBench's settings for each of its datasets, as facts. Needs no
simulator."""

from __future__ import annotations

from dataclasses import dataclass

from fastflow.envs import dataset_name, known_names

__all__ = ["Recipe", "collectable_names", "recipe_for"]


@dataclass(frozen=True)
class Recipe:
    """How one dataset is made."""

    dataset: str
    """Its name, such as "cube-single-play-v0"; the files are `<dataset>.npz` and `<dataset>-val.npz`."""
    env_id: str
    """The Gymnasium id of the goal-conditioned environment, such as "cube-single-v0"."""
    kind: str
    """The dataset type: "navigate", "stitch" or "explore" for mazes, "play" or "noisy" for manipulation."""
    episodes: int
    """Training episodes of the published dataset; a tenth as many validation episodes come on top."""
    steps: int
    """Rows per episode, of which all but the last are transitions."""
    noise: float
    """Standard deviation of the action noise (mazes), its level in the plan ("play") or its largest level ("noisy")."""
    random_action: float = 0.0
    """Probability of a uniformly random action at each step."""


# OGBench, data_gen_scripts/commands.sh. (episodes, rows per episode, noise); the arena is as the medium maze, and
# explore, which OGBench collects with its ant alone, is as the ant's.
_MAZE = {
    "navigate": (1000, 1001, 0.5),
    "stitch": (5000, 201, 0.5),
    "explore": (10000, 501, 1.0),
}
_MAZES = ("arena", "medium", "large", "giant", "teleport")
_MANIPULATION_EPISODES = {
    "cube-single": 1000,
    "cube-double": 1000,
    "cube-triple": 3000,
    "cube-quadruple": 5000,
    "cube-octuple": 5000,  # OGBench publishes 100 times as many, in parts under another name
    "scene": 1000,
    "puzzle-3x3": 1000,
    "puzzle-4x4": 1000,
    "puzzle-4x5": 3000,
    "puzzle-4x6": 5000,
}


def _recipes() -> dict[str, Recipe]:
    recipes = []
    for maze in _MAZES:
        for kind, (episodes, steps, noise) in _MAZE.items():
            if (maze, kind) == ("giant", "navigate"):
                episodes, steps = 500, 2001
            name = f"pointmaze-{maze}"
            recipes.append(Recipe(f"{name}-{kind}-v0", f"{name}-v0", kind, episodes, steps, noise))
    for name, episodes in _MANIPULATION_EPISODES.items():
        recipes.append(Recipe(f"{name}-play-v0", f"{name}-v0", "play", episodes, 1001, 0.1))
        random_action = 0.2 if name.startswith("puzzle") else 0.1
        recipes.append(Recipe(f"{name}-noisy-v0", f"{name}-v0", "noisy", episodes, 1001, 0.1, random_action))
    return {recipe.dataset: recipe for recipe in recipes}


_RECIPES = _recipes()


def collectable_names() -> list[str]:
    """The dataset names that have a recipe, sorted."""
    return sorted(_RECIPES)


def recipe_for(name: str) -> Recipe | None:
    """The recipe of a dataset or environment name, or None: the names of one environment's tasks share a dataset."""
    # A mistyped task should be reported, not collected.
    if "-singletask" in name and name not in known_names():
        return None
    return _RECIPES.get(dataset_name(name))
