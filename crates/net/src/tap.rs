//! Tap devices (Linux Documentation/networking/tuntap.rst): Ethernet frames, each behind a
//! virtio-net header.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use thiserror::Error;

/// Bytes of the virtio-net header before each frame: the one of virtio 1, with `num_buffers`.
pub const VNET_HEADER: usize = 12;

const TUN: &str = "/dev/net/tun";

/// Why a tap device could not be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// The name is none that a network interface can have.
    #[error(
        "Interface name {name:?} is not 1 to {max} characters without '/', '%' and white space",
        max = libc::IFNAMSIZ - 1
    )]
    Name {
        /// The name as given.
        name: String,
    },
    /// The kernel has no tap devices.
    #[error(
        "{TUN} is missing: load the driver with `modprobe tun`, or pass the device to the container"
    )]
    NoDriver(#[source] io::Error),
    /// The device file cannot be opened.
    #[error("Cannot open {TUN}: its permissions are 0666 as a rule")]
    Open(#[source] io::Error),
    /// The tap belongs to somebody else, or is not there and we may not create it.
    #[error(
        "No permission for tap {name}: have it made for this user with \
         `ip tuntap add dev {name} mode tap user $USER`, or grant CAP_NET_ADMIN"
    )]
    Permission {
        /// Name of the tap.
        name: String,
    },
    /// Another process has the tap open.
    #[error("Tap {name} is in use by another process: give each machine its own")]
    Busy {
        /// Name of the tap.
        name: String,
    },
    /// The interface is no tap, or one with another number of queues.
    #[error(
        "{name} is no tap device for {queues}: `ip -d link show {name}` tells what it is; a tap for \
         several queues is made with `ip tuntap add dev {name} mode tap multi_queue`"
    )]
    Kind {
        /// Name of the interface.
        name: String,
        /// How many queues were wanted: "one queue" or "several queues".
        queues: &'static str,
    },
    /// The number of queues is none that a tap can have.
    #[error("A tap has 1 to {MAX_QUEUES} queues, not {count}")]
    Queues {
        /// The number as given.
        count: usize,
    },
    /// The kernel opened the tap without a virtio-net header.
    #[error("Tap {name} has no virtio-net headers")]
    NoVnetHeader {
        /// Name of the tap.
        name: String,
    },
    /// The kernel refused a setting.
    #[error("Cannot set up tap {name} ({setting})")]
    Setup {
        /// Name of the tap.
        name: String,
        /// Name of the ioctl.
        setting: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Queues that the kernel allows for one tap (MAX_TAP_QUEUES).
const MAX_QUEUES: usize = 256;

/// What the guest takes and gives beyond finished frames of the MTU's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames with unfinished checksums; the others need this one.
    pub checksum: bool,
    /// Large TCP segments over IPv4.
    pub tso4: bool,
    /// Large TCP segments over IPv6.
    pub tso6: bool,
    /// Large TCP segments with ECN bits.
    pub ecn: bool,
    /// Large UDP datagrams to be fragmented.
    pub ufo: bool,
}

impl Offloads {
    fn bits(self) -> libc::c_uint {
        [
            (self.checksum, libc::TUN_F_CSUM),
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn, libc::TUN_F_TSO_ECN),
            (self.ufo, libc::TUN_F_UFO),
        ]
        .into_iter()
        .fold(
            0,
            |bits, (wanted, bit)| if wanted { bits | bit } else { bits },
        )
    }
}

