//! What every kind of disk does with the requests of its driver: rate limits, what to do about
//! errors of the host, retries, and the way to a disk from outside.

pub(crate) mod handle;
pub(crate) mod jobs;
pub(crate) mod limiter;
pub(crate) mod policy;

pub use edgevmm_block::engine::Aio;
pub use handle::BlockHandle;
pub use limiter::{Rate, RateLimits, Rates};
pub use policy::ErrorPolicy;

/// Enough stack for the thread of a disk with a nested image format; only touched pages cost
/// memory.
pub(crate) const STACK_SIZE: usize = 512 * 1024;
