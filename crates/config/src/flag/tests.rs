#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::{
    ByteSize, ConsoleConfig, ConsoleDevice, ConsoleOutput, CpuConfig, DiskAio, DiskBus, DiskConfig,
    DiskErrorPolicy, DiskFormat, DiskKind, ImageConfig, MacAddr, MemoryConfig, NetBackendConfig,
    NetConfig,
};

fn error<T: std::str::FromStr<Err = FlagError> + fmt::Debug>(text: &str) -> String {
    text.parse::<T>().unwrap_err().to_string()
}

#[test]
fn disks() {
    assert_eq!("a.qcow2".parse(), Ok(DiskConfig::new("a.qcow2")));
    let text = "path=x.qcow2,ro,serial=abc,bootindex=1,snapshot,backing=a,backing=b,direct,\
                format=qcow2,queues=2,data_file=c,overlay=o,overlay_size=20G,internal_snapshot=1,\
                member=m,aio=threads,error-policy=enospace,bps=10M,bps-read=9M,bps-write=8M,\
                bps-burst=7M,iops=6,iops_read=5,iops-write=4,iops_burst=3,kind=cdrom,bus=sata";
    let expected = DiskConfig {
        path: "x.qcow2".into(),
        kind: DiskKind::Cdrom,
        bus: Some(DiskBus::Sata),
        data_file: vec!["c".into()],
        overlay: Some("o".into()),
        overlay_size: Some(ByteSize(20 << 30)),
        internal_snapshot: Some("1".into()),
        member: Some("m".into()),
        format: Some(DiskFormat::Qcow2),
        ro: true,
        serial: Some("abc".into()),
        bootindex: Some(1),
        backing: vec!["a".into(), "b".into()],
        snapshot: true,
        direct: true,
        queues: Some(2),
        aio: DiskAio::Threads,
        error_policy: DiskErrorPolicy::EnoSpace,
        bps: Some(ByteSize::mib(10)),
        bps_read: Some(ByteSize::mib(9)),
        bps_write: Some(ByteSize::mib(8)),
        bps_burst: Some(ByteSize::mib(7)),
        iops: Some(6),
        iops_read: Some(5),
        iops_write: Some(4),
        iops_burst: Some(3),
    };
    assert_eq!(text.parse(), Ok(expected));
    assert_eq!("a,,b,ro=off".parse(), Ok(DiskConfig::new("a,b")));
    assert_eq!("path=a=b".parse(), Ok(DiskConfig::new("a=b")));
    let ro = DiskConfig {
        ro: true,
        ..DiskConfig::new("a,")
    };
    assert_eq!("a,,,ro".parse(), Ok(ro));
}

#[test]
fn images_have_the_keys_of_disks_that_are_about_content() {
    let text = "x,format=vmdk,data_file=a,data_file=b,backing=c,internal_snapshot=1,member=m";
    let image: ImageConfig = text.parse().unwrap();
    assert_eq!(image, text.parse::<DiskConfig>().unwrap().image());
    assert!(error::<ImageConfig>("x,ro").contains("unknown key `ro`"));
}

#[test]
fn broken_disks_say_what_to_do() {
    for (text, expected) in [
        ("a,r0", "unknown key `r0`: did you mean `ro`?"),
        ("serial=a", "the key `path` is missing: add path=VALUE"),
        ("a,path=b", "`path` stands twice: leave one out"),
        ("a,serial", "`serial` lacks its value: write serial=VALUE"),
        ("a,ro=maybe", "`maybe` can't be `ro`: write ro=on or ro=off"),
        (
            "a,bootindex=-1",
            "`-1` can't be `bootindex`: write a whole number from 0 to 4294967295",
        ),
        (
            "a,format=qcow",
            "unknown value `qcow`: did you mean `qcow2`?",
        ),
        (
            "a,",
            "nothing stands around a comma: write a comma of a value twice",
        ),
        (
            "",
            "nothing stands around a comma: write a comma of a value twice",
        ),
        ("a,=b", "`=b` lacks its key: write key=value"),
    ] {
        assert_eq!(error::<DiskConfig>(text), expected, "{text}");
    }
}

