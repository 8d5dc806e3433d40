"""The command line. Each command imports what it needs when it runs, so that help and errors come at once.

Exit codes: 0 done, 2 something the user can put right (printed as `error: ...`), 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import difflib
import inspect
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastflow._version import __version__
from fastflow.errors import UserError, missing_extra

__all__ = ["main"]

_HELP = """\
usage: fastflow COMMAND [OPTIONS]

commands:
  collect NAME   make an OGBench dataset locally with scripted policies
  train AGENT    train floq, fql, fql-iqn, value-flows, td2-cfm, fb, fpo, dppo or ppo;
                 --env NAME, --resume RUN
  evaluate RUN   test what a saved run has learnt
  plot RUN       draw learning curves of saved runs, and what they learnt
  experiment NAME  run, repeat and draw a comparison
  convert FILE   make a run of weights from floq's or FQL's JAX code, or a file for JAX of a run
  relabel NAME   turn an OGBench dataset into a file that trains without a simulator
  info           versions, devices and kernel plan: what a bug report needs

fastflow COMMAND --help tells the options of a command; fastflow --version the version.
"""

# How positional arguments are called in help.
_METAVARS = {"name": "NAME", "runs": "RUN [RUN ...]", "source": "FILE|RUN"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is sys.argv without the program by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; what Python would flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_HELP, end="", file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if name in ("--version", "-V"):
        print(f"fastflow {__version__}")
        return 0
    if name not in _COMMANDS:
        raise UserError(f"no command {name!r}{_nearest(name, list(_COMMANDS))}; fastflow --help lists the commands")
    return _COMMANDS[name](rest)


def _nearest(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f", did you mean {found[0]}?" if found else ""


def _parse(function: Callable[..., Any], argv: list[str], command: str, rest: bool = False) -> Any:
    """Calls `function` with arguments from the command line: its positional-only parameters are positional there too.
    With `rest`, gives what it returned and the arguments that it has no parameter for.

    The functions only return what they were given; the work starts when tyro is done, outside its error handling.
    """
    try:
        import tyro
    except ImportError as error:
        raise missing_extra("rl", "tyro") from error
    function.__annotations__ |= {
        name: Annotated[kind, tyro.conf.arg(metavar=_METAVARS[name])]
        for name, kind in typing.get_type_hints(function).items()
        if name in _METAVARS
    }
    if rest:
        return tyro.cli(function, args=argv, prog=f"fastflow {command}", return_unknown_args=True)
    return tyro.cli(function, args=argv, prog=f"fastflow {command}")


def _collect(argv: list[str]) -> int:
    def collect(
        name: str,
        /,
        dataset_dir: Path | None = None,
        episodes: int | None = None,
        val_episodes: int | None = None,
        seed: int = 0,
        noise: float | None = None,
        transitions: int = 1_000_000,
        policy: str | None = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Makes the files of an OGBench dataset with the scripted policies that ship in the ogbench package, or one
        file with transitions of a world such as linear-gaussian or pointmass-maze.

        Interrupted, the same command goes on where it stopped.

        Args:
            name: Dataset, such as cube-single-play-v0, an environment that uses it, or a world.
            dataset_dir: Folder for the files; by default OGBench's own, ~/.ogbench/data.
            episodes: Training episodes; by default as many as published.
            val_episodes: Validation episodes; by default a tenth of the training episodes.
            seed: Decides every episode.
            noise: Action noise; by default as published.
            transitions: Rows to collect (worlds).
            policy: Named policy that collects instead of the world's behaviour policy (worlds).
            overwrite: Replace existing files, once the new ones are complete.
            progress: Progress bar, if the output is a terminal.
        """
        return locals()

    options = _parse(collect, argv, "collect")
    from fastflow.worlds import WORLDS

    world = {name: options.pop(name) for name in ("transitions", "policy")}
    if options["name"] in WORLDS:
        from fastflow.worlds.files import collect as collect_world

        shared = {name: options[name] for name in ("dataset_dir", "seed", "overwrite")}
        print(collect_world(options["name"], **shared, **world))
        return 0
    from fastflow.collect import collect as make

    try:
        written = make(options.pop("name"), **options)
    except KeyboardInterrupt:
        print("interrupted; the finished episodes are kept, and the same command goes on", file=sys.stderr)
        return 130
    for path in written:
        print(path)
    return 0


