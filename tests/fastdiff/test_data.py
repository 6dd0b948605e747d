"""Every format is built here, byte by byte, and read back; every error must name what is wrong."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff.data import Batches, Dataset, load, to_float, to_uint8
from fastdiff.data.cifar import _CIFAR_INSIDE
from fastdiff.data.load import _DEBIAN
from fastdiff.errors import UserError


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test sees this machine's data, or leaves anything in its cache."""
    monkeypatch.delenv("FASTDIFF_DATA", raising=False)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_error(*parts, split="train", spec):
    """load(spec) must raise one UserError that names all the parts."""
    with pytest.raises(UserError) as caught:
        load(spec, split)
    for part in parts:
        assert str(part) in str(caught.value)


# --- digits ---


def test_digits_is_scaled_to_bytes():
    train = load("digits")
    assert train.shape == (1, 8, 8)
    assert train.class_names == tuple("0123456789") and train.num_classes == 10
    assert (train.name, train.split) == ("digits", "train")
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert train.images.min() == 0 and train.images.max() == 255
    assert len(np.unique(train.images)) == 17  # the levels 0..16
    image, label = train[3]
    assert image.shape == (1, 8, 8) and type(label) is int and label == train.labels[3]


def test_digits_splits_are_disjoint_complete_and_stratified():
    from sklearn.datasets import load_digits

    train, test = load("digits", "train"), load("digits", "test")
    together = np.concatenate([train.images, test.images])
    original = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    as_rows = [sorted(image.tobytes() for image in images) for images in (together, original)]
    assert as_rows[0] == as_rows[1]  # every image in one split, none in both
    everyone = np.bincount(train.labels) + np.bincount(test.labels)
    assert np.abs(np.bincount(test.labels) / everyone - 0.2).max() < 0.01


def test_digits_is_deterministic():
    assert load("digits").fingerprint == load("digits").fingerprint
    assert load("digits").fingerprint != load("digits", "test").fingerprint


# --- IDX ---


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, images, labels, prefix="train", separator="-", compressed=False):
    folder.mkdir(exist_ok=True)
    for content, kind, array in (("images", "idx3", images), ("labels", "idx1", labels)):
        name = f"{prefix}-{content}{separator}{kind}-ubyte"
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_is_read_and_padded(tmp_path, separator, compressed):
    images = random_bytes(5, 28, 28)
    labels = np.array([0, 3, 1, 2, 2])
    write_idx(tmp_path / "mine", images, labels, separator=separator, compressed=compressed)
    dataset = load(tmp_path / "mine")
    assert dataset.shape == (1, 32, 32)
    assert (dataset.images[:, 0, 2:-2, 2:-2] == images).all()
    assert dataset.images.sum() == images.sum()  # the border is black
    assert (dataset.labels == labels).all()
    assert dataset.class_names == ("0", "1", "2", "3") and dataset.name == "mine"


def test_idx_pads_odd_sides_and_leaves_multiples_alone(tmp_path):
    images = random_bytes(2, 16, 13)
    write_idx(tmp_path / "odd", images, np.array([0, 1]))
    dataset = load(tmp_path / "odd")
    assert dataset.shape == (1, 16, 16)
    assert (dataset.images[:, 0, :, 1:14] == images).all()


def test_idx_classes_agree_between_splits(tmp_path):
    write_idx(tmp_path / "mine", random_bytes(2, 8, 8), np.array([0, 9]))
    write_idx(tmp_path / "mine", random_bytes(2, 8, 8), np.array([1, 2]), prefix="t10k")
    assert load(tmp_path / "mine", "test").num_classes == load(tmp_path / "mine").num_classes == 10


def test_named_data_sets_are_found(tmp_path, monkeypatch):
    write_idx(tmp_path / "there-fashion", random_bytes(2, 8, 8), np.array([0, 9]))
    assert load(tmp_path / "there-fashion").class_names[9] == "Ankle boot"

    (tmp_path / "data").mkdir()
    write_idx(tmp_path / "data" / "mnist", random_bytes(1, 8, 8), np.array([4]))
    assert load("mnist").labels.tolist() == [4]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("FASTDIFF_DATA", str(tmp_path / "elsewhere"))
    write_idx(tmp_path / "elsewhere" / "mnist", random_bytes(1, 8, 8), np.array([7]))
    write_idx(tmp_path / "elsewhere" / "fashion-mnist", random_bytes(1, 8, 8), np.array([1]))
    assert load("mnist").labels.tolist() == [7]  # before ./data
    fashion = load("fashion-mnist")
    assert fashion.name == "fashion-mnist" and fashion.class_names[1] == "Trouser" and fashion.num_classes == 10


