//! Parts of VirtualMachines: start, stop, restart and expand. They write what the user wants into the
//! machine, and its controller does it.

use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use kube::api::{Patch, PatchParams};
use kube::core::DynamicObject;
use kube::discovery::ApiResource;
use kube::{Api, ResourceExt};
use serde::Deserialize;
use serde_json::{Value, json};

use edgevmm_kubevirt::api::machine::{StateAction, StateChange};
use edgevmm_kubevirt::api::{RunStrategy, VirtualMachine, VirtualMachineInstance};

use super::Server;
use super::answer::{Answer, Refusal, body, empty, json_answer};
use super::instances;
use super::path::Part;

/// How often a change is tried anew when the machine is changed meanwhile.
const TRIES: usize = 5;
/// Grace period, in seconds, when none is given.
const GRACE: i64 = 30;

/// What `start`, `stop` and `restart` take.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Options {
    paused: bool,
    grace_period: Option<i64>,
    grace_period_seconds: Option<i64>,
    dry_run: Option<Vec<String>>,
}

impl Options {
    /// How to patch.
    ///
    /// # Errors
    /// It is not known what is to be tried.
    pub fn params(&self) -> Result<PatchParams, Refusal> {
        let mut params = PatchParams::default();
        let values = self.dry_run.as_deref().unwrap_or_default();
        match values {
            [] => {}
            [all] if all == "All" => params.dry_run = true,
            _ => return Err(Refusal::bad("dryRun can be [\"All\"] only")),
        }
        Ok(params)
    }
}

/// What is to be written.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Strategy(RunStrategy),
    Requests(Vec<StateChange>),
}

/// A machine with its instance.
struct Pair {
    machine: VirtualMachine,
    instance: Option<VirtualMachineInstance>,
}

impl Pair {
    async fn get(server: &Server, part: &Part) -> Result<Self, Refusal> {
        let machines: Api<VirtualMachine> = Api::namespaced(server.client.clone(), &part.namespace);
        let machine = machines.get_opt(&part.name).await?;
        let machine = machine.ok_or_else(|| {
            Refusal::not_found(format!("VirtualMachine {:?} not found", part.name))
        })?;
        let instances: Api<VirtualMachineInstance> =
            Api::namespaced(server.client.clone(), &part.namespace);
        let instance = instances.get_opt(&part.name).await?;
        Ok(Self { machine, instance })
    }

    fn strategy(&self) -> RunStrategy {
        let spec = &self.machine.spec;
        let running = spec.running.map(|running| match running {
            true => RunStrategy::Always,
            false => RunStrategy::Halted,
        });
        spec.run_strategy.or(running).unwrap_or_default()
    }

    /// The instance, if it has not ended.
    fn live(&self) -> Option<&VirtualMachineInstance> {
        self.instance
            .as_ref()
            .filter(|instance| !instances::phase(instance).is_final())
    }

    fn pending(&self) -> &[StateChange] {
        let status = self.machine.status.as_ref();
        status.map_or(&[], |status| &status.state_change_requests)
    }

    fn start(&self) -> Result<Change, Refusal> {
        let stays = |live: &VirtualMachineInstance| live.metadata.deletion_timestamp.is_none();
        if self.live().is_some_and(stays) && self.pending().is_empty() {
            return Err(Refusal::conflict("VM is already running"));
        }
        let strategy = self.strategy();
        match strategy {
            RunStrategy::Halted => Ok(Change::Strategy(RunStrategy::Always)),
            RunStrategy::RerunOnFailure if self.instance.as_ref().is_some_and(has_failed) => Err(
                Refusal::conflict("RerunOnFailure does not support starting VM from failed state"),
            ),
            RunStrategy::Manual | RunStrategy::RerunOnFailure => self.request(start_request()),
            RunStrategy::Always | RunStrategy::Once => Err(Refusal::conflict(format!(
                "{strategy} does not support manual start requests"
            ))),
        }
    }

