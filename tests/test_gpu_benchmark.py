"""benchmarks/gpu*.py at toy size on the CPU: every part runs, and what it says of parity and arithmetic is true."""

import importlib
import json
import os
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the opponent of the GPU benchmark is not installed")

TUNES = ["lora", "qlora"] if find_spec("bitsandbytes") else ["lora"]
SYSTEMS = ["welltuned", "PEFT, adapters bf16", "PEFT, adapters fp32"]


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules by name; they find each other as they do when gpu.py is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def result(parts, tmp_path_factory):
    """What one toy run wrote, its exit code checked."""
    out = tmp_path_factory.mktemp("results")
    assert parts("gpu").main(["--toy", "--out", str(out)]) == 0
    return json.loads((out / "gpu-toy.json").read_text(encoding="utf-8"))


def test_parity_passes_in_bf16_and_holds_in_fp32(result):
    assert [p["tune"] for p in result["parity"]] == TUNES
    for parity in result["parity"]:
        assert parity["passed"]
        assert parity["errors"]["engine, fp32"]["gradient"] < 2e-5
        assert parity["errors"]["engine, bf16"]["cosine"] > 0.999


def test_every_cell_has_its_numbers(result):
    cells = result["cells"]
    ours = {("qlora", False): "welltuned, dense base", **{(t, True): "welltuned, inputs on the host" for t in TUNES}}
    for tune in TUNES:
        for checkpointing in (False, True):
            named = [c["system"] for c in cells if (c["tune"], c["checkpointing"]) == (tune, checkpointing)]
            more = [ours[tune, checkpointing]] if (tune, checkpointing) in ours else []
            assert sorted(named) == sorted(3 * (SYSTEMS + more))
    for cell in cells:
        assert cell["problem"] is None
        assert len(cell["seconds"]) >= 2 and len(cell["ceilings"]) == 2
        assert cell["tokens_per_second"] > 0 and cell["share_of_floor"] > 0 and cell["peak_bytes"] > 0
        assert cell["loss"] == pytest.approx(cells[0]["loss"], rel=0.2)  # random weights: about ln V
    kinds = {(rows, again) for rows in ("S = 64", "ragged", "S = 8") for again in (False, True)}
    assert {(c["rows"], c["checkpointing"]) for c in cells} == kinds


def test_parts_have_their_numbers(result):
    assert result["toy"] is True and result["machine"]["versions"]["torch"]
    assert all(a["seconds"] > 0 for a in result["attention"]) and result["head"]["seconds"] > 0
    packed = [a["errors"] for a in result["attention"] if a["rows"] == "ragged" and a["way"].startswith("packed")]
    assert len(packed) == 2 and max(e for errors in packed for e in errors.values()) < 1e-5


@pytest.mark.skipif("qlora" not in TUNES, reason="4-bit weights need bitsandbytes")
def test_the_large_base_is_measured_beside_its_forecast(result):
    runs = result["large"]["runs"]
    assert result["large"]["passed"] and [r["offload"] for r in runs] == [False, True]
    assert runs[0]["loss"] == runs[1]["loss"] and runs[0]["host_bytes"] == 0 < runs[1]["host_bytes"]
    assert all(r["peak_bytes"] > 0 and r["forecast_bytes"] > 0 and r["seconds"] > 0 for r in runs)


def test_a_toy_run_writes_nothing_unless_told_to(parts, monkeypatch):
    gpu = parts("gpu")
    monkeypatch.setattr(gpu, "run", lambda scale, deadline, save: save({}) or {"ok": True})
    monkeypatch.setattr(parts("gpu_scale"), "write_result", lambda *_: pytest.fail("written"))
    assert gpu.main(["--toy"]) == 0


def test_what_comes_after_speed_has_its_numbers(result, parts):
    ways = {way["way"]: way["nanoseconds_a_number"] for way in result["optimizer"]["ways"]}
    assert ways.keys() == {"AdamW, fp32", "AdamW, 8 bits"} and min(ways.values()) > 0
    bank = result["bank"]
    assert bank["passed"] and bank["gradient_apart"] < 1e-5 and bank["adapters"] == 4
    for group in bank["cells"]:
        assert [cell["system"] for cell in group["of"]] == ["one run", "bank of 4"] and group["speed_ratio"] > 0
        assert group["of"][1]["tokens"] == 4 * group["of"][0]["tokens"]


