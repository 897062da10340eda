//! The `key=value,key=value` syntax of flags, read into the same types as files.
//!
//! Grammar: items separated by commas; an item is `key=value`, or `key` alone for a yes. The first
//! item may be the value of the flag's main key, without the key. A comma inside a value is
//! written twice. A key given several times makes a list where the type wants one.

mod value;

use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{self, DeserializeOwned};

use crate::keys::{shorten, unknown};
use value::Values;

/// Why a flag's text can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FlagError(String);

impl de::Error for FlagError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(unknown("key", field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self(unknown("value", variant, expected))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("the key `{field}` is missing: add {field}=VALUE"))
    }
}

/// The keys of a flag in the order of their first mention, with their values.
#[derive(Debug, Default)]
pub(crate) struct Items(Vec<(String, Vec<Option<String>>)>);

impl Items {
    /// Splits `text`; `main` is the key of a first item that has none.
    pub(crate) fn parse(text: &str, main: &str) -> Result<Self, FlagError> {
        let mut items = Self::default();
        for (index, item) in split(text).into_iter().enumerate() {
            match item.split_once('=') {
                Some(("", _)) => {
                    let item = shorten(&item);
                    return Err(FlagError(format!(
                        "`{item}` lacks its key: write key=value"
                    )));
                }
                Some((key, value)) => items.add(key, Some(value)),
                None if item.is_empty() => {
                    return Err(FlagError(
                        "nothing stands around a comma: write a comma of a value twice".to_owned(),
                    ));
                }
                None if index == 0 => items.add(main, Some(&item)),
                None => items.add(&item, None),
            }
        }
        Ok(items)
    }

    fn add(&mut self, key: &str, value: Option<&str>) {
        let value = value.map(ToOwned::to_owned);
        match self.0.iter_mut().find(|item| item.0 == key) {
            Some((_, values)) => values.push(value),
            None => self.0.push((key.to_owned(), vec![value])),
        }
    }

    /// Takes the values of `key` out.
    pub(crate) fn take(&mut self, key: &str) -> Option<Vec<Option<String>>> {
        let index = self.0.iter().position(|item| item.0 == key)?;
        Some(self.0.remove(index).1)
    }

    /// Reads a type from the keys that are left.
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<T, FlagError> {
        let items = self.0.into_iter().map(|(key, values)| {
            let values = Values {
                key: key.clone(),
                values,
            };
            (key, values)
        });
        T::deserialize(MapDeserializer::new(items))
    }
}

/// Splits at single commas; two commas are one that belongs to the value.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(letter);
        }
    }
    items
}

/// Makes a text of a value: each comma is written twice.
#[must_use]
pub fn escape_value(value: &str) -> String {
    value.replace(',', ",,")
}

/// Implements `FromStr` by the syntax of flags with the main key given.
macro_rules! impl_flag {
    ($($kind:ty: $main:literal),* $(,)?) => {$(
        impl std::str::FromStr for $kind {
            type Err = FlagError;

            fn from_str(text: &str) -> Result<Self, FlagError> {
                Items::parse(text, $main)?.read()
            }
        }
    )*};
}

impl_flag! {
    crate::ChannelConfig: "name",
    crate::CpuConfig: "count",
    crate::MemoryConfig: "size",
    crate::DiskConfig: "path",
    crate::ImageConfig: "path",
    crate::NetConfig: "type",
}

/// `file=PATH` stands for the file of the output.
impl std::str::FromStr for crate::ConsoleConfig {
    type Err = FlagError;

    fn from_str(text: &str) -> Result<Self, FlagError> {
        let mut items = Items::parse(text, "output")?;
        let file = items.take("file");
        let Some(mut paths) = file else {
            return items.read();
        };
        let (Some(Some(path)), true) = (paths.pop(), paths.is_empty()) else {
            return Err(FlagError(
                "`file` needs one path: write file=PATH".to_owned(),
            ));
        };
        if items.take("output").is_some() {
            return Err(FlagError(
                "a console goes to one place: leave out file=PATH".to_owned(),
            ));
        }
        let output = crate::ConsoleOutput::File(path.into());
        Ok(Self {
            output,
            ..items.read()?
        })
    }
}

#[cfg(test)]
mod tests;
