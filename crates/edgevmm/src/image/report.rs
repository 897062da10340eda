//! What `image` tells of images, for people and as JSON.

use std::fmt::Write as _;
use std::io::{self, BufWriter, StdoutLock, Write};

use anyhow::Context;
use edgevmm_block::DiskPaths;
use edgevmm_image::{Checked, Comparison, Info, MapRange, Qcow2Info, SnapshotInfo};
use serde::Serialize;

/// Findings of a check that are shown.
const FINDINGS: usize = 20;

/// A number of bytes for people: exactly, and rounded where that is shorter.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let Some((unit, shift)) = UNITS.iter().find(|(_, shift)| bytes >> shift > 0) else {
        return format!("{bytes} bytes");
    };
    // To a tenth, without the rounding of floats.
    let tenths = (u128::from(bytes) * 10 + (1 << (shift - 1))) >> shift;
    let (whole, tenth) = (tenths / 10, tenths % 10);
    match tenth {
        0 => format!("{whole} {unit} ({bytes} bytes)"),
        _ => format!("{whole}.{tenth} {unit} ({bytes} bytes)"),
    }
}

/// Prints JSON, if anybody reads it.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("Can't write JSON")?;
    print(&(text + "\n"))
}

/// Prints text, if anybody reads it.
pub fn print(text: &str) -> anyhow::Result<()> {
    broken_pipe_is_fine(io::stdout().write_all(text.as_bytes()))
}

/// Lets a reader leave when it has read enough.
pub fn broken_pipe_is_fine(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("Can't write to standard output")
        }
        _ => Ok(()),
    }
}

/// Describes an image and those below it.
pub fn info(info: &Info) -> anyhow::Result<()> {
    let mut text = String::new();
    for (depth, image) in std::iter::once(info).chain(&info.chain).enumerate() {
        if depth > 0 {
            text.push('\n');
        }
        describe(image, &mut text)?;
    }
    print(&text)
}

fn describe(image: &Info, text: &mut String) -> std::fmt::Result {
    let mut line = |name: &str, value: &str| {
        if value.is_empty() {
            Ok(())
        } else {
            writeln!(text, "  {name:<14}{value}")
        }
    };
    line("image", &image.path)?;
    let version = image
        .qcow2
        .as_ref()
        .map(|own| format!(", version {}", own.version));
    line(
        "format",
        &(image.format.clone() + &version.unwrap_or_default()),
    )?;
    line("disk size", &bytes(image.virtual_size))?;
    line("takes up", &bytes(image.host_size))?;
    if let Some(backing) = &image.backing {
        let format = backing.format.as_ref().map(|format| format!(" ({format})"));
        line(
            "base",
            &(backing.name.clone() + &format.unwrap_or_default()),
        )?;
        let checked = match &backing.problem {
            Some(problem) => problem,
            None if backing.checked => "recorded; checked whenever it is used",
            None => "not recorded; must not change",
        };
        line("base content", checked)?;
    }
    if let Some(own) = &image.qcow2 {
        line("clusters", &clusters(own))?;
        line("features", &features(own))?;
        if let Some(file) = &own.data_file {
            let name = file.name.as_deref().unwrap_or("a file that is not named");
            let raw = if file.raw { " (raw)" } else { "" };
            line("data file", &format!("{name}{raw}"))?;
        }
        line("state", state(own))?;
        let names: Vec<_> = own.snapshots.iter().map(|it| it.name.as_str()).collect();
        line("snapshots", &names.join(", "))?;
    }
    Ok(())
}

fn clusters(own: &Qcow2Info) -> String {
    let parts = if own.extended_l2 {
        ", each of 32 subclusters"
    } else {
        ""
    };
    let size = edgevmm_config::ByteSize(own.cluster_size);
    format!("{size}{parts}, {}-bit refcounts", own.refcount_bits)
}

fn features(own: &Qcow2Info) -> String {
    let encryption = own.encryption.map(|how| format!("encrypted ({how})"));
    let bitmaps = (own.bitmaps > 0).then(|| format!("{} persistent bitmaps", own.bitmaps));
    let features = [
        encryption,
        (own.compression != "zlib").then(|| format!("compression by {}", own.compression)),
        own.lazy_refcounts.then(|| "lazy refcounts".to_owned()),
        bitmaps,
    ];
    features
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

fn state(own: &Qcow2Info) -> &'static str {
    if own.corrupt {
        "marked as damaged; `edgevmm image check --repair` may mend it"
    } else if own.dirty {
        "not closed cleanly, or in use; `edgevmm image check --repair` mends it"
    } else {
        ""
    }
}

/// Lists internal snapshots.
pub fn snapshots(snapshots: &[SnapshotInfo]) -> anyhow::Result<()> {
    let mut text = format!("{:<6}{:<24}{:<22}{}\n", "ID", "NAME", "TAKEN", "DISK SIZE");
    for snapshot in snapshots {
        let SnapshotInfo { id, name, .. } = snapshot;
        let taken = utc(snapshot.taken);
        let size = bytes(snapshot.virtual_size);
        writeln!(text, "{id:<6}{name:<24}{taken:<22}{size}")?;
    }
    print(&text)
}

