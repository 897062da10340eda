//! Works around a bug of QEMU's emulated SVM in a private copy of the program.
//!
//! When an L2 guest writes CR8 while L1's KVM waits for an interrupt window, `helper_write_crN`
//! (`target/i386/tcg`) raises the virtual interrupt without QEMU's big lock, and the assertion at
//! the top of `tcg_handle_interrupt` ends QEMU. The flag is set on the calling vCPU itself, which
//! needs no lock, so the copy simply does not check. Seen in QEMU 7.2 and 10.0; OVMF guests always
//! meet it, SeaBIOS and Linux do not.

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection, ObjectSymbol};

/// `test %al,%al`: looks at what `bql_locked` returned.
const TEST_AL: [u8; 2] = [0x84, 0xc0];

/// How far into the function the check is.
const PROLOGUE: usize = 48;

/// Returns the program `elf` without the check.
///
/// # Errors
/// The function or the check is not where this knows to find it.
pub fn without_lock_check(mut elf: Vec<u8>) -> Result<Vec<u8>> {
    let start = function_offset(&elf, "tcg_handle_interrupt")?;
    let code = elf
        .get_mut(start..start + PROLOGUE)
        .context("The function is cut off")?;
    let test = code
        .windows(2)
        .position(|pair| pair == TEST_AL)
        .context("No check found")?;
    let branch = code
        .get_mut(test + 2..test + 8)
        .context("The check is cut off")?;
    match *branch {
        // jne past the failure: always.
        [0x75, ..] => branch[0] = 0xeb,
        // je (short, near) to the failure: never.
        [0x74, ..] => branch[..2].fill(0x90),
        [0x0f, 0x84, ..] => branch.fill(0x90),
        _ => bail!("Unknown code {branch:02x?} after the check"),
    }
    Ok(elf)
}

fn function_offset(elf: &[u8], name: &str) -> Result<usize> {
    let file = object::File::parse(elf).context("Not an ELF file")?;
    let symbol = file
        .dynamic_symbols()
        .find(|symbol| symbol.name() == Ok(name))
        .with_context(|| format!("No function {name}"))?;
    let offset = file.sections().find_map(|section| {
        let inside = symbol.address().checked_sub(section.address())?;
        let (start, _) = section.file_range()?;
        (inside < section.size()).then(|| start + inside)
    });
    Ok(usize::try_from(
        offset.context("The function is in no section")?,
    )?)
}
