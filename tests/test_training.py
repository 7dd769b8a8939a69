"""Training: each step against an independent computation, and resuming to the bit."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_models import draw_parameters, tiny_denoiser, tiny_images, tiny_unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_lib import CheckpointError, Denoiser, Schedule, Trainer, UNet, best_device
from ddpm_lib.checkpoint import read_checkpoint
from ddpm_lib.degradation import blurred, coarse
from ddpm_lib.training import NonFiniteError, keyed_randomness

SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "warmup": 3, "precision": "float32"}


def trainer(*, labels=False, classes=None, dropout=0.0, heads=None, **options) -> Trainer:
    images = tiny_images()
    label = torch.arange(len(images)) % 3 if labels else None
    denoiser = tiny_denoiser(classes=3 if labels else classes, dropout=dropout, heads=heads)
    return Trainer(denoiser, images, label, **SETTINGS | options)


def run(trainer: Trainer, steps: int) -> list:
    return list(trainer.run(steps))


def bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that training changes: network, average, the optimiser's moments and counts."""
    state = {f"network.{k}": v.clone() for k, v in trainer.denoiser.state_dict().items()}
    state |= {f"ema.{k}": v.clone() for k, v in trainer.ema.state_dict().items()}
    for i, moments in trainer.optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{i}.{k}": v.clone() for k, v in moments.items()}
    return state


def scale(trainer: Trainer) -> dict:
    return trainer.scaler.state_dict()


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# Resuming


EVERYTHING = {"labels": True, "dropout": 0.3, "condition_dropout": 0.4, "decay_steps": 12, "seed": 7}


