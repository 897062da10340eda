//! Both kinds of network interface, in one machine: addresses, and 64 MiB each way. Booting from one.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, Process, as_root, net_rom};

/// SIGKILL.
const KILL: i32 = 9;
/// The host's loopback, as the guest of a user network sees it.
const USER_HOST: &str = "10.0.2.2";

/// A tap of one test's own, and the network on it.
struct Tap {
    name: &'static str,
    /// Its address on the host without the last number; the guest gets one beside it.
    network: &'static str,
}

impl Tap {
    fn make(&self, host: &Host) -> Result<()> {
        let Self { name, network } = self;
        host.ok(&Command::script(format!(
            "modprobe tun || true; ip tuntap add dev {name} mode tap; \
             ip address add {network}.1/24 dev {name}; ip link set {name} up"
        )))?;
        Ok(())
    }

    /// A DHCP server on it that says more than addresses.
    fn serve<'h>(&self, host: &'h Host, more: &str) -> Result<Process<'h>> {
        let Self { name, network } = self;
        let config = format!(
            "interface {name}\nstart {network}.50\nend {network}.60\nlease_file {}\n\
             pidfile {}\noption subnet 255.255.255.0\n{more}\n",
            host.write("leases", "")?,
            host.path("udhcpd.pid")
        );
        let config = host.write("udhcpd.conf", &config)?;
        host.spawn(&Command::new(host.busybox()?).args(["udhcpd", "-f", "-S", &config]))
    }

    fn address(&self) -> String {
        format!("{}.1", self.network)
    }

    fn remove(&self, host: &Host) -> Result<()> {
        host.ok(&Command::script(format!("ip link delete {}", self.name)))?;
        Ok(())
    }
}

/// Waits until somebody of the host listens to a TCP port.
fn wait_for_listener(host: &Host, port: u16) -> Result<()> {
    let script = format!("until ss -Htln 'sport = {port}' | grep -q .; do sleep 0.05; done");
    host.ok(&Command::script(script))?;
    Ok(())
}

fn checked(guest: &mut Guest<'_>, file: &str, expected: &str) -> Result<()> {
    let hash = guest.sh(&format!("sha256sum {file}"))?;
    ensure!(hash.starts_with(expected), "{hash} in place of {expected}");
    Ok(())
}

/// The guest connects to the host's `address` and fetches the payload.
fn fetch(
    host: &Host,
    guest: &mut Guest<'_>,
    listen: &str,
    address: &str,
    hash: &str,
) -> Result<()> {
    let port = host.free_port()?;
    let serve = host.spawn(&Command::script(format!(
        "nc -N -l {listen} {port} < payload"
    )))?;
    wait_for_listener(host, port)?;
    guest.sh(&format!("nc {address} {port} <>/idle > /got"))?;
    serve.wait(host.limit(Limit::Command))?.expect_code(0)?;
    checked(guest, "/got", hash)
}

/// The guest connects to the host's `address` and sends back what it has fetched.
fn send(host: &Host, guest: &mut Guest<'_>, listen: &str, address: &str, hash: &str) -> Result<()> {
    let port = host.free_port()?;
    let take = host.spawn(&Command::script(format!(
        "nc -d -l {listen} {port} > returned"
    )))?;
    wait_for_listener(host, port)?;
    guest.sh(&format!("nc {address} {port} < /got"))?;
    take.wait(host.limit(Limit::Boot))?.expect_code(0)?;
    let returned = host.sha256("returned")?;
    ensure!(returned == hash, "{returned} in place of {hash}");
    guest.sh("rm /got")?;
    Ok(())
}

/// The host connects to the guest through a forwarded port.
fn push(host: &Host, guest: &mut Guest<'_>, forward: u16, hash: &str) -> Result<()> {
    guest
        .sh("{ nc -l -p 7 <>/idle > /got & }; until netstat -tln | grep -q ':7 '; do usleep 50000; done")?;
    host.ok(&Command::script(format!(
        "nc -N 127.0.0.1 {forward} < payload"
    )))?;
    guest.sh("wait")?;
    checked(guest, "/got", hash)
}

