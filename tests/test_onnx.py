"""Models for runtimes without PyTorch: onnxruntime computes what torch computes, from the file alone."""

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import sys

import numpy as np
import pytest
import torch
from tiny_models import tiny_denoiser
from torch import nn

from ddpm_lib import Denoiser, Schedule, UNet, export_onnx, sample


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A denoiser that is in training, with all that a UNet can have, its file, and onnxruntime's session with it.

    One export serves all tests, since the exporter is slow.
    """
    import onnxruntime

    options = {"image_size": 8, "patch_size": 2, "attention_resolutions": (4,), "classes": 3, "dropout": 0.5}
    denoiser = tiny_denoiser(Schedule.cosine(20), "v", **options)
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    logging.root.addHandler(handler)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        export_onnx(denoiser.train(), path)
    logging.root.removeHandler(handler)
    assert said.getvalue() == ""
    return denoiser, path, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_export_leaves_one_file_and_the_denoiser_as_it_was(exported):
    denoiser, path, session = exported
    assert os.listdir(path.parent) == ["model.onnx"]
    assert all(module.training for module in denoiser.modules())
    assert denoiser.network._label_embedding.__func__ is UNet._label_embedding
    shape = ["batch", 1, *[denoiser.network.config["image_size"]] * 2]
    inputs = [("x_t", shape), ("t", ["batch"]), ("label", ["batch"])]
    assert [(i.name, i.shape) for i in session.get_inputs()] == inputs
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("prediction", shape)]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_computes_what_torch_computes(exported, batch):
    """Counted from 1: the network itself is asked for t - 1."""
    denoiser, _, session = exported
    config, T = denoiser.network.config, denoiser.schedule.T
    x = torch.randn(batch, 1, config["image_size"], config["image_size"])
    t = torch.linspace(1, T, batch).long()
    label = torch.arange(batch) % 4
    (found,) = session.run(["prediction"], {"x_t": x.numpy(), "t": t.numpy(), "label": label.numpy()})
    with torch.no_grad():
        truth = denoiser.eval().network(x, t - 1, label)
    assert truth.std() > 0.1
    np.testing.assert_allclose(found, truth.numpy(), rtol=0, atol=1e-5)


def test_the_file_tells_all_that_sampling_needs(exported):
    """Algorithm 2 in numpy, from the file alone, gives our samples."""
    denoiser, _, session = exported
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["schedule"]) == denoiser.schedule.config
    assert told["predicts"] == "v"
    T, alpha_bar, (low, high) = int(told["T"]), json.loads(told["alpha_bar"]), json.loads(told["value_range"])
    shape = (2, *session.get_inputs()[0].shape[1:])
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=draw).numpy()
    for t in range(T, 0, -1):
        inputs = {"x_t": x, "t": np.full(2, t), "label": np.full(2, int(told["no_label"]))}
        (value,) = session.run(None, inputs)
        now, before = alpha_bar[t], alpha_bar[t - 1]
        beta = 1 - now / before
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        x0 = signal * x - noise * value
        x = math.sqrt(before) * beta * np.clip(x0, low, high) + math.sqrt(now / before) * (1 - before) * x
        x = (x / (1 - now)).astype(np.float32)
        if t > 1:
            x += math.sqrt(beta) * torch.randn(shape, generator=draw).numpy()
    ours = sample(denoiser, shape, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(x, ours.numpy(), rtol=0, atol=1e-5)


def test_a_network_without_classes_has_no_input_for_labels(tmp_path, monkeypatch):
    """Seen by what the exporter is asked for: a second export would take as long as the first."""
    asked = {}

    def stop(model, **options):
        asked.update(options, model=model)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", stop)
    denoiser = tiny_denoiser().eval()
    with pytest.raises(KeyboardInterrupt):
        export_onnx(denoiser, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []
    assert asked["input_names"] == list(asked["kwargs"]) == list(asked["dynamic_shapes"]) == ["x_t", "t"]
    with torch.no_grad():
        x, t = torch.randn(2, 1, 4, 4), torch.tensor([1, 30])
        torch.testing.assert_close(asked["model"](x, t), denoiser.network(x, t - 1), rtol=0, atol=0)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    assert importlib.util.find_spec(package)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export_onnx(tiny_denoiser(), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_only_a_unet_is_exported(tmp_path):
    with pytest.raises(ValueError, match="has a Linear"):
        export_onnx(Denoiser(nn.Linear(1, 1), Schedule.linear()), tmp_path / "model.onnx")
