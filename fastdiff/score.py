"""`fastdiff evaluate --features FILE`: scores on the features of a given network, in passes that can be resumed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff import data, distributed, features, files
from fastdiff.errors import UserError
from fastdiff.features import Extractor, Gaussian
from fastdiff.generate import Sampling, generate

PASS = 5000  # images between two saves


class Real:
    """What generated images are compared with: an npz of mu and sigma, or a data set, whose features are then known.

    Raises UserError for moments of features of another width.
    """

    def __init__(self, extractor: Extractor, dataset: data.Dataset | None, reference: Path | None):
        self.features = None if dataset is None else extractor.of_dataset(dataset)
        self.labels = None if dataset is None or not dataset.num_classes else torch.from_numpy(dataset.labels)
        self.gaussian = Gaussian.load(reference) if dataset is None else Gaussian.of(self.features)
        self.name = str(reference) if dataset is None else f"{dataset.name}, {dataset.split}: {len(dataset)} images"
        if len(self.gaussian.mean) != extractor.width:
            raise UserError(
                f"--reference {self.name} is of {len(self.gaussian.mean)} features, and --features {extractor.path} "
                f"returns {extractor.width}: give those that belong together"
            )

    def chosen_labels(self, num: int) -> Tensor | int:
        """The real images' classes in their own frequencies, or all in turn where none are known."""
        return num if self.labels is None else self.labels[torch.arange(num) * len(self.labels) // num]


def score(
    model: nn.Module,
    extractor: Extractor,
    real: Real,
    sampling: Sampling,
    *,
    num: int,
    decode: Callable[[Tensor], Tensor],
    saved: Path,
    key: str,
) -> dict:
    """A row of scores of num images; what is made is saved every PASS images beside `saved`, under a hash of `key`.

    Interrupted, it goes on from there: image i is a function of the seed and i.
    """
    sampling = sampling.settled(model.config)
    told = {"sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.guidance, "seed": sampling.seed}
    how = {key: value for key, value in asdict(sampling).items() if key not in ("batch_size", "graph")}
    digest = hashlib.sha256(json.dumps([key, how, num, PASS]).encode()).hexdigest()
    labels = real.chosen_labels(num) if model.num_classes else num
    rows, made, seconds, parts = model.network_rows, 0, 0.0, []
    for number, ids in enumerate(torch.arange(num).split(PASS)):
        place = saved.with_name(f".{saved.name}.{digest[:12]}-{number}.safetensors")
        found = _read(place, len(ids))
        if found is None:
            start = time.perf_counter()
            of = labels[ids] if isinstance(labels, Tensor) else _in_turn(ids, model)
            found = torch.cat(list(_features(model, of, ids, sampling, extractor, decode)))
            seconds, made = seconds + time.perf_counter() - start, made + len(ids)
            distributed.first(lambda place=place, found=found: _write(place, found))
        parts.append(found)
    generated = torch.cat(parts)
    calls = int(distributed.total(torch.tensor(model.network_rows - rows)))
    row = told | {
        "nfe": calls / made if made else None,
        "distance": round(Gaussian.of(generated).distance(real.gaussian), 4),
        "images_per_second": round(made / seconds, 2) if made else None,
        "num": num,
    }
    if real.features is not None:
        row["kid"] = round(features.kid(real.features, generated), 6)
        row["precision"], row["recall"] = (round(n, 4) for n in features.precision_recall(real.features, generated))
    return row


def _in_turn(ids: Tensor, model: nn.Module) -> Tensor | int:
    return ids % model.num_classes if model.num_classes else len(ids)


def _features(model, labels, ids: Tensor, sampling: Sampling, extractor: Extractor, decode) -> Iterator[Tensor]:
    for images in generate(model, labels, sampling, noise_ids=ids):
        here = distributed.part(torch.arange(len(images)))
        pixels = data.to_uint8(decode(images[here.to(images.device)])).cpu()
        yield distributed.gather(extractor(pixels), len(images))


def _read(place: Path, count: int) -> Tensor | None:
    """What a pass left, if it is whole."""
    try:
        found = load_file(place)["features"].clone()
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == count else None


def _write(place: Path, found: Tensor) -> None:
    try:
        with files.writing(place) as writing:
            save_file({"features": found.contiguous()}, writing)
    except OSError as error:
        raise UserError(f"{place} was not written ({error.strerror}): make room there") from None


def unfinished(saved: Path, command: str) -> bool:
    """Whether these are the first rows of a command, by its hash, that was interrupted."""
    try:
        return bool(_passes(saved)) and json.loads(saved.read_text())["reference"]["command"] == command
    except (OSError, ValueError, KeyError, TypeError):
        return False


def forget(saved: Path) -> None:
    """Remove what passes left, once all results are written."""
    for place in _passes(saved):
        place.unlink()


def _passes(saved: Path) -> list[Path]:
    return [*saved.parent.glob(f".{saved.name}.*-*.safetensors")]


def key_of(model: nn.Module, extractor: Extractor, dataset: data.Dataset | None, vae: Path | None) -> str:
    """What generated features depend on, beside how they are drawn."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    real = None if dataset is None else dataset.fingerprint
    return json.dumps([weights.hexdigest(), model.config.to_dict(), extractor.sha256, real, str(vae)])


def table(rows: list[dict], name: str) -> str:
    """Rows of scores as Markdown."""
    keys = [key for key in rows[0] if key not in ("seed", "sampler")]
    lines = ["| " + " | ".join(name if key == "distance" else key for key in keys) + " |", "|---" * len(keys) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows)])
