"""`fastdiff.translate`: pictures of one domain become ones of another; what does not fit together is refused."""

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import command_lines
import numpy as np
import pytest
import torch
from command_lines import assert_refused
from common import TINY, randomize, snapshot
from PIL import Image
from torch import nn

from fastdiff import checkpoint, data, samplers
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided, with_guidance
from fastdiff.schedule import CosineSchedule, KarrasSchedule
from fastdiff.translate import Pair, load_picture, rmse

run, elsewhere = command_lines.run, command_lines.elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

LIMITS = (0.0, 4.0)
ENCODER = {"kind": "encoder", "guidance_range": LIMITS, "steps": 4, "sampler": "encode"}
DECODER = {"kind": "stage2", "guidance_range": LIMITS, "steps": 4}
TWO_CLASSES = {"classes": 2, "class_names": ("cat", "dog")}


def save_model(folder, *, classes=10, channels=1, size=(8, 8), scale=0.2, seed=0, **config):
    """A checkpoint with random weights."""
    has_input = config.get("guidance_range") is not None
    unet = replace(TINY, num_classes=classes, image_channels=channels, image_size=size, guidance_input=has_input)
    config = {"data": "digits"} | config
    checkpoint.save(folder, randomize(Denoiser(DenoiserConfig(unet, **config)), scale=scale, seed=seed))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "encoder", **ENCODER)
    save_model(folder / "decoder", seed=1, **DECODER)
    save_model(folder / "teacher", seed=2)
    save_model(folder / "stage1", seed=3, kind="stage1", guidance_range=LIMITS)
    save_model(folder / "stochastic", **(DECODER | {"sampler": "stochastic"}))
    save_model(folder / "plain", classes=0, seed=4)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures of digits."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(data.load("digits", "test").images[:3]):
        Image.fromarray(image[0]).save(folder / f"digit-{index}.png")
    return folder


@pytest.fixture
def translate(run, models):
    """Translate with the distilled pair, from class 3 to class 5; later options replace these."""

    def translate_(*arguments, encoder=models / "encoder", decoder=models / "decoder", labels=(3, 5)):
        line = ["--encoder", encoder, "--decoder", decoder, "--images", "pictures", "--out", "out", "--device", "cpu"]
        for option, label in zip(("--from-label", "--to-label"), labels, strict=True):
            line += [] if label is None else [option, label]
        return run("translate", *line, *arguments)

    return translate_


def images(folder, count=3):
    """The pictures of a folder as the models take them."""
    read = [np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())[:count]]
    return data.to_float(torch.from_numpy(np.stack(read))[:, None])


def written(names):
    return np.stack([np.asarray(Image.open(Path("out") / name)) for name in names])


def report():
    found = json.loads(Path("out/report.json").read_text())
    return found["images"], found["rows"]


def load(folder):
    return with_guidance(checkpoint.load(folder))


# --- what it makes ---


def test_pictures_strip_and_report(translate, models, pictures):
    result = translate("--guidance", 0, 1.5, 4)
    assert result.code == 0 and not result.err, result.err
    expected = {f"digit-{index}-w{w}.png" for index in range(3) for w in ("0", "1.5", "4")}
    assert {path.name for path in Path("out").iterdir()} == expected | {"strip.png", "report.json"}
    pair = Pair(load(models / "encoder"), load(models / "decoder"), 4, 4)
    source, target = torch.full((3,), 3), torch.full((3,), 5)
    columns = [images(pictures)]
    for w in (0, 1.5, 4):
        columns.append(pair.translate(columns[0], source, target, w))
        found = written([f"digit-{index}-w{w:g}.png" for index in range(3)])
        assert (found == data.to_uint8(columns[-1])[:, 0].numpy()).all()
    with Image.open("out/strip.png") as strip:  # a row a picture: the original, then each w; 8 pixels enlarged 3 times
        assert strip.size == (4 * 25 + 1, 3 * 25 + 1)
        pixels = np.asarray(strip)[..., 0]
    for i, column in enumerate(columns):
        tiles = [pixels[1 + 25 * row : 25 + 25 * row : 3, 1 + 25 * i : 25 + 25 * i : 3] for row in range(3)]
        assert (np.stack(tiles) == data.to_uint8(column)[:, 0].numpy()).all()
    count, rows = report()
    assert count == 3 and [(row["model"], row["guidance"], row["calls"]) for row in rows] == [
        ("pair", w, 8) for w in (0, 1.5, 4)
    ]
    for row in rows:
        error = rmse(pair.translate(columns[0], source, source, row["guidance"]), columns[0])
        assert row["reconstruction_rmse"] == pytest.approx(error, abs=1e-5) and error > 0.01


