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
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow import agents
from fastflow.envs import nearest
from fastflow.errors import UserError, missing_extra
from fastflow.graphs import make_update
from fastflow.info import resolve_device, versions
from fastflow.record import (
    Checkpoint,
    Run,
    absolute,
    check_available,
    config_from_json,
    differences,
    load_agent_state,
    make_agent,
    quote,
    to_json,
)
from fastflow.settings import LoopSettings
from fastflow.task import Task

__all__ = ["Task", "TrainResult", "default_settings", "full_names", "parse", "preset_config", "train"]

# Settings that are paths, of whichever task.
_PATHS = ("dataset_dir", "dataset_path", "policies")

# Settings that older runs were made without, which is what their defaults do.
_LATER = ("cuda_graph", "compile")

_DISPLAY_SECONDS = 2.0


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


def preset_config(agent_name: str, env: str, preset: str = "auto", *, online: bool = False) -> tuple[str, Any]:
    """The agent's configuration under a named preset.

    Args:
        agent_name: such as "floq".
        env: name of the task, for "auto".
        preset: a name of the agent's presets, "auto" or "none".
        online: "auto" takes the preset of online fine-tuning, where there is one.

    Returns:
        The name of the preset that was chosen ("none" if there is none for the task), and the configuration.

    Raises:
        UserError: no such preset; the message lists them.
    """
    module, config_class = agents.module(agent_name), agents.config_class(agent_name)
    if preset == "auto":
        preset = module.preset_for(env) or "none"
        if online and f"{preset}/online" in module.PRESETS:
            preset += "/online"
    if preset == "none":
        return preset, config_class()
    if preset not in module.PRESETS:
        names = sorted(module.PRESETS)
        raise UserError(f"preset {preset}: unknown{nearest(preset, names)}; there are auto, none, {', '.join(names)}")
    return preset, config_class(**module.PRESETS[preset])


def default_settings(agent_name: str, env: str, preset: str = "auto", **changes: Any) -> Any:
    """Settings of a preset, those of the training loop that go with it (the agent's `LOOP_PRESETS`) included.

    Args:
        agent_name: such as "floq".
        env: name of the task.
        preset: a name of the agent's presets, "auto" or "none".
        **changes: fields of the agent's settings class that win over the preset.

    Returns:
        The settings, of `agents.settings_class(agent_name)`.

    Raises:
        UserError: no such preset.
        ValueError: a field of `changes` that cannot be.
    """
    preset, config = preset_config(agent_name, env, preset, online=bool(changes.get("online_steps")))
    loop = agents.module(agent_name).LOOP_PRESETS.get(preset, {})
    return agents.settings_class(agent_name)(**{"env": env, "agent": config, "preset": preset, **loop, **changes})


