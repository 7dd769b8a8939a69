"""Pictures: the book's style, grids of images, and sliders that move without a kernel."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

# Okabe and Ito (2008): eight colours that colour-blind eyes tell apart; yellow and black are left out of the cycle.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
}


def use_style() -> None:
    """Set matplotlib to the style of the book: white card, readable on a phone, Okabe-Ito colours."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.0, 3.4),
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.size": 12.5,
            "legend.fontsize": 11,
            "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "lines.linewidth": 2,
            "legend.frameon": False,
            "image.cmap": "gray",
        }
    )


def tile(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """One picture of many: images (N, C, H, W) in [-1, 1], clipped there, to floats (rows, columns[, 3]) in [0, 1].

    C is 1 or 3. Images stand in rows of ``columns``, with ``gap`` white pixels between them.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, C, H, W) with C 1 or 3; got {tuple(images.shape)}.")
    if columns < 1:
        raise ValueError(f"columns must be 1 or more; got {columns}.")
    pixels = ((images.detach().cpu().float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    n, height, width, channels = pixels.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels))
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet[..., 0] if channels == 1 else sheet


def show_images(images: Tensor, columns: int = 10, title: str | None = None, ax: plt.Axes | None = None) -> plt.Axes:
    """Draw images (N, C, H, W) in [-1, 1] as one grid, on ``ax`` or a new figure of fitting height."""
    sheet = tile(images, columns)
    if ax is None:
        _, ax = plt.subplots(figsize=(6, max(6 * sheet.shape[0] / sheet.shape[1], 0.6) + (0.3 if title else 0)))
    ax.imshow(sheet, vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return ax


def png(picture: Figure | np.ndarray, width: int = 360) -> bytes:
    """A figure as PNG, or an array (H, W) or (H, W, 3) of floats in [0, 1], enlarged to about ``width``."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(picture)
    else:
        factor = max(1, round(width / picture.shape[1]))
        large = picture.repeat(factor, 0).repeat(factor, 1)
        imsave(buffer, large, format="png", cmap="gray", vmin=0, vmax=1, metadata={"Software": None})
    return buffer.getvalue()


class Slider(ipywidgets.VBox):
    """A slider over pictures drawn beforehand, with a Play button; see ``slider``."""

    def __repr__(self) -> str:
        return f"Slider with {self.frames} frames"


def slider(
    frames: Sequence[Figure | np.ndarray], labels: Sequence[str], description: str, alt: str, start: int = 0
) -> Slider:
    """A slider through frames that also moves on a static page, where no Python runs.

    Args:
        frames: figures, or arrays as for ``png``.
        labels: one caption per frame, such as 't = 100'.
        description: name of what the slider changes, such as 'step t'.
        alt: what the pictures show, for readers who cannot see them; the frame's caption is added to it.
        start: index of the frame shown first.
    """
    if len(frames) < 2 or len(frames) != len(labels):
        raise ValueError(f"a slider needs two or more frames, each with a label; got {len(frames)} and {len(labels)}.")
    if not 0 <= start < len(frames):
        raise ValueError(f"start must be the index of a frame, 0..{len(frames) - 1}; got {start}.")
    pictures = [
        ipywidgets.HTML(
            f'<img class="slider-frame" alt="{html.escape(alt)} ({html.escape(label)})" '
            f'src="data:image/png;base64,{base64.b64encode(png(frame)).decode()}">'
            f'<div class="slider-label">{html.escape(label)}</div>'
        )
        for frame, label in zip(frames, labels)
    ]
    last = len(frames) - 1
    stack = ipywidgets.Stack(pictures, selected_index=start)
    handle = ipywidgets.IntSlider(start, 0, last, description=description, readout=False)
    play = ipywidgets.Play(value=start, min=0, max=last, interval=150)
    widget = Slider([ipywidgets.HBox([play, handle]), stack])
    widget.frames = len(frames)
    widget.links = [
        ipywidgets.jslink((handle, "value"), (stack, "selected_index")),
        ipywidgets.jslink((play, "value"), (handle, "value")),
    ]
    return widget
