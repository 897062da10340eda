//! Recognises user-data the way cloud-init does, so that a mistake shows on the host and not as a
//! line in the guest's log.

use thiserror::Error;

/// What cloud-init looks for at the start of a text, and what it then takes the text for.
const STARTS: [(&str, UserDataFormat); 9] = [
    ("#cloud-config-archive", UserDataFormat::CloudConfigArchive),
    ("#cloud-config-jsonp", UserDataFormat::CloudConfigJsonPatch),
    ("#cloud-config", UserDataFormat::CloudConfig),
    ("#cloud-boothook", UserDataFormat::BootHook),
    ("#part-handler", UserDataFormat::PartHandler),
    ("#include-once", UserDataFormat::Include),
    ("#include", UserDataFormat::Include),
    ("## template: jinja", UserDataFormat::Jinja),
    ("#!", UserDataFormat::Script),
];

/// How much of a text cloud-init searches for a MIME header.
const MIME_SEARCH: usize = 4096;

/// The form of a piece of user-data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserDataFormat {
    /// YAML after `#cloud-config`.
    CloudConfig,
    /// A list of parts after `#cloud-config-archive`.
    CloudConfigArchive,
    /// A JSON patch after `#cloud-config-jsonp`.
    CloudConfigJsonPatch,
    /// A program that runs on every boot, after `#cloud-boothook`.
    BootHook,
    /// Python after `#part-handler`.
    PartHandler,
    /// URLs after `#include` or `#include-once`.
    Include,
    /// A template after `## template: jinja`.
    Jinja,
    /// A script after `#!`.
    Script,
    /// A MIME message, of several parts as a rule.
    Mime,
    /// Any of the others, compressed with gzip.
    Gzip,
    /// Nothing but white space.
    Empty,
}

/// Why cloud-init would ignore a piece of user-data.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UserDataError {
    /// It is neither text nor gzip.
    #[error("User-data is neither UTF-8 text nor gzip (byte {offset} is no text)")]
    Binary {
        /// Where the text ends.
        offset: usize,
    },
    /// A byte order mark hides the first line from cloud-init.
    #[error("User-data begins with a byte order mark, which cloud-init does not skip: remove it")]
    ByteOrderMark,
    /// The first line is none that cloud-init knows.
    #[error(
        "User-data begins with {line:?}, which cloud-init ignores: \
         begin with `#cloud-config` for YAML or `#!/bin/sh` for a script"
    )]
    Unknown {
        /// Start of the first line that is not blank.
        line: String,
    },
}

impl UserDataFormat {
    /// Tells the form of `data`.
    ///
    /// # Errors
    /// Fails when cloud-init would ignore it.
    pub fn detect(data: &[u8]) -> Result<Self, UserDataError> {
        if data.starts_with(&[0x1f, 0x8b]) {
            return Ok(Self::Gzip);
        }
        let text = std::str::from_utf8(data).map_err(|error| UserDataError::Binary {
            offset: error.valid_up_to(),
        })?;
        let head = data.get(..MIME_SEARCH).unwrap_or(data);
        if String::from_utf8_lossy(head)
            .to_ascii_lowercase()
            .contains("mime-version:")
        {
            return Ok(Self::Mime);
        }
        if text.starts_with('\u{feff}') {
            return Err(UserDataError::ByteOrderMark);
        }
        let text = text.trim_start();
        if text.is_empty() {
            return Ok(Self::Empty);
        }
        let begins = |start: &str| {
            let head = text.as_bytes().get(..start.len());
            head.is_some_and(|head| head.eq_ignore_ascii_case(start.as_bytes()))
        };
        match STARTS.iter().find(|(start, _)| begins(start)) {
            Some((_, format)) => Ok(*format),
            None => Err(UserDataError::Unknown {
                line: text
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .chars()
                    .take(40)
                    .collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_that_cloud_init_knows() {
        use UserDataFormat::*;
        for (data, format) in [
            ("#cloud-config\nusers: []\n", CloudConfig),
            ("\r\n  #Cloud-Config\r\n", CloudConfig),
            ("#cloud-config-archive\n", CloudConfigArchive),
            ("#cloud-config-jsonp\n", CloudConfigJsonPatch),
            ("#cloud-boothook\n", BootHook),
            ("#part-handler\n", PartHandler),
            ("#include-once\nhttp://a/\n", Include),
            ("#include\nhttp://a/\n", Include),
            ("## template: jinja\n#cloud-config\n", Jinja),
            ("#!/bin/sh\n", Script),
            (
                "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n",
                Mime,
            ),
            (" \n", Empty),
            ("", Empty),
        ] {
            assert_eq!(
                UserDataFormat::detect(data.as_bytes()),
                Ok(format),
                "{data:?}"
            );
        }
        assert_eq!(UserDataFormat::detect(&[0x1f, 0x8b, 8, 0xff]), Ok(Gzip));
    }

    #[test]
    fn what_cloud_init_would_ignore() {
        for line in ["users: []", "# cloud-config", "#cloud_config", "hello"] {
            assert_eq!(
                UserDataFormat::detect(format!("\n{line}\nmore").as_bytes()),
                Err(UserDataError::Unknown {
                    line: line.to_owned()
                })
            );
        }
        assert_eq!(
            UserDataFormat::detect("\u{feff}#cloud-config".as_bytes()),
            Err(UserDataError::ByteOrderMark)
        );
        assert_eq!(
            UserDataFormat::detect(b"#cloud-config\n\xff"),
            Err(UserDataError::Binary { offset: 14 })
        );
        let long = "\u{e9}".repeat(5000);
        assert_eq!(
            UserDataFormat::detect(long.as_bytes()),
            Err(UserDataError::Unknown {
                line: "\u{e9}".repeat(40)
            })
        );
    }
}
