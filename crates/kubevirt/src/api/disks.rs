//! Disks of a machine and the volumes behind them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, LocalObjectReference};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_with::skip_serializing_none;

/// A disk: a volume of the same name as the guest sees it.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Disk {
    /// Name of the volume.
    pub name: String,
    /// A hard disk.
    pub disk: Option<DiskTarget>,
    /// A CD-ROM drive with the volume in it.
    pub cdrom: Option<CdRomTarget>,
    /// Its turn when the firmware looks for something to boot, from 1.
    pub boot_order: Option<u32>,
    /// Serial number that the guest reads.
    pub serial: Option<String>,
    /// `none`, `writethrough` or `writeback`.
    pub cache: Option<String>,
    /// `native` or `threads`.
    pub io: Option<String>,
    /// What follows an error of the volume: `stop`, `report` or `ignore`.
    pub error_policy: Option<String>,
    /// A thread of its own, as each disk has one anyway.
    #[serde(rename = "dedicatedIOThread")]
    pub dedicated_io_thread: Option<bool>,
}

/// How a hard disk is attached.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DiskTarget {
    /// `virtio` or `sata`.
    pub bus: Option<String>,
    /// Whether writing is refused.
    pub readonly: Option<bool>,
}

/// How a CD-ROM drive is attached.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CdRomTarget {
    /// `sata`.
    pub bus: Option<String>,
    /// Always true.
    pub readonly: Option<bool>,
    /// `closed`.
    pub tray: Option<String>,
}

/// Where a disk's content comes from. Exactly one source is set.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// What disks call it.
    pub name: String,
    /// The disk image in a container image.
    pub container_disk: Option<ContainerDisk>,
    /// A claim.
    pub persistent_volume_claim: Option<ClaimSource>,
    /// A claim that a DataVolume fills.
    pub data_volume: Option<DataVolumeSource>,
    /// A claim under an overlay that goes with the machine.
    pub ephemeral: Option<EphemeralSource>,
    /// An empty disk that goes with the machine.
    pub empty_disk: Option<EmptyDisk>,
    /// An image on the node.
    pub host_disk: Option<HostDisk>,
    /// What cloud-init reads by its data source NoCloud.
    pub cloud_init_no_cloud: Option<CloudInit>,
    /// What cloud-init reads by its data source ConfigDrive.
    pub cloud_init_config_drive: Option<CloudInit>,
    /// Files of a ConfigMap.
    pub config_map: Option<ConfigMapSource>,
    /// Files of a Secret.
    pub secret: Option<SecretSource>,
    /// Files about the pod.
    #[serde(rename = "downwardAPI")]
    pub downward_api: Option<DownwardApi>,
    /// The credentials of a service account.
    pub service_account: Option<ServiceAccountSource>,
    /// Answers for the setup of Windows.
    pub sysprep: Option<Sysprep>,
}

/// The disk image in a container image.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContainerDisk {
    /// The container image.
    pub image: String,
    /// Absolute path of the disk image in it; else it is the only file in /disk.
    pub path: Option<String>,
    /// When to pull it.
    pub image_pull_policy: Option<String>,
    /// Secret to pull it with.
    pub image_pull_secret: Option<String>,
}

/// A claim.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimSource {
    /// Its name.
    pub claim_name: String,
    /// Whether writing is refused.
    pub read_only: Option<bool>,
}

/// A claim that a DataVolume fills.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DataVolumeSource {
    /// Name of the DataVolume and of its claim.
    pub name: String,
}

/// A claim under an overlay.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EphemeralSource {
    /// The claim, which is not written to.
    pub persistent_volume_claim: Option<ClaimSource>,
}

/// An empty disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EmptyDisk {
    /// Its size.
    pub capacity: Quantity,
}

/// An image on the node.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostDisk {
    /// Its absolute path.
    pub path: String,
    /// `Disk`, or `DiskOrCreate`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its size when it is made.
    pub capacity: Option<Quantity>,
}

/// What cloud-init reads.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CloudInit {
    /// User data as text.
    pub user_data: Option<String>,
    /// User data in base 64.
    pub user_data_base64: Option<String>,
    /// A Secret with the key `userdata` or `userData`.
    pub secret_ref: Option<LocalObjectReference>,
    /// Network configuration as text.
    pub network_data: Option<String>,
    /// Network configuration in base 64.
    pub network_data_base64: Option<String>,
    /// A Secret with the key `networkdata` or `networkData`.
    pub network_data_secret_ref: Option<LocalObjectReference>,
}

/// Files of a ConfigMap.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapSource {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Whether the machine starts without it.
    pub optional: Option<bool>,
    /// What the disk is called; `cfgdata` when absent.
    pub volume_label: Option<String>,
}

/// Files of a Secret.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretSource {
    /// Its name.
    pub secret_name: Option<String>,
    /// Whether the machine starts without it.
    pub optional: Option<bool>,
    /// What the disk is called; `cfgdata` when absent.
    pub volume_label: Option<String>,
}

/// Files about the pod.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DownwardApi {
    /// The files.
    #[serde(default)]
    pub fields: Vec<DownwardAPIVolumeFile>,
    /// What the disk is called; `cfgdata` when absent.
    pub volume_label: Option<String>,
}

/// The credentials of a service account.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccountSource {
    /// Its name.
    pub service_account_name: Option<String>,
}

/// Answers for the setup of Windows.
#[skip_serializing_none]
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sysprep {
    /// A ConfigMap with `autounattend.xml` or `unattend.xml`.
    pub config_map: Option<LocalObjectReference>,
    /// A Secret with one of them.
    pub secret: Option<LocalObjectReference>,
}

/// Amounts by resource.
pub type Amounts = BTreeMap<String, Quantity>;
