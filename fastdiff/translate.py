"""Style transfer: encode in one domain, decode in another ([GD] section 5): `python -m fastdiff.translate …`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff import checkpoint, checks, cli, data, figures, files, samplers
from fastdiff.cli import number
from fastdiff.data.pictures import check_background, laid_on
from fastdiff.denoiser import Guided, with_guidance
from fastdiff.errors import UserError
from fastdiff.generate import TEACHER_STEPS
from fastdiff.networks import NetworkOptions, enter
from fastdiff.precision import Precision, autocast, choose
from fastdiff.vae import of_model

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}
STRIP_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Options(NetworkOptions):
    encoder: Path
    """A checkpoint of train.encoder; or a teacher or stage-1 model, which encodes with DDIM."""
    decoder: Path
    """A checkpoint of train.stage2; or a teacher or stage-1 model."""
    images: Path
    """A picture, or a folder of pictures."""
    from_label: str | None = None
    """The class of the pictures by name, or by number, for models with classes."""
    to_label: str | None = None
    """The class to turn them into."""
    guidance: tuple[float, ...] = (0.0,)
    """One or several guidance strengths w, for encoding and decoding alike."""
    encoder_steps: int | None = None
    """Default: what the encoder was trained for, 64 for others."""
    decoder_steps: int | None = None
    """Default: what the decoder was trained for, 64 for others."""
    compare: Path | None = None
    """An undistilled model, whose reconstruction error with as many network calls is reported beside."""
    resize: bool = False
    """Bring pictures of another size or mode to the models' own; without it they are refused."""
    background: str = "white"
    """What transparent pictures are laid on by --resize: a colour, or none to drop their alpha."""
    clip: bool = True
    """Limit the predicted image to [−1, 1] in every step of an undistilled decoder. Distilled ones learned theirs
    without a limit, as encoders do, and give back more with none."""
    vae: Path | None = None
    """Of models that make latents: the folder of the VAE that encodes and decodes them."""
    batch_size: int = 256
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "fp32"
    """bf16: autocast of the networks; auto: bf16 where it is found to be faster and within 2e-2 of fp32, for both."""
    out: Path = Path("translated")
    """Folder for the pictures, one a picture and w, strip.png with all of them, and report.json."""
    overwrite: bool = False
    """Write into a folder that is not empty."""


