//! YAML text as a tree that remembers lines and columns. Scalars stay text: their type is decided by the key they
//! belong to. Merge keys (`<<: *base`) bring the entries of another mapping after a mapping's own, which win.

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};
use std::collections::HashMap;

/// Bounds that no honest config reaches; they keep hostile files from eating stack or memory.
const MAX_DEPTH: usize = 32;
const MAX_NODES: usize = 100_000;

/// A place in a text; both numbers count from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    pub line: usize,
    pub column: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub at: Mark,
    pub body: Body,
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    /// `plain`: written without quotes, so `true`, `null` and numbers mean themselves.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key: String,
    pub at: Mark,
    pub value: Node,
    /// Brought by a merge key: a key written beside it wins, under whichever name.
    pub merged: bool,
}

/// A mistake and its place.
pub(super) type Fault = (Mark, String);

impl Node {
    pub fn is_null(&self) -> bool {
        matches!(&self.body, Body::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    fn count(&self) -> usize {
        match &self.body {
            Body::Scalar { .. } => 1,
            Body::List(nodes) => 1 + nodes.iter().map(Node::count).sum::<usize>(),
            Body::Map(entries) => 1 + entries.iter().map(|entry| entry.value.count()).sum::<usize>(),
        }
    }
}

/// Parses one YAML document; `None` means an empty text.
pub(super) fn parse(text: &str) -> Result<Option<Node>, Fault> {
    let mut parser = Parser::new_from_str(text);
    let mut builder = Builder::default();
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|e| (mark(e.marker()), format!("not valid YAML: {}", e.info())))?;
        let at = mark(&span.start);
        if matches!(event, Event::StreamEnd) {
            break;
        }
        builder.take(event, at)?;
    }
    Ok(builder.root)
}

fn mark(marker: &Marker) -> Mark {
    Mark { line: marker.line(), column: marker.col() + 1 }
}

enum Frame {
    List { at: Mark, anchor: usize, nodes: Vec<Node> },
    Map { at: Mark, anchor: usize, entries: Vec<Entry>, merges: Vec<Node>, key: Option<Word> },
}

/// A key as written.
struct Word {
    text: String,
    at: Mark,
    /// `<<` without quotes.
    merges: bool,
}

#[derive(Default)]
struct Builder {
    root: Option<Node>,
    stack: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    documents: usize,
    nodes: usize,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, at: Mark) -> Result<(), Fault> {
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err((at, "a second YAML document; a config is one document".into()));
                }
            }
            Event::Scalar(text, style, anchor, _) => {
                let body = Body::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain };
                return self.finish(Node { at, body }, anchor);
            }
            Event::Alias(anchor) => {
                let mut node = self.anchors.get(&anchor).cloned().ok_or((at, "unknown alias".to_string()))?;
                node.at = at;
                return self.finish(node, 0);
            }
            Event::SequenceStart(anchor, _) => return self.open(Frame::List { at, anchor, nodes: Vec::new() }, at),
            Event::MappingStart(anchor, _) => {
                return self.open(Frame::Map { at, anchor, entries: Vec::new(), merges: Vec::new(), key: None }, at);
            }
            Event::SequenceEnd | Event::MappingEnd => return self.close(),
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, frame: Frame, at: Mark) -> Result<(), Fault> {
        if self.stack.len() >= MAX_DEPTH {
            return Err((at, format!("nested deeper than {MAX_DEPTH} levels")));
        }
        self.stack.push(frame);
        Ok(())
    }

    fn close(&mut self) -> Result<(), Fault> {
        match self.stack.pop() {
            Some(Frame::List { at, anchor, nodes }) => self.finish(Node { at, body: Body::List(nodes) }, anchor),
            Some(Frame::Map { at, anchor, mut entries, merges, .. }) => {
                merges.into_iter().try_for_each(|merged| merge(&mut entries, merged))?;
                self.finish(Node { at, body: Body::Map(entries) }, anchor)
            }
            None => Ok(()),
        }
    }

    /// Hangs a complete node below its parent.
    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        self.nodes += node.count();
        if self.nodes > MAX_NODES {
            return Err((node.at, format!("more than {MAX_NODES} values after aliases are followed")));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Frame::List { nodes, .. }) => nodes.push(node),
            Some(Frame::Map { entries, merges, key, .. }) => match key.take() {
                None => *key = Some(key_of(node, entries, merges)?),
                Some(key) if key.merges => merges.push(node),
                Some(key) => entries.push(Entry { key: key.text, at: key.at, value: node, merged: false }),
            },
        }
        Ok(())
    }
}

