//! Errors of the image libraries in words for users: their own text names types and variants of their code.

use png::DecodingError;
use zune_jpeg::errors::DecodeErrors;

/// Message about a bad PNG file, with the remedy.
pub(super) fn of_png(error: &DecodingError) -> &'static str {
    match error {
        DecodingError::IoError(_) => "it is cut off: copy it again, or leave it out",
        DecodingError::LimitsExceeded => "it holds more data than an image of its size needs: write it again",
        DecodingError::Parameter(_) => "its pixels do not have the size that its header names: write it again",
        DecodingError::Format(format) => of_format(&format.to_string()),
    }
}

/// The library tells kinds of damage apart by text alone.
fn of_format(text: &str) -> &'static str {
    const KINDS: [(&str, &str); 7] = [
        ("CRC error", "it is damaged, a checksum does not match: copy it again, or leave it out"),
        ("Corrupt deflate", "it is damaged, its pixels cannot be decompressed: copy it again, or leave it out"),
        ("not have enough data", "it is cut off, pixels are missing: copy it again, or leave it out"),
        ("chunk is missing", "it holds no pixels: copy it again, or leave it out"),
        ("palette", "its palette is missing or too short: write it again"),
        ("color", "its header names a kind of colour that PNG does not have: write it again"),
        ("bit depth", "its header names a depth that PNG does not have: write it again"),
    ];
    let kind = KINDS.iter().find(|(part, _)| text.contains(part));
    kind.map_or(
        "it is damaged, its parts are not as the format asks for: copy it again, or leave it out",
        |(_, words)| words,
    )
}

/// Message about a bad JPEG file, with the remedy.
pub(super) fn of_jpeg(error: &DecodeErrors) -> String {
    const AGAIN: &str = "copy it again, or leave it out";
    match error {
        DecodeErrors::ExhaustedData | DecodeErrors::IoErrors(_) => format!("it is cut off: {AGAIN}"),
        DecodeErrors::HuffmanDecode(_) | DecodeErrors::MCUError(_) => {
            format!("it is damaged, its pixels cannot be decoded: {AGAIN}")
        }
        DecodeErrors::DqtError(_) | DecodeErrors::SosError(_) | DecodeErrors::SofError(_) => {
            format!("it is damaged, its header is not as the format asks for: {AGAIN}")
        }
        DecodeErrors::ZeroError => "its header names a height or width of 0: write it again".into(),
        DecodeErrors::LargeDimensions(side) => format!("its header names a side of {side} pixels: write it again"),
        DecodeErrors::Unsupported(_) => UNREADABLE_KIND.into(),
        DecodeErrors::IllegalMagicBytes(_) => format!("it does not begin as a JPEG file does: {AGAIN}"),
        DecodeErrors::Format(_) | DecodeErrors::FormatStatic(_) | DecodeErrors::TooSmallOutput(..) => {
            format!("it is damaged or cut off: {AGAIN}")
        }
    }
}

const UNREADABLE_KIND: &str = "a kind of JPEG that is not read (expected baseline or progressive, 8 bits per sample): write \
                               it again, or as PNG";

/// Checks the kind of compression by its marker, SOF0 to SOF15, and the bits per sample.
///
/// # Errors
/// The decoder does not know it.
pub(super) fn jpeg_kind(marker: u8, bits: u8) -> Result<(), String> {
    if matches!(marker, 0xC0..=0xC2) && bits == 8 {
        return Ok(());
    }
    let kind = match marker {
        0xC0..=0xC2 => "Huffman-coded",
        0xC3 | 0xC7 | 0xCB | 0xCF => "lossless",
        0xC9 | 0xCA | 0xCD | 0xCE => "arithmetic-coded",
        _ => "hierarchical",
    };
    Err(format!("{kind}, {bits} bits per sample: {UNREADABLE_KIND}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_jpeg_that_cannot_be_decoded_are_told_by_the_header() {
        for marker in [0xC0, 0xC1, 0xC2] {
            assert_eq!(jpeg_kind(marker, 8), Ok(()));
        }
        for (marker, bits, word) in
            [(0xC0, 12, "12 bits"), (0xC3, 8, "lossless"), (0xC9, 8, "arithmetic"), (0xC5, 8, "hier")]
        {
            assert!(jpeg_kind(marker, bits).unwrap_err().contains(word));
        }
    }
}
