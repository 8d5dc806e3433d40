"""python -m benchmarks.predictions: what fastflow's kernels should take on an H200, by the model of `kernels.roofline`.

PREDICTIONS, NOT MEASUREMENTS. Prints a row for every case of the GPU's table of goals: the launch by every design that
covers it, what surrounds the launch in a CUDA graph, all in all by the designs that exist and by the cheapest of all,
and the floor. Writes predictions-<machine>.md and .json into benchmarks/results/. `make gpu` compares its measurements
with the same model and reports the error.

What surrounds a launch (weights packed, cond's share of the first layer, gradients added up ...) is counted, not
guessed: in Triton's interpreter, or on a GPU by torch's profiler.

    --machine H200    or another of kernels.roofline
    --output FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before anything imports triton: launches are counted in its interpreter.
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks import launches
from benchmarks.cases import CASES, Case, PlainPass, UpdateCase
from benchmarks.gpu_updates import GPU_UPDATES, Td2UpdateCase
from benchmarks.rivals import fused
from fastflow import fused_dense
from fastflow.dense import Kind
from fastflow.fused import network
from fastflow.kernels import plan, roofline
from fastflow.kernels.roofline import Machine

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
HEAD = "PREDICTIONS, NOT MEASUREMENTS: a model of the machine, nothing has run"


class Predicted(NamedTuple):
    """Microseconds of some launches: all of them, those that leave no multiprocessor to others, and by which design."""

    us: float
    filling_us: float
    chosen: dict[str, str]


def predict(
    case: Case, machine: Machine, precision: str, designs: Sequence[str] | None = None, ring: bool = False
) -> Predicted:
    """A case's launches and weight gradients, each by the cheapest of some designs, or without any by the one that
    runs, `ring` with FASTFLOW_RING=1.

    Raises:
        ValueError: none of the designs covers the case.
    """
    net, members = network(case.spec, precision), case.spec.ensemble or 1
    rows, evaluations = members * case.rows, case.evaluations
    own_times = case.end_times or case.kind != "integrate"
    if own_times:
        net = plan.film_rows(net, members, case.rows, evaluations)
    forward = "integrate_fwd" if case.kind == "integrate" else "matching_fwd"
    stored = plan.stores(net, members, case.rows, evaluations)
    options: dict[str, Any] = {"members": members, "own_times": own_times}
    save = bool(case.gradient) and stored
    if designs is None:
        chosen = {forward: roofline.built(net, rows, machine, forward, save=save, ring=ring, **options)}
    else:
        names = {"designs": designs, "save": save, **options}
        chosen = {forward: roofline.best(net, rows, evaluations, machine, forward, **names)}
    there = roofline.predict(chosen[forward], forward, net, rows, evaluations, machine, save=save, **options).seconds
    seconds = {forward: there}
    if case.gradient:
        # What only covers the way there goes back by what exists.
        covering = [d for d in designs or () if roofline.why_not(d, "backward", net, machine) is None] or ["rows"]
        back = roofline.best(net, rows, evaluations, machine, "backward", designs=covering, **options)
        chosen["backward"] = back
        seconds["backward"] = roofline.predict(back, "backward", net, rows, evaluations, machine, **options).seconds
        if not stored:
            again = roofline.predict(chosen[forward], forward, net, rows, evaluations, machine, **options)
            seconds["backward"] += again.seconds
    around = (1 + bool(case.gradient)) * roofline.prepared(net, rows, evaluations, machine)
    if "parameters" in case.gradient:
        around += roofline.weight_gradients(net, rows, evaluations, machine)
    return _predicted(seconds, around, chosen, net, rows, machine, members)


def predict_plain(case: PlainPass, machine: Machine, precision: str, ring: bool = False) -> Predicted:
    """A plain network's kernels and weight gradients, by the design that runs."""
    net = fused_dense.network(Kind(case.widths, True, "gelu_tanh", case.norm, 1e-6, precision))
    rows, save = case.members * case.rows, bool(case.gradient)
    options: dict[str, Any] = {"members": case.members, "save": save}
    chosen = {"integrate_fwd": roofline.built(net, rows, machine, ring=ring, **options)}
    there = roofline.predict(chosen["integrate_fwd"], "integrate_fwd", net, rows, 1, machine, **options)
    seconds = {"integrate_fwd": there.seconds}
    if case.gradient:
        chosen["backward"] = "rows"
        back = roofline.predict("rows", "backward", net, rows, 1, machine, members=case.members)
        seconds["backward"] = back.seconds
    around = roofline.weight_gradients(net, rows, 1, machine) if "parameters" in case.gradient else 0.0
    return _predicted(seconds, around, chosen, net, rows, machine, case.members)


