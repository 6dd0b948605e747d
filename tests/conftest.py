"""What the tests share: an own cache, and one tiny run of each recipe."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastdiff import metrics
from fastdiff.denoiser import Denoiser
from fastdiff.unet import UNetConfig
from train import stage1, stage2, teacher

TINY = UNetConfig((8, 8), 1, 10, channels=8, channel_mult=(1,), blocks=1, middle_attention=False)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache, and tiny networks do not wait for threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        torch.set_num_threads(1)
        yield


@dataclass(frozen=True)
class Runs:
    """The folders of a teacher, its stage-1 student (w in [0, 4]) and the rounds 4 -> 2 -> 1 of stage 2."""

    teacher: Path
    stage1: Path
    stage2: Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory, own_cache) -> Runs:
    """Read them only: all tests share them."""
    folder = tmp_path_factory.mktemp("runs")
    made = Runs(folder / "teacher", folder / "stage1", folder / "stage2")
    teacher.train(teacher.Options(out=made.teacher, unet=TINY, updates=60, batch_size=16, device="cpu"))
    stage1.train(stage1.Options(out=made.stage1, teacher=made.teacher, updates=20, batch_size=16, device="cpu"))
    stage2.train(stage2_options(made.stage1, made.stage2))
    return made


def stage2_options(of: Path, out: Path, **changes) -> stage2.Options:
    tiny = {"start_steps": 4, "updates": 6, "last_updates": 8, "save_every": 4, "batch_size": 16, "device": "cpu"}
    return stage2.Options(teacher=of, out=out, **(tiny | changes))


@pytest.fixture(scope="session")
def extractor(own_cache) -> metrics.Extractor:
    """The feature extractor of digits; training it takes seconds, once a session."""
    return metrics.load_extractor("digits")


def randomize(denoiser: Denoiser, *, scale: float = 0.3, seed: int = 0) -> Denoiser:
    """Random values in every parameter, in place, so that no branch is zero as it is in a new network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return denoiser


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, to see whether anything was touched."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