def test_the_undistilled_pair_is_compared_at_as_many_calls(translate, models, pictures):
    result = translate("--guidance", 0, 1, "--compare", models / "teacher")
    assert result.code == 0, result.err
    _, rows = report()
    assert [(row["model"], row["guidance"], row["calls"]) for row in rows] == [
        ("pair", 0, 8),
        ("undistilled", 0, 8),
        ("pair", 1, 8),
        ("undistilled", 1, 8),
    ]
    assert "w = 1: undistilled, 8 calls, reconstruction error" in result.out
    teacher, source = load(models / "teacher"), torch.full((3,), 3)
    for row, steps in ((rows[1], 4), (rows[3], 2)):  # w > 0 takes this teacher two calls a step
        pair = Pair(teacher, teacher, steps, steps)
        error = rmse(pair.translate(images(pictures), source, source, row["guidance"]), images(pictures))
        assert row["reconstruction_rmse"] == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("name", ["teacher", "stage1"])
def test_undistilled_models_encode_and_decode_with_ddim(translate, models, pictures, name):
    of = models / name
    assert translate(encoder=of, decoder=of).code == 0
    assert report()[1][0]["calls"] == 2 * 64
    given = ["--encoder-steps", 3, "--decoder-steps", 2, "--guidance", 1, "--overwrite"]
    assert translate(*given, encoder=of, decoder=of).code == 0
    assert report()[1][0]["calls"] == 5 * (2 if name == "teacher" else 1)


def test_one_picture_is_translated(translate, models, pictures):
    assert translate("--images", pictures / "digit-1.png").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["digit-1-w0.png", "report.json", "strip.png"]


def test_the_result_does_not_depend_on_the_batch(translate, pictures):
    assert translate("--guidance", 1).code == 0
    names = [f"digit-{index}-w1.png" for index in range(3)]
    whole = written(names).astype(int)
    assert translate("--guidance", 1, "--batch-size", 2, "--overwrite").code == 0
    assert np.abs(written(names) - whole).max() <= 1


def test_a_class_becomes_another_in_one_model(translate, pictures):
    """The class and the strength are given to the model, for encoding and for decoding."""
    found = []
    for labels, w in (((3, 5), 2), ((3, 3), 2), ((4, 5), 2), ((3, 5), 4)):
        assert translate("--guidance", w, "--overwrite", labels=labels).code == 0
        found.append(written([f"digit-{index}-w{w}.png" for index in range(3)]))
    assert all((found[0] != other).any() for other in found[1:])


def test_pictures_of_another_size_or_mode_are_changed_when_asked(translate, tmp_path):
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "pictures/a.jpg")
    Image.fromarray(noise).convert("P").save(tmp_path / "pictures/b.png")
    Image.fromarray(noise[:8, :8, 0]).save(tmp_path / "pictures/c.BMP")
    assert_refused(translate(), "pictures/a.jpg", "30×20 RGB", "8×8 L", "--resize")
    assert not (tmp_path / "out").exists()
    assert translate("--resize").code == 0
    assert written(["a-w0.png", "b-w0.png", "c-w0.png"]).shape == (3, 8, 8)
    kept = load_picture(tmp_path / "pictures/c.BMP", (1, 8, 8), resize=True)
    assert (data.to_uint8(kept[None])[0, 0].numpy() == noise[:8, :8, 0]).all()
    colour = load_picture(tmp_path / "pictures/a.jpg", (3, 20, 30), resize=False)
    assert colour.shape == (3, 20, 30) and colour.abs().max() <= 1


# --- two domains ---


def test_two_models_are_two_domains_each_with_its_own_classes(translate, models, tmp_path, pictures):
    save_model(tmp_path / "animals", **(DECODER | TWO_CLASSES))
    result = translate("--guidance", 1, decoder=tmp_path / "animals", labels=(7, 1))
    assert result.code == 0, result.err
    z = samplers.encode(
        load(models / "encoder"), images(pictures), torch.full((3,), 7), 1.0, 4, schedule=CosineSchedule()
    )
    z = samplers.ddim(load(tmp_path / "animals"), z, torch.full((3,), 1), 1.0, 4, schedule=CosineSchedule(), clip=None)
    names = [f"digit-{index}-w1.png" for index in range(3)]
    assert (written(names) == data.to_uint8(z.detach())[:, 0].numpy()).all()
    assert "reconstruction" not in result.out and report() == (3, [])  # there is no way back to the pictures
    assert_refused(
        translate("--overwrite", decoder=tmp_path / "animals", labels=(7, 2)), "--to-label 2", "animals", "2 classes"
    )
    other = save_model(tmp_path / "from", **(ENCODER | TWO_CLASSES))
    assert_refused(translate("--overwrite", encoder=other, labels=(7, 2)), "--from-label 7", other, "2 classes")


