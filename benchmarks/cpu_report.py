"""What a run of the CPU table leaves behind: one JSON file, and the printed table beside it.

Keys of the file (FORMAT 1):
    format, kind ("cpu"), profile, started, seconds, complete
    hardware      cpu, cpu_cores, flags {name: bool}, native (what fastflow's native code uses of it, or why it is not)
    software      versions, compiler
    repository    commit, dirty, sources
    table         a list of rows: title, measurement, entrant, precision, threads, processors, disturbed (whether other
                  programs needed its processors), runs (what fastflow ran), fastflow_us {median, p20, p80}, errors,
                  and vs {rival: goal, against, median_us, ratio, p20, p80, low and high (95 %), met}
    measurements  by name: title, threads, processors, others (how many processors other programs took while the clock
                  ran), seconds, skipped, and entrants with name, rival, variant, precision, accurate, errors and
                  eager_errors against float64, note, prepare_seconds, median_us, p20_us, p80_us, spread, rounds,
                  calls_per_round, and times: how many times as long as each fastflow
    curves        the same, of the figure's points
    skipped       what was left out, and why
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cpu_rows import RIVAL_NAMES, TABLE, Row
from fastflow.atomic import atomic_write
from fastflow.kernels import cpu as native_code

FORMAT = 1
# Processors that other programs took, above which a reader is told.
DISTURBED = 0.15
HEADINGS = {"jax": "JAX jit fp32", "compile": "torch.compile fp32", "eager": "eager"}


def new(profile: str) -> dict[str, Any]:
    """A report of a run that begins now."""
    facts = machine.public_facts(torch.device("cpu"))
    facts["hardware"] |= {"flags": machine.cpu_flags(), "native": native_code.features()}
    facts["software"] |= {"compiler": machine.compiler(), "torchdiffeq": machine.version("torchdiffeq")}
    now = datetime.datetime.now(datetime.timezone.utc)
    head = {"format": FORMAT, "kind": "cpu", "profile": profile, "started": now.isoformat(timespec="seconds")}
    results: dict[str, Any] = {"table": [], "measurements": {}, "curves": {}, "skipped": []}
    return head | {"seconds": 0.0, "complete": False} | facts | results


def stem(report: Mapping[str, Any]) -> str:
    """cpu-<machine>-<date>: the name of the run's files."""
    profile = re.sub(r"[^a-z0-9]+", "-", report["profile"].lower()).strip("-")
    # What is not the whole table does not take the place of one.
    suffix = "" if profile == "full" else f"-{profile}"
    return f"cpu-{machine.name_of(report['hardware'])}-{report['started'][:10]}{suffix}"


def table(measurements: Mapping[str, Any], rows: Sequence[Row] = TABLE) -> list[dict[str, Any]]:
    """The rows whose measurements there are, goal beside measured."""
    return [_row(row, measurements[row.measurement]) for row in rows if row.measurement in measurements]


def _row(row: Row, measured: Mapping[str, Any]) -> dict[str, Any]:
    name = row.entrant
    timed = [entrant for entrant in measured["entrants"] if "median_us" in entrant]
    ours = next((entrant for entrant in timed if entrant["name"] == name), None)
    out: dict[str, Any] = {"title": row.title, "measurement": row.measurement}
    out |= {"entrant": name, "precision": row.precision}
    out |= {"threads": measured["threads"], "processors": measured["processors"]}
    out |= {"disturbed": _disturbed(measured), "runs": ours and ours["note"], "errors": ours and ours["errors"]}
    out["fastflow_us"] = ours and {key: ours[f"{key}_us"] for key in ("median", "p20", "p80")}
    out["vs"] = {}
    for rival, goal in row.goal.items():
        # The fastest of its kind, in float32, also where fastflow rounds: see `cpu_rows`.
        others = [entrant for entrant in timed if (entrant["rival"], entrant["precision"]) == (rival, "fp32")]
        best = min(others, key=lambda entrant: entrant["median_us"], default=None)
        times = best["times"].get(name) if best else None
        found: dict[str, Any] = {"goal": goal, "against": best and best["name"]}
        found["median_us"] = best and best["median_us"]
        found["ratio"] = times and times["median"]
        found |= {key: times and times.get(key) for key in ("p20", "p80", "low", "high")}
        out["vs"][rival] = found | {"met": bool(times and times["median"] >= goal)}
    return out


