"""One small run of every recipe and sampler, by command lines alone, and what it left: hashes, and a few numbers.

    python tests/golden/record.py FILE      # records anew, which is right only where results were meant to change

Everything runs in one process with one thread, on the CPU. Another CPU adds up in another order (wider vector
instructions, other libraries' kernels), and so does another PyTorch: there the last bits differ, and after some updates
more than those. So hashes count where processor and PyTorch are those of the recording, and the numbers beside them, to
a tolerance, elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import runpy
import sys
import tempfile
from pathlib import Path

TINY = "--unet.channels 8 --unet.channel-mult 1 --unet.blocks 1 --unet.no-middle-attention --unet.attention-resolutions"
FEW = "--updates 6 --save-every 3 --log-every 2 --batch-size 16 --device cpu --seed 3"
EDM = "--schedule karras --parameterization edm --weight edm --noise-levels lognormal"
ROUNDS = f"{FEW} --start-steps 4 --end-steps 1 --last-updates 4"
RUNS = {
    "teacher": f"train.teacher {TINY} {FEW} --ema 0.9 --flip --unet.dropout 0.1",
    "attending": f"train.teacher {TINY} 8 --unet.head-width 8 {FEW} --ema 0 --accumulate 2",
    "checkpointing": f"train.teacher {TINY} {FEW} --ema 0.9 --gradient-checkpointing --weight-decay 0.1",
    "bf16": f"train.teacher {TINY} {FEW} --precision bf16 --anneal none",
    "edm": f"train.teacher {TINY} {FEW} {EDM}",
    "eps": f"train.teacher {TINY} {FEW} --schedule linear-beta --parameterization eps",
    "unlabelled": f"train.teacher {TINY} {FEW} --no-labels",
    "stage1": f"train.stage1 --teacher teacher {FEW}",
    "fixed": f"train.stage1 --teacher teacher {FEW} --guidance-range 1 1 --no-clip --weight snr_trunc",
    "stage2": f"train.stage2 --teacher stage1 {ROUNDS}",
    "stochastic": f"train.stage2 --teacher stage1 {ROUNDS} --sampler stochastic",
    "plain": f"train.stage2 --teacher unlabelled {ROUNDS}",
    "encoder": f"train.encoder --teacher stage1 {ROUNDS}",
    "two_student": f"train.two_student --teacher teacher {ROUNDS}",
    "sid": f"train.sid --teacher stage1 {FEW} --data None --score-num 16 --ema 0.9",
}
MODELS = [name for name in RUNS if name not in ("stage2", "stochastic", "plain", "encoder", "two_student")]
MODELS += [f"{name}/steps-{n}" for name in ("stage2", "stochastic", "plain", "encoder", "two_student") for n in (2, 1)]
GRIDS = {
    "ddim": "--checkpoint teacher --steps 3 --guidance 0 1 --num 10 --seed 5",
    "ddim-stage1": "--checkpoint stage1 --steps 3 --guidance-range 0 4 --num 11 --batch-size 4",
    "ddim-student": "--checkpoint stage2/steps-2 --guidance 2 --num 10",
    "stochastic-teacher": "--checkpoint eps --sampler stochastic --steps 3 --guidance 1 --num 10",
    "stochastic-student": "--checkpoint stochastic/steps-2 --guidance 1 --num 10 --batch-size 3",
    "ancestral": "--checkpoint teacher --sampler ancestral --steps 3 --variance 0.3 --guidance 1 --num 10 --no-clip",
    "heun": "--checkpoint edm --sampler heun --steps 3 --guidance 0 1 --num 10",
    "one_step": "--checkpoint sid --guidance 0 4 --num 10",
    "bf16": "--checkpoint bf16 --steps 2 --precision bf16 --num 10",
    "unlabelled": "--checkpoint plain/steps-1 --num 10",
}


def run(line: str) -> str:
    """Be `python -m LINE`, and return what it printed."""
    words, printed = line.split(), io.StringIO()
    before = sys.argv
    sys.argv = words
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{line}: {printed.getvalue()}"
    finally:
        sys.argv = before
    return printed.getvalue()


def weights_of(file: Path) -> dict:
    """Hash and a few numbers of a file of tensors."""
    from safetensors.torch import load_file

    tensors, digest = load_file(file), hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    largest = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))[:4]
    numbers = {name: [float(tensors[name].norm()), *map(float, tensors[name].flatten()[:4])] for name in largest}
    return {"sha256": digest.hexdigest(), "numbers": numbers}


def picture_of(file: Path) -> dict:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(file))
    some = pixels.reshape(-1)[:: max(1, pixels.size // 64)][:64]
    return {
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "size": list(pixels.shape),
        "numbers": some.tolist(),
    }


def log_of(file: Path) -> list[dict]:
    measured = ("time", "images_per_second", "memory_gb")
    return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in file.read_text().splitlines()]


def where() -> dict:
    """What exact equality depends on."""
    import torch

    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = " ".join(
            sorted({line.partition(":")[2].strip() for line in lines if line.startswith(("model", "flags"))})
        )
    return {"torch": torch.__version__, "cpu": hashlib.sha256(cpu.encode()).hexdigest()[:16]}


def record() -> dict:
    """Run everything in the present, empty folder."""
    import torch

    torch.set_num_threads(1)
    found = {"where": where(), "weights": {}, "logs": {}, "samples": {}, "grids": {}}
    for name, line in RUNS.items():
        run(f"{line} --out {name}")
        found["logs"][name] = log_of(Path(name, "metrics.jsonl"))
        for picture in sorted(Path(name).glob("samples-*.png")):
            found["samples"][str(picture)] = picture_of(picture)
    for name in MODELS:
        folder = Path(name) if "/" in name else max(Path(name).glob("checkpoint-*"))
        found["weights"][name] = weights_of(folder / "model.safetensors")
    for name, line in GRIDS.items():
        run(f"fastdiff.sample {line} --device cpu --out {name}.png")
        found["grids"][name] = picture_of(Path(f"{name}.png"))
    run("fastdiff.sample --checkpoint teacher --steps 8 --num 4 --device cpu --out originals")
    run(
        "fastdiff.translate --encoder encoder/steps-2 --decoder stage2/steps-2 --images originals --from-label 1 "
        "--to-label 8 --guidance 0 1 --device cpu --out translated"
    )
    found["grids"]["encode"] = picture_of(Path("translated/strip.png"))
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTDIFF_CACHE"] = f"{folder}/cache"
        os.environ["MPLBACKEND"] = "Agg"
        Path(folder, "work").mkdir()
        os.chdir(f"{folder}/work")
        target.write_text(json.dumps(record(), indent=None, separators=(",", ":"), sort_keys=True) + "\n")
