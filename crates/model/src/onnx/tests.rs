//! Operators against answers worked out by hand, and graphs that ask for too much.

use std::collections::HashMap;

use super::{Array, Network, Value};

fn number(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value > 127 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn int(tag: u64, value: i64) -> Vec<u8> {
    [number(tag << 3), number(value as u64)].concat()
}

fn bytes(tag: u64, data: &[u8]) -> Vec<u8> {
    [number(tag << 3 | 2), number(data.len() as u64), data.to_vec()].concat()
}

/// An operator; attributes as they lie in the file.
fn node(kind: &str, inputs: &[&str], output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut data: Vec<u8> = inputs.iter().flat_map(|name| bytes(1, name.as_bytes())).collect();
    data.extend(bytes(2, output.as_bytes()));
    data.extend(bytes(4, kind.as_bytes()));
    data.extend(attributes.iter().flat_map(|a| bytes(5, a)));
    bytes(1, &data)
}

fn ints(name: &str, values: &[i64]) -> Vec<u8> {
    let values: Vec<u8> = values.iter().flat_map(|v| int(8, *v)).collect();
    [bytes(1, name.as_bytes()), values, int(20, 7)].concat()
}

fn one(name: &str, value: i64) -> Vec<u8> {
    [bytes(1, name.as_bytes()), int(3, value), int(20, 2)].concat()
}

fn word(name: &str, value: &str) -> Vec<u8> {
    [bytes(1, name.as_bytes()), bytes(4, value.as_bytes()), int(20, 3)].concat()
}

fn constant(name: &str, shape: &[i64], values: &[f32]) -> Vec<u8> {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape: Vec<u8> = shape.iter().flat_map(|side| int(1, *side)).collect();
    bytes(5, &[shape, int(2, 1), bytes(8, name.as_bytes()), bytes(9, &data)].concat())
}

fn places(name: &str, values: &[i64]) -> Vec<u8> {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    bytes(5, &[int(1, values.len() as i64), int(2, 7), bytes(8, name.as_bytes()), bytes(9, &data)].concat())
}

/// A network from `x` to `y`.
fn network(parts: &[Vec<u8>], opset: i64) -> Result<Network, String> {
    let graph = [parts.concat(), bytes(11, &bytes(1, b"x")), bytes(12, &bytes(1, b"y"))].concat();
    Network::read(&[bytes(7, &graph), bytes(8, &int(2, opset))].concat())
}

fn run(parts: &[Vec<u8>], opset: i64, shape: &[usize], values: &[f32]) -> Result<(Vec<usize>, Vec<f32>), String> {
    let input = Array { shape: shape.to_vec(), values: values.to_vec() };
    match network(parts, opset)?.run(input)?.remove(0).1 {
        Value::Floats(array) => Ok((array.shape, array.values)),
        Value::Ints(array) => Ok((array.shape, array.values.iter().map(|v| *v as f32).collect())),
    }
}

fn counted(count: usize) -> Vec<f32> {
    (0..count).map(|i| i as f32).collect()
}

#[test]
fn a_convolution_pads_strides_and_adds_its_bias_in_groups() {
    let attributes = [ints("pads", &[1, 0, 0, 1]), ints("strides", &[2, 1]), one("group", 2)];
    let parts = [
        node("Conv", &["x", "w", "b"], "y", &attributes),
        constant("w", &[2, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0, 1.0, 0.0, 0.0, 0.0]),
        constant("b", &[2], &[0.5, 100.0]),
    ];
    let (shape, values) = run(&parts, 13, &[1, 2, 3, 2], &counted(12)).unwrap();
    assert_eq!(shape, [1, 2, 2, 2]);
    // Row of zeros above, column of zeros to the right: the first is 3·0 + 4·1 + 0.5.
    assert_eq!(values, [4.5, 3.5, 2.0 + 6.0 + 12.0 + 20.0 + 0.5, 3.0 + 15.0 + 0.5, 100.0, 100.0, 108.0, 109.0]);
}

#[test]
fn pools_see_what_lies_in_the_picture() {
    let attributes = [ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2]), ints("pads", &[1, 1, 0, 0])];
    let of = |kind: &str| run(&[node(kind, &["x"], "y", &attributes)], 13, &[1, 1, 3, 3], &counted(9)).unwrap();
    assert_eq!(of("MaxPool"), (vec![1, 1, 2, 2], vec![0.0, 2.0, 6.0, 8.0]));
    assert_eq!(of("AveragePool").1, [0.0, 1.5, 4.5, 6.0]);
}

