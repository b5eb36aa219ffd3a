//! Framing of messages on a stream: a little-endian `u32` length, then a body of that many bytes.
//!
//! One framing serves both protocols: control messages have bodies of JSON ([`Json`]), those of the page cache have bodies of
//! bytes ([`super::wire::Binary`]).

use super::MAX_FRAME_BYTES;
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};
use std::marker::PhantomData;

/// Encoding of the bodies of a protocol.
pub trait Codec {
    /// Longest body, bytes.
    const MOST_BYTES: usize;
    type Error: From<TooLong>;
}

/// A codec that writes messages of type `T`.
pub trait Encode<T: ?Sized>: Codec {
    /// Appends the body of a message.
    ///
    /// # Errors
    /// The message has no such form.
    fn write(message: &T, to: &mut Vec<u8>) -> Result<(), Self::Error>;
}

/// A codec that reads messages of type `T`.
pub trait Decode<T>: Codec {
    /// Reads a whole body.
    ///
    /// # Errors
    /// The body is not a message of this type.
    fn read(body: &[u8]) -> Result<T, Self::Error>;
}

/// A body above [`Codec::MOST_BYTES`]. On a stream nothing that follows can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    pub len: usize,
}

/// Why a control message could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream is out of step: nothing after this can be trusted.
    #[error("control frame of {len} bytes, at most {MAX_FRAME_BYTES} are allowed")]
    TooLong { len: usize },
    /// One body was not understood; the stream itself is whole and the next frame can be read.
    #[error("control frame is no known message: {0}")]
    Body(#[from] serde_json::Error),
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
}

impl From<TooLong> for FrameError {
    fn from(TooLong { len }: TooLong) -> Self {
        Self::TooLong { len }
    }
}

/// Bodies of control messages.
#[derive(Debug)]
pub struct Json;

impl Codec for Json {
    const MOST_BYTES: usize = MAX_FRAME_BYTES;
    type Error = FrameError;
}

impl<T: Serialize> Encode<T> for Json {
    fn write(message: &T, to: &mut Vec<u8>) -> Result<(), FrameError> {
        Ok(serde_json::to_writer(to, message)?)
    }
}

impl<T: DeserializeOwned> Decode<T> for Json {
    fn read(body: &[u8]) -> Result<T, FrameError> {
        Ok(serde_json::from_slice(body)?)
    }
}

/// Appends length and body of one message to `to`, which stays as it was after an error.
///
/// # Errors
/// As [`Encode::write`], and [`TooLong`].
pub fn append<C: Encode<T>, T>(message: &T, to: &mut Vec<u8>) -> Result<(), C::Error> {
    let start = to.len();
    to.extend_from_slice(&[0; 4]);
    let written = C::write(message, to).and_then(|()| match to.len() - start - 4 {
        len if len > C::MOST_BYTES => Err(TooLong { len }.into()),
        len => Ok(len),
    });
    match written {
        // The bound is far below u32::MAX.
        Ok(len) => to[start..start + 4].copy_from_slice(&(len as u32).to_le_bytes()),
        Err(_) => to.truncate(start),
    }
    written.map(drop)
}

/// Length and body of one control message, ready to be written.
///
/// # Errors
/// [`FrameError::TooLong`] when the body passes [`MAX_FRAME_BYTES`], [`FrameError::Body`] when it is not JSON.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = Vec::new();
    append::<Json, T>(message, &mut frame)?;
    Ok(frame)
}

/// Writes one control message with a single `write_all` and flushes it.
pub fn write_frame<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), FrameError> {
    to.write_all(&encode(message)?)?;
    Ok(to.flush()?)
}

/// Reads one control message, blocking. `None`: the other side closed between two frames.
///
/// # Errors
/// [`FrameError::Io`] of kind `UnexpectedEof` when the stream ends within a frame.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut head = [0; 4];
    let mut have = 0;
    while have < head.len() {
        match from.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut body = vec![0; checked_len::<Json>(head)?];
    from.read_exact(&mut body)?;
    Json::read(&body).map(Some)
}

