//! Bytes of the page cache's messages ([`super::cache`] has the format), the same code on both sides.

use super::cache::{CacheStats, FromDirectory, Grant, Item, ToDirectory};
use super::frame::{Codec, Decode, Encode, TooLong, append};

/// Longest body of a frame, bytes: some 40,000 items.
pub const MAX_CACHE_FRAME_BYTES: usize = 1 << 20;

/// Why bytes are no message. The stream is out of step afterwards: nothing that follows can be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("cache frame of {len} bytes, at most {MAX_CACHE_FRAME_BYTES} are allowed: send fewer keys per message")]
    TooLong { len: usize },
    #[error("cache frame of an unknown kind {0}")]
    Kind(u8),
    #[error("cache frame of kind {kind} ends after {len} bytes, within its fields")]
    Short { kind: u8, len: usize },
    #[error("cache frame of kind {kind} has {extra} bytes after its last field")]
    Long { kind: u8, extra: usize },
    #[error("cache frame of kind {kind} holds the impossible value {value} in `{field}`")]
    Value { kind: u8, field: &'static str, value: u8 },
}

/// A message that has a binary form.
pub trait Message: Sized {
    /// Kind and fields, without the length.
    fn write(&self, to: &mut Vec<u8>);
    /// Takes kind and fields from a whole body.
    ///
    /// # Errors
    /// The body is no message of this type.
    fn read(body: &[u8]) -> Result<Self, WireError>;
}

impl From<TooLong> for WireError {
    fn from(TooLong { len }: TooLong) -> Self {
        Self::TooLong { len }
    }
}

/// Bodies of the page cache's messages. Written by hand: derived codecs were measured, and took 13 % more time per look-up
/// (postcard, `scripts/bench directory`).
#[derive(Debug)]
pub struct Binary;

impl Codec for Binary {
    const MOST_BYTES: usize = MAX_CACHE_FRAME_BYTES;
    type Error = WireError;
}

impl<T: Message> Encode<T> for Binary {
    fn write(message: &T, to: &mut Vec<u8>) -> Result<(), WireError> {
        message.write(to);
        Ok(())
    }
}

impl<T: Message> Decode<T> for Binary {
    fn read(body: &[u8]) -> Result<T, WireError> {
        T::read(body)
    }
}

/// Takes bytes of the page cache's stream as they come and gives whole messages.
pub type Decoder = super::frame::Decoder<Binary>;

/// Appends one frame to `to`.
///
/// # Errors
/// [`WireError::TooLong`]; `to` is then as it was.
pub fn encode<T: Message>(message: &T, to: &mut Vec<u8>) -> Result<(), WireError> {
    append::<Binary, T>(message, to)
}

/// Fields of one body, in order.
struct Fields<'a> {
    kind: u8,
    len: usize,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn of(body: &'a [u8]) -> Result<Self, WireError> {
        let (kind, rest) = body.split_first().ok_or(WireError::Short { kind: 0, len: 0 })?;
        Ok(Self { kind: *kind, len: body.len(), rest })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(WireError::Short { kind: self.kind, len: self.len })?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A list of items that take at least `least` bytes each: what the body cannot hold is not reserved.
    fn list<T>(
        &mut self,
        least: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u32()? as usize;
        if count > self.rest.len() / least {
            return Err(WireError::Short { kind: self.kind, len: self.len });
        }
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(item(self)?);
        }
        Ok(list)
    }

    fn item(&mut self) -> Result<Item, WireError> {
        let (key, bytes, next_use) = (self.u64()?, self.u64()?, self.u64()?);
        let offer = match self.u8()? {
            0 => false,
            1 => true,
            value => return Err(WireError::Value { kind: self.kind, field: "offer", value }),
        };
        Ok(Item { key, bytes, next_use, offer })
    }

    fn grant(&mut self) -> Result<Grant, WireError> {
        Ok(match self.u8()? {
            0 => Grant::Ready { offset: self.u64()?, bytes: self.u64()? },
            1 => Grant::Fill { offset: self.u64()?, bytes: self.u64()? },
            2 => Grant::Wait,
            3 => Grant::Bypass,
            value => return Err(WireError::Value { kind: self.kind, field: "grant", value }),
        })
    }

    fn stats(&mut self) -> Result<CacheStats, WireError> {
        Ok(CacheStats {
            capacity_bytes: self.u64()?,
            used_bytes: self.u64()?,
            entries: self.u64()?,
            hits: self.u64()?,
            misses: self.u64()?,
            evictions: self.u64()?,
            bypasses: self.u64()?,
        })
    }

    fn end<T>(self, message: T) -> Result<T, WireError> {
        match self.rest.len() {
            0 => Ok(message),
            extra => Err(WireError::Long { kind: self.kind, extra }),
        }
    }
}

