"""Models that leave for diffusers and come back: the same numbers there, the same bits here, and no half a file.

diffusers runs what is written, and writes what is read. Nothing is downloaded: all weights are drawn at random.
"""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_twin import diffusers_twin, in_float64
from safetensors.torch import load_file, save_file
from tiny_models import draw_parameters, tiny_denoiser, tiny_unet
from torch import nn

from ddpm_lib import CheckpointError, Denoiser, Schedule, UNet, interop, sample
from ddpm_lib.interop import WEIGHTS, diffusers_sampling, from_diffusers, to_diffusers

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


class OneLayer(nn.Module):
    """A network whose thousand calls take no time, for us and for diffusers; other tests compare the real ones."""

    def __init__(self):
        super().__init__()
        self.conv = draw_parameters(nn.Conv2d(1, 1, 3, padding=1))

    def forward(self, x, steps):
        return (self.conv(x) + x * (1 - steps.reshape(-1, 1, 1, 1) / 1000)).tanh()


def test_all_thousand_steps_of_the_paper_agree(tmp_path):
    """Within 1e-5, given exact tables: its own float32 ones cost diffusers 2e-5, or 0.005 of a grey level."""
    network, schedule = OneLayer(), Schedule.linear()
    ours = sample(Denoiser(network, schedule), (2, 1, 4, 4), generator=torch.Generator().manual_seed(2))
    assert ours.std() > 0.1
    to_diffusers(tiny_denoiser(schedule), tmp_path / "model")
    pipe = pipeline(tmp_path / "model")
    pipe.unet.forward = lambda x, t: SimpleNamespace(sample=network(x, t))
    for tables, tolerance in ((pipe.scheduler.alphas_cumprod, 5e-5), (schedule.alpha_bar[1:], 1e-5)):
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
        ({"patch_size": 2}, r"patch_size must be 1; got 2"),
        ({"coordinates": True}, r"sees no coordinates"),
        ({"heads": 2}, r"heads must be None"),
    ],
    ids=["score", "wide first level", "two channels", "patches", "coordinates", "heads"],
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
    "widths that diffusers cannot embed": changed("unet", block_out_channels=[2, 4]),
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
