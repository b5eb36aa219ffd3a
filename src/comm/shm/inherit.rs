//! Takes over the sockets that the launcher left open for this process.
#![allow(unsafe_code)]

use std::io::{self, ErrorKind};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

/// Every inherited socket that was taken: its number, and which socket it was.
static TAKEN: Mutex<Vec<(RawFd, String)>> = Mutex::new(Vec::new());

/// Owns the inherited socket number `fd` from now on, closed on exec. Works once per socket.
///
/// # Errors
/// The number is a standard stream, not open, not a socket, or it or its socket was taken before.
pub fn inherited_socket(fd: RawFd) -> io::Result<UnixStream> {
    let refuse = |problem: String| Err(io::Error::new(ErrorKind::InvalidInput, problem));
    if fd <= 2 {
        return refuse(format!("descriptor {fd} is a standard stream or negative, expected a socket"));
    }
    let what = match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(link) => link.to_string_lossy().into_owned(),
        Err(e) => return refuse(format!("descriptor {fd} is not open in this process: {e}")),
    };
    if !what.starts_with("socket:") {
        return refuse(format!("descriptor {fd} is {what}, expected a socket"));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.iter().any(|(number, socket)| *number == fd || *socket == what) {
        return refuse(format!("descriptor {fd}: this socket was taken before"));
    }
    taken.push((fd, what));
    drop(taken);
    // SAFETY: the number is open and a socket (checked above); it was named by the launcher through the environment for
    // this use alone, so no other value in this process owns it, and TAKEN lets this line run once per number.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(UnixStream::from(owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn takes_a_socket_once_and_nothing_else() {
        assert!(inherited_socket(1).unwrap_err().to_string().contains("standard stream"));
        assert!(inherited_socket(99_999).unwrap_err().to_string().contains("not open"));
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert!(inherited_socket(file.as_raw_fd()).unwrap_err().to_string().contains("expected a socket"));

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut taken = inherited_socket(ours.into_raw_fd()).unwrap();
        taken.write_all(b"hi").unwrap();
        let mut got = [0; 2];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hi");
        assert!(inherited_socket(taken.as_raw_fd()).unwrap_err().to_string().contains("taken before"));
        let (other, _kept) = UnixStream::pair().unwrap();
        let again = other.try_clone().unwrap();
        assert!(inherited_socket(other.into_raw_fd()).is_ok());
        assert!(inherited_socket(again.into_raw_fd()).unwrap_err().to_string().contains("taken before"));
    }
}
