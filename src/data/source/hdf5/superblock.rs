//! A look at a file's first bytes before libhdf5 sees them: what it would spend long on, or say in many words.

use super::library::Fault;
use std::fs::File;
use std::os::unix::fs::FileExt;

const SIGNATURE: [u8; 8] = *b"\x89HDF\r\n\x1a\n";

/// Where the superblock starts: byte 0, or behind a user block of 512 × 2ⁿ bytes.
///
/// # Errors
/// No HDF5 file, a version or sizes that no writer gives, or a file shorter than it says. Without path and file size.
pub fn check(file: &File, file_bytes: u64) -> Result<u64, Fault> {
    let mut head = [0; 64];
    let mut at = 0;
    if file_bytes >= 2 {
        let mut first = [0; 2];
        file.read_exact_at(&mut first, 0).map_err(|error| Fault::of_io(&error))?;
        if first == [0x1F, 0x8B] {
            return Err(Fault::content("cannot be read as HDF5: it is compressed as a whole (gunzip it)"));
        }
    }
    loop {
        if at + head.len() as u64 > file_bytes {
            return Err(Fault::content("cannot be read as HDF5: no signature"));
        }
        file.read_exact_at(&mut head, at).map_err(|error| Fault::of_io(&error))?;
        if head.starts_with(&SIGNATURE) {
            return fields(&head, at, file_bytes).map(|()| at).map_err(Fault::content);
        }
        at = if at == 0 { 512 } else { at * 2 };
    }
}

/// HDF5 file format 3.0, II.A.
fn fields(head: &[u8; 64], at: u64, file_bytes: u64) -> Result<(), String> {
    let number = |from: usize| {
        let mut eight = [0; 8];
        eight.copy_from_slice(&head[from..from + 8]);
        u64::from_le_bytes(eight)
    };
    let version = head[8];
    // Sizes of addresses and of lengths, then where base address and end of file stand.
    let (sizes, base, end) = match version {
        0 => ([head[13], head[14]], 24, 40),
        1 => ([head[13], head[14]], 28, 44),
        2 | 3 => ([head[9], head[10]], 12, 28),
        _ => return Err(format!("cannot be read as HDF5: superblock version {version}, 0 to 3 expected")),
    };
    if sizes.iter().any(|size| ![2, 4, 8, 16, 32].contains(size)) {
        return Err(format!("cannot be read as HDF5: addresses of {} bytes, lengths of {}", sizes[0], sizes[1]));
    }
    if sizes != [8, 8] {
        return Ok(());
    }
    let (base, end) = (number(base), number(end));
    if base != 0 && base != at {
        return Err(format!("cannot be read as HDF5: base address {base}, its superblock is at {at}"));
    }
    // The end is counted from the base by some writers and from byte 0 by others.
    if end > file_bytes {
        return Err(format!("is truncated: it says that it ends at byte {end}"));
    }
    Ok(())
}
