#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]
use kube::core::DynamicObject;
use serde_json::{Value, json};

use super::*;

fn now() -> Time {
    serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap()
}

fn at(seconds: i64) -> Time {
    Time(now().0 + SignedDuration::from_secs(seconds))
}

fn machine(strategy: &str, status: Value) -> VirtualMachine {
    let value = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {"name": "vm", "namespace": "n", "uid": "m", "generation": 2, "finalizers": [FINALIZER]},
        "spec": {"runStrategy": strategy, "template": {"spec": {"domain": {}}}},
        "status": status,
    });
    serde_json::from_value(value).unwrap()
}

fn instance(phase: &str, leaving: bool) -> VirtualMachineInstance {
    let mut value = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
        "metadata": {
            "name": "vm", "uid": "i", "finalizers": [FINALIZER], "annotations": {GENERATION: "2"},
        },
        "spec": {"domain": {}},
        "status": {"phase": phase, "conditions": [{"type": "Ready", "status": "True"}]},
    });
    if leaving {
        value["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    serde_json::from_value(value).unwrap()
}

fn requests(kinds: &[&str]) -> Value {
    let request = |kind: &&str| match *kind {
        "Stop" => json!({"action": "Stop", "uid": "i"}),
        "Late" => json!({"action": "Stop", "uid": "other"}),
        "Paused" => json!({"action": "Start", "data": {"paused": "true"}}),
        kind => json!({"action": kind}),
    };
    kinds.iter().map(request).collect()
}

#[test]
fn an_instance_is_kept_as_its_strategy_says() {
    const CREATE: Option<Action> = Some(Action::Create { paused: false });
    const DELETE: Option<Action> = Some(Action::Delete);
    // Strategy, the one before, requests; phase of the instance; what is done, requests that are left.
    type Case<'a> = (
        &'a str,
        &'a str,
        &'a [&'a str],
        Option<&'a str>,
        Option<Action>,
        usize,
    );
    let cases: &[Case<'_>] = &[
        ("Always", "Always", &[], None, CREATE, 0),
        ("Always", "Always", &[], Some("Running"), None, 0),
        ("Always", "Always", &[], Some("Succeeded"), DELETE, 0),
        ("Always", "Always", &[], Some("Failed"), DELETE, 0),
        (
            "Always",
            "Always",
            &["Stop", "Start"],
            Some("Running"),
            DELETE,
            2,
        ),
        ("Always", "Always", &["Stop", "Start"], None, CREATE, 1),
        ("Always", "Always", &["Start"], Some("Running"), None, 0),
        ("Always", "Always", &["Late"], Some("Running"), None, 0),
        ("RerunOnFailure", "Halted", &[], None, CREATE, 0),
        ("RerunOnFailure", "RerunOnFailure", &[], None, None, 0),
        (
            "RerunOnFailure",
            "RerunOnFailure",
            &["Start"],
            None,
            CREATE,
            1,
        ),
        (
            "RerunOnFailure",
            "RerunOnFailure",
            &[],
            Some("Failed"),
            DELETE,
            1,
        ),
        (
            "RerunOnFailure",
            "RerunOnFailure",
            &[],
            Some("Succeeded"),
            DELETE,
            0,
        ),
        (
            "RerunOnFailure",
            "RerunOnFailure",
            &["Stop"],
            Some("Running"),
            DELETE,
            1,
        ),
        ("Manual", "Halted", &[], None, None, 0),
        ("Manual", "Manual", &["Start"], None, CREATE, 1),
        ("Manual", "Manual", &["Stop"], Some("Running"), DELETE, 1),
        ("Manual", "Manual", &[], Some("Failed"), None, 0),
        ("Manual", "Manual", &["Start"], Some("Succeeded"), DELETE, 1),
        ("Halted", "Always", &[], Some("Running"), DELETE, 0),
        ("Halted", "Halted", &[], None, None, 0),
        ("Once", "Halted", &[], None, CREATE, 0),
        ("Once", "Once", &[], None, None, 0),
        ("Once", "Once", &[], Some("Succeeded"), None, 0),
    ];
    for case in cases {
        let (strategy, before, asked, phase, action, left) = case;
        let status = json!({"runStrategy": before, "stateChangeRequests": requests(asked)});
        let machine = machine(strategy, status);
        let instance = phase.map(|phase| instance(phase, false));
        let plan = decide(&machine, instance.as_ref(), None, &now());
        assert_eq!(&plan.action, action, "{case:?}");
        assert_eq!(plan.status.state_change_requests.len(), *left, "{case:?}");
        assert_eq!(plan.finalizer, None);
        assert_eq!(plan.strategy, None);
    }
}

#[test]
fn a_paused_start_of_what_is_halted_flips_it_and_is_remembered() {
    let asked = json!({"stateChangeRequests": requests(&["Paused"])});
    let plan = decide(&machine("Halted", asked.clone()), None, None, &now());
    assert_eq!(
        (plan.strategy, plan.action),
        (Some(RunStrategy::Always), None)
    );
    let plan = decide(&machine("Always", asked), None, None, &now());
    assert_eq!(plan.action, Some(Action::Create { paused: true }));
}

