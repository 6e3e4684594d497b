"""Draws the demo portrait: a 512 x 512 picture of nobody.

Everything is shapes and soft shading at four times the size, reduced by area, without randomness:
the same Pillow draws the same bytes.

    python make_portrait.py [portrait.png]
"""

import math
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 512
SCALE = 4

SKIN = (232, 184, 152)
SKIN_SHADE = (176, 112, 84)
SKIN_LIGHT = (255, 226, 202)
BLUSH = (222, 120, 100)
HAIR = (62, 40, 32)
HAIR_LIGHT = (122, 82, 58)
LINE = (70, 42, 36)
JACKET = (44, 84, 104)
JACKET_SHADE = (26, 54, 70)
SHIRT = (240, 236, 226)
IRIS = (84, 112, 92)
LIPS = (192, 92, 88)

Point = tuple[float, float]


def up(points: list[Point]) -> list[Point]:
    """Brings points from picture pixels to drawing pixels."""
    return [(x * SCALE, y * SCALE) for x, y in points]


def smooth(points: list[Point], steps: int = 24) -> list[Point]:
    """Runs a closed Catmull-Rom curve through the points."""
    curve = []
    count = len(points)
    for i in range(count):
        a, b, c, d = (points[(i + k - 1) % count] for k in range(4))
        for s in range(steps):
            t = s / steps
            curve.append(
                tuple(
                    0.5
                    * (
                        2 * b[k]
                        + (c[k] - a[k]) * t
                        + (2 * a[k] - 5 * b[k] + 4 * c[k] - d[k]) * t**2
                        + (3 * b[k] - a[k] - 3 * c[k] + d[k]) * t**3
                    )
                    for k in range(2)
                )
            )
    return curve


def mirrored(half: list[Point], axis: float = 256) -> list[Point]:
    """Closes a right half, given from top to bottom, with its mirror image."""
    return half + [(2 * axis - x, y) for x, y in reversed(half) if x != axis]


def ellipse(cx: float, cy: float, rx: float, ry: float) -> list[Point]:
    """Points of an ellipse."""
    turns = [2 * math.pi * i / 96 for i in range(96)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in turns]


class Canvas:
    """A picture that is painted in masks: a shape, its blur, and what it must stay inside of."""

    def __init__(self) -> None:
        self.side = SIDE * SCALE
        self.image = Image.new("RGB", (self.side, self.side))

    def mask(self, points: list[Point], blur: float = 0) -> Image.Image:
        """Coverage of a shape, 0 to 255; `blur` is in picture pixels."""
        mask = Image.new("L", (self.side, self.side))
        ImageDraw.Draw(mask).polygon(up(points), fill=255)
        return mask.filter(ImageFilter.GaussianBlur(blur * SCALE)) if blur else mask

    def paint(
        self,
        points: list[Point],
        colour: tuple[int, int, int],
        blur: float = 0,
        strength: float = 1,
        inside: Image.Image | None = None,
    ) -> None:
        """Lays a colour over the picture where the shape is."""
        mask = self.mask(points, blur)
        if strength < 1:
            mask = mask.point(lambda value: round(value * strength))
        if inside is not None:
            mask = ImageChops.multiply(mask, inside)
        self.image.paste(colour, (0, 0), mask)


def line(start: Point, middle: Point, end: Point) -> list[Point]:
    """Close points of the curve from start to end that leans towards the middle."""
    count = 200
    curve = []
    for i in range(count + 1):
        t = i / count
        curve.append(
            tuple((1 - t) ** 2 * start[k] + 2 * t * (1 - t) * middle[k] + t**2 * end[k] for k in range(2))
        )
    return curve


def brush(canvas: Canvas, curve: list[Point], colour: tuple[int, int, int], width: float) -> None:
    """Draws an open line, given by close points, that thins out to both ends."""
    draw = ImageDraw.Draw(canvas.image)
    for i, (x, y) in enumerate(curve):
        r = width / 2 * (0.3 + 0.7 * math.sin(math.pi * i / (len(curve) - 1))) * SCALE
        draw.ellipse([x * SCALE - r, y * SCALE - r, x * SCALE + r, y * SCALE + r], fill=colour)


