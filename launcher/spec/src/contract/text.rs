//! Names of files in messages.

use std::path::Path;

/// Target of log events that every user must see, whatever the level.
pub const USERS: &str = "headroom::users";

/// A path as users read it. One that is not UTF-8 is quoted with its odd bytes escaped, as in `"s1\xFF.hdf5"`, never
/// shown as another name.
pub fn shown(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    path.to_str().map_or_else(|| format!("{path:?}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn names_are_shown_as_they_are() {
        assert_eq!(shown("runs/größe 1"), "runs/größe 1");
        assert_eq!(shown(OsStr::from_bytes(b"d/s\xff.h5")), r#""d/s\xFF.h5""#);
        assert_ne!(shown(OsStr::from_bytes(b"\xfe")), shown(OsStr::from_bytes(b"\xff")));
    }
}