@pytest.mark.parametrize(
    "options",
    [
        {},
        EVERYTHING,
        {"ema_warmup": False, "ema_decay": 0.5, "batch_size": 7},
        {"precision": "bfloat16", "dropout": 0.1, "batch_size": 25, "heads": 2},
        {"precision": "float16", "dropout": 0.1, "flip": True},
        {"accumulate": 2, "dropout": 0.3, "channels_last": True},
        {"optimiser": "muon", "dropout": 0.3, "labels": True, "weight_decay": 0.1},
    ],
    ids=[
        "plain",
        "everything",
        "constant EMA, batch across epochs",
        "bfloat16, batch over two epochs",
        "float16 with its scale, mirrored",
        "in two parts, channels last",
        "Muon",
    ],
)
@pytest.mark.parametrize("n", [1, 5])
def test_2n_steps_are_n_steps_a_stop_and_n_steps(tmp_path, options, n):
    whole = trainer(**options)
    whole_logs = run(whole, 2 * n)
    first = trainer(**options)
    first_logs = run(first, n)
    first.save(tmp_path / "half.safetensors")
    torch.randn(100)  # whatever happens in between
    second = trainer(**options)
    run(second, 3)  # and whatever the new trainer did before
    second.resume(tmp_path / "half.safetensors")
    second_logs = run(second, n)
    assert_same_bits(bits(second), bits(whole))
    assert scale(second) == scale(whole)
    for ours, theirs in zip(first_logs + second_logs, whole_logs, strict=True):
        assert (ours.step, ours.learning_rate) == (theirs.step, theirs.learning_rate)
        for name in ("t", "losses", "grad_norm"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_muon_leaves_the_embedding_of_classes_to_adam():
    ours = trainer(labels=True, optimiser="muon")
    run(ours, 1)
    state = dict(zip(ours.parameters, ours.optimiser.state_dict()["state"].values(), strict=True))
    assert state.pop(ours.denoiser.network.label.weight).keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all((p.ndim > 1) == ("momentum" in values) for p, values in state.items())


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_weight_decay_takes_its_share_of_the_old_weights(optimiser):
    """Of one step from the same weights, the difference is lr x weight_decay x weight; Muon spares all but its maps."""
    start = trainer(labels=True, optimiser=optimiser)
    before = [p.detach().clone() for p in start.parameters]
    options = {"labels": True, "optimiser": optimiser, "learning_rate": 1e-2, "warmup": 0}
    plain, decaying = (trainer(**options, weight_decay=share) for share in (0.0, 0.5))
    run(plain, 1), run(decaying, 1)
    for old, p, q in zip(before, plain.parameters, decaying.parameters):
        shrinks = optimiser == "adam" or decaying.optimiser.is_map(q)
        torch.testing.assert_close(p - q, 5e-3 * old * shrinks, rtol=1e-3, atol=1e-7)


def test_resuming_twice_gives_the_same_file(tmp_path):
    first = trainer(**EVERYTHING)
    run(first, 4)
    first.save(tmp_path / "a.safetensors")
    second = trainer(**EVERYTHING)
    second.resume(tmp_path / "a.safetensors")
    second.save(tmp_path / "b.safetensors")
    (config, tensors), (again, found) = (read_checkpoint(tmp_path / f"{name}.safetensors", "training") for name in "ab")
    assert config == again
    assert_same_bits(tensors, found)


def test_a_trainer_that_never_stepped_can_be_saved(tmp_path):
    first, second = trainer(), trainer()
    first.save(tmp_path / "zero.safetensors")
    second.resume(tmp_path / "zero.safetensors")
    run(first, 2)
    run(second, 2)
    assert_same_bits(bits(first), bits(second))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-2}, "learning_rate is 0.01 there and 0.02 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"ema_decay": 0.9}, "ema_decay"),
        ({"dropout": 0.1}, "dropout is 0.0 there and 0.1 here"),
        ({"classes": 3}, "classes is None there and 3 here"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_resuming_another_run_is_refused(tmp_path, change, named):
    trainer().save(tmp_path / "run.safetensors")
    with pytest.raises(CheckpointError, match=named):
        trainer(**change).resume(tmp_path / "run.safetensors")


def test_resuming_on_other_data_or_another_schedule_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    trainer().save(path)
    with pytest.raises(CheckpointError, match="data_sha256"):
        Trainer(tiny_denoiser(), tiny_images() * 0.5, **SETTINGS).resume(path)
    with pytest.raises(CheckpointError, match=r"schedule.*T is 30 there and 40 here"):
        Trainer(tiny_denoiser(Schedule.linear(40)), tiny_images(), **SETTINGS).resume(path)
    with pytest.raises(CheckpointError, match="predicts is 'eps' there and 'v' here"):
        Trainer(tiny_denoiser(predicts="v"), tiny_images(), **SETTINGS).resume(path)


# Randomness and the order of the data


class Spy(nn.Module):
    """A network of one weight that notes what it was shown, and answers with weight * x."""

    def __init__(self, weight: float = 0.5, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.config, self.seen, self.labels, self.steps = config, [], [], []
        self.nothing = torch.tensor(config.get("classes", 0))

    def forward(self, x, steps, label=None):
        self.seen.append(x.detach())
        self.steps.append(steps)
        self.labels.append(label)
        return self.weight * x


def numbered(n: int) -> torch.Tensor:
    """Images that show their own number: (i + 0.5) / n."""
    return ((torch.arange(n) + 0.5) / n)[:, None, None, None].expand(n, 1, 2, 2).contiguous()


QUIET = Schedule([1e-14] * 25)  # x_t is x0, as near as the test can see


def shown(n: int, batch_size: int, steps: int, seed: int = 0) -> list[int]:
    spy = Spy()
    run(Trainer(Denoiser(spy, QUIET), numbered(n), batch_size=batch_size, seed=seed), steps)
    return [int(value * n) for batch in spy.seen for value in batch[:, 0, 0, 0]]


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (5, 7), (3, 16)])
def test_each_epoch_shows_each_image_once(n, batch_size):
    epochs = 6
    order = shown(n, batch_size, -(-n * epochs // batch_size))
    assert len(order) >= n * epochs
    chunks = [order[i * n : (i + 1) * n] for i in range(epochs)]
    assert all(sorted(chunk) == list(range(n)) for chunk in chunks)
    assert len({tuple(chunk) for chunk in chunks}) > 1


def test_the_order_depends_on_the_seed_alone():
    assert shown(12, 4, 6) == shown(12, 4, 6)
    assert shown(12, 4, 6) != shown(12, 4, 6, seed=1)
    assert shown(12, 4, 6) == shown(12, 6, 4)


def test_training_leaves_the_streams_of_the_caller_alone():
    training = trainer(**EVERYTHING)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    run(training, 3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_the_streams_of_the_caller_do_not_matter():
    first, second = trainer(**EVERYTHING), trainer(**EVERYTHING)
    torch.manual_seed(0)
    run(first, 3)
    torch.manual_seed(1)
    run(second, 3)
    assert_same_bits(bits(first), bits(second))


def test_every_seed_and_step_has_its_own_noise():
    draws = set()
    for seed in range(8):
        for step in range(8):
            with keyed_randomness(seed, step, torch.device("cpu")):
                draws.add(float(torch.randn(())))
    assert len(draws) == 64


def test_steps_t_are_uniform_on_1_to_T():
    spy = Spy()
    run(Trainer(Denoiser(spy, QUIET), numbered(4), batch_size=1000), 25)
    counts = torch.bincount(torch.cat(spy.steps), minlength=25)
    assert len(counts) == 25
    expected = 25 * 1000 / 25
    # Chi-square with 24 degrees of freedom: mean 24, deviation 7.
    assert float(((counts - expected) ** 2 / expected).sum()) < 24 + 5 * 7


def test_the_noise_is_standard_normal():
    """With no signal left, the network is shown nothing but eps."""
    spy = Spy()
    logs = run(Trainer(Denoiser(spy, Schedule([1 - 1e-12] * 2)), numbered(4), batch_size=500), 10)
    eps = torch.cat(spy.seen).flatten()
    assert float(eps.mean()) == pytest.approx(0, abs=4 / math.sqrt(len(eps)))
    assert float(eps.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / len(eps)))
    assert not torch.equal(spy.seen[0], spy.seen[1])
    assert logs[-1].t.shape == (500,)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_a_share_of_labels_is_replaced_by_no_label(share):
    spy = Spy(classes=7)
    labels = torch.arange(10) % 7
    options = {"batch_size": 500, "condition_dropout": share}
    run(Trainer(Denoiser(spy, QUIET), numbered(10), labels, **options), 20)
    given, seen = torch.cat(spy.labels), torch.cat(spy.seen)[:, 0, 0, 0]
    dropped = given == 7
    assert float(dropped.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 10_000))
    assert torch.equal(given[~dropped], labels[(seen * 10).long()][~dropped])


# One step, computed independently


@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_are_zero_in_a_step_and_then_as_before(before):
    """They cost a CPU many times what other numbers cost."""

    def flushed():
        return float(torch.tensor(1e-30) * 1e-10) == 0

    training, seen = trainer(), []
    training.denoiser.network.register_forward_hook(lambda *_: seen.append(flushed()))
    if not torch.set_flush_denormal(before):
        pytest.skip("this processor cannot")
    try:
        next(training.run(1))
        assert (seen, flushed()) == ([True], before)
    finally:
        torch.set_flush_denormal(False)


def test_a_weight_cap_caps_the_loss():
    """Caps below the square root of all SNRs are the weights themselves."""
    low, twice, paper = (next(trainer(weight_cap=cap).run(1)).losses for cap in (1e-4, 2e-4, None))
    torch.testing.assert_close(twice, 2 * low)
    assert not torch.allclose(paper, low)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("ema_warmup", [True, False], ids=["EMA warm-up", "EMA constant"])
def test_every_step_is_adam_on_the_clipped_gradient(clip_norm, ema_warmup):
    """Loss, gradient, clipping, Adam, learning rate and average of a one-weight network, redone in plain Python."""
    schedule, spy = Schedule.linear(30), Spy(0.5)
    options = {"warmup": 4, "decay_steps": 9, "learning_rate": 0.1, "batch_size": 6, "ema_decay": 0.6}
    images = torch.full((3, 1, 2, 2), 0.25)
    training = Trainer(Denoiser(spy, schedule), images, clip_norm=clip_norm, ema_warmup=ema_warmup, **options)
    weight = average = 0.5
    m = v = 0.0
    alpha_bar = np.cumprod(1 - np.linspace(0.1 / 30, 20 / 30, 30))
    for n, log in enumerate(training.run(14), start=1):
        x_t, index = spy.seen[-1].double().numpy().reshape(6, 4), log.t.numpy() - 1
        signal, noise = np.sqrt(alpha_bar[index])[:, None], np.sqrt(1 - alpha_bar[index])[:, None]
        eps = (x_t - signal * 0.25) / noise
        residual = weight * x_t - eps
        np.testing.assert_allclose(log.losses, (residual**2).mean(1), rtol=1e-4)
        gradient = (2 * residual * x_t).mean()
        assert float(log.grad_norm) == pytest.approx(abs(gradient), rel=1e-4, abs=1e-5)
        assert log.loss == pytest.approx((residual**2).mean(), rel=1e-4)
        gradient *= min(1, clip_norm / abs(gradient))
        rate = 0.1 * (n / 4 if n <= 4 else max((9 - (n - 1)) / 5, 0.02))
        assert log.learning_rate == pytest.approx(rate)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        weight -= rate * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)
        # The first step averages with decay 1/10, the second with 2/11, ...
        decay = min(0.6, n / (9 + n)) if ema_warmup else 0.6
        average = decay * average + (1 - decay) * weight
        assert float(spy.weight.detach()) == pytest.approx(weight, abs=1e-4)
        assert float(training.ema.network.weight) == pytest.approx(average, abs=1e-4)
        assert log.step == training.step == n


