//! What the tests need and make when it is missing: the lab and the images.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask::images::{Image, Images};
use xtask::lab::{Layout, setup_tools};
use xtask::pods::Pods;

use crate::binary::cargo;

/// Makes an image unless it is there, and tells where all images are.
///
/// # Errors
/// It cannot be made.
pub fn image(image: Image) -> Result<Images> {
    let images = Images::of_this_user();
    images.ensure(image)?;
    Ok(images)
}

/// What runs containers.
///
/// # Errors
/// It cannot be had.
pub(crate) fn pods() -> Result<Pods> {
    Pods::ensure()
}

/// A busybox that runs anywhere, with a DHCP server in it.
pub(crate) fn busybox() -> Result<PathBuf> {
    tool("usr/bin/busybox")
}

/// iPXE for SeaBIOS and virtio, as QEMU's packages have it.
///
/// # Errors
/// It cannot be had.
pub fn net_rom() -> Result<PathBuf> {
    tool("usr/share/qemu/pxe-virtio.rom")
}

fn tool(path: &str) -> Result<PathBuf> {
    let layout = Layout::of_this_user();
    let tools = if layout.is_ready()? {
        layout.tools()
    } else {
        setup_tools(&layout)?
    };
    Ok(tools.path(path))
}

/// Makes the lab unless it is ready.
pub(crate) fn lab() -> Result<()> {
    if Layout::of_this_user().is_ready()? {
        return Ok(());
    }
    let mut setup: Command = cargo();
    setup.args(["run", "--quiet", "--package", "xtask", "--", "lab", "setup"]);
    let status = setup.status().context("Cannot start cargo")?;
    ensure!(status.success(), "The lab cannot be set up");
    Ok(())
}
