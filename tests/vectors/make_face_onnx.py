"""Makes face_*.onnx: tiny networks in the form of four families of face detectors, byte by byte, without any package.

The first three find red squares: a cell of 16 pixels is a face where it is red and neither green nor blue, so that the
order of the channels and their scale show. What size the face has is written in the file:

- face_ultraface.onnx, (1, 3, 48, 64): the box of cell (row, column) is the cell itself; of (0, 0) 32 pixels a side
- face_yunet.onnx, (1, 3, 64, 64): 24 wide and 16 high around the middle of the cell; strides 8 and 32 find nothing
- face_scrfd.onnx, any size: from 4 left and 6 above the cell's corner to 20 right and 22 below it; strides 8 and 32
  find nothing, and of the two candidates of a cell the first scores less

The YOLO-face ones give three candidates (1, 3, 16): centre x and y, width, height, objectness, five points, class score.
The first two are as wide as 40 network pixels and 60 times the mean of red, and as high as 40 and 60 times the mean of
green; the third has an objectness of 0.3.

    python3 tests/vectors/make_face_onnx.py tests/vectors
"""

import math
import struct
import sys
from pathlib import Path

FLOAT, INT64 = 1, 7
CANDIDATES = [
    [100, 200, 40, 40, 0.9, *[7] * 10, 0.9],
    [300, 120, 20, 20, 0.8, *[7] * 10, 0.9],
    [300, 320, 400, 400, 0.3, *[7] * 10, 0.9],
]


def number(value: int) -> bytes:
    """A whole number in groups of seven bits."""
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(tag: int, value: int | str | bytes) -> bytes:
    """One field of a message."""
    if isinstance(value, int):
        return number(tag << 3) + number(value)
    data = value.encode() if isinstance(value, str) else value
    return number(tag << 3 | 2) + number(len(data)) + data


def tensor(name: str, kind: int, shape: list[int], values: list) -> bytes:
    """A constant."""
    data = struct.pack(f"<{len(values)}{'f' if kind == FLOAT else 'q'}", *values)
    return field(5, b"".join(field(1, side) for side in shape) + field(2, kind) + field(8, name) + field(9, data))


def value(tag: int, name: str, shape: list[int | str]) -> bytes:
    """An input (tag 11) or output (12); a side that is not known has a name."""
    sides = b"".join(field(1, field(1 if isinstance(side, int) else 2, side)) for side in shape)
    return field(tag, field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, sides))))


def node(kind: str, inputs: list[str], output: str, **attributes: int | list[int]) -> bytes:
    """One operator."""
    data = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for name, given in attributes.items():
        if isinstance(given, int):
            data += field(5, field(1, name) + field(3, given) + field(20, 2))
        else:
            data += field(5, field(1, name) + b"".join(field(8, one) for one in given) + field(20, 7))
    return field(1, data)


def network(nodes: bytes, inputs: bytes, outputs: bytes, opset: int = 13) -> bytes:
    """The whole file."""
    return field(1, 8) + field(2, "make_face_onnx.py") + field(7, nodes + inputs + outputs) + field(8, field(2, opset))


def ultraface() -> bytes:
    """Its picture is -0.99..1: of red the weighed sum is 1 + 2 * 0.99, of anything else at most 1."""
    boxes = [[c / 4, r / 3, (c + 1) / 4, (r + 1) / 3] for r in range(3) for c in range(4)]
    boxes[0] = [0, 0, 2 / 4, 2 / 3]
    nodes = (
        node("Conv", ["picture", "weigh", "bias"], "mixed")
        + node("AveragePool", ["mixed"], "red", kernel_shape=[16, 16], strides=[16, 16])
        + tensor("weigh", FLOAT, [1, 3, 1, 1], [1.0, -1.0, -1.0])
        + tensor("bias", FLOAT, [1], [-2.0])
        + node("Mul", ["red", "ten"], "much")
        + node("Sigmoid", ["much"], "face_map")
        + node("Reshape", ["face_map", "rows"], "face")
        + node("Sub", ["one", "face"], "none")
        + node("Concat", ["none", "face"], "scores", axis=2)
        + node("Identity", ["places"], "boxes")
        + tensor("ten", FLOAT, [], [10.0])
        + tensor("one", FLOAT, [1], [1.0])
        + tensor("rows", INT64, [3], [1, -1, 1])
        + tensor("places", FLOAT, [1, 12, 4], [v for box in boxes for v in box])
    )
    outputs = value(12, "scores", [1, 12, 2]) + value(12, "boxes", [1, 12, 4])
    return network(nodes, value(11, "picture", [1, 3, 48, 64]), outputs)


