//! Tap devices (Linux Documentation/networking/tuntap.rst): Ethernet frames, each behind a
//! virtio-net header.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use thiserror::Error;
use vm_memory::VolatileSlice;

use crate::stream::total;

/// Bytes of the virtio-net header before each frame: the one of virtio 1, with `num_buffers`.
pub const VNET_HEADER: usize = 12;

/// Parts that a frame comes in at most: the kernel's limit (UIO_MAXIOV).
pub const MAX_PARTS: usize = 1024;

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
    /// There is no interface of that name.
    #[error(
        "There is no tap {name}: make it with \
         `ip tuntap add dev {name} mode tap user $USER && ip link set {name} up`"
    )]
    Missing {
        /// Name of the tap.
        name: String,
    },
    /// The tap belongs to somebody else.
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
    /// Opens the tap `name`. One that is not there is not created, although the kernel offers that:
    /// nothing would be connected to it.
    ///
    /// # Errors
    /// Fails when the name is invalid, without permission, when the tap is missing, in use or no
    /// tap.
    pub fn open(name: &str) -> Result<Self, TapError> {
        attach(name, false)
    }

    /// Makes a tap `name` that stays after the program, in the network namespace of the caller. It
    /// is down, and there may be one already.
    ///
    /// # Errors
    /// As for [`Tap::open`], but that it need not be there.
    pub fn make(name: &str) -> Result<(), TapError> {
        let file = open_driver(name)?;
        let tap = configure(file, name, false)?;
        sys::keep(&tap.file).map_err(|errno| tap.setup_error("TUNSETPERSIST", errno))
    }

    /// Opens `count` queues of the tap `name`, which was made with `multi_queue`.
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

    /// MTU of the interface, in bytes.
    ///
    /// # Errors
    /// Fails when the interface is gone or was renamed.
    pub fn mtu(&self) -> Result<u16, TapError> {
        sys::mtu(&self.name).map_err(|errno| self.setup_error("SIOCGIFMTU", errno))
    }

    /// Moves the next frame for the guest, behind its header, into `parts` and returns the length of
    /// both; `None` when there is none now.
    ///
    /// A frame longer than `parts` is lost, and so is one that the kernel has no header for; the
    /// length is then some number greater than the room. A frame that fills [`MAX_PARTS`] parts to
    /// the last byte counts as one of these.
    ///
    /// # Errors
    /// `InvalidInput` when there are more than [`MAX_PARTS`]; any other error means that the
    /// interface is gone.
    pub fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        if parts.len() > MAX_PARTS {
            return Err(ErrorKind::InvalidInput.into());
        }
        let lost = total(parts).saturating_add(1);
        loop {
            return match sys::readv(&self.file, parts) {
                Ok(count) if parts.len() == MAX_PARTS && count + 1 == lost => Ok(Some(lost)),
                Ok(count) => Ok(Some(count)),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Ok(None),
                Err(Errno::EINVAL) => Ok(Some(lost)),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Sends a frame of the guest behind its header. Returns `false` when the kernel cannot take it
    /// now; offer it again when the descriptor is writable. A frame that the kernel refuses, for
    /// what is in it or because the interface is down, is dropped as if sent.
    ///
    /// # Errors
    /// `InvalidInput` when there are more than [`MAX_PARTS`]; any other error means that the
    /// interface is gone.
    pub fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool> {
        if parts.len() > MAX_PARTS {
            return Err(ErrorKind::InvalidInput.into());
        }
        loop {
            return match sys::writev(&self.file, parts) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Ok(false),
                Err(errno @ (Errno::EBADFD | Errno::EBADF)) => Err(errno.into()),
                Ok(()) | Err(_) => Ok(true),
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
    let file = open_driver(name)?;
    // Not by /sys, which may show another network namespace than ours.
    if if_nametoindex(name) == Err(Errno::ENODEV) {
        return Err(TapError::Missing {
            name: name.to_owned(),
        });
    }
    configure(file, name, several)
}

/// Opens the driver for the tap `name`, if that is a name.
fn open_driver(name: &str) -> Result<File, TapError> {
    let forbidden = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '%' | ':');
    let size = 1..libc::IFNAMSIZ;
    if !size.contains(&name.len()) || matches!(name, "." | "..") || name.contains(forbidden) {
        return Err(TapError::Name {
            name: name.to_owned(),
        });
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver(error),
            _ => TapError::Open(error),
        })
}

/// Makes `file` a queue of the tap `name`, which the kernel makes if it is missing.
fn configure(file: File, name: &str, several: bool) -> Result<Tap, TapError> {
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

/// MTU of an interface in the network namespace of the caller, in bytes.
///
/// # Errors
/// Fails when there is none of that name.
pub fn interface_mtu(name: &str) -> io::Result<u16> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(Errno::ENODEV.into());
    }
    Ok(sys::mtu(name)?)
}

