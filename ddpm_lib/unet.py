"""The U-Net of the paper, configurable from a lecture's model to the 35.7M and 114M of the paper.

Source: Ho, Jain, Abbeel (2020), appendix B, and their released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import _positive_int

EPS = 1e-6  # of every GroupNorm in the paper's code


class UNet(nn.Module):
    """Maps a noisy image and its step to an image of the same shape.

    The defaults are the paper's CIFAR-10 model: 35,746,307 parameters. The network may be told what to draw, by a
    class, by a text or by an image: set one of ``classes``, ``text_channels`` and ``image_channels``.

    Args:
        image_size: side of the square training images; it only fixes where ``attention_resolutions`` lie. Other sizes
            work as long as every level can halve them.
        in_channels: of image and output.
        base_channels: channels of the first level, a multiple of ``groups``.
        channel_multipliers: channels of each level over base_channels; each level but the last halves the image.
        blocks_per_level: residual blocks on the way down; there is one more on the way up.
        attention_resolutions: sides of the feature maps that get self-attention.
        heads: None for the paper's attention, with one head (four to words); else that many heads in all attention,
            with queries and keys normalised in each head (in the spirit of Dehghani et al. 2023, section 2). It keeps a
            high learning rate from driving the attention of each place to one single place, where its gradient
            vanishes.
        dropout: in the residual blocks.
        groups: of every group normalisation.
        classes: number of classes for a class-conditional network; None for an unconditional one.
        patch_size: side of the squares of pixels that become channels of one place before the first convolution, and
            pixels again after the last. 1, the paper's, leaves the image as it is; 2 makes a step about four times
            cheaper (Luhman and Luhman 2022).
        text_channels: features of each word of a text. Their mean joins the embedding of the step, and behind each
            self-attention the pixels attend to the words (Rombach et al. 2022, section 3.3).
        image_channels: channels of an image beside the noisy one, of the same size, that the first convolution sees,
            too (Saharia et al. 2021, section 2.1).
        adaptive_norm: let the embedding scale and shift what each block has normalised, instead of joining it before
            (Dhariwal and Nichol 2021, section 3.1). It says more with the same embedding.
        lean: for small networks on a CPU, about half the operations: as many blocks on the way up as down, images
            halved before the blocks of a level instead of after them, and a convolution of 1 x 1 before images are
            doubled instead of 3 x 3 after (in the spirit of Saharia et al. 2022, appendix B, Efficient U-Net).
        coordinates: show the first convolution two more channels, x and y of each place in [-1, 1] (Liu et al. 2018).
            Without them a network knows places from the padding of its convolutions alone.
        initial: where the weights start: 'paper', with variance 2 / (fan_in + fan_out), or 'torch', PyTorch's own
            1 / (3 fan_in), from which a small network with a high learning rate sets out several times faster. What
            starts near zero does so in both.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        groups: int = 32,
        classes: int | None = None,
        patch_size: int = 1,
        text_channels: int | None = None,
        image_channels: int | None = None,
        adaptive_norm: bool = False,
        lean: bool = False,
        coordinates: bool = False,
        initial: str = "paper",
        heads: int | None = None,
    ):
        super().__init__()
        if initial not in ("paper", "torch"):
            raise ValueError(f"initial must be 'paper' or 'torch'; got {initial!r}.")
        for name, value in (("image_size", image_size), ("in_channels", in_channels), ("base_channels", base_channels)):
            _positive_int(name, value)
        for name, value in (("blocks_per_level", blocks_per_level), ("groups", groups), ("patch_size", patch_size)):
            _positive_int(name, value)
        self.config = {
            "image_size": image_size,
            "in_channels": in_channels,
            "base_channels": base_channels,
            "channel_multipliers": list(channel_multipliers),
            "blocks_per_level": blocks_per_level,
            "attention_resolutions": list(attention_resolutions),
            "dropout": dropout,
            "groups": groups,
            "classes": classes,
            "patch_size": patch_size,
            "text_channels": text_channels,
            "image_channels": image_channels,
            "adaptive_norm": adaptive_norm,
            "lean": lean,
            "coordinates": coordinates,
            "initial": initial,
            "heads": heads,
        }
        if not channel_multipliers or any(not isinstance(m, int) or m < 1 for m in channel_multipliers):
            raise ValueError(f"channel_multipliers must be one or more whole numbers >= 1; got {channel_multipliers}.")
        if base_channels % groups or base_channels % 2:
            raise ValueError(
                f"base_channels must be even and a multiple of groups = {groups}; got {base_channels}. "
                "Choose fewer groups or more channels."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}.")
        if heads is not None:
            _positive_int("heads", heads)
        conditions = {"classes": classes, "text_channels": text_channels, "image_channels": image_channels}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        for name, value in conditions.items():
            _positive_int(name, value)
        if len(conditions) > 1:
            raise ValueError(f"a network is told what to draw in one way; got {' and '.join(conditions)}.")
        self.halvings = len(channel_multipliers) - 1
        self._check_size(image_size, image_size)
        sizes = [image_size // patch_size >> level for level in range(len(channel_multipliers))]
        if unknown := set(attention_resolutions) - set(sizes):
            raise ValueError(
                f"attention_resolutions must be among the feature map sizes {sizes}; got {sorted(unknown)}."
            )

        channels = [base_channels * m for m in channel_multipliers]
        embedding = 4 * base_channels
        self.time = TimeEmbedding(base_channels, embedding)
        self.label = None if classes is None else nn.Embedding(classes + 1, embedding)
        self.text = None if text_channels is None else linear(text_channels, embedding)
        pixels = in_channels * patch_size**2
        self.stem = conv3x3(pixels + (image_channels or 0) * patch_size**2 + 2 * coordinates, base_channels)

        def stage(width_in: int, width: int, size: int) -> Stage:
            attends = size in attention_resolutions
            return Stage(width_in, width, embedding, dropout, groups, attends, text_channels, adaptive_norm, heads)

        skips, width = [] if lean else [base_channels], base_channels
        self.down = nn.ModuleList()
        for level, (size, out) in enumerate(zip(sizes, channels)):
            if lean and level > 0:
                self.down.append(Downsample(width, out))
                width = out
            for _ in range(blocks_per_level):
                self.down.append(stage(width, out, size))
                width = out
                skips.append(width)
            if not lean and level < self.halvings:
                self.down.append(Downsample(width, width))
                skips.append(width)

        self.middle = nn.ModuleList(
            [
                Stage(width, width, embedding, dropout, groups, True, text_channels, adaptive_norm, heads),
                Stage(width, width, embedding, dropout, groups, False, text_channels, adaptive_norm, heads),
            ]
        )

        self.up = nn.ModuleList()
        for level, (size, out) in reversed(list(enumerate(zip(sizes, channels)))):
            for _ in range(blocks_per_level if lean else blocks_per_level + 1):
                self.up.append(stage(width + skips.pop(), out, size))
                width = out
            if level > 0:
                self.up.append(LeanUpsample(width, channels[level - 1]) if lean else Upsample(width))
                width = channels[level - 1] if lean else width

        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.head = conv3x3(width, pixels, near_zero=True)
        if initial == "torch":
            for layer in self.modules():
                if getattr(layer, "near_zero", True) is False:
                    layer.reset_parameters()
                    nn.init.zeros_(layer.bias)

    @property
    def nothing(self) -> Tensor | None:
        """The condition that stands for none, for one image; None if the network knows no such thing."""
        return None if self.label is None else torch.tensor(self.config["classes"])

    def forward(self, x: Tensor, steps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Output of the shape of x.

        Args:
            x: images, (B, in_channels, H, W), H and W divisible by patch_size * 2 ** (levels - 1).
            steps: (B,), counted from 0 (the Denoiser passes t - 1).
            condition: what to draw. For a network with classes, (B,) whole numbers in 0..classes, where ``classes``
                stands for "no label", as does None; with text_channels, (B, words, text_channels); with image_channels,
                (B, image_channels, H, W).
        """
        if x.ndim != 4 or x.shape[1] != self.config["in_channels"]:
            raise ValueError(f"x must have shape (B, {self.config['in_channels']}, H, W); got {tuple(x.shape)}.")
        self._check_size(*x.shape[2:])
        embedding, text = self.time(steps), ()
        if self.text is not None:
            text = (self._checked_text(condition, x),)
            embedding = embedding + self.text(text[0].mean(1))
        elif self.config["image_channels"] is not None:
            x = torch.cat([x, self._checked_image(condition, x)], dim=1)
        else:
            embedding = embedding + self._label_embedding(condition, x)
        h = F.pixel_unshuffle(x, self.config["patch_size"])
        if self.config["coordinates"]:
            h = torch.cat([h, coordinates(h).expand(len(h), -1, -1, -1)], dim=1)
        h = self.stem(h)
        lean = self.config["lean"]
        skips = [] if lean else [h]
        for part in self.down:
            h = part(h, embedding, *text) if isinstance(part, Stage) else part(h, embedding)
            if isinstance(part, Stage) or not lean:
                skips.append(h)
        for part in self.middle:
            h = part(h, embedding, *text)
        for part in self.up:
            if isinstance(part, Stage):
                h = part(torch.cat([h, skips.pop()], dim=1), embedding, *text)
            else:
                h = part(h, embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.config["patch_size"])

    def _label_embedding(self, label: Tensor | None, x: Tensor) -> Tensor | float:
        if self.label is None:
            if label is not None:
                raise ValueError("this network has no classes: leave the label out, or build it with classes=N.")
            return 0.0
        classes = self.config["classes"]
        if label is None:
            label = torch.full((x.shape[0],), classes, device=x.device)
        elif label.shape != x.shape[:1] or label.is_floating_point():
            raise ValueError(
                f"label must hold one whole number per image, shape ({x.shape[0]},); "
                f"got {label.dtype} of shape {tuple(label.shape)}."
            )
        elif label.device.type == "cpu" and len(label) and not 0 <= int(label.min()) <= int(label.max()) <= classes:
            wrong = [int(c) for c in label if not 0 <= c <= classes]
            raise ValueError(f"labels must lie in 0..{classes} ({classes} for no label); got {wrong[0]}.")
        return self.label(label)

    def _checked_text(self, text: Tensor | None, x: Tensor) -> Tensor:
        channels = self.config["text_channels"]
        found = None if text is None else tuple(text.shape)
        if text is None or text.ndim != 3 or len(text) != len(x) or text.shape[2] != channels or text.shape[1] == 0:
            raise ValueError(f"this network needs a text, of shape ({len(x)}, words, {channels}); got {found}.")
        return text

    def _checked_image(self, image: Tensor | None, x: Tensor) -> Tensor:
        needed = (x.shape[0], self.config["image_channels"], *x.shape[2:])
        found = None if image is None else tuple(image.shape)
        if found != needed:
            raise ValueError(f"this network needs an image beside x, of shape {needed}; got {found}.")
        return image

    def _check_size(self, height: int, width: int) -> None:
        factor = self.config["patch_size"] * 2**self.halvings
        if height % factor or width % factor:
            raise ValueError(
                f"a U-Net of {self.halvings + 1} levels halves the image {self.halvings} times, so its sides must be "
                f"multiples of {factor}; got {height} x {width}. Pad the images or use fewer channel_multipliers."
            )


def coordinates(x: Tensor) -> Tensor:
    """x, which grows to the right, and y, which grows downwards, of each place of a map (B, C, H, W): (1, 2, H, W).

    The map reaches from -1 to 1 both ways; a place has the coordinates of its middle.
    """
    height, width = ((torch.arange(n, dtype=x.dtype, device=x.device) * 2 + 1) / n - 1 for n in x.shape[2:])
    return torch.stack([width.expand(len(height), -1), height[:, None].expand(-1, len(width))])[None]


class TimeEmbedding(nn.Module):
    """Sines, then cosines, of the step at frequencies from 1 down to 1/10,000; then two linear layers."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        half = channels // 2
        exponent = torch.arange(half) / max(half - 1, 1)
        self.register_buffer("frequency", torch.exp(-math.log(10_000) * exponent), persistent=False)
        self.linear_1 = linear(channels, out)
        self.linear_2 = linear(out, out)

    def forward(self, steps: Tensor) -> Tensor:
        angle = steps[:, None] * self.frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))

    def _apply(self, *arguments, **options) -> TimeEmbedding:
        """As every module; but ``half()`` leaves the frequencies exact, for angles would be off by radians."""
        exact = self.frequency
        super()._apply(*arguments, **options)
        if self.frequency.element_size() < 4:
            self.frequency = exact.to(self.frequency.device)
        return self


