//! A guest, seen through its console.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::command::{Command, Output};
use crate::host::{Host, Limit};
use crate::process::Process;
use crate::{Image, WindowSize, image};

/// Tells the answers to commands apart, also those of earlier attachments to the same console.
static COMMANDS: AtomicU32 = AtomicU32::new(0);

/// Arguments of a small machine without network.
pub const SMALL: [&str; 6] = ["--cpus", "1", "--memory", "256M", "--net", "none"];

/// A console: that of a machine in the foreground, or an attachment to one in the background.
#[derive(Debug)]
pub struct Guest<'h> {
    host: &'h Host,
    process: Process<'h>,
    seen: usize,
}

impl<'h> Guest<'h> {
    /// Starts `edgevmm` with these arguments, its console on pipes.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start<S: Into<String>>(
        host: &'h Host,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        Self::of(host, &host.edgevmm(arguments))
    }

    /// Takes the output of a command for a console.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn of(host: &'h Host, command: &Command) -> Result<Self> {
        Ok(Self {
            host,
            process: host.spawn(command)?,
            seen: 0,
        })
    }

    /// Arguments of `edgevmm` for booting the kernel directly into a shell. More words for its
    /// command line may be given.
    ///
    /// # Errors
    /// There is no kernel.
    pub fn shell_arguments(host: &Host, words: &str) -> Result<Vec<String>> {
        let images = image(Image::Kernel)?;
        let cmdline = format!("console=ttyS0 quiet edgevmm.shell {words}");
        let boot = [
            "run".to_owned(),
            "--kernel".to_owned(),
            host.shared(&images.vmlinux())?,
            "--initrd".to_owned(),
            host.shared(&images.initrd())?,
            "--cmdline".to_owned(),
            cmdline,
        ];
        Ok(boot.into())
    }

    /// Waits for the shell of the initial RAM disk; gives what it says of the machine.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect_shell(&mut self) -> Result<String> {
        self.expect_report("INITRD-SHELL")
    }

    /// Waits for the shell of the mini disk; gives what it says of the machine.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect_mini(&mut self) -> Result<String> {
        self.expect_report("MINI-READY")
    }

    fn expect_report(&mut self, marker: &str) -> Result<String> {
        self.expect(marker, Limit::Boot)?;
        let report = self.expect("\n", Limit::Command)?;
        self.expect("# ", Limit::Command)?;
        Ok(report.trim().to_owned())
    }

    /// Waits for `text`, after what was waited for before; gives what came before it.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect(&mut self, text: &str, limit: Limit) -> Result<String> {
        let timeout = self.host.limit(limit);
        let end = self.process.wait_for_stdout(text, self.seen, timeout)?;
        let output = self.process.stdout();
        let before = output.get(self.seen..end.saturating_sub(text.len()));
        self.seen = end;
        Ok(before.unwrap_or_default().to_owned())
    }

    /// Whether `text` does not come for so long, from now on.
    #[must_use]
    pub fn is_silent(&self, text: &str, time: Duration) -> bool {
        let now = self.process.stdout().len();
        self.process.wait_for_stdout(text, now, time).is_err()
    }

    /// Forgets what has come so far.
    pub fn skip(&mut self) {
        self.seen = self.process.stdout().len();
    }

    /// What has come so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.process.stdout()
    }

    /// Types something.
    ///
    /// # Errors
    /// The console takes no input.
    pub fn type_in(&self, text: &str) -> Result<()> {
        self.process.write(text)
    }

    /// Logs in at a prompt for it.
    ///
    /// # Errors
    /// There is none, or the guest refuses.
    pub fn log_in(&mut self, user: &str, password: &str) -> Result<()> {
        self.expect("login: ", Limit::Distribution)?;
        self.type_in(&format!("{user}\n"))?;
        self.expect("assword: ", Limit::Boot)?;
        self.type_in(&format!("{password}\n"))?;
        self.expect("# ", Limit::Boot)?;
        Ok(())
    }

    /// Has the guest's shell run a command; gives its exit code and output.
    ///
    /// # Errors
    /// It does not end.
    pub fn run(&mut self, command: &str) -> Result<(i32, String)> {
        let number = COMMANDS.fetch_add(1, Ordering::Relaxed);
        // Put together by the shell, so that the line's echo does not have them.
        let (begin, end) = (format!("BEGIN-{number}-"), format!("END-{number}-"));
        self.type_in(&format!(
            "echo BEGIN'-{number}-'; {command}; echo END'-{number}-'$?'-'\n"
        ))?;
        self.expect(&end, Limit::Boot)?;
        let code = self.expect("-", Limit::Command)?;
        let all = self.process.stdout();
        let said = all.rsplit_once(&begin).map(|(_, after)| after);
        let said = said.and_then(|after| Some(after.rsplit_once(&end)?.0));
        let said = said.context("The guest's answer has no begin")?;
        let code = code
            .parse()
            .with_context(|| format!("Exit code {code:?}"))?;
        Ok((code, said.replace('\r', "").trim().to_owned()))
    }

    /// Has the guest's shell run a command that must succeed; gives its output.
    ///
    /// # Errors
    /// It fails.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        let (code, said) = self.run(command)?;
        ensure!(
            code == 0,
            "`{command}` in the guest ended with {code}: {said}"
        );
        Ok(said)
    }

    /// Changes the size of the terminal that `edgevmm` runs on.
    ///
    /// # Errors
    /// It has none, or has ended.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        self.process.resize(size)
    }

    /// Sends `edgevmm` a signal, by number.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, number: i32) -> Result<()> {
        self.process.signal(number)
    }

    /// Waits until `edgevmm` ends.
    ///
    /// # Errors
    /// It does not.
    pub fn end(self, limit: Limit) -> Result<Output> {
        self.process.wait(self.host.limit(limit))
    }
}
