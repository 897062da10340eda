//! Statements of a script.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::vec::Vec;

use super::lexer::{Token, Word, tokens};
use crate::decline::{Decline, config};

/// Deeper nesting has nothing that a tool writes.
const DEPTH_MAX: u32 = 32;

/// Statements that belong together.
pub(super) type Block = Rc<[Statement]>;

/// One statement.
#[derive(Debug)]
pub(super) enum Statement {
    Command(Vec<Word>),
    If {
        /// Conditions with what they guard.
        arms: Vec<(Block, Block)>,
        otherwise: Option<Block>,
    },
    Function {
        name: Box<str>,
        body: Block,
    },
    /// `menuentry` or `submenu` with its words.
    Entry {
        submenu: bool,
        words: Vec<Word>,
        body: Block,
    },
    /// `for`, `while` or `until`, which are left out.
    Loop,
}

/// Reads a script.
pub(super) fn parse(script: &str) -> Result<Block, Decline> {
    let tokens = tokens(script)?;
    let mut parser = Parser {
        tokens: &tokens,
        at: 0,
        depth: 0,
    };
    let block = parser.block(&[])?;
    match parser.keyword() {
        None => Ok(block),
        Some(word) => Err(config(format!(
            "GRUB's configuration has a lone \"{word}\""
        ))),
    }
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    depth: u32,
}

impl<'a> Parser<'a> {
    fn skip_ends(&mut self) {
        while matches!(self.tokens.get(self.at), Some(Token::End)) {
            self.at += 1;
        }
    }

    /// The plain word that comes next.
    fn keyword(&self) -> Option<&'a str> {
        match self.tokens.get(self.at) {
            Some(Token::Word(word)) => word.plain(),
            _ => None,
        }
    }

    fn word(&mut self) -> Option<&'a Word> {
        match self.tokens.get(self.at) {
            Some(Token::Word(word)) => {
                self.at += 1;
                Some(word)
            }
            _ => None,
        }
    }

    fn expect(&mut self, keyword: &str) -> Result<(), Decline> {
        self.skip_ends();
        if self.keyword() == Some(keyword) {
            self.at += 1;
            Ok(())
        } else {
            Err(config(format!(
                "GRUB's configuration lacks a \"{keyword}\""
            )))
        }
    }

    /// Statements up to one of these words at the start of a command, or the end.
    fn block(&mut self, ends: &[&str]) -> Result<Block, Decline> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(config("GRUB's configuration is nested too deeply"));
        }
        let mut statements = Vec::new();
        loop {
            self.skip_ends();
            match self.keyword() {
                Some(word) if ends.contains(&word) => break,
                Some("}" | "then" | "elif" | "else" | "fi" | "do" | "done") => break,
                _ if self.at >= self.tokens.len() => break,
                keyword => statements.push(self.statement(keyword)?),
            }
        }
        self.depth -= 1;
        Ok(statements.into())
    }

    fn braces(&mut self) -> Result<Block, Decline> {
        self.expect("{")?;
        let body = self.block(&["}"])?;
        self.expect("}")?;
        Ok(body)
    }

    fn statement(&mut self, keyword: Option<&str>) -> Result<Statement, Decline> {
        match keyword {
            Some("if") => self.condition(),
            Some("function") => {
                self.at += 1;
                let name = self.word().and_then(Word::plain);
                let name =
                    name.ok_or_else(|| config("GRUB's configuration has a nameless function"))?;
                let body = self.braces()?;
                Ok(Statement::Function {
                    name: name.into(),
                    body,
                })
            }
            Some(kind @ ("menuentry" | "submenu")) => {
                self.at += 1;
                let mut words = Vec::new();
                while self.keyword() != Some("{") {
                    let word = self.word();
                    let lacks = || config("GRUB's configuration has an entry without a body");
                    words.push(word.ok_or_else(lacks)?.clone());
                }
                Ok(Statement::Entry {
                    submenu: kind == "submenu",
                    words,
                    body: self.braces()?,
                })
            }
            Some("for" | "while" | "until") => {
                self.at += 1;
                if keyword == Some("for") {
                    while self.word().is_some() {}
                } else {
                    self.block(&["do"])?;
                }
                self.expect("do")?;
                self.block(&["done"])?;
                self.expect("done")?;
                Ok(Statement::Loop)
            }
            _ => {
                let mut words = Vec::new();
                while self.keyword() != Some("}")
                    && let Some(word) = self.word()
                {
                    words.push(word.clone());
                }
                Ok(Statement::Command(words))
            }
        }
    }

    fn condition(&mut self) -> Result<Statement, Decline> {
        self.at += 1;
        let mut arms = Vec::new();
        let mut otherwise = None;
        loop {
            let condition = self.block(&["then"])?;
            self.expect("then")?;
            arms.push((condition, self.block(&["elif", "else", "fi"])?));
            match self.keyword() {
                Some("elif") => self.at += 1,
                Some("else") => {
                    self.at += 1;
                    otherwise = Some(self.block(&["fi"])?);
                    break;
                }
                _ => break,
            }
        }
        self.expect("fi")?;
        Ok(Statement::If { arms, otherwise })
    }
}
