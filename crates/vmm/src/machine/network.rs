//! Opens the host ends of a machine's network interfaces.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use edgevmm_config::{MacAddr, NetBackendConfig, PortForward, Protocol, VmConfig};
use edgevmm_devices::platform::DeviceLoop;
use edgevmm_devices::virtio::VirtioDevice;
use edgevmm_devices::virtio::net::{self, GuestOffloads, Net, NetBackend};
use edgevmm_net::{
    Forward, FrameSocket, Offloads, Passt, PasstConfig, PasstError, Tap, TapError, Transport,
};
use uuid::Uuid;
use vm_memory::VolatileSlice;

use super::identity;
use super::lease::{self, LeasedTap};

/// MTU of user networks, the largest that passt takes: it has no other way to move much at once.
///
/// DHCP alone tells it to the guest. As the device's own MTU it would size the receive buffers of
/// whatever driver comes first, and iPXE can't get as much memory: its DHCP then fails. A guest
/// that does not ask DHCP for an MTU keeps its 1500, which passt heeds on each connection.
const USER_MTU: u16 = 65_520;

/// Why a machine's network interfaces can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A tap can't be used.
    #[error("Can't use the tap of network interface {index}")]
    Tap {
        /// Place of the interface among the machine's, from 0.
        index: usize,
        /// Why.
        #[source]
        source: TapError,
    },
    /// A user network can't be started.
    #[error("Can't start the user network of network interface {index}")]
    User {
        /// Place of the interface among the machine's, from 0.
        index: usize,
        /// Why.
        #[source]
        source: PasstError,
    },
    /// A port forward listens at an IPv6 address.
    #[error(
        "Can't forward {forward} to network interface {index}: user networks have no IPv6; give an \
         IPv4 address to listen at, like 127.0.0.1, or none for all"
    )]
    Ipv6 {
        /// Place of the interface among the machine's, from 0.
        index: usize,
        /// The forward as given.
        forward: PortForward,
    },
}

/// A network interface whose host end is open.
#[derive(Debug)]
pub(super) struct OpenNic {
    config: net::NetConfig,
    backend: Box<dyn NetBackend>,
    /// Its place in the boot order; `None` is not booted from.
    pub(super) boot_order: Option<u32>,
}

impl OpenNic {
    /// The interface's device.
    pub(super) fn into_device(self, device_loop: Arc<dyn DeviceLoop>) -> Box<dyn VirtioDevice> {
        Box::new(Net::new(self.config, vec![self.backend], device_loop))
    }
}

/// A process that a network interface needs. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct NetHelper {
    interface: usize,
    passt: Passt,
    gone: bool,
}

impl NetHelper {
    /// Process ID.
    pub(super) fn pid(&self) -> u32 {
        self.passt.pid()
    }

    /// Says why the process ended, once, if it has.
    pub(super) fn check(&mut self) {
        if self.gone {
            return;
        }
        if let Some(exit) = self.passt.try_wait() {
            self.gone = true;
            tracing::error!(
                "The user network of interface {} is gone: passt ended ({}) {}",
                self.interface,
                exit.status,
                exit.message
            );
        }
    }
}

/// Opens the interfaces of `config`, the machine `uuid`, and starts what they need.
///
/// # Errors
/// Fails when a tap or a user network can't be had; nothing is left running then.
pub(super) fn open(
    config: &VmConfig,
    uuid: Uuid,
) -> Result<(Vec<OpenNic>, Vec<NetHelper>), NetworkError> {
    let mut nics = Vec::with_capacity(config.nets.len());
    let mut helpers = Vec::new();
    for (index, net) in config.nets.iter().enumerate() {
        let mac = net.mac.unwrap_or_else(|| identity::mac(uuid, index));
        let (backend, mtu): (Box<dyn NetBackend>, _) = match &net.backend {
            NetBackendConfig::Tap { tap, lease } => {
                let (backend, mtu) =
                    open_tap(tap).map_err(|source| NetworkError::Tap { index, source })?;
                match lease {
                    None => (Box::new(backend), Some(mtu)),
                    Some(lease) => {
                        let responder = lease::responder(lease, mac, mtu);
                        (Box::new(LeasedTap::new(backend, responder)), Some(mtu))
                    }
                }
            }
            NetBackendConfig::User {
                forwards,
                host_loopback,
            } => {
                let passt = PasstConfig {
                    forwards: to_forwards(index, forwards)?,
                    host_loopback: *host_loopback,
                    ..user_network(helpers.len())
                };
                let (passt, socket) =
                    Passt::spawn(&passt).map_err(|source| NetworkError::User { index, source })?;
                helpers.push(NetHelper {
                    interface: index,
                    passt,
                    gone: false,
                });
                (Box::new(PasstBackend(socket)), None)
            }
        };
        nics.push(OpenNic {
            config: device_config(index, mac, mtu),
            backend,
            boot_order: net.bootindex,
        });
    }
    Ok((nics, helpers))
}

