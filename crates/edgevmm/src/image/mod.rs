//! `image`: making, converting, checking and mending disk images.

pub mod args;
pub mod report;
mod work;

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use edgevmm_block::qcow2::{Compression, CreateOptions, Repair};
use edgevmm_block::{BlockError, Existing};
use edgevmm_image::{Afterwards, ImageError, Job, NewSize, Target, TargetFormat};
use edgevmm_vmm::machine::disk_paths;

use crate::exit::{self, Failure, Outcome};
use args::{
    CheckArgs, CommitArgs, CompactArgs, CompareArgs, ConvertArgs, CreateArgs, ForceArg, FormatArgs,
    NewCompression, NewFormat, OneImage, OverlayArgs, RebaseArgs, RepairArg, ResizeArgs, Verb,
};
use report::{bytes, print_json};
use work::{shown, watched};

/// Does what a verb says.
///
/// # Errors
///
/// Why it could not be done.
pub fn run(verb: Verb) -> Outcome {
    match verb {
        Verb::Info(args) => info(&args),
        Verb::Create(args) => create(&args),
        Verb::Convert(args) => convert(&args),
        Verb::Check(args) => check(&args),
        Verb::Resize(args) => resize(&args),
        Verb::Overlay(args) => overlay(&args),
        Verb::Commit(args) => commit(&args),
        Verb::Rebase(args) => rebase(&args),
        Verb::Map(args) => map(&args),
        Verb::Compact(args) => compact(&args),
        Verb::Compare(args) => compare(&args),
        Verb::Snapshots(args) => snapshots(&args),
    }
}

/// The failure of something done to an image.
fn failure(error: ImageError) -> Failure {
    if error.is_out_of_space() {
        return Failure::host(error).hint(
            "make room on the filesystem, or name a file on another one; `df -h` shows how full \
             they are",
        );
    }
    let usage = match &error {
        ImageError::Block(BlockError::Exists { .. }) => {
            return Failure::usage(error).hint("--force replaces it once the new one is complete");
        }
        ImageError::Block(BlockError::File { source, .. }) => matches!(
            source.kind(),
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied
        ),
        ImageError::Block(BlockError::Io { .. } | BlockError::Flush(_)) => false,
        ImageError::Block(_) | ImageError::Unfit { .. } => true,
        ImageError::Io { .. } | ImageError::Cancelled { .. } => false,
    };
    if usage {
        Failure::usage(error)
    } else {
        Failure::host(error)
    }
}