@pytest.mark.parametrize("plain", ["encoder", "decoder"])
def test_one_of_two_domains_may_have_no_classes(translate, models, pictures, plain):
    labels = (None, 5) if plain == "encoder" else (3, None)
    result = translate(**{plain: models / "plain"}, labels=labels)
    assert result.code == 0, result.err


def test_two_models_without_classes_need_no_label(translate, models, tmp_path, pictures):
    domains = {"encoder": models / "plain", "decoder": save_model(tmp_path / "other", classes=0)}
    result = translate(**domains, labels=(None, None))
    assert result.code == 0, result.err
    result = translate("--guidance", 1, "--overwrite", **domains, labels=(None, None))
    assert_refused(result, "unconditional", "use 0")


NAMES = ("zero", "one")


@pytest.mark.parametrize(
    ("encoder", "decoder", "classes", "same"),
    [
        ({"data": "cats"}, {"data": "dogs"}, 0, False),
        ({"data": "cats"}, {"data": "cats"}, 0, True),
        ({"data": ""}, {"data": ""}, 0, False),  # nothing says that they are one
        ({"data": "print", "class_names": NAMES}, {"data": "ink", "class_names": NAMES}, 2, False),
        ({"data": "print", "class_names": NAMES}, {"data": "print", "class_names": NAMES}, 2, True),
        ({"data": "", "class_names": NAMES}, {"data": "ink", "class_names": NAMES}, 2, True),
        ({"data": "", "class_names": NAMES}, {"data": "ink", "class_names": NAMES[::-1]}, 2, False),
    ],
)
def test_pictures_of_another_domain_are_no_reconstruction(
    translate, tmp_path, pictures, encoder, decoder, classes, same
):
    """Two models without classes were once taken for one domain, and so were two with classes of the same names."""
    save_model(tmp_path / "a", classes=classes, **encoder)
    save_model(tmp_path / "b", classes=classes, seed=1, **decoder)
    labels = (0, 1) if classes else (None, None)
    steps = "--encoder-steps", 2, "--decoder-steps", 2
    result = translate(*steps, encoder=tmp_path / "a", decoder=tmp_path / "b", labels=labels)
    assert result.code == 0 and ("reconstruction" in result.out) == same, result.err
    assert [row["model"] for row in report()[1]] == ["pair"] * same
    assert translate(*steps, "--overwrite", encoder=tmp_path / "a", decoder=tmp_path / "a", labels=labels).code == 0
    assert [row["model"] for row in report()[1]] == ["pair"]


# --- Pair ---


@pytest.mark.parametrize("name", ["decoder", "stage1"])
def test_a_pair_encodes_and_then_decodes(models, name):
    """Written out for different steps, labels and strengths, in one batch; the limit is for undistilled decoders."""
    encoder, decoder = load(models / "teacher"), load(models / name)
    assert isinstance(encoder, Guided)
    limited = name == "stage1"
    x = 1.5 * data.to_float(torch.from_numpy(data.load("digits", "test").images[:4]))  # so that the limit is reached
    source, target, seen = torch.tensor([0, 3, 9, 5]), torch.tensor([1, 4, 0, 5]), []
    for clip in (True, False):
        found = Pair(encoder, decoder, 3, 2).translate(x, source, target, 1.5, clip=clip)
        with torch.no_grad():
            z = samplers.encode(encoder, x, source, 1.5, 3, schedule=CosineSchedule())
            limit = 1.0 if clip and limited else None
            z = samplers.ddim(decoder, z, target, 1.5, 2, schedule=CosineSchedule(), clip=limit)
        assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
        torch.testing.assert_close(found, z)
        seen.append(found)
    assert (seen[0].abs().max() <= 1 + 1e-6) == limited and (seen[0] != seen[1]).any() == limited


