"""The benchmarks themselves: counted work, rivals that compute the same, the clock, the GPU command from end to end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
# benchmarks/ is not installed; `pytest` without `python -m` does not look for it here.
sys.path.insert(0, str(ROOT))

from benchmarks import cpu, cpu_figure, cpu_report, cpu_row, gpu, gpu_goals, limited, machine, measure  # noqa: E402
from benchmarks.cases import CASES, PAPER_CASES, UPDATES, Case, worst  # noqa: E402
from benchmarks.cpu_rows import MEASUREMENTS, TABLE, curve  # noqa: E402
from benchmarks.floq_update import first_noises  # noqa: E402
from benchmarks.rivals import RIVALS, Skipped, Variant, check, eager, global_precision  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def run_command(plain_environment):
    """`python -m` with these arguments, without a GPU."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", *arguments],
            cwd=ROOT,
            env={**plain_environment, "CUDA_VISIBLE_DEVICES": "", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def small_run(tmp_path):
    """A run of the GPU command on the CPU, in this process."""
    arguments = gpu.parse(["--allow-cpu", "--small", "--minutes", "5", "--output", str(tmp_path)])
    return gpu.Run(arguments, CPU)


# Cases --------------------------------------------------------------------------------------------------------------


def plain_flops(case):
    """What plain PyTorch computes of a case."""
    with FlopCounterMode(display=False) as counter:
        case.build(CPU).results("reference", "fp32")
    return counter.get_total_flops()


def smallest(name):
    """The case with one row and one step."""
    return dataclasses.replace(CASES[name].shrunk(), batch=1, samples=None, num_steps=1)


@pytest.mark.parametrize(
    "name",
    [
        "walk-2x2048",
        "loss-2x2048",
        "actor-walk-256",
        "actor-loss-256",
        "fpo-walk-2048",
        "fpo-plus-walk-4096",
        "fpo-loss-30720x8",
        "td-loss-1024",
        "resnet-walk-2x2048",
    ],
)
def test_flops_are_those_of_plain_pytorch_where_nothing_repeats(name):
    # With one row and one step, plain PyTorch computes nothing twice.
    case = smallest(name)
    assert plain_flops(case) == case.flops


def test_flops_leave_out_what_plain_pytorch_cannot():
    # It takes the first layer's inputs as one, and so differentiates for state and time where cond is asked for.
    for name in ("walk-to-actions-2x2048", "walk-backward-2x2048"):
        case = smallest(name)
        assert plain_flops(case) - case.flops == 2 * 2 * (50 + 1) * 32
    # It encodes cond in both evaluations of a step: two layers, then scale and shift of four.
    case = smallest("td-walk-1024")
    assert plain_flops(case) - case.flops == 2 * (6 * 32 + 32 * 32 + 4 * 32 * 64)


def test_flops_of_the_papers_cases_by_hand():
    k, rows = 8, 2048
    deeper = 3 * 512 * 512 + 512
    walk = rows * 42 * 512 + k * 512 + k * rows * (50 * 512 + deeper)
    # The way back reaches the state from every step but the first.
    back = k * rows * deeper + (k - 1) * rows * 50 * 512 + rows * 42 * 512
    fpo = 6 * 32 + 3 * 32 * 32 + 32 * 6
    fpo_plus = 12 * 256 + 2 * 256 * 256 + 256 * 12
    pairs = 30720 * 8
    fpo_loss = 30720 * 17 * 32 + pairs * (8 * 32 + fpo)
    # Six layers, two of which take two; scale and shift of each.
    unet = 4 * 512 + 3 * 512 * 512 + 2 * 1024 * 512 + 512 * 4
    cond = 6 * 512 + 2 * 512 * 512 + 512 * 6 * 1024
    time = 2 * 256 * 256 + 256 * 6 * 1024
    by_hand = {
        "walk-to-actions-2x2048": 2 * (walk + back),
        "walk-backward-2x2048": 2 * (2 * walk + back),
        "fpo-walk-2048": 2048 * 17 * 32 + 10 * 8 * 32 + 10 * 2048 * fpo,
        "fpo-plus-walk-4096": 4096 * 48 * 256 + 64 * 8 * 256 + 64 * 4096 * fpo_plus,
        "fpo-loss-30720x8": 2 * fpo_loss + pairs * (fpo - 6 * 32),
        "td-walk-1024": 1024 * cond + 2 * 10 * 1024 * (time + unet),
        "td-loss-1024": 1024 * (3 * (cond + time + unet) - 6 * 512 - 256 * 256 - 4 * 512),
        "resnet-walk-2x2048": 2 * (walk + k * rows * 512 * 512),
    }
    assert {name: 2 * products for name, products in by_hand.items()} == {
        name: case.flops for name, case in PAPER_CASES.items()
    }


def test_flops_leave_out_what_repeats():
    one, two = (dataclasses.replace(CASES["walk-2x2048"], num_steps=k).flops for k in (1, 2))
    per_row_and_step = 50 * 512 + 3 * 512 * 512 + 512
    assert two - one == 2 * 2 * (2048 * per_row_and_step + 512)  # and the time features once per step
    # 2 x 2048 rows through three hidden layers for eight steps, and a few per cent around them.
    assert 1.0 < CASES["walk-2x2048"].flops / 51.5e9 < 1.05


@pytest.mark.parametrize("name", UPDATES)
def test_update_flops_are_below_those_of_plain_pytorch(name):
    # Batches as published, because what is hoisted is per row; narrow networks, because counting computes.
    case = UPDATES[name]
    narrow = {"block_width": 32, "value_hidden_dims": (32,) * 4, "actor_hidden_dims": (32,) * 4, "batch_size": 16}
    case = dataclasses.replace(case, options={**case.options, **narrow})
    agent = case.agent(CPU, "reference")
    with FlopCounterMode(display=False) as counter:
        agent.update(case.batches(CPU, 1)[0])
    # At this width the first layers, which plain PyTorch repeats for every step, are a large part.
    assert 0.4 * counter.get_total_flops() < case.flops < counter.get_total_flops()


def test_bytes_count_each_tensor_once():
    problem = CASES["loss-2x2048"].build(CPU)
    tensors = [*problem.inputs.values(), *problem.field.parameters(), *problem.field.parameters()]
    assert problem.case.bytes == sum(t.nbytes for t in tensors)
    walk = CASES["walk-2x256"].build(CPU)
    tensors = [*walk.inputs.values(), *walk.field.parameters(), *walk.results("reference", "fp32").values()]
    assert walk.case.bytes == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", PAPER_CASES)
def test_bytes_count_gradients_and_what_they_are_given(name):
    problem = CASES[name].shrunk().build(CPU)
    results = [x for x in problem.results("reference", "fp32").values() if x.dim()]
    tensors = [*problem.inputs.values(), *problem.field.parameters(), *results]
    tensors += [] if problem.given is None else [problem.given]
    assert problem.case.bytes == sum(t.nbytes for t in tensors)


def test_frozen_parameters_have_no_gradient():
    problem = CASES["walk-to-actions-2x2048"].shrunk().build(CPU)
    assert problem.results("reference", "fp32").keys() == {"x_1", "cond"}
    assert not any(p.requires_grad for p in problem.field.parameters())
    assert problem.errors(problem.exact()).keys() == {"displacement", "cond"}
    both = CASES["walk-backward-2x2048"].shrunk().build(CPU)
    assert both.errors(both.exact()).keys() == {"displacement", "cond", "gradients"}


def test_a_case_has_the_same_numbers_every_time():
    a, b = (CASES["demo-loss"].build(CPU) for _ in range(2))
    assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in b.inputs)
    assert all(torch.equal(p, q) for p, q in zip(a.field.parameters(), b.field.parameters()))


