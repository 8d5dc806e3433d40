"""python -m benchmarks.breakdown: where the time of one floq update goes, over K, by fastflow and by eager PyTorch.

The parts are timed inside whole updates: the critics' walks, the behaviour-cloning flow's walk, the flow losses and the
plain networks on their way forward, everything's way back (small updates of fastflow's on a CPU have that in their
losses), Adam, the moving average; what is left is Python and small operators around them. On a GPU each part waits for
the device, which a real update does not: there the sum is more than an update takes, and the shares are what counts.

    --update NAME       of benchmarks.published.UPDATES or benchmarks.cases.UPDATES
    --steps 1 4 8 16    K of the critic
    --updates 7         timed for each bar; the medians are kept
    --json FILE         where results go; the figure is FILE with .png
    --draw FILE         only the figure, from results that are there
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, machine, published
from benchmarks.measure import Timer
from benchmarks.scaling_figure import place
from fastflow import modules, ops
from fastflow.agents import floq, fql_actor
from fastflow.atomic import atomic_write
from fastflow.record import write_json

UPDATES = published.UPDATES | cases.UPDATES
PARTS = (
    "critic walks",
    "flow losses",
    "plain networks",
    "policy's walk",
    "backward",
    "Adam",
    "moving average",
    "the rest",
)
BACKENDS = {"auto": "fastflow", "reference": "eager"}
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#BBBBBB")


@contextlib.contextmanager
def parts_of(agent: Any, timer: Timer) -> Iterator[dict[str, float]]:
    """Seconds by part of the updates done within; "the rest" is left to the caller."""
    found = dict.fromkeys(PARTS[:-1], 0.0)

    def timed(function: Callable[..., Any], part: str | Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            timer.synchronize()
            began = time.perf_counter()
            result = function(*arguments, **options)
            timer.synchronize()
            found[part if isinstance(part, str) else part(*arguments)] += time.perf_counter() - began
            return result

        return call

    def walker(field: Any, *rest: Any) -> str:
        first = field[0] if isinstance(field, (list, tuple)) else field
        return "critic walks" if first.spec.state_dim == 1 and first.spec.ensemble else "policy's walk"

    with contextlib.ExitStack() as stack:
        for owner, name, part in (
            (ops, "integrate", walker),
            (ops, "flow_matching_loss", "flow losses"),
            (modules, "dense_stack", "plain networks"),
            (torch.Tensor, "backward", "backward"),
            # Losses that native code differentiates in the same pass.
            (fql_actor, "matching_gradients", "flow losses"),
            (floq, "matching_gradients", "flow losses"),
            (modules, "regression", "plain networks"),
            (modules, "climb", "plain networks"),
            (agent._descent, "step", "Adam"),
            (torch, "_foreach_lerp_", "moving average"),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        yield found


def measure(case: cases.UpdateCase, backend: str, precision: str | None, device: torch.device, count: int) -> dict:
    """Median milliseconds by part, and of whole updates without a clock inside."""
    agent, batches, timer = case.agent(device, backend, precision), case.batches(device), Timer(device)

    def update(i: int) -> float:
        timer.synchronize()
        began = time.perf_counter()
        agent.update(batches[i % len(batches)])
        timer.synchronize()
        return time.perf_counter() - began

    for i in range(2):
        update(i)
    plain, rows = [], []
    for i in range(count):
        plain.append(update(i))
        with parts_of(agent, timer) as found:
            whole = update(i)
        rows.append(found | {"the rest": whole - sum(found.values())})
    parts = {part: 1e3 * statistics.median(row[part] for row in rows) for part in PARTS}
    return {"parts_ms": parts, "update_ms": 1e3 * statistics.median(plain)}


def draw(results: Mapping[str, Any], path: Path) -> Path:
    """Stacked bars; returns the path.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9.5, 4.8), layout="constrained")
    ax = figure.subplots()
    bars = results["bars"]
    at = [bar["at"] for bar in bars]
    bottom = [0.0] * len(bars)
    for part, color in zip(PARTS, _COLORS, strict=True):
        values = [max(bar["parts_ms"][part], 0.0) for bar in bars]
        ax.bar(at, values, 0.8, bottom, color=color, label=part, edgecolor="white", linewidth=0.4)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    ax.plot(at, [bar["update_ms"] for bar in bars], "k_", markersize=22, label="whole update, no clock inside")
    ax.set_xticks(at, [f"{bar['name']}\nK = {bar['steps']}" for bar in bars], fontsize=8.5)
    ax.set_ylabel("milliseconds of one update (medians)")
    figure.suptitle(f"{results['update']}: {results['title']}\n{place(results)}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis="y", color="#e6e6e6")
    ax.set_axisbelow(True)
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5, reverse=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__, formatter_class=style)
    parser.add_argument("--update", choices=UPDATES, default="floq/cube-double-play/update")
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 4, 8, 16))
    parser.add_argument("--precision", choices=("bf16", "tf32", "fp32"))
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args(arguments)
    if given.draw is not None:
        print(draw(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(".png")))
        return 0
    if min(given.steps) < 1 or given.updates < 1:
        parser.error("--steps, --updates: expected numbers of at least 1")
    device = given.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = given.precision or ("bf16" if device.type == "cuda" else "fp32")
    case = UPDATES[given.update]
    results = {"format": 1, "kind": "breakdown", "update": case.name, "title": case.title, "precision": precision}
    results |= {"threads": torch.get_num_threads(), **machine.public_facts(device), "bars": []}
    for i, steps in enumerate(given.steps):
        sized = dataclasses.replace(case, options={**case.options, "critic_flow_steps": steps})
        for j, (backend, name) in enumerate(BACKENDS.items()):
            bar = {"name": name, "steps": steps, "at": i * (len(BACKENDS) + 0.6) + j}
            bar |= measure(sized, backend, precision, device, given.updates)
            results["bars"].append(bar)
            print(f"K = {steps:2} {name:9} {bar['update_ms']:9.2f} ms:", end="")
            print("".join(f"  {part} {ms:.2f}" for part, ms in bar["parts_ms"].items()), flush=True)
    if given.json is not None:
        write_json(given.json, results)
        print(draw(results, given.json.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
