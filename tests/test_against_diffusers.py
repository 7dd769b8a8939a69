"""The network and the samplers equal diffusers' to 1e-10 in float64, step by step, wherever diffusers is exact.

Where it is not, the test says why and compares what is left:
- its tables are float32: they are replaced by float64 tables, computed here from its own betas' formula;
- its time embedding is computed in float32: both networks are given the same exact waves, and the embedding itself is
  compared at float32 accuracy;
- its ancestral sampler adds noise after the last step of a respaced walk (unless that step is t = 1), and clamps the
  smaller variance there to 1e-20: that last step is compared with the noise taken out;
- its DDIM moves by T // steps at each step whatever its timesteps say: only even respacings are comparable, walked
  from T ("trailing");
- its DDIM keeps the old eps after clipping x0 unless told ``use_clipped_model_output=True``;
- its ``fixed_large_log`` takes the root of a logarithm: never used.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers_twin import diffusers_twin, in_float64
from tiny_models import draw_parameters, tiny_unet
from torch import nn

from ddpm_lib import Denoiser, Schedule, UNet, interop, sample_steps

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE_TYPES = {"beta_tilde": "fixed_small", "beta": "fixed_large"}


# The network


def twins(network: UNet):
    """The network and diffusers' in float64, every parameter drawn at random, with the same exact waves."""
    draw_parameters(network.double(), seed=3)
    return in_float64(network, diffusers_twin(network))


ODD = {
    "two levels of attention": {"image_size": 16, "channel_multipliers": (1, 2, 2), "attention_resolutions": (16, 4)},
    "one level": {"image_size": 6, "channel_multipliers": (1,), "attention_resolutions": (6,), "blocks_per_level": 3},
    "narrowing": {"image_size": 8, "channel_multipliers": (1, 3, 2), "attention_resolutions": (4,), "groups": 4},
    "four levels, no attention": {"image_size": 8, "channel_multipliers": (1, 1, 2, 4), "attention_resolutions": ()},
}


