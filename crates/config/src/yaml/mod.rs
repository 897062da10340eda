//! YAML 1.2 as configuration files use it, with JSON as a part of it.
//!
//! A text becomes a tree of [`Node`]s, each with its line, and the tree becomes a configuration
//! (read.rs) or text again (write.rs). For serde every format is one more copy of the code of each
//! type: with the tree there is one copy for all texts, and the YAML library for serde, whose copies
//! were the largest part of the program, is not needed.
//!
//! Scalars are what the type makes of them, so `name: 007` is a text and `count: 0x2` a number. Left
//! out: keys that are not scalars, and tags but those of YAML itself.

mod build;
mod read;
mod write;

use serde::Serialize;

pub(crate) use build::parse;

/// Deepest nesting of a text.
const MAX_DEPTH: usize = 16;
/// Most nodes of a text.
const MAX_NODES: usize = 20_000;
/// Most aliases of a text.
const MAX_ALIASES: usize = 100;
/// Most nodes and bytes that aliases may copy.
const MAX_COPIED: usize = 256 << 10;

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// Line where it begins, from 1; 0 when it is not from a text.
    line: u64,
    value: Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    /// A scalar without quotes: a number, a truth, nothing or a text, as the type has it.
    Plain(String),
    /// A scalar with quotes, or a block of text.
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

impl Node {
    /// The text of a scalar.
    fn scalar(&self) -> Option<&str> {
        match &self.value {
            Value::Plain(text) | Value::Text(text) => Some(text),
            Value::List(_) | Value::Map(_) => None,
        }
    }

    fn is_null(&self) -> bool {
        matches!(&self.value, Value::Plain(text)
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// What a copy takes: nodes and bytes of text.
    fn weight(&self) -> usize {
        1 + match &self.value {
            Value::Plain(text) | Value::Text(text) => text.len(),
            Value::List(items) => items.iter().map(Node::weight).sum(),
            Value::Map(entries) => entries
                .iter()
                .map(|(key, value)| key.weight() + value.weight())
                .sum(),
        }
    }
}

/// Writes YAML, in the order of `value`.
///
/// # Errors
///
/// When it can't be told in text, as a path that isn't UTF-8.
pub fn to_yaml(value: &impl Serialize) -> Result<String, String> {
    let json = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    let node: Node = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    Ok(write::text(&node))
}

#[cfg(test)]
mod tests;
