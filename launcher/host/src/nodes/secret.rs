//! The secret that the launchers of a job share, and proofs of it: HMAC-SHA-256 over numbers that each side chose for this meeting.
//!
//! Architecture invariant: the secret itself never leaves the process, nor does anything that shows it.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use spec::contract::shown;
use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use subtle::ConstantTimeEq;

/// Fewest bytes of a secret, most of a file with one.
const LEAST_BYTES: usize = 8;
const MOST_BYTES: u64 = 64 << 10;
const NONCE_BYTES: usize = 32;

/// See [`super::NodePlace::secret`].
#[derive(Clone, PartialEq, Eq)]
pub struct JoinSecret(Vec<u8>);

/// A secret that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error(
        "{from} has {bytes} bytes, a join secret at least {LEAST_BYTES}: make one with `head -c 32 /dev/urandom | base64`"
    )]
    Short { from: String, bytes: usize },
    #[error("the join secret {path} can be read by others: chmod 600 it", path = shown(.0))]
    Open(PathBuf),
    #[error("cannot read the join secret {path}", path = shown(path))]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Side that proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Host,
    Guest,
}

/// Facts that a proof is bound to: it holds in one meeting, for one node and one direction.
#[derive(Clone, Copy, Debug)]
pub(super) struct About<'a> {
    pub side: Side,
    pub job: &'a str,
    pub node_rank: usize,
    /// Numbers of either side.
    pub guest: &'a str,
    pub host: &'a str,
}

impl JoinSecret {
    /// # Errors
    /// It is too short to be one.
    pub fn new(bytes: Vec<u8>) -> Result<Self, SecretError> {
        Self::named("the join secret", bytes)
    }

    fn named(from: &str, bytes: Vec<u8>) -> Result<Self, SecretError> {
        match bytes.len() {
            short @ 0..LEAST_BYTES => Err(SecretError::Short { from: from.to_owned(), bytes: short }),
            _ => Ok(Self(bytes)),
        }
    }

    /// From a file that only this user can read, white space at its end left out; else the value of the variable.
    ///
    /// # Errors
    /// The file cannot be read, others can read it, or it is too short.
    pub fn find(file: Option<&Path>, variable: Option<String>) -> Result<Option<Self>, SecretError> {
        let Some(path) = file else {
            let value = variable.filter(|value| !value.is_empty());
            return value.map(|value| Self::named("HEADROOM_JOIN_SECRET", value.into_bytes())).transpose();
        };
        let read = |source| SecretError::Read { path: path.to_owned(), source };
        let opened = std::fs::File::open(path).map_err(read)?;
        if opened.metadata().map_err(read)?.mode() & 0o077 != 0 {
            return Err(SecretError::Open(path.to_owned()));
        }
        let mut bytes = Vec::new();
        opened.take(MOST_BYTES).read_to_end(&mut bytes).map_err(read)?;
        bytes.truncate(bytes.trim_ascii_end().len());
        Self::named(&format!("the join secret {}", shown(path)), bytes).map(Some)
    }

    /// The secret of the ranks of `job`, which are not to know this one.
    pub fn of_ranks(&self, job: &str) -> String {
        self.proof(&About { side: Side::Host, job, node_rank: 0, guest: "ranks", host: "" })
    }

    fn mac(&self, about: &About) -> Option<Vec<u8>> {
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.0).ok()?;
        let side = match about.side {
            Side::Host => "host",
            Side::Guest => "guest",
        };
        let rank = about.node_rank.to_string();
        for part in ["headroom join 1", side, about.job, &rank, about.guest, about.host] {
            // Lengths keep parts apart.
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part.as_bytes());
        }
        Some(mac.finalize().into_bytes().to_vec())
    }

    pub(super) fn proof(&self, about: &About) -> String {
        hex(&self.mac(about).unwrap_or_default())
    }

    /// In a time that does not depend on where the proof is wrong.
    pub(super) fn holds(&self, about: &About, proof: &str) -> bool {
        let right = self.proof(about);
        !right.is_empty() && same(right.as_bytes(), proof.as_bytes())
    }
}

