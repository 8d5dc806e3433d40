"""Episodes as moving pictures: GIF with what the simulators bring along, MP4 with the extra "video"."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastflow.atomic import atomic_write
from fastflow.errors import UserError, missing_extra
from fastflow.evaluate import Episodes, Policy, Rollouts

__all__ = ["check_path", "film"]

# Browsers slow down what is faster.
_MOST_FRAMES = 30  # per second


def check_path(path: Path) -> None:
    """Checks where a video is to go, before anything is played.

    Raises:
        UserError: neither .gif nor .mp4, or the folder does not exist.
        MissingExtra: no writer of such files is installed.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise UserError(f"video: expected a name that ends in .gif or .mp4, got {path}")
    if not path.parent.is_dir():
        raise UserError(f"video: expected a file in an existing folder, got {path}")
    for package in ("imageio", *(("imageio_ffmpeg",) if path.suffix == ".mp4" else ())):
        if importlib.util.find_spec(package) is None:
            raise missing_extra("video", package.replace("_", "-"))


def film(agent: Policy, env_name: str, path: Path, make: Callable[..., Any], *, seed: int = 0) -> Episodes:
    """Plays one episode and writes it as a video.

    On Linux without a display, MuJoCo renders by EGL unless MUJOCO_GL says otherwise.

    Args:
        agent: the policy.
        env_name: name of its task.
        path: a .gif or .mp4.
        make: makes the environment, by its name and `render_mode`.
        seed: of the episode and the policy's noise.

    Returns:
        The episode.

    Raises:
        UserError: see `check_path`; nothing can be rendered here, or the environment has no pictures.
    """
    check_path(path)
    _choose_renderer()
    filmed: list[_Filmed] = []

    def make_filmed(name: str) -> _Filmed:
        try:
            filmed.append(_Filmed(make(name, render_mode="rgb_array")))
        except UserError:
            raise
        except Exception as error:
            raise _cannot_render(name, error) from error
        return filmed[0]

    rollouts = Rollouts(env_name, 1, make_filmed)
    try:
        episodes = rollouts.run(agent, episodes=1, seed=seed)
    finally:
        rollouts.close()
    assert episodes is not None
    _write(path, filmed[0].frames, filmed[0].rate)
    return episodes


def _choose_renderer() -> None:
    # MuJoCo reads it when it is imported.
    display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform.startswith("linux") and not display and "mujoco" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl")


def _cannot_render(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} cannot be rendered here ({type(error).__name__}: {error}). Without a display, MuJoCo needs EGL or "
        f"OSMesa: set MUJOCO_GL=egl or MUJOCO_GL=osmesa (now {os.environ.get('MUJOCO_GL') or 'not set'})"
    )


class _Filmed:
    """An environment whose pictures are kept."""

    def __init__(self, env: Any) -> None:
        self.env = env
        rate = float(env.metadata.get("render_fps") or _MOST_FRAMES)
        self.every = max(round(rate / _MOST_FRAMES), 1)
        self.rate = rate / self.every
        self.frames: list[np.ndarray] = []
        self._steps = 0

    def reset(self, **options: Any) -> Any:
        found = self.env.reset(**options)
        self._shoot()
        return found

    def step(self, action: np.ndarray) -> Any:
        found = self.env.step(action)
        self._steps += 1
        if self._steps % self.every == 0:
            self._shoot()
        return found

    def _shoot(self) -> None:
        try:
            frame = self.env.render()
        except Exception as error:
            raise _cannot_render(self.env.spec.id, error) from error
        if frame is None:
            raise UserError(f"{self.env.spec.id} has no pictures")
        self.frames.append(np.asarray(frame, dtype=np.uint8))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)


def _write(path: Path, frames: list[np.ndarray], rate: float) -> None:
    import imageio.v3

    timing: dict[str, Any] = (
        {"fps": rate, "macro_block_size": 2} if path.suffix == ".mp4" else {"duration": 1000 / rate, "loop": 0}
    )
    with atomic_write(path) as temporary:
        imageio.v3.imwrite(temporary, np.stack(frames), **timing)
