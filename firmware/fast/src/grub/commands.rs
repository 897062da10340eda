//! The commands.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::environment::check_unsaved;
use super::script::{Flow, Script, assignment};
use super::{By, Linux, Place};
use crate::decline::{Decline, config};

const INITRDS_MAX: usize = 16;

impl Script<'_> {
    /// Runs a command of GRUB's own.
    pub(super) fn command(&mut self, name: &str, words: &[String]) -> Result<Flow, Decline> {
        self.status = match name {
            "[" => match words {
                [words @ .., last] if last == "]" => self.test(words)?,
                _ => return Err(config("GRUB's configuration has a test without end")),
            },
            "test" => self.test(words)?,
            "set" => self.set(words)?,
            "unset" => {
                words.iter().for_each(|word| self.environment.unset(word));
                true
            }
            "hwmatch" => {
                self.environment.set("match", "0")?;
                true
            }
            "load_env" => self.load_env(words)?,
            "save_env" => {
                check_unsaved(&names(words)?)?;
                true
            }
            "search" | "search.file" | "search.fs_label" | "search.fs_uuid" => {
                self.search(name, words)?
            }
            "source" | "." => return self.run_file(first(name, words)?),
            "configfile" | "normal" => {
                self.entries.clear();
                let flow = self.run_file(first(name, words)?)?;
                return if flow == Flow::Go {
                    self.run_default()
                } else {
                    Ok(flow)
                };
            }
            "blscfg" => self.add_bls_entries(words)?,
            "linux" | "linux16" | "linuxefi" => self.linux(words)?,
            "initrd" | "initrd16" | "initrdefi" => self.initrd(words)?,
            "boot" => return Ok(Flow::Boot),
            _ => quiet(name, words)?,
        };
        Ok(Flow::Go)
    }

    fn set(&mut self, words: &[String]) -> Result<bool, Decline> {
        match words.first().map(|word| assignment(word)) {
            None => Ok(true),
            Some(Some((name, value))) => self.environment.set(name, value).map(|()| true),
            Some(None) => Err(config("GRUB's configuration sets what is no variable")),
        }
    }

    fn load_env(&mut self, words: &[String]) -> Result<bool, Decline> {
        let mut file = format!("{}/grubenv", self.environment.get("prefix"));
        let mut only = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--skip-sig" | "-s" => {}
                "-f" | "--file" => file = words.next().cloned().unwrap_or_default(),
                word => match word.strip_prefix("--file=") {
                    Some(name) => file = name.to_string(),
                    None if word.starts_with('-') => return Err(option("load_env", word)),
                    None => only.push(word.to_string()),
                },
            }
        }
        let (device, path) = self.place(&file)?;
        match self.devices.read(&device, &path)? {
            Some(block) => self.environment.load(&block, &only),
            None => Ok(false),
        }
    }

    fn search(&mut self, command: &str, words: &[String]) -> Result<bool, Decline> {
        let mut by = match command {
            "search.fs_label" => By::Label,
            "search.fs_uuid" => By::Uuid,
            _ => By::File,
        };
        let mut target = (command != "search").then_some("root");
        let mut operands: Vec<&str> = Vec::new();
        let mut words = words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word {
                "-f" | "--file" => by = By::File,
                "-l" | "--label" => by = By::Label,
                "-u" | "--fs-uuid" => by = By::Uuid,
                "-n" | "--no-floppy" => {}
                "-s" | "--set" => target = Some("root"),
                _ if word.starts_with("--set=") => target = word.get(6..),
                _ if word.starts_with("--hint") => {
                    if !word.contains('=') {
                        words.next();
                    }
                }
                _ if word.starts_with('-') => return Err(option("search", word)),
                _ => operands.push(word),
            }
        }
        // The commands of early configurations take the variable after the value, then hints.
        let value = match (command, operands.as_slice()) {
            ("search", [.., last]) => *last,
            (_, [value, rest @ ..]) => {
                target = rest.first().copied().or(target);
                *value
            }
            (_, []) => return Err(option("search", "")),
        };
        let Some(device) = self.devices.search(by, value)? else {
            return Ok(false);
        };
        if let Some(target) = target {
            self.environment.set(target, &device)?;
        }
        Ok(true)
    }

    fn linux(&mut self, words: &[String]) -> Result<bool, Decline> {
        let (name, arguments) = words.split_first().ok_or_else(|| option("linux", ""))?;
        let (device, path) = self.place(name)?;
        let mut command_line = format!("BOOT_IMAGE={name}");
        for argument in arguments {
            command_line.push(' ');
            push_quoted(&mut command_line, argument);
        }
        self.kernel = Some(Linux {
            kernel: Place { device, path },
            initrds: Vec::new(),
            command_line,
        });
        Ok(true)
    }

    fn initrd(&mut self, words: &[String]) -> Result<bool, Decline> {
        let mut initrds = Vec::new();
        for word in words {
            let (device, path) = self.place(word)?;
            initrds.push(Place { device, path });
        }
        if initrds.len() > INITRDS_MAX {
            return Err(config("GRUB's configuration has too many RAM disks"));
        }
        match &mut self.kernel {
            Some(kernel) => kernel.initrds = initrds,
            None => {
                return Err(config(
                    "GRUB's configuration has a RAM disk without a kernel",
                ));
            }
        }
        Ok(true)
    }
}

/// Commands that change nothing of what is booted; gives whether they succeed.
fn quiet(name: &str, words: &[String]) -> Result<bool, Decline> {
    match name {
        "true" | ":" | "insmod" | "rmmod" | "echo" | "export" | "clear" | "sleep" | "serial"
        | "terminal" | "terminal_input" | "terminal_output" | "background_image"
        | "background_color" | "play" | "gettext" => Ok(true),
        // No font is loaded, no key is held down, and this is no UEFI.
        "false" | "loadfont" | "keystatus" => Ok(false),
        "fwsetup" if words.iter().any(|word| word == "--is-supported") => Ok(false),
        _ => Err(config(format!("GRUB's command \"{name}\" is not known"))),
    }
}

fn option(command: &str, word: &str) -> Decline {
    config(format!("GRUB's command \"{command} {word}\" is not known"))
}

fn first<'a>(command: &str, words: &'a [String]) -> Result<&'a str, Decline> {
    let word = words.first().ok_or_else(|| option(command, ""))?;
    Ok(word)
}

/// The names among the words of `save_env`.
fn names(words: &[String]) -> Result<Vec<String>, Decline> {
    match words.iter().find(|word| word.starts_with('-')) {
        Some(word) => Err(option("save_env", word)),
        None => Ok(words.to_vec()),
    }
}

/// Appends an argument as GRUB passes it to a kernel.
fn push_quoted(line: &mut String, argument: &str) {
    let quoted = argument.contains(' ');
    if quoted {
        line.push('"');
    }
    for c in argument.chars() {
        if matches!(c, '\\' | '\'' | '"') {
            line.push('\\');
        }
        line.push(c);
    }
    if quoted {
        line.push('"');
    }
}
