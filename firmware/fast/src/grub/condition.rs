//! `[ … ]`.

use alloc::format;
use alloc::string::String;

use super::Kind;
use super::script::Script;
use crate::decline::{Decline, config};

const DEPTH_MAX: u32 = 16;

impl Script<'_> {
    /// Whether the words between the brackets hold.
    pub(super) fn test(&self, words: &[String]) -> Result<bool, Decline> {
        let mut test = Test {
            script: self,
            words,
            depth: 0,
        };
        let result = test.any()?;
        match test.words {
            [] => Ok(result),
            [word, ..] => Err(unknown(word)),
        }
    }
}

fn unknown(word: &str) -> Decline {
    config(format!("GRUB's configuration has a test with \"{word}\""))
}

struct Test<'a> {
    script: &'a Script<'a>,
    words: &'a [String],
    depth: u32,
}

impl Test<'_> {
    fn take(&mut self, word: &str) -> bool {
        match self.words {
            [first, rest @ ..] if first == word => {
                self.words = rest;
                true
            }
            _ => false,
        }
    }

    fn any(&mut self) -> Result<bool, Decline> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(config("GRUB's configuration has a test that is too deep"));
        }
        let mut result = self.all()?;
        while self.take("-o") {
            let more = self.all()?;
            result |= more;
        }
        self.depth -= 1;
        Ok(result)
    }

    fn all(&mut self) -> Result<bool, Decline> {
        let mut result = self.one()?;
        while self.take("-a") {
            let more = self.one()?;
            result &= more;
        }
        Ok(result)
    }

    fn one(&mut self) -> Result<bool, Decline> {
        let mut negated = false;
        // With nothing behind it, it is a word like any other.
        while self.words.len() > 1 && self.take("!") {
            negated = !negated;
        }
        Ok(self.primary()? != negated)
    }

    fn primary(&mut self) -> Result<bool, Decline> {
        let words = self.words;
        match words {
            [left, operator, right, rest @ ..] if is_binary(operator) => {
                self.words = rest;
                binary(left, operator, right)
            }
            [open, rest @ ..] if open == "(" => {
                self.words = rest;
                let result = self.any()?;
                if self.take(")") {
                    Ok(result)
                } else {
                    Err(unknown("("))
                }
            }
            [operator, operand, rest @ ..] if is_unary(operator) => {
                self.words = rest;
                self.unary(operator, operand)
            }
            [operator, _, ..] if operator.len() == 2 && operator.starts_with('-') => {
                Err(unknown(operator))
            }
            [word, rest @ ..] => {
                self.words = rest;
                Ok(!word.is_empty())
            }
            [] => Ok(false),
        }
    }

    fn unary(&self, operator: &str, operand: &str) -> Result<bool, Decline> {
        let kind = || {
            let (device, path) = self.script.place(operand)?;
            self.script.devices.kind(&device, &path)
        };
        Ok(match operator {
            "-z" => operand.is_empty(),
            "-n" => !operand.is_empty(),
            "-e" => kind()?.is_some(),
            "-f" => matches!(kind()?, Some(Kind::File(_))),
            "-d" => kind()? == Some(Kind::Directory),
            _ => matches!(kind()?, Some(Kind::File(1..))),
        })
    }
}

fn is_unary(word: &str) -> bool {
    matches!(word, "-z" | "-n" | "-e" | "-f" | "-d" | "-s")
}

fn is_binary(word: &str) -> bool {
    matches!(word, "=" | "==" | "!=" | "<" | ">" | "<=" | ">=")
        || matches!(word, "-eq" | "-ne" | "-lt" | "-le" | "-gt" | "-ge")
}

fn binary(left: &str, operator: &str, right: &str) -> Result<bool, Decline> {
    let number = |text: &str| text.parse::<i64>().map_err(|_| unknown(text));
    let numbers = || Ok::<_, Decline>((number(left)?, number(right)?));
    Ok(match operator {
        "=" | "==" => left == right,
        "!=" => left != right,
        "<" => left < right,
        ">" => left > right,
        "<=" => left <= right,
        ">=" => left >= right,
        _ => {
            let (left, right) = numbers()?;
            match operator {
                "-eq" => left == right,
                "-ne" => left != right,
                "-lt" => left < right,
                "-le" => left <= right,
                "-gt" => left > right,
                _ => left >= right,
            }
        }
    })
}
