"""The run folder: everything one training run leaves behind, in formats that any tool can read.

    runs/<env>__<agent>__seed<k>/
      config.json                            all settings, versions and facts about the dataset
      train.csv  eval.csv                    one row per log point and per evaluation, metric names of the FQL family
      events.out.tfevents.*                  the same numbers for TensorBoard
      checkpoints/step_00012500.safetensors  the whole training state; metadata says which agent and configuration
      samples.safetensors                    a few dataset rows, so that figures need no dataset
      replay/*.safetensors                   what came in online, where learning went online (see fastflow.replay)
      evaluations/*.json  figures/*.png

Files that replace an older one are written beside it and renamed, so a full disk or a crash leaves the old one intact.
Nothing here is a pickle: opening a run of a stranger runs none of their code.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
import shlex
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow._version import __version__
from fastflow.atomic import atomic_write
from fastflow.errors import UserError, missing_extra
from fastflow.info import resolve_device

RUN_FORMAT = "fastflow-run"
CHECKPOINT_FORMAT = "fastflow-checkpoint"
FORMAT_VERSION = "1"

_CHECKPOINT_NAME = re.compile(r"step_(\d{8,})\.safetensors")
# EDQUOT (quota) does not exist on Windows.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def to_json(value: Any) -> Any:
    """`value` as plain JSON types: dataclasses become objects, tuples lists, paths strings.

    Two settings are the same exactly when their JSON is the same; that is how a checkpoint is compared with a
    configuration.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"to_json: expected dataclasses, mappings, sequences, paths or plain values, got {type(value).__name__}"
    )


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line per field whose JSON value differs: `name: <saved> there, <asked> here`, nested ones by dotted names."""
    lines = []
    for key in sorted({*saved, *asked}):
        there, here = saved.get(key, "(absent)"), asked.get(key, "(absent)")
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: {there} there, {here} here")
    return lines


def absolute(path: Path | None) -> str | None:
    """A path as config.json keeps it: it must mean the same in another working directory."""
    return None if path is None else str(path.expanduser().resolve())


def quote(path: Path) -> str:
    """A path as it can be pasted into a shell."""
    return shlex.quote(str(path))


def _disk_error(path: Path, error: OSError) -> UserError:
    reason = "the disk is full" if error.errno in _FULL else "cannot write"
    return UserError(f"{path}: {reason} ({error.strerror or error})")


# --- tables -----------------------------------------------------------------------------------------------------------


class MetricTable:
    """A CSV file of metrics with a `step` column, appended row by row.

    Rows reach the disk one by one, so a crash loses at most the row being written. A row with new columns rewrites the
    file once with the wider header.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def rows(self) -> list[dict[str, float]]:
        """All complete rows, oldest first; empty cells are left out of a row's dict. A missing file has no rows."""
        return [
            {name: float(cell) for name, cell in row.items() if cell != ""} | {"step": int(row["step"])}
            for row in self._cells()
        ]

    def steps(self) -> list[int]:
        """The `step` column."""
        return [int(row["step"]) for row in self._cells()]

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        row = {"step": step, **metrics}
        columns = self._columns()
        if columns is None or not set(row) <= set(columns):
            self._write([*self._cells(), row], _union([columns or (), row]))
            return
        buffer = io.StringIO()
        csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerow(row)
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(buffer.getvalue())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise _disk_error(self.path, error) from error

    def insert(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row in its place by step, replacing a row of the same step."""
        others = [row for row in self._cells() if int(row["step"]) != step]
        rows = sorted([*others, {"step": step, **metrics}], key=lambda row: int(row["step"]))
        self._write(rows, _union([self._columns() or (), {"step": step, **metrics}]))

    def truncate(self, last_step: int) -> None:
        """Drops rows after `last_step` and a half-written last line: what resuming from a checkpoint needs."""
        columns = self._columns()
        if columns is not None:
            self._write([row for row in self._cells() if int(row["step"]) <= last_step], columns)

    def _columns(self) -> list[str] | None:
        if not self.path.exists():
            return None
        with open(self.path, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), None)
        if columns is not None and "step" not in columns:
            raise UserError(f"{self.path} is not a metrics table: its first line has no `step` column")
        return columns

    def _cells(self) -> list[dict[str, Any]]:
        columns = self._columns()
        if columns is None:
            return []
        # A last line without its end was cut off, perhaps in the middle of a number.
        text = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        lines = list(csv.reader(io.StringIO(text)))[1:]
        return [
            dict(zip(columns, cells, strict=True)) for cells in lines if len(cells) == len(columns) and _numeric(cells)
        ]

    def _write(self, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write_bytes(self.path, buffer.getvalue().encode())


def _union(rows: Iterable[Iterable[str]]) -> list[str]:
    columns: dict[str, None] = {"step": None}
    for row in rows:
        columns.update(dict.fromkeys(row))
    return list(columns)


def _numeric(cells: Iterable[str]) -> bool:
    try:
        for cell in cells:
            if cell != "":
                float(cell)
    except ValueError:
        return False
    return True


def _write_bytes(path: Path, data: bytes) -> None:
    _make_folder(path.parent)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _disk_error(path, error) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing_extra("rl", "safetensors") from error
    # safetensors refuses tensors that share memory, and parameters may be views of one buffer.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    _make_folder(path.parent)
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` (see `to_json`) to `path` as indented JSON, atomically."""
    _write_bytes(Path(path), (json.dumps(to_json(value), indent=2) + "\n").encode())


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved training state.

    Attributes:
        step: updates done.
        agent: name of the algorithm.
        config: the agent's configuration as JSON types.
        arguments: what else building the agent takes: obs_dim, action_dim, reward_range, observation_statistics.
        loop: what the training loop itself needs to go on: metric names, seconds spent, device type, fingerprint of
            the dataset.
        tensors: flat names to CPU tensors; the agent's begin with `agent/`, the loop's with `loop/`.
    """

    step: int
    agent: str
    config: dict[str, Any]
    arguments: dict[str, Any]
    loop: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `name/`, without that prefix."""
        prefix = f"{name}/"
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint as safetensors, atomically.

    Raises:
        ValueError: a floating-point tensor holds a number that is not finite; such a state is not worth keeping.
        UserError: the disk is full or the file cannot be written; an older file of that name is intact.
    """
    bad = [
        name for name, value in checkpoint.tensors.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise ValueError(
            f"checkpoint at step {checkpoint.step}: expected finite numbers, got NaN or infinity in {bad[0]}"
        )
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "version": FORMAT_VERSION,
        "agent": checkpoint.agent,
        "step": str(checkpoint.step),
        "config": json.dumps(to_json(checkpoint.config)),
        "arguments": json.dumps(to_json(checkpoint.arguments)),
        "loop": json.dumps(to_json(checkpoint.loop)),
    }
    save_tensors(Path(path), checkpoint.tensors, metadata)


def load_checkpoint(
    path: str | Path, *, agent: str | None = None, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Reads a checkpoint written by `save_checkpoint`, onto the CPU.

    Args:
        path: the file.
        agent: if given, the algorithm that the checkpoint must belong to.
        config: if given, the agent configuration (JSON types) that the checkpoint must have been trained with.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint of fastflow, of another format version, of another
            agent, or of another configuration (the message names the fields that differ).
    """
    try:
        import safetensors
    except ImportError as error:
        raise missing_extra("rl", "safetensors") from error

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, agent)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        checkpoint = Checkpoint(
            step=int(metadata["step"]),
            agent=metadata["agent"],
            config=json.loads(metadata["config"]),
            arguments=json.loads(metadata["arguments"]),
            loop=json.loads(metadata["loop"]),
            tensors=tensors,
        )
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, struct.error) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of fastflow ({error})") from error
    if config is not None and (lines := differences(checkpoint.config, to_json(config))):
        raise UserError(f"{path} was trained with another configuration:\n  " + "\n  ".join(lines))
    return checkpoint


