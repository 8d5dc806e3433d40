"""Videos of episodes, where this machine can render; and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from fastflow.errors import MissingExtra, UserError
from fastflow.video import check_path

pytest.importorskip("ogbench")

# A process of its own: MuJoCo chooses what renders when it is imported.
PROGRAM = """
import sys
from pathlib import Path
import torch
from fastflow.envs import make_env
from fastflow.errors import UserError
from fastflow.video import film

class Walker:
    device = torch.device("cpu")

    def act(self, observations, generator=None):
        return (20 - observations).clamp(-1, 1)

def make(name, **options):
    return make_env(name, max_episode_steps=12, **options)

try:
    episode = film(Walker(), "pointmaze-arena-navigate-singletask-v0", Path(sys.argv[1]), make, seed=3)
except UserError as error:
    sys.exit(str(error))
print(int(episode.lengths[0]))
"""


def film_in_process(path, **environment) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    kept.pop("MUJOCO_GL", None)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, env=kept | environment, timeout=120
    )


def test_an_episode_as_a_gif(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    path = tmp_path / "episode.gif"
    done = film_in_process(path)
    if done.returncode and "cannot be rendered here" in done.stderr:
        pytest.skip(f"rendering does not work on this machine: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 12
    frames = imageio.imread(path, index=None)
    # The first observation's and one after every step.
    assert frames.shape == (13, 200, 200, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50
    assert imageio.immeta(path)["duration"] == 100


def test_where_nothing_can_be_rendered(tmp_path):
    """GLFW without a display."""
    if sys.platform != "linux":
        pytest.skip("other systems always have a display")
    done = film_in_process(tmp_path / "episode.gif", MUJOCO_GL="glfw")
    assert done.returncode == 1
    assert "cannot be rendered here" in done.stderr
    assert "set MUJOCO_GL=egl or MUJOCO_GL=osmesa (now glfw)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ends in \.gif or \.mp4, got .*episode\.avi"):
        check_path(tmp_path / "episode.avi")
    with pytest.raises(UserError, match="expected a file in an existing folder"):
        check_path(tmp_path / "nowhere" / "episode.gif")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtra, match=r"fastflow\[video\]"):
        check_path(tmp_path / "episode.mp4")
