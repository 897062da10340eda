//! `install` and `uninstall`: make containerd, by itself or k3s's, know this program as a runtime for
//! pods.
//!
//! Everything is planned before anything is changed. Installing twice changes nothing the second time;
//! files that others wrote keep all of their own.

mod change;
mod runtime;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Args;
use edgevmm_api::RuntimeDir;
use edgevmm_vmm::boot::fast;
use serde::Serialize;

use crate::exit::{Failure, Outcome};
use change::{Change, Verb, read, read_text};
use runtime::Version;
pub use runtime::{cri_is_off, shim_in};

/// Programs, in the order in which they are put in place: whoever finds the shim finds the others.
const PROGRAMS: [&str; 3] = [OPTIONAL, VMM, SHIM];
/// The one that the others need.
const VMM: &str = "edgevmm";
/// Not needed to run machines.
const OPTIONAL: &str = "edgevmm-fast";
/// What is told where that is missing.
const NO_FAST: &str = "for machines with the firmware `fast`, put edgevmm-fast beside edgevmm";
/// containerd's shim.
pub const SHIM: &str = "containerd-shim-edgevmm-v1";
/// Where k3s has all that is its own.
pub const K3S: &str = "var/lib/rancher/k3s";
/// containerd's configuration.
pub const CONTAINERD: &str = "etc/containerd/config.toml";
/// What k3s applies when it starts, below its folder.
const MANIFEST: &str = "server/manifests/edgevmm.yaml";
/// First line of the manifest, as long as it is ours.
const MANIFEST_MARK: &str = "# written by edgevmm install\n";
/// Where machines of pods have their sockets.
const MACHINES: &str = "run/edgevmm";

/// What `install` takes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  edgevmm install --k3s\n  \
                        edgevmm install --containerd --dry-run\n  \
                        edgevmm install --runtime-class | kubectl apply -f -")]
pub struct InstallArgs {
    #[command(flatten)]
    pub target: TargetArgs,
    /// Print the RuntimeClass for Kubernetes and change nothing
    #[arg(long, conflicts_with_all = ["k3s", "containerd", "dry_run", "json"])]
    pub runtime_class: bool,
    /// Have pods with machines run on nodes with this label only, beside those of this architecture
    #[arg(long, value_name = "LABEL=VALUE")]
    pub node_selector: Vec<String>,
}

/// What is changed, and how that is told.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// For the containerd that k3s brings
    #[arg(long, conflicts_with = "containerd")]
    pub k3s: bool,
    /// For containerd by itself. Default: whichever there is
    #[arg(long)]
    pub containerd: bool,
    /// Folder of the programs
    #[arg(long, value_name = "FOLDER", default_value = "/usr/local/bin", value_parser = absolute)]
    pub bin_dir: PathBuf,
    /// Tell what would be changed and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Folder that stands for the host's root
    #[arg(long, value_name = "FOLDER", default_value = "/", hide = true)]
    pub root: PathBuf,
}

/// A folder as containerd is told it, which may be started anywhere.
fn absolute(path: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(path);
    path.is_absolute()
        .then_some(path)
        .ok_or("it must begin with a slash")
}

/// Who runs the containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    K3s,
    Containerd,
}

/// What is done and what is left to do.
#[derive(Debug, Default, Serialize)]
struct Plan {
    changes: Vec<Change>,
    next: Vec<String>,
}

/// Installs.
///
/// # Errors
///
/// When a program is missing, or a file can't be read or written.
pub fn install(args: &InstallArgs) -> Outcome {
    let class = runtime_class(&args.node_selector)?;
    if args.runtime_class {
        print!("{class}");
        return Ok(ExitCode::SUCCESS);
    }
    let target = args.target.find()?;
    let mut plan = Plan::default();
    let own = std::env::current_exe().context("Can't tell where this program is")?;
    plan.programs(&args.target, own.parent().unwrap_or_else(|| Path::new("/")))?;
    let shim = args.target.bin_dir.join(SHIM);
    match target {
        Target::K3s => {
            plan.k3s(&args.target.root, &shim)?;
            let manifest = args.target.root.join(K3S).join(MANIFEST);
            if manifest.parent().is_some_and(Path::is_dir) {
                plan.manifest(&manifest, &class)?;
            } else {
                plan.next.push(CLASS_NEXT.to_owned());
            }
        }
        Target::Containerd => {
            plan.containerd(&args.target.root.join(CONTAINERD), &shim)?;
            plan.next.push(CLASS_NEXT.to_owned());
        }
    }
    plan.carry_out(&args.target, target)
}

const CLASS_NEXT: &str = "edgevmm install --runtime-class | kubectl apply -f -";

