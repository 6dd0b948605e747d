"""Score a checkpoint: `python -m fastdiff.evaluate --checkpoint … --guidance 0 1 4 --num 10000 --out results.json`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastdiff import checks, cli, data, distributed, files, metrics, score
from fastdiff.denoiser import fitted
from fastdiff.errors import UserError
from fastdiff.features import Extractor
from fastdiff.generate import Sampling, generate
from fastdiff.metrics import Row, find
from fastdiff.sample import SamplingOptions
from fastdiff.vae import Vae, decoder


@dataclass(frozen=True)
class Reference:
    """Real images to compare with: their moments and the extractor that made them."""

    dataset: data.Dataset
    extractor: metrics.Extractor
    moments: metrics.Moments
    floor: float

    @classmethod
    def load(cls, spec: str, *, device: str = "cpu", background: str = "white") -> Reference:
        """The training split of a data set. Raises UserError as `metrics.check_scorable` does."""
        extractor = metrics.load_extractor(spec, device=device, background=background)
        dataset = data.load(spec, "train", background=background)
        first, second = metrics.halves(extractor, dataset)
        return cls(dataset, extractor, first + second, metrics.frechet_distance(first, second))

    def describe(self) -> dict:
        return {
            "data": self.dataset.name,
            "split": self.dataset.split,
            "images": len(self.dataset),
            "extractor": self.extractor.name,
            "extractor_test_accuracy": round(self.extractor.accuracy, 4),
            "half_against_half_fd": round(self.floor, 4),
            "score": round(self.moments.score(), 4),
        }


def evaluate(
    model: nn.Module, reference: Reference, sampling: Sampling, *, name: str, num: int, vae: Vae | None = None
) -> Row:
    """num images with the reference's own label frequencies, scored, timed, and calls counted; guidance is a number.

    vae: makes images of a model's latents. Raises UserError where images are not finite.
    """
    sampling, labels = sampling.settled(model.config), num
    if model.num_classes:
        evenly = torch.arange(num) * len(reference.dataset) // num  # data sets may be sorted by class
        dataset, names = reference.dataset, model.config.class_names
        if sorted(names) == sorted(dataset.class_names):
            dataset = dataset.in_order_of(names)
        labels = torch.from_numpy(dataset.labels[evenly.numpy()])
    decode = decoder(vae)
    moments, rows, seconds = metrics.Moments(), model.network_rows, 0.0
    chunks = generate(model, labels, sampling)
    while True:
        start = time.perf_counter()
        images = next(chunks, None)
        if images is None:
            break
        images = decode(images).cpu()  # waits for the device, so that the time is the samples' own
        seconds += time.perf_counter() - start
        reference.extractor.add(moments, images, what=f"images of {name} at w = {sampling.guidance:g}")
    calls = int(distributed.total(torch.tensor(model.network_rows - rows)))
    return Row(
        model=name,
        sampler=sampling.sampler,
        steps=sampling.steps,
        nfe=calls / num,
        guidance=sampling.guidance,
        fd=round(metrics.frechet_distance(moments, reference.moments), 4),
        score=round(moments.score(), 4),
        images_per_second=round(num / seconds, 2),
        num=num,
        seed=sampling.seed,
    )


def table(rows: Sequence[Row], reference: dict) -> str:
    """Rows of `evaluate` as Markdown: a line a model and step count, a column a guidance strength."""
    strengths = sorted({row.guidance for row in rows})
    lines = [
        "| model | steps | " + " | ".join(f"w = {w:g}: calls | FD | score" for w in strengths) + " |",
        "|---|---:|" + "---:|---:|---:|" * len(strengths),
    ]
    for model, steps in dict.fromkeys((row.model, row.steps) for row in rows):
        cells = []
        for w in strengths:
            row = find(rows, model, steps, w)
            cells += [f"{row.nfe:g}", f"{row.fd:.2f}", f"{row.score:.2f}"] if row else [""] * 3
        lines.append(f"| {model} | {steps} | " + " | ".join(cells) + " |")
    nums = sorted({row.num for row in rows})
    lines += [
        "",
        f"FD: Fréchet distance on features of {reference['extractor']} (test accuracy "
        f"{reference['extractor_test_accuracy']:.1%}), not FID. {' or '.join(map(str, nums))} samples against the "
        f"{reference['images']} images of {reference['data']}'s {reference['split']} split, seed {rows[0].seed}. "
        f"One half of those images against the other: {reference['half_against_half_fd']:.2f}. Score: exp of the mean "
        f"KL of the predicted classes to their marginal; the real images have {reference['score']:.2f}.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    data: str = "digits"
    """The data set to compare with; its training split is the reference."""
    background: str = "white"
    """What its transparent pictures are laid on: a colour, or none to drop their alpha."""
    guidance: tuple[float, ...] = (0.0,)
    """One or several guidance strengths w."""
    num: int = 10_000
    features: Path | None = None
    """A network for the features, as a TorchScript file that takes uint8 (N, 3, H, W), such as the Inception of FID; or
    torch-fidelity, for the one of that library; default: a classifier of --data, trained once. Interrupted, the same
    command goes on."""
    reference: Path | None = None
    """With --features: an npz with mu and sigma of the real images, instead of --data."""
    fid: bool = False
    """Say that --features is the network of FID, so that the distance is called so; of known ones it is."""
    out: Path = Path("results.json")
    """Holds the rows that are done at any time."""


def main(options: Options) -> None:
    """Score a checkpoint against a data set."""
    if options.num == 1:
        raise UserError("--num 1: a score needs at least 2 images")
    if not options.guidance:
        raise UserError("--guidance needs at least one number")
    model = options.load()
    checks.finite(model, options.checkpoint)
    for guidance in options.guidance:
        checks.guidance(model, guidance)
    vae = options.decoder(model)
    if options.features is not None:
        _score_on_features(options, model, vae)
        return
    if options.reference is not None or options.fid:
        raise UserError("--reference and --fid are of the features of a given network: name it by --features")
    distributed.first(lambda: checks.output(options.out, options.overwrite, file=True))
    _comparable(model, vae, options)
    reference = Reference.load(options.data, device=options.device, background=options.background)
    rows: list[Row] = []
    sampling = options.sampling(model, options.num, guidance=0.0)
    for guidance in options.guidance:
        one = replace(sampling, guidance=guidance)
        rows.append(evaluate(model, reference, one, name=str(options.checkpoint), num=options.num, vae=vae))
        results = {"reference": reference.describe(), "rows": [asdict(row) for row in rows]}
        if distributed.is_first():
            print(json.dumps(results["rows"][-1]), flush=True)
        text = json.dumps(results, indent=1) + "\n"
        distributed.first(partial(files.replace, options.out, text))
    if distributed.is_first():
        print(table(rows, reference.describe()))


def _score_on_features(options: Options, model: nn.Module, vae: Vae | None) -> None:
    """Write the scores on the features of a given network; what the same command has left of them is not in its way."""
    made = model.image_shape if vae is None else vae.image_shape(model.image_shape)
    extractor = Extractor(options.features, made, options.device)
    dataset = _comparable(model, vae, options) if options.reference is None else None
    sampling, rows = options.sampling(model, options.num, guidance=0.0), []
    key = score.key_of(model, extractor, dataset, options.vae)
    wanted = [key, repr(sampling), options.num, options.guidance, str(options.reference)]
    command = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    goes_on = score.unfinished(options.out, command)
    distributed.first(lambda: checks.output(options.out, options.overwrite or goes_on, file=True))
    real = score.Real(extractor, dataset, options.reference)
    how = {"num": options.num, "decode": decoder(vae), "saved": options.out, "key": key}
    name = "FID" if options.fid or extractor.is_fid else "distance"
    about = {"distance": name, "features": extractor.name, "real": real.name, "checkpoint": str(options.checkpoint)}
    about["command"] = command
    for guidance in options.guidance:
        one = replace(sampling, guidance=guidance)
        rows.append(score.score(model, extractor, real, one, **how))
        if distributed.is_first():
            print(json.dumps(rows[-1]), flush=True)
        text = json.dumps({"reference": about, "rows": rows}, indent=1) + "\n"
        distributed.first(partial(files.replace, options.out, text))
    if distributed.is_first():
        score.forget(options.out)
        print(score.table(rows, name))
        print(f"{name} on the features of {extractor.name}, against {real.name}")


def _comparable(model: nn.Module, vae: Vae | None, options: Options) -> data.Dataset:
    """The data that images are compared with. Raises UserError where they cannot be."""
    dataset = data.load(options.data, "train", background=options.background)
    if dataset.latents is not None:
        raise UserError(f"--data {options.data} holds latents: name the images that they were made of")
    if vae is None:
        return fitted(model, dataset, options.checkpoint)
    made = vae.image_shape(model.image_shape)
    if tuple(dataset.shape) != made or model.num_classes not in (0, dataset.num_classes):
        raise UserError(
            f"the data set {dataset.name} has {dataset.num_classes} classes and images of "
            f"{'×'.join(map(str, dataset.shape))}, but {options.checkpoint} has {model.num_classes} and, by "
            f"--vae {options.vae}, makes {'×'.join(map(str, made))}: give --data the set that it was trained on"
        )
    return dataset


if __name__ == "__main__":
    cli.run(main, Options)
