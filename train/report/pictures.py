"""Pictures of every line of a comparison, with the same noises and classes in each, as files at their true size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff import checks, data, figures, files
from fastdiff.cli import number
from fastdiff.generate import generate
from train.report.methods import Method, Options

FOLDER = "pictures"
NOISES = 5
MOST_CLASSES = 10  # evenly chosen where there are more


def draw(
    methods: Iterable[Method],
    options: Options,
    out: Path,
    class_names: Sequence[str],
    *,
    strengths: Sequence[float] | None = None,
    again: bool = False,
) -> dict:
    """A PNG in out/pictures for each method and w, a row a noise and a column a class; returns what results.json keeps.

    strengths: default, those of each method's scores. again: also draw what is there already.
    """
    checks.folder(out / FOLDER)
    labels = shown_classes(len(class_names))
    grids = {}
    for method in methods:
        model = None
        for w in method.guidance if strengths is None else strengths:
            path = file(out, method, w)
            if again or not path.is_file():
                model = model or method.load(options)
                ids = torch.arange(NOISES).repeat_interleave(len(labels))
                images = generate(model, labels.repeat(NOISES), method.sampling(w, options), noise_ids=ids)
                save(torch.cat([part.cpu() for part in images]), path, columns=len(labels))
            line = {"key": method.key, "model": method.name, "steps": method.steps, "guidance": w}
            grids[path.name] = line
    return {"noises": NOISES, "class_names": [class_names[label] for label in labels], "grids": grids}


def shown_classes(count: int) -> Tensor:
    """(K,) labels: all, or some where there are many."""
    shown = min(count, MOST_CLASSES)
    return torch.arange(shown) * (count // shown)


def file(out: Path, method: Method, w: float) -> Path:
    return out / FOLDER / f"{method.key}-{method.steps}-w{number(w)}.png"


def save(images: Tensor, path: Path, *, columns: int) -> None:
    """(N, C, H, W) in [−1, 1] as a grid without any gaps, filled row by row."""
    picture = Image.fromarray(figures.grid(images, columns=columns, padding=0, min_side=1))
    with files.writing(path) as place:
        (picture.convert("L") if images.shape[1] == 1 else picture).save(place, format="png", optimize=True)


def load(path: Path, *, columns: int) -> Tensor:
    """The images (N, C, H, W) of `save`, as they were rounded to 8 bits."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture))  # (rows·H, columns·W) or (rows·H, columns·W, C)
    height, width = len(pixels) // NOISES, pixels.shape[1] // columns
    images = pixels.reshape(NOISES, height, columns, width, -1).permute(0, 2, 4, 1, 3)
    return data.to_float(images.flatten(0, 1).contiguous())


def panels(titles: dict[str, Method], w: float, out: Path, drawn: dict) -> list[tuple[str, Tensor]]:
    """Images of each method under its title, for `figures.save_panels`: one row a class, one column a noise."""
    classes = len(drawn["class_names"])
    across = torch.arange(NOISES * classes).reshape(NOISES, classes).T.flatten()
    return [(title, load(file(out, method, w), columns=classes)[across]) for title, method in titles.items()]