    fn stop(&self, grace: Option<i64>) -> Result<Option<Change>, Refusal> {
        let not_running = || Refusal::conflict("VM is not running");
        match self.strategy() {
            RunStrategy::Always | RunStrategy::Once => {
                Ok(Some(Change::Strategy(RunStrategy::Halted)))
            }
            RunStrategy::Manual | RunStrategy::RerunOnFailure => {
                let live = self.live().ok_or_else(not_running)?;
                if live.metadata.deletion_timestamp.is_some() && is_shorter(grace, live) {
                    return Ok(None);
                }
                self.request(stop_request(live)).map(Some)
            }
            RunStrategy::Halted => {
                let live = self.live().ok_or_else(not_running)?;
                if !is_shorter(grace, live) {
                    return Err(Refusal::conflict(
                        "Halted only supports manual stop requests with a shorter graceperiod",
                    ));
                }
                Ok(None)
            }
        }
    }

    fn restart(&self) -> Result<Change, Refusal> {
        let strategy = self.strategy();
        if matches!(strategy, RunStrategy::Halted | RunStrategy::Once) {
            return Err(Refusal::conflict(format!(
                "{strategy} does not support manual restart requests"
            )));
        }
        let live = self.live();
        let live = live.ok_or_else(|| Refusal::conflict("VM is not running"))?;
        let stop = stop_request(live);
        if !self.pending().is_empty() {
            return Err(underway());
        }
        Ok(Change::Requests(vec![stop, start_request()]))
    }

    /// One more request: a start may follow a stop, and that is all that waits.
    fn request(&self, new: StateChange) -> Result<Change, Refusal> {
        match self.pending() {
            [] => Ok(Change::Requests(vec![new])),
            [stop] if stop.action == StateAction::Stop && new.action == StateAction::Start => {
                Ok(Change::Requests(vec![stop.clone(), new]))
            }
            _ => Err(underway()),
        }
    }

    /// Writes a change into the machine as it was read.
    async fn write(
        &self,
        server: &Server,
        change: &Change,
        params: &PatchParams,
    ) -> Result<(), kube::Error> {
        let namespace = self.machine.namespace().unwrap_or_default();
        let machines: Api<VirtualMachine> = Api::namespaced(server.client.clone(), &namespace);
        let name = self.machine.name_any();
        let metadata = json!({ "resourceVersion": self.machine.metadata.resource_version });
        match change {
            Change::Strategy(strategy) => {
                let spec = if self.machine.spec.running.is_some() {
                    json!({ "running": *strategy == RunStrategy::Always })
                } else {
                    json!({ "runStrategy": strategy })
                };
                let patch = Patch::Merge(json!({ "metadata": metadata, "spec": spec }));
                machines.patch(&name, params, &patch).await?;
            }
            Change::Requests(requests) => {
                let status = json!({ "stateChangeRequests": requests });
                let patch = Patch::Merge(json!({ "metadata": metadata, "status": status }));
                machines.patch_status(&name, params, &patch).await?;
            }
        }
        Ok(())
    }
}

fn underway() -> Refusal {
    Refusal::conflict("unable to complete request: stop/start already underway")
}

/// Whether it is shorter than what the instance has.
fn is_shorter(grace: Option<i64>, instance: &VirtualMachineInstance) -> bool {
    let now = instance.spec.termination_grace_period_seconds;
    grace.is_some_and(|grace| grace < now.unwrap_or(GRACE))
}

fn has_failed(instance: &VirtualMachineInstance) -> bool {
    instances::phase(instance) == edgevmm_kubevirt::api::Phase::Failed
}

fn start_request() -> StateChange {
    StateChange {
        action: StateAction::Start,
        data: None,
        uid: None,
    }
}

fn stop_request(instance: &VirtualMachineInstance) -> StateChange {
    StateChange {
        action: StateAction::Stop,
        data: None,
        uid: instance.uid(),
    }
}

/// `start`.
///
/// # Errors
/// It runs, or its run strategy leaves no choice.
pub async fn start(
    server: &Server,
    part: &Part,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let options: Options = body(request.into_body()).await?;
    if options.paused {
        return Err(Refusal::bad(
            "Starting a machine paused is not supported yet",
        ));
    }
    change(server, part, &options, |pair| pair.start().map(Some)).await
}

