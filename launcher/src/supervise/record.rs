//! Error files: where a program under `--exec` writes why it failed, as `torch.distributed.elastic`'s `@record` does.
//!
//! Source: torch/distributed/elastic/multiprocessing/errors/error_handler.py.

use host::scratch::{Holders, hold, sweep};
use serde_json::Value;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Longest file that is read, bytes.
const MOST_BYTES: u64 = 1 << 20;
/// Most lines of a traceback that are shown: its end says what happened.
const MOST_LINES: usize = 12;

/// Behind it stands the number of the launcher's process.
const NAME: &str = "headroom-errors-";

/// A folder with a file per rank; gone when dropped. That of a launcher that was killed goes when the next one starts.
#[derive(Debug)]
pub struct ErrorFiles {
    folder: PathBuf,
    /// The folder, held while its launcher lives; `None`: its file system has no locks, and no launcher removes what another one left.
    _held: Option<File>,
}

impl ErrorFiles {
    /// Makes the folder, for this user alone. `None`: it cannot be made, and nothing is recorded.
    pub fn make() -> Option<Self> {
        let roots = [std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), Some(std::env::temp_dir())];
        let name = format!("{NAME}{}", std::process::id());
        roots.into_iter().flatten().find_map(|root| {
            sweep_killed(&root);
            let folder = root.join(&name);
            // Of an earlier process of this number, or of an attempt before.
            let _ = fs::remove_dir_all(&folder);
            let mut made = false;
            let open = |folder: &Path| {
                match DirBuilder::new().mode(0o700).create(folder) {
                    Ok(()) => made = true,
                    // Made a moment ago: another launcher looks whether anybody holds it.
                    Err(error) if made && error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
                File::open(folder)
            };
            let held = hold(&folder, Holders::One, open).ok();
            (made && folder.is_dir()).then_some(Self { folder, _held: held })
        })
    }

    /// The file of a rank.
    pub fn path(&self, rank: u32) -> PathBuf {
        self.folder.join(format!("rank{rank}.json"))
    }

    /// Lines that the rank wrote; the message first.
    pub fn read(&self, rank: u32) -> Vec<String> {
        let path = self.path(rank);
        if path.metadata().is_ok_and(|meta| meta.len() > MOST_BYTES) {
            return Vec::new();
        }
        let Ok(text) = fs::read(path) else { return Vec::new() };
        serde_json::from_slice(&text).map(|value| lines(&value)).unwrap_or_default()
    }
}

impl Drop for ErrorFiles {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Removes folders of launchers that are gone.
fn sweep_killed(root: &Path) {
    // A folder that cannot be read holds nothing of ours.
    let _ = sweep(root, |name| name.starts_with(NAME), |folder| drop(fs::remove_dir_all(folder)));
}

fn lines(value: &Value) -> Vec<String> {
    // An older form holds the text itself.
    let message = value.get("message").unwrap_or(value);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let Some(what) = message.get("message").and_then(text).or_else(|| text(message)) else { return Vec::new() };
    let stack = message.pointer("/extraInfo/py_callstack").and_then(Value::as_str).unwrap_or_default();
    let stack: Vec<&str> = stack.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut found = vec![format!("recorded: {}", what.lines().next().unwrap_or_default())];
    found.extend(stack[stack.len().saturating_sub(MOST_LINES)..].iter().map(|line| (*line).to_owned()));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_comes_first_then_the_end_of_the_traceback() {
        let stack: String = (0..30).map(|n| format!("line {n}\n")).collect();
        let value = serde_json::json!({"message": {"message": "ValueError: no\nmore",
            "extraInfo": {"py_callstack": stack, "timestamp": "1"}}});
        let found = lines(&value);
        assert_eq!((found.len(), found[0].as_str()), (1 + MOST_LINES, "recorded: ValueError: no"));
        assert_eq!(found.last().map(String::as_str), Some("line 29"));
        assert_eq!(lines(&serde_json::json!({"message": "killed"})), ["recorded: killed"]);
        assert!(lines(&serde_json::json!([1])).is_empty());
    }

    #[test]
    fn the_folder_goes_with_its_owner() {
        let files = ErrorFiles::make().unwrap();
        let path = files.path(3);
        std::fs::write(&path, r#"{"message": {"message": "x"}}"#).unwrap();
        assert_eq!((files.read(3), files.read(4)), (vec!["recorded: x".to_owned()], vec![]));
        // Of a launcher that was killed; that of one that lives stays.
        let left = files.folder.with_file_name(format!("{NAME}killed"));
        std::fs::create_dir_all(left.join("inner")).unwrap();
        sweep_killed(files.folder.parent().unwrap());
        assert!(!left.exists() && path.exists());
        drop(files);
        assert!(!path.exists());
    }
}