def _predicted(
    seconds: Mapping[str, float],
    around: float,
    chosen: dict[str, str],
    net: plan.Network,
    rows: int,
    machine: Machine,
    members: int,
) -> Predicted:
    filling = (
        taken
        for kernel, taken in seconds.items()
        if roofline.fills(chosen[kernel], kernel, net, rows, machine, members)
    )
    return Predicted(1e6 * (sum(seconds.values()) + around), 1e6 * sum(filling), chosen)


def floor_us(flops: int, moved: int, machine: Machine, precision: str) -> float:
    """The least time that FLOPs and bytes leave."""
    return 1e6 * max(flops / machine.rate(precision), moved / machine.memory)


def of_case(case: Case, machine: Machine, precision: str, launched: int) -> dict[str, Any]:
    """What a case should take.

    Args:
        launched: kernels that one call launches.
    """
    by_design = {}
    for design in roofline.DESIGNS:
        try:
            by_design[design] = predict(case, machine, precision, [design]).us
        except ValueError:
            continue
    own = 1 + bool(case.gradient)
    around = 1e6 * roofline.around(max(launched - own, 0), machine)
    built, _, built_by = predict(case, machine, precision)
    ring = predict(case, machine, precision, ring=True).us
    chosen, _, chosen_by = predict(case, machine, precision, roofline.DESIGNS)
    return {
        "title": case.title,
        "launches": launched,
        "around_us": around,
        "kernels_us": by_design,
        "predicted_us": built + around,
        "built": built_by,
        "ring_us": ring + around,
        "chosen_us": chosen + around,
        "chosen": chosen_by,
        "floor_us": floor_us(case.flops, case.bytes, machine, precision),
    }


def of_update(
    case: UpdateCase | Td2UpdateCase, machine: Machine, precision: str, launched: Mapping[str, int]
) -> dict[str, Any]:
    """What a whole update should take in a CUDA graph: its walks, losses and plain networks, and everything else as
    launches; branches side by side, but for kernels that leave no multiprocessor to others.

    Args:
        launched: kernels of every branch, as `launches.by_branch` counts them.
    """

    def total(designs: Sequence[str] | None, ring: bool) -> tuple[float, float]:
        """Microseconds with branches, and one behind the other."""
        filling, by_branch = 0.0, []
        for name, (operators, passes) in case.parts.items():
            found = [predict(operator, machine, precision, designs, ring) for operator in operators]
            found += [predict_plain(each, machine, precision, ring) for each in passes]
            filling += sum(each.filling_us for each in found)
            beside = sum(each.us - each.filling_us for each in found)
            by_branch.append(beside + 1e6 * roofline.around(launched.get(name, 0), machine))
        return filling + max(by_branch), filling + sum(by_branch)

    (built, in_turn), (ring, _), (chosen, _) = (
        total(designs, ring) for designs, ring in ((None, False), (None, True), (roofline.DESIGNS, False))
    )
    operators_us = sum(predict(operator, machine, precision).us for operator in case.launched)
    return {
        "title": case.title,
        "update": True,
        "launches": sum(launched.values()),
        "branches": dict(launched),
        "around_us": in_turn - operators_us,
        "predicted_us": built,
        "in_turn_us": in_turn,
        "ring_us": ring,
        "chosen_us": chosen,
        "floor_us": 1e6 * case.flops / machine.rate(precision),
    }


def counted_as(name: str) -> str:
    """Under which name launches are counted: their number does not depend on rows and steps."""
    return "walk-2x2048" if name.startswith("walk-2x") else name


