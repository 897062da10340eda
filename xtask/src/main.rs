//! Project tasks: the lab, test images, the run and test commands. `cargo xtask --help` lists them.

mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match commands::Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            xtask::progress::note(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