def test_a_bank_that_computes_something_else_is_seen(parts, monkeypatch, capsys):
    scale, bank = parts("gpu_scale"), parts("gpu_bank")
    monkeypatch.setattr(bank, "ALPHA", 16)  # the bank's; a run's is 32
    model = parts("gpu_systems").build_model(scale.CPU.shape, torch.float32, "cpu", nf4=False)
    found = bank.measure_bank(scale.CPU, model, "lora", scale.Deadline.after(0.0))
    assert not found["passed"] and found["gradient_apart"] > 0.01
    assert all(cell["problem"] == "no time left" for group in found["cells"] for cell in group["of"])


def test_a_large_base_is_not_begun_without_time(parts):
    scale, large = parts("gpu_scale"), parts("gpu_large")
    found = large.check_large(scale.GPU, scale.Deadline.after(0.5))
    assert found["problem"] == "no time left" and found["passed"] and not found["runs"]


def test_time_that_is_kept_for_later_is_not_spent(parts):
    deadline = parts("gpu_scale").Deadline.after(1.0)
    assert 0 < deadline.earlier(50).left <= 10 and deadline.earlier(90).left == 0.0


def test_a_wrong_gradient_fails_parity(parts, result):
    errors = {name: dict(e) for name, e in result["parity"][0]["errors"].items()}
    assert parts("gpu_parity").passes(errors)
    errors["engine, bf16"]["gradient"] *= 2
    assert not parts("gpu_parity").passes(errors)


def test_arithmetic_is_that_of_the_design(parts):
    """34.0 and 49.1 GFLOP a token for Llama-3.1-8B at S = 4096 (shared research, perf.md, section 2.2)."""
    scale = parts("gpu_scale")
    rows = scale.long_rows(scale.GPU)
    assert scale.flops_per_token(scale.LLAMA_8B, rows, False) == pytest.approx(34.03e9, rel=1e-3)
    assert scale.flops_per_token(scale.LLAMA_8B, rows, True) == pytest.approx(49.15e9, rel=1e-3)


def test_ragged_rows_look_like_gsm8k(parts):
    scale = parts("gpu_scale")
    lengths = torch.tensor([len(row.ids) for row in scale.ragged_rows(scale.GPU)], dtype=torch.float)
    assert len(lengths) == 64 and 195 < lengths.mean() < 235 and lengths.min() > 80 and lengths.max() < 600


def test_batches_keep_to_the_budget(parts):
    scale, systems = parts("gpu_scale"), parts("gpu_systems")
    rows = scale.ragged_rows(scale.GPU)
    batches = systems.batches_of(rows, 2048)
    assert sorted(row.origin for batch in batches for row in batch) == sorted(row.origin for row in rows)
    assert all(len(batch[0].ids) * len(batch) <= 2048 for batch in batches)
    padded = sum(len(batch[0].ids) * len(batch) for batch in batches)
    assert padded < 1.15 * sum(len(row.ids) for row in rows)


def _cell(speed):
    given = dict(tune="lora", rank=16, rows="ragged", checkpointing=False, system="any")
    return speed.Cell(tokens=100, flops_per_token=1e9, **given)


def _system(speed, fails_above):
    @contextmanager
    def system(budget):
        if budget > fails_above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield speed.Running(lambda: 1.0, lambda: None, {}, dict, lambda rows: 1.0)

    return system


def test_out_of_memory_is_recorded_and_a_smaller_micro_batch_tried(parts):
    scale, speed = parts("gpu_scale").CPU, parts("gpu_speed")
    fits, never, late = _cell(speed), _cell(speed), _cell(speed)
    speed.visit(scale, fits, _system(speed, 64), 1.0)
    assert fits.budget == 64 and fits.problem is None and fits.seconds
    speed.visit(scale, never, _system(speed, 0), 1.0)
    assert never.problem == "out of memory at 64 tokens a micro-batch" and not never.seconds
    speed.visit(scale, late, _system(speed, 64), 0.0)
    assert late.problem == "no time left" and late.to_json()["seconds"] == []


