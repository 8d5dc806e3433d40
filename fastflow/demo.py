"""`make demo`, or `python -m fastflow.demo`: from nothing to a policy that solves a task, in minutes on one core.

Collects data in OGBench's point maze on its open arena map, trains floq with K = 8 on it, compares the policy before
and after, and draws a figure. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastflow.errors import UserError

__all__ = ["main"]

ENV = "pointmaze-arena-navigate-singletask-v0"
EPISODES = 300
GOAL = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0 if every seed reaches the goal, 1 if not, 2 for errors, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m fastflow.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="training seed (default 0)")
    parser.add_argument("--seeds", type=int, nargs="+", help="several training seeds, for a table")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default demo)")
    parser.add_argument("--fresh", action="store_true", help="train again even if a finished run is there")
    parser.add_argument("--device", default="cpu", help="cpu (default: the networks are small), cuda or auto")
    parser.add_argument("--steps", type=int, help="updates (default 15,000, for which the goal is meant)")
    options = parser.parse_args(argv)
    try:
        return _run(options.folder, options.seeds or [options.seed], options.steps, options.device, options.fresh)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def _run(folder: Path, seeds: list[int], steps: int | None, device: str, fresh: bool) -> int:
    began = time.perf_counter()
    data = _collect(folder / "data")
    # Late, so that the first line of output comes at once.
    from fastflow.plot import plot_overview
    from fastflow.record import Run
    from fastflow.train import default_settings, train

    changes: dict[str, Any] = {"dataset_dir": data, "device": device} | ({} if steps is None else {"steps": steps})
    runs: list[Run] = []
    for seed in seeds:
        path = folder / f"seed{seed}"
        settings = default_settings("floq", ENV, run_dir=path, seed=seed, **changes)
        if path.exists():
            run = Run.open(path)
            if fresh or not run.checkpoint_steps():
                # Only a run folder gets here: anything else does not open.
                shutil.rmtree(path)
            elif settings.steps in run.checkpoint_steps() and settings.steps in run.eval.steps():
                print(f"seed {seed}: trained already, in {path} (--fresh trains again)")
                runs.append(run)
                continue
            else:
                settings = dataclasses.replace(settings, resume=path)
        result = train(settings, "floq")
        if result.interrupted is not None:
            print("the demo goes on with the same command")
            return 128 + int(result.interrupted)
        runs.append(result.run)

    print(f"\nsuccess over {settings.eval_episodes} episodes, K = {settings.agent.critic_flow_steps}")
    print(f"{'seed':>6} {'before':>8} {'after':>8} {'updates':>9} {'seconds':>9}")
    missed = []
    for seed, run in zip(seeds, runs, strict=True):
        rows = run.eval.rows()
        before, after = rows[0]["evaluation/success"], rows[-1]["evaluation/success"]
        print(f"{seed:6d} {before:8.2f} {after:8.2f} {int(rows[-1]['step']):9,d} {rows[-1]['time/total_time']:9.0f}")
        if after < GOAL:
            missed.append(seed)
    print(f"figure: {plot_overview(runs, folder / 'figure.png')}")
    print(f"all of it took {time.perf_counter() - began:.0f} s this time")
    if missed:
        print(f"NOT reached: success of at least {GOAL} after training, for seed {', '.join(map(str, missed))}")
        return 1
    return 0


def _collect(folder: Path) -> Path:
    from fastflow.collect import collect
    from fastflow.envs import dataset_name

    name = dataset_name(ENV)
    files = [folder / f"{name}.npz", folder / f"{name}-val.npz"]
    if all(file.exists() for file in files):
        print(f"data: {files[0]}, collected before")
        return folder
    print(f"collecting {EPISODES} episodes of {name} into {folder}", flush=True)
    began = time.perf_counter()
    collect(name, dataset_dir=folder, episodes=EPISODES)
    print(f"collected in {time.perf_counter() - began:.0f} s")
    return folder


if __name__ == "__main__":
    sys.exit(main())