def count_case(case: Case, device: torch.device, precision: str) -> int:
    """Kernels that one call of a case launches."""
    problem = case.with_batch(8).build(device)
    return launches.count(fused(problem, precision).call, device)


def count_update(case: UpdateCase | Td2UpdateCase, device: torch.device, precision: str) -> dict[str, int]:
    """Kernels that one update launches in every branch; on a GPU, where they are counted together, in the shares that
    the interpreter has found."""
    agent, (batch,) = case.agent(device, "fused", precision), case.batches(device, 1)
    if device.type != "cuda":
        return launches.by_branch(lambda: agent.update(batch))
    count = launches.count(lambda: agent.update(batch), device)
    written = json.loads((ROOT / "benchmarks" / "results" / "predictions-h200.json").read_text(encoding="utf-8"))
    known: dict[str, int] = written["cases"].get(case.name, {}).get("branches", {"": 1})
    whole = sum(known.values())
    found = {name: round(count * n / whole) for name, n in known.items() if name}
    return {"": count - sum(found.values()), **found}


def table(machine: Machine, precision: str = "bf16") -> dict[str, Any]:
    """Predictions of all cases with a goal, by name."""
    from benchmarks.gpu_goals import GOALS, absolute

    device = torch.device("cpu")
    found: dict[str, Any] = {}
    for goal in GOALS:
        if goal.name in CASES:
            found[goal.name] = of_case(
                CASES[goal.name], machine, precision, count_case(CASES[goal.name], device, precision)
            )
        elif goal.name in GPU_UPDATES:
            update = GPU_UPDATES[goal.name]
            found[goal.name] = of_update(update, machine, precision, count_update(update, device, precision))
    walk = CASES["walk-2x2048"]
    found["k-scaling"] = _over_steps(walk, machine, precision, found[walk.name]["launches"])
    # In the goals' order and words.
    return {goal.name: found[goal.name] | {"title": goal.title, "goal": absolute(goal)} for goal in GOALS}


