"""What `make gpu` makes of its measurements: goals, fits, figure, profiler, predictions, whole updates."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# benchmarks/ is not installed; `pytest` without `python -m` does not look for it here.
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_figure, gpu_goals, gpu_updates, launches, ncu, predictions, tables  # noqa: E402
from benchmarks.cases import CASES, NUM_STEPS, UPDATES  # noqa: E402
from benchmarks.gpu_updates import GPU_UPDATES, Td2UpdateCase  # noqa: E402
from benchmarks.rivals import Skipped  # noqa: E402
from fastflow.kernels import roofline  # noqa: E402

CPU = torch.device("cpu")


def row(rival, mode, us, graph=None, call=None, precision="bf16", **more):
    """A measured row; `graph` and `call` are how many times as long as fastflow's it takes."""
    beside = {
        key: {"median": x, "low": 0.98 * x, "high": 1.02 * x} for key, x in (("graph", graph), ("call", call)) if x
    }
    times = {f"{key}_us": value for key, value in (("median", us), ("p20", 0.9 * us), ("p80", 1.1 * us))}
    return {"rival": rival, "mode": mode, "precision": precision, "accurate": True, "vs_fused": beside, **times, **more}


def walk_over_steps(k):
    us = {"graph": 8.0 + 20.0 * k, "call": 40.0 + 20.0 * k}
    rows = [row("fused", mode, value, times_floor=value / 60, tflops=400.0) for mode, value in us.items()]
    rows.append(row("eager", "call", 1400.0, 1400 / us["graph"], 1400 / us["call"]))
    if k <= 8:
        rows.append(row("compile max-autotune", "call", 30.0 + 40.0 * k, (30 + 40 * k) / us["graph"], 1.0))
    return {"title": f"K={k}", "flops": 1, "floor_us": {"bf16": 8.4 * k}, "results": rows}


@pytest.fixture
def report():
    """A report by hand: of a GPU that there is not."""
    cases = {"walk-2x2048" if k == 8 else f"walk-2x2048-k{k}": walk_over_steps(k) for k in NUM_STEPS}
    cases["walk-2x2048"]["results"] += [
        row("compile reduce-overhead", "call", 400.0, 2.4, 2.0),
        row("compile", "call", 200.0, 1.2, 1.0),  # without CUDA graphs: no goal is against it
        row("eager", "graph", 300.0, 1.8, 1.5),  # nor against eager PyTorch in a graph
        row("jax", "call", 600.0, 3.6, 3.0),
        row("jax unrolled", "call", 500.0, 3.0, 2.5),
        row("jax", "call", 100.0, 0.5, 0.5, precision="tf32"),
    ]
    cases["walk-2x256"] = {"floor_us": {"bf16": 9.0}, "results": [row("fused", "call", 90.0, None, 1.0)]}
    cases["walk-2x256"]["results"].append(row("eager", "call", 900.0, None, 9.9))
    cases["walk-2x8192"] = {
        "floor_us": {"bf16": 260.0},
        "results": [row("fused", "graph", 500.0, 1.0, tflops=440.0), row("eager", "call", 505.0, 1.01)],
    }
    cases["fpo-loss-30720x8"] = {
        "floor_us": {"bf16": 7.0},
        "results": [
            row("fused", "call", 300.0, None, 1.0, peak_memory_bytes=10),
            row("eager", "call", 3000.0, None, 10.0, peak_memory_bytes=60),
        ],
    }
    updates = {
        "update-cube-double-depth4": {
            "title": "whole",
            "flops": 1,
            "results": [
                {key: x for key, x in r.items() if key != "accurate"}
                for r in (
                    row("fused", "call", 2500.0, 3.0, 1.0),
                    row("fused", "graph", 800.0, 1.0, 0.3),
                    row("compile + graph", "graph", 1500.0, 1.9, 0.6),
                    row("compile max-autotune", "call", 2400.0, 3.0, 1.0),
                )
            ],
        }
    }
    return {
        "started": "2030-01-02T03:04:05+00:00",
        "seconds": 500.0,
        "complete": True,
        "small": False,
        "only": None,
        "hardware": {"gpu": "NVIDIA H200", "driver": "1.2.3"},
        "software": {"python": "3.12", "torch": "2.11", "triton": "3.6.0", "jax": None},
        "repository": {"commit": "abc", "dirty": False, "sources": "def"},
        "context": {"product_bf16_tflops": 790.0, "copy_tbytes_per_s": 4.0},
        "tests": {"status": "passed"},
        "cases": cases,
        "updates": updates,
        "predictions": {},
        "ncu": {"status": "not available: no ncu on PATH", "cases": {}},
        "failures": [],
    }


