"""Environments by OGBench's singletask names, and the open arena that OGBench's point maze has but does not register.

Importing this module needs no simulator; making an environment does (`pip install "fastflow[rl]"`).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastflow.errors import UserError, missing_extra

if TYPE_CHECKING:
    import gymnasium

__all__ = [
    "DATASET_DIR",
    "NumpyStream",
    "check_name",
    "dataset_name",
    "is_published",
    "known_names",
    "make_core_env",
    "make_env",
    "nearest",
    "register",
]

DATASET_DIR = "~/.ogbench/data"
"""OGBench's own folder for datasets."""

# What OGBench publishes for download: family -> (variants, dataset types).
_PUBLISHED = (
    ("pointmaze", ("medium", "large", "giant", "teleport"), ("navigate", "stitch")),
    ("antmaze", ("medium", "large", "teleport"), ("navigate", "stitch", "explore")),
    ("antmaze", ("giant",), ("navigate", "stitch")),
    ("humanoidmaze", ("medium", "large", "giant"), ("navigate", "stitch")),
    ("antsoccer", ("arena", "medium"), ("navigate", "stitch")),
    ("cube", ("single", "double", "triple", "quadruple"), ("play", "noisy")),
    ("scene", ("",), ("play", "noisy")),
    ("puzzle", ("3x3", "4x4", "4x5", "4x6"), ("play", "noisy")),
)
# Environments that exist, with data that only `fastflow collect` makes.
_LOCAL = (
    ("pointmaze", ("arena",), ("navigate", "stitch", "explore")),
    ("pointmaze", ("medium", "large", "giant", "teleport"), ("explore",)),
    ("cube", ("octuple",), ("play", "noisy")),
)
_NUM_TASKS = 5

# (start cell, goal cell) as (row, column) of the arena's map, whose free cells are 1..6 by 1..6. OGBench defines the
# first alone; the others add the other diagonal, goals away from the corners and a short way.
_ARENA_TASKS = (
    ((1, 1), (6, 6)),
    ((6, 1), (1, 6)),
    ((6, 6), (3, 3)),
    ((1, 6), (6, 3)),
    ((4, 1), (2, 5)),
)
_ARENA_STEPS = 1000  # as OGBench's medium maze


def _names(table: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]) -> list[str]:
    return [
        "-".join(filter(None, (family, variant, kind, "v0")))
        for family, variants, kinds in table
        for variant in variants
        for kind in kinds
    ]


_PUBLISHED_NAMES = frozenset(_names(_PUBLISHED))


def known_names() -> list[str]:
    """Every environment name that `make_env` and `load_dataset` take, sorted.

    Each is `<environment>-<dataset type>-singletask[-taskN]-v0` with N in 1..5; without N it is OGBench's default task.
    """
    suffixes = ["", *(f"-task{i + 1}" for i in range(_NUM_TASKS))]
    datasets = _names(_PUBLISHED) + _names(_LOCAL)
    return sorted(f"{name.removesuffix('-v0')}-singletask{suffix}-v0" for name in datasets for suffix in suffixes)


def nearest(name: str, names: list[str]) -> str:
    """A clause that suggests the nearest of `names`, or nothing if none is near."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def check_name(name: str) -> None:
    """Checks an environment name before anything is spent on it.

    Raises:
        UserError: `name` is not one of `known_names()`; the message suggests the nearest one.
    """
    names = known_names()
    if name in names:
        return
    reason = "image observations are not supported" if name.startswith("visual-") else "unknown environment"
    raise UserError(
        f"{name}: {reason}{nearest(name.removeprefix('visual-'), names)} "
        "(names are OGBench's: <environment>-<dataset type>-singletask[-task1..5]-v0)"
    )


def dataset_name(name: str) -> str:
    """The dataset that an environment is trained on: "cube-single-play-singletask-task2-v0" -> "cube-single-play-v0".

    A dataset name stays as it is.
    """
    return re.sub(r"-singletask(-task\d+)?(?=-v\d+$)", "", name)


def is_published(name: str) -> bool:
    """Whether OGBench offers the dataset of `name` (a dataset or environment name) for download."""
    return dataset_name(name) in _PUBLISHED_NAMES


def register() -> None:
    """Registers `pointmaze-arena-v0` and `pointmaze-arena-singletask[-taskN]-v0` with Gymnasium, as OGBench names its
    own.

    Runs when this module is imported, may run again, and does nothing without Gymnasium.
    """
    try:
        import gymnasium
    except ImportError:
        return
    # OGBench's settings for its singletask environments (and its defaults for the goal-conditioned one).
    singletask: dict[str, Any] = {"add_noise_to_goal": False, "success_timing": "pre"}
    variants: dict[str, dict[str, Any]] = {"": {}, "-singletask": {"reward_task_id": 1, **singletask}}
    for i in range(_NUM_TASKS):
        variants[f"-singletask-task{i + 1}"] = {"reward_task_id": i + 1, **singletask}
    for suffix, kwargs in variants.items():
        name = f"pointmaze-arena{suffix}-v0"
        if name not in gymnasium.registry:
            entry_point = "fastflow.envs:_make_arena"
            gymnasium.register(id=name, entry_point=entry_point, max_episode_steps=_ARENA_STEPS, kwargs=kwargs)


def _make_arena(**kwargs: Any) -> gymnasium.Env:
    """OGBench's point maze on its arena map, with five tasks instead of one."""
    from ogbench.locomaze.maze import make_maze_env

    env = make_maze_env("point", "maze", maze_type="arena", **kwargs)
    env.task_infos = [
        {
            "task_name": f"task{i + 1}",
            "init_ij": start,
            "init_xy": env.ij_to_xy(start),
            "goal_ij": goal,
            "goal_xy": env.ij_to_xy(goal),
        }
        for i, (start, goal) in enumerate(_ARENA_TASKS)
    ]
    env.num_tasks = len(env.task_infos)
    return env


