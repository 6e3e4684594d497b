"""Writes pillow.safetensors beside this file: pictures, and what Pillow and OpenCV make of them.

    pip install pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6 safetensors==0.8.0
    python tests/vectors/make_pillow.py

A picture is `<name>`, (height, width, 3) u8. A result is `<name>/<filter>/<width>x<height>`, of the same layout. The
file's metadata names the versions. The same versions write the same bytes.
"""

from pathlib import Path

import cv2
import numpy
import PIL
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

RANDOM = numpy.random.default_rng(20)


def noise(width, height):
    return RANDOM.integers(0, 256, (height, width, 3), dtype=numpy.uint8)


def black_and_white(width, height):
    """Nothing between 0 and 255: where a filter with negative lobes overshoots most."""
    return RANDOM.integers(0, 2, (height, width, 3), dtype=numpy.uint8) * numpy.uint8(255)


def gradient(width, height):
    x, y = numpy.meshgrid(numpy.linspace(0, 1, width), numpy.linspace(0, 1, height))
    return numpy.round(numpy.stack([x, y, (x * y) ** 0.5], 2) * 255).astype(numpy.uint8)


def text(width, height):
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for line in range(0, height, 12):
        draw.text((line % 5, line), "The quick fox", fill=(line % 256, 0, 60))
    draw.line((0, 0, width, height), fill=(200, 30, 0))
    return numpy.asarray(picture)


# A picture, and the sizes (width, height) that it is brought to.
CASES = {
    "noise": (noise(31, 41), [(21, 11), (67, 41), (31, 17), (1, 1), (48, 48), (9, 82)]),
    "black_and_white": (black_and_white(33, 29), [(47, 41), (16, 9), (33, 58), (11, 29), (5, 60)]),
    "gradient": (gradient(64, 40), [(63, 41), (21, 63), (96, 12), (5, 3)]),
    "text": (text(75, 50), [(53, 35), (25, 75), (2, 50)]),
    "wide": (noise(72, 24), [(24, 72), (36, 12), (71, 23), (48, 1)]),
    "tall": (noise(7, 211), [(21, 70), (7, 13), (9, 211), (1, 1)]),
    "row": (noise(59, 1), [(29, 1), (118, 5), (1, 9)]),
    "column": (noise(1, 43), [(1, 20), (9, 86), (3, 1)]),
    "pixel": (noise(1, 1), [(5, 3), (1, 1)]),
    "two": (black_and_white(2, 2), [(3, 3), (17, 19), (1, 2)]),
}
# The file is to stay small: OpenCV is asked for these alone.
OPENCV = {"noise", "black_and_white", "row", "column", "pixel", "two"}

PILLOW = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}


def main():
    tensors = {}
    for name, (picture, sizes) in CASES.items():
        tensors[name] = picture
        for size in sizes:
            for kind, filter_ in PILLOW.items():
                resized = Image.fromarray(picture).resize(size, filter_)
                tensors[f"{name}/{kind}/{size[0]}x{size[1]}"] = numpy.asarray(resized)
            if name in OPENCV:
                resized = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
                tensors[f"{name}/cv2_linear/{size[0]}x{size[1]}"] = resized
    file = Path(__file__).with_name("pillow.safetensors")
    tensors = {name: numpy.ascontiguousarray(values) for name, values in tensors.items()}
    versions = f"Pillow {PIL.__version__}, OpenCV {cv2.__version__}, NumPy {numpy.__version__}"
    save_file(tensors, file, {"versions": versions})
    print(f"{file.name}: {len(tensors)} tensors, {file.stat().st_size} bytes; {versions}")


if __name__ == "__main__":
    main()