fn info(args: &OneImage) -> Outcome {
    let info = edgevmm_image::info(&disk_paths(&args.image)).map_err(failure)?;
    if args.json.json {
        print_json(&info)?;
    } else {
        report::info(&info)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn snapshots(args: &OneImage) -> Outcome {
    let snapshots = edgevmm_image::snapshots(&disk_paths(&args.image)).map_err(failure)?;
    if args.json.json {
        print_json(&snapshots)?;
    } else {
        report::snapshots(&snapshots)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn create(args: &CreateArgs) -> Outcome {
    let target = target(&args.file, &args.format, false, &args.force)?;
    edgevmm_image::create(&target, args.size.0).map_err(failure)?;
    Ok(ExitCode::SUCCESS)
}

fn convert(args: &ConvertArgs) -> Outcome {
    let target = target(&args.file, &args.format, args.compress, &args.force)?;
    let source = disk_paths(&args.image);
    watched("Converting", |job| {
        edgevmm_image::convert(&source, &target, job)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn target(
    path: &Path,
    format: &FormatArgs,
    compress: bool,
    force: &ForceArg,
) -> Result<Target, Failure> {
    let FormatArgs {
        to,
        cluster_size,
        extended_l2,
        compression,
        refcount_bits,
        lazy_refcounts,
        qcow2_version,
    } = format;
    let format = match to {
        NewFormat::Raw => {
            let options = [
                ("--compress", compress),
                ("--cluster-size", cluster_size.is_some()),
                ("--extended-l2", *extended_l2),
                ("--compression", compression.is_some()),
                ("--refcount-bits", refcount_bits.is_some()),
                ("--lazy-refcounts", *lazy_refcounts),
                ("--qcow2-version", qcow2_version.is_some()),
            ];
            if let Some((flag, _)) = options.iter().find(|option| option.1) {
                let error = anyhow!("{flag} is for qcow2, and a raw image is asked for");
                return Err(Failure::usage(error).hint("leave it out, or leave out --to raw"));
            }
            TargetFormat::Raw
        }
        NewFormat::Qcow2 => {
            let default = CreateOptions::default();
            let options = CreateOptions {
                cluster_size: cluster_size.map_or(default.cluster_size, |size| size.0),
                extended_l2: *extended_l2,
                compression: match compression {
                    None | Some(NewCompression::Zlib) => Compression::Zlib,
                    Some(NewCompression::Zstd) => Compression::Zstd,
                },
                refcount_bits: refcount_bits.unwrap_or(default.refcount_bits),
                lazy_refcounts: *lazy_refcounts,
                version: qcow2_version.unwrap_or(default.version),
                ..default
            };
            TargetFormat::Qcow2 {
                options: Box::new(options),
                compress,
            }
        }
    };
    Ok(Target {
        path: path.to_owned(),
        existing: existing(force),
        format,
    })
}

fn existing(force: &ForceArg) -> Existing {
    if force.force {
        Existing::Replace
    } else {
        Existing::Keep
    }
}

fn check(args: &CheckArgs) -> Outcome {
    let repair = match args.repair {
        None => Repair::No,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    let paths = disk_paths(&args.image.image);
    let checked = shown("Checking", |job| edgevmm_image::check(&paths, repair, job))?;
    if args.image.json.json {
        print_json(&checked)?;
    } else {
        report::check(&paths, &checked)?;
    }
    Ok(if checked.is_damaged() {
        exit::DIFFERENT.into()
    } else if checked.has_leaks() {
        exit::LEAKS.into()
    } else {
        ExitCode::SUCCESS
    })
}

fn resize(args: &ResizeArgs) -> Outcome {
    let size = match args.size {
        args::NewSize::To(size) => NewSize::To(size.0),
        args::NewSize::By(size) => NewSize::By(size.0),
    };
    let paths = disk_paths(&args.image);
    let size = edgevmm_image::resize(&paths, size, args.shrink).map_err(|error| {
        let unfit = matches!(error, ImageError::Unfit { .. });
        let failure = failure(error);
        if unfit && !args.shrink {
            failure.hint("--shrink cuts a raw image off")
        } else {
            failure
        }
    })?;
    say(format_args!("{} now has {}", paths.hint(), bytes(size)))?;
    Ok(ExitCode::SUCCESS)
}

fn overlay(args: &OverlayArgs) -> Outcome {
    let base = disk_paths(&args.base);
    let size = args.size.map(|size| size.0);
    edgevmm_image::create_overlay(&base, &args.overlay, size, existing(&args.force))
        .map_err(failure)?;
    Ok(ExitCode::SUCCESS)
}

fn commit(args: &CommitArgs) -> Outcome {
    let base = disk_paths(&args.base);
    let afterwards = if args.delete {
        Afterwards::Delete
    } else {
        Afterwards::Empty
    };
    watched("Committing", |job| {
        edgevmm_image::commit(&args.overlay, &base, afterwards, job)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn rebase(args: &RebaseArgs) -> Outcome {
    let onto = args.onto.as_ref().map(disk_paths);
    match &args.from {
        Some(from) => watched("Rebasing", |job| {
            edgevmm_image::rebase(&args.overlay, &disk_paths(from), onto.as_ref(), job)
        })?,
        None => edgevmm_image::record_base(&args.overlay, onto.as_ref()).map_err(failure)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn map(args: &OneImage) -> Outcome {
    let paths = disk_paths(&args.image);
    let mut writer = report::MapWriter::new(args.json.json);
    let mut written = Ok(());
    let mapped = edgevmm_image::map(&paths, &Job::unattended(), |range| {
        written = writer.range(range);
        // A reader that has enough has what it wanted.
        if written.is_ok() {
            Ok(())
        } else {
            Err(ImageError::Cancelled {
                left: "nothing was changed",
            })
        }
    });
    if written.is_err() {
        report::broken_pipe_is_fine(written)?;
        return Ok(ExitCode::SUCCESS);
    }
    mapped.map_err(failure)?;
    report::broken_pipe_is_fine(writer.end())?;
    Ok(ExitCode::SUCCESS)
}

fn compact(args: &CompactArgs) -> Outcome {
    let compacted = watched("Compacting", |job| {
        edgevmm_image::compact(&args.image, args.compress, job)
    })?;
    let (before, after) = (bytes(compacted.before), bytes(compacted.after));
    let name = args.image.display();
    say(format_args!(
        "{name} took up {before} and takes up {after} now"
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn compare(args: &CompareArgs) -> Outcome {
    let [one, other] = [&args.image, &args.other].map(disk_paths);
    let comparison = watched("Comparing", |job| edgevmm_image::compare(&one, &other, job))?;
    if args.json.json {
        print_json(&comparison)?;
    } else {
        report::comparison(&comparison)?;
    }
    Ok(if comparison.is_same() {
        ExitCode::SUCCESS
    } else {
        exit::DIFFERENT.into()
    })
}

/// Writes a line to standard output.
fn say(text: std::fmt::Arguments<'_>) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{text}").context("Can't write to standard output")?;
    Ok(())
}