/// One queue of a tap device. The descriptor is non-blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the tap `name`; creates it, for as long as it is open, when there is none.
    ///
    /// # Errors
    /// Fails when the name is invalid, without permission, when the tap is in use or is no tap.
    pub fn open(name: &str) -> Result<Self, TapError> {
        attach(name, false)
    }

    /// Opens `count` queues of the tap `name`, which was made with `multi_queue`; creates it when
    /// there is none.
    ///
    /// # Errors
    /// As for [`Tap::open`], and when `count` is not 1 to 256.
    pub fn open_queues(name: &str, count: usize) -> Result<Vec<Self>, TapError> {
        if !(1..=MAX_QUEUES).contains(&count) {
            return Err(TapError::Queues { count });
        }
        (0..count).map(|_| attach(name, true)).collect()
    }

    /// Name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the kernel what the guest has agreed to. It holds for the whole interface.
    ///
    /// # Errors
    /// Fails when the kernel does not know an offload, or for others without `checksum`.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        sys::set_offloads(&self.file, offloads.bits())
            .map_err(|errno| self.setup_error("TUNSETOFFLOAD", errno))
    }

    /// Moves the next frame for the guest, behind its header, into `parts` and returns the length of
    /// both; `None` when there is none now. What does not fit is cut off.
    ///
    /// # Errors
    /// Fails when the interface is gone, or when `parts` cannot hold the header.
    pub fn recv(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        loop {
            return match self.file.read_vectored(parts) {
                Ok(count) => Ok(Some(count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error),
            };
        }
    }

    /// Sends a frame of the guest behind its header. Returns `false` when the kernel cannot take it
    /// now; offer it again when the descriptor is writable. A frame that the kernel refuses, for
    /// what is in it or because the interface is down, is dropped as if sent.
    ///
    /// # Errors
    /// Fails when the interface is gone.
    pub fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<bool> {
        loop {
            let Err(error) = self.file.write_vectored(parts) else {
                return Ok(true);
            };
            return match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
                Errno::EINTR => continue,
                Errno::EAGAIN => Ok(false),
                Errno::EBADFD | Errno::EBADF => Err(error),
                _ => Ok(true),
            };
        }
    }

    fn setup_error(&self, setting: &'static str, errno: Errno) -> TapError {
        TapError::Setup {
            name: self.name.clone(),
            setting,
            source: errno.into(),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn attach(name: &str, several: bool) -> Result<Tap, TapError> {
    let forbidden = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '%' | ':');
    let size = 1..libc::IFNAMSIZ;
    if !size.contains(&name.len()) || matches!(name, "." | "..") || name.contains(forbidden) {
        return Err(TapError::Name {
            name: name.to_owned(),
        });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver(error),
            _ => TapError::Open(error),
        })?;
    let tap = Tap {
        file,
        name: name.to_owned(),
    };

    let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    sys::set_interface(&tap.file, name, flags).map_err(|errno| {
        let name = name.to_owned();
        match errno {
            Errno::EPERM | Errno::EACCES => TapError::Permission { name },
            Errno::EBUSY => TapError::Busy { name },
            Errno::EINVAL => TapError::Kind {
                name,
                queues: if several {
                    "several queues"
                } else {
                    "one queue"
                },
            },
            errno => tap.setup_error("TUNSETIFF", errno),
        }
    })?;
    let actual =
        sys::interface_flags(&tap.file).map_err(|errno| tap.setup_error("TUNGETIFF", errno))?;
    if actual & libc::IFF_VNET_HDR == 0 {
        return Err(TapError::NoVnetHeader { name: tap.name });
    }
    sys::set_header_size(&tap.file, VNET_HEADER)
        .map_err(|errno| tap.setup_error("TUNSETVNETHDRSZ", errno))?;
    tap.set_offloads(Offloads::default())?;
    Ok(tap)
}

/// The ioctls of tap devices.
mod sys {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use nix::errno::Errno;

    mod raw {
        nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);
        nix::ioctl_read_bad!(get_interface, libc::TUNGETIFF, libc::ifreq);
        nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
        nix::ioctl_write_int_bad!(set_offloads, libc::TUNSETOFFLOAD);
    }

    fn request(flags: libc::c_int) -> libc::ifreq {
        // All flags of a tap fit the kernel's 16 bits.
        let ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
        libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags },
        }
    }

    /// Makes `file` a queue of the interface `name`, which has room for its terminating zero.
    pub(super) fn set_interface(file: &File, name: &str, flags: libc::c_int) -> Result<(), Errno> {
        let mut request = request(flags);
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        // SAFETY: the descriptor is open and the kernel only reads and writes `request`, which
        // outlives the call.
        unsafe { raw::set_interface(file.as_raw_fd(), &raw const request) }.map(drop)
    }

    pub(super) fn interface_flags(file: &File) -> Result<libc::c_int, Errno> {
        let mut request = request(0);
        // SAFETY: the descriptor is open and `request` is the kernel's to fill during the call.
        unsafe { raw::get_interface(file.as_raw_fd(), &raw mut request) }?;
        // SAFETY: every bit pattern is a valid short, and the union is initialised.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(libc::c_int::from(flags.cast_unsigned()))
    }

    pub(super) fn set_header_size(file: &File, size: usize) -> Result<(), Errno> {
        let size = libc::c_int::try_from(size).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the descriptor is open and the kernel reads one int from `size`.
        unsafe { raw::set_header_size(file.as_raw_fd(), &raw const size) }.map(drop)
    }

    pub(super) fn set_offloads(file: &File, bits: libc::c_uint) -> Result<(), Errno> {
        let bits = libc::c_int::try_from(bits).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the descriptor is open and the argument is a number, not a pointer.
        unsafe { raw::set_offloads(file.as_raw_fd(), bits) }.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_has() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "tap%d",
            "sixteen-letters-",
            "a\0",
            "a:1",
        ] {
            assert!(
                matches!(Tap::open(name), Err(TapError::Name { .. })),
                "{name:?}"
            );
        }
        for count in [0, 257] {
            assert!(matches!(
                Tap::open_queues("a", count),
                Err(TapError::Queues { .. })
            ));
        }
    }
}
