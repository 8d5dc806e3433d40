"""python -m benchmarks.agents: agents as they train, end to end: updates or environment steps per second.

Each turn is a short run of `fastflow train` as it is, batches, logging and environments included, by fastflow and with
`backend="reference"`, which is eager PyTorch in the structure of the published code: floq's 2 K + 1 evaluations of the
critic's network as calls of their own. Where JAX is installed, floq's jitted update takes part, on batches drawn from
the same dataset. Turns alternate; a ratio is the median of the turns' quotients with its 95 % bootstrap interval.

    --rounds 5          turns of each
    --only NAME ...     floq, td2-cfm, fpo, ppo
    --json FILE         all turns, and the machine
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.intervals import median_interval
from fastflow.collect import collect
from fastflow.record import write_json
from fastflow.train import default_settings, train

# By agent: its task, what a second is counted in, how many of them a turn has, and settings that keep it to training.
_QUIET: dict[str, Any] = {"eval_interval": 0, "save_interval": 0, "progress": False, "tensorboard": False, "threads": 1}
AGENTS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "floq": ("pointmaze-arena-navigate-singletask-v0", "updates", 400, {}),
    "td2-cfm": ("linear-gaussian", "updates", 400, {"transitions": 20_000}),
    "fpo": ("Hopper-v5", "environment steps", 4_096, {}),
    "ppo": ("Hopper-v5", "environment steps", 4_096, {}),
}
Turn = Callable[[], float]


def trained(name: str, backend: str, folder: Path, data: Path) -> Turn:
    """A turn of `fastflow train`: how many per second."""
    env, _, steps, own = AGENTS[name]
    more = {"dataset_dir": data} if name == "floq" else {}
    settings = default_settings(name, env, steps=steps, log_interval=steps, device="cpu", **_QUIET, **own, **more)
    settings = dataclasses.replace(settings, agent=dataclasses.replace(settings.agent, backend=backend))

    def turn() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            result = train(dataclasses.replace(settings, run_dir=Path(place) / "run"), name, out=lambda line: None)
            rates = [value for key, value in result.run.train.rows()[-1].items() if key.endswith("_per_second")]
        return float(rates[0])

    return turn


def by_jax(data: Path) -> Turn | None:
    """A turn of floq's jitted update; None without JAX."""
    try:
        import jax
    except ImportError:
        return None
    from benchmarks import jax_floq
    from fastflow.agents import make
    from fastflow.data import load_dataset

    env, _, steps, _ = AGENTS["floq"]
    config = default_settings("floq", env).agent
    config = dataclasses.replace(config, lr_decay_steps=0, backend="reference")
    dataset = load_dataset(env, dataset_dir=data)[0]
    sizes = {"obs_dim": dataset.obs_dim, "action_dim": dataset.action_dim, "reward_range": (-1.0, 0.0)}
    agent = jax_floq.JaxFloq(make("floq", config, **sizes, device="cpu", seed=0))
    generator = torch.Generator().manual_seed(0)

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            metrics = agent.update(jax_floq.arrays(dataset.sample(config.batch_size, generator)))
        jax.block_until_ready(metrics)
        return steps / (time.perf_counter() - began)

    return turn


def measure(names: Sequence[str], rounds: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """By agent and entrant, what each turn reached."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if "floq" in names:
            collect(AGENTS["floq"][0], dataset_dir=folder / "data", episodes=20, progress=False)
        for name in names:
            turns: dict[str, Turn] = {
                "fastflow": trained(name, "auto", folder, folder / "data"),
                "eager": trained(name, "reference", folder, folder / "data"),
            }
            jax = by_jax(folder / "data") if name == "floq" else None
            turns |= {"jax": jax} if jax is not None else {}
            rates: dict[str, list[float]] = {entrant: [] for entrant in turns}
            for i in range(rounds + 1):
                for entrant, turn in turns.items():
                    rate = turn()
                    if i:  # the first compiles and allocates
                        rates[entrant].append(rate)
            found[name] = {"unit": AGENTS[name][1], "per_second": rates}
            out(describe(name, found[name]))
    return found


def describe(name: str, found: dict[str, Any]) -> str:
    """A line per entrant."""
    lines = []
    for entrant, rates in found["per_second"].items():
        times = median_interval([a / b for a, b in zip(found["per_second"]["fastflow"], rates, strict=True)])
        beside = "" if entrant == "fastflow" else f"  fastflow does {times} times as many"
        middle = median_interval(rates)
        lines.append(
            f"{name:8} {entrant:9} {middle.middle:9,.0f} {found['unit']}/s ({middle.low:,.0f} to {middle.high:,.0f})"
            f"{beside}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agents", description=__doc__, formatter_class=style)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {given.rounds}")
    found = measure(given.only, given.rounds)
    if given.json is not None:
        write_json(given.json, {"format": 1, **machine.public_facts(torch.device("cpu")), "agents": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
