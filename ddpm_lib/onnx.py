"""Networks for runtimes without PyTorch: one ONNX file that says all that sampling needs."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import denoiser_config, write_file
from .prediction import Denoiser
from .unet import UNet


class _Exported(nn.Module):
    """The network as an ONNX file holds it: steps counted from 1, labels not looked at."""

    def __init__(self, network: UNet):
        super().__init__()
        self.network = copy.deepcopy(network).cpu().float().eval()
        if network.label is not None:  # the check of the labels depends on their values, which no graph knows
            self.network._label_embedding = lambda label, x: self.network.label(label)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(x_t, t - 1, label)


def export_onnx(denoiser: Denoiser, path: str | Path) -> None:
    """Write the network to one ONNX file, opset 18, for images of its image_size and batches of any size.

    Its inputs are ``x_t`` (B, C, H, W) float32, ``t`` (B,) int64 counted from 1, and, if the network has classes,
    ``label`` (B,) int64 in 0..classes, where ``classes`` stands for no label. Its output is ``prediction`` (B, C, H, W)
    of the denoiser's own kind. The file's metadata holds what sampling needs besides: T, predicts, alpha_bar (T + 1
    numbers, JSON), schedule (JSON), value_range, classes, no_label. Weights are float32.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the denoiser's network is not a UNet, or is told what to draw by a text or an image.
    """
    config = denoiser_config(denoiser)
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs two more packages: pip install onnx onnxscript") from error
    network, schedule = config["network"], denoiser.schedule
    if network["text_channels"] is not None or network["image_channels"] is not None:
        raise ValueError("only networks that are told what to draw by a class, or not at all, are exported.")
    B, C, size = 2, network["in_channels"], network["image_size"]
    inputs = {"x_t": torch.zeros(B, C, size, size), "t": torch.ones(B, dtype=torch.int64)}
    metadata = {
        "format": "ddpm_lib onnx 1",
        "T": str(schedule.T),
        "predicts": denoiser.predicts,
        "schedule": json.dumps(config["schedule"]),
        "alpha_bar": json.dumps(schedule.alpha_bar.tolist()),
        "value_range": "[-1, 1]",
    }
    if network["classes"] is not None:
        inputs["label"] = torch.zeros(B, dtype=torch.int64)
        metadata |= {"classes": str(network["classes"]), "no_label": str(network["classes"])}
    with _silence():
        program = torch.onnx.export(
            _Exported(denoiser.network).eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["prediction"],
            dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in inputs},
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props.update(metadata)
        write_file(Path(path), program.model_proto.SerializeToString())


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log lines of the exporter, whose deprecations are not the caller's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
