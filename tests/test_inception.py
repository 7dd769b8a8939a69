"""The Inception judge: what it hands to torch-fidelity's network, what it takes from it, and evaluation with it."""

import sys
import types

import pytest
import torch

from ddpm_lib import digits, frechet_distance, pretrained
from ddpm_lib.evaluation import evaluate
from ddpm_lib.inception import Inception


class Network(torch.nn.Module):
    """In place of torch-fidelity's, with its interface: 8-bit colour images in, a tuple of features out, 16 of them."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.weights = feature_extractor_weights_path
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(3 * 8 * 8, 16).requires_grad_(False)
        self.fc = torch.nn.Linear(16, 1008).requires_grad_(False)

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        self.seen = x
        return (self.projection(x.flatten(1).float() / 255),)


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_arrive_as_eight_bit_colours(library, channels):
    judge = Inception()
    values = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0]).repeat(13)[:64].view(1, 1, 8, 8)
    features = judge.features(values.expand(2, channels, 8, 8))
    assert features.shape == (2, 16)
    assert judge.network.seen.shape == (2, 3, 8, 8)
    assert judge.network.seen[1, 2].flatten()[:5].tolist() == [0, 0, 128, 255, 255]
    logits = judge.head(features)
    assert logits.shape == (2, 1008)
    torch.testing.assert_close(logits, judge.network.fc(features) - judge.network.fc.bias)


def test_weights_of_ones_own_are_passed_on(library, tmp_path):
    assert Inception(tmp_path / "weights.pth").network.weights == str(tmp_path / "weights.pth")


def test_images_of_another_form_are_refused(library):
    with pytest.raises(ValueError, match="1 or 3"):
        Inception().features(torch.zeros(1, 4, 8, 8))


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"ddpm-lib\[inception\]"):
        Inception()


def test_a_model_is_evaluated_by_it(library):
    figures = evaluate(pretrained("digits"), "digits", number=40, steps=4, inception=True)
    network = Network("", ["2048"])
    held_out, training = (
        network(((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, 8, 8))[0]
        for x in (digits("test")[0][:40], digits("train")[0])
    )
    expected = frechet_distance(held_out, training)
    assert figures["Frechet distance, held-out to training"] == pytest.approx(expected, rel=1e-4)
    assert figures["Frechet distance, samples to training"] > 0
    assert 1 <= figures["Inception score, samples"] <= 1008
    assert 0 <= figures["recall"] <= 1
    assert "label accuracy, samples" not in figures


def test_torch_fidelitys_own_network_fits():
    """With random weights: the real ones are a download. Skipped where torch-fidelity is not installed."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda network, state: None)
        patch.setattr(torch, "load", lambda *args, **options: {})
        judge = Inception("weights.pth")
    features = judge.features(torch.rand(2, 1, 28, 28) * 2 - 1)
    assert features.shape == (2, 2048)
    assert judge.head(features).shape == (2, 1008)