/// `stop`.
///
/// # Errors
/// It does not run.
pub async fn stop(
    server: &Server,
    part: &Part,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let options: Options = body(request.into_body()).await?;
    let grace = options.grace_period;
    if grace.is_some_and(i64::is_negative) {
        return Err(Refusal::bad("gracePeriod has to be 0 or more"));
    }
    let pair = Pair::get(server, part).await?;
    pair.stop(grace)?;
    if let (Some(grace), Some(live)) = (grace, pair.live()) {
        hurry(server, live, grace, &options.params()?).await?;
    }
    change(server, part, &options, |pair| match pair.stop(grace) {
        // Its own grace period has just been written.
        Err(_) if grace.is_some() => Ok(None),
        stop => stop,
    })
    .await
}

/// `restart`.
///
/// # Errors
/// It does not run, or its run strategy leaves no choice.
pub async fn restart(
    server: &Server,
    part: &Part,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let options: Options = body(request.into_body()).await?;
    let grace = options.grace_period_seconds;
    if grace.is_some_and(|grace| grace != 0) {
        return Err(Refusal::bad(
            "gracePeriodSeconds can be 0 only, to restart by force",
        ));
    }
    if grace.is_some() {
        // Before another instance can have taken its place.
        let pair = Pair::get(server, part).await?;
        pair.restart()?;
        if let Some(live) = pair.live() {
            hurry(server, live, 1, &options.params()?).await?;
        }
    }
    change(server, part, &options, |pair| pair.restart().map(Some)).await
}