@pytest.fixture
def small_run(tmp_path):
    arguments = gpu.parse(["--allow-cpu", "--small", "--minutes", "5", "--output", str(tmp_path)])
    return gpu.Run(arguments, CPU)


@pytest.fixture
def fitted(report):
    """The same with its fit over K."""
    gpu.fit_steps(type("Run", (), {"report": report}))
    return report


# Goals --------------------------------------------------------------------------------------------------------------


def test_goals():
    wanted = {goal.name: (goal.eager, goal.compile, goal.jax) for goal in gpu_goals.GOALS}
    assert wanted == {
        "walk-2x2048": (6, 1.8, 2.5),
        "walk-2x256": (10, 2.5, 3),
        "walk-2x8192": (3, 1.5, 2),
        "k-scaling": (None, None, None),
        "fpo-walk-2048": (20, 5, 5),
        "fpo-plus-walk-4096": (20, 3, 3),
        "one-row": (15, 2, 3),
        "loss-2x2048": (3, 1.5, 2),
        "fpo-loss-30720x8": (5, 2.5, 2.5),
        "walk-to-actions-2x2048": (4, 1.5, 2),
        "update-cube-double-depth4": (6, 2, 4),
        "update-td2-unet": (6, 2, None),
    }
    absolute = {goal.name: gpu_goals.absolute(goal) for goal in gpu_goals.GOALS if gpu_goals.absolute(goal)}
    assert absolute == {
        "walk-2x2048": "at most 2.5x the floor",
        "walk-2x8192": "at least 55% of the peak",
        "k-scaling": "at most 10 µs fixed, within 3.0% of a line",
        "loss-2x2048": "at most 2.5x the floor",
        "fpo-loss-30720x8": "at most 0.2 of eager's memory",
        "update-cube-double-depth4": "at least 1,000 updates/s",
        "update-td2-unet": "at least 500 updates/s",
    }
    for name in gpu_goals.NAMES:
        assert name == "k-scaling" or name in CASES or name in GPU_UPDATES


def test_sizes_of_the_goals():
    update, td2 = UPDATES["update-cube-double-depth4"].config(), Td2UpdateCase()
    assert (update.batch_size, update.noise_samples, update.critic_flow_steps, update.block_depth) == (256, 8, 8, 4)
    config = td2.config()
    assert (config.batch_size, config.num_steps, config.method) == (1024, 10, "midpoint")
    assert (config.architecture, config.hidden) == ("film-unet", (512, 512, 512))
    walk, _, loss = td2.operators
    assert walk.flops == CASES["td-walk-1024"].flops
    # Both terms of a row share its cond.
    assert CASES["td-loss-1024"].flops < loss.flops < 2 * CASES["td-loss-1024"].flops
    pairs = CASES["fpo-loss-30720x8"]
    assert (pairs.batch, pairs.samples, pairs.pairs) == (30720, 8, True)


