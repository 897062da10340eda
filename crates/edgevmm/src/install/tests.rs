#![allow(clippy::unwrap_used)]

use std::fs;

use super::*;

fn host() -> (tempfile::TempDir, TargetArgs) {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    fs::create_dir_all(&from).unwrap();
    for name in PROGRAMS {
        fs::write(from.join(name), name).unwrap();
    }
    let args = TargetArgs {
        k3s: false,
        containerd: false,
        bin_dir: "/usr/local/bin".into(),
        dry_run: false,
        json: false,
        root: root.path().to_owned(),
    };
    (root, args)
}

fn verbs(plan: &Plan) -> Vec<Verb> {
    plan.changes.iter().map(|change| change.verb).collect()
}

/// Plans and makes an installation.
fn put_in(args: &TargetArgs, plan: impl Fn(&mut Plan) -> Result<(), Failure>) -> Plan {
    let mut made = Plan::default();
    made.programs(args, &args.root.join("from")).unwrap();
    plan(&mut made).unwrap();
    made.changes.iter().try_for_each(Change::make).unwrap();
    made
}

#[test]
fn twice_is_as_once_and_taking_out_leaves_what_was_there() {
    let (root, args) = host();
    let path = root.path().join(CONTAINERD);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let own = "version = 3\n[grpc]\n  uid = 0\n";
    fs::write(&path, own).unwrap();
    let shim = Path::new("/usr/local/bin").join(SHIM);
    let first = put_in(&args, |plan| plan.containerd(&path, &shim));
    assert_eq!(
        verbs(&first),
        [Verb::Create, Verb::Create, Verb::Create, Verb::Update]
    );
    let again = put_in(&args, |plan| plan.containerd(&path, &shim));
    assert_eq!(verbs(&again), [Verb::Keep; 4]);
    let text = fs::read_to_string(&path).unwrap();
    assert!(
        text.starts_with(own) && text.contains("io.containerd.cri.v1.runtime"),
        "{text}"
    );
    let mode = fs::metadata(root.path().join("usr/local/bin").join(SHIM)).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o755
    );

    uninstall(&args).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), own);
    assert!(!root.path().join("usr/local/bin/edgevmm").exists());
    uninstall(&args).unwrap();
}

#[test]
fn what_installing_made_alone_goes_as_a_whole() {
    let (root, args) = host();
    fs::create_dir_all(root.path().join("etc/containerd")).unwrap();
    let path = root.path().join(CONTAINERD);
    put_in(&args, |plan| plan.containerd(&path, Path::new("/s")));
    assert!(
        fs::read_to_string(&path)
            .unwrap()
            .starts_with("version = 2\n")
    );
    uninstall(&args).unwrap();
    assert!(!path.exists());
}

#[test]
fn k3s_gets_what_its_version_reads() {
    let (root, args) = host();
    let folder = root.path().join(K3S).join("agent/etc/containerd");
    fs::create_dir_all(&folder).unwrap();
    let files = |written: Option<&str>| {
        match written {
            Some(text) => fs::write(folder.join("config.toml"), text).unwrap(),
            None => fs::remove_file(folder.join("config.toml")).unwrap(),
        }
        let plan = put_in(&args, |plan| plan.k3s(&args.root, Path::new("/s")));
        let mut names: Vec<_> = plan.changes.iter().skip(PROGRAMS.len()).collect();
        names.sort_by(|a, b| a.path.cmp(&b.path));
        let names = names.iter().map(|change| {
            let path = change.path.strip_prefix(&folder).unwrap();
            assert!(
                fs::read_to_string(&change.path)
                    .unwrap()
                    .contains("runtimes.edgevmm]")
            );
            path.display().to_string()
        });
        let names: Vec<_> = names.collect();
        let mut removal = args_of(&args);
        removal.k3s = true;
        uninstall(&removal).unwrap();
        for name in &names {
            assert!(!folder.join(name).exists(), "{name}");
        }
        names
    };
    let imports = "version = 3\nimports = [\"/x/config-v3.toml.d/*.toml\"]\n";
    assert_eq!(files(Some(imports)), ["config-v3.toml.d/edgevmm.toml"]);
    assert_eq!(files(Some("version = 3\n")), ["config-v3.toml.tmpl"]);
    assert_eq!(files(Some("version = 2\n")), ["config.toml.tmpl"]);
    assert_eq!(files(None), ["config-v3.toml.tmpl", "config.toml.tmpl"]);
}

