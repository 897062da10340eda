//! From the events of a YAML parser to a tree.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Tag, options};

use super::{MAX_ALIASES, MAX_COPIED, MAX_DEPTH, MAX_NODES, Node, Value};
use crate::file::ConfigTextError;
use crate::keys::shorten;

/// The key whose value lends its own entries to the map around it.
const MERGE: &str = "<<";

/// Reads a text with one document; no document is an empty map.
///
/// # Errors
///
/// When it isn't YAML, or there is more in it than a configuration can have.
pub(crate) fn parse(text: &str) -> Result<Node, ConfigTextError> {
    let options = options! {
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    let mut tree = Tree::default();
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|error| {
            let message = error.kind().to_string();
            wrong(error.marker().line() as u64, message)
        })?;
        tree.take(event, span.start.line() as u64)?;
    }
    Ok(tree.root.unwrap_or(Node {
        line: 1,
        value: Value::Map(Vec::new()),
    }))
}

fn wrong(line: u64, message: impl Into<String>) -> ConfigTextError {
    let message = message.into();
    ConfigTextError { line, message }
}

/// A tree that grows.
#[derive(Debug, Default)]
struct Tree {
    /// Lists and maps that go on, the outermost first.
    open: Vec<Open>,
    root: Option<Node>,
    nodes: usize,
    aliases: usize,
    copied: usize,
    /// What aliases stand for, by the parser's number.
    anchors: HashMap<usize, Node>,
}

#[derive(Debug)]
struct Open {
    node: Node,
    anchor: usize,
    /// The last key of a map, whose value comes next.
    key: Option<Node>,
}

impl Tree {
    fn take(&mut self, event: Event<'_>, line: u64) -> Result<(), ConfigTextError> {
        match event {
            Event::DocumentStart(..) if self.root.is_some() => {
                Err(wrong(line, "a second document begins: remove it"))
            }
            Event::Scalar(text, style, anchor, tag) => {
                let text = text.into_owned();
                let value = if is_plain(style, tag.as_deref(), line)? {
                    Value::Plain(text)
                } else {
                    Value::Text(text)
                };
                self.count(line)?;
                self.put(Node { line, value }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                known(tag.as_deref(), line)?;
                self.begin(line, Value::List(Vec::new()), anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                known(tag.as_deref(), line)?;
                self.begin(line, Value::Map(Vec::new()), anchor)
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::Alias(anchor) => {
                let node = self.resolve(anchor, line)?;
                self.put(node, 0)
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, line: u64) -> Result<(), ConfigTextError> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(wrong(
                line,
                format!("there is more than {MAX_NODES} values"),
            ));
        }
        Ok(())
    }

    fn begin(&mut self, line: u64, value: Value, anchor: usize) -> Result<(), ConfigTextError> {
        self.count(line)?;
        if self.open.len() >= MAX_DEPTH {
            let message = format!("there is more than {MAX_DEPTH} levels within each other");
            return Err(wrong(line, message));
        }
        self.open.push(Open {
            node: Node { line, value },
            anchor,
            key: None,
        });
        Ok(())
    }

    fn end(&mut self) -> Result<(), ConfigTextError> {
        let Some(Open {
            mut node, anchor, ..
        }) = self.open.pop()
        else {
            return Ok(());
        };
        if let Value::Map(entries) = &mut node.value {
            merge(entries)?;
        }
        self.put(node, anchor)
    }

    /// A copy of what an alias stands for.
    fn resolve(&mut self, anchor: usize, line: u64) -> Result<Node, ConfigTextError> {
        let node = self.anchors.get(&anchor);
        let node = node.ok_or_else(|| wrong(line, "an alias stands inside of what it means"))?;
        self.aliases += 1;
        self.copied += node.weight();
        if self.aliases > MAX_ALIASES || self.copied > MAX_COPIED {
            return Err(wrong(line, "aliases make too much of this text"));
        }
        Ok(node.clone())
    }

    /// Puts a whole node where it belongs.
    fn put(&mut self, node: Node, anchor: usize) -> Result<(), ConfigTextError> {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.node.value {
            Value::List(items) => items.push(node),
            Value::Map(entries) => match open.key.take() {
                Some(key) => entries.push((key, node)),
                None => open.key = Some(new_key(entries, node)?),
            },
            Value::Plain(_) | Value::Text(_) => {}
        }
        Ok(())
    }
}

/// A key that the map doesn't have yet.
fn new_key(entries: &[(Node, Node)], key: Node) -> Result<Node, ConfigTextError> {
    let Some(text) = key.scalar() else {
        return Err(wrong(key.line, "a text is needed here"));
    };
    if has(entries, text) {
        let message = format!("the key `{}` stands twice: remove one", shorten(text));
        return Err(wrong(key.line, message));
    }
    Ok(key)
}

fn has(entries: &[(Node, Node)], key: &str) -> bool {
    entries.iter().any(|(known, _)| known.scalar() == Some(key))
}

/// Replaces a merge key by the entries of its map or maps that are not there without it; of several
/// maps the first counts.
fn merge(entries: &mut Vec<(Node, Node)>) -> Result<(), ConfigTextError> {
    let is_merge = |(key, _): &(Node, Node)| matches!(&key.value, Value::Plain(it) if it == MERGE);
    let Some(at) = entries.iter().position(is_merge) else {
        return Ok(());
    };
    let (_, lender) = entries.remove(at);
    let lenders = match lender.value {
        Value::List(lenders) => lenders,
        value => vec![Node { value, ..lender }],
    };
    for Node { line, value } in lenders {
        let Value::Map(lent) = value else {
            return Err(wrong(line, "`<<` takes a map, or a list of maps"));
        };
        for (key, value) in lent {
            if key.scalar().is_some_and(|key| !has(entries, key)) {
                entries.push((key, value));
            }
        }
    }
    Ok(())
}

/// Whether a scalar may be something else than a text.
fn is_plain(style: ScalarStyle, tag: Option<&Tag>, line: u64) -> Result<bool, ConfigTextError> {
    match tag {
        None => Ok(style == ScalarStyle::Plain),
        Some(tag) if tag.original() == "!" => Ok(false),
        Some(_) => Ok(known(tag, line)? != Some("str")),
    }
}

/// The name of a tag, which must be one of YAML's own.
fn known(tag: Option<&Tag>, line: u64) -> Result<Option<&str>, ConfigTextError> {
    let Some(tag) = tag else {
        return Ok(None);
    };
    let name = tag.core_suffix().ok_or_else(|| {
        let tag = shorten(&tag.original());
        wrong(
            line,
            format!("the tag `{tag}` means nothing here: leave it out"),
        )
    })?;
    Ok(Some(name))
}
