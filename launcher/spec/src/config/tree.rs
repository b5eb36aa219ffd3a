//! YAML text as a tree that remembers lines. Scalars stay text: their type is decided by the key they belong to.

use saphyr_parser::{Event, Parser, ScalarStyle};
use std::collections::HashMap;

/// Bounds that no honest config reaches; they keep hostile files from eating stack or memory.
const MAX_DEPTH: usize = 32;
const MAX_NODES: usize = 100_000;

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub line: usize,
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
    pub line: usize,
    pub value: Node,
}

/// A mistake at a line.
pub(super) type Fault = (usize, String);

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

/// Parses one YAML document; `None` where there is none.
pub(super) fn parse(text: &str) -> Result<Option<Node>, Fault> {
    let mut parser = Parser::new_from_str(text);
    let mut builder = Builder::default();
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|e| (e.marker().line(), format!("not valid YAML: {}", e.info())))?;
        let line = span.start.line();
        if matches!(event, Event::StreamEnd) {
            break;
        }
        builder.take(event, line)?;
    }
    Ok(builder.root)
}

enum Frame {
    List { line: usize, anchor: usize, nodes: Vec<Node> },
    Map { line: usize, anchor: usize, entries: Vec<Entry>, key: Option<(String, usize)> },
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
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), Fault> {
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err((line, "a second YAML document; a config is one document".into()));
                }
            }
            Event::Scalar(text, style, anchor, _) => {
                let body = Body::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain };
                return self.finish(Node { line, body }, anchor);
            }
            Event::Alias(anchor) => {
                let mut node = self.anchors.get(&anchor).cloned().ok_or((line, "unknown alias".to_string()))?;
                node.line = line;
                return self.finish(node, 0);
            }
            Event::SequenceStart(anchor, _) => {
                return self.open(Frame::List { line, anchor, nodes: Vec::new() }, line);
            }
            Event::MappingStart(anchor, _) => {
                return self.open(Frame::Map { line, anchor, entries: Vec::new(), key: None }, line);
            }
            Event::SequenceEnd | Event::MappingEnd => return self.close(),
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, frame: Frame, line: usize) -> Result<(), Fault> {
        if self.stack.len() >= MAX_DEPTH {
            return Err((line, format!("nested deeper than {MAX_DEPTH} levels")));
        }
        self.stack.push(frame);
        Ok(())
    }

    fn close(&mut self) -> Result<(), Fault> {
        match self.stack.pop() {
            Some(Frame::List { line, anchor, nodes }) => self.finish(Node { line, body: Body::List(nodes) }, anchor),
            Some(Frame::Map { line, anchor, entries, .. }) => {
                self.finish(Node { line, body: Body::Map(entries) }, anchor)
            }
            None => Ok(()),
        }
    }

    /// Hangs a complete node below its parent.
    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        self.nodes += node.count();
        if self.nodes > MAX_NODES {
            return Err((node.line, format!("more than {MAX_NODES} values after aliases are followed")));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Frame::List { nodes, .. }) => nodes.push(node),
            Some(Frame::Map { entries, key, .. }) => match key.take() {
                None => *key = Some(key_of(node, entries)?),
                Some((key, line)) => entries.push(Entry { key, line, value: node }),
            },
        }
        Ok(())
    }
}

fn key_of(node: Node, entries: &[Entry]) -> Result<(String, usize), Fault> {
    let Body::Scalar { text, .. } = node.body else {
        return Err((node.line, "a key must be a word, not a list or a section".into()));
    };
    if let Some(earlier) = entries.iter().find(|entry| entry.key == text) {
        return Err((node.line, format!("duplicate key {text}: first written on line {}", earlier.line)));
    }
    Ok((text, node.line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_aliases_survive() {
        let root = parse("# note\na: &x [1, 'two']\nb:\n  c: *x\n").unwrap().unwrap();
        let Body::Map(entries) = root.body else { panic!("map") };
        assert_eq!((entries[0].line, entries[1].line), (2, 3));
        let Body::Map(inner) = &entries[1].value.body else { panic!("map") };
        assert_eq!(inner[0].line, 4);
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
        let (line, text) = parse("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!((line, text.as_str()), (3, "duplicate key a: first written on line 1"));
        assert_eq!(parse("a: [1, 2\nb: 3\n").unwrap_err().0, 2);
        assert!(parse("a: 1\n---\nb: 2\n").unwrap_err().1.contains("second YAML document"));
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
