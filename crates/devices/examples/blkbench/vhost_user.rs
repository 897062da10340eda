//! The front-end's side of vhost-user, as far as it takes to have another program serve the rings
//! of a disk: memory, rings and eventfds are handed over, and no protocol feature is asked for.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use edgevmm_devices::GuestMemory;

use super::driver::Driver;

/// Version 1 of the protocol, in each message.
const VERSION: u32 = 1;
/// In a message of a ring's eventfd: none comes with it. The number of the queue is below.
const NO_FD: u64 = 1 << 8;

/// What a message asks for.
#[derive(Debug, Clone, Copy)]
enum Ask {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
}

/// A disk that another program serves.
#[derive(Debug)]
pub struct Remote(UnixStream);

impl Remote {
    /// Connects to whoever listens at `socket`, and agrees on those `features` that both know.
    pub fn connect(socket: &Path, features: u64) -> Self {
        let mut this = Self(UnixStream::connect(socket).unwrap());
        this.send(Ask::SetOwner, &[], &[]);
        let offered = this.features();
        assert_eq!(offered & features, features, "offered: {offered:#x}");
        this.send(Ask::SetFeatures, &features.to_le_bytes(), &[]);
        this
    }

    /// Hands over guest memory, all of it in files. Its addresses here are those of the guest.
    pub fn share(&mut self, memory: &GuestMemory) {
        let mut body = Vec::new();
        let mut fds = Vec::new();
        body.extend(u64::try_from(memory.num_regions()).unwrap().to_le_bytes());
        for region in memory.iter() {
            let file = region.file_offset().unwrap();
            let start = region.start_addr().0;
            for value in [start, region.len(), start, file.start()] {
                body.extend(value.to_le_bytes());
            }
            fds.push(file.file().as_raw_fd());
        }
        self.send(Ask::SetMemTable, &body, &fds);
    }

    /// Has the rings of a driver served as queue `index`, which tells by `event` of what is done.
    pub fn serve(&mut self, index: u16, size: u16, driver: &Driver, event: &EventFd) {
        let state = |value: u32| [u32::from(index).to_le_bytes(), value.to_le_bytes()].concat();
        self.send(Ask::SetVringNum, &state(size.into()), &[]);
        self.send(Ask::SetVringBase, &state(0), &[]);
        let mut addresses = state(0);
        for address in [driver.table(), driver.used_ring(), driver.avail_ring(), 0] {
            addresses.extend(address.to_le_bytes());
        }
        self.send(Ask::SetVringAddr, &addresses, &[]);
        let number = u64::from(index);
        assert!(number < NO_FD);
        self.send(
            Ask::SetVringCall,
            &number.to_le_bytes(),
            &[event.as_raw_fd()],
        );
        let kick = driver.kick.as_raw_fd();
        self.send(Ask::SetVringKick, &number.to_le_bytes(), &[kick]);
        // QEMU has made what it was sent non-blocking, once it answers.
        self.features();
        // SAFETY: it is open for as long as it is borrowed here.
        let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        fcntl(event, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    }

    /// Has queue `index` served no more. Returns once that is so.
    pub fn stop(&mut self, index: u16) {
        let state = [u32::from(index).to_le_bytes(), [0; 4]].concat();
        self.send(Ask::GetVringBase, &state, &[]);
        self.receive();
    }

    fn features(&mut self) -> u64 {
        self.send(Ask::GetFeatures, &[], &[]);
        u64::from_le_bytes(self.receive().try_into().unwrap())
    }

    fn send(&mut self, ask: Ask, body: &[u8], fds: &[RawFd]) {
        let mut message = Vec::new();
        for word in [ask as u32, VERSION, u32::try_from(body.len()).unwrap()] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        if fds.is_empty() {
            self.0.write_all(&message).unwrap();
        } else {
            let sent = self.0.send_with_fds(&[&message[..]], fds).unwrap();
            assert_eq!(sent, message.len());
        }
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        let len = u32::from_le_bytes(header[8..].try_into().unwrap());
        let mut body = vec![0; len as usize];
        self.0.read_exact(&mut body).unwrap();
        body
    }
}
