"""Write the emoji that the package ships: ``python -m scripts.emoji_data FONT LIST``.

FONT is ``NotoColorEmoji.ttf`` and LIST ``emoji-test.txt``, on Debian from the packages ``fonts-noto-color-emoji`` and
``unicode-data``. Taken are faces, hands, and persons who are alone, with at most one skin tone.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).parent.parent / "ddpm_lib" / "datasets" / "emoji.npz"
SIDE = 32
BITMAP = 109  # the only size of the font, whose pictures are 136 pixels wide
PAGE = 136
CROWDS = {"family", "person-symbol"}
ENTRY = re.compile(r"[0-9A-F ]+; fully-qualified +# (\S+) E[\d.]+ (.+)")


def chosen(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Characters and names of the emoji that are taken, in the order of the list."""
    group = subgroup = ""
    for line in lines:
        if line.startswith("# group:"):
            group = line.split(":")[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":")[1].strip()
        elif entry := ENTRY.match(line):
            characters, name = entry.groups()
            alone = group == "People & Body" and subgroup not in CROWDS and name.count("skin tone") < 2
            if alone or (group == "Smileys & Emotion" and subgroup.startswith("face")):
                yield characters, name.strip()


def picture(characters: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """An emoji on white, (SIDE, SIDE, 3) uint8."""
    page = Image.new("RGB", (PAGE, PAGE), "white")
    middle = (PAGE / 2, PAGE / 2)
    ImageDraw.Draw(page).text(middle, characters, font=font, embedded_color=True, anchor="mm")
    return np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX))


def main(font: str, names: str) -> None:
    drawn = ImageFont.truetype(font, BITMAP, layout_engine=ImageFont.Layout.RAQM)
    with Path(names).open(encoding="utf-8") as lines:
        made = [(name, picture(characters, drawn)) for characters, name in chosen(lines)]
    told, images = zip(*made)
    np.savez_compressed(TARGET, images=np.stack(images), names=np.array(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