def test_idx_errors(tmp_path):
    folder = tmp_path / "fashion"
    write_idx(folder, random_bytes(2, 8, 8), np.array([0, 11]))
    labels = folder / "train-labels-idx1-ubyte"
    assert_error(labels, "11", "0 to 9", spec=folder)
    assert_error(folder, "'test'", "t10k", "'train'", spec=folder, split="test")
    assert_error(folder, "'val'", spec=folder, split="val")

    labels.write_bytes(idx(np.array([0, 1, 2])))
    assert_error(labels, "2 images", "3 labels", spec=folder)
    labels.write_bytes(idx(np.array([0, 1]))[:-1])
    assert_error(labels, "[2]", "holds 1", spec=folder)
    labels.write_bytes(b"not an idx file")
    assert_error(labels, "not an IDX file", spec=folder)
    labels.unlink()
    for content in (b"not gzip", gzip.compress(idx(np.array([0, 1])))[:-9]):
        (folder / "train-labels-idx1-ubyte.gz").write_bytes(content)
        assert_error(folder / "train-labels-idx1-ubyte.gz", spec=folder)


def test_idx_without_images_is_an_error(tmp_path):
    write_idx(tmp_path / "empty", np.zeros((0, 8, 8)), np.zeros(0))
    assert_error("'empty'", "(0, 1, 8, 8)", spec=tmp_path / "empty")


def test_real_fashion_mnist():
    if not _DEBIAN["fashion-mnist"].is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    test = load("fashion-mnist", "test")
    assert (len(test), test.shape, test.num_classes) == (10000, (1, 32, 32), 10)
    assert (np.bincount(test.labels) == 1000).all()
    assert test.images[:, :, :2].max() == 0 and test.images[:, :, 2:-2, 2:-2].max() == 255


# --- CIFAR-10 ---