# Rivals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["walk-2x2048", "loss-2x2048", "one-row", "actor-loss-256", *PAPER_CASES])
@pytest.mark.parametrize("rival", [name for name in RIVALS if not name.startswith("compile")])
def test_rivals_compute_the_same(rival, name, precision):
    problem = CASES[name].shrunk().build(CPU)
    with global_precision(precision):
        try:
            verdict = check(problem, RIVALS[rival](problem, precision), precision)
        except Skipped as reason:
            pytest.skip(str(reason))
    assert verdict.within(2.0), verdict
    assert worst(verdict.errors) < (1e-5 if precision == "fp32" else 3e-2)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["walk-backward-2x2048", "td-loss-1024"])
def test_the_fused_rival_runs_kernels_in_the_interpreter(name, monkeypatch):
    pytest.importorskip("triton")
    backends = []
    run = Case.run
    monkeypatch.setattr(Case, "run", lambda *arguments: (backends.append(arguments[3]), run(*arguments))[1])
    RIVALS["fused"](CASES[name].shrunk().build(CPU), "fp32").call()
    assert backends == ["fused"]


def test_what_the_jax_rival_lacks_is_named():
    for rival in ("jax", "jax unrolled"):
        with pytest.raises(Skipped, match="no FiLMUNet, Sinusoidal, mish, midpoint, end times per row"):
            RIVALS[rival](CASES["td-walk-1024"].shrunk().build(CPU), "fp32")
        with pytest.raises(Skipped, match="no FiLMUNet, Sinusoidal, mish, velocity-matching loss"):
            RIVALS[rival](CASES["td-loss-1024"].shrunk().build(CPU), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-row", "demo-loss", "fpo-loss-30720x8"])
def test_compiled_rival_computes_the_same(name):
    problem = CASES[name].shrunk().build(CPU)
    try:
        verdict = check(problem, RIVALS["compile"](problem, "fp32"), "fp32")
    except Skipped as reason:
        pytest.skip(str(reason))
    finally:
        torch.compiler.reset()
    assert verdict.within(2.0), verdict


def test_rivals_that_need_cuda_say_so():
    problem = CASES["one-row"].shrunk().build(CPU)
    for rival in ("compile reduce-overhead", "compile max-autotune"):
        with pytest.raises(Skipped, match="for CUDA"):
            RIVALS[rival](problem, "fp32")


def test_errors_see_wrong_and_missing_results():
    problem = CASES["demo-loss"].shrunk().build(CPU)
    exact = problem.exact()
    assert worst(problem.errors(exact)) == 0.0
    name = next(key for key in exact if key != "loss")
    assert worst(problem.errors(exact | {name: exact[name] * 1.5})) > 1e-3
    assert worst(problem.errors(exact | {name: exact[name] * math.nan})) == math.inf
    with pytest.raises(ValueError, match="named and shaped"):
        problem.errors({key: value for key, value in exact.items() if key != name})


# The clock ----------------------------------------------------------------------------------------------------------


def test_entries_are_measured_in_turn():
    order = []
    entries = [
        measure.Entry(name, lambda name=name: (order.append(name), time.sleep(0.002)), lambda result: None)
        for name in ("a", "b", "c")
    ]
    timings = measure.Timer(CPU, batch_seconds=0.002).measure(entries, rounds=4)
    assert {timing.rounds for timing in timings.values()} == {4}
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Rounds abc, bca, cab, abc, equal neighbours as one; before them the calibration.
    assert "".join(runs).endswith("abcbcacababc")
    assert all(timing.p20 <= timing.median <= timing.p80 for timing in timings.values())
    assert timings["a"].median >= 0.002


def test_time_is_per_call_and_ratios_are_per_round():
    timer = measure.Timer(CPU, batch_seconds=0.02)
    short = measure.Entry("short", lambda: time.sleep(0.001), lambda result: None)
    long = measure.Entry("long", lambda: time.sleep(0.004), lambda result: None)
    timings = timer.measure([short, long], rounds=5)
    assert timings["short"].calls_per_round > timings["long"].calls_per_round
    assert 1.5 < measure.ratios(timings["long"], timings["short"])["median"] < 6
    drifting = measure.summarize([1.0, 2.0, 4.0], 1), measure.summarize([2.0, 4.0, 8.0], 1)
    assert measure.ratios(drifting[1], drifting[0]) == dict.fromkeys(("median", "p20", "p80", "low", "high"), 2.0)


def test_time_limit_interrupts_also_within_another():
    began = time.monotonic()
    with gpu.time_limit(30):
        with pytest.raises(gpu.OutOfTime, match="not done within"), gpu.time_limit(0.2):
            time.sleep(10)
        with pytest.raises(gpu.OutOfTime), gpu.time_limit(0.2):
            while True:
                # What compilers do with exceptions of a candidate.
                try:
                    time.sleep(10)
                except gpu.OutOfTime:
                    raise
    assert time.monotonic() - began < 5


def test_sources_are_identified_without_git():
    digest = machine.sources_digest()
    assert re.fullmatch(r"[0-9a-f]{12}", digest)
    assert machine.facts(CPU)["repository"]["sources"] == digest


# The command --------------------------------------------------------------------------------------------------------


def test_without_cuda_it_says_so_and_fails(run_command, tmp_path):
    done = run_command("benchmarks.gpu", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_everything_runs_and_is_written_down(run_command, tmp_path):
    options = ["--allow-cpu", "--small", "--minutes", "0.6", "--tests", "tests/test_atomic.py"]
    done = run_command("benchmarks.gpu", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}-cpu-[0-9a-z-]+\.json", path.name)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["format"] == gpu.FORMAT
    assert report["complete"] and report["ok"] and report["small"]
    assert report["failures"] == []
    assert report["tests"]["status"] == "passed" and report["tests"]["passed"] > 0
    assert report["software"]["torch"] == torch.__version__
    assert set(report["hardware"]) >= {"device", "cpu", "cpu_cores"}
    assert set(report["repository"]) == {"commit", "dirty", "sources"}
    assert report["context"]["product_bf16_tflops"] > 0
    statuses = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert statuses["first figures"] == statuses["kernel tests"] == statuses["updates"] == "done"
    assert any("s left" in status for status in statuses.values()), "nothing was left out in half a minute?"
    for name in gpu.MAIN_CASES:
        case = report["cases"][name]
        assert case["flops"] > 0 and case["bytes"] > 0 and case["floor_us"]["bf16"] > 0
        assert {row["rival"] for row in case["results"]} >= {"fused", "eager"}
        for row in case["results"]:
            assert row["accurate"]
            assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
            assert row["rounds"] >= 3 and row["calls_per_round"] >= 1
            assert row["tflops"] == pytest.approx(case["flops"] / row["median_us"] * 1e-6)
            assert all(math.isfinite(error) for error in row["errors"].values())
            assert row["errors"].keys() == row["eager_errors"].keys()
        fused = [row for row in case["results"] if row["rival"] == "fused"]
        assert all(row["vs_fused"]["call"]["median"] == 1.0 for row in fused)
    for name in ("update-demo", "update-td2-unet"):
        assert {row["rival"] for row in report["updates"][name]["results"]} >= {"fused", "eager"}
        for row in report["updates"][name]["results"]:
            assert row["updates_per_second"] > 0
            assert row["loss_difference"] < 0.02
    assert "ok after" in done.stdout and str(path) in done.stdout
    # The table of goals: printed, and written beside.
    goals = {row["name"]: row for row in report["goals"]}
    assert list(goals) == list(gpu_goals.NAMES)
    assert goals["walk-2x2048"]["goals"]["eager"]["measured"] > 0
    assert goals["walk-2x2048"]["goals"]["compile"]["measured"] is None
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page.startswith(f"**{gpu_goals.SMALL}**") and page in done.stdout
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert {"where": "update-demo bf16 fused + graph", "reason": "CUDA graphs need CUDA"} in report["skipped"]
    order = ["kernel tests\n", "first figures\n", "walk-2x2048: ", "sizes\n", "papers\n"]
    assert [done.stdout.index(heading) for heading in order] == sorted(map(done.stdout.index, order))


@pytest.mark.interpreter
def test_chosen_cases_run_through_the_interpreter(run_command, tmp_path):
    pytest.importorskip("triton")
    options = ["--allow-cpu", "--small", "--minutes", "0.4", "--tests", "--only", "^fpo-"]
    done = run_command("benchmarks.gpu", *options, "--output", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert set(report["cases"]) == {"fpo-walk-2048", "fpo-plus-walk-4096", "fpo-loss-30720x8"}
    for case in report["cases"].values():
        errors = {row["rival"]: row["errors"] for row in case["results"] if row["precision"] == "bf16"}
        assert errors["fused"] != errors["eager"], "the kernels add in another order"
    assert not report["updates"] and report["tests"]["status"] == "not run"


def test_wrong_and_broken_rivals_are_recorded_and_not_timed(small_run, monkeypatch, capsys):
    def wrong(problem, precision):
        right = eager(problem, precision)
        return Variant("wrong", right.call, lambda: {name: 1.1 * x for name, x in right.results().items()})

    def broken(problem, precision):
        raise RuntimeError("no such kernel")

    def absent(problem, precision):
        raise Skipped("not for this shape")

    for function in (wrong, broken, absent):
        monkeypatch.setitem(RIVALS, function.__name__, function)
    gpu.measure_case(small_run, "one-row", "fp32", ["fused", "wrong", "broken", "absent", "eager"])
    report = small_run.report
    assert [row["rival"] for row in report["cases"]["one-row"]["results"]] == ["fused", "eager"]
    assert [failure["where"] for failure in report["failures"]] == [
        "one-row fp32 wrong: accuracy",
        "one-row fp32 broken",
    ]
    assert "no such kernel" in report["failures"][1]["error"]
    assert report["skipped"] == [{"where": "one-row fp32 absent", "reason": "not for this shape"}]
    assert report["ok"], "a rival's failure is not fastflow's"
    assert "FAILED" in capsys.readouterr().out


def test_a_wrong_kernel_fails_the_run_and_is_timed_all_the_same(small_run, monkeypatch):
    def fused(problem, precision):
        right = eager(problem, precision)
        return Variant("fused", right.call, lambda: {name: 1.1 * x for name, x in right.results().items()})

    monkeypatch.setitem(RIVALS, "fused", fused)
    gpu.measure_case(small_run, "one-row", "fp32", ["fused", "eager"])
    assert not small_run.report["ok"]
    first, second = small_run.report["cases"]["one-row"]["results"]
    assert (first["rival"], first["accurate"], second["accurate"]) == ("fused", False, True)
    assert "WRONG" in gpu.table(small_run)


def test_a_failing_kernel_test_fails_the_run_with_its_name(small_run, tmp_path, capsys):
    failing = tmp_path / "test_kernels.py"
    failing.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n")
    small_run.arguments = argparse.Namespace(**{**vars(small_run.arguments), "tests": [str(failing)]})
    small_run.stage("kernel tests", 0, lambda: gpu.run_tests(small_run, 100.0))
    tests = json.loads(small_run.path.read_text(encoding="utf-8"))["tests"]
    assert tests["status"] == "failed" and (tests["passed"], tests["failed_count"]) == (1, 1)
    assert "test_bad" in tests["failed"][0]["name"] and "one is not two" in tests["failed"][0]["message"]
    assert not small_run.report["ok"]
    assert "test_bad" in capsys.readouterr().out


def test_without_pytest_the_cases_are_the_check(small_run, monkeypatch):
    found = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "pytest" else found(name))
    gpu.run_tests(small_run, 10.0)
    assert small_run.report["tests"]["status"] == "pytest is not installed"
    assert small_run.report["ok"]
    assert [item["where"] for item in small_run.report["skipped"]] == ["kernel tests"]


def test_tests_that_hang_are_ended(small_run, tmp_path):
    hanging = tmp_path / "test_kernels.py"
    hanging.write_text("import time\ndef test_hangs(): time.sleep(60)\n")
    small_run.arguments = argparse.Namespace(**{**vars(small_run.arguments), "tests": [str(hanging)]})
    gpu.run_tests(small_run, 4.0)
    assert small_run.report["tests"]["status"] == "not done within 4 s"
    assert not small_run.report["ok"]
    assert small_run.child.poll() is not None


def test_tests_that_would_begin_too_late_are_counted(small_run, tmp_path, monkeypatch):
    late = tmp_path / "test_kernels.py"
    late.write_text("def test_one(): pass\ndef test_two(): pass\n")
    small_run.arguments = argparse.Namespace(**{**vars(small_run.arguments), "tests": [str(late)]})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    gpu.run_tests(small_run, 100.0)
    tests = small_run.report["tests"]
    assert (tests["status"], tests["passed"], tests["not_begun"]) == ("passed, 2 not begun", 0, 2)
    assert small_run.report["skipped"][0]["reason"].startswith("2 not begun within 80 s")
    assert small_run.report["ok"]


def test_a_limit_cuts_a_little_of_every_test():
    names = ["a.py::one[x]", "a.py::one[y]", "a.py::one[z]", "a.py::two", "b.py::one[x]", "b.py::one[y]"]
    items = [argparse.Namespace(nodeid=name) for name in names]
    limited.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [names[i] for i in (0, 3, 4, 1, 5, 2)]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_process_without_its_device_ends(small_run, tmp_path, monkeypatch, workers):
    if workers > 1:
        pytest.importorskip("xdist")
    monkeypatch.setattr(gpu, "processes", lambda run: workers)
    lines = ["import pytest", "from benchmarks import limited", "def test_breaks():"]
    lines += ["    limited.device_answers = lambda: False", "    assert 1 == 2, 'an illegal memory access'"]
    lines += ["@pytest.mark.parametrize('i', range(20))", "def test_good(i): assert limited.device_answers()"]
    breaking = tmp_path / "test_kernels.py"
    breaking.write_text("\n".join(lines) + "\n")
    small_run.arguments = argparse.Namespace(**{**vars(small_run.arguments), "tests": [str(breaking)]})
    gpu.run_tests(small_run, 100.0)
    tests = small_run.report["tests"]
    assert tests["status"] == "failed"
    assert "an illegal memory access" in tests["failed"][0]["message"]
    assert {item["name"].rpartition("::")[2] for item in tests["failed"]} == {"test_breaks"}
    assert tests["passed"] == (0 if workers == 1 else 20)


def test_what_there_is_no_time_for_is_named(small_run):
    small_run.limit = 0.0
    assert not small_run.able("one-row bf16 jax")
    assert small_run.report["skipped"] == [{"where": "one-row bf16 jax", "reason": "no time left"}]


def test_stages_out_of_time_are_named(small_run):
    small_run.limit = 0.0
    small_run.stage("something", 10, lambda: pytest.fail("must not run"))
    (stage,) = json.loads(small_run.path.read_text(encoding="utf-8"))["stages"]
    assert stage["name"] == "something" and stage["status"].startswith("skipped: 0 s left")


def test_numbers_that_json_lacks_are_words(small_run):
    small_run.report["context"] = {"a": math.nan, "b": [math.inf, 1.0]}
    small_run.write()
    assert json.loads(small_run.path.read_text(encoding="utf-8"))["context"] == {"a": "nan", "b": ["inf", 1.0]}


def test_fit_over_steps_finds_slope_and_fixed_cost(small_run):
    for k in (1, 2, 4, 8, 16):
        name = "walk-2x2048" if k == 8 else f"walk-2x2048-k{k}"
        row = {"rival": "fused", "mode": "graph", "precision": "bf16", "median_us": 7.0 + 3.0 * k}
        small_run.report["cases"][name] = {"results": [row]}
    gpu.fit_steps(small_run)
    fit = small_run.report["k_scaling"]["fits"]["fused graph"]
    assert fit["fixed_us"] == pytest.approx(7.0) and fit["slope_us"] == pytest.approx(3.0)


def test_tiles_are_forced_for_one_kernel_and_given_back():
    pytest.importorskip("triton")
    from fastflow.fused import network
    from fastflow.kernels import plan

    before = plan.choose
    for name in ("walk-2x2048", "td-walk-1024"):
        net = network(CASES[name].spec, "bf16")
        candidates = gpu.sweep_tiles("integrate_fwd", net)
        assert len(candidates) > 20 and len(set(candidates)) == len(candidates)
        assert candidates[0] == plan.candidates("integrate_fwd", 90, net)[0]
        padding = plan.ROW_PAD
        for tiles in candidates:
            with gpu.tiles_forced("integrate_fwd", tiles):
                assert plan.choose("integrate_fwd", 90, 132, net, 4096) == tiles
                assert plan.ROW_PAD % tiles.rows == 0
                other = plan.choose("backward", 90, 132, net, 4096)
        assert plan.choose is before and padding == plan.ROW_PAD
        assert other == plan.choose("backward", 90, 132, net, 4096)


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", gpu.SWEPT)
def test_swept_cases_launch_the_kernel_with_the_forced_tiles(kernel, monkeypatch):
    pytest.importorskip("triton")
    from fastflow.kernels import plan

    tiles = plan.Tiles(16, 16, 2, 1)  # of no plan
    for name in gpu.SWEPT[kernel]:
        problem, chosen = CASES[name].shrunk().build(CPU), []
        with gpu.tiles_forced(kernel, tiles), monkeypatch.context() as patch:
            forced = plan.choose
            patch.setattr(plan, "choose", lambda *a, f=forced, c=chosen: c.append((a[0], f(*a))) or f(*a))
            assert check(problem, RIVALS["fused"](problem, "fp32"), "fp32").within(2.0)
        assert {found for found, used in chosen if used == tiles} == {kernel}, name


def test_sweep_runs_from_end_to_end(run_command, tmp_path):
    pytest.importorskip("triton")
    options = ["--sweep", "--allow-cpu", "--small", "--only", "backward bf16 64x"]
    done = run_command("benchmarks.gpu", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text(encoding="utf-8"))["sweep"]
    assert len(rows) >= 15
    assert {row["case"] for row in rows} == set(gpu.SWEPT["backward"])
    assert all(row["tiles"].startswith("64x") for row in rows)
    assert all(row["kernel"] == "backward" and row["median_us"] > 0 for row in rows)


def test_pytest_benchmarks_run_once(run_command):
    pytest.importorskip("pytest_benchmark")
    selected = "(demo or one-row or fpo or actions) and not compile"
    done = run_command("pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider", "-k", selected)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--minutes", "-1", "--minutes must be positive"),
        ("--test-minutes", "0", "--test-minutes must be positive"),
        ("--only", "(", "--only must be a regular expression"),
    ],
)
def test_bad_arguments_are_refused(argument, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.parse([argument, value])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_kernel_tests_are_there():
    assert all((ROOT / path).is_file() for path in gpu.KERNEL_TESTS)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_made_is_named(run_command, tmp_path):
    tmp_path.chmod(0o500)
    done = run_command("benchmarks.gpu", "--allow-cpu", "--small", "--output", str(tmp_path / "below"))
    assert done.returncode == 2
    assert "--output" in done.stderr


# The CPU table ------------------------------------------------------------------------------------------------------


def shrunk(name, *rivals):
    """The measurement, small, with some of its entrants alone."""
    small = MEASUREMENTS[name].shrunk()
    return dataclasses.replace(small, ways=tuple(way for way in small.ways if way[0] in rivals))


@pytest.fixture(scope="module")
def measured():
    """All measurements of the CPU table, small, fastflow and eager PyTorch alone."""
    names = ("fastflow", "eager", "eager baddbmm")
    return {name: cpu_row.measure(shrunk(name, *names), share=0.0, rounds=3) for name in MEASUREMENTS}


def test_goals_of_the_cpu_table():
    goals = [(row.measurement, row.precision, row.goal["jax"], row.goal["compile"], row.goal["eager"]) for row in TABLE]
    assert goals == [
        ("walk-2x2048", "bf16", 3, 3.5, 5),
        ("walk-2x2048", "fp32", 1.1, 1.25, 1.8),
        ("walk-2x256", "bf16", 3, 3, 4),
        *[("fpo-walk-16", "fp32", 1, 1.5, 4)] * 2,  # frozen, and not
        *[("fpo-walk-1", "fp32", 1, 1.5, 4)] * 2,
        ("loss-2x2048", "bf16", 2.5, 2.5, 3),
        ("update-cube-double-depth2", "bf16", 2.5, 2, 3),
        ("update-cube-double-depth4", "bf16", 2.5, 2, 3),
        ("update-demo", "fp32", 1, 1.5, 3),
        ("update-td2", "fp32", 2, 1.5, 2.5),
    ]
    assert {row.measurement for row in TABLE} == set(MEASUREMENTS)
    for row in TABLE:
        m = MEASUREMENTS[row.measurement]
        kinds = {(rival, precision) for rival, _, precision in m.ways}
        assert ("fastflow", row.variant, row.precision) in m.ways
        assert kinds >= {(rival, "fp32") for rival in row.goal}
    assert [m.threads for m in MEASUREMENTS.values() if m.threads] == [1]


def test_sizes_of_the_cpu_table():
    sizes = {name: (m.case.rows, m.case.num_steps) for name, m in MEASUREMENTS.items() if isinstance(m.case, Case)}
    walks = {"walk-2x2048": (2048, 8), "walk-2x256": (256, 8), "fpo-walk-16": (16, 10), "fpo-walk-1": (1, 10)}
    assert sizes == {**walks, "loss-2x2048": (2048, 1)}
    demo = MEASUREMENTS["update-demo"].case.config()
    assert (demo.block_width, demo.block_depth, demo.batch_size) == (64, 2, 256)
    assert (demo.noise_samples, demo.critic_flow_steps) == (1, 8)
    assert [MEASUREMENTS[f"update-cube-double-depth{d}"].case.config().block_depth for d in (2, 4)] == [2, 4]
    assert [point.case.num_steps for point in curve("steps")] == [2, 4, 16, 32, 64, 1]


def test_rows_of_the_cpu_table_are_measured(measured):
    rows = cpu_report.table(measured)
    assert [row["title"] for row in rows] == [row.title for row in TABLE]
    for row in rows:
        assert row["fastflow_us"]["p20"] <= row["fastflow_us"]["median"] <= row["fastflow_us"]["p80"]
        assert row["vs"]["eager"]["against"] == "eager fp32" and row["vs"]["eager"]["ratio"] > 0
        assert row["vs"]["jax"]["ratio"] is None and not row["vs"]["jax"]["met"]
        assert "kernel" in row["runs"]
    for result in measured.values():
        assert not result["skipped"] or "batched products" in str(result["skipped"])
        for entrant in result["entrants"]:
            assert entrant["accurate"] and entrant["median_us"] > 0
            assert entrant["errors"].keys() == entrant["eager_errors"].keys()


@pytest.mark.parametrize("name", ["walk-2x256", "fpo-walk-16", "loss-2x2048", "update-td2"])
def test_jax_takes_part_in_the_cpu_table(name):
    pytest.importorskip("jax")
    small = shrunk(name, "jax")
    # One way of several: to compile all takes long.
    small = dataclasses.replace(small, ways=small.ways[:1])
    result = cpu_row.measure(small, share=0.0, rounds=3)
    assert not result["skipped"]
    assert [entrant["name"] for entrant in result["entrants"]] == ["jax scan fp32"]


def test_a_goal_is_against_the_fastest_of_its_kind_in_fp32():
    def entrant(rival, variant, precision, times):
        name = " ".join(filter(None, (rival, variant, precision)))
        medians = {f"{key}_us": 100.0 * times for key in ("median", "p20", "p80")}
        ends = {"low": min(0.9 * times, 0.99), "high": times} if times < 1.05 else {"low": 0.9 * times, "high": times}
        quotients = {"fastflow bf16": {"median": times, "p20": times, "p80": times, **ends}}
        own = {"name": name, "rival": rival, "precision": precision, "times": quotients, "note": "", "errors": {}}
        return own | medians

    others = [
        ("jax", "scan", "fp32", 4.0),
        ("jax", "unrolled", "fp32", 3.5),
        ("jax", "scan", "bf16", 1.0),
        ("compile", "", "fp32", 1.02),
    ]
    entrants = [entrant(*other) for other in (("fastflow", "", "bf16", 1.0), *others, ("eager", "", "fp32", 4.9))]
    result = {"entrants": entrants, "threads": 2, "processors": 2, "others": 0.01}
    row = cpu_report.table({"walk-2x2048": result})[0]
    assert not row["disturbed"]
    disturbed = cpu_report.table({"walk-2x2048": {**result, "others": 0.9}})[0]
    assert disturbed["disturbed"] and disturbed["vs"] == row["vs"]
    report = {**cpu_report.new("full"), "table": [row, disturbed]}
    lines = [line for line in cpu_report.markdown(report).splitlines() if line.startswith("| walk 2 x")]
    assert ["3x: 3.50x ✓ |" in line for line in lines] == [True, False]
    assert all("3.5x: no difference |" in line for line in lines)
    assert (row["vs"]["jax"]["against"], row["vs"]["jax"]["ratio"]) == ("jax unrolled fp32", 3.5)
    assert [row["vs"][rival]["met"] for rival in ("jax", "compile", "eager")] == [True, False, False]


def test_the_cpu_tables_files_hold_what_is_documented(measured, tmp_path):
    pytest.importorskip("matplotlib")
    report = cpu_report.new("full")
    report["measurements"] = measured
    report["curves"] = {f"curve-{axis}-{n}": measured["walk-2x256"] for axis in cpu_figure.PANELS for n in (1, 4)}
    report["table"] = cpu_report.table(measured)
    report["skipped"] = [{"where": "somewhere", "reason": "for a test"}]
    path = cpu_report.write(report, tmp_path / "results")
    assert re.fullmatch(r"cpu-[a-z0-9-]+-\d+-cores-\d{4}-\d\d-\d\d\.json", path.name)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert all(re.search(rf"\b{key}\b", cpu_report.__doc__) for key in read)
    assert set(read["hardware"]) >= {"cpu", "cpu_cores", "flags", "native"}
    assert set(read["software"]) >= {"python", "torch", "jax", "numpy", "compiler"}
    assert str(ROOT) not in path.read_text(encoding="utf-8") and sys.executable not in str(read)
    vs = {"goal", "against", "median_us", "ratio", "p20", "p80", "low", "high", "met"}
    for row in read["table"]:
        assert set(row) >= {"title", "measurement", "precision", "threads", "processors", "errors"}
        assert set(row) >= {"runs", "fastflow_us", "vs"}
        assert all(set(found) == vs for found in row["vs"].values())
    for result in read["measurements"].values():
        assert set(result) >= {"title", "threads", "processors", "others", "seconds", "skipped"}
        for entrant in result["entrants"]:
            assert set(entrant) >= {"rival", "variant", "precision", "accurate", "errors", "eager_errors", "note"}
            assert set(entrant) >= {"median_us", "p20_us", "p80_us", "rounds", "calls_per_round", "times"}
    printed = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(row.title in printed for row in TABLE) and "3.5x: not timed" in printed and "for a test" in printed
    cpu_figure.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.with_suffix(".md").name]


