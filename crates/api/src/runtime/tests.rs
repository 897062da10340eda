#![allow(clippy::unwrap_used)]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::*;
use crate::ExitReason;

fn runtime() -> (tempfile::TempDir, RuntimeDir) {
    let folder = tempfile::tempdir().unwrap();
    let runtime = RuntimeDir::new(folder.path().join("machines"));
    (folder, runtime)
}

#[test]
fn a_claim_lives_as_long_as_its_holder() {
    let (_folder, runtime) = runtime();
    assert!(runtime.list().unwrap().is_empty());
    let claim = runtime.claim("a").unwrap();
    let dir = runtime.open("a").unwrap();
    assert!(dir.is_alive().unwrap());
    assert_eq!(dir.pid().unwrap(), i32::try_from(std::process::id()).ok());
    assert!(matches!(
        runtime.claim("a"),
        Err(RuntimeDirError::NameInUse { .. })
    ));
    assert!(matches!(
        dir.clone().remove(),
        Err(RuntimeDirError::Alive { .. })
    ));
    assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);

    drop(claim);
    assert!(!dir.is_alive().unwrap());
    assert_eq!(dir.pid().unwrap(), None);
    assert_eq!(runtime.list().unwrap().len(), 1);
    dir.remove().unwrap();
    assert!(matches!(
        runtime.open("a"),
        Err(RuntimeDirError::NotFound { .. })
    ));
}

#[test]
fn a_name_taken_again_starts_with_an_empty_folder() {
    let (_folder, runtime) = runtime();
    let claim = runtime.claim("a").unwrap();
    claim.write_config("{}").unwrap();
    claim
        .open_exit()
        .unwrap()
        .write(&ExitRecord::now(ExitReason::PowerOff, ""))
        .unwrap();
    fs::create_dir(claim.dir().path().join("folder")).unwrap();
    let dir = claim.dir().clone();
    drop(claim);
    assert_eq!(dir.config_json().unwrap().as_deref(), Some("{}"));
    assert_eq!(dir.exit().unwrap().unwrap().reason, ExitReason::PowerOff);

    let claim = runtime.claim("a").unwrap();
    assert_eq!(dir.config_json().unwrap(), None);
    assert_eq!(dir.exit().unwrap(), None);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    claim.remove().unwrap();
    assert!(!dir.exists());
}

#[test]
fn unique_names_count_up_over_living_machines() {
    let (_folder, runtime) = runtime();
    let mut claims: Vec<_> = (0..3)
        .map(|_| runtime.claim_unique("vm").unwrap())
        .collect();
    let names: Vec<_> = claims
        .iter()
        .map(|claim| claim.dir().name().to_owned())
        .collect();
    assert_eq!(names, ["vm", "vm-2", "vm-3"]);
    drop(claims.remove(1));
    assert_eq!(runtime.claim_unique("vm").unwrap().dir().name(), "vm-2");
    assert_eq!(numbered(&"a".repeat(63), 12).len(), 63);
}

#[test]
fn one_of_many_racers_gets_the_name() {
    let (_folder, runtime) = runtime();
    for _ in 0..50 {
        let barrier = Barrier::new(4);
        let winners = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    barrier.wait();
                    let claim = runtime.claim("a");
                    if claim.is_ok() {
                        winners.fetch_add(1, Ordering::Relaxed);
                    }
                    barrier.wait();
                    assert!(matches!(
                        claim,
                        Ok(_) | Err(RuntimeDirError::NameInUse { .. })
                    ));
                });
            }
        });
        assert_eq!(winners.into_inner(), 1);
    }
}

#[test]
fn claims_and_removals_at_once_never_share_a_folder() {
    let (_folder, runtime) = runtime();
    let holders = AtomicU32::new(0);
    let claims = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let Ok(claim) = runtime.claim("a") else {
                        continue;
                    };
                    claims.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                    thread::yield_now();
                    assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                    claim.remove().unwrap();
                }
            });
        }
    });
    assert!(claims.into_inner() > 0);
}

#[test]
fn a_claim_can_be_handed_over() {
    let (_folder, runtime) = runtime();
    let claim = runtime.claim("a").unwrap();
    let lock = claim.lock().try_clone().unwrap();
    let path = claim.dir().path().to_owned();
    drop(claim);
    let taken = MachineClaim::inherit(&path, lock.into(), 7).unwrap();
    assert!(matches!(
        runtime.claim("a"),
        Err(RuntimeDirError::NameInUse { .. })
    ));
    drop(taken);
    drop(runtime.claim("a").unwrap());

    let old = runtime.claim("a").unwrap();
    let shared = MachineClaim::inherit(&path, old.lock().try_clone().unwrap().into(), 7).unwrap();
    old.remove().unwrap();
    let new = runtime.claim("a").unwrap();
    new.write_config("{}").unwrap();
    shared.remove().unwrap();
    assert_eq!(new.dir().config_json().unwrap().as_deref(), Some("{}"));

    let other = File::open("/dev/null").unwrap();
    let wrong = MachineClaim::inherit(&path, other.into(), 7);
    assert!(matches!(wrong, Err(RuntimeDirError::Insecure { .. })));
}

#[test]
fn folders_of_others_are_refused() {
    let (folder, runtime) = runtime();
    symlink("/tmp", runtime.path()).unwrap();
    assert!(matches!(
        runtime.claim("a"),
        Err(RuntimeDirError::Insecure { .. })
    ));
    fs::remove_file(runtime.path()).unwrap();
    fs::create_dir(runtime.path()).unwrap();
    fs::set_permissions(runtime.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(
        runtime.claim("a"),
        Err(RuntimeDirError::Insecure { .. })
    ));
    fs::set_permissions(runtime.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let elsewhere = folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, runtime.path().join("b")).unwrap();
    assert!(matches!(
        runtime.claim("b"),
        Err(RuntimeDirError::Insecure { .. })
    ));
    assert!(matches!(
        runtime.open("b"),
        Err(RuntimeDirError::NotFound { .. })
    ));
    symlink(
        "/etc/passwd",
        runtime.claim("c").unwrap().dir().path().join("config.json"),
    )
    .unwrap();
    assert!(runtime.open("c").unwrap().config_json().is_err());
}

#[test]
fn names_and_long_paths_are_checked() {
    let (folder, runtime) = runtime();
    assert!(matches!(
        runtime.open("../a"),
        Err(RuntimeDirError::Name(_))
    ));
    assert!(matches!(runtime.claim(".."), Err(RuntimeDirError::Name(_))));
    let deep = RuntimeDir::new(folder.path().join("d".repeat(100)));
    let Err(RuntimeDirError::SocketPath { excess, .. }) = deep.claim("a") else {
        panic!()
    };
    assert_eq!(
        excess,
        deep.path().as_os_str().len() + "/a/api.sock".len() - 107
    );
    assert!(!deep.path().exists());
}