def test_calls_are_counted_by_the_network_too(models):
    teacher, stage1, encoder = (load(models / name) for name in ("teacher", "stage1", "encoder"))
    x, label = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    for pair in (Pair(teacher, teacher, 3, 2), Pair(stage1, stage1, 3, 2)):
        for w in (0.0, 2.0):
            before = pair.encoder.network_rows
            pair.translate(x, label, label, w)
            assert pair.encoder.network_rows - before == 2 * pair.calls(w)
    distilled = Pair(encoder, stage1, 8, 4)
    for w, factor, steps in ((0.0, 1, (8, 4)), (0.0, 2, (16, 8)), (1.0, 1, (4, 2)), (1.0, 2, (8, 4))):
        other = distilled.undistilled(teacher, w, factor=factor)
        assert (other.encoder_steps, other.decoder_steps) == steps
        assert other.calls(w) == factor * distilled.calls(w) and other.encoder is other.decoder is teacher
    assert Pair(encoder, stage1, 1, 1).undistilled(teacher, 1.0).encoder_steps == 1  # there is no half step


class Gaussian(nn.Module):
    """The exact velocity of pixels N(0.2, 0.4²)."""

    schedule, mean, std = CosineSchedule(), 0.2, 0.4

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z, angle, label, guidance):
        cos, sin = (f(angle)[:, None, None, None] for f in (torch.cos, torch.sin))
        scaled = (z - cos * self.mean) / ((cos * self.std) ** 2 + sin**2)
        return cos * sin * scaled - sin * (self.mean + cos * self.std**2 * scaled)


def test_reconstruction_of_an_exact_model_approaches_the_picture_at_first_order():
    model = Gaussian()
    x = 0.2 + 0.4 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = [rmse(Pair(model, model, n, n).translate(x, None, None, 0.0, clip=False), x) for n in (16, 32, 64, 128)]
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(errors)), errors
    assert errors[-1] < 0.02


# --- mistakes ---


def test_an_encoder_and_a_decoder_of_other_sizes_are_refused(translate, models, tmp_path, pictures):
    save_model(tmp_path / "colour", channels=3, **DECODER)
    save_model(tmp_path / "large", size=(16, 16))
    for name, size in (("colour", "3×8×8"), ("large", "1×16×16")):
        result = translate(decoder=tmp_path / name)
        assert_refused(result, tmp_path / name, size, models / "encoder", "1×8×8")
        assert_refused(translate("--compare", tmp_path / "large"), tmp_path / "large", "1×16×16", "1×8×8")
    assert not Path("out").exists()


@pytest.mark.parametrize("schedule", [KarrasSchedule(), CosineSchedule(log_snr_limit=15.0)])
def test_an_encoder_and_a_decoder_of_other_schedules_are_refused(translate, models, tmp_path, pictures, schedule):
    save_model(tmp_path / "other", schedule=schedule, **DECODER)
    assert_refused(translate(decoder=tmp_path / "other"), tmp_path / "other", models / "encoder", "noise schedule")
    save_model(tmp_path / "undistilled", schedule=schedule)
    assert_refused(translate("--compare", tmp_path / "undistilled"), tmp_path / "undistilled", "noise schedule")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((10, 5), ["--from-label 10", "10 classes, 0 to 9"]),
        ((3, -1), ["--to-label -1", "10 classes, 0 to 9"]),
        ((None, 5), ["10 classes", "--from-label"]),
        ((3, None), ["10 classes", "--to-label"]),
    ],
)
def test_labels_that_the_models_do_not_have_are_refused(translate, pictures, labels, said):
    assert_refused(translate(labels=labels), *said)
    assert not Path("out").exists()


def test_classes_are_named_by_each_model_in_its_own_order(translate, models, tmp_path, pictures):
    """A name may have another number in the encoder, in the decoder and in the model to compare with."""
    names = tuple("0123456789")
    for order in (names, names[::-1]):
        for kind, config in (("from", ENCODER), ("to", DECODER), ("teacher", {})):
            save_model(tmp_path / f"{kind}{order[0]}", class_names=order, **config)
    drawn = []
    for other in "09":  # weights and numbers are the same, names are not
        labels = ("3", "8") if other == "0" else ("6", "1")
        of = {"encoder": tmp_path / f"from{other}", "decoder": tmp_path / f"to{other}", "labels": labels}
        result = translate("--guidance", 1, "--compare", tmp_path / f"teacher{other}", "--overwrite", **of)
        assert result.code == 0, result.err
        drawn.append((written([f"digit-{index}-w1.png" for index in range(3)]).tolist(), report()))
    assert drawn[0] == drawn[1]
    assert translate("--guidance", 1, "--overwrite", decoder=tmp_path / "to9", labels=(3, "cat")).code == 2
    mixed = {"encoder": tmp_path / "from0", "decoder": tmp_path / "to9", "labels": ("3", "1")}
    assert translate("--guidance", 1, "--compare", tmp_path / "teacher9", "--overwrite", **mixed).code == 0
    assert written([f"digit-{index}-w1.png" for index in range(3)]).tolist() == drawn[0][0]
    assert "classes: 3 (3) -> 8 (1)" in translate("--overwrite", **mixed).out


