"""Several seeds of one training in one command: an experiment with a single arm."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastflow.errors import UserError
from fastflow.experiments import report
from fastflow.experiments.declare import Arm, Experiment, Metric, Size
from fastflow.experiments.run import cores, run
from fastflow.record import to_json
from fastflow.settings import LoopSettings
from fastflow.train import default_settings

__all__ = ["Seeds", "split", "train_seeds"]

# What every seed has for itself.
_OWN = ("seed", "run_dir", "resume")
_SIZE = "train"


@dataclasses.dataclass(frozen=True)
class Seeds:
    """What the command line says of several seeds.

    Attributes:
        seeds: those to train.
        jobs: runs at a time.
    """

    seeds: tuple[int, ...]
    jobs: int = 1


def split(argv: Sequence[str]) -> tuple[Seeds | None, list[str]]:
    """Takes `--seeds 0 1 2` and `--jobs N` out of the flags of `fastflow train`.

    Returns:
        The seeds, or None for a run of its own; and the other flags.

    Raises:
        UserError: not numbers, `--jobs` without `--seeds`, or flags that go with one run alone.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int)
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; as in --seeds 0 1 2 --jobs 2") from error
    if found.seeds is None:
        if found.jobs is not None:
            raise UserError("--jobs: only with --seeds")
        return None, rest
    if min(found.seeds) < 0 or len(set(found.seeds)) < len(found.seeds):
        raise UserError(f"--seeds: expected different numbers of at least 0, got {' '.join(map(str, found.seeds))}")
    for flag in ("--seed", "--resume"):
        if any(word == flag or word.startswith(f"{flag}=") for word in rest):
            raise UserError(f"{flag} cannot be given with --seeds, whose runs go on by the same command")
    return Seeds(tuple(found.seeds), 1 if found.jobs is None else found.jobs), rest


def train_seeds(
    agent_name: str, settings: LoopSettings[Any], seeds: Seeds, *, command: str, out: Callable[[str], None] = print
) -> Path:
    """Trains with every seed, what is finished or begun already included, and prints the scores over seeds: the
    interquartile mean and its bootstrap interval from three seeds on, the mean and the range of fewer.

    Args:
        agent_name: such as "floq".
        settings: of all runs; `run_dir` is the folder of them all, by default runs/ENV__AGENT__seeds.
        seeds: see `Seeds`.
        command: for the report.
        out: called with every line of text.

    Returns:
        The folder, with results.csv, summary.md and figure.png beside the run folders AGENT/seedK.

    Raises:
        UserError: an agent without scores, a folder of another training, or runs that failed.
        KeyboardInterrupt: stopped; what was under way is saved.
    """
    if not settings.scores:
        raise UserError(f"--seeds: {agent_name} has no score to compare runs by; see fastflow experiment")
    if seeds.jobs < 1:
        raise UserError(f"jobs: expected at least 1, got {seeds.jobs}")
    folder = settings.run_dir or Path("runs") / f"{settings.env}__{agent_name}__seeds"
    arm = Arm(agent_name, agent_name)
    experiment = Experiment(
        name=f"{settings.env}__{agent_name}",
        title=f"{agent_name} on {settings.env}, preset {settings.preset}",
        agent=agent_name,
        question="How well does it do, over seeds?",
        arms=(arm,),
        sizes={_SIZE: Size(_changes(agent_name, settings), seeds.seeds, f"{settings.last_step:,} steps per seed")},
        metrics=tuple(Metric(column, label, "higher") for column, label in settings.scores.items()),
    )
    threads = max(cores() // seeds.jobs, 1)
    run(experiment, size=_SIZE, output=folder, jobs=seeds.jobs, threads=threads, command=command, out=out)
    results = report.results(experiment, seeds.seeds, folder)
    for column, label in settings.scores.items():
        values = [result.values[column] for result in results if column in result.values]
        kind = "interquartile mean and 95 % interval" if len(values) >= report.LEAST_SEEDS else "mean and range"
        out(f"{label} over {len(values)} seed{'s' * (len(values) != 1)}, {kind}: {report.estimate(values)}")
    return folder


def _changes(agent_name: str, settings: LoopSettings[Any]) -> dict[str, Any]:
    """Dotted names and values of what differs from the preset, and the settings that runs among many have otherwise."""
    default = default_settings(agent_name, settings.env, settings.preset)
    found: dict[str, Any] = {"env": settings.env, "preset": settings.preset}
    found |= {name: getattr(settings, name) for name in ("tensorboard", "keep_checkpoints", "threads")}
    for prefix, ours, theirs in (("", settings, default), ("agent.", settings.agent, default.agent)):
        before: Mapping[str, Any] = to_json(theirs)
        for name, value in to_json(ours).items():
            if value != before[name] and f"{prefix}{name}" not in ("agent", *_OWN):
                found[f"{prefix}{name}"] = value
    return found
