//! Finds the mirror this system itself installs from: no host name is built in.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// A distribution whose packages the lab and the test images are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Distribution {
    /// Debian 12 or newer.
    Debian,
    /// Ubuntu 25.04 or newer.
    Ubuntu,
}

/// Where packages come from, and which releases to take.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mirror {
    /// The distribution the mirror carries.
    pub distribution: Distribution,
    /// The address from the system's own apt sources, or `$EDGEVMM_MIRROR`.
    pub uri: String,
    /// The release this system runs.
    host_suite: String,
}

impl Mirror {
    /// Reads `/etc/os-release` and the apt sources of this system.
    ///
    /// # Errors
    /// Not a Debian or Ubuntu system, or no source line for its release.
    pub fn of_this_system() -> Result<Self> {
        let release = os_release(&fs::read_to_string("/etc/os-release").unwrap_or_default());
        let get = |key: &str| release.get(key).cloned().unwrap_or_default();
        let distribution = match get("ID").as_str() {
            "debian" => Distribution::Debian,
            "ubuntu" => Distribution::Ubuntu,
            other => bail!(
                "The lab and the test images are made of Debian or Ubuntu packages and this system \
                 is '{other}'. Run this on Debian 12 or newer or Ubuntu 25.04 or newer (a container \
                 will do)."
            ),
        };
        let suite = get("VERSION_CODENAME");
        let uri = match std::env::var("EDGEVMM_MIRROR") {
            Ok(uri) => uri,
            Err(_) => find_uri(&apt_sources(), &suite).with_context(|| {
                format!(
                    "No apt source for '{suite}' in /etc/apt. Set EDGEVMM_MIRROR to the address of \
                     a mirror."
                )
            })?,
        };
        Ok(Self {
            distribution,
            uri,
            host_suite: suite,
        })
    }

    /// The release the lab is made of: at least as new as this system, so that what is built here
    /// finds a C library in the lab that is new enough.
    #[must_use]
    pub fn lab_suite(&self) -> &str {
        match (self.distribution, self.host_suite.as_str()) {
            (Distribution::Debian, "bookworm" | "bullseye") => "trixie",
            (_, suite) => suite,
        }
    }

    /// The release the guest images are made of.
    #[must_use]
    pub fn guest_suite(&self) -> &str {
        match self.distribution {
            Distribution::Debian => "bookworm",
            Distribution::Ubuntu => &self.host_suite,
        }
    }

    /// The release that gets new packages first.
    #[must_use]
    pub fn newest_suite(&self) -> &str {
        match self.distribution {
            Distribution::Debian => "sid",
            Distribution::Ubuntu => &self.host_suite,
        }
    }

    /// The package that depends on the newest general-purpose kernel of a release.
    #[must_use]
    pub fn generic_kernel(&self) -> &'static str {
        match self.distribution {
            Distribution::Debian => "linux-image-amd64",
            Distribution::Ubuntu => "linux-image-generic",
        }
    }

    /// The package that depends on the kernel meant for virtual machines.
    #[must_use]
    pub fn cloud_kernel(&self) -> &'static str {
        match self.distribution {
            Distribution::Debian => "linux-image-cloud-amd64",
            Distribution::Ubuntu => "linux-image-virtual",
        }
    }

    /// A one-line apt source for `suite`: package lists only, no translations or icons.
    #[must_use]
    pub fn source_line(&self, suite: &str) -> String {
        self.line("deb", "arch=amd64 target=Packages", suite)
    }

    /// A one-line apt source for what packages of `suite` are made of.
    #[must_use]
    pub fn sources_line(&self, suite: &str) -> String {
        self.line("deb-src", "target=Sources", suite)
    }

    fn line(&self, kind: &str, options: &str, suite: &str) -> String {
        let (keyring, components) = match self.distribution {
            Distribution::Debian => ("debian-archive-keyring.gpg", "main"),
            Distribution::Ubuntu => ("ubuntu-archive-keyring.gpg", "main universe"),
        };
        let keyring = format!("/usr/share/keyrings/{keyring}");
        let signed = if Path::new(&keyring).exists() {
            format!("signed-by={keyring} ")
        } else {
            String::new()
        };
        format!(
            "{kind} [{signed}{options}] {} {suite} {components}",
            self.uri
        )
    }
}

fn os_release(text: &str) -> HashMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
        .collect()
}

/// The text of every apt source file: deb822 files and one-line files alike.
fn apt_sources() -> Vec<String> {
    let mut paths = vec!["/etc/apt/sources.list".into()];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(entries.flatten().map(|entry| entry.path()));
    }
    paths.sort();
    paths
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect()
}

/// The address of the first source that carries exactly `suite` (not its updates) in `main`.
fn find_uri(sources: &[String], suite: &str) -> Option<String> {
    sources
        .iter()
        .find_map(|text| one_line_uri(text, suite).or_else(|| deb822_uri(text, suite)))
}

fn one_line_uri(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line
            .trim()
            .strip_prefix("deb")?
            .strip_prefix([' ', '\t'])?
            .trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next()? == suite && words.any(|word| word == "main")).then(|| uri.to_owned())
    })
}

fn deb822_uri(text: &str, suite: &str) -> Option<String> {
    let without_comments: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    without_comments
        .join("\n")
        .split("\n\n")
        .find_map(|stanza| {
            let field = |name: &str| {
                stanza.lines().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then(|| value.trim())
                })
            };
            let has = |name: &str, word: &str| {
                field(name).is_some_and(|value| value.split_whitespace().any(|each| each == word))
            };
            let enabled = field("Enabled").is_none_or(|value| !value.eq_ignore_ascii_case("no"));
            let fits =
                enabled && has("Types", "deb") && has("Suites", suite) && has("Components", "main");
            fits.then(|| field("URIs")?.split_whitespace().next().map(str::to_owned))
                .flatten()
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reads_deb822_sources() {
        let text = "Types: deb\n# a comment\nURIs: http://one.test/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main\n\n\
                    Types: deb\nURIs: http://two.test/security\nSuites: bookworm-security\n\
                    Components: main\n";
        let find = |suite| find_uri(&[text.to_owned()], suite);
        assert_eq!(find("bookworm").unwrap(), "http://one.test/debian");
        assert_eq!(
            find("bookworm-security").unwrap(),
            "http://two.test/security"
        );
        assert_eq!(find("trixie"), None);
    }

    #[test]
    fn reads_one_line_sources_and_skips_comments_and_disabled_stanzas() {
        let text = "# deb http://no.test/debian bookworm main\n\
                    deb-src http://no.test/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k] http://yes.test/debian bookworm contrib main\n";
        assert_eq!(
            find_uri(&[text.to_owned()], "bookworm").unwrap(),
            "http://yes.test/debian"
        );
        let off = "Enabled: no\nTypes: deb\nURIs: http://x.test\nSuites: noble\nComponents: main\n";
        assert_eq!(find_uri(&[off.to_owned()], "noble"), None);
    }
}