def test_the_average_covers_every_parameter_and_follows_its_formula():
    training = trainer(ema_decay=0.9)
    averages = [p.clone() for p in training.denoiser.parameters()]
    for n, _ in enumerate(training.run(20), start=1):
        decay = min(0.9, n / (9 + n))
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, training.denoiser.parameters())]
    for ours, theirs in zip(averages, training.ema.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert not theirs.requires_grad
    assert not training.ema.training


def test_the_average_starts_at_the_weights_and_is_not_trained():
    training = trainer()
    for a, b in zip(training.denoiser.parameters(), training.ema.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0}, [1] * 10),
        ({"warmup": 0, "decay_steps": 5}, [1, 0.8, 0.6, 0.4, 0.2, 0.02, 0.02, 0.02, 0.02, 0.02]),
        ({"warmup": 2, "decay_steps": 4}, [0.5, 1, 1, 0.5, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02]),
    ],
    ids=["warm-up", "constant", "decay", "both"],
)
def test_learning_rates(options, expected):
    logs = run(trainer(**options), 10)
    assert [log.learning_rate / 1e-2 for log in logs] == pytest.approx(expected)


def test_the_gradient_is_clipped_as_torch_does():
    """The norm that is logged is the norm before; Adam's first moment holds a tenth of the clipped gradient."""
    training = trainer(clip_norm=1e-2, warmup=0)
    (log,) = run(training, 1)
    assert log.grad_norm > 0.1
    moments = [state["exp_avg"] for state in training.optimiser.state_dict()["state"].values()]
    clipped = 10 * torch.cat([m.flatten() for m in moments])
    assert float(clipped.norm()) == pytest.approx(1e-2, rel=1e-3)


