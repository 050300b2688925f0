"""The small classifier on real digits, and what feature networks and classifiers have to return."""

import math

import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.evaluation.features import (
    FeatureClassifier,
    class_labels,
    class_probabilities,
    feature_classifier,
    features_of,
)


@pytest.fixture(scope="module")
def digits():
    return pg.data.load("digits", binarize=None)


@pytest.fixture(scope="module")
def trained(digits):
    return feature_classifier(digits.train, digits.train_labels, epochs=40)


def test_digits_are_told_apart(digits, trained):
    """Ten seeds gave 0.972 to 0.989 on the test rows, and 0.951 to 0.993 on 143 held-out ones."""
    right = (class_labels(trained, digits.test) == digits.test_labels).double().mean()
    assert right >= 0.95 and trained.accuracy >= 0.95 and trained.held_out == 143
    assert f"accuracy {trained.accuracy:.4f} on 143 held-out rows" in repr(trained)
    assert trained(digits.test).shape == (180, 128) == (180, trained.num_features)
    torch.testing.assert_close(trained.probabilities(digits.test), trained.logits(digits.test).softmax(-1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 30), (2, 33, 20), (4, 4, 4), (5,), (6, 7)])
def test_shapes(shape):
    x, labels = torch.rand(20, *shape), torch.arange(20) % 2
    found = feature_classifier(x + labels.view(-1, *[1] * len(shape)), labels, epochs=30, features=8)
    assert found(x).shape == (20, 8) and found.logits(x).shape == (20, 2) and found.accuracy == 1
    assert found.is_image == (len(shape) == 3 and min(shape[1:]) >= 8)
    copy = FeatureClassifier(shape, 2, features=8)
    copy.load_state_dict(found.state_dict())
    torch.testing.assert_close(copy(x), found(x))


