//! Facts about unchanged files, kept from run to run, so that the next start reads no samples.
//!
//! `emg-<key>.jsonl`: a header line, one line per file, a last line with the CRC-32 of all before. Anything unexpected in it
//! means that files are scanned again, never an error.

use super::scan::{FileFacts, ScanFacts};
use crate::data::DataError;
use crate::data::source::Identity;
use libdeflater::Crc;
use serde::{Deserialize, Serialize};
use spec::contract::shown;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Raised when the scan finds out something else. An index of another version is made anew.
const VERSION: u32 = 3;
/// Longest line that is read.
const MAX_LINE_BYTES: u64 = 256 << 20;

#[derive(PartialEq, Serialize, Deserialize)]
struct Header {
    version: u32,
    facts: ScanFacts,
}

/// An index of any version.
#[derive(Deserialize)]
struct AnyHeader {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct Trailer {
    crc32: u32,
}

/// Where facts that were found under `facts` about files below `root` are kept.
pub fn path(index_dir: &Path, facts: &ScanFacts, root: &Path) -> PathBuf {
    let mut key = serde_json::to_vec(facts).unwrap_or_default();
    key.extend_from_slice(root.as_os_str().as_bytes());
    index_dir.join(format!("emg-{:08x}.jsonl", libdeflater::crc32(&key)))
}

/// Facts about those files for which `wanted` holds, as they were then. An index that is missing or of another version is
/// empty; so is a damaged one, with a warning. Read line by line: with tens of thousands of files its text is never in memory
/// as a whole.
pub fn load(path: &Path, facts: &ScanFacts, wanted: impl Fn(&Path) -> bool) -> HashMap<PathBuf, FileFacts> {
    let Ok(file) = File::open(path) else {
        return HashMap::new();
    };
    parse(BufReader::new(file), facts, wanted).unwrap_or_else(|problem| {
        tracing::warn!("{}: {problem}: files are scanned again", shown(path));
        HashMap::new()
    })
}

/// Each line is taken in when the next one shows that it was not the last, which holds the checksum of all before.
fn parse(
    mut text: impl BufRead,
    facts: &ScanFacts,
    wanted: impl Fn(&Path) -> bool,
) -> Result<HashMap<PathBuf, FileFacts>, String> {
    let mut found = HashMap::new();
    let mut crc32 = Crc::new();
    let (mut line, mut next) = (Vec::new(), Vec::new());
    let mut header = true;
    read_line(&mut text, &mut line)?;
    loop {
        read_line(&mut text, &mut next)?;
        if next.is_empty() {
            break;
        }
        crc32.update(&line);
        if std::mem::take(&mut header) {
            let version = serde_json::from_slice(&line).map(|AnyHeader { version }| version);
            if version.is_ok_and(|version| version != VERSION) {
                return Ok(HashMap::new());
            }
            let found: Option<Header> = serde_json::from_slice(&line).ok();
            if found != Some(Header { version: VERSION, facts: facts.clone() }) {
                return Err("damaged index, or one of other settings".into());
            }
        } else {
            let file: FileFacts = serde_json::from_slice(&line).map_err(|error| format!("damaged index: {error}"))?;
            file.validate(facts).map_err(|error| format!("damaged index: {error}"))?;
            if wanted(&file.table.path) {
                found.insert(file.table.path.clone(), file);
            }
        }
        std::mem::swap(&mut line, &mut next);
    }
    if header {
        return Err("damaged index, too short".into());
    }
    let whole = line.strip_suffix(b"\n").and_then(|line| serde_json::from_slice(line).ok());
    let trailer: Trailer = whole.ok_or("damaged index, cut at its end")?;
    if trailer.crc32 != crc32.sum() {
        return Err("damaged index, checksum does not match".into());
    }
    Ok(found)
}

/// Replaces `line`; empty at the end of the text.
fn read_line(text: &mut impl BufRead, line: &mut Vec<u8>) -> Result<(), String> {
    line.clear();
    // A line of a file with a million chunks is about 30 MB.
    text.take(MAX_LINE_BYTES).read_until(b'\n', line).map_err(|error| error.to_string())?;
    if line.len() as u64 == MAX_LINE_BYTES {
        return Err(format!("damaged index, a line of {MAX_LINE_BYTES} bytes or more"));
    }
    Ok(())
}

/// The file, and each other file that holds rows of it, still is as it was when these facts were found: neither path, size nor
/// times say so alone, since an archive may restore all of them with other content.
pub fn current(file: &FileFacts) -> bool {
    let same = |path: &Path, known: &Identity| Identity::now(path).is_ok_and(|now| now == *known);
    same(&file.table.path, &file.identity) && file.table.others.iter().all(|other| same(&other.path, &other.identity))
}

/// Writes the index beside its place and renames it.
///
/// # Errors
/// No room or permission.
pub fn save<'a>(path: &Path, facts: &ScanFacts, files: impl Iterator<Item = &'a FileFacts>) -> Result<(), DataError> {
    let beside = path.with_extension(format!("partial-{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut out = BufWriter::new(File::create(&beside)?);
        let mut crc32 = Crc::new();
        let mut line = serde_json::to_vec(&Header { version: VERSION, facts: facts.clone() })?;
        let mut files = files;
        loop {
            line.push(b'\n');
            crc32.update(&line);
            out.write_all(&line)?;
            let Some(file) = files.next() else { break };
            line.clear();
            serde_json::to_writer(&mut line, file)?;
        }
        serde_json::to_writer(&mut out, &Trailer { crc32: crc32.sum() })?;
        out.write_all(b"\n")?;
        out.flush()?;
        drop(out);
        std::fs::rename(&beside, path)
    };
    write().map_err(|error| DataError::File { path: path.to_owned(), problem: error.to_string() })
}
