//! configs/schema.json: the keys as JSON Schema (draft 7), for editors.

use super::keys::{Key, Section, one_line};
use super::kind::Kind;
use super::range::Range;
use super::schema::{Alias, PROFILES, Schema};
use super::spelling::SECTION_ALIASES;
use super::stages;
use serde_json::{Map, Value, json};

/// The schema. Spellings in capitals and keys with dots are let through unchecked.
pub fn json_schema(schema: &Schema) -> Value {
    let mut root = object();
    for section in schema.sections() {
        for key in section.keys {
            place(&mut root, key.path, key_schema(key));
        }
        if !section.name().is_empty() {
            describe(&mut root, section);
        }
    }
    for (name, alias) in schema.aliases_sorted() {
        let old = match alias {
            Alias::To(key) => {
                with(kind_schema(&key.kind, key.range), "description", format!("Another name of {}.", key.path))
            }
            Alias::Inert(why) => json!({ "description": format!("No effect: {why}.") }),
        };
        if schema.is_section(name) {
            // A section that another program writes as one value: `data: coco.yaml`.
            let section = &mut root["properties"][name];
            if section.is_null() {
                *section = object();
            }
            section["type"] = json!(["object", "null", "string"]);
        } else {
            place(&mut root, name, with(old, "deprecationMessage", "an old or foreign name"));
        }
    }
    let definitions = take_sections(&mut root);
    for (alias, section) in SECTION_ALIASES {
        root["properties"][alias] = root["properties"][section].clone();
    }
    let stage = root.clone();
    root["properties"][stages::SECTION] = json!({
        "description": "Values laid over the others for one stage of the task.",
        "type": ["object", "null"], "additionalProperties": { "$ref": "#/definitions/stage" },
    });
    let profile = root.clone();
    let profiles: Map<String, Value> =
        PROFILES.iter().map(|name| (name.to_string(), json!({ "$ref": "#/definitions/profile" }))).collect();
    root["properties"]["profiles"] = json!({
        "description": "Values laid over the others for one kind of device.",
        "type": ["object", "null"], "properties": profiles, "additionalProperties": false,
    });
    root["$schema"] = json!("http://json-schema.org/draft-07/schema#");
    root["title"] = json!("A config of Headroom");
    root["definitions"] = Value::Object(definitions);
    root["definitions"]["profile"] = profile;
    root["definitions"]["stage"] = stage;
    root["definitions"]["number"] = json!({ "type": "string", "pattern": "^[-+]?[0-9._]+([eE][-+]?[0-9]+)?$" });
    root
}

/// Moves the top sections of `root` into definitions, which profiles share.
fn take_sections(root: &mut Value) -> Map<String, Value> {
    let mut definitions = Map::new();
    for (name, property) in root["properties"].as_object_mut().into_iter().flatten() {
        if property.get("properties").is_some() {
            let reference = json!({ "$ref": format!("#/definitions/{name}") });
            definitions.insert(name.clone(), std::mem::replace(property, reference));
        }
    }
    definitions
}

fn object() -> Value {
    json!({
        "type": ["object", "null"],
        "properties": {},
        "patternProperties": { "\\.|^[A-Z_0-9]+$|^<<$": true },
        "additionalProperties": false,
    })
}

/// Puts `what` at `path`, making sections on the way.
fn place(root: &mut Value, path: &str, what: Value) {
    let mut at = root;
    let mut words = path.split('.').peekable();
    while let Some(word) = words.next() {
        let slot = &mut at["properties"][word];
        if words.peek().is_none() {
            *slot = what;
            return;
        }
        if slot.is_null() {
            *slot = object();
        }
        at = slot;
    }
}

fn describe(root: &mut Value, section: &Section) {
    let pointer: String = section.name().split('.').map(|word| format!("/properties/{word}")).collect();
    if let Some(object) = root.pointer_mut(&pointer) {
        object["description"] = json!(one_line(section.doc));
    }
}

fn key_schema(key: &Key) -> Value {
    let unit = if key.unit.is_empty() { String::new() } else { format!(" Unit: {}.", key.unit) };
    with(kind_schema(&key.kind, key.range), "description", key.summary() + &unit)
}

fn with(mut schema: Value, word: &str, value: impl Into<Value>) -> Value {
    schema[word] = value.into();
    schema
}

fn kind_schema(kind: &Kind, range: Range) -> Value {
    let ranged = |kind: &str| {
        let mut schema = Map::from_iter([("type".to_string(), json!(kind))]);
        range.restrict(&mut schema);
        Value::Object(schema)
    };
    // YAML readers disagree on `1e-4`: some take it for text.
    let number = |name: &str| json!({ "anyOf": [ranged(name), { "$ref": "#/definitions/number" }] });
    match kind {
        Kind::Text | Kind::Word | Kind::Path | Kind::Metric => match ranged("string") {
            Value::Object(fields) if fields.len() > 1 => Value::Object(fields),
            _ => json!({ "type": ["string", "number", "boolean"] }),
        },
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Whole => number("integer"),
        Kind::Number => number("number"),
        Kind::Bytes | Kind::Size => json!({ "type": ["integer", "string"] }),
        Kind::Optional(kind) => json!({ "anyOf": [kind_schema(kind, range), { "type": "null" }, { "const": "auto" }] }),
        Kind::Choice(words) => {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            json!({ "anyOf": [{ "enum": words }, { "type": ["boolean", "null"] }] })
        }
        Kind::Rates => {
            let list = json!({ "type": "array", "items": number("number"), "uniqueItems": true });
            json!({ "anyOf": [number("number"), list, { "type": "null" }] })
        }
        Kind::Numbers(count) => {
            json!({ "type": "array", "items": number("number"), "minItems": count, "maxItems": count })
        }
        Kind::Values => json!({ "type": ["object", "null"] }),
        Kind::List(kind) => json!({ "type": "array", "items": kind_schema(kind, range) }),
        Kind::Record(section) => {
            let keys: Map<String, Value> = section.keys.iter().map(|key| (key.path.into(), key_schema(key))).collect();
            let needed: Vec<&str> = section.keys.iter().map(|key| key.path).collect();
            json!({ "type": "object", "properties": keys, "required": needed, "additionalProperties": false })
        }
    }
}