def test_the_gradient_is_that_of_the_mean_loss():
    training = trainer(clip_norm=1e6)
    twin = copy.deepcopy(training.denoiser)
    seen = []
    hook = training.denoiser.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    (log,) = run(training, 1)
    hook.remove()
    ((x_t, steps),) = seen
    assert torch.equal(steps + 1, log.t)
    output = twin.network(x_t, steps)
    alpha_bar = twin.schedule.alpha_bar[log.t].view(-1, 1, 1, 1)
    images = tiny_images().double()
    eps = [(x_t.double() - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt() for image in images]
    # Which image each row shows is not told: one of them must explain its loss.
    errors = torch.stack([(output.double() - e).square().mean((1, 2, 3)) for e in eps])
    assert (errors - log.losses).abs().min(0).values.max() < 1e-4


def test_networks_that_know_the_answer_have_no_loss():
    class Knowing(Spy):
        """Knows that all images are 0.25."""

        def forward(self, x, steps):
            alpha_bar = schedule.alpha_bar[steps + 1].view(-1, 1, 1, 1)
            return (x - alpha_bar.sqrt() * 0.25) / (1 - alpha_bar).sqrt() + 0 * self.weight

    schedule, images = Schedule.linear(50), torch.full((3, 1, 2, 2), 0.25)
    (log,) = run(Trainer(Denoiser(Knowing(), schedule), images, batch_size=64), 1)
    assert log.losses.max() < 1e-9


def test_a_network_that_answers_zero_has_the_loss_of_the_noise():
    images = torch.zeros(3, 1, 8, 8)
    (log,) = run(Trainer(Denoiser(Spy(0.0), Schedule.linear(50)), images, batch_size=1000), 1)
    assert float(log.losses.mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / 64_000))


