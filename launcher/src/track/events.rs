//! TensorBoard's event files: `TFRecord` frames that hold `Event` messages.
//!
//! Sources: tensorflow/core/util/event.proto, framework/summary.proto, tensorboard/plugins/hparams/plugin_data.proto and
//! lib/io/record_writer.h.

use super::proto::Message;
use super::{Param, Params};
use host::journal;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Version word that every file begins with.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.START`.
const START: i64 = 1;
/// `DataType.DT_STRING` of a tensor.
const DT_STRING: i64 = 7;

/// An event file that is being written.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

/// State of a run for the plugin of hyper-parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    Success = 1,
    Failure = 2,
    Running = 3,
}

impl EventFile {
    /// Makes a new file in `folder`; its name holds time, host and process, as TensorBoard expects.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(folder: &Path, host: &str) -> io::Result<Self> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let pid = std::process::id();
        for number in 0.. {
            let name = format!("events.out.tfevents.{:010}.{host}.{pid}.{number}", since.as_secs());
            let path = folder.join(name);
            match OpenOptions::new().create_new(true).append(true).open(&path) {
                Ok(file) => {
                    let mut made = Self { file, path };
                    let head = Message::new().double(1, since.as_secs_f64()).text(3, FILE_VERSION);
                    made.write(&[record(&head.into_bytes())])?;
                    return Ok(made);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole records. A full disk is waited for, then the error is the caller's; a record that was written in part is cut off.
    ///
    /// # Errors
    /// No room, no permission.
    pub fn write(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        let bytes = records.concat();
        let length = self.file.metadata()?.len();
        journal::when_there_is_room(journal::SHORT_LIMIT, || {
            self.file.write_all(&bytes).inspect_err(|_| drop(self.file.set_len(length)))
        })
    }
}

/// Frames a message: length and content, each with its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut frame = Vec::with_capacity(data.len() + 16);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(&masked(&length).to_le_bytes());
    frame.extend_from_slice(data);
    frame.extend_from_slice(&masked(data).to_le_bytes());
    frame
}

/// Checksum that is safe to compute over data that holds checksums.
fn masked(data: &[u8]) -> u32 {
    let crc = crc32c::crc32c(data);
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn event(t: f64, step: u64) -> Message {
    Message::new().double(1, t).int(2, i64::try_from(step).unwrap_or(i64::MAX))
}

fn summary(t: f64, step: u64, values: &[Message]) -> Vec<u8> {
    let mut summary = Message::new();
    values.iter().for_each(|value| summary.push(1, value));
    record(&event(t, step).message(5, &summary).into_bytes())
}

/// Numbers at one step. The file keeps 32 bits of each.
pub fn scalars<'a>(t: f64, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> Vec<u8> {
    let values: Vec<Message> =
        values.into_iter().map(|(tag, value)| Message::new().text(1, tag).float(2, value as f32)).collect();
    summary(t, step, &values)
}

/// A picture, as its PNG file.
pub fn image(t: f64, step: u64, tag: &str, png: &[u8]) -> Option<Vec<u8>> {
    let [width, height] = png_size(png)?;
    // Colour space 3: RGB; the file itself says what it holds.
    let image = Message::new().int(1, i64::from(height)).int(2, i64::from(width)).int(3, 3).bytes(4, png);
    Some(summary(t, step, &[Message::new().text(1, tag).message(4, &image)]))
}

/// Width and height by the header of a whole PNG file.
fn png_size(png: &[u8]) -> Option<[u32; 2]> {
    let whole = png.starts_with(b"\x89PNG\r\n\x1a\n") && png.ends_with(b"IEND\xaeB`\x82");
    let number = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?));
    whole.then(|| Some([number(16)?, number(20)?])).flatten()
}

fn of_plugin(tag: &str, plugin: &str, content: Option<&Message>) -> Message {
    let mut data = Message::new().text(1, plugin);
    if let Some(content) = content {
        data = data.message(2, content);
    }
    Message::new().text(1, tag).message(9, &Message::new().message(1, &data))
}

