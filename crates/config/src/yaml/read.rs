//! From a tree to a type.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::{Node, Value};
use crate::file::ConfigTextError;
use crate::keys::unknown;

impl Node {
    /// Reads a type.
    ///
    /// # Errors
    ///
    /// When the text is no description of it.
    pub(crate) fn read<T: de::DeserializeOwned>(self) -> Result<T, ConfigTextError> {
        self.seeded(PhantomData)
    }

    /// Reads what `seed` is for; an error that doesn't say where is at this node.
    fn seeded<'de, T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, ConfigTextError> {
        let line = self.line;
        seed.deserialize(self).map_err(|error| error.at(line))
    }

    fn wrong(&self, message: impl Into<String>) -> ConfigTextError {
        let (line, message) = (self.line, message.into());
        ConfigTextError { line, message }
    }

    /// The text of a scalar that isn't null.
    fn into_text(self) -> Result<String, ConfigTextError> {
        match self.value {
            _ if self.is_null() => Err(self.wrong("a text is needed here")),
            Value::Plain(text) | Value::Text(text) => Ok(text),
            Value::List(_) | Value::Map(_) => Err(self.wrong("a text is needed here")),
        }
    }

    /// The number that a scalar is: decimal, or hexadecimal or octal with its prefix.
    fn number(&self) -> Option<u64> {
        let text = self.scalar()?;
        match text.as_bytes() {
            [b'0', b'x', ..] => digits(text.get(2..)?, 16),
            [b'0', b'o', ..] => digits(text.get(2..)?, 8),
            // Elsewhere a number like this is octal: nobody knows what is meant.
            [b'0', _, ..] => None,
            _ => digits(text, 10),
        }
    }

    fn truth(&self) -> Option<bool> {
        match self.scalar()? {
            "true" | "True" | "TRUE" => Some(true),
            "false" | "False" | "FALSE" => Some(false),
            _ => None,
        }
    }
}

/// A number without a sign.
fn digits(text: &str, radix: u32) -> Option<u64> {
    let first = text.chars().next()?;
    first.is_digit(radix).then_some(())?;
    u64::from_str_radix(text, radix).ok()
}

impl ConfigTextError {
    /// The error, which is at `line` if it does not say where.
    fn at(mut self, line: u64) -> Self {
        if self.line == 0 {
            self.line = line;
        }
        self
    }
}

impl de::Error for ConfigTextError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self {
            line: 0,
            message: message.to_string(),
        }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(unknown("key", field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(unknown("value", variant, expected))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::custom(format_args!("the key `{field}` is missing"))
    }
}

/// Implements the methods for unsigned numbers.
macro_rules! numbers {
    ($($method:ident $visit:ident $kind:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            let number = self.number().and_then(|number| <$kind>::try_from(number).ok());
            let number = number.ok_or_else(|| {
                self.wrong(format!("write a whole number from 0 to {}", <$kind>::MAX))
            })?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> Deserializer<'de> for Node {
    type Error = ConfigTextError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match (self.number(), self.truth(), self.value) {
            (Some(number), _, Value::Plain(_)) => visitor.visit_u64(number),
            (_, Some(truth), Value::Plain(_)) => visitor.visit_bool(truth),
            (.., Value::Plain(text) | Value::Text(text)) => visitor.visit_string(text),
            (.., Value::List(items)) => visitor.visit_seq(Items(items.into_iter())),
            (.., Value::Map(entries)) => visitor.visit_map(Entries {
                entries: entries.into_iter(),
                value: None,
            }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        let truth = self.truth();
        visitor.visit_bool(truth.ok_or_else(|| self.wrong("write true or false"))?)
    }

    numbers!(
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64
    );

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_string(self.into_text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        if self.is_null() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.value {
            Value::List(_) => self.deserialize_any(visitor),
            _ => Err(self.wrong("a list is needed here, with `- ` before each item")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.value {
            Value::Map(_) => self.deserialize_any(visitor),
            _ => Err(self.wrong("keys with values are needed here, like `count: 2`")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.deserialize_map(visitor)
    }

    /// A variant alone, or as the one key of a map with what it holds.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        let line = self.line;
        let (name, value) = match self.value {
            Value::Map(entries) => match <[_; 1]>::try_from(entries) {
                Ok([(name, value)]) => (name, Some(value)),
                Err(_) => return Err(wrong_choice(line)),
            },
            Value::List(_) => return Err(wrong_choice(line)),
            _ => (self, None),
        };
        visitor.visit_enum(Variant { name, value })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct
    }
}

fn wrong_choice(line: u64) -> ConfigTextError {
    let message = "one value is needed here, or one key with its value".to_owned();
    ConfigTextError { line, message }
}

/// The items of a list.
struct Items(std::vec::IntoIter<Node>);

impl<'de> SeqAccess<'de> for Items {
    type Error = ConfigTextError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Self::Error> {
        self.0.next().map(|node| node.seeded(seed)).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

/// The keys and values of a map.
struct Entries {
    entries: std::vec::IntoIter<(Node, Node)>,
    /// That of the last key.
    value: Option<Node>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = ConfigTextError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Self::Error> {
        let Some((key, value)) = self.entries.next() else {
            return Ok(None);
        };
        self.value = Some(value);
        key.seeded(seed).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<T::Value, Self::Error> {
        let value = self.value.take();
        let value = value.ok_or_else(|| de::Error::custom("a value before its key"))?;
        value.seeded(seed)
    }
}

/// A variant with what it holds.
struct Variant {
    name: Node,
    value: Option<Node>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = ConfigTextError;
    type Variant = Content;

    fn variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<(T::Value, Content), Self::Error> {
        let line = self.name.line;
        let value = self.value;
        Ok((self.name.seeded(seed)?, Content { line, value }))
    }
}

/// What a variant holds.
struct Content {
    line: u64,
    value: Option<Node>,
}

impl Content {
    fn node(self) -> Result<Node, ConfigTextError> {
        let line = self.line;
        self.value.ok_or_else(|| ConfigTextError {
            line,
            message: "this takes a value: write it as a key with its value".into(),
        })
    }
}

impl<'de> VariantAccess<'de> for Content {
    type Error = ConfigTextError;

    fn unit_variant(self) -> Result<(), Self::Error> {
        match self.value {
            Some(value) if !value.is_null() => Err(value.wrong("this takes no value")),
            _ => Ok(()),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<T::Value, Self::Error> {
        self.node()?.seeded(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(
        self,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.node()?.deserialize_seq(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.node()?.deserialize_map(visitor)
    }
}

/// Reads JSON, whose nodes have no lines.
impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = deserializer.deserialize_any(AnyValue)?;
        Ok(Self { line: 0, value })
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Plain("null".into()))
    }

    fn visit_bool<E: de::Error>(self, truth: bool) -> Result<Value, E> {
        Ok(Value::Plain(truth.to_string()))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Plain(number.to_string()))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Plain(number.to_string()))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Plain(number.to_string()))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, Node>()? {
            let key = Node {
                line: 0,
                value: Value::Text(key),
            };
            entries.push((key, value));
        }
        Ok(Value::Map(entries))
    }
}
