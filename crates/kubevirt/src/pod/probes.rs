//! Probes of an instance as probes of its pod's container.

use k8s_openapi::api::core::v1::{ExecAction, Probe as PodProbe};

use crate::api::instance::Probe;

/// What asks the guest agent whether it is there.
const AGENT_PING: [&str; 3] = ["edgevmm-ctl", "agent", "ping"];

pub(super) fn probe(probe: &Probe) -> PodProbe {
    let ping = || ExecAction {
        command: Some(AGENT_PING.map(str::to_owned).to_vec()),
    };
    PodProbe {
        http_get: probe.http_get.clone(),
        tcp_socket: probe.tcp_socket.clone(),
        exec: probe
            .exec
            .clone()
            .or_else(|| probe.guest_agent_ping.map(|_| ping())),
        initial_delay_seconds: probe.initial_delay_seconds,
        timeout_seconds: probe.timeout_seconds,
        period_seconds: probe.period_seconds,
        success_threshold: probe.success_threshold,
        failure_threshold: probe.failure_threshold,
        ..PodProbe::default()
    }
}
