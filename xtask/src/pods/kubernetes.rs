//! Kubernetes built from a distribution's source package: the newest that is in any, and old enough
//! to need nothing but its own sources.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::packages::{self, Apt, Mirror};
use crate::process;
use crate::progress::step;

/// The release whose packages fit together.
const SUITE: &str = "bookworm";
/// The compiler that the sources were written for, with its library.
const COMPILER: [&str; 2] = ["golang-1.19-go", "golang-1.19-src"];
const GOROOT: &str = "usr/lib/go-1.19";
/// The import path that all of the source tree's own imports begin with.
const IMPORT: &str = "k8s.io/kubernetes";

const PROGRAMS: [&str; 4] = [
    "./cmd/kubelet",
    "./cmd/kube-apiserver",
    "./cmd/kube-controller-manager",
    "./cmd/kube-scheduler",
];

/// The kubelet's client for the container runtime, which names an interface that newer runtimes
/// have under its final name only. The messages are the same.
const RUNTIME_CLIENT: &str = "vendor/k8s.io/cri-api/pkg/apis/runtime/v1alpha2/api.pb.go";
/// Where the kubelet waits five seconds for a Docker that is not there.
const DOCKER_FACTORY: &str = "vendor/github.com/google/cadvisor/container/docker/factory.go";
/// What iterates over maps for JSON, in a way that Go's own library had before 1.18; with this compiler
/// the API server dies at the first object of a custom resource.
const MAP_ITERATOR: &str = "vendor/github.com/modern-go/reflect2/unsafe_map.go";
const OLD_ITERATION: &str = "
func (type2 *UnsafeMapType) UnsafeIterate(obj unsafe.Pointer) MapIterator {
	return &UnsafeMapIterator{
		hiter:      mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj)),
";
/// The caller makes the iterator, of which `hiter` is the beginning only.
const NEW_ITERATION: &str = "
type wholeIterator struct {
	hiter
	pointers [6]unsafe.Pointer
	numbers  [4]uint64
}

//go:linkname beginIteration reflect.mapiterinit
func beginIteration(rtype, m unsafe.Pointer, iterator *wholeIterator)