def background(canvas: Canvas) -> None:
    """A wall, lighter behind the head."""
    whole = [(0, 0), (SIDE, 0), (SIDE, SIDE), (0, SIDE)]
    canvas.paint(whole, (150, 172, 178))
    canvas.paint(ellipse(220, 190, 210, 230), (206, 218, 214), blur=90)


def body(canvas: Canvas) -> None:
    """Neck, shirt and jacket."""
    jacket = smooth(
        mirrored([(256, 392), (318, 402), (396, 430), (446, 470), (470, 560), (360, 600), (256, 600)])
    )
    inside = canvas.mask(jacket)
    canvas.paint(jacket, JACKET)
    canvas.paint(ellipse(420, 560, 90, 130), JACKET_SHADE, blur=26, inside=inside)
    canvas.paint(ellipse(150, 470, 70, 60), (70, 116, 136), blur=26, strength=0.7, inside=inside)

    canvas.paint([(206, 394), (306, 394), (292, 450), (256, 512), (220, 450)], SHIRT)
    neck = smooth(mirrored([(256, 330), (304, 334), (300, 384), (312, 408), (284, 432), (256, 444)]))
    within = canvas.mask(neck)
    canvas.paint(neck, SKIN)
    canvas.paint(ellipse(262, 366, 62, 34), SKIN_SHADE, blur=12, strength=0.75, inside=within)
    for side in (-1, 1):
        collar = [(256 + side * x, y) for x, y in [(54, 396), (64, 424), (30, 486), (2, 452), (30, 434)]]
        canvas.paint(collar, (252, 250, 244))
        lapel = [(256 + side * x, y) for x, y in [(60, 404), (92, 420), (70, 470), (2, 540), (26, 482)]]
        canvas.paint(lapel, JACKET_SHADE)


def head(canvas: Canvas) -> None:
    """Hair behind, ears, face with its light and shade, hair in front."""
    canvas.paint(
        smooth(mirrored([(256, 66), (330, 84), (376, 150), (378, 228), (364, 290), (320, 310), (256, 300)])), HAIR
    )
    for side in (-1, 1):
        ear = ellipse(256 + side * 108, 246, 15, 27)
        canvas.paint(ear, SKIN)
        canvas.paint(ellipse(256 + side * 108, 248, 7, 15), SKIN_SHADE, blur=3, strength=0.6)

    face = smooth(
        mirrored([(256, 108), (318, 122), (356, 176), (362, 238), (348, 300), (312, 350), (256, 374)])
    )
    inside = canvas.mask(face)
    canvas.paint(face, SKIN)
    canvas.paint(ellipse(226, 176, 90, 60), SKIN_LIGHT, blur=28, strength=0.7, inside=inside)
    canvas.paint(ellipse(372, 270, 44, 120), SKIN_SHADE, blur=24, strength=0.55, inside=inside)
    canvas.paint(ellipse(146, 280, 26, 100), SKIN_SHADE, blur=20, strength=0.4, inside=inside)
    canvas.paint(ellipse(256, 384, 80, 20), SKIN_SHADE, blur=14, strength=0.5, inside=inside)
    canvas.paint(ellipse(256, 352, 26, 12), SKIN_LIGHT, blur=9, strength=0.6, inside=inside)
    for x in (192, 320):
        canvas.paint(ellipse(x, 282, 24, 17), BLUSH, blur=13, strength=0.4, inside=inside)
        canvas.paint(ellipse(x + (256 - x) * 0.08, 226, 34, 20), SKIN_SHADE, blur=10, strength=0.5, inside=inside)

    fringe = smooth(
        [
            (146, 244), (134, 190), (150, 124), (196, 80), (256, 64), (318, 80), (364, 126), (378, 190),
            (366, 244), (352, 204), (334, 166), (296, 142), (250, 130), (212, 146), (176, 172), (158, 206),
        ]
    )  # fmt: skip
    shadow = [(x, y + 8) for x, y in fringe]
    canvas.paint(shadow, SKIN_SHADE, blur=7, strength=0.6, inside=inside)
    canvas.paint(fringe, HAIR)
    hair = canvas.mask(fringe)
    canvas.paint(ellipse(216, 108, 52, 18), HAIR_LIGHT, blur=12, strength=0.8, inside=hair)
    for start, middle, end in [
        ((250, 70), (196, 84), (160, 190)), ((256, 72), (210, 96), (182, 164)), ((258, 72), (320, 88), (358, 190)),
        ((262, 74), (306, 100), (336, 160)), ((254, 70), (170, 84), (144, 200)),
    ]:  # fmt: skip
        brush(canvas, line(start, middle, end), (84, 56, 44), 2.2)