def test_ratios_are_against_the_fastest_of_a_kind(report):
    rows = {r["name"]: r for r in gpu_goals.evaluate(report)}
    walk = rows["walk-2x2048"]
    assert walk["fastflow_us"] == {"graph": 168.0, "call": 200.0}
    found = walk["goals"]
    assert (found["eager"]["against"], found["eager"]["mode"]) == ("eager", "graph")
    assert found["eager"]["measured"] == pytest.approx(1400 / 168) and found["eager"]["met"]
    assert found["eager"]["measured_call"] == pytest.approx(7.0)
    # 350 us of max-autotune are less than the 400 of the other.
    assert found["compile"]["against"] == "compile max-autotune"
    assert found["compile"]["measured"] == pytest.approx(350 / 168) and found["compile"]["met"]
    assert (found["jax"]["against"], found["jax"]["measured"], found["jax"]["met"]) == ("jax unrolled", 3.0, True)
    assert found["floor"]["measured"] == pytest.approx(168 / 60) and not found["floor"]["met"]
    few = rows["walk-2x256"]["goals"]
    assert few["eager"] | {"low": 0, "high": 0} == {
        "goal": 10,
        **dict(against="eager", mode="call", measured=9.9, met=False, low=0, high=0),
    }
    assert few["compile"] == {"goal": 2.5, "measured": None, "met": False}
    assert rows["walk-2x8192"]["goals"]["peak"]["measured"] == pytest.approx(440 / 790)
    assert rows["walk-2x8192"]["goals"]["peak"]["met"]
    memory = rows["fpo-loss-30720x8"]["goals"]["memory"]
    assert memory["measured"] == pytest.approx(1 / 6) and memory["met"]
    update = rows["update-cube-double-depth4"]["goals"]
    assert (update["compile"]["against"], update["compile"]["measured"]) == ("compile + graph", 1.9)
    assert update["rate"]["measured"] == pytest.approx(1250) and update["rate"]["met"]
    assert not update["compile"]["met"]
    assert rows["update-td2-unet"]["goals"]["rate"] == {"goal": 500, "measured": None, "met": False}


def test_time_over_steps_has_goals(fitted):
    fits = fitted["k_scaling"]["fits"]
    assert set(fits) >= {"fused graph", "fused call", "eager call", "compile max-autotune call"}
    assert list(fits["compile max-autotune call"]["points"]) == [1, 2, 4, 8]
    found = next(r for r in gpu_goals.evaluate(fitted) if r["name"] == "k-scaling")
    assert found["fastflow_us"] == pytest.approx({"fixed": 8.0, "slope": 20.0})
    goals = found["goals"]
    assert goals["slope"]["measured"] == pytest.approx(0.5) and goals["slope"]["met"]
    assert goals["fixed"]["measured"] == pytest.approx(8.0) and goals["fixed"]["met"]
    assert goals["linear"]["measured"] == pytest.approx(0.0, abs=1e-9) and goals["linear"]["met"]
    bent = copy.deepcopy(fitted)
    bent["cases"]["walk-2x2048-k64"]["results"][0]["median_us"] *= 1.2
    gpu.fit_steps(type("Run", (), {"report": bent}))
    goals = next(r for r in gpu_goals.evaluate(bent) if r["name"] == "k-scaling")["goals"]
    assert goals["linear"]["measured"] > 0.03 and not goals["linear"]["met"]


def test_wrong_results_have_no_ratio(report):
    for r in report["cases"]["walk-2x2048"]["results"]:
        r["accurate"] = r["rival"] not in ("fused", "compile max-autotune")
    walk = gpu_goals.evaluate(report)[0]
    assert walk["fastflow_us"] == {} and walk["goals"]["floor"]["measured"] is None
    assert walk["goals"]["compile"]["against"] == "compile reduce-overhead"


