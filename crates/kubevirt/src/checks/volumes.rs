//! Checks of volumes.

use std::collections::BTreeSet;

use super::{Report, is_label, is_name};
use crate::api::disks::{CloudInit, Volume};
use crate::quantity::units;

/// Longest user data and network configuration in an instance, in bytes, as with KubeVirt.
const MAX_INLINE: usize = 2048;

pub(super) fn check(volumes: &[Volume], report: &mut Report<'_>) {
    let mut names = BTreeSet::new();
    for (index, volume) in volumes.iter().enumerate() {
        let mut report = report.below(&format!("volumes[{index}]"));
        if !is_label(&volume.name) {
            report.refuse("name", "write at most 63 of a-z, 0-9 and -");
        }
        if !names.insert(&volume.name) {
            report.refuse("name", "another volume is called so");
        }
        self::volume(volume, &mut report);
    }
    if count(volumes, |volume| volume.container_disk.is_some()) > 1 {
        report.refuse(
            "volumes",
            "more than one containerDisk: a pod has one image that is the machine, so put the others into claims",
        );
    }
    if count(volumes, |volume| volume.service_account.is_some()) > 1 {
        report.refuse("volumes", "a service account can be there once");
    }
    if count(volumes, |volume| volume.cloud_init_no_cloud.is_some()) > 1 {
        report.refuse("volumes", "cloudInitNoCloud can be there once");
    }
}

fn count(volumes: &[Volume], of: impl Fn(&Volume) -> bool) -> usize {
    volumes.iter().filter(|volume| of(volume)).count()
}

/// Names of objects that the volume needs.
fn objects(volume: &Volume, report: &mut Report<'_>) {
    let claim = volume.persistent_volume_claim.as_ref();
    let claim = claim.map(|claim| &claim.claim_name);
    let data = volume.data_volume.as_ref().map(|data| &data.name);
    let secret = volume.secret.as_ref();
    let secret = secret.and_then(|secret| secret.secret_name.as_ref());
    let map = volume.config_map.as_ref().map(|map| &map.name);
    for (field, name) in [
        ("persistentVolumeClaim.claimName", claim),
        ("dataVolume.name", data),
        ("secret.secretName", secret),
        ("configMap.name", map),
    ] {
        if name.is_some_and(|name| !is_name(name)) {
            report.refuse(field, "no object of the namespace can be called so");
        }
    }
}

fn volume(volume: &Volume, report: &mut Report<'_>) {
    objects(volume, report);
    let sources = [
        volume.container_disk.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.data_volume.is_some(),
        volume.ephemeral.is_some(),
        volume.empty_disk.is_some(),
        volume.host_disk.is_some(),
        volume.cloud_init_no_cloud.is_some(),
        volume.cloud_init_config_drive.is_some(),
        volume.config_map.is_some(),
        volume.secret.is_some(),
        volume.downward_api.is_some(),
        volume.service_account.is_some(),
        volume.sysprep.is_some(),
    ];
    if sources.into_iter().filter(|there| *there).count() != 1 {
        report.refuse("", "write exactly one source");
    }
    for (field, there) in [
        ("ephemeral", volume.ephemeral.is_some()),
        ("hostDisk", volume.host_disk.is_some()),
        (
            "cloudInitConfigDrive",
            volume.cloud_init_config_drive.is_some(),
        ),
        ("sysprep", volume.sysprep.is_some()),
    ] {
        if there {
            report.refuse(field, "not supported by edgevmm yet");
        }
    }
    if let Some(disk) = &volume.container_disk {
        let in_folder = |path: &str| {
            let name = path.strip_prefix("/disk/");
            name.is_some_and(|name| !name.is_empty() && !name.contains('/'))
        };
        if disk.path.as_deref().is_some_and(|path| !in_folder(path)) {
            report.refuse(
                "containerDisk.path",
                "write a file in the image's folder /disk",
            );
        }
    }
    if let Some(disk) = &volume.empty_disk
        && units(&disk.capacity).is_none_or(|bytes| bytes < 1 << 20)
    {
        report.refuse(
            "emptyDisk.capacity",
            "write a size of 1Mi or more, like 2Gi",
        );
    }
    let labels = [
        (
            "configMap",
            volume.config_map.as_ref().map(|map| &map.volume_label),
        ),
        (
            "secret",
            volume.secret.as_ref().map(|secret| &secret.volume_label),
        ),
        (
            "downwardAPI",
            volume.downward_api.as_ref().map(|api| &api.volume_label),
        ),
    ];
    for (field, label) in labels {
        if label.is_some_and(Option::is_some) {
            report.refuse(
                &format!("{field}.volumeLabel"),
                "not supported: it is cfgdata",
            );
        }
    }
    if let Some(seed) = &volume.cloud_init_no_cloud {
        cloud_init(seed, &mut report.below("cloudInitNoCloud"));
    }
}

fn cloud_init(seed: &CloudInit, report: &mut Report<'_>) {
    let user = [
        seed.user_data.is_some(),
        seed.user_data_base64.is_some(),
        seed.secret_ref.is_some(),
    ];
    if user.into_iter().filter(|there| *there).count() != 1 {
        report.refuse(
            "",
            "write exactly one of userData, userDataBase64, secretRef",
        );
    }
    let network = [
        seed.network_data.is_some(),
        seed.network_data_base64.is_some(),
        seed.network_data_secret_ref.is_some(),
    ];
    if network.into_iter().filter(|there| *there).count() > 1 {
        let fields = "networkData, networkDataBase64, networkDataSecretRef";
        report.refuse("", format!("write at most one of {fields}"));
    }
    let inline = user[0] || user[1] || network[0] || network[1];
    if inline && (user[2] || network[2]) {
        report.refuse(
            "",
            "not both inline and by Secrets yet: put all of it into Secrets",
        );
    }
    for (field, text) in [
        ("userData", &seed.user_data),
        ("userDataBase64", &seed.user_data_base64),
        ("networkData", &seed.network_data),
        ("networkDataBase64", &seed.network_data_base64),
    ] {
        if text.as_ref().is_some_and(|text| text.len() > MAX_INLINE) {
            report.refuse(field, "more than 2048 bytes: put it into a Secret");
        }
    }
    for (field, text) in [
        ("userDataBase64", &seed.user_data_base64),
        ("networkDataBase64", &seed.network_data_base64),
    ] {
        if text
            .as_ref()
            .is_some_and(|text| crate::seed::decode(text).is_none())
        {
            report.refuse(field, "no text in base 64");
        }
    }
}
