//! Containers that are machines, under containerds of several releases.

use std::path::Path;

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Containerd, Guest, Host, Image, Limit, Node, as_root, image};

const MINI: &str = "local.test/mini:1";
const KERNEL: &str = "local.test/kernel:1";
const SATA: &str = "local.test/sata:1";
const MEMORY: [&str; 2] = ["--memory-limit", "268435456"];

/// A folder with these files of this machine.
fn folder(host: &Host, files: &[(&Path, &str)]) -> Result<String> {
    let folder = host.path("content");
    let mut script = format!("rm -rf {folder}; mkdir -p {folder}\n");
    for (from, to) in files {
        let from = host.shared(from)?;
        script += &format!("install -D {from} {folder}/{to}\n");
    }
    host.ok(&Command::script(script))?;
    Ok(folder)
}

/// Waits for text in the file that has a container's console.
fn expect_in_file(host: &Host, file: &str, text: &str) -> Result<()> {
    let script = r#"until grep -q "$2" "$1"; do sleep 0.2; done"#;
    let wait = Command::new("bash").args(["-c", script, "wait", file, text]);
    host.run_for(&wait, Limit::Boot)?.expect_code(0)?;
    Ok(())
}

fn lives_and_ends(host: &Host, which: Containerd) -> Result<()> {
    let node = Node::start(host, which)?;
    let disk = image(Image::Mini)?.mini_qcow2();
    node.import(&folder(host, &[(&disk, "disk/mini.qcow2")])?, MINI)?;
    let console = host.path("console");
    let log = format!("file://{console}");
    let options = ["--detach", "--log-uri", &log];
    host.ok(&node.ctr_run(&[&options[..], &MEMORY].concat(), MINI, "vm"))?;
    expect_in_file(host, &console, "MINI-READY")?;
    ensure!(node.state("vm")? == "RUNNING");
    host.ok(&node.ctr(["tasks", "pause", "vm"]))?;
    ensure!(node.state("vm")? == "PAUSED");
    host.ok(&node.ctr(["tasks", "resume", "vm"]))?;
    let metrics = host.ok(&node.ctr(["tasks", "metrics", "vm"]))?;
    ensure!(metrics.contains("memory.usage"), "Metrics: {metrics}");

    node.restart()?;
    ensure!(node.state("vm")? == "RUNNING");
    host.ok(&node.ctr(["tasks", "kill", "--signal", "SIGKILL", "vm"]))?;
    let end = node.end("vm")?;
    ensure!(end.stderr.contains("exit code 137"), "Its end: {end:?}");
    host.ok(&node.ctr(["containers", "rm", "vm"]))?;
    node.expect_clean()
}

/// Options of `ctr run` for an image with a kernel, and more words for its command line.
fn kernel(host: &Host, node: &Node<'_>, words: &str) -> Result<Vec<String>> {
    let images = image(Image::Kernel)?;
    let files = [
        (&*images.vmlinuz(), "boot/vmlinuz"),
        (&*images.initrd(), "boot/initrd"),
    ];
    node.import(&folder(host, &files)?, KERNEL)?;
    let annotations = [
        "edgevmm.io/kernel=/boot/vmlinuz".to_owned(),
        "edgevmm.io/initrd=/boot/initrd".to_owned(),
        format!("edgevmm.io/cmdline=console=ttyS0 quiet {words}"),
    ];
    let mut options = [&["--rm"], &MEMORY[..]].concat();
    options.extend(annotations.iter().flat_map(|it| ["--annotation", it]));
    Ok(options.into_iter().map(str::to_owned).collect())
}

#[test]
fn a_kernel_in_an_image_runs_and_powers_off() -> Result<()> {
    as_root(|host| {
        let node = Node::start(host, Containerd::Current)?;
        let options = kernel(host, &node, "")?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let said = host.ok(&node.ctr_run(&options, KERNEL, "vm"))?;
        ensure!(said.contains("INIT-FIRST-LINE"), "The console: {said}");
        node.expect_clean()
    })
}

/// A machine in the network namespace `evmpod` has the address `own`, and is reached at each of
/// `places`: behind what has a command run in a namespace, an address.
fn is_in_a_pods_network(
    host: &Host,
    run: &Command,
    own: &str,
    places: &[(&str, &str)],
) -> Result<()> {
    let mut guest = Guest::of(host, run)?;
    let report = guest.expect_shell()?;
    ensure!(report.contains(&format!("ip={own}")), "It says {report}");
    guest.sh(&format!("mkdir /www; echo is {own} > /www/index.html"))?;
    guest.sh("httpd -p 80 -h /www; ping -c 1 10.77.9.1")?;
    ensure!(guest.sh("cat /sys/class/net/eth0/mtu")? == "1400");
    let busybox = host.busybox()?;
    for (before, address) in places {
        let script = format!("{before} {busybox} wget -T 9 -q -O - http://{address}/");
        let page = host.ok(&Command::script(script))?;
        ensure!(page.trim() == format!("is {own}"), "{address}: {page}");
    }
    guest.type_in("exit\n")?;
    guest.end(Limit::Boot)?.expect_code(0)?;
    Ok(())
}