def test_training_learns():
    """Images of one value: the loss falls well below that of the best constant answer."""
    images = torch.full((4, 1, 4, 4), 0.5)
    denoiser = Denoiser(draw_parameters(tiny_unet(base_channels=8)), Schedule.linear(30))
    training = Trainer(denoiser, images, batch_size=32, learning_rate=5e-3, warmup=10, precision="float32")
    losses = [log.loss for log in training.run(80)]
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:5]) / 5
    assert sum(losses[-20:]) / 20 < 0.8


# Precision, devices and waiting


def test_bfloat16_keeps_the_weights_and_the_loss_in_float32():
    training = trainer(precision="bfloat16")
    outputs = []
    training.denoiser.network.head.register_forward_hook(lambda module, arguments, output: outputs.append(output.dtype))
    (log,) = run(training, 1)
    assert outputs == [torch.bfloat16]
    assert log.losses.dtype == torch.float32
    assert {p.dtype for p in training.denoiser.parameters()} == {torch.float32}
    (exact,) = run(trainer(precision="float32"), 1)
    torch.testing.assert_close(log.losses, exact.losses, rtol=0.05, atol=0.05)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device: reading a value, or shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", [{}, {"labels": True, "condition_dropout": 0.5}], ids=["plain", "labels"])
def test_no_step_waits_for_the_device(options, monkeypatch):
    """The checks of t and of labels look at tensors on the CPU only, so they are taken out here."""
    training = trainer(**options)
    monkeypatch.setattr(Schedule, "check", lambda *_, **__: None)
    monkeypatch.setattr(UNet, "_label_embedding", lambda self, label, x: 0.0 if label is None else self.label(label))
    fused = training.optimiser.param_groups[0]["fused"]
    run(training, 1)
    with Waits() as waits:
        logs = run(training, 2)
    assert waits.found == []
    assert fused
    assert all(isinstance(getattr(log, name), torch.Tensor) for log in logs for name in ("t", "losses", "grad_norm"))
    with Waits() as waits:
        assert isinstance(logs[0].loss, float)
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"labels": True, "dropout": 0.2}], ids=["plain", "labels"])
def test_no_step_waits_for_cuda(options):
    training = trainer(device="cuda", **options)
    run(training, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(training, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


ACCELERATED = pytest.param(
    best_device(), marks=pytest.mark.skipif(best_device().type == "cpu", reason="no accelerator"), id="accelerator"
)


@pytest.mark.parametrize("device", [ACCELERATED])
def test_training_on_the_accelerator_follows_the_cpu_and_resumes(device, tmp_path):
    training = trainer(device=device, dropout=0.2)
    before = torch.get_rng_state()
    run(training, 4)
    assert torch.equal(torch.get_rng_state(), before)
    training.save(tmp_path / "a.safetensors")
    again = trainer(device=device, dropout=0.2)
    again.resume(tmp_path / "a.safetensors")
    (a,), (b,) = run(training, 1), run(again, 1)
    assert a.losses.device.type == device.type
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-3, atol=1e-4)


# Parts of a batch, mirrors, and numbers that are none


def gradient_step(**options) -> dict[str, torch.Tensor]:
    training = trainer(**options)
    run(training, 1)
    return {name: moments["exp_avg"] / 0.1 for name, moments in training.optimiser.state_dict()["state"].items()}


def test_the_gradient_of_the_parts_is_that_of_the_batch():
    whole, parts = gradient_step(clip_norm=1e9), gradient_step(clip_norm=1e9, accumulate=4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


def test_dropout_differs_from_part_to_part():
    """With every image, step and noise the same, parts differ by their masks alone."""
    training = trainer(dropout=0.5, accumulate=4)
    x0, t, eps, _ = training._batch()
    with torch.no_grad():
        same = (*(part[:1].expand_as(part) for part in (x0, t, eps)), None)
    training.denoiser.train()
    losses = training._gradient(same)
    assert len(losses.unique()) == 4


def test_half_of_the_images_are_mirrored():
    training = Trainer(tiny_denoiser(), tiny_images(), batch_size=1000, precision="float32", flip=True)
    plain = Trainer(tiny_denoiser(), tiny_images(), batch_size=1000, precision="float32")
    batches = []
    for one in (training, plain):
        with keyed_randomness(0, 0, torch.device("cpu")):
            batches.append(one._batch())
    (flipped, *rest), (straight, *same_rest) = batches
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(rest, same_rest))
    mirrored = (flipped == straight.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], straight.flip(3), straight))
    assert abs(float(mirrored.double().mean()) - 0.5) < 3 * 0.5 / 1000**0.5


