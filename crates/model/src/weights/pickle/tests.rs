//! Archives that PyTorch wrote (`tests/checkpoints/make.py`), whole and damaged.

mod build;
mod hostile;

use std::{collections::BTreeMap, path::PathBuf};

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::weights::{fp8::e4m3_to_f32, stored::Encoding};

const WHOLE: [&str; 6] = ["module.pt", "protocol5.pt", "fp8.pt", "fp8_map.pt", "fp8_map_tensors.pt", "state_dict.pt"];

fn fixture(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints");
    std::fs::read(folder.join(name)).unwrap()
}

fn read_as(name: &str, file: &[u8]) -> Result<Archive> {
    read(Path::new(name), file)
}

/// Reads what must be refused, and gives the message.
fn refusal(name: &str, file: &[u8]) -> String {
    read_as(name, file).unwrap_err().to_string()
}

fn to_f32(bytes: &[u8], encoding: Encoding) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter();
    match encoding {
        Encoding::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Encoding::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Encoding::Bf16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Encoding::F8E4M3 => bytes.iter().map(|b| e4m3_to_f32(*b)).collect(),
        Encoding::I8 => bytes.iter().map(|b| f32::from(b.cast_signed())).collect(),
        Encoding::Other("i64") => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
        other => panic!("no fixture has {other:?}"),
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u32>)>;

/// Shapes and bits of the f32 values that the recipe says are in the file.
fn expected(name: &str) -> Tensors {
    let values = fixture("values.safetensors");
    let mut tensors = BTreeMap::new();
    for (key, view) in SafeTensors::deserialize(&values).unwrap().tensors() {
        if let Some(key) = key.strip_prefix(&format!("{name}/")) {
            let bits = view.data().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            tensors.insert(key.to_owned(), (view.shape().to_vec(), bits));
        }
    }
    tensors
}

fn found(name: &str) -> Tensors {
    let file = fixture(name);
    let archive = read_as(name, &file).unwrap();
    archive
        .tensors
        .into_iter()
        .map(|t| {
            let bits = to_f32(&file[t.bytes], t.encoding).into_iter().map(f32::to_bits).collect();
            (t.name, (t.shape, bits))
        })
        .collect()
}

#[test]
fn every_tensor_that_pytorch_saved_has_its_values_to_the_bit() {
    for name in WHOLE {
        assert_eq!(found(name), expected(name), "{name}");
    }
    let count = |name| expected(name).len();
    assert_eq!((count("module.pt"), count("protocol5.pt"), count("fp8.pt"), count("state_dict.pt")), (12, 12, 4, 4));
}

#[test]
fn tensors_keep_their_order_and_the_type_they_are_stored_in() {
    let archive = read_as("module.pt", &fixture("module.pt")).unwrap();
    let types: Vec<(&str, &str)> = archive.tensors.iter().map(|t| (t.name.as_str(), t.encoding.name())).collect();
    let expected = [
        ("single.weight", "f32"),
        ("half.weight", "f16"),
        ("brain.weight", "bf16"),
        ("parameter.bias", "f32"),
        ("transposed.weight", "f32"),
        ("rows.weight", "f32"),
        ("table.weight", "f32"),
        ("column.weight", "f32"),
        ("scalar", "f32"),
        ("empty", "f32"),
        ("position_ids", "i64"),
        ("int8.weight", "int8"),
    ];
    assert_eq!(types, expected);
    assert!(archive.numbers.is_empty(), "those beside the state dict are not part of it: {:?}", archive.numbers);

    let archive = read_as("fp8.pt", &fixture("fp8.pt")).unwrap();
    let types: Vec<Encoding> = archive.tensors.iter().map(|t| t.encoding).collect();
    assert_eq!(types, [Encoding::F8E4M3, Encoding::Bf16, Encoding::F8E4M3, Encoding::Bf16]);
}

#[test]
fn tensors_that_share_a_storage_share_their_bytes() {
    let archive = read_as("module.pt", &fixture("module.pt")).unwrap();
    let bytes = |name| archive.tensors.iter().find(|t| t.name == name).unwrap().bytes.clone();
    let (table, rows) = (bytes("table.weight"), bytes("rows.weight"));
    assert_eq!(rows, table.start + 2 * 4 * 4..table.start + 5 * 4 * 4);
}

