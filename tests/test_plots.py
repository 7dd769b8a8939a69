"""Pictures: pixels are where they should be, sliders are linked, and bytes do not change from run to run."""

import base64
import io
import re

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ddpm_lib import plots


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def decoded(picture: bytes) -> np.ndarray:
    return plt.imread(io.BytesIO(picture), format="png")


def test_tile_puts_images_in_rows_with_white_gaps():
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0)])
    sheet = plots.tile(images, columns=2)
    assert sheet.shape == (5, 7)
    assert (sheet[:2, :3] == 0).all()
    assert (sheet[:2, 4:] == 0.5).all()
    assert (sheet[3:, :3] == 1).all()
    assert (sheet[2] == 1).all()
    assert (sheet[3:, 4:] == 1).all()


def test_tile_clips_and_keeps_colour():
    image = torch.tensor([[[[-3.0]], [[0.0]], [[5.0]]]])
    assert plots.tile(image, columns=4)[0, 0].tolist() == [0, 0.5, 1]


def test_show_images_draws_the_sheet_on_one_scale():
    ax = plots.show_images(torch.zeros(3, 1, 2, 2), columns=3, title="zeros")
    (drawn,) = ax.get_images()
    assert drawn.get_clim() == (0, 1)
    assert np.array_equal(drawn.get_array(), plots.tile(torch.zeros(3, 1, 2, 2), 3))
    assert ax.get_title() == "zeros"
    _, mine = plt.subplots()
    assert plots.show_images(torch.zeros(1, 3, 2, 2), ax=mine) is mine


def test_png_of_an_array_enlarges_whole_pixels():
    picture = decoded(plots.png(np.array([[0.0, 1.0], [0.5, 0.2]]), width=20))
    assert picture.shape[:2] == (20, 20)
    corners = picture[[0, 0, 19, 19], [0, 19, 0, 19], 0]
    np.testing.assert_allclose(corners, [0, 1, 0.5, 0.2], atol=0.003)


def test_png_is_the_same_bytes_each_time():
    def draw():
        figure, ax = plt.subplots()
        ax.plot([0, 1], [1, 0])
        return plots.png(figure)

    assert draw() == draw()
    assert plt.get_fignums() == []


def frames(n: int = 3) -> list[np.ndarray]:
    return [np.full((2, 2), i / n) for i in range(n)]


def test_the_slider_moves_the_stack_and_play_moves_the_slider():
    widget = plots.slider(frames(), ["t = 1", "t = 2", "t = 3"], "step t", "a grey square", start=1)
    (box, stack) = widget.children
    play, handle = box.children
    assert isinstance(play, ipywidgets.Play)
    assert (handle.value, handle.min, handle.max, handle.description) == (1, 0, 2, "step t")
    assert (play.min, play.max, stack.selected_index) == (0, 2, 1)
    linked = [(link.source, link.target) for link in widget.links]
    assert linked == [((handle, "value"), (stack, "selected_index")), ((play, "value"), (handle, "value"))]


def test_each_frame_has_its_picture_alternative_text_and_label():
    widget = plots.slider(frames(2), ["x < 1", "x & y"], "x", 'a "square"')
    for child, frame, label in zip(widget.children[1].children, frames(2), ("x &lt; 1", "x &amp; y")):
        assert f'alt="a &quot;square&quot; ({label})"' in child.value
        assert f">{label}</div>" in child.value
        data = re.search(r"base64,([^\"]+)\"", child.value)[1]
        assert base64.b64decode(data) == plots.png(frame)


def test_a_slider_prints_as_one_plain_line():
    assert repr(plots.slider(frames(), "abc", "x", "squares")) == "Slider with 3 frames"


def test_the_style_is_white_and_its_colours_differ():
    with plt.rc_context():
        plots.use_style()
        assert plt.rcParams["figure.facecolor"] == "white"
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == list(plots.COLOURS.values())
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
