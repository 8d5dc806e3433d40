"""Settings that the training of every agent has; what comes besides, the kind of its task brings (`fastflow.offline`,
`fastflow.horizon`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

__all__ = ["AgentConfig", "LoopSettings", "WorldSettings"]

AgentConfig = TypeVar("AgentConfig")
Settings = TypeVar("Settings", bound="LoopSettings")


@dataclasses.dataclass(frozen=True)
class LoopSettings(Generic[AgentConfig]):
    """Trains an agent and leaves a run folder (config.json, train.csv, eval.csv, checkpoints).

    Ctrl-C saves a checkpoint and prints the command that goes on from it, bit for bit.

    Raises:
        ValueError: a setting that cannot be; it names the field.
    """

    env: str
    """Task, by name."""
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
    save_interval: int = 100_000
    """Updates between checkpoints, besides the one at the end; 0 is only at the end."""
    keep_checkpoints: int = 0
    """Newest checkpoints to keep; 0 keeps all."""
    run_dir: Path | None = None
    """Where to record the run; by default runs/ENV__AGENT__seedN. It must not exist yet, or be empty."""
    resume: Path | None = None
    """Run folder to go on with. Its settings are the defaults then; those of the agent, task and seed cannot change."""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda or cuda:N."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """float32 matrix products on a GPU, as in torch.set_float32_matmul_precision. high is TF32, which the published JAX
    code had by default on such GPUs. The CPU always multiplies in float32."""
    threads: int = 0
    """Threads of torch on the CPU; 0 leaves torch's choice."""
    cuda_graph: bool = False
    """Run updates as replays of a CUDA graph, which gives what they give without (docs/integrations.md). Not yet run on
    a GPU."""
    compile: bool = False
    """torch.compile the losses, within rounding of those without; of floq, fql, fql-iqn and td2-cfm. Slower on a CPU,
    and the first update then takes half a minute."""
    progress: bool = True
    """Progress bar, if the output is a terminal."""
    tensorboard: bool = True
    """TensorBoard events besides the CSV files."""

    fixed: ClassVar[tuple[str, ...]] = ("env", "seed", "matmul_precision", "agent")
    """Settings that define the run; another value is another run. The rest may change on resuming."""
    least: ClassVar[Mapping[str, int]] = {
        "seed": 0,
        "steps": 0,
        "log_interval": 1,
        "eval_interval": 0,
        "save_interval": 0,
        "keep_checkpoints": 0,
        "threads": 0,
    }

    scores: ClassVar[Mapping[str, str]] = {}
    """Columns of eval.csv that runs are compared by, the most important first, and how tables call them; more is
    better."""

    @property
    def last_step(self) -> int:
        """Where a run ends."""
        return self.steps

    def whole(self: Settings) -> Settings:
        """As the loop can follow them: a task whose updates are many steps rounds numbers of steps."""
        return self

    def __post_init__(self) -> None:
        for name, bound in self.least.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")


@dataclasses.dataclass(frozen=True)
class WorldSettings(LoopSettings[AgentConfig]):
    """Settings of what is trained on one of fastflow's worlds: linear-gaussian, circle, pointmaze-arena, -medium,
    -large, -giant or pointmass-maze."""

    transitions: int = 1_000_000
    """Transitions that the behaviour policy collects, where no dataset is given."""
    data_seed: int = 0
    """Decides the collected transitions, and where evaluations start."""
    dataset_path: Path | None = None
    """Dataset file (npz) instead: by fastflow collect, or trajectories in OGBench's format."""

    fixed: ClassVar[tuple[str, ...]] = (*LoopSettings.fixed, "transitions", "data_seed")
    least: ClassVar[Mapping[str, int]] = {**LoopSettings.least, "transitions": 1, "data_seed": 0}
