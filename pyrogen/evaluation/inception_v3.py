"""Inception v3 as a feature network and as a classifier, with weights that are at hand."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception_v3

from pyrogen.arguments import checked
from pyrogen.data import as_float

__all__ = ["FidelityInception", "Inception", "inception"]

SIDE = 299
BATCH = 64
"""How many images are enlarged at once."""
FILES = {
    "torchvision": "inception_v3_google-0cc3c7bd.pth",
    "torch-fidelity": "weights-inception-2015-12-05-6726825d.pth",
}
"""What the weights are called where torch keeps what it has downloaded."""


class Inception(nn.Module):
    r"""Torchvision's Inception v3: the 2048 averages before its last layer, and 1000 classes.

    Images ``(N, C, H, W)`` of one channel, which is repeated, or three, with pixels in [0, 1], are resized to 299×299
    with antialiasing, bilinearly, and mapped to [-1, 1], as these weights were trained.

    Args:
        weights: Its parameters by name, as torchvision's file has them; None draws them at random.

    Attributes:
        num_features: 2048.

    Raises:
        ValueError: If these are parameters of another network; when called with other shapes or other pixels.
    """

    num_features = 2048

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        if weights is not None:
            # The branch that only training reads is left out.
            used = {name: x for name, x in weights.items() if not name.startswith("AuxLogits.")}
            with _explained("torchvision"):
                self.network.load_state_dict(used)
        self.last = self.network.fc
        self.network.fc = nn.Identity()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        images = _three_channels(x, self.last.weight)
        return torch.cat([self.network(2 * _resized(part) - 1) for part in images.split(BATCH)])

    def logits(self, x: Tensor) -> Tensor:
        """The unnormalised log-probabilities of the classes, ``(N, 1000)``."""
        return self.last(self(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """The probabilities of the classes, ``(N, 1000)``."""
        return self.logits(x).softmax(-1)


class FidelityInception(nn.Module):
    """The Inception v3 of 2015 that published FIDs, KIDs and Inception Scores are of, as torch-fidelity has it.

    Images as :class:`Inception`; they are rounded to 8 bits and resized as TensorFlow 1 did, without antialiasing.

    Args:
        path: The file of its weights.

    Attributes:
        num_features: 2048.

    Raises:
        ModuleNotFoundError: If torch-fidelity is not installed.
        ValueError: If the file holds anything but weights; when called with other shapes or other pixels.
    """

    num_features = 2048

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "these weights need torch-fidelity: python -m pip install torch-fidelity; or use torchvision's"
            ) from error
        _read(path)  # torch-fidelity would unpickle whatever is in it
        wanted = ["2048", "logits_unbiased"]
        with _explained("torch-fidelity"):
            self.network: Any = FeatureExtractorInceptionV3("inception", wanted, str(path))
        self.eval()

    def _outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images = (255 * _three_channels(x, next(self.network.parameters()))).round().to(torch.uint8)
        features, logits = zip(*(self.network(part) for part in images.split(BATCH)), strict=True)
        return torch.cat(features), torch.cat(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self._outputs(x)[0]

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities of 1008 classes, without the last biases, as published scores take them."""
        return self._outputs(x)[1]

    def probabilities(self, x: Tensor) -> Tensor:
        """The probabilities of the 1008 classes, ``(N, 1008)``."""
        return self.logits(x).softmax(-1)


@checked()
def inception(
    weights: str | os.PathLike[str] | None = None,
    *,
    kind: Literal["torchvision", "torch-fidelity"] = "torchvision",
    device: torch.device | str = "cpu",
) -> Inception | FidelityInception:
    """Inception v3 with trained weights, for images of natural scenes.

    Nothing is downloaded. Szegedy et al. 2016, *Rethinking the Inception architecture for computer vision*, 1512.00567.
    Published figures are of the network of 2015, ``kind="torch-fidelity"``; torchvision's gives other ones, which are
    comparable among themselves.

    Args:
        weights: The file of the weights; by default the one that torch keeps under ``torch.hub.get_dir()`` where it
            has been downloaded before.
        kind: Whose network and weights.
        device: Where it is to run.

    Returns:
        A feature network ``(N, C, H, W)`` to ``(N, 2048)`` in evaluation mode, which is a classifier too.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If torch-fidelity is asked for and not installed.
        ValueError: If the file holds no weights of this network, or the kind isn't known.

    Example:
        >>> inception("weights.pth")
        Traceback (most recent call last):
        ...
        FileNotFoundError: there are no weights of torchvision's Inception v3 at weights.pth; ...
    """
    if kind not in FILES:
        raise ValueError(f"kind must be one of {[*FILES]}, got {kind!r}")
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / FILES[kind]
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no weights of {kind}'s Inception v3 at {path}; download {FILES[kind]} and pass its path, or "
            "use the features of a feature_classifier trained on the data"
        )
    return FidelityInception(path).to(device) if kind == "torch-fidelity" else Inception(_read(path)).to(device)


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights by name, of a file that holds nothing else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (as published, and tensors only)
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise ValueError(f"{path} can't be read as weights of Inception v3 ({type(error).__name__})") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} holds no weights by name; save network.state_dict() with torch.save")
    return found


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Say in short which weights another network's are not."""
    try:
        yield
    except RuntimeError as error:
        first, *others = str(error).splitlines()
        reason = (others or [first])[0].strip()  # the first line is torch's own heading
        raise ValueError(f"these are no weights of {kind}'s Inception v3: {reason}") from error


def _resized(images: Tensor) -> Tensor:
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)


def _three_channels(x: Tensor, like: Tensor) -> Tensor:
    """Images of three channels with pixels in [0, 1], where and of what type a parameter is."""
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"Inception v3 takes images of shape (N, 1 or 3, H, W), got {tuple(x.shape)}; reshape them")
    x = as_float(x).to(like.device, like.dtype)
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"Inception v3 takes pixels in [0, 1], got values from {float(x.min()):.3g} to {float(x.max()):.3g}; "
            "rescale the images, or x.clamp(0, 1) what a sample's noise has carried outside"
        )
    return x.expand(-1, 3, -1, -1)
