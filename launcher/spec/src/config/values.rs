//! Values under keys that the user chooses.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A section whose keys the user chooses, such as arguments of a function of the user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Values(pub Map<String, Value>);