@pytest.mark.parametrize(("labels", "option"), [((0, None), "--from-label 0"), ((None, 0), "--to-label 0")])
def test_labels_for_models_without_classes_are_refused(translate, models, pictures, labels, option):
    result = translate(encoder=models / "plain", decoder=models / "plain", labels=labels)
    assert_refused(result, option, models / "plain", "no classes")


def test_a_strength_outside_the_trained_range_is_one_warning_a_model(translate, models, tmp_path, pictures):
    save_model(tmp_path / "narrow", **(ENCODER | {"guidance_range": (0.0, 1.0)}))
    result = translate("--guidance", 2, encoder=tmp_path / "narrow")
    assert result.code == 0 and result.err.count("\n") == 1
    assert result.err.startswith("warning: ") and "guidance 2" in result.err and "[0, 1]" in result.err
    result = translate("--guidance", 5, "--overwrite")
    assert result.code == 0
    assert result.err.splitlines() == [
        f"warning: guidance 5 is outside [0, 4], where {models / name} was trained" for name in ("encoder", "decoder")
    ]


def test_steps_that_a_model_was_not_trained_for_are_a_warning(translate, models, pictures):
    result = translate("--encoder-steps", 4, "--decoder-steps", 4)
    assert result.code == 0 and not result.err
    result = translate("--encoder-steps", 8, "--overwrite")
    assert result.code == 0 and report()[1][0]["calls"] == 8 + 4
    for text in ("warning: ", f"--encoder {models / 'encoder'}", "trained for 4 steps", "with 8"):
        assert text in result.err
    result = translate("--decoder-steps", 2, "--overwrite")
    assert result.err.startswith(f"warning: --decoder {models / 'decoder'}") and result.err.count("\n") == 1
    result = translate("--encoder-steps", 3, "--overwrite", encoder=models / "teacher")  # takes any number
    assert result.code == 0 and not result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--guidance", -1], ["--guidance", "-1"]),
        (["--guidance", 1e38], ["--guidance", "1e+38", "at most 10000"]),
        (["--guidance", 0, "nan"], ["--guidance", "nan"]),
        (["--guidance"], ["--guidance", "at least one"]),
        (["--encoder-steps", 0], ["--encoder-steps", "0"]),
        (["--decoder-steps", -2], ["--decoder-steps", "-2"]),
        (["--batch-size", 0], ["--batch-size", "0"]),
        (["--device", "tpu"], ["--device tpu"]),
    ],
)
def test_numbers_without_sense_are_refused(translate, pictures, arguments, said):
    assert_refused(translate(*arguments), *said)
    assert not Path("out").exists()


def test_models_that_do_something_else_are_refused(translate, models, pictures):
    for given, said in [
        ({"encoder": models / "decoder"}, ["--encoder", models / "decoder", "stage2", "ddim", "train.encoder"]),
        ({"encoder": models / "stochastic"}, ["--encoder", "stage2", "stochastic", "train.encoder"]),
        ({"decoder": models / "stochastic"}, ["--decoder", models / "stochastic", "stochastic", "for ddim"]),
        ({"decoder": models / "encoder"}, ["--decoder", models / "encoder", "encode", "for ddim"]),
        ({"decoder": models / "nowhere"}, ["nowhere", "no checkpoint"]),
    ]:
        assert_refused(translate(**given), *said)
    assert_refused(translate("--compare", models / "decoder"), "--compare", models / "decoder", "4 steps", "teacher")
    assert_refused(translate("--compare", models / "encoder"), "--compare", models / "encoder")
    assert not Path("out").exists()