def test_the_table(fitted):
    lines = gpu_goals.markdown(fitted).splitlines()
    assert lines[0] == "| case | fastflow | vs eager | vs torch.compile + CUDA graph | vs JAX jit | besides |"
    assert lines[2] == (
        "| floq walk, 2 nets x 2,048 rows, 4x512, HL-Gauss, K=8 | 168 µs (call 200 µs) | 6x: 8.33x ✓ (call 7.00x) | "
        "1.8x: 2.08x ✓ | 2.5x: 3.00x ✓ | at most 2.5x the floor: 2.8x |"
    )
    assert lines[3].startswith(
        "| the same, 2 x 256 rows | (call 90 µs) | 10x: 9.90x | 2.5x: not run | 3x: not run | - |"
    )
    assert "3x: no difference" in lines[4] and "at least 55% of the peak: 56% ✓" in lines[4]
    assert "| 8 µs + K 20 µs | - | slope at most 0.55x: 0.50x ✓ | - | at most 10 µs fixed: 8 ✓" in lines[5]
    assert "at most 0.2 of eager's memory: 0.17 ✓" in lines[10]
    assert "at least 1,000 updates/s: 1,250 ✓" in lines[12]
    assert lines[13].startswith("| whole TD²-CFM update") and "| not run |" in lines[13]
    assert len(lines[2:14]) == len(gpu_goals.GOALS)
    text = "\n".join(lines)
    every = [goal for r in gpu_goals.evaluate(fitted) for goal in r["goals"].values()]
    met, missing = sum(g["met"] for g in every), sum(g["measured"] is None for g in every)
    assert f"{met} of {len(every)} goals met, {missing} not run." in text
    assert "NVIDIA H200, driver 1.2.3" in text and "commit abc" in text
    assert "ncu: not available: no ncu on PATH" in text
    small = gpu_goals.markdown({**fitted, "small": True})
    assert small.startswith(f"**{gpu_goals.SMALL}**")
    assert f"0 of {len(every)} goals met" in small and small.count("✓") == 1


def test_an_empty_run_has_a_table(small_run):
    small_run.write()
    page = small_run.path.with_suffix(".md").read_text(encoding="utf-8")
    assert "0 of 41 goals met, 41 not run." in page
    assert json.loads(small_run.path.read_text(encoding="utf-8"))["goals"] == gpu_goals.evaluate(small_run.report)


# Figure -------------------------------------------------------------------------------------------------------------


