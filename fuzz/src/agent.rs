//! Target of `edgevmm-agent`: what a guest may say in place of its agent.

use edgevmm_agent::{
    AnswerError, AuthorizedKeys, Empty, ExecResult, ExecStarted, FileSystem, Framer, FreezeStatus,
    HostName, Info, Interface, OsInfo, TimeZone, User, answer,
};

/// Longest line, as large as an input.
const LIMIT: usize = 4 << 10;

/// Reads lines in pieces of a size by the first byte, and each line as each kind of answer.
pub fn agent(input: &[u8]) {
    let Some((&size, stream)) = input.split_first() else {
        return;
    };
    let mut framer = Framer::default();
    for mut piece in stream.chunks(usize::from(size).max(1)) {
        loop {
            match framer.line(&mut piece, LIMIT) {
                Ok(Some(line)) => read(&line),
                Ok(None) => break,
                Err(error) => assert_eq!(error.limit, LIMIT),
            }
        }
    }
}

fn read(line: &[u8]) {
    assert!(line.len() <= LIMIT && !line.contains(&b'\n'));
    let results = [
        answer::<Empty>(line).err(),
        answer::<i64>(line).err(),
        answer::<Info>(line).err(),
        answer::<OsInfo>(line).err(),
        answer::<HostName>(line).err(),
        answer::<TimeZone>(line).err(),
        answer::<Vec<Interface>>(line).err(),
        answer::<Vec<User>>(line).err(),
        answer::<Vec<FileSystem>>(line).err(),
        answer::<FreezeStatus>(line).err(),
        answer::<ExecStarted>(line).err(),
        answer::<ExecResult>(line).err(),
        answer::<AuthorizedKeys>(line).err(),
    ];
    for error in results.into_iter().flatten() {
        if let AnswerError::Refused { description, .. } = error {
            assert!(!description.chars().any(char::is_control));
        }
    }
}
