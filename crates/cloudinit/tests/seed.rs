//! Seeds as other programs see them.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::process::{Command, Stdio};

use edgevmm_cloudinit::{DataSource, Seed, SeedError, SshKeyError, UserDataError};

const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB3kC8ZpRxtL7vTnHTSRyXwk8vmTS3R0Sf0HjSM4nP1u \"q\" \u{e9}";

fn seed() -> Seed {
    Seed {
        data_source: DataSource::NoCloud,
        user_data: Some(b"#cloud-config\npackages: [vim]\n".to_vec()),
        ssh_keys: vec![format!("# laptop\n{KEY}\n"), KEY.to_owned()],
        hostname: Some("edge-1.example.org".to_owned()),
        instance_id: "6c0cd1ce-7f4a-4d7c-9a35-6f0cb2d6f0f1".to_owned(),
        network_config: Some(b"version: 2\n".to_vec()),
    }
}

/// Runs a program on `image`; `None`, with a line on standard error, when it is not installed.
fn run(program: &str, arguments: &[&str], image: &[u8]) -> Option<Vec<u8>> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    let output = Command::new(program)
        .args(arguments)
        .arg(file.path())
        .env(
            "PATH",
            format!(
                "{}:/usr/sbin:/sbin",
                std::env::var("PATH").unwrap_or_default()
            ),
        )
        .stderr(Stdio::inherit())
        .output();
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{program}: {}", output.status);
            Some(output.stdout)
        }
        Err(error) => {
            // Past the test harness, which hides what passing tests print.
            let _ = writeln!(std::io::stderr(), "SKIPPED the check by {program}: {error}");
            None
        }
    }
}

#[test]
fn blkid_sees_the_label() {
    let image = seed().build().unwrap();
    if let Some(output) = run("blkid", &["-p", "-o", "export"], &image) {
        let output = String::from_utf8(output).unwrap();
        assert!(
            output.lines().any(|line| line == "LABEL=cidata"),
            "{output}"
        );
        assert!(
            output.lines().any(|line| line == "TYPE=iso9660"),
            "{output}"
        );
    }
}

#[test]
fn isoinfo_reads_every_file() {
    let seed = seed();
    let image = seed.build().unwrap();
    let read = |name: &str| run("isoinfo", &["-J", "-x", name, "-i"], &image);
    let Some(meta_data) = read("/meta-data;1") else {
        return;
    };
    assert_eq!(read("/user-data;1"), seed.user_data);
    assert_eq!(read("/network-config;1"), seed.network_config);
    let meta_data: serde_json::Value = serde_json::from_slice(&meta_data).unwrap();
    assert_eq!(
        meta_data,
        serde_json::json!({
            "instance-id": seed.instance_id,
            "local-hostname": "edge-1.example.org",
            "public-keys": [KEY, KEY],
        })
    );
}

#[test]
fn a_config_drive_has_the_files_of_openstack() {
    let network = br#"{"links": [], "networks": [], "services": []}"#;
    let seed = Seed {
        data_source: DataSource::ConfigDrive,
        network_config: Some(network.to_vec()),
        ..seed()
    };
    let image = seed.build().unwrap();
    if let Some(output) = run("blkid", &["-p", "-o", "value", "-s", "LABEL"], &image) {
        assert_eq!(output, b"config-2\n");
    }
    let read = |name: &str| {
        let path = format!("/openstack/latest/{name};1");
        run("isoinfo", &["-J", "-x", &path, "-i"], &image)
    };
    let Some(meta_data) = read("meta_data.json") else {
        return;
    };
    assert_eq!(read("user_data"), seed.user_data);
    assert_eq!(read("network_data.json"), seed.network_config);
    let meta_data: serde_json::Value = serde_json::from_slice(&meta_data).unwrap();
    assert_eq!(
        meta_data,
        serde_json::json!({
            "uuid": seed.instance_id,
            "instance_id": seed.instance_id,
            "hostname": "edge-1.example.org",
            "name": "edge-1",
            "public_keys": {"0": KEY, "1": KEY},
        })
    );
}

#[test]
fn a_config_drive_takes_openstacks_network_data_only() {
    for text in [
        "version: 2\n",
        "{}",
        "[]",
        r#"{"links": 1, "networks": [], "services": []}"#,
    ] {
        let seed = Seed {
            data_source: DataSource::ConfigDrive,
            network_config: Some(text.into()),
            ..seed()
        };
        assert_eq!(seed.build(), Err(SeedError::NetworkData), "{text}");
    }
}

#[test]
fn the_least_seed_has_empty_user_data() {
    let seed = Seed {
        instance_id: "i-1".to_owned(),
        ..Seed::default()
    };
    let image = seed.build().unwrap();
    assert_eq!(image, seed.build().unwrap());
    let names: Vec<u8> = "user-data;1"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    assert!(image.windows(names.len()).any(|window| window == names));
    assert!(
        image
            .windows(15)
            .any(|window| window == b"\"instance-id\": ")
    );
}

#[test]
fn mistakes_are_told() {
    let refused = |change: fn(&mut Seed)| {
        let mut seed = seed();
        change(&mut seed);
        seed.build().unwrap_err()
    };
    assert_eq!(
        refused(|seed| seed.user_data = Some(b"packages: [vim]".to_vec())),
        SeedError::UserData(UserDataError::Unknown {
            line: "packages: [vim]".to_owned()
        })
    );
    assert_eq!(
        refused(|seed| seed
            .ssh_keys
            .push("-----BEGIN RSA PRIVATE KEY-----\n".to_owned())),
        SeedError::SshKey(SshKeyError::Private { line: 1 })
    );
    assert_eq!(
        refused(|seed| seed.network_config = Some(b"version: \xff".to_vec())),
        SeedError::NetworkConfig { offset: 9 }
    );
    assert_eq!(
        refused(|seed| seed.user_data = Some(vec![b'#'; (16 << 20) + 1])),
        SeedError::Size {
            file: "user-data",
            bytes: (16 << 20) + 1
        }
    );
    for hostname in [
        "",
        "-a",
        "a-",
        "a_b",
        "a..b",
        "a.",
        "10.0.2.15",
        "a b",
        "\u{e9}",
        "a\nb",
    ] {
        let seed = Seed {
            hostname: Some(hostname.to_owned()),
            ..seed()
        };
        assert_eq!(
            seed.build(),
            Err(SeedError::Hostname {
                hostname: hostname.to_owned()
            })
        );
    }
    for id in ["", ".", "..", "../etc", "a/b", "a b", &"x".repeat(129)] {
        let seed = Seed {
            instance_id: id.to_owned(),
            ..seed()
        };
        assert_eq!(
            seed.build(),
            Err(SeedError::InstanceId { id: id.to_owned() })
        );
    }
}
