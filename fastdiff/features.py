"""Scores on the features of a given network, as papers report them: Fréchet distance, KID, precision and recall.

The network is a TorchScript file that takes uint8 (N, 3, H, W) and returns (N, D), as the Inception of FID is
distributed, or that Inception as torch-fidelity has it. Which network and which real images make a distance what it is:
it is called FID where the network is known to be FID's, or if one says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import data, distributed
from fastdiff.errors import UserError
from fastdiff.metrics import frechet_of_gaussians

TORCH_FIDELITY = "torch-fidelity"  # in place of a file: that library's Inception
FIDS = {  # the networks that make a distance FID, by SHA-256 of their files
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "NVIDIA's inception-2015-12-05.pt"
}
AT_A_TIME = 128  # images
SUBSETS, SUBSET = 100, 1000  # of KID: so many, of so many images
NEIGHBOURS = 3  # whose farthest is the radius around an image, for precision and recall
COMPARED = 10_000  # images of each kind, at most, of which precision and recall compare all pairs


class Extractor:
    """The network in a TorchScript file, or torch-fidelity's, for images (C, H, W) of a shape.

    It is tried on one image, so that what it does not take is known before any are made. `is_fid`: whether it is known
    to be FID's. Raises UserError for any other file, and where torch-fidelity is not installed.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], device: str = "cpu"):
        self.path, self.device, self.how = path, device, {}
        if str(path) == TORCH_FIDELITY:
            self.network, self.name = _of_torch_fidelity()
            self.sha256, self.is_fid = self.name, True
        else:
            self.network, self.sha256 = _of_file(path, device)
            self.name, self.is_fid = f"{path.name} (SHA-256 {self.sha256[:12]}…)", self.sha256 in FIDS
            if "return_features" in [argument.name for argument in self.network.forward.schema.arguments]:
                self.how = {"return_features": True}  # NVIDIA's Inception returns classes otherwise
        self.network = self.network.to(device).eval()
        self.width = self(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Of images uint8 (N, C, H, W), grey or colour: (N, D) float32 on the CPU. Raises UserError where it cannot."""
        found = []
        for part in images.split(AT_A_TIME) if len(images) else ():
            try:
                made = self.network(part.expand(-1, 3, -1, -1).contiguous().to(self.device), **self.how)
            except Exception as error:
                raise UserError(f"--features {self.path} does not take uint8 (N, 3, H, W) ({_brief(error)})") from None
            made = made[0] if isinstance(made, tuple) and len(made) == 1 else made  # torch-fidelity's
            if not isinstance(made, Tensor) or made.ndim < 2 or len(made) != len(part):
                raise UserError(f"--features {self.path} returns no features (N, D), one row an image")
            found.append(made.flatten(1).float().cpu())
        return torch.cat(found) if found else torch.empty(0, self.width)

    def of_dataset(self, dataset: data.Dataset) -> Tensor:
        """(N, D) of all images of a data set; several processes take a part each."""
        count = len(dataset)
        here = distributed.part(torch.arange(count))
        made = [self(torch.from_numpy(dataset.images[ids.numpy()])) for ids in here.split(AT_A_TIME)]
        return distributed.gather(torch.cat(made), count)


def _of_file(path: Path, device: str) -> tuple[torch.jit.ScriptModule, str]:
    """The network in a TorchScript file, and the file's SHA-256. Raises UserError for any other file."""
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return torch.jit.load(path, map_location=device), sha256
    except OSError as error:
        raise UserError(f"--features {path} cannot be read ({error.strerror}): name a TorchScript file") from None
    except Exception as error:  # a foreign file may raise anything
        raise UserError(f"--features {path} is no TorchScript file ({_brief(error)})") from None


def _of_torch_fidelity() -> tuple[nn.Module, str]:
    """FID's Inception as torch-fidelity has it, and its name. Raises UserError where it or its weights are missing."""
    try:
        import torch_fidelity
        from torch_fidelity.utils import create_feature_extractor
    except ImportError:
        raise UserError(
            f"--features {TORCH_FIDELITY}: it is not installed; pip install torch-fidelity, or name a TorchScript file"
        ) from None
    try:
        network = create_feature_extractor("inception-v3-compat", ["2048"], cuda=False)
    except Exception as error:  # it downloads its weights, where they are not there yet
        raise UserError(f"--features {TORCH_FIDELITY}: its Inception could not be made ({_brief(error)})") from None
    return network, f"{TORCH_FIDELITY} {torch_fidelity.__version__}, inception-v3-compat, 2048"


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Of features (N, D), N ≥ 2."""
        return cls(features.double().mean(0), torch.cov(features.double().T))

    @classmethod
    def load(cls, path: Path) -> Gaussian:
        """From an npz with mu and sigma, as EDM and others distribute them. Raises UserError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in ("mu", "sigma"))
        except Exception as error:  # a foreign file may raise anything
            raise UserError(f"--reference {path} is no npz with mu and sigma ({_brief(error)})") from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"--reference {path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit"
            )
        return cls(mean, covariance)

    def distance(self, other: Gaussian) -> float:
        """Fréchet's."""
        return frechet_of_gaussians(self.mean, self.covariance, other.mean, other.covariance)


def kid(real: Tensor, generated: Tensor) -> float:
    """Kernel inception distance: the unbiased squared MMD with (x·y/D + 1)³, in the mean of random subsets.

    (N, D) and (M, D), at least 2 of each; subsets of 1000, or of all where there are fewer.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(SUBSET, len(real), len(generated))
    found = []
    for _ in range(SUBSETS if size < max(len(real), len(generated)) else 1):
        x, y = (each[torch.randperm(len(each), generator=generator)[:size]].double() for each in (real, generated))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in (xx, yy))
        found.append(within - 2 * xy.mean())
    return float(torch.stack(found).mean())


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """The share of generated images that lie among the real ones, and of real among generated (arXiv 1904.06991).

    An image lies among others if it is nearer to one of them than that is to its third neighbour. Of the first 10,000.
    """
    real, generated = real[:COMPARED].float(), generated[:COMPARED].float()
    return _share_within(generated, real), _share_within(real, generated)


def _share_within(images: Tensor, others: Tensor) -> float:
    count = min(NEIGHBOURS + 1, len(others))  # each is its own nearest
    radius = torch.cat([torch.cdist(part, others).kthvalue(count, dim=1).values for part in others.split(1000)])
    within = [(torch.cdist(part, others) <= radius).any(1) for part in images.split(1000)]
    return float(torch.cat(within).float().mean())