#[test]
fn cpus_and_memory() {
    assert_eq!("4".parse(), Ok(CpuConfig::new(4)));
    let expected = CpuConfig {
        count: 4,
        sockets: Some(1),
        cores: Some(2),
        threads: Some(2),
    };
    assert_eq!("4,sockets=1,cores=2,threads=2".parse(), Ok(expected));
    assert_eq!(
        error::<CpuConfig>("300"),
        "`300` can't be `count`: write a whole number from 0 to 255"
    );
    assert_eq!(
        "512M".parse(),
        Ok(MemoryConfig {
            size: ByteSize::mib(512),
            hugepages: false,
            balloon: true,
        })
    );
    assert_eq!(
        "2G,hugepages".parse(),
        Ok(MemoryConfig {
            size: ByteSize::mib(2048),
            hugepages: true,
            balloon: true,
        })
    );
    assert_eq!(
        error::<MemoryConfig>("x"),
        "`size`: `x` is not a size: write a whole number and K, M, G or T, like 512M"
    );
}

#[test]
fn nets() {
    assert_eq!("user".parse(), Ok(NetConfig::user()));
    let mac = Some(MacAddr([0x52, 0x54, 0, 0, 0, 1]));
    let backend = NetBackendConfig::Tap {
        tap: "tap0".into(),
        lease: None,
    };
    assert_eq!(
        "tap=tap0,mac=52:54:00:00:00:01".parse(),
        Ok(NetConfig {
            backend,
            mac,
            bootindex: None
        })
    );
    let leased: NetConfig = "tap=tap0,address=10.42.0.7/24,gateway=10.42.0.1,dns=10.43.0.10,\
                             routes=10.42.0.0/16@10.42.0.1,search=a,search=b,hostname=till"
        .parse()
        .unwrap();
    let NetBackendConfig::Tap {
        lease: Some(lease), ..
    } = &leased.backend
    else {
        panic!()
    };
    assert_eq!(lease.address, Some("10.42.0.7/24".parse().unwrap()));
    assert_eq!((lease.routes.len(), lease.search.len()), (1, 2));
    let text = serde_json::to_string(&leased).unwrap();
    assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), leased);
    let leased: NetConfig = "tap=tap0,address6=fd00::7/64,gateway6=02:00:00:00:00:01,dns=fd00::a"
        .parse()
        .unwrap();
    let text = serde_json::to_string(&leased).unwrap();
    assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), leased);
    let net: NetConfig = "user,forwards=2222:22,forwards=udp:53:53,host_loopback"
        .parse()
        .unwrap();
    let NetBackendConfig::User {
        forwards,
        host_loopback: true,
    } = net.backend
    else {
        panic!()
    };
    assert_eq!(forwards.len(), 2);
    assert!(error::<NetConfig>("tap0").contains("did you mean `tap`?"));
    assert!(error::<NetConfig>("tap").contains("write tap=NAME"));
    assert!(error::<NetConfig>("user,mac=1").starts_with("`mac`: `1` is not a MAC address"));
}

#[test]
fn consoles() {
    let console = |output, device| Ok(ConsoleConfig { output, device });
    let file = ConsoleOutput::File("out,put".into());
    assert_eq!(
        "pty".parse(),
        console(ConsoleOutput::Pty, ConsoleDevice::Serial)
    );
    assert_eq!(
        "none".parse(),
        console(ConsoleOutput::None, ConsoleDevice::Serial)
    );
    assert_eq!(
        "stdio,device=virtio".parse(),
        console(ConsoleOutput::Stdio, ConsoleDevice::Virtio)
    );
    assert_eq!(
        "file=out,,put,device=virtio".parse(),
        console(file, ConsoleDevice::Virtio)
    );
    assert!(error::<ConsoleConfig>("file").contains("more"));
    assert!(error::<ConsoleConfig>("device=serial,file").contains("write file=PATH"));
    assert!(error::<ConsoleConfig>("file=a,file=b").contains("write file=PATH"));
    assert!(error::<ConsoleConfig>("pty,file=b").contains("one place"));
    assert!(error::<ConsoleConfig>("ptty").contains("did you mean `pty`?"));
}

proptest! {
    #[test]
    fn any_path_can_be_escaped(path in "[^\0]+", serial in "[ -~]{0,20}") {
        let text = format!("path={},serial={}", escape_value(&path), escape_value(&serial));
        let disk: DiskConfig = text.parse().unwrap();
        prop_assert_eq!(disk.path, PathBuf::from(path));
        prop_assert_eq!(disk.serial, Some(serial));
    }

    #[test]
    fn no_text_panics(text in "[a-z0-9=,:é]*") {
        let _ = text.parse::<DiskConfig>();
        let _ = text.parse::<NetConfig>();
        let _ = text.parse::<CpuConfig>();
        let _ = text.parse::<ConsoleConfig>();
    }
}
