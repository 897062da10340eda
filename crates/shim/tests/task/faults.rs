//! What is broken, or breaks: the end is clear, and nothing is left.

use std::fs;

use edgevmm_shim::proto::task::DeleteResponse;
use edgevmm_shim::ttrpc::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;

use crate::run;
use crate::shim::{Shim, children, eventually};

fn sigkill(pid: u32) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

fn is_there(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

#[test]
fn a_killed_vmm_is_the_end_of_its_container() {
    run(async {
        let shim = Shim::start("a").await;
        shim.run("a").await;
        let machine = shim.machine("a").unwrap();
        let (daemon, vmm) = shim.pids("a").await;
        sigkill(vmm);
        assert_eq!(shim.wait("a", "").await, Ok(137));
        assert_eq!(shim.kill("a", 15).await.unwrap_err().code, Code::NotFound);
        assert_eq!(shim.delete("a").await, Ok(137));
        assert_eq!(shim.leftovers(&[machine]), Vec::<String>::new());
        assert_eq!(children(daemon), Vec::<u32>::new());
    });
}

#[test]
fn a_killed_daemon_takes_its_vmm_along_and_delete_clears_up() {
    run(async {
        let shim = Shim::start("a").await;
        shim.run("a").await;
        let machine = shim.machine("a").unwrap();
        let (daemon, vmm) = shim.pids("a").await;
        sigkill(daemon);
        eventually("the VMM lives on", || !is_there(vmm)).await;
        for _ in 0..2 {
            let output = shim.command("a", "delete", &[]);
            assert!(output.status.success(), "{output:?}");
            let response = DeleteResponse::decode(output.stdout.as_slice()).unwrap();
            assert_eq!(response.exit_status, 137);
            assert_eq!(
                shim.leftovers(std::slice::from_ref(&machine)),
                Vec::<String>::new()
            );
            assert_eq!(shim.sockets(), 0);
        }
    });
}

#[test]
fn bundles_that_are_half_made_are_refused_and_cleared_up() {
    run(async {
        let shim = Shim::start("a").await;
        fs::remove_file(shim.bundle_path("a").join("config.json")).unwrap();
        shim.create("a").await.unwrap_err();
        fs::write(shim.bundle_path("a").join("config.json"), "{").unwrap();
        shim.create("a").await.unwrap_err();
        fs::write(shim.bundle_path("a").join("edgevmm.json"), "{").unwrap();
        for _ in 0..2 {
            let output = shim.command("a", "delete", &[]);
            assert!(output.status.success(), "{output:?}");
        }
        fs::remove_dir_all(shim.bundle_path("a")).unwrap();
        shim.create("a").await.unwrap_err();
        // The daemon is as good as new.
        shim.bundle("a", "/boot/guest");
        shim.run("a").await;
        shim.kill("a", 9).await.unwrap();
        shim.wait("a", "").await.unwrap();
        shim.delete("a").await.unwrap();
    });
}

#[test]
fn images_without_one_disk_are_refused_by_name() {
    run(async {
        let shim = Shim::start("a").await;
        shim.bundle("a", "");
        let refused = |words: &'static [&'static str]| {
            let shim = &shim;
            async move {
                let error = shim.create("a").await.unwrap_err();
                assert_eq!(error.code, Code::InvalidArgument, "{error}");
                for word in words {
                    assert!(error.message.contains(word), "{error}");
                }
                assert_eq!(shim.leftovers(&[]), Vec::<String>::new());
            }
        };
        refused(&["no disk in /disk"]).await;
        let disks = shim.image().join("disk");
        fs::create_dir(&disks).unwrap();
        refused(&["no disk in /disk"]).await;
        for name in ["one.raw", "two.raw"] {
            fs::write(disks.join(name), [0; 512]).unwrap();
        }
        refused(&["one.raw, two.raw", "edgevmm.io/disk"]).await;
    });
}

#[test]
fn a_full_disk_is_told_at_the_start() {
    run(async {
        let shim = Shim::start("a").await;
        shim.bundle("a", "/boot/guest");
        let image = shim.image();
        fs::create_dir(image.join("disk")).unwrap();
        let options = Some("size=64k,nr_inodes=64");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("full"), &image, Some("tmpfs"), flags, options).unwrap();
        let unmount = Unmount(image.clone());
        for folder in ["disk", "boot"] {
            fs::create_dir(image.join(folder)).unwrap();
        }
        fs::write(image.join("boot/guest"), crate::guest::elf()).unwrap();
        let disk = fs::File::create(image.join("disk/disk.raw")).unwrap();
        disk.set_len(1 << 20).unwrap();
        // Nobody cares how much fits.
        let _ = fs::write(image.join("filler"), vec![0; 64 << 10]);
        shim.create("a").await.unwrap();
        let error = shim.plain("Start", "a").await.unwrap_err();
        assert!(error.message.contains("No space left"), "{error}");
        shim.wait("a", "").await.unwrap();
        shim.delete("a").await.unwrap();
        drop(unmount);
        assert_eq!(shim.leftovers(&[]), Vec::<String>::new());
    });
}

/// A mount of a test's.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
