//! The fields of a protocol-buffer message, borrowed from the file: nothing is copied before it was counted.

use super::limits::ELEMENTS;

/// What one field holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field<'a> {
    Number(u64),
    Fixed32([u8; 4]),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
}

/// Why a message is none.
pub(super) const BROKEN: &str = "it is no ONNX file, or it is cut off";

/// The `(tag, field)` pairs of one message.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number in groups of seven bits, the lowest first.
    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = u64::from(*self.take(1)?.first()?);
            value |= (byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.number()?;
        let field = match key & 7 {
            0 => Field::Number(self.number()?),
            1 => Field::Fixed64(self.take(8)?.try_into().ok()?),
            2 => {
                let length = usize::try_from(self.number()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed32(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        (key >> 3 != 0).then_some((key >> 3, field))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| BROKEN.to_owned()))
    }
}

impl<'a> Field<'a> {
    pub(super) fn bytes(self) -> Result<&'a [u8], String> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(BROKEN.to_owned()),
        }
    }

    pub(super) fn text(self) -> Result<String, String> {
        let text = std::str::from_utf8(self.bytes()?).map_err(|_| BROKEN)?;
        Ok(text.to_owned())
    }

    /// A whole number, signed as two's complement.
    pub(super) fn int(self) -> Result<i64, String> {
        match self {
            Self::Number(number) => Ok(number as i64),
            _ => Err(BROKEN.to_owned()),
        }
    }

    /// Whole numbers, one or packed.
    pub(super) fn ints(self, into: &mut Vec<i64>) -> Result<(), String> {
        let mut packed = match self {
            Self::Number(number) => {
                into.push(number as i64);
                return Ok(());
            }
            _ => Fields(self.bytes()?),
        };
        while !packed.0.is_empty() {
            if into.len() >= ELEMENTS {
                return Err(format!("a list of more than {ELEMENTS} numbers, the limit"));
            }
            into.push(packed.number().ok_or(BROKEN)? as i64);
        }
        Ok(())
    }

    /// Numbers of 32 bits, one or packed.
    pub(super) fn floats(self, into: &mut Vec<f32>) -> Result<(), String> {
        match self {
            Self::Fixed32(bytes) => into.push(f32::from_le_bytes(bytes)),
            Self::Bytes(bytes) => {
                let (values, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(BROKEN.to_owned());
                }
                into.extend(values.iter().map(|value| f32::from_le_bytes(*value)));
            }
            _ => return Err(BROKEN.to_owned()),
        }
        Ok(())
    }

    /// Numbers of 64 bits, one or packed, rounded to 32.
    pub(super) fn doubles(self, into: &mut Vec<f32>) -> Result<(), String> {
        match self {
            Self::Fixed64(bytes) => into.push(f64::from_le_bytes(bytes) as f32),
            Self::Bytes(bytes) => {
                into.extend(bytes.as_chunks::<8>().0.iter().map(|value| f64::from_le_bytes(*value) as f32));
            }
            _ => return Err(BROKEN.to_owned()),
        }
        Ok(())
    }
}
