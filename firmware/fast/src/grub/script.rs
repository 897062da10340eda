//! Running a script: statements, functions and what words become.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::environment::Environment;
use super::lexer::{Piece, Word};
use super::menu::Entry;
use super::parser::{Block, Statement, parse};
use super::{Devices, FILE_MAX, Linux};
use crate::decline::{Decline, config};

/// Statements that all of a boot may run. A generated configuration takes some hundred.
const STEPS_MAX: u32 = 20_000;
/// Functions, files and entries within each other.
const DEPTH_MAX: u32 = 24;
/// Bytes of scripts in all.
const SCRIPTS_MAX: usize = 2 << 20;
const WORDS_MAX: usize = 1024;
const WORD_MAX: usize = 16 << 10;

/// Whether the next statement is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Go,
    /// The script said `boot`.
    Boot,
}

/// A script as it runs.
pub(super) struct Script<'a> {
    pub(super) devices: &'a dyn Devices,
    pub(super) environment: Environment,
    pub(super) entries: Vec<Entry>,
    pub(super) kernel: Option<Linux>,
    /// Whether the last command succeeded.
    pub(super) status: bool,
    functions: BTreeMap<String, Block>,
    arguments: Vec<String>,
    steps: u32,
    depth: u32,
    read: usize,
}

impl<'a> Script<'a> {
    pub(super) fn new(devices: &'a dyn Devices, device: &str, path: &str) -> Self {
        let prefix = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        Self {
            devices,
            environment: Environment::new(device, prefix),
            entries: Vec::new(),
            kernel: None,
            status: true,
            functions: BTreeMap::new(),
            arguments: Vec::new(),
            steps: 0,
            depth: 0,
            read: 0,
        }
    }

    /// Runs the file and then the default entry.
    pub(super) fn run(mut self, device: &str, path: &str) -> Result<Linux, Decline> {
        if self.run_file(&format!("({device}){path}"))? == Flow::Go {
            self.run_default()?;
        }
        self.kernel
            .ok_or_else(|| config("GRUB's default entry starts no Linux"))
    }

    /// Runs a script of the disk in the present context.
    pub(super) fn run_file(&mut self, name: &str) -> Result<Flow, Decline> {
        let (device, path) = self.place(name)?;
        let Some(bytes) = self.devices.read(&device, &path)? else {
            return Err(config(format!("GRUB's configuration has no file {path}")));
        };
        self.read += bytes.len();
        if bytes.len() > FILE_MAX || self.read > SCRIPTS_MAX {
            return Err(config("GRUB's configuration is too long"));
        }
        let block = parse(&String::from_utf8_lossy(&bytes))?;
        self.nested(|script| script.run_block(&block))
    }