/// Takes everything away that [`install`] put in place.
///
/// # Errors
///
/// When machines of pods run, or a file can't be changed.
pub fn uninstall(args: &TargetArgs) -> Outcome {
    let target = args.find()?;
    let machines = RuntimeDir::new(args.root.join(MACHINES)).list();
    let machines = machines.context("Can't tell which machines run")?;
    let of_pods = machines
        .iter()
        .filter(|machine| machine.name().starts_with("pod-"));
    let running = of_pods
        .filter(|machine| machine.is_alive().unwrap_or(true))
        .count();
    if running > 0 && !args.dry_run {
        let error = anyhow!("{running} machines of pods run");
        return Err(Failure::host(error).hint("delete their pods first"));
    }
    let mut plan = Plan::default();
    match target {
        Target::K3s => {
            let k3s = args.root.join(K3S);
            let folder = k3s.join("agent/etc/containerd");
            for name in [
                "config-v3.toml.tmpl",
                "config.toml.tmpl",
                "config-v3.toml.d/edgevmm.toml",
            ] {
                plan.take_out(&folder.join(name))?;
            }
            let manifest = k3s.join(MANIFEST);
            if is_our_manifest(&manifest)? {
                plan.changes.extend(Change::remove(&manifest));
            }
        }
        Target::Containerd => {
            let path = args.root.join(CONTAINERD);
            if let Some(folder) = read_text(&path)?.as_deref().and_then(runtime::drop_ins) {
                plan.take_out(&args.below(&folder).join("edgevmm.toml"))?;
            }
            plan.take_out(&path)?;
        }
    }
    plan.next
        .push("kubectl delete runtimeclass edgevmm".to_owned());
    let programs = PROGRAMS.iter().rev();
    let programs =
        programs.filter_map(|name| Change::remove(&args.below(&args.bin_dir).join(name)));
    plan.changes.extend(programs);
    plan.carry_out(args, target)
}

/// Whether there is a manifest that [`install`] wrote.
fn is_our_manifest(path: &Path) -> anyhow::Result<bool> {
    Ok(read(path)?.is_some_and(|text| text.starts_with(MANIFEST_MARK.as_bytes())))
}

impl TargetArgs {
    fn find(&self) -> Result<Target, Failure> {
        let found = |path: &str| self.root.join(path).exists();
        match () {
            () if self.k3s => Ok(Target::K3s),
            () if self.containerd => Ok(Target::Containerd),
            () if found(K3S) => Ok(Target::K3s),
            () if found("etc/containerd") => Ok(Target::Containerd),
            () => Err(
                Failure::usage(anyhow!("There is neither k3s nor containerd here"))
                    .hint("say which one it is for: --k3s or --containerd"),
            ),
        }
    }

    /// Whether the VMM, where it is put, finds this firmware where it is.
    fn is_found(&self, firmware: &Path) -> bool {
        let places = fast::places(&self.bin_dir.join(VMM));
        self.root == Path::new("/") && places.iter().any(|place| place == firmware)
    }

