#![allow(clippy::unwrap_used)]

use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;
use crate::dhcp6::{
    ADDRESS, ASSOCIATION, CLIENT, DNS, Options, PREFERENCE, RAPID, REFRESH, SEARCH, SERVER, STATUS,
};
use crate::frame6::OWN;

const MAC: Mac = [2, 0, 0, 0, 0, 7];
const GATEWAY: Mac = [2, 0, 0, 0, 0, 1];
const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 7);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0xa, 0xbcde);
const LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 7);
const DUID: [u8; 4] = [0, 4, 1, 2];
const SERVER_DUID: [u8; 10] = [0, 3, 0, 1, 2, 0x65, 0x64, 0x67, 0x65, 1];

fn lease() -> Lease6 {
    Lease6 {
        mac: MAC,
        address: ADDRESS6,
        prefix: 64,
        router: Some(Router::Absent {
            mac: GATEWAY,
            address: Some(GATEWAY6),
        }),
        dns: vec!["fd00:53::a".parse().unwrap()],
        search: vec!["svc.cluster.local".into()],
        mtu: Some(1450),
    }
}

/// A packet of the guest's.
fn packet(from: Ipv6Addr, to: &str, header: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [[0x33; 6], MAC].concat();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend([header, 255]);
    frame.extend(from.octets());
    frame.extend(to.parse::<Ipv6Addr>().unwrap().octets());
    frame.extend(payload);
    frame
}

fn dhcp(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + message.len()).unwrap().to_be_bytes();
    let udp = [&[2, 34, 2, 35, len[0], len[1], 0, 0], message].concat();
    packet(LINK, "ff02::1:2", 17, &udp)
}

fn option(code: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len()).unwrap();
    [&code.to_be_bytes()[..], &len.to_be_bytes(), value].concat()
}

/// An association with these addresses.
fn association(addresses: &[Ipv6Addr]) -> Vec<u8> {
    let mut value = b"iaid\0\0\0\0\0\0\0\0".to_vec();
    for address in addresses {
        value.extend(option(ADDRESS, &[&address.octets()[..], &[0; 8]].concat()));
    }
    option(ASSOCIATION, &value)
}

fn message(kind: u8, options: &[Vec<u8>]) -> Vec<u8> {
    [&[kind, 0xaa, 0xbb, 0xcc][..], &options.concat()].concat()
}

fn answer(frame: &[u8]) -> (Verdict, Vec<u8>) {
    let mut answer = vec![0; MAX_FRAME];
    let verdict = Responder::new(None, Some(lease())).answer(frame, &mut answer);
    if let Verdict::Answer(len) | Verdict::AnswerAndAdvertise(len) | Verdict::AnswerAndLook(len) =
        verdict
    {
        answer.truncate(len);
        check(&answer);
    }
    (verdict, answer)
}

/// Options that are told.
type Told = Vec<(u16, Vec<u8>)>;

/// The answer to a DHCP message: its type and options.
fn ask(kind: u8, options: &[Vec<u8>]) -> Option<(u8, Told)> {
    let (verdict, frame) = answer(&dhcp(&message(kind, options)));
    if verdict == Verdict::Swallow {
        return None;
    }
    assert_eq!(frame[..6], MAC);
    assert_eq!(frame[22..38], OWN.octets());
    assert_eq!(frame[38..54], LINK.octets());
    assert_eq!(frame[54..58], [2, 35, 2, 34]);
    assert_eq!(frame[63..66], [0xaa, 0xbb, 0xcc]);
    let options = Options(&frame[66..]).map(|(code, value)| (code, value.to_vec()));
    Some((frame[62], options.collect()))
}

fn find(options: &[(u16, Vec<u8>)], code: u16) -> Option<&[u8]> {
    let found = options.iter().find(|option| option.0 == code);
    found.map(|option| &option.1[..])
}

/// Lengths and checksum of a frame are right.
fn check(frame: &[u8]) {
    let len = u16::from_be_bytes([frame[18], frame[19]]);
    assert_eq!(usize::from(len), frame.len() - 54);
    let pseudo = frame::sum(0, &frame[22..54]);
    let pseudo = frame::sum(pseudo, &[frame[18], frame[19], 0, frame[20]]);
    assert_eq!(frame::sum(pseudo, &frame[54..]), 0xffff);
}

/// The options of neighbour discovery in `bytes`, with all of their bytes.
fn nd_options(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut options = Vec::new();
    while !bytes.is_empty() {
        let (option, rest) = bytes.split_at(usize::from(bytes[1]) * 8);
        options.push(option);
        bytes = rest;
    }
    options
}

