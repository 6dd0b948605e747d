"""The prediction against bytes counted by hand, the CSV rows, and the session script without a GPU."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import attention_table, gpu_time, measuring

roofline = pytest.importorskip("benchmarks.roofline", reason="needs Triton", exc_type=ImportError)

REPOSITORY = Path(__file__).parents[2]
CASES = {case.name: case for case in roofline.CASES}
H100 = roofline.GPUS["H100"]
NORM = "norm 256@32 cifar10 bf16"


def rows_of(*names: str) -> dict[str, roofline.Row]:
    """By case and direction."""
    return {row.name: row for row in roofline.rows([CASES[name] for name in names])}


def test_update_bytes():
    row = rows_of("update+clip cifar10 bf16")["update+clip cifar10 bf16 forward"]
    image = 256 * 3 * 32 * 32
    # ours: z 4 + a 2 + b 2 + out 4
    assert row.work.bytes == pytest.approx(12 * image, rel=0.01)
    # coef_z·z, coef_a·a, +, coef_b·b, +, clip, cos·z, sin·x, +
    each = [8, 6, 12, 6, 12, 8, 8, 8, 12]
    assert [work.bytes / image for _, work in row.sequence] == pytest.approx(each, rel=0.01)


def test_loss_bytes():
    rows = rows_of("loss stage1 cifar10 bf16")
    image = 256 * 3 * 32 * 32
    forward, backward = rows["loss stage1 cifar10 bf16 forward"], rows["loss stage1 cifar10 bf16 backward"]
    # ours: prediction 2 + z 4 + a 2 + b 2, and the residual written 2; then residual 2 and gradient 2
    assert forward.work.bytes == pytest.approx(12 * image, rel=0.01)
    assert 4 * image <= backward.work.bytes <= 6.1 * image
    # target as in the update, target − prediction, square, mean
    assert forward.eager.bytes == pytest.approx((8 + 6 + 12 + 6 + 12 + 10 + 8 + 4) * image, rel=0.01)
    # gradient of the mean 4, of the square (residual¹ 8, times 2 8, times gradient 12), minus 8, to bfloat16 6
    assert backward.eager.bytes == pytest.approx((4 + 8 + 8 + 12 + 8 + 6) * image, rel=0.01)


def test_group_norm_bytes():
    rows = rows_of(NORM)
    image = 256 * 256 * 32 * 32
    forward, backward = rows[f"{NORM} forward"], rows[f"{NORM} backward"]
    # one pass: x 2, y 2; two passes: one read more
    assert 4 * image <= forward.work.bytes <= 6.3 * image
    # + bias 4, to NCHW 4, GroupNorm 2 + 2 + 2, ·(1 + scale) 4, + shift 4, SiLU 4, back to channels-last 4
    assert forward.eager.bytes == pytest.approx((4 + 4 + 6 + 4 + 4 + 4 + 4) * image, rel=0.01)
    # SiLU 6, its sum for shift 2, times y 6, its sum for scale 2, ·(1 + scale) 4, to NCHW 4, GroupNorm (2+2)·2 + 2,
    # and its sum for the bias 2
    assert backward.eager.bytes == pytest.approx((6 + 2 + 6 + 2 + 4 + 4 + 10 + 2) * image, rel=0.01)


def test_attention_operations():
    name = "attention 256x4x64 cifar10 bf16"
    rows = rows_of(name)
    product = 2 * 256 * 4 * 256 * 256 * 64  # one matrix product of tokens × tokens × head width, in all heads
    assert rows[f"{name} forward"].work.dots == 2 * product
    assert rows[f"{name} backward"].work.dots == 7 * product  # the scores and dP are computed twice
    assert sum(work.dots for _, work in rows[f"{name} forward"].sequence) == 2 * product


@pytest.mark.parametrize(
    "name, direction, ratio",
    [
        ("update+clip cifar10 bf16", "forward", 4),
        ("loss stage1 cifar10 bf16", "forward", 4),
        ("loss stage1 cifar10 bf16", "backward", 4),
        ("loss teacher cifar10 bf16", "forward", 4),
        (NORM, "forward", 3),
        (NORM, "backward", 2),
        ("norm 256@16 cifar10 bf16", "forward", 3),
        ("norm 256@16 cifar10 bf16", "backward", 2),
    ],
)
def test_predicted_ratios(name, direction, ratio):
    row = rows_of(name)[f"{name} {direction}"]
    assert row.eager.bytes / row.work.bytes >= ratio
    assert row.ratio(H100) >= ratio


def test_noise_is_bound_by_memory():
    last, first = "update+clip+noise cifar10 bf16", "update+clip+noise nchw cifar10 bf16"
    rows = rows_of(last, first)
    elements = 256 * 3 * 32 * 32
    # Ten rounds of ten for four elements; channels-last also their places, in tiles of 512 that hold 504
    assert rows[f"{first} forward"].work.integers == 25 * elements
    assert rows[f"{last} forward"].work.integers == pytest.approx((25 + 15) * elements * 512 / 504)
    for row in (rows[f"{name} forward"] for name in (last, first)):
        assert row.work.arithmetic_us(H100, torch.bfloat16) < row.work.memory_us(H100)


@pytest.mark.parametrize(
    "found, gpu, warps",
    [
        ({"registers": 40, "threads": 128, "shared_kb": 0.0}, "H100", 48),  # 12 programs of 5120 registers
        ({"registers": 32, "threads": 128, "shared_kb": 99.0}, "H100", 8),  # two in 227 KB
        ({"registers": 16, "threads": 32, "shared_kb": 0.0}, "A100", 32),  # 32 programs, whatever their size
        ({"registers": 64, "threads": 256, "shared_kb": 0.0}, "RTX 4090", 32),  # 4 of 16384 registers
    ],
)
def test_resident_warps(found, gpu, warps):
    assert roofline.resident_warps(found, roofline.GPUS[gpu]) == warps


def test_prediction_says_so(capsys, tmp_path):
    file = tmp_path / "prediction.json"
    assert roofline.main(["--gpu", "H100", "--case", "sid", "--sequences", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "PREDICTION for H100" in out and "not measured" in out
    assert '"prediction": true' in file.read_text() and '"resident_warps"' in file.read_text()


@pytest.mark.parametrize("arguments", [["--gpu", "H99"], ["--case", "no such case"]])
def test_usage_errors_are_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        roofline.main(arguments)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rows_of_csv(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    common = {"times": (90.0, 100.0, 120.0), "shape": (2, 3), "dtype": torch.bfloat16}
    measured = measuring.row("cpu", "update", "forward", "eager", moved=10**6, floor_us=25.0, **common)
    measuring.append(path, [measured])
    measuring.append(path, [measuring.row("cpu", "update", "forward", "compile", operations=2e9, **common)])
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert (first["gb_per_s"], first["percent_of_floor"], first["shape"]) == ("10.0", "25.0", "2x3")
    assert (first["p20_us"], first["p50_us"], first["p80_us"]) == ("90.00", "100.00", "120.00")
    assert (second["tflop_per_s"], second["gb_per_s"]) == ("20", "")
    assert first["torch"] == torch.__version__ and first["gpu"] == "none"


def test_times_are_ordered():
    low, middle, high = measuring.times_us(lambda: torch.zeros(1000), "cpu")
    assert 0 < low <= middle <= high


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def test_a_case_in_a_process_of_its_own(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (case, *_) = gpu_time.cases()
    eager, graphs = gpu_time.measure_apart(case, 120, "--tiny")
    assert (eager["contender"], graphs["contender"]) == ("eager", "graphs") and eager["wall_ms"] > 0
    assert gpu_time.measure_apart(case, 0.1, "--tiny")[-1]["failed"] == "stopped after 0 s"
    (failed,) = gpu_time.measure_apart("no case", 120, "--tiny")
    assert "no case" in failed["failed"]


def test_a_contender_that_fails_is_a_row(monkeypatch):
    def fails(device, tiny):
        raise RuntimeError("no memory\nmore")

    works = {"bad": fails, "good": lambda device, tiny: lambda: None}
    monkeypatch.setattr(gpu_time, "cases", lambda: {"case": works})
    bad, good = gpu_time.measure_here("case", True)
    assert bad["failed"] == "no memory" and "failed" not in good
    assert "no memory" in gpu_time.table([bad, good])


@no_gpu
@pytest.mark.parametrize(("arguments", "word"), [([], "no GPU"), (["--tiny", "--only", "nothing"], "'nothing'")])
def test_times_that_cannot_be_had(arguments, word, capsys, tmp_path):
    assert gpu_time.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "out").exists()


@no_gpu
def test_attention_table_needs_a_gpu(tmp_path, capsys):
    assert attention_table.main(["--out", str(tmp_path / "table.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err and not (tmp_path / "table.json").exists()


def session(*arguments: str) -> subprocess.CompletedProcess:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    inner = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")  # of the tests themselves
    environment = {key: value for key, value in os.environ.items() if key not in inner}
    script = REPOSITORY / "benchmarks" / "gpu_session.sh"
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=600)


@no_gpu
def test_session_needs_a_gpu(tmp_path):
    ended = session(str(tmp_path / "out"))
    assert ended.returncode == 2 and not (tmp_path / "out").exists()
    assert len(ended.stderr.splitlines()) == 1 and "no GPU" in ended.stderr


def test_dry_session_goes_through_all_parts(tmp_path):
    ended = session("--dry-run", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "DRY RUN" in ended.stdout
    for name in ("times", "attention", "tests", "kernels", "prediction"):
        assert f"{name}: done" in ended.stdout
    with (tmp_path / "benchmarks.csv").open() as file:
        contenders = {row["contender"] for row in csv.DictReader(file)}
    assert contenders == {"fastdiff", "eager", "compile", "sdpa"}
    rows = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == set(gpu_time.cases())
    assert all(row["wall_ms"] >= row["host_ms"] > 0 for row in rows)
    assert all(row["contender"] in ended.stdout for row in rows)
    assert (tmp_path / "attention.json").exists() and (tmp_path / "prediction.json").exists()
