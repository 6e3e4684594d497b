//! Archives that lie, and pickles that try more than a state dict takes.

use super::{
    build::{Pickle, Tensor, Zip, archive},
    *,
};

/// The message that refuses the pickle, without the file's name.
fn refused(pickle: &[u8]) -> String {
    let message = refusal("a", &archive(pickle).finish());
    message.strip_prefix("weights: a: ").map_or(message.clone(), str::to_owned)
}

fn one_tensor(tensor: &Tensor) -> Vec<u8> {
    Pickle::module().text("w").tensor(tensor).finish()
}

#[test]
fn the_archives_of_these_tests_are_read_when_they_do_not_lie() {
    let mut zips = [archive(&one_tensor(&Tensor::default())), Zip { wide: true, ..Zip::default() }];
    zips[1].add("folder/name/data.pkl", &one_tensor(&Tensor::default())).add("folder/name/data/0", &[7; 24]);
    zips[1].comment = b"a comment of the archive, with PK\x05\x06 in it and some more bytes".to_vec();
    for zip in zips {
        let file = zip.finish();
        let archive = read_as("a", &file).unwrap();
        let [tensor] = archive.tensors.as_slice() else { panic!("{archive:?}") };
        assert_eq!((tensor.name.as_str(), tensor.shape.as_slice(), tensor.encoding), ("w", &[2, 3][..], Encoding::F32));
        assert_eq!(file[tensor.bytes.clone()], [7; 24]);
    }
}

#[test]
fn globals_that_no_state_dict_takes_are_refused_by_name_before_anything_calls_them() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("subprocess", "Popen"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch", "float32.__class__"),
        ("argparse", "Namespace"),
    ] {
        let expected = format!("refuses global `{module}.{name}`: a checkpoint may hold tensors only");
        let message = refused(&Pickle::module().text("w").global(module, name).finish());
        assert!(message.ends_with(&expected), "{message}");
        let message = refused(&Pickle::module().text("w").text(module).text(name).raw(b"\x93").finish());
        assert!(message.ends_with(&expected), "{message}");
    }
    let message = refused(&Pickle::module().text("w").global("os", &"\u{1b}x".repeat(9999)).finish());
    assert!(message.len() < 1000 && message.contains(r"os.\u{1b}x"), "{message}");
}

#[test]
fn a_call_of_something_else_than_a_known_global_is_refused() {
    let call = |callee: Pickle| refused(&callee.raw(b")R").finish());
    let start = || Pickle::module().text("w");
    assert!(call(start().text("os.system")).ends_with("something else than a global is called"));
    assert!(call(start().global("torch", "FloatStorage")).ends_with("other arguments than torch.save's"));
    assert!(call(start().global("torch._utils", "_rebuild_parameter")).ends_with("other arguments than torch.save's"));
    assert!(refused(&start().tensor(&Tensor::default()).raw(b"}b").finish()).contains("sets attributes"));
}

#[test]
fn opcodes_that_no_checkpoint_takes_are_refused() {
    // INST, OBJ, EXT1, NEWOBJ_EX, PERSID, BYTEARRAY8, STRING, INT.
    for opcode in b"io\x82\x92P\x96SI" {
        let message = refused(&Pickle::module().raw(&[*opcode, 0, 0, 0, 0, 0, 0, 0, 0]).finish());
        assert!(message.ends_with(&format!("opcode {opcode:#04x}, which no checkpoint needs")), "{message}");
    }
    assert!(refused(b"\x80\x06N.").ends_with("pickle protocol 6, the limit is 5"));
}

#[test]
fn a_stack_that_runs_empty_is_refused() {
    for program in
        [&b"."[..], b"0.", b"(t0.", b"s", b"}s", b"}Ns", b"N(s", b"(0u", b"t", b"}(Nu", b"h\0", b"R", b"Q", b"\x87"]
    {
        assert!(!refused(program).is_empty(), "{program:?}");
    }
}

