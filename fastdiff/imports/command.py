"""A teacher from another library: `fastdiff import SOURCE --out runs/teacher`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from fastdiff import checkpoint, checks, cli, files
from fastdiff.denoiser import Denoiser, DenoiserConfig, Pair
from fastdiff.errors import UserError
from fastdiff.imports import compare, diffusers, edm, guided_diffusion
from fastdiff.imports.model import Imported

KINDS = "a folder of diffusers, a .pt of guided-diffusion or a .pkl of EDM"


@dataclass(frozen=True, kw_only=True)
class Options:
    source: tyro.conf.Positional[Path]
    """A folder that diffusers saved (UNet2DModel, DiT, or a pipeline of one), a guided-diffusion .pt, or an EDM
    network-snapshot .pkl."""
    out: Path
    """The teacher's folder."""
    unconditional: Path | None = None
    """A network without classes, of the same kind and noise levels, to guide one with classes: both become one
    teacher."""
    flags: tuple[str, ...] = ()
    """Of a guided-diffusion .pt: a file of its published flags (JSON, or their text), or NAME=VALUE pairs."""
    unconditional_flags: tuple[str, ...] = ()
    """Those of --unconditional; default: the same, with class_cond=False."""
    scheduler: Path | None = None
    """Of a diffusers network without its pipeline: the scheduler_config.json that it was trained with."""
    vae: Path | None = None
    """The folder of the VAE in whose latents a diffusers network works; default: that of its pipeline."""
    null_class: bool = False
    """The last class of a diffusers network stands for no class, so that guidance needs no second network."""
    check: Path | None = None
    """Inputs and outputs that were made with the network's own code, to compare with (safetensors or npz): input, time,
    output, label."""
    check_unconditional: Path | None = None
    """The same for --unconditional."""
    overwrite: bool = False
    """Replace a teacher that is there already."""


def main(options: Options) -> None:
    """Make a teacher from another library's network, compared with its own outputs."""
    if options.unconditional is None and (options.check_unconditional or options.unconditional_flags):
        raise UserError("--check-unconditional and --unconditional-flags are of --unconditional, which is not given")
    part = checkpoint.FILES
    checks.replaceable(options.out, options.overwrite, is_part=lambda path: path.name in part, what="a teacher")
    flags = guided_diffusion.read_flags(options.flags)
    imported = _read(options, options.source, flags)
    compared = [_compare(imported, options.source, options.check)]
    denoiser = imported.denoiser()
    if options.unconditional is not None:
        other = guided_diffusion.read_flags(options.unconditional_flags)
        if other is None and flags is not None:
            other = flags | {"class_cond": False}
        second = _read(options, options.unconditional, other, null_class=False)
        compared.append(_compare(second, options.unconditional, options.check_unconditional))
        denoiser = _pair(imported, second, options)
    checks.folder(options.out.parent)
    checkpoint.save(options.out, denoiser)
    for line in (*imported.told, *compared, describe(denoiser.config)):
        print(line)
    print(f"-> {options.out}")


def _read(options: Options, path: Path, flags: dict | None, *, null_class: bool | None = None) -> Imported:
    """The network at a path, by what kind of path it is. Raises UserError for options of another kind."""
    kind = _format(path)
    for name, of in (
        ("flags", "guided-diffusion"),
        ("scheduler", "diffusers"),
        ("vae", "diffusers"),
        ("null_class", "diffusers"),
    ):
        if getattr(options, name) and kind != of:
            raise UserError(f"--{name.replace('_', '-')} is of networks of {of}, and {path} is one of {kind}")
    match kind:
        case "diffusers":
            null = options.null_class if null_class is None else null_class
            return diffusers.read(path, options.scheduler, options.vae, null_class=null)
        case "guided-diffusion":
            return guided_diffusion.read(path, flags)
    return edm.read(path)


def _format(path: Path) -> Literal["diffusers", "guided-diffusion", "EDM"]:
    if path.is_dir():
        return "diffusers"
    if not path.is_file():
        raise UserError(
            f"there is nothing at {path}: name a folder of diffusers, a .pt of guided-diffusion or EDM's .pkl"
        )
    kinds = {".pt": "guided-diffusion", ".pth": "guided-diffusion", ".pkl": "EDM"}
    if path.suffix not in kinds:
        raise UserError(
            f"{path} is of no known kind: name a folder of diffusers, a .pt of guided-diffusion or EDM's .pkl"
        )
    return kinds[path.suffix]


def _compare(imported: Imported, path: Path, check: Path | None) -> str:
    """A line on how far the outputs are apart. Raises UserError where they are too far; warns without any."""
    found = []
    if imported.peer is not None:
        error = compare.largest_error(imported, compare.outputs_of(imported.peer, imported), path)
        found.append(f"{error:.1e} from those of its own code")
    if check is not None:
        error = compare.largest_error(imported, compare.read(check), f"--check {check}")
        found.append(f"{error:.1e} from those in {check}")
    if not found:
        files.warn(f"{path} was not compared with its own code's outputs, which shapes cannot stand for: give --check")
        return f"compared     {path}: no"
    return f"compared     {path}: outputs at most {' and '.join(found)}, relative, in float32"


def _pair(conditional: Imported, unconditional: Imported, options: Options) -> Denoiser:
    """Both networks as one teacher. Raises UserError where they do not belong together."""
    first, second = conditional.config, unconditional.config
    if not first.unet.num_classes:
        raise UserError(f"{options.source} knows no classes, so --unconditional has nothing to guide: leave it out")
    if first.unet.null_class:
        raise UserError(f"{options.source} knows a null class, which guides it: leave --unconditional out")
    if second.unet.num_classes:
        raise UserError(
            f"--unconditional {options.unconditional} has {second.unet.num_classes} classes: give one without"
        )
    for name in ("schedule", "parameterization", "time"):
        if getattr(first, name) != getattr(second, name):
            raise UserError(
                f"--unconditional {options.unconditional} has another {name} than {options.source} "
                f"({_brief(getattr(second, name))}, not {_brief(getattr(first, name))}): give one trained alike"
            )
    shapes = {(config.unet.image_channels, *config.unet.image_size) for config in (first, second)}
    if len(shapes) > 1:
        raise UserError(f"--unconditional {options.unconditional} makes images of another size than {options.source}")
    config = replace(first, unconditional=second.unet, sources=(*first.sources, *second.sources))
    return Denoiser(config, Pair(conditional.denoiser().network, unconditional.denoiser().network)).eval()


def _brief(value: object) -> str:
    return str(value)[:80]


def describe(config: DenoiserConfig) -> str:
    """What kind of teacher it is, in a few words and what follows from them."""
    unet = config.unet
    images = "×".join(map(str, (unet.image_channels, *unet.image_size)))
    if config.latents is not None:
        images += f" latents (of a VAE, scaled by {config.latents.scale:g})"
    if not unet.num_classes:
        return f"teacher      {images}, no classes, predicts {config.parameterization}"
    guide = "guided by its null class" if unet.null_class else "guided by the second network"
    if not config.can_guide:
        guide = "without guidance, as it knows no null class: for w > 0 give --unconditional SOURCE"
    return f"teacher      {images}, {unet.num_classes} classes, predicts {config.parameterization}, {guide}"


if __name__ == "__main__":
    cli.run(main, Options)
