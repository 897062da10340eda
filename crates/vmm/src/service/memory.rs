//! What the API does with a guest's memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use edgevmm_api::v1;
use edgevmm_devices::virtio::balloon::{BalloonHandle, GuestMemoryStats};
use tonic::Status;

use super::Ways;

/// How long a guest may take to tell its statistics.
const ANSWER: Duration = Duration::from_secs(1);
/// Bytes of what the kernel tells of a process that are looked at; its memory comes early.
const STATUS_MAX: usize = 4096;
/// How often is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// Tells how the guest's memory is used.
pub(super) async fn get(ways: &Ways) -> v1::GetMemoryResponse {
    let mut response = v1::GetMemoryResponse {
        size: ways.memory,
        target: ways.memory,
        resident: resident(ways.status.as_ref()),
        ..v1::GetMemoryResponse::default()
    };
    if let Some(balloon) = &ways.balloon {
        response.guest = guest(balloon).await;
        let usage = balloon.usage();
        response.target = ways.memory.saturating_sub(usage.wanted);
        response.balloon = Some(v1::Balloon {
            driver: usage.driver,
            held: usage.actual,
            inflated: usage.inflated,
            reported: usage.reported,
        });
    }
    response
}

/// Has the guest do with `target` bytes.
pub(super) fn set_target(ways: &Ways, target: u64) -> Result<(), Status> {
    let Some(balloon) = &ways.balloon else {
        return Err(Status::failed_precondition(
            "it has no balloon, as it was started without one or with huge pages",
        ));
    };
    let Some(left) = ways.memory.checked_sub(target) else {
        return Err(Status::invalid_argument(format!(
            "it has no more than {} bytes",
            ways.memory
        )));
    };
    balloon.ask(left);
    Ok(())
}

/// The guest's statistics: new ones if it answers soon, else the newest that it has told.
async fn guest(balloon: &BalloonHandle) -> Option<v1::GuestMemory> {
    if balloon.usage().driver {
        let before = balloon.renew_stats();
        let end = Instant::now() + ANSWER;
        while balloon.stats().0 == before && Instant::now() < end {
            tokio::time::sleep(LOOK).await;
        }
    }
    match balloon.stats() {
        (0, _) => None,
        (_, stats) => Some(told(stats)),
    }
}

fn told(stats: GuestMemoryStats) -> v1::GuestMemory {
    v1::GuestMemory {
        total: stats.total,
        free: stats.free,
        available: stats.available,
        caches: stats.caches,
        swap_in: stats.swap_in,
        swap_out: stats.swap_out,
        major_faults: stats.major_faults,
        minor_faults: stats.minor_faults,
    }
}

/// Opens what the kernel tells of this process; `None` when it does not.
pub fn open_status() -> Option<File> {
    File::open("/proc/self/status").ok()
}

/// Bytes of the host's memory that this process takes up; 0 when the host does not tell.
fn resident(status: Option<&File>) -> u64 {
    let mut text = [0; STATUS_MAX];
    let read = status.map(|status| status.read_at(&mut text, 0));
    let len = read.and_then(Result::ok).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(..len).unwrap_or_default());
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_up_memory() {
        assert!((1 << 20..1 << 40).contains(&resident(open_status().as_ref())));
    }
}
