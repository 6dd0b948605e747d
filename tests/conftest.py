"""What the tests share: an own cache, and one tiny run of each recipe."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from common import TINY, stage2_options

from fastdiff import metrics
from train import stage1, stage2, teacher


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


@pytest.fixture(scope="session")
def extractor(own_cache) -> metrics.Extractor:
    """The feature extractor of digits; training it takes seconds, once a session."""
    return metrics.load_extractor("digits")