def test_a_failing_system_does_not_stop_the_others(parts, capsys):
    scale, speed = parts("gpu_scale").CPU, parts("gpu_speed")
    cell = _cell(speed)
    speed.visit(scale, cell, lambda budget: 1 / 0, 1.0)
    assert cell.problem == "failed: ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err


# ── ranks and other tools ────────────────────────────────────────────────────────────────────────────────────────────

FAKE = """
import json, sys
spec = json.load(open(sys.argv[1]))
if spec["rank"] == 64:
    sys.exit("no kernel image")
assert spec["tune"] == "lora" and all(len(job["ids"]) == len(job["labels"]) for job in spec["jobs"])
jobs = [{"rows": job["rows"], "seconds": [0.5], "loss": None, "peak_bytes": 7, "budget": 64, "problem": None}
        for job in spec["jobs"]]
jobs[-1]["loss"] = 1.0
print("noise\\n" + json.dumps({"jobs": jobs, "ceilings": [1e12], "flags": {"padding_free": True}, "versions": {}}))
"""


@pytest.fixture(scope="module")
def speeds(parts, tmp_path_factory):
    """What gpu_speed.py wrote at two ranks, with a stand-in for TRL and without Unsloth."""
    out = tmp_path_factory.mktemp("speeds")
    (out / "trl_gpu.py").write_text(FAKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts("gpu_peers"), "SCRIPTS", out)
        options = ["--tune", "lora", "--checkpointing", "off", "--trl-python", sys.executable, "--out", str(out)]
        assert parts("gpu_speed").main(["--toy", *options]) == 0  # what fails in another tool is its own
    return json.loads((out / "gpu-speed-toy.json").read_text(encoding="utf-8"))


def test_both_ranks_have_their_columns(speeds):
    ours = [cell for cell in speeds["cells"] if cell["system"] in SYSTEMS]
    assert {(c["rank"], c["rows"]) for c in ours} == {(r, k) for r in (16, 64) for k in ("S = 64", "ragged", "S = 8")}
    assert all(c["problem"] is None and c["seconds"] for c in ours)
    per_token = {c["rank"]: c["flops_per_token"] for c in ours if c["rows"] == "ragged"}
    assert per_token[64] - per_token[16] == 6 * 48 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


def test_other_tools_have_their_columns(speeds):
    cells = {(c["system"], c["rank"], c["rows"]): c for c in speeds["cells"]}
    assert all(c["problem"] == "not given" for key, c in cells.items() if key[0] == "Unsloth")
    good = cells["TRL", 16, "ragged"]
    assert good["tokens_per_second"] == good["tokens"] / 0.5 and good["peak_bytes"] == 7
    assert good["problem"] is None and good["flags"]["padding_free"] and good["share_of_floor"] > 0
    assert "it computes something else" in cells["TRL", 16, "S = 8"]["problem"]
    assert cells["TRL", 64, "ragged"]["problem"] == "failed: no kernel image" and speeds["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl", "unsloth"])
def test_the_real_tools_run_at_toy_size(parts, tmp_path, name):
    python = os.environ.get(f"WELLTUNED_{name.upper()}_PYTHON")
    if not python:
        pytest.skip(f"WELLTUNED_{name.upper()}_PYTHON names no environment's python")
    options = ["--rank", "16", "--checkpointing", "off", f"--{name}-python", python, "--out", str(tmp_path)]
    assert parts("gpu_speed").main(["--toy", "--tune", "lora", *options]) == 0
    cells = json.loads((tmp_path / "gpu-speed-toy.json").read_text(encoding="utf-8"))["cells"]
    theirs = [c for c in cells if c["system"].lower() == name]
    assert len(theirs) == 3 and all(c["problem"] is None and c["seconds"] for c in theirs)