    /// Runs what is inside of something else.
    pub(super) fn nested(
        &mut self,
        inner: impl FnOnce(&mut Self) -> Result<Flow, Decline>,
    ) -> Result<Flow, Decline> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(config("GRUB's configuration is nested too deeply"));
        }
        let flow = inner(self)?;
        self.depth -= 1;
        Ok(flow)
    }

    pub(super) fn run_block(&mut self, block: &Block) -> Result<Flow, Decline> {
        for statement in block.iter() {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return Err(config("GRUB's configuration runs without end"));
            }
            if self.run_statement(statement)? == Flow::Boot {
                return Ok(Flow::Boot);
            }
        }
        Ok(Flow::Go)
    }

    fn run_statement(&mut self, statement: &Statement) -> Result<Flow, Decline> {
        match statement {
            Statement::Command(words) => {
                let words = self.expand(words)?;
                self.run_words(&words)
            }
            Statement::If { arms, otherwise } => {
                for (condition, block) in arms {
                    let flow = self.nested(|script| script.run_block(condition))?;
                    if flow == Flow::Boot {
                        return Ok(flow);
                    }
                    if self.status {
                        return self.nested(|script| script.run_block(block));
                    }
                }
                match otherwise {
                    Some(block) => self.nested(|script| script.run_block(block)),
                    None => Ok(Flow::Go),
                }
            }
            Statement::Function { name, body } => {
                self.functions.insert(name.to_string(), Rc::clone(body));
                Ok(Flow::Go)
            }
            Statement::Entry {
                submenu,
                words,
                body,
            } => {
                let words = self.expand(words)?;
                self.add_entry(*submenu, &words, body)
            }
            Statement::Loop => Err(config("GRUB's configuration has a loop")),
        }
    }

    fn run_words(&mut self, words: &[String]) -> Result<Flow, Decline> {
        let [name, arguments @ ..] = words else {
            return Ok(Flow::Go);
        };
        if let Some((variable, value)) = assignment(name) {
            self.environment.set(variable, value)?;
            self.status = true;
            return Ok(Flow::Go);
        }
        match self.functions.get(name).cloned() {
            Some(body) => self.call(&body, arguments.to_vec()),
            None => self.command(name, arguments),
        }
    }

    /// Runs a function's or an entry's body with these as `$1`, `$2` and so on.
    pub(super) fn call(&mut self, body: &Block, arguments: Vec<String>) -> Result<Flow, Decline> {
        let outer = core::mem::replace(&mut self.arguments, arguments);
        let flow = self.nested(|script| script.run_block(body));
        self.arguments = outer;
        flow
    }

    fn expand(&self, words: &[Word]) -> Result<Vec<String>, Decline> {
        let mut expanded = Vec::new();
        for word in words {
            self.expand_word(word, &mut expanded)?;
            if expanded.len() > WORDS_MAX {
                return Err(config(
                    "GRUB's configuration has a command that is too long",
                ));
            }
        }
        Ok(expanded)
    }

    fn expand_word(&self, word: &Word, into: &mut Vec<String>) -> Result<(), Decline> {
        let mut current = word.quoted.then(String::new);
        for piece in &word.pieces {
            match piece {
                Piece::Text(text) => current.get_or_insert_default().push_str(text),
                Piece::Variable { name, quoted: true } => {
                    current.get_or_insert_default().push_str(&self.value(name));
                }
                Piece::Variable { name, .. } => {
                    let value = self.value(name);
                    for (index, part) in value.split_ascii_whitespace().enumerate() {
                        if index > 0 {
                            into.extend(current.take());
                        }
                        current.get_or_insert_default().push_str(part);
                    }
                }
            }
            if current.as_ref().is_some_and(|word| word.len() > WORD_MAX) || into.len() > WORDS_MAX
            {
                return Err(config("GRUB's configuration has a word that is too long"));
            }
        }
        into.extend(current);
        Ok(())
    }

    /// A variable's value, or that of a function's argument.
    fn value(&self, name: &str) -> String {
        match name {
            "?" => if self.status { "0" } else { "1" }.to_owned(),
            "#" => self.arguments.len().to_string(),
            "@" | "*" => self.arguments.join(" "),
            _ => match name.parse::<usize>() {
                Ok(index) => {
                    let argument = index.checked_sub(1).and_then(|i| self.arguments.get(i));
                    argument.cloned().unwrap_or_default()
                }
                Err(_) => self.environment.get(name).to_owned(),
            },
        }
    }

    /// Device and path of `(device)/path`, or of a path on the root device.
    pub(super) fn place(&self, name: &str) -> Result<(String, String), Decline> {
        let (device, path) = match name.strip_prefix('(') {
            Some(rest) => rest.split_once(')').unwrap_or((rest, "")),
            None => (self.environment.get("root"), name),
        };
        if path.starts_with('/') {
            Ok((device.to_owned(), path.to_owned()))
        } else {
            Err(config(format!("GRUB's configuration names \"{name}\"")))
        }
    }
}

/// Name and value of a word that sets a variable.
pub(super) fn assignment(word: &str) -> Option<(&str, &str)> {
    let (name, value) = word.split_once('=')?;
    let mut chars = name.chars();
    let first = chars.next()?;
    let named = (first.is_ascii_alphabetic() || first == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_');
    named.then_some((name, value))
}