class Stage(nn.Module):
    """A residual block; if it ``attends``, self-attention behind it, and attention to the text if there is one."""

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        dropout: float,
        groups: int,
        attends: bool,
        text_channels: int | None = None,
        adaptive_norm: bool = False,
        heads: int | None = None,
    ):
        super().__init__()
        self.residual = ResidualBlock(width_in, width, embedding, dropout, groups, adaptive_norm)
        self.attention = Attention(width, groups, heads) if attends else nn.Identity()
        self.reading = CrossAttention(width, text_channels, groups, heads) if attends and text_channels else None

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.attention(self.residual(x, embedding))
        return x if self.reading is None else self.reading(x, text)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the embedding between; plus the input.

    The embedding is added before the second norm, or, if the norm is adaptive, scales and shifts what comes out of it.
    """

    def __init__(
        self, width_in: int, width: int, embedding: int, dropout: float, groups: int, adaptive_norm: bool = False
    ):
        super().__init__()
        self.adaptive_norm = adaptive_norm
        self.norm_1 = nn.GroupNorm(groups, width_in, eps=EPS)
        self.conv_1 = conv3x3(width_in, width)
        self.embedding = linear(embedding, 2 * width if adaptive_norm else width)
        self.norm_2 = nn.GroupNorm(groups, width, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv3x3(width, width, near_zero=True)
        self.shortcut = conv1x1(width_in, width) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        told = self.embedding(F.silu(embedding))[:, :, None, None]
        if self.adaptive_norm:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + told)
        h = self.conv_2(self.dropout(F.silu(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention among the pixels of a feature map; plus the input. For ``heads`` see ``UNet``."""

    def __init__(self, width: int, groups: int, heads: int | None = None):
        super().__init__()
        self.heads = Heads(width, heads, default=1)
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.query, self.key, self.value = (conv1x1(width, width) for _ in range(3))
        self.out = conv1x1(width, width, near_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.query, self.key, self.value))
        return x + self.out(self.heads(q, k, v).transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention of the pixels of a feature map to the words of a text; plus the input. For ``heads`` see ``UNet``.

    Source: Rombach et al. (2022), section 3.3.
    """

    def __init__(self, width: int, text_channels: int, groups: int, heads: int | None = None):
        super().__init__()
        self.heads = Heads(width, heads, default=4)
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.query = conv1x1(width, width)
        self.key, self.value = linear(text_channels, width), linear(text_channels, width)
        self.out = conv1x1(width, width, near_zero=True)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        seen = self.heads(self._pixels(x), self.key(text), self.value(text))
        return x + self.out(seen.transpose(1, 2).reshape(x.shape))

    def weights(self, x: Tensor, text: Tensor) -> Tensor:
        """How much each pixel looks at each word, (B, H, W, words), the mean over heads; they sum to 1 over words."""
        weights = self.heads.weights(self._pixels(x), self.key(text))
        return weights.mean(1).unflatten(1, x.shape[2:])

    def _pixels(self, x: Tensor) -> Tensor:
        return self.query(self.norm(x)).flatten(2).transpose(1, 2)


class Heads(nn.Module):
    """Attention in heads, each with its share of the channels.

    Args:
        width: of all heads together.
        heads: how many, with queries and keys normalised to length sqrt(width / heads) and then scaled channel by
            channel; None for ``default`` many that are not.
        default: how many there are if ``heads`` is None.
    """

    def __init__(self, width: int, heads: int | None, default: int):
        super().__init__()
        self.number = default if heads is None else heads
        if width % self.number:
            raise ValueError(f"{width} channels cannot be shared by {self.number} heads of attention.")
        each = width // self.number
        self.norm_query, self.norm_key = (None if heads is None else nn.RMSNorm(each, eps=EPS) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, width) for queries (B, N, width), keys and values (B, M, width)."""
        seen = attend(self._split(q, self.norm_query), self._split(k, self.norm_key), self._split(v))
        return seen.unflatten(0, (-1, self.number)).transpose(1, 2).flatten(2)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """How much each query looks at each key, (B, heads, N, M)."""
        q, k = self._split(q, self.norm_query), self._split(k, self.norm_key)
        weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
        return weights.unflatten(0, (-1, self.number))

    def _split(self, values: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """(B, N, width) as (B heads, N, width / heads), normalised if there is a norm."""
        values = values.unflatten(2, (self.number, -1)).transpose(1, 2).flatten(0, 1)
        return values if norm is None else norm(values.to(norm.weight.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q of shape (B, N, d), k and v of shape (B, M, d).

    PyTorch's fused kernel on an accelerator; written out on a CPU, where the fused kernel's backward pass is slower.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    scale = q.shape[-1] ** -0.25
    return torch.softmax((q * scale) @ (k * scale).transpose(1, 2), dim=-1) @ v


class Downsample(nn.Module):
    """Halves both sides by a strided convolution, padded at the right and the bottom as in the paper's code."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = initialised(nn.Conv2d(width_in, width, 3, stride=2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides by repeating pixels, then convolves."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = conv3x3(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class LeanUpsample(nn.Module):
    """Changes the width by a convolution of 1 x 1, then doubles both sides by repeating pixels."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = conv1x1(width_in, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")


def initialised(layer: nn.Module, near_zero: bool = False) -> nn.Module:
    """Weights uniform with variance 2 / (fan_in + fan_out), or 1e-10 of it; biases zero."""
    layer.near_zero = near_zero
    nn.init.xavier_uniform_(layer.weight, gain=1e-5 if near_zero else 1.0)
    nn.init.zeros_(layer.bias)
    return layer


def linear(width_in: int, width: int) -> nn.Linear:
    return initialised(nn.Linear(width_in, width))


def conv1x1(width_in: int, width: int, near_zero: bool = False) -> nn.Conv2d:
    return initialised(nn.Conv2d(width_in, width, 1), near_zero)


def conv3x3(width_in: int, width: int, near_zero: bool = False) -> nn.Conv2d:
    return initialised(nn.Conv2d(width_in, width, 3, padding=1), near_zero)