#[test]
fn starts_that_fail_wait_longer_each_time_and_one_that_runs_ends_that() {
    let mut machine = machine("Always", json!({}));
    for (count, least) in [
        (1, 10),
        (2, 40),
        (3, 90),
        (4, 160),
        (5, 250),
        (6, 300),
        (40_000, 300),
    ] {
        let mut failed = instance("Failed", false);
        failed.metadata.uid = Some(count.to_string());
        let status = machine.status.as_mut().unwrap();
        if let Some(failure) = &mut status.start_failure {
            failure.consecutive_fail_count = count - 1;
        }
        let plan = decide(&machine, Some(&failed), None, &now());
        assert_eq!(plan.action, Some(Action::Delete));
        machine.status = Some(plan.status);
        let again = decide(&machine, Some(&failed), None, &now()).status;
        assert_eq!(Some(&again), machine.status.as_ref(), "counted twice");
        let waits = decide(&machine, None, None, &now());
        assert_eq!(waits.action, None);
        let printable = waits.status.printable_status.as_deref();
        assert_eq!(printable, Some("CrashLoopBackOff"));
        let left = waits.look_again.unwrap().as_secs();
        assert!(
            (least..=300.min(least * 3 / 2)).contains(&left),
            "{count}: {left}"
        );
        let later = decide(&machine, None, None, &at(301));
        assert_eq!(later.action, Some(Action::Create { paused: false }));
        let long_ago = decide(&machine, None, None, &at(-100_000));
        assert!(long_ago.look_again.unwrap() <= Duration::from_secs(300));
    }
    let plan = decide(&machine, Some(&instance("Running", false)), None, &now());
    assert_eq!(plan.status.start_failure, None);
}

#[test]
fn one_word_tells_the_state() {
    let condition = |kind: &str, status: &str, reason: &str| json!([{"type": kind, "status": status, "reason": reason}]);
    let none = json!([]);
    let cases = [
        ("Always", "Running", false, none.clone(), "Running"),
        ("Always", "Running", true, none.clone(), "Stopping"),
        ("Halted", "Running", false, none.clone(), "Stopping"),
        (
            "Always",
            "Running",
            false,
            condition("Paused", "True", "PausedByUser"),
            "Paused",
        ),
        ("Always", "Scheduled", false, none.clone(), "Starting"),
        (
            "Always",
            "Pending",
            false,
            condition("Synchronized", "False", "FailedPvcNotFound"),
            "ErrorPvcNotFound",
        ),
        (
            "Always",
            "Scheduling",
            false,
            condition("PodScheduled", "False", "Unschedulable"),
            "ErrorUnschedulable",
        ),
        (
            "Always",
            "Scheduling",
            false,
            condition("Synchronized", "False", "ErrImagePull"),
            "ErrImagePull",
        ),
        (
            "Always",
            "Scheduling",
            false,
            condition("Synchronized", "False", "ImagePullBackOff"),
            "ImagePullBackOff",
        ),
        (
            "Always",
            "Scheduling",
            false,
            condition("Synchronized", "False", "FailedCreate"),
            "Starting",
        ),
        ("Manual", "Succeeded", false, none.clone(), "Stopped"),
        ("Manual", "Failed", true, none, "Stopped"),
    ];
    for (strategy, phase, leaving, conditions, word) in cases {
        let mut instance = instance(phase, leaving);
        let status = instance.status.as_mut().unwrap();
        status.conditions = serde_json::from_value(conditions).unwrap();
        let plan = decide(&machine(strategy, json!({})), Some(&instance), None, &now());
        assert_eq!(
            plan.status.printable_status.as_deref(),
            Some(word),
            "{phase}"
        );
    }
    let plan = decide(&machine("Halted", json!({})), None, None, &now());
    assert_eq!(plan.status.printable_status.as_deref(), Some("Stopped"));
}

#[test]
fn conditions_are_those_of_the_instance_and_ready_is_always_there() {
    let plan = decide(
        &machine("Always", json!({})),
        Some(&instance("Running", false)),
        None,
        &now(),
    );
    assert_eq!(
        (plan.status.created, plan.status.ready),
        (Some(true), Some(true))
    );
    let mut machine = machine("Halted", json!({}));
    machine.status = Some(plan.status);
    let plan = decide(&machine, None, None, &at(5));
    let [ready] = &*plan.status.conditions else {
        panic!("{:?}", plan.status.conditions)
    };
    assert_eq!(
        (&*ready.status, ready.reason.as_deref()),
        ("False", Some("VMINotExists"))
    );
    assert_eq!(
        (plan.status.created, plan.status.ready),
        (Some(false), Some(false))
    );
    machine.status = Some(plan.status.clone());
    assert_eq!(
        decide(&machine, None, None, &at(9)).status,
        plan.status,
        "it does not settle"
    );
}

