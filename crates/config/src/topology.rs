//! How vCPUs form cores and sockets.

use crate::CpuConfig;

/// Largest ID of a local APIC; 255 addresses all of them.
const MAX_APIC_ID: u32 = 254;

/// A complete topology. Its product is the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u8,
    /// Cores per socket.
    pub cores: u8,
    /// Threads per core.
    pub threads: u8,
}

/// Why there is no topology for a number of vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// A number is zero.
    #[error("A machine needs at least one {0}: write 1 or more")]
    Zero(&'static str),
    /// The given parts don't divide the count.
    #[error(
        "{count} vCPUs can't form {parts}: their product must be {count}, so change one of them or \
         leave it out"
    )]
    Product {
        /// vCPUs.
        count: u8,
        /// The parts that were given.
        parts: String,
    },
    /// IDs of local APICs, in which each level has whole bits, run out.
    #[error(
        "The local APIC of the last vCPU would need the ID {0}, more than {MAX_APIC_ID}: use fewer \
         vCPUs, or numbers of cores and threads that are powers of two"
    )]
    ApicId(u32),
}

impl CpuConfig {
    /// Fills in the parts of the topology that aren't given: one thread per core, and one socket
    /// with all cores.
    ///
    /// # Errors
    ///
    /// When the given parts don't fit the count.
    pub fn topology(&self) -> Result<Topology, TopologyError> {
        let given = [
            ("vCPU", Some(self.count)),
            ("socket", self.sockets),
            ("core", self.cores),
            ("thread", self.threads),
        ];
        if let Some((what, _)) = given.iter().find(|part| part.1 == Some(0)) {
            return Err(TopologyError::Zero(what));
        }
        let threads = self.threads.unwrap_or(1);
        let rest = self.count / threads;
        let (sockets, cores) = match (self.sockets, self.cores) {
            (Some(sockets), Some(cores)) => (sockets, cores),
            (Some(sockets), None) => (sockets, rest / sockets),
            (None, Some(cores)) => (rest / cores, cores),
            (None, None) => (1, rest),
        };
        if u32::from(sockets) * u32::from(cores) * u32::from(threads) != u32::from(self.count) {
            return Err(self.product_error());
        }
        let topology = Topology {
            sockets,
            cores,
            threads,
        };
        match topology.apic_id(self.count - 1) {
            0..=MAX_APIC_ID => Ok(topology),
            id => Err(TopologyError::ApicId(id)),
        }
    }

    fn product_error(&self) -> TopologyError {
        let parts = [
            ("sockets", self.sockets),
            ("cores", self.cores),
            ("threads", self.threads),
        ];
        let parts = parts
            .into_iter()
            .filter_map(|(what, part)| Some(format!("{} {what}", part?)));
        let parts = parts.collect::<Vec<_>>().join(" x ");
        TopologyError::Product {
            count: self.count,
            parts,
        }
    }
}

impl Topology {
    /// ID of the local APIC of the vCPU `index`: socket, core and thread, each in as many bits as
    /// its level needs.
    #[must_use]
    pub fn apic_id(&self, index: u8) -> u32 {
        let thread = u32::from(index % self.threads);
        let core = u32::from(index / self.threads % self.cores);
        let socket = u32::from(index / self.threads / self.cores);
        (socket << self.socket_shift()) | (core << self.core_shift()) | thread
    }

    /// Bits of an APIC ID below those of the core.
    #[must_use]
    pub const fn core_shift(&self) -> u32 {
        bits(self.threads)
    }

    /// Bits of an APIC ID below those of the socket.
    #[must_use]
    pub const fn socket_shift(&self) -> u32 {
        self.core_shift() + bits(self.cores)
    }
}

/// Bits that hold the numbers below `count`, which isn't 0.
const fn bits(count: u8) -> u32 {
    u8::BITS - (count - 1).leading_zeros()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn cpus(count: u8, sockets: u8, cores: u8, threads: u8) -> CpuConfig {
        let given = |part| (part != 99).then_some(part);
        CpuConfig {
            count,
            sockets: given(sockets),
            cores: given(cores),
            threads: given(threads),
        }
    }

    #[test]
    fn absent_parts_are_filled_in() {
        for (given, expected) in [
            (cpus(6, 99, 99, 99), (1, 6, 1)),
            (cpus(6, 99, 99, 2), (1, 3, 2)),
            (cpus(6, 2, 99, 99), (2, 3, 1)),
            (cpus(8, 99, 2, 2), (2, 2, 2)),
            (cpus(8, 2, 2, 2), (2, 2, 2)),
            (cpus(255, 99, 99, 99), (1, 255, 1)),
        ] {
            let (sockets, cores, threads) = expected;
            assert_eq!(
                given.topology(),
                Ok(Topology {
                    sockets,
                    cores,
                    threads
                }),
                "{given:?}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for given in [
            cpus(4, 3, 99, 99),
            cpus(4, 1, 2, 1),
            cpus(2, 99, 99, 4),
            cpus(2, 99, 4, 99),
        ] {
            assert!(
                matches!(given.topology(), Err(TopologyError::Product { .. })),
                "{given:?}"
            );
        }
        let error = cpus(4, 3, 99, 2).topology().unwrap_err().to_string();
        assert!(
            error.starts_with("4 vCPUs can't form 3 sockets x 2 threads:"),
            "{error}"
        );
        assert_eq!(
            cpus(0, 99, 99, 99).topology(),
            Err(TopologyError::Zero("vCPU"))
        );
        assert_eq!(
            cpus(2, 99, 0, 99).topology(),
            Err(TopologyError::Zero("core"))
        );
        assert!(matches!(
            cpus(255, 51, 5, 1).topology(),
            Err(TopologyError::ApicId(404))
        ));
    }

    proptest! {
        #[test]
        fn every_vcpu_has_its_own_apic(count in 1u8.., sockets: u8, cores: u8, threads in 0u8..9) {
            let given = |part| (part != 0).then_some(part);
            let config = CpuConfig {
                count, sockets: given(sockets), cores: given(cores), threads: given(threads),
            };
            if let Ok(topology) = config.topology() {
                let ids: Vec<_> = (0..count).map(|index| topology.apic_id(index)).collect();
                prop_assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(ids.last() <= Some(&MAX_APIC_ID));
            }
        }
    }
}