class Exploding(nn.Module):
    """A network whose output is NaN at one training step."""

    def __init__(self, at: int):
        super().__init__()
        self.inner, self.at, self.calls = draw_parameters(tiny_unet()), at, 0

    def forward(self, x, steps):
        self.calls += self.training
        return self.inner(x, steps) * (math.nan if self.calls == self.at else 1.0)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_nan_never_reaches_the_weights(precision):
    options = SETTINGS | {"precision": precision, "nonfinite": "skip"}
    training = Trainer(Denoiser(Exploding(3), Schedule.linear(30)), tiny_images(), **options)
    run(training, 2)
    before = [p.detach().clone() for p in training.parameters]
    (log,) = run(training, 1)
    assert not math.isfinite(log.loss)
    assert all(torch.equal(p, q) for p, q in zip(training.parameters, before))
    run(training, 1)
    assert not all(torch.equal(p, q) for p, q in zip(training.parameters, before))
    assert all(p.isfinite().all() for p in [*training.parameters, *training.averages])


def test_a_nan_stops_the_run_within_a_hundred_steps_and_is_named():
    training = Trainer(Denoiser(Exploding(3), Schedule.linear(30)), tiny_images(), **SETTINGS)
    with pytest.raises(NonFiniteError, match="at step 3;"):
        run(training, 200)
    assert training.step == 100


