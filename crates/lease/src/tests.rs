#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::options::find;

const MAC: Mac = [2, 0, 0, 0, 0, 7];
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 7);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
const BROADCAST: [u8; 2] = [0x80, 0];

fn lease() -> Lease {
    Lease {
        mac: MAC,
        address: ADDRESS,
        prefix: 24,
        gateway: Some(GATEWAY),
        routes: Vec::new(),
        dns: vec![Ipv4Addr::new(10, 43, 0, 10)],
        search: vec!["shop.svc.cluster.local".into(), "cluster.local".into()],
        hostname: Some("till".into()),
        mtu: Some(1450),
    }
}

/// A message of the client with these options behind the one of its type.
fn message(kind: u8, flags: [u8; 2], address: Ipv4Addr, options: &[u8]) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef, 0, 0, flags[0], flags[1]];
    message.extend(address.octets());
    message.extend([0; 12]);
    message.extend(MAC);
    message.resize(236, 0);
    message.extend([99, 130, 83, 99, 53, 1, kind]);
    message.extend(options);
    message.push(255);
    message
}

/// A frame with it.
fn question(message: &[u8], to: Ipv4Addr) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC].concat();
    frame.extend([8, 0]);
    let total = u16::try_from(28 + message.len()).unwrap().to_be_bytes();
    frame.extend([
        0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0,
    ]);
    frame.extend(to.octets());
    let udp = u16::try_from(8 + message.len()).unwrap().to_be_bytes();
    frame.extend([0, 68, 0, 67, udp[0], udp[1], 0, 0]);
    frame.extend(message);
    frame
}

/// The answer to `message`, if there is one.
fn ask(lease: &Lease, message: &[u8]) -> Option<Vec<u8>> {
    let mut answer = [0; MAX_FRAME];
    let frame = question(message, Ipv4Addr::BROADCAST);
    match Responder::new(Some(lease.clone()), None).answer(&frame, &mut answer) {
        Verdict::Answer(len) => Some(answer[..len].to_vec()),
        Verdict::Swallow => None,
        verdict => panic!("{verdict:?}"),
    }
}

fn option(frame: &[u8], code: u8) -> Option<Vec<u8>> {
    find(&frame[42 + 240..], code).map(<[u8]>::to_vec)
}

/// Whom a frame goes to.
fn receiver(frame: &[u8]) -> (Mac, Ipv4Addr) {
    let address: [u8; 4] = frame[30..34].try_into().unwrap();
    (frame[..6].try_into().unwrap(), address.into())
}

#[test]
fn a_client_gets_the_address_and_all_about_it() {
    let offer = ask(&lease(), &message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &[])).unwrap();
    assert_eq!(receiver(&offer), (MAC, ADDRESS));
    assert_eq!(offer[42..50], [2, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef]);
    assert_eq!(offer[42 + 16..42 + 20], ADDRESS.octets());
    assert_eq!(offer[42 + 28..42 + 34], MAC);
    assert!(offer.len() >= 42 + 300);
    let server = option(&offer, 54).unwrap();
    let expected: [(u8, &[u8]); 10] = [
        (53, &[2]),
        (51, &[0xff; 4]),
        (1, &[255, 255, 255, 0]),
        (3, &GATEWAY.octets()),
        (6, &[10, 43, 0, 10]),
        (26, &[5, 170]),
        (12, b"till"),
        (15, b"shop.svc.cluster.local"),
        (
            119,
            b"\x04shop\x03svc\x07cluster\x05local\0\x07cluster\x05local\0",
        ),
        (54, &server),
    ];
    for (code, value) in expected {
        assert_eq!(
            option(&offer, code).as_deref(),
            Some(value),
            "option {code}"
        );
    }
    assert_eq!(option(&offer, 121), None);

    let options = [&[54, 4][..], &server, &[50, 4], &ADDRESS.octets()].concat();
    let ack = ask(
        &lease(),
        &message(3, BROADCAST, Ipv4Addr::UNSPECIFIED, &options),
    )
    .unwrap();
    assert_eq!(receiver(&ack), ([0xff; 6], Ipv4Addr::BROADCAST));
    assert_eq!(option(&ack, 53), Some(vec![5]));
}

#[test]
fn checksums_are_right() {
    let offer = ask(&lease(), &message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &[])).unwrap();
    assert_eq!(frame::sum(0, &offer[14..34]), 0xffff);
    let udp_len = u16::try_from(offer.len() - 34).unwrap();
    let pseudo = frame::sum(udp_len + 17, &offer[26..34]);
    assert_eq!(frame::sum(pseudo, &offer[34..]), 0xffff);
}

#[test]
fn another_address_is_refused_and_a_renewed_one_confirmed() {
    let other = [50, 4, 192, 168, 1, 5];
    let nak = ask(&lease(), &message(3, [0; 2], Ipv4Addr::UNSPECIFIED, &other)).unwrap();
    assert_eq!(option(&nak, 53), Some(vec![6]));
    assert_eq!(receiver(&nak), ([0xff; 6], Ipv4Addr::BROADCAST));
    assert_eq!(nak[42 + 16..42 + 20], [0; 4]);

    let ack = ask(&lease(), &message(3, [0; 2], ADDRESS, &[])).unwrap();
    assert_eq!(option(&ack, 53), Some(vec![5]));
    assert_eq!(receiver(&ack), (MAC, ADDRESS));
}