fn key_of(node: Node, entries: &[Entry], merges: &[Node]) -> Result<Word, Fault> {
    let Body::Scalar { text, plain } = node.body else {
        return Err((node.at, "a key must be a word, not a list or a section".into()));
    };
    if let Some(earlier) = entries.iter().find(|entry| entry.key == text) {
        return Err((node.at, format!("duplicate key {text}: first written on line {}", earlier.at.line)));
    }
    let merges_here = plain && text == "<<";
    if let (true, Some(earlier)) = (merges_here, merges.first()) {
        let line = earlier.at.line;
        return Err((node.at, format!("duplicate key <<: first written on line {line}; merge a list: <<: [*a, *b]")));
    }
    Ok(Word { text, at: node.at, merges: merges_here })
}

/// Adds the entries of a mapping, or of each mapping in a list, that `entries` lacks: earlier ones win.
fn merge(entries: &mut Vec<Entry>, merged: Node) -> Result<(), Fault> {
    match merged.body {
        Body::Map(more) => {
            for entry in more {
                if !entries.iter().any(|known| known.key == entry.key) {
                    entries.push(Entry { merged: true, ..entry });
                }
            }
            Ok(())
        }
        Body::List(nodes) if nodes.iter().all(|node| matches!(node.body, Body::Map(_))) => {
            nodes.into_iter().try_for_each(|node| merge(entries, node))
        }
        _ => Err((merged.at, "<<: expected a section or a list of sections to merge, such as <<: *base".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_aliases_survive() {
        let root = parse("# note\na: &x [1, 'two']\nb:\n  c: *x\n").unwrap().unwrap();
        let Body::Map(entries) = root.body else { panic!("map") };
        assert_eq!((entries[0].at, entries[1].at.line), (Mark { line: 2, column: 1 }, 3));
        let Body::Map(inner) = &entries[1].value.body else { panic!("map") };
        assert_eq!(inner[0].at, Mark { line: 4, column: 3 });
        let Body::List(items) = &inner[0].value.body else { panic!("list") };
        assert!(matches!(&items[1].body, Body::Scalar { text, plain: false } if text == "two"));
    }

    #[test]
    fn empty_text_is_no_document() {
        assert!(parse("").unwrap().is_none());
        assert!(parse("# only a comment\n").unwrap().is_none());
    }

    #[test]
    fn duplicates_bad_syntax_and_second_documents_name_their_line() {
        let (at, text) = parse("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!((at.line, text.as_str()), (3, "duplicate key a: first written on line 1"));
        assert_eq!(parse("a: [1, 2\nb: 3\n").unwrap_err().0.line, 2);
        assert!(parse("a: 1\n---\nb: 2\n").unwrap_err().1.contains("second YAML document"));
    }

    fn merged(text: &str) -> Vec<(String, String)> {
        let Body::Map(entries) = parse(text).unwrap().unwrap().body else { panic!("map") };
        let Body::Map(last) = &entries.last().unwrap().value.body else { panic!("map") };
        let text = |entry: &Entry| match &entry.value.body {
            Body::Scalar { text, .. } => text.clone(),
            _ => "-".into(),
        };
        last.iter().map(|entry| (entry.key.clone(), text(entry))).collect()
    }

    #[test]
    fn merge_keys_bring_what_a_mapping_lacks() {
        let pairs =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Vec<_>>();
        assert_eq!(merged("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"), pairs(&[("y", "3"), ("x", "1")]));
        assert_eq!(merged("a: &a {x: 1}\nb: &b {x: 2, z: 3}\nc:\n  <<: [*a, *b]\n"), pairs(&[("x", "1"), ("z", "3")]));
        assert_eq!(merged("a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b}\n"), pairs(&[("y", "2"), ("x", "1")]));
        // In quotes it is a key like others.
        assert_eq!(merged("a: {\"<<\": 1}\n"), pairs(&[("<<", "1")]));
        for text in ["a: {<<: 1}\n", "a: {<<: [1]}\n", "a: {<<: }\n"] {
            assert!(parse(text).unwrap_err().1.starts_with("<<: expected a section"), "{text}");
        }
        let twice = "a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n";
        assert_eq!(
            parse(twice).unwrap_err(),
            (
                Mark { line: 4, column: 3 },
                "duplicate key <<: first written on line 3; merge a list: <<: [*a, *b]".into()
            )
        );
    }

    #[test]
    fn hostile_files_are_refused() {
        assert!(parse(&"[".repeat(10_000)).is_err());
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..9 {
            let refs = vec![format!("*a{}", i - 1); 10].join(", ");
            bomb += &format!("a{i}: &a{i} [{refs}]\n");
        }
        assert!(parse(&bomb).unwrap_err().1.contains("more than"));
    }
}