def _over_steps(walk: Case, machine: Machine, precision: str, launched: int) -> dict[str, Any]:
    """Time over K as fixed cost and slope."""

    def at(k: int, key: str) -> float:
        value: float = of_case(dataclasses.replace(walk, num_steps=k), machine, precision, launched)[key]
        return value

    one, two = (dataclasses.replace(walk, num_steps=k) for k in (1, 2))
    found: dict[str, Any] = {"launches": launched}
    found["around_us"] = 1e6 * roofline.around(launched - 1, machine)
    for key in ("predicted_us", "ring_us", "chosen_us"):
        found[key] = at(2, key) - at(1, key)
        found[f"fixed_{key}"] = at(1, key) - found[key]
    found["floor_us"] = floor_us(two.flops - one.flops, 0, machine, precision)
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The predictions as a table, and what they rest on."""
    designs = roofline.DESIGNS
    lines = [f"# {HEAD}", ""]
    head = [f"predicted for {report['machine']}, µs", "as it runs", "FASTFLOW_RING=1", "cheapest design"]
    head += ["floor", "goal"]
    lines += ["| " + " | ".join([*head, "around, launches", *(f"by {design}" for design in designs)]) + " |"]
    lines += ["|---" * (len(head) + 1 + len(designs)) + "|"]
    for row in report["cases"].values():
        cells = [row["title"], *(_total(row, key, "") for key in ("predicted_us", "ring_us"))]
        cells += [_total(row, "chosen_us", _names(row))]
        cells += [_us(row["floor_us"]), row["goal"] or "-", f"{_us(row['around_us'])}, {row['launches']}"]
        cells += [_us(row.get("kernels_us", {}).get(design)) or "-" for design in designs]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"One call in a CUDA graph, products in {report['precision']}, by the model in `kernels/roofline.py`.",
        "As it runs: by the design that the plan takes; FASTFLOW_RING=1: with the kernel that has to be asked for",
        "until a GPU has run it; cheapest: by the best of all, of which `layers` has not been built; in brackets how",
        "many times the floor, which is FLOPs and bytes at the machine's assumed rates. Around: what surrounds the",
        "kernels, with the number of launches, counted without running them. By a design: its kernels alone, gradients",
        "of weights included. Over K: a step, and what is fixed. Whole updates: captured, branches side by side but",
        "for kernels that fill the GPU; the JSON has what they take in turn. The goals are those that name no rival.",
        "",
        "| assumed of the machine | |",
        "|---|---|",
        *(f"| {name} | {_assumed(value)} |" for name, value in report["assumed"].items()),
    ]
    return "\n".join(lines) + "\n"


def _total(row: Mapping[str, Any], key: str, names: str) -> str:
    inside = [f"{row[key] / row['floor_us']:.1f}x", *([names] if names else [])]
    if row.get("update"):
        inside.append(f"{1e6 / row[key]:,.0f} updates/s")
    fixed = f", fixed {_us(row[f'fixed_{key}'])}" if f"fixed_{key}" in row else ""
    return f"{_us(row[key])}{fixed} ({', '.join(inside)})"


def _names(row: Mapping[str, Any]) -> str:
    return " and ".join(dict.fromkeys(row.get("chosen", {}).values()))


def _assumed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(f"{share:g} to {rows} rows" for rows, share in value) if isinstance(value, list) else f"{value:,}"


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def compare(
    report: Mapping[str, Any], machine: Machine, precision: str, device: torch.device | None, counted: dict[str, Any]
) -> dict[str, Any]:
    """Predicted beside measured of every case and update that a run measured, and the relative error of the former.

    Args:
        report: of `benchmarks.gpu`, of sizes as they are.
        device: where launches are counted; None to leave out what was not counted yet.
        counted: launches of one call by name; those that are missing are counted and added.
    """
    found: dict[str, Any] = {}
    known: dict[str, Mapping[str, Any]] = {"cases": CASES, "updates": GPU_UPDATES}
    for kind, cases in known.items():
        for name, case in cases.items():
            measured = _measured(report[kind].get(name, {}), precision)
            if measured is None:
                continue
            operator, known_as = isinstance(case, Case), counted_as(name)
            if known_as not in counted:
                if device is None:
                    continue
                counted[known_as] = (count_case if operator else count_update)(case, device, precision)
            row = (of_case if operator else of_update)(case, machine, precision, counted[known_as])
            mode, us = measured
            found[name] = {**row, "mode": mode, "measured_us": us, "relative_error": row["predicted_us"] / us - 1}
    return found


def _measured(case: Mapping[str, Any], precision: str) -> tuple[str, float] | None:
    """fastflow's last time: as a graph, which is what the model is of, or else as called."""
    rows = case.get("results", [])
    ours = {row["mode"]: row["median_us"] for row in rows if (row["rival"], row["precision"]) == ("fused", precision)}
    return next(((mode, ours[mode]) for mode in ("graph", "call") if mode in ours), None)


def beside(found: Mapping[str, Any]) -> str:
    """Predicted beside measured in lines."""
    return "\n".join(
        f"  {name:30}{row['predicted_us']:10.1f} us predicted, {row['measured_us']:10.1f} us measured ({row['mode']}): "
        f"off by {row['relative_error']:+.0%}"
        for name, row in found.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=roofline.MACHINES, default="H200")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    machine = roofline.MACHINES[given.machine]
    try:
        cases = table(machine)
    except (RuntimeError, ImportError) as error:
        print(f"benchmarks.predictions: {error}", file=sys.stderr)
        return 1
    assumed = json.loads(json.dumps({name: value for name, value in vars(machine).items() if name != "name"}))
    report = {"format": FORMAT, "kind": "predictions", "note": HEAD, "machine": machine.name, "precision": "bf16"}
    report |= {"assumed": assumed, "cases": cases}
    from fastflow.atomic import atomic_write

    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"predictions-{machine.name.lower()}.md"
    for target, text in (
        (path, markdown(report)),
        (path.with_suffix(".json"), json.dumps(report, indent=1, allow_nan=False) + "\n"),
    ):
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(markdown(report) + f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