@dataclass(frozen=True)
class Pair:
    """An encoder and a decoder with their steps."""

    encoder: nn.Module
    decoder: nn.Module
    encoder_steps: int
    decoder_steps: int

    @torch.no_grad()
    def translate(
        self,
        images: Tensor,
        source: Tensor | None,
        target: Tensor | None,
        w: float,
        *,
        clip: bool = True,
        batch_size: int = 256,
        precision: str = "fp32",
    ) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] of classes `source` as ones of classes `target`, float32 on the CPU.

        source, target: (B,) int64, or None for models without classes. With source = target it is a reconstruction.
        clip: limit x̂ to [−1, 1] in every step of an undistilled decoder; a distilled one learned its without a limit.
        """
        limit = self.decoder.config.limit if clip and self.decoder.config.steps is None else None
        device = next(self.encoder.parameters()).device
        translated = []
        with autocast(precision, device, self.encoder, self.decoder):
            for start in range(0, len(images), batch_size):
                part = slice(start, start + batch_size)
                here, there = (None if label is None else label[part].to(device) for label in (source, target))
                z = images[part].to(device).contiguous(memory_format=torch.channels_last)
                z = samplers.encode(self.encoder, z, here, w, self.encoder_steps, schedule=self.encoder.schedule)
                z = samplers.ddim(
                    self.decoder, z, there, w, self.decoder_steps, schedule=self.decoder.schedule, clip=limit
                )
                translated.append(z.cpu())
        translated = torch.cat(translated)
        if bad := int((~data.are_finite(translated)).sum()):
            files.warn(f"{bad} of {len(images)} translated images at w = {w:g} are not finite: use other checkpoints")
        return translated

    def calls(self, w: float) -> int:
        """Network calls an image."""
        return self.encoder_steps * _calls(self.encoder, w) + self.decoder_steps * _calls(self.decoder, w)

    def undistilled(self, model: nn.Module, w: float, *, factor: int = 1) -> Pair:
        """`model` for both, with as many steps each as `factor` times this pair's calls allow (at least one)."""
        steps = (
            max(1, factor * mine * _calls(own, w) // _calls(model, w))
            for mine, own in ((self.encoder_steps, self.encoder), (self.decoder_steps, self.decoder))
        )
        return Pair(model, model, *steps)


def main(options: Options) -> None:
    """Turn pictures of one class into another, by encoding and decoding."""
    enter(options.network_module)
    pair, undistilled = load_models(options)
    originals = _files(options.images)
    written = {options.out / "strip.png", *(_output(options, file, w) for file in originals for w in options.guidance)}
    if replaced := {path.resolve() for path in written} & {file.resolve() for file in originals}:
        raise UserError(
            f"--out {options.out}: a result would replace the original {min(replaced)}: choose another folder"
        )
    vae = of_model(options.vae, pair.encoder.config, options.device)
    shape = pair.encoder.image_shape if vae is None else vae.image_shape(pair.encoder.image_shape)
    if shape[0] not in MODES:
        size = "×".join(map(str, shape))
        raise UserError(f"{options.encoder} makes images of {size}, and picture files have 1 or 3 channels")
    how = {"resize": options.resize, "background": options.background}
    pictures = torch.stack([load_picture(file, shape, **how) for file in originals])
    codes = pictures if vae is None else vae.encode(pictures.to(options.device)).cpu()
    checks.output(options.out, options.overwrite, file=False)
    checks.space(options.out, len(originals) * len(options.guidance), pictures[0].numel())
    source = _labels(pair.encoder, options.encoder, options.from_label, "--from-label", len(originals))
    target = _labels(pair.decoder, options.decoder, options.to_label, "--to-label", len(originals))
    if source is not None and target is not None:
        classes = zip((source, target), (pair.encoder, pair.decoder), strict=True)
        print(f"classes: {' -> '.join(checks.named(int(label[0]), model) for label, model in classes)}")
    batch_size = options.batch_size
    precision = choose(options.precision, pair.encoder, pair.decoder, batch_size=min(len(originals), batch_size))
    how = {"clip": options.clip, "batch_size": batch_size, "precision": precision}
    goes_back = options.encoder == options.decoder or same_domain(pair.encoder, pair.decoder)

    def translated(pair: Pair, source: Tensor | None, target: Tensor | None, w: float) -> Tensor:
        made = pair.translate(codes, source, target, w, **how)
        return made if vae is None else vae.decode(made.to(options.device)).cpu()

    columns, rows = [pictures], []
    for w in options.guidance:
        columns.append(translated(pair, source, target, w))
        for file, image in zip(originals, columns[-1], strict=True):
            figures.save_image(image, _output(options, file, w))
        compared = {"pair": (pair, source)} if goes_back else {}
        if undistilled is not None:
            own = _labels(undistilled, options.compare, options.from_label, "--from-label", len(originals))
            compared["undistilled"] = pair.undistilled(undistilled, w), own
        for name, (one, label) in compared.items():
            error = rmse(translated(one, label, label, w), pictures)
            rows.append({"model": name, "guidance": w, "calls": one.calls(w), "reconstruction_rmse": round(error, 5)})
            print(f"w = {number(w)}: {name}, {one.calls(w)} calls, reconstruction error {error:.4f}")
        strip = torch.stack([column[:STRIP_ROWS] for column in columns], dim=1).flatten(0, 1)
        figures.save_grid(strip, options.out / "strip.png", columns=len(columns))
        report = {"images": len(originals), "rows": rows}
        files.replace(options.out / "report.json", json.dumps(report, indent=1) + "\n")
    count = f"{len(originals)} pictures × {len(options.guidance)} strengths"
    print(f"{count} -> {options.out} (strip.png: originals, each w)")


def rmse(images: Tensor, others: Tensor) -> float:
    """Root of the mean squared difference; images in [−1, 1]."""
    return float((images - others).square().mean().sqrt())


def load_models(options: Options) -> tuple[Pair, nn.Module | None]:
    """The pair, and the undistilled model to compare with. Raises UserError where things do not fit together."""
    checks.positive(options, "encoder_steps", "decoder_steps", "batch_size")
    if not options.guidance:
        raise UserError("--guidance needs at least one number")
    checks.device(options.device)
    check_background(options.background)
    encoder, encoder_steps = _load(options.encoder, "--encoder", options.encoder_steps, options.device)
    decoder, decoder_steps = _load(options.decoder, "--decoder", options.decoder_steps, options.device)
    models = [(encoder, options.encoder, options.from_label, "--from-label")]
    models += [(decoder, options.decoder, options.to_label, "--to-label")]
    undistilled = None
    if options.compare is not None:
        undistilled, _ = _load(options.compare, "--compare", None, options.device)
        if undistilled.config.steps is not None:
            raise UserError(
                f"--compare {options.compare} is distilled to {undistilled.config.steps} steps: name a teacher"
            )
        models.append((undistilled, options.compare, options.from_label, "--from-label"))
    for model, path, label, option in models:
        if tuple(model.image_shape) != tuple(encoder.image_shape):
            raise UserError(
                f"{path} makes images of {_size(model)}, but {options.encoder} encodes ones of {_size(encoder)}"
            )
        if model.config.latents != encoder.config.latents:
            raise UserError(f"{path} works in other latents than {options.encoder}, or one of them in none")
        if model.schedule != encoder.schedule:
            raise UserError(
                f"{path} has another noise schedule than {options.encoder}: the noise of one is not the other's"
            )
        _labels(model, path, label, option, 0)
    for path, model in {path: model for model, path, *_ in models}.items():
        for w in options.guidance:
            checks.guidance(model, w, path)
    return Pair(encoder, decoder, encoder_steps, decoder_steps), undistilled


def load_picture(file: Path, shape: tuple[int, int, int], *, resize: bool, background: str = "white") -> Tensor:
    """A picture file as (C, H, W) in [−1, 1]. Raises UserError where size or mode differ and are not to be changed.

    background: what a transparent one is laid on where they are; "none" drops its alpha.
    """
    channels, height, width = shape
    mode = MODES[channels]
    try:
        with Image.open(file) as picture:
            picture.load()
    except Exception as error:  # Pillow raises many kinds for broken files
        raise UserError(f"{file} cannot be read as a picture ({error})") from None
    if picture.mode[0] in "IF":
        raise UserError(f"{file} has more than 8 bits a channel: convert it to 8 bits")
    if (picture.mode, picture.size) != (mode, (width, height)):
        if not resize:
            raise UserError(
                f"{file} is {picture.width}×{picture.height} {picture.mode}, "
                f"but the models take {width}×{height} {mode}: "
                "convert it, or have it done with --resize"
            )
        picture, transparent = laid_on(background, picture)
        if transparent:
            files.warn(f"{file} is transparent in places: it is laid on {background} (--background says on what)")
        picture = picture.convert(mode).resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).reshape(height, width, channels)
    return data.to_float(pixels.permute(2, 0, 1)[None])[0]