STEMS = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def python2_pickle(images, labels):
    """The bytes Python 2 and its NumPy write for {"data": images, "labels": labels}, opcode by opcode."""

    def text(value):  # a Python 2 str
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + integer(images.shape[0]) + integer(images.shape[1]) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", images.nbytes) + images.tobytes() + b"tb"
    listed = b"](" + b"".join(integer(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def python3_pickle(images, labels):
    return pickle.dumps({b"data": images, b"labels": labels}, protocol=2)


def cifar_files(write_batch, end):
    """All files of one variant, with two images a batch, and what they hold."""
    images = random_bytes(len(STEMS), 2, 3072)
    labels = [[2 * number % 10, 9] for number in range(len(STEMS))]
    batches = zip(STEMS, images, labels, strict=True)
    files = {stem + end: write_batch(batch, listed) for stem, batch, listed in batches}
    if end:
        files["batches.meta.txt"] = "\n".join([*NAMES, ""]).encode()
    else:
        files["batches.meta"] = pickle.dumps({b"label_names": [name.encode() for name in NAMES]}, protocol=2)
    return files, images.reshape(-1, 2, 3, 32, 32), np.array(labels)


def binary_batch(images, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))


VARIANTS = {
    "binary": (binary_batch, ".bin"),
    "python 2": (python2_pickle, ""),
    "python 3": (python3_pickle, ""),
}


def write_folder(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, variant, packed):
    files, images, labels = cifar_files(*VARIANTS[variant])
    spec = tmp_path / "cifar.tar.gz" if packed else tmp_path / "cifar"
    (write_tar if packed else write_folder)(spec, files)
    before = sorted(tmp_path.rglob("*"))
    train, test = load(spec), load(spec, "test")
    assert (train.images == images[:5].reshape(-1, 3, 32, 32)).all()
    assert (train.labels == labels[:5].ravel()).all()
    assert (test.images == images[5]).all() and (test.labels == labels[5]).all()
    assert train.class_names == test.class_names == tuple(NAMES) and train.name == "cifar"
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


@pytest.mark.parametrize("inside", _CIFAR_INSIDE)
def test_cifar_is_found_by_name(tmp_path, inside):
    files, *_ = cifar_files(*VARIANTS["binary" if "bin" in inside else "python 2"])
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    (write_tar if inside.endswith(".gz") else write_folder)(folder / inside, files)
    assert len(load("cifar10")) == 10 and load("cifar10").name == "cifar10"


class Payload:
    """Unpickled without care, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("packed", [False, True])
def test_malicious_pickle_is_refused(tmp_path, protocol, packed):
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(trace), protocol))
    assert trace.exists()  # the payload works
    trace.rmdir()

    files, *_ = cifar_files(python2_pickle, "")
    files["data_batch_3"] = pickle.dumps({b"data": Payload(trace)}, protocol)
    spec = tmp_path / "cifar.tar.gz" if packed else tmp_path / "cifar"
    (write_tar if packed else write_folder)(spec, files)
    assert_error(spec / "data_batch_3", "mkdir", "trust", spec=spec)
    assert not trace.exists()


def test_harmless_callables_cannot_reach_others(tmp_path):
    """A dotted name or a codec must not lead from an allowed module to anything else."""
    for content in (
        b"cnumpy\nndarray.tofile\n.",
        b"c_codecs\ndecode\n.",
        b"cbuiltins\neval\n.",
        b"cos\nsystem\n.",
    ):
        files, *_ = cifar_files(python2_pickle, "")
        folder = tmp_path / content.hex()
        write_folder(folder, files | {"data_batch_1": content})
        assert_error(folder / "data_batch_1", "asks to run", spec=folder)


def test_cifar_errors(tmp_path):
    folder = tmp_path / "cifar"
    files, *_ = cifar_files(binary_batch, ".bin")
    write_folder(folder, files)
    assert_error(folder, "'val'", "'train', 'test'", spec=folder, split="val")

    batch = folder / "data_batch_2.bin"
    batch.write_bytes(binary_batch(random_bytes(1, 3072), [10]))
    assert_error(batch, "label 10", "0 to 9", spec=folder)
    batch.write_bytes(b"short")
    assert_error(batch, "5 bytes", spec=folder)
    batch.unlink()
    assert_error(folder, "data_batch_2.bin", "'train'", spec=folder)
    (folder / "test_batch.bin").unlink()
    assert_error(folder, "test_batch.bin", "'test'", spec=folder, split="test")

    (tmp_path / "torn.tar.gz").write_bytes(b"not an archive")
    assert_error(tmp_path / "torn.tar.gz", spec=tmp_path / "torn.tar.gz")
    write_tar(tmp_path / "other.tar.gz", {"readme": b"hello"})
    assert_error(tmp_path / "other.tar.gz", "data_batch_1", spec=tmp_path / "other.tar.gz")


@pytest.mark.parametrize(
    "content",
    [
        b"damaged",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}),  # float
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}),
    ],
)
def test_odd_cifar_pickles_are_errors(tmp_path, content):
    files, *_ = cifar_files(python2_pickle, "")
    write_folder(tmp_path / "cifar", files | {"data_batch_1": content})
    assert_error(tmp_path / "cifar" / "data_batch_1", spec=tmp_path / "cifar")


# --- Folders and zips of images ---


def write_image(path, shape=(4, 6, 3), seed=0):
    """A lossless image with random pixels; returns them."""
    pixels = random_bytes(*shape, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_classes(root, names, per_class, **options):
    """Numbered PNGs in one folder a class; the pixels by file."""
    files = [root / name / f"{number:03}.png" for name in names for number in range(per_class)]
    return {path: write_image(path, seed=seed, **options) for seed, path in enumerate(files)}


def test_image_folder_with_split_folders(tmp_path):
    train = write_classes(tmp_path / "pets" / "train", ["dog", "cat"], 2)
    test = write_classes(tmp_path / "pets" / "test", ["dog"], 1)
    (tmp_path / "pets" / "train" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / ".hidden").mkdir()
    (tmp_path / "pets" / "train" / ".hidden" / "x.png").write_bytes(b"")
    dataset = load(tmp_path / "pets")
    assert dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.shape == (3, 4, 6) and dataset.name == "pets"
    expected = [train[path].transpose(2, 0, 1) for path in sorted(train)]
    assert (dataset.images == np.stack(expected)).all()
    held_out = load(tmp_path / "pets", "test")
    assert held_out.class_names == ("cat", "dog") and held_out.labels.tolist() == [1]
    assert (held_out.images[0] == next(iter(test.values())).transpose(2, 0, 1)).all()
    assert_error(tmp_path / "pets", "'val'", "'train', 'test'", spec=tmp_path / "pets", split="val")


def test_val_folder_serves_as_test(tmp_path):
    write_classes(tmp_path / "pets" / "train", ["cat"], 2)
    write_classes(tmp_path / "pets" / "val", ["cat"], 1)
    assert load(tmp_path / "pets", "val").fingerprint == load(tmp_path / "pets", "test").fingerprint
    assert len(load(tmp_path / "pets", "val")) == 1


def test_image_folder_is_split_by_class(tmp_path):
    written = write_classes(tmp_path / "pets", ["cat", "dog"], 20)
    train, test = load(tmp_path / "pets"), load(tmp_path / "pets", "test")
    assert np.bincount(train.labels).tolist() == [18, 18] and np.bincount(test.labels).tolist() == [2, 2]
    seen = [image.transpose(1, 2, 0).tobytes() for part in (train, test) for image in part.images]
    assert sorted(seen) == sorted(pixels.tobytes() for pixels in written.values())
    by_pixels = {pixels.tobytes(): path.parent.name for path, pixels in written.items()}
    for image, label in (test[index] for index in range(len(test))):
        assert test.class_names[label] == by_pixels[image.transpose(1, 2, 0).tobytes()]


def test_flat_folder_is_unlabelled(tmp_path):
    for number in range(3):
        write_image(tmp_path / "flat" / f"{number}.png", seed=number)
    dataset = load(tmp_path / "flat")
    assert (len(dataset), dataset.num_classes, dataset.class_names) == (3, 0, ())
    assert dataset.labels.tolist() == [0, 0, 0]
    assert_error(tmp_path / "flat", "'test'", spec=tmp_path / "flat", split="test")


@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".JPEG", ".webp", ".bmp", ".gif"])
def test_every_image_format(tmp_path, ending):
    path = tmp_path / "flat" / f"image{ending}"
    path.parent.mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    dataset = load(tmp_path / "flat")
    assert dataset.shape == (3, 8, 8)
    assert np.abs(dataset.images[0].mean((1, 2)) - [255, 0, 0]).max() < 5


def test_grey_stays_one_channel_unless_mixed(tmp_path):
    grey = write_image(tmp_path / "flat" / "a.png", (4, 6))
    alpha = write_image(tmp_path / "flat" / "b.png", (4, 6, 2))
    dataset = load(tmp_path / "flat", background="none")
    assert dataset.shape == (1, 4, 6)
    assert (dataset.images[:, 0] == [grey, alpha[..., 0]]).all()

    colour = write_image(tmp_path / "flat" / "c.png", (4, 6, 4))
    dataset = load(tmp_path / "flat", background="none")  # alpha is dropped, not blended
    assert dataset.shape == (3, 4, 6)
    assert (dataset.images[0] == grey).all()
    assert (dataset.images[2] == colour[..., :3].transpose(2, 0, 1)).all()


def test_image_folder_errors(tmp_path):
    root = tmp_path / "pets"
    write_classes(root, ["cat", "dog"], 2)
    wrong = root / "dog" / "zz.png"
    write_image(wrong, (5, 6, 3))
    assert_error(wrong, "6x5", "6x4", spec=root)
    wrong.write_bytes(b"not a picture")
    assert_error(wrong, "cannot be decoded", spec=root)
    wrong.write_bytes((root / "dog" / "000.png").read_bytes()[:60])  # a good header, torn pixels
    assert_error(wrong, "cannot be decoded", spec=root)
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(wrong)
    assert_error(wrong, "8 bits", spec=root)
    wrong.unlink()
    write_image(root / "beside.png")
    assert_error(root / "beside.png", "beside", spec=root)
    assert not list((tmp_path / "cache").glob("*"))  # no half-written cache


def test_dangling_link_is_an_error(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert_error(tmp_path / "flat" / "a.png", "cannot be read", spec=tmp_path / "flat")


def test_test_folder_must_have_the_classes_of_train(tmp_path):
    write_classes(tmp_path / "pets" / "train", ["cat"], 1)
    write_classes(tmp_path / "pets" / "test", ["cow"], 1)
    assert_error("test/cow/000.png", "'cow'", spec=tmp_path / "pets", split="test")


def write_edm_zip(path, labels, count=3):
    """A zip as the EDM tools write it; `labels` goes into dataset.json unless it is missing."""
    pixels = random_bytes(count, 8, 8, 3)
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(pixels):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            archive.writestr(f"00000/img{number:08}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return pixels


def edm_labels(*labels):
    return [[f"00000/img{number:08}.png", label] for number, label in enumerate(labels)]


def test_edm_zip(tmp_path):
    path = tmp_path / "imagenet-64.zip"
    pixels = write_edm_zip(path, edm_labels(3, 0, 1))
    dataset = load(path)
    assert (dataset.images == pixels.transpose(0, 3, 1, 2)).all()
    assert dataset.labels.tolist() == [3, 0, 1]
    assert dataset.class_names == ("0", "1", "2", "3") and dataset.name == "imagenet-64"
    assert_error(path, "'test'", spec=path, split="test")

    zipfile.ZipFile(path).extractall(tmp_path / "unpacked")
    assert load(tmp_path / "unpacked").fingerprint == dataset.fingerprint


def test_edm_zip_without_labels(tmp_path):
    write_edm_zip(tmp_path / "faces.zip", None)
    dataset = load(tmp_path / "faces.zip")
    assert (dataset.num_classes, dataset.class_names, dataset.labels.tolist()) == (0, (), [0, 0, 0])


def test_edm_zip_errors(tmp_path):
    path = tmp_path / "edm.zip"
    for label in (-1, 1 << 40, 0.5, "cat", [0, 1], True):
        write_edm_zip(path, edm_labels(0, label, 1))
        assert_error(path / "dataset.json", "img00000001.png", repr(label), spec=path)
    write_edm_zip(path, edm_labels(0, 1))
    assert_error(path / "dataset.json", "img00000002.png", spec=path)
    for labels in (3, [1, 2], "text", [["a.png"]]):
        write_edm_zip(path, labels)
        assert_error(path / "dataset.json", spec=path)
    path.write_bytes(b"not a zip")
    assert_error(path, spec=path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dataset.json", "{")
        archive.writestr("a.png", "x")
    assert_error(path / "dataset.json", spec=path)


def test_missing_data_sets(tmp_path, monkeypatch):
    assert_error("'imagenot'", "digits", "cifar-10-binary.tar.gz", "zip", spec="imagenot")
    assert_error(tmp_path / "nowhere", "digits", spec=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert_error(tmp_path / "empty", "no images", "digits", spec=tmp_path / "empty")
    (tmp_path / "file.txt").write_text("")
    assert_error(tmp_path / "file.txt", "digits", spec=tmp_path / "file.txt")
    assert_error("'digits'", "'val'", spec="digits", split="val")
    assert_error("'training'", "train, test, val", spec="digits", split="training")

    monkeypatch.setenv("FASTDIFF_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys.modules["fastdiff.data.load"], "_DEBIAN", {"fashion-mnist": tmp_path / "debian"})
    for name in ("mnist", "fashion-mnist", "cifar10"):
        assert_error(f"'{name}'", tmp_path / "elsewhere" / name, os.path.join("data", name), spec=name)
    assert_error("apt install dataset-fashion-mnist", tmp_path / "debian", spec="fashion-mnist")


# --- The cache ---


@pytest.fixture
def opened(monkeypatch):
    """The list of images that were opened."""
    calls = []
    real = Image.open

    def counting(file, *args, **kwargs):
        calls.append(file)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", counting)
    return calls


def test_images_are_decoded_once(tmp_path, opened):
    write_classes(tmp_path / "pets", ["cat", "dog"], 10)
    first = load(tmp_path / "pets")
    assert opened
    opened.clear()
    again, test = load(tmp_path / "pets"), load(tmp_path / "pets", "test")
    assert not opened
    assert isinstance(again.images, np.memmap) and again.fingerprint == first.fingerprint
    assert len(test) == 2
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]


@pytest.mark.parametrize("change", ["content", "time", "size", "new", "rename"])
def test_a_changed_folder_is_decoded_again(tmp_path, opened, change):
    write_classes(tmp_path / "pets", ["cat", "dog"], 3)
    load(tmp_path / "pets")
    opened.clear()
    image = tmp_path / "pets" / "cat" / "000.png"
    if change == "content":
        pixels = write_image(image, seed=99)
    elif change == "time":
        os.utime(image, ns=(1, 1))
    elif change == "size":  # a byte after the end of the image, within one tick of the clock
        before = image.stat().st_mtime_ns
        image.write_bytes(image.read_bytes() + b"\0")
        os.utime(image, ns=(before, before))
    elif change == "new":
        write_image(tmp_path / "pets" / "dog" / "new.png", seed=99)
    else:
        image.rename(image.with_name("renamed.png"))
    parts = load(tmp_path / "pets"), load(tmp_path / "pets", "test")
    assert opened
    if change == "content":
        found = [image.transpose(1, 2, 0).tobytes() for part in parts for image in part.images]
        assert pixels.tobytes() in found


def test_a_changed_zip_is_decoded_again(tmp_path):
    write_edm_zip(tmp_path / "edm.zip", None)
    load(tmp_path / "edm.zip")
    write_edm_zip(tmp_path / "edm.zip", None, count=4)
    assert len(load(tmp_path / "edm.zip")) == 4


def test_cache_argument_comes_first(tmp_path):
    write_image(tmp_path / "flat" / "a.png")
    load(tmp_path / "flat", cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1 and not (tmp_path / "cache").exists()


def test_unwritable_cache_warns_and_decodes_to_memory(tmp_path):
    pixels = write_image(tmp_path / "flat" / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="decoding to memory"):
        dataset = load(tmp_path / "flat", cache=tmp_path / "file" / "below")
    assert (dataset.images[0] == pixels.transpose(2, 0, 1)).all()


def test_full_disk_warns_and_leaves_nothing(tmp_path, monkeypatch):
    pixels = write_image(tmp_path / "flat" / "a.png")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        dataset = load(tmp_path / "flat")
    assert (dataset.images[0] == pixels.transpose(2, 0, 1)).all()
    assert not list((tmp_path / "cache").iterdir())


# --- Dataset ---


def numbered(count, channels=1):
    """A data set whose image i has all pixels i, except a bright first column."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, channels, 2, 3)).copy()
    images[..., 0] = 255
    return Dataset(images, np.arange(count, dtype=np.int64) % 3, ("a", "b", "c"), "numbered", "train")


def test_dataset_checks_its_arrays():
    images, labels = np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 1])
    for bad_images, bad_labels, part in (
        (images.astype(np.float32), labels, "float32"),
        (images[0], labels, "(1, 4, 4)"),
        (images, labels[:1], "(1,)"),
        (images, labels.astype(np.int32), "int32"),
        (images, np.array([0, 2]), "2"),
        (images, np.array([-1, 0]), "-1"),
    ):
        with pytest.raises(UserError) as caught:
            Dataset(bad_images, bad_labels, ("a", "b"), "bad", "train")
        assert "'bad'" in str(caught.value) and part in str(caught.value)