async fn change(
    server: &Server,
    part: &Part,
    options: &Options,
    decide: impl Fn(&Pair) -> Result<Option<Change>, Refusal>,
) -> Result<Answer, Refusal> {
    let params = options.params()?;
    for _ in 0..TRIES {
        let pair = Pair::get(server, part).await?;
        let Some(change) = decide(&pair)? else {
            return Ok(empty(StatusCode::ACCEPTED));
        };
        match pair.write(server, &change, &params).await {
            Ok(()) => return Ok(empty(StatusCode::ACCEPTED)),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Refusal::conflict(
        "The VM was changed by others all the time: try again",
    ))
}

/// Has an instance end sooner.
async fn hurry(
    server: &Server,
    live: &VirtualMachineInstance,
    grace: i64,
    params: &PatchParams,
) -> Result<(), Refusal> {
    let namespace = live.namespace().unwrap_or_default();
    let instances: Api<VirtualMachineInstance> = Api::namespaced(server.client.clone(), &namespace);
    let patch = json!({
        "metadata": { "uid": live.metadata.uid },
        "spec": { "terminationGracePeriodSeconds": grace },
    });
    instances
        .patch(&live.name_any(), params, &Patch::Merge(patch))
        .await?;
    Ok(())
}

/// `expand-spec`: what there is, as nothing else is folded into it.
///
/// # Errors
/// There is no such machine.
pub async fn show(server: &Server, part: &Part) -> Result<Answer, Refusal> {
    let resource = ApiResource::erase::<VirtualMachine>(&());
    let machines: Api<DynamicObject> =
        Api::namespaced_with(server.client.clone(), &part.namespace, &resource);
    let machine = machines.get(&part.name).await?;
    Ok(json_answer(StatusCode::OK, &machine))
}

/// `expand-vm-spec`: the same of a machine that need not be there.
///
/// # Errors
/// It is no machine, or needs an object that is not known here.
pub fn expand(machine: Value, namespace: &str) -> Result<Value, Refusal> {
    if machine
        .get("kind")
        .is_some_and(|kind| kind != "VirtualMachine")
        || !machine.is_object()
    {
        return Err(Refusal::bad("The body has to be a VirtualMachine"));
    }
    let given = machine.pointer("/metadata/namespace");
    if given.is_some_and(|given| given != namespace) {
        return Err(Refusal::bad(
            "The machine's namespace is not that of the path",
        ));
    }
    for word in ["instancetype", "preference"] {
        if machine.pointer(&format!("/spec/{word}")).is_some() {
            return Err(Refusal::bad(format!("spec.{word} is not supported")));
        }
    }
    Ok(machine)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pair(spec: &Value, requests: &Value, phase: Option<&str>) -> Pair {
        let mut machine = json!({
            "metadata": { "name": "a", "namespace": "default" },
            "spec": { "template": { "spec": { "domain": { "devices": {} } } } },
            "status": { "stateChangeRequests": requests },
        });
        for (key, value) in spec.as_object().unwrap() {
            machine["spec"][key] = value.clone();
        }
        let instance = phase.map(|phase| {
            serde_json::from_value(json!({
                "metadata": { "name": "a", "namespace": "default", "uid": "1" },
                "spec": { "domain": { "devices": {} } },
                "status": { "phase": phase },
            }))
            .unwrap()
        });
        Pair {
            machine: serde_json::from_value(machine).unwrap(),
            instance,
        }
    }

    fn with(strategy: &str, phase: Option<&str>) -> Pair {
        pair(&json!({ "runStrategy": strategy }), &json!([]), phase)
    }

    fn requests(change: &Change) -> Vec<StateAction> {
        let Change::Requests(requests) = change else {
            return Vec::new();
        };
        requests.iter().map(|request| request.action).collect()
    }

    #[test]
    fn starting_follows_the_run_strategy() {
        let always = Change::Strategy(RunStrategy::Always);
        assert_eq!(with("Halted", None).start().unwrap(), always);
        let deprecated = pair(&json!({ "running": false }), &json!([]), None);
        assert_eq!(deprecated.start().unwrap(), always);
        for strategy in ["Manual", "RerunOnFailure"] {
            let change = with(strategy, Some("Succeeded")).start().unwrap();
            assert_eq!(requests(&change), [StateAction::Start], "{strategy}");
        }
        for (strategy, phase) in [
            ("Always", None),
            ("Once", Some("Succeeded")),
            ("RerunOnFailure", Some("Failed")),
            ("Manual", Some("Running")),
            ("Halted", Some("Scheduling")),
        ] {
            let refusal = with(strategy, phase).start().unwrap_err();
            assert_eq!(refusal.code, StatusCode::CONFLICT, "{strategy}");
        }
    }

    #[test]
    fn stopping_follows_the_run_strategy() {
        let halted = Some(Change::Strategy(RunStrategy::Halted));
        assert_eq!(with("Always", Some("Running")).stop(None).unwrap(), halted);
        assert_eq!(with("Once", None).stop(None).unwrap(), halted);
        let change = with("Manual", Some("Running")).stop(None).unwrap().unwrap();
        let Change::Requests(stop) = change else {
            panic!("no request");
        };
        assert_eq!(stop[0].uid.as_deref(), Some("1"));
        with("Manual", None).stop(None).unwrap_err();
        with("RerunOnFailure", Some("Failed"))
            .stop(None)
            .unwrap_err();
        with("Halted", None).stop(Some(0)).unwrap_err();
        with("Halted", Some("Running")).stop(None).unwrap_err();
        with("Halted", Some("Running")).stop(Some(30)).unwrap_err();
        assert_eq!(with("Halted", Some("Running")).stop(Some(5)).unwrap(), None);
    }

    #[test]
    fn restarting_stops_and_starts() {
        for strategy in ["Always", "Manual", "RerunOnFailure"] {
            let change = with(strategy, Some("Running")).restart().unwrap();
            let expected = [StateAction::Stop, StateAction::Start];
            assert_eq!(requests(&change), expected, "{strategy}");
            with(strategy, None).restart().unwrap_err();
        }
        with("Halted", Some("Running")).restart().unwrap_err();
        with("Once", Some("Running")).restart().unwrap_err();
    }

    #[test]
    fn requests_do_not_pile_up() {
        let manual = json!({ "runStrategy": "Manual" });
        let stop = json!([{ "action": "Stop", "uid": "1" }]);
        let stopping = pair(&manual, &stop, Some("Running"));
        let change = stopping.start().unwrap();
        assert_eq!(requests(&change), [StateAction::Stop, StateAction::Start]);
        stopping.stop(None).unwrap_err();
        stopping.restart().unwrap_err();
        let start = json!([{ "action": "Start" }]);
        pair(&manual, &start, None).start().unwrap_err();
    }

    #[test]
    fn only_machines_are_expanded() {
        let machine = json!({ "kind": "VirtualMachine", "metadata": { "namespace": "default" } });
        assert_eq!(expand(machine.clone(), "default").unwrap(), machine);
        expand(machine, "other").unwrap_err();
        expand(json!({ "kind": "Pod" }), "default").unwrap_err();
        expand(json!(null), "default").unwrap_err();
        expand(
            json!({ "spec": { "instancetype": { "name": "u1" } } }),
            "default",
        )
        .unwrap_err();
    }
}
