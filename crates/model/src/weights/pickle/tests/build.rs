//! Writes archives and pickles that PyTorch would not.

/// Bytes of a pickle.
#[derive(Default, Clone)]
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    /// `{"module": {` with the marks of both dicts open.
    pub fn module() -> Self {
        Self::default().raw(b"\x80\x02}(").text("module").raw(b"}(")
    }

    /// Closes what [`module`](Self::module) opens.
    pub fn finish(self) -> Vec<u8> {
        self.raw(b"uu.").0
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn text(self, text: &str) -> Self {
        self.raw(b"X").raw(&(text.len() as u32).to_le_bytes()).raw(text.as_bytes())
    }

    pub fn int(self, number: i64) -> Self {
        self.raw(b"\x8a\x08").raw(&number.to_le_bytes())
    }

    pub fn ints(self, numbers: &[i64]) -> Self {
        numbers.iter().fold(self.raw(b"("), |pickle, number| pickle.int(*number)).raw(b"t")
    }

    pub fn global(self, module: &str, name: &str) -> Self {
        self.raw(format!("c{module}\n{name}\n").as_bytes())
    }

    /// A tensor of the record `data/0`.
    pub fn tensor(self, tensor: &Tensor) -> Self {
        self.global("torch._utils", "_rebuild_tensor_v2")
            .raw(b"((")
            .text("storage")
            .global("torch", tensor.class)
            .text("0")
            .text("cpu")
            .int(tensor.stored)
            .raw(b"tQ")
            .int(tensor.offset)
            .ints(&tensor.shape)
            .ints(&tensor.strides)
            .raw(b"\x89NtR")
    }
}

/// What a pickle says about a tensor.
#[derive(Clone)]
pub struct Tensor {
    pub class: &'static str,
    /// Elements of its storage.
    pub stored: i64,
    pub offset: i64,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>,
}

impl Default for Tensor {
    /// Two rows of three singles.
    fn default() -> Self {
        Self { class: "FloatStorage", stored: 6, offset: 0, shape: vec![2, 3], strides: vec![3, 1] }
    }
}

/// A writer of zip archives that lies when told to.
#[derive(Default)]
pub struct Zip {
    pub records: Vec<u8>,
    pub directory: Vec<u8>,
    pub entries: u64,
    /// Writes sizes and offsets into zip64 fields.
    pub wide: bool,
    /// Added to the number of entries; past 2^64 it begins again at 0.
    pub more_entries: u64,
    /// Method that entries claim to be compressed with.
    pub method: u16,
    /// Length that entries claim, instead of their own.
    pub claimed: Option<u64>,
    /// Where the next local header is claimed to be, instead of where it is.
    pub header: Option<u64>,
    /// Comment of the archive.
    pub comment: Vec<u8>,
    /// Where the central directory is claimed to be.
    pub start: Option<u64>,
}

impl Zip {
    pub fn add(&mut self, name: &str, content: &[u8]) -> &mut Self {
        let header = self.header.unwrap_or(self.records.len() as u64);
        let length = self.claimed.unwrap_or(content.len() as u64);
        let name_length = (name.len() as u16).to_le_bytes();
        let records = &mut self.records;
        records.extend(b"PK\x03\x04");
        records.extend([0; 22]);
        records.extend(name_length);
        records.extend([3, 0]);
        records.extend(name.as_bytes());
        records.extend(b"FBZ");
        records.extend(content);

        let narrow = |number: u64| if self.wide { [0xff; 4] } else { (number as u32).to_le_bytes() };
        let extra: Vec<u8> = if self.wide {
            let fields = [length, length, header].map(u64::to_le_bytes);
            [&b"FB\x01\x00Z\x01\x00\x18\x00"[..], fields.as_flattened()].concat()
        } else {
            Vec::new()
        };
        let directory = &mut self.directory;
        directory.extend(b"PK\x01\x02\0\0\0\0\0\0");
        directory.extend(self.method.to_le_bytes());
        directory.extend([0; 8]);
        directory.extend(narrow(length));
        directory.extend(narrow(length));
        directory.extend(name_length);
        directory.extend((extra.len() as u16).to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(narrow(header));
        directory.extend(name.as_bytes());
        directory.extend(extra);
        self.entries += 1;
        self
    }

    pub fn finish(&self) -> Vec<u8> {
        let start = self.start.unwrap_or(self.records.len() as u64);
        let (entries, length) = (self.entries.wrapping_add(self.more_entries), self.directory.len() as u64);
        let mut file = [self.records.as_slice(), &self.directory].concat();
        if self.wide {
            let end = file.len() as u64;
            file.extend(b"PK\x06\x06");
            file.extend([0; 20]);
            file.extend([entries, entries, length, start].map(u64::to_le_bytes).as_flattened());
            file.extend(b"PK\x06\x07\0\0\0\0");
            file.extend(end.to_le_bytes());
            file.extend([1, 0, 0, 0]);
            file.extend(b"PK\x05\x06\0\0\0\0");
            file.extend([0xff; 12]);
        } else {
            file.extend(b"PK\x05\x06\0\0\0\0");
            file.extend([entries as u16, entries as u16].map(u16::to_le_bytes).as_flattened());
            file.extend([length as u32, start as u32].map(u32::to_le_bytes).as_flattened());
        }
        file.extend((self.comment.len() as u16).to_le_bytes());
        file.extend(&self.comment);
        file
    }
}

/// An archive of a pickle and the 24 bytes of `data/0`.
pub fn archive(pickle: &[u8]) -> Zip {
    let mut zip = Zip::default();
    zip.add("a/data.pkl", pickle).add("a/data/0", &[7; 24]);
    zip
}
