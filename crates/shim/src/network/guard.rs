//! What a guest may send: a program (classic BPF, kernel's
//! networking/filter.rst) that the kernel runs on each frame before it goes on, so it holds whatever
//! becomes of the VMM.
//!
//! Frames come from the guest's MAC address, if that is known. If it has addresses, they are untagged, and are
//!
//! - IPv4 from one of its addresses,
//! - ARP that tells of one of them or none,
//! - IPv6 from one of them or one of the link, for which nobody is asked (RFC 4862), so that a guest may
//!   choose it, but not the router's. It advertises no others as its own, is no router and redirects
//!   nobody. Before a host has an address it may look whether others have it, find routers and join
//!   groups.
//!
//! Headers between those of IPv6 and ICMPv6 would hide what is in it: only the one of group membership
//! may be there (RFC 3810), and fragments, which receivers ignore if they are such messages (RFC 6980).

use std::net::{Ipv4Addr, Ipv6Addr};

/// An instruction (`sock_filter`).
pub type Instruction = [u8; 8];

/// What a guest may send as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// Its MAC address, unless it may choose one.
    pub mac: Option<[u8; 6]>,
    /// Its IPv4 addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// Its IPv6 addresses.
    pub addresses6: Vec<Ipv6Addr>,
    /// The router's address of the link, which is not the guest's to choose.
    pub router: Option<Ipv6Addr>,
}

/// Sizes of a load (BPF_LD | BPF_ABS).
const WORD: u16 = 0x20;
const HALF: u16 = 0x28;
const BYTE: u16 = 0x30;
const LOAD_LEN: u16 = 0x80;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_NOT_BELOW: u16 = 0x35;
const RETURN: u16 = 0x06;
/// Where a load finds whether there was a VLAN tag, which the kernel keeps apart (SKF_AD_OFF).
const TAGGED: u32 = 0xffff_f030;

/// What programs answer (TC_ACT_UNSPEC, TC_ACT_SHOT): ask the next filter, or lose the frame.
const GO_ON: u32 = u32::MAX;
const LOSE: u32 = 2;

const IPV4: u32 = 0x0800;
const ARP: u32 = 0x0806;
const IPV6: u32 = 0x86dd;
const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const ICMPV6: u32 = 58;
const DESTINATION_OPTIONS: u32 = 60;
/// Reports of group membership, and who leaves one.
const MEMBERSHIP: [u32; 3] = [131, 132, 143];
const ROUTER_SOLICITATION: u32 = 133;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;

/// Offsets in frames.
const SENDER: u32 = 6;
const TYPE: u32 = 12;
const ARP_KIND: u32 = 14;
const ARP_SENDER: u32 = 22;
const ARP_ADDRESS: u32 = 28;
const ARP_END: u32 = 42;
const IPV4_SOURCE: u32 = 26;
const IPV4_END: u32 = 34;
const NEXT_HEADER: u32 = 20;
const IPV6_SOURCE: u32 = 22;
const IPV6_END: u32 = 54;
/// The address that a message of neighbour discovery is about, behind an ICMPv6 header.
const TARGET: u32 = IPV6_END + 8;
const TARGET_END: u32 = TARGET + 16;

/// The program for a guest.
pub fn program(own: &Own) -> Vec<Instruction> {
    let mut program = Assembler::default();
    let (pass, lose) = (program.label(), program.label());
    program.expect_mac(SENDER, own.mac, lose);
    if own.addresses.is_empty() && own.addresses6.is_empty() {
        program.go(pass);
    } else {
        let (arp, ipv4, ipv6) = (program.label(), program.label(), program.label());
        program.load(WORD, TAGGED);
        program.unless(0, lose);
        program.load(HALF, TYPE);
        for (kind, place) in [(IPV4, ipv4), (IPV6, ipv6), (ARP, arp)] {
            program.when(kind, place);
        }
        program.go(lose);
        program.place(ipv4);
        program.expect_len(IPV4_END, lose);
        program.load(WORD, IPV4_SOURCE);
        program.one_of(&own.addresses, pass, lose);
        program.place(arp);
        program.arp(&own.addresses, own.mac, pass, lose);
        program.place(ipv6);
        program.ipv6(own, pass, lose);
    }
    program.place(pass);
    program.emit(RETURN, 0, 0, GO_ON);
    program.place(lose);
    program.emit(RETURN, 0, 0, LOSE);
    program.finish()
}

/// A place in a program, which may come later.
#[derive(Debug, Clone, Copy)]
struct Label(usize);

