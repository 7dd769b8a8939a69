"""The paper's released weights, as the PyTorch port names them. The port is written anew; its weights are random."""

import contextlib
import math
import os
import random

import pytest
import torch
import torch.nn.functional as F
from diffusers_twin import in_float64
from safetensors.torch import save_file
from tiny_models import draw_parameters, tiny_denoiser
from torch import nn

from ddpm_lib import CheckpointError, Schedule, UNet, from_pytorch_diffusion, save_denoiser


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


def test_a_file_that_is_not_the_port_is_refused(tmp_path):
    path = tmp_path / "port.safetensors"
    with pytest.raises(CheckpointError, match="no file"):
        from_pytorch_diffusion(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        from_pytorch_diffusion(path)
    save_denoiser(tiny_denoiser(), tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the port's tensors"):
        from_pytorch_diffusion(tmp_path / "ours.safetensors")
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


# The port's own files are pickles


@pytest.fixture
def ckpt(tmp_path):
    torch.save(draw_parameters(Port(32, (1,), 1, {0})).state_dict(), tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_the_port_s_own_file_gives_the_model_of_its_safetensors(ckpt, tmp_path):
    save_file(torch.load(ckpt, weights_only=True), tmp_path / "port.safetensors")
    a, b = from_pytorch_diffusion(ckpt), from_pytorch_diffusion(tmp_path / "port.safetensors")
    assert a.network.config == b.network.config
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


class Bomb:
    """Unpickling it leaves a folder behind."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_never_run(tmp_path):
    torch.save({"conv_in.weight": Bomb(tmp_path / "fired")}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="without running code"):
        from_pytorch_diffusion(tmp_path / "model.ckpt")
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"step": 3}, torch.zeros(2)], ids=["list", "number", "tensor"])
def test_a_pickle_of_other_things_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.ckpt must hold tensors by their names"):
        from_pytorch_diffusion(tmp_path / "model.ckpt")


def test_a_damaged_pickle_is_refused_or_gives_weights_of_the_same_shapes(ckpt):
    """Every cut is noticed; the format has no checksum over all of it, so a flipped bit may not be."""
    whole, rng = ckpt.read_bytes(), random.Random(5)
    for _ in range(30):
        ckpt.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(CheckpointError, match=r"model\.ckpt"):
            from_pytorch_diffusion(ckpt)
    for _ in range(60):
        place = rng.choice([rng.randrange(5000), rng.randrange(len(whole) - 8000, len(whole))])
        ckpt.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with contextlib.suppress(CheckpointError):
            from_pytorch_diffusion(ckpt)


def test_a_torch_whose_loader_was_unsafe_is_not_used(ckpt, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch 2\.5\.1\+cpu cannot read safely: take 2\.6 or newer"):
        from_pytorch_diffusion(ckpt)
