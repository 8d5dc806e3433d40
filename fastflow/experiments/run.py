"""Runs the arms of an experiment over seeds, several at a time, each as a `fastflow train` of its own, and reports.

    <output>/
      experiment.json                   what was declared, and on which machine and commit it was run
      results.csv summary.md figure.png
      <arm>/seed<k>/                    the run folder (see fastflow.record)
      <arm>/seed<k>.log                 what its training printed
      <arm>/seed<k>.after.json          further metrics, where the arm has some

What is to be done next for a run is read from the disk alone, so the same command goes on after anything.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastflow import experiments
from fastflow.errors import UserError
from fastflow.experiments import report
from fastflow.experiments.declare import Arm, Experiment
from fastflow.experiments.reuse import take_over
from fastflow.info import _cpu_name, versions
from fastflow.record import Run, differences, to_json, write_json

__all__ = ["flags", "measure", "run"]

_FORMAT = "fastflow-experiment"
_VERSION = "1"

# What a run among many needs unless an experiment declares otherwise.
_DEFAULTS: dict[str, Any] = {"threads": 1, "tensorboard": False, "keep_checkpoints": 1}
_MEASURE = "import sys; from fastflow.experiments.run import measure; measure(*sys.argv[1:])"
_POLL_SECONDS = 0.05
_LOG_LINES = 5


def _say(text: str) -> None:
    print(text, flush=True)


def run(
    experiment: str | Experiment,
    *,
    size: str = "small",
    output: str | Path | None = None,
    jobs: int | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    plot_only: bool = False,
    reuse: bool = False,
    threads: int = 1,
    command: str | None = None,
    out: Callable[[str], None] = _say,
) -> list[Path]:
    """Does what is not done yet of an experiment and reports; what `fastflow experiment` does.

    Ctrl-C (also SIGTERM and SIGHUP) lets the runs under way save, reports what is finished, and raises
    KeyboardInterrupt; the same call goes on.

    Args:
        experiment: a name (see `fastflow.experiments`), or a declaration.
        size: one of its sizes.
        output: folder of the experiment; by default runs/NAME__SIZE.
        jobs: runs at a time; by default as many as there are CPU cores.
        arms: names of those to run; by default all. The report is about all.
        seeds: to run; by default those of the size.
        plot_only: only reports, from what is finished.
        reuse: finished runs with the same settings and seed of the experiments beside `output` are copied instead of
            trained again, whatever code they were trained with; the report names them.
        threads: of each run on the CPU, where an experiment leaves them to torch (threads 0).
        command: what the report says that it was made by; by default fastflow experiment.
        out: called with every line of text.

    Returns:
        The files of the report.

    Raises:
        UserError: no such experiment, size or arm; a folder that is not this experiment's; runs that failed, after the
            others are done and reported.
    """
    if isinstance(experiment, str):
        experiment = experiments.load(experiment)
    chosen_arms, chosen_seeds = _choose(experiment, size, arms, seeds)
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs: expected at least 1, got {jobs}")
    folder = Path("runs") / f"{experiment.name}__{size}" if output is None else Path(output)
    facts = _claim(experiment, size, chosen_seeds, folder, write=not plot_only)
    if command is None:
        command = f"fastflow experiment {experiment.name} --size {size}"
        command = command if output is None else f"{command} --output {shlex.quote(str(output))}"
    facts["command"] = command

    failures: list[str] = []
    stopped = False
    if not plot_only:
        todo = [_Job(experiment, size, arm, seed, folder) for seed in chosen_seeds for arm in chosen_arms]
        count = len(todo)
        if reuse:
            for job in todo:
                if (taken := job.take_over()) is not None:
                    out(f"{job.name}: taken over from {taken}")
        todo = [job for job in todo if job.next() is not None]
        workers = min(jobs or cores(), max(len(todo), 1))
        out(f"{experiment.name}, {size}: {count - len(todo)} of {count} runs finished before, {workers} at a time")
        out(f"folder: {folder}; budget: {experiment.sizes[size].budget}")
        failures, stopped = _work(todo, workers, count, threads, out)
    written = report.write(experiment, facts["seeds"], folder, facts, out)
    if experiment.picture is not None:
        module, _, name = experiment.picture.partition(":")
        written += getattr(importlib.import_module(module), name)(experiment, facts["seeds"], folder)
    if stopped:
        out("stopped; what was under way is saved, and the same command goes on")
        raise KeyboardInterrupt
    if failures:
        raise UserError(
            f"{len(failures)} of {len(chosen_arms) * len(chosen_seeds)} runs failed: {', '.join(failures)}. The others "
            f"are in {folder / 'summary.md'}; the same command tries these again"
        )
    return written


def _choose(
    experiment: Experiment, size: str, arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> tuple[list[Arm], list[int]]:
    if size not in experiment.sizes:
        raise UserError(f"size: expected {' or '.join(experiment.sizes)}, got {size!r}")
    names = [arm.name for arm in experiment.arms]
    unknown = [name for name in arms or () if name not in names]
    if unknown:
        from fastflow.envs import nearest

        raise UserError(f"no arm {unknown[0]!r}{nearest(unknown[0], names)}; there are {', '.join(names)}")
    chosen = list(dict.fromkeys(experiment.sizes[size].seeds if seeds is None else seeds))
    if not chosen or min(chosen) < 0:
        raise UserError(f"seeds: expected numbers of at least 0, got {chosen}")
    return [arm for arm in experiment.arms if arms is None or arm.name in arms], chosen


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The folder -----------------------------------------------------------------------------------------------------------


def _claim(experiment: Experiment, size: str, seeds: Sequence[int], folder: Path, *, write: bool) -> dict[str, Any]:
    """What experiment.json says, after checking that the folder is this experiment's or free, and writing it.

    Arms and seeds may come in addition; arms that are no longer declared are kept there, so that they cannot come back
    as something else.
    """
    declared = experiment.sizes[size]
    arms = {
        arm.name: {
            "settings": to_json(arm.settings),
            **({} if arm.after is None else {"after": arm.after}),
            **({} if arm.agent is None else {"agent": arm.agent}),
        }
        for arm in experiment.arms
    }
    identity = {
        "name": experiment.name,
        "agent": experiment.agent,
        "size": size,
        "settings": to_json(declared.settings),
    }
    saved = _read(folder)
    if saved is None and not write:
        raise UserError(f"{folder} holds no experiment to report on: no experiment.json in it")
    saved = saved or {"arms": {}, "seeds": [], "sessions": []}
    if "name" in saved:
        # Not `after`: another one needs no other training.
        both = [name for name in arms if name in saved["arms"]]
        before, asked = (
            {
                **top,
                "arms": {name: {"agent": side[name].get("agent"), "settings": side[name]["settings"]} for name in both},
            }
            for top, side in (({name: saved.get(name) for name in identity}, saved["arms"]), (identity, arms))
        )
        lines = differences(before, asked)
        if lines:
            raise UserError(
                f"{folder} holds another experiment; pass another folder by --output:\n  " + "\n  ".join(lines)
            )
    session = {"commit": _commit(), "machine": _machine(), "versions": versions()}
    sessions = saved["sessions"]
    if write and (not sessions or any(sessions[-1].get(name) != value for name, value in session.items())):
        began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        sessions = [*sessions, {"began": began, **session}]
    facts = {
        "format": _FORMAT,
        "version": _VERSION,
        **identity,
        "title": experiment.title,
        "question": experiment.question,
        "budget": declared.budget,
        "arms": saved["arms"] | arms,
        "seeds": sorted({*declared.seeds, *saved["seeds"], *seeds}),
        "sessions": sessions,
    }
    if write:
        write_json(folder / "experiment.json", facts)
    return facts


def _read(folder: Path) -> dict[str, Any] | None:
    """experiment.json, or None where there may be a new one."""
    path = folder / "experiment.json"
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and not an experiment's: no experiment.json in it")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: expected a folder, got a file")
        return None
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = (saved["format"], saved["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not of an experiment ({error})") from error
    if kind != (_FORMAT, _VERSION):
        raise UserError(f"{path}: expected {_FORMAT} version {_VERSION}, got {kind[0]} version {kind[1]}")
    return saved


def _machine() -> str:
    return f"{_cpu_name()}, {cores()} cores, {platform.system()}"


def _commit() -> str | None:
    """The commit of the sources that run, if they are a git checkout, and whether they differ from it."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-c", "safe.directory=*", "-C", str(root)]
    top = _answer([*git, "rev-parse", "--show-toplevel"])
    # Installed into somebody's own repository, its commit would not be ours.
    if top is None or Path(top).resolve() != root:
        return None
    commit = _answer([*git, "rev-parse", "--short=12", "HEAD"])
    changed = _answer([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with changes" if commit and changed else commit


def _answer(command: Sequence[str]) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


# One run --------------------------------------------------------------------------------------------------------------


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Command-line flags of `fastflow train` for dotted settings: {"agent.batch_size": 32} is --agent.batch-size=32."""
    words: list[str] = []
    for name, value in settings.items():
        group, _, last = name.rpartition(".")
        prefix = f"--{group}." if group else "--"
        flag = (prefix + last).replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"{prefix}no-{last}".replace("_", "-"))
        elif isinstance(value, (tuple, list)):
            words += [flag, *map(str, value)]
        else:
            # In one word, which may then begin with a dash.
            words.append(f"{flag}={value}")
    return words


def measure(function: str, path: str | Path) -> None:
    """Calls `function` ("module:function") with the finished run in `path`, and keeps what it returns beside the run.

    Raises:
        UserError: the run is not finished.
        TypeError: the function did not return a dict of numbers.
    """
    finished = report.finished(Path(path))
    if finished is None:
        raise UserError(f"{path}: expected a finished run")
    module, _, name = function.partition(":")
    metrics = getattr(importlib.import_module(module), name)(finished)
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{function}: expected a dict of numbers by name, got {type(metrics).__name__}")
    found = {}
    for key, value in metrics.items():
        try:
            found[str(key)] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{function}: {key}: expected a number, got {value!r}") from error
    record = {"function": function, "step": finished.last_step, "metrics": found}
    write_json(report.after_path(finished.path), record)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One arm with one seed."""

    experiment: Experiment
    size: str
    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm.name} seed {self.seed}"

    @property
    def path(self) -> Path:
        return report.run_path(self.folder, self.arm, self.seed)

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    def next(self) -> tuple[str, list[str]] | None:
        """What is to be done next and the command that does it, or None if all is done."""
        finished = report.finished(self.path)
        if finished is None:
            return "training", self._train()
        after = self.arm.after
        if after is not None and report.read_after(finished, after) is None:
            return after, [sys.executable, "-c", _MEASURE, after, str(self.path)]
        return None

    @property
    def _agent(self) -> str:
        return self.arm.agent or self.experiment.agent

    @property
    def _settings(self) -> dict[str, Any]:
        return {**_DEFAULTS, **self.experiment.settings(self.arm, self.size), "seed": self.seed, "run_dir": self.path}

    def _train(self) -> list[str]:
        command = [sys.executable, "-m", "fastflow", "train", self._agent]
        if self._begun():
            return [*command, f"--resume={self.path}", f"--threads={self._settings['threads']}"]
        return [*command, *flags(self._settings)]

    def take_over(self) -> Path | None:
        """The finished run of another experiment that was copied here, if this one has not begun."""
        self.clear()
        return None if self.path.exists() else take_over(self._agent, flags(self._settings), self.path, self.folder)

    def _begun(self) -> bool:
        try:
            return bool(Run.open(self.path).checkpoint_steps())
        except UserError:
            return False

    def clear(self) -> None:
        """Removes a run folder that holds no checkpoint, from which nothing could go on; nothing else."""
        try:
            run = Run.open(self.path)
        except UserError:
            return
        if not run.checkpoint_steps():
            shutil.rmtree(self.path)


# Many runs ------------------------------------------------------------------------------------------------------------


class _Process:
    """A command of a job under way."""

    def __init__(self, job: _Job, stage: str, command: Sequence[str], threads: int, began: float | None = None) -> None:
        self.job = job
        self.stage = stage
        self.began = time.perf_counter() if began is None else began  # with the job's first command
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.clear()
        self._log: TextIO = open(job.log, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the process
        print(f"$ {shlex.join(command)}", file=self._log, flush=True)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            # Out of the terminal's reach: its Ctrl-C besides ours would be the second, which does not save.
            start_new_session=True,
        )

    def done(self) -> bool:
        if self.process.poll() is None:
            return False
        self._log.close()
        return True

    def interrupt(self) -> None:
        if self.process.poll() is None:
            # Windows has no such signal for another process; ending one loses what it did since its last checkpoint.
            self.process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)

    def last_words(self) -> str:
        """The end of what this process printed."""
        text = self.job.log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
        lines = [line.rstrip() for line in text.splitlines()[1:] if line.strip()]
        return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])


