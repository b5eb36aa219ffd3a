//! Images of all splits: their files, labels, and pixels at the size of training.
//!
//! Architecture invariant: pixels of an image are the same whether the page cache holds its file, its pixels or nothing; so
//! memory decides about speed, never about results.

use super::labels::Row;
use super::letterbox::fitted;
use crate::data::entries::{CachedEntries, EntrySource};
use crate::data::source::chunks::{Chunk, ChunkKey, ChunkStore, LruChunks};
use crate::data::source::file_error;
use crate::data::source::picture::{self, Header, resize::resize, shrink_for};
use crate::data::source::video::image::ImageSize;
use crate::data::{DataError, Scratch};
use cache::client::{Held, Reading};
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

/// An image of the data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    pub path: PathBuf,
    pub header: Header,
    pub bytes: u64,
    pub modified: (i64, i64),
    /// Pixels are those of a decoder of full size.
    pub exact: bool,
}

impl Image {
    /// Bytes of memory that decoding takes: the file and its pixels, which are copied where EXIF says that they are turned.
    pub fn decoding_bytes(&self) -> u64 {
        let copies = if self.header.orientation > 1 { 2 } else { 1 };
        self.bytes + copies * self.header.size.bytes() as u64
    }
}

/// Content of entries of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Files.
    Encoded,
    /// Pixels, `[h, w, 3]`.
    Resized,
}

/// Images of all splits, numbered through.
pub struct Store {
    pub imgsz: usize,
    pub content: Content,
    images: Vec<Image>,
    rows: Vec<Row>,
    /// Beginnings of the images' rows, and the end.
    ends: Vec<usize>,
    /// Pixels that this rank keeps for mosaics.
    kept: LruChunks,
}

/// Pixels of an image, wherever they lie.
pub enum Pixels<'a> {
    Cached(Held<'a>),
    Kept(Arc<Chunk>),
    Own(Vec<u8>),
}

impl Deref for Pixels<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Pixels::Cached(held) => held,
            Pixels::Kept(chunk) => &chunk.bytes,
            Pixels::Own(pixels) => pixels,
        }
    }
}

impl Store {
    /// `kept`: bytes of pixels that this rank keeps, smaller while `is_short`.
    pub fn new(
        images: Vec<(Image, Vec<Row>)>,
        imgsz: usize,
        content: Content,
        (kept, is_short): (u64, impl Fn() -> bool + Send + Sync + 'static),
    ) -> Self {
        let mut ends = vec![0];
        let (mut rows, mut all) = (Vec::new(), Vec::with_capacity(images.len()));
        for (image, mut of) in images {
            rows.append(&mut of);
            ends.push(rows.len());
            all.push(image);
        }
        Self { imgsz, content, images: all, rows, ends, kept: LruChunks::new(kept).small_while(is_short) }
    }

    pub fn image(&self, number: usize) -> &Image {
        &self.images[number]
    }

    /// Boxes of an image.
    pub fn rows(&self, number: usize) -> &[Row] {
        &self.rows[self.ends[number]..self.ends[number + 1]]
    }

    /// Size of an image's pixels: its longest side is `imgsz`.
    pub fn size(&self, number: usize) -> ImageSize {
        fitted(self.images[number].header.size, self.imgsz)
    }

    /// Bytes of an image's entry.
    pub fn bytes(&self, number: usize) -> u64 {
        match self.content {
            Content::Encoded => self.images[number].bytes,
            Content::Resized => self.size(number).bytes() as u64,
        }
    }

    /// Pixels of an image. `keeps`: others will want them soon.
    ///
    /// # Errors
    /// Its file cannot be read, has changed, or is damaged.
    pub fn pixels<'a>(
        &'a self,
        number: usize,
        cached: Option<&'a CachedEntries<Store>>,
        keeps: bool,
        scratch: &mut Scratch,
    ) -> Result<Pixels<'a>, DataError> {
        let in_cache = self.content == Content::Resized && cached.is_some();
        if let (true, Some(cached)) = (in_cache, cached)
            && let Reading::Held(held) = cached.read_or_lend(number as u64, (0..0, u64::MAX), scratch)?
        {
            return Ok(Pixels::Cached(held));
        }
        if !keeps {
            return Ok(Pixels::Own(self.decoded(number, cached, scratch)?));
        }
        let key = ChunkKey { file: 0, chunk: number as u32 };
        let mut fill = || Ok(Chunk { bytes: self.decoded(number, cached, scratch)?.into() });
        Ok(Pixels::Kept(self.kept.get(key, &mut fill)?))
    }

    /// Forgets pixels that are kept for speed.
    pub fn give_back(&self) {
        self.kept.clear();
    }

    fn decoded(
        &self,
        number: usize,
        cached: Option<&CachedEntries<Store>>,
        scratch: &mut Scratch,
    ) -> Result<Vec<u8>, DataError> {
        let mut out = Vec::new();
        let cached = cached.filter(|_| self.content == Content::Encoded);
        if let Some(cached) = cached
            && let Reading::Held(held) = cached.read_or_lend(number as u64, (0..0, u64::MAX), scratch)?
        {
            self.decode(number, &held, &mut out)?;
            return Ok(out);
        }
        let mut file = std::mem::take(&mut scratch.raw);
        let read = self.read_file(number, &mut file).and_then(|()| self.decode(number, &file, &mut out));
        scratch.raw = file;
        read.map(|()| out)
    }

    /// Bytes of the file, which must be the one that was looked at.
    fn read_file(&self, number: usize, into: &mut Vec<u8>) -> Result<(), DataError> {
        let Image { path, bytes, modified, .. } = &self.images[number];
        let failed = |error: std::io::Error| file_error(path, error.to_string());
        let mut file = File::open(path).map_err(failed)?;
        let facts = file.metadata().map_err(failed)?;
        if (facts.len(), (facts.mtime(), facts.mtime_nsec())) != (*bytes, *modified) {
            return Err(file_error(path, "changed since the run began: start again"));
        }
        into.clear();
        file.read_to_end(into).map_err(failed)?;
        if into.len() as u64 != *bytes {
            return Err(file_error(path, "changed while it was read: start again"));
        }
        Ok(())
    }

    fn decode(&self, number: usize, file: &[u8], out: &mut Vec<u8>) -> Result<(), DataError> {
        let Image { path, header, exact, .. } = &self.images[number];
        let shrink = if *exact { 1 } else { shrink_for(header.size, self.imgsz) };
        let rgb = picture::decode(path, file, header, shrink)?;
        let size = self.size(number);
        if rgb.size == size {
            *out = rgb.pixels;
        } else {
            resize(&rgb.pixels, rgb.size, size, out);
        }
        Ok(())
    }
}

impl EntrySource for Store {
    fn entry_bytes(&self, key: u64) -> u64 {
        self.bytes(key as usize)
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        let number = key as usize;
        let mut file = std::mem::take(&mut scratch.raw);
        let mut pixels = std::mem::take(&mut scratch.decoded);
        let read = self.read_file(number, &mut file).and_then(|()| {
            if self.content == Content::Resized {
                self.decode(number, &file, &mut pixels)?;
            }
            out.copy_from_slice(if self.content == Content::Resized { &pixels } else { &file });
            Ok(())
        });
        (scratch.raw, scratch.decoded) = (file, pixels);
        scratch.count();
        read
    }
}