#[test]
fn a_machine_goes_when_its_instance_is_gone_unless_that_stays() {
    let mut machine = machine("Always", json!({}));
    machine.metadata.deletion_timestamp = Some(now());
    let plan = |machine: &VirtualMachine, instance: Option<VirtualMachineInstance>| {
        let plan = decide(machine, instance.as_ref(), None, &now());
        assert_eq!(plan.status.printable_status.as_deref(), Some("Terminating"));
        (plan.action, plan.finalizer)
    };
    let running = || Some(instance("Running", false));
    assert_eq!(plan(&machine, running()), (Some(Action::Delete), None));
    assert_eq!(
        plan(&machine, Some(instance("Running", true))),
        (None, None)
    );
    let over = Some(instance("Failed", true));
    assert_eq!(plan(&machine, over), (Some(Action::Release), None));
    assert_eq!(plan(&machine, None), (None, Some(Finalizer::Remove)));
    machine.finalizers_mut().push(ORPHAN.to_owned());
    let orphan = (Some(Action::Orphan), Some(Finalizer::Remove));
    assert_eq!(plan(&machine, running()), orphan);
}

#[test]
fn a_change_of_the_template_asks_for_a_restart_and_another_one_does_not() {
    let mut machine = machine("Always", json!({}));
    machine.metadata.generation = Some(3);
    let running = instance("Running", false);
    let same = machine.spec.template.clone();
    let plan = decide(&machine, Some(&running), Some(&same), &now());
    assert_eq!(plan.action, Some(Action::Annotate(3)));
    machine.spec.template.spec.hostname = Some("new".to_owned());
    let plan = decide(&machine, Some(&running), Some(&same), &now());
    assert_eq!(plan.action, None);
    assert!(crate::conditions::holds(
        &plan.status.conditions,
        RESTART_REQUIRED
    ));
    assert_eq!(plan.status.observed_generation, Some(2));
    assert_eq!(plan.status.desired_generation, Some(3));
    machine.status = Some(plan.status);
    let plan = decide(&machine, None, None, &now());
    assert!(!crate::conditions::holds(
        &plan.status.conditions,
        RESTART_REQUIRED
    ));
}

#[test]
fn running_and_run_strategy_exclude_each_other() {
    let mut machine = machine("Always", json!({}));
    machine.spec.running = Some(true);
    let plan = decide(&machine, None, None, &now());
    assert_eq!(plan.action, None);
    assert!(crate::conditions::holds(&plan.status.conditions, FAILURE));
    machine.status = Some(plan.status.clone());
    assert_eq!(
        decide(&machine, None, None, &at(9)).status,
        plan.status,
        "it does not settle"
    );
    machine.spec.run_strategy = None;
    assert_eq!(strategy(&machine), Some(RunStrategy::Always));
    machine.spec.running = Some(false);
    assert_eq!(strategy(&machine), Some(RunStrategy::Halted));
}

#[test]
fn an_instance_has_all_of_the_template_and_nothing_of_the_machine() {
    let value = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {"name": "vm", "namespace": "n", "uid": "m", "generation": 7, "labels": {"own": "1"}},
        "spec": {"template": {
            "metadata": {"labels": {"a": "b"}, "annotations": {"c": "d"}},
            "spec": {"domain": {"surprise": 1}},
        }},
    });
    let machine: DynamicObject = serde_json::from_value(value).unwrap();
    let Start { revision, instance } = start(&machine, true).unwrap();
    let instance = serde_json::to_value(instance).unwrap();
    assert_eq!(
        revision.metadata.name.as_deref(),
        Some("revision-start-vm-m-7")
    );
    assert_eq!(
        instance["status"]["virtualMachineRevisionName"],
        "revision-start-vm-m-7"
    );
    let meta = &instance["metadata"];
    assert_eq!(meta["labels"], json!({"a": "b"}));
    assert_eq!(meta["annotations"], json!({"c": "d", GENERATION: "7"}));
    assert_eq!(meta["ownerReferences"][0]["uid"], "m");
    assert_eq!(
        meta["finalizers"],
        json!([FINALIZER, crate::pod::FINALIZER])
    );
    let domain = &instance["spec"]["domain"];
    assert_eq!(domain["surprise"], 1);
    assert_eq!(instance["spec"]["startStrategy"], "Paused");
    let uuid = domain["firmware"]["uuid"].as_str().unwrap();
    let again = start(&machine, false).unwrap().instance;
    assert_eq!(
        again.data.pointer("/spec/domain/firmware/uuid").unwrap(),
        uuid
    );
    assert_eq!(uuid.as_bytes()[14], b'5');
}

#[test]
fn only_a_machines_own_revisions_count() {
    assert!(is_revision("revision-start-vm-1-2-15", "1-2"));
    for name in [
        "revision-start-vm-1-2-",
        "revision-start-vm-1-2-3/../../secrets/x",
        "revision-start-vm-3-15",
        "other",
    ] {
        assert!(!is_revision(name, "1-2"), "{name}");
    }
}
