"""Inception v3 with random weights against torchvision's own, and its errors."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torchvision.models import inception_v3
from torchvision.transforms import v2

from pyrogen.evaluation.features import features_of
from pyrogen.evaluation.inception_v3 import FidelityInception, Inception, inception


@pytest.fixture(scope="module")
def reference():
    """Torchvision's network with weights that keep the signal alive through all layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = inception_v3(weights=None, aux_logits=True, transform_input=True, init_weights=False)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        return network.eval()


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(reference.state_dict(), path)
    return path


def test_pixels_are_resized_and_normalised_as_torchvision_does(reference, weights):
    network, images = inception(weights), torch.tensor([0.3, 1.0]).view(2, 1, 1, 1) * torch.rand(2, 3, 32, 40)
    prepare = v2.Compose(
        [v2.Resize([299, 299], antialias=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    with torch.no_grad():
        expected = reference(prepare(images))
        found = network.logits(images)
        # By how much the two images are told apart is what it has to be small against.
        assert (found - expected).abs().max() < 1e-3 * expected.std(0).mean()
        torch.testing.assert_close(network.probabilities(images), found.softmax(-1))
    assert network(images[:1]).shape == (1, Inception.num_features) and not network.training


def test_one_channel_is_repeated_and_bytes_are_pixels(weights):
    network, gray = inception(weights), torch.randint(256, (1, 1, 28, 28), dtype=torch.uint8)
    (found,) = features_of(network, samples=gray)
    with torch.no_grad():
        torch.testing.assert_close(found.float(), network((gray / 255).expand(1, 3, 28, 28)))
    with pytest.raises(ValueError, match=r"images of shape \(N, 1 or 3, H, W\), got \(1, 2, 8, 8\)"):
        network(torch.rand(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\], got values from -1 to 1"):
        network(torch.tensor([-1.0, 1.0]).expand(1, 3, 8, 2))


def test_weights_that_are_not_there_or_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for kind, name in (("torchvision", "inception_v3_google"), ("torch-fidelity", "weights-inception-2015")):
        with pytest.raises(FileNotFoundError, match=f"no weights of {kind}'s Inception v3 at .*checkpoints/{name}"):
            inception(kind=kind)
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no weights of torchvision's Inception v3: Missing key"):
        inception(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds no weights by name"):
        inception(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="can't be read as weights"):
        inception(path)
    with pytest.raises(ValueError, match=r"kind must be one of \['torchvision', 'torch-fidelity'\]"):
        inception(path, kind="keras")


def test_the_network_of_2015(tmp_path, monkeypatch):
    """Its features and logits, of images rounded to 8 bits."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    original, path = module.FeatureExtractorInceptionV3, tmp_path / "weights.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:  # it can't be made without weights
        patch.setattr(original, "load_state_dict", lambda self, weights: None)
        reference = original("inception", ["2048", "logits_unbiased"], str(path))
    torch.save(reference.state_dict(), path)
    network, images = inception(path, kind="torch-fidelity"), torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    assert isinstance(network, FidelityInception)
    features, logits = reference(images.expand(2, 3, 28, 28))
    torch.testing.assert_close(network(images), features)
    torch.testing.assert_close(network.probabilities(images / 255), logits.softmax(-1))
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no weights of torch-fidelity's Inception v3: Missing key"):
        inception(path, kind="torch-fidelity")


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_torch_fidelity(tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(ModuleNotFoundError, match="need torch-fidelity"):
        inception(tmp_path / "weights.pth", kind="torch-fidelity")
