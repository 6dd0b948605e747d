"""Folders and zips of images, decoded once and kept as one memory-mapped file."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor
from tqdm import tqdm

from fastdiff import files
from fastdiff.data.arrangement import Tree, arrange, formats, some
from fastdiff.data.dataset import Dataset, no_split
from fastdiff.errors import UserError

_GREY_MODES = ("1", "L", "LA", "La")
_CACHE_VERSION = 2  # raise it when decoding changes


def load(path: Path, split: str, name: str, cache: Path | None, background: str) -> tuple[Dataset, str]:
    """The data set, and what of the folder or zip is no part of it, in words."""
    check_background(background)
    with _open_tree(path) as tree:
        names, labels, class_names, splits, left_out = arrange(tree)
        if split == "test" and "test" not in splits and "val" in splits:
            part = splits["val"]
        elif split in splits:
            part = splits[split]
        else:
            raise no_split(split, path, splits)
        images = _decoded(tree, names, _cache_folder(cache), background)
    return Dataset(images[part], labels[part], class_names, name, split), some(left_out) if left_out else ""


@contextmanager
def _open_tree(path: Path) -> Iterator[Tree]:
    if path.is_dir():
        names, folders = _walk(path)
        yield Tree(path, names, folders, lambda name: (path / name).open("rb"), lambda name: (path / name).stat())
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}): make it again") from error
    with archive:
        stat = path.stat()
        members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():  # some programs write the names of Windows
            name = member.filename.replace("\\", "/")
            if members.setdefault(name, member) is not member:
                raise UserError(f"{path} holds {name} more than once: make it again")
        names = sorted(name for name in members if not name.endswith("/") and _is_visible(name))
        folders = {name.rpartition("/")[0] for name in members if _is_visible(name.rstrip("/"))}
        folders |= {top for folder in folders for top in _above(folder)}
        yield Tree(path, names, folders, lambda name: archive.open(members[name]), lambda name: stat)


def _walk(root: Path) -> tuple[list[str], set[str]]:
    """Visible files and folders below a folder, each real one once, whatever links lead to it."""
    names, folders, seen, known = [], set(), set(), set()
    for top, below, here in os.walk(root, followlinks=True):
        real = os.path.realpath(top)
        below[:] = sorted(
            (name for name in below if not name.startswith(".")),
            key=lambda name: (os.path.islink(Path(top, name)), name),
        )
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        folders.add(Path(top).relative_to(root).as_posix())
        for name in _real_first(top, here):
            if (real := os.path.realpath(Path(top, name))) not in known:
                known.add(real)
                names.append(Path(top, name).relative_to(root).as_posix())
    return sorted(names), folders - {"."}


def _real_first(top: str, names: list[str]) -> list[str]:
    """Those that are not hidden, links last."""
    return sorted((name for name in names if _is_visible(name)), key=lambda name: (Path(top, name).is_symlink(), name))


def _above(folder: str) -> Iterator[str]:
    parts = folder.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def _cache_folder(cache: Path | None) -> Path:
    return Path(cache or os.environ.get("FASTDIFF_CACHE") or "~/.cache/fastdiff/data").expanduser()


def _decoded(tree: Tree, names: list[str], cache: Path, background: str) -> np.ndarray:
    """uint8 (N, C, H, W) of the images in this order, decoded only if the cache does not have them."""
    path = cache / f"{_digest(tree, names, background)}.npy"
    try:
        if not path.is_file():
            _write_npy(path, *_decode_all(tree, names, background))
        return np.load(path, mmap_mode="r")
    except OSError as error:  # of the cache: those of the images have become UserErrors
        warnings.warn(f"cannot keep decoded images in {cache} ({error}); decoding to memory", stacklevel=4)
    shape, decoded = _decode_all(tree, names, background)
    images = np.empty(shape, dtype=np.uint8)
    for row, image in zip(images, decoded, strict=True):
        row[:] = image
    return images


def _digest(tree: Tree, names: list[str], background: str) -> str:
    digest = hashlib.blake2b(os.fsencode(f"{_CACHE_VERSION} {background} {tree.root.resolve()}"), digest_size=16)
    for name in names:
        try:
            stat = tree.stat(name)
        except OSError as error:  # such as a link to nowhere
            raise UserError(f"{tree.root / name} cannot be read ({error}): replace or remove it") from error
        digest.update(os.fsencode(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return digest.hexdigest()


@contextmanager
def _open_image(tree: Tree, name: str) -> Iterator[Image.Image]:
    try:
        with tree.open(name) as file, Image.open(file, formats=formats()) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise UserError(f"{tree.root / name} cannot be decoded ({error}): replace or remove it") from error


def _common_format(tree: Tree, names: list[str]) -> tuple[str, tuple[int, int]]:
    """The Pillow mode ("L" or "RGB") and the (width, height) for all; reads the headers only."""
    mode, common = "L", None
    for name in tqdm(names, desc=f"checking {tree.root.name}", disable=len(names) <= 1000):
        with _open_image(tree, name) as image:
            common = common or image.size
            if image.size != common:
                raise UserError(
                    f"{tree.root / name} has {image.width}x{image.height} pixels where "
                    f"{common[0]}x{common[1]} were expected, as in {names[0]}: bring all images to one size"
                )
            if image.mode[0] in "IF":  # converting these to 8 bits would clip them
                raise UserError(f"{tree.root / name} has more than 8 bits a channel: convert it to 8 bits")
            if image.mode not in _GREY_MODES:
                mode = "RGB"
    return mode, common


def _decode_all(tree: Tree, names: list[str], background: str) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """The shape (N, C, H, W) of all images together, and the images one by one, uint8 (C, H, W)."""
    mode, (width, height) = _common_format(tree, names)
    progress = tqdm(names, desc=f"decoding {tree.root.name}", disable=len(names) <= 1000)
    shape = (len(names), len(mode), height, width)  # one letter a channel
    return shape, _decode(tree, progress, mode, background)


def _decode(tree: Tree, names: Iterable[str], mode: str, background: str) -> Iterator[np.ndarray]:
    transparent = 0
    for name in names:
        with _open_image(tree, name) as image:
            image, covered = laid_on(background, image)
            pixels = np.asarray(image.convert(mode))
        transparent += covered
        yield np.atleast_3d(pixels).transpose(2, 0, 1)
    if transparent:
        files.warn(
            f"{transparent} pictures of {tree.root} are transparent in places: they are laid on {background} "
            "(--background says on what; none drops their alpha)"
        )


def check_background(background: str) -> None:
    """Raises UserError for what is no colour."""
    try:
        background == "none" or ImageColor.getrgb(background)
    except ValueError:
        raise UserError(
            f"--background {background}: not a colour; give a name such as white, #rrggbb, or none to drop alpha"
        ) from None


def laid_on(background: str, image: Image.Image) -> tuple[Image.Image, bool]:
    """A picture without transparency, and whether there was any. background: a colour, or none for what lies under."""
    if background == "none" or not image.has_transparency_data:
        return image, False
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image, False
    canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
    return Image.alpha_composite(canvas, image), True


def _write_npy(path: Path, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> None:
    """Write the images as one .npy, which appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path, shared=True) as unfinished, unfinished.open("xb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        for image in images:
            file.write(image.tobytes())
