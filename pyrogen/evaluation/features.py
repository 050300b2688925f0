"""Feature networks, in whose features samples and data are compared: what they return, checked, and a small classifier.

A feature network is any callable from images ``(n, *event_shape)`` to features ``(n, D)``; a classifier is a module
with a method ``probabilities``, or any callable from images to probabilities ``(n, K)``. Both see floats, and pixels in
[0, 1].
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrogen.arguments import as_device, check_counts, check_positive, checked
from pyrogen.data import as_float
from pyrogen.inference.checks import first_parameter
from pyrogen.inference.programs import evaluation_mode
from pyrogen.inference.turns import seeded
from pyrogen.networks.mlp import as_shape, dense, initialise

__all__ = [
    "ROWS",
    "FeatureClassifier",
    "check_sides",
    "class_labels",
    "class_probabilities",
    "feature_classifier",
    "features_of",
    "prepared_batches",
]

ROWS = 512
"""How many images go through a network at once."""
SMALLEST_SIDE = 8
"""Images smaller than this are read as vectors."""
LARGEST_LEFT = 7
"""Convolutions halve an image until its smaller side is this or less."""
CHANNELS = (16, 32, 64)
"""Of the convolutions; those past the last have as many as the last."""
KERNEL = 5
BATCH = 128
STEPS = 1200
LEARNING_RATE = 2e-3
TOLERANCE = 1e-3
"""By how much the probabilities of one image may fail to sum to 1."""


@checked()
class FeatureClassifier(nn.Module):
    r"""A small classifier whose last hidden layer gives features.

    .. math:: p(k \mid x) \propto \exp(w_k^\top h(x) + b_k)

    Images ``(C, H, W)`` with sides of 8 or more, of any size, go through convolutions of stride 2 until the smaller
    side is at most 7; other shapes are flattened. One hidden layer of ``features`` rectified units h follows, on
    vectors after one of 256. Values are first standardised by the moments of the training data, by channel or by value.

    Args:
        shape: Event shape E of the data.
        classes: Number K of classes.
        features: Number D of features.

    Shapes:
        samples ``(N, *E)``, floats or as they are stored, give features ``(N, D)``; :meth:`logits` and
        :meth:`probabilities` ``(N, K)``.

    Attributes:
        num_features: D.
        accuracy: The share of held-out rows that it classifies rightly; NaN where :func:`feature_classifier` has not
            set it. It is no part of the weights that ``state_dict`` gives.
        held_out: How many rows these are.

    Example:
        >>> classifier = FeatureClassifier((3, 20, 17), classes=5)
        >>> images = torch.rand(4, 3, 20, 17)
        >>> classifier(images).shape, classifier.probabilities(images).shape
        (torch.Size([4, 128]), torch.Size([4, 5]))
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, shape: int | Sequence[int], classes: int, features: int = 128) -> None:
        super().__init__()
        check_counts(classes=classes, features=features)
        self.shape = as_shape(shape)
        self.classes = classes
        self.num_features = features
        self.accuracy = math.nan
        self.held_out = 0
        self.is_image = len(self.shape) == 3 and min(self.shape[1:]) >= SMALLEST_SIDE
        per = (self.shape[0], 1, 1) if self.is_image else self.shape
        self.register_buffer("centre", torch.zeros(per))
        self.register_buffer("scale", torch.ones(per))
        layers, width = _convolutions(*self.shape) if self.is_image else ([], math.prod(self.shape))
        sizes = (width, features) if self.is_image else (width, 256, features)
        self.body = nn.Sequential(*layers, nn.Flatten(), *dense(sizes, nn.ReLU), nn.ReLU())
        self.last = nn.Linear(features, classes)
        initialise(self, last=self.last)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape or x.dim() == 0:
            raise ValueError(
                f"this classifier was built for samples of shape (N, {', '.join(map(str, self.shape))}), got "
                f"{tuple(x.shape)}; reshape or resize them, or train one on data of their shape"
            )
        return self.body((as_float(x).to(self.centre.dtype) - self.centre) / self.scale)

    def logits(self, x: Tensor) -> Tensor:
        """The unnormalised log-probabilities of the classes, ``(N, K)``."""
        return self.last(self(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """The probabilities of the classes, ``(N, K)``."""
        return self.logits(x).softmax(-1)

    def extra_repr(self) -> str:
        judged = f", accuracy {self.accuracy:.4f} on {self.held_out} held-out rows" if self.held_out else ""
        return f"{self.shape}, classes={self.classes}, features={self.num_features}{judged}"


def _convolutions(channels: int, height: int, width: int) -> tuple[list[nn.Module], int]:
    """Convolutions for an image, and how many values come of it."""
    layers: list[nn.Module] = []
    stage = 0
    while min(height, width) > LARGEST_LEFT:
        after = CHANNELS[min(stage, len(CHANNELS) - 1)]
        layers += [nn.Conv2d(channels, after, kernel_size=KERNEL, stride=2, padding=KERNEL // 2), nn.ReLU()]
        channels, height, width, stage = after, -(-height // 2), -(-width // 2), stage + 1
    return layers, channels * height * width


@checked()
def feature_classifier(
    x: Tensor,
    labels: Tensor,
    *,
    epochs: int | None = None,
    seed: int = 0,
    features: int = 128,
    held_out: tuple[Tensor, Tensor] | None = None,
    batch_size: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    device: torch.device | str | None = None,
) -> FeatureClassifier:
    """Train a :class:`FeatureClassifier` on a data set, for its features and for the Inception Score.

    Adam minimises the cross entropy, at a learning rate that falls to 0 as a half cosine. Figures in these features are
    comparable only where the network is the same: keep it, or its seed, with the figures. They are no published FID.
    Rows that it was trained on lie closer together in its features than others do; compare samples with held-out data.

    Args:
        x: Images or vectors ``(N, *event_shape)``, as they are stored or as floats.
        labels: Integers ``(N,)``, from 0.
        epochs: How often all rows are seen; by default so often that there are at least 1200 steps.
        seed: Of weights, order and held-out rows; the caller's random state is left as it was.
        features: The number of features.
        held_out: Rows and labels by which the accuracy is measured; by default a random tenth of ``x``, which is then
            not trained on.
        batch_size: Rows of a step; the remainder of an epoch is left out.
        learning_rate: At the first step.
        device: Where to train; by default where ``x`` is.

    Returns:
        The classifier in evaluation mode, with its ``.accuracy``.

    Raises:
        TypeError: If x is of a type whose meaning isn't known, or labels are no integers.
        ValueError: If x is empty or not finite, labels do not match it or are negative, or a number is below 1.

    Example:
        >>> import pyrogen as pg
        >>> data = pg.data.load("digits", binarize=None)
        >>> classifier = feature_classifier(data.train, data.train_labels, epochs=20)
        >>> classifier.accuracy > 0.9, classifier.held_out
        (True, 143)
    """
    check_counts(batch_size=batch_size, features=features)
    check_counts(or_none=True, epochs=epochs)
    check_positive(learning_rate=learning_rate)
    _check_labelled(x, labels, "x")
    device = as_device(device) if device is not None else x.device
    with seeded(seed, device):
        if held_out is None:
            if len(x) < 2:
                raise ValueError(f"a tenth can't be held out of {len(x)} row; give more, or held_out=(x, labels)")
            order = torch.randperm(len(x)).to(x.device)
            cut = max(1, len(x) // 10)
            held_out, x, labels = (x[order[:cut]], labels[order[:cut]]), x[order[cut:]], labels[order[cut:]]
        check_sides(x=x, held_out=held_out[0])
        _check_labelled(*held_out, "held_out")
        classes = int(max(labels.max(), held_out[1].max())) + 1
        classifier = FeatureClassifier(x.shape[1:], classes, features).to(device)
        _standardise(classifier, x)
        with torch.enable_grad():
            _train(classifier, x, labels, epochs, min(batch_size, len(x)), learning_rate)
    guessed = class_labels(classifier, held_out[0])
    classifier.accuracy = float((guessed == held_out[1].to(guessed.device)).double().mean())
    classifier.held_out = len(guessed)
    return classifier


def _check_labelled(x: Tensor, labels: Tensor, name: str) -> None:
    check_sides(**{name: x})
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        came = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"expected the labels of {name} as a tensor of integers, got {came}")
    if labels.shape != x.shape[:1] or int(labels.min()) < 0:
        least = f" from {int(labels.min())}" if labels.numel() else ""
        raise ValueError(
            f"expected one label a row of {name}, integers from 0 of shape ({len(x)},), got {tuple(labels.shape)}"
            f"{least}; relabel the rows"
        )
    for _ in prepared_batches(x, name, ROWS, None):
        pass


@torch.no_grad()
def _standardise(classifier: FeatureClassifier, x: Tensor) -> None:
    """Give a classifier the moments of its data; a value that never changes is left as wide as it is."""
    axes = (0, 2, 3) if classifier.is_image else (0,)
    total, squares = torch.zeros_like(classifier.centre), torch.zeros_like(classifier.centre)
    # Around a value of about the right size, so that the difference of squares keeps its digits.
    shift = next(prepared_batches(x, "x", ROWS, classifier.centre)).mean(axes, keepdim=True)[0]
    for batch in prepared_batches(x, "x", ROWS, classifier.centre):
        total += (batch - shift).sum(axes, keepdim=True)[0]
        squares += (batch - shift).square().sum(axes, keepdim=True)[0]
    count = len(x) * (math.prod(classifier.shape[1:]) if classifier.is_image else 1)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    classifier.centre.copy_(shift + mean)
    classifier.scale.copy_(torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.ones_like(deviation)))


def _train(
    classifier: FeatureClassifier, x: Tensor, labels: Tensor, epochs: int | None, batch_size: int, learning_rate: float
) -> None:
    per_epoch = len(x) // batch_size
    epochs = epochs or math.ceil(STEPS / per_epoch)
    device = classifier.centre.device
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    classifier.train()
    for _ in range(epochs):
        order = torch.randperm(len(x))[: per_epoch * batch_size].to(x.device)
        for rows in order.split(batch_size):
            classes = labels[rows.to(labels.device)].long().to(device)
            loss = F.cross_entropy(classifier.logits(x[rows].to(device)), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()


def features_of(network: Callable | None, *, rows: int = ROWS, **sides: Tensor) -> list[Tensor]:
    """Features of several sets of one event shape, in evaluation mode, without gradients, ``rows`` at once.

    Args:
        network: From ``(n, *event_shape)`` to ``(n, D)``; None takes the flattened values themselves.
        rows: How many rows go through the network at once.
        **sides: By the name that errors use, sets ``(N, *event_shape)``.

    Returns:
        Features ``(N, D)`` in double precision, where the network is, in the order of the sets.

    Raises:
        TypeError: If a set is no tensor of values whose meaning is known.
        ValueError: If a set is empty or not finite, shapes differ, or the network gives no finite ``(n, D)`` of one
            width.

    Example:
        >>> samples, data = torch.rand(5, 1, 8, 8), torch.rand(7, 1, 8, 8)
        >>> [tuple(h.shape) for h in features_of(None, samples=samples, data=data)]
        [(5, 64), (7, 64)]
    """
    check_counts(rows=rows)
    check_sides(**sides)
    found = {name: _outputs(network, x, name, rows, "features") for name, x in sides.items()}
    if len({h.shape[1] for h in found.values()}) > 1:
        widths = {name: h.shape[1] for name, h in found.items()}
        raise ValueError(f"expected features of one width, but the network's are {widths} wide; use one that is fixed")
    return [*found.values()]


def class_probabilities(classifier: Callable | Tensor, x: Tensor, *, rows: int = ROWS) -> Tensor:
    """The probabilities that a classifier gives, or a tensor of them, checked.

    Args:
        classifier: A module with a method ``probabilities``, a callable from ``(n, *event_shape)`` to ``(n, K)``, or
            probabilities ``(N, K)`` of the samples.
        x: Samples ``(N, *event_shape)``.
        rows: How many rows go through the classifier at once.

    Returns:
        ``(N, K)`` in double precision.

    Raises:
        TypeError: If x is no tensor of values whose meaning is known.
        ValueError: If x is empty or not finite, or these are no probabilities.
    """
    check_counts(rows=rows)
    check_sides(samples=x)
    if isinstance(classifier, Tensor):
        found = _exactly(classifier, x, "probabilities")
    else:
        found = _outputs(classifier, x, "samples", rows, "probabilities")
    sums = found.sum(1)
    if not (bool((found >= 0).all()) and bool(((sums - 1).abs() < TOLERANCE).all())):
        raise ValueError(
            f"expected probabilities, which are not negative and sum to 1 for each of the samples, got values from "
            f"{float(found.min()):.3g} to {float(found.max()):.3g} with sums from {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}; of logits pass lambda x: network(x).softmax(-1)"
        )
    return found / sums.unsqueeze(1)


def class_labels(classifier: Callable | Tensor, x: Tensor, *, rows: int = ROWS) -> Tensor:
    """The most probable class of each of the samples ``(N,)``, or a tensor of such labels, checked.

    Args:
        classifier: As :func:`class_probabilities`, or integers ``(N,)``.
        x: Samples ``(N, *event_shape)``.
        rows: How many rows go through the classifier at once.

    Raises:
        TypeError: If x is no tensor of values whose meaning is known.
        ValueError: If x is empty or not finite, labels do not match it, or the classifier gives no probabilities.
    """
    if isinstance(classifier, Tensor) and not classifier.is_floating_point():
        _check_labelled(x, classifier, "samples")
        return classifier.long()
    return class_probabilities(classifier, x, rows=rows).argmax(1)


def check_sides(**sides: Tensor) -> None:
    """Raise an error unless these are sets of rows of one event shape, of types whose meaning is known."""
    for name, x in sides.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"expected {name} as a tensor (N, *event_shape), got {type(x).__name__}; of what pyrogen.data.load "
                "returns pass a split, such as data.test"
            )
        if x.dim() == 0 or x.numel() == 0:
            raise ValueError(f"expected {name} of shape (N, *event_shape) with at least one row, got {tuple(x.shape)}")
        as_float(x[:0])
    shapes = {name: tuple(x.shape[1:]) for name, x in sides.items()}
    if len({*shapes.values()}) > 1:
        raise ValueError(f"expected one event shape, got {shapes}; reshape or resize one of them")


def prepared_batches(x: Tensor, name: str, rows: int, like: Tensor | None) -> Iterator[Tensor]:
    """The rows of a set as floats, where and of what type a parameter is, ``rows`` at once; they have to be finite."""
    for start in range(0, len(x), rows):
        batch = as_float(x[start : start + rows])
        if not batch.isfinite().all():
            row = start + int((~batch.reshape(len(batch), -1).isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"expected {name} to be finite, but there is NaN or infinity in row {row} of {len(x)}; see whether the "
                "training has diverged, or leave such rows out"
            )
        yield batch if like is None else batch.to(like.device, like.dtype)


def _outputs(network: Callable | None, x: Tensor, name: str, rows: int, what: str) -> Tensor:
    """What a network gives for a set, ``(N, D)``, in double precision."""
    like = first_parameter(network)
    device = x.device if like is None else like.device
    call = getattr(network, what, network) if what == "probabilities" else network
    found = []
    # From a seed: a network that draws, unlikely as it is, then gives the same for the same rows.
    with evaluation_mode(network), torch.no_grad(), seeded(0, device):
        for batch in prepared_batches(x, name, rows, like):
            outputs = batch.reshape(len(batch), -1) if call is None else call(batch)
            found.append(_exactly(outputs, batch, what))
    if len({part.shape[1] for part in found}) > 1:
        raise ValueError(f"the network gives {what} of other widths for other batches; expected a fixed width")
    return torch.cat(found)


def _exactly(outputs: Tensor, x: Tensor, what: str) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(x) or not outputs.shape[1]:
        came = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"expected {what} of shape ({len(x)}, D) for {len(x)} rows, got {came}; reshape them")
    if not outputs.isfinite().all():
        wrong = int((~outputs.isfinite()).any(1).sum())
        raise ValueError(f"the {what} of {wrong} of {len(x)} rows are NaN or infinite; see what the network is given")
    # Apple's GPUs know no doubles.
    return (outputs.cpu() if outputs.device.type == "mps" else outputs).detach().double()