def parse(agent_name: str, argv: Sequence[str], prog: str | None = None) -> Any:
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
    first.add_argument("--online-steps", "--online_steps")
    try:
        chosen, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError:
        # A flag without its value: the second stage says so, with its help.
        chosen = argparse.Namespace(env=None, preset=None, resume=None, run_dir=None, online_steps=None)

    config_class, settings_class = agents.config_class(agent_name), agents.settings_class(agent_name)
    if chosen.resume is not None:
        for flag in ("preset", "run_dir"):
            if getattr(chosen, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} cannot be given with --resume: the run keeps what it has")
        default = settings_from_config(Run.open(chosen.resume), agent_name)
        preset = default.preset
    else:
        # The number itself is the second stage's.
        online = hasattr(settings_class, "online_steps") and chosen.online_steps not in (None, "0")
        changes = {"online_steps": 1} if online else {}
        default = default_settings(agent_name, chosen.env or "", chosen.preset or "auto", **changes)
        preset = default.preset
        # Help shows what was chosen from, and a task that was not given is asked for.
        env = tyro.MISSING if chosen.env is None else chosen.env
        default = dataclasses.replace(default, env=env, preset=chosen.preset or "auto")
    try:
        settings = tyro.cli(
            settings_class[config_class],  # type: ignore[index]
            args=full_names(argv, settings_class, config_class),
            default=default,
            prog=prog,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    # The name that was resolved, not the word "auto".
    return dataclasses.replace(settings, preset=preset)


def full_names(argv: Sequence[str], settings_class: type, config_class: type) -> list[str]:
    """`argv` with `--gamma` spelled `--agent.gamma` where only the agent has such a setting."""
    own, agent = ({field.name for field in dataclasses.fields(kind)} for kind in (settings_class, config_class))

    def full(word: str) -> str:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        bare = name.removeprefix("no_")
        if not word.startswith("--") or own & {name, bare} or not agent & {name, bare}:
            return word
        return "--agent." + word.removeprefix("--")

    return [full(word) for word in argv]


def settings_from_config(run: Run, agent_name: str) -> Any:
    """The settings that a run folder was made with.

    Raises:
        UserError: the run is of another agent, or its config.json lacks a setting or has an unknown one.
    """
    config = run.config
    if config.get("agent_name") != agent_name:
        raise UserError(f"{run.path} is a run of agent {config.get('agent_name')}, expected {agent_name}")
    settings_class = agents.settings_class(agent_name)
    names = [field.name for field in dataclasses.fields(settings_class) if field.name not in ("agent", "resume")]
    missing = [name for name in (*names, "agent") if name not in config and name not in _LATER]
    if missing:
        raise UserError(f"{run.path / 'config.json'} lacks {', '.join(missing)}: it was written by another version")
    values = {name: config[name] for name in names if name in config}
    for name in ("run_dir", *_PATHS):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return settings_class(agent=config_from_json(agent_name, config["agent"]), **values)


# --- the loop ---------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    # At once, also into a pipe or a file.
    print(text, flush=True)


def train(settings: LoopSettings[Any], agent_name: str = "floq", *, out: Callable[[str], None] = _say) -> TrainResult:
    """Trains until `settings.last_step` is reached or a signal asks to stop; what `fastflow train` does.

    Args:
        settings: of the agent's settings class; with `resume`, the state comes from the newest checkpoint of that run
            folder.
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

    def __init__(self, settings: LoopSettings[Any], agent_name: str, out: Callable[[str], None]) -> None:
        settings = settings.whole()
        self.settings = settings
        self.agent_name = agent_name
        self.out = out
        for package in ("safetensors", "tqdm", *(("tensorboard",) if settings.tensorboard else ())):
            if importlib.util.find_spec(package) is None:
                raise missing_extra("rl", package)
        task_class = agents.task_class(agent_name)
        task_class.check_name(settings.env)
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
        if settings.cuda_graph and self.device.type != "cuda":
            raise UserError(f"--cuda-graph needs a CUDA device, got {self.device}")
        self.path, self.saved = path, saved
        self.task: Task = task_class(settings, self.device, None if saved is None else saved.arguments, path, out)
        self.facts = self.task.facts
        if saved is not None and saved.loop["fingerprint"] is None:
            self._check_sizes(saved.arguments)
        elif saved is not None and saved.loop["fingerprint"] != self.facts["fingerprint"]:
            raise UserError(
                f"the dataset is not the one that {path} was trained on: it has {self.facts['rows']:,} rows, the "
                f"run's had {self.run.config['dataset']['rows']:,} (path {self.run.config['dataset']['path']})"
            )
        self.arguments = self.task.arguments
        try:
            self.agent = make_agent(
                agent_name, to_json(settings.agent), self.arguments, device=self.device, seed=settings.seed
            )
        except ValueError as error:
            raise UserError(f"settings of {agent_name}: {error}") from error

        try:
            self.update = make_update(self.agent, compile=settings.compile, cuda_graph=settings.cuda_graph)
        except ValueError as error:
            raise UserError(f"settings of {agent_name}: {error}") from error

        self.task.bind(self.agent)
        self.stride = self.task.stride
        self.generator = torch.Generator(self.device).manual_seed(_derived_seed(settings.seed, "batches"))
        self.meter = _Meter(self.device)
        self.step = 0
        self.seconds = 0.0
        self.saved_at = -1
        self.advised = False
        if saved is not None:
            load_agent_state(self.agent, saved.part("agent"), self.run.checkpoint_path(saved.step))
            loop = saved.part("loop")
            self.generator.set_state(loop["batches_generator"])
            self.task.load_state_dict(saved.part("task"), saved.step)
            self.meter.load(saved.loop["metrics"], loop)
            self.step = self.saved_at = saved.step
            self.seconds = saved.loop["seconds"]

    # before the first update

    def _checkpoint(self) -> Checkpoint:
        asked = {name: to_json(getattr(self.settings, name)) for name in self.settings.fixed}
        lines = differences({name: self.run.config.get(name) for name in asked}, asked)
        if lines:
            raise UserError(f"{self.run.path} was trained with other settings:\n  " + "\n  ".join(lines))
        return self.run.load(agent=self.agent_name, config=asked["agent"])

    def _check_sizes(self, arguments: Mapping[str, Any]) -> None:
        """A converted run goes on with any dataset that its networks fit."""
        for name in ("obs_dim", "action_dim"):
            if self.facts[name] != arguments[name]:
                raise UserError(
                    f"{self.path}: expected a dataset with {name} {arguments[name]}, as its networks have it, "
                    f"got {self.facts[name]}"
                )

    def _config(self) -> dict[str, Any]:
        settings = {name: value for name, value in to_json(self.settings).items() if name != "resume"}
        for name in set(_PATHS) & set(settings):
            # Resuming may happen in another working directory.
            settings[name] = absolute(getattr(self.settings, name))
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
            self.run.save_samples(self.task.samples())
            return
        self.run.rewind(saved.step)
        if saved.loop["fingerprint"] is None:
            self.run.save_samples(self.task.samples())
        # Settings that may change are recorded as they are from now on; how they were is in the list.
        names = ("steps", "online_steps", "cuda_graph", "compile", "versions", "device_name", "threads_used")
        before = {name: self.run.config[name] for name in names if name in self.run.config}
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
                with _Display(self.settings, self.task, self.step, self.out) as self.display:
                    self._loop()
            finally:
                self.run.close()
                self.task.close()
        stopped_by = self.stop.requested
        if stopped_by is None:
            self.out(f"done: {self.step:,} {self.task.steps_are}, run folder {self.path}")
        else:
            self.out(f"stopped after {self.step:,} {self.task.steps_are} by {stopped_by.name}; saved. Go on with:")
            self.out(f"  fastflow train {self.agent_name} --resume {quote(self.path)}")
        return TrainResult(self.run, self.step, stopped_by, self.agent)

    def _loop(self) -> None:
        settings = self.settings
        batch_size = settings.agent.batch_size
        self.began = time.perf_counter() - self.seconds
        self.interval_began = (self.step, time.perf_counter())
        self._evaluate_if_due()
        while self.step < settings.last_step and not self.stop.requested:
            try:
                metrics = [
                    self.update(self.task.sample(batch_size, self.generator))
                    for _ in range(self.task.begin_step(self.step, self.generator))
                ]
            except UserError as error:
                raise self._lost(error) from error
            self.meter.add(metrics[0] if len(metrics) == 1 else _means(metrics))
            self.step += self.stride
            self.display.advance(self.meter)
            # Where learning goes online there is a row of its own and a checkpoint, to begin from in other ways.
            turn = self.step == settings.steps
            if self.step % settings.log_interval == 0 or turn:
                self._log()
            if (settings.save_interval and self.step % settings.save_interval == 0) or turn:
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
        self.out(f"{self.task.describe_data()}; run folder: {self.run.path}")
        if self.step:
            self.out(f"going on from the checkpoint after {self.step:,} {self.task.steps_are}")

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
            f"training/{name} is not finite since {self.task.step_is} "
            f"{self.step - self.stride * (self.meter.count - updates - 1):,}"
        )

    def _diverged(self, what: str) -> UserError:
        steps = self.run.checkpoint_steps()
        kept = (
            f"the last good checkpoint is {self.run.checkpoint_path(steps[-1])}" if steps else "nothing was saved yet"
        )
        return UserError(
            f"{what}: training stopped at {self.task.step_is} {self.step:,}; {kept}. A smaller learning rate may help "
            "(--agent.lr)"
        )

    def _lost(self, error: UserError) -> UserError:
        """What becomes of an error on the way to a batch: what was learnt so far is saved."""
        if not self.step:
            return error
        self._save()
        return UserError(
            f"{error}; stopped after {self.step:,} {self.task.steps_are} and saved. Go on with: "
            f"fastflow train {self.agent_name} --resume {quote(self.path)}"
        )

    def _log(self) -> None:
        means = self._read_meter()
        now = time.perf_counter()
        step_before, time_before = self.interval_began
        rate = (self.step - step_before) / max(now - time_before, 1e-9)
        row = {f"training/{name}": value for name, value in means.items()}
        row |= self._validate() | self.task.report()
        row |= {f"time/{self.task.steps_are.replace(' ', '_')}_per_second": rate, "time/total_time": now - self.began}
        self.run.log(self.run.train, self.step, row, tensorboard=self.settings.tensorboard)
        self.display.logged(means, rate)
        self._advise(means)
        self.meter.reset()
        self.interval_began = (self.step, time.perf_counter())

    def _advise(self, means: Mapping[str, float]) -> None:
        """Passes on what the agent has to say about its metrics, once."""
        advise = getattr(self.agent, "advise", None)
        advice = None if advise is None or self.advised else advise(means)
        if advice is not None:
            self.advised = True
            self.display.line(f"warning: {self.task.step_is} {self.step:,}: {advice}")

    def _validate(self) -> dict[str, float]:
        seed = _derived_seed(self.settings.seed, "validation", self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = self.task.sample_validation(self.settings.agent.batch_size, generator)
        if batch is None:
            return {}
        metrics = self.agent.validate(batch)
        values = torch.stack(list(metrics.values())).tolist()
        row = {f"validation/{name}": value for name, value in zip(metrics, values, strict=True)}
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise self._diverged(f"{bad[0]} is not finite after {self.task.step_is} {self.step:,}")
        return row

    def _save(self) -> None:
        if self.saved_at == self.step:
            return
        self._read_meter()
        self.task.save()
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
                **{f"task/{name}": value for name, value in self.task.state_dict().items()},
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
        if not settings.eval_interval or not self.task.evaluates or self.stop.requested:
            return
        due = last or self.step % settings.eval_interval == 0 or self.step == settings.steps
        if not due or self.step in self.run.eval.steps():
            return
        if self.meter.count:
            self._read_meter()
        began = time.perf_counter()
        self.display.doing("evaluating")
        try:
            metrics = self.task.evaluate(
                self.agent,
                _derived_seed(settings.seed, "evaluation", self.step),
                lambda: self.stop.requested is not None,
            )
        except UserError as error:
            raise self._lost(error) from error
        self.display.doing("")
        now = time.perf_counter()
        # The rate of updates does not count time spent here.
        self.interval_began = (self.interval_began[0], self.interval_began[1] + now - began)
        if metrics is None:
            return
        row = {f"evaluation/{name}": value for name, value in metrics.items()}
        row |= {"time/evaluation": now - began, "time/total_time": now - self.began}
        self.run.log(self.run.eval, self.step, row, tensorboard=settings.tensorboard)
        self.display.line(f"{self.task.step_is} {self.step:,}: {self.task.describe(metrics)}")


def _derived_seed(seed: int, *path: str | int) -> int:
    """One seed per use, so that no two random streams of a run are the same."""
    words = [int.from_bytes(str(part).encode(), "little") for part in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _means(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Means of the metrics of several updates."""
    return {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}


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

    def __init__(self, settings: LoopSettings[Any], task: Task, step: int, out: Callable[[str], None]) -> None:
        self.out = out
        self.task = task
        self.steps = settings.last_step
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
                unit=f" {self.task.steps_are}",
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
        self.step += self.task.stride
        if self._bar is None:
            return
        self._bar.update(self.task.stride)
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
        self.out(
            f"{self.task.step_is} {self.step:,} of {self.steps:,}: {losses}; {rate:.1f} {self.task.steps_are}/s, "
            f"{left} left"
        )

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
