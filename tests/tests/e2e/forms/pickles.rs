//! PyTorch's zip archives, as `torch.save` writes them: a pickle of protocol 2 that builds tensors out of storages,
//! each a file of its own in a zip without compression.

use std::{fs, path::Path};

use safetensors::Dtype;

use super::sheet::{Plain, Sheet};
use crate::inputs::crc32;

/// Where storages begin in the file, as PyTorch aligns them.
const ALIGNMENT: usize = 64;

/// Writes tensors as a dictionary, within another one under the key `wrapper` where there is one.
pub fn write(file: &Path, wrapper: Option<&str>, sheet: &Sheet) {
    let mut pickle = Pickle::default();
    pickle.out.extend(b"\x80\x02");
    if let Some(key) = wrapper {
        pickle.out.extend(b"}(");
        pickle.text(key);
    }
    pickle.ordered_dictionary();
    pickle.out.push(b'(');
    for (i, (name, plain)) in sheet.iter().enumerate() {
        pickle.text(name);
        pickle.tensor(i, plain);
    }
    pickle.out.push(b'u');
    // What a module's state carries besides: versions, which nothing here needs.
    pickle.out.push(b'}');
    pickle.text("_metadata");
    pickle.ordered_dictionary();
    pickle.out.extend(b"sb");
    if wrapper.is_some() {
        pickle.out.push(b'u');
    }
    pickle.out.push(b'.');
    let mut zip = Zip::default();
    zip.add("data.pkl", &pickle.out);
    zip.add("byteorder", b"little");
    for (i, plain) in sheet.values().enumerate() {
        zip.add(&format!("data/{i}"), &plain.bytes);
    }
    zip.add("version", b"3\n");
    fs::write(file, zip.end()).unwrap();
}

#[derive(Default)]
struct Pickle {
    out: Vec<u8>,
    remembered: u32,
}

impl Pickle {
    /// Every text and class is remembered, as Python's pickler does it.
    fn remember(&mut self) {
        match u8::try_from(self.remembered) {
            Ok(short) => self.out.extend([b'q', short]),
            Err(_) => self.out.extend([&b"r"[..], &self.remembered.to_le_bytes()].concat()),
        }
        self.remembered += 1;
    }

    fn text(&mut self, text: &str) {
        self.out.push(b'X');
        self.out.extend((text.len() as u32).to_le_bytes());
        self.out.extend(text.as_bytes());
        self.remember();
    }

    fn class(&mut self, module: &str, name: &str) {
        self.out.extend(format!("c{module}\n{name}\n").as_bytes());
        self.remember();
    }

    fn number(&mut self, number: usize) {
        match (u8::try_from(number), u16::try_from(number)) {
            (Ok(short), _) => self.out.extend([b'K', short]),
            (_, Ok(short)) => self.out.extend([&b"M"[..], &short.to_le_bytes()].concat()),
            _ => self.out.extend([&b"J"[..], &(number as u32).to_le_bytes()].concat()),
        }
    }

    fn numbers(&mut self, numbers: &[usize]) {
        self.out.push(b'(');
        numbers.iter().for_each(|number| self.number(*number));
        self.out.push(b't');
        self.remember();
    }

    fn ordered_dictionary(&mut self) {
        self.class("collections", "OrderedDict");
        self.out.extend(b")R");
        self.remember();
    }

    fn tensor(&mut self, storage: usize, plain: &Plain) {
        // Types that are younger than typed storages come as bytes, and say their type behind all else.
        let (class, young) = match plain.dtype {
            Dtype::F32 => (("torch", "FloatStorage"), None),
            Dtype::F16 => (("torch", "HalfStorage"), None),
            Dtype::BF16 => (("torch", "BFloat16Storage"), None),
            Dtype::I64 => (("torch", "LongStorage"), None),
            Dtype::F8_E4M3 => (("torch.storage", "UntypedStorage"), Some("float8_e4m3fn")),
            other => panic!("{other:?}"),
        };
        let count: usize = plain.shape.iter().product();
        let strides: Vec<usize> = (0..plain.shape.len()).map(|i| plain.shape[i + 1..].iter().product()).collect();
        self.class("torch._utils", if young.is_some() { "_rebuild_tensor_v3" } else { "_rebuild_tensor_v2" });
        self.out.extend(b"((");
        self.text("storage");
        self.class(class.0, class.1);
        self.text(&storage.to_string());
        self.text("cpu");
        self.number(count);
        self.out.extend(b"tQ");
        self.number(0);
        self.numbers(&plain.shape);
        self.numbers(&strides);
        self.out.push(0x89); // no gradient
        self.ordered_dictionary();
        if let Some(kind) = young {
            self.class("torch", kind);
        }
        self.out.extend(b"tR");
        self.remember();
    }
}

#[derive(Default)]
struct Zip {
    out: Vec<u8>,
    directory: Vec<u8>,
    files: u16,
}

impl Zip {
    /// Stores a file below `archive/`; padding in the header's extra field aligns its bytes.
    fn add(&mut self, name: &str, bytes: &[u8]) {
        let name = format!("archive/{name}");
        let (at, begin) = (self.out.len(), self.out.len() + 30 + name.len() + 4);
        let padding = begin.next_multiple_of(ALIGNMENT) - begin;
        let mut common = Vec::new();
        common.extend([0; 2]); // no flags
        common.extend([0; 2]); // stored
        common.extend([0; 4]); // no time
        common.extend(crc32(bytes).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        self.out.extend(b"PK\x03\x04\0\0");
        self.out.extend(&common);
        self.out.extend((4 + padding as u16).to_le_bytes());
        self.out.extend(name.as_bytes());
        self.out.extend(b"FB");
        self.out.extend((padding as u16).to_le_bytes());
        self.out.extend(vec![b'Z'; padding]);
        self.out.extend(bytes);
        self.directory.extend(b"PK\x01\x02\0\0\0\0");
        self.directory.extend(&common);
        self.directory.extend([0; 2 + 2 + 2 + 2 + 4]); // extra, comment, disk, attributes
        self.directory.extend((at as u32).to_le_bytes());
        self.directory.extend(name.as_bytes());
        self.files += 1;
    }

    fn end(mut self) -> Vec<u8> {
        let at = self.out.len() as u32;
        self.out.extend(&self.directory);
        self.out.extend(b"PK\x05\x06\0\0\0\0");
        self.out.extend([self.files.to_le_bytes(), self.files.to_le_bytes()].concat());
        self.out.extend((self.directory.len() as u32).to_le_bytes());
        self.out.extend(at.to_le_bytes());
        self.out.extend([0; 2]);
        self.out
    }
}
