"""The training loop: batch, update, log, evaluate, save, resume. It knows nothing of any one algorithm.

What makes a run continue bit for bit: the checkpoint holds the agent's whole state (its random generator included), the
state of the generator that draws batches, and the running sums of metrics since the last log point. Evaluation and
validation have random generators of their own, made anew from (seed, step).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastflow import agents
from fastflow.envs import check_name, nearest
from fastflow.errors import MissingExtra, UserError, missing_extra
from fastflow.evaluate import Rollouts
from fastflow.info import resolve_device, versions
from fastflow.record import (
    Checkpoint,
    Run,
    check_available,
    config_from_json,
    differences,
    load_agent_state,
    make_agent,
    spread,
    tensor_fingerprint,
    to_json,
)

if TYPE_CHECKING:
    from fastflow.data import Dataset

__all__ = ["LOOP_PRESETS", "TrainResult", "TrainSettings", "default_settings", "parse", "preset_config", "train"]

LOOP_PRESETS: dict[str, dict[str, Any]] = {
    # The agent's preset of that name is made for these; minutes on one CPU core.
    "pointmaze-arena-demo": {
        "steps": 15_000,
        "observation_scale": 4.0,
        "log_interval": 500,
        "eval_interval": 3_000,
        "save_interval": 3_000,
        "threads": 1,
    },
}
"""Defaults of `TrainSettings` that go with a preset of an agent; the general ones go with the published presets."""

_SAMPLES = 64
_DISPLAY_SECONDS = 2.0

AgentConfig = TypeVar("AgentConfig")


@dataclasses.dataclass(frozen=True)
class TrainSettings(Generic[AgentConfig]):
    """Trains an agent on an offline dataset and leaves a run folder (config.json, train.csv, eval.csv, checkpoints).

    Ctrl-C saves a checkpoint and prints the command that goes on from it, bit for bit.
    """

    env: str
    """Task, by OGBench's singletask name (cube-single-play-singletask-v0, ...) or fastflow's pointmaze-arena-*."""
    agent: AgentConfig
    """The algorithm's own settings. Defaults are those of the preset; a flag given here wins over it."""
    preset: str = "auto"
    """Named settings of the agent: auto takes the published ones for the task, none takes the defaults."""
    seed: int = 0
    """Decides initial weights, batches and noise."""
    steps: int = 2_000_000
    """Updates in all."""
    log_interval: int = 5_000
    """Updates between rows of train.csv, each the mean over its interval."""
    eval_interval: int = 20_000
    """Updates between evaluations, which also take place before the first update and after the last; 0 is never."""
    eval_episodes: int = 50
    """Episodes per evaluation."""
    eval_envs: int = 10
    """Environments that step together during an evaluation."""
    save_interval: int = 100_000
    """Updates between checkpoints, besides the one at the end; 0 is only at the end."""
    keep_checkpoints: int = 0
    """Newest checkpoints to keep; 0 keeps all."""
    run_dir: Path | None = None
    """Where to record the run; by default runs/ENV__AGENT__seedN. It must not exist yet, or be empty."""
    resume: Path | None = None
    """Run folder to go on with. Its settings are the defaults then; those of the agent, task and seed cannot change."""
    dataset_dir: Path | None = None
    """Folder with OGBench's dataset files; by default OGBench's own, ~/.ogbench/data."""
    dataset_path: Path | None = None
    """One dataset file instead. One by `fastflow relabel` needs no simulator; without it, evaluation is skipped."""
    observation_scale: float = 0.0
    """If not 0, the networks see this number times (observation - mean) / std of the dataset."""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda or cuda:N."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """float32 matrix products on a GPU, as in torch.set_float32_matmul_precision. high is TF32, which the published JAX
    code had by default on such GPUs. The CPU always multiplies in float32."""
    threads: int = 0
    """Threads of torch on the CPU; 0 leaves torch's choice."""
    progress: bool = True
    """Progress bar, if the output is a terminal."""
    tensorboard: bool = True
    """TensorBoard events besides the CSV files."""

    def __post_init__(self) -> None:
        least = {"steps": 0, "log_interval": 1, "eval_interval": 0, "eval_episodes": 1, "eval_envs": 1}
        least |= {"save_interval": 0, "keep_checkpoints": 0, "threads": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
        if not 0 <= self.observation_scale < float("inf"):
            raise ValueError(f"observation_scale: expected a finite number of at least 0, got {self.observation_scale}")


_FIXED = ("env", "seed", "observation_scale", "matmul_precision", "agent")
"""Settings that define the run; another value is another run. The rest may change on resuming."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        run: the run folder.
        step: updates done.
        interrupted: the signal that stopped it early (a checkpoint is saved), or None.
        agent: the agent as it is now.
    """

    run: Run
    step: int
    interrupted: signal.Signals | None
    agent: Any


# --- settings from the command line -----------------------------------------------------------------------------------


def preset_config(agent_name: str, env: str, preset: str = "auto") -> tuple[str, Any]:
    """The agent's configuration under a named preset.

    Args:
        agent_name: such as "floq".
        env: name of the task, for "auto".
        preset: a name of the agent's presets, "auto" or "none".

    Returns:
        The name of the preset that was chosen ("none" if there is none for the task), and the configuration.

    Raises:
        UserError: no such preset; the message lists them.
    """
    module, config_class = agents.module(agent_name), agents.config_class(agent_name)
    if preset == "auto":
        preset = module.preset_for(env) or "none"
    if preset == "none":
        return preset, config_class()
    if preset not in module.PRESETS:
        names = sorted(module.PRESETS)
        raise UserError(f"preset {preset}: unknown{nearest(preset, names)}; there are auto, none, {', '.join(names)}")
    return preset, config_class(**module.PRESETS[preset])


def default_settings(agent_name: str, env: str, preset: str = "auto", **changes: Any) -> TrainSettings:
    """Settings of a preset, those of the training loop that go with it (`LOOP_PRESETS`) included.

    Args:
        agent_name: such as "floq".
        env: name of the task.
        preset: a name of the agent's presets, "auto" or "none".
        **changes: fields of `TrainSettings` that win over the preset.

    Raises:
        UserError: no such preset.
        ValueError: a field of `changes` that cannot be.
    """
    preset, config = preset_config(agent_name, env, preset)
    values: dict[str, Any] = {"env": env, "agent": config, "preset": preset, **LOOP_PRESETS.get(preset, {}), **changes}
    return TrainSettings(**values)


def parse(agent_name: str, argv: Sequence[str], prog: str | None = None) -> TrainSettings:
    """Settings from command-line flags.

    In two stages: --env and --preset, or --resume, decide the defaults; then every flag that is given wins over them.

    Args:
        agent_name: such as "floq".
        argv: flags, without the command.
        prog: how the command is called in its help.

    Raises:
        UserError: unknown preset, or a setting that cannot be; SystemExit(2) for malformed flags.
    """
    try:
        import tyro
    except ImportError as error:
        raise missing_extra("rl", "tyro") from error

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--env", "--preset", "--resume", "--run-dir"):
        first.add_argument(flag)
    try:
        chosen, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError:
        # A flag without its value: the second stage says so, with its help.
        chosen = argparse.Namespace(env=None, preset=None, resume=None, run_dir=None)

    config_class = agents.config_class(agent_name)
    default: TrainSettings
    if chosen.resume is not None:
        for flag in ("preset", "run_dir"):
            if getattr(chosen, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} cannot be given with --resume: the run keeps what it has")
        default = settings_from_config(Run.open(chosen.resume), agent_name)
        preset = default.preset
    else:
        default = default_settings(agent_name, chosen.env or "", chosen.preset or "auto")
        preset = default.preset
        # Help shows what was chosen from, and a task that was not given is asked for.
        env = tyro.MISSING if chosen.env is None else chosen.env
        default = dataclasses.replace(default, env=env, preset=chosen.preset or "auto")
    try:
        settings = tyro.cli(
            TrainSettings[config_class],  # type: ignore[valid-type]
            args=list(argv),
            default=default,
            prog=prog,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    # The name that was resolved, not the word "auto".
    return dataclasses.replace(settings, preset=preset)


def settings_from_config(run: Run, agent_name: str) -> TrainSettings:
    """The settings that a run folder was made with.

    Raises:
        UserError: the run is of another agent, or its config.json lacks a setting or has an unknown one.
    """
    config = run.config
    if config.get("agent_name") != agent_name:
        raise UserError(f"{run.path} is a run of agent {config.get('agent_name')}, expected {agent_name}")
    names = [field.name for field in dataclasses.fields(TrainSettings) if field.name not in ("agent", "resume")]
    missing = [name for name in (*names, "agent") if name not in config]
    if missing:
        raise UserError(f"{run.path / 'config.json'} lacks {', '.join(missing)}: it was written by another version")
    values = {name: config[name] for name in names}
    for name in ("run_dir", "dataset_dir", "dataset_path"):
        values[name] = None if values[name] is None else Path(values[name])
    return TrainSettings(agent=config_from_json(agent_name, config["agent"]), **values)


# --- the loop ---------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    # At once, also into a pipe or a file.
    print(text, flush=True)


def train(settings: TrainSettings, agent_name: str = "floq", *, out: Callable[[str], None] = _say) -> TrainResult:
    """Trains until `settings.steps` updates are done or a signal asks to stop; what `fastflow train` does.

    Args:
        settings: see `TrainSettings`; with `resume`, the state comes from the newest checkpoint of that run folder.
        agent_name: such as "floq".
        out: called with every line of text.

    Returns:
        The run folder, the step reached, and whether a signal ended it.

    Raises:
        UserError: anything the user can put right: an unknown task, missing or damaged data, no CUDA, an existing run
            folder, a checkpoint that does not fit, a full disk, a loss that is not finite (the last good checkpoint is
            kept).
    """
    threads = torch.get_num_threads()
    wanted = settings.threads
    if settings.resume is not None and not wanted:
        # Sums in another order would not continue bit for bit.
        wanted = Run.open(settings.resume).config.get("threads_used", 0)
    if wanted:
        torch.set_num_threads(wanted)
    precision = torch.get_float32_matmul_precision()
    if resolve_device(settings.device).type == "cuda":
        torch.set_float32_matmul_precision(settings.matmul_precision)
    try:
        return _Training(settings, agent_name, out).run_all()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


class _Training:
    """One call of `train`: what must be true before the first update is checked here, before a folder is made."""

    def __init__(self, settings: TrainSettings, agent_name: str, out: Callable[[str], None]) -> None:
        from fastflow.data import load_dataset

        self.settings = settings
        self.agent_name = agent_name
        self.out = out
        for package in ("safetensors", "tqdm", *(("tensorboard",) if settings.tensorboard else ())):
            if importlib.util.find_spec(package) is None:
                raise missing_extra("rl", package)
        check_name(settings.env)
        if settings.resume is None:
            path = settings.run_dir or Path("runs") / f"{settings.env}__{agent_name}__seed{settings.seed}"
            check_available(path)
            saved = None
            self.device = resolve_device(settings.device)
        else:
            path = settings.resume
            self.run = Run.open(path)
            saved = self._checkpoint()
            before = saved.loop["device"]
            self.device = resolve_device(before if settings.device == "auto" else settings.device)
            if self.device.type != before:
                raise UserError(
                    f"{path} was trained on {before} and cannot go on bit for bit on {self.device.type}: "
                    f"pass --device {before}, or start a new run"
                )
        self.path, self.saved = path, saved
        try:
            self.data, self.validation = load_dataset(
                settings.env,
                dataset_dir=settings.dataset_dir,
                dataset_path=settings.dataset_path,
                device=self.device,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"dataset of {settings.env}: {error}") from error
        self.facts = _dataset_facts(self.data, self.validation, settings)
        if saved is not None and saved.loop["fingerprint"] != self.facts["fingerprint"]:
            raise UserError(
                f"the dataset is not the one that {path} was trained on: it has {self.facts['rows']:,} rows, the "
                f"run's had {self.run.config['dataset']['rows']:,} (path {self.run.config['dataset']['path']})"
            )
        self.arguments = _agent_arguments(self.data, settings) if saved is None else saved.arguments
        try:
            self.agent = make_agent(
                agent_name, to_json(settings.agent), self.arguments, device=self.device, seed=settings.seed
            )
        except ValueError as error:
            raise UserError(f"settings of {agent_name}: {error}") from error
        self.rollouts = self._make_rollouts(path)

        self.generator = torch.Generator(self.device).manual_seed(_derived_seed(settings.seed, "batches"))
        self.meter = _Meter(self.device)
        self.step = 0
        self.seconds = 0.0
        self.saved_at = -1
        if saved is not None:
            load_agent_state(self.agent, saved.part("agent"), self.run.checkpoint_path(saved.step))
            loop = saved.part("loop")
            self.generator.set_state(loop["batches_generator"])
            self.meter.load(saved.loop["metrics"], loop)
            self.step = self.saved_at = saved.step
            self.seconds = saved.loop["seconds"]

    # before the first update

    def _checkpoint(self) -> Checkpoint:
        asked = {name: to_json(getattr(self.settings, name)) for name in _FIXED}
        lines = differences({name: self.run.config.get(name) for name in _FIXED}, asked)
        if lines:
            raise UserError(f"{self.run.path} was trained with other settings:\n  " + "\n  ".join(lines))
        return self.run.load(agent=self.agent_name, config=asked["agent"])

    def _make_rollouts(self, path: Path) -> Rollouts | None:
        settings = self.settings
        if not settings.eval_interval:
            return None
        try:
            rollouts = Rollouts(settings.env, min(settings.eval_envs, settings.eval_episodes))
        except MissingExtra as error:
            self.out(f"evaluation is skipped: {error}. Where there is a simulator: fastflow evaluate {_quote(path)}")
            return None
        dims = (self.data.obs_dim, self.data.action_dim)
        if dims != (rollouts.obs_dim, rollouts.action_dim):
            raise UserError(
                f"the dataset has {dims[0]} observations and {dims[1]} actions per row, but {settings.env} has "
                f"{rollouts.obs_dim} and {rollouts.action_dim}: is it the dataset of another task?"
            )
        return rollouts

    def _config(self) -> dict[str, Any]:
        settings = {name: value for name, value in to_json(self.settings).items() if name != "resume"}
        for name in ("dataset_dir", "dataset_path"):
            # Resuming may happen in another working directory.
            settings[name] = _absolute(getattr(self.settings, name))
        return {
            "agent_name": self.agent_name,
            **settings,
            "arguments": self.arguments,
            "dataset": self.facts,
            "versions": versions(),
            "device_name": _device_name(self.device),
            "threads_used": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "FASTFLOW_BACKEND": os.environ.get("FASTFLOW_BACKEND"),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "resumed": [],
        }

    def _open_folder(self) -> None:
        """The first thing that changes the disk."""
        saved = self.saved
        if saved is None:
            self.run = Run.create(self.path, self._config())
            rows = spread(len(self.data), _SAMPLES).to(self.device)
            self.run.save_samples({name: self.data.tensors[name][rows] for name in ("observations", "actions")})
            return
        self.run.rewind(saved.step)
        # Settings that may change are recorded as they are from now on; how they were is in the list.
        before = {name: self.run.config.get(name) for name in ("steps", "versions", "device_name", "threads_used")}
        history = [*self.run.config.get("resumed", []), {"step": saved.step, "before": before}]
        created = self.run.config.get("created")
        self.run.config |= self._config() | {"created": created, "resumed": history}
        self.run.write_config()

    # during

    def run_all(self) -> TrainResult:
        with _Stop() as self.stop:
            self._open_folder()
            self._say_start()
            try:
                with _Display(self.settings, self.step, self.out) as self.display:
                    self._loop()
            finally:
                self.run.close()
                if self.rollouts is not None:
                    self.rollouts.close()
        stopped_by = self.stop.requested
        if stopped_by is None:
            self.out(f"done: {self.step:,} updates, run folder {self.path}")
        else:
            self.out(f"stopped after {self.step:,} updates by {stopped_by.name}; saved. Go on with:")
            self.out(f"  fastflow train {self.agent_name} --resume {_quote(self.path)}")
        return TrainResult(self.run, self.step, stopped_by, self.agent)

    def _loop(self) -> None:
        settings = self.settings
        batch_size = settings.agent.batch_size
        self.began = time.perf_counter() - self.seconds
        self.interval_began = (self.step, time.perf_counter())
        self._evaluate_if_due()
        while self.step < settings.steps and not self.stop.requested:
            batch = self.data.sample(batch_size, self.generator)
            self.meter.add(self.agent.update(batch))
            self.step += 1
            self.display.advance(self.meter)
            if self.step % settings.log_interval == 0:
                self._log()
            if settings.save_interval and self.step % settings.save_interval == 0:
                self._save()
            self._evaluate_if_due()
        if not self.stop.requested:
            if self.meter.count:
                self._log()
            self._save()
            self._evaluate_if_due(last=True)
        self._save()

    def _say_start(self) -> None:
        settings = self.settings
        self.out(
            f"{self.agent_name} on {settings.env}, preset {settings.preset}, seed {settings.seed}, "
            f"{_device_name(self.device)}"
        )
        self.out(f"dataset: {self.facts['rows']:,} rows; run folder: {self.run.path}")
        if self.step:
            self.out(f"going on from the checkpoint after {self.step:,} updates")

    def _read_meter(self) -> dict[str, float]:
        """Means since the last log point; waits for the device.

        Raises:
            UserError: a metric was not finite.
        """
        means, bad = self.meter.read()
        if bad is None:
            return means
        name, updates = bad
        raise self._diverged(
            f"training/{name} is not finite since update {self.step - self.meter.count + updates + 1:,}"
        )

    def _diverged(self, what: str) -> UserError:
        steps = self.run.checkpoint_steps()
        kept = (
            f"the last good checkpoint is {self.run.checkpoint_path(steps[-1])}" if steps else "nothing was saved yet"
        )
        return UserError(
            f"{what}: training stopped at update {self.step:,}; {kept}. A smaller learning rate may help (--agent.lr)"
        )

    def _log(self) -> None:
        means = self._read_meter()
        now = time.perf_counter()
        step_before, time_before = self.interval_began
        rate = (self.step - step_before) / max(now - time_before, 1e-9)
        row = {f"training/{name}": value for name, value in means.items()}
        row |= self._validate()
        row |= {"time/updates_per_second": rate, "time/total_time": now - self.began}
        self.run.log(self.run.train, self.step, row, tensorboard=self.settings.tensorboard)
        self.display.logged(means, rate)
        self.meter.reset()
        self.interval_began = (self.step, time.perf_counter())

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        seed = _derived_seed(self.settings.seed, "validation", self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        metrics = self.agent.validate(self.validation.sample(self.settings.agent.batch_size, generator))
        values = torch.stack(list(metrics.values())).tolist()
        row = {f"validation/{name}": value for name, value in zip(metrics, values, strict=True)}
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise self._diverged(f"{bad[0]} is not finite after update {self.step:,}")
        return row

    def _save(self) -> None:
        if self.saved_at == self.step:
            return
        self._read_meter()
        names, sums = self.meter.save()
        checkpoint = Checkpoint(
            step=self.step,
            agent=self.agent_name,
            config=to_json(self.settings.agent),
            arguments=self.arguments,
            loop={
                "env": self.settings.env,
                "seed": self.settings.seed,
                "device": self.device.type,
                "fingerprint": self.facts["fingerprint"],
                "metrics": names,
                "seconds": time.perf_counter() - self.began,
            },
            tensors={
                **{f"agent/{name}": value for name, value in self.agent.state_dict().items()},
                **{f"loop/{name}": value for name, value in sums.items()},
                "loop/batches_generator": self.generator.get_state(),
            },
        )
        try:
            self.run.save(checkpoint, self.settings.keep_checkpoints)
        except ValueError as error:
            # The losses were finite, so it was the very last update that broke the weights.
            raise self._diverged(str(error)) from error
        self.saved_at = self.step

    def _evaluate_if_due(self, last: bool = False) -> None:
        settings = self.settings
        if self.rollouts is None or self.stop.requested:
            return
        if not (last or self.step % settings.eval_interval == 0) or self.step in self.run.eval.steps():
            return
        if self.meter.count:
            self._read_meter()
        began = time.perf_counter()
        self.display.doing("evaluating")
        episodes = self.rollouts.run(
            self.agent,
            episodes=settings.eval_episodes,
            seed=_derived_seed(settings.seed, "evaluation", self.step),
            should_stop=lambda: self.stop.requested is not None,
        )
        self.display.doing("")
        now = time.perf_counter()
        # The rate of updates does not count time spent here.
        self.interval_began = (self.interval_began[0], self.interval_began[1] + now - began)
        if episodes is None:
            return
        metrics = episodes.metrics()
        row = {f"evaluation/{name}": value for name, value in metrics.items()}
        row |= {
            "evaluation/episodes": settings.eval_episodes,
            "time/evaluation": now - began,
            "time/total_time": now - self.began,
        }
        self.run.log(self.run.eval, self.step, row, tensorboard=settings.tensorboard)
        self.display.line(
            f"update {self.step:,}: success {metrics['success']:.2f} over {settings.eval_episodes} episodes, "
            f"return {metrics['episode.return']:.1f}, length {metrics['episode.length']:.1f}"
        )


def _derived_seed(seed: int, *path: str | int) -> int:
    """One seed per use, so that no two random streams of a run are the same."""
    words = [int.from_bytes(str(part).encode(), "little") for part in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def _quote(path: Path) -> str:
    return shlex.quote(str(path))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _dataset_facts(data: Dataset, validation: Dataset | None, settings: TrainSettings) -> dict[str, Any]:
    rewards = data.tensors["rewards"]
    return {
        "name": data.name,
        "path": _absolute(settings.dataset_path or settings.dataset_dir),
        "rows": len(data),
        "validation_rows": 0 if validation is None else len(validation),
        "bytes": data.nbytes,
        "obs_dim": data.obs_dim,
        "action_dim": data.action_dim,
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        "reward_mean": float(rewards.double().mean()),
        "fingerprint": tensor_fingerprint(data.tensors),
    }


def _agent_arguments(data: Dataset, settings: TrainSettings) -> dict[str, Any]:
    rewards = data.tensors["rewards"]
    statistics = None
    if settings.observation_scale:
        observations = data.tensors["observations"].double()
        mean, std = observations.mean(0), observations.std(0, correction=0)
        # An observation that never changes is only centred.
        std = torch.where(std < 1e-6, torch.ones_like(std), std) / settings.observation_scale
        statistics = [mean.float().tolist(), std.float().tolist()]
    return {
        "obs_dim": data.obs_dim,
        "action_dim": data.action_dim,
        "reward_range": [float(rewards.min()), float(rewards.max())],
        "observation_statistics": statistics,
    }


class _Meter:
    """Sums of metrics since the last log point, kept on the device: adding waits for nothing.

    A sum stays non-finite from the first non-finite value on, so counting the updates after which it was finite tells
    at which update that was, without asking at every update.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.count = 0
        self._sums = self._finite = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        if list(metrics) != self.names:
            if self.count:
                raise ValueError(f"metrics: expected {self.names} as before, got {list(metrics)}")
            self.names = list(metrics)
            self._sums = torch.zeros(len(metrics), dtype=torch.float64, device=self.device)
            self._finite = torch.zeros_like(self._sums)
        self._sums += torch.stack(list(metrics.values()))
        self._finite += self._sums.isfinite()
        self.count += 1

    def read(self) -> tuple[dict[str, float], tuple[str, int] | None]:
        """Means, and for the first metric that was not finite its name and how many updates it was finite for."""
        if not self.count:
            return {}, None
        sums, finite = torch.stack([self._sums, self._finite]).tolist()
        means = {name: total / self.count for name, total in zip(self.names, sums, strict=True)}
        first = min(range(len(finite)), key=lambda i: finite[i])
        bad = (self.names[first], int(finite[first])) if finite[first] < self.count else None
        return means, bad

    def reset(self) -> None:
        self._sums.zero_()
        self._finite.zero_()
        self.count = 0

    def save(self) -> tuple[list[str], dict[str, Tensor]]:
        count = torch.tensor(self.count, dtype=torch.int64)
        return self.names, {"metric_sums": self._sums, "metric_count": count}

    def load(self, names: list[str], tensors: Mapping[str, Tensor]) -> None:
        self.names = list(names)
        self.count = int(tensors["metric_count"])
        self._sums = tensors["metric_sums"].to(self.device).clone()
        # Only finite sums are saved.
        self._finite = torch.full_like(self._sums, self.count)


class _Stop:
    """Turns SIGINT and SIGTERM into a request that the loop honours after its update; a second one stops at once."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        # Signals reach only the main thread; elsewhere the caller has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._before[name] = signal.signal(name, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        # Not print: the interrupted code may be in the middle of writing to the same stream.
        os.write(2, b"\nstopping after this update and saving; once more to stop at once\n")


class _Display:
    """A progress bar on a terminal; elsewhere one line per log point."""

    def __init__(self, settings: TrainSettings, step: int, out: Callable[[str], None]) -> None:
        self.out = out
        self.steps = settings.steps
        self.step = step
        self.on = settings.progress and sys.stderr.isatty()
        self._bar: Any = None
        self._shown = time.perf_counter()

    def __enter__(self) -> _Display:
        if self.on:
            try:
                import tqdm
            except ImportError as error:
                raise missing_extra("rl", "tqdm") from error
            self._bar = tqdm.tqdm(
                total=self.steps,
                initial=self.step,
                unit=" updates",
                dynamic_ncols=True,
                smoothing=0.05,
                mininterval=0.5,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def advance(self, meter: _Meter) -> None:
        self.step += 1
        if self._bar is None:
            return
        self._bar.update()
        # With somebody watching, losses are worth waiting for the device now and then.
        if time.perf_counter() - self._shown > _DISPLAY_SECONDS:
            self._show(meter.read()[0])

    def _show(self, means: Mapping[str, float]) -> None:
        self._bar.set_postfix(
            {name.split("/")[-1]: f"{means[name]:.3g}" for name in _main_losses(means)}, refresh=False
        )
        self._shown = time.perf_counter()

    def doing(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def logged(self, means: Mapping[str, float], rate: float) -> None:
        if self._bar is not None:
            self._show(means)
            return
        losses = ", ".join(f"{name} {means[name]:.4g}" for name in _main_losses(means))
        left = datetime.timedelta(seconds=round((self.steps - self.step) / max(rate, 1e-9)))
        self.out(f"update {self.step:,} of {self.steps:,}: {losses}; {rate:.1f} updates/s, {left} left")

    def line(self, text: str) -> None:
        if self._bar is None:
            self.out(text)
        else:
            self._bar.clear()
            self.out(text)
            self._bar.refresh()


def _main_losses(means: Mapping[str, float]) -> list[str]:
    """critic/critic_loss and actor/actor_loss where an agent has such totals, else all of its losses."""
    totals = [name for name in means if "/" in name and name == f"{name.split('/')[0]}/{name.split('/')[0]}_loss"]
    return totals or [name for name in means if name.endswith("loss")]
