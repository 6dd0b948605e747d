"""Pictures: grids of images and plots of results."""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastdiff import files
from fastdiff.data import to_uint8
from fastdiff.errors import UserError
from fastdiff.metrics import Row

MIN_SIDE, PADDING = 24, 1  # of a grid's images, and between them, in pixels
LONGEST = {"AVIF": 65_536, "ICO": 256, "JPEG": 65_500, "MPO": 65_500, "WEBP": 16_383} | dict.fromkeys(
    ("GIF", "PCX", "SGI", "TGA"), 65_535
)  # pixels of a side, by Pillow's names of formats


def grid(images: Tensor, *, columns: int, padding: int = PADDING, min_side: int = MIN_SIDE) -> np.ndarray:
    """(N, C, H, W) in [−1, 1] -> one uint8 picture (rows·h, columns·w, 3), filled row by row.

    Small images are enlarged by a whole factor to at least `min_side` pixels, so that they can be seen.
    """
    pixels = to_uint8(images.detach().cpu()).numpy().transpose(0, 2, 3, 1)
    how = {"columns": columns, "padding": padding, "min_side": min_side}
    canvas = np.full((*grid_size(len(pixels), *pixels.shape[1:3], **how), 3), 255, np.uint8)
    factor = -(-min_side // pixels.shape[1])
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    if pixels.shape[-1] != 3:
        pixels = pixels[..., :1].repeat(3, axis=-1)
    height, width = pixels.shape[1:3]
    for index, picture in enumerate(pixels):
        top, left = (
            padding + i * (side + padding) for i, side in zip(divmod(index, columns), (height, width), strict=True)
        )
        canvas[top : top + height, left : left + width] = picture
    return canvas


def grid_size(
    count: int, height: int, width: int, *, columns: int, padding: int = PADDING, min_side: int = MIN_SIDE
) -> tuple[int, int]:
    """(height, width) of a `grid` of so many images, in pixels."""
    factor = -(-min_side // height)
    counts = zip((-(-count // columns), columns), (height, width), strict=True)
    return tuple(number * (factor * side + padding) + padding for number, side in counts)


def save_grid(images: Tensor, path: str | Path, *, columns: int) -> None:
    """Write `grid` as a picture file. Raises UserError where the drive refuses it."""
    _save_picture(grid(images, columns=columns), Path(path), flush=True)


def save_image(image: Tensor, path: Path) -> None:
    """One image (C, H, W) in [−1, 1] as a picture file. Raises UserError where the drive refuses it."""
    pixels = to_uint8(image[None])[0].cpu().numpy().transpose(1, 2, 0)
    _save_picture(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, path, flush=False)


def _save_picture(pixels: np.ndarray, path: Path, *, flush: bool) -> None:
    with files.saving(path, flush=flush) as place:
        Image.fromarray(pixels).save(place, _format(path))


def is_picture(path: Path) -> bool:
    """Whether a name ends as those of pictures do, whether or not they can be written."""
    return _format(path) is not None or (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def _format(path: Path) -> str | None:
    """Pillow's name of the format that an ending stands for."""
    return Image.registered_extensions().get(path.suffix.lower())


def check_picture(path: Path, height: int, width: int) -> None:
    """Raises UserError for an ending that Pillow cannot write, and for a picture too large for its format."""
    name = _format(path)
    longest = LONGEST.get(name)
    if longest is not None and max(height, width) > longest:
        raise UserError(
            f"--out {path}: the picture would have {width}×{height} pixels, and {path.suffix} files have at most "
            f"{longest} on a side: choose .png, or draw fewer images"
        )
    try:
        for size in ((width, 1), (1, height)):
            file = io.BytesIO()
            Image.new("RGB", size).save(file, name or path.suffix)
            with Image.open(file) as written:
                if written.size != size:
                    raise ValueError("not of that size")
    except Exception as error:  # encoders raise many types
        raise UserError(
            f"--out {path}: Pillow writes no picture of {width}×{height} pixels into {path.suffix} files ({error}): "
            "choose .png, or for a folder a name without such an ending"
        ) from None


def check_plot(path: Path) -> None:
    """Raises UserError for an ending that matplotlib cannot write."""
    from matplotlib.figure import Figure

    endings = sorted(Figure().canvas.get_supported_filetypes().keys() - {"pgf"})  # which needs LaTeX
    if path.suffix.lower().removeprefix(".") not in endings:
        raise UserError(f"--out {path}: plots are written as one of {', '.join(endings)}: choose such an ending")


def _save_plot(figure, path: str | Path) -> None:
    path = Path(path)
    with files.saving(path) as place:
        figure.savefig(place, dpi=110, format=path.suffix.lower().removeprefix("."))


def save_panels(panels: Sequence[tuple[str, Tensor]], path: str | Path, *, columns: int) -> None:
    """Several grids of the same size side by side, each under its title."""
    pictures = [grid(images, columns=columns) for _, images in panels]
    height, width = pictures[0].shape[:2]
    figure, axes = _subplots(len(panels), figsize=(len(panels) * 3, 3 * height / width + 0.4))
    for axis, picture, (title, _) in zip(axes[0], pictures, panels, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    _save_plot(figure, path)


def plot_quality(rows: Sequence[Row], floor: float, path: str | Path) -> None:
    """Fréchet distance against network calls per image, log axes; one panel a guidance strength, one line a model."""
    strengths = sorted({row.guidance for row in rows})
    figure, axes = _subplots(len(strengths), figsize=(4 * len(strengths), 3.4), sharey=True)
    for axis, strength in zip(axes[0], strengths, strict=True):
        for model in dict.fromkeys(row.model for row in rows):
            points = sorted((r.nfe, r.fd) for r in rows if r.model == model and r.guidance == strength)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=model)
        axis.axhline(floor, color="grey", linestyle=":", linewidth=1, label="one half of the data against the other")
        axis.set(yscale="log", xlabel="network calls per image", title=f"guidance w = {strength:g}")
        _doubling(axis)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("Fréchet distance")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    _save_plot(figure, path)


def plot_methods(rows: Sequence[Row], floor: float, path: str | Path) -> None:
    """FD (upper row) and score (lower row) against steps, one column a guidance strength, one line a method."""
    strengths = sorted({row.guidance for row in rows})
    figure, axes = _subplots(len(strengths), rows=2, figsize=(3.6 * len(strengths), 6.4), sharey="row", sharex=True)
    methods = list(dict.fromkeys(row.model for row in rows))
    for column, strength in enumerate(strengths):
        for axis, key in zip(axes[:, column], ("fd", "score"), strict=True):
            for color, model in enumerate(methods):
                here = [r for r in rows if r.model == model and r.guidance == strength]
                points = sorted((r.steps, getattr(r, key)) for r in here)
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{color}", label=model)
            axis.set(yscale="log" if key == "fd" else "linear")
            _doubling(axis)
            axis.tick_params(axis="x", labelsize=7)
            axis.grid(alpha=0.3)
        axes[0][column].axhline(floor, color="grey", linestyle=":", linewidth=1)
        axes[0][column].set_title(f"guidance w = {strength:g}")
        axes[1][column].set_xlabel("sampling steps")
    axes[0][0].set_ylabel("Fréchet distance")
    axes[1][0].set_ylabel("score")
    _legend_below(figure, axes[0], 0.07)
    _save_plot(figure, path)


def plot_trade_off(rows: Sequence[Row], path: str | Path) -> None:
    """Score against FD, each line one method over the guidance strengths; one panel a step count.

    Dotted, in every panel: the method that is there with the most steps, with those.
    """
    from matplotlib.ticker import NullFormatter

    most = max(row.steps for row in rows)
    counts = [steps for steps in (1, 2, 4, 8, 16) if any(row.steps == steps for row in rows)] or [most]
    figure, axes = _subplots(len(counts), figsize=(max(3.6 * len(counts), 7), 4), sharey=True)
    for axis, steps in zip(axes[0], counts, strict=True):
        for color, model in enumerate(dict.fromkeys(row.model for row in rows)):
            for count in dict.fromkeys((steps, most)):
                points = [(r.guidance, r.fd, r.score) for r in rows if (r.model, r.steps) == (model, count)]
                if len(points) > 1:
                    _, fd, score = zip(*sorted(points), strict=True)
                    style = {"linestyle": "-", "label": model}
                    if count != steps:
                        style = {"linestyle": ":", "label": f"{model}, {count} steps"}
                    axis.plot(fd, score, marker="o", markersize=3, color=f"C{color}", **style)
        axis.set(xscale="log", xlabel="Fréchet distance", title=f"{steps} step{'s' * (steps > 1)}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("score")
    _legend_below(figure, axes[0], 0.12)
    _save_plot(figure, path)


def _doubling(axis) -> None:
    """A logarithmic axis of steps or calls, with numbers at 1, 2, 4, …"""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=16))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend_below(figure, axes, height: float) -> None:
    """One legend for all panels, on a share of the figure's height; a label of several panels stands there once."""
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, height, 1, 1))


def _subplots(columns: int, *, rows: int = 1, **options):
    """Rows of axes on a figure that needs no display; matplotlib is imported here because it takes a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=options.pop("figsize"))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plot_curves(rows: Sequence[dict[str, dict[str, Sequence[tuple[float, float]]]]], path: str | Path) -> None:
    """Rows of panels, title -> label -> points of a line, (thousands of images, value); NaN breaks the line.

    Lines of many points are drawn faintly under their moving average. Axes are logarithmic, but for the learning rate,
    which may end at 0, and for values on both sides of 0 (SiD's losses), where they are so away from 0. Distances have
    a logarithmic axis of images too.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import AsinhLocator, FuncFormatter, LogFormatter, LogLocator, NullFormatter

    class Plain(LogFormatter):
        """Where the usual one writes 2 × 10⁰, 2."""

        def __call__(self, value, position=None):
            return f"{value:g}" if super().__call__(value, position) else ""

    columns = max(map(len, rows))
    figure, axes = _subplots(columns, rows=len(rows), figsize=(max(4.2 * columns, 6), 3.1 * len(rows) + 0.5))
    labels = list(dict.fromkeys(label for row in rows for lines in row.values() for label in lines))
    colors = {label: f"C{index % 10}" for index, label in enumerate(labels)}
    for index, row in enumerate(rows):
        for axis in axes[index, len(row) :]:
            axis.axis("off")
        for axis, (title, lines) in zip(axes[index], row.items(), strict=False):
            values = [np.array([value for _, value in points]) for points in lines.values()]
            least = min(np.nanmin(line) for line in values)
            if least < 0:
                usual = max(np.nanmedian(np.abs(line)) for line in values)
                axis.set_yscale("asinh", linear_width=max(usual, 1e-9))
                axis.yaxis.set_major_locator(AsinhLocator(max(usual, 1e-9), numticks=8, base=0))  # round numbers
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            elif least > 0 and title != "learning rate":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(Plain())
                axis.yaxis.set_minor_formatter(Plain())
            for label, points in lines.items():
                _curve(axis, np.array(points, dtype=float), colors[label])
            axis.set(xlabel="thousands of images", xscale="log" if title == "Fréchet distance" else "linear")
            if title == "Fréchet distance":
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.xaxis.set_minor_formatter(NullFormatter())  # or else it writes between them what has no room
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
    handles = [Line2D([], [], color=color) for color in colors.values()]
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=9)
    figure.tight_layout(rect=(0, 0.3 * -(-len(labels) // columns) / figure.get_figheight(), 1, 1))
    _save_plot(figure, path)


def _curve(axis, points: np.ndarray, color: str) -> None:
    """A line of (N, 2) points, with its moving average where they are many."""
    (x, y), window = points.T, len(points) // 40
    marker = {"marker": "o", "markersize": 3} if len(points) < 20 else {}
    axis.plot(x, y, color=color, linewidth=1, alpha=0.3 if window > 1 else 1, **marker)
    if window > 1:
        axis.plot(x, _moving_average(y, window), color=color, linewidth=1.5)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and its `window` neighbours, of those that are there and not NaN; NaN where it is."""
    known = np.isfinite(values)
    around = np.ones(2 * (window // 2) + 1)
    total = np.convolve(np.where(known, values, 0), around, mode="same")
    return np.where(known, total / np.maximum(np.convolve(known, around, mode="same"), 1), np.nan)