def test_data_are_standardised():
    """By channel, or by value; a value that never changes is left as it is, and so is a far offset."""
    x = 1e4 + torch.randn(5000, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.0])
    found = feature_classifier(x, torch.arange(5000) % 2, epochs=1, held_out=(x[:10], torch.arange(10) % 2))
    torch.testing.assert_close(found.centre.double(), x.mean(0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.scale.double(), torch.tensor([1.0, 10.0, 1.0]).double(), rtol=0.03, atol=0.0)
    images = torch.rand(500, 2, 8, 8) * torch.tensor([1.0, 0.1]).view(2, 1, 1)
    found = feature_classifier(images, torch.arange(500) % 2, epochs=1, held_out=(images[:10], torch.arange(10) % 2))
    torch.testing.assert_close(found.scale.flatten(), images.std((0, 2, 3)), rtol=1e-3, atol=0.0)


def test_seeds_and_the_random_state(digits):
    state, few = torch.get_rng_state(), (digits.train[:200], digits.train_labels[:200])
    first, again, other = (feature_classifier(*few, epochs=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    x = digits.test[:5]
    assert torch.equal(first(x), again(x)) and not torch.equal(first(x), other(x))


def test_what_a_classifier_is_not_trained_on():
    x, labels = torch.rand(30, 4), torch.arange(30) % 3
    with pytest.raises(TypeError, match=r"labels of x as a tensor of integers, got torch\.float32"):
        feature_classifier(x, labels.float())
    with pytest.raises(ValueError, match=r"one label a row of x, integers from 0 of shape \(30,\), got \(29,\)"):
        feature_classifier(x, labels[1:])
    with pytest.raises(ValueError, match="from -1"):
        feature_classifier(x, labels - 1)
    with pytest.raises(ValueError, match="expected x to be finite, but there is NaN or infinity in row 7 of 30"):
        feature_classifier(x.masked_fill((torch.arange(30) == 7).unsqueeze(1), math.nan), labels)
    with pytest.raises(ValueError, match=r"one event shape, got {'x': \(4,\), 'held_out': \(5,\)}"):
        feature_classifier(x, labels, held_out=(torch.rand(3, 5), labels[:3]))
    with pytest.raises(ValueError, match="a tenth can't be held out of 1 row"):
        feature_classifier(x[:1], labels[:1])
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1, got 0"):
        feature_classifier(x, labels, epochs=0)
    with pytest.raises(ValueError, match=r"built for samples of shape \(N, 1, 8, 8\), got \(5, 8, 8\)"):
        FeatureClassifier((1, 8, 8), 2)(torch.rand(5, 8, 8))


def test_a_network_is_left_as_it_was():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    network[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(10, 4)
    state = torch.get_rng_state()
    whole, part = (features_of(network, rows=rows, x=x)[0] for rows in (10, 3))
    assert whole.dtype == torch.float64 and not whole.requires_grad
    torch.testing.assert_close(whole, part)
    assert network.training and network[3].training and torch.equal(torch.get_rng_state(), state)
    assert not network[1].weight.requires_grad and network[1].bias.requires_grad
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_network_in_double_precision_gets_doubles_and_bytes_become_pixels():
    network = nn.Linear(4, 3).double()
    x = torch.randint(256, (10, 4), dtype=torch.uint8)
    torch.testing.assert_close(features_of(network, x=x)[0], network(x.double() / 255).detach(), rtol=1e-6, atol=1e-6)


class Ragged(nn.Module):
    """Features of another width for the rows of another law."""

    def forward(self, x):
        return x[:, : 2 if x.mean() > 0 else 3]


def test_what_a_feature_network_must_not_return():
    x = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"one width, but the network's are {'samples': 2, 'data': 3} wide"):
        features_of(Ragged(), samples=x, data=-x)
    with pytest.raises(ValueError, match="other widths for other batches"):
        features_of(Ragged(), samples=torch.cat([x, -x]), rows=6)
    for network in (lambda x: x.unsqueeze(1), lambda x: x[1:], lambda x: x.sum(1), lambda x: (x, x)):
        with pytest.raises(ValueError, match=r"expected features of shape \(6, D\) for 6 rows"):
            features_of(network, x=x)
    with pytest.raises(ValueError, match="features of 6 of 6 rows are NaN or infinite"):
        features_of(lambda x: x / 0, x=x)


def test_what_sets_must_not_be():
    x = torch.rand(6, 4)
    with pytest.raises(TypeError, match=r"expected data as a tensor .* got list"):
        features_of(None, samples=x, data=[x])
    with pytest.raises(TypeError, match="bool, uint8 or floating tensor"):
        features_of(None, samples=x.long())
    with pytest.raises(ValueError, match=r"samples of shape .* at least one row, got \(0, 4\)"):
        features_of(None, samples=x[:0])
    with pytest.raises(ValueError, match=r"one event shape, got {'samples': \(4,\), 'data': \(2, 2\)}"):
        features_of(None, samples=x, data=x.view(6, 2, 2))
    with pytest.raises(ValueError, match="expected data to be finite, but there is NaN or infinity in row 5 of 6"):
        features_of(None, rows=4, samples=x, data=torch.cat([x[:5], x[5:] / 0]))


def test_probabilities_and_labels():
    x, network = torch.rand(7, 4), nn.Linear(4, 3)
    expected = network(x).softmax(-1).double().detach()
    for classifier in (lambda x: network(x).softmax(-1), expected):
        torch.testing.assert_close(class_probabilities(classifier, x, rows=2), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(class_labels(classifier, x), expected.argmax(1))
    assert torch.equal(class_labels(torch.arange(7), x), torch.arange(7))
    with pytest.raises(ValueError, match="expected probabilities, which are not negative and sum to 1"):
        class_probabilities(network, x)
    with pytest.raises(ValueError, match=r"expected probabilities of shape \(7, D\) for 7 rows, got \(6, 3\)"):
        class_probabilities(expected[1:], x)
    with pytest.raises(ValueError, match="one label a row of samples"):
        class_labels(torch.arange(6), x)
