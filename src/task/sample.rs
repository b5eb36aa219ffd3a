//! Helpers of the makers of sample data.

use crate::data::DataError;
use crate::data::loader::mix;
use std::path::{Path, PathBuf};

/// Has `write` make the new folder `out`: beside it first, then renamed, so that `out` is never half there.
///
/// # Errors
/// `out` exists and is not an empty folder, there is no room or permission, or what `write` says.
pub fn new_folder(out: &Path, write: impl FnOnce(&Path) -> Result<(), DataError>) -> Result<(), DataError> {
    let failed = |error: std::io::Error| DataError::File { path: out.to_owned(), problem: error.to_string() };
    if let Ok(mut entries) = std::fs::read_dir(out)
        && entries.next().is_some()
    {
        let problem = "already holds files: name another folder, or remove it".to_string();
        return Err(DataError::File { path: out.to_owned(), problem });
    }
    let beside = beside(out);
    std::fs::create_dir_all(&beside).map_err(failed)?;
    let written = write(&beside).and_then(|()| std::fs::rename(&beside, out).map_err(failed));
    if written.is_err() {
        // The remains of a failed attempt are useless; the first error is the one that matters.
        let _ = std::fs::remove_dir_all(&beside);
    }
    written
}

fn beside(out: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(out.file_name().unwrap_or_default());
    name.push(format!(".partial-{}", std::process::id()));
    out.with_file_name(name)
}

/// SplitMix64 with normal numbers by Marsaglia's polar method.
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        loop {
            let bits = self.draw();
            let unit = |half: u64| (half as f64 + 0.5) / f64::from(1u32 << 31) - 1.0;
            let (x, y) = (unit(bits >> 32), unit(bits & 0xFFFF_FFFF));
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                return x * (-2.0 * square.ln() / square).sqrt();
            }
        }
    }
}
