"""Published shapes, their sweeps, what is measured of them, and how it gets into figures and pages."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import fastflow as ff

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import breakdown, quality, scaling, tables  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.floors import Rates, rates  # noqa: E402
from benchmarks.published import AXES, PUBLISHED, SIZES, UPDATES, along  # noqa: E402
from benchmarks.rivals import RIVAL_TIMES, RIVALS, Skipped, buffered_walk, check, torch_variant  # noqa: E402
from fastflow.agents import floq  # noqa: E402

CPU = torch.device("cpu")

# Shapes ---------------------------------------------------------------------------------------------------------------


def test_every_published_environment_has_its_cases():
    published = {name for name in floq.PRESETS if name.count("/") == 0 and not name.endswith("-demo")}
    assert set(SIZES) == published
    for environment in SIZES:
        assert {f"floq/{environment}/walk", f"fql/{environment}/one-row"} <= set(PUBLISHED)
        assert f"floq/{environment}/update" in UPDATES
    giant = PUBLISHED["floq/antmaze-giant-navigate/best/walk"]
    assert (giant.rows, giant.num_steps, giant.spec.cond_dim) == (4096, 4, 37)
    assert PUBLISHED["fpo/fpo++-go2/walk"].num_steps == 64
    assert PUBLISHED["td-flow/multi-policy/walk"].spec.hidden == (1024,) * 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cases_run(name):
    problem = PUBLISHED[name].shrunk().build(CPU)
    assert check(problem, RIVALS["eager"](problem, "fp32"), "fp32").within(1.5)
    assert check(problem, torch_variant("fastflow", problem, _by_fastflow(problem)), "fp32").within(RIVAL_TIMES)


def _by_fastflow(problem):
    return lambda **inputs: problem.case.run(problem.field, inputs, "auto", "fp32")


@pytest.mark.parametrize("name", UPDATES)
def test_published_updates_run(name):
    case = UPDATES[name].shrunk()
    metrics = case.agent(CPU).update(case.batches(CPU, 1)[0])
    assert metrics["critic/critic_loss"].isfinite()


def test_sweeps_change_one_thing():
    walk = PUBLISHED["floq/cube-double-play/walk"]
    assert [along(walk, "steps", n).num_steps for n in AXES["steps"]] == list(AXES["steps"])
    assert dataclasses.replace(along(walk, "steps", 64), num_steps=8, name=walk.name) == walk
    assert along(walk, "rows", 65536).rows == 65536
    wide = along(PUBLISHED["td-flow/single-policy/walk"], "width", 64).spec
    assert wide.hidden == (64,) * 3 and wide.architecture == ff.FiLMUNet((64,) * 3)
    with pytest.raises(ValueError, match=r"axis: floq/cube-double-play/loss is a loss, which has no steps"):
        along(PUBLISHED["floq/cube-double-play/loss"], "steps", 2)
    with pytest.raises(ValueError, match="axis: expected one of steps, rows, width, got 'depth'"):
        along(walk, "depth", 2)


def test_floors():
    least = Rates(flops=1e9, bytes=1e6)
    assert least.seconds(2_000_000_000, 1) == 2.0 and least.seconds(1, 3_000_000) == 3.0
    found = rates(CPU, "fp32")
    assert 1e8 < found.flops < 1e14 and 1e7 < found.bytes < 1e13


# Rivals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fpo-walk-2048", "fpo-plus-walk-4096", "actor-walk-256"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sampler_for_cuda_graphs_is_right(name, precision):
    problem = CASES[name].shrunk().build(CPU)
    assert check(problem, torch_variant("graph sampler", problem, buffered_walk(problem, precision)), precision).within(
        RIVAL_TIMES
    )


def test_rivals_say_why_they_are_missing():
    walk, critic = CASES["fpo-walk-2048"].shrunk().build(CPU), CASES["demo-walk"].shrunk().build(CPU)
    with pytest.raises(Skipped, match="needs CUDA"):
        RIVALS["graph sampler"](walk, "fp32")
    with pytest.raises(Skipped, match="plain MLPs without norms"):
        buffered_walk(critic, "fp32")
    with pytest.raises(Skipped, match="no ensembles"):
        RIVALS["torchrl"](critic, "fp32")
    modules = pytest.importorskip("torchrl.modules")
    if not hasattr(modules, "FlowMatchingModel"):
        with pytest.raises(Skipped, match=r"torchrl .* has no FlowMatchingModel"):
            RIVALS["torchrl"](walk, "fp32")
    else:
        assert check(walk, RIVALS["torchrl"](walk, "fp32"), "fp32").within(RIVAL_TIMES)


# The commands ---------------------------------------------------------------------------------------------------------


def test_scaling_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    names = ["--rivals", "eager", "graph sampler", "--precision", "fp32", "--device", "cpu", "--seconds", "0.1"]
    assert (
        scaling.main(["fpo/playground/walk", "--over", "rows", "--values", "1", "4", *names, "--json", str(path)]) == 0
    )
    printed = capsys.readouterr().out
    assert "rows 4: 4 rows, floor" in printed and "left out: a sampler for CUDA graphs needs CUDA" in printed
    results = json.loads(path.read_text(encoding="utf-8"))
    assert [point["n"] for point in results["points"]] == [1, 4]
    for point in results["points"]:
        assert set(point["entrants"]) == {"fastflow", "eager"} and set(point["skipped"]) == {"graph sampler"}
        assert point["entrants"]["fastflow"]["times"] == {"middle": 1.0, "low": 1.0, "high": 1.0}
        assert point["entrants"]["fastflow"]["us"]["middle"] > point["floor_us"] > 0
    assert path.with_suffix(".png").stat().st_size > 10_000
    path.with_suffix(".png").unlink()
    assert scaling.main(["--draw", str(path)]) == 0 and path.with_suffix(".png").is_file()


def test_scaling_lists_and_refuses(capsys):
    assert scaling.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*PUBLISHED, *CASES))
    for arguments, message in (
        (["floq/nowhere/walk"], "expected a name that --list prints, got 'floq/nowhere/walk'"),
        (["demo-loss"], "demo-loss is a loss, which has no steps"),
        (["demo-walk", "--rivals", "nobody"], "got 'nobody'"),
        (["demo-walk", "--values", "0"], "expected numbers of at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            scaling.main(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture
def times(tmp_path):
    path = tmp_path / "breakdown.json"
    arguments = ["--update", "update-demo", "--device", "cpu", "--steps", "1", "2", "--updates", "1"]
    assert breakdown.main([*arguments, "--json", str(path)]) == 0
    return path


def test_breakdown_accounts_for_the_whole_update(times):
    bars = json.loads(times.read_text(encoding="utf-8"))["bars"]
    assert [(bar["name"], bar["steps"]) for bar in bars] == [
        (name, k) for k in (1, 2) for name in ("fastflow", "eager")
    ]
    for bar in bars:
        assert set(bar["parts_ms"]) == set(breakdown.PARTS)
        # Small updates of fastflow compute gradients along with the losses.
        none = {"backward"} if bar["name"] == "fastflow" and not bar["parts_ms"]["backward"] else set()
        assert all(ms > 0 for part, ms in bar["parts_ms"].items() if part not in none) and bar["update_ms"] > 0
    assert times.with_suffix(".png").stat().st_size > 10_000


def test_quality_beside_cost(times, tmp_path, capsys):
    experiment = tmp_path / "steps.csv"
    lines = ["arm,seed,x,group,success", "k1,0,1.0,floq,0.25", "k1,1,1.0,floq,0.75", "k2,0,2.0,floq,1.0", "base,0,,,0"]
    experiment.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = quality.read(experiment, "success", None)
    assert [(k, value.middle) for k, value in found.items()] == [(1, 0.5), (2, 1.0)]
    assert found[1].low <= 0.5 <= found[1].high
    assert quality.main([str(experiment), "--times", str(times)]) == 0
    assert (tmp_path / "steps-cost.png").stat().st_size > 10_000
    assert quality.main([str(experiment), "--times", str(times), "--metric", "luck"]) == 2
    assert "expected a column of" in capsys.readouterr().err


# Pages ----------------------------------------------------------------------------------------------------------------


def test_tables_of_the_pages_are_those_of_the_results(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_tables_are_filled_in(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "r.md").write_text("# R\n\n| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n\nwords\n", encoding="utf-8")
    page = tmp_path / "README.md"
    begin = "x\n<!-- table: r.md columns=1,3 -->\n"
    page.write_text(begin + "old\n<!-- end of table -->\ny\n", encoding="utf-8")
    assert tables.main(["--check"], tmp_path) == 1
    assert tables.main([], tmp_path) == 0
    rows = "| a | c |\n|---|---|\n| 1 | 3 |\n"
    assert page.read_text(encoding="utf-8") == begin + rows + "<!-- end of table -->\ny\n"
    assert tables.main(["--check"], tmp_path) == 0
    page.write_text("<!-- table: none.md -->\n<!-- end of table -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"none\.md"):
        tables.main(["--check"], tmp_path)
    with pytest.raises(ValueError, match=r"columns: expected numbers from 1 to 3, got \[4\]"):
        tables.first_table("| a | b | c |\n", [4])


def test_agents_from_end_to_end(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ogbench")
    from benchmarks import agents

    few = {
        name: (env, unit, 2 if unit == "updates" else 64, own) for name, (env, unit, _, own) in agents.AGENTS.items()
    }
    few["ppo"] = ("Pendulum-v1", "environment steps", 64, {"num_envs": 1})
    monkeypatch.setattr(agents, "AGENTS", few)
    path = tmp_path / "agents.json"
    assert agents.main(["--rounds", "1", "--only", "floq", "ppo", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["agents"]
    assert set(found) == {"floq", "ppo"}
    for name, entrants in (("floq", {"fastflow", "eager"}), ("ppo", {"fastflow", "eager"})):
        assert entrants <= set(found[name]["per_second"])
        assert all(len(rates) == 1 and rates[0] > 0 for rates in found[name]["per_second"].values())
    assert "environment steps/s" in capsys.readouterr().out