#[test]
fn tensors_that_are_not_within_their_record_are_refused() {
    let good = Tensor::default();
    let big = i64::MAX;
    for (tensor, reason) in [
        (Tensor { stored: 7, ..good.clone() }, "its record a/data/0 has 24 bytes, which are not 7 elements"),
        (Tensor { stored: -6, ..good.clone() }, "which are not -6 elements"),
        (Tensor { stored: big, ..good.clone() }, "which are not 9223372036854775807 elements"),
        (Tensor { class: "HalfStorage", ..good.clone() }, "which are not 6 elements"),
        (Tensor { offset: 1, ..good.clone() }, "shape [2, 3] from element 1 on is past its storage of 24 bytes"),
        (Tensor { offset: -1, ..good.clone() }, "a size or an offset is -1"),
        (Tensor { offset: big, ..good.clone() }, "past its storage of 24 bytes"),
        (Tensor { shape: vec![3, 3], ..good.clone() }, "past its storage of 24 bytes"),
        (Tensor { shape: vec![-2, 3], ..good.clone() }, "a size or an offset is -2"),
        (Tensor { shape: vec![2, 3, 1], ..good.clone() }, "has strides [3, 1], expected row-major ones"),
        (Tensor { shape: vec![big, big], strides: vec![big, 1], ..good.clone() }, "past its storage of 24 bytes"),
        (Tensor { shape: vec![2, big, big], strides: vec![0, big, 1], ..good.clone() }, "expected row-major ones"),
        (Tensor { shape: vec![1; 17], strides: vec![1; 17], ..good.clone() }, "it has 17 sides, the limit is 16"),
        // An expanded scalar: six values of one element.
        (Tensor { strides: vec![0, 0], ..good.clone() }, "has strides [0, 0], expected row-major ones"),
        (Tensor { shape: vec![0, big], offset: big, ..good.clone() }, "past its storage of 24 bytes"),
    ] {
        let message = refused(&one_tensor(&tensor));
        assert!(message.starts_with("weights: tensor \"w\" in a: ") && message.contains(reason), "{message}");
    }
    let mut lone = Zip::default();
    lone.add("a/data.pkl", &one_tensor(&good));
    assert!(refusal("a", &lone.finish()).ends_with("its record a/data/0 is not in the archive"));
}

#[test]
fn arguments_that_rebuild_no_tensor_are_refused() {
    let rebuild = |arguments: &[u8]| {
        let v2 = Pickle::module().text("w").global("torch._utils", "_rebuild_tensor_v2");
        refused(&v2.raw(arguments).raw(b"R").finish())
    };
    assert!(rebuild(b")").ends_with("it is rebuilt from too few arguments"));
    assert!(rebuild(b"(NNNNNNt").ends_with("it has no storage"));
    assert!(rebuild(b"(NQNNNNNt").ends_with("it is rebuilt from something else than a tuple"));
    assert!(rebuild(b"()QNNNNNt").ends_with("its storage's id is not one that torch.save writes"));
    assert!(rebuild(b"N").ends_with("a call has no tuple of arguments"));
}

