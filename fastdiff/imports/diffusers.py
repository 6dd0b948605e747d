"""diffusers: the folder of a UNet2DModel or a DiT, or of a pipeline of one with its DDPM or DDIM scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.denoiser import DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.imports import dit, guided_diffusion, unet2d
from fastdiff.imports.account import Settings, Tensors, source
from fastdiff.imports.model import Imported, Peer
from fastdiff.schedule import CosineBetaSchedule, LinearBetaSchedule, ScaledLinearSchedule, Schedule, TableSchedule
from fastdiff.vae import latents_of

KINDS = {"UNet2DModel": unet2d, "DiTTransformer2DModel": dit, "Transformer2DModel": dit}  # the last before 0.27
PIPELINES = {"DDPMPipeline": "unet", "DDIMPipeline": "unet", "DiTPipeline": "transformer"}  # where their network is
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
OF_SAMPLING = (  # what its own sampler does with the network, which no sampler here asks
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
)
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}


def read(folder: Path, scheduler: Path | None = None, vae: Path | None = None, *, null_class: bool = False) -> Imported:
    """The network in a folder, with its scheduler or the one in a file. Raises UserError for what fastdiff cannot be.

    vae: the folder of the one in whose latents it works, where that is no part of the pipeline. null_class: whether the
    last class of a U-Net stands for no class.
    """
    network = _network_folder(folder)
    values = _json(network / "config.json")
    kind = str(values.get("_class_name"))
    if kind not in KINDS:
        raise UserError(f"{network / 'config.json'}: _class_name is {kind!r}, and fastdiff reads {', '.join(KINDS)}")
    settings = Settings(values, KINDS[kind].DEFAULTS, network / "config.json")
    settings.ignore("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
    file = _weights_file(network)
    tensors = Tensors(_tensors(file), file, KINDS[kind].DECIDED_BY)
    scheduler = _scheduler_file(folder, scheduler)
    schedule, predicts, learned = _scheduler(scheduler)
    built, found = KINDS[kind].read(settings, tensors, learned=learned, null_class=null_class)
    settings.finish()
    tensors.finish()
    sources = tuple(source(path, f"diffusers {kind}") for path in (network / "config.json", file, scheduler))
    vae = folder if vae is None and (folder / "vae").is_dir() else vae
    latents = None if vae is None else latents_of(vae)
    how = {"network": KINDS[kind].NETWORK, "time": "step", "sources": sources, "latents": latents}
    told = tuple(f"{what} is dropped: {why}" for what, why in tensors.dropped.items())
    return Imported(DenoiserConfig(built, schedule, predicts, **how), found, told, "step", _peer(network))


def _peer(folder: Path) -> Peer | None:
    """diffusers' own network, where it is installed."""
    try:
        import diffusers
    except ImportError:
        return None
    is_unet = _json(folder / "config.json")["_class_name"] == "UNet2DModel"
    own = diffusers.UNet2DModel if is_unet else diffusers.DiTTransformer2DModel
    network = own.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False).float().eval()
    return lambda z, step, label: network(z, timestep=step, class_labels=label).sample


# --- Files ---


def _network_folder(folder: Path) -> Path:
    """Where the network's config.json is. Raises UserError for other pipelines, and for folders of something else."""
    if (folder / "model_index.json").is_file():
        kind = str(_json(folder / "model_index.json").get("_class_name"))
        if kind not in PIPELINES:
            raise UserError(f"{folder} is a {kind}, and of diffusers' pipelines fastdiff reads {', '.join(PIPELINES)}")
        if (folder / PIPELINES[kind]).is_dir():
            return folder / PIPELINES[kind]
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds neither config.json nor model_index.json: name a folder that diffusers saved")
    return folder


def _scheduler_file(folder: Path, given: Path | None) -> Path:
    if given is not None:
        return given / "scheduler_config.json" if given.is_dir() else given
    for place in (folder / "scheduler", folder):
        if (place / "scheduler_config.json").is_file():
            return place / "scheduler_config.json"
    raise UserError(
        f"{folder} does not say which noise its network was trained on: give its scheduler_config.json by --scheduler"
    )


def _weights_file(folder: Path) -> Path:
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    others = sorted(path.name for path in folder.glob("diffusion_pytorch_model*"))
    raise UserError(
        f"{folder} has no diffusion_pytorch_model.safetensors or .bin"
        + (f", only {', '.join(others[:3])}: save it again in one file" if others else ": the download is incomplete")
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read, or is no JSON ({error}): use another copy") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: use another copy")
    return values


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return guided_diffusion.load(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged or truncated ({error}): use another copy") from None


# --- Settings ---


def _scheduler(path: Path) -> tuple[Schedule, str, bool]:
    """The schedule, what the network predicts, and whether it predicts the variance beside it."""
    settings = Settings(_json(path), SCHEDULER_DEFAULTS, path)
    settings.expect("_class_name", *SCHEDULERS)
    settings.ignore("_diffusers_version", *OF_SAMPLING)
    steps, zero = settings.whole("num_train_timesteps", least=2), settings.expect("rescale_betas_zero_snr", False, True)
    predicts = PREDICTS[settings.expect("prediction_type", *PREDICTS)]
    if zero and predicts == "eps":
        raise settings.refuse("prediction_type", "v_prediction and sample where rescale_betas_zero_snr is true")
    fixed = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
    learned = settings.expect("variance_type", *fixed, "learned", "learned_range") not in fixed
    betas, limits = settings["trained_betas"], (settings.number("beta_start"), settings.number("beta_end"))
    shape = settings.expect("beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2")
    settings.finish()
    if betas is not None:
        return _given(settings, zero), predicts, learned
    if not 0 < limits[0] <= limits[1] < 1:
        raise settings.refuse("beta_start", "0 < beta_start ≤ beta_end < 1, by which ᾱ falls")
    match shape:
        case "linear":
            return LinearBetaSchedule(*limits, steps, zero), predicts, learned
        case "scaled_linear":
            return ScaledLinearSchedule(*limits, steps, zero), predicts, learned
    return CosineBetaSchedule(steps, zero), predicts, learned


def _given(settings: Settings, zero: bool) -> Schedule:
    betas = settings.numbers("trained_betas")
    if zero:
        raise settings.refuse("rescale_betas_zero_snr", "false beside trained_betas")
    alphas = torch.tensor([1 - beta for beta in betas], dtype=torch.float64)
    try:
        return TableSchedule(tuple(alphas.cumprod(0).tolist()))
    except ValueError as error:
        raise UserError(f"{settings.place}: trained_betas: {error}") from None