fn put(to: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| to.extend_from_slice(&value.to_le_bytes()));
}

/// A longer list makes a body beyond the bound, which `encode` refuses.
fn put_len(to: &mut Vec<u8>, len: usize) {
    to.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_items(to: &mut Vec<u8>, ticket: u64, items: &[Item]) {
    put(to, &[ticket]);
    put_len(to, items.len());
    for item in items {
        put(to, &[item.key, item.bytes, item.next_use]);
        to.push(item.offer.into());
    }
}

fn put_grant(to: &mut Vec<u8>, grant: &Grant) {
    match grant {
        Grant::Ready { offset, bytes } => {
            to.push(0);
            put(to, &[*offset, *bytes]);
        }
        Grant::Fill { offset, bytes } => {
            to.push(1);
            put(to, &[*offset, *bytes]);
        }
        Grant::Wait => to.push(2),
        Grant::Bypass => to.push(3),
    }
}

impl Message for ToDirectory {
    fn write(&self, to: &mut Vec<u8>) {
        match self {
            ToDirectory::Hello { version, rank } => {
                to.push(1);
                to.extend_from_slice(&version.to_le_bytes());
                to.extend_from_slice(&rank.to_le_bytes());
            }
            ToDirectory::Acquire { ticket, items } => {
                to.push(2);
                put_items(to, *ticket, items);
            }
            ToDirectory::Publish { keys } => {
                to.push(3);
                put_len(to, keys.len());
                put(to, keys);
            }
            ToDirectory::Abandon { keys } => {
                to.push(4);
                put_len(to, keys.len());
                put(to, keys);
            }
            ToDirectory::Release { keys } => {
                to.push(5);
                put_len(to, keys.len());
                keys.iter().for_each(|(key, next_use)| put(to, &[*key, *next_use]));
            }
            ToDirectory::Stats { ticket } => {
                to.push(6);
                put(to, &[*ticket]);
            }
            ToDirectory::Again { ticket, items } => {
                to.push(7);
                put_items(to, *ticket, items);
            }
            ToDirectory::Resized { ticket } => {
                to.push(8);
                put(to, &[*ticket]);
            }
            ToDirectory::Registers => to.push(9),
            ToDirectory::Open { ticket, items } => {
                to.push(10);
                put_items(to, *ticket, items);
            }
            ToDirectory::Find { ticket, items } => {
                to.push(11);
                put_items(to, *ticket, items);
            }
            ToDirectory::Enlarge { ticket, key, bytes } => {
                to.push(12);
                put(to, &[*ticket, *key, *bytes]);
            }
            ToDirectory::Length { keys } => {
                to.push(13);
                put_len(to, keys.len());
                keys.iter().for_each(|(key, bytes)| put(to, &[*key, *bytes]));
            }
            ToDirectory::Hits { count } => {
                to.push(14);
                put(to, &[*count]);
            }
        }
    }

    fn read(body: &[u8]) -> Result<Self, WireError> {
        let mut f = Fields::of(body)?;
        let message = match f.kind {
            1 => ToDirectory::Hello { version: f.u32()?, rank: f.u32()? },
            2 => ToDirectory::Acquire { ticket: f.u64()?, items: f.list(25, Fields::item)? },
            3 => ToDirectory::Publish { keys: f.list(8, Fields::u64)? },
            4 => ToDirectory::Abandon { keys: f.list(8, Fields::u64)? },
            5 => ToDirectory::Release { keys: f.list(16, |f| Ok((f.u64()?, f.u64()?)))? },
            6 => ToDirectory::Stats { ticket: f.u64()? },
            7 => ToDirectory::Again { ticket: f.u64()?, items: f.list(25, Fields::item)? },
            8 => ToDirectory::Resized { ticket: f.u64()? },
            9 => ToDirectory::Registers,
            10 => ToDirectory::Open { ticket: f.u64()?, items: f.list(25, Fields::item)? },
            11 => ToDirectory::Find { ticket: f.u64()?, items: f.list(25, Fields::item)? },
            12 => ToDirectory::Enlarge { ticket: f.u64()?, key: f.u64()?, bytes: f.u64()? },
            13 => ToDirectory::Length { keys: f.list(16, |f| Ok((f.u64()?, f.u64()?)))? },
            14 => ToDirectory::Hits { count: f.u64()? },
            kind => return Err(WireError::Kind(kind)),
        };
        f.end(message)
    }
}

impl Message for FromDirectory {
    fn write(&self, to: &mut Vec<u8>) {
        match self {
            FromDirectory::Granted { ticket, grants } => {
                to.push(17);
                put(to, &[*ticket]);
                put_len(to, grants.len());
                grants.iter().for_each(|grant| put_grant(to, grant));
            }
            FromDirectory::Settled { key, grant } => {
                to.push(18);
                put(to, &[*key]);
                put_grant(to, grant);
            }
            FromDirectory::Stats { ticket, stats } => {
                to.push(19);
                put(to, &[*ticket, stats.capacity_bytes, stats.used_bytes, stats.entries]);
                put(to, &[stats.hits, stats.misses, stats.evictions, stats.bypasses]);
            }
            FromDirectory::Resize { ticket, bytes } => {
                to.push(20);
                put(to, &[*ticket, *bytes]);
            }
            FromDirectory::Present { bytes } => {
                to.push(21);
                put(to, &[*bytes]);
            }
            FromDirectory::Full => to.push(22),
        }
    }

    fn read(body: &[u8]) -> Result<Self, WireError> {
        let mut f = Fields::of(body)?;
        let message = match f.kind {
            17 => FromDirectory::Granted { ticket: f.u64()?, grants: f.list(1, Fields::grant)? },
            18 => FromDirectory::Settled { key: f.u64()?, grant: f.grant()? },
            19 => FromDirectory::Stats { ticket: f.u64()?, stats: f.stats()? },
            20 => FromDirectory::Resize { ticket: f.u64()?, bytes: f.u64()? },
            21 => FromDirectory::Present { bytes: f.u64()? },
            22 => FromDirectory::Full,
            kind => return Err(WireError::Kind(kind)),
        };
        f.end(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to_directory() -> impl Strategy<Value = ToDirectory> {
        let item = any::<(u64, u64, u64, bool)>().prop_map(|(key, bytes, next_use, offer)| Item {
            key,
            bytes,
            next_use,
            offer,
        });
        let keys = || prop::collection::vec(any::<u64>(), 0..40);
        prop_oneof![
            any::<(u32, u32)>().prop_map(|(version, rank)| ToDirectory::Hello { version, rank }),
            (any::<u64>(), prop::collection::vec(item, 0..40)).prop_flat_map(|(ticket, items)| {
                let again = ToDirectory::Again { ticket, items: items.clone() };
                let open = ToDirectory::Open { ticket, items: items.clone() };
                let find = ToDirectory::Find { ticket, items: items.clone() };
                prop_oneof![Just(ToDirectory::Acquire { ticket, items }), Just(again), Just(open), Just(find)]
            }),
            keys().prop_map(|keys| ToDirectory::Publish { keys }),
            keys().prop_map(|keys| ToDirectory::Abandon { keys }),
            prop::collection::vec(any::<(u64, u64)>(), 0..40).prop_map(|keys| ToDirectory::Release { keys }),
            any::<u64>().prop_map(|ticket| ToDirectory::Stats { ticket }),
            any::<(u64, u64, u64)>().prop_map(|(ticket, key, bytes)| ToDirectory::Enlarge { ticket, key, bytes }),
            prop::collection::vec(any::<(u64, u64)>(), 0..40).prop_map(|keys| ToDirectory::Length { keys }),
            any::<u64>().prop_map(|ticket| ToDirectory::Resized { ticket }),
            Just(ToDirectory::Registers),
            any::<u64>().prop_map(|count| ToDirectory::Hits { count }),
        ]
    }

    fn from_directory() -> impl Strategy<Value = FromDirectory> {
        let grant = || {
            prop_oneof![
                any::<(u64, u64)>().prop_map(|(offset, bytes)| Grant::Ready { offset, bytes }),
                any::<(u64, u64)>().prop_map(|(offset, bytes)| Grant::Fill { offset, bytes }),
                Just(Grant::Wait),
                Just(Grant::Bypass),
            ]
        };
        let stats = any::<[u64; 7]>().prop_map(|n| CacheStats {
            capacity_bytes: n[0],
            used_bytes: n[1],
            entries: n[2],
            hits: n[3],
            misses: n[4],
            evictions: n[5],
            bypasses: n[6],
        });
        prop_oneof![
            (any::<u64>(), prop::collection::vec(grant(), 0..40))
                .prop_map(|(ticket, grants)| FromDirectory::Granted { ticket, grants }),
            (any::<u64>(), grant()).prop_map(|(key, grant)| FromDirectory::Settled { key, grant }),
            (any::<u64>(), stats).prop_map(|(ticket, stats)| FromDirectory::Stats { ticket, stats }),
            any::<(u64, u64)>().prop_map(|(ticket, bytes)| FromDirectory::Resize { ticket, bytes }),
            any::<u64>().prop_map(|bytes| FromDirectory::Present { bytes }),
            Just(FromDirectory::Full),
        ]
    }

    /// Sends `messages` in pieces of `piece` bytes and reads them back.
    fn through<T: Message>(messages: &[T], piece: usize) -> Vec<T> {
        let mut stream = Vec::new();
        messages.iter().for_each(|message| encode(message, &mut stream).unwrap());
        let (mut decoder, mut got) = (Decoder::default(), Vec::new());
        for bytes in stream.chunks(piece) {
            decoder.push(bytes);
            while let Some(message) = decoder.next_message().unwrap() {
                got.push(message);
            }
        }
        got
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(
            up in prop::collection::vec(to_directory(), 0..8),
            down in prop::collection::vec(from_directory(), 0..8),
            piece in 1usize..200,
        ) {
            prop_assert_eq!(through(&up, piece), up);
            prop_assert_eq!(through(&down, piece), down);
        }

        #[test]
        fn any_body_is_refused_or_means_itself(kind in 0u8..24, body in prop::collection::vec(any::<u8>(), 0..120)) {
            let body = [&[kind], body.as_slice()].concat();
            let mut again = Vec::new();
            if let Ok(message) = ToDirectory::read(&body) {
                message.write(&mut again);
            } else if let Ok(message) = FromDirectory::read(&body) {
                message.write(&mut again);
            } else {
                return Ok(());
            }
            prop_assert_eq!(again, body);
        }

        #[test]
        fn a_damaged_stream_never_panics(
            messages in prop::collection::vec(to_directory(), 1..5), at in any::<prop::sample::Index>(), byte: u8,
        ) {
            let mut stream = Vec::new();
            messages.iter().for_each(|message| encode(message, &mut stream).unwrap());
            let at = at.index(stream.len());
            stream[at] = byte;
            let mut decoder = Decoder::default();
            decoder.push(&stream);
            while let Ok(Some(_)) = decoder.next_message::<ToDirectory>() {}
        }
    }

    #[test]
    fn a_list_longer_than_its_body_reserves_nothing() {
        let mut body = vec![3];
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(ToDirectory::read(&body), Err(WireError::Short { kind: 3, len: 5 }));
    }

    #[test]
    fn lengths_are_bounded_on_both_sides() {
        let mut to = vec![7];
        let keys = vec![0; MAX_CACHE_FRAME_BYTES / 8];
        assert!(matches!(encode(&ToDirectory::Publish { keys }, &mut to), Err(WireError::TooLong { .. })));
        assert_eq!(to, [7]);
        let mut decoder = Decoder::default();
        decoder.push(&[255; 4]);
        assert_eq!(decoder.next_message::<ToDirectory>(), Err(WireError::TooLong { len: 0xffff_ffff }));
    }
}