/// A time in seconds since 1970, as a date and time in UTC.
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Days are counted from the first of March of the year 0, so that leap days come last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + next;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

/// Tells what a check found.
pub fn check(paths: &DiskPaths, checked: &Checked) -> anyhow::Result<()> {
    let mut text = String::new();
    for finding in checked.messages.iter().take(FINDINGS) {
        writeln!(text, "{finding}")?;
    }
    let found = checked.corruptions + checked.leaks;
    let more = found.saturating_sub(checked.messages.len().min(FINDINGS) as u64);
    if more > 0 {
        writeln!(text, "and {more} more findings")?;
    }
    let name = paths.hint();
    let Checked {
        corruptions,
        corruptions_fixed,
        leaks,
        leaks_fixed,
        format,
        ..
    } = checked;
    if found > 0 {
        writeln!(
            text,
            "{corruptions} errors, {corruptions_fixed} of them mended"
        )?;
        writeln!(
            text,
            "{leaks} lost clusters, {leaks_fixed} of them given back"
        )?;
    }
    let verdict = if checked.is_damaged() {
        "is damaged; `edgevmm image check --repair` mends what can be mended (copy it first)"
    } else if checked.has_leaks() {
        "is sound, but clusters are lost; `edgevmm image check --repair=leaks` gives them back"
    } else if found > 0 {
        "is sound now"
    } else {
        "is sound"
    };
    writeln!(text, "{name} ({format}) {verdict}")?;
    if let Some(clusters) = checked.clusters {
        let of_allocated = |part: u64| part * 100 / clusters.allocated.max(1);
        writeln!(
            text,
            "{} of {} clusters are allocated; of these {}% are compressed, {}% fragmented",
            clusters.allocated,
            clusters.total,
            of_allocated(clusters.compressed),
            of_allocated(clusters.fragmented)
        )?;
    }
    print(&text)
}

/// Tells how two images compare.
pub fn comparison(comparison: &Comparison) -> anyhow::Result<()> {
    let [one, other] = comparison.sizes;
    let text = match comparison.first_difference {
        Some(at) => format!("The images differ from byte {at} on\n"),
        None if one == other => "The images have the same content\n".to_owned(),
        None => format!(
            "The images have the same content but for their sizes, {one} and {other} bytes\n"
        ),
    };
    print(&text)
}

/// Writes a map as it comes.
#[derive(Debug)]
pub struct MapWriter {
    out: BufWriter<StdoutLock<'static>>,
    json: bool,
    first: bool,
}

impl MapWriter {
    pub fn new(json: bool) -> Self {
        Self {
            out: BufWriter::new(io::stdout().lock()),
            json,
            first: true,
        }
    }

    /// Writes a range.
    ///
    /// # Errors
    ///
    /// Standard output refuses.
    pub fn range(&mut self, range: &MapRange) -> io::Result<()> {
        let first = std::mem::replace(&mut self.first, false);
        if self.json {
            self.out.write_all(if first { b"[" } else { b",\n " })?;
            return serde_json::to_writer(&mut self.out, range).map_err(Into::into);
        }
        if first {
            self.head()?;
        }
        let kind = match range {
            MapRange { present: false, .. } => "unallocated",
            MapRange {
                compressed: true, ..
            } => "compressed",
            MapRange { zero: true, .. } => "zero",
            _ => "data",
        };
        let depth = if range.present {
            range.depth.to_string()
        } else {
            "-".to_owned()
        };
        let offset = range
            .offset
            .map_or_else(|| "-".to_owned(), |at| format!("{at:#x}"));
        let (start, length) = (range.start, range.length);
        writeln!(
            self.out,
            "{start:<#18x}{length:<#18x}{kind:<13}{depth:<7}{offset}"
        )
    }

    fn head(&mut self) -> io::Result<()> {
        writeln!(
            self.out,
            "{:<18}{:<18}{:<13}{:<7}OFFSET IN FILE",
            "START", "LENGTH", "KIND", "IMAGE"
        )
    }

    /// Writes what comes last.
    ///
    /// # Errors
    ///
    /// Standard output refuses.
    pub fn end(&mut self) -> io::Result<()> {
        if self.json {
            self.out
                .write_all(if self.first { b"[]\n" } else { b"]\n" })?;
        } else if self.first {
            self.head()?;
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_and_short() {
        for (size, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB (1024 bytes)"),
            (1536, "1.5 KiB (1536 bytes)"),
            (8 << 30, "8 GiB (8589934592 bytes)"),
            ((8 << 30) + 1, "8 GiB (8589934593 bytes)"),
            (u64::MAX, "16777216 TiB (18446744073709551615 bytes)"),
        ] {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn times_are_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (951_868_799, "2000-02-29 23:59:59Z"),
            (951_868_800, "2000-03-01 00:00:00Z"),
            (1_735_689_599, "2024-12-31 23:59:59Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