func (type2 *UnsafeMapType) UnsafeIterate(obj unsafe.Pointer) MapIterator {
	iterator := new(wholeIterator)
	beginIteration(type2.rtype, *(*unsafe.Pointer)(obj), iterator)
	return &UnsafeMapIterator{
		hiter:      &iterator.hiter,
";

/// Whether `mirror` has what is needed.
pub(super) fn exists(mirror: &Mirror) -> bool {
    mirror.guest_suite() == SUITE
}

/// Puts Kubernetes' programs, etcd and kubectl into `dir`.
pub(super) fn make(mirror: &Mirror, apt: &Path, dir: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(dir)?;
    let build = Build {
        goroot: work.path().join("compiler").join(GOROOT),
        work: work.path().to_owned(),
    };
    step("Downloading Kubernetes' sources and a compiler", || {
        build.fetch(mirror, apt, dir)
    })?;
    step("Building Kubernetes (minutes, once)", || build.build(dir))
}

/// A build in a directory of its own.
struct Build {
    work: PathBuf,
    goroot: PathBuf,
}

impl Build {
    fn fetch(&self, mirror: &Mirror, apt: &Path, dir: &Path) -> Result<()> {
        let binaries = Apt::open(apt, mirror, SUITE)?;
        let compiler = binaries.download(&COMPILER, |file| file.starts_with("golang-1.19-"))?;
        packages::unpack(&compiler, &self.work.join("compiler"))?;
        let ready = binaries.download(&["etcd-server", "kubernetes-client"], |file| {
            file.starts_with("etcd-server_") || file.starts_with("kubernetes-client_")
        })?;
        packages::unpack(&ready, &self.work.join("ready"))?;
        for program in ["etcd", "kubectl"] {
            let from = self.work.join("ready/usr/bin").join(program);
            fs::copy(&from, dir.join(program))
                .with_context(|| format!("There is no {}", from.display()))?;
        }
        let archive = Apt::open_sources(apt, mirror, SUITE)?.source("kubernetes")?;
        fs::create_dir_all(self.tree())?;
        let mut tar = Command::new("tar");
        tar.arg("-xf").arg(archive).arg("-C").arg(self.tree());
        process::output(tar.arg("--strip-components=1")).map(drop)
    }

    fn build(&self, dir: &Path) -> Result<()> {
        self.generate()?;
        let replaced = self.replacements()?;
        let version = format!("{IMPORT}/vendor/k8s.io/component-base/version");
        let flags = format!(
            "-s -w -X {version}.gitVersion=v1.20.2 -X {version}.gitMajor=1 -X {version}.gitMinor=20"
        );
        let mut output = OsString::from(dir);
        output.push("/");
        let mut go = self.go();
        go.arg("build").arg("-overlay").arg(replaced);
        go.arg("-ldflags").arg(flags).arg("-o").arg(output);
        process::output(go.args(PROGRAMS)).map(drop)
    }

    /// Makes the one source file that the package does not have: the API's description.
    fn generate(&self) -> Result<()> {
        let generator = self.work.join("openapi-gen");
        let mut go = self.go();
        go.arg("build").arg("-o").arg(&generator);
        process::output(go.arg("./vendor/k8s.io/kube-openapi/cmd/openapi-gen"))?;
        let mut generate = self.in_tree(Command::new(&generator));
        generate.arg("-i").arg(self.described()?.join(","));
        generate.args(["-p", "k8s.io/kubernetes/pkg/generated/openapi"]);
        generate.args(["-O", "zz_generated.openapi", "-h"]);
        generate.arg("vendor/k8s.io/code-generator/hack/boilerplate.go.txt");
        generate.arg("-r").arg(self.work.join("violations"));
        process::output(&mut generate).map(drop)
    }

    /// The packages whose types are part of the API's description.
    fn described(&self) -> Result<Vec<String>> {
        let mut grep = self.in_tree(Command::new("grep"));
        grep.args(["-R", "-l", "--include=*.go", "^// +k8s:openapi-gen="]);
        grep.args(["pkg", "cmd", "plugin", "vendor/k8s.io"]);
        let files = process::output(&mut grep)?;
        let left_out = [
            "/testdata/",
            "/_examples/",
            "vendor/k8s.io/code-generator/",
            "vendor/k8s.io/sample-apiserver/",
        ];
        let folders: BTreeSet<String> = files
            .lines()
            .filter(|file| !left_out.iter().any(|part| file.contains(part)))
            .filter_map(|file| file.rsplit_once('/'))
            .map(|(folder, _)| format!("{IMPORT}/{folder}"))
            .collect();
        Ok(folders.into_iter().collect())
    }

    /// Writes changed copies of sources, and the file that tells the compiler to take those.
    fn replacements(&self) -> Result<PathBuf> {
        let changes = [
            (RUNTIME_CLIENT, "\"/runtime.v1alpha2.", "\"/runtime.v1."),
            (
                DOCKER_FACTORY,
                "const rootDirRetries = 5",
                "const rootDirRetries = 0",
            ),
            (MAP_ITERATOR, OLD_ITERATION, NEW_ITERATION),
        ];
        let mut replaced = serde_json::Map::new();
        for (number, (file, from, to)) in changes.into_iter().enumerate() {
            let original = self.tree().join(file);
            let text = fs::read_to_string(&original)
                .with_context(|| format!("Cannot read {}", original.display()))?;
            ensure!(text.contains(from), "{file} has no {from}");
            let copy = self.work.join(format!("replaced-{number}.go"));
            fs::write(&copy, text.replace(from, to))?;
            replaced.insert(
                original.display().to_string(),
                copy.display().to_string().into(),
            );
        }
        let list = self.work.join("replaced.json");
        fs::write(
            &list,
            serde_json::json!({ "Replace": replaced }).to_string(),
        )?;
        Ok(list)
    }

    fn tree(&self) -> PathBuf {
        self.work.join("go/src").join(IMPORT)
    }

    fn go(&self) -> Command {
        self.in_tree(Command::new(self.goroot.join("bin/go")))
    }

    fn in_tree(&self, mut command: Command) -> Command {
        command.current_dir(self.tree());
        command.env("GOROOT", &self.goroot);
        command.env("GOPATH", self.work.join("go"));
        command.env("GOCACHE", self.work.join("cache"));
        // The tree's list of modules does not fit the modules that it brings with it.
        command.env("GO111MODULE", "off").env("GOFLAGS", "");
        command.env("CGO_ENABLED", "0");
        command
    }
}
