//! The monitor's metrics for others: a file that is replaced whole, or a small HTTP server on loopback or a socket.

use super::openmetrics::{Dialect, render};
use super::view::Look;
use host::journal;
use std::cell::Cell;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest request, bytes; longest time for one.
const REQUEST_BYTES: usize = 8 << 10;
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
/// Time until the next try, where nobody can be let in.
const PAUSE: Duration = Duration::from_millis(100);

/// `--listen`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("unix: needs a path, such as unix:/run/user/1000/headroom.sock".into()),
                path => Ok(Listen::Unix(path.into())),
            };
        }
        let text = text.replace("localhost:", "127.0.0.1:");
        let address: SocketAddr = text.parse().map_err(|_| "expected 127.0.0.1:PORT, [::1]:PORT or unix:PATH")?;
        match address.ip().is_loopback() {
            true => Ok(Listen::Tcp(address)),
            false => {
                Err("metrics are served on this machine alone: give 127.0.0.1:PORT, and let a proxy or an exporter's \
                          textfile bring them elsewhere"
                    .into())
            }
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "http://{address}/metrics"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

type Pages = Arc<Mutex<[String; 2]>>;

/// Where metrics go.
#[derive(Default)]
pub struct Outlets {
    textfile: Option<PathBuf>,
    pages: Option<Pages>,
    socket: Option<PathBuf>,
    /// The last look could not be written.
    failing: Cell<bool>,
}

impl Outlets {
    /// Opens what was asked for; the second value is where it can be read.
    ///
    /// # Errors
    /// The address is taken, or the file's folder may not be written.
    pub fn open(textfile: Option<PathBuf>, listen: Option<&Listen>) -> io::Result<(Self, Option<Listen>)> {
        let mut outlets = Self { textfile, pages: None, socket: None, failing: Cell::new(false) };
        let Some(listen) = listen else { return Ok((outlets, None)) };
        let pages = Pages::default();
        let at = match listen {
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(at(listen))?;
                let bound = listener.local_addr()?;
                let pages = Arc::clone(&pages);
                start(move || {
                    for stream in listener.incoming().filter_map(come) {
                        let _ = stream.set_read_timeout(Some(REQUEST_LIMIT));
                        let _ = stream.set_write_timeout(Some(REQUEST_LIMIT));
                        let _ = answer(stream, &pages);
                    }
                })?;
                Listen::Tcp(bound)
            }
            Listen::Unix(path) => {
                let listener = bind(path).map_err(at(listen))?;
                outlets.socket = Some(path.clone());
                let pages = Arc::clone(&pages);
                start(move || {
                    for stream in listener.incoming().filter_map(come) {
                        let _ = stream.set_read_timeout(Some(REQUEST_LIMIT));
                        let _ = stream.set_write_timeout(Some(REQUEST_LIMIT));
                        let _ = answer(stream, &pages);
                    }
                })?;
                listen.clone()
            }
        };
        outlets.pages = Some(pages);
        Ok((outlets, Some(at)))
    }

    /// Gives out a look. One that finds no room is left out, which is said once: the next one may find some.
    ///
    /// # Errors
    /// The textfile cannot be written, for a reason that does not pass.
    pub fn show(&self, look: &Look) -> io::Result<()> {
        if let Some(pages) = &self.pages {
            let new = [render(look, Dialect::OpenMetrics), render(look, Dialect::Prometheus)];
            *pages.lock().unwrap_or_else(PoisonError::into_inner) = new;
        }
        let Some(path) = &self.textfile else { return Ok(()) };
        // A sibling whose name the collector passes over.
        let sibling = path.with_extension(format!("prom.{}", std::process::id()));
        let text = render(look, Dialect::Prometheus);
        let Err(error) = fs::write(&sibling, text).and_then(|()| fs::rename(&sibling, path)) else {
            self.failing.set(false);
            return Ok(());
        };
        let _ = fs::remove_file(&sibling);
        if !journal::is_passing(&error) {
            return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
        if !self.failing.replace(true) {
            let text = format!("launch: warning: {}: {error}: it stays as it is until there is room", path.display());
            let _ = writeln!(io::stderr(), "{text}");
        }
        Ok(())
    }
}

impl Drop for Outlets {
    /// Values of a monitor that has ended are not to be taken for those of now.
    fn drop(&mut self) {
        for path in self.textfile.iter().chain(&self.socket) {
            let _ = fs::remove_file(path);
        }
    }
}

fn at(listen: &Listen) -> impl FnOnce(io::Error) -> io::Error {
    let text = listen.to_string();
    move |error| io::Error::new(error.kind(), format!("cannot listen on {text}: {error}"))
}

/// A socket that nobody listens on any more is replaced.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            if !is_socket || UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

/// Who came; without a descriptor for them the next one waits a little.
fn come<T>(stream: io::Result<T>) -> Option<T> {
    stream.inspect_err(|_| std::thread::sleep(PAUSE)).ok()
}

fn start(serve: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("metrics".into()).spawn(serve).map(drop)
}

/// Reads one request and answers it. Whoever says too much, or nothing in time, gets nothing.
fn answer(mut stream: impl Read + Write, pages: &Pages) -> io::Result<()> {
    let (began, mut request) = (Instant::now(), Vec::new());
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut bytes = [0; 1024];
        let n = stream.read(&mut bytes)?;
        if n == 0 || request.len() + n > REQUEST_BYTES || began.elapsed() > REQUEST_LIMIT {
            return Ok(());
        }
        request.extend_from_slice(&bytes[..n]);
    }
    let text = String::from_utf8_lossy(&request);
    let mut words = text.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let wants_new = text.lines().any(|line| {
        let line = line.to_ascii_lowercase();
        line.starts_with("accept:") && line.contains("application/openmetrics-text")
    });
    let dialect = if wants_new { Dialect::OpenMetrics } else { Dialect::Prometheus };
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics" | "/") => {
            let page = pages.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(!wants_new)].clone();
            ("200 OK", dialect.content_type(), page)
        }
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "metrics are at /metrics\n".into()),
        _ => ("405 Method Not Allowed", "text/plain", "only GET is answered\n".into()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    if method != "HEAD" {
        stream.write_all(body.as_bytes())?;
    }
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Talk<'a>(&'a [u8], Vec<u8>);

    impl Read for Talk<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }

    impl Write for Talk<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn ask(request: &str) -> String {
        let pages: Pages = Arc::new(Mutex::new(["new".into(), "old".into()]));
        let mut talk = Talk(request.as_bytes(), Vec::new());
        answer(&mut talk, &pages).unwrap();
        String::from_utf8(talk.1).unwrap()
    }

    #[test]
    fn only_whole_requests_for_metrics_are_answered() {
        let page = ask("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
        assert!(
            page.starts_with("HTTP/1.1 200 OK") && page.contains("0.0.4") && page.ends_with("\r\n\r\nold"),
            "{page}"
        );
        let page = ask("GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n");
        assert!(page.contains("openmetrics-text; version=1.0.0") && page.ends_with("new"), "{page}");
        assert!(ask("GET /etc/passwd HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask("POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask("HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        assert_eq!((ask("GET /metrics"), ask(&"x".repeat(20_000))), (String::new(), String::new()));
    }

    #[test]
    fn metrics_stay_on_this_machine() {
        assert_eq!("127.0.0.1:9400".parse(), Ok(Listen::Tcp(([127, 0, 0, 1], 9400).into())));
        assert!(matches!("localhost:0".parse(), Ok(Listen::Tcp(_))));
        assert!(matches!("[::1]:9400".parse(), Ok(Listen::Tcp(_))));
        assert_eq!("unix:/run/a".parse(), Ok(Listen::Unix("/run/a".into())));
        for wrong in ["0.0.0.0:9400", "9400", "unix:", "host:1"] {
            assert!(wrong.parse::<Listen>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_socket_left_behind_is_taken_over_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let listen = Listen::Unix(path.clone());
        let (outlets, _) = Outlets::open(None, Some(&listen)).unwrap();
        assert!(Outlets::open(None, Some(&listen)).is_err());
        let mut stream = UnixStream::connect(&path).unwrap();
        outlets.show(&Look::default()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("headroom_machine_memory_bytes"), "{text}");
        drop(outlets);
        assert!(!path.exists());
        std::fs::write(&path, "a file").unwrap();
        assert!(Outlets::open(None, Some(&listen)).is_err() && path.exists());
    }

    #[test]
    fn a_textfile_is_there_while_the_monitor_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("headroom.prom");
        let (outlets, _) = Outlets::open(Some(path.clone()), None).unwrap();
        outlets.show(&Look::default()).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("headroom_machine_memory_bytes 0\n"));
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
        drop(outlets);
        assert!(!path.exists());
    }

    /// `/dev/full` takes no byte.
    #[test]
    fn a_full_disk_ends_no_monitor_and_a_missing_folder_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.prom");
        let sibling = path.with_extension(format!("prom.{}", std::process::id()));
        std::os::unix::fs::symlink("/dev/full", &sibling).unwrap();
        let (outlets, _) = Outlets::open(Some(path.clone()), None).unwrap();
        outlets.show(&Look::default()).unwrap();
        assert!(outlets.failing.get() && !path.exists());
        outlets.show(&Look::default()).unwrap();
        assert!(!outlets.failing.get() && path.exists());
        let (outlets, _) = Outlets::open(Some(dir.path().join("none/a.prom")), None).unwrap();
        assert!(outlets.show(&Look::default()).is_err());
    }
}
