"""The goals on a GPU, and how a run of `benchmarks.gpu` stands beside them: a table, goal beside measured.

Times are medians of one run in turns, products in bf16 and everything else in float32. A ratio is the median of the
rounds' quotients, against the fastest of its kind: eager PyTorch as it is called, torch.compile with CUDA graphs, and
JAX's jit. fastflow's side is its CUDA graph where one was measured, as theirs are, and else the call; beside eager
PyTorch the ratio of plain calls is told as well. Absolute goals (updates per second) are those of an H200.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PRECISION = "bf16"
# By column: the rivals of its kind, and in which way they are called; with CUDA graphs of their own or inside of one.
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "eager": {"eager": ("call",)},
    "compile": {
        "compile reduce-overhead": ("call",),
        "compile max-autotune": ("call",),
        "compile + graph": ("graph",),
    },
    "jax": {"jax": ("call",), "jax unrolled": ("call",)},
}
HEADINGS = {"eager": "eager", "compile": "torch.compile + CUDA graph", "jax": "JAX jit"}
SMALL = "Small sizes, for trying the program: these are no measurements of the cases below."
# What fits of time over K are of.
FITTED, FIT_RIVAL = "fused graph", "compile max-autotune call"


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Args:
        name: of a case or an update; "k-scaling" for the fit of time over K.
        title: its first cell.
        eager, compile, jax: how many times as fast as each fastflow is to be; None for no goal.
        floor: at most so many times the least time that FLOPs and bytes leave.
        peak: at least this share of the measured rate of bf16 products.
        rate: at least so many updates per second.
        memory: at most this share of eager PyTorch's peak memory.
        slope: at most this share of torch.compile's slope over K. fixed: at most so many microseconds besides the
            slope. linear: no K further from the line than this, of itself.
    """

    name: str
    title: str
    eager: float | None = None
    compile: float | None = None
    jax: float | None = None
    floor: float | None = None
    peak: float | None = None
    rate: float | None = None
    memory: float | None = None
    slope: float | None = None
    fixed: float | None = None
    linear: float | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """The goals that are ratios to a rival, by column."""
        given = {"eager": self.eager, "compile": self.compile, "jax": self.jax}
        return {kind: value for kind, value in given.items() if value is not None}


GOALS = (
    Goal("walk-2x2048", "floq walk, 2 nets x 2,048 rows, 4x512, HL-Gauss, K=8", 6, 1.8, 2.5, floor=2.5),
    Goal("walk-2x256", "the same, 2 x 256 rows", 10, 2.5, 3),
    Goal("walk-2x8192", "the same, 2 x 8,192 rows", 3, 1.5, 2, peak=0.55),
    Goal("k-scaling", "time over K from 1 to 64, 2 x 2,048 rows", slope=0.55, fixed=10, linear=0.03),
    Goal("fpo-walk-2048", "FPO sampler, 2,048 environments, 4x32, K=10", 20, 5, 5),
    Goal("fpo-plus-walk-4096", "FPO++ sampler, 4,096 environments, 3x256, K=64", 20, 3, 3),
    Goal("one-row", "one row, 4x512, K=10", 15, 2, 3),
    Goal("loss-2x2048", "loss and gradients, 2 nets x 2,048 rows, 4x512", 3, 1.5, 2, floor=2.5),
    Goal("fpo-loss-30720x8", "FPO loss of 30,720 x 8 pairs and gradients, 4x32", 5, 2.5, 2.5, memory=0.2),
    Goal("walk-to-actions-2x2048", "floq walk and its gradient to actions, 2 nets x 2,048 rows, K=8", 4, 1.5, 2),
    Goal(
        "update-cube-double-depth4",
        "whole floq update, cube-double sizes, B=256, r=8, K=8, critic 4x512",
        *(6, 2, 4),
        rate=1000,
    ),
    Goal("update-td2-unet", "whole TD²-CFM update, B=1024, FiLM U-Net 3x512, 10 midpoint steps", 6, 2, rate=500),
)
NAMES = tuple(goal.name for goal in GOALS)