/// A program being written.
#[derive(Debug, Default)]
struct Assembler {
    code: Vec<(u16, u8, u8, u32)>,
    labels: Vec<usize>,
    /// Jumps, and where they lead.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn arp(&mut self, addresses: &[Ipv4Addr], mac: Option<[u8; 6]>, pass: Label, lose: Label) {
        self.expect_len(ARP_END, lose);
        // Of Ethernet and IPv4, or what follows lies elsewhere.
        self.load(WORD, ARP_KIND);
        self.unless(0x0001_0800, lose);
        self.load(HALF, ARP_KIND + 4);
        self.unless(0x0604, lose);
        self.expect_mac(ARP_SENDER, mac, lose);
        self.load(WORD, ARP_ADDRESS);
        self.when(0, pass);
        self.one_of(addresses, pass, lose);
    }

    fn ipv6(&mut self, own: &Own, pass: Label, lose: Label) {
        let (named, nameless) = (self.label(), self.label());
        self.expect_len(IPV6_END, lose);
        self.own6(IPV6_SOURCE, own, named, lose);
        self.when_address(IPV6_SOURCE, Ipv6Addr::UNSPECIFIED, nameless);
        self.go(lose);
        self.place(named);
        self.load(BYTE, NEXT_HEADER);
        for header in [ROUTING, DESTINATION_OPTIONS] {
            self.when(header, lose);
        }
        self.inner(own, &[ROUTER_ADVERTISEMENT, REDIRECT], pass, lose);
        self.go(pass);
        self.place(nameless);
        self.load(BYTE, NEXT_HEADER);
        self.inner(own, &[], pass, lose);
        self.go(lose);
    }

    /// What is in IPv6 whose next header is loaded: ICMPv6, of which `refused` types are lost, or, if
    /// there are none, all but those of a host without an address; groups. All else goes on behind it.
    fn inner(&mut self, own: &Own, refused: &[u32], pass: Label, lose: Label) {
        let (icmp, options, target) = (self.label(), self.label(), self.label());
        let end = self.label();
        self.when(ICMPV6, icmp);
        self.when(HOP_BY_HOP, options);
        self.go(end);
        self.place(options);
        self.expect_len(TARGET + 1, lose);
        self.load(HALF, IPV6_END);
        // Behind eight bytes of options.
        self.unless(ICMPV6 << 8, lose);
        self.load(BYTE, TARGET);
        for kind in MEMBERSHIP {
            self.when(kind, pass);
        }
        self.go(lose);
        self.place(icmp);
        self.expect_len(TARGET, lose);
        self.load(BYTE, IPV6_END);
        for kind in refused {
            self.when(*kind, lose);
        }
        if refused.is_empty() {
            self.when(ROUTER_SOLICITATION, pass);
            self.when(NEIGHBOUR_SOLICITATION, target);
            self.go(lose);
        } else {
            self.when(NEIGHBOUR_ADVERTISEMENT, target);
            self.go(pass);
        }
        self.place(target);
        self.expect_len(TARGET_END, lose);
        self.own6(TARGET, own, pass, lose);
        self.go(lose);
        self.place(end);
    }

    /// Goes to `mine` if the address at an offset is the guest's.
    fn own6(&mut self, at: u32, own: &Own, mine: Label, lose: Label) {
        if let Some(router) = own.router {
            self.when_address(at, router, lose);
        }
        self.load(HALF, at);
        self.emit(AND, 0, 0, 0xffc0);
        self.when(0xfe80, mine);
        for address in &own.addresses6 {
            self.when_address(at, *address, mine);
        }
    }

    fn when_address(&mut self, at: u32, address: Ipv6Addr, to: Label) {
        let other = self.label();
        let words = address.octets();
        let words = words.as_chunks::<4>().0.iter();
        for (word, at) in words.zip((at..).step_by(4)) {
            self.load(WORD, at);
            self.unless(u32::from_be_bytes(*word), other);
        }
        self.go(to);
        self.place(other);
    }

    fn one_of(&mut self, addresses: &[Ipv4Addr], pass: Label, lose: Label) {
        for address in addresses {
            self.when(address.to_bits(), pass);
        }
        self.go(lose);
    }

    fn expect_mac(&mut self, at: u32, mac: Option<[u8; 6]>, lose: Label) {
        let Some([a, b, c, d, e, f]) = mac else {
            return;
        };
        self.load(WORD, at);
        self.unless(u32::from_be_bytes([a, b, c, d]), lose);
        self.load(HALF, at + 4);
        self.unless(u32::from(u16::from_be_bytes([e, f])), lose);
    }

    /// A load beyond the end would end the program as if the kernel itself were meant.
    fn expect_len(&mut self, len: u32, lose: Label) {
        self.emit(LOAD_LEN, 0, 0, 0);
        self.emit(JUMP_NOT_BELOW, 1, 0, len);
        self.go(lose);
    }

    fn load(&mut self, size: u16, at: u32) {
        self.emit(size, 0, 0, at);
    }

    /// Goes to a place if what was loaded is `value`.
    fn when(&mut self, value: u32, to: Label) {
        self.emit(JUMP_EQUAL, 0, 1, value);
        self.go(to);
    }

    /// Goes to a place if what was loaded is not `value`.
    fn unless(&mut self, value: u32, to: Label) {
        self.emit(JUMP_EQUAL, 1, 0, value);
        self.go(to);
    }

    /// Conditions lead at most 255 instructions on, this as far as may be.
    fn go(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.emit(JUMP, 0, 0, 0);
    }

    fn emit(&mut self, code: u16, so: u8, otherwise: u8, value: u32) {
        self.code.push((code, so, otherwise, value));
    }

    fn label(&mut self) -> Label {
        self.labels.push(0);
        Label(self.labels.len() - 1)
    }

    fn place(&mut self, label: Label) {
        let here = self.code.len();
        if let Some(place) = self.labels.get_mut(label.0) {
            *place = here;
        }
    }

    fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            let to = self.labels.get(label.0).copied().unwrap_or_default();
            let distance = to.saturating_sub(at + 1);
            if let Some(jump) = self.code.get_mut(at) {
                jump.3 = u32::try_from(distance).unwrap_or_default();
            }
        }
        let code = self.code.into_iter();
        code.map(|(code, so, otherwise, value)| {
            let [a, b] = code.to_ne_bytes();
            let [c, d, e, f] = value.to_ne_bytes();
            [a, b, so, otherwise, c, d, e, f]
        })
        .collect()
    }
}
