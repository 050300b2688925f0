"""One contract for every encoder and decoder, then what is particular to each."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from pyrogen.networks import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    ResidualBlock,
    ResNetDecoder,
    ResNetEncoder,
    RoscaEncoder,
)
from pyrogen.networks.convolutional import stages

CATALOGUE = {
    "mlp": partial(MLP, 6, 4),
    "mlp-linear": partial(MLP, 6, 4, ()),
    "mlp-shapes": partial(MLP, (2, 3), (1, 4, 4), (16,), activation=nn.Tanh),
    "mlp-scalars": partial(MLP, (), ()),
    "conv-encoder-28": partial(ConvEncoder, (1, 28, 28), 5),
    "conv-encoder-32": partial(ConvEncoder, (3, 32, 32), (2, 3)),
    "conv-encoder-64": partial(ConvEncoder, (3, 64, 64), 5, (4, 4, 8, 8), hidden=(16,)),
    "conv-encoder-8": partial(ConvEncoder, (1, 8, 8), 5, hidden=(), activation=nn.SiLU),
    "conv-encoder-oblong": partial(ConvEncoder, (1, 4, 12), 5),
    "conv-decoder-28": partial(ConvDecoder, 5, (1, 28, 28)),
    "conv-decoder-32": partial(ConvDecoder, (2, 3), (6, 32, 32)),
    "conv-decoder-64": partial(ConvDecoder, 5, (3, 64, 64), (4, 4, 8, 8), hidden=(16,)),
    "conv-decoder-8": partial(ConvDecoder, 5, (1, 8, 8), hidden=(), activation=nn.SiLU),
    "conv-decoder-oblong": partial(ConvDecoder, 5, (10, 4, 12), (8,)),
    "resnet-encoder-28": partial(ResNetEncoder, (1, 28, 28), 5),
    "resnet-encoder-32": partial(ResNetEncoder, (3, 32, 32), (2, 3), (8, 16, 16), blocks=1),
    "resnet-encoder-64": partial(ResNetEncoder, (3, 64, 64), 5, (4, 4, 8, 8), blocks=1),
    "resnet-encoder-8": partial(ResNetEncoder, (1, 8, 8), 5, activation=nn.SiLU),
    "resnet-decoder-28": partial(ResNetDecoder, 5, (1, 28, 28)),
    "resnet-decoder-32": partial(ResNetDecoder, (2, 3), (6, 32, 32), (8, 16, 16), blocks=1),
    "resnet-decoder-64": partial(ResNetDecoder, 5, (3, 64, 64), (4, 4, 8, 8), blocks=1),
    "resnet-decoder-8": partial(ResNetDecoder, 5, (1, 8, 8), activation=nn.SiLU),
    "rosca-28": partial(RoscaEncoder, (1, 28, 28), 5),
    "rosca-odd": partial(RoscaEncoder, (3, 9, 7), (2, 3), (4, 8), slope=0.1),
}


@pytest.fixture(params=list(CATALOGUE.values()), ids=list(CATALOGUE))
def build(request):
    return request.param


@pytest.fixture
def network(build):
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
def test_leading_dimensions_are_kept_and_independent(network, batch):
    network = network.double()
    x = torch.rand(batch + network.input_shape, dtype=torch.float64)
    y = network(x)
    assert y.shape == batch + network.output_shape
    assert y.dtype == torch.float64
    # One observation's output must not depend on its neighbours: this is what batch normalisation would
    # break.
    one_by_one = [network(row) for row in x.reshape(-1, *network.input_shape)]
    torch.testing.assert_close(y.reshape(-1, *network.output_shape), torch.stack(one_by_one))


def test_every_parameter_gets_a_gradient(network):
    # The second power, since what follows a normalisation does not change a plain sum.
    network(torch.randn(7, *network.input_shape)).pow(2).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_state_round_trip(network):
    x = torch.rand(3, *network.input_shape)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(other(x), network(x))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_training_and_evaluation_agree(network):
    x = torch.rand(3, *network.input_shape)
    trained = network.train()(x)
    assert torch.equal(network.eval()(x), trained)
    assert torch.equal(network(x), trained)


def test_constructor_arguments_are_attributes(network, build):
    positional = ("inputs", "outputs", "hidden" if isinstance(network, MLP) else "channels")
    given = dict(zip(positional, build.args, strict=False)) | build.keywords
    for name, value in given.items():
        assert getattr(network, name) == value
    assert type(network).__name__ in repr(network)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_outputs_start_at_the_size_of_the_inputs(network, draw):
    x = draw(64, *network.input_shape)
    y = network(x)
    # The last layer's outputs have the variance of the hidden layer's second moment, which He's weights keep at
    # the inputs' own: neither lost (a posterior would start collapsed) nor blown up (a loss would start high).
    size = y.pow(2).mean().sqrt() / x.pow(2).mean().sqrt()
    assert 0.2 < size < 3
    # Read as a log-scale, the largest of up to 800 000 outputs and its square are far from float32's ends.
    assert y.abs().max() < 20


def test_wrong_shape_says_what_was_expected(network):
    if network.input_shape == ():  # every shape ends in the empty one
        return
    wrong = torch.zeros(2, *network.input_shape[:-1], 5 + network.input_shape[-1])
    with pytest.raises(ValueError, match=r"expected an input of shape \(\.\.\., .*got \(2"):
        network(wrong)
    with pytest.raises(ValueError, match="expected an input of shape"):
        network(torch.zeros(()))


def test_mlp_is_the_composition_it_says():
    torch.manual_seed(0)
    network = MLP((2, 3), (4, 1), hidden=(5,), activation=nn.Tanh)
    x = torch.randn(7, 2, 3)
    w = network.state_dict()
    h = torch.tanh(x.reshape(7, 6) @ w["layers.0.weight"].T + w["layers.0.bias"])
    expected = h @ w["layers.2.weight"].T + w["layers.2.bias"]
    torch.testing.assert_close(network(x), expected.reshape(7, 4, 1))


def test_linear_mlp_is_linear():
    torch.manual_seed(0)
    network = MLP(3, 2, ())
    x, y = torch.randn(2, 3)
    torch.testing.assert_close(network(x + y) + network(torch.zeros(3)), network(x) + network(y))


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="a size must be positive, got 0"):
        MLP(0, 3)
    with pytest.raises(ValueError, match="a size must be positive"):
        ConvEncoder((1, 28, 0), 3)


@pytest.mark.parametrize(
    ("size", "channels", "expected"),
    [
        ((28, 28), None, ((32, 64), (7, 7))),
        ((32, 32), None, ((32, 64, 128), (4, 4))),
        ((64, 64), None, ((32, 64, 128, 256), (4, 4))),
        ((128, 128), None, ((32, 64, 128, 256, 256), (4, 4))),
        ((8, 8), None, ((32,), (4, 4))),
        ((8, 8), (1, 2, 3), ((1, 2, 3), (1, 1))),
        ((4, 12), None, ((32,), (2, 6))),
        ((8, 12), [5, 6], ((5, 6), (2, 3))),
    ],
)
def test_stages(size, channels, expected):
    assert stages(size[0], size[1], channels) == expected


@pytest.mark.parametrize("encoder", [ConvEncoder, ResNetEncoder])
def test_sizes_that_cannot_be_halved_are_refused(encoder):
    with pytest.raises(ValueError, match=r"28 x 28 can be halved 2 times but .* asks for 3: pass 1 to 2 channels"):
        encoder((1, 28, 28), 5, channels=(8, 8, 8))
    with pytest.raises(ValueError, match="27 x 27 can be halved 0 times"):
        encoder((1, 27, 27), 5)


@pytest.mark.parametrize("decoder", [ConvDecoder, ResNetDecoder])
def test_decoders_refuse_what_is_no_image(decoder):
    with pytest.raises(ValueError, match=r"outputs must be an image's shape \(C, H, W\), got 784"):
        decoder(5, 784)
    with pytest.raises(ValueError, match="27 x 28 can be halved 0 times"):
        decoder(5, (1, 27, 28))


def test_encoders_refuse_what_is_no_image():
    for encoder in (ConvEncoder, ResNetEncoder, RoscaEncoder):
        with pytest.raises(ValueError, match="inputs must be an image's shape"):
            encoder((784,), 5)


def test_counts_must_be_positive():
    with pytest.raises(ValueError, match="blocks must be 1 or more, got 0"):
        ResNetEncoder((1, 8, 8), 5, blocks=0)
    with pytest.raises(ValueError, match="channels must name at least one convolution"):
        RoscaEncoder((1, 8, 8), 5, ())
    with pytest.raises(ValueError, match=r"resize must be 0\.5, 1 or 2, got 3"):
        ResidualBlock(4, 4, resize=3)


def test_residual_blocks_start_near_the_identity():
    torch.manual_seed(0)
    block = ResNetEncoder((1, 8, 8), 3, channels=(32,)).layers[1]
    x = torch.randn(16, 32, 8, 8)
    assert (block(x) - x).pow(2).mean().sqrt() < 0.3
    assert (block(x) - x).abs().max() > 0