/// Takes bytes as they come and gives whole messages, for sockets that do not block.
#[derive(Debug)]
pub struct Decoder<C = Json> {
    bytes: Vec<u8>,
    /// Bytes at the front that were given out already.
    used: usize,
    codec: PhantomData<C>,
}

impl<C> Default for Decoder<C> {
    fn default() -> Self {
        Self { bytes: Vec::new(), used: 0, codec: PhantomData }
    }
}

impl<C: Codec> Decoder<C> {
    pub fn push(&mut self, bytes: &[u8]) {
        if self.used > 0 {
            self.bytes.drain(..self.used);
            self.used = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message; `None`: more bytes are needed.
    ///
    /// # Errors
    /// After the error of a body the frame is skipped, and the next one can be read; [`TooLong`] is final.
    pub fn next_message<T>(&mut self) -> Result<Option<T>, C::Error>
    where
        C: Decode<T>,
    {
        let rest = &self.bytes[self.used..];
        let Some((head, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let len = checked_len::<C>(*head)?;
        let Some(body) = rest.get(..len) else { return Ok(None) };
        self.used += 4 + len;
        C::read(body).map(Some)
    }
}

fn checked_len<C: Codec>(head: [u8; 4]) -> Result<usize, C::Error> {
    let len = u32::from_le_bytes(head) as usize;
    if len > C::MOST_BYTES { Err(TooLong { len }.into()) } else { Ok(len) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::FromRank;

    fn messages() -> Vec<FromRank> {
        vec![
            FromRank::Hello { version: 1, rank: 2 },
            FromRank::Line { text: "ü".repeat(1000) },
            FromRank::Failed { code: 4, step: Some(37), error: "no such file".into() },
            FromRank::Done,
        ]
    }

    #[test]
    fn messages_survive_any_cut_of_the_stream() {
        let stream: Vec<u8> = messages().iter().flat_map(|m| encode(m).unwrap()).collect();
        for piece in [1, 3, 5, 64, stream.len()] {
            let (mut decoder, mut got) = (Decoder::<Json>::default(), Vec::new());
            for bytes in stream.chunks(piece) {
                decoder.push(bytes);
                while let Some(message) = decoder.next_message::<FromRank>().unwrap() {
                    got.push(message);
                }
            }
            assert_eq!(got, messages(), "pieces of {piece} bytes");
        }
    }

    #[test]
    fn blocking_reader_ends_between_frames_and_refuses_a_cut_one() {
        let mut stream = Vec::new();
        for message in messages() {
            write_frame(&mut stream, &message).unwrap();
        }
        let mut from = stream.as_slice();
        let mut got: Vec<FromRank> = Vec::new();
        while let Some(message) = read_frame(&mut from).unwrap() {
            got.push(message);
        }
        assert_eq!(got, messages());
        for cut in [2, 7] {
            let error = read_frame::<FromRank>(&mut &stream[..cut]).unwrap_err();
            assert!(matches!(&error, FrameError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof), "{error}");
        }
    }

    #[test]
    fn a_bad_body_is_skipped_but_a_bad_length_is_final() {
        let mut decoder = Decoder::<Json>::default();
        decoder.push(&[2, 0, 0, 0, b'{', b'}']);
        decoder.push(&encode(&FromRank::Done).unwrap());
        assert!(matches!(decoder.next_message::<FromRank>(), Err(FrameError::Body(_))));
        assert_eq!(decoder.next_message::<FromRank>().unwrap(), Some(FromRank::Done));
        decoder.push(&[255; 8]);
        assert!(matches!(decoder.next_message::<FromRank>(), Err(FrameError::TooLong { len: 0xffff_ffff })));
        let long = FromRank::Line { text: "x".repeat(MAX_FRAME_BYTES) };
        assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    }
}
