#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;

/// What a text holds, with scalars as texts.
fn held(text: &str) -> Json {
    fn of(node: &Node) -> Json {
        match &node.value {
            Value::Plain(text) | Value::Text(text) => json!(text),
            Value::List(items) => items.iter().map(of).collect(),
            Value::Map(entries) => entries
                .iter()
                .map(|(key, value)| (key.scalar().unwrap(), of(value)))
                .collect(),
        }
    }
    of(&parse(text).unwrap())
}

fn message(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn aliases_and_merge_keys_are_copies() {
    let text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n\
                d: {<<: [*a, {y: 4, z: 5}]}\ne: {'<<': q}\n";
    let expected = json!({
        "a": {"x": "1", "y": "2"},
        "b": {"x": "1", "y": "2"},
        "c": {"x": "1", "y": "3"},
        "d": {"x": "1", "y": "2", "z": "5"},
        "e": {"<<": "q"},
    });
    assert_eq!(held(text), expected);
    assert_eq!(
        message("a: 1\nb: {<<: 1}"),
        "line 2: `<<` takes a map, or a list of maps"
    );
    assert_eq!(
        message("a: &a\n- *a"),
        "line 2: an alias stands inside of what it means"
    );
}

#[test]
fn what_a_text_may_have_is_bounded() {
    let long = format!("a: &a {}\nb: [{}]", "x".repeat(4000), "*a, ".repeat(70));
    assert_eq!(message(&long), "line 2: aliases make too much of this text");
    let many = format!("a: &a x\nb: [{}]", "*a, ".repeat(MAX_ALIASES + 1));
    assert_eq!(message(&many), "line 2: aliases make too much of this text");
    let nodes = format!("[{}]", "x, ".repeat(MAX_NODES));
    assert!(message(&nodes).contains("more than 20000 values"));
    let deep = |levels| "- ".repeat(levels) + "x";
    assert!(parse(&deep(MAX_DEPTH)).is_ok());
    assert!(parse(&deep(MAX_DEPTH + 1)).is_err());
    let mixed = deep(MAX_DEPTH - 1) + ":\n" + &" ".repeat(2 * MAX_DEPTH);
    assert!(parse(&(mixed.clone() + "x")).is_ok());
    assert!(message(&(mixed + "[x]")).contains("more than 16 levels"));
}

#[test]
fn tags_of_yaml_only() {
    let node = |text: &str| parse(text).unwrap().value;
    assert_eq!(node("!!str 5"), Value::Text("5".into()));
    assert_eq!(node("! 5"), Value::Text("5".into()));
    assert_eq!(node("!!int '5'"), Value::Plain("5".into()));
    assert_eq!(
        message("a: !b c"),
        "line 1: the tag `!b` means nothing here: leave it out"
    );
}

#[test]
fn numbers_are_what_everybody_takes_them_for() {
    let number = |text: &str| parse(text).unwrap().read::<u64>().ok();
    for (text, value) in [("0", 0), ("12", 12), ("0x1F", 31), ("0o17", 15), ("'7'", 7)] {
        assert_eq!(number(text), Some(value), "{text}");
    }
    for text in [
        "010", "+1", "-1", "1_0", "0x", "0x+1", "1.0", "1e3", "", "~",
    ] {
        assert_eq!(number(text), None, "{text}");
    }
    assert_eq!(number(&format!("{}0", u64::MAX)), None);
}

#[test]
fn written_text_is_as_people_write_it() {
    let value = json!({
        "a": [{"b": 1, "c": [true, null]}, [], {}],
        "d": {"e": "x y", "f": "a: b #c"},
        "g": ["007", "64M", "no", "", "/a/b.c", "é\n\u{1b}"],
    });
    let expected = "a:\n- b: 1\n  c:\n  - true\n  - null\n- []\n- {}\n\
                    d:\n  e: x y\n  f: \"a: b #c\"\n\
                    g:\n- \"007\"\n- 64M\n- \"no\"\n- \"\"\n- /a/b.c\n- \"é\\n\\U0000001b\"\n";
    assert_eq!(to_yaml(&value).unwrap(), expected);
}

fn any_json() -> impl Strategy<Value = Json> {
    let text = prop_oneof!["[a-z ~:#'\"0-9<-]{0,6}", any::<String>()];
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        text.clone().prop_map(Json::from),
    ];
    leaf.prop_recursive(5, 40, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Json::from),
            proptest::collection::btree_map(text.clone(), inner, 0..5)
                .prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// Without lines, which a tree from JSON does not have.
fn placeless(node: Node) -> Node {
    let value = match node.value {
        Value::List(items) => Value::List(items.into_iter().map(placeless).collect()),
        Value::Map(entries) => Value::Map(
            entries
                .into_iter()
                .map(|(key, value)| (as_text(&key), placeless(value)))
                .collect(),
        ),
        // Quotes may go where they change nothing.
        Value::Text(text) if text.chars().any(|c| c.is_alphabetic() || c == '/') => {
            Value::Plain(text)
        }
        scalar => scalar,
    };
    Node { line: 0, value }
}

fn as_text(key: &Node) -> Node {
    let value = Value::Text(key.scalar().unwrap().to_owned());
    Node { line: 0, value }
}

proptest! {
    #[test]
    fn what_is_written_reads_the_same(value in any_json()) {
        let node: Node = serde_json::from_value(value.clone()).unwrap();
        let text = to_yaml(&value).unwrap();
        let read = parse(&text);
        prop_assert_eq!(read.map(placeless), Ok(placeless(node)), "{}", text);
    }
}