def test_fingerprint_sees_shape_labels_and_pixels():
    base = numbered(6)
    pixels = base.images.copy()
    pixels[5, 0, 1, 2] ^= 1
    variants = [
        base,
        Dataset(pixels, base.labels, base.class_names, "x", "train"),
        Dataset(base.images, base.labels[::-1].copy(), base.class_names, "x", "train"),
        Dataset(base.images.reshape(6, 1, 3, 2), base.labels, base.class_names, "x", "train"),
    ]
    assert len({dataset.fingerprint for dataset in variants}) == 4
    assert numbered(6).fingerprint == base.fingerprint and len(base.fingerprint) == 16


# --- Bytes and floats ---


def test_bytes_survive_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    values = to_float(every)
    assert values.dtype == torch.float32 and values[0] == -1 and values[-1] == 1
    assert torch.equal(to_uint8(values), every)
    assert torch.equal(to_uint8(values.double()), every)


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-9.0, 9.0, float("nan"), float("inf"), -float("inf"), 0.2 / 127.5 - 1, 0.8 / 127.5 - 1])
    assert to_uint8(values).tolist() == [0, 255, 0, 255, 0, 0, 1]


def test_conversions_run_on_the_meta_device():
    images = torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta")
    back = to_uint8(to_float(images))
    assert back.device.type == "meta" and back.dtype == torch.uint8 and back.shape == images.shape


