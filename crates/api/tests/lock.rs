//! The lock of a machine across processes. Alone in its process, because a fork in another test
//! would hold the lock for a moment.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};

use edgevmm_api::{RuntimeDir, RuntimeDirError};

#[test]
fn a_lock_lives_and_dies_with_the_process_that_inherited_it() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = RuntimeDir::new(folder.path());
    let claim = runtime.claim("a").unwrap();
    let lock = Stdio::from(claim.lock().try_clone().unwrap());
    let mut holder = Command::new("sleep").arg("60").stdin(lock).spawn().unwrap();
    drop(claim);

    let dir = runtime.open("a").unwrap();
    assert!(dir.is_alive().unwrap());
    assert!(matches!(
        runtime.claim("a"),
        Err(RuntimeDirError::NameInUse { .. })
    ));

    holder.kill().unwrap();
    holder.wait().unwrap();
    assert!(!dir.is_alive().unwrap());
    drop(runtime.claim("a").unwrap());
}