def level(stride: int, places: int, scores: list[float], box: list[float], prefix: list[str], batch: list[int]) -> bytes:
    """Scores and boxes of one stride: `scores` times redness, and constant boxes, for each of `places` candidates."""
    score, more, name = prefix
    width = len(box) // places
    parts = (
        node("AveragePool", ["mixed"], f"mean_{stride}", kernel_shape=[stride, stride], strides=[stride, stride])
        + node("Clip", [f"mean_{stride}", "zero", "one"], f"red_{stride}")
        + tensor(f"shares_{stride}", FLOAT, [places, 1, 1, 1], scores)
        + node("Conv", [f"red_{stride}", f"shares_{stride}"], f"shared_{stride}")
        + node("Transpose", [f"shared_{stride}"], f"last_{stride}", perm=[0, 2, 3, 1])
        + tensor(f"column_{stride}", INT64, [len(batch) + 2], [*batch, -1, 1])
        + node("Reshape", [f"last_{stride}", f"column_{stride}"], score)
        + tensor(f"nothing_{stride}", FLOAT, [len(box), 1, 1, 1], [0.0] * len(box))
        + tensor(f"box_{stride}", FLOAT, [len(box)], box)
        + node("Conv", [f"red_{stride}", f"nothing_{stride}", f"box_{stride}"], f"boxes_{stride}")
        + node("Transpose", [f"boxes_{stride}"], f"boxes_last_{stride}", perm=[0, 2, 3, 1])
        + tensor(f"row_{stride}", INT64, [len(batch) + 2], [*batch, -1, width])
        + node("Reshape", [f"boxes_last_{stride}", f"row_{stride}"], name)
    )
    return parts + (node("Identity", [score], more) if more else b"")


MIXED = (
    node("Conv", ["picture", "weigh", "bias"], "mixed")
    + tensor("zero", FLOAT, [], [0.0])
    + tensor("one", FLOAT, [], [1.0])
)


def yunet() -> bytes:
    """Its picture is BGR of 0..255."""
    nodes = (
        MIXED
        + tensor("weigh", FLOAT, [1, 3, 1, 1], [-1 / 255, -1 / 255, 1 / 255])
        + tensor("bias", FLOAT, [1], [0.0])
    )
    for stride in (8, 16, 32):
        share = [1.0 if stride == 16 else 0.0]
        box = [0.5, 0.5, math.log(1.5), 0.0]
        nodes += level(stride, 1, share, box, [f"cls_{stride}", f"obj_{stride}", f"bbox_{stride}"], [1])
    outputs = b""
    for name, width in (("cls", 1), ("obj", 1), ("bbox", 4)):
        for stride in (8, 16, 32):
            outputs += value(12, f"{name}_{stride}", [1, (64 // stride) ** 2, width])
    return network(nodes, value(11, "picture", [1, 3, 64, 64]), outputs)


def scrfd() -> bytes:
    """Its picture is RGB of -1..1, of any size."""
    nodes = (
        MIXED
        + tensor("weigh", FLOAT, [1, 3, 1, 1], [0.5, -0.5, -0.5])
        + tensor("bias", FLOAT, [1], [-0.5])
    )
    names = {}
    for stride, first in ((8, 448), (16, 471), (32, 494)):
        shares = [0.8, 0.95] if stride == 16 else [0.0, 0.0]
        box = [4 / stride, 6 / stride, 20 / stride, 22 / stride]
        names[stride] = (str(first), str(first + 3))
        nodes += level(stride, 2, shares, box * 2, [str(first), "", str(first + 3)], [])
    outputs = b"".join(value(12, names[s][0], ["scores", 1]) for s in (8, 16, 32))
    outputs += b"".join(value(12, names[s][1], ["boxes", 4]) for s in (8, 16, 32))
    return network(nodes, value(11, "picture", [1, 3, "height", "width"]), outputs)


def yolo(sides: list[int | str], columns: int = 16, more: bytes = b"") -> bytes:
    """The reference's family."""
    identity = [float(i == j) for i in range(3) for j in range(3)]
    weights = [0.0] * (3 * columns)
    weights[2], weights[columns + 3] = 60.0, 60.0
    candidates = [entry for row in CANDIDATES for entry in (row + [0] * columns)[:columns]]
    nodes = (
        node("Conv", ["picture", "identity"], "same")
        + node("GlobalAveragePool", ["same"], "means")
        + node("Reshape", ["means", "row"], "channels")
        + node("MatMul", ["channels", "weights"], "sizes")
        + node("Add", ["sizes", "candidates"], "faces")
        + tensor("identity", FLOAT, [3, 3, 1, 1], identity)
        + tensor("row", INT64, [3], [1, 1, 3])
        + tensor("weights", FLOAT, [3, columns], weights)
        + tensor("candidates", FLOAT, [1, 3, columns], candidates)
    )
    return network(nodes, value(11, "picture", [1, 3, *sides]) + more, value(12, "faces", [1, 3, columns]))


def main() -> None:
    """Writes the files."""
    folder = Path(sys.argv[1])
    files = {
        "face_ultraface": ultraface(),
        "face_yunet": yunet(),
        "face_scrfd": scrfd(),
        "face_any_size": yolo(["height", "width"]),
        "face_fixed_size": yolo([416, 640]),
        "face_other_output": yolo(["height", "width"], columns=15),
        "face_two_inputs": yolo(["height", "width"], more=value(11, "grid", [1, 1, 2, 2])),
    }
    for name, data in files.items():
        (folder / f"{name}.onnx").write_bytes(data)


main()
