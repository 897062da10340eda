//! A machine's memory: how it is used, and what the guest is to do with.

use std::process::ExitCode;

use anyhow::Context;
use edgevmm_api::v1::{GetMemoryRequest, GetMemoryResponse, SetMemoryTargetRequest};
use edgevmm_config::ByteSize;
use serde_json::{Value, json};

use super::{connect, refused};
use crate::cli::MemoryArgs;
use crate::exit::Outcome;

/// Shows how a machine's memory is used, or has its guest do with less.
///
/// # Errors
///
/// When there is no such machine, or it can't do with so much.
pub async fn memory(args: &MemoryArgs) -> Outcome {
    let (_, mut client) = connect(&args.name).await?;
    if let Some(ByteSize(target)) = args.target {
        let answer = client.set_memory_target(SetMemoryTargetRequest { target });
        answer
            .await
            .map_err(|status| refused("change the memory of", &args.name, &status))?;
        if !args.json.json {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let answer = client.get_memory(GetMemoryRequest {}).await;
    let memory = answer.map_err(|status| refused("look at the memory of", &args.name, &status))?;
    let memory = as_json(&memory.into_inner());
    if args.json.json {
        let text = serde_json::to_string_pretty(&memory).context("Can't write JSON")?;
        println!("{text}");
    } else {
        print!("{}", as_lines(&memory));
    }
    Ok(ExitCode::SUCCESS)
}

/// All figures in bytes, but for the counts of faults. What is not known is left out.
fn as_json(memory: &GetMemoryResponse) -> Value {
    let mut all = json!({
        "size": memory.size,
        "target": memory.target,
        "resident": memory.resident,
    });
    if let Some(balloon) = &memory.balloon {
        all["balloon"] = json!({
            "driver": balloon.driver,
            "held": balloon.held,
            "inflated": balloon.inflated,
            "reported": balloon.reported,
        });
    }
    if let Some(guest) = &memory.guest {
        let values = [
            ("total", guest.total),
            ("free", guest.free),
            ("available", guest.available),
            ("caches", guest.caches),
            ("swap_in", guest.swap_in),
            ("swap_out", guest.swap_out),
            ("major_faults", guest.major_faults),
            ("minor_faults", guest.minor_faults),
        ];
        let known = values
            .iter()
            .filter_map(|&(key, value)| Some((key, value?)));
        all["guest"] = known
            .map(|(key, value)| (key.to_owned(), json!(value)))
            .collect::<serde_json::Map<_, _>>()
            .into();
    }
    all
}

/// A line for each figure, with sizes as people read them.
fn as_lines(memory: &Value) -> String {
    let mut text = String::new();
    let mut add = |group: &str, key: &str, value: &Value| {
        let name = format!("{group}{}", key.replace('_', " "));
        let shown = match value.as_u64() {
            Some(count) if key.ends_with("faults") => count.to_string(),
            Some(bytes) => size(bytes),
            None => value.to_string(),
        };
        text.push_str(&format!("{name:<20} {shown:>12}\n"));
    };
    for (key, value) in memory.as_object().into_iter().flatten() {
        match value.as_object() {
            Some(group) => group
                .iter()
                .for_each(|(inner, value)| add(&format!("{key} "), inner, value)),
            None => add("", key, value),
        }
    }
    text
}

/// MiB with one digit, as pages make odd numbers.
fn size(bytes: u64) -> String {
    let tenths = bytes / (1 << 20) * 10 + bytes % (1 << 20) * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_for_people_and_for_scripts() {
        let memory = GetMemoryResponse {
            size: 512 << 20,
            target: 256 << 20,
            resident: (100 << 20) + (512 << 10),
            balloon: None,
            guest: Some(edgevmm_api::v1::GuestMemory {
                free: Some(3 << 20),
                major_faults: Some(7),
                ..Default::default()
            }),
        };
        let all = as_json(&memory);
        assert_eq!(
            all,
            json!({
                "size": 512 << 20,
                "target": 256 << 20,
                "resident": (100 << 20) + (512 << 10),
                "guest": {"free": 3 << 20, "major_faults": 7},
            })
        );
        let lines = as_lines(&all);
        let line = |name: &str| {
            let found = lines.lines().find(|line| line.starts_with(name));
            found
                .and_then(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        assert_eq!(line("resident"), Some("100.5 MiB"));
        assert_eq!(line("guest free"), Some("3.0 MiB"));
        assert_eq!(line("guest major faults"), Some("7"));
    }
}
