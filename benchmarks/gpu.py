"""python -m benchmarks.gpu: checks the kernels on a GPU, measures them beside their rivals, writes one JSON file.

Beside it, by the same name: a table with every goal beside what was measured (.md), and a figure (.png). The kernel
tests come first, then the most important measurements, and the file is written anew after every stage, so that
whatever ends a run early leaves what was measured until then. Exit code 0: kernels right and measured. 1: no CUDA,
a failed test, or a result less accurate than it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
ROOT = Path(__file__).resolve().parents[1]
# The last has a kernel that is not on by default: should it hang, the others have been tested.
_TESTED = ("published", "integrate", "matching", "designs", "fused_dense", "encode", "backup", "philox", "ops", "ring")
KERNEL_TESTS = tuple(f"tests/test_{name}.py" for name in _TESTED)
MAIN_CASES = ("walk-2x2048", "loss-2x2048")
# The first is what goals are against; every one takes its time to compile.
BEST_COMPILER, OTHER_COMPILERS = "compile max-autotune", ("compile reduce-overhead", "compile")
JAX = ("jax", "jax unrolled")
# K at which torch.compile takes part: every K is compiled anew, its loop unrolled. K=8 is one of the main cases.
COMPILED_STEPS = (1, 2, 4)


class OutOfTime(Exception):
    """A step took longer than it was given."""


class Run:
    """One run: its clock, its device and the report that it fills.

    Args:
        arguments: the parsed command line.
        device: where everything runs.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        from benchmarks import machine
        from benchmarks.measure import Timer

        self.arguments, self.device = arguments, device
        self.began = time.monotonic()
        self.limit = 60.0 * arguments.minutes
        # Small sizes are a smoke test: quick batches, few rounds.
        self.rounds = 3 if arguments.small else 21
        self.timer = Timer(device, 0.002 if arguments.small else 0.015)
        self.precisions = ("bf16", "tf32") if device.type == "cuda" else ("bf16", "fp32")
        self.dead: str | None = None
        self.launches: dict[str, int] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        now = datetime.datetime.now(datetime.timezone.utc)
        facts = machine.facts(device)
        self.report: dict[str, Any] = {
            "format": FORMAT,
            "started": now.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "complete": False,
            "ok": True,
            "small": arguments.small,
            "only": arguments.only,
            **facts,
            "clocks": {"start": machine.clocks(device)},
            "context": {},
            "tests": {"status": "not run"},
            "cases": {},
            "updates": {},
            "predictions": {},
            "ncu": {"status": "not run", "cases": {}},
            "stages": [],
            "skipped": [],
            "failures": [],
        }
        name = facts["hardware"].get("gpu") or "cpu"
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        commit = facts["repository"]["commit"] or f"sources-{facts['repository']['sources']}"
        dirty = "-dirty" if facts["repository"]["dirty"] else ""
        self.path = Path(arguments.output) / f"{now:%Y-%m-%d-%H%M%S}-{slug}-{commit}{dirty}.json"

    def left(self) -> float:
        """Seconds until the run should be over."""
        return self.limit - (time.monotonic() - self.began)

    def write(self) -> None:
        """The report as it is now, in place of the one before, and its table of goals."""
        from benchmarks import gpu_goals
        from fastflow.atomic import atomic_write

        with self.lock:
            self.report["seconds"] = round(time.monotonic() - self.began, 1)
            texts = {}
            if not self.arguments.sweep:
                self.report["goals"] = gpu_goals.evaluate(self.report)
                texts[self.path.with_suffix(".md")] = gpu_goals.markdown(self.report)
            texts[self.path] = json.dumps(_finite(self.report), indent=1, allow_nan=False) + "\n"
            for path, text in texts.items():
                with atomic_write(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")

    def stage(self, name: str, needed: float, work: Callable[[], None], on_device: bool = True) -> None:
        """Do `work` if at least `needed` seconds are left and the device still answers; write the report after it."""
        began = time.monotonic()
        if on_device and self.dead:
            status = f"skipped: {self.dead}"
        elif self.left() < needed:
            status = f"skipped: {max(self.left(), 0):.0f} s left, {needed:.0f} wanted"
        else:
            print(f"[{began - self.began:5.0f} s] {name}", flush=True)
            status = "done" if self.attempt(name, work) else "failed"
        self.report["stages"].append({"name": name, "seconds": round(time.monotonic() - began, 2), "status": status})
        if status.startswith("skipped"):
            print(f"[{began - self.began:5.0f} s] {name}: {status}", flush=True)
        self.write()

    def attempt(self, where: str, work: Callable[[], Any], grave: bool = False, seconds: float | None = None) -> bool:
        """Whether `work` succeeds. What stops it is recorded, and with `grave` the run counts as failed."""
        from benchmarks.rivals import Skipped

        try:
            with time_limit(max(1.0, min(self.left(), seconds or math.inf))):
                work()
            return True
        except Skipped as reason:
            self.skip(where, str(reason))
        except OutOfTime as error:
            self.skip(where, str(error))
            # A kernel that never ran to its end has not been shown to work.
            if grave:
                self.fail(where, str(error), grave=True)
        except Exception as error:
            # Compilers wrap what interrupts them.
            if "OutOfTime" in str(error):
                self.skip(where, f"not done in the time it was given ({type(error).__name__})")
            else:
                self.fail(where, f"{type(error).__name__}: {error}", grave, traceback.format_exc()[-4000:])
            self.check_device(where)
        return False

    def able(self, where: str) -> bool:
        """Whether there is a device and time for one more thing; if not, that it was left out is recorded."""
        reason = self.dead or ("no time left" if self.left() <= 5 else None)
        if reason:
            self.skip(where, reason)
        return not reason

    def check_device(self, where: str) -> None:
        """Notice an error after which every call of this process fails, such as an illegal memory access."""
        if self.device.type == "cuda" and self.dead is None:
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                self.dead = f"the device gave up in {where}: {str(error).splitlines()[0]}"

    def skip(self, where: str, reason: str) -> None:
        """Record what was left out, and why."""
        self.report["skipped"].append({"where": where, "reason": reason})
        print(f"          skipped {where}: {reason}", flush=True)

    def fail(self, where: str, error: str, grave: bool, detail: str | None = None) -> None:
        """Record a failure; a grave one fails the run."""
        self.report["failures"].append({"where": where, "error": error[:2000], "grave": grave, "detail": detail})
        if grave:
            self.report["ok"] = False
        print(f"  FAILED  {where}: {error.splitlines()[0][:300] if error else 'no message'}", flush=True)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after `seconds`, where there are signals (the main thread of Unix)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise OutOfTime(f"not done within {seconds:.0f} s")

    outer = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    signal.signal(signal.SIGALRM, ring)
    # Again and again: compilers catch exceptions of what they try.
    outer_left, outer_interval = signal.setitimer(signal.ITIMER_REAL, seconds, 3.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer)
        if outer_left:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, outer_left - (time.monotonic() - began)), outer_interval)


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities as strings."""
    if isinstance(value, dict):
        return {str(key): _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# Stages -------------------------------------------------------------------------------------------------------------


def measure_context(run: Run) -> None:
    """What the device can do at best: matrix products, copies, launches."""
    from benchmarks.floors import copy_rate, product_rate
    from benchmarks.measure import Entry

    n = 256 if run.arguments.small else 8192
    timer, device, context = run.timer, run.device, run.report["context"]

    from benchmarks.rivals import capture, global_precision

    context["product_size"] = n
    context["product_bf16_tflops"] = 1e-12 * product_rate(timer, n, torch.bfloat16)
    with global_precision("tf32"):
        context["product_tf32_tflops"] = 1e-12 * product_rate(timer, n, torch.float32)
    context["copy_tbytes_per_s"] = 1e-12 * copy_rate(timer, n)
    one = torch.zeros(1, device=device)
    launch = Entry("launch", lambda: one.add_(1), timer.finish)
    context["launch_us"] = 1e6 * timer.measure([launch], 9, 1.0)["launch"].median
    if device.type == "cuda":

        def hundred() -> None:
            for _ in range(100):
                one.add_(1)

        graph, _ = capture(hundred)
        replay = Entry("replay", graph.replay, timer.finish, events=True)
        context["graph_node_us"] = 1e4 * timer.measure([replay], 9, 1.0)["replay"].median
    print("          " + ", ".join(f"{name} {value:.4g}" for name, value in context.items()), flush=True)


def floor_us(run: Run, flops: int, moved: int, precision: str) -> float | None:
    """The least time that FLOPs and bytes leave on this device, by the rates measured in this run."""
    context = run.report["context"]
    rate, bandwidth = context.get(f"product_{precision}_tflops"), context.get("copy_tbytes_per_s")
    return max(1e-6 * flops / rate, 1e-6 * moved / bandwidth) if rate and bandwidth else None


def measure_case(
    run: Run,
    name: str,
    precision: str,
    rivals: Sequence[str],
    seconds_per_rival: float = 60.0,
    graphs: bool = True,
) -> None:
    """Check and time some rivals on one case, interleaved; rows go to the report."""
    from benchmarks.cases import CASES
    from benchmarks.measure import Entry, ratios
    from benchmarks.rivals import (
        FUSED_TIMES,
        RIVAL_TIMES,
        RIVALS,
        Variant,
        check,
        global_precision,
        graphed,
        quiet_compiler,
    )

    case = CASES[name].shrunk() if run.arguments.small else CASES[name]
    at = run.report["cases"].setdefault(
        name,
        {
            "title": CASES[name].title,
            "kind": case.kind,
            "gradient": list(case.gradient),
            "members": case.spec.ensemble or 1,
            "rows": case.rows,
            "num_steps": case.num_steps if case.kind == "integrate" else None,
            "method": case.method if case.kind == "integrate" else None,
            "flops": case.flops,
            "bytes": case.bytes,
            "floor_us": {},
            "results": [],
        },
    )
    at["floor_us"][precision] = floor_us(run, case.flops, case.bytes, precision)
    if any(rival.startswith("compile") for rival in rivals):
        # torch.compile keeps few versions of one function, and every case is one.
        torch.compiler.reset()
    problem = case.build(run.device)
    entries: list[Entry] = []
    rows: dict[str, dict[str, Any]] = {}

    def prepare(rival: str) -> None:
        with quiet_compiler():
            variant = RIVALS[rival](problem, precision)
            admit(rival, variant, "call")
        if graphs and variant.capturable and run.device.type == "cuda":
            replayed = graphed(problem, variant)
            admit(rival, replayed, "graph")

    def admit(rival: str, variant: Variant, mode: str) -> None:
        verdict = check(problem, variant, precision)
        accurate = verdict.within(FUSED_TIMES if rival == "fused" else RIVAL_TIMES)
        if not accurate:
            error = f"errors {verdict.errors} against float64 beside eager PyTorch's {verdict.eager}"
            run.fail(f"{name} {precision} {variant.name}: accuracy", error, grave=rival == "fused")
            if rival != "fused":
                return
        row = {"rival": rival, "mode": mode, "precision": precision, "accurate": accurate}
        row |= {"errors": verdict.errors, "eager_errors": verdict.eager, "times_eager_error": verdict.times_eager}
        if mode == "call" and run.device.type == "cuda":
            row["peak_memory_bytes"] = _peak_memory(run.device, variant.call)
        rows[variant.name] = row
        entry = variant.entry(run.timer)
        entry.events = mode == "graph"
        entries.append(entry)

    with global_precision(precision):
        for rival in rivals:
            where = f"{name} {precision} {rival}"
            if not run.dead:
                run.attempt(where, functools.partial(prepare, rival), rival == "fused", seconds_per_rival)
        if run.dead or not entries:
            return
        timings = run.timer.measure(entries, run.rounds)
    fused = {mode: timings[key] for mode, key in (("call", "fused"), ("graph", "fused + graph")) if key in timings}
    group = 1 + max((row["group"] for row in at["results"]), default=0)
    for key, timing in timings.items():
        row = {"group": group, **rows[key], **timing.as_json()}
        row["tflops"] = 1e-12 * case.flops / timing.median
        floor = at["floor_us"][precision]
        row["times_floor"] = row["median_us"] / floor if floor else None
        row["vs_fused"] = {mode: ratios(timing, other) for mode, other in fused.items()}
        at["results"].append(row)


def _peak_memory(device: torch.device, call: Callable[[], Any]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def processes(run: Run) -> int:
    """How many processes compile kernels at a time: compilers take a core each, and a GPU's context its memory."""
    most = min(16, os.cpu_count() or 1)
    if run.device.type == "cuda":
        most = min(most, torch.cuda.get_device_properties(run.device).total_memory // 2**31)
    return max(1, most)


def run_tests(run: Run, seconds: float) -> None:
    """The kernel tests in a process of their own, on real kernels; in several where pytest-xdist is installed.

    A test compiles two to six kernels, for seconds each: a thousand seconds of one core, two dozen of them in the
    longest test. None begins after four fifths of the time, so that what has begun can end.
    """
    from benchmarks import limited

    tests = run.report["tests"]
    if importlib.util.find_spec("pytest") is None:
        tests |= {"status": "pytest is not installed", "note": "the accuracy of every case below is the only check"}
        run.skip("kernel tests", "pytest is not installed; every case's values and gradients are checked all the same")
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        xml, log = Path(folder, "tests.xml"), Path(folder, "tests.log")
        command = [sys.executable, "-m", "pytest", *run.arguments.tests, "-q", "--tb=short", f"--junitxml={xml}"]
        # Newer and older libraries than ours warn of other things; here only results count.
        command += ["-W", "default", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", limited.__name__]
        workers = processes(run)
        if importlib.util.find_spec("xdist") is not None and workers >= 4:
            # In the order that the plugin makes.
            command += ["-n", str(workers), "--dist", "load"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {"OMP_NUM_THREADS": "1", limited.UNTIL: str(time.time() + 0.8 * seconds)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",
            )
            run.child = process
            try:
                code: int | None = process.wait(timeout=seconds)
            except BaseException as error:
                _end(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = None
        text = log.read_text(encoding="utf-8", errors="replace")
        counts, failed = _read_junit(xml) if xml.is_file() else ({}, [])
    tests |= {"command": command[1:], "seconds": round(time.monotonic() - began, 1), "exit_code": code, **counts}
    tests["failed"] = failed
    left_out = counts.get("not_begun", 0)
    if left_out:
        run.skip("kernel tests", f"{left_out} not begun within {0.8 * seconds:.0f} s; --test-minutes gives them more")
    if code == 0:
        tests["status"] = f"passed, {left_out} not begun" if left_out else "passed"
        print(f"          {counts.get('passed', '?')} passed, {counts.get('skipped', '?')} skipped", flush=True)
        return
    tests["status"] = f"not done within {seconds:.0f} s" if code is None else "failed"
    tests["output"] = text[-6000:]
    names = ", ".join(item["name"] for item in failed[:8]) + (" ..." if len(failed) > 8 else "")
    run.fail("kernel tests", f"{tests['status']}: {names or 'see tests.output in the results file'}", grave=True)
    for item in failed[:8]:
        print(f"          {item['name']}: {item['message']}", flush=True)
    if not failed:
        print(text[-1500:], flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own session, with its children: pytest asked first writes what it has."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if os.name == "posix":
            process.send_signal(signal.SIGINT)
            process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _read_junit(path: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Counts of passed, failed, skipped and not begun tests, and each failure's name and first line."""
    from benchmarks.limited import NOT_BEGUN

    counts = {"passed": 0, "failed_count": 0, "skipped": 0, "not_begun": 0}
    failed = []
    for test in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        problems = [child for child in test if child.tag in ("failure", "error")]
        if problems:
            counts["failed_count"] += 1
            message = (problems[0].get("message") or "").strip()[:500]
            failed.append({"name": f"{test.get('classname')}::{test.get('name')}", "message": message})
        elif any(child.tag == "skipped" for child in test):
            late = any(NOT_BEGUN in (child.get("message") or "") for child in test)
            counts["not_begun" if late else "skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failed


def fit_steps(run: Run) -> None:
    """Time against K, as fixed cost and slope: least squares of relative errors over the K that were measured."""
    from benchmarks.cases import CASES, NUM_STEPS

    points: dict[str, list[tuple[int, float]]] = {}
    for k in NUM_STEPS:
        name = "walk-2x2048" if k == 8 else f"walk-2x2048-k{k}"
        # The last measurement of a case under each heading.
        latest = {}
        for row in run.report["cases"].get(name, {}).get("results", []):
            if row["precision"] == "bf16" and row.get("accurate", True):
                latest[f"{row['rival']} {row['mode']}"] = row["median_us"]
        for heading, value in latest.items():
            points.setdefault(heading, []).append((k, value))
    fits = {}
    for heading, measured in points.items():
        if len(measured) < 3:
            continue
        w, wk, wkk, wt, wkt = 0.0, 0.0, 0.0, 0.0, 0.0
        for k, us in measured:
            weight = 1 / us**2
            w, wk, wkk = w + weight, wk + weight * k, wkk + weight * k * k
            wt, wkt = wt + weight * us, wkt + weight * k * us
        slope = (w * wkt - wk * wt) / (w * wkk - wk * wk)
        fixed = (wt - slope * wk) / w
        off = max(abs(fixed + slope * k - us) / us for k, us in measured)
        fits[heading] = {"fixed_us": fixed, "slope_us": slope, "worst_relative": off, "points": dict(measured)}
    run.report["k_scaling"] = {"case": CASES["walk-2x2048"].title, "precision": "bf16", "fits": fits}


# Sweep over tiles ---------------------------------------------------------------------------------------------------

# Kernel -> cases; every kernel's first case comes before any other case.
SWEPT = {
    "integrate_fwd": ("walk-2x2048", "td-walk-1024"),
    "matching_fwd": ("loss-2x2048", "td-loss-1024"),
    "backward": ("loss-2x2048", "td-loss-1024", "walk-backward-2x2048"),
}


def sweep_tiles(kernel: str, net: Any) -> list[Any]:
    """Tiles to try for a kernel and a `plan.Network`: the plan's for this device first, then a grid around them."""
    from fastflow.kernels import launch, plan

    arch = launch.target(torch.cuda.current_device())[0] if torch.cuda.is_available() else 90
    planned = list(plan.candidates(kernel, arch, net))
    columns = [c for c in (32, 64, 128) if c <= max(net.padded)]
    grid = [
        plan.Tiles(rows, c, warps, stages)
        for (warps, stages), rows, c in itertools.product(
            ((4, 2), (8, 2), (8, 3), (4, 3), (4, 1)), (32, 64, 16, 128), columns
        )
        # More accumulators than registers, or tiles too small for their warps.
        if not (rows == 128 and (warps == 4 or net.precision != "bf16")) and not (rows == 16 and warps == 8 and c < 64)
    ]
    return planned + [tiles for tiles in grid if tiles not in planned]


@contextlib.contextmanager
def tiles_forced(kernel: str, tiles: Any) -> Iterator[None]:
    """The plan chooses `tiles` for one kernel."""
    from fastflow.kernels import plan

    chosen, padding = plan.choose, plan.ROW_PAD

    def choose(name: str, *arguments: Any, **keywords: Any) -> Any:
        return tiles if name == kernel else chosen(name, *arguments, **keywords)

    plan.choose = choose
    # Workspaces are padded to a multiple of every row tile; the plan's own may be smaller than one tried here.
    plan.ROW_PAD = max(padding, tiles.rows)
    try:
        yield
    finally:
        plan.choose, plan.ROW_PAD = chosen, padding


def warm_tiles(job: tuple[str, str, str, Any, bool]) -> str:
    """Compile one kernel with one choice of tiles into Triton's cache, by running it once in a process of its own."""
    from benchmarks.cases import CASES
    from benchmarks.rivals import fused, global_precision

    case_name, precision, kernel, tiles, small = job
    case = CASES[case_name].shrunk() if small else CASES[case_name]
    problem = case.build("cuda")
    with global_precision(precision), tiles_forced(kernel, tiles):
        fused(problem, precision).call()
    torch.cuda.synchronize()
    return "compiled"


def sweep(run: Run) -> None:
    """Time every kernel with every choice of tiles, as replays of the whole operator's graph."""
    from benchmarks.cases import CASES
    from fastflow.fused import network

    results = run.report.setdefault("sweep", [])
    small = run.arguments.small
    groups = [
        (kernel, precision, case_name)
        for names in itertools.zip_longest(*SWEPT.values())
        for precision in run.precisions
        for kernel, case_name in zip(SWEPT, names, strict=True)
        if case_name is not None
    ]
    jobs = []
    for kernel, precision, case_name in groups:
        case = CASES[case_name].shrunk() if small else CASES[case_name]
        for tiles in sweep_tiles(kernel, network(case.spec, precision)):
            jobs.append((case_name, precision, kernel, tiles, small))
    if run.arguments.only:
        pattern = re.compile(run.arguments.only)
        jobs = [job for job in jobs if pattern.search(f"{job[2]} {job[1]} {_shape(job[3])} {job[0]}")]
    compiled = _compile_ahead(run, jobs) if run.device.type == "cuda" else {}
    for i, job in enumerate(jobs):
        case_name, precision, kernel, tiles, _ = job
        row = {"kernel": kernel, "case": case_name, "precision": precision, "tiles": _shape(tiles)}
        problem_with = compiled.get(i)
        if run.dead or run.left() < 10:
            row["error"] = run.dead or "no time left"
        elif problem_with not in (None, "compiled"):
            row["error"] = problem_with
        else:
            _time_tiles(run, job, row)
        results.append(row)
    ranked = sorted((row for row in results if "median_us" in row), key=lambda row: row["median_us"])
    for group in groups:
        best = [row for row in ranked if (row["kernel"], row["precision"], row["case"]) == group]
        for row in best[:6]:
            mark = "" if row["accurate"] else "  WRONG"
            label = f"{group[0]:14} {group[1]} {group[2]:21}"
            print(f"          {label} {row['tiles']:24} {row['median_us']:9.1f} us{mark}", flush=True)
    print(f"          {len(ranked)} of {len(jobs)} measured", flush=True)


def _shape(tiles: Any) -> str:
    return f"{tiles.rows}x{tiles.columns} {tiles.num_warps} warps {tiles.num_stages} stages"


def _compile_ahead(run: Run, jobs: list[Any]) -> dict[int, str]:
    """Compile all choices in parallel. What a worker says of its job, by index; nothing where there was no answer."""
    import multiprocessing

    said: dict[int, str] = {}
    pool = multiprocessing.get_context("spawn").Pool(processes(run), maxtasksperchild=16)
    deadline = time.monotonic() + 0.55 * run.left()
    try:
        waiting = {i: pool.apply_async(warm_tiles, (job,)) for i, job in enumerate(jobs)}
        for i, answer in waiting.items():
            try:
                said[i] = answer.get(timeout=max(0.1, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                said[i] = "not compiled in time"
            except Exception as error:  # out of shared memory or registers: the answer that a sweep is for
                said[i] = f"{type(error).__name__}: {error}"[:300]
    finally:
        pool.terminate()
        pool.join()
    return said


def _time_tiles(run: Run, job: Any, row: dict[str, Any]) -> None:
    from benchmarks.cases import CASES
    from benchmarks.rivals import FUSED_TIMES, check, fused, global_precision, graphed

    case_name, precision, kernel, tiles, small = job
    case = CASES[case_name].shrunk() if small else CASES[case_name]

    def work() -> None:
        problem = case.build(run.device)
        variant = fused(problem, precision)
        if run.device.type == "cuda":
            variant = graphed(problem, variant)
        verdict = check(problem, variant, precision)
        entry = variant.entry(run.timer)
        entry.events = True
        timing = run.timer.measure([entry], min(run.rounds, 7))[entry.name]
        row.update(timing.as_json(), accurate=verdict.within(FUSED_TIMES), errors=verdict.errors)

    with global_precision(precision), tiles_forced(kernel, tiles):
        if not run.attempt(f"sweep {kernel} {precision} {_shape(tiles)}", work, seconds=30):
            row["error"] = "see failures"


# What follows from a run ---------------------------------------------------------------------------------------------


def compare_predictions(run: Run, count: bool) -> None:
    """The model's times beside the measured ones; of all cases, or of those whose launches were counted before."""
    from benchmarks import predictions
    from benchmarks.rivals import Skipped
    from fastflow.kernels import roofline

    machine = roofline.machine_of(run.report["hardware"].get("gpu", ""))
    if machine is None or run.arguments.small:
        raise Skipped("the model knows " + ", ".join(roofline.MACHINES) + ", and cases as large as they are")
    device = run.device if count else None
    run.report["predictions"] = predictions.compare(run.report, machine, "bf16", device, run.launches)


def profile_cases(run: Run, names: Sequence[str]) -> None:
    """Tensor pipes and L2 of the main cases, where NVIDIA's profiler is there and works."""
    from benchmarks import ncu

    report = run.report["ncu"]
    try:
        for name in names:
            if run.able(f"ncu {name}"):
                seconds = min(ncu.SECONDS, run.left())
                found = ncu.profile(name, run.precisions[0], seconds, run.arguments.small)
                report["cases"][name] = found
                line = f"{name}: tensor pipes {found['tensor_percent']:.0f} %, L2 {found['l2_tbytes_per_s']:.3g} TB/s"
                print(f"          {line}", flush=True)
        report["status"] = "done"
    except ncu.Unavailable as reason:
        report["status"] = str(reason)
        run.skip("ncu", str(reason))


def draw_figure(run: Run) -> None:
    """Time over K and over rows, beside the results file."""
    from benchmarks import gpu_figure

    try:
        print(gpu_figure.draw(run.report, run.path.with_suffix(".png")), flush=True)
    except (ImportError, ValueError) as error:
        run.skip("figure", str(error))


# Tables -------------------------------------------------------------------------------------------------------------


def table(run: Run, names: Iterable[str] | None = None) -> str:
    """What was measured of these cases, or of all: times, rates, and how many times fastflow's they are."""
    lines = []
    header = f"  {'':30}{'call us':>10} {'graph us':>10} {'TFLOP/s':>8} {'x fused':>8} {'x graph':>8}   error (x eager)"
    wanted = None if names is None else set(names)
    for name, case in run.report["cases"].items():
        if not case["results"] or (wanted is not None and name not in wanted):
            continue
        floors = ", ".join(f"{p} {us:.1f} us" for p, us in case["floor_us"].items() if us)
        floors = f", floor {floors}" if floors else ""
        lines += ["", f"{name}: {case['title']}; {case['flops'] / 1e9:.4g} GFLOP{floors}", header]
        merged: dict[tuple[str, str], dict[str, Any]] = {}
        for row in case["results"]:
            merged.setdefault((row["precision"], row["rival"]), {})[row["mode"]] = row
        for (precision, rival), modes in merged.items():
            call, graph = modes.get("call"), modes.get("graph")
            best = min((row for row in (call, graph) if row), key=lambda row: row["median_us"])
            cells = [
                f"{call['median_us']:10.1f}" if call else " " * 10,
                f"{graph['median_us']:10.1f}" if graph else " " * 10,
                f"{best['tflops']:8.4g}",
                _times(call, "call"),
                _times(best, "graph"),
            ]
            mark = "" if best["accurate"] else "  WRONG"
            errors = f"{max(best['errors'].values()):.1e} ({best['times_eager_error']:.2f}){mark}"
            lines.append(f"  {precision + ' ' + rival:30}{' '.join(cells)}   {errors}")
    for name, case in run.report["updates"].items():
        if case["results"] and (wanted is None or name in wanted):
            lines += ["", f"{name}: {case['title']}; {case['flops'] / 1e9:.4g} GFLOP"]
            for row in case["results"]:
                rates = f"{row['updates_per_second']:8.1f} updates/s {row['tflops']:8.4g} TFLOP/s"
                label = f"{row['precision']} {row['rival']}{' as a graph' if row['mode'] == 'graph' else ''}"
                beside = f"{_times(row, 'call')} x fused {_times(row, 'graph')} x graph"
                lines.append(f"  {label:30}{row['median_us']:10.1f} us {rates} {beside}")
    if wanted is None and run.report["predictions"]:
        from benchmarks import predictions

        lines += ["", "the model's predictions:", predictions.beside(run.report["predictions"])]
    for heading, fit in run.report.get("k_scaling", {}).get("fits", {}).items():
        if wanted is None:
            line = f"{fit['fixed_us']:.1f} us + {fit['slope_us']:.2f} us K, off by {fit['worst_relative']:.1%}"
            lines.append(f"  time over K, {heading}: {line}")
    return "\n".join(lines)


def _times(row: dict[str, Any] | None, mode: str) -> str:
    ratio = (row or {}).get("vs_fused", {}).get(mode)
    if not ratio:
        return " " * 8
    # The interval of the median holds 1: no difference was seen.
    return " no diff" if ratio["low"] <= 1.0 <= ratio["high"] else f"{ratio['median']:8.2f}"


# The command --------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything (default %(default)s)")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results"), help="folder of the results file")
    parser.add_argument("--sweep", action="store_true", help="time kernels over tile sizes in place of everything else")
    parser.add_argument(
        "--only",
        help='only cases that match this, such as "^td-"; with --sweep what matches, such as "backward bf16 64x"',
    )
    parser.add_argument("--tests", nargs="*", default=list(KERNEL_TESTS), help="test files to run; none for no tests")
    parser.add_argument(
        "--test-minutes",
        type=float,
        default=4.0,
        help="most time for the tests, and at most half of --minutes (default %(default)s). They run in an order that "
        "does something of everything first; what has not begun after four fifths of it is skipped and counted",
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, for trying the program")
    parser.add_argument("--allow-cpu", action="store_true", help="run without CUDA, for trying the program")
    arguments = parser.parse_args(argv)
    for name in ("minutes", "test_minutes"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    if arguments.only:
        try:
            re.compile(arguments.only)
        except re.error as error:
            parser.error(f"--only must be a regular expression: {error}")
    return arguments


def measure_everything(run: Run) -> None:
    """All stages: the tests, what has a goal beside eager PyTorch, its slower rivals, then everything else."""
    from benchmarks import gpu_updates
    from benchmarks.cases import CASES, PAPER_CASES
    from benchmarks.gpu_goals import NAMES

    low, high = run.precisions
    only = re.compile(run.arguments.only or "")
    # Those with a goal first.
    chosen = sorted((name for name in CASES if only.search(name)), key=lambda name: name not in NAMES)
    updated = sorted((n for n in gpu_updates.GPU_UPDATES if only.search(n)), key=lambda name: name not in NAMES)
    main = [name for name in MAIN_CASES if name in chosen]
    papers = [name for name in chosen if name in PAPER_CASES]
    steps = [name for name in chosen if "-k" in name]
    rows = [name for name in chosen if re.fullmatch(r"walk-2x\d+", name) and name not in NAMES]
    sizes = [name for name in chosen if name not in (*main, *papers, *steps, *rows)]
    goals = [name for name in (*sizes, *papers) if name in NAMES]
    goal_updates = [name for name in updated if name in NAMES]
    compiled_steps = [name for name in steps if int(name.rpartition("-k")[2]) in COMPILED_STEPS]

    def cases(names: Iterable[str], precision: str, rivals: Sequence[str], **options: Any) -> Callable[[], None]:
        def work() -> None:
            for name in names:
                if run.able(f"{name} {precision} {', '.join(rivals)}"):
                    measure_case(run, name, precision, rivals, **options)
                    run.write()

        return work

    def updates(names: Iterable[str], precision: str, rivals: Sequence[str], **options: Any) -> Callable[[], None]:
        def work() -> None:
            for name in names:
                if run.able(f"{name} {precision} {', '.join(rivals)}"):
                    gpu_updates.measure_update(run, name, precision, rivals, **options)
                    run.write()

        return work

    def share(most: float = 90.0) -> dict[str, float]:
        """What a compiler may take of the time that is left."""
        return {"seconds_per_rival": max(1.0, min(most, 0.4 * run.left()))}

    if run.arguments.tests:
        # Its own processes: they run even if the device gives up on one of them.
        seconds = min(60 * run.arguments.test_minutes, 0.5 * run.left())
        run.stage("kernel tests", 5, lambda: run_tests(run, seconds), on_device=False)
    run.stage("context", 0, lambda: measure_context(run))
    run.stage("first figures", 0, cases(main, low, ("fused", "eager")))
    if main:
        print(table(run, main), flush=True)
    run.stage("sizes", 5, cases(sizes, low, ("fused", "eager")))
    run.stage("updates", 5, updates(updated, low, gpu_updates.FIRST_RIVALS))
    run.stage(f"{high} products", 5, cases(main, high, ("fused", "eager")))
    run.stage("papers", 5, cases(papers, low, ("fused", "eager")))
    for name in main:
        run.stage(f"torch.compile, {name}", 30, cases([name], low, ("fused", "eager", BEST_COMPILER), **share()))
    run.stage("JAX", 20, cases([*main, *goals], low, ("fused", *JAX)))
    run.stage("number of steps", 10, cases(steps, low, ("fused", "eager")))
    run.attempt("time over K", lambda: fit_steps(run))
    predict = functools.partial(run.attempt, "predictions", lambda: compare_predictions(run, True), seconds=40.0)
    run.stage("predictions", 5, predict)
    for name in goals:
        run.stage(f"torch.compile, {name}", 30, cases([name], low, ("fused", BEST_COMPILER), **share()))
    for name in goal_updates:
        rivals = ("fused", "fused + graph", *gpu_updates.COMPILED_RIVALS)
        run.stage(f"torch.compile, {name}", 40, updates([name], low, rivals, **share(120.0)))
    run.stage("JAX, updates", 30, updates(goal_updates, low, ("fused", "fused + graph", *gpu_updates.JAX_RIVALS)))
    # Late: should a kernel that has never run hang, the rest is there.
    walks = [name for name in (*main, *goals) if CASES[name].kind == "integrate" and not CASES[name].gradient]
    run.stage("ring", 5, cases(walks, low, ("fused", "ring")))
    for name in compiled_steps:
        run.stage(f"torch.compile, {name}", 20, cases([name], low, ("fused", BEST_COMPILER), **share(60.0)))
    run.stage("number of rows", 10, cases(rows, low, ("fused", "eager", "jax")))
    run.stage("JAX, number of steps", 20, cases(steps, low, ("fused", "jax")))
    others = [name for name in (*sizes, *papers) if name not in goals]
    run.stage("JAX, other cases", 30, cases(others, low, ("fused", *JAX)))
    run.stage(f"{high} products, updates", 10, updates(updated, high, ("fused", "eager")))
    run.stage(f"{high} products, papers", 10, cases(papers, high, ("fused", "eager")))
    for name in (*main, *goals, *others):
        rivals = ("fused", *(() if name in NAMES else (BEST_COMPILER,)), *OTHER_COMPILERS)
        run.stage(f"other modes of torch.compile, {name}", 40, cases([name], low, rivals, **share()))
    run.stage("ncu", 20, lambda: profile_cases(run, main))


def conclude(run: Run) -> None:
    """What follows from the measurements, whatever time is left."""
    run.attempt("time over K", lambda: fit_steps(run))
    if run.launches:
        run.attempt("predictions", lambda: compare_predictions(run, False))
    draw_figure(run)
    run.write()


def watch(run: Run, grace: float = 20.0) -> None:
    """Ends the process a little after its time even where no signal reaches it, such as in a kernel that hangs."""

    def wait() -> None:
        time.sleep(max(0.0, run.left()) + grace)
        run.fail("time", "the run was ended from outside: something did not return", grave=True)
        if run.child is not None and run.child.poll() is None:
            _end(run.child)
        with contextlib.suppress(BaseException):
            run.write()
        print(f"benchmarks.gpu: out of time; what was measured is in {run.path}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    arguments = parse(argv)
    if not torch.cuda.is_available() and not arguments.allow_cpu:
        why = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
        what = f"torch {torch.__version__} of {sys.executable} {why}"
        print(f"benchmarks.gpu: needs a CUDA GPU, and {what}.", file=sys.stderr)
        print("benchmarks.gpu: `make bench` measures this machine's CPU.", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --output {arguments.output}: {error.strerror}", file=sys.stderr)
        return 2
    from benchmarks import gpu_goals, history, machine

    run = Run(arguments, device)
    watch(run)
    hardware, software, repository = (run.report[key] for key in ("hardware", "software", "repository"))
    where = f"{hardware['gpu']}, driver {hardware['driver']}" if "gpu" in hardware else "CPU, for trying the program"
    versions = f"torch {software['torch']}, triton {software['triton']}, commit {repository['commit']}"
    print(f"{where}, {versions}", flush=True)
    try:
        if arguments.sweep:
            run.stage("context", 0, lambda: measure_context(run))
            run.stage("sweep", 0, lambda: sweep(run))
        else:
            measure_everything(run)
            conclude(run)
        run.report["complete"] = True
    except KeyboardInterrupt:
        run.fail("run", "interrupted", grave=True)
    finally:
        run.report["clocks"]["end"] = machine.clocks(device)
        run.write()
    if not (arguments.small or arguments.sweep):
        history.append(run.report, run.path.parent)
    print(table(run))
    if not arguments.sweep:
        print("\n" + gpu_goals.markdown(run.report))
    summarize(run)
    return 0 if run.report["ok"] else 1


def summarize(run: Run) -> None:
    """The last lines: what went wrong, and where everything is written down."""
    report = run.report
    graves = [failure for failure in report["failures"] if failure["grave"]]
    others = len(report["failures"]) - len(graves)
    print(f"\nkernel tests: {report['tests']['status']}; skipped {len(report['skipped'])}, failed rivals {others}")
    for failure in graves[:12]:
        print(f"FAILED {failure['where']}: {failure['error'].splitlines()[0][:300]}")
    if len(graves) > 12:
        print(f"FAILED and {len(graves) - 12} more, all in the results file")
    print(f"{'ok' if report['ok'] else 'NOT OK'} after {report['seconds']:.0f} s; {run.path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