#[test]
fn a_machine_is_in_the_network_of_its_pod() -> Result<()> {
    as_root(|host| {
        let node = Node::start(host, Containerd::Current)?;
        host.ok(&Command::script(
            "ip netns delete evmpod 2> /dev/null || true
             ip netns add evmpod; ip link add evmveth type veth peer name eth0 netns evmpod
             ip address add 10.77.9.1/24 dev evmveth; ip link set evmveth up
             pod='ip -n evmpod'; $pod address add 10.77.9.7/24 dev eth0
             $pod link set eth0 mtu 1400 up; $pod link set lo up
             $pod route add default via 10.77.9.1",
        ))?;
        let mut options = kernel(host, &node, "edgevmm.shell")?;
        let network = ["--with-ns", "network:/run/netns/evmpod"];
        options.extend(network.map(str::to_owned));
        let masquerade = ["--annotation", "edgevmm.io/network=masquerade"];
        let run = |more: &[&str]| {
            let options = options
                .iter()
                .map(String::as_str)
                .chain(more.iter().copied());
            node.ctr_run(&options.collect::<Vec<_>>(), KERNEL, "vm")
        };
        // What the first one leaves in the namespace the second one finds. The lab's kernel has no
        // act_nat, by which the loopback leads to the first one.
        let (outside, loopback) = (("", "10.77.9.7"), ("ip netns exec evmpod", "127.0.0.1"));
        is_in_a_pods_network(host, &run(&[]), "10.77.9.7", &[outside])?;
        is_in_a_pods_network(host, &run(&masquerade), "10.0.2.2", &[outside, loopback])?;
        host.ok(&Command::script("ip netns delete evmpod"))?;
        node.expect_clean()
    })
}

#[test]
fn a_container_is_a_machine() -> Result<()> {
    as_root(|host| lives_and_ends(host, Containerd::Current))
}

#[test]
fn a_container_is_a_machine_under_older_and_newer_containerds() -> Result<()> {
    as_root(|host| {
        lives_and_ends(host, Containerd::Old)?;
        lives_and_ends(host, Containerd::New)
    })
}

/// A stock kernel without virtio drivers. What firmware would try first boots, too.
#[test]
fn a_guest_has_each_disk_as_its_entry_says() -> Result<()> {
    let images = image(Image::Sata)?;
    as_root(|host| {
        let node = Node::start(host, Containerd::Current)?;
        let (disk, disc) = (images.sata("sata.raw"), images.sata("grub-rescue.iso"));
        let files = [(&*disk, "disk/sata.raw"), (&*disc, "disk/rescue.iso")];
        node.import(&folder(host, &files)?, SATA)?;
        let annotations = [
            "edgevmm.io/firmware=bios",
            "edgevmm.io/cpus=2,sockets=2",
            "edgevmm.io/disks=/disk/rescue.iso,kind=cdrom\n\
             containerDisk,bus=sata,bootindex=1,serial=LEGACY-1",
        ];
        let annotations = annotations.iter().flat_map(|it| ["--annotation", it]);
        let options = ["--rm"].into_iter().chain(MEMORY).chain(annotations);
        let run = node.ctr_run(&options.collect::<Vec<_>>(), SATA, "vm");
        let mut guest = Guest::of(host, &run)?;
        let report = guest.expect_mini()?;
        ensure!(report.contains("root=/dev/sda1"), "It says {report}");
        let disc = host.sha256(&host.shared(&disc)?)?;
        ensure!(guest.sh("sha256sum < /dev/sr0")?.starts_with(&disc));
        let serial = guest.sh("tr -cd A-Z0-9- < /sys/block/sda/device/vpd_pg80")?;
        ensure!(serial == "LEGACY-1", "Its serial number is {serial}");
        let package = "/sys/devices/system/cpu/cpu1/topology/physical_package_id";
        ensure!(guest.sh(&format!("cat {package}"))? == "1");
        guest.type_in("sync; poweroff -f\n")?;
        guest.end(Limit::Boot)?.expect_code(0)?;
        node.expect_clean()
    })
}

#[test]
fn what_cannot_be_a_machine_is_refused_with_a_reason() -> Result<()> {
    as_root(|host| {
        let node = Node::start(host, Containerd::Current)?;
        let refused = |options: &[&str], reason: &str| {
            let output = host.run(&node.ctr_run(options, MINI, "vm"))?;
            ensure!(output.code != 0, "It is not refused");
            ensure!(
                output.stderr.contains(reason),
                "Refused as: {}",
                output.stderr
            );
            host.ok(&node.ctr(["containers", "rm", "vm"]))?;
            node.expect_clean()
        };
        let disk = image(Image::Mini)?.mini_qcow2();
        node.import(&folder(host, &[(&disk, "elsewhere/a.qcow2")])?, MINI)?;
        refused(&[], "no disk")?;
        let two = [(&*disk, "disk/a.qcow2"), (&*disk, "disk/b.qcow2")];
        node.import(&folder(host, &two)?, MINI)?;
        refused(&[], "b.qcow2")?;
        refused(
            &["--annotation", "edgevmm.io/colour=red"],
            "edgevmm.io/colour",
        )?;
        refused(
            &["--annotation", "edgevmm.io/disks=/disk/a.qcow2\nroot"],
            "`root`",
        )
    })
}
