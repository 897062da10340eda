//! Who a machine is: what stays the same when it is started again.

use edgevmm_config::{MacAddr, VmConfig};
use uuid::Uuid;

/// Namespace of the UUIDs that are derived from names.
const NAMESPACE: Uuid = Uuid::from_u128(0x9f0b_7c5e_0d3a_4e6b_8c41_65d6_a2e1_7f30);
/// Prefix of locally administered addresses as VMs use them.
const MAC_PREFIX: [u8; 3] = [0x52, 0x54, 0x00];

/// The machine's UUID: the one given, or one derived from its name and first disk, so that the
/// guest finds the same machine (DHCP lease, cloud-init instance, licence) at every start.
pub fn uuid(config: &VmConfig) -> Uuid {
    config.identity.uuid.unwrap_or_else(|| {
        let mut seed = config.name.clone().unwrap_or_default();
        // What is in a CD-ROM drive comes and goes.
        if let Some(disk) = config.disks.iter().find(|disk| !disk.is_cdrom()) {
            let path = std::path::absolute(&disk.path).unwrap_or_else(|_| disk.path.clone());
            seed.push('\0');
            seed.push_str(&path.to_string_lossy());
        }
        Uuid::new_v5(&NAMESPACE, seed.as_bytes())
    })
}

/// The address of interface number `index`, derived from the machine's UUID.
pub fn mac(uuid: Uuid, index: usize) -> MacAddr {
    let name = format!("nic{index}");
    let [.., x, y, z] = *Uuid::new_v5(&uuid, name.as_bytes()).as_bytes();
    let [a, b, c] = MAC_PREFIX;
    MacAddr([a, b, c, x, y, z])
}

#[cfg(test)]
mod tests {
    use super::*;
    use edgevmm_config::DiskConfig;

    fn config(name: &str, disk: &str) -> VmConfig {
        VmConfig {
            name: Some(name.into()),
            disks: vec![DiskConfig::new(disk)],
            ..VmConfig::default()
        }
    }

    #[test]
    fn the_same_machine_stays_the_same() {
        assert_eq!(uuid(&config("a", "/x")), uuid(&config("a", "/x")));
        assert_ne!(uuid(&config("a", "/x")), uuid(&config("b", "/x")));
        assert_ne!(uuid(&config("a", "/x")), uuid(&config("a", "/y")));
        let mut given = config("a", "/x");
        given.identity.uuid = Some(Uuid::from_u128(7));
        assert_eq!(uuid(&given), Uuid::from_u128(7));
    }

    #[test]
    fn interfaces_have_addresses_of_their_own() {
        let id = uuid(&config("a", "/x"));
        assert_ne!(mac(id, 0), mac(id, 1));
        assert_eq!(mac(id, 0).0[..3], MAC_PREFIX);
    }
}
