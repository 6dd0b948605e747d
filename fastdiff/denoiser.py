"""A network that knows what it predicts (`Denoiser`), and classifier-free guidance on top of it (`Guided`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastdiff import files, rotation, schedule
from fastdiff.data import Dataset, Latents
from fastdiff.dit import DiT
from fastdiff.errors import UserError
from fastdiff.rotation import Affine
from fastdiff.unet import UNet, UNetConfig, config_from_dict

MAX_GUIDANCE = 1e4  # far beyond any use, and far below where float32 overflows
NETWORKS: dict[str, Callable[[UNetConfig], nn.Module]] = {"unet": UNet, "dit": DiT}
"""By the name in a checkpoint, what builds a network: enter your own here before its checkpoints are loaded, or by a
file that the commands' option --network-module names.

What its `__init__` freezes stays frozen, and weights that it ties stay tied. Tensors that are not saved with the
weights must come out the same each time that it is built.

network(z, time, label, guidance) -> (B, outputs·C, H, W). z (B, C, H, W), for EDM's F scaled as EDM's input is; time
(B,), what the config's `time` says; label (B,) int64, num_classes for the null class, None for models without
classes; guidance (B,), None for w = 0 and where the config has no guidance_input. Of the config, image_size,
image_channels, num_classes, guidance_input and outputs say what it has to fit. With the guidance input a network has
the weights of the one without, and more, which at first should change nothing. With two outputs, ε̃ and then x̃, those
of its last layer have twice as many rows; a network may know one output alone, and so do its students then. Labels are
dropped here: a network that drops some itself while it trains learns another thing than it is asked.
"""
OURS = tuple(NETWORKS)
TIMES = ("angle", "log-sigma", "step", "nearest-step")
KINDS = ("teacher", "stage1", "stage2", "encoder", "two_student", "sid")


@dataclass(frozen=True)
class Source:
    """A file that an imported model was made from."""

    format: str
    file: str
    """Its name."""
    sha256: str


@dataclass(frozen=True)
class DenoiserConfig:
    """All that is needed to rebuild a denoiser and to use it rightly; a checkpoint's model.json."""

    unet: UNetConfig
    schedule: schedule.Schedule = field(default_factory=schedule.CosineSchedule)
    parameterization: str = "v"
    kind: str = "teacher"
    """Which recipe trained it, one of KINDS."""
    guidance_range: tuple[float, float] | None = None
    """The w that it was trained for; None: any."""
    sampler: str = "ddim"
    """The sampler that its steps were trained for."""
    steps: int | None = None
    """The number of sampling steps that it was trained for; None: any."""
    sigma_init: float | None = None
    """The noise level σ = tan φ from which a one-step generator starts."""
    class_names: tuple[str, ...] = ()
    network: str = "unet"
    """Which of NETWORKS is built from `unet`."""
    data: str = ""
    """The fingerprint of the images that its teacher was trained on, by which models of one domain know each other."""
    time: str | None = None
    """What the network hears of the time: "angle", φ over π/2; "log-sigma", log(tan φ)/4, [EDM]'s c_noise; "step", the
    schedule's step with fractions between two; "nearest-step", a whole number. None: log-sigma for EDM's F, else angle.
    Sinusoids of the step are smooth, so such networks hear fractions; a network that looks its step up in a table
    cannot."""
    unconditional: UNetConfig | None = None
    """Of a teacher that is two networks: the one that guides the one with classes, which knows no null class."""
    sources: tuple[Source, ...] = ()
    """Of an imported teacher and its students: what the teacher was made from."""

    latents: Latents | None = None
    """How its images were scaled, where they are a VAE's latents."""

    @property
    def limit(self) -> float | None:
        """Of what it predicts: images lie in [−1, 1], latents anywhere."""
        return 1.0 if self.latents is None else None

    @property
    def can_guide(self) -> bool:
        """Whether there is an unconditional model beside the class-conditional one, for `Guided`."""
        return bool(self.unet.num_classes) and (self.unet.null_class or self.unconditional is not None)

    @property
    def guides_itself(self) -> bool:
        """Whether w is an input of the network, and guidance takes no second call."""
        return self.guidance_range is not None and self.kind != "two_student"

    def to_dict(self) -> dict:
        return asdict(self) | {"schedule": self.schedule.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> DenoiserConfig:
        """Raises ValueError (unknown fields or values) or KeyError (missing ones)."""
        values = dict(values)
        values["unet"] = config_from_dict(values["unet"])
        values["schedule"] = schedule.from_dict(values["schedule"])
        values["class_names"] = tuple(values.get("class_names", ()))
        values["sources"] = tuple(Source(**source) for source in values.get("sources", ()))
        if values.get("unconditional") is not None:
            values["unconditional"] = config_from_dict(values["unconditional"])
        if values.get("latents") is not None:
            values["latents"] = Latents(**values["latents"])
        if values.get("guidance_range") is not None:
            values["guidance_range"] = tuple(values["guidance_range"])
        try:
            config = cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None
        known = (*rotation.PARAMETERIZATIONS, "eps-x")
        if config.kind not in KINDS or config.parameterization not in known:
            raise ValueError(f"unknown kind {config.kind!r} or parameterization {config.parameterization!r}")
        if (config.parameterization == "eps-x") != (config.unet.outputs == 2):
            raise ValueError(f"{config.unet.outputs} outputs cannot be {config.parameterization!r}")
        if config.time not in (None, *TIMES):
            raise ValueError(f"unknown time {config.time!r}; known: {', '.join(TIMES)}")
        if config.time in ("step", "nearest-step") and not isinstance(config.schedule, schedule.StepSchedule):
            raise ValueError(f"time {config.time!r} needs a schedule of steps, not {config.schedule}")
        return config


class UnknownNetwork(ValueError):
    """Nothing is known that builds a network of this name."""


def is_guidance(w: float) -> bool:
    """Whether a number can be a guidance strength; NaN cannot."""
    return 0 <= w <= MAX_GUIDANCE


class Denoiser(nn.Module):
    """forward(z, angle, label=None, guidance=None) -> velocity, float32, of z's shape.

    z (B, C, H, W); angle (B,) in (0, π/2]; label (B,) int64, None for the null class; guidance (B,), None for w = 0.
    `network_rows` counts the images that went through the network, so that calls per image can be measured.
    """

    def __init__(self, config: DenoiserConfig, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.network = _network(config) if network is None else network
        self.frozen = frozenset(name for name, p in self.network.named_parameters() if not p.requires_grad)
        self.network_rows = 0

    def requires_grad_(self, requires_grad: bool = True) -> Denoiser:
        """As of any module, but what the network's own code has frozen stays so."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen)
        return self

    @property
    def schedule(self) -> schedule.Schedule:
        return self.config.schedule

    @property
    def num_classes(self) -> int:
        return self.config.unet.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.unet.image_channels, *self.config.unet.image_size

    def weights_sha256(self) -> str:
        """Of names, dtypes, shapes and values of the weights, on whatever device they are."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            plain = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
            digest.update(plain.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def velocity_coefficients(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B), float64 (B,), with v = A·z + B·F for the network's only output F."""
        return rotation.velocity_coefficients(self.config.parameterization, angle)

    def network_output(self, z: Tensor, angle: Tensor, label: Tensor | None, guidance: Tensor | None) -> Tensor:
        """The network's raw output F, in its own parameterization: (B, C, H, W), of two outputs (B, 2·C, H, W)."""
        self.network_rows += z.shape[0]  # len(z) would fix the size where a graph is traced
        if self.config.parameterization == "edm":
            z = z * rotation.edm_input_scale(angle).to(z.dtype)[:, None, None, None]
        return self.network(z, self.time(angle).float(), label, guidance)

    def time(self, angle: Tensor) -> Tensor:
        """What the network hears at an angle, (B,)."""
        match self.config.time or ("log-sigma" if self.config.parameterization == "edm" else "angle"):
            case "log-sigma":
                return torch.log(torch.tan(angle.double())) / 4
            case "step":
                return self.schedule.step(angle)
            case "nearest-step":
                return self.schedule.step(angle).round()
        return angle / (torch.pi / 2)

    def both_outputs(self, z: Tensor, angle: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """F of the classes and F without: one call on 2B rows, or one of each network where there are two."""
        if self.config.unconditional is not None:
            return self.network_output(z, angle, label, None), self.network_output(z, angle, None, None)
        both = torch.cat([label, torch.full_like(label, self.num_classes)])
        output = self.network_output(torch.cat([z, z]), torch.cat([angle, angle]), both, None)
        return output.unflatten(0, (2, -1)).unbind()  # a chunk would fix the size where a graph is traced

    def conditional(self) -> Denoiser:
        """Where there are two networks, the one with classes alone, sharing its weights; else this denoiser."""
        if self.config.unconditional is None:
            return self
        made = Denoiser(replace(self.config, unconditional=None), self.network.conditional)
        prefix = "conditional."
        made.frozen = frozenset(name.removeprefix(prefix) for name in self.frozen if name.startswith(prefix))
        return made.train(self.training)

    def affine(self, z: Tensor, angle: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Affine:
        """The velocity as an affine function of z and the raw network output, for the fused operations."""
        return rotation.affine(self.config.parameterization, self.network_output(z, angle, label, guidance), angle)

    def forward(self, z: Tensor, angle: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        return self.affine(z, angle, label, guidance).apply(z)


class Pair(nn.Module):
    """A conditional network without a null class and an unconditional one: the second is called by label None."""

    def __init__(self, conditional: nn.Module, unconditional: nn.Module):
        super().__init__()
        self.conditional, self.unconditional = conditional, unconditional

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None, guidance: Tensor | None) -> Tensor:
        return (self.unconditional if label is None else self.conditional)(z, time, label, guidance)


def blank(config: DenoiserConfig) -> Denoiser:
    """A denoiser whose weights mean nothing yet, for `filled` or for its shapes: on the `meta` device if it can be.

    Networks of one's own are built on the CPU, as their code may need values. Raises UserError that names a tensor of
    one that no checkpoint would bring back.
    """
    if config.network in OURS:
        with torch.device("meta"):
            return Denoiser(config)
    with torch.random.fork_rng(devices=[]):
        denoiser = Denoiser(config)
        if kept := dict(unsaved(denoiser.network)):
            again = dict(unsaved(Denoiser(config).network))
            for name, tensor in kept.items():
                if not torch.equal(tensor, again.get(name, tensor.new_empty(0))):
                    raise UserError(
                        f"the network {config.network!r} makes its tensor {name} anew each time, with other values, "
                        "and no checkpoint holds it: make it a parameter or a buffer that is saved"
                    )
    return denoiser


def filled(denoiser: Denoiser, weights: dict[str, Tensor]) -> Denoiser:
    """A `blank` denoiser with the weights of its network, which on `meta` are taken as they are, and else copied."""
    on_meta = all(tensor.is_meta for tensor in denoiser.network.state_dict().values())
    denoiser.network.load_state_dict(weights, assign=on_meta)
    return denoiser


def moved(denoiser: Denoiser, device: str | torch.device) -> Denoiser:
    """On a device, channels-last. Raises UserError that names a tensor of the network which stayed behind."""
    denoiser = denoiser.to(device, memory_format=torch.channels_last)
    for name, tensor in unsaved(denoiser.network):
        if tensor.device.type != torch.device(device).type:
            raise UserError(
                f"the network {denoiser.config.network!r} keeps its tensor {name} where `to` does not see it, so that "
                f"it stays on {tensor.device.type} and not on {device}: register it by register_buffer(…, "
                "persistent=False)"
            )
    return denoiser


def unsaved(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network that its state_dict does not have, by name: unsaved buffers and plain attributes."""
    registered = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    for prefix, module in network.named_modules():
        for key in module._non_persistent_buffers_set:
            yield f"{prefix}.{key}".lstrip("."), module._buffers[key]
        for key in module.__dict__.keys() - _MODULE:
            for name, tensor in _tensors(key, module.__dict__[key]):
                if id(tensor) not in registered:
                    yield f"{prefix}.{name}".lstrip("."), tensor


_MODULE = nn.Module().__dict__.keys()  # what PyTorch itself keeps in a module


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an attribute: itself, or those in its list, tuple or dictionary."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(f"{name}[{key!r}]", item)


def _network(config: DenoiserConfig) -> nn.Module:
    if config.network not in NETWORKS:
        raise UnknownNetwork(f"the network {config.network!r} is not in fastdiff.denoiser.NETWORKS")
    build = NETWORKS[config.network]
    if config.unconditional is None:
        return build(config.unet)
    return Pair(build(config.unet), build(config.unconditional))


class Guided(nn.Module):
    """Classifier-free guidance: v_w = (1+w)·v_cond − w·v_uncond ([GD] eq. 3), in one call on 2B rows.

    Same signature as `Denoiser`; label is needed. guidance None (or all zeros on the CPU, where looking costs nothing)
    makes one call on B rows. Raises ValueError for an unconditional denoiser, and for guidance by one that knows no
    null class.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        if not denoiser.num_classes:
            raise ValueError("guidance needs a class-conditional model, and this one is unconditional")
        if denoiser.config.parameterization == "eps-x":
            raise ValueError("guidance by two calls is of networks with one output, and this one has two")
        self.denoiser = denoiser

    @property
    def config(self) -> DenoiserConfig:
        return self.denoiser.config

    @property
    def schedule(self) -> schedule.Schedule:
        return self.denoiser.schedule

    @property
    def num_classes(self) -> int:
        return self.denoiser.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.denoiser.image_shape

    @property
    def network_rows(self) -> int:
        return self.denoiser.network_rows

    def affine(self, z: Tensor, angle: Tensor, label: Tensor, guidance: Tensor | None = None) -> Affine:
        looks = guidance is not None and guidance.device.type == "cpu" and not is_compiling()
        if guidance is None or (looks and not guidance.any()):
            return self.denoiser.affine(z, angle, label)
        if not self.config.can_guide:
            raise ValueError("guidance needs an unconditional model, and this one has no null class")
        conditional, unconditional = self.denoiser.both_outputs(z, angle, label)
        coef_z, coef_f = self.denoiser.velocity_coefficients(angle)
        w = guidance.double()  # 1 + w loses digits in float32, and the coefficient may be large
        return Affine(conditional, coef_z, coef_f * (1 + w), unconditional, -coef_f * w)

    def forward(self, z: Tensor, angle: Tensor, label: Tensor, guidance: Tensor | None = None) -> Tensor:
        return self.affine(z, angle, label, guidance).apply(z)


def with_guidance(denoiser: Denoiser) -> Denoiser | Guided:
    """The model to sample from: a class-conditional one without guidance inside is wrapped in `Guided`."""
    return denoiser if denoiser.config.guides_itself or not denoiser.num_classes else Guided(denoiser)


def fitted(denoiser: Denoiser, dataset: Dataset, source: str | Path) -> Dataset:
    """The data set with its labels in the order of the model's classes, which their names decide.

    Warns where names differ; then, and where one has none, numbers count. Raises UserError if a model and a data set do
    not go together.
    """
    if tuple(dataset.shape) != tuple(denoiser.image_shape):
        raise UserError(
            f"the data set {dataset.name} has images of {'×'.join(map(str, dataset.shape))}, "
            f"but the model in {source} makes "
            f"{'×'.join(map(str, denoiser.image_shape))}: give --data the set that it was trained on"
        )
    ours, theirs = denoiser.config.latents, dataset.latents
    if (ours is None) != (theirs is None) or (ours and (ours.scale, ours.shift) != (theirs.scale, theirs.shift)):
        raise UserError(
            f"the data set {dataset.name} holds {_kind(theirs)}, but the model in {source} makes {_kind(ours)}: give "
            "--data the set that it was trained on"
        )
    if denoiser.num_classes and dataset.num_classes != denoiser.num_classes:
        raise UserError(
            f"the data set {dataset.name} has {dataset.num_classes} classes, but the model in {source} has "
            f"{denoiser.num_classes}: give --data the set that it was trained on"
        )
    ours, theirs = denoiser.config.class_names, dataset.class_names
    if not ours or not theirs or ours == theirs:
        return dataset
    if sorted(ours) != sorted(theirs):
        one, other = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
        files.warn(
            f"the classes of the data set {dataset.name} have other names than those of the model in {source} "
            f"({other!r} where that has {one!r}): they are taken by number"
        )
        return dataset
    files.warn(f"the model in {source} has the classes of {dataset.name} in another order: they are taken by name")
    return dataset.in_order_of(ours)


def _kind(latents: Latents | None) -> str:
    return "images" if latents is None else f"latents scaled by {latents.scale:g} (shift {latents.shift:g})"
