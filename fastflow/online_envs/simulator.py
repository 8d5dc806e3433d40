"""MuJoCo's state, and its own opinion of it. Importing this module needs no MuJoCo."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["has_diverged", "quiet_deprecations", "set_simulator_state", "simulator_state"]

# Results of the last step that environments read before the next one, which computes them anew: a few of them belong
# to the moment before the last integration, so that they do not follow from the state. Not every version has them all.
_DERIVED = (
    "actuator_force",
    "cacc",
    "cfrc_ext",
    "cfrc_int",
    "cinert",
    "cvel",
    "geom_xmat",
    "geom_xpos",
    "geom_xquat",
    "qacc",
    "qfrc_actuator",
    "qfrc_constraint",
    "sensordata",
    "site_xmat",
    "site_xpos",
    "site_xquat",
    "subtree_com",
    "subtree_linvel",
    "ximat",
    "xipos",
    "xiquat",
    "xmat",
    "xpos",
    "xquat",
)
# What tasks change in their model: targets and how they look when an episode begins, colours and locks at a button.
_MODEL = ("dof_damping", "geom_pos", "geom_rgba", "geom_size", "site_pos", "site_rgba", "site_size", "wrap_prm")


def simulator_state(model: Any, data: Any) -> dict[str, np.ndarray]:
    """Exact state of a MuJoCo simulation, as arrays."""
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, spec), dtype=np.float64)
    mujoco.mj_getState(model, data, integration, spec)
    state = {"simulator.integration": integration}
    for prefix, owner, names in (("simulator", data, _DERIVED), ("model", model, _MODEL)):
        state |= {f"{prefix}.{name}": getattr(owner, name).copy() for name in names if hasattr(owner, name)}
    return state


def set_simulator_state(model: Any, data: Any, state: dict[str, np.ndarray]) -> None:
    """Gives a MuJoCo simulation of the same model the state that `simulator_state` returned."""
    import mujoco

    for name in _MODEL:
        getattr(model, name)[...] = state[f"model.{name}"]
    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.ascontiguousarray(state["simulator.integration"], dtype=np.float64)
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, integration, spec)
    # Contacts and constraints, which a step in two halves takes from before it. This moves the solver's warm start.
    mujoco.mj_forward(model, data)
    mujoco.mj_setState(model, data, integration, spec)
    for name in _DERIVED:
        if hasattr(data, name):
            getattr(data, name)[...] = state[f"simulator.{name}"]


@contextlib.contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Keeps MuJoCo from printing, and from writing to a file MUJOCO_LOG.TXT where the user happens to be, what is
    deprecated in models that belong to Gymnasium. Does nothing without MuJoCo."""
    try:
        import mujoco
    except ImportError:
        yield
        return
    before = mujoco.get_mju_user_warning()

    def warn(message: str) -> None:
        if "is deprecated" in message:
            return
        if before is None:
            print(f"WARNING: {message}", file=sys.stderr)
        else:
            before(message)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def has_diverged(data: Any) -> bool:
    """Whether a MuJoCo simulation met numbers that are not finite (or huge) in this episode; False for what is not one.

    MuJoCo then begins anew from its reference pose in the middle of a step, and goes on as if nothing had happened.
    """
    mujoco = sys.modules.get("mujoco")
    if mujoco is None or not isinstance(data, mujoco.MjData):
        return False
    # This is asked at every step.
    return any(data.warning.number.tolist()[_bad_numbers()])


@functools.cache
def _bad_numbers() -> slice:
    """Where MuJoCo's warnings of positions, velocities and accelerations stand: three neighbours."""
    import mujoco

    return slice(mujoco.mjtWarning.mjWARN_BADQPOS.value, mujoco.mjtWarning.mjWARN_BADQACC.value + 1)