def evaluate(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table from a run's report: `title`, `name`, `fastflow_us` by mode, and `goals` by what they are
    about, each with `goal`, `measured` (None where it was not) and `met`, which no run of small sizes does."""
    rows = [_row(goal, report) for goal in GOALS]
    for goal in (goal for row in rows for goal in row["goals"].values()):
        goal["met"] = goal["met"] and not report.get("small")
    return rows


def _row(goal: Goal, report: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": goal.name, "title": goal.title, "fastflow_us": {}, "goals": {}}
    if goal.name == "k-scaling":
        ours = _own_fit(report)
        if ours:
            out["fastflow_us"] = {"fixed": ours["fixed_us"], "slope": ours["slope_us"]}
        out["goals"] = dict(_scaling(goal, report))
        return out
    case = {**report.get("cases", {}), **report.get("updates", {})}.get(goal.name, {})
    rows = [row for row in case.get("results", []) if row["precision"] == PRECISION and row.get("accurate", True)]
    ours = {row["mode"]: row for row in rows if row["rival"] == "fused"}
    out["fastflow_us"] = {mode: row["median_us"] for mode, row in ours.items()}
    mode = "graph" if "graph" in ours else "call"
    best = ours.get(mode)
    for kind, wanted in goal.ratios.items():
        out["goals"][kind] = {"goal": wanted, "measured": None, "met": False} | _ratio(kind, wanted, rows, mode)
    if goal.floor is not None:
        times = best and best.get("times_floor")
        out["goals"]["floor"] = _at_most(goal.floor, times)
    if goal.peak is not None:
        peak = report.get("context", {}).get(f"product_{PRECISION}_tflops")
        out["goals"]["peak"] = _at_least(goal.peak, best["tflops"] / peak if best and peak else None)
    if goal.rate is not None:
        out["goals"]["rate"] = _at_least(goal.rate, best and 1e6 / best["median_us"])
    if goal.memory is not None:
        out["goals"]["memory"] = _at_most(goal.memory, _memory_share(rows))
    return out


def _ratio(kind: str, wanted: float, rows: Sequence[Mapping[str, Any]], mode: str) -> dict[str, Any]:
    """Against the rival of a kind that is fastest beside fastflow."""
    rivals = [row for row in rows if row["mode"] in KINDS[kind].get(row["rival"], ()) and row["vs_fused"].get(mode)]
    if not rivals:
        return {}
    row = min(rivals, key=lambda row: row["vs_fused"][mode]["median"])
    found = row["vs_fused"][mode]
    out = {"against": row["rival"], "mode": mode, "measured": found["median"], "met": found["median"] >= wanted}
    out |= {end: found.get(end) for end in ("low", "high")}
    call = row["vs_fused"].get("call")
    return out | ({"measured_call": call["median"]} if kind == "eager" and mode == "graph" and call else {})


def _memory_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """fastflow's peak memory over eager PyTorch's."""
    peak = {row["rival"]: row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")}
    return peak["fused"] / peak["eager"] if peak.keys() >= {"fused", "eager"} else None


def _own_fit(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """fastflow's line over K; where no graph holds the walk, as on a CPU, of its calls."""
    fits = report.get("k_scaling", {}).get("fits", {})
    return fits.get(FITTED) or fits.get("fused call")


def _scaling(goal: Goal, report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    ours, rival = _own_fit(report), report.get("k_scaling", {}).get("fits", {}).get(FIT_RIVAL)
    if goal.slope is not None:
        share = ours["slope_us"] / rival["slope_us"] if ours and rival and rival["slope_us"] > 0 else None
        yield "slope", _at_most(goal.slope, share)
    if goal.fixed is not None:
        yield "fixed", _at_most(goal.fixed, ours and ours["fixed_us"])
    if goal.linear is not None:
        yield "linear", _at_most(goal.linear, ours and ours["worst_relative"])


def _at_most(goal: float, measured: float | None) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "met": measured is not None and measured <= goal}


def _at_least(goal: float, measured: float | None) -> dict[str, Any]:
    return {"goal": goal, "measured": measured, "met": measured is not None and measured >= goal}


# The table ----------------------------------------------------------------------------------------------------------

COLUMNS = (*HEADINGS, "floor")
# What stands in the last column: words around the goal, and how a number is written.
_WORDS = {
    "floor": ("at most {}", "{:.2g}x the floor"),
    "peak": ("at least {}", "{:.0%} of the peak"),
    "rate": ("at least {}", "{:,.0f} updates/s"),
    "memory": ("at most {}", "{:.2g} of eager's memory"),
    "fixed": ("at most {}", "{:.3g} µs fixed"),
    "linear": ("within {}", "{:.1%} of a line"),
}


def markdown(report: Mapping[str, Any]) -> str:
    """The table as printed, then where and how it was measured."""
    # No table of goals is to be taken for that of a machine which it is not.
    lines = [f"**{SMALL}**", ""] if report.get("small") else []
    lines += ["| case | fastflow | " + " | ".join(f"vs {name}" for name in HEADINGS.values()) + " | besides |"]
    lines += ["|---" * (3 + len(HEADINGS)) + "|"]
    rows = evaluate(report)
    for row in rows:
        goals = row["goals"]
        cells = [_cell(goals[kind]) if kind in goals else "-" for kind in HEADINGS]
        if "slope" in goals:
            cells[1] = _slope(goals["slope"])
        besides = [_besides(name, goals[name]) for name in _WORDS if name in goals]
        lines.append(
            f"| {row['title']} | {_ours(row['fastflow_us'])} | "
            + " | ".join(cells)
            + f" | {', '.join(besides) or '-'} |"
        )
    every = [goal for row in rows for goal in row["goals"].values()]
    met, missing = sum(goal["met"] for goal in every), sum(goal["measured"] is None for goal in every)
    lines += [
        "",
        f"{met} of {len(every)} goals met, {missing} not run. A cell: the goal, how many times as fast fastflow is,",
    ]
    lines += ["✓ where that meets the goal. fastflow's time is that of a CUDA graph, in brackets as called."]
    lines += ["", *_where(report)]
    return "\n".join(lines) + "\n"


def _ours(times: Mapping[str, float]) -> str:
    if not times:
        return "not run"
    if "slope" in times:
        return f"{_us(times['fixed'])} + K {_us(times['slope'])}"
    first = f"{_us(times['graph'])}" if "graph" in times else f"(call {_us(times['call'])})"
    return first + (f" (call {_us(times['call'])})" if {"graph", "call"} <= times.keys() else "")


def _us(value: float) -> str:
    return f"{value:.3g} µs" if value < 1000 else f"{float(f'{value / 1000:.3g}'):g} ms"


def _mark(goal: Mapping[str, Any]) -> str:
    return " ✓" if goal["met"] else ""


def _cell(goal: Mapping[str, Any]) -> str:
    if goal["measured"] is None:
        return f"{goal['goal']:g}x: not run"
    if goal.get("low") is not None and goal["low"] <= 1.0 <= goal["high"]:
        return f"{goal['goal']:g}x: no difference"
    call = f" (call {goal['measured_call']:.2f}x)" if "measured_call" in goal else ""
    return f"{goal['goal']:g}x: {goal['measured']:.2f}x{_mark(goal)}{call}"


def _slope(goal: Mapping[str, Any]) -> str:
    found = "not run" if goal["measured"] is None else f"{goal['measured']:.2f}x{_mark(goal)}"
    return f"slope at most {goal['goal']:g}x: {found}"


def _besides(name: str, goal: Mapping[str, Any]) -> str:
    before, number = _WORDS[name]
    found = "not run" if goal["measured"] is None else number.split(" ")[0].format(goal["measured"]) + _mark(goal)
    return f"{before.format(number.format(goal['goal']))}: {found}"


def absolute(goal: Goal) -> str:
    """The goals of a row that name no rival, in words."""
    given = {name: getattr(goal, name) for name in _WORDS}
    found = [
        _WORDS[name][0].format(_WORDS[name][1].format(value)) for name, value in given.items() if value is not None
    ]
    return ", ".join(found)


def _where(report: Mapping[str, Any]) -> Iterator[str]:
    hardware, software, repository = report["hardware"], report["software"], report["repository"]
    device = (
        f"{hardware['gpu']}, driver {hardware.get('driver')}" if "gpu" in hardware else "a CPU, for trying the program"
    )
    yield f"- {device}; products in {PRECISION}"
    context = report.get("context", {})
    if f"product_{PRECISION}_tflops" in context:
        rate, bandwidth = context[f"product_{PRECISION}_tflops"], context.get("copy_tbytes_per_s")
        yield f"- measured: {rate:.4g} TFLOP/s of {PRECISION} products" + (
            f", copies at {bandwidth:.3g} TB/s" if bandwidth else ""
        )
    versions = ", ".join(
        f"{name} {software[name]}" for name in ("python", "torch", "triton", "jax") if software.get(name)
    )
    commit = f"{repository['commit'] or repository['sources']}{' and changes' if repository['dirty'] else ''}"
    yield f"- {versions}; commit {commit}; {report['started']}, {report['seconds']:.0f} s"
    tests = report.get("tests", {})
    yield f"- kernel tests: {tests.get('status', 'not run')}"
    wrong = [failure["where"] for failure in report.get("failures", []) if failure["grave"]]
    if wrong:
        yield f"- FAILED: {', '.join(wrong[:12])}"
    profile = report.get("ncu", {})
    for name, found in profile.get("cases", {}).items():
        if "tensor_percent" in found:
            tensor, l2 = found["tensor_percent"], found["l2_tbytes_per_s"]
            yield f"- {name} under ncu: tensor pipes busy {tensor:.0f} %, L2 {l2:.3g} TB/s"
    if profile.get("status") not in (None, "done"):
        yield f"- ncu: {profile['status']}"
    errors = [row["relative_error"] for row in report.get("predictions", {}).values()]
    if errors:
        typical = sorted(map(abs, errors))[len(errors) // 2]
        yield f"- the model's predictions are off by {typical:.0%} (median of {len(errors)} cases)"