fn args_of(args: &TargetArgs) -> TargetArgs {
    TargetArgs {
        bin_dir: args.bin_dir.clone(),
        root: args.root.clone(),
        ..*args
    }
}

#[test]
fn what_is_missing_or_foreign_is_told_before_anything_is_changed() {
    let (root, args) = host();
    let mut plan = Plan::default();
    fs::remove_file(root.path().join("from").join(SHIM)).unwrap();
    let error = plan.programs(&args, &root.path().join("from")).unwrap_err();
    assert!(error.to_string().contains(SHIM), "{error}");
    let path = root.path().join("config.toml");
    fs::write(&path, "[plugins]\n").unwrap();
    let error = plan.containerd(&path, Path::new("/s")).unwrap_err();
    assert!(error.to_string().contains("config migrate"), "{error}");
    fs::write(&path, "version = 2\ndisabled_plugins = [\"cri\"]\n").unwrap();
    plan.containerd(&path, Path::new("/s")).unwrap();
    assert!(plan.next[0].contains("disabled_plugins"));
    assert!(runtime_class(&["a b=c".to_owned()]).is_err());
    let class = runtime_class(&["edgevmm.io/kvm=true".to_owned()]).unwrap();
    assert!(class.ends_with("    edgevmm.io/kvm: \"true\"\n"), "{class}");
}

#[test]
fn what_others_gave_our_names_is_left_alone() {
    let (root, mut args) = host();
    args.k3s = true;
    let k3s = root.path().join(K3S);
    let (manifest, folder) = (k3s.join(MANIFEST), k3s.join("agent/etc/containerd"));
    let drop_in = folder.join("config-v3.toml.d/edgevmm.toml");
    for path in [&manifest, &drop_in] {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
    }
    let imports = "version = 3\nimports = [\"/x/config-v3.toml.d/*.toml\"]\n";
    fs::write(folder.join("config.toml"), imports).unwrap();
    let theirs = "# theirs\n";
    fs::write(&manifest, theirs).unwrap();
    fs::write(&drop_in, "[debug]\n").unwrap();
    let mut plan = Plan::default();
    plan.manifest(&manifest, "a: b\n").unwrap_err();
    plan.k3s(&args.root, Path::new("/s")).unwrap_err();
    assert_eq!(plan.changes, []);
    uninstall(&args).unwrap();
    assert_eq!(fs::read_to_string(&manifest).unwrap(), theirs);
    assert!(drop_in.exists());

    fs::remove_file(&manifest).unwrap();
    for class in ["a: b\n", "a: c\n"] {
        put_in(&args, |plan| plan.manifest(&manifest, class));
        let text = fs::read_to_string(&manifest).unwrap();
        assert_eq!(text, format!("# written by edgevmm install\n{class}"));
    }
    uninstall(&args).unwrap();
    assert!(!manifest.exists());
}

#[test]
fn programs_are_where_containerd_finds_them_from_anywhere() {
    assert_eq!(absolute("/opt/bin"), Ok("/opt/bin".into()));
    absolute("opt/bin").unwrap_err();
}

#[test]
fn the_firmware_comes_from_where_the_vmm_finds_it() {
    let (root, args) = host();
    let planned = |from: &Path, args: &TargetArgs| {
        let mut plan = Plan::default();
        plan.programs(args, from).unwrap();
        let paths = plan.changes.iter().map(|change| change.path.clone());
        (paths.collect::<Vec<_>>(), plan.next)
    };
    let from = root.path().join("usr/bin");
    fs::create_dir_all(&from).unwrap();
    for name in [VMM, SHIM] {
        fs::write(from.join(name), name).unwrap();
    }
    if fast::find(&from.join(VMM)).is_err() {
        assert_eq!(planned(&from, &args).1, [NO_FAST]);
    }
    // As a package has it.
    let firmware = root.path().join("usr/lib/edgevmm").join(OPTIONAL);
    fs::create_dir_all(firmware.parent().unwrap()).unwrap();
    fs::write(&firmware, OPTIONAL).unwrap();
    let (paths, next) = planned(&from, &args);
    assert_eq!(paths[0], root.path().join("usr/local/bin").join(OPTIONAL));
    assert_eq!((paths.len(), next.len()), (3, 0));
    let where_they_are = TargetArgs {
        bin_dir: from.clone(),
        root: "/".into(),
        ..args
    };
    assert_eq!(planned(&from, &where_they_are).0.len(), 2);
}
