//! What a pickle can make: plain data and descriptions of tensors.

use crate::weights::stored::Encoding;

/// A value on the machine's stack. What holds others lies in the [`Heap`], so that sharing, cycles and nesting
/// cost nothing to copy or to drop.
#[derive(Debug, Clone, Copy)]
pub enum Value<'a> {
    /// `None`, a truth value, bytes, or a number past 64 bits: nothing that a network reads.
    Plain,
    Int(i64),
    Float(f64),
    Text(&'a str),
    Global(Global),
    /// Index into the heap.
    Object(usize),
}

/// What holds other values.
#[derive(Debug)]
pub enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    /// A list or a set.
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// The id that a storage is stored under.
    Storage(Value<'a>),
    /// Arguments that a tensor is rebuilt from, unchecked.
    Tensor {
        arguments: Value<'a>,
        typed: Typed,
    },
}

/// What says a tensor's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Typed {
    /// Its storage: `_rebuild_tensor_v2`.
    ByStorage,
    /// An argument, beside a storage of bytes: `_rebuild_tensor_v3`, for types newer than the typed storages.
    ByArgument,
}

/// The objects of a pickle.
pub type Heap<'a> = Vec<Object<'a>>;

/// The elements of a tensor: how they are stored, and in how many bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Element {
    pub encoding: Encoding,
    pub size: usize,
}

/// The classes and functions that a pickle may name. None of them runs; they say what a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Global {
    OrderedDict,
    RebuildTensor(Typed),
    RebuildParameter,
    Size,
    /// A class of storages; of bytes where it has no type.
    Storage(Option<Element>),
    Dtype(Element),
}

/// Names in `torch` of storages (where there are some) and dtypes.
const ELEMENTS: [(Option<&str>, &str, Encoding, usize); 16] = [
    (Some("FloatStorage"), "float32", Encoding::F32, 4),
    (Some("HalfStorage"), "float16", Encoding::F16, 2),
    (Some("BFloat16Storage"), "bfloat16", Encoding::Bf16, 2),
    (Some("CharStorage"), "int8", Encoding::I8, 1),
    (None, "float8_e4m3fn", Encoding::F8E4M3, 1),
    (None, "float8_e5m2", Encoding::Other("float8_e5m2"), 1),
    (None, "float8_e8m0fnu", Encoding::Other("float8_e8m0fnu"), 1),
    (Some("DoubleStorage"), "float64", Encoding::Other("f64"), 8),
    (Some("LongStorage"), "int64", Encoding::Other("i64"), 8),
    (Some("IntStorage"), "int32", Encoding::Other("i32"), 4),
    (Some("ShortStorage"), "int16", Encoding::Other("i16"), 2),
    (Some("ByteStorage"), "uint8", Encoding::Other("u8"), 1),
    (Some("BoolStorage"), "bool", Encoding::Other("bool"), 1),
    (None, "uint16", Encoding::Other("u16"), 2),
    (None, "uint32", Encoding::Other("u32"), 4),
    (None, "uint64", Encoding::Other("u64"), 8),
];

impl Global {
    /// The class or function of that name; nothing where a checkpoint has no need of it.
    pub fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor(Typed::ByStorage),
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensor(Typed::ByArgument),
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch" | "torch.storage", "UntypedStorage") => Self::Storage(None),
            ("torch", name) => ELEMENTS.iter().find_map(|&(storage, dtype, encoding, size)| {
                let element = Element { encoding, size };
                if storage == Some(name) {
                    Some(Self::Storage(Some(element)))
                } else {
                    (dtype == name).then_some(Self::Dtype(element))
                }
            })?,
            _ => return None,
        })
    }
}