def _check_metadata(path: Path, metadata: Mapping[str, str], agent: str | None) -> None:
    if metadata.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} is a safetensors file, but not a checkpoint of fastflow (format {metadata.get('format')!r})"
        )
    if metadata.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {metadata.get('version')}; fastflow {__version__} reads version "
            f"{FORMAT_VERSION}"
        )
    if agent is not None and metadata.get("agent") != agent:
        raise UserError(f"{path} is a checkpoint of agent {metadata.get('agent')!r}, expected {agent!r}")


# --- the folder -------------------------------------------------------------------------------------------------------


def check_available(path: str | Path) -> None:
    """Raises UserError unless `path` is free for a new run: absent, or an empty folder."""
    path = Path(path)
    if path.is_dir():
        if any(path.iterdir()):
            raise UserError(
                f"run folder {path} exists and is not empty: go on with it by --resume {path}, or name another by "
                "--run-dir"
            )
    elif path.exists():
        raise UserError(f"run folder {path}: a file of that name exists")


class Run:
    """An open run folder. Make one with `Run.create` or `Run.open`.

    Attributes:
        path: the folder.
        config: what config.json says.
        train, eval: the two tables of metrics.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.train = MetricTable(path / "train.csv")
        self.eval = MetricTable(path / "eval.csv")
        self._events: Any = None
        self._purge_step: int | None = None

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> Run:
        """A new run folder with its config.json.

        Raises:
            UserError: the folder exists and is not empty, or cannot be written.
        """
        path = Path(path)
        check_available(path)
        _make_folder(path)
        run = cls(path, {"format": RUN_FORMAT, "version": FORMAT_VERSION, **to_json(config)})
        run.write_config()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run folder.

        Raises:
            UserError: there is no such folder, or its config.json is missing, damaged or of another version.
        """
        path = Path(path)
        file = path / "config.json"
        if not file.is_file():
            raise UserError(
                f"{path} is not a run folder: " + ("no config.json in it" if path.is_dir() else "no such folder")
            )
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            kind, version = config["format"], config["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged or not the configuration of a run ({error})") from error
        if kind != RUN_FORMAT or version != FORMAT_VERSION:
            raise UserError(
                f"{file}: expected format {RUN_FORMAT} version {FORMAT_VERSION}, got format {kind} version {version}"
            )
        return cls(path, config)

    @property
    def last_step(self) -> int:
        """Where the run is meant to end."""
        return int(self.config["steps"]) + int(self.config.get("online_steps", 0))

    def write_config(self) -> None:
        """Writes `config` to config.json, atomically."""
        write_json(self.path / "config.json", self.config)

    # checkpoints

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` updates lies."""
        return self.path / "checkpoints" / f"step_{step:08d}.safetensors"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, ascending."""
        folder = self.path / "checkpoints"
        names = [_CHECKPOINT_NAME.fullmatch(file.name) for file in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name[1]) for name in names if name)

    def save(self, checkpoint: Checkpoint, keep: int = 0) -> Path:
        """Writes a checkpoint under its step (see `save_checkpoint`); then removes all but the newest `keep` > 0."""
        path = self.checkpoint_path(checkpoint.step)
        save_checkpoint(path, checkpoint)
        if keep > 0:
            for step in self.checkpoint_steps()[:-keep]:
                self.checkpoint_path(step).unlink(missing_ok=True)
        return path

    def load(self, step: int | None = None, **expected: Any) -> Checkpoint:
        """Reads the checkpoint of `step`, by default the newest (see `load_checkpoint` for `expected` and errors)."""
        steps = self.checkpoint_steps()
        if not steps:
            raise UserError(f"{self.path} holds no checkpoint: that run ended before its first; start anew")
        if step is not None and step not in steps:
            raise UserError(f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return load_checkpoint(self.checkpoint_path(steps[-1] if step is None else step), **expected)

    # metrics

    def rewind(self, step: int) -> None:
        """Forgets rows and TensorBoard events after `step`, so that training from there writes each exactly once."""
        self.train.truncate(step)
        self.eval.truncate(step)
        self._purge_step = step + 1

    def log(self, table: MetricTable, step: int, metrics: Mapping[str, float], *, tensorboard: bool = True) -> None:
        """Appends a row to `table` (`self.train` or `self.eval`) and, unless told not to, to TensorBoard.

        Raises:
            UserError: the disk is full or a file cannot be written.
        """
        table.append(step, metrics)
        if not tensorboard:
            return
        try:
            events = self._writer()
            for name, value in metrics.items():
                if math.isfinite(value):
                    events.add_scalar(name, value, step)
            events.flush()
        except OSError as error:
            raise _disk_error(self.path / "events.out.tfevents", error) from error

    def _writer(self) -> Any:
        if self._events is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise missing_extra("rl", "tensorboard") from error
            self._events = SummaryWriter(str(self.path), purge_step=self._purge_step)
        return self._events

    def close(self) -> None:
        """Flushes and closes the TensorBoard file."""
        if self._events is not None:
            events, self._events = self._events, None
            try:
                events.close()
            except OSError as error:
                raise _disk_error(self.path / "events.out.tfevents", error) from error

    # samples

    def save_samples(self, samples: Mapping[str, Tensor]) -> None:
        """Keeps a few dataset rows for figures: `observations` [N, O] and `actions` [N, A]."""
        save_tensors(self.path / "samples.safetensors", samples)

    def load_samples(self) -> dict[str, Tensor]:
        """The rows kept by `save_samples`.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            import safetensors
            import safetensors.torch
        except ImportError as error:
            raise missing_extra("rl", "safetensors") from error

        path = self.path / "samples.safetensors"
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is missing or damaged ({error})") from error


def spread(rows: int, count: int) -> Tensor:
    """At most `count` different row numbers, evenly spread over `rows`; int64."""
    count = min(rows, count)
    return torch.arange(count) * rows // max(count, 1)


def mean_and_std(rows: Tensor) -> list[list[float]]:
    """Mean and standard deviation of rows [N, D] as JSON, for agents that centre and scale. What never changes is only
    centred."""
    rows = rows.double()
    std = rows.std(0, correction=0)
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return [rows.mean(0).float().tolist(), std.float().tolist()]


def tensor_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of a dataset: all of the rewards and masks, and 1,000 rows of everything else, evenly spread."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        if name not in ("rewards", "masks"):
            value = value[spread(len(value), 1000).to(value.device)]
        digest.update(f"{name}:{tuple(tensors[name].shape)};".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_agent(run: Run, step: int | None = None, device: str = "auto") -> tuple[Any, Checkpoint]:
    """The agent of a run as it was after `step` updates (default: the newest checkpoint), without its dataset.

    Args:
        run: an open run folder.
        step: which checkpoint.
        device: "auto", "cpu" or "cuda"; need not be the one it was trained on.

    Returns:
        The agent and the checkpoint it came from.

    Raises:
        UserError: no such or a damaged checkpoint, one that does not belong to the run's configuration, or no CUDA.
    """
    name = run.config["agent_name"]
    checkpoint = run.load(step, agent=name, config=run.config["agent"])
    target = resolve_device(device)
    agent = make_agent(name, checkpoint.config, checkpoint.arguments, device=target, seed=run.config["seed"])
    state = checkpoint.part("agent")
    if target.type != checkpoint.loop["device"]:
        # The state of a random generator means nothing to one on another kind of device. Where training does not go on,
        # the freshly seeded one will do.
        state["generator"] = agent.state_dict()["generator"]
    load_agent_state(agent, state, run.checkpoint_path(checkpoint.step))
    return agent, checkpoint


def config_from_json(agent_name: str, values: Mapping[str, Any]) -> Any:
    """An agent's configuration from its JSON.

    Raises:
        UserError: unknown fields or values that cannot be, as another version may have written.
    """
    from fastflow import agents

    config_class = agents.config_class(agent_name)
    unknown = set(values) - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        raise UserError(
            f"configuration of {agent_name}: unknown {', '.join(sorted(unknown))}; another version wrote it"
        )
    try:
        return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"configuration of {agent_name}: {error}") from error


def make_agent(
    agent_name: str, config: Mapping[str, Any], arguments: Mapping[str, Any], *, device: torch.device, seed: int
) -> Any:
    """A new agent from JSON values: what config.json and a checkpoint's metadata hold.

    Raises:
        UserError: the configuration has unknown fields or values that cannot be.
    """
    from fastflow import agents

    return agents.make(agent_name, config_from_json(agent_name, config), **arguments, device=device, seed=seed)


def load_agent_state(agent: Any, state: Mapping[str, Tensor], path: Path) -> None:
    """Puts a saved state into an agent.

    Raises:
        UserError: names or shapes do not fit this agent.
    """
    try:
        agent.load_state_dict(dict(state))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit this agent: {error}") from error
