//! From a tree to text: a line for each scalar, lists with `- `, and quotes where a text without them
//! would be read as something else.

use std::fmt::Write;

use super::{Node, Value};

/// Spaces of a level.
const INDENT: usize = 2;

/// The text of a tree.
pub(super) fn text(node: &Node) -> String {
    let mut out = String::new();
    write_node(&mut out, node, 0);
    out
}

/// Writes a node whose own line has begun, its further lines from column `indent` on.
fn write_node(out: &mut String, node: &Node, indent: usize) {
    match &node.value {
        Value::List(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                begin_line(out, indent, i);
                out.push_str("- ");
                write_node(out, item, indent + INDENT);
            }
        }
        Value::Map(entries) if !entries.is_empty() => {
            for (i, (key, value)) in entries.iter().enumerate() {
                begin_line(out, indent, i);
                write_scalar(out, key);
                out.push(':');
                write_value(out, value, indent);
            }
        }
        Value::List(_) => out.push_str("[]\n"),
        Value::Map(_) => out.push_str("{}\n"),
        Value::Plain(_) | Value::Text(_) => {
            write_scalar(out, node);
            out.push('\n');
        }
    }
}

/// Writes the value of a key at column `indent`: on the same line if it is one.
fn write_value(out: &mut String, value: &Node, indent: usize) {
    let (further, indent) = match &value.value {
        Value::List(items) => (!items.is_empty(), indent),
        Value::Map(entries) => (!entries.is_empty(), indent + INDENT),
        Value::Plain(_) | Value::Text(_) => (false, indent),
    };
    if further {
        let _ = write!(out, "\n{:indent$}", "");
    } else {
        out.push(' ');
    }
    write_node(out, value, indent);
}

/// Begins the line of the `i`-th part of a node; that of the first has begun.
fn begin_line(out: &mut String, indent: usize, i: usize) {
    if i > 0 {
        let _ = write!(out, "{:indent$}", "");
    }
}

fn write_scalar(out: &mut String, node: &Node) {
    match &node.value {
        Value::Plain(text) => out.push_str(text),
        Value::Text(text) if is_plain(text) => out.push_str(text),
        Value::Text(text) => write_quoted(out, text),
        Value::List(_) | Value::Map(_) => {}
    }
}

/// Whether a text is the same without quotes, for every reader of YAML: that is, made of harmless
/// characters, and no number, truth, date or the like. A size like 512M is a text.
fn is_plain(text: &str) -> bool {
    let harmless = |c: char| c.is_alphanumeric() || "/._-+@%=".contains(c);
    let words = [
        "true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan",
    ];
    let size = text.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or_default();
    if !size.is_empty() && size.bytes().all(|c| c.is_ascii_digit()) {
        return true;
    }
    text.starts_with(|c: char| c.is_alphabetic() || c == '/')
        && text
            .split(' ')
            .all(|word| !word.is_empty() && word.chars().all(harmless))
        && !words.iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Writes a text between double quotes, in ASCII where it isn't plainly visible.
fn write_quoted(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            c if c.is_alphanumeric() => out.push(c),
            c => {
                let _ = write!(out, "\\U{:08x}", u32::from(c));
            }
        }
    }
    out.push('"');
}