#[test]
fn who_has_an_address_is_only_told_the_rest() {
    let ack = ask(
        &lease(),
        &message(8, [0; 2], Ipv4Addr::new(10, 42, 0, 9), &[]),
    )
    .unwrap();
    assert_eq!(option(&ack, 51), None);
    assert_eq!(option(&ack, 6), Some(vec![10, 43, 0, 10]));
    assert_eq!(ack[42 + 16..42 + 20], [0; 4]);
}

#[test]
fn others_get_no_answer() {
    let discover = message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &[]);
    assert!(ask(&lease(), &discover).is_some());
    let (mut stranger, mut relayed, mut reply) = (discover.clone(), discover.clone(), discover);
    stranger[33] = 8;
    relayed[24..28].copy_from_slice(&[10, 0, 0, 1]);
    reply[0] = 2;
    let other_server = message(3, [0; 2], Ipv4Addr::UNSPECIFIED, &[54, 4, 10, 0, 0, 1]);
    let release = message(7, [0; 2], ADDRESS, &[]);
    for message in [stranger, relayed, reply, other_server, release] {
        assert_eq!(ask(&lease(), &message), None);
    }
}

#[test]
fn what_is_no_question_passes() {
    let responder = Responder::new(Some(lease()), None);
    let good = question(&message(1, [0; 2], ADDRESS, &[]), Ipv4Addr::BROADCAST);
    let mut answer = [0; MAX_FRAME];
    assert!(matches!(
        responder.answer(&good, &mut answer),
        Verdict::Answer(_)
    ));
    // ARP, TCP, a fragment, another port, IPv6 in IPv4's clothes.
    for (at, byte) in [(13, 6), (23, 6), (20, 0x20), (37, 68), (14, 0x65)] {
        let mut frame = good.clone();
        frame[at] = byte;
        assert_eq!(responder.answer(&frame, &mut answer), Verdict::Pass, "{at}");
    }
    let elsewhere = question(
        &message(1, [0; 2], ADDRESS, &[]),
        Ipv4Addr::new(10, 9, 9, 9),
    );
    assert_eq!(responder.answer(&elsewhere, &mut answer), Verdict::Pass);
}

#[test]
fn a_gateway_outside_of_the_network_is_reached_first() {
    let link = Ipv4Addr::new(169, 254, 1, 1);
    let lease = Lease {
        prefix: 32,
        gateway: Some(link),
        ..lease()
    };
    let offer = ask(&lease, &message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &[])).unwrap();
    let routes = [&[32, 169, 254, 1, 1, 0, 0, 0, 0][..], &[0, 169, 254, 1, 1]].concat();
    assert_eq!(option(&offer, 121), Some(routes));
    assert_eq!(option(&offer, 1), Some(vec![255; 4]));
}

#[test]
fn routes_come_with_the_default_one_last() {
    let lease = Lease {
        routes: vec![
            Route {
                network: Ipv4Addr::new(10, 42, 0, 0),
                prefix: 16,
                gateway: Some(GATEWAY),
            },
            Route {
                network: Ipv4Addr::new(172, 16, 128, 0),
                prefix: 20,
                gateway: None,
            },
        ],
        ..lease()
    };
    let offer = ask(&lease, &message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &[])).unwrap();
    let routes = [
        &[16, 10, 42, 10, 42, 0, 1][..],
        &[20, 172, 16, 128, 0, 0, 0, 0],
        &[0, 10, 42, 0, 1],
    ];
    assert_eq!(option(&offer, 121), Some(routes.concat()));
}

#[test]
fn what_does_not_fit_is_left_out_from_the_end() {
    let lease = Lease {
        search: (0..20)
            .map(|n| format!("a-rather-long-name-{n}.example.org"))
            .collect(),
        dns: vec![GATEWAY; 60],
        ..lease()
    };
    let plain = ask(&lease, &message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &[])).unwrap();
    assert!(plain.len() <= 14 + 576, "{}", plain.len());
    assert_eq!(option(&plain, 3), Some(GATEWAY.octets().to_vec()));
    let room = [57, 2, 5, 220];
    let more = ask(&lease, &message(1, [0; 2], Ipv4Addr::UNSPECIFIED, &room)).unwrap();
    assert!(more.len() > plain.len());
    assert!(option(&more, 119).is_some());
}

proptest! {
    /// Whatever the guest sends, the answer is a frame of its length, and goes to the guest or all.
    #[test]
    fn nothing_breaks_it(
        kind in 0_u8..10,
        flags: [u8; 2],
        options in prop::collection::vec(any::<u8>(), 0..400),
        cut in 0_usize..700,
        flips in prop::collection::vec((0_usize..700, any::<u8>()), 0..4),
    ) {
        let message = message(kind, flags, Ipv4Addr::UNSPECIFIED, &options);
        let mut frame = question(&message, Ipv4Addr::BROADCAST);
        for (at, byte) in flips {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        let frame = &frame[..cut.min(frame.len())];
        let mut answer = [0; MAX_FRAME];
        if let Verdict::Answer(len) = Responder::new(Some(lease()), None).answer(frame, &mut answer) {
            let (mac, _) = receiver(&answer[..len]);
            prop_assert!(mac == MAC || mac == [0xff; 6]);
            prop_assert!(Responder::wants(frame));
        }
        let head = frame.get(..HEAD).unwrap_or(frame);
        prop_assert_eq!(Responder::wants(head), Responder::wants(frame));
    }
}