def test_the_figure_has_what_was_measured(report, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    steps, rows = (gpu_figure.series(report, axis) for axis in gpu_figure.PANELS)
    assert [n for n, *_ in steps["fused graph"]] == list(NUM_STEPS)
    assert steps["fused graph"][0][1:] == pytest.approx((0.028, 0.0252, 0.0308))
    assert [n for n, *_ in steps["compile max-autotune call"]] == [1, 2, 4, 8]
    assert [n for n, *_ in rows["eager call"]] == [256, 2048, 8192]
    assert set(steps) | set(rows) <= set(gpu_figure.LINES)
    source = tmp_path / "run.json"
    source.write_text(json.dumps(report), encoding="utf-8")
    assert gpu_figure.main([str(source)]) == 0
    assert source.with_suffix(".png").stat().st_size > 20_000
    source.write_text(json.dumps({**report, "cases": {}}), encoding="utf-8")
    assert gpu_figure.main([str(source)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


# README -------------------------------------------------------------------------------------------------------------


def test_pages_show_the_newest_whole_run_of_every_gpu(fitted, tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "predictions-h200.md").write_text(
        "| a | b | c | d | e | f |\n|---|---|---|---|---|---|\n", encoding="utf-8"
    )
    page = "x\n<!-- tables of GPUs -->\nold\n<!-- end of tables -->\ny\n"
    before = tables.filled(page, tmp_path)
    assert "**Predictions of a model, not measurements: nothing has been run on a GPU.**" in before
    assert "| a | b | c | e | f |\n" in before and "old" not in before

    def put(day, gpu_name="NVIDIA H200", **more):
        run = {**copy.deepcopy(fitted), "started": f"2030-01-{day:02}T00:00:00+00:00", **more}
        run |= {"hardware": {"gpu": gpu_name, "driver": "1"}, "goals": gpu_goals.evaluate(run)}
        run["cases"]["walk-2x256"]["results"][0]["median_us"] = float(day)
        path = results / f"2030-01-{day:02}-000000-{day}.json"
        path.write_text(json.dumps(run), encoding="utf-8")
        return path

    put(1)
    newest = put(2)
    newest.with_suffix(".png").write_bytes(b"")
    put(3, small=True)
    put(4, only="^td-")
    put(5, complete=False)
    put(6, "NVIDIA A100-SXM4-80GB")
    after = tables.filled(page, tmp_path)
    assert list(tables.gpu_runs(tmp_path)) == [results / "2030-01-06-000000-6.json", newest]
    assert "Predictions" not in after and after.count("| case | fastflow |") == 2
    assert "**NVIDIA H200**, 2030-01-02, commit abc ([all of it](benchmarks/results/2030-01-02-000000-2.md)):" in after
    assert after.index("A100") < after.index("H200") and "(call 2 µs)" in after and "(call 6 µs)" in after
    assert after.count("![time of a walk") == 1
    assert tables.filled(after, tmp_path) == after


# Profiler -----------------------------------------------------------------------------------------------------------

NCU = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "integrate_fwd_kernel": 0%....50%....100% - 8 passes
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4242","python3.12","127.0.0.1","void at::native::elementwise_kernel<128, 2>(int, T1)","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","2,000"
"0","4242","python3.12","127.0.0.1","void at::native::elementwise_kernel<128, 2>(int, T1)","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Command line profiler metrics","lts__t_bytes.sum.per_second","byte/second","1,000,000,000,000"
"0","4242","python3.12","127.0.0.1","void at::native::elementwise_kernel<128, 2>(int, T1)","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Command line profiler metrics","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","%","0"
"1","4242","python3.12","127.0.0.1","integrate_fwd_kernel","1","7","(256, 1, 1)","(32, 2, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","198,000"
"1","4242","python3.12","127.0.0.1","integrate_fwd_kernel","1","7","(256, 1, 1)","(32, 2, 1)","0","9.0","Command line profiler metrics","lts__t_bytes.sum.per_second","byte/second","6,000,000,000,000.50"
"1","4242","python3.12","127.0.0.1","integrate_fwd_kernel","1","7","(256, 1, 1)","(32, 2, 1)","0","9.0","Command line profiler metrics","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","%","40.50"
"2","4242","python3.12","127.0.0.1","memset","1","7","(256, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","n/a"
"""  # noqa: E501


def test_the_profilers_csv_is_read():
    found = ncu.parse(NCU)
    assert [launch["kernel"] for launch in found][1:] == ["integrate_fwd_kernel", "memset"]
    assert found[1][ncu.TIME] == 198_000 and found[1][ncu.L2] == pytest.approx(6e12)
    assert ncu.TIME not in found[2]
    summary = ncu.summarize(found)
    assert summary["launches"] == 2 and summary["seconds"] == pytest.approx(200e-6)
    # Weighted by time.
    assert summary["tensor_percent"] == pytest.approx(0.99 * 40.5)
    assert summary["l2_tbytes_per_s"] == pytest.approx(0.99 * 6 + 0.01 * 1)
    assert summary["kernels"]["integrate_fwd_kernel"]["tensor_percent"] == 40.5
    with pytest.raises(ValueError, match="no table in ncu's output: ==ERROR== ERR_NVGPUCTRPERM"):
        ncu.parse("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n")
    with pytest.raises(ValueError, match="no launch has"):
        ncu.summarize([{"kernel": "memset"}])


def fake_ncu(folder, monkeypatch, body):
    program = folder / "ncu"
    program.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a program")
def test_the_profiler_is_asked_again_by_the_name_that_the_gpu_has(small_run, tmp_path, monkeypatch):
    older = NCU.replace(ncu.TENSOR[0], ncu.TENSOR[1])
    body = f"known = {ncu.TENSOR[1]!r} in ' '.join(sys.argv)\n"
    fake_ncu(tmp_path, monkeypatch, body + f"print({older!r} if known else '==ERROR== {ncu.UNKNOWN} x')")
    gpu.profile_cases(small_run, gpu.MAIN_CASES)
    assert small_run.report["ncu"]["status"] == "done"
    assert set(small_run.report["ncu"]["cases"]) == set(gpu.MAIN_CASES)
    assert small_run.report["ncu"]["cases"]["loss-2x2048"]["launches"] == 2
    assert "tensor pipes busy 40 %, L2 5.95 TB/s" in gpu_goals.markdown(small_run.report)


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a program")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('==ERROR== ERR_NVGPUCTRPERM')", "ERR_NVGPUCTRPERM"),
        ("time.sleep(60)", "not done in the time"),
    ],
)
def test_a_profiler_that_does_not_work_is_not_available(small_run, tmp_path, monkeypatch, body, reason):
    fake_ncu(tmp_path, monkeypatch, body)
    monkeypatch.setattr(ncu, "SECONDS", 2.0)
    gpu.profile_cases(small_run, gpu.MAIN_CASES)
    status = small_run.report["ncu"]["status"]
    assert status.startswith("not available") and reason in status
    assert small_run.report["skipped"] == [{"where": "ncu", "reason": status}] and small_run.report["ok"]


def test_no_profiler_is_not_available(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu.profile_cases(small_run, gpu.MAIN_CASES)
    assert small_run.report["ncu"] == {"status": "not available: no ncu on PATH", "cases": {}}


# Predictions --------------------------------------------------------------------------------------------------------


def test_predictions_stand_beside_measurements(report, monkeypatch):
    monkeypatch.setattr(predictions, "count_case", lambda case, device, precision: 5)
    monkeypatch.setattr(predictions, "count_update", lambda case, device, precision: {"": 60, "actor": 40})
    counted = {"walk-2x2048": 1}
    found = predictions.compare(report, roofline.H200, "bf16", CPU, counted)
    assert set(found) == {*report["cases"], *report["updates"]}
    # Rows and steps do not change how much is launched.
    assert counted == {"walk-2x2048": 1, "fpo-loss-30720x8": 5, "update-cube-double-depth4": {"": 60, "actor": 40}}
    assert predictions.compare(report, roofline.H200, "bf16", None, counted) == found
    assert "fpo-loss-30720x8" not in predictions.compare(report, roofline.H200, "bf16", None, {"walk-2x2048": 1})
    walk = found["walk-2x2048"]
    # Nothing around its one launch.
    alone = (
        1e6
        * roofline.predict(
            "group",
            "integrate_fwd",
            predictions.network(CASES["walk-2x2048"].spec, "bf16"),
            4096,
            8,
            roofline.H200,
            members=2,
        ).seconds
    )
    assert walk["predicted_us"] == pytest.approx(alone) and walk["around_us"] == 0
    assert (walk["mode"], walk["measured_us"]) == ("graph", 168.0)
    assert walk["relative_error"] == pytest.approx(alone / 168 - 1)
    assert found["walk-2x256"]["mode"] == "call"
    assert found["fpo-loss-30720x8"]["around_us"] == pytest.approx(3 * 1.3)
    assert f"168.0 us measured (graph): off by {alone / 168 - 1:+.0%}" in predictions.beside(found)
    report["predictions"] = found
    assert f"(median of {len(found)} cases)" in gpu_goals.markdown(report)


def test_predictions_need_a_machine_that_is_known(small_run):
    with pytest.raises(Skipped, match="the model knows H200, H100, A100"):
        gpu.compare_predictions(small_run, True)


def test_committed_predictions_are_those_of_the_model():
    path = ROOT / tables.PREDICTIONS
    written = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    machine = roofline.MACHINES[written["machine"]]
    assert list(written["cases"]) == list(gpu_goals.NAMES)
    for name, case in written["cases"].items():
        if name == "k-scaling":
            continue
        of = predictions.of_case if name in CASES else predictions.of_update
        counted = case["launches"] if name in CASES else case["branches"]
        expected = of(CASES.get(name) or GPU_UPDATES[name], machine, written["precision"], counted)
        again = "make them again: python -m benchmarks.predictions"
        for key in ("predicted_us", "ring_us", "chosen_us", "floor_us"):
            assert case[key] == pytest.approx(expected[key]), again
    assert predictions.markdown(written) == path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").startswith("# PREDICTIONS, NOT MEASUREMENTS")


def test_predictions_count_the_way_back():
    walk, back = CASES["walk-2x2048"], CASES["walk-to-actions-2x2048"]
    both = CASES["walk-backward-2x2048"]
    times = [predictions.predict(case, roofline.H200, "bf16").us for case in (walk, back, both)]
    assert times[0] < times[1] < times[2]
    us, _, chosen = predictions.predict(back, roofline.H200, "bf16", ("group",))
    # What only covers the way there goes back by what there is.
    assert chosen == {"integrate_fwd": "group", "backward": "rows"} and us > 0
    with pytest.raises(ValueError, match="none of narrow covers"):
        predictions.predict(walk, roofline.H200, "bf16", ("narrow",))


@pytest.mark.interpreter
def test_launches_are_counted_without_running_them(plain_environment):
    pytest.importorskip("triton")
    code = (
        "import dataclasses, torch\n"
        "from benchmarks import launches, predictions\n"
        "from benchmarks.cases import CASES\n"
        "x = torch.ones(4)\n"
        "print(launches.count(lambda: torch.cat([x.view(2, 2)[0] + 1, x * 2]), torch.device('cpu')))\n"
        "ys = [torch.ones(2), torch.ones(3)]\n"
        "print(launches.count(lambda: torch._foreach_mul_(ys, 2.0), torch.device('cpu')))\n"
        "for k in (1, 3):\n"
        "    case = CASES['walk-2x2048'].shrunk()\n"
        "    case = dataclasses.replace(case, num_steps=k)\n"
        "    print(predictions.count_case(case, torch.device('cpu'), 'fp32'))\n"
    )
    environment = {**plain_environment, "TRITON_INTERPRET": "1", "KINETO_LOG_LEVEL": "99", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    numbers = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    assert numbers[:2] == [3, 1]
    # However many steps: the walk is one launch of them.
    assert numbers[2] == numbers[3] > 1


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "most"), [("loss-2x2048", 24), ("walk-to-actions-2x2048", 12), ("walk-backward-2x2048", 24)]
)
def test_few_launches_surround_a_way_back(name, most):
    pytest.importorskip("triton")
    assert 0 < predictions.count_case(CASES[name], CPU, "bf16") <= most


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "most"), [("update-cube-double-depth4", 175), ("update-td2-unet", 160)])
def test_whole_updates_take_few_launches(name, most):
    pytest.importorskip("triton")
    # Their number does not depend on rows and widths, which take time here.
    case = GPU_UPDATES[name].shrunk()
    found = predictions.count_update(case, CPU, "bf16")
    assert 0 < sum(found.values()) <= most
    # None of them is a trifle, and what is in none is not all.
    assert set(found) == set(case.parts) and min(found.values()) >= 15
    agent, (batch,) = case.agent(CPU, "fused", "bf16"), case.batches(CPU, 1)
    in_turn = launches.count(lambda: agent.update(batch), CPU)
    # Every branch begins its way back anew.
    assert in_turn <= sum(found.values()) <= in_turn + 5


def test_branches_take_the_longest_of_them():
    case = GPU_UPDATES["update-cube-double-depth4"]
    counted = {"": 55, "actor": 65, "bc flow": 21, "distilled critic": 28}
    row = predictions.of_update(case, roofline.H200, "bf16", counted)
    assert row["predicted_us"] < 0.85 * row["in_turn_us"] and row["launches"] == 169
    later = predictions.of_update(case, roofline.H200, "bf16", counted | {"actor": 66})
    assert later["predicted_us"] == pytest.approx(row["predicted_us"] + 1.3)
    assert later["in_turn_us"] == pytest.approx(row["in_turn_us"] + 1.3)


@pytest.mark.interpreter
def test_an_update_launches_the_walks_that_are_predicted(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    case, names = GPU_UPDATES["update-cube-double-depth4"].shrunk(), []
    agent, (batch,) = case.agent(CPU, "fused", "bf16"), case.batches(CPU, 1)
    run = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: names.append(self.fn.__name__) or run(self, *a, **k)
    )
    agent.update(batch)
    walks = sum(each.kind == "integrate" for each in case.launched)
    assert names.count("integrate_fwd_kernel") == walks + len(case.plain) == 6
    back = [each for each in (*case.launched, *case.plain) if each.gradient]
    assert names.count("backward_kernel") == len(back) == 5
    assert sum(each.flops for each in case.launched) >= sum(each.flops for each in case.operators)


def test_launches_need_something_to_count_them(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on a GPU or in Triton's interpreter"):
        launches.count(lambda: None, CPU)


# Updates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["update-demo", "update-td2-unet"])
def test_ways_to_update_agree(name):
    case = GPU_UPDATES[name].shrunk()
    firsts = {rival: gpu_updates.prepare(case, rival, "fp32", CPU).first for rival in ("fused", "eager")}
    for key in gpu_updates.checked_losses(case):
        assert firsts["fused"][key] == pytest.approx(firsts["eager"][key], rel=1e-4)
    # The update as a compiler would be given its losses does the same, step after step.
    agent, twin = (case.agent(CPU, "reference", "fp32") for _ in range(2))
    by = gpu_updates.td2_update_by if isinstance(case, Td2UpdateCase) else gpu_updates.update_by
    update = by(twin, twin.losses)
    for batch in case.batches(CPU, 3):
        metrics, again = agent.update(batch), update(batch)
        for key in gpu_updates.checked_losses(case):
            assert float(again[key]) == pytest.approx(float(metrics[key]), rel=1e-5)


def test_jax_updates_agree_where_there_are_some():
    pytest.importorskip("jax")
    case = GPU_UPDATES["update-demo"].shrunk()
    way, eager = (gpu_updates.prepare(case, rival, "fp32", CPU) for rival in ("jax", "eager"))
    for key in gpu_updates.checked_losses(case):
        assert way.first[key] == pytest.approx(eager.first[key], rel=1e-3)
    way.finish(way.update(way.batches[1]))
    with pytest.raises(Skipped, match="no FiLMUNet"):
        gpu_updates.prepare(GPU_UPDATES["update-td2-unet"].shrunk(), "jax", "fp32", CPU)


def test_ways_that_need_cuda_say_so():
    case = GPU_UPDATES["update-demo"].shrunk()
    for rival in ("fused + graph", *gpu_updates.COMPILED_RIVALS):
        with pytest.raises(Skipped, match="CUDA"):
            gpu_updates.prepare(case, rival, "fp32", CPU)


def test_updates_that_disagree_are_failures(small_run, monkeypatch):
    prepare = gpu_updates.prepare

    def off(case, rival, precision, device):
        way = prepare(case, rival, precision, device)
        if rival == "fused":
            way.first = {key: 1.1 * value for key, value in way.first.items()}
        return way

    monkeypatch.setattr(gpu_updates, "prepare", off)
    gpu_updates.measure_update(small_run, "update-demo", "fp32", ("eager",))
    gpu_updates.measure_update(small_run, "update-demo", "fp32", ("fused", "fused + graph"))
    assert not small_run.report["ok"]
    (failure,) = small_run.report["failures"]
    assert failure["where"] == "update-demo fp32 fused: agreement" and failure["grave"]
    found = small_run.report["updates"]["update-demo"]["results"]
    assert [(r["rival"], r["mode"], r["group"]) for r in found] == [("eager", "call", 1), ("fused", "call", 2)]
    assert found[0]["loss_difference"] == 0.0 and found[1]["loss_difference"] == pytest.approx(0.1, rel=0.1)


def test_operators_of_an_update_are_what_its_flops_count():
    for case in UPDATES.values():
        assert case.flops == sum(operator.flops for operator in case.operators) + case.plain_flops
        walk = case.operators[0]
        assert walk.spec.hidden == (case.config().block_width,) * case.config().block_depth
    deep = dataclasses.replace(Td2UpdateCase(), options={"num_steps": 20})
    assert deep.flops > 1.5 * Td2UpdateCase().flops