def eyes(canvas: Canvas) -> None:
    """Brows, lids, whites, irises and their light."""
    for side in (-1, 1):
        cx, cy = 256 + side * 46, 230
        white = smooth([(cx - 27, cy + 2), (cx - 12, cy - 12), (cx + 12, cy - 12), (cx + 27, cy + 2),
                        (cx + 12, cy + 11), (cx - 12, cy + 11)])  # fmt: skip
        inside = canvas.mask(white)
        canvas.paint(white, (248, 246, 242))
        canvas.paint(ellipse(cx, cy, 14, 14), (44, 60, 50), inside=inside)
        canvas.paint(ellipse(cx, cy, 12.5, 12.5), IRIS, inside=inside)
        canvas.paint(ellipse(cx, cy + 5, 8, 6), (140, 166, 130), blur=3, strength=0.8, inside=inside)
        canvas.paint(ellipse(cx, cy, 6.2, 6.2), (18, 14, 14), inside=inside)
        canvas.paint(ellipse(cx, cy - 14, 30, 7), (120, 96, 92), blur=4, strength=0.6, inside=inside)
        canvas.paint(ellipse(cx - 4, cy - 5, 3, 3), (255, 255, 255))
        brush(canvas, line((cx - 29, cy + 3), (cx, cy - 25), (cx + 29, cy + 3)), LINE, 5)
        brush(canvas, line((cx - 22, cy + 8), (cx, cy + 17), (cx + 22, cy + 8)), (156, 100, 82), 2)
        brush(canvas, line((cx - 26, cy - 10), (cx, cy - 29), (cx + 26, cy - 10)), (158, 102, 78), 2)
        inner, outer = cx - side * 28, cx + side * 34
        brush(canvas, line((inner, cy - 30), (cx, cy - 48), (outer, cy - 28)), HAIR, 10)


def nose_and_mouth(canvas: Canvas) -> None:
    """A nose of light and shade, and closed lips."""
    canvas.paint(ellipse(253, 256, 8, 36), SKIN_LIGHT, blur=6, strength=0.8)
    canvas.paint(ellipse(270, 262, 6, 34), SKIN_SHADE, blur=6, strength=0.35)
    canvas.paint(ellipse(256, 294, 22, 9), SKIN_SHADE, blur=5, strength=0.55)
    canvas.paint(ellipse(254, 283, 11, 9), SKIN_LIGHT, blur=5, strength=0.7)
    for side in (-1, 1):
        canvas.paint(ellipse(256 + side * 11, 295, 5, 2.6), (110, 58, 48), blur=1.2)
        brush(canvas, line((256 + side * 19, 280), (256 + side * 26, 290), (256 + side * 17, 297)), (170, 108, 84), 2.4)

    canvas.paint(ellipse(256, 344, 24, 5), SKIN_SHADE, blur=5, strength=0.5)
    upper = [(256, 317), (267, 314), (282, 317), (296, 317), (280, 326), (256, 329)]
    canvas.paint(smooth(mirrored(upper)), (178, 84, 80))
    lower = [(256, 327), (280, 324), (295, 318), (280, 336), (256, 341)]
    canvas.paint(smooth(mirrored(lower)), LIPS)
    canvas.paint(ellipse(252, 334, 14, 2.6), (238, 168, 158), blur=3, strength=0.8)
    brush(canvas, line((211, 315), (256, 341), (301, 315)), (112, 46, 46), 2.6)
    for side in (-1, 1):
        canvas.paint(ellipse(256 + side * 46, 314, 4, 5), SKIN_SHADE, blur=2.5, strength=0.5)


def main() -> None:
    """Draws and writes the picture."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("portrait.png")
    canvas = Canvas()
    background(canvas)
    body(canvas)
    head(canvas)
    eyes(canvas)
    nose_and_mouth(canvas)
    canvas.image.resize((SIDE, SIDE), Image.Resampling.BOX).save(out, optimize=True)


if __name__ == "__main__":
    main()