def test_a_folder_without_pictures_is_refused(translate, tmp_path):
    assert_refused(translate("--images", "nowhere"), "--images nowhere", "no pictures")
    (tmp_path / "empty").mkdir()
    assert_refused(translate("--images", "empty"), "--images empty", "no pictures")
    (tmp_path / "empty/notes.txt").write_text("mine")
    assert_refused(translate("--images", "empty"), "--images empty", ".png", ".jpg")
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["digit-1-w0.png", "strip.png"])
def test_an_original_is_never_replaced(translate, pictures, name):
    """With --overwrite, digit-1-w0.png was once written over an original of that name."""
    Image.open(pictures / "digit-1.png").save(pictures / name)
    before = snapshot(pictures)
    result = translate("--out", "pictures", "--overwrite")
    assert_refused(result, "--out pictures", name, "another folder")
    assert snapshot(pictures) == before
    (pictures / name).unlink()
    assert translate("--out", "pictures", "--overwrite").code == 0


def test_strengths_that_differ_late_have_pictures_of_their_own(translate, pictures):
    assert translate("--images", "pictures/digit-0.png", "--guidance", 0.12345678, 0.12345679).code == 0
    names = ["digit-0-w0.12345678.png", "digit-0-w0.12345679.png"]
    assert sorted(path.name for path in Path("out").glob("digit*")) == names


def test_models_of_what_no_picture_file_holds_are_refused(translate, tmp_path, pictures):
    save_model(tmp_path / "four", channels=4)
    result = translate(encoder=tmp_path / "four", decoder=tmp_path / "four")
    assert_refused(result, tmp_path / "four", "4×8×8", "1 or 3 channels")


def test_two_pictures_of_one_name_are_refused(translate, pictures):
    Image.open(pictures / "digit-1.png").save(pictures / "digit-1.bmp")
    assert_refused(translate(), "--images pictures", "several pictures called digit-1")
    assert not Path("out").exists()


def test_folders_between_the_pictures_are_passed_over(translate, pictures):
    (pictures / "a.png").mkdir()
    (pictures / "z.png").mkdir()
    result = translate()
    assert result.code == 0, result.err
    assert report()[0] == 3


def broken(kind):
    """A file that no decoder reads; Pillow raises another error for each kind."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "bmp" if kind == "too large" else "png")
    good = file.getvalue()
    middle = good.index(b"IDAT") if kind != "too large" else 0
    return {
        "text": b"not a picture",
        "empty": b"",
        "cut": good[: len(good) // 2],
        "no data": good[: middle + 8] + bytes(len(good) - middle - 8),
        "another chunk": good[:middle] + b"\x00\x01\x02\x03" + good[middle + 4 :],
        "a chunk of another length": good[: middle - 4] + (10).to_bytes(4, "big") + good[middle:],
        "too large": good[:18] + (30_000).to_bytes(4, "little") * 2 + good[26:],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["text", "empty", "cut", "no data", "another chunk", "a chunk of another length", "too large"]
)
def test_a_picture_that_cannot_be_read_is_refused(translate, tmp_path, kind):
    (tmp_path / "broken.png").write_bytes(broken(kind))
    for resize in ([], ["--resize"]):
        assert_refused(translate("--images", "broken.png", *resize), "broken.png")
    assert not Path("out").exists()


def test_pictures_of_more_than_eight_bits_are_not_cut_off(translate, tmp_path):
    """Bringing 16 bits to 8 by limiting them to 255 makes almost everything white."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    result = translate("--images", "deep.png", "--resize")
    if result.code == 0:
        found = load_picture(tmp_path / "deep.png", (1, 8, 8), resize=True)
        torch.testing.assert_close(found.flatten(), torch.linspace(-1, 1, 64), atol=0.02, rtol=0)
    else:
        assert_refused(result, "deep.png", "8 bits")


def test_an_existing_output_is_kept_unless_asked(translate, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/digit-0-w0.png").write_text("mine")
    before = snapshot(tmp_path / "out")
    assert_refused(translate(), "--out out", "--overwrite")
    assert snapshot(tmp_path / "out") == before
    assert translate("--overwrite").code == 0
    assert written(["digit-0-w0.png"]).shape == (1, 8, 8)
    (tmp_path / "file").write_text("mine")
    assert_refused(translate("--out", "file", "--overwrite"), "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert_refused(translate("--out", "file/below"), "file")


def test_the_pictures_survive_an_output_beside_them(translate, pictures):
    """Such as 000000.png of fastdiff.sample, which a new run of that command would remove."""
    for index in range(3):
        (pictures / f"digit-{index}.png").rename(pictures / f"{index:06d}.png")
    before = snapshot(pictures)
    translate("--out", "pictures", "--overwrite")
    assert before.items() <= snapshot(pictures).items()