/// In a time that does not depend on where they differ.
pub fn same(one: &[u8], other: &[u8]) -> bool {
    bool::from(one.ct_eq(other))
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinSecret(…)")
    }
}

/// Numbers that no other meeting has.
pub fn nonce() -> String {
    let mut bytes = [0; NONCE_BYTES];
    let filled = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    if filled.is_err() {
        // A sandbox without the device: time and process are at least never the same twice.
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap_or_default();
        bytes[..16].copy_from_slice(&now.as_nanos().to_le_bytes());
        bytes[16..20].copy_from_slice(&std::process::id().to_le_bytes());
    }
    hex(&bytes)
}

/// Bytes as a text that can be said.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that [`hex`] gave. `None`: it did not.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let one = |pair: &[u8]| match *pair {
        [high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
        _ => None,
    };
    text.as_bytes().chunks(2).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_proof_holds_for_what_it_is_about_alone() {
        let secret = JoinSecret::new(b"correct horse".to_vec()).unwrap();
        let about = About { side: Side::Guest, job: "night", node_rank: 1, guest: "a", host: "b" };
        let proof = secret.proof(&about);
        assert!(secret.holds(&about, &proof));
        for other in [
            About { side: Side::Host, ..about },
            About { job: "day", ..about },
            About { node_rank: 2, ..about },
            About { guest: "ab", host: "", ..about },
            About { host: "c", ..about },
        ] {
            assert!(!secret.holds(&other, &proof), "{other:?}");
        }
        assert!(!secret.holds(&about, "") && !secret.holds(&about, &proof[1..]));
        assert!(!JoinSecret::new(b"another horse".to_vec()).unwrap().holds(&about, &proof));
        assert_ne!(nonce(), nonce());
        assert_eq!(format!("{secret:?}"), "JoinSecret(…)");
    }

    #[test]
    fn bytes_survive_as_text() {
        assert_eq!(unhex(&hex(&[0, 7, 255])), Some(vec![0, 7, 255]));
        assert_eq!((unhex(""), unhex("0"), unhex("+1"), unhex("xy")), (Some(Vec::new()), None, None, None));
    }

    #[test]
    fn ranks_of_each_job_have_a_secret_that_shows_nothing_of_the_launchers() {
        let secret = JoinSecret::new(b"correct horse".to_vec()).unwrap();
        assert_eq!(secret.of_ranks("night"), secret.of_ranks("night"));
        assert_ne!(secret.of_ranks("night"), secret.of_ranks("day"));
        assert!(JoinSecret::new(secret.of_ranks("night").into_bytes()).is_ok());
    }

    #[test]
    fn the_mac_is_that_of_the_standard() {
        // RFC 4231, test case 2.
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(b"Jefe").unwrap();
        mac.update(b"what do ya want for nothing?");
        let text = hex(&mac.finalize().into_bytes());
        assert_eq!(text, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "correct horse\n").unwrap();
        let chmod = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        chmod(0o644);
        let find = || JoinSecret::find(Some(&path), Some("another secret".into()));
        assert!(matches!(find(), Err(SecretError::Open(_))));
        chmod(0o600);
        assert_eq!(find().unwrap(), Some(JoinSecret(b"correct horse".to_vec())));
        std::fs::write(&path, "short").unwrap();
        assert!(find().unwrap_err().to_string().contains("has 5 bytes"));
        assert_eq!(JoinSecret::find(None, None).unwrap(), None);
        assert_eq!(JoinSecret::find(None, Some(String::new())).unwrap(), None);
        assert!(JoinSecret::find(None, Some("short".into())).unwrap_err().to_string().contains("HEADROOM_JOIN_SECRET"));
    }
}