def test_the_paper_network_equals_diffusers():
    ours, theirs = twins(UNet())
    ours, theirs = ours.eval(), theirs.eval()
    assert sum(p.numel() for p in theirs.parameters()) == 35_746_307
    x, steps = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([731])
    with torch.no_grad():
        a, b = ours(x, steps), theirs(x, steps).sample
    assert a.std() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_odd_networks_and_their_gradients_equal_diffusers(options):
    """In training mode, with the gradients of all parameters and of the input."""
    ours, theirs = twins(tiny_unet(in_channels=2, **options))
    x = torch.randn(2, 2, options["image_size"], options["image_size"], dtype=torch.float64)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    steps = torch.tensor([0, 999])
    a, b = ours.train()(ours_x, steps), theirs.train()(theirs_x, steps).sample
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    a.square().mean().backward()
    b.square().mean().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=0, atol=1e-10)
    for parameter in ours.parameters():
        parameter.data = parameter.grad  # so that the conversion of weights also converts gradients
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in interop._diffusers_state(ours).items():
        torch.testing.assert_close(
            gradient, gradients[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_time_waves_equal_diffusers_as_far_as_float32_goes():
    """At step 999 an angle in float32 is known to 6e-5; the waves agree to that."""
    network, steps = tiny_unet(base_channels=32, groups=4), torch.tensor([0, 1, 10, 500, 999])
    waves = []
    network.time.linear_1.register_forward_pre_hook(lambda module, arguments: waves.append(arguments[0]))
    network.time(steps)
    theirs = get_timestep_embedding(steps, 32, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(waves[0], theirs, rtol=0, atol=2e-4)
    torch.testing.assert_close(waves[0][:3], theirs[:3], rtol=0, atol=2e-6)


# The samplers


class Toy(nn.Module):
    """A deterministic stand-in for a trained network; large enough that clipping bites."""

    def forward(self, x, steps):
        phase = steps.double().view(-1, *[1] * (x.ndim - 1)) / 37
        return 1.3 * torch.tanh(x.roll(1, -1) + phase.cos()) + 0.4 * (2 * x).sin()


def schedule_and_tables(name: str, T: int):
    """Our schedule, and diffusers' name of it with its alphas_cumprod in float64, from its own formula for beta."""
    if name == "linear":
        beta = np.linspace(0.1 / T, 20 / T, T)
        return (
            Schedule.linear(T),
            {"beta_schedule": "linear", "beta_start": 0.1 / T, "beta_end": 20 / T},
            np.cumprod(1 - beta),
        )

    def curve(x):
        return math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2

    beta = np.array([min(1 - curve((i + 1) / T) / curve(i / T), 0.999) for i in range(T)])
    return Schedule.cosine(T), {"beta_schedule": "squaredcos_cap_v2"}, np.cumprod(1 - beta)


def scheduler_in_float64(kind, name: str, T: int, **options):
    schedule, config, alphas_cumprod = schedule_and_tables(name, T)
    scheduler = kind(num_train_timesteps=T, **config, **options)
    # Its own float32 tables are the same function, up to their rounding.
    np.testing.assert_allclose(scheduler.alphas_cumprod, alphas_cumprod, rtol=2e-3)
    scheduler.alphas_cumprod = torch.from_numpy(alphas_cumprod)
    return schedule, scheduler


def start(seed: int):
    x_T = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x_T, torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(seed + 1)


def assert_equal(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))


WALKS = {
    "every step": (60, None),
    "10 of 1000": (1000, 10),
    "7 of 1000": (1000, 7),
    "1 of 60": (60, 1),
    "uneven": (1000, [1000, 999, 700, 421, 33, 2, 1, 0]),
    "ends far from the data": (60, [60, 59, 31, 0]),
}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ancestral_sampling_equals_diffusers_ddpm(name, variance, clip, predicts, walk):
    T, steps = WALKS[walk]
    schedule, scheduler = scheduler_in_float64(
        DDPMScheduler,
        name,
        T,
        variance_type=VARIANCE_TYPES[variance],
        clip_sample=clip,
        prediction_type=PREDICTION_TYPES[predicts],
    )
    denoiser = Denoiser(Toy(), schedule, predicts)
    x, ours_noise, theirs_noise = start(7)
    walked = list(sample_steps(denoiser, steps=steps, variance=variance, clip=clip, x_T=x, generator=ours_noise))
    scheduler.set_timesteps(timesteps=[state.t - 1 for state in walked])
    for state, timestep in zip(walked, scheduler.timesteps):
        output = Toy()(x, timestep.expand(2))
        if state.s == 0 and state.t > 1:
            scheduler._get_variance = lambda *_, **__: torch.zeros(())  # diffusers adds noise here: leave its mean
        x, x0 = scheduler.step(output, timestep, x, generator=theirs_noise, return_dict=False)
        assert_equal(state.prediction.x0, x0)
        assert_equal(state.x_s, x)


@pytest.mark.parametrize("walk", ["every step", "10 of 1000", "1 of 60", "12 of 60"])
@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_equals_diffusers(name, eta, clip, predicts, walk):
    T, steps = (WALKS | {"12 of 60": (60, 12)})[walk]
    schedule, scheduler = scheduler_in_float64(
        DDIMScheduler,
        name,
        T,
        clip_sample=clip,
        prediction_type=PREDICTION_TYPES[predicts],
        timestep_spacing="trailing",
        set_alpha_to_one=True,  # alpha_bar_0 = 1: the last step arrives at the data
    )
    scheduler.set_timesteps(steps or T)
    denoiser = Denoiser(Toy(), schedule, predicts)
    x, ours_noise, theirs_noise = start(8)
    walked = list(
        sample_steps(denoiser, steps=steps, eta=eta, variance="beta_tilde", clip=clip, x_T=x, generator=ours_noise)
    )
    assert [state.t - 1 for state in walked] == scheduler.timesteps.tolist()
    for state, timestep in zip(walked, scheduler.timesteps):
        output = Toy()(x, timestep.expand(2))
        x, x0 = scheduler.step(
            output, timestep, x, eta=eta, use_clipped_model_output=clip, generator=theirs_noise, return_dict=False
        )
        assert_equal(state.prediction.x0, x0)
        assert_equal(state.x_s, x)


def test_the_whole_walk_of_the_paper_equals_diffusers():
    schedule, scheduler = scheduler_in_float64(DDPMScheduler, "linear", 1000, variance_type="fixed_large")
    x, ours_noise, theirs_noise = start(9)
    denoiser = Denoiser(Toy(), schedule)
    for state in sample_steps(denoiser, x_T=x, generator=ours_noise):
        timestep = state.t - 1
        x = scheduler.step(Toy()(x, torch.tensor([timestep] * 2)), timestep, x, generator=theirs_noise).prev_sample
        assert_equal(state.x_s, x)


def test_noising_equals_diffusers_as_far_as_float32_goes():
    """add_noise casts its table to the sample's type before 1 - alpha_bar: exact in float64 only."""
    schedule, scheduler = scheduler_in_float64(DDPMScheduler, "linear", 1000)
    x0, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 1000])
    assert_equal(schedule.q_sample(x0, t, eps), scheduler.add_noise(x0, eps, t - 1))
    single = scheduler.add_noise(x0.float(), eps.float(), t - 1)
    torch.testing.assert_close(schedule.q_sample(x0.float(), t, eps.float()), single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
def test_targets_equal_diffusers(predicts):
    """The v that a network learns is diffusers' get_velocity."""
    schedule, scheduler = scheduler_in_float64(DDPMScheduler, "cosine", 100)
    x0, eps, t = (
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(4, 3, dtype=torch.float64),
        torch.tensor([1, 9, 50, 100]),
    )
    denoiser = Denoiser(Toy(), schedule, predicts)
    found = denoiser(schedule.q_sample(x0, t, eps), t)
    target = scheduler.get_velocity(found.x0, found.eps, t - 1)
    assert_equal(found.v, target)