/// The system calls of tap devices.
mod sys {
    use std::fs::File;
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd;

    use nix::errno::Errno;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use vm_memory::VolatileSlice;

    use super::MAX_PARTS;

    mod raw {
        nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);
        nix::ioctl_read_bad!(get_interface, libc::TUNGETIFF, libc::ifreq);
        nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
        nix::ioctl_write_int_bad!(set_offloads, libc::TUNSETOFFLOAD);
        nix::ioctl_write_int_bad!(set_persist, libc::TUNSETPERSIST);
        nix::ioctl_read_bad!(get_mtu, libc::SIOCGIFMTU, libc::ifreq);
    }

    /// A request about the interface `name`, which has room for its terminating zero.
    fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
        // All flags of a tap fit the kernel's 16 bits.
        let ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags },
        };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request
    }

    /// Makes `file` a queue of the interface `name`.
    pub(super) fn set_interface(file: &File, name: &str, flags: libc::c_int) -> Result<(), Errno> {
        let request = request(name, flags);
        // SAFETY: the descriptor is open and the kernel only reads and writes `request`, which
        // outlives the call.
        unsafe { raw::set_interface(file.as_raw_fd(), &raw const request) }.map(drop)
    }

    pub(super) fn interface_flags(file: &File) -> Result<libc::c_int, Errno> {
        let mut request = request("", 0);
        // SAFETY: the descriptor is open and `request` is the kernel's to fill during the call.
        unsafe { raw::get_interface(file.as_raw_fd(), &raw mut request) }?;
        // SAFETY: every bit pattern is a valid short, and the union is initialised.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(libc::c_int::from(flags.cast_unsigned()))
    }

    pub(super) fn mtu(name: &str) -> Result<u16, Errno> {
        let (family, kind) = (AddressFamily::Inet, SockType::Datagram);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let mut request = request(name, 0);
        // SAFETY: the descriptor is open and `request` is the kernel's to fill during the call.
        unsafe { raw::get_mtu(socket.as_raw_fd(), &raw mut request) }?;
        // SAFETY: every bit pattern is a valid int, and the kernel has just written this one.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
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

    /// Has the interface stay when nobody has it open.
    pub(super) fn keep(file: &File) -> Result<(), Errno> {
        // SAFETY: the descriptor is open and the argument is a number, not a pointer.
        unsafe { raw::set_persist(file.as_raw_fd(), 1) }.map(drop)
    }

    type Iovecs = [MaybeUninit<libc::iovec>; MAX_PARTS];

    /// Writes as many of `parts` as there is room for to the front of `iovecs`; returns how many.
    fn fill<'a>(
        iovecs: &mut Iovecs,
        parts: impl Iterator<Item = &'a VolatileSlice<'a>>,
    ) -> libc::c_int {
        let mut count = 0;
        for (iovec, part) in iovecs.iter_mut().zip(parts) {
            iovec.write(libc::iovec {
                iov_base: part.ptr_guard_mut().as_ptr().cast(),
                iov_len: part.len(),
            });
            count += 1;
        }
        count
    }

    /// Reads one frame into `parts`. The count is greater than their room if the frame was cut off,
    /// which cannot be told when there are [`MAX_PARTS`].
    pub(super) fn readv(file: &File, parts: &[VolatileSlice<'_>]) -> Result<usize, Errno> {
        // The kernel cuts silently; a byte beyond the room shows it.
        let mut beyond = [0];
        let beyond = [VolatileSlice::from(&mut beyond[..])];
        let mut iovecs: Iovecs = [const { MaybeUninit::uninit() }; MAX_PARTS];
        let count = fill(&mut iovecs, parts.iter().chain(&beyond));
        // SAFETY: the first `count` entries are written, and each is memory that its slice borrows
        // and that anybody may change at any time, as is in the nature of a volatile slice.
        let done = unsafe { libc::readv(file.as_raw_fd(), iovecs.as_ptr().cast(), count) };
        Errno::result(done).map(isize::cast_unsigned)
    }

    /// Writes `parts` as one frame, which the kernel takes whole or not at all.
    pub(super) fn writev(file: &File, parts: &[VolatileSlice<'_>]) -> Result<(), Errno> {
        let mut iovecs: Iovecs = [const { MaybeUninit::uninit() }; MAX_PARTS];
        let count = fill(&mut iovecs, parts.iter());
        // SAFETY: the first `count` entries are written, and each is memory that its slice borrows;
        // the kernel copes with its changing meanwhile.
        let done = unsafe { libc::writev(file.as_raw_fd(), iovecs.as_ptr().cast(), count) };
        Errno::result(done).map(drop)
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
