"""The chapter's ablation: its results belong to its script, and each version lacks what its name says."""

import json

import pytest
import torch

from ddpm_lib import UNet
from scripts import unet_ablation
from scripts.unet_ablation import NETWORK, OPTIONS, RESULTS, SEEDS, STEPS, VARIANTS, build, macs


def test_the_results_are_those_of_the_script():
    stored = json.loads(RESULTS.read_text())
    assert {(run["variant"], run["seed"]) for run in stored["runs"]} == {(v, s) for v in VARIANTS for s in SEEDS}
    ours = json.loads(json.dumps({"network": NETWORK, "steps": STEPS, "options": OPTIONS}))
    assert {name: stored["settings"][name] for name in ours} == ours
    for run in stored["runs"]:
        network = build(run["variant"], run["seed"])
        assert (sum(p.numel() for p in network.parameters()), macs(network)) == (run["parameters"], run["macs"])


def awake(variant: str) -> UNet:
    """A version whose last layers have grown, so that its output depends on all that it can."""
    network = build(variant, 0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("conv_2.weight", "out.weight", "head.weight")):
                parameter.normal_(std=0.1)
    return network


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_without_a_clock_the_step_does_not_matter(variant):
    network, x = awake(variant), torch.randn(1, 1, 8, 8)
    a, b = (network(x, torch.tensor([step])) for step in (10, 700))
    assert torch.equal(a, b) == (variant == "no time embedding")


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_without_skips_the_stem_is_not_read_on_the_way_up(variant):
    network, seen = awake(variant), []
    network.up[-1].residual.norm_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.randn(1, 1, 8, 8), torch.tensor([5]))
    kept = seen[0][:, -NETWORK["base_channels"] // 2 :]
    assert bool((kept == 0).all()) == (variant == "no skips")


def test_told_once_means_in_the_first_block_only():
    network = awake("told once")
    told = [
        float(stage.residual.embedding(torch.ones(1, 64)).detach().abs().max())
        for stage in unet_ablation.stages(network)
    ]
    assert told[0] > 0
    assert not any(told[1:])


def test_what_is_left_out_is_not_there():
    assert not any("attention" in name for name, _ in build("no attention", 0).named_parameters())
    assert not any("norm" in name for name, _ in build("no normalisation", 0).named_parameters())
    assert not any("shortcut" in name for name, _ in build("no shortcuts", 0).named_parameters())
    assert len(build("no middle", 0).middle) == 0
