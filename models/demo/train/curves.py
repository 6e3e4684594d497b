"""Draws the curves that the trainings logged: python curves.py RUN curves.png"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {
    "vae-images": ("VAE, pictures: PSNR (dB) of held-out faces", ["whole_psnr", "mouth_psnr"]),
    "vae-clips": ("VAE, clips: PSNR (dB) of held-out faces", ["whole_psnr", "mouth_psnr"]),
    "vae-decoder": ("VAE, decoder alone: PSNR (dB)", ["whole_psnr", "mouth_psnr"]),
    "audio": ("Whisper: correlation with the mouth", ["correlation"]),
    "text": ("Text: share of prompts understood", ["right_llava", "right_clip"]),
    "transformer": ("Transformer: held-out loss by speech heard", ["right", "silent", "wrong"]),
}


def main():
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    parts = [name for name in PARTS if (run / f"{name}.csv").exists()]
    figure, axes = plt.subplots(2, (len(parts) + 1) // 2, figsize=(4.2 * ((len(parts) + 1) // 2), 6), layout="constrained")
    for axis, name in zip(axes.flat, parts, strict=False):
        title, columns = PARTS[name]
        with (run / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        for column in columns:
            axis.plot([int(row["step"]) for row in rows], [float(row[column]) for row in rows], label=column)
        if name == "transformer":
            axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(parts) :]:
        axis.set_axis_off()
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
