"""Finished runs of other experiments with the same settings and seed: what is compared often is trained once."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastflow.errors import UserError
from fastflow.experiments import report
from fastflow.record import Run
from fastflow.train import parse, settings_from_config

__all__ = ["take_over"]


def take_over(agent: str, flags: Sequence[str], path: Path, folder: Path) -> Path | None:
    """Copies a finished run like the one that `fastflow train AGENT FLAGS` would make, if there is one.

    Only settings are compared: that the runs were of code that trains alike is for the caller to know.

    Args:
        agent, flags: of the training.
        path: where its run folder goes; must not exist.
        folder: of the experiment that it is for. Experiments beside it are looked through.

    Returns:
        The run that was copied, with the further metrics beside it and where it came from, or None.
    """
    wanted = _common(parse(agent, flags))
    for other in sorted(folder.parent.glob(f"*/*/{path.name}")):
        run = None if folder in other.parents else report.finished(other)
        if run is None or run.config.get("agent_name") != agent:
            continue
        # Runs of another version may lack a setting: not the same, then.
        with contextlib.suppress(UserError, ValueError, TypeError):
            if _common(settings_from_config(run, agent)) == wanted:
                _copy(run, path)
                return other
    return None


def _common(settings: Any) -> Any:
    """Settings without what every run has for itself."""
    paths = {
        field.name: value.expanduser().resolve()
        for field in dataclasses.fields(settings)
        if isinstance(value := getattr(settings, field.name), Path)
    }
    return dataclasses.replace(settings, **{**paths, "run_dir": None, "resume": None})


def _copy(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.copy")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(run.path, unfinished)
    further = report.after_path(run.path)
    if further.exists():
        shutil.copyfile(further, report.after_path(path))
    experiment, arm, _ = run.path.resolve().parts[-3:]
    report.origin_path(path).write_text(f"{experiment}/{arm}\n", encoding="utf-8")
    unfinished.rename(path)
