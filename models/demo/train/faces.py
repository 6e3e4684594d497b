"""Draws what `quality` measured: each clip's portrait, and frames of its video.

    python faces.py HELD_OUT VIDEOS faces.jpg
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from stills import frames

SIDE = 160
"""Pixels of a frame in the picture."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path, help="folder of held_out.py")
    parser.add_argument("videos", type=Path, help="folder of quality's --videos")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--clips", nargs="+", default=["02", "05", "09", "14", "19"])
    parser.add_argument("--every", type=int, default=9, help="shows every so many frames")
    parser.add_argument("--count", type=int, default=7, help="frames of a clip")
    a = parser.parse_args()
    rows = []
    for name in a.clips:
        shown = frames(a.videos / f"{name}-own.mp4")[:: a.every][: a.count]
        row = [cv2.imread(str(a.held_out / f"{name}.png"))[..., ::-1], *shown]
        rows.append(np.concatenate([cv2.resize(view, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for view in row], 1))
    cv2.imwrite(str(a.picture), np.concatenate(rows)[..., ::-1])


if __name__ == "__main__":
    main()