#[test]
fn an_archive_that_lies_is_refused() {
    let pickle = one_tensor(&Tensor::default());
    let lie = |zip: Zip| {
        let mut zip = zip;
        zip.add("a/data.pkl", &pickle).add("a/data/0", &[7; 24]);
        refusal("a", &zip.finish())
    };
    let zip = || Zip { wide: true, ..Zip::default() };
    for (zip, reason) in [
        (Zip { method: 8, ..zip() }, "record a/data.pkl is compressed"),
        (Zip { claimed: Some(1 << 60), ..zip() }, "has 1152921504606846976 bytes, past the end of the records"),
        (Zip { claimed: Some(u64::MAX), ..zip() }, "past the end of the records"),
        (Zip { claimed: Some(900), ..zip() }, "past the end of the records"),
        (Zip { header: Some(1 << 60), ..zip() }, "has its header past the end of the records"),
        (Zip { header: Some(u64::MAX), ..zip() }, "has its header past the end of the records"),
        (Zip { header: Some(5), ..zip() }, "has no header where the central directory points"),
        (Zip { more_entries: 1, ..zip() }, "the zip archive's directory is truncated"),
        (Zip { more_entries: 2u64.wrapping_neg(), ..zip() }, "more than the 0 records it claims"),
        (Zip { more_entries: 1 << 60, ..zip() }, "claims 1152921504606846978 records, the limit is 65536"),
        (Zip { start: Some(1 << 60), ..zip() }, "past its end at"),
        (Zip { start: Some(u64::MAX), ..zip() }, "past its end at"),
        (Zip { start: Some(0), ..zip() }, "has fewer records than it claims"),
        (Zip { more_entries: 1, ..Zip::default() }, "the zip archive's directory is truncated"),
        (Zip { more_entries: 0xffff, ..Zip::default() }, "more than the 1 records it claims"),
        (Zip { claimed: Some(u32::MAX.into()), ..Zip::default() }, "lacks its zip64 sizes"),
    ] {
        let message = lie(zip);
        assert!(message.contains(reason), "{message}, expected {reason}");
    }
}

#[test]
fn records_that_overlap_or_have_the_same_name_are_refused() {
    let pickle = one_tensor(&Tensor::default());
    let mut zip = archive(&pickle);
    zip.add("a/data/0", &[1; 24]);
    assert!(refusal("a", &zip.finish()).ends_with("record a/data/0 is there twice"));

    // A whole record within the bytes of another.
    let mut inner = Zip::default();
    inner.add("a/data/1", &[1; 24]);
    let mut zip = archive(&pickle);
    let within = zip.records.len() + 30 + "a/data/2".len() + 3;
    zip.add("a/data/2", &inner.records);
    zip.header = Some(within as u64);
    zip.add("a/data/1", &[1; 24]);
    assert!(refusal("a", &zip.finish()).ends_with("record a/data/1 overlaps another"));

    let mut zip = archive(&pickle);
    zip.add("b/data.pkl", &pickle);
    assert!(refusal("a", &zip.finish()).ends_with("the zip archive has more than one data.pkl"));

    let mut zip = Zip::default();
    zip.add("data.pkl", &pickle);
    assert!(refusal("a", &zip.finish()).ends_with("the zip archive has no record data.pkl in a folder"));

    let mut zip = archive(&pickle);
    zip.add("a/byteorder", b"big");
    assert!(refusal("a", &zip.finish()).ends_with("byte order big, expected little"));
}

#[test]
fn lists_that_double_forty_times_over_are_survived() {
    // l = []; then forty times l = [l, l]: 2^40 leaves for whoever walks them all.
    let lists = (0..40).fold(Pickle::module().text("x").raw(b"]"), |pickle, _| pickle.raw(b"q\0]h\0ah\0a"));
    let archive = read_as("a", &archive(&lists.text("y").raw(b"h\0").finish()).finish()).unwrap();
    assert!(archive.tensors.is_empty() && archive.numbers.is_empty());
}

#[test]
fn deep_nesting_is_survived() {
    let nested = Pickle::module().text("x").raw(&b"]".repeat(500_000)).raw(&b"a".repeat(499_999)).finish();
    assert!(read_as("a", &archive(&nested).finish()).is_ok());
    let tuples = Pickle::module().text("x").raw(b")").raw(&b"\x85".repeat(500_000)).finish();
    assert!(read_as("a", &archive(&tuples).finish()).is_ok());
    let marks = Pickle::module().raw(&b"(".repeat(500_000)).finish();
    assert!(!refused(&marks).is_empty());
}

#[test]
fn a_dict_that_holds_itself_is_refused() {
    let file = archive(&Pickle::default().raw(b"}q\0").text("module").raw(b"h\0s.").0).finish();
    assert!(refusal("a", &file).ends_with("the state dict is wrapped more than 4 times"));
}