def test_cpu_command_from_end_to_end(run_command, tmp_path):
    options = ["--quick", "--only", "^fpo-walk-1$", "--threads", "1"]
    done = run_command("benchmarks.cpu", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-quick-only-fpo-walk-1.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["complete"] and list(report["measurements"]) == ["fpo-walk-1"]
    assert report["measurements"]["fpo-walk-1"]["threads"] == 1
    assert str(path) in done.stdout and "| FPO sampler, 1 row" in done.stdout
    assert cpu.main(["--only", "no such measurement"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "("], "--only must be a regular expression"), (["--threads", "0"], "--threads must be a positive")],
)
def test_bad_arguments_of_the_cpu_command_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_jax_updates_of_floq_have_the_agents_losses():
    jax = pytest.importorskip("jax")
    from benchmarks import jax_floq

    case = UPDATES["update-cube-double-depth4"].shrunk()
    case = dataclasses.replace(case, options={**case.options, "q_agg": "min", "normalize_q_loss": True})
    batches = case.batches(CPU, 3)
    noises, agent = first_noises(case, batches), case.agent(CPU, "reference", "fp32")
    jax_agent = jax_floq.JaxFloq(agent)
    for batch, noise in zip(batches, noises, strict=True):
        # The agent draws what `first_noises` did: their generators begin alike.
        expected = {name: float(value) for name, value in agent.update(batch).items()}
        given = jax_floq.arrays(batch), jax_floq.arrays(noise)
        metrics = {name: float(value) for name, value in jax_agent.update(*given).items()}
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    drawn = jax.eval_shape(jax_agent.draw, jax_agent.state["key"], given[0])
    assert {name: x.shape for name, x in drawn.items()} == {name: x.shape for name, x in given[1].items()}


