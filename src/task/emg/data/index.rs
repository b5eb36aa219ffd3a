//! Facts about unchanged files, kept from run to run, so that the next start reads no samples.
//!
//! `emg-<key>.jsonl`: a header line, one line per file, a last line with the CRC-32 of all before. Anything unexpected in it
//! means that files are scanned again, never an error.

use super::scan::{FileFacts, ScanFacts};
use crate::data::DataError;
use crate::data::source::hdf5::open;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Raised when the scan finds out something else.
const VERSION: u32 = 1;

#[derive(PartialEq, Serialize, Deserialize)]
struct Header {
    version: u32,
    facts: ScanFacts,
}

#[derive(Serialize, Deserialize)]
struct Trailer {
    crc32: u32,
}

/// Where facts that were found under `facts` about files below `root` are kept.
pub fn path(index_dir: &Path, facts: &ScanFacts, root: &Path) -> PathBuf {
    let key = serde_json::to_string(facts).unwrap_or_default() + &root.to_string_lossy();
    index_dir.join(format!("emg-{:08x}.jsonl", libdeflater::crc32(key.as_bytes())))
}

/// Facts about files that are as they were. A missing index is empty; a damaged one too, with a warning.
pub fn load(path: &Path, facts: &ScanFacts) -> HashMap<PathBuf, FileFacts> {
    let Ok(text) = std::fs::read(path) else {
        return HashMap::new();
    };
    parse(&text, facts).unwrap_or_else(|problem| {
        tracing::warn!("{}: {problem}: files are scanned again", path.display());
        HashMap::new()
    })
}

fn parse(text: &[u8], facts: &ScanFacts) -> Result<HashMap<PathBuf, FileFacts>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "damaged index, no text")?;
    let body = text.strip_suffix('\n').and_then(|text| text.rfind('\n')).map(|at| text.split_at(at + 1));
    let (body, last) = body.ok_or("damaged index, too short")?;
    let trailer: Trailer = serde_json::from_str(last).map_err(|_| "damaged index, cut at its end")?;
    if trailer.crc32 != libdeflater::crc32(body.as_bytes()) {
        return Err("damaged index, checksum does not match".into());
    }
    let mut lines = body.lines();
    let header: Option<Header> = lines.next().and_then(|line| serde_json::from_str(line).ok());
    if header != Some(Header { version: VERSION, facts: facts.clone() }) {
        return Err("index of another version".into());
    }
    let mut found = HashMap::new();
    for line in lines {
        let file: FileFacts = serde_json::from_str(line).map_err(|error| format!("damaged index: {error}"))?;
        file.validate(facts).map_err(|error| format!("damaged index: {error}"))?;
        found.insert(file.table.path.clone(), file);
    }
    Ok(found)
}

/// Whether the file still is as it was when these facts were found.
pub fn current(file: &FileFacts) -> bool {
    open::stamp(&file.table.path).is_ok_and(|stamp| stamp == (file.table.file_bytes, file.table.modified_ns))
}

/// Writes the index beside its place and renames it.
///
/// # Errors
/// No room or permission.
pub fn save<'a>(path: &Path, facts: &ScanFacts, files: impl Iterator<Item = &'a FileFacts>) -> Result<(), DataError> {
    let failed = |problem: String| DataError::File { path: path.to_owned(), problem };
    let line = |value: serde_json::Result<String>| value.map_err(|error| failed(error.to_string()));
    let mut text = line(serde_json::to_string(&Header { version: VERSION, facts: facts.clone() }))? + "\n";
    for file in files {
        text += &line(serde_json::to_string(file))?;
        text.push('\n');
    }
    let crc32 = libdeflater::crc32(text.as_bytes());
    writeln!(text, "{}", line(serde_json::to_string(&Trailer { crc32 }))?)
        .map_err(|error| failed(error.to_string()))?;
    let beside = path.with_extension(format!("partial-{}", std::process::id()));
    let write = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&beside, &text)?;
        std::fs::rename(&beside, path)
    };
    write().map_err(|error| failed(error.to_string()))
}
