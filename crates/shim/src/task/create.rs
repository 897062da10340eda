//! Makes a container: control group, root file system, machine, process.

use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::aside::aside;
use super::container::{Container, Machine};
use super::log::Log;
use super::spawn::spawn;
use crate::annotations::Annotations;
use crate::cgroup::{self, Cgroup};
use crate::cli::check_identifier;
use crate::holder::{self, Plan};
use crate::network::{RESOLV_CONF, Wish};
use crate::process::Process;
use crate::proto::task::CreateRequest;
use crate::record::{Record, machines};
use crate::runc::{self, Ordinary, Runc};
use crate::spec::Spec;
use crate::ttrpc::{CallError, Code};
use crate::vmm::{self, Vmm};
use crate::{machine, rootfs, volumes};

/// Makes a container of the pod, which may have a machine already. It waits to be started.
///
/// # Errors
///
/// When it can't be made; nothing is left of it then.
pub async fn create(
    request: CreateRequest,
    namespace: &str,
    has_machine: bool,
    log: &Log,
) -> Result<Container, CallError> {
    let bundle = PathBuf::from(&request.bundle);
    check_identifier(&request.id).map_err(|error| invalid(&error))?;
    if !request.checkpoint.is_empty() {
        let message = "Machines can't be restored from checkpoints";
        return Err(CallError::new(Code::Unimplemented, message));
    }
    let spec = Spec::read(&bundle).map_err(|error| failed(&error))?;
    let mut record = Record::default();
    let result = make(request, namespace, &spec, has_machine, &mut record, log).await;
    if result.is_err()
        && let Err(error) = record.clear_aside(&bundle).await
    {
        log.say(&crate::chain(error.as_ref()));
    }
    result
}

async fn make(
    request: CreateRequest,
    namespace: &str,
    spec: &Spec,
    has_machine: bool,
    record: &mut Record,
    log: &Log,
) -> Result<Container, CallError> {
    // A sandbox has those of the whole pod: wrong ones fail the pod before anything of it runs.
    let annotations = Annotations::parse(&spec.annotations).map_err(|error| invalid(&error))?;
    let bundle = PathBuf::from(&request.bundle);
    let group = cgroup::relative(&spec.linux.cgroups_path, namespace, &request.id)
        .map_err(|error| invalid(&error))?;
    let cgroup = Cgroup::create(&group, &spec.linux.resources, |warning| log.say(&warning));
    let cgroup = cgroup.map_err(|error| {
        let message = format!("Can't make the control group {}: {error}", group.display());
        CallError::new(Code::Unknown, message)
    })?;
    record.cgroups = cgroup.folders().to_vec();
    let mut plan = place(spec, &cgroup);
    let mut machine = None;
    if spec.is_sandbox() {
        plan.new_ipc = spec.makes_namespace("ipc");
        let own_name = spec.makes_namespace("uts") && !spec.hostname.is_empty();
        plan.hostname = own_name.then(|| spec.hostname.clone());
    } else {
        let root = spec.root(&bundle);
        record.root = (!request.rootfs.is_empty()).then(|| root.clone());
        record.write(&bundle).map_err(|error| failed(&error))?;
        rootfs::mount_all(&request.rootfs, &root).map_err(|error| failed(&error))?;
        if !runc::is_machine(spec, &annotations, &root) {
            plan = ordinary(&request, namespace, spec, &group)?;
            record.runc = plan.ordinary.as_ref().map(|ordinary| ordinary.runc.clone());
        } else if has_machine {
            let message = "The pod has a machine already: put each VM image into a pod of its own, \
                           or name the one machine by the annotation edgevmm.io/container";
            return Err(CallError::new(Code::FailedPrecondition, message));
        } else {
            let name = machine_name(namespace, &request.id);
            record.machine = Some(name.clone());
            record.network = plan.network.clone();
            let memory;
            let (for_vmm, spec) = (request.clone(), spec.clone());
            let (of_vm, root) = (name.clone(), root.clone());
            let work = move || describe(&for_vmm, &of_vm, &spec, annotations, &root);
            (plan.vmm, memory) = aside(work).await?;
            let vmm = Vmm::new(name);
            machine = Some(Machine { vmm, memory });
        }
        record.write(&bundle).map_err(|error| failed(&error))?;
    }
    let input = match &plan.ordinary {
        Some(ordinary) => runc::keep_open(&ordinary.stdin).map_err(|error| failed(&error))?,
        None => None,
    };
    let mut spawned = spawn(&plan, log.clone())
        .await
        .map_err(|error| match plan.ordinary {
            Some(_) => taken_for_ordinary(&error),
            None => error,
        })?;
    if let Some(first) = record.runc.as_ref().and_then(Runc::pid)
        && let Some(process) = Process::find(first)
    {
        spawned.process = process;
    }
    record.process = Some(spawned.process);
    record.write(&bundle).map_err(|error| failed(&error))?;
    Ok(Container::new(
        request,
        record.clone(),
        cgroup,
        machine,
        spawned,
        input,
    ))
}