class _Requests:
    """Counts the signals that ask to stop. Between them, the loop is where it can stop everything that it started."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def listen(self) -> Iterator[None]:
        names = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in names:
                # What nohup and the like have switched off stays off.
                if signal.getsignal(name) is not signal.SIG_IGN:
                    before[name] = signal.signal(name, self._handle)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1


def _work(
    jobs: Sequence[_Job], workers: int, count: int, threads: int, out: Callable[[str], None]
) -> tuple[list[str], bool]:
    """Does `jobs`, `workers` at a time.

    Returns:
        Names of those that failed, and whether a signal stopped the rest.
    """
    waiting = collections.deque(jobs)
    active: list[_Process] = []
    failures: list[str] = []
    requests = _Requests()
    with requests.listen():
        try:
            while (waiting or active) and not requests.count:
                while waiting and len(active) < workers:
                    job = waiting.popleft()
                    step = job.next()
                    if step is not None:
                        active.append(_Process(job, *step, threads))
                time.sleep(_POLL_SECONDS)
                for process in [process for process in active if process.done()]:
                    active.remove(process)
                    following = process.job.next()
                    code = process.process.returncode
                    if code == 0 and following is not None and following[0] != process.stage:
                        active.append(_Process(process.job, *following, threads, process.began))
                        continue
                    taken = time.perf_counter() - process.began
                    place = f"[{count - len(waiting) - len(active)} of {count}] {process.job.name}"
                    if code == 0 and following is None:
                        out(f"{place}: done, {taken:.0f} s")
                        continue
                    failures.append(process.job.name)
                    why = f"exit code {code}" if code else "ended unfinished (is the evaluation skipped?)"
                    out(f"{place}: {process.stage} FAILED, {why}; {process.job.log} ends with\n{process.last_words()}")
        finally:
            _stop(active, requests, out)
    return failures, requests.count > 0


def _stop(active: list[_Process], requests: _Requests, out: Callable[[str], None]) -> None:
    """Asks what is under way to save and waits for it; another signal is passed on, and a third ends it."""
    if not active:
        return
    out(f"stopping {len(active)} runs after their updates and saving; once more to stop at once")
    seen = max(requests.count, 1)
    for process in active:
        process.interrupt()
    while active:
        time.sleep(_POLL_SECONDS)
        active[:] = [process for process in active if not process.done()]
        if requests.count > seen:
            seen = requests.count
            for process in active:
                process.interrupt() if seen < 3 else process.process.kill()