#[test]
fn a_resize_takes_the_nearest_pixel_or_between_two() {
    let resized = |mode: &str, rule: &str| {
        let attributes =
            [word("mode", mode), word("coordinate_transformation_mode", rule), word("nearest_mode", "floor")];
        let parts =
            [node("Resize", &["x", "", "scales"], "y", &attributes), constant("scales", &[4], &[1.0, 1.0, 1.0, 2.0])];
        run(&parts, 13, &[1, 1, 1, 2], &[1.0, 3.0]).unwrap().1
    };
    assert_eq!(resized("nearest", "asymmetric"), [1.0, 1.0, 3.0, 3.0]);
    assert_eq!(resized("linear", "half_pixel"), [1.0, 1.5, 2.5, 3.0]);
}

#[test]
fn a_softmax_goes_along_one_side_and_in_old_files_along_all_from_it_on() {
    let softmax = [node("Softmax", &["x"], "y", &[one("axis", 1)])];
    let equal = |opset| run(&softmax, opset, &[1, 2, 2], &[0.0; 4]).unwrap().1;
    assert_eq!((equal(13), equal(11)), (vec![0.5; 4], vec![0.25; 4]));
}

#[test]
fn slices_go_backwards_and_shapes_are_computed() {
    let parts = [
        node("Slice", &["x", "from", "to", "axes", "by"], "y", &[]),
        places("from", &[-1]),
        places("to", &[i64::MIN]),
        places("axes", &[1]),
        places("by", &[-2]),
    ];
    assert_eq!(run(&parts, 13, &[1, 5], &counted(5)).unwrap(), (vec![1, 3], vec![4.0, 2.0, 0.0]));
    let parts = [
        node("Shape", &["x"], "shape", &[]),
        node("Gather", &["shape", "last"], "side", &[]),
        node("Concat", &["open", "side"], "wanted", &[one("axis", 0)]),
        node("Reshape", &["x", "wanted"], "rows", &[]),
        node("Transpose", &["rows"], "y", &[ints("perm", &[1, 0])]),
        places("last", &[-1]),
        places("open", &[-1]),
    ];
    let (shape, values) = run(&parts, 13, &[1, 2, 3], &counted(6)).unwrap();
    assert_eq!((shape, values), (vec![3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0]));
}

#[test]
fn pads_and_products_and_repeated_sides_go_where_they_should() {
    let parts = [node("Pad", &["x", "pads"], "y", &[]), places("pads", &[0, 1, 1, 0])];
    assert_eq!(run(&parts, 13, &[2, 1], &[5.0, 6.0]).unwrap(), (vec![3, 2], vec![0.0, 5.0, 0.0, 6.0, 0.0, 0.0]));
    let parts = [
        node("Gemm", &["x", "w", "b"], "sum", &[one("transB", 1)]),
        node("Add", &["sum", "column"], "y", &[]),
        constant("w", &[1, 2], &[1.0, 10.0]),
        constant("b", &[1], &[100.0]),
        constant("column", &[2, 1], &[0.0, 1000.0]),
    ];
    assert_eq!(run(&parts, 13, &[2, 2], &counted(4)).unwrap(), (vec![2, 1], vec![110.0, 1132.0]));
}