/// Where the container's process has to go.
fn place(spec: &Spec, cgroup: &Cgroup) -> Plan {
    let network = spec.namespace("network");
    let path = network.and_then(|network| network.path.clone());
    let groups = cgroup.folders().iter();
    Plan {
        cgroups: groups.map(|folder| folder.join("cgroup.procs")).collect(),
        new_network: network.is_some() && path.is_none(),
        network: path,
        oom_score: spec.process.oom_score_adj,
        ..Plan::default()
    }
}

/// Tells why a container was not taken for a machine, as one may have been meant.
fn taken_for_ordinary(error: &CallError) -> CallError {
    let message = format!(
        "{} (its image has no disk in /disk, so it was taken for an ordinary container: the \
         annotation edgevmm.io/container names the pod's machine)",
        error.message
    );
    CallError::new(error.code, message)
}

/// What makes an ordinary container.
fn ordinary(
    request: &CreateRequest,
    namespace: &str,
    spec: &Spec,
    group: &Path,
) -> Result<Plan, CallError> {
    let refused = |message: &str| CallError::new(Code::FailedPrecondition, message);
    runc::check(spec, request.terminal).map_err(refused)?;
    let bundle = Path::new(&request.bundle);
    let runc = Runc::new(namespace, &request.id, bundle).ok_or_else(|| {
        refused("There is no runc on containerd's PATH for containers beside a machine: install it")
    })?;
    runc::use_group(bundle, group).map_err(|error| failed(&*error))?;
    Ok(Plan {
        ordinary: Some(Ordinary {
            runc,
            stdin: stream(&request.stdin)?,
            stdout: stream(&request.stdout)?,
            stderr: stream(&request.stderr)?,
        }),
        ..Plan::default()
    })
}

/// What starts the machine, whose configuration is put into the bundle, and its memory in bytes.
fn describe(
    request: &CreateRequest,
    name: &str,
    spec: &Spec,
    annotations: Annotations,
    root: &Path,
) -> Result<(Option<holder::Vmm>, u64), CallError> {
    let bundle = Path::new(&request.bundle);
    let wish = network(name, spec, &annotations);
    let mut volumes =
        volumes::attach(spec, &annotations, bundle).map_err(|error| invalid(&error))?;
    let vm = machine::describe(name, spec, annotations, root, &mut volumes)
        .map_err(|error| invalid(&error))?;
    let program = vmm::program()?;
    let config = bundle.join("machine.json");
    let text = serde_json::to_vec(&vm).map_err(|error| failed(&error))?;
    fs::write(&config, text).map_err(|error| failed(&error))?;
    let vmm = holder::Vmm {
        program,
        config,
        network: wish,
        machines: machines().path().to_owned(),
        given: volumes.given,
        stdin: stream(&request.stdin)?,
        stdout: stream(&request.stdout)?,
    };
    Ok((Some(vmm), vm.memory.size.0))
}

/// How the machine `name` is to be connected to the container's network.
fn network(name: &str, spec: &Spec, annotations: &Annotations) -> Wish {
    let who = || spec.pod().unwrap_or_else(|| name.to_owned());
    Wish {
        mode: annotations.network,
        pod: spec.sandbox_id().is_some(),
        lan: annotations.lan.clone().map(|lan| (lan, who())),
        spoof: annotations.spoof,
        resolv_conf: spec.mounted_at(RESOLV_CONF).map(Path::to_owned),
        hostname: spec.hostname().map(str::to_owned),
    }
}

/// A short name that no other container's machine has.
fn machine_name(namespace: &str, id: &str) -> String {
    let key = format!("{namespace}/{id}");
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, key.as_bytes())
        .simple()
        .to_string();
    let short: String = hash.chars().take(16).collect();
    format!("pod-{short}")
}

/// Path of a stream of the container: a FIFO, or a file as a URI.
///
/// # Errors
///
/// When it is something else.
pub fn stream(text: &str) -> Result<PathBuf, CallError> {
    let path = text
        .strip_prefix("fifo://")
        .or_else(|| text.strip_prefix("file://"));
    let path = path.unwrap_or(text);
    if path.contains("://") {
        let message = format!("Nothing can be connected to {text}: use a FIFO or file://");
        return Err(CallError::new(Code::InvalidArgument, message));
    }
    Ok(PathBuf::from(path))
}

fn invalid(error: &dyn std::error::Error) -> CallError {
    CallError::new(Code::InvalidArgument, crate::chain(error))
}

fn failed(error: &dyn std::error::Error) -> CallError {
    CallError::new(Code::Unknown, crate::chain(error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_of_machines_are_valid_and_their_own() {
        let name = machine_name("k8s.io", &"a".repeat(64));
        edgevmm_config::check_name(&name).unwrap();
        assert_ne!(name, machine_name("default", &"a".repeat(64)));
    }

    #[test]
    fn streams_are_paths_or_refused() {
        assert_eq!(stream("/run/f").unwrap(), Path::new("/run/f"));
        assert_eq!(stream("file:///tmp/log").unwrap(), Path::new("/tmp/log"));
        assert_eq!(stream("").unwrap(), Path::new(""));
        stream("binary:///bin/logger").unwrap_err();
    }
}
