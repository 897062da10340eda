//! The menu: its entries, and which of them is the default.

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::parser::Block;
use super::script::{Flow, Script};
use crate::bls;
use crate::decline::{Decline, config};

const ENTRIES_MAX: usize = 1024;

/// An entry of the menu.
#[derive(Debug)]
pub(super) struct Entry {
    title: String,
    id: String,
    unrestricted: bool,
    arguments: Vec<String>,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Commands(Block),
    Submenu(Block),
    Bls(Box<bls::Entry>),
}

impl Script<'_> {
    pub(super) fn add_entry(
        &mut self,
        submenu: bool,
        words: &[String],
        block: &Block,
    ) -> Result<Flow, Decline> {
        let mut id = None;
        let mut unrestricted = false;
        let mut arguments = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => id = words.next().cloned(),
                "--class" | "--users" | "--hotkey" => drop(words.next()),
                "--unrestricted" => unrestricted = true,
                word if word.starts_with("--") => match word.split_once('=') {
                    Some(("--id", value)) => id = Some(value.to_owned()),
                    Some(("--class" | "--users" | "--hotkey", _)) => {}
                    _ => return Err(config(format!("GRUB's menu has an entry with {word}"))),
                },
                word => arguments.push(word.to_owned()),
            }
        }
        let title = arguments.first().cloned().unwrap_or_default();
        let body = if submenu {
            Body::Submenu
        } else {
            Body::Commands
        };
        self.push_entry(Entry {
            id: id.unwrap_or_else(|| title.clone()),
            title,
            unrestricted,
            arguments,
            body: body(Rc::clone(block)),
        })
    }

    fn push_entry(&mut self, entry: Entry) -> Result<Flow, Decline> {
        if self.entries.len() >= ENTRIES_MAX {
            return Err(config("GRUB's menu is too long"));
        }
        self.entries.push(entry);
        Ok(Flow::Go)
    }

    /// `blscfg`: entries of the Boot Loader Specification, the newest first.
    pub(super) fn add_bls_entries(&mut self, words: &[String]) -> Result<bool, Decline> {
        if !words.is_empty() || !self.environment.get("blsdir").is_empty() {
            return Err(config("GRUB's command \"blscfg\" has arguments"));
        }
        let device = self.environment.get("root").to_owned();
        let mut entries = Vec::new();
        for directory in ["/loader/entries", "/boot/loader/entries"] {
            for name in self.devices.names(&device, directory)? {
                let Some(id) = name.strip_suffix(".conf") else {
                    continue;
                };
                let path = format!("{directory}/{name}");
                let Some(text) = self.devices.read(&device, &path)? else {
                    continue;
                };
                let entry = bls::Entry::parse(id, &String::from_utf8_lossy(&text))?;
                entries.push(entry);
            }
            if !entries.is_empty() {
                break;
            }
        }
        entries.sort_by(|a, b| bls::compare_versions(&b.id, &a.id));
        let found = !entries.is_empty();
        for entry in entries {
            self.push_entry(Entry {
                title: entry.title.clone(),
                id: entry.id.clone(),
                unrestricted: true,
                arguments: Vec::new(),
                body: Body::Bls(Box::new(entry)),
            })?;
        }
        Ok(found)
    }

    /// Runs the default entry of the menu that the script has made.
    pub(super) fn run_default(&mut self) -> Result<Flow, Decline> {
        if self.entries.is_empty() {
            return Err(config("GRUB's menu is empty"));
        }
        if !matches!(self.environment.get("timeout").parse::<i64>(), Ok(0..)) {
            return Err(config("GRUB would wait for a choice from its menu"));
        }
        let mut wanted = self.environment.get("default").to_owned();
        for _ in 0..8 {
            let (index, rest) = self.default_of(&wanted);
            let entry = self.entries.swap_remove(index);
            let users = self.environment.get("superusers");
            if !users.is_empty() && !entry.unrestricted {
                return Err(config("GRUB would ask for a password"));
            }
            self.environment.set("chosen", &entry.id)?;
            match (entry.body, rest) {
                (Body::Commands(body), _) => return self.call(&body, entry.arguments),
                (Body::Bls(entry), _) => return self.run_bls(&entry),
                (Body::Submenu(body), Some(rest)) => {
                    self.entries.clear();
                    if self.call(&body, entry.arguments)? == Flow::Boot {
                        return Ok(Flow::Boot);
                    }
                    wanted = rest;
                }
                (Body::Submenu(_), None) => break,
            }
            if self.entries.is_empty() {
                break;
            }
        }
        Err(config("GRUB's default entry is a submenu"))
    }

    /// Index of the entry that `wanted` names, and what it names inside of that. The first when
    /// there is no such entry.
    fn default_of(&self, wanted: &str) -> (usize, Option<String>) {
        let (first, rest) = match wanted.split_once('>') {
            Some((first, rest)) => (first, Some(rest.to_owned())),
            None => (wanted, None),
        };
        if let Ok(index) = first.trim().parse::<usize>() {
            return if index < self.entries.len() {
                (index, rest)
            } else {
                (0, None)
            };
        }
        for (index, entry) in self.entries.iter().enumerate() {
            // A title's own ">" is doubled.
            for name in [entry.id.as_str(), &entry.title.replace('>', ">>")] {
                match wanted.strip_prefix(name) {
                    Some("") => return (index, None),
                    Some(rest) if rest.starts_with('>') => {
                        return (index, rest.get(1..).map(str::to_owned));
                    }
                    _ => {}
                }
            }
        }
        (0, None)
    }

    /// What GRUB makes of an entry of the Boot Loader Specification.
    fn run_bls(&mut self, entry: &bls::Entry) -> Result<Flow, Decline> {
        let unsupported = entry.unsupported || entry.efi.is_some();
        let Some(kernel) = entry.linux.as_ref().filter(|_| !unsupported) else {
            return Err(config("the boot loader entry starts no Linux"));
        };
        // Options and names of RAM disks may have variables of GRUB's.
        let line = |command: &str, rest: &str| format!("{command} {rest}\n");
        let mut script = line("linux", &format!("{kernel} {}", entry.options));
        if !entry.initrds.is_empty() {
            script.push_str(&line("initrd", &entry.initrds.join(" ")));
        }
        let block = super::parser::parse(&script)?;
        self.call(&block, vec![])
    }
}