#[test]
fn a_pickle_that_makes_or_remembers_too_much_is_refused() {
    let limit = |program: &[u8]| refused(&Pickle::module().raw(program).finish());
    assert!(limit(&b"N".repeat(2 << 20)).ends_with("the pickle makes more than 1048576 values"));
    assert!(limit(&b"]".repeat(2 << 20)).ends_with("the pickle makes more than 1048576 values"));
    assert!(limit(&b"(".repeat(2 << 20)).ends_with("the pickle makes more than 1048576 values"));
    let remembered = [&b"N"[..], &b"\x94".repeat(1 << 20)].concat();
    assert!(limit(&remembered).ends_with("the pickle remembers more than 524288 values"));
    assert!(refused(&vec![b'N'; (16 << 20) + 1]).ends_with("data.pkl has 16777217 bytes, the limit is 16777216"));
}

#[test]
fn lengths_past_the_pickle_are_refused() {
    for program in [
        &b"X\xff\xff\xff\xff"[..],
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8e\0\0\0\0\0\0\0\x10",
        b"B\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\xff",
        b"\x8a\xff",
        b"\x8c\xff",
        b"cos",
        b"\x95\0",
    ] {
        assert!(refused(program).ends_with("the pickle is truncated"), "{program:?}");
    }
}

#[test]
fn only_one_dict_may_bear_tensors() {
    let w = Tensor::default();
    // {"module": {}, "ema": {"w": tensor}}
    let other = Pickle::default().raw(b"}(").text("module").raw(b"}").text("ema").raw(b"}(").text("w").tensor(&w);
    assert!(refused(&other.raw(b"uu.").0).contains("the tensors are under \"ema\", expected a dict under one of"));
    let both = Pickle::module().text("w").tensor(&w).raw(b"u").text("optimizer").raw(b"]").tensor(&w).raw(b"au.");
    assert!(refused(&both.0).contains("there are tensors under \"module\" and under \"optimizer\""));
    let nested = Pickle::module().text("w").tensor(&w).text("v").raw(b"]").tensor(&w).raw(b"a").finish();
    assert!(refused(&nested).ends_with("entry \"v\" holds tensors, but is none itself"));
    let twice = Pickle::module().text("w").tensor(&w).text("w").tensor(&w).finish();
    assert!(refused(&twice).ends_with("it is there twice"));
    let unnamed = Pickle::module().int(1).tensor(&w).finish();
    assert!(refused(&unnamed).ends_with("a tensor's name is not text"));
    let long = Pickle::module().text(&"w".repeat(513)).tensor(&w).finish();
    assert!(refused(&long).ends_with("has 513 bytes, the limit is 512"));
    assert!(refused(b"\x80\x02].").ends_with("the pickle holds no dict of tensors"));
}

#[test]
fn wrappers_within_each_other_and_plain_data_beside_are_passed_over() {
    // {"state_dict": {"module": {"w": tensor, "scale": 0.5, "steps": 7, "note": None}, "seen": {1: [2.0, "x"]}}}
    let pickle = Pickle::default()
        .raw(b"}(")
        .text("state_dict")
        .raw(b"}(")
        .text("module")
        .raw(b"}(")
        .text("w")
        .tensor(&Tensor::default())
        .text("scale")
        .raw(b"G\x3f\xe0\0\0\0\0\0\0")
        .text("steps")
        .int(7)
        .text("note")
        .raw(b"Nu")
        .text("seen")
        .raw(b"}K\x01]K\x02a")
        .text("x")
        .raw(b"asuu.");
    let archive = read_as("a", &archive(&pickle.0).finish()).unwrap();
    assert_eq!(archive.tensors.len(), 1);
    assert_eq!(archive.numbers, [("scale".to_owned(), 0.5), ("steps".to_owned(), 7.0)].into());
}