fn device_config(index: usize, mac: MacAddr, mtu: Option<u16>) -> net::NetConfig {
    net::NetConfig {
        name: format!("net{index}"),
        mac: mac.0,
        // The guest is told, so that it neither sends what the host's network can't carry nor has
        // too little room for what comes from there.
        mtu,
    }
}

fn open_tap(name: &str) -> Result<(TapBackend, u16), TapError> {
    let tap = Tap::open(name)?;
    let mtu = tap.mtu()?;
    Ok((TapBackend(tap), mtu))
}

/// User network number `number` of a machine: 10.0.2.0/24 and those that follow, because an
/// address is good on one interface only.
fn user_network(number: usize) -> PasstConfig {
    let third = u8::try_from(number).unwrap_or(u8::MAX).saturating_add(2);
    PasstConfig {
        guest: Ipv4Addr::new(10, 0, third, 15),
        gateway: Ipv4Addr::new(10, 0, third, 2),
        mtu: Some(USER_MTU),
        ..PasstConfig::default()
    }
}

fn to_forwards(index: usize, forwards: &[PortForward]) -> Result<Vec<Forward>, NetworkError> {
    let to_forward = |forward: &PortForward| {
        let address = match forward.address {
            Some(IpAddr::V6(_)) => {
                let forward = forward.clone();
                return Err(NetworkError::Ipv6 { index, forward });
            }
            Some(IpAddr::V4(address)) => Some(address),
            None => None,
        };
        Ok(Forward {
            transport: match forward.protocol {
                Protocol::Tcp => Transport::Tcp,
                Protocol::Udp => Transport::Udp,
            },
            address,
            host: forward.host,
            guest: forward.guest,
        })
    };
    forwards.iter().map(to_forward).collect()
}

/// A tap as the host end of an interface.
#[derive(Debug)]
pub(super) struct TapBackend(Tap);

impl NetBackend for TapBackend {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn vnet_header(&self) -> bool {
        true
    }

    fn set_offloads(&mut self, offloads: GuestOffloads) -> io::Result<()> {
        let offloads = Offloads {
            checksum: offloads.checksum,
            tso4: offloads.tso4,
            tso6: offloads.tso6,
            ecn: offloads.ecn,
            ufo: false,
        };
        self.0.set_offloads(offloads).map_err(io::Error::other)
    }

    fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        self.0.recv(parts)
    }

    fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        self.0.send(parts)
    }
}

/// The link to a passt as the host end of an interface.
#[derive(Debug)]
struct PasstBackend(FrameSocket);

impl NetBackend for PasstBackend {
    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn vnet_header(&self) -> bool {
        false
    }

    fn set_offloads(&mut self, _: GuestOffloads) -> io::Result<()> {
        // Without headers the device offers the guest none.
        Ok(())
    }

    fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        self.0.recv(parts)
    }

    fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        self.0.send(parts)
    }

    fn flush(&mut self) -> io::Result<bool> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::path::PathBuf;

    use edgevmm_config::{MacAddr, NetConfig};
    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;

    const UUID: Uuid = Uuid::from_u128(7);

    fn machine(nets: Vec<NetConfig>) -> VmConfig {
        VmConfig {
            nets,
            ..VmConfig::default()
        }
    }

    fn tap(name: &str) -> NetConfig {
        let backend = NetBackendConfig::Tap {
            tap: name.into(),
            lease: None,
        };
        NetConfig {
            backend,
            mac: None,
            bootindex: None,
        }
    }

    fn user(forward: &str) -> NetConfig {
        let backend = NetBackendConfig::User {
            forwards: vec![forward.parse().unwrap()],
            host_loopback: false,
        };
        NetConfig {
            backend,
            mac: None,
            bootindex: None,
        }
    }

    fn passt_is_there() -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let there = std::env::split_paths(&path).any(|directory| directory.join("passt").is_file());
        if !there {
            let _ = writeln!(io::stderr(), "SKIPPED: passt is not installed");
        }
        there
    }

    /// Asks for `target` and returns who answered.
    fn arp(backend: &mut dyn NetBackend, target: Ipv4Addr) -> Option<Ipv4Addr> {
        let mut request = [0; 42];
        request[..6].fill(0xff);
        request[6] = 2;
        request[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request[22] = 2;
        request[38..].copy_from_slice(&target.octets());
        let (head, tail) = request.split_at_mut(20);
        assert!(backend.send(&[head.into(), tail.into()]).unwrap());
        assert!(backend.flush().unwrap());
        for _ in 0..200 {
            let mut frame = [0; 2000];
            match backend.recv(&[(&mut frame[..]).into()]).unwrap() {
                Some(_) if frame[12..14] == [8, 6] && frame[21] == 2 => {
                    return Some(Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]));
                }
                Some(_) => {}
                None => {
                    let readable = PollFd::new(backend.poll_fd(), PollFlags::POLLIN);
                    poll(&mut [readable], 50_u8).unwrap();
                }
            }
        }
        None
    }

    #[test]
    fn user_networks_are_apart_and_end_with_their_helpers() {
        if !passt_is_there() {
            return;
        }
        let given = MacAddr([2, 0, 0, 0, 0, 1]);
        let second = NetConfig {
            mac: Some(given),
            ..NetConfig::user()
        };
        let (mut nics, helpers) = open(&machine(vec![NetConfig::user(), second]), UUID).unwrap();
        for (nic, third) in nics.iter_mut().zip([2, 3]) {
            assert!(!nic.backend.vnet_header());
            nic.backend.set_offloads(GuestOffloads::default()).unwrap();
            let gateway = Ipv4Addr::new(10, 0, third, 2);
            assert_eq!(arp(&mut *nic.backend, gateway), Some(gateway));
        }
        let configs: Vec<_> = nics.iter().map(|nic| &nic.config).collect();
        assert_eq!((&*configs[0].name, &*configs[1].name), ("net0", "net1"));
        assert_eq!(configs[0].mac, identity::mac(UUID, 0).0);
        assert_eq!(configs[1].mac, given.0);

        let processes: Vec<_> = helpers
            .iter()
            .map(|helper| PathBuf::from(format!("/proc/{}", helper.passt.pid())))
            .collect();
        assert!(processes.iter().all(|process| process.exists()));
        drop(helpers);
        assert!(!processes.iter().any(|process| process.exists()));
        let mut room = [0; 2000];
        let error = nics[0].backend.recv(&[(&mut room[..]).into()]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn no_interfaces_need_nothing() {
        let (nics, helpers) = open(&machine(Vec::new()), UUID).unwrap();
        assert!(nics.is_empty() && helpers.is_empty());
    }

    #[test]
    fn forwards_keep_their_parts() {
        let forwards = ["udp:127.0.0.1:53:5353", "80:8080"].map(|text| text.parse().unwrap());
        let [one, other] = to_forwards(0, &forwards).unwrap()[..] else {
            panic!("not two");
        };
        assert_eq!(one.transport, Transport::Udp);
        assert_eq!(one.to_string(), "127.0.0.1/53:5353");
        assert_eq!(other.transport, Transport::Tcp);
        assert_eq!(other.to_string(), "80:8080");
    }

    #[test]
    fn ipv6_listeners_are_refused() {
        let error = open(&machine(vec![user("[::1]:2222:22")]), UUID).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Can't forward [::1]:2222:22 to network interface 0: user networks have no IPv6; give \
             an IPv4 address to listen at, like 127.0.0.1, or none for all"
        );
    }

    #[test]
    fn a_tap_that_is_not_there_is_not_made() {
        let name = "edgevmm-none";
        let error = open(&machine(vec![tap(name)]), UUID).unwrap_err();
        assert!(matches!(&error, NetworkError::Tap { index: 0, .. }));
        assert!(!PathBuf::from("/sys/class/net").join(name).exists());
    }
}
