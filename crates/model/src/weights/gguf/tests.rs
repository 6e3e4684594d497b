use std::{fs, path::PathBuf};

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::{
    Error, Result,
    weights::{Found, ggml},
};

fn fixture() -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/checkpoints/gguf");
    fs::read(PathBuf::from(folder).join("forms.gguf")).unwrap()
}

fn read_bytes(file: &[u8]) -> Result<Vec<Found>> {
    read("some.gguf".as_ref(), file)
}

fn refused(file: &[u8], part: &str) {
    let message = read_bytes(file).expect_err(part).to_string();
    assert!(message.contains("some.gguf") && message.contains(part), "{message:?} lacks {part:?}");
}

fn singles(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn halves<T>(bytes: &[u8], value: impl Fn([u8; 2]) -> T) -> Vec<T> {
    bytes.as_chunks::<2>().0.iter().map(|b| value(*b)).collect()
}

/// A header in pieces: entries and tensors as they lie in the file, then `data` bytes.
fn file(entries: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut file = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((entries.len() as u64).to_le_bytes());
    entries.iter().chain(tensors).for_each(|part| file.extend(part));
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(key), kind.to_le_bytes().as_slice(), value].concat()
}

/// Sides as in the file: the one that varies fastest first.
fn tensor(name: &str, sides: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((sides.len() as u32).to_le_bytes());
    sides.iter().for_each(|side| bytes.extend(side.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

#[test]
fn the_python_packages_file_reads_as_it_says() {
    let file = fixture();
    assert!(is_gguf(&file));
    let found = read_bytes(&file).unwrap();
    let find = |name: &str| found.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("{name}"));
    let bytes = |name: &str| &file[find(name).bytes.clone()];
    assert_eq!(found.len(), 15);
    assert!(found.iter().all(|f| f.bytes.start.is_multiple_of(64)));

    for (name, encoding, shape) in [
        ("q8_0", Encoding::Q8_0, [2, 96]),
        ("q4_0", Encoding::Q4_0, [2, 96]),
        ("q4_k", Encoding::Q4K, [2, 512]),
        ("q5_k", Encoding::Q5K, [2, 512]),
        ("q6_k", Encoding::Q6K, [2, 512]),
    ] {
        assert_eq!((find(name).encoding, find(name).shape.as_slice()), (encoding, shape.as_slice()));
        let expected = singles(bytes(&format!("{name}.values")));
        let mut values = vec![f32::NAN; expected.len()];
        ggml::dequantise(encoding, bytes(name), &mut values);
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(value.to_bits(), expected.to_bits(), "{name} value {i}: {value}, expected {expected}");
        }
    }

    let cube = find("cube");
    assert_eq!((cube.encoding, cube.shape.as_slice()), (Encoding::F32, [3, 2, 1, 2, 2].as_slice()));
    let cube = singles(bytes("cube"));
    let rounded: Vec<f16> = cube.iter().map(|v| f16::from_f32(*v)).collect();
    assert_eq!(halves(bytes("cube.f16"), f16::from_le_bytes), rounded);
    let rounded: Vec<bf16> = cube.iter().map(|v| bf16::from_f32(*v)).collect();
    assert_eq!(halves(bytes("cube.bf16"), bf16::from_le_bytes), rounded);
    assert_eq!((find("counts").encoding, find("counts").bytes.len()), (Encoding::Other("i32"), 20));
}

#[test]
fn a_file_cut_anywhere_in_its_header_or_last_tensor_is_refused() {
    let file = fixture();
    let last = read_bytes(&file).unwrap().iter().map(|f| f.bytes.end).max().unwrap();
    assert!(read_bytes(&file[..last]).is_ok());
    for length in 0..last {
        assert!(read_bytes(&file[..length]).is_err(), "cut to {length} of {last} bytes");
    }
}

#[test]
fn a_flipped_byte_of_the_header_never_panics_and_never_leads_out_of_the_file() {
    let sound = fixture();
    let header = read_bytes(&sound).unwrap().iter().map(|f| f.bytes.start).min().unwrap();
    let mut file = sound.clone();
    for at in 0..header {
        for flip in [0x01, 0x80, 0xff] {
            file[at] = sound[at] ^ flip;
            for found in read_bytes(&file).unwrap_or_default() {
                assert!(found.bytes.end <= file.len(), "byte {at}: {found:?}");
            }
        }
        file[at] = sound[at];
    }
}

proptest! {
    #[test]
    fn any_bytes_after_the_magic_are_read_or_refused(rest in prop::collection::vec(any::<u8>(), 0..200), version in 2u32..4) {
        let file = [b"GGUF".as_slice(), &version.to_le_bytes(), &rest].concat();
        for found in read_bytes(&file).unwrap_or_default() {
            prop_assert!(found.bytes.end <= file.len());
        }
    }
}

#[test]
fn metadata_of_all_kinds_is_passed_over() {
    let numbers = [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (10, 8), (11, 8), (12, 8)];
    let mut entries: Vec<Vec<u8>> =
        numbers.iter().map(|(kind, size)| entry(&format!("n{kind}"), *kind, &vec![1; *size])).collect();
    entries.extend(numbers.iter().map(|(kind, size)| {
        let array = [&kind.to_le_bytes(), 3u64.to_le_bytes().as_slice(), &vec![1; 3 * size]].concat();
        entry(&format!("a{kind}"), 9, &array)
    }));
    entries.push(entry("s", 8, &string("text")));
    let words = [&8u32.to_le_bytes(), 2u64.to_le_bytes().as_slice(), &string("a"), &string("")].concat();
    let nested = [&9u32.to_le_bytes(), 2u64.to_le_bytes().as_slice(), &words, &words].concat();
    entries.push(entry("nested", 9, &nested));
    let file = file(&entries, &[tensor("t", &[4, 2], 0, 0)], 32);
    let found = read_bytes(&file).unwrap();
    assert_eq!((found[0].shape.as_slice(), found[0].bytes.clone()), ([2, 4].as_slice(), file.len() - 32..file.len()));
}

#[test]
fn an_alignment_is_a_power_of_two_up_to_64_kib() {
    let aligned =
        |value: u32| file(&[entry(ALIGNMENT_KEY, 4, &value.to_le_bytes())], &[tensor("t", &[8], 0, 0)], 1 << 17);
    for value in [1, 8, 64, 1 << 16] {
        let found = read_bytes(&aligned(value)).unwrap();
        assert!(found[0].bytes.start.is_multiple_of(value as usize), "{value}");
    }
    for value in [0, 48, 1 << 17, u32::MAX] {
        refused(&aligned(value), &format!("{value}, expected a power of two up to 65536"));
    }
    refused(&file(&[entry(ALIGNMENT_KEY, 10, &32u64.to_le_bytes())], &[], 0), "type 10, expected one entry of type 4");
    let entry = entry(ALIGNMENT_KEY, 4, &32u32.to_le_bytes());
    refused(&file(&[entry.clone(), entry], &[], 0), "expected one entry");
}

#[test]
fn what_is_wrong_with_a_header_is_named() {
    refused(b"GGML\0\0\0\0", "it is no GGUF file");
    refused(&[b"GGUF".as_slice(), &3u32.to_be_bytes()].concat(), "big endian");
    refused(&[b"GGUF".as_slice(), &1u32.to_le_bytes()].concat(), "version 1 of GGUF, expected 2 or 3");
    let counts = |tensors: u64, entries: u64| {
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
    };
    refused(&counts(1 << 60, 0), "1152921504606846976 tensors, the file has room for 0 at most");
    refused(&counts(0, 1 << 60), "1152921504606846976 entries, the file has room for 0 at most");
    let huge = (1u64 << 60).to_le_bytes();
    for kind in [0u32, 8, 9, 12] {
        let array = [&kind.to_le_bytes(), huge.as_slice()].concat();
        refused(&file(&[entry("k", 9, &array)], &[], 64), "\"k\": 1152921504606846976 values");
    }
    refused(&file(&[entry("k", 8, &huge)], &[], 64), "\"k\": 1152921504606846976 bytes");
    refused(&file(&[[huge.as_slice(), &[0; 32]].concat()], &[], 64), "key of entry 0: 1152921504606846976 bytes");
    refused(&file(&[], &[[huge.as_slice(), &[0; 32]].concat()], 64), "name of tensor 0: 1152921504606846976 bytes");
    refused(&file(&[entry("k", 13, &[0; 8])], &[], 0), "\"k\": type 13 of a value, expected 0 to 12");
    let deep = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat().repeat(5);
    refused(&file(&[entry("k", 9, &deep)], &[], 64), "past depth 4");
    refused(&file(&[entry("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])], &[], 0), "utf-8");
}

#[test]
fn what_is_wrong_with_a_tensor_is_named() {
    let one = |part: Vec<u8>| file(&[], &[part], 256);
    refused(&one(tensor("t", &[32], 9, 0)), "tensor \"t\" in some.gguf: type 9, whose size is unknown");
    refused(&one(tensor("t", &[32], 99, 0)), "type 99, whose size is unknown");
    refused(&one(tensor("t", &[48], 8, 0)), "rows of 48 values are no whole blocks of 32");
    refused(&one(tensor("t", &[], 8, 0)), "rows of 1 values");
    refused(&one(tensor("t", &[1; 9], 0, 0)), "9 sides, the limit is 8");
    refused(&one(tensor("t", &[1 << 60, 1 << 60], 0, 0)), "overflows");
    refused(&one(tensor("t", &[1 << 60], 0, 0)), "the file ends at 320");
    refused(&one(tensor("t", &[1 << 62], 0, 0)), "overflows");
    refused(&one(tensor("t", &[65], 0, 0)), "260 bytes from 64 + 0, the file ends at 320");
    refused(&one(tensor("t", &[1], 0, 4)), "offset 4, expected a multiple of 32");
    refused(&one(tensor("t", &[1], 0, u64::MAX - 31)), "the file ends at 320");
    refused(&one(tensor(&"n".repeat(1025), &[1], 0, 0)), "1025 bytes, the limit is 1024");
    let two =
        |a: (&str, u64), b: (&str, u64)| file(&[], &[tensor(a.0, &[16], 0, a.1), tensor(b.0, &[16], 0, b.1)], 256);
    refused(&two(("a", 0), ("a", 64)), "tensor \"a\" in some.gguf: the file has two of that name");
    refused(&two(("a", 32), ("b", 0)), "tensor \"a\" in some.gguf: its bytes overlap those of \"b\"");
    assert_eq!(read_bytes(&two(("a", 64), ("b", 0))).unwrap()[0].name, "a");
}

#[test]
fn a_file_written_in_pieces_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("written.gguf");
    let weights = ggml::tests::gaussian(512, 0.02, 3);
    let mut quantised = Vec::new();
    ggml::quantise(Encoding::Q4K, &weights, &mut quantised);
    let tensors = [
        ("empty".to_owned(), vec![0, 32], Encoding::Q8_0),
        ("scalar".to_owned(), vec![], Encoding::F32),
        ("block.weight".to_owned(), vec![2, 256], Encoding::Q4K),
        ("odd".to_owned(), vec![3, 1, 1, 1, 1], Encoding::Bf16),
    ];
    let mut writer = Writer::create(&path, &[("general.architecture", "avatar"), ("é", "")], &tensors).unwrap();
    writer.append(&1.5f32.to_le_bytes()).unwrap();
    for piece in quantised.chunks(100) {
        writer.append(piece).unwrap();
    }
    writer.append(&[1, 2, 3, 4]).unwrap();
    writer.append(&[]).unwrap();
    writer.append(&[5, 6]).unwrap();
    writer.finish().unwrap();

    let file = fs::read(&path).unwrap();
    assert!(file.len().is_multiple_of(32));
    let found = read(&path, &file).unwrap();
    let as_written: Vec<_> = found.iter().map(|f| (f.name.clone(), f.shape.clone(), f.encoding)).collect();
    assert_eq!(as_written, tensors);
    let bytes: Vec<&[u8]> = found.iter().map(|f| &file[f.bytes.clone()]).collect();
    assert_eq!(bytes, [&[], 1.5f32.to_le_bytes().as_slice(), &quantised, &[1, 2, 3, 4, 5, 6]]);
}

#[test]
fn a_writer_refuses_what_readers_would_and_bytes_that_are_too_many_or_too_few() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("refused.gguf");
    let create = |tensors: &[(&str, &[usize], Encoding)]| {
        let tensors: Vec<_> = tensors.iter().map(|(n, s, e)| ((*n).to_owned(), s.to_vec(), *e)).collect();
        Writer::create(&path, &[], &tensors)
    };
    for (tensors, part) in [
        (&[("a", &[1][..], Encoding::F32), ("a", &[1], Encoding::F32)][..], "two of that name"),
        (&[("a", &[2, 128], Encoding::Q4K)], "rows of 128 values are no whole blocks of 256"),
        (&[("a", &[1], Encoding::F8E4M3)], "GGUF has no type for fp8"),
        (&[("a", &[1; 9], Encoding::F32)], "9 sides, the limit is 8"),
        (&[("a", &[usize::MAX, 2], Encoding::F32)], "overflows"),
    ] {
        let message = create(tensors).expect_err(part).to_string();
        assert!(message.contains("tensor \"a\"") && message.contains(part), "{message}");
    }

    let two = [("a", &[2][..], Encoding::F32), ("b", &[1], Encoding::F16)];
    let mut writer = create(&two).unwrap();
    let message = writer.append(&[0; 9]).unwrap_err().to_string();
    assert!(message.contains("tensor \"a\"") && message.contains("9 bytes, it lacks 8 of 8"), "{message}");
    writer.append(&[0; 8]).unwrap();
    writer.append(&[0; 1]).unwrap();
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("tensor \"b\"") && message.contains("it lacks 1 of 2 bytes"), "{message}");

    let mut writer = create(&two[1..]).unwrap();
    writer.append(&[0; 2]).unwrap();
    assert!(matches!(writer.append(&[0]), Err(Error::File { .. })));
    writer.finish().unwrap();
}