#[test]
fn graphs_that_grow_without_end_are_refused_before_they_do() {
    let refused = |parts: &[Vec<u8>]| run(parts, 13, &[1, 3, 32, 32], &vec![0.0; 3072]).unwrap_err();
    let huge = places("huge", &[1 << 40, 1 << 40]);
    assert!(refused(&[node("ConstantOfShape", &["huge"], "y", &[]), huge.clone()]).contains("limit"));
    assert!(
        refused(&[node("Expand", &["x", "huge"], "y", &[]), places("huge", &[1 << 20, 1, 1, 1])]).contains("limit")
    );
    assert!(refused(&[node("Pad", &["x", "p"], "y", &[]), places("p", &[i64::MAX; 8])]).contains("too large"));
    let conv = |pads: i64| {
        [node("Conv", &["x", "w"], "y", &[ints("pads", &[pads; 4])]), constant("w", &[1, 3, 1, 1], &[0.0; 3])]
    };
    assert!(refused(&conv(1 << 20)).contains("limit"));
    assert!(refused(&conv(i64::MAX)).contains("pads"));
    assert!(refused(&conv(-1)).contains("pads"));
    let strided = [ints("kernel_shape", &[1 << 24, 1 << 24]), ints("pads", &[1 << 24; 4])];
    assert!(refused(&[node("MaxPool", &["x"], "y", &strided)]).contains("limit"));
    // Each doubles what the one before gave.
    let doubled = |i: usize| {
        let (from, to) = (if i == 0 { "x".to_owned() } else { format!("v{i}") }, format!("v{}", i + 1));
        node("Concat", &[&from, &from], if i == 39 { "y" } else { &to }, &[one("axis", 0)])
    };
    assert!(refused(&(0..40).map(doubled).collect::<Vec<_>>()).contains("limit"));
    // A small tensor of many sides.
    let sides = [node("Reshape", &["x", "s"], "y", &[]), places("s", &[[-1].as_slice(), &[1; 100]].concat())];
    assert!(refused(&sides).contains("sides"));
}

#[test]
fn loops_other_operators_and_values_elsewhere_are_refused_by_name() {
    let refused = |parts: &[Vec<u8>]| network(parts, 13).unwrap_err();
    let looped = [node("Relu", &["b"], "a", &[]), node("Relu", &["a"], "b", &[]), node("Add", &["x", "b"], "y", &[])];
    assert!(refused(&looped).contains("\"b\""), "{}", refused(&looped));
    assert!(refused(&[node("Relu", &["y"], "y", &[])]).contains("loop"));
    assert!(refused(&[node("Loop", &["x"], "y", &[])]).contains("Loop"));
    assert!(refused(&[node("Relu", &["x"], "x", &[])]).contains("made twice"));
    let short = refused(&[node("Add", &["x", "w"], "y", &[]), constant("w", &[1 << 20], &[1.0])]);
    assert!(short.contains("1 values for the shape [1048576]"), "{short}");
    assert!(refused(&[constant("w", &[1 << 62, 1 << 62], &[1.0])]).contains("the limit"));
    let elsewhere = bytes(5, &[int(1, 1), int(2, 1), bytes(8, b"w"), bytes(13, b"\x0a\x08location")].concat());
    assert!(refused(&[elsewhere]).contains("another file"));
}

/// f32 against f32: only the order of additions differs, and the answers are written with six digits.
#[test]
fn networks_that_pytorch_exported_give_what_pytorch_computes() {
    let vector = |name: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors");
        std::fs::read(folder.join(name)).unwrap()
    };
    let expected: HashMap<String, (Vec<usize>, Vec<f32>)> = serde_json::from_slice(&vector("torch_onnx.json")).unwrap();
    let values: Vec<f32> = (0..3 * 32 * 48).map(|i| (0.05 * f64::from(i)).sin() as f32).collect();
    for opset in [11, 17] {
        let network = Network::read(&vector(&format!("torch_opset{opset}.onnx"))).unwrap();
        let outputs = network.run(Array { shape: vec![1, 3, 32, 48], values: values.clone() }).unwrap();
        assert_eq!(outputs.len(), 2);
        for (name, value) in outputs {
            let Value::Floats(made) = value else { panic!("{name}") };
            let (shape, values) = &expected[&name];
            assert_eq!(&made.shape, shape, "{name}");
            for (i, (ours, theirs)) in made.values.iter().zip(values).enumerate() {
                assert!((ours - theirs).abs() < 1e-5, "opset {opset}, {name}[{i}]: {ours}, PyTorch {theirs}");
            }
        }
    }
}
