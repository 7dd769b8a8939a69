"""Models that leave for other programs and come back: the same numbers there, the same bits here, and no half a file.

diffusers runs what is written, and writes what is read. The PyTorch port of the released weights is written out anew
below. Nothing is downloaded: all weights are drawn at random.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_twin import diffusers_twin, in_float64
from safetensors.torch import load_file, save_file
from tiny_models import draw_parameters, tiny_denoiser, tiny_unet
from torch import nn

from ddpm_lib import CheckpointError, Denoiser, Schedule, UNet, interop, sample
from ddpm_lib.interop import (
    WEIGHTS,
    diffusers_sampling,
    export_onnx,
    from_diffusers,
    from_pytorch_diffusion,
    to_diffusers,
)

ARCHITECTURES = {
    "small": {},
    "classes": {"classes": 3, "dropout": 0.25, "in_channels": 2},
    "no attention": {"image_size": 8, "attention_resolutions": (), "base_channels": 8, "channel_multipliers": (1, 2)},
    "attention everywhere": {"image_size": 8, "channel_multipliers": (1, 3, 2), "attention_resolutions": (8, 4, 2)},
    "one level": {"image_size": 5, "channel_multipliers": (1,), "attention_resolutions": (5,), "blocks_per_level": 3},
    "four levels": {
        "image_size": 8,
        "channel_multipliers": (1, 1, 2, 4),
        "attention_resolutions": (4, 1),
        "blocks_per_level": 2,
    },
}
SCHEDULES = {
    "linear": Schedule.linear(30),
    "the paper's": Schedule.linear(),
    "other ends": Schedule.linear(20, 1e-3, 0.3),
    "cosine": Schedule.cosine(25),
    "other cosine": Schedule.cosine(25, s=0.01),
    "other clipping": Schedule.cosine(25, beta_max=0.5),
    "free": Schedule([0.1, 0.3, 0.2]),
}


@pytest.fixture
def folder(tmp_path):
    """A small exported model."""
    to_diffusers(tiny_denoiser(), tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    """Change keys of a JSON file; the value ... removes one."""
    config = json.loads(path.read_text())
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    path.write_text(json.dumps(config))


def assert_same(a: Denoiser, b: Denoiser):
    assert a.predicts == b.predicts
    assert a.network.config == b.network.config
    assert torch.equal(a.schedule.alpha_bar, b.schedule.alpha_bar)
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# There and back


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_bit_comes_back(tmp_path, options):
    denoiser = tiny_denoiser(**options)
    to_diffusers(denoiser, tmp_path / "model")
    again = from_diffusers(tmp_path / "model")
    assert not again.training
    assert_same(denoiser, again)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_and_kind_come_back_and_diffusers_reads_the_same(tmp_path, schedule, predicts):
    denoiser = tiny_denoiser(schedule, predicts)
    to_diffusers(denoiser, tmp_path / "model")
    again = from_diffusers(tmp_path / "model")
    assert_same(denoiser, again)
    theirs = DDPMScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    torch.testing.assert_close(theirs.betas, schedule.beta[1:].float(), rtol=3e-6, atol=0)  # its own float32 formula
    assert theirs.config.prediction_type == {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[predicts]


def test_half_precision_weights_are_read_exactly(folder):
    path = folder / "unet" / WEIGHTS
    half = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(half, path)
    state = interop._diffusers_state(from_diffusers(folder).network)
    assert all(state[name].dtype == torch.float32 for name in half)
    assert all(torch.equal(state[name], value.float()) for name, value in half.items())


# diffusers runs our model


def pipeline(folder):
    pipe = DDPMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


WALKS = [
    *itertools.product(["linear", "cosine"], ["beta", "beta_tilde"], [True, False], ["eps"]),
    *itertools.product(["other ends"], ["beta", "beta_tilde"], [True], ["x0", "v"]),
    ("free", "beta", False, "v"),
]


@pytest.mark.parametrize(("schedule", "variance", "clip", "predicts"), WALKS)
def test_the_pipeline_of_diffusers_draws_what_we_draw(tmp_path, schedule, variance, clip, predicts):
    """The same seed gives the same noise, in the same order, to both."""
    denoiser = tiny_denoiser(SCHEDULES[schedule], predicts)
    to_diffusers(denoiser, tmp_path / "model", variance=variance, clip=clip)
    options = diffusers_sampling(tmp_path / "model")
    assert options == {"variance": variance, "clip": clip}
    ours = sample(denoiser, (3, 1, 4, 4), **options, generator=torch.Generator().manual_seed(2))
    theirs = pipeline(tmp_path / "model")(
        batch_size=3,
        num_inference_steps=denoiser.schedule.T,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    )
    assert ours.std() > 0.1
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs.images, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_all_thousand_steps_of_the_paper_agree(tmp_path):
    """Within 1e-5, given exact tables: its own float32 ones cost diffusers 1.5e-5, or 0.004 of a grey level."""
    denoiser = tiny_denoiser(Schedule.linear())
    to_diffusers(denoiser, tmp_path / "model")
    ours = sample(denoiser, (2, 1, 4, 4), generator=torch.Generator().manual_seed(2))
    pipe = pipeline(tmp_path / "model")
    for tables, tolerance in ((pipe.scheduler.alphas_cumprod, 5e-5), (denoiser.schedule.alpha_bar[1:], 1e-5)):
        pipe.scheduler.alphas_cumprod = tables
        theirs = pipe(batch_size=2, generator=torch.Generator().manual_seed(2), output_type="pt").images
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=tolerance)


def test_fewer_steps_start_at_T_there_too(tmp_path):
    to_diffusers(tiny_denoiser(Schedule.linear()), tmp_path / "model")
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_written_network_is_the_same_function(tmp_path, options):
    """With every class and with none; in float64, where only equal networks agree to 1e-10."""
    denoiser = tiny_denoiser(**options)
    to_diffusers(denoiser, tmp_path / "model")
    theirs, report = UNet2DModel.from_pretrained(tmp_path / "model" / "unet", output_loading_info=True)
    assert not any(report.values())
    ours, theirs = in_float64(denoiser.network.eval(), theirs)
    size, classes = ours.config["image_size"], ours.config["classes"]
    x = torch.randn(4, ours.config["in_channels"], size, size, dtype=torch.float64)
    steps = torch.tensor([0, 7, 29, 999])
    label = None if classes is None else torch.tensor([0, 1, 2, classes])
    with torch.no_grad():
        a, b = ours(x, steps, label), theirs(x, steps, label).sample
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        if classes is not None:
            none = theirs(x, steps, torch.full((4,), classes)).sample
            torch.testing.assert_close(ours(x, steps), none, rtol=0, atol=1e-10)


# What diffusers cannot express


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicts": "score"}, r"reads eps, x0, v; this network predicts score"),
        ({"channel_multipliers": (2, 2)}, r"first channel multiplier must be 1; got \[2, 2\]"),
        ({"base_channels": 2}, r"base_channels must be 4 or more"),
    ],
    ids=["score", "wide first level", "two channels"],
)
def test_what_diffusers_has_no_word_for_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(tiny_denoiser(**options), tmp_path / "model")
    with pytest.raises(ValueError, match="variance must be 'beta' or 'beta_tilde'; got 'learned'"):
        to_diffusers(tiny_denoiser(), tmp_path / "model", variance="learned")
    with pytest.raises(ValueError, match="has a Linear"):
        to_diffusers(Denoiser(nn.Linear(1, 1), Schedule.linear()), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_over(tmp_path, folder):
    before = (folder / "unet" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="model is there already"):
        to_diffusers(tiny_denoiser(predicts="v"), folder)
    assert (folder / "unet" / WEIGHTS).read_bytes() == before
    (tmp_path / "empty").mkdir()
    to_diffusers(tiny_denoiser(), tmp_path / "empty")
    assert_same(tiny_denoiser(), from_diffusers(tmp_path / "empty"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch, call):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "left by a killed process").touch()

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interop.os, call, fail)
        with pytest.raises(KeyboardInterrupt):
            to_diffusers(tiny_denoiser(), tmp_path / "model")
    assert os.listdir(tmp_path) == []
    to_diffusers(tiny_denoiser(), tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    written = [path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*.*")]
    assert sorted(written) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
    ]


# We read what diffusers writes


def their_network(**options):
    network = draw_parameters(tiny_unet(**ARCHITECTURES["four levels"] | options))
    return network, diffusers_twin(network).eval()


def assert_same_network(network: UNet, found: Denoiser):
    assert found.network.config == network.config
    assert not found.training
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.network.state_dict().items())


def test_folders_that_diffusers_saves_are_read(tmp_path):
    network, unet = their_network(classes=4)
    scheduler = DDPMScheduler(100, 1e-3, 0.2, variance_type="fixed_large", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "bare" / "unet")
    scheduler.save_pretrained(tmp_path / "bare" / "scheduler")
    unet.save_pretrained(tmp_path / "flat")
    scheduler.save_pretrained(tmp_path / "flat")
    for folder in ("pipeline", "bare", "bare/unet", "flat"):
        found = from_diffusers(tmp_path / folder)
        assert_same_network(network, found)
        assert found.predicts == "v"
        assert found.schedule.config == Schedule.linear(100, 1e-3, 0.2).config
        assert diffusers_sampling(tmp_path / folder) == {"variance": "beta", "clip": True}


SCHEDULERS = {
    "its defaults": ({}, Schedule.linear(1000, 1e-4, 0.02)),
    "scaled": ({"beta_schedule": "scaled_linear"}, Schedule(torch.linspace(0.01, 0.02**0.5, 1000).double() ** 2)),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, Schedule.cosine(50)),
    "given": ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}, Schedule([0.1, 0.2])),
}


@pytest.mark.parametrize(("options", "schedule"), SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_schedules_of_diffusers_are_read(folder, options, schedule, variance_type):
    scheduler = DDPMScheduler(**options, clip_sample=False, clip_sample_range=3.0, variance_type=variance_type)
    scheduler.save_pretrained(folder / "scheduler")
    found = from_diffusers(folder)
    torch.testing.assert_close(found.schedule.beta, schedule.beta, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.schedule.beta[1:].float(), scheduler.betas, rtol=1e-5, atol=0)
    assert found.predicts == "eps"
    variance = "beta" if variance_type == "fixed_large" else "beta_tilde"
    assert diffusers_sampling(folder) == {"variance": variance, "clip": False}


def test_a_scheduler_that_says_nothing_has_the_defaults_of_diffusers(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    found = from_diffusers(folder)
    assert found.schedule.config == Schedule.linear().config
    assert (found.predicts, diffusers_sampling(folder)) == ("eps", {"variance": "beta_tilde", "clip": True})


def released(folder, classes=None):
    """A folder in the layout and words of google/ddpm-cifar10-32: flat, old configuration, old attention names."""
    network, unet = their_network(classes=classes)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in unet.state_dict().items():
        for new, word in old.items():
            name = name.replace(f".{new}.", f".{word}.")
        state[name] = value
    folder.mkdir()
    save_file(state, folder / WEIGHTS)
    config = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [4, 4, 8, 16],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 1,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 2,
        "out_channels": 1,
        "sample_size": 8,
        "time_embedding_type": "positional",
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "timestep_values": None,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"} | index))
    return network


def test_the_layout_of_the_paper_s_converted_weights_is_read(tmp_path):
    network = released(tmp_path / "released")
    assert UNet2DModel.from_pretrained(tmp_path / "released")  # diffusers, too, takes it for one of its own
    found = from_diffusers(tmp_path / "released")
    assert_same_network(network, found)
    assert found.schedule.config == Schedule.linear().config
    assert diffusers_sampling(tmp_path / "released") == {"variance": "beta", "clip": True}


def test_defaults_that_are_spelt_out_are_no_obstacle(tmp_path):
    network, unet = their_network(attention_resolutions=())
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    spelt = {"attention_head_dim": 16, "attn_norm_num_groups": 2, "time_embedding_dim": 16, "act_fn": "swish"}
    edit(tmp_path / "unet" / "config.json", **spelt, sample_size=[8, 8], num_train_timesteps=1000)
    assert_same_network(network, from_diffusers(tmp_path))


def test_a_pickle_is_not_read_and_the_message_converts_it(tmp_path):
    network, unet = their_network()
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="pickle only, which may run code and is not read") as error:
        from_diffusers(tmp_path)
    exec(str(error.value).split("with diffusers: ")[1])
    assert_same_network(network, from_diffusers(tmp_path))


# What our U-Net cannot express

UNSUPPORTED = [
    ("unet", {"attention_head_dim": 4}, r"attention_head_dim = 4 \(supported: null\)"),
    ("unet", {"freq_shift": 0}, r"freq_shift = 0 \(supported: 1\)"),
    ("unet", {"freq_shift": ...}, r"freq_shift = 0 \(supported: 1\)"),
    ("unet", {"flip_sin_to_cos": True}, r"flip_sin_to_cos = true \(supported: false\)"),
    ("unet", {"flip_sin_to_cos": ...}, r"flip_sin_to_cos = true \(supported: false\)"),
    ("unet", {"norm_eps": 1e-5}, r"norm_eps = 1e-05 \(supported: 1e-06\)"),
    ("unet", {"norm_eps": ...}, r"norm_eps = 1e-05 \(supported: 1e-06\)"),
    ("unet", {"downsample_padding": 1}, r"downsample_padding = 1 \(supported: 0\)"),
    ("unet", {"downsample_padding": ...}, r"downsample_padding = 1 \(supported: 0\)"),
    ("unet", {"act_fn": "relu"}, r'act_fn = "relu" \(supported: "silu"\)'),
    ("unet", {"add_attention": False}, r"add_attention = false \(supported: true\)"),
    ("unet", {"attn_norm_num_groups": 4}, "attn_norm_num_groups = 4"),
    ("unet", {"center_input_sample": True}, "center_input_sample = true"),
    ("unet", {"class_embed_type": "timestep"}, 'class_embed_type = "timestep"'),
    ("unet", {"mid_block_type": None}, "mid_block_type = null"),
    ("unet", {"mid_block_scale_factor": 1.4}, "mid_block_scale_factor = 1.4"),
    ("unet", {"resnet_time_scale_shift": "scale_shift"}, 'resnet_time_scale_shift = "scale_shift"'),
    ("unet", {"time_embedding_dim": 20}, "time_embedding_dim = 20"),
    ("unet", {"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier"'),
    ("unet", {"upsample_type": "resnet"}, 'upsample_type = "resnet"'),
    ("unet", {"downsample_type": "resnet"}, 'downsample_type = "resnet"'),
    ("unet", {"out_channels": 2}, r"out_channels = 2 \(supported: 1, as in_channels: no learned variance\)"),
    ("unet", {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D.*supported: DownBlock2D or"),
    ("unet", {"down_block_types": ["DownBlock2D"]}, "for each of 2 levels"),
    ("unet", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types.*the mirror image of"),
    ("unet", {"block_out_channels": [4, 6]}, r"block_out_channels = \[4, 6\] \(supported: whole multiples"),
    ("unet", {"sample_size": [4, 8]}, r"sample_size = \[4, 8\]"),
    ("unet", {"sample_size": None}, "sample_size = null"),
    ("unet", {"num_class_embeds": 1}, r"num_class_embeds = 1 \(supported: null, 2 or more\)"),
    ("unet", {"norm_num_groups": None}, "norm_num_groups = null"),
    ("unet", {"a_new_key": 3}, r"a_new_key = 3 \(supported: leaving it out\)"),
    ("unet", {"_class_name": "UNet2DConditionModel"}, r'"UNet2DConditionModel" \(supported: "UNet2DModel"\)'),
    ("scheduler", {"_class_name": "DDIMScheduler"}, r'"DDIMScheduler" \(supported: "DDPMScheduler"\)'),
    ("scheduler", {"thresholding": True}, "thresholding = true"),
    ("scheduler", {"clip_sample_range": 2.0}, "clip_sample_range = 2.0"),
    ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true"),
    ("scheduler", {"predict_epsilon": False}, "predict_epsilon = false"),
    ("scheduler", {"prediction_type": "flow"}, r'"flow" \(supported: "epsilon", "sample", "v_prediction"\)'),
    ("scheduler", {"variance_type": "learned_range"}, r'"learned_range" \(supported: "fixed_large", "fixed_small"'),
    ("scheduler", {"variance_type": "fixed_large_log"}, "fixed_large_log"),  # its root of a logarithm is no number
    ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported"),
    (".", {"_class_name": "LDMPipeline"}, r'"LDMPipeline" \(supported: "DDPMPipeline"\)'),
]
CONFIGS = {"unet": "unet/config.json", "scheduler": "scheduler/scheduler_config.json", ".": "model_index.json"}


@pytest.mark.parametrize(("part", "change", "message"), UNSUPPORTED, ids=lambda value: str(value)[:50])
def test_another_model_is_refused_by_key_value_and_what_is_supported(folder, part, change, message):
    edit(folder / CONFIGS[part], **change)
    with pytest.raises(CheckpointError, match=message):
        from_diffusers(folder)


def test_all_that_the_defaults_of_diffusers_have_otherwise_is_named_at_once(folder):
    types = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    UNet2DModel(4, 1, 1, block_out_channels=[4, 16], norm_num_groups=2, **types).save_config(folder / "unet")
    with pytest.raises(CheckpointError) as error:
        from_diffusers(folder)
    for named in ("attention_head_dim = 8", "downsample_padding = 1", "flip_sin_to_cos = true", "freq_shift = 0"):
        assert named in str(error.value)


# Damage


def replace_tensor(name, change):
    def damage(folder):
        tensors = load_file(folder / "unet" / WEIGHTS)
        value = tensors.pop(name)
        save_file(tensors | change(value), folder / "unet" / WEIGHTS)

    return damage


def write(path, content: bytes):
    return lambda folder: (folder / path).write_bytes(content)


def changed(part, **changes):
    return lambda folder: edit(folder / CONFIGS[part], **changes)


Q = "mid_block.attentions.0.to_q.weight"
DAMAGE = {
    "no folder": shutil.rmtree,
    "no unet": lambda folder: shutil.rmtree(folder / "unet"),
    "no scheduler": lambda folder: shutil.rmtree(folder / "scheduler"),
    "no configuration": lambda folder: (folder / "unet/config.json").unlink(),
    "no weights": lambda folder: (folder / "unet" / WEIGHTS).unlink(),
    "weights are a folder": lambda folder: ((folder / "unet" / WEIGHTS).unlink(), (folder / "unet" / WEIGHTS).mkdir()),
    "no weights in the file": lambda folder: save_file({}, folder / "unet" / WEIGHTS),
    **{f"empty {path}": write(path, b"") for path in (*CONFIGS.values(), f"unet/{WEIGHTS}")},
    **{f"list in {path}": write(path, b"[]") for path in CONFIGS.values()},
    **{f"null in {path}": write(path, b"null") for path in CONFIGS.values()},
    **{f"NaN in {path}": write(path, b'{"_class_name": NaN}') for path in CONFIGS.values()},
    **{f"no UTF-8 in {path}": write(path, b'{"_class_name": "\xff"}') for path in CONFIGS.values()},
    **{f"bottomless {path}": write(path, b"[" * 100_000) for path in CONFIGS.values()},
    **{f"no class in {part}": changed(part, _class_name=...) for part in CONFIGS},
    "not safetensors": write(f"unet/{WEIGHTS}", b"\x80\x02}q\x00." * 20),
    "huge header": write(f"unet/{WEIGHTS}", b"\xff" * 64),
    "no channels": changed("unet", in_channels=...),
    "no widths": changed("unet", block_out_channels=[]),
    "negative width": changed("unet", block_out_channels=[-4, 8]),
    "widths in words": changed("unet", block_out_channels=["4", "8"]),
    "other widths": changed("unet", block_out_channels=[8, 16]),
    "widths beyond memory": changed("unet", block_out_channels=[4 << 30, 8 << 30]),
    "widths beyond numbers": changed("unet", block_out_channels=[4 << 70, 8 << 70]),
    "blocks without end": changed("unet", layers_per_block=10**12),
    "one block more": changed("unet", layers_per_block=2),
    "no block": changed("unet", layers_per_block=0),
    "true blocks": changed("unet", layers_per_block=True),
    "groups that do not divide": changed("unet", norm_num_groups=3),
    "odd size": changed("unet", sample_size=5),
    "infinite dropout": changed("unet", dropout=math.inf),
    "dropout of 1": changed("unet", dropout=1),
    "dropout in words": changed("unet", dropout="0.1"),
    "classes unheard of": changed("unet", num_class_embeds=4),
    "attention elsewhere": changed(
        "unet", down_block_types=["AttnDownBlock2D"] * 2, up_block_types=["AttnUpBlock2D"] * 2
    ),
    "types that are no list": changed("unet", down_block_types="DownBlock2D"),
    "T of 0": changed("scheduler", num_train_timesteps=0),
    "T of 1.5": changed("scheduler", num_train_timesteps=1.5),
    "T beyond memory": changed("scheduler", num_train_timesteps=10**13),
    "T of other betas": changed("scheduler", trained_betas=[0.1, 0.2]),
    "betas of 1": changed("scheduler", trained_betas=[1.0] * 30),
    "betas in words": changed("scheduler", trained_betas=["a"] * 30),
    "nested betas": changed("scheduler", trained_betas=[[0.1]] * 30),
    "no betas": changed("scheduler", trained_betas=[]),
    "negative beta": changed("scheduler", beta_start=-0.1),
    "root of a negative beta": changed("scheduler", beta_start=-0.1, beta_schedule="scaled_linear"),
    "infinite beta": write(CONFIGS["scheduler"], b'{"_class_name": "DDPMScheduler", "beta_end": 1e999}'),
    "beta in words": changed("scheduler", beta_end="0.02"),
    "variance of a list": changed("scheduler", variance_type=["fixed_small"]),
    "clipping in words": changed("scheduler", clip_sample="yes"),
    "missing tensor": replace_tensor(Q, lambda value: {}),
    "renamed tensor": replace_tensor(Q, lambda value: {f"{Q}s": value}),
    "one tensor more": replace_tensor(Q, lambda value: {Q: value, "extra": value.clone()}),
    "twice under two names": replace_tensor(Q, lambda value: {Q: value, Q.replace("to_q", "query"): value.clone()}),
    "transposed tensor": replace_tensor("conv_in.weight", lambda value: {"conv_in.weight": value.transpose(0, 1)}),
    "tensor cut short": replace_tensor(Q, lambda value: {Q: value[:-1]}),
    "not a number": replace_tensor(Q, lambda value: {Q: value * math.nan}),
    "infinite": replace_tensor(Q, lambda value: {Q: value / 0}),
    "whole numbers": replace_tensor(Q, lambda value: {Q: value.long()}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.filterwarnings("ignore:.*non-contiguous")
def test_a_damaged_folder_is_refused(folder, damage):
    damage(folder)
    with pytest.raises(CheckpointError, match=folder.name):
        from_diffusers(folder)


def test_no_cut_and_no_flipped_bit_ends_in_another_error(folder):
    """Every cut is noticed. A flipped bit may give another model (the layout has no checksum), but nothing worse."""
    rng = random.Random(3)
    for name in (*CONFIGS.values(), f"unet/{WEIGHTS}"):
        path, whole = folder / name, (folder / name).read_bytes()
        for _ in range(25):
            path.write_bytes(whole[: rng.randrange(len(whole) - 2)])
            with pytest.raises(CheckpointError, match=path.name):
                from_diffusers(folder)
        header = 8 + int.from_bytes(whole[:8], "little") if path.name == WEIGHTS else len(whole)
        for _ in range(40):
            place = rng.randrange(header)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            with contextlib.suppress(CheckpointError):
                from_diffusers(folder)
        path.write_bytes(whole)
    assert_same(from_diffusers(folder), tiny_denoiser())


# The port of the released weights, written anew


class PortResidual(nn.Module):
    def __init__(self, width_in, width, embedding):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width_in, eps=1e-6), nn.Conv2d(width_in, width, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, width)
        self.norm2, self.conv2 = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PortAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        weights = torch.einsum("bcij,bckl->bijkl", self.q(h), self.k(h)) / math.sqrt(x.shape[1])
        weights = weights.flatten(3).softmax(-1).view_as(weights)
        return x + self.proj_out(torch.einsum("bijkl,bckl->bcij", weights, self.v(h)))


class Port(nn.Module):
    """The released U-Net under the port's names: levels counted from the finest on both sides, steps from 0."""

    def __init__(self, ch, ch_mult, num_res_blocks, attending, channels=3):
        super().__init__()
        self.ch, widths = ch, [ch * m for m in ch_mult]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)

        def side(ins, level):
            part = nn.Module()
            part.block = nn.ModuleList(PortResidual(width_in, widths[level], 4 * ch) for width_in in ins)
            part.attn = nn.ModuleList(PortAttention(widths[level]) for _ in ins if level in attending)
            return part

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            above = [ch, *widths][level]
            below = widths[min(level + 1, len(widths) - 1)]
            self.down.append(side([above] + [width] * (num_res_blocks - 1), level))
            self.up.append(side([below + width] + [2 * width] * (num_res_blocks - 1) + [width + above], level))
            for part, name, exists in (
                (self.down[-1], "downsample", width is not widths[-1] or level < len(widths) - 1),
                (self.up[-1], "upsample", level > 0),
            ):
                if exists:
                    setattr(part, name, nn.Module())
                    stride = {"stride": 2} if name == "downsample" else {"padding": 1}
                    getattr(part, name).conv = nn.Conv2d(width, width, 3, **stride)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (PortResidual(widths[-1], widths[-1], 4 * ch) for _ in range(2))
        self.mid.attn_1 = PortAttention(widths[-1])
        self.norm_out, self.conv_out = nn.GroupNorm(32, ch, eps=1e-6), nn.Conv2d(ch, channels, 3, padding=1)

    def forward(self, x, steps):
        half = self.ch // 2
        angle = steps.double()[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](torch.cat([angle.sin(), angle.cos()], 1))))
        hs = [self.conv_in(x)]
        for part in self.down:
            for i, block in enumerate(part.block):
                h = block(hs[-1], temb)
                hs.append(part.attn[i](h) if part.attn else h)
            if hasattr(part, "downsample"):
                hs.append(part.downsample.conv(F.pad(hs[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for part in reversed(self.up):
            for i, block in enumerate(part.block):
                h = block(torch.cat([h, hs.pop()], 1), temb)
                h = part.attn[i](h) if part.attn else h
            if hasattr(part, "upsample"):
                h = part.upsample.conv(h.repeat_interleave(2, -1).repeat_interleave(2, -2))
        return self.conv_out(F.silu(self.norm_out(h)))


def save_port(port, path):
    save_file(port.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("mult", "blocks", "attending", "size"),
    [((1, 2, 2), 2, {1}, 8), ((1, 1, 2), 1, {0, 2}, 8), ((1,), 1, {0}, 4)],
    ids=["as released", "attention at two levels", "one level"],
)
def test_the_port_of_the_released_weights_is_read(tmp_path, mult, blocks, attending, size):
    port = draw_parameters(Port(32, mult, blocks, attending)).eval()
    found = from_pytorch_diffusion(save_port(port, tmp_path / "port.safetensors"), image_size=size)
    assert not found.training
    assert found.schedule.config == Schedule.linear().config
    assert found.predicts == "eps"
    x, steps = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([0, 731])
    with torch.no_grad():
        a, b = in_float64(found.network)(x, steps), port.double()(x, steps)
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_architectures_of_the_paper_are_read_off_the_shapes(tmp_path):
    """With a quarter of the channels, which changes nothing else."""
    for mult, level, size in (((1, 2, 2, 2), 1, 32), ((1, 1, 2, 2, 4, 4), 4, 256)):
        path = save_port(Port(32, mult, 2, {level}), tmp_path / "port.safetensors")
        network = from_pytorch_diffusion(path).network
        paper = UNet(size, base_channels=32, channel_multipliers=mult, attention_resolutions=(16,), dropout=0.0)
        assert network.config == paper.config


def test_a_file_that_is_not_the_port_is_refused(tmp_path, folder):
    path = tmp_path / "port.safetensors"
    with pytest.raises(CheckpointError, match="no file"):
        from_pytorch_diffusion(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        from_pytorch_diffusion(path)
    with pytest.raises(CheckpointError, match="does not hold the port's tensors"):
        from_pytorch_diffusion(folder / "unet" / WEIGHTS)
    port = Port(32, (1, 2), 1, {0, 1})
    with pytest.raises(CheckpointError, match="attention at 2 levels, not one: give image_size"):
        from_pytorch_diffusion(save_port(port, path))
    with pytest.raises(CheckpointError, match="no network of this library"):
        from_pytorch_diffusion(path, image_size=7)
    state = port.state_dict()
    for name in list(state)[::17]:
        save_file({key: value for key, value in state.items() if key != name}, path)
        with pytest.raises(CheckpointError, match=r"port\.safetensors"):
            from_pytorch_diffusion(path, image_size=4)


# ONNX: last, since the exporter is slow


@pytest.fixture(scope="module", params=["eps, classes", "v"])
def exported(request, tmp_path_factory):
    """A denoiser that is in training, its ONNX file, and a session of onnxruntime that reads it."""
    import onnxruntime

    if request.param == "v":
        denoiser = tiny_denoiser(Schedule.cosine(20), "v", image_size=8, attention_resolutions=(4,), dropout=0.5)
    else:
        denoiser = tiny_denoiser(classes=3, dropout=0.5)
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
    labels = [("label", ["batch"])] if denoiser.network.config["classes"] else []
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("x_t", shape), ("t", ["batch"]), *labels]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("prediction", shape)]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_computes_what_torch_computes(exported, batch):
    """Counted from 1: the network itself is asked for t - 1."""
    denoiser, _, session = exported
    config, T = denoiser.network.config, denoiser.schedule.T
    x = torch.randn(batch, 1, config["image_size"], config["image_size"])
    t = torch.linspace(1, T, batch).long()
    inputs = {"x_t": x.numpy(), "t": t.numpy()}
    label = None
    if config["classes"]:
        label = torch.arange(batch) % 4
        inputs["label"] = label.numpy()
    (found,) = session.run(["prediction"], inputs)
    with torch.no_grad():
        truth = denoiser.eval().network(x, t - 1, label)
    assert truth.std() > 0.1
    np.testing.assert_allclose(found, truth.numpy(), rtol=0, atol=1e-5)


def test_the_file_tells_all_that_sampling_needs(exported):
    """Algorithm 2 in numpy, from the file alone, gives our samples."""
    denoiser, _, session = exported
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["schedule"]) == denoiser.schedule.config
    T, alpha_bar, (low, high) = int(told["T"]), json.loads(told["alpha_bar"]), json.loads(told["value_range"])
    shape = (2, *session.get_inputs()[0].shape[1:])
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=draw).numpy()
    for t in range(T, 0, -1):
        inputs = {"x_t": x, "t": np.full(2, t)}
        if "no_label" in told:
            inputs["label"] = np.full(2, int(told["no_label"]))
        (value,) = session.run(None, inputs)
        now, before = alpha_bar[t], alpha_bar[t - 1]
        beta = 1 - now / before
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        x0 = (x - noise * value) / signal if told["predicts"] == "eps" else signal * x - noise * value
        x = math.sqrt(before) * beta * np.clip(x0, low, high) + math.sqrt(now / before) * (1 - before) * x
        x = (x / (1 - now)).astype(np.float32)
        if t > 1:
            x += math.sqrt(beta) * torch.randn(shape, generator=draw).numpy()
    ours = sample(denoiser, shape, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(x, ours.numpy(), rtol=0, atol=1e-5)


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
