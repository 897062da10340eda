//! Targets of `edgevmm-config`: files and flags that somebody made without knowing how.

use edgevmm_config::{
    ChannelConfig, ConsoleConfig, CpuConfig, DiskConfig, MemoryConfig, NetConfig, VmConfig,
};

const INPUT_MAX: usize = 16 << 10;

/// Reads a configuration file; what is taken can be written and read again.
pub fn config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if text.len() > INPUT_MAX {
        return;
    }
    let Ok(config) = VmConfig::parse(text) else {
        return;
    };
    let _ = config.validate();
    let again = config.to_yaml().map(|text| VmConfig::parse(&text));
    assert_eq!(again, Ok(Ok(config)));
}

/// Reads the values of flags; the first byte chooses the flag.
pub fn flag(input: &[u8]) {
    let Some((&flag, text)) = input.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let mut config = VmConfig::default();
    match flag % 6 {
        0 => config.disks.extend(text.parse::<DiskConfig>()),
        1 => config.nets.extend(text.parse::<NetConfig>()),
        2 => config.cpus = text.parse::<CpuConfig>().unwrap_or_default(),
        3 => config.memory = text.parse::<MemoryConfig>().unwrap_or_default(),
        4 => config.console = text.parse::<ConsoleConfig>().unwrap_or_default(),
        _ => config.channels.extend(text.parse::<ChannelConfig>()),
    }
    let _ = config.validate();
}
