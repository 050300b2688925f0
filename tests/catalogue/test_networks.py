"""Networks, families, likelihoods and models with wrong arguments."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from pyrogen import distributions, models, networks

MLP = networks.MLP
IMAGE = (1, 16, 16)
DECODER = MLP(2, 3, (4,))
IMAGES = {"inputs": IMAGE, "outputs": 4, "channels": (2, 2), "activation": nn.ReLU}
BACK = {"inputs": 4, "outputs": IMAGE, "channels": (2, 2), "activation": nn.ReLU}
FAMILY = {"features": 2, "context": 3}

Call = namedtuple("Call", "function arguments kinds right", defaults=({}, {}))
CALLS = {
    "MLP": Call(MLP, {"inputs": 3, "outputs": 2, "hidden": (4,), "activation": nn.ReLU}, right={"hidden": ("empty",)}),
    "ConvEncoder": Call(networks.ConvEncoder, IMAGES | {"hidden": (4,)}),
    "ConvDecoder": Call(networks.ConvDecoder, BACK | {"hidden": (4,)}),
    "ResNetEncoder": Call(networks.ResNetEncoder, IMAGES | {"blocks": 1}),
    "ResNetDecoder": Call(networks.ResNetDecoder, BACK | {"blocks": 1}),
    "ResidualBlock": Call(
        networks.ResidualBlock,
        {"inputs": 2, "outputs": 3, "resize": 2, "activation": nn.ReLU},
        kinds={"inputs": "count", "outputs": "count"},
    ),
    "RoscaEncoder": Call(
        networks.RoscaEncoder, {"inputs": (1, 16, 16), "outputs": 4, "channels": (2, 2, 2, 2), "slope": 0.2}
    ),
    "Critic": Call(
        networks.Critic,
        {"features": 3, "context": 2, "hidden": (4,), "outputs": 1, "spectral": False, "activation": nn.ReLU},
        kinds={"outputs": "count"},
    ),
    "Critic of images": Call(networks.Critic, {"features": IMAGE, "channels": (2, 2)}, kinds={"features": "shape"}),
    "Bernoulli": Call(distributions.Bernoulli, {"decoder": DECODER}),
    "ContinuousBernoulli": Call(distributions.ContinuousBernoulli, {"decoder": DECODER}),
    "CategoricalLikelihood": Call(distributions.CategoricalLikelihood, {"decoder": DECODER, "levels": 4}),
    "DiscretizedLogisticMixture": Call(
        distributions.DiscretizedLogisticMixture, {"decoder": DECODER, "components": 2, "levels": 4}
    ),
    "LaplaceLikelihood": Call(distributions.LaplaceLikelihood, {"decoder": DECODER, "scale": 1.0}),
    "NormalLikelihood": Call(distributions.NormalLikelihood, {"decoder": DECODER, "scale": 1.0}),
    "QuantizedNormal": Call(
        distributions.QuantizedNormal,
        {"decoder": DECODER, "levels": 4, "scale": "shared"},
        kinds={"scale": "choice"},
        right={"scale": ("a number",)},
    ),
    "Delta": Call(distributions.Delta, FAMILY),
    "Normal": Call(distributions.Normal, FAMILY),
    "MultivariateNormal": Call(distributions.MultivariateNormal, FAMILY),
    "StandardNormal": Call(distributions.StandardNormal, {"features": 2}),
    "Mixture": Call(distributions.Mixture, FAMILY | {"components": 2}),
    "Flow": Call(distributions.Flow, FAMILY | {"transform": "affine_autoregressive", "layers": 1, "hidden": (4,)}),
    "Implicit": Call(
        distributions.Implicit, FAMILY | {"noise": 2, "hidden": (4,), "inject": False}, right={"noise": ("zero",)}
    ),
    "Implicit with a network": Call(
        distributions.Implicit,
        FAMILY | {"noise": 2, "network": MLP(5, 2, (4,))},
        right={"noise": ("zero",)},
    ),
    "SemiImplicit": Call(
        distributions.SemiImplicit, FAMILY | {"noise": 2, "draws": 2, "hidden": (4,), "family": distributions.Normal}
    ),
    "Vamp": Call(distributions.Vamp, {"features": 2, "inputs": torch.rand(3, 4)}, right={"inputs": ("an empty list",)}),
    "Vamp of a shape": Call(
        distributions.Vamp, {"features": 2, "inputs": (4,), "components": 3}, right={"inputs": ("a tensor",)}
    ),
    "LatentVariableModel": Call(
        models.LatentVariableModel,
        {
            "prior": distributions.StandardNormal(2),
            "likelihood": distributions.Bernoulli(MLP(2, 3, (4,))),
        },
    ),
    "ProbabilisticPCA": Call(models.ProbabilisticPCA, {"latent": 2, "observed": 3}, kinds={"observed": "shape"}),
}


@pytest.mark.parametrize("package", [networks, distributions, models], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_catalogue(package, check_complete):
    check_complete(package, CALLS, {})


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name, catalogue):
    catalogue.try_all(name, CALLS[name])
