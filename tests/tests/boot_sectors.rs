//! Disks and discs whose first sectors are wrong: clear, bounded, and the host goes on.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, SMALL, on_host};

/// SIGINT and SIGTERM.
const INTERRUPT: i32 = 2;
const TERMINATE: i32 = 15;

/// Says `!` on the serial port, then goes on for ever.
const LOOPS: &str = r"\xba\xf8\x03\xb0\x21\xee\xeb\xfe";
/// Says so too, then has an exception with no room for a handler, or for any other.
const TRIPLE_FAULT: &str = r"\xba\xf8\x03\xb0\x21\xee\x0f\x01\x1e\x10\x7c\xcc\xeb\xfe";

/// Boots from this file.
fn start<'h>(host: &'h Host, medium: &[&str]) -> Result<Guest<'h>> {
    let arguments = ["run", "--name", "bad"].iter().chain(&SMALL).chain(medium);
    Guest::start(host, arguments.copied())
}

/// Makes a disk whose boot sector is this code.
fn disk(host: &Host, code: &str) -> Result<()> {
    host.ok(&Command::script(format!(
        "truncate -s 1M disk.raw; printf '{code}' | dd of=disk.raw conv=notrunc; \
         printf '\\x55\\xaa' | dd of=disk.raw bs=1 seek=510 conv=notrunc"
    )))?;
    Ok(())
}

/// The button, which nobody reads, then force.
fn end(guest: Guest<'_>) -> Result<()> {
    guest.signal(TERMINATE)?;
    guest.signal(INTERRUPT)?;
    guest.end(Limit::Boot)?.expect_code(4)?;
    Ok(())
}

#[test]
fn bad_boot_sectors_harm_nobody_else() -> Result<()> {
    on_host(|host| {
        disk(host, LOOPS)?;
        let mut guest = start(host, &["disk.raw"])?;
        guest.expect("!", Limit::Boot)?;
        let state = host.ok(&host.edgevmm(["inspect", "bad"]))?;
        ensure!(state.contains("state: running"), "{state}");
        end(guest)?;

        host.ok(&Command::script("rm disk.raw"))?;
        disk(host, TRIPLE_FAULT)?;
        let mut guest = start(host, &["disk.raw"])?;
        guest.expect("!", Limit::Boot)?;
        let output = guest.end(Limit::Command)?;
        output.expect_code(3)?;
        ensure!(
            output.stderr.to_lowercase().contains("triple fault"),
            "{}",
            output.stderr
        );

        // A boot record that names a catalogue of noise, and one beyond the end of the disc.
        host.ok(&Command::script(
            "truncate -s 36K noise.iso; \
             printf '\\x00CD001\\x01EL TORITO SPECIFICATION' | \
                 dd of=noise.iso bs=1 seek=34816 conv=notrunc; \
             cp noise.iso cut.iso; \
             printf '\\x12' | dd of=noise.iso bs=1 seek=34887 conv=notrunc; \
             head -c 64K /dev/urandom >> noise.iso; \
             printf '\\xff\\xff\\xff\\x7f' | dd of=cut.iso bs=1 seek=34887 conv=notrunc",
        ))?;
        for disc in ["noise.iso", "cut.iso"] {
            let mut guest = start(host, &["--cdrom", disc])?;
            guest.expect("Boot failed: Could not read from CDROM", Limit::Boot)?;
            end(guest)?;
        }
        Ok(())
    })
}