def test_jax_does_not_pass_over_what_it_lacks():
    pytest.importorskip("jax")
    from benchmarks import jax_floq

    case = UPDATES["update-demo"].shrunk()
    case = dataclasses.replace(case, options={**case.options, "lr_decay_steps": 10})
    with pytest.raises(ValueError, match="constant learning rate"):
        jax_floq.JaxFloq(case.agent(CPU))


def test_td2_update_is_the_agents():
    from benchmarks.td2_update import Td2Case, Td2Learner
    from fastflow.agents.td2_cfm import PRESETS, Td2CfmAgent, Td2CfmConfig

    case = Td2Case()
    settings = {**PRESETS["linear-gaussian"], "gamma": case.gamma}
    config = Td2CfmConfig(**settings)
    assert (config.hidden, config.batch_size, config.num_steps) == (case.hidden, case.batch_size, case.num_steps)
    assert (config.target_rate, config.lr, config.weight_decay) == pytest.approx((case.tau, case.lr, case.weight_decay))
    agent, learner = Td2CfmAgent(config, case.state_dim, case.action_dim), Td2Learner(case, "auto", None)
    assert agent.online.field.spec == learner.field.spec
    for mine, theirs in ((agent.online.field, learner.field), (agent.target.field, learner.target)):
        mine.load_state_dict(theirs.state_dict())
    batch = case.batches(1)[0]
    (state, action), (_, next_action) = (batch[key].split(case.state_dim, -1) for key in ("cond", "next_cond"))
    given = {"observations": state, "actions": action, "next_actions": next_action}
    noise = agent.sample_noise({"observations": state})
    _, metrics = agent.losses({**given, "next_observations": batch["next_state"]}, noise)
    direct, bootstrap = learner.plain_losses(batch, noise.source, noise.time)
    torch.testing.assert_close(metrics["direct_loss"], direct.detach())
    torch.testing.assert_close(metrics["bootstrap_loss"], bootstrap.detach(), rtol=1e-4, atol=1e-6)


def test_fpo_beside_plain_pytorch(monkeypatch, tmp_path, capsys):
    from benchmarks import fpo_update

    monkeypatch.setattr(fpo_update, "STEPS", 6)
    monkeypatch.setattr(fpo_update, "ENVS", 4)
    threads = torch.get_num_threads()
    try:
        assert fpo_update.main(["--rounds", "1", "--output", str(tmp_path / "fpo.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "fpo.json").read_text())
    # The same losses and gradients as plain PyTorch, before anything is timed.
    assert max(found["differences"].values()) < 1e-4
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["seconds"].values())
    kept = found["bytes kept for an update"]
    pairs = 6 * 4 * 8
    # Stored: times, noise, old losses. Regenerated: an id per row, old losses.
    assert kept["fastflow fp32"] == 4 * pairs * (1 + fpo_update.ACTION + 1)
    assert kept["fastflow fp32, noise regenerated"] == 4 * pairs + 8 * 6 * 4
    assert "plain PyTorch fp32" in capsys.readouterr().out
