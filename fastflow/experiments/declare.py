"""What an experiment is: arms that differ in settings, seeds, and the metrics that answer a question."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["Arm", "Experiment", "Metric", "Size"]

# Names become folders and words of a command line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Decided by the runner, for every run.
_RESERVED = ("seed", "run_dir", "resume")


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what}: expected letters, digits and . _ + = -, beginning with one of the first, got {name!r}"
        )


def _check_settings(what: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name in _RESERVED:
            raise ValueError(f"{what}: {name} is set for every run and cannot be declared")
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{what}: expected dotted names of settings such as agent.gamma, got {name!r}")
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if item is not None and not isinstance(item, (bool, int, float, str, Path)):
                raise TypeError(f"{what}: {name}: expected a plain value or a tuple of such, got {type(item).__name__}")


def _check_once(what: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"{what}: expected at least one, got none")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}: expected each name once, got {name!r} {names.count(name)} times")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
        name: its folder.
        label: how tables and figures call it.
        settings: what it sets, by the dotted names of the settings of `fastflow train`: "env", "agent.variant", ...
            They win over those of a size.
        x: its number on the experiment's axis, if that has one; an arm without is drawn across the whole axis.
        group: arms of one group share a colour, and along the axis a line.
        after: "module:function", called in a process of its own with the finished `fastflow.record.Run`; returns
            further metrics by name, which are kept beside the run.
        reference: name of the arm that this one is compared with, where it is not the experiment's.
        agent: name of its algorithm, where it is not the experiment's.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    x: float | None = None
    group: str | None = None
    after: str | None = None
    reference: str | None = None
    agent: str | None = None

    def __post_init__(self) -> None:
        _check_name("arm", self.name)
        _check_settings(f"arm {self.name}: settings", self.settings)
        if self.after is not None and not _FUNCTION.fullmatch(self.after):
            raise ValueError(f"arm {self.name}: after: expected module:function, got {self.after!r}")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large an experiment is run.

    Attributes:
        settings: what all arms share (see `Arm.settings`).
        seeds: one run of every arm for each.
        budget: what it takes, in words: "2 CPU cores, 30 minutes".
    """

    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    budget: str

    def __post_init__(self) -> None:
        _check_settings("size: settings", self.settings)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"size: seeds: expected different numbers of at least 0, got {self.seeds}")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of every finished run.

    Attributes:
        column: a column of eval.csv, read at the last step, or a name that `Arm.after` returns.
        label: how tables and figures call it.
        better: which way is good, if one is.
        log: drawn on a logarithmic axis.
        floor: column of what a perfect model would score, drawn as a line.
        compare: how arms are compared with their reference; "difference" suits what has no zero, such as a logarithm,
            and stands in for the ratio where a value is not positive.
    """

    column: str
    label: str
    better: Literal["lower", "higher"] | None = None
    log: bool = False
    floor: str | None = None
    compare: Literal["ratio", "difference"] = "ratio"

    def __post_init__(self) -> None:
        if self.compare not in ("ratio", "difference"):
            raise ValueError(f"metric {self.column}: compare: expected 'ratio' or 'difference', got {self.compare!r}")
        if self.better not in ("lower", "higher", None):
            raise ValueError(f"metric {self.column}: better: expected 'lower', 'higher' or None, got {self.better!r}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question, and the runs that answer it.

    Attributes:
        name: how the command calls it.
        title: one line for tables and figures.
        agent: name of the algorithm, as in `fastflow train`.
        question: one sentence.
        arms: what is compared.
        sizes: by name; "small" and "paper" as a rule.
        metrics: what is compared by, the most important first.
        x: what the arms' `x` is, if they lie along an axis: "horizon", "K".
        reference: name of the arm that the others are compared with.
        picture: "module:function", called with the experiment, its seeds and its folder after every report; draws
            further pictures there and returns their paths.

    Raises:
        ValueError, TypeError: a declaration that cannot be; the message names the field.
    """

    name: str
    title: str
    agent: str
    question: str
    arms: tuple[Arm, ...]
    sizes: Mapping[str, Size]
    metrics: tuple[Metric, ...]
    x: str | None = None
    reference: str | None = None
    picture: str | None = None

    def __post_init__(self) -> None:
        _check_name("experiment", self.name)
        if self.picture is not None and not _FUNCTION.fullmatch(self.picture):
            raise ValueError(f"picture: expected module:function, got {self.picture!r}")
        _check_once("arms", [arm.name for arm in self.arms])
        _check_once("metrics", [metric.column for metric in self.metrics])
        if not self.sizes:
            raise ValueError("sizes: expected at least one, got none")
        for size in self.sizes:
            _check_name("size", size)
        names = [arm.name for arm in self.arms]
        for whose, name in [("", self.reference), *((f"arm {arm.name}: ", arm.reference) for arm in self.arms)]:
            if name is not None and name not in names:
                raise ValueError(f"{whose}reference: expected one of {', '.join(names)}, got {name!r}")
        if self.x is not None and all(arm.x is None for arm in self.arms):
            raise ValueError(f"x: expected an arm with a number on the axis {self.x!r}, got none")
        if self.x is None and any(arm.x is not None for arm in self.arms):
            raise ValueError("x: expected the name of the axis that arms have numbers on, got None")

    def reference_of(self, arm: Arm) -> Arm | None:
        """The arm that `arm` is compared with; None for a reference itself, and where there is none."""
        name = arm.reference or self.reference
        return next((other for other in self.arms if other.name == name and name != arm.name), None)

    def settings(self, arm: Arm, size: str) -> dict[str, Any]:
        """Dotted names and values of everything that is declared for `arm` in `size`; the arm's win."""
        return {**self.sizes[size].settings, **arm.settings}
