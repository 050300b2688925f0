"""In what space samples are compared with a data set, and with which rows of it."""

from typing import Any

import torch
from torch import Tensor

from pyrogen.data import Data
from pyrogen.evaluation.features import feature_classifier
from pyrogen.inference.batches import as_batch
from pyrogen.inference.turns import seeded

__all__ = ["compared_in"]


def compared_in(data: Any, parts: Any, seed: int) -> dict[str, Any]:
    """What :func:`pyrogen.evaluate` takes for ``features`` and ``training``, where samples are to be compared.

    Args:
        data: What was fitted. Labelled images get a classifier, whose features are the space; others are compared by
            their values.
        parts: The parts of the evaluation.
        seed: Of the classifier.
    """
    if parts != "all" and "samples" not in parts:
        return {}
    with seeded(seed, torch.device("cpu")):
        if isinstance(data, Data):
            training, features = data.prepare(data.train), None
            if data.train_labels is not None and len(data.event_shape) == 3:
                features = feature_classifier(training, data.train_labels, seed=seed)
            return {"features": features, "training": training}
    tensors = isinstance(data, (Tensor, tuple, list))
    return {"training": as_batch(data)[0]} if tensors else {}
