"""Experiments: ablations and comparisons as declarations that one command runs, repeats and draws.

They are found here by name, and imported only when asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastflow.errors import UserError

if TYPE_CHECKING:
    from fastflow.experiments.declare import Experiment

__all__ = ["NAMES", "load"]

NAMES: dict[str, tuple[str, str]] = {
    "floq-steps": ("fastflow.experiments.floq", "STEPS"),
    "floq-noise-range": ("fastflow.experiments.floq", "NOISE_RANGE"),
    "floq-embedding": ("fastflow.experiments.floq", "EMBEDDING"),
    "floq-time": ("fastflow.experiments.floq", "TIME"),
    "floq-backup": ("fastflow.experiments.floq", "BACKUP"),
    "floq-target": ("fastflow.experiments.floq", "TARGET"),
    "floq-recovery": ("fastflow.experiments.floq", "RECOVERY"),
    "floq-target-noise": ("fastflow.experiments.floq", "TARGET_NOISE"),
    "floq-plasticity": ("fastflow.experiments.floq", "PLASTICITY"),
    "floq-utd": ("fastflow.experiments.floq", "UTD"),
    "floq-feature-norm": ("fastflow.experiments.floq", "FEATURE_NORM"),
    "floq-precision": ("fastflow.experiments.floq", "PRECISION"),
    "floq-medium": ("fastflow.experiments.floq", "MEDIUM"),
    "baselines-pointmaze": ("fastflow.experiments.baselines", "POINTMAZE"),
    "baselines-cube-double": ("fastflow.experiments.baselines", "CUBE_DOUBLE"),
    "baselines-antmaze-giant": ("fastflow.experiments.baselines", "ANTMAZE_GIANT"),
    "td2-linear-gaussian": ("fastflow.experiments.td2_cfm", "LINEAR_GAUSSIAN"),
    "td2-pointmaze": ("fastflow.experiments.td2_cfm", "POINTMAZE"),
    "td2-planning": ("fastflow.experiments.td2_cfm", "PLANNING"),
    "td2-curved": ("fastflow.experiments.td2_cfm", "CURVED"),
    "td2-steps": ("fastflow.experiments.td2_cfm", "STEPS"),
    "td2-diffusion": ("fastflow.experiments.td2_cfm", "DIFFUSION"),
    "fpo-pendulum": ("fastflow.experiments.fpo", "PENDULUM"),
    "fpo-reacher": ("fastflow.experiments.fpo", "REACHER"),
    "fpo-hopper": ("fastflow.experiments.fpo", "HOPPER"),
    "fpo-halfcheetah": ("fastflow.experiments.fpo", "HALFCHEETAH"),
    "fpo-ablation": ("fastflow.experiments.fpo", "ABLATION"),
    "fpo-dmc": ("fastflow.experiments.fpo", "DMC"),
    "fpo-gridworld": ("fastflow.experiments.fpo_modes", "GRIDWORLD"),
    "fpo-modes": ("fastflow.experiments.fpo_modes", "MODES"),
    "fpo-bandit": ("fastflow.experiments.fpo_modes", "BANDIT"),
    "fpo-search-pendulum": ("fastflow.experiments.fpo", "SEARCH_PENDULUM"),
    "fpo-search-reacher": ("fastflow.experiments.fpo", "SEARCH_REACHER"),
    "fpo-search-hopper": ("fastflow.experiments.fpo", "SEARCH_HOPPER"),
}
"""Name of an experiment: the module that declares it, and its name there."""


def load(name: str) -> Experiment:
    """The experiment `name`.

    Raises:
        UserError: there is no such experiment; the message suggests the nearest and lists them.
    """
    if name not in NAMES:
        from fastflow.envs import nearest

        there = f"there are {', '.join(sorted(NAMES))}" if NAMES else "there are none"
        raise UserError(f"no experiment {name!r}{nearest(name, sorted(NAMES))}; {there}")
    module, attribute = NAMES[name]
    experiment: Experiment = getattr(importlib.import_module(module), attribute)
    if experiment.name != name:
        raise ValueError(f"{module}.{attribute}: expected an experiment of name {name!r}, got {experiment.name!r}")
    return experiment