def _disturbed(measured: Mapping[str, Any]) -> bool:
    """Whether other programs needed processors that this measurement ran on."""
    free = max((os.cpu_count() or 1) - measured["processors"], 0)
    return (measured["others"] or 0.0) > DISTURBED + free


def markdown(report: Mapping[str, Any]) -> str:
    """The table as printed, then every entrant's median, then where it was measured."""
    hardware, software, repository = report["hardware"], report["software"], report["repository"]
    flags = ", ".join(name for name, there in hardware["flags"].items() if there) or "none of those looked for"
    lines = ["| case | fastflow | " + " | ".join(f"vs {HEADINGS[name]}" for name in RIVAL_NAMES) + " |"]
    lines += ["|---" * (2 + len(RIVAL_NAMES)) + "|"]
    for row in report["table"]:
        ours = milliseconds(row["fastflow_us"]["median"]) if row["fastflow_us"] else "not timed"
        cells = [_cell(row["vs"][rival], row["disturbed"]) for rival in RIVAL_NAMES]
        lines.append(f"| {row['title']} | {ours} | " + " | ".join(cells) + " |")
    lines += ["", "A cell: goal, how many times as fast fastflow is, ✓ where that meets the goal.", ""]
    plain = [row["title"] for row in report["table"] if row["runs"] and "plain PyTorch" in row["runs"]]
    if plain:
        share = f"{len(plain)} of {len(report['table'])} rows"
        lines += [f"fastflow ran plain PyTorch, for want of a kernel, in {share}.", ""]
    disturbed = [name for name, measured in report["measurements"].items() if _disturbed(measured)]
    if disturbed:
        # OpenMP's threads spin while they wait for one that has no processor: a hundred times as long, for eager
        # PyTorch and torch.compile more than for JAX.
        lines += [f"Other programs took processors meanwhile, so these say nothing: {', '.join(disturbed)}.", ""]
    if any(measured["processors"] < (os.cpu_count() or 1) for measured in report["measurements"].values()):
        lines += ["With fewer threads than cores, all ran on so many processors (affinity), XLA's threads too.", ""]
    lines += ["| measurement | threads | medians |", "|---|---|---|"]
    for name, measured in report["measurements"].items():
        timed = [entrant for entrant in measured["entrants"] if "median_us" in entrant]
        medians = ", ".join(f"{entrant['name']} {milliseconds(entrant['median_us'])}" for entrant in timed)
        lines.append(f"| {name} | {measured['threads']} | {medians} |")
    lines += [""]
    for skipped in report["skipped"]:
        lines += [f"- left out: {skipped['where']}: {skipped['reason']}"]
    commit = f"{repository['commit'] or repository['sources']}{' and changes' if repository['dirty'] else ''}"
    versions = ", ".join(f"{name} {software[name]}" for name in ("python", "torch", "jax", "numpy", "compiler"))
    lines += [f"- {hardware['cpu']}, {hardware['cpu_cores']} cores; of its flags: {flags}"]
    lines += [f"- native code: {hardware['native']}"]
    lines += [f"- {versions}; commit {commit}; {report['started']}, {report['seconds']:.0f} s, {report['profile']}"]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any], disturbed: bool) -> str:
    if found["ratio"] is None:
        return f"{found['goal']:g}x: not timed"
    if found.get("low") is not None and found["low"] <= 1.0 <= found["high"]:
        return f"{found['goal']:g}x: no difference"
    mark = "" if not found["met"] else " (disturbed)" if disturbed else " ✓"
    return f"{found['goal']:g}x: {found['ratio']:.2f}x{mark}"


def milliseconds(microseconds: float) -> str:
    """A time for a reader, three digits."""
    return f"{microseconds:.3g} µs" if microseconds < 1000 else f"{float(f'{microseconds / 1000:.3g}'):g} ms"


def write(report: Mapping[str, Any], folder: Path) -> Path:
    """Write both files whole; returns the JSON file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(report)}.json"
    for target, text in (
        (path, json.dumps(report, indent=1, allow_nan=False) + "\n"),
        (path.with_suffix(".md"), markdown(report)),
    ):
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path
