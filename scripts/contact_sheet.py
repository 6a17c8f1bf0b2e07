"""What does the phantom look like? Draws docs/phantom.png: every part, six patients each, beside the true masks.

python scripts/contact_sheet.py                               # some seconds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bayescam.data.phantom.clinic import OTHER_PARTS, PARTS
from bayescam.data.phantom.roster import Dials
from bayescam.data.phantom.simulate import Simulated, simulate
from bayescam.storage import atomic_path

COLOURS = {  # painted in this order
    "soft_tissue": (40, 46, 62),
    "collimation": (0, 0, 0),
    "bone": (170, 176, 190),
    "joint": (80, 150, 210),
    "evidence": (240, 170, 40),
    "cast": (120, 80, 140),
    "hardware": (220, 60, 60),
    "marker": (70, 200, 110),
}


def painted(drawn: Simulated) -> np.ndarray:
    """The masks as one picture (H, W, 3)."""
    canvas = np.zeros((*drawn.image.shape, 3), np.uint8)
    for name, colour in COLOURS.items():
        mask = drawn.masks[name]
        canvas[mask] = np.asarray(colour) if name != "cast" else canvas[mask] // 2 + np.asarray(colour) // 2
    return canvas


def sheet(parts: tuple[str, ...], patients: int, size: int, seed: int, difficulty: float) -> Image.Image:
    """One row a part, for each patient the radiograph and its masks."""
    pad, label = 2, 18
    out = np.full((len(parts) * (size + label), patients * (2 * size + 3 * pad), 3), 255, np.uint8)
    for row, part in enumerate(parts):
        seen: set[int] = set()
        dials = Dials(size=size, parts=(part,), difficulty=difficulty)
        for drawn in simulate(20 * patients, seed + row, dials):
            if drawn.case.patient in seen or len(seen) == patients:
                continue
            top, left = row * (size + label) + label, len(seen) * (2 * size + 3 * pad)
            grey = np.repeat(np.rint(255 * drawn.image).astype(np.uint8)[:, :, None], 3, axis=2)
            for offset, picture in ((0, grey), (size + pad, painted(drawn))):
                height, width = picture.shape[:2]
                start = left + offset + (size - width) // 2
                out[top : top + size, left + offset : left + offset + size] = 0
                out[top : top + height, start : start + width] = picture
            seen.add(drawn.case.patient)
            if len(seen) == patients:
                break
    image = Image.fromarray(out)
    pen = ImageDraw.Draw(image)
    for row, part in enumerate(parts):
        pen.text((4, row * (size + label) + 3), part, fill=(0, 0, 0))
    return image


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/phantom.png"))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=201)
    parser.add_argument("--difficulty", type=float, default=0.5)
    parser.add_argument("--others", action="store_true", help="knee and foot too")
    asked = parser.parse_args()
    parts = PARTS + (OTHER_PARTS if asked.others else ())
    image = sheet(parts, asked.patients, asked.size, asked.seed, asked.difficulty)
    with atomic_path(asked.out) as temporary:
        image.quantize(128, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