@pytest.mark.slow
@pytest.mark.skipif("qlora" not in TUNES, reason="4-bit weights need bitsandbytes")
def test_large_runs_by_itself(parts, tmp_path):
    assert parts("gpu_large").main(["--toy", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gpu-large-toy.json").read_text(encoding="utf-8"))["large"]["passed"]


# ── quality ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_quality_agrees_with_peft_at_toy_size(parts, tmp_path):
    assert parts("gpu_quality").main(["--toy", "--seeds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu-quality-toy.json").read_text(encoding="utf-8"))
    assert {r["tune"] for r in result["runs"]} == set(TUNES) and result["toy"] is True
    assert all(result["entropy"] < r["after"] < r["before"] for r in result["runs"])
    assert all(c["agrees"] and abs(c["difference"]) < 0.01 for c in result["compared"])
    if "qlora" in TUNES:
        assert result["dense_base"]["cached"] == result["dense_base"]["rebuilt"]
    assert not result["left_out"]


def test_quality_ends_in_time(parts, monkeypatch, capsys):
    """One seed is made whatever the time; those for which none is left are named."""
    scale, quality = parts("gpu_scale"), parts("gpu_quality")
    learned = [quality.Learned("lora", system, 0, 3.0, 1.5) for system in (quality.OURS, quality.THEIRS)]
    monkeypatch.setattr(quality, "tunes_here", lambda: ["lora"])
    monkeypatch.setattr(quality, "pretrain", lambda *_: None)
    monkeypatch.setattr(quality, "one_seed", lambda *_: time.sleep(0.02) or learned)
    written = []
    found = quality.run(scale.CPU, quality.TOY, 3, 16, scale.Deadline.after(0.03 / 60), written.append)
    assert [(one["seed"], one["problem"]) for one in found["left_out"]] == [(1, "no time left"), (2, "no time left")]
    assert len(found["runs"]) == 2 and found["ok"] and len(written) == 3


def test_learning_less_than_peft_is_seen(parts):
    quality = parts("gpu_quality")

    def runs(after):
        return [
            quality.Learned("lora", system, seed, 3.0, end + 0.001 * seed)
            for system, end in ((quality.OURS, after), (quality.THEIRS, 1.5))
            for seed in range(3)
        ]

    assert quality.compare(runs(1.5), "lora")["agrees"] and quality.all_learned(runs(1.5), 1.0)
    assert not quality.compare(runs(1.6), "lora")["agrees"]
    assert not quality.all_learned(runs(2.9), 1.0)


def test_the_walk_has_the_entropy_that_it_claims(parts):
    quality = parts("gpu_quality")
    first = quality.walk(0)
    second = first.changed(1)
    changed = (first.next_TS != second.next_TS).any(1).sum()
    assert changed == quality.TOKENS // 2 and second.entropy == pytest.approx(1.0627, abs=1e-3)
    row = second.row(2000, 5)
    assert all(b in second.next_TS[a] for a, b in zip(row.ids[:-1], row.ids[1:], strict=True))
    assert (row.ids == second.row(2000, 5).ids).all() and not (row.ids == second.row(2000, 6).ids).all()


def test_shared_prompts_cost_what_they_cost_by_each_way(parts):
    found = parts("gpu_compile").check_prefix(parts("gpu_scale").CPU)
    assert found["passed"] and "backward on CPU" in found["flex_attention"]
    for row in found["rows"]:
        assert set(row["seconds"]) == {"own prompt each", "shared, keys copied"} and min(row["seconds"].values()) > 0
        assert row["apart"]["own prompt each"] < 1e-5


@pytest.mark.slow
def test_compiled_layers_take_turns_with_plain_ones(parts, tmp_path):
    torch._dynamo.reset()
    assert parts("gpu_compile").main(["--toy", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    for row in json.loads(path.read_text(encoding="utf-8"))["compiled"]["rows"]:
        assert row["warm_up"]["graphs"] >= 1 and row["warm_up"]["problem"] is None
        assert row["losses"]["plain"] == pytest.approx(row["losses"]["compiled"], rel=1e-5)