def test_conversions_refuse_the_wrong_type():
    with pytest.raises(UserError, match="float32"):
        to_float(torch.zeros(1))
    with pytest.raises(UserError, match="uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


# --- Batches ---


def stream(batches, count):
    """The first `count` samples as (images, labels, sample ids)."""
    rounds = -(-count // batches.batch_size)
    parts = zip(*(next(batches) for _ in range(rounds)), strict=True)
    return tuple(torch.cat(part)[:count] for part in parts)


def assert_same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_types_and_pairs():
    dataset = numbered(10, channels=3)
    batch = next(Batches(dataset, 4))
    assert batch.images.shape == (4, 3, 2, 3) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert torch.equal(batch.labels, batch.images[:, 0, 0, 1].long() % 3)
    assert batch.sample_ids.tolist() == [0, 1, 2, 3]


@given(size=st.integers(1, 12), batch_size=st.integers(1, 12), seed=st.integers(0, 1 << 70))
@settings(max_examples=50, deadline=None)
def test_every_image_once_an_epoch(size, batch_size, seed):
    images, _, ids = stream(Batches(numbered(size), min(size, batch_size), seed=seed), 3 * size)
    for epoch in images[:, 0, 0, 1].reshape(3, size):
        assert sorted(epoch.tolist()) == list(range(size))
    assert ids.tolist() == list(range(3 * size))


def test_epochs_and_seeds_differ():
    order = stream(Batches(numbered(50), 50), 150)[0][:, 0, 0, 1].reshape(3, 50).tolist()
    other = stream(Batches(numbered(50), 50, seed=1), 50)[0][:, 0, 0, 1].tolist()
    assert len({tuple(epoch) for epoch in [*order, other, range(50)]}) == 5


@given(first=st.integers(1, 11), second=st.integers(1, 11), seed=st.integers(0, 99), flip=st.booleans())
@settings(max_examples=50, deadline=None)
def test_stream_does_not_depend_on_batch_size(first, second, seed, flip):
    dataset = numbered(11)
    assert_same(*(stream(Batches(dataset, size, seed=seed, flip=flip), 40) for size in (first, second)))


@given(batch_size=st.integers(1, 7), before=st.integers(0, 25), flip=st.booleans())
@settings(max_examples=50, deadline=None)
def test_restored_batches_continue_exactly(batch_size, before, flip):
    original = Batches(numbered(7), batch_size, seed=5, flip=flip)
    for _ in range(before):
        next(original)
    state = json.loads(json.dumps(original.state()))
    assert state == {
        "epoch": before * batch_size // 7,
        "permutation_seed": 5,
        "index": before * batch_size % 7,
    }
    resumed = Batches(numbered(7), batch_size, seed=5, flip=flip)
    next(resumed)  # a used stream can be restored, too
    resumed.restore(state)
    for _ in range(10):
        assert_same(next(original), next(resumed))


def test_flip_mirrors_half_of_the_samples_and_spares_the_data():
    dataset = numbered(200)
    untouched = dataset.images.copy()
    plain = stream(Batches(dataset, 50), 1000)
    flipped = stream(Batches(dataset, 50, flip=True), 1000)
    mirrored = (flipped[0] == plain[0].flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[0][~mirrored], plain[0][~mirrored])  # either mirrored or the same
    assert 400 < mirrored.sum() < 600
    assert not torch.equal(mirrored[:200], mirrored[200:400])
    assert_same(flipped[1:], plain[1:])
    assert (dataset.images == untouched).all()


def test_batches_from_a_read_only_cache(tmp_path):
    write_classes(tmp_path / "pets", ["cat"], 10)
    load(tmp_path / "pets")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns about memory that cannot be written
        batch = next(Batches(load(tmp_path / "pets"), 4, flip=True))
    before = batch.images.clone()
    assert torch.equal(batch.images.add_(1), before + 1)


@pytest.mark.parametrize("batch_size", [0, -1, 6])
def test_batch_size_must_fit(batch_size):
    with pytest.raises(UserError, match=f"batch size {batch_size} .*'numbered'.*1 to 5"):
        Batches(numbered(5), batch_size)


def test_negative_seed_is_an_error():
    with pytest.raises(UserError, match="-3"):
        Batches(numbered(5), 1, seed=-3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"permutation_seed": 1}, "permutation_seed 1"),
        ({"permutation_seed": None}, "permutation_seed None"),
        ({"index": 5}, "index 5"),
        ({"index": -1}, "index -1"),
        ({"index": 1.5}, "index 1.5"),
        ({"epoch": -1}, "epoch -1"),
        ({"epoch": None}, "epoch None"),
    ],
)
def test_restore_refuses_a_state_that_does_not_fit(change, part):
    batches = Batches(numbered(5), 2)
    with pytest.raises(UserError, match=part):
        batches.restore(batches.state() | change)
    assert batches.state() == {"epoch": 0, "permutation_seed": 0, "index": 0}
