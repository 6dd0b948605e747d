"""Random models of every kind, and no pictures on the way."""

from dataclasses import replace

import pytest
from common import TINY, save_model
from sid_runs import LIMITS, REAL_PREVIEW, train

from fastdiff.schedule import KarrasSchedule, LinearBetaSchedule
from train import loop


@pytest.fixture(autouse=True)
def no_preview(monkeypatch):
    monkeypatch.setattr(loop, "preview", lambda *args, **kwargs: None)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Random models of every kind, by name."""
    folder, taught = tmp_path_factory.mktemp("models"), {"unet": replace(TINY, guidance_input=True)}
    save_model(folder / "teacher")
    save_model(folder / "edm", schedule=KarrasSchedule(), parameterization="edm")
    save_model(folder / "linear", schedule=LinearBetaSchedule(), parameterization="eps")
    save_model(folder / "unconditional", unet=replace(TINY, num_classes=0))
    save_model(folder / "guided", **taught, kind="stage1", guidance_range=LIMITS)
    save_model(folder / "one strength", kind="stage1", guidance_range=(2.0, 2.0))
    save_model(folder / "stage2", **taught, kind="stage2", guidance_range=LIMITS, steps=4)
    save_model(folder / "encoder", **taught, kind="encoder", guidance_range=LIMITS, steps=4, sampler="encode")
    save_model(folder / "two_student", kind="two_student", steps=4)
    save_model(folder / "sid", kind="sid", steps=1, sampler="one_step", sigma_init=2.5, guidance_range=(0.0, 0.0))
    return folder


@pytest.fixture(scope="session")
def made(runs, extractor, tmp_path_factory):
    """A guided run on the shared stage 1, scored on digits. Read it only."""
    out = tmp_path_factory.mktemp("sid") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preview", lambda *args: REAL_PREVIEW(*args, columns=2))
        train(runs.stage1, out, data="digits", score_num=32, lr=1e-3, keep=1, score_guidance=(0.0, 4.0, 9.0))
    return out