def test_a_nan_is_not_saved(tmp_path):
    training = Trainer(Denoiser(Exploding(3), Schedule.linear(30)), tiny_images(), **SETTINGS)
    run(training, 5)
    with pytest.raises(NonFiniteError, match="at step 3;"):
        training.save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_uint8_images_train_as_their_floats_do():
    images = (tiny_images() * 127.5 + 127.5).round().to(torch.uint8)
    whole, floats = (Trainer(tiny_denoiser(), pictures, **SETTINGS) for pictures in (images, images / 127.5 - 1))
    run(whole, 3)
    run(floats, 3)
    assert_same_bits(bits(whole), bits(floats))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: no g++ here")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_channels_last_run_is_the_eager_one_up_to_rounding():
    """Four channels to a group, as in the paper's network: there a compiled normalisation has once been wrong."""
    outcomes = []
    for options in ({}, {"compile": True, "channels_last": True}):
        denoiser = tiny_denoiser(base_channels=16, groups=4, channel_multipliers=(1,), attention_resolutions=(4,))
        taught = Trainer(denoiser, tiny_images(), **SETTINGS | {"warmup": 0, "learning_rate": 1e-3} | options)
        logs = run(taught, 3)
        gradients = [parameter.grad.clone() for parameter in taught.parameters]
        outcomes.append((torch.stack([log.losses for log in logs]), gradients))
    (eager_losses, eager), (losses, compiled) = outcomes
    torch.testing.assert_close(losses, eager_losses, rtol=1e-4, atol=1e-6)
    for a, b in zip(compiled, eager):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


# Images beside the images


def beside(conditions, flip=False) -> Trainer:
    denoiser = tiny_denoiser(image_channels=1)
    return Trainer(denoiser, tiny_images(), conditions, **SETTINGS | {"batch_size": 8}, flip=flip)


def test_what_an_image_is_shown_beside_is_mirrored_with_it():
    x0, _, _, condition = beside(tiny_images(), flip=True)._batch()
    assert torch.equal(x0, condition)


@pytest.mark.parametrize(
    ("conditions", "complaint"),
    [
        (tiny_images()[:5], r"floats of shape \(10, 1, 4, 4\); got torch.float32 of shape \(5, 1, 4, 4\)"),
        (torch.zeros(10, 1, 4, 4, dtype=torch.uint8), "floats of shape"),
        (torch.zeros(10, 3, 4, 4), "floats of shape"),
        (torch.full((10, 1, 4, 4), math.nan), "finite"),
    ],
)
def test_images_beside_that_do_not_fit_are_refused(conditions, complaint):
    with pytest.raises(ValueError, match=complaint):
        beside(conditions)


def test_resuming_with_another_view_of_the_images_is_refused(tmp_path):
    first = beside(blurred)
    run(first, 1)
    first.save(tmp_path / "run.safetensors")
    again = beside(blurred)
    again.resume(tmp_path / "run.safetensors")
    assert again.step == 1
    with pytest.raises(CheckpointError, match="data_sha256"):
        beside(coarse).resume(tmp_path / "run.safetensors")


def test_images_beside_are_brought_to_the_precision_of_the_network():
    losses = [run(beside(tiny_images().to(dtype)), 1)[0].loss for dtype in (torch.float32, torch.float64)]
    assert losses[0] == losses[1]


def test_a_run_does_not_depend_on_how_the_images_lie_in_memory():
    images = tiny_images().repeat(1, 3, 1, 1) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    other = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    losses = [
        [log.loss for log in run(Trainer(tiny_denoiser(in_channels=3), x, **SETTINGS), 2)] for x in (images, other)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_are_whole_numbers_of_any_kind(dtype):
    labels = (torch.arange(10) % 3).to(dtype)
    one = Trainer(tiny_denoiser(classes=3), tiny_images(), labels, **SETTINGS)
    assert run(one, 1)[0].loss == run(trainer(labels=True), 1)[0].loss


def test_resuming_forgets_a_number_that_was_not_finite(tmp_path):
    one = trainer()
    run(one, 1)
    one.save(tmp_path / "run.safetensors")
    one.first_bad.fill_(1)
    one.resume(tmp_path / "run.safetensors")
    one.check_finite()