    /// A path of the host, below the folder that stands for its root.
    fn below(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

impl Plan {
    /// Copies the programs that are in `from`.
    fn programs(&mut self, args: &TargetArgs, from: &Path) -> Result<(), Failure> {
        for name in PROGRAMS {
            let mut path = from.join(name);
            if name == OPTIONAL {
                match fast::find(&from.join(VMM)) {
                    Ok(found) if found != path && args.is_found(&found) => continue,
                    Ok(found) => path = found,
                    Err(_) => {
                        self.next.push(NO_FAST.to_owned());
                        continue;
                    }
                }
            }
            let Some(program) = read(&path)? else {
                let error = anyhow!(
                    "There is no {name} beside this program in {}",
                    from.display()
                );
                return Err(Failure::host(error).hint("`cargo build --release` builds all of them"));
            };
            let path = args.below(&args.bin_dir).join(name);
            self.changes.push(Change::write(&path, program, 0o755)?);
        }
        Ok(())
    }

    /// Puts the runtime into k3s's settings: a drop-in where it imports them, else a template beside
    /// the configuration that it wrote, of the same version. Before its first start both versions are
    /// there, and it takes the one that it knows.
    fn k3s(&mut self, root: &Path, shim: &Path) -> Result<(), Failure> {
        let folder = root.join(K3S).join("agent/etc/containerd");
        let written = read_text(&folder.join("config.toml"))?.unwrap_or_default();
        if runtime::drop_ins(&written).is_some_and(|path| path.ends_with("config-v3.toml.d")) {
            let path = folder.join("config-v3.toml.d/edgevmm.toml");
            let text = runtime::drop_in(&read_text(&path)?.unwrap_or_default(), shim);
            return self.edit(&path, text);
        }
        let v2 = (folder.join("config.toml.tmpl"), Version::V2);
        let v3 = (folder.join("config-v3.toml.tmpl"), Version::V3);
        // k3s takes the newer template where there is one, so a new one must not hide an old one.
        let old_alone = v2.0.exists() && !v3.0.exists();
        let templates = match Version::of(&written) {
            Some(Version::V2) => vec![v2],
            Some(Version::V3) => vec![v3],
            None if old_alone => vec![v2],
            None => vec![v2, v3],
        };
        for (path, version) in templates {
            let text = match read_text(&path)? {
                Some(text) => runtime::with_block(&text, version, shim),
                None => runtime::template(version, shim),
            };
            self.edit(&path, text)?;
        }
        Ok(())
    }

    fn containerd(&mut self, path: &Path, shim: &Path) -> Result<(), Failure> {
        let text = read_text(path)?.unwrap_or_else(|| "version = 2\n".to_owned());
        if cri_is_off(&text) {
            let note = format!("take `cri` out of `disabled_plugins` in {}", path.display());
            self.next.push(note);
        }
        let version = Version::of(&text).ok_or_else(|| {
            let error = anyhow!("{} has no `version = 2` or 3 at its top", path.display());
            Failure::host(error).hint("`containerd config migrate` makes a newer one of it")
        })?;
        self.edit(path, runtime::configuration(&text, version, shim))
    }

    /// Has k3s apply `class`.
    fn manifest(&mut self, path: &Path, class: &str) -> Result<(), Failure> {
        if path.symlink_metadata().is_ok() && !is_our_manifest(path)? {
            let error = anyhow!("{} is not this program's", path.display());
            return Err(Failure::host(error).hint("move it away, or give it another name"));
        }
        let text = format!("{MANIFEST_MARK}{class}");
        self.changes
            .push(Change::write(path, text.into_bytes(), 0o600)?);
        Ok(())
    }

    fn edit(
        &mut self,
        path: &Path,
        text: Result<String, runtime::EditError>,
    ) -> Result<(), Failure> {
        let text = text.with_context(|| format!("Can't change {}", path.display()))?;
        self.changes
            .push(Change::write(path, text.into_bytes(), 0o644)?);
        Ok(())
    }

    /// Takes our block out of a file, and the file away when nothing else is left.
    fn take_out(&mut self, path: &Path) -> Result<(), Failure> {
        let Some(text) = read_text(path)? else {
            return Ok(());
        };
        let left = runtime::without_block(&text);
        let left = left.with_context(|| format!("Can't change {}", path.display()))?;
        if left == text {
            return Ok(());
        }
        match runtime::rest(&left) {
            Some(rest) => self.edit(path, Ok(rest.to_owned())),
            None => {
                self.changes.extend(Change::remove(path));
                Ok(())
            }
        }
    }

    fn carry_out(mut self, args: &TargetArgs, target: Target) -> Outcome {
        let changed = self.changes.iter().any(|change| change.verb != Verb::Keep);
        if changed {
            let restart = match target {
                Target::K3s => "restart k3s (or k3s-agent): what runs goes on",
                Target::Containerd => "restart containerd: what runs goes on",
            };
            self.next.insert(0, restart.to_owned());
        }
        if !args.dry_run {
            self.changes.iter().try_for_each(Change::make)?;
        }
        if args.json {
            let text = serde_json::to_string_pretty(&self).context("Can't write JSON")?;
            println!("{text}");
        } else {
            print!("{}", self.text(args.dry_run));
        }
        Ok(ExitCode::SUCCESS)
    }

    fn text(&self, dry_run: bool) -> String {
        let mut text = String::new();
        for change in &self.changes {
            let verb = match (change.verb, dry_run) {
                (Verb::Keep, _) => "unchanged",
                (Verb::Create, false) => "created",
                (Verb::Create, true) => "would create",
                (Verb::Update, false) => "updated",
                (Verb::Update, true) => "would update",
                (Verb::Remove, false) => "removed",
                (Verb::Remove, true) => "would remove",
            };
            text += &format!("{verb:<12}  {}\n", change.path.display());
        }
        for next in &self.next {
            text += &format!("next          {next}\n");
        }
        text
    }
}

/// The RuntimeClass, which tells the scheduler where such pods run and what they need beside their
/// containers: the shim, and the process that holds the sandbox. The VMM is within its container's
/// limits.
fn runtime_class(selectors: &[String]) -> Result<String, Failure> {
    let mut labels = String::new();
    for selector in selectors {
        let label = selector.split_once('=').filter(|(name, value)| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            !name.is_empty() && name.chars().chain(value.chars()).all(plain)
        });
        let Some((name, value)) = label else {
            let error = anyhow!("`{selector}` is no label of a node");
            return Err(Failure::usage(error).hint("write LABEL=VALUE, like edgevmm.io/kvm=true"));
        };
        labels += &format!("    {name}: \"{value}\"\n");
    }
    Ok(format!(
        "apiVersion: node.k8s.io/v1\n\
         kind: RuntimeClass\n\
         metadata:\n  name: edgevmm\n\
         handler: edgevmm\n\
         overhead:\n  podFixed:\n    memory: 8Mi\n    cpu: 10m\n\
         scheduling:\n  nodeSelector:\n    kubernetes.io/arch: amd64\n{labels}"
    ))
}

#[cfg(test)]
mod tests;
