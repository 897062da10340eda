//! Volumes of an instance as volumes of its pod. The runtime makes disks of what it finds mounted, and
//! calls each by where that is.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, DownwardAPIVolumeSource, EmptyDirVolumeSource,
    PersistentVolumeClaimVolumeSource, ProjectedVolumeSource, SecretProjection, SecretVolumeSource,
    ServiceAccountTokenProjection, Volume as PodVolume, VolumeDevice, VolumeMount,
    VolumeProjection,
};

use super::{Parts, PodError, entries};
use crate::api::InstanceSpec;
use crate::api::disks::{CloudInit, ServiceAccountSource, Volume};
use crate::quantity::units;

/// Seconds that the token of a service account holds.
const TOKEN_SECONDS: i64 = 3607;
/// Of a claim's size, what its file system keeps for itself: 5.5 %, as with KubeVirt.
const FILE_SYSTEM_SHARE: u64 = 55;

/// What must be known of a claim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Claim {
    /// Whether it is a block device.
    pub block: bool,
    /// Its size in bytes.
    pub size: u64,
}

/// Claims by name.
pub type Claims = BTreeMap<String, Claim>;

/// Names of the claims that an instance needs.
pub fn claims_of(spec: &InstanceSpec) -> impl Iterator<Item = &str> {
    spec.volumes
        .iter()
        .filter_map(|volume| Some(claim_of(volume)?.0))
}

fn claim_of(volume: &Volume) -> Option<(&str, bool)> {
    if let Some(claim) = &volume.persistent_volume_claim {
        return Some((&claim.claim_name, claim.read_only == Some(true)));
    }
    Some((&volume.data_volume.as_ref()?.name, false))
}

pub(super) fn describe(
    spec: &InstanceSpec,
    claims: &Claims,
    parts: &mut Parts,
) -> Result<(), PodError> {
    let mut empty = Vec::new();
    for volume in &spec.volumes {
        let name = &volume.name;
        let disks = &spec.domain.devices.disks;
        let disk = disks.iter().find(|disk| disk.name == *name);
        if let Some(disk) = &volume.container_disk {
            parts.image = Some((
                disk.image.clone(),
                disk.image_pull_policy.clone(),
                disk.image_pull_secret.clone(),
            ));
            if let Some(file) = disk
                .path
                .as_deref()
                .and_then(|path| path.strip_prefix("/disk/"))
            {
                parts.annotate("disk", file);
            }
        } else if let Some((claim, read_only)) = claim_of(volume) {
            let facts = claims
                .get(claim)
                .ok_or_else(|| PodError::NoClaim(claim.to_owned()))?;
            if !facts.block && !read_only && !entries::is_read_only(disk) {
                let left = facts.size - facts.size / 1000 * FILE_SYSTEM_SHARE;
                empty.push(format!("{name}={}M", left >> 20));
            }
            claim_volume(name, claim, read_only, *facts, parts);
        } else if let Some(disk) = &volume.empty_disk {
            let size = units(&disk.capacity).unwrap_or(0) >> 20;
            empty.push(format!("{name}={size}M"));
            mount(
                parts,
                PodVolume {
                    name: name.clone(),
                    empty_dir: Some(EmptyDirVolumeSource::default()),
                    ..PodVolume::default()
                },
            );
        } else if let Some(volume) = files(volume) {
            mount(parts, volume);
        }
        if let Some(source) = &volume.cloud_init_no_cloud {
            secrets_of_seed(name, source, parts);
        }
    }
    if let Some(entries) = entries::of_disks(spec) {
        parts.annotate("disks", entries);
    }
    if !empty.is_empty() {
        parts.annotate("create-disk", empty.join(","));
    }
    Ok(())
}

fn claim_volume(name: &str, claim: &str, read_only: bool, facts: Claim, parts: &mut Parts) {
    let volume = PodVolume {
        name: name.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.to_owned(),
            read_only: read_only.then_some(true),
        }),
        ..PodVolume::default()
    };
    if facts.block {
        parts.devices.push(VolumeDevice {
            name: name.to_owned(),
            device_path: format!("/dev/{name}"),
        });
        parts.volumes.push(volume);
    } else {
        mount(parts, volume);
    }
}

fn mount(parts: &mut Parts, volume: PodVolume) {
    parts.mounts.push(VolumeMount {
        name: volume.name.clone(),
        mount_path: format!("/{}", volume.name),
        ..VolumeMount::default()
    });
    parts.volumes.push(volume);
}

/// A volume of files from the API, when it is one.
fn files(volume: &Volume) -> Option<PodVolume> {
    let mut made = PodVolume {
        name: volume.name.clone(),
        ..PodVolume::default()
    };
    if let Some(map) = &volume.config_map {
        made.config_map = Some(ConfigMapVolumeSource {
            name: map.name.clone(),
            optional: map.optional,
            ..ConfigMapVolumeSource::default()
        });
    } else if let Some(secret) = &volume.secret {
        made.secret = Some(SecretVolumeSource {
            secret_name: secret.secret_name.clone(),
            optional: secret.optional,
            ..SecretVolumeSource::default()
        });
    } else if let Some(api) = &volume.downward_api {
        made.downward_api = Some(DownwardAPIVolumeSource {
            items: Some(api.fields.clone()),
            ..DownwardAPIVolumeSource::default()
        });
    } else {
        made.projected = Some(credentials(volume.service_account.as_ref()?));
    }
    Some(made)
}

fn credentials(_: &ServiceAccountSource) -> ProjectedVolumeSource {
    ProjectedVolumeSource {
        sources: Some(vec![VolumeProjection {
            service_account_token: Some(ServiceAccountTokenProjection {
                path: "token".to_owned(),
                expiration_seconds: Some(TOKEN_SECONDS),
                ..ServiceAccountTokenProjection::default()
            }),
            ..VolumeProjection::default()
        }]),
        ..ProjectedVolumeSource::default()
    }
}

/// Mounts the Secrets that have what cloud-init is told.
fn secrets_of_seed(name: &str, source: &CloudInit, parts: &mut Parts) {
    let secrets: Vec<_> = [&source.secret_ref, &source.network_data_secret_ref]
        .into_iter()
        .flatten()
        .map(|secret| VolumeProjection {
            secret: Some(SecretProjection {
                name: secret.name.clone(),
                ..SecretProjection::default()
            }),
            ..VolumeProjection::default()
        })
        .collect();
    if secrets.is_empty() {
        return;
    }
    parts.annotate("cloud-init", name);
    mount(
        parts,
        PodVolume {
            name: name.to_owned(),
            projected: Some(ProjectedVolumeSource {
                sources: Some(secrets),
                ..ProjectedVolumeSource::default()
            }),
            ..PodVolume::default()
        },
    );
}
