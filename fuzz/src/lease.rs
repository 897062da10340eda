//! Target of `edgevmm-lease`: frames of a guest that looks for addresses and routers.

use edgevmm_lease::{
    HEAD, Heard, Lease, Lease6, MAX_FRAME, ROUTER_HEAD, Responder, Router, Verdict,
};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// Answers frames, each behind two bytes of its length. Whatever is asked, an answer goes to the guest
/// or to all, and its lengths are right.
pub fn lease(input: &[u8]) {
    let mut responder = responder();
    let mut rest = input;
    while let Some((&[high, low], frames)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes([high, low])).min(frames.len());
        let (frame, others) = frames.split_at(len);
        rest = others;
        ask(&responder, frame);
        // What the network says instead must be as harmless.
        let heard = responder.hear(frame);
        let head = frame.get(..ROUTER_HEAD).unwrap_or(frame);
        assert!(heard == Heard::Nothing || responder.hear(head) == Heard::Same);
    }
}

fn ask(responder: &Responder, frame: &[u8]) {
    let mut answer = [0; MAX_FRAME];
    let head = frame.get(..HEAD).unwrap_or(frame);
    let wanted = Responder::wants(frame);
    assert_eq!(Responder::wants(head), wanted);
    let len = match responder.answer(frame, &mut answer) {
        Verdict::Pass => return,
        Verdict::Swallow => return assert!(wanted),
        Verdict::Answer(len) => len,
        Verdict::AnswerAndAdvertise(len) => {
            let mut more = [0; MAX_FRAME];
            let told = responder.advertise(&mut more);
            check(told.and_then(|len| more.get(..len)).unwrap_or_default());
            len
        }
        Verdict::AnswerAndLook(len) => {
            let mut question = [0; ROUTER_HEAD];
            let asked = responder.look_for_router(&mut question);
            check(
                asked
                    .and_then(|len| question.get(..len))
                    .unwrap_or_default(),
            );
            len
        }
    };
    assert!(wanted);
    check(answer.get(..len).unwrap_or_default());
}

fn check(frame: &[u8]) {
    let to = frame.get(..6).unwrap_or_default();
    assert!(to == MAC || to.first().is_some_and(|byte| byte & 1 == 1));
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let len = match word(12) {
        Some(0x0800) => word(16).map(|len| 14 + usize::from(len)),
        Some(0x86dd) => word(18).map(|len| 54 + usize::from(len)),
        _ => None,
    };
    assert_eq!(len, Some(frame.len()));
}

fn responder() -> Responder {
    let address = [0xfd, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    let lease = Lease {
        mac: MAC,
        address: [10, 42, 0, 7].into(),
        prefix: 24,
        gateway: Some([10, 42, 0, 1].into()),
        routes: Vec::new(),
        dns: vec![[10, 43, 0, 10].into()],
        search: vec!["cluster.local".to_owned()],
        hostname: Some("till".to_owned()),
        mtu: Some(1450),
    };
    let lease6 = Lease6 {
        mac: MAC,
        address: address.into(),
        prefix: 64,
        router: Some(Router::Absent {
            mac: [2, 0, 0, 0, 0, 1],
            address: Some([0xfd, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].into()),
        }),
        dns: vec![address.into()],
        search: lease.search.clone(),
        mtu: Some(1450),
    };
    Responder::new(Some(lease), Some(lease6))
}
