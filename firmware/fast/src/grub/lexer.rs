//! Words of a script: quotes, escapes, variables and comments.

use alloc::string::String;
use alloc::vec::Vec;

use crate::decline::{Decline, config};

/// A part of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Text as it stands.
    Text(String),
    /// The value of a variable. Outside of quotes it may become several words, or none.
    Variable { name: String, quoted: bool },
}

/// A word, not yet expanded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Word {
    pub(super) pieces: Vec<Piece>,
    /// It has quotes, so it is a word even when it is empty, and never a keyword.
    pub(super) quoted: bool,
}

impl Word {
    /// The word when it is nothing but unquoted text.
    pub(super) fn plain(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [Piece::Text(text)] if !self.quoted => Some(text),
            _ => None,
        }
    }

    fn push(&mut self, c: char) {
        if let Some(Piece::Text(text)) = self.pieces.last_mut() {
            text.push(c);
        } else {
            self.pieces.push(Piece::Text(c.into()));
        }
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty() && !self.quoted
    }
}

/// A word or the end of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    Word(Word),
    End,
}

/// Splits a script.
pub(super) fn tokens(script: &str) -> Result<Vec<Token>, Decline> {
    let mut lexer = Lexer {
        chars: script.chars().peekable(),
        word: Word::default(),
        tokens: Vec::new(),
    };
    lexer.run()?;
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    chars: core::iter::Peekable<core::str::Chars<'a>>,
    word: Word,
    tokens: Vec<Token>,
}

impl Lexer<'_> {
    fn run(&mut self) -> Result<(), Decline> {
        while let Some(c) = self.chars.next() {
            match c {
                ' ' | '\t' | '\r' => self.finish(),
                '\n' | ';' => {
                    self.finish();
                    self.tokens.push(Token::End);
                }
                '#' if self.word.is_empty() => {
                    while self.chars.next_if(|c| *c != '\n').is_some() {}
                }
                '\\' => match self.chars.next() {
                    Some('\n') | None => {}
                    Some(c) => {
                        self.word.quoted = true;
                        self.word.push(c);
                    }
                },
                '\'' => self.single()?,
                '"' => self.double()?,
                '$' => self.variable(false)?,
                '|' | '&' | '<' | '>' => {
                    return Err(config(
                        "GRUB's configuration has a command that is not known",
                    ));
                }
                c => self.word.push(c),
            }
        }
        self.finish();
        self.tokens.push(Token::End);
        Ok(())
    }

    fn finish(&mut self) {
        if !self.word.is_empty() {
            let word = core::mem::take(&mut self.word);
            self.tokens.push(Token::Word(word));
        }
    }

    fn single(&mut self) -> Result<(), Decline> {
        self.word.quoted = true;
        loop {
            match self.chars.next() {
                Some('\'') => return Ok(()),
                Some(c) => self.word.push(c),
                None => return Err(open_quote()),
            }
        }
    }

    fn double(&mut self) -> Result<(), Decline> {
        self.word.quoted = true;
        loop {
            match self.chars.next() {
                Some('"') => return Ok(()),
                Some('$') => self.variable(true)?,
                Some('\\') => match self.chars.next() {
                    Some('\n') => {}
                    Some(c @ ('$' | '"' | '\\')) => self.word.push(c),
                    Some(c) => {
                        self.word.push('\\');
                        self.word.push(c);
                    }
                    None => return Err(open_quote()),
                },
                Some(c) => self.word.push(c),
                None => return Err(open_quote()),
            }
        }
    }

    fn variable(&mut self, quoted: bool) -> Result<(), Decline> {
        let mut name = String::new();
        if self.chars.next_if_eq(&'{').is_some() {
            loop {
                match self.chars.next() {
                    Some('}') => break,
                    Some(c) => name.push(c),
                    None => return Err(open_quote()),
                }
            }
        } else if let Some(c) = self.chars.next_if(|c| matches!(c, '?' | '@' | '*' | '#')) {
            name.push(c);
        } else if let Some(digit) = self.chars.next_if(char::is_ascii_digit) {
            name.push(digit);
        } else {
            while let Some(c) = self
                .chars
                .next_if(|c| c.is_ascii_alphanumeric() || *c == '_')
            {
                name.push(c);
            }
        }
        if name.is_empty() {
            self.word.push('$');
        } else {
            self.word.pieces.push(Piece::Variable { name, quoted });
        }
        Ok(())
    }
}

fn open_quote() -> Decline {
    config("GRUB's configuration ends inside a quote")
}