def _load(path: Path, option: str, steps: int | None, device: str) -> tuple[nn.Module, int]:
    denoiser = checkpoint.load(path, device=device)
    kind, sampler, trained = denoiser.config.kind, denoiser.config.sampler, denoiser.config.steps
    wanted = "encode" if option == "--encoder" else "ddim"
    if trained is not None and sampler != wanted:
        raise UserError(
            f"{option} {path} is a {kind} model for the {sampler} sampler: "
            + ("give one of train.encoder or an undistilled one" if wanted == "encode" else "give one for ddim")
        )
    if steps is not None and trained is not None and steps != trained:
        files.warn(f"{option} {path} was trained for {trained} steps; with {steps} the pictures will be worse")
    return with_guidance(denoiser), steps or trained or TEACHER_STEPS


def _labels(model: nn.Module, path: Path, wanted: str | None, option: str, count: int) -> Tensor | None:
    """(count,) of the model's own number of a class, or None without one. Raises UserError where it has no such."""
    if wanted is None and model.num_classes:
        raise UserError(f"{path} has {model.num_classes} classes: say which with {option}")
    return None if wanted is None else torch.full((count,), checks.label(wanted, model, option, path))


def same_domain(one: nn.Module, other: nn.Module) -> bool:
    """Whether both were trained on the same images, or, where one does not say on which, name the same classes."""
    data, names = ({getattr(model.config, key) for model in (one, other)} for key in ("data", "class_names"))
    return len(names) == 1 and (len(data) == 1 if "" not in data else names != {()})


def _output(options: Options, file: Path, w: float) -> Path:
    return options.out / f"{file.stem}-w{number(w)}.png"


def _files(path: Path) -> list[Path]:
    """Pictures by name. Raises UserError where there are none, or where two have the same name but for the ending."""
    inside = path.iterdir() if path.is_dir() else [path]
    files = sorted(file for file in inside if file.is_file() and (file == path or file.suffix.lower() in PICTURES))
    if not files:
        raise UserError(f"--images {path}: there are no pictures ({', '.join(PICTURES)}) here")
    names = [file.stem for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--images {path} has several pictures called {twice[0]}: their results would have one name")
    return files


def _calls(model: nn.Module, w: float) -> int:
    return 2 if isinstance(model, Guided) and w else 1


def _size(model: nn.Module) -> str:
    return "×".join(map(str, model.image_shape))


if __name__ == "__main__":
    cli.run(main, Options)