/// Text, shown as Markdown.
pub fn text(t: f64, tag: &str, text: &str) -> Vec<u8> {
    let shape = Message::new().message(2, &Message::new().int(1, 1));
    let tensor = Message::new().int(1, DT_STRING).message(2, &shape).text(8, text);
    summary(t, 0, &[of_plugin(tag, "text", None).message(8, &tensor)])
}

/// The run begins again at `step`: what was written of this and later steps is no longer valid.
pub fn again(t: f64, step: u64) -> Vec<u8> {
    record(&event(t, step).message(7, &Message::new().int(1, START)).into_bytes())
}

/// Hyper-parameters of the run.
pub fn hparams(t: f64, group: &str, params: &Params) -> Vec<u8> {
    let mut info = Message::new();
    for (name, value) in params {
        let value = match value {
            Param::Number(number) => Message::new().double(2, *number),
            Param::Bool(flag) => Message::new().bool(4, *flag),
            Param::Text(text) => Message::new().text(3, text),
        };
        info.push(1, &Message::new().text(1, name).message(2, &value));
    }
    info = info.text(4, group).double(5, t);
    let content = Message::new().message(3, &info);
    summary(t, 0, &[of_plugin("_hparams_/session_start_info", "hparams", Some(&content))])
}

/// Names of the hyper-parameters and of the metrics that the table of runs shows.
pub fn experiment(t: f64, params: &Params, metrics: &[String]) -> Vec<u8> {
    let mut experiment = Message::new().double(3, t);
    for (name, value) in params {
        let kind = match value {
            Param::Text(_) => 1,
            Param::Bool(_) => 2,
            Param::Number(_) => 3,
        };
        experiment.push(4, &Message::new().text(1, name).int(4, kind));
    }
    for tag in metrics {
        experiment.push(5, &Message::new().message(1, &Message::new().text(2, tag)));
    }
    let content = Message::new().message(2, &experiment);
    summary(t, 0, &[of_plugin("_hparams_/experiment", "hparams", Some(&content))])
}

/// End of the run, for the same table.
pub fn session_end(t: f64, end: SessionEnd) -> Vec<u8> {
    let info = Message::new().int(1, end as i64).double(2, t);
    let content = Message::new().message(4, &info);
    summary(t, 0, &[of_plugin("_hparams_/session_end_info", "hparams", Some(&content))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_checksums_of_the_format() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let frame = record(b"abc");
        assert_eq!((frame.len(), &frame[..8], &frame[12..15]), (19, &3u64.to_le_bytes()[..], &b"abc"[..]));
        assert_eq!(frame[8..12], masked(&3u64.to_le_bytes()).to_le_bytes());
        assert_ne!(masked(b"abc"), masked(b"abd"));
    }

    #[test]
    fn files_never_share_a_name_and_begin_with_the_version() {
        let dir = tempfile::tempdir().unwrap();
        let [mut a, b] = [(); 2].map(|()| EventFile::create(dir.path(), "host").unwrap());
        assert_ne!(a.path(), b.path());
        a.write(&[scalars(1.0, 2, [("loss", 0.5)])]).unwrap();
        let bytes = std::fs::read(a.path()).unwrap();
        let first = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert!(bytes[12..12 + first].ends_with(FILE_VERSION.as_bytes()));
        let second = &bytes[12 + first + 4..];
        let length = u64::from_le_bytes(second[..8].try_into().unwrap()) as usize;
        assert_eq!(second.len(), length + 16);
    }

    #[test]
    fn half_a_picture_is_no_picture() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x03\0\0\0\x02".to_vec();
        assert_eq!(image(0.0, 1, "a", &png), None);
        png.extend_from_slice(b"IEND\xaeB`\x82");
        assert_eq!(png_size(&png), Some([3, 2]));
        assert!(image(0.0, 1, "a", &png).is_some());
    }
}