def _relabel(argv: list[str]) -> int:
    def relabel(
        name: str,
        /,
        output: Path,
        dataset_dir: Path | None = None,
        dataset_path: Path | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Writes the transitions of a task, rewards included, to one file.

        OGBench computes rewards from simulator states when it loads a dataset. The file made here holds them, so that
        `fastflow train --dataset-path FILE` runs where there is no simulator.

        Args:
            name: Task, such as cube-single-play-singletask-v0.
            output: File to write (npz).
            dataset_dir: Folder with OGBench's dataset files; by default OGBench's own, ~/.ogbench/data.
            dataset_path: One OGBench dataset file instead.
            overwrite: Replace an existing file.
        """
        return locals()

    options = _parse(relabel, argv, "relabel")
    output = options["output"]
    if output.exists() and not options["overwrite"]:
        raise UserError(f"{output}: exists; pass --overwrite to replace it")
    if not output.parent.is_dir():
        raise UserError(f"output: expected a file in an existing folder, got {output}")
    from fastflow.data import load_dataset, save_transitions
    from fastflow.envs import check_name

    name = options["name"]
    check_name(name)
    try:
        dataset, validation = load_dataset(
            name, dataset_dir=options["dataset_dir"], dataset_path=options["dataset_path"]
        )
    except (OSError, ValueError) as error:
        raise UserError(f"dataset of {name}: {error}") from error
    save_transitions(dataset, output)
    print(f"{output}: {len(dataset):,} transitions")
    if validation is not None:
        # Where load_dataset looks for the other half.
        beside = output.with_name(f"{output.stem}-val{output.suffix}")
        save_transitions(validation, beside)
        print(f"{beside}: {len(validation):,} transitions")
    return 0


def _train(argv: list[str]) -> int:
    from fastflow import agents

    names = ", ".join(agents.NAMES)
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: fastflow train AGENT --env NAME [OPTIONS]\n\nagents: {names}\n\n"
            "fastflow train AGENT --help tells all options; --seeds 0 1 2 [--jobs N] trains several runs."
        )
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in agents.NAMES:
        raise UserError(f"no agent {name!r}{_nearest(name, list(agents.NAMES))}; there are: {names}")
    from fastflow.experiments.seeds import split, train_seeds
    from fastflow.train import parse, train

    seeds, flags = split(rest)
    settings = parse(name, flags, prog=f"fastflow train {name}")
    if seeds is not None:
        train_seeds(name, settings, seeds, command=f"fastflow train {shlex.join(argv)}")
        return 0
    result = train(settings, name)
    return 0 if result.interrupted is None else 128 + int(result.interrupted)


def _evaluate(argv: list[str]) -> int:
    def evaluate(
        runs: tuple[Path, ...],
        /,
        episodes: int = 50,
        seed: int = 0,
        envs: int = 10,
        states: int | None = None,
        samples: int | None = None,
        checkpoint: int | None = None,
        all_checkpoints: bool = False,
        device: str = "auto",
        video: Path | None = None,
    ) -> dict[str, Any]:
        """Tests what saved runs have learnt.

        A policy plays episodes; success, return and length are printed, and of several runs also the mean and the
        interquartile mean with a bootstrap interval, task by task. A successor model is compared with true futures.
        Results are written to RUN/evaluations, and to RUN/eval.csv where that step has no row yet.

        Args:
            runs: Run folders; of policies also of several agents, which are summed up one by one.
            episodes: Episodes per checkpoint (policies).
            seed: Decides start states and all noise.
            envs: Environments that step together (policies).
            states: States whose futures are compared (successor models); by default the run's own number.
            samples: Samples per state; by default the run's own number.
            checkpoint: Step of the checkpoint; by default the newest.
            all_checkpoints: Every checkpoint of each run.
            device: auto, cpu, cuda or cuda:N.
            video: A .gif or .mp4 to write an episode of a policy to; one run.
        """
        return locals()

    options = _parse(evaluate, argv, "evaluate")
    for name in ("episodes", "envs", "states", "samples"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"{name}: expected at least 1, got {options[name]}")
    runs = options.pop("runs")
    command = _command(runs, "evaluate")
    options["num_envs"] = options.pop("envs")
    taken = inspect.signature(command).parameters
    if options["video"] is not None and "video" not in taken:
        raise UserError("video: expected runs of a policy, got those of a successor model")
    command(runs, **{name: value for name, value in options.items() if name in taken})
    return 0


def _command(runs: Sequence[Path], which: str) -> Callable[..., Any]:
    """What a command does with these runs, by the agent that they are of."""
    from fastflow import agents
    from fastflow.record import Run

    names = sorted({Run.open(path).config["agent_name"] for path in runs})
    for name in names:
        if name not in agents.NAMES:
            raise UserError(f"{runs[0]} is a run of agent {name}, which this version does not know")
    commands = {agents.command(name, which) for name in names or ["floq"]}
    if len(commands) > 1:
        raise UserError(f"runs: expected runs of one agent, or of one kind, got {', '.join(names)}")
    return commands.pop()


def _plot(argv: list[str]) -> int:
    def plot(runs: tuple[Path, ...], /, output: Path | None = None, checkpoint: int | None = None) -> dict[str, Any]:
        """Draws learning_curve.png, and flow_paths.png of floq or futures.png, value_map.png of a successor model.

        Args:
            runs: Run folders of one kind (floq and its baselines; fpo, dppo, ppo); several share one learning curve.
            output: Folder for the figures; by default RUN/figures of the first run.
            checkpoint: Step of the checkpoint for the other figures; by default the newest.
        """
        return locals()

    options = _parse(plot, argv, "plot")
    from fastflow.plot import figure_style

    figure_style()  # a missing matplotlib is said before anything is read
    runs = options.pop("runs")
    for path in _command(runs, "plot")(runs, **options):
        print(path)
    return 0


def _experiment(argv: list[str]) -> int:
    def experiment(
        name: str,
        /,
        size: str = "small",
        output: Path | None = None,
        jobs: int | None = None,
        arms: tuple[str, ...] = (),
        seeds: tuple[int, ...] = (),
        plot_only: bool = False,
        reuse: bool = False,
    ) -> dict[str, Any]:
        """Runs an experiment: every arm with every seed, then a table, a figure and all numbers.

        What is finished is not run again: the same command goes on, and adds seeds or arms.

        Args:
            name: Experiment; an unknown name lists them.
            size: small (minutes on a CPU) or paper (published sizes, for a GPU), where the experiment has both.
            output: Folder for runs and report; by default runs/NAME__SIZE.
            jobs: Runs at a time; by default as many as CPU cores.
            arms: Only these arms; by default all.
            seeds: These seeds; by default the experiment's own.
            plot_only: Only the report, from what is finished.
            reuse: Copy finished runs of other experiments that have the same settings and seed.
        """
        return locals()

    options = _parse(experiment, argv, "experiment")
    from fastflow.experiments.run import run

    for key in ("arms", "seeds"):
        options[key] = options[key] or None
    for path in run(options.pop("name"), **options):
        print(path)
    return 0


def _convert(argv: list[str]) -> int:
    def convert(
        source: Path,
        /,
        env: str | None = None,
        preset: str = "auto",
        r_min: float | None = None,
        r_max: float | None = None,
        flags: Path | None = None,
        seed: int | None = None,
        device: str = "auto",
        checkpoint: int | None = None,
        output: Path | None = None,
    ) -> dict[str, Any]:
        """Makes a run folder of a checkpoint of the published JAX code of floq or FQL, without JAX; or of a run
        folder a file of arrays with flax's names.

        A checkpoint does not hold settings or rewards: what flags.json beside it does not say comes as options, those
        of the agent as in fastflow train (--alpha 300).

        Args:
            source: params_STEP.pkl or an npz as this command writes it; or a run folder.
            env: Task, such as cube-double-play-singletask-v0; by default the one in the flags.
            preset: Named settings for what neither flags nor options say.
            r_min: Smallest reward of the dataset, at most 0 (floq).
            r_max: Largest reward of the dataset, at least 0 (floq).
            flags: The flags.json of the checkpoint; by default the one beside it.
            seed: Decides noise and batches from here on; by default the one in the flags, or 0.
            device: Where training is to go on, auto, cpu, cuda or cuda:N.
            checkpoint: Of a run folder, the step; by default the newest.
            output: Run folder to make, by default runs/ENV__AGENT__seedN; or npz file, by default step_N.npz there.
        """
        return locals()

    options, rest = _parse(convert, argv, "convert", True)
    source, output = options.pop("source"), options.pop("output")
    step = options.pop("checkpoint")
    from fastflow import convert as conversion

    if source.is_dir():
        extra = [name for name, value in options.items() if value not in (None, "auto")]
        if extra or rest:
            raise UserError(f"{[*extra, *rest][0]}: only where a file becomes a run, and {source} is a folder")
        print(conversion.export_run(source, output, step))
        return 0
    if step is not None:
        raise UserError(f"checkpoint: only where a run becomes a file, and {source} is none")
    run, report = conversion.import_checkpoint(source, output=output, agent_flags=rest, **options)
    for line in report:
        print(line)
    print(f"run folder: {run.path}")
    return 0


def _info(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: fastflow info\n\nPrints versions, devices, shared memory and kernel plan: what a bug report needs."
        )
        return 0
    if argv:
        raise UserError(f"info: expected no arguments, got {' '.join(argv)}")
    from fastflow.info import describe

    print(describe())
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "collect": _collect,
    "train": _train,
    "evaluate": _evaluate,
    "plot": _plot,
    "experiment": _experiment,
    "convert": _convert,
    "relabel": _relabel,
    "info": _info,
}
