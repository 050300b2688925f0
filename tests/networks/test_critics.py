"""The default critic: its shapes, what it reads, its start, and spectral normalisation."""

from functools import partial

import pytest
import torch
from torch import nn

from pyrogen.configuration import build, describe
from pyrogen.networks import Critic

CATALOGUE = {
    "vector": partial(Critic, 6),
    "vector-context": partial(Critic, 6, 3, hidden=(16,)),
    "linear": partial(Critic, 6, 3, hidden=()),
    "scalar": partial(Critic, (), 2, hidden=(8,), activation=nn.SiLU),
    "matrix": partial(Critic, (2, 3), hidden=(8, 8), outputs=4),
    "image": partial(Critic, (1, 8, 8), hidden=(16,)),
    "image-context": partial(Critic, (3, 8, 12), 5, hidden=(16,), outputs=2),
    "narrow-image": partial(Critic, (3, 8, 8), 5, hidden=(16,), channels=(4, 6)),
    "flat-image": partial(Critic, (3, 8, 8), hidden=(16,), channels=()),
    "odd-image": partial(Critic, (1, 9, 9), hidden=(8,)),
    "tiny-image": partial(Critic, (1, 2, 2), 1, hidden=(8,)),
    "spectral": partial(Critic, 6, 3, hidden=(16, 16), spectral=True),
    "spectral-image": partial(Critic, (1, 8, 8), hidden=(16,), spectral=True),
}


@pytest.fixture(params=list(CATALOGUE.values()), ids=list(CATALOGUE))
def critic(request):
    torch.manual_seed(0)
    return request.param()


def inputs(critic, batch, dtype=torch.float32):
    z = torch.randn(batch + critic.shape, dtype=dtype)
    return z, torch.randn(*batch, critic.context, dtype=dtype) if critic.context else None


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
def test_leading_dimensions_are_kept_and_independent(critic, batch):
    critic = critic.double().eval()
    z, context = inputs(critic, batch, torch.float64)
    scores = critic(z, context)
    tail = () if critic.outputs == 1 else (critic.outputs,)
    assert scores.shape == batch + tail
    flat = z.reshape(-1, *critic.shape)
    contexts = [None] * len(flat) if context is None else context.reshape(-1, critic.context)
    rows = [critic(row, of_row) for row, of_row in zip(flat, contexts, strict=True)]
    torch.testing.assert_close(scores.reshape(-1, *tail), torch.stack(rows))


def test_every_parameter_gets_a_gradient(critic):
    critic(*inputs(critic, (7,))).pow(2).sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_description_builds_an_equal_critic(critic):
    other = build(describe(critic))
    other.load_state_dict(critic.state_dict())
    assert repr(other) == repr(critic)
    z, context = inputs(critic, (3,))
    assert torch.equal(other.eval()(z, context), critic.eval()(z, context))


def test_features_are_what_the_last_layer_reads(critic):
    critic.eval()
    z, context = inputs(critic, (5, 2))
    h = critic.features_of(z, context)
    assert h.shape[:-1] == (5, 2) and h.dim() == 3
    scores = h @ critic.last.weight.T + critic.last.bias
    torch.testing.assert_close(scores.squeeze(-1) if critic.outputs == 1 else scores, critic(z, context))


def test_scores_start_near_zero():
    torch.manual_seed(0)
    for critic in (Critic(50), Critic(10, 40), Critic((1, 28, 28)), Critic(10, outputs=8)):
        z, context = inputs(critic, (64,))
        # The last layer sums features of size about 1 with weights of variance 0.01 / fan-in: about 0.1.
        assert 0.01 < critic(z, context).std() < 0.3


def test_context_and_samples_are_broadcast():
    critic = Critic(6, 3, hidden=(16,))
    z, context = torch.randn(4, 1, 6), torch.randn(5, 3)
    expected = critic(z.expand(4, 5, 6), context.expand(4, 5, 3))
    torch.testing.assert_close(critic(z, context), expected)


def test_convolutions_are_for_images_that_can_be_halved():
    assert Critic((1, 28, 28)).convolutions is not None
    for shape in (784, (28, 28), (1, 9, 9), (1, 2, 2), (1, 4, 4)):
        assert Critic(shape).convolutions is None


def test_channels_say_which_convolutions_there_are():
    critic = Critic((1, 28, 28), channels=(4, 6))
    assert [layer.out_channels for layer in critic.convolutions if isinstance(layer, nn.Conv2d)] == [4, 6]
    assert Critic((1, 4, 4), channels=(4,)).convolutions is not None
    assert Critic((1, 28, 28), channels=()).convolutions is None
    assert Critic(784, channels=(4, 6)).convolutions is None
    with pytest.raises(ValueError, match="can be halved 2 times"):
        Critic((1, 28, 28), channels=(4, 6, 8))


def test_every_layer_has_norm_one_under_spectral_normalisation():
    torch.manual_seed(0)
    critic = Critic((1, 8, 8), 3, hidden=(16, 16), spectral=True)
    z, context = inputs(critic, (2,))
    for _ in range(100):  # each call in training mode takes one step of the power method
        critic(z, context)
    layers = [layer for layer in critic.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(layers) == 4
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        # The power method comes from below, so the norm from above: 1 % where singular values lie close.
        assert 1 - 1e-5 < norm < 1.01


def test_spectral_critic_of_vectors_is_lipschitz():
    torch.manual_seed(0)
    critic = Critic(4, hidden=(16, 16), spectral=True)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(30)
        for _ in range(100):
            critic(torch.zeros(1, 4))
        a, b = 5 * torch.randn(2, 1000, 4)
        slopes = (critic(a) - critic(b)).abs() / (a - b).norm(dim=-1)
    assert slopes.max() < 1.02


def test_wrong_inputs_say_what_was_expected():
    critic = Critic((1, 8, 8), 3)
    good, context = torch.zeros(2, 1, 8, 8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"samples of shape \(\.\.\., 1, 8, 8\), got \(2, 64\)"):
        critic(torch.zeros(2, 64), context)
    with pytest.raises(ValueError, match=r"samples of shape .*got \(8, 8\)"):
        critic(torch.zeros(8, 8), context)
    with pytest.raises(ValueError, match=r"a context of shape \(\.\.\., 3\), got none"):
        critic(good)
    with pytest.raises(ValueError, match=r"a context of shape \(\.\.\., 3\), got one of shape \(2, 4\)"):
        critic(good, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="built for no context, got one of shape"):
        Critic((1, 8, 8))(good, context)
    with pytest.raises(ValueError, match="outputs 1 or more, got context=0, outputs=0"):
        Critic(3, outputs=0)
