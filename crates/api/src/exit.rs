//! How a guest ended, as kept in a machine's folder and told by the API.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::v1;

/// Why a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered off, by itself or because the power button was pressed.
    PowerOff,
    /// Ended by force by a call or a signal.
    Killed,
    /// Ended by force because it didn't power off within the deadline of a stop.
    StopTimeout,
    /// The guest can't go on: a triple fault, or an error of KVM while running it.
    GuestCrash,
    /// The VMM or a resource of the host failed.
    VmmError,
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Why.
    pub reason: ExitReason,
    /// Details for people: the error, or the registers of a crashed vCPU. May have several lines.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// When, in seconds since 1970.
    pub time: u64,
}

impl ExitRecord {
    /// A record of something that ends now.
    #[must_use]
    pub fn now(reason: ExitReason, message: impl Into<String>) -> Self {
        let time = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            reason,
            message: message.into(),
            time: time.as_secs(),
        }
    }
}

impl From<ExitReason> for v1::ExitReason {
    fn from(reason: ExitReason) -> Self {
        match reason {
            ExitReason::PowerOff => Self::PowerOff,
            ExitReason::Killed => Self::Killed,
            ExitReason::StopTimeout => Self::StopTimeout,
            ExitReason::GuestCrash => Self::GuestCrash,
            ExitReason::VmmError => Self::VmmError,
        }
    }
}

/// A reason that this version doesn't know counts as an error of the VMM.
impl From<v1::ExitReason> for ExitReason {
    fn from(reason: v1::ExitReason) -> Self {
        match reason {
            v1::ExitReason::PowerOff => Self::PowerOff,
            v1::ExitReason::Killed => Self::Killed,
            v1::ExitReason::StopTimeout => Self::StopTimeout,
            v1::ExitReason::GuestCrash => Self::GuestCrash,
            v1::ExitReason::VmmError | v1::ExitReason::Unspecified => Self::VmmError,
        }
    }
}

impl From<ExitRecord> for v1::Exit {
    fn from(record: ExitRecord) -> Self {
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(record.time));
        Self {
            reason: v1::ExitReason::from(record.reason).into(),
            message: record.message,
            time: time.map(prost_types::Timestamp::from),
        }
    }
}

impl From<v1::Exit> for ExitRecord {
    fn from(exit: v1::Exit) -> Self {
        let seconds = exit.time.as_ref().map_or(0, |time| time.seconds);
        Self {
            reason: exit.reason().into(),
            message: exit.message,
            time: u64::try_from(seconds).unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn records_survive_json_and_protobuf() {
        for reason in [
            ExitReason::PowerOff,
            ExitReason::Killed,
            ExitReason::StopTimeout,
            ExitReason::GuestCrash,
            ExitReason::VmmError,
        ] {
            let record = ExitRecord::now(reason, "two\nlines");
            assert_eq!(ExitRecord::from(v1::Exit::from(record.clone())), record);
            let json = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<ExitRecord>(&json).unwrap(), record);
        }
    }

    #[test]
    fn unknown_reasons_and_broken_times_are_taken() {
        let time = Some(prost_types::Timestamp {
            seconds: -5,
            nanos: 0,
        });
        let exit = v1::Exit {
            reason: 99,
            message: String::new(),
            time,
        };
        let record = ExitRecord::from(exit);
        assert_eq!((record.reason, record.time), (ExitReason::VmmError, 0));
        let far = ExitRecord {
            time: u64::MAX,
            ..record
        };
        assert_eq!(v1::Exit::from(far).time, None);
    }
}