#[test]
fn routers_are_told_of_with_all_about_the_link() {
    let from = Ipv6Addr::UNSPECIFIED;
    let (verdict, frame) = answer(&packet(from, "ff02::2", 58, &[133, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(verdict, Verdict::Answer(frame.len()));
    assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!(frame[21], 255);
    assert_eq!(frame[22..38], OWN.octets());
    assert_eq!(OWN.to_string(), "fe80::65:64ff:fe67:6501");
    // Hops, managed and other, a lifetime, and nothing said of times.
    assert_eq!(frame[54..56], [134, 0]);
    assert_eq!(frame[58..70], [64, 0xc0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
    let forever = [255; 4];
    let network = [0xfd, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let prefix = [&[3, 4, 64, 0x80][..], &forever, &forever, &[0; 4], &network].concat();
    let server = "fd00:53::a".parse::<Ipv6Addr>().unwrap().octets();
    let dns = [&[25, 3, 0, 0][..], &forever, &server].concat();
    let search = [
        &[31, 4, 0, 0][..],
        &forever,
        b"\x03svc\x07cluster\x05local\0",
        &[0; 5],
    ];
    let expected: [&[u8]; 5] = [
        &[1, 1, 2, 0, 0, 0, 0, 1],
        &[5, 1, 0, 0, 0, 0, 5, 170],
        &prefix,
        &dns,
        &search.concat(),
    ];
    assert_eq!(nd_options(&frame[70..]), expected);
}

#[test]
fn a_router_of_the_link_speaks_for_itself_and_none_is_none() {
    let mut frame = [0; MAX_FRAME];
    let mut advertise = |router| {
        let lease = Lease6 {
            router,
            prefix: 128,
            ..lease()
        };
        let responder = Responder::new(None, Some(lease));
        let own = packet(LINK, "ff02::1", 58, &neighbour(OWN));
        assert_eq!(responder.answer(&own, &mut frame), Verdict::Swallow);
        let len = responder.advertise(&mut frame).unwrap();
        let kinds: Vec<_> = nd_options(&frame[70..len])
            .iter()
            .map(|option| option[0])
            .collect();
        assert_eq!(kinds, [5, 25, 31]);
        let from: [u8; 16] = frame[22..38].try_into().unwrap();
        (Ipv6Addr::from(from), [frame[60], frame[61]])
    };
    assert_eq!(advertise(Some(Router::Present(LINK))), (LINK, [255; 2]));
    assert_eq!(advertise(None), (OWN, [0; 2]));
}

/// A question for the MAC address of `target`.
fn neighbour(target: Ipv6Addr) -> Vec<u8> {
    [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat()
}

#[test]
fn the_router_is_answered_for() {
    let (verdict, frame) = answer(&packet(LINK, "ff02::1:ff67:6501", 58, &neighbour(OWN)));
    assert_eq!(verdict, Verdict::AnswerAndLook(frame.len()));
    assert_eq!(frame[..6], MAC);
    assert_eq!(frame[38..54], LINK.octets());
    assert_eq!(frame[58..62], [0xe0, 0, 0, 0]);
    assert_eq!(frame[62..78], OWN.octets());
    assert_eq!(frame[78..], [2, 1, 2, 0, 0, 0, 0, 1]);
    // Who is about to take its address hears it with all others.
    let (_, frame) = answer(&packet(
        Ipv6Addr::UNSPECIFIED,
        "ff02::1:ff67:6501",
        58,
        &neighbour(OWN),
    ));
    assert_eq!(frame[38..54], frame6::ALL_NODES.octets());
    assert_eq!(frame[58], 0xa0);
}

/// A router's answer to the guest.
fn advertised(target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let mut message = vec![136, 0, 0, 0, 0xc0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(mac);
    packet(target, "fd00:10::7", 58, &message)
}

#[test]
fn a_router_that_changes_is_told_of() {
    let mut responder = Responder::new(None, Some(lease()));
    let mut frame = [0; MAX_FRAME];
    let len = responder.look_for_router(&mut frame).unwrap();
    assert_eq!(len, ROUTER_HEAD);
    let question = &frame[..len];
    check(question);
    assert_eq!(question[..6], [0x33, 0x33, 0xff, 0x0a, 0xbc, 0xde]);
    assert_eq!(question[6..12], MAC);
    assert_eq!(question[22..38], ADDRESS6.octets());
    let group: Ipv6Addr = "ff02::1:ff0a:bcde".parse().unwrap();
    assert_eq!(question[38..54], group.octets());
    assert_eq!(
        (question[54], &question[62..78]),
        (135, &GATEWAY6.octets()[..])
    );
    assert_eq!(question[78..], [&[1, 1][..], &MAC].concat());

    let new = [2, 0, 0, 0, 0, 0x42];
    let mut other = advertised(GATEWAY6, new);
    other[21] = 64;
    for nothing in [
        &advertised(ADDRESS6, new)[..],
        &advertised(GATEWAY6, MAC),
        &advertised(GATEWAY6, [0; 6]),
        &advertised(GATEWAY6, [0xff; 6]),
        &advertised(GATEWAY6, new)[..ROUTER_HEAD - 1],
        &other,
        &[],
    ] {
        assert_eq!(responder.hear(nothing), Heard::Nothing, "{nothing:?}");
    }
    assert_eq!(responder.hear(&advertised(GATEWAY6, GATEWAY)), Heard::Same);
    assert_eq!(responder.hear(&advertised(GATEWAY6, new)), Heard::Changed);
    assert_eq!(responder.hear(&advertised(GATEWAY6, new)), Heard::Same);
    let len = responder.advertise(&mut frame).unwrap();
    assert_eq!(nd_options(&frame[70..len])[0], [1, 1, 2, 0, 0, 0, 0, 0x42]);
    let own = packet(LINK, "ff02::1:ff67:6501", 58, &neighbour(OWN));
    let verdict = responder.answer(&own, &mut frame);
    assert_eq!(verdict, Verdict::AnswerAndLook(86));
    assert_eq!(frame[80..86], new);
}

#[test]
fn a_router_without_an_address_is_not_looked_for() {
    for router in [
        None,
        Some(Router::Present(LINK)),
        Some(Router::Absent {
            mac: GATEWAY,
            address: None,
        }),
    ] {
        let lease = Lease6 { router, ..lease() };
        let mut responder = Responder::new(None, Some(lease));
        let mut frame = [0; MAX_FRAME];
        assert_eq!(responder.look_for_router(&mut frame), None);
        let heard = responder.hear(&advertised(GATEWAY6, [2, 0, 0, 0, 0, 9]));
        assert_eq!(heard, Heard::Nothing);
        let own = packet(LINK, "ff02::1", 58, &neighbour(OWN));
        let verdict = responder.answer(&own, &mut frame);
        assert!(!matches!(verdict, Verdict::AnswerAndLook(_)), "{verdict:?}");
    }
}

#[test]
fn a_client_gets_the_address() {
    let client = option(CLIENT, &DUID);
    let server = option(SERVER, &SERVER_DUID);
    let given = [
        &b"iaid"[..],
        &14400_u32.to_be_bytes(),
        &28800_u32.to_be_bytes(),
        &option(ADDRESS, &[&ADDRESS6.octets()[..], &[255; 8]].concat()),
    ]
    .concat();
    let solicit = [client.clone(), association(&[])];
    let (kind, told) = ask(1, &solicit).unwrap();
    assert_eq!(kind, 2);
    let name = b"\x03svc\x07cluster\x05local\0";
    for (code, value) in [
        (CLIENT, &DUID[..]),
        (SERVER, &SERVER_DUID),
        (PREFERENCE, &[255]),
        (ASSOCIATION, &given),
        (DNS, &lease().dns[0].octets()),
        (SEARCH, name),
    ] {
        assert_eq!(find(&told, code), Some(value), "option {code}");
    }
    // At once, if it likes.
    let (kind, told) = ask(1, &[&solicit[..], &[option(RAPID, &[])]].concat()).unwrap();
    assert_eq!((kind, find(&told, RAPID)), (7, Some(&[][..])));
    assert_eq!(find(&told, PREFERENCE), None);
    // Whichever it asks for it gets the one.
    let other = "fd00:10::8".parse().unwrap();
    let request = [client, server, association(&[other])];
    let (kind, told) = ask(3, &request).unwrap();
    assert_eq!((kind, find(&told, ASSOCIATION)), (7, Some(&given[..])));
}

#[test]
fn who_renews_hears_of_other_addresses_and_the_router() {
    let other: Ipv6Addr = "fd00:10::8".parse().unwrap();
    let client = option(CLIENT, &DUID);
    let server = option(SERVER, &SERVER_DUID);
    let mine = association(&[other, ADDRESS6]);
    let renew = message(5, &[client.clone(), server, mine.clone()]);
    let (verdict, frame) = answer(&dhcp(&renew));
    assert_eq!(verdict, Verdict::AnswerAndAdvertise(frame.len()));
    let (_, told) = ask(6, &[client.clone(), mine]).unwrap();
    let given = find(&told, ASSOCIATION).unwrap();
    let addresses: Vec<_> = Options(&given[12..])
        .map(|(_, value)| (value[..16].to_vec(), value[16]))
        .collect();
    let expected = [
        (ADDRESS6.octets().to_vec(), 255),
        (other.octets().to_vec(), 0),
    ];
    assert_eq!(addresses, expected);
    // Of more than a few it is not told.
    let (_, told) = ask(6, &[client, association(&[other; 40])]).unwrap();
    assert_eq!(find(&told, ASSOCIATION).unwrap().len(), 12 + 9 * 28);
}

#[test]
fn addresses_are_confirmed_and_given_back() {
    let client = option(CLIENT, &DUID);
    let other = "fd00:11::8".parse().unwrap();
    for (address, status) in [(ADDRESS6, 0), (other, 4)] {
        let (kind, told) = ask(4, &[client.clone(), association(&[address])]).unwrap();
        assert_eq!((kind, find(&told, STATUS)), (7, Some(&[0, status][..])));
    }
    assert_eq!(ask(4, &[client.clone(), association(&[])]), None);
    let server = option(SERVER, &SERVER_DUID);
    for kind in [8, 9] {
        let (_, told) = ask(kind, &[client.clone(), server.clone()]).unwrap();
        assert_eq!(find(&told, STATUS), Some(&[0, 0][..]));
    }
    let (_, told) = ask(11, &[]).unwrap();
    assert_eq!(find(&told, REFRESH), Some(&14400_u32.to_be_bytes()[..]));
    assert!(find(&told, DNS).is_some() && find(&told, CLIENT).is_none());
}

#[test]
fn others_get_no_answer() {
    let client = option(CLIENT, &DUID);
    let server = option(SERVER, &SERVER_DUID);
    let stranger = option(SERVER, &DUID);
    for (kind, options) in [
        (1, vec![]),
        (1, vec![client.clone(), server.clone()]),
        (1, vec![option(CLIENT, &[0; 131])]),
        (3, vec![client.clone()]),
        (3, vec![client.clone(), stranger.clone()]),
        (5, vec![server]),
        (11, vec![stranger]),
        (11, vec![association(&[])]),
        (7, vec![client.clone()]),
        (1, vec![client, option(ASSOCIATION, b"iai")]),
    ] {
        assert_eq!(ask(kind, &options), None, "{kind}");
    }
}

#[test]
fn what_is_no_question_passes() {
    let solicit = dhcp(&message(1, &[option(CLIENT, &DUID), association(&[])]));
    let routers = packet(LINK, "ff02::2", 58, &[133, 0, 0, 0, 0, 0, 0, 0]);
    let own = packet(LINK, "ff02::1", 58, &neighbour(OWN));
    for good in [&solicit, &routers, &own] {
        assert!(matches!(
            answer(good).0,
            Verdict::Answer(_) | Verdict::AnswerAndLook(_)
        ));
        // Another's MAC, protocol and version.
        for (at, byte) in [(6, 9), (13, 0), (14, 0x40), (20, 6)] {
            let mut frame = good.clone();
            frame[at] = byte;
            assert_eq!(answer(&frame).0, Verdict::Pass, "{at}");
        }
        let mut frame = [0; MAX_FRAME];
        let other = Responder::new(None, None);
        assert_eq!(other.answer(good, &mut frame), Verdict::Pass);
        assert_eq!(other.advertise(&mut frame), None);
    }
    // To another port and server, through a router, for another's address.
    for (good, at) in [(&solicit, 57), (&solicit, 50), (&routers, 21), (&own, 70)] {
        let mut frame = good.clone();
        frame[at] = 9;
        assert_eq!(answer(&frame).0, Verdict::Pass, "{at}");
    }
}

proptest! {
    /// Whatever the guest sends, the answer is a sound frame.
    #[test]
    fn nothing_breaks_it(
        kind in 0_u8..14,
        known in prop::collection::vec(0_usize..6, 0..6),
        bytes in prop::collection::vec(any::<u8>(), 0..1400),
        cut in 0_usize..1600,
        flips in prop::collection::vec((0_usize..300, any::<u8>()), 0..4),
    ) {
        let all = [
            option(CLIENT, &DUID),
            option(SERVER, &SERVER_DUID),
            association(&[ADDRESS6, LINK]),
            option(RAPID, &[]),
            option(CLIENT, &[7; 130]),
            association(&[LINK; 30]),
        ];
        let mut options: Vec<_> = known.iter().map(|at| all[*at].clone()).collect();
        options.push(bytes);
        let mut frame = dhcp(&message(kind, &options));
        for (at, byte) in flips {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        let frame = &frame[..cut.min(frame.len())];
        if answer(frame).0 != Verdict::Pass {
            prop_assert!(Responder::wants(frame));
        }
        let head = frame.get(..HEAD).unwrap_or(frame);
        prop_assert_eq!(Responder::wants(head), Responder::wants(frame));
    }
}
