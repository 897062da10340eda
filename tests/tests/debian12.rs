//! A whole distribution from a GPT disk: SeaBIOS, GRUB, systemd, cloud-init, ssh.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Image, Limit, image, on_host};
use serde_json::Value;

/// SIGTERM.
const TERMINATE: i32 = 15;

/// Installs a package of fresh files as the distribution's tools do, makes and removes a big file,
/// and leaves a list of hashes.
const WRITE: &str = "set -e; cd /root; mkdir -p p/DEBIAN p/opt/e2e; \
    printf 'Package: e2e\\nVersion: 1\\nArchitecture: all\\nMaintainer: e2e <e2e@example.org>\\n\
Description: e2e\\n' > p/DEBIAN/control; \
    head -c 16M /dev/urandom | split -b 64k -a 3 - p/opt/e2e/part-; \
    dpkg-deb -Znone --build p e2e.deb > /dev/null; dpkg -i e2e.deb > /dev/null; rm -r p; \
    cd /opt/e2e; sha256sum part-* > SUMS; \
    dd if=/dev/zero of=/var/big bs=1M count=64 conv=fsync status=none; rm /var/big; fstrim /; \
    sync; sha256sum < SUMS";

/// A guest with a way in by ssh.
struct Access<'h> {
    host: &'h Host,
    port: String,
}

impl<'h> Access<'h> {
    fn new(host: &'h Host) -> Result<Self> {
        host.ok(&Command::script("ssh-keygen -q -t ed25519 -N '' -f key"))?;
        let port = host.free_port()?.to_string();
        Ok(Self { host, port })
    }

    /// Arguments of a machine that lets the key in.
    fn arguments(&self, cpus: &str, hostname: &str, disk: &str) -> Vec<String> {
        let publish = format!("{}:22", self.port);
        let key = self.host.path("key.pub");
        let options = ["run", "--cpus", cpus, "--memory", "768M", "-p", &publish];
        let seed = ["--hostname", hostname, "--ssh-key", &key, disk];
        options
            .iter()
            .chain(&seed)
            .map(ToString::to_string)
            .collect()
    }

    fn ssh(&self, command: &str) -> Command {
        let user = ["-p", &self.port, "-i", "key", "root@127.0.0.1", command];
        // The slowest part under emulation is agreeing on keys.
        let options = [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=120",
            "KexAlgorithms=curve25519-sha256",
        ];
        let options = options.iter().flat_map(|option| ["-o", *option]);
        Command::new("ssh").args(options).args(user)
    }

    fn ok(&self, command: &str) -> Result<String> {
        let output = self.host.run_for(&self.ssh(command), Limit::Distribution)?;
        Ok(output.expect_code(0)?.to_owned())
    }
}

/// Waits until everything is started.
fn expect_ready(guest: &mut Guest<'_>) -> Result<String> {
    guest.expect("D12-READY", Limit::Distribution)?;
    guest.expect("\n", Limit::Command)
}

/// Looks into an image that no guest uses: it is sound, its file system is clean and the files are
/// those the guest wrote.
fn check_image(host: &Host, name: &str, sums: &str) -> Result<()> {
    let run = |script: &str| {
        let output = host.run_for(&Command::script(script), Limit::Distribution)?;
        Ok::<_, anyhow::Error>(output.expect_code(0)?.to_owned())
    };
    run(&format!(
        "qemu-img check {name} && qemu-img convert -O raw {name} raw && rm {name}"
    ))?;
    let table: Value = serde_json::from_str(&run("sfdisk --json raw")?)?;
    let partitions = table["partitiontable"]["partitions"].as_array();
    let mut partitions = partitions.context("No partitions")?.iter();
    let root = partitions.find(|partition| partition["name"] == "root");
    let sector = root
        .and_then(|root| root["start"].as_u64())
        .context("No root partition")?;
    let root = format!("raw?offset={}", sector * 512);
    run(&format!("e2fsck -fn '{root}'"))?;
    run(&format!(
        "mkdir out && debugfs -R 'rdump /opt/e2e out' '{root}'"
    ))?;
    let found = run("cd out/e2e && sha256sum --quiet -c SUMS && sha256sum < SUMS")?;
    ensure!(found == sums, "The list of hashes is another one");
    Ok(())
}

