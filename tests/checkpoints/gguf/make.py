"""Makes forms.gguf with the `gguf` package of Python (0.19.0) and numpy: each block form, beside what it means.

    pip install gguf==0.19.0 && python make.py

A tensor `X` in a block form has its values, as that package reads them, in the f32 tensor `X.values`.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFWriter
from gguf.quants import dequantize, quantize

ROWS = 2
rng = np.random.default_rng(1)
writer = GGUFWriter(Path(__file__).parent / "forms.gguf", "none")
writer.add_custom_alignment(64)
writer.add_bool("kinds.bool", True)
writer.add_float64("kinds.f64", 0.5)
writer.add_int16("kinds.i16", -7)
writer.add_array("kinds.strings", ["one", "two", ""])
writer.add_array("kinds.numbers", [1, 2, 3])


def put(name, kind, data):
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor(f"{name}.values", dequantize(data, kind).astype(np.float32))


def halves(count, scale):
    return (rng.standard_normal((count, 1)) * scale).astype("<f2").view(np.uint8)


# Quantised by the package: one row of usual weights, one whose scales are subnormal halves.
weights = (rng.standard_normal((ROWS, 96)) * [[0.02], [1e-4]]).astype(np.float32)
put("q8_0", Type.Q8_0, quantize(weights, Type.Q8_0))
put("q4_0", Type.Q4_0, quantize(weights, Type.Q4_0))

# The package only reads the others, so their blocks are random: bytes for scales and levels, halves of either sign.
random = lambda count, size: rng.integers(0, 256, (count, size), dtype=np.uint8)
blocks = 2 * ROWS
put("q4_k", Type.Q4_K, np.concatenate([halves(blocks, 1e-4), halves(blocks, 1e-4), random(blocks, 140)], 1).reshape(ROWS, -1))
put("q5_k", Type.Q5_K, np.concatenate([halves(blocks, 1e-4), halves(blocks, 1e-4), random(blocks, 172)], 1).reshape(ROWS, -1))
put("q6_k", Type.Q6_K, np.concatenate([random(blocks, 208), halves(blocks, 1e-4)], 1).reshape(ROWS, -1))

# Five sides, and the plain types.
cube = rng.standard_normal((3, 2, 1, 2, 2)).astype(np.float32)
writer.add_tensor("cube", cube)
writer.add_tensor("cube.f16", cube.astype(np.float16))
put("cube.bf16", Type.BF16, quantize(cube, Type.BF16))
writer.add_tensor("counts", np.arange(5, dtype=np.int32))

writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
