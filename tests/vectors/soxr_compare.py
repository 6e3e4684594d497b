"""Measures our resampler to 16 kHz beside soxr HQ, which the reference uses. Prints docs/benchmarks/resampling.md's table.

    cargo build --release -p e2e --bin bench
    pip install soxr==1.1.0 numpy==2.4.6
    python tests/vectors/soxr_compare.py target/release/bench

Sines of amplitude 0.5 stand one after another, with silence between them. In the middle of each, `a sin + b cos` is
fitted: the level is the ripple, the angle the delay, and what is left over is noise, images and aliases together.
"""

import subprocess
import sys

import numpy
import soxr

RATES = [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000]
TO = 16000
AMPLITUDE = 0.5
# Seconds of one sine with the silence after it, and the part of it that is looked at.
SLOT, TONE, LOOK_FROM, LOOK_TO = 0.32, 0.26, 0.08, 0.18


def ours(bench, signal, rate):
    run = subprocess.run([bench, "resample", "--from", str(rate)], input=signal.tobytes(), capture_output=True, check=True)
    return numpy.frombuffer(run.stdout, dtype="<f4")


def theirs(_, signal, rate):
    return soxr.resample(signal, rate, TO, quality="HQ")


def sines(tones, rate):
    """The tones one after another, each beginning on a whole sample of both rates."""
    slot = round(SLOT * rate)
    time = numpy.arange(slot) / rate
    parts = [AMPLITUDE * numpy.sin(2 * numpy.pi * hz * time) * (time < TONE) for hz in tones]
    return numpy.concatenate(parts).astype("<f4")


def looked_at(output, n):
    first = round((n * SLOT + LOOK_FROM) * TO)
    last = round((n * SLOT + LOOK_TO) * TO)
    return output[first:last].astype(float), numpy.arange(first, last) / TO - n * SLOT


def decibels(ratio):
    return 20 * numpy.log10(max(ratio, 1e-12))


def measure(resample, bench, rate):
    nyquist = min(rate, TO) / 2
    top = min(7000.0, 0.9 * nyquist)
    tones = numpy.linspace(50, top, 60)
    output = resample(bench, sines(tones, rate), rate)
    levels, delays, rests = [], [], []
    for n, hz in enumerate(tones):
        values, time = looked_at(output, n)
        basis = numpy.stack([numpy.sin(2 * numpy.pi * hz * time), numpy.cos(2 * numpy.pi * hz * time)], 1)
        (a, b), *_ = numpy.linalg.lstsq(basis, values, rcond=None)
        levels.append(decibels(numpy.hypot(a, b) / AMPLITUDE))
        delays.append(-numpy.arctan2(b, a) / (2 * numpy.pi * hz) * TO)
        rests.append(decibels(numpy.sqrt(2 * numpy.mean((values - basis @ [a, b]) ** 2)) / AMPLITUDE))
    edge = decibels_at(resample, bench, rate, 0.95 * nyquist)
    alias = None
    if rate > TO:
        tones = numpy.linspace(TO / 2, rate / 2 * 0.999, 60)
        output = resample(bench, sines(tones, rate), rate)
        alias = max(
            decibels(numpy.sqrt(2 * numpy.mean(looked_at(output, n)[0] ** 2)) / AMPLITUDE) for n in range(len(tones))
        )
    return max(abs(level) for level in levels), edge, max(rests), alias, max(delays, key=abs)


def decibels_at(resample, bench, rate, hz):
    values, _ = looked_at(resample(bench, sines([hz], rate), rate), 0)
    return decibels(numpy.sqrt(2 * numpy.mean(values**2)) / AMPLITUDE)


def main():
    bench = sys.argv[1] if len(sys.argv) > 1 else "target/release/bench"
    print(f"soxr {soxr.__version__} (libsoxr {soxr.__libsoxr_version__}), NumPy {numpy.__version__}\n")
    print("| from, Hz | resampler | ripple, dB | at 0.95 of Nyquist, dB | rest, dB | worst alias, dB | delay, samples |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rate in RATES:
        for name, resample in (("ours", ours), ("soxr HQ", theirs)):
            ripple, edge, rest, alias, delay = measure(resample, bench, rate)
            alias = "-" if alias is None else f"{alias:.0f}"
            print(f"| {rate} | {name} | {ripple:.5f} | {edge:.1f} | {rest:.0f} | {alias} | {delay:+.5f} |")


if __name__ == "__main__":
    main()
