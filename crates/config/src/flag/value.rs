//! Values of keys as serde sees them.

use serde::de::value::{SeqDeserializer, StringDeserializer};
use serde::de::{self, Deserializer, EnumAccess, IntoDeserializer, VariantAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::FlagError;
use crate::keys::shorten;

/// What a key was given: one entry per mention, `None` where it stood alone.
#[derive(Debug)]
pub(super) struct Values {
    pub(super) key: String,
    pub(super) values: Vec<Option<String>>,
}

impl Values {
    /// The one text given.
    fn text(&mut self) -> Result<String, FlagError> {
        let key = &self.key;
        let value = self.values.pop();
        if !self.values.is_empty() {
            return Err(FlagError(format!("`{key}` stands twice: leave one out")));
        }
        value
            .flatten()
            .ok_or_else(|| FlagError(format!("`{key}` lacks its value: write {key}=VALUE")))
    }

    /// Adds the key to an error that doesn't name it.
    fn blame(&self, error: FlagError) -> FlagError {
        if error.0.contains(&format!("`{}`", self.key)) {
            error
        } else {
            FlagError(format!("`{}`: {error}", self.key))
        }
    }
}

/// Implements the methods for unsigned numbers.
macro_rules! numbers {
    ($($method:ident $visit:ident $kind:ty),*) => {$(
        fn $method<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, FlagError> {
            let text = self.text()?;
            let number: $kind = text.parse().map_err(|_| {
                let (key, text, most) = (&self.key, shorten(&text), <$kind>::MAX);
                FlagError(format!("`{text}` can't be `{key}`: write a whole number from 0 to {most}"))
            })?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> Deserializer<'de> for Values {
    type Error = FlagError;

    fn deserialize_any<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, FlagError> {
        let text = self.text()?;
        visitor
            .visit_string(text)
            .map_err(|error| self.blame(error))
    }

    fn deserialize_bool<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, FlagError> {
        if self.values == [None] {
            return visitor.visit_bool(true);
        }
        match self.text()?.as_str() {
            "true" | "on" => visitor.visit_bool(true),
            "false" | "off" => visitor.visit_bool(false),
            other => {
                let (key, other) = (&self.key, shorten(other));
                Err(FlagError(format!(
                    "`{other}` can't be `{key}`: write {key}=on or {key}=off"
                )))
            }
        }
    }

    numbers!(
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64
    );

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FlagError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, FlagError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FlagError> {
        let Self { key, values } = self;
        let single = values.into_iter().map(|value| Self {
            key: key.clone(),
            values: vec![value],
        });
        visitor.visit_seq(SeqDeserializer::new(single))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FlagError> {
        let text = self.text()?;
        visitor.visit_enum(Variant {
            key: self.key,
            text: text.into_deserializer(),
        })
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct map struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, FlagError> for Values {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// A variant without content.
struct Variant {
    key: String,
    text: StringDeserializer<FlagError>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = FlagError;
    type Variant = Content;

    fn variant_seed<V: de::DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Content), FlagError> {
        Ok((seed.deserialize(self.text)?, Content { key: self.key }))
    }
}

/// The content that a variant doesn't have.
struct Content {
    key: String,
}

impl Content {
    fn missing<T>(self) -> Result<T, FlagError> {
        Err(FlagError(format!(
            "the value of `{}` needs more, which a flag can't hold",
            self.key
        )))
    }
}

impl<'de> VariantAccess<'de> for Content {
    type Error = FlagError;

    fn unit_variant(self) -> Result<(), FlagError> {
        Ok(())
    }

    fn newtype_variant_seed<T: de::DeserializeSeed<'de>>(
        self,
        _seed: T,
    ) -> Result<T::Value, FlagError> {
        self.missing()
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, FlagError> {
        self.missing()
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, FlagError> {
        self.missing()
    }
}
