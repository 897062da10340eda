//! What a disk does about requests that the host fails.

use std::error::Error;
use std::io;

use edgevmm_block::BlockError;

/// What to do when the host fails a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// Keep the request and stop the machine until somebody has it go on.
    #[default]
    Stop,
    /// Tell the guest.
    Report,
    /// Tell the guest that all is well.
    Ignore,
    /// Stop for want of space, tell the guest of other errors.
    EnoSpace,
}

/// What to do about one failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Stop,
    Report,
    Ignore,
}

impl ErrorPolicy {
    pub(crate) fn judge(self, error: &BlockError) -> Verdict {
        // These are the guest's doing, and would be so again.
        if matches!(
            error,
            BlockError::ReadOnly | BlockError::OutOfRange { .. } | BlockError::Unsupported { .. }
        ) {
            return Verdict::Report;
        }
        match self {
            Self::Stop => Verdict::Stop,
            Self::EnoSpace if is_full(error) => Verdict::Stop,
            Self::Report | Self::EnoSpace => Verdict::Report,
            Self::Ignore => Verdict::Ignore,
        }
    }
}

/// Whether the host has run out of space, or the user of their share of it.
fn is_full(error: &BlockError) -> bool {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| {
            matches!(
                cause.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_has_its_verdict() {
        let failed = |errno| BlockError::Io {
            op: "write",
            offset: 0,
            len: 512,
            source: io::Error::from_raw_os_error(errno),
        };
        let (io, full, quota) = (
            failed(libc::EIO),
            failed(libc::ENOSPC),
            BlockError::Flush(io::Error::from_raw_os_error(libc::EDQUOT)),
        );
        for (policy, on_io, on_full) in [
            (ErrorPolicy::Stop, Verdict::Stop, Verdict::Stop),
            (ErrorPolicy::Report, Verdict::Report, Verdict::Report),
            (ErrorPolicy::Ignore, Verdict::Ignore, Verdict::Ignore),
            (ErrorPolicy::EnoSpace, Verdict::Report, Verdict::Stop),
        ] {
            assert_eq!(policy.judge(&io), on_io);
            assert_eq!(policy.judge(&full), on_full);
            assert_eq!(policy.judge(&quota), on_full);
            assert_eq!(policy.judge(&BlockError::ReadOnly), Verdict::Report);
        }
    }
}