#[test]
fn scales_are_numbers_or_tensors_of_one_element() {
    let archive = read_as("fp8_map.pt", &fixture("fp8_map.pt")).unwrap();
    let scales = [("double_blocks.0.img_mod.linear", 0.0125), ("single_blocks.0.linear1", 0.03125)];
    assert_eq!(archive.numbers, scales.map(|(name, scale)| (name.to_owned(), scale)).into());
    assert!(archive.tensors.is_empty());

    let archive = read_as("fp8_map_tensors.pt", &fixture("fp8_map_tensors.pt")).unwrap();
    let shapes: Vec<&[usize]> = archive.tensors.iter().map(|t| t.shape.as_slice()).collect();
    assert_eq!(shapes, [&[1][..], &[]]);
    assert!(archive.numbers.is_empty());
}

#[test]
fn a_pickle_that_would_run_a_command_is_refused_by_the_commands_name() {
    let message = refusal("hostile.pt", &fixture("hostile_os_system.pt"));
    assert!(
        message.starts_with("weights: hostile.pt: ")
            && message.ends_with("refuses global `posix.system`: a checkpoint may hold tensors only"),
        "{message}"
    );
}

#[test]
fn a_legacy_pickle_is_refused_with_what_to_do() {
    let file = fixture("legacy.pt");
    assert!(!is_zip(&file) && is_zip(&fixture("module.pt")));
    assert_eq!(
        refusal("legacy.pt", &file),
        "weights: legacy.pt: a legacy pickle; save it again with torch.save of a current PyTorch, or as safetensors"
    );
    assert_eq!(refusal("a.pt", b"GGUF"), "weights: a.pt: it is not a zip archive, as torch.save writes them");
    assert_eq!(refusal("a.pt", b""), "weights: a.pt: it is not a zip archive, as torch.save writes them");
}

#[test]
fn a_transposed_view_is_refused_by_its_name() {
    assert_eq!(
        refusal("strided.pt", &fixture("strided.pt")),
        "weights: tensor \"strided\" in strided.pt: shape [5, 3] has strides [1, 5], expected row-major ones; \
         save it again after .contiguous()"
    );
}

#[test]
fn a_file_truncated_at_any_byte_is_refused() {
    for name in WHOLE {
        let file = fixture(name);
        for length in 0..file.len() {
            assert!(read_as(name, &file[..length]).is_err(), "{name} truncated to {length} bytes");
        }
    }
}

/// Reads a damaged file: refused or not, what it gives lies within the file and is as long as its shape says.
fn read_damaged(name: &str, file: &[u8]) {
    for tensor in read_as(name, file).map(|archive| archive.tensors).unwrap_or_default() {
        assert!(tensor.bytes.start <= tensor.bytes.end && tensor.bytes.end <= file.len(), "{tensor:?}");
        if !matches!(tensor.encoding, Encoding::Other(_)) {
            let expected = tensor.encoding.bytes(tensor.shape.iter().product());
            assert_eq!(Some(tensor.bytes.len()), expected, "{tensor:?}");
        }
    }
}

#[test]
fn flipped_bits_anywhere_are_survived() {
    for name in ["module.pt", "protocol5.pt", "fp8.pt", "state_dict.pt"] {
        let mut file = fixture(name);
        for at in 0..file.len() {
            for bits in [0x01, 0x20, 0x80, 0xff] {
                file[at] ^= bits;
                read_damaged(name, &file);
                file[at] ^= bits;
            }
        }
    }
}

const BUILDING: &[u8] = b"(012NK\x01)\x85\x86\x87t]l}daesuq\x00h\x00\x94QRb.";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn bytes_overwritten_anywhere_are_survived(
        which in 0..WHOLE.len(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut file = fixture(WHOLE[which]);
        for (at, byte) in damage {
            let at = at.index(file.len());
            file[at] = byte;
        }
        read_damaged(WHOLE[which], &file);
    }

    #[test]
    fn any_program_is_survived(program in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = machine::run(&program);
    }

    /// Opcodes that build values, in any order and number: most of them get further than random bytes do.
    #[test]
    fn any_program_of_known_opcodes_is_survived(
        program in prop::collection::vec(prop::sample::select(BUILDING), 0..400),
    ) {
        let mut archive = build::Zip::default();
        archive.add("a/data.pkl", &program);
        read_damaged("program", &archive.finish());
    }
}
