"""Images that are NaN or infinite are told of, and never scored."""

import math
from pathlib import Path

import command_lines
import pytest
import torch
from command_lines import assert_refused
from common import TINY, randomize

from fastdiff import checkpoint, data, metrics, translate
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.evaluate import Reference, evaluate
from fastdiff.generate import Sampling, generate

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def broken(value=math.nan, label=3, **config):
    """A model whose images of one class are not finite."""
    model = randomize(Denoiser(DenoiserConfig(TINY, **config)).eval())
    with torch.no_grad():
        model.network.label_embedding.weight[label] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_are_told_of_with_their_share(capsys, value):
    images = torch.cat(list(generate(broken(value), 25, Sampling(steps=2, batch_size=8))))
    assert data.are_finite(images).tolist() == [number % 10 != 3 for number in range(25)]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("warning: 3 of 25 images (12.0%) are not finite")
    list(generate(broken(0.0), 25, Sampling(steps=2)))
    assert capsys.readouterr().err == ""


def test_no_score_is_made_of_them(extractor):
    """They were once scored as if they were black."""
    dataset = data.load("digits")
    reference = Reference(dataset, extractor, metrics.Moments(), 0.0)
    with pytest.raises(UserError, match=r"\d+ of 20 images of mine at w = 1 are not finite"):
        evaluate(broken(), reference, Sampling(steps=1, guidance=1.0), name="mine", num=20)
    images = torch.zeros(4, 1, 8, 8)
    images[1, 0, 2, 2] = math.inf
    with pytest.raises(UserError, match="1 of 4 images are not finite"):
        extractor.add(metrics.Moments(), images)


@pytest.mark.parametrize("command", ["evaluate", "stage1"])
def test_weights_that_are_not_finite_are_refused_at_once(run, monkeypatch, command):
    monkeypatch.setattr(Reference, "load", None)
    checkpoint.save("model", broken())
    model = {"evaluate": "--checkpoint", "stage1": "--teacher"}[command]
    result = run(command, model, "model", "--out", "out", "--device", "cpu")
    assert_refused(result, "model has weights that are not finite (first in label_embedding.weight)")
    assert not Path("out").exists()


def test_translations_are_told_of(capsys):
    model = broken(steps=None)
    pair = translate.Pair(model, model, 1, 1)
    labels = torch.tensor([2, 3, 4, 3])
    pair.translate(torch.zeros(4, 1, 8, 8), labels, labels, 0.0)
    assert capsys.readouterr().err.startswith("warning: 2 of 4 translated images at w = 0 are not finite")