def import_ogbench() -> ModuleType:
    """Imports OGBench and registers its environments and ours.

    Raises:
        MissingExtra: OGBench, Gymnasium, MuJoCo or another package of the "rl" extra is not installed.
    """
    try:
        # OGBench itself imports without a simulator, and would fail in the middle of making an environment.
        for package in ("gymnasium", "mujoco", "dm_control"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
        with _quiet_simulator():
            import ogbench
    except ImportError as error:
        raise missing_extra("rl", error.name or "ogbench") from error
    register()
    return ogbench


def make_env(name: str, **kwargs: Any) -> gymnasium.Env:
    """Makes the environment of an OGBench singletask name, or of one of fastflow's `pointmaze-arena-*`.

    Observations are float64 vectors [O], actions float32 vectors [A] in [-1, 1]; rewards are OGBench's (number of
    satisfied conditions minus their total, 0 at success) and `info["success"]` says whether the task is solved.

    Unlike OGBench's own, the environment is reproducible: `reset(seed=...)` fixes the start state, the state does not
    depend on earlier episodes, and NumPy's global generator is left alone.

    Args:
        name: one of `known_names()`.
        **kwargs: passed on to `gymnasium.make`, such as `max_episode_steps`.

    Raises:
        UserError: unknown name.
        MissingExtra: the "rl" extra is not installed.
    """
    check_name(name)
    ogbench = import_ogbench()
    # Gymnasium's checker computes an observation space, and with it an observation, at every step.
    kwargs.setdefault("disable_env_checker", True)
    with _quiet_simulator():
        env = ogbench.make_env_and_datasets(name, env_only=True, **kwargs)
        _make_reproducible(env)
    return env


def make_core_env(env_id: str, **kwargs: Any) -> Any:
    """Makes an environment by its Gymnasium id, such as "cube-single-v0", for collecting: reproducible like
    `make_env`'s, and without Gymnasium's wrappers.

    Raises:
        MissingExtra: the "rl" extra is not installed.
    """
    import_ogbench()
    import gymnasium

    with _quiet_simulator():
        env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
        _make_reproducible(env)
    return env.unwrapped


@contextlib.contextmanager
def _quiet_simulator() -> Iterator[None]:
    """Hides the warnings that are known and harmless for state observations, each by its own text."""
    with warnings.catch_warnings():
        # mujoco.viewer initialises GLFW when it is imported, on machines without a display too.
        warnings.filterwarnings("ignore", message=r".*\(65550\) b'(X11|Wayland): ")
        warnings.filterwarnings("ignore", message=r".*Box (low|high)'s precision lowered by casting")
        yield


class NumpyStream:
    """A stream of random numbers that stands in for NumPy's global generator inside a `with` block.

    OGBench draws start positions and its scripted policies' choices from the global generator. Within the block these
    draws come from this stream, which goes on where it stopped at the next block; outside, the global generator is as
    if nothing had happened.
    """

    def __init__(self, seed: int | np.random.SeedSequence | None = None) -> None:
        self.seed(seed)

    def seed(self, seed: int | np.random.SeedSequence | None) -> None:
        """Starts the stream anew; None takes entropy from the operating system."""
        bits = np.random.MT19937(seed)
        self._state: Any = np.random.RandomState(bits).get_state()

    def __enter__(self) -> None:
        self._outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._state)  # noqa: NPY002

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._outside)  # noqa: NPY002


def _make_reproducible(env: gymnasium.Env) -> None:
    """Makes `env.reset(seed=...)` determine the episode, which OGBench alone does not.

    Its mazes draw start positions from NumPy's global generator. Its manipulation environments move the arm at reset by
    actions from an action space that is made anew, without a seed, at every access; and the scene keeps its locks
    (joint damping) and its targets of other kinds from the last episode, which a scripted policy can see.
    """
    core: Any = env.unwrapped
    base: Any = type(core)
    stream = NumpyStream()

    class Reproducible(base):
        def reset(self, options: dict[str, Any] | None = None, *, seed: int | None = None) -> tuple[np.ndarray, dict]:
            if seed is not None:
                stream.seed(seed)
                self.action_space.seed(seed)
            for array, values in arrays:
                array[:] = values
            for name, value in targets.items():
                setattr(self, name, copy.copy(value))
            with stream:
                return super().reset(options=options, seed=seed)

    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    targets: dict[str, Any] = {}
    # The first reset compiles a manipulation environment's model and chooses targets: the same ones in every process.
    with stream:
        core.reset(seed=0)
    core.np_random = np.random.default_rng()
    stream.seed(None)
    if base.__module__.startswith("ogbench.manipspace"):
        arrays.extend((array, array.copy()) for array in (core.model.dof_damping, core.model.site_pos))
        targets.update((name, copy.copy(value)) for name, value in vars(core).items() if name.startswith("_target"))

    if getattr(core, "_teleport_info", None) is not None:

        def step(self: Any, action: np.ndarray) -> Any:
            # A teleport's exit is drawn from the global generator.
            with stream:
                return base.step(self, action)

        Reproducible.step = step
    for space in ("action_space", "observation_space"):
        if isinstance(getattr(base, space, None), property):
            setattr(Reproducible, space, getattr(core, space))
    Reproducible.__name__, Reproducible.__qualname__ = base.__name__, base.__qualname__
    core.__class__ = Reproducible

    # OGBench leaves the maze's description behind in the temporary folder, one file per environment; it has been read.
    description = getattr(core, "fullpath", None)
    if description is not None and os.path.dirname(description) == tempfile.gettempdir():
        with contextlib.suppress(OSError):
            os.unlink(description)


register()
