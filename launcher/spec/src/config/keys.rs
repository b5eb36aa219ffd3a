//! Declarations of keys: the one place where a key's name, doc, type, default, range, unit and other names stand.
//!
//! ```text
//! keys! {
//!     /// The training loop.
//!     #[serde(default, deny_unknown_fields)]
//!     pub struct TrainConfig in "train." {
//!         /// Samples per rank and accumulation step.
//!         batch_size: usize = 64, range = AtLeast(1.0), aliases = &["train.batch"];
//!     }
//!     inert { "train.compile_model" => "there is no graph compiler to switch on"; }
//! }
//! ```
//! [`keys!`](crate::keys) makes the struct with its `Default` and serde, and a [`Section`] from which reading, range checks,
//! nearest keys, `launch help`, configs/README.md and configs/schema.json come.
//!
//! A macro rather than serde with `schemars`: serde stops at the first fault and knows neither its line nor the nearest
//! key, so text would be read by other code in any case; `schemars` knows doc, type and default, but units, other
//! names, inert keys and words such as `num_workers: auto` would be a second list beside the struct.

use super::kind::Kind;
use super::range::Range;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// One key.
#[derive(Debug)]
pub struct Key {
    /// With its sections: `train.batch_size`.
    pub path: &'static str,
    /// First what it means, then details; lines end with `\n`.
    pub doc: &'static str,
    pub kind: Kind,
    pub range: Range,
    /// `s`, `pixels`; empty where the type says all.
    pub unit: &'static str,
    /// Other names, in lower case, with their sections.
    pub aliases: &'static [&'static str],
}

/// A key that is accepted and has no effect.
#[derive(Debug)]
pub struct Inert {
    pub path: &'static str,
    pub why: &'static str,
}

/// Keys that stand together, and sections inside.
pub struct Section {
    /// `train.`, with the dot; empty for the top.
    pub prefix: &'static str,
    pub doc: &'static str,
    pub keys: &'static [Key],
    pub nested: &'static [&'static Section],
    pub inert: &'static [Inert],
    /// Prefix that all these keys had earlier, also accepted.
    pub earlier: Option<&'static str>,
    /// Values of keys that are left out.
    pub defaults: fn() -> Value,
    /// The section as its struct holds it.
    pub normal: fn(&Value) -> Result<Value, String>,
}

impl std::fmt::Debug for Section {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Section").field(&self.name()).finish()
    }
}

/// A struct made by [`keys!`](crate::keys).
pub trait Keys: Default + Serialize + DeserializeOwned {
    const SECTION: &'static Section;
}

impl Key {
    /// A key without range, unit and other names.
    pub const fn new(path: &'static str, doc: &'static str, kind: Kind) -> Self {
        Self { path, doc, kind, range: Range::Any, unit: "", aliases: &[] }
    }

    /// The name without its sections.
    pub fn leaf(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }

    /// `doc` in one line.
    pub fn summary(&self) -> String {
        one_line(self.doc)
    }
}

impl Section {
    /// `train`; empty for the top.
    pub fn name(&self) -> &'static str {
        self.prefix.strip_suffix('.').unwrap_or(self.prefix)
    }

    /// This section and those inside, outer ones first.
    pub fn all(&'static self) -> Vec<&'static Section> {
        let inner = self.nested.iter().flat_map(|section| section.all());
        std::iter::once(self).chain(inner).collect()
    }
}

pub(super) fn one_line(doc: &str) -> String {
    doc.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// JSON of the default, for [`Section::defaults`].
pub fn defaults_of<T: Keys>() -> Value {
    serde_json::to_value(T::default()).unwrap_or_default()
}

/// A round trip through the struct, for [`Section::normal`].
pub fn normal_of<T: Keys>(value: &Value) -> Result<Value, String> {
    let typed = T::deserialize(value).map_err(|e| e.to_string())?;
    serde_json::to_value(typed).map_err(|e| e.to_string())
}

/// Declares a section: see the module. `earlier "model."` after the prefix accepts an older prefix for all its keys;
/// `sections` are structs inside; `also` are fields that are no keys.
#[macro_export]
macro_rules! keys {
    (@option) => { None };
    (@option $some:literal) => { Some($some) };
    (
        $(#[doc = $doc:literal])+
        #[serde($($serde:tt)+)]
        pub struct $name:ident in $prefix:literal $(, earlier $earlier:literal)? {
            $(
                $(#[doc = $key_doc:literal])+
                $key:ident: $type:ty = $default:expr $(, $attribute:ident = $value:expr)*;
            )*
        }
        $(sections { $($field:ident: $inner:ty;)* })?
        $(also { $($(#[$extra_meta:meta])* $extra:ident: $extra_type:ty;)* })?
        $(inert { $($inert:literal => $why:expr;)* })?
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde($($serde)+)]
        pub struct $name {
            $($(#[doc = $key_doc])+ pub $key: $type,)*
            $($(pub $field: $inner,)*)?
            $($($(#[$extra_meta])* pub $extra: $extra_type,)*)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($key: $default,)*
                    $($($field: Default::default(),)*)?
                    $($($extra: Default::default(),)*)?
                }
            }
        }

        impl $crate::config::Keys for $name {
            const SECTION: &'static $crate::config::Section = &$crate::config::Section {
                prefix: $prefix,
                doc: concat!($($doc, "\n"),+),
                keys: &[$($crate::config::Key {
                    $($attribute: $value,)*
                    ..$crate::config::Key::new(
                        concat!($prefix, stringify!($key)),
                        concat!($($key_doc, "\n"),+),
                        <$type as $crate::config::Typed>::KIND,
                    )
                }),*],
                nested: &[$($(<$inner as $crate::config::Keys>::SECTION),*)?],
                inert: &[$($($crate::config::Inert { path: $inert, why: $why }),*)?],
                earlier: $crate::config::keys!(@option $($earlier)?),
                defaults: $crate::config::defaults_of::<$name>,
                normal: $crate::config::normal_of::<$name>,
            };
        }
    };
}

/// Declares an enum whose variants are words of a config, each with its meaning.
#[macro_export]
macro_rules! choices {
    (
        $(#[doc = $doc:literal])+
        pub enum $name:ident {
            $($(#[doc = $word_doc:literal])* $variant:ident = $word:literal),+ $(,)?
        }
    ) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[doc = $word_doc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// The words of all variants.
            pub const WORDS: &[&str] = &[$($word),+];

            /// The variant as a config writes it.
            pub const fn word(self) -> &'static str {
                match self {
                    $($name::$variant => $word,)+
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok($name::$variant),)+
                    _ => Err(format!("expected one of {}", Self::WORDS.join(", "))),
                }
            }
        }

        impl $crate::config::Typed for $name {
            const KIND: $crate::config::Kind =
                $crate::config::Kind::Choice(&[$(($word, concat!($($word_doc, "\n"),*))),+]);
        }
    };
}