/// In the foreground: cloud-init takes the seed, root logs in on the console, files are written,
/// the guest powers off by itself.
#[test]
fn one_vcpu_with_a_login_on_the_console() -> Result<()> {
    let images = image(Image::Debian12)?;
    on_host(|host| {
        let disk = host.copy(&images.debian12(), "disk.qcow2")?;
        let access = Access::new(host)?;
        let user_data =
            "#cloud-config\nwrite_files: [{path: /root/from-the-seed, content: seeded}]\n";
        let user_data = host.write("user-data", user_data)?;
        let mut arguments = access.arguments("1", "alpha", &disk);
        arguments.extend(["--user-data".to_owned(), user_data]);
        let mut guest = Guest::start(host, arguments)?;
        let report = expect_ready(&mut guest)?;
        ensure!(
            report.contains("cpus=1") && report.contains("fw=bios"),
            "{report}"
        );
        ensure!(report.contains("10.0.2.15"), "No address: {report}");

        guest.type_in("\n")?;
        guest.log_in("root", "root")?;
        // By exit codes, as cloud-init and systemd write between the lines of the shell.
        guest.sh("dmesg -n 1; test $(hostname) = alpha")?;
        guest.sh("grep -qx seeded /root/from-the-seed")?;
        ensure!(access.ok("hostname")? == "alpha");
        let sums = access.ok(WRITE)?;
        guest.sh("cd /opt/e2e && sha256sum --quiet -c SUMS")?;
        guest.type_in("systemctl poweroff\n")?;
        guest.end(Limit::Distribution)?.expect_code(0)?;
        check_image(host, "disk.qcow2", &sums)
    })
}

/// An address of the user network that its DHCP never gives, in the seed's `network-config`. A route
/// `to: default` would be more modern than this distribution's cloud-init.
const STATIC_NETWORK: &str = "version: 2\nethernets:\n  eth0:\n    addresses: [10.0.2.77/24]\n    \
                              gateway4: 10.0.2.2\n";

/// In the background, with two vCPUs and an address of its own: ssh by the key of the seed, and
/// `edgevmm stop`, which presses the power button.
#[test]
fn two_vcpus_stopped_by_the_power_button() -> Result<()> {
    let images = image(Image::Debian12)?;
    on_host(|host| {
        let disk = host.copy(&images.debian12(), "disk.qcow2")?;
        let access = Access::new(host)?;
        let mut arguments = access.arguments("2", "beta", &disk);
        let network = host.write("network-config", STATIC_NETWORK)?;
        arguments
            .extend(["--detach", "--name", "beta", "--network-config", &network].map(String::from));
        host.ok(&host.edgevmm(arguments))?;
        let mut console = Guest::start(host, ["console", "beta"])?;
        let report = expect_ready(&mut console)?;
        ensure!(report.contains("cpus=2"), "{report}");
        ensure!(access.ok("hostname")? == "beta");
        let addresses = access.ok("ip -4 -o addr show dev eth0")?;
        ensure!(
            addresses.contains("inet 10.0.2.77/24") && addresses.lines().count() == 1,
            "{addresses}"
        );
        let sums = access.ok(WRITE)?;
        let stop = host.edgevmm(["stop", "--timeout", "900", "beta"]);
        host.run_for(&stop, Limit::Distribution)?.expect_code(0)?;
        host.ok(&host.edgevmm(["wait", "beta"]))?;
        check_image(host, "disk.qcow2", &sums)
    })
}

/// Another such address in a config drive's `network_data.json`.
const OPENSTACK_NETWORK: &str = r#"{
    "links": [{"id": "l", "type": "phy", "ethernet_mac_address": "52:54:00:12:34:78"}],
    "networks": [{"id": "n", "link": "l", "type": "ipv4", "ip_address": "10.0.2.78",
        "netmask": "255.255.255.0",
        "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.2.2"}]}],
    "services": []
}"#;

/// With `--snapshot` the guest writes as much, and the image stays as it is. SIGTERM presses the
/// power button. The seed is a config drive.
#[test]
fn a_snapshot_is_thrown_away() -> Result<()> {
    let images = image(Image::Debian12)?;
    on_host(|host| {
        let disk = host.copy(&images.debian12(), "disk.qcow2")?;
        let before = host.sha256(&disk)?;
        let access = Access::new(host)?;
        let mut arguments = access.arguments("2", "gamma", &disk);
        arguments.extend(["--snapshot", "--stop-timeout", "900"].map(String::from));
        let network = host.write("network_data.json", OPENSTACK_NETWORK)?;
        let nic = "user,mac=52:54:00:12:34:78";
        let seed = ["--datasource", "config-drive", "--network-config", &network];
        arguments.extend(["--net", nic].iter().chain(&seed).map(ToString::to_string));
        let mut guest = Guest::start(host, arguments)?;
        expect_ready(&mut guest)?;
        ensure!(access.ok("hostname")? == "gamma");
        let addresses = access.ok("ip -4 -o addr show scope global")?;
        ensure!(
            addresses.contains("inet 10.0.2.78/24") && addresses.lines().count() == 1,
            "{addresses}"
        );
        let sums = access.ok(WRITE)?;
        let read = "sync; echo 3 > /proc/sys/vm/drop_caches; cd /opt/e2e && \
                    sha256sum --quiet -c SUMS && sha256sum < SUMS";
        ensure!(
            access.ok(read)? == sums,
            "The guest reads other data than it wrote"
        );
        guest.signal(TERMINATE)?;
        guest.end(Limit::Distribution)?.expect_code(0)?;
        ensure!(
            host.sha256(&disk)? == before,
            "--snapshot changed the image"
        );
        Ok(())
    })
}
