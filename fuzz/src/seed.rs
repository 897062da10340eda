//! Targets of `edgevmm-cloudinit`: what a user may give for a seed.

use edgevmm_cloudinit::{DataSource, Seed};

const INPUT_MAX: usize = 16 << 10;

/// Makes a seed of parts of the input, which zero bytes divide.
pub fn seed(input: &[u8]) {
    if input.len() > INPUT_MAX {
        return;
    }
    let mut parts = input.splitn(5, |&byte| byte == 0);
    let mut next = || {
        parts
            .next()
            .filter(|part| !part.is_empty())
            .map(<[u8]>::to_vec)
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let mut seed = Seed {
        data_source: DataSource::NoCloud,
        hostname: next().map(text),
        instance_id: next().map_or_else(String::new, text),
        ssh_keys: next().map(text).into_iter().collect(),
        user_data: next(),
        network_config: next(),
    };
    for data_source in [DataSource::NoCloud, DataSource::ConfigDrive] {
        seed.data_source = data_source;
        if let Ok(image) = seed.build() {
            assert!(image.len().is_multiple_of(2048));
            assert_eq!(image[16 * 2048 + 1..][..5], *b"CD001");
        }
    }
}
