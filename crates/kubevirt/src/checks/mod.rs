//! What can't be done is refused before anything is made, and by the name of its field: left out in
//! silence it would look done.

mod devices;
mod domain;
mod resources;
mod volumes;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::api::InstanceSpec;
use crate::api::machine::MachineSpec;

/// Most problems that are told of at once.
const MAX_PROBLEMS: usize = 20;

/// Why an object is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, like `spec.domain.cpu.model`.
    pub field: String,
    /// What is wrong with it, and what to do.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}: {}", self.field, self.message)
    }
}

/// All problems in one line.
#[must_use]
pub fn summary(problems: &[Problem]) -> String {
    let texts: Vec<_> = problems.iter().map(Problem::to_string).collect();
    texts.join("; ")
}

/// Collects problems below a path.
struct Report<'a> {
    path: String,
    problems: &'a mut Vec<Problem>,
}

impl Report<'_> {
    fn refuse(&mut self, field: &str, message: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem {
                field: join(&self.path, field),
                message: message.into(),
            });
        }
    }

    fn below(&mut self, field: &str) -> Report<'_> {
        Report {
            path: join(&self.path, field),
            problems: self.problems,
        }
    }

    /// Refuses a field whose value is none of `known`.
    fn expect_one_of(&mut self, field: &str, value: Option<&str>, known: &[&str]) {
        if let Some(value) = value.filter(|value| !known.contains(value)) {
            let value: String = value.chars().take(60).collect();
            let known: Vec<_> = known
                .iter()
                .filter(|name| !name.is_empty())
                .copied()
                .collect();
            let known = known.join(", ");
            self.refuse(
                field,
                format!("`{value}` is not supported: use one of {known}"),
            );
        }
    }
}

fn join(path: &str, field: &str) -> String {
    if field.is_empty() {
        path.to_owned()
    } else {
        format!("{path}.{field}")
    }
}

/// The `spec` of an instance, when nothing in it is to be refused.
///
/// # Errors
/// Everything that is.
pub fn instance(spec: &Value) -> Result<InstanceSpec, Vec<Problem>> {
    checked(spec, "spec", |spec: &InstanceSpec, report| {
        instance_spec(spec, report);
    })
}

/// The `spec` of a machine, likewise.
///
/// # Errors
/// Everything that is refused.
pub fn machine(spec: &Value) -> Result<MachineSpec, Vec<Problem>> {
    checked(spec, "spec", |spec: &MachineSpec, report| {
        if spec.running.is_some() && spec.run_strategy.is_some() {
            report.refuse("running", "leave it out, as runStrategy says it");
        }
        if !spec.data_volume_templates.is_empty() {
            report.refuse(
                "dataVolumeTemplates",
                "not supported yet: make the claim yourself",
            );
        }
        instance_spec(&spec.template.spec, &mut report.below("template.spec"));
    })
}

fn checked<T: DeserializeOwned>(
    spec: &Value,
    path: &str,
    check: impl FnOnce(&T, &mut Report<'_>),
) -> Result<T, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut report = Report {
        path: path.to_owned(),
        problems: &mut problems,
    };
    let mut unknown = |path: serde_ignored::Path<'_>| {
        let field = path_text(&path);
        let field = field.trim_start_matches('.');
        report.refuse(field, "not supported by edgevmm");
    };
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(spec, &mut track);
    let parsed = serde_ignored::deserialize::<_, _, T>(tracked, &mut unknown);
    match parsed {
        Ok(parsed) => {
            check(&parsed, &mut report);
            if problems.is_empty() {
                Ok(parsed)
            } else {
                Err(problems)
            }
        }
        Err(error) => {
            let field = track.path().to_string();
            report.refuse(field.trim_matches('.'), error.to_string());
            Err(problems)
        }
    }
}

/// A path as in a problem, with a dot before it.
fn path_text(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", path_text(parent)),
        Path::Map { parent, key } => format!("{}.{key}", path_text(parent)),
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => path_text(parent),
    }
}

fn instance_spec(spec: &InstanceSpec, report: &mut Report<'_>) {
    report.expect_one_of("architecture", spec.architecture.as_deref(), &["", "amd64"]);
    report.expect_one_of(
        "evictionStrategy",
        spec.eviction_strategy.as_deref(),
        &["", "None", "LiveMigrateIfPossible"],
    );
    if spec
        .termination_grace_period_seconds
        .is_some_and(|seconds| seconds < 0)
    {
        report.refuse("terminationGracePeriodSeconds", "write 0 or more");
    }
    for (field, name) in [("hostname", &spec.hostname), ("subdomain", &spec.subdomain)] {
        if name.as_deref().is_some_and(|name| !is_label(name)) {
            report.refuse(
                field,
                "write at most 63 of a-z, 0-9 and - as a name of the DNS",
            );
        }
    }
    domain::check(&spec.domain, &mut report.below("domain"));
    let kernel = spec
        .domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.kernel_boot.as_ref());
    if kernel.is_some()
        && spec
            .volumes
            .iter()
            .any(|volume| volume.container_disk.is_some())
    {
        report.refuse(
            "domain.firmware.kernelBoot",
            "not supported yet together with a containerDisk: use a claim",
        );
    }
    devices::check(spec, report);
    volumes::check(&spec.volumes, report);
    for (field, probe) in [
        ("readinessProbe", &spec.readiness_probe),
        ("livenessProbe", &spec.liveness_probe),
    ] {
        let Some(probe) = probe else { continue };
        let ways = [
            probe.http_get.is_some(),
            probe.tcp_socket.is_some(),
            probe.exec.is_some(),
            probe.guest_agent_ping.is_some(),
        ];
        if ways.into_iter().filter(|way| *way).count() != 1 {
            report.refuse(
                field,
                "write exactly one of httpGet, tcpSocket, exec, guestAgentPing",
            );
        }
    }
}

/// Whether it is a label of the DNS.
fn is_label(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Whether it can be an object's name: labels of the DNS with dots between them. What becomes part of
/// a path to the API server has to be no more than that.
fn is_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod table;
#[cfg(test)]
mod tests;
