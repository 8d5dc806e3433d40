"""Environments that step together, for agents that learn from what they do: names, making, stepping, exact snapshots.

`make_envs(name, num_envs)` makes them and `make_single(name)` makes one for evaluation or rendering, where `name` is

    gridworld-<map>         the FPO paper's grid worlds (`gridworld`), vectorised
    bandit-two-modes        one state, one step, two equally good actions (`bandit`), vectorised
    dmc-<domain>-<task>     ten tasks of the DM control suite (`dm_control`)
    online-ant-v0 ...       OGBench's online locomotion and its singletask environments (`ogbench`)
    Hopper-v5 ...           any id registered with Gymnasium whose observations and actions are vectors of numbers

Importing this package needs no simulator; making an environment does (`pip install "fastflow[rl]"`).
"""

from fastflow.online_envs.make import make_envs, make_single
from fastflow.online_envs.names import check_name, known_names
from fastflow.online_envs.vector import EnvironmentFailed, OnlineEnvs, Step

__all__ = ["EnvironmentFailed", "OnlineEnvs", "Step", "check_name", "known_names", "make_envs", "make_single"]
