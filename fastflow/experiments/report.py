"""What an experiment found: results.csv, summary.md and figure.png from the finished runs in its folder.

Statistics over seeds are those of `fastflow.evaluate`: interquartile mean and percentile bootstrap interval (Agarwal et
al., arXiv:2108.13264).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastflow.atomic import atomic_write
from fastflow.errors import MissingExtra, UserError
from fastflow.evaluate import bootstrap_interval, interquartile_mean
from fastflow.experiments.declare import Arm, Experiment, Metric
from fastflow.plot import COLORS, figure_style, save_figure
from fastflow.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Comparison", "Estimate", "Result", "compare", "estimate", "finished", "read_after", "results", "run_path"]

LEAST_SEEDS = 3
"""Fewer give no interval."""

_MARKERS = "osD^vPX*"
_COLUMNS = 3


# Reading --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        arm, seed: which.
        step: updates done.
        seconds: that training and its evaluations took.
        values: eval.csv at the last step, and what `Arm.after` returned.
        origin: "experiment__size/arm" where another experiment trained the run.
    """

    arm: Arm
    seed: int
    step: int
    seconds: float
    values: Mapping[str, float]
    origin: str | None = None


def run_path(folder: Path, arm: Arm, seed: int) -> Path:
    """Where the run of an arm and a seed lies."""
    return folder / arm.name / f"seed{seed}"


def after_path(path: Path) -> Path:
    """Where the further metrics of the run in `path` lie."""
    return path.with_name(f"{path.name}.after.json")


def origin_path(path: Path) -> Path:
    """Where it says which experiment and arm trained the run in `path`, if another one did."""
    return path.with_name(f"{path.name}.origin")


def _origin(path: Path) -> str | None:
    return origin_path(path).read_text(encoding="utf-8").strip() if origin_path(path).exists() else None


def finished(path: Path) -> Run | None:
    """The run in `path` if it is finished: a checkpoint at its last step and, where it evaluates, a row of eval.csv."""
    try:
        run = Run.open(path)
    except UserError:
        return None
    steps = run.last_step
    if steps not in run.checkpoint_steps() or (run.config["eval_interval"] and steps not in run.eval.steps()):
        return None
    return run


