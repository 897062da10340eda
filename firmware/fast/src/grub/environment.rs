//! Variables, and the environment block that keeps some of them on disk.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::decline::{Decline, config};

const VARIABLES_MAX: usize = 512;
const VALUE_MAX: usize = 4096;
const BLOCK_START: &str = "# GRUB Environment Block\n";

/// What GRUB says it can do. Scripts of distributions ask for these.
const FEATURES: [&str; 8] = [
    "feature_200_final",
    "feature_all_video_module",
    "feature_default_font_path",
    "feature_menuentry_id",
    "feature_menuentry_options",
    "feature_nativedisk_cmd",
    "feature_platform_search_hint",
    "feature_timeout_style",
];

/// What may stay unsaved: hints for the next menu, which the system itself or the next boot by GRUB
/// sets again. The saved entry is the one that boots.
const UNSAVED: [&str; 5] = [
    "recordfail",
    "saved_entry",
    "boot_success",
    "boot_indeterminate",
    "boot_once",
];

/// Set for one boot only, for GRUB to clear on disk.
const ONE_SHOT: [&str; 2] = ["next_entry", "prev_saved_entry"];

/// The variables.
#[derive(Debug, Default)]
pub(super) struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Those that GRUB has at its start, with its files in `prefix` of `device`.
    pub(super) fn new(device: &str, prefix: &str) -> Self {
        let mut environment = Self::default();
        let full = format!("({device}){prefix}");
        let own = [
            ("root", device),
            ("prefix", &full),
            ("config_directory", &full),
            ("cmdpath", &full),
            ("grub_cpu", "i386"),
            ("grub_platform", "pc"),
        ];
        let features = FEATURES.map(|name| (name, "y"));
        for (name, value) in own.into_iter().chain(features) {
            environment.0.insert(name.to_string(), value.to_string());
        }
        environment
    }

    /// A variable's value; empty when it is unset.
    pub(super) fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// Sets a variable.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<(), Decline> {
        if value.len() > VALUE_MAX || name.len() > VALUE_MAX || self.0.len() >= VARIABLES_MAX {
            return Err(config("GRUB's configuration has too many variables"));
        }
        self.0.insert(name.to_string(), value.to_string());
        Ok(())
    }

    /// Unsets a variable.
    pub(super) fn unset(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Takes variables from an environment block: these, or all. False when it is none.
    pub(super) fn load(&mut self, block: &[u8], only: &[String]) -> Result<bool, Decline> {
        let text = String::from_utf8_lossy(block);
        let Some(lines) = text.strip_prefix(BLOCK_START) else {
            return Ok(false);
        };
        for (name, value) in variables(lines) {
            if only.is_empty() || only.contains(&name) {
                if ONE_SHOT.contains(&name.as_str()) && !value.is_empty() {
                    return Err(config("GRUB is to boot another entry once"));
                }
                self.set(&name, &value)?;
            }
        }
        Ok(true)
    }
}

/// Whether GRUB's environment block may stay as it is when a script would save these.
pub(super) fn check_unsaved(names: &[String]) -> Result<(), Decline> {
    match names.iter().find(|name| !UNSAVED.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(config(format!("GRUB would save \"{name}\" to the disk"))),
    }
}

/// Lines of the form `name=value`; a backslash protects what follows it, also the end of the line.
fn variables(block: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut chars = block.chars();
    let (mut name, mut text) = (None, String::new());
    while let Some(c) = chars.next() {
        match c {
            '#' if name.is_none() && text.is_empty() => {
                let _ = chars.by_ref().find(|c| *c == '\n');
            }
            '\\' => text.extend(chars.next()),
            '=' if name.is_none() => name = Some(core::mem::take(&mut text)),
            '\n' => {
                let value = core::mem::take(&mut text);
                found.extend(name.take().map(|name| (name, value)));
            }
            c => text.push(c),
        }
    }
    found
}
