"""The examples of the documentation run, and what it says of them holds."""

from __future__ import annotations

import difflib
import importlib.util
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium, part of the extra rl, is not installed")
pytest.importorskip("tyro", reason="tyro, part of the extra rl, is not installed")

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"
PAGE = (DOCS / "cleanrl.md").read_text(encoding="utf-8")
TWINS = ["sac", "td3"]
ONLINE = ["sac", "sac_flow", "td3", "td3_flow"]


def run(*command):
    """Standard output of an example, in which a warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_example_runs(name):
    # 20 updates, and the end of every environment's first episode among them.
    steps = dict(num_envs=2, total_steps=410, learning_starts=390, batch_size=16, eval_episodes=2)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in steps.items()]
    out = run(EXAMPLES / f"{name}.py", *options, "--hidden", 16, 16)
    assert len(re.findall(r"^step 400 return -\d+", out, re.M)) == 1
    result = re.search(r"^evaluation return (\S+) after 410 steps", out, re.M)
    assert result is not None, out
    assert math.isfinite(float(result[1]))


class Count(gymnasium.Env):
    """Observes how many steps the episode has had; every second episode terminates behind the third."""

    observation_space = gymnasium.spaces.Box(0, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, self.steps == 3 and self.episode % 2 == 0, False, {}


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_example_stores_where_an_episode_went(name, monkeypatch):
    """Not where the next one begins; and a time limit, here five steps, is no termination."""
    count = gymnasium.envs.registration.EnvSpec("Count-v0", Count, max_episode_steps=5)
    monkeypatch.setitem(gymnasium.registry, "Count-v0", count)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, example)
    spec.loader.exec_module(example)
    buffers = []

    class Kept(example.Buffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    monkeypatch.setattr(example, "Buffer", Kept)
    args = dict(num_envs=2, total_steps=42, learning_starts=40, batch_size=4, buffer_size=64, hidden=(8,))
    result = example.main(example.Args(env_id="Count-v0", eval_episodes=2, **args))
    assert result == 5.0
    (buffer,) = buffers
    assert buffer.count == 42
    rows = {key: tensor[:42] for key, tensor in buffer.tensors.items()}
    assert torch.equal(rows["next_obs"], rows["obs"] + 1)
    assert rows["obs"].max() == 4
    # Episodes of 5, 3, 5, 3 and 5 steps, two at a time.
    assert rows["terminated"].flatten().nonzero().flatten().tolist() == [14, 15, 30, 31]
    assert (rows["next_obs"][rows["terminated"] == 1] == 3).all()


@pytest.mark.parametrize("name", TWINS)
def test_the_page_shows_how_the_twins_differ(name):
    files = [f"{name}.py", f"{name}_flow.py"]
    lines = [(EXAMPLES / file).read_text(encoding="utf-8").splitlines(keepends=True) for file in files]
    diff = "".join(difflib.unified_diff(*lines, *files, n=1))
    assert diff in re.findall(r"```diff\n(.*?)```", PAGE, re.S), diff
    added = re.findall(r"^\+(?!\+\+).*\S", diff, re.M)
    assert len(added) <= 5


def test_the_offline_loop_runs_and_is_short(tmp_path):
    pytest.importorskip("ogbench", reason="ogbench, part of the extra rl, is not installed")
    from fastflow.collect import collect

    loop = EXAMPLES / "offline_loop.py"
    text = loop.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"```python\n{text}```" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
    collect("pointmaze-arena-navigate-v0", dataset_dir=tmp_path, episodes=2)
    out = run(loop, "--data", tmp_path, "--updates", 3, "--episodes", 1)
    assert re.search(r"'success': [01]\.\d+", out)