def read_after(run: Run, function: str) -> dict[str, float] | None:
    """The further metrics that `function` ("module:function") found of a finished run, or None if it has yet to."""
    try:
        saved = json.loads(after_path(run.path).read_text(encoding="utf-8"))
        if (saved["function"], saved["step"]) != (function, run.last_step):
            return None
        return {str(name): float(value) for name, value in saved["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def results(experiment: Experiment, seeds: Sequence[int], folder: Path) -> list[Result]:
    """The finished runs of all arms, in order of declaration; one whose `after` is missing is not finished."""
    found = []
    for arm in experiment.arms:
        for seed in seeds:
            run = finished(run_path(folder, arm, seed))
            further = None if run is None else {} if arm.after is None else read_after(run, arm.after)
            if run is None or further is None:
                continue
            step = run.last_step
            rows = [row for row in run.eval.rows() if row["step"] == step]
            values = dict(rows[-1]) if rows else {}
            clock = [row["time/total_time"] for row in [*run.train.rows(), *rows] if "time/total_time" in row]
            values = {name: value for name, value in values.items() if name.startswith("evaluation/")} | further
            found.append(Result(arm, seed, step, max(clock, default=math.nan), values, _origin(run.path)))
    return found


# Statistics -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric of one arm over its seeds.

    Attributes:
        count: finite values that went in.
        left_out: values that were not finite.
        center: interquartile mean; with fewer than three values their mean; NaN of none.
        low, high: bootstrap interval; with fewer than three values their range.
    """

    count: int
    left_out: int
    center: float
    low: float
    high: float

    def __str__(self) -> str:
        if not self.count:
            return f"not finite in {self.left_out}" if self.left_out else "—"
        text = _number(self.center)
        if self.count > 1:
            text += f" ({_number(self.low)} to {_number(self.high)})"
        return text + (f", {self.left_out} not finite" if self.left_out else "")


def estimate(values: Sequence[float]) -> Estimate:
    """Centre and interval of one arm's values, one per seed; those that are not finite are counted and left out."""
    finite = [value for value in values if math.isfinite(value)]
    left_out = len(values) - len(finite)
    if not finite:
        return Estimate(0, left_out, math.nan, math.nan, math.nan)
    if len(finite) < LEAST_SEEDS:
        return Estimate(len(finite), left_out, float(np.mean(finite)), min(finite), max(finite))
    return Estimate(len(finite), left_out, interquartile_mean(finite), *bootstrap_interval([finite]))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against its reference.

    Attributes:
        kind: "ratio", or "difference" for a metric that is not positive everywhere.
        center: of the interquartile means; of the means with fewer than three seeds on a side.
        interval: bootstrap interval, seeds of both sides resampled; None with fewer than three seeds on a side.
    """

    kind: str
    center: float
    interval: tuple[float, float] | None

    def same(self) -> bool:
        """Whether the interval leaves open that there is no difference."""
        return (
            self.interval is not None and self.interval[0] <= (1.0 if self.kind == "ratio" else 0.0) <= self.interval[1]
        )

    def word(self, better: str | None) -> str:
        """What the interval says: "no difference", "better", "worse", or nothing where it cannot be said."""
        if self.interval is None:
            return ""
        if self.same():
            return "no difference"
        if better is None:
            return ""
        lower = self.interval[1] < (1.0 if self.kind == "ratio" else 0.0)
        return "better" if lower == (better == "lower") else "worse"

    def text(self, better: str | None) -> str:
        """The comparison as a cell of a table."""
        sign = "+" if self.kind == "difference" and self.center > 0 else ""
        text = f"{sign}{_number(self.center)}"
        if self.interval is None:
            return text
        text += f" ({_number(self.interval[0])} to {_number(self.interval[1])})"
        word = self.word(better)
        return f"{text}, {word}" if word else text


def compare(values: Sequence[float], reference: Sequence[float], kind: str = "ratio") -> Comparison | None:
    """An arm's values against those of its reference, one per seed; None if either has no finite value.

    Seeds of the two are not paired: the same number does not make two algorithms draw the same.
    """
    ours, theirs = ([value for value in side if math.isfinite(value)] for side in (values, reference))
    if not ours or not theirs:
        return None
    few = min(len(ours), len(theirs)) < LEAST_SEEDS
    center: Callable[[Any], float] = np.mean if few else interquartile_mean

    def statistic(both: Any) -> float:
        a, b = float(center(both[: len(ours)])), float(center(both[len(ours) :]))
        return a / b if kind == "ratio" else a - b

    interval = None if few else bootstrap_interval([ours, theirs], statistic)
    return Comparison(kind, statistic([*ours, *theirs]), interval)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _values(found: Sequence[Result], arm: Arm, column: str) -> list[float]:
    return [result.values[column] for result in found if result.arm.name == arm.name and column in result.values]


# Files ----------------------------------------------------------------------------------------------------------------


def write(
    experiment: Experiment, seeds: Sequence[int], folder: Path, facts: Mapping[str, Any], out: Callable[[str], None]
) -> list[Path]:
    """Writes results.csv, summary.md and figure.png from what is finished.

    Args:
        experiment: the declaration.
        seeds: those asked for; what is not finished of them is said.
        folder: of the experiment.
        facts: of experiment.json: size, budget, command, sessions.
        out: called with lines of text.

    Returns:
        The files written; no figure without matplotlib, or without a finished run.

    Raises:
        UserError: a file cannot be written.
    """
    found = results(experiment, seeds, folder)
    paths = [folder / "results.csv", folder / "summary.md"]
    _write_text(paths[0], table(experiment, found))
    _write_text(paths[1], summary(experiment, seeds, found, facts))
    if any(_values(found, arm, metric.column) for arm in experiment.arms for metric in experiment.metrics):
        try:
            paths.append(save_figure(draw(experiment, found, len(experiment.arms) * len(seeds)), folder / "figure.png"))
        except MissingExtra as error:
            out(f"no figure: {error}")
    return paths


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def table(experiment: Experiment, found: Sequence[Result]) -> str:
    """One row per finished run as CSV: what it is, and every metric, the declared ones first."""
    declared = [name for metric in experiment.metrics for name in (metric.column, metric.floor) if name]
    others = [name for result in found for name in result.values]
    columns = list(dict.fromkeys([*declared, *others]))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "x", "group", "steps", "seconds", *columns])
    for result in found:
        arm = result.arm
        first = [arm.name, result.seed, arm.x, arm.group, result.step, f"{result.seconds:.1f}"]
        writer.writerow([*first, *(result.values.get(name, "") for name in columns)])
    return buffer.getvalue()


def summary(experiment: Experiment, seeds: Sequence[int], found: Sequence[Result], facts: Mapping[str, Any]) -> str:
    """One row per arm as a Markdown table, under a header that says how it was made."""
    missing = [
        f"{arm.name} seed {seed}"
        for arm in experiment.arms
        for seed in seeds
        if not any(result.arm.name == arm.name and result.seed == seed for result in found)
    ]
    count = len(experiment.arms) * len(seeds)
    lines = [f"# {experiment.title}", "", experiment.question, ""]
    lines.append(f"- Runs: {len(found)} of {count} finished" + (f"; missing: {_listed(missing)}" if missing else ""))
    lines.append(f"- Command: `{facts['command']}`")
    sessions = facts["sessions"]
    for label, key in (("Commit", "commit"), ("Machine", "machine")):
        lines.append(f"- {label}: {'; '.join(dict.fromkeys(str(session[key] or 'unknown') for session in sessions))}")
    shared = dict.fromkeys(f"{result.arm.name} from {result.origin}" for result in found if result.origin)
    if shared:
        lines.append(f"- Runs of other experiments with the same settings: {', '.join(shared)}")
    taken = sum(result.seconds for result in found if math.isfinite(result.seconds))
    lines.append(f"- Budget: {facts['budget']} ({_duration(taken)} of training in the finished runs together)")
    lines.append(f"- Numbers: {_explanation(experiment, found)}")
    unseen = [
        metric.column for metric in experiment.metrics if found and not any(metric.column in r.values for r in found)
    ]
    if unseen:
        lines.append(f"- No finished run has {', '.join(f'`{name}`' for name in unseen)}")
    return "\n".join([*lines, "", *_arm_rows(experiment, found)]) + "\n"


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _explanation(experiment: Experiment, found: Sequence[Result]) -> str:
    counts = [sum(result.arm.name == arm.name for result in found) for arm in experiment.arms]
    counts = [count for count in counts if count]
    enough, few = (
        [count for count in counts if count >= LEAST_SEEDS],
        [count for count in counts if count < LEAST_SEEDS],
    )
    parts = []
    if enough or not counts:
        parts.append("interquartile mean over seeds (95 % bootstrap interval)")
    if few:
        whose = "" if not enough else f" in arms with fewer than {LEAST_SEEDS} seeds"
        parts.append(f"mean over seeds (smallest to largest){whose}, because fewer than {LEAST_SEEDS} give no interval")
    if enough and any(experiment.reference_of(arm) for arm in experiment.arms):
        parts.append(
            "comparisons resample the seeds of both sides, and say no difference where the interval does not exclude it"
        )
    return "; ".join(parts)


def _kind(experiment: Experiment, found: Sequence[Result], metric: Metric) -> str:
    """How arms are compared: a ratio means nothing of numbers that may be zero or negative."""
    if metric.compare == "difference":
        return metric.compare
    values = [value for arm in experiment.arms for value in _values(found, arm, metric.column) if math.isfinite(value)]
    return "ratio" if min(values, default=1.0) > 0 else "difference"


def _heading(metric: Metric) -> str:
    return metric.label + {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]


def _arm_rows(experiment: Experiment, found: Sequence[Result]) -> list[str]:
    references = [experiment.reference_of(arm) for arm in experiment.arms]
    labels = list(dict.fromkeys(reference.label for reference in references if reference))
    # Named in the heading where all are compared with the same arm, else in a column.
    several = len(labels) > 1
    main = "reference" if several else "".join(labels)
    header = ["arm", "seeds", *([experiment.x] if experiment.x else []), *(["reference"] if several else [])]
    for metric in experiment.metrics:
        header.append(_heading(metric))
        if metric.floor:
            header.append(f"{metric.label}, floor")
        if any(references):
            word = "ratio to" if _kind(experiment, found, metric) == "ratio" else "difference from"
            header.append(f"{word} {main}")
    rows = [[*header, "seconds per run"]]
    for arm, reference in zip(experiment.arms, references, strict=True):
        ours = [result for result in found if result.arm.name == arm.name]
        row = [arm.label, str(len(ours))]
        if experiment.x:
            row.append("—" if arm.x is None else f"{arm.x:g}")
        if several:
            row.append(reference.label if reference else "—")
        for metric in experiment.metrics:
            row.append(str(estimate(_values(found, arm, metric.column))))
            if metric.floor:
                floors = [value for value in _values(found, arm, metric.floor) if math.isfinite(value)]
                row.append(_number(float(np.mean(floors))) if floors else "—")
            if main:
                row.append(_against(experiment, found, metric, arm, reference))
        seconds = [result.seconds for result in ours]
        rows.append([*row, _number(float(np.median(seconds))) if seconds else "—"])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _against(experiment: Experiment, found: Sequence[Result], metric: Metric, arm: Arm, reference: Arm | None) -> str:
    if reference is None:
        served = any(experiment.reference_of(side) == arm for side in experiment.arms)
        return "reference" if served else "—"
    values, theirs = (_values(found, side, metric.column) for side in (arm, reference))
    comparison = compare(values, theirs, _kind(experiment, found, metric))
    return "—" if comparison is None else comparison.text(metric.better)


# Figure ---------------------------------------------------------------------------------------------------------------


def draw(experiment: Experiment, found: Sequence[Result], count: int) -> Figure:
    """One panel per metric: against the experiment's axis, a line per group; without an axis, a row per arm.

    Args:
        experiment: the declaration.
        found: finished runs.
        count: runs asked for, which the title says where some are missing.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    metrics = [m for m in experiment.metrics if any(_values(found, arm, m.column) for arm in experiment.arms)]
    columns = 2 if len(metrics) == 4 else min(len(metrics), _COLUMNS)
    lines = -(-len(metrics) // columns)
    height = 3.6 if experiment.x else 1.0 + 0.46 * len(experiment.arms)
    with figure_style():
        from matplotlib.figure import Figure

        size = (max(4.4 * columns + (0.0 if experiment.x else 1.4), 6.0), height * lines + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=False)
        for panel in grid.ravel()[len(metrics) :]:
            panel.remove()
        for i, (panel, metric) in enumerate(zip(grid.ravel(), metrics)):
            if experiment.x:
                _draw_lines(panel, experiment, found, metric)
            else:
                _draw_rows(panel, experiment, found, metric, labels=i % columns == 0)
        handles, labels = _handles(list(grid.ravel()[: len(metrics)])) if experiment.x else _patches(experiment)
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=9)
        title = textwrap.fill(experiment.title, int(size[0] * 11))
        figure.suptitle(f"{title}\n{_note(experiment, found, count)}", x=0.01, ha="left", fontsize=10.5)
    return figure


def _note(experiment: Experiment, found: Sequence[Result], count: int) -> str:
    """How to read the figure, and what it lacks."""
    counts = [n for arm in experiment.arms if (n := sum(result.arm.name == arm.name for result in found))]
    low, high = min(counts), max(counts)
    seeds = "1 seed" if high == 1 else f"{low} seeds" if low == high else f"{low} to {high} seeds"
    how = "interquartile mean and 95 % interval" if high >= LEAST_SEEDS else "mean and range"
    if low < LEAST_SEEDS <= high:
        how += f" (mean and range of fewer than {LEAST_SEEDS})"
    missing = f", {len(found)} of {count} runs" if len(found) < count else ""
    return f"dots: runs; {how} over {seeds}{missing}"


def _groups(experiment: Experiment) -> dict[str | None, int]:
    """Groups of the arms, and which colour and marker each has."""
    return {group: i for i, group in enumerate(dict.fromkeys(arm.group for arm in experiment.arms))}


def _handles(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Legend entries of all panels, each label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def _patches(experiment: Experiment) -> tuple[list[Any], list[str]]:
    """Legend entries of the named groups."""
    from matplotlib.patches import Patch

    named = {group: COLORS[i % len(COLORS)] for group, i in _groups(experiment).items() if group is not None}
    return [Patch(color=color) for color in named.values()], list(named)


def _finite(found: Sequence[Result], arm: Arm, column: str) -> list[float]:
    return [value for value in _values(found, arm, column) if math.isfinite(value)]


def _draw_lines(axis: Axes, experiment: Experiment, found: Sequence[Result], metric: Metric) -> None:
    """A metric against the axis, a line per group with a band for its interval."""
    groups = _groups(experiment)
    every: list[float] = []
    for group, i in groups.items():
        color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
        points = []
        for arm in experiment.arms:
            values = _finite(found, arm, metric.column) if arm.group == group else []
            every += values
            if values and arm.x is not None:
                points.append((arm.x, estimate(values)))
                axis.plot([arm.x] * len(values), values, ".", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
            elif values:
                axis.axhline(estimate(values).center, color=color, linewidth=1.4, linestyle=":", label=arm.label)
        if points:
            points.sort(key=lambda point: point[0])
            x = [place for place, _ in points]
            low, center, high = np.transpose([(e.low, e.center, e.high) for _, e in points])
            axis.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
            axis.plot(x, center, color=color, marker=marker, markersize=5, linewidth=1.8, label=group or "_nolegend_")
    places = sorted({arm.x for arm in experiment.arms if arm.x is not None})
    _set_scale(axis, "x", places, log=places[0] > 0 and places[-1] >= 8 * places[0])
    if len(places) <= 8:
        axis.set_xticks(places, _labels_apart(axis, places))
        axis.set_xticks([], minor=True)
    axis.set_xlabel(experiment.x or "")
    axis.set_title(_title(metric))
    if metric.floor:
        floors = {
            place: [v for arm in experiment.arms if arm.x == place for v in _finite(found, arm, metric.floor)]
            for place in places
        }
        known = [(place, float(np.mean(values))) for place, values in floors.items() if values]
        if known:
            where, floor = [place for place, _ in known], [value for _, value in known]
            every += floor
            axis.plot(where, floor, color="#555555", linestyle="--", linewidth=1.2)
            axis.annotate(
                "floor", (where[-1], floor[-1]), xytext=(0, 3), textcoords="offset points", ha="right", color="#555555"
            )
    _set_scale(axis, "y", every, log=metric.log)


def _draw_rows(axis: Axes, experiment: Experiment, found: Sequence[Result], metric: Metric, *, labels: bool) -> None:
    """A metric per arm: bars from zero, markers where zero is not on the axis or means nothing; runs as dots."""
    groups = _groups(experiment)
    every = [value for arm in experiment.arms for value in _finite(found, arm, metric.column)]
    bars = not _logarithmic(metric.log, every) and min(every, default=0.0) >= 0
    floors = {}
    for row, arm in enumerate(experiment.arms):
        values = _finite(found, arm, metric.column)
        color = COLORS[groups[arm.group] % len(COLORS)]
        if not values:
            note = "not finite" if _values(found, arm, metric.column) else "no finished run"
            axis.annotate(
                note, (0.02, row), xycoords=("axes fraction", "data"), va="center", color="#888888", fontsize=8
            )
            continue
        middle = estimate(values)
        error = [[middle.center - middle.low], [middle.high - middle.center]]
        # The interval of an interquartile mean need not hold it exactly.
        error = np.maximum(error, 0).tolist()
        if bars:
            axis.barh(row, middle.center, height=0.62, color=color, alpha=0.55)
        axis.errorbar(
            middle.center,
            row,
            xerr=error,
            color="black" if bars else color,
            fmt="none" if bars else "o",
            markersize=6,
            elinewidth=1.4 if bars else 2.2,
            capsize=3,
        )
        spread = row + np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [row]
        axis.plot(values, spread, ".", color="#333333", alpha=0.55, markersize=5, markeredgewidth=0)
        if metric.floor and (below := _finite(found, arm, metric.floor)):
            floors[row] = float(np.mean(below))
    for row, floor in floors.items():
        axis.plot([floor, floor], [row - 0.5, row + 0.5], color="#555555", linestyle="--", linewidth=1.2)
    if floors:
        row, floor = min(floors.items())
        axis.annotate(
            "floor",
            (floor, row - 0.5),
            xytext=(3, 1),
            textcoords="offset points",
            va="bottom",
            color="#555555",
            fontsize=8,
        )
    names = [textwrap.fill(arm.label, 26) for arm in experiment.arms]
    axis.set_yticks(range(len(names)), names if labels else [""] * len(names))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    # Room for the floor's name, in all panels so that their rows are level.
    axis.set_ylim(len(names) - 0.5, -0.5 - (0.35 if any(other.floor for other in experiment.metrics) else 0))
    axis.set_title(_title(metric))
    _set_scale(axis, "x", [*every, *floors.values()], log=metric.log)


def _labels_apart(axis: Axes, places: Sequence[float]) -> list[str]:
    """A label for each of the ascending places; none for those that would touch the label before."""
    at = axis.transAxes.inverted().transform(axis.transData.transform([(place, 0.0) for place in places]))[:, 0]
    labels, last = [], -math.inf
    for place, x in zip(places, at, strict=True):
        free = x - last > 0.07
        labels.append(f"{place:g}" if free else "")
        last = x if free else last
    return labels


def _title(metric: Metric) -> str:
    return metric.label + {"lower": " (lower is better)", "higher": " (higher is better)", None: ""}[metric.better]


def _logarithmic(wanted: bool, values: Sequence[float]) -> bool:
    return wanted and min(values, default=0.0) > 0


def _set_scale(axis: Axes, which: Literal["x", "y"], values: Sequence[float], *, log: bool) -> None:
    """Scale and ticks along x or y; numbers that are not all positive have no logarithm."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not _logarithmic(log, values):
        return
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    ticks = axis.xaxis if which == "x" else axis.yaxis
    # Within few decades, powers of ten alone would leave an axis with a single number.
    decades = math.log10(max(values) / min(values))
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    ticks.set_minor_formatter(NullFormatter())
    if decades < 5:
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