#[test]
fn tap_and_user_network_carry_data_both_ways() -> Result<()> {
    as_root(|host| {
        let tap = Tap {
            name: "evmtap0",
            network: "192.168.77",
        };
        tap.make(host)?;
        let dhcp = tap.serve(host, "")?;
        host.ok(&Command::script("head -c 64M /dev/urandom > payload"))?;
        let hash = host.sha256("payload")?;
        let forward = host.free_port()?;
        let mut arguments = Guest::shell_arguments(host, "")?;
        let publish = format!("{forward}:7");
        let machine = ["--cpus", "1", "--memory", "512M", "-p", &publish];
        arguments.extend(machine.map(String::from));
        let nets = [
            "--net",
            "tap=evmtap0,mac=52:54:00:aa:bb:cc",
            "--net",
            "user,host_loopback",
        ];
        arguments.extend(nets.map(String::from));
        let mut guest = Guest::start(host, arguments)?;
        guest.expect_shell()?;
        // The end of its stdin would end nc: a pipe that it holds both ends of has none.
        guest.sh("mkfifo /idle")?;

        for (interface, begin) in [("eth0", "192.168.77."), ("eth1", "10.0.2.15")] {
            let said = guest.sh(&format!("ifconfig {interface}"))?;
            ensure!(said.contains(&format!("inet addr:{begin}")), "{said}");
        }
        let mac = guest.sh("cat /sys/class/net/eth0/address")?;
        ensure!(mac == "52:54:00:aa:bb:cc", "{mac}");

        let address = tap.address();
        fetch(host, &mut guest, &address, &address, &hash)?;
        send(host, &mut guest, &address, &address, &hash)?;
        fetch(host, &mut guest, "127.0.0.1", USER_HOST, &hash)?;
        send(host, &mut guest, "127.0.0.1", USER_HOST, &hash)?;
        push(host, &mut guest, forward, &hash)?;

        guest.type_in("poweroff -f\n")?;
        guest.end(Limit::Boot)?.expect_code(0)?;
        let passt = "! pgrep -x passt; ! pgrep -x passt.avx2";
        host.ok(&Command::script(passt))
            .context("passt outlives its machine")?;
        dhcp.signal(15)?;
        tap.remove(host)
    })
}

/// SeaBIOS boots from a tap by iPXE, which finds its script by DHCP and HTTP.
#[test]
fn a_network_is_booted_from() -> Result<()> {
    let rom = net_rom()?;
    as_root(|host| {
        let tap = Tap {
            name: "evmtap2",
            network: "192.168.79",
        };
        tap.make(host)?;
        let address = tap.address();
        let more = format!("siaddr {address}\nboot_file http://{address}:8077/boot.ipxe");
        let dhcp = tap.serve(host, &more)?;
        // A variable, so that the script itself does not have what it prints.
        let script = "#!ipxe\necho BOOTED BY ${netX/mac}\n";
        host.write("boot.ipxe", script)?;
        let listen = format!("{address}:8077");
        let web = ["httpd", "-f", "-p", &listen, "-h", &host.path("")];
        let web = host.spawn(&Command::new(host.busybox()?).args(web))?;
        let mac = "52:54:00:aa:bb:cc";
        let net = format!("tap={},mac={mac},bootindex=0", tap.name);
        let rom = host.copy(&rom, "net.rom")?;
        let machine = ["run", "--cpus", "1", "--memory", "64M", "--net-rom", &rom];
        let mut guest = Guest::start(host, machine.into_iter().chain(["--net", &net]))?;
        guest.expect(&format!("BOOTED BY {mac}"), Limit::Boot)?;
        guest.signal(KILL)?;
        drop(guest);
        web.signal(15)?;
        dhcp.signal(15)?;
        tap.remove(host)
    })
}

/// A tap in a network where nobody answers DHCP.
#[test]
fn a_guest_on_a_tap_gets_the_address_that_it_is_meant_to_have() -> Result<()> {
    as_root(|host| {
        let tap = Tap {
            name: "evmtap1",
            network: "192.168.78",
        };
        tap.make(host)?;
        host.ok(&Command::script("ip link set evmtap1 mtu 1400"))?;
        let mut arguments = Guest::shell_arguments(host, "")?;
        let machine = ["--cpus", "1", "--memory", "256M", "--net"];
        arguments.extend(machine.map(String::from));
        arguments.push(
            "tap=evmtap1,address=192.168.78.9/24,gateway=192.168.78.1,dns=192.168.78.53".into(),
        );
        let mut guest = Guest::start(host, arguments)?;
        guest.expect_shell()?;
        let said = guest.sh("ifconfig eth0; route -n; cat /etc/resolv.conf")?;
        for part in [
            "192.168.78.9",
            "MTU:1400",
            "192.168.78.1 ",
            "nameserver 192.168.78.53",
        ] {
            ensure!(said.contains(part), "No {part} in: {said}");
        }
        guest.sh("ping -c 1 192.168.78.1")?;
        guest.type_in("poweroff -f\n")?;
        guest.end(Limit::Boot)?.expect_code(0)?;
        tap.remove(host)
    })
}
