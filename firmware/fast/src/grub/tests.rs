#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::Reason;

/// Files by device and path, and UUIDs and labels of devices.
#[derive(Default)]
struct Fake {
    files: BTreeMap<(String, String), Vec<u8>>,
    names: BTreeMap<String, String>,
}

impl Fake {
    fn file(mut self, device: &str, path: &str, text: &str) -> Self {
        let place = (device.to_owned(), path.to_owned());
        self.files.insert(place, text.into());
        self
    }

    fn name(mut self, name: &str, device: &str) -> Self {
        self.names.insert(name.to_owned(), device.to_owned());
        self
    }

    /// What `script` starts, as text.
    fn start(self, script: &str) -> Result<String, Decline> {
        let fake = self.file("hd0,gpt3", "/boot/grub/grub.cfg", script);
        let linux = run(&fake, "hd0,gpt3", "/boot/grub/grub.cfg")?;
        let place = |place: &Place| format!("({}){}", place.device, place.path);
        let initrds: Vec<_> = linux.initrds.iter().map(place).collect();
        let kernel = place(&linux.kernel);
        Ok(format!(
            "{kernel} [{}] {}",
            initrds.join(" "),
            linux.command_line
        ))
    }
}

impl Devices for Fake {
    fn read(&self, device: &str, path: &str) -> Result<Option<Vec<u8>>, Decline> {
        let place = (device.to_owned(), path.to_owned());
        Ok(self.files.get(&place).cloned())
    }

    fn kind(&self, device: &str, path: &str) -> Result<Option<Kind>, Decline> {
        let file = self.read(device, path)?;
        Ok(file.map(|file| Kind::File(file.len() as u64)))
    }

    fn names(&self, device: &str, path: &str) -> Result<Vec<String>, Decline> {
        let names = self.files.keys().filter(|(on, _)| on == device);
        let names = names.filter_map(|(_, file)| file.strip_prefix(path)?.strip_prefix('/'));
        Ok(names.map(str::to_owned).collect())
    }

    fn search(&self, _: By, value: &str) -> Result<Option<String>, Decline> {
        Ok(self.names.get(value).cloned())
    }
}

fn start(script: &str) -> Result<String, Decline> {
    Fake::default().start(script)
}

fn declined(result: Result<String, Decline>) -> String {
    let decline = result.unwrap_err();
    assert_eq!(decline.reason, Reason::Config, "{decline}");
    decline.text
}

/// A menu of entries that start kernels of these names, and a submenu.
const MENU: &str = "menuentry 'First one' --class os $menuentry_id_option 'first' { linux /1 }\n\
    menuentry \"Second\" --id=second { linux /2 a=b }\n\
    submenu 'More > this' --id more {\n\
      menuentry 'Third' --id third { linux /3\n initrd /i }\n\
      menuentry Fourth { linux /4 }\n\
    }\n";

/// The shape of what distributions generate: environment block, functions, feature tests, hints.
const DISTRIBUTION: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
  set default="${next_entry}"; set next_entry=; save_env next_entry; set boot_once=true
else
  set default="${saved_entry}"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then saved_entry="${chosen}"; save_env saved_entry; fi
}
function recordfail {
  set recordfail=1
  if [ -n "${have_grubenv}" ]; then if [ -z "${boot_once}" ]; then save_env recordfail; fi; fi
}
function load_video {
  if [ x$feature_all_video_module = xy ]; then insmod all_video; else insmod efi_gop; fi
}
if [ x$feature_default_font_path = xy ] ; then
   font=unicode
else
   insmod part_gpt
   search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt3 AAAA
   font="/usr/share/grub/unicode.pf2"
fi
if loadfont $font ; then
  set gfxmode=auto; load_video; insmod gfxterm
fi
terminal_output gfxterm
if [ "${recordfail}" = 1 ] ; then
  set timeout=30
else
  if [ x$feature_timeout_style = xy ] ; then set timeout_style=menu; set timeout=5
  # Fallback normal timeout code in case the timeout_style feature is unavailable.
  else set timeout=5; fi
fi
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux $menuentry_id_option 'gnulinux-simple' {
	load_video
	recordfail
	savedefault
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	set root='hd0,gpt1'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1 --hint-efi=hd0,gpt1  11-22
	else
	  search --no-floppy --fs-uuid --set=root 11-22
	fi
	echo	'Loading Linux 6.1 ...'
	linux	/boot/vmlinuz-6.1 root=UUID=11-22 ro  quiet
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced' {
	menuentry 'Linux 5.10' --class debian $menuentry_id_option 'gnulinux-5.10' {
	linux	/boot/vmlinuz-5.10 ro single
	}
}
if [ "$grub_platform" = "efi" ]; then
	fwsetup --is-supported
fi
if [ -f  ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
elif [ -z "${config_directory}" -a -f  $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
"#;

fn environment(lines: &str) -> String {
    format!("# GRUB Environment Block\n{lines}{}", "#".repeat(512))
}

#[test]
fn the_configuration_of_a_distribution_starts_its_default() {
    let fake = || {
        Fake::default()
            .name("11-22", "hd0,gpt3")
            .name("AAAA", "hd0,gpt3")
    };
    let first = "(hd0,gpt3)/boot/vmlinuz-6.1 [(hd0,gpt3)/boot/initrd.img-6.1] \
        BOOT_IMAGE=/boot/vmlinuz-6.1 root=UUID=11-22 ro quiet";
    assert_eq!(fake().start(DISTRIBUTION).unwrap(), first);
    let grubenv = |lines: &str| fake().file("hd0,gpt3", "/boot/grub/grubenv", &environment(lines));
    let saved = "saved_entry=gnulinux-advanced>gnulinux-5.10\nrecordfail=1\n";
    let second = "(hd0,gpt3)/boot/vmlinuz-5.10 [] BOOT_IMAGE=/boot/vmlinuz-5.10 ro single";
    assert_eq!(grubenv(saved).start(DISTRIBUTION).unwrap(), second);
    let once = declined(grubenv("next_entry=1\n").start(DISTRIBUTION));
    assert!(once.contains("once"), "{once}");
    let custom = fake().file(
        "hd0,gpt3",
        "/boot/grub/custom.cfg",
        "set default=x\nmenuentry x { linux /x }\n",
    );
    assert_eq!(
        custom.start(DISTRIBUTION).unwrap(),
        "(hd0,gpt3)/x [] BOOT_IMAGE=/x"
    );
}

#[test]
fn defaults_are_numbers_titles_ids_and_paths() {
    for (default, kernel) in [
        ("", "/1"),
        ("0", "/1"),
        ("1", "/2 a=b"),
        ("7", "/1"),
        ("Second", "/2 a=b"),
        ("second", "/2 a=b"),
        ("nothing", "/1"),
        ("2>1", "/4"),
        ("more>third", "/3"),
        ("More >> this>Fourth", "/4"),
        ("more>0", "/3"),
        ("First one", "/1"),
    ] {
        let line = start(&format!("set timeout=0\nset default='{default}'\n{MENU}")).unwrap();
        assert!(
            line.ends_with(&format!("BOOT_IMAGE={kernel}")),
            "{default}: {line}"
        );
    }
    let submenu = declined(start(&format!("set timeout=0\nset default=2\n{MENU}")));
    assert_eq!(submenu, "GRUB's default entry is a submenu");
}

#[test]
fn words_are_split_and_quoted_as_in_grub() {
    for (words, line) in [
        ("a 'b  c' \"d e\" f\\ g", "a \"b  c\" \"d e\" \"f g\""),
        ("$list", "one two"),
        ("\"$list\"", "\"one two\""),
        ("x${list}y", "xone twoy"),
        ("$nothing '' end", " end"),
        ("a=$one${two}", "a=12"),
        ("'$one' \\$one \"\\$one\"", "$one $one $one"),
        ("quote=\"it's\"", "quote=it\\'s"),
        ("# comment", ""),
        ("a#b", "a#b"),
        ("a\\\nb", "ab"),
    ] {
        let script = format!("set one=1; set two=2; set list='one two'\nlinux /k {words}\nboot\n");
        let expected = format!("(hd0,gpt3)/k [] BOOT_IMAGE=/k {line}");
        assert_eq!(start(&script).unwrap(), expected.trim_end(), "{words}");
    }
}

#[test]
fn conditions_hold_as_in_grub() {
    for (condition, holds) in [
        ("[ a = a ]", true),
        ("[ a == b ]", false),
        ("[ a != b ]", true),
        ("[ a ]", true),
        ("[ \"\" ]", false),
        ("[ -z \"\" ]", true),
        ("[ -n $unset ]", true),
        ("[ ! a = b ]", true),
        ("[ 9 -lt 10 ]", true),
        ("[ 9 -ge 10 ]", false),
        ("[ a = b -o c = c ]", true),
        ("[ a = a -a c = d ]", false),
        ("[ ( a = b -o a = a ) -a ! b = c ]", true),
        ("[ -f /boot/grub/grub.cfg ]", true),
        ("[ -e /nothing ]", false),
        ("[ -s (hd0,gpt3)/boot/grub/grub.cfg ]", true),
        ("[ -e (hd9)/x ]", false),
        ("true", true),
        ("false", false),
        ("test a = a", true),
        ("false; true", true),
        ("search --set=x --label nothing", false),
    ] {
        let script = format!("if {condition}; then linux /yes; else linux /no; fi; boot");
        let expected = if holds { "/yes" } else { "/no" };
        let line = start(&script).unwrap();
        assert!(line.ends_with(expected), "{condition}: {line}");
    }
}

#[test]
fn functions_take_arguments_and_entries_their_rest() {
    let script = "function f { set x=\"$1-$2-$#\"; }\nf a b\nset timeout=0\n\
        menuentry t one two --unrestricted { linux /k $x $1 $2 $3 }\n";
    let line = start(script).unwrap();
    assert!(line.ends_with("BOOT_IMAGE=/k a-b-2 t one two"), "{line}");
}

#[test]
fn boot_loader_entries_are_a_menu_from_new_to_old() {
    let entry = |version: &str| {
        format!(
            "title Linux {version}\nlinux /vmlinuz-{version}\ninitrd /initrd-{version} $tuned\noptions root=/dev/vda2 $kernelopts\n"
        )
    };
    let fake = || {
        let fake = Fake::default().name("boot", "hd0,gpt2");
        let fake = fake.file("hd0,gpt2", "/loader/entries/id-6.9.conf", &entry("6.9"));
        fake.file("hd0,gpt2", "/loader/entries/id-6.10.conf", &entry("6.10"))
    };
    let script = |default: &str| {
        format!(
            "set timeout=1\nset default=\"{default}\"\nset kernelopts='quiet ro'\n\
            search --no-floppy --label boot --set=root\ninsmod blscfg\nblscfg\n"
        )
    };
    let newest = "(hd0,gpt2)/vmlinuz-6.10 [(hd0,gpt2)/initrd-6.10] \
        BOOT_IMAGE=/vmlinuz-6.10 root=/dev/vda2 quiet ro";
    assert_eq!(fake().start(&script("")).unwrap(), newest);
    let older = fake().start(&script("id-6.9")).unwrap();
    assert!(older.contains("/vmlinuz-6.9 "), "{older}");
}

#[test]
fn what_grub_would_ask_or_write_is_declined() {
    for (script, text) in [
        (MENU, "GRUB would wait for a choice from its menu"),
        (
            &format!("set timeout=-1\n{MENU}"),
            "GRUB would wait for a choice from its menu",
        ),
        (
            &format!("set timeout=1\nset superusers=root\n{MENU}"),
            "GRUB would ask for a password",
        ),
        (
            "save_env boot_counter",
            "GRUB would save \"boot_counter\" to the disk",
        ),
        ("set timeout=1", "GRUB's menu is empty"),
        (
            "chainloader +1",
            "GRUB's command \"chainloader\" is not known",
        ),
        (
            "for x in a b; do echo $x; done",
            "GRUB's configuration has a loop",
        ),
        (
            "while true; do echo; done",
            "GRUB's configuration has a loop",
        ),
        (
            "set timeout=1; menuentry x { true }",
            "GRUB's default entry starts no Linux",
        ),
        (
            "initrd /x",
            "GRUB's configuration has a RAM disk without a kernel",
        ),
        (
            "source /missing",
            "GRUB's configuration has no file /missing",
        ),
        ("linux vmlinuz", "GRUB's configuration names \"vmlinuz\""),
        (
            "[ a -nt b ]",
            "GRUB's configuration has a test with \"-nt\"",
        ),
        (
            "search --bogus x",
            "GRUB's command \"search --bogus\" is not known",
        ),
    ] {
        assert_eq!(declined(start(script)), text, "{script}");
    }
    // What is not reached is no matter.
    let line = start("if false; then chainloader +1; fi; linux /k; boot").unwrap();
    assert!(line.ends_with("/k"), "{line}");
}

#[test]
fn hostile_scripts_end() {
    let deep = |open: &str, close: &str| open.repeat(100_000) + &close.repeat(100_000);
    for script in [
        "function f { f; f; }\nf\n".to_owned(),
        "source /boot/grub/grub.cfg\n".to_owned(),
        "set x=1234567890\n".to_owned() + &"set x=$x$x$x$x\n".repeat(40),
        deep("if true; then ", "fi; "),
        deep("menuentry a { ", "}\n"),
        "[ ".to_owned() + &"( ".repeat(100_000),
        "[ ".to_owned() + &"! ".repeat(100_000) + "a ]",
        "linux /k ".to_owned() + &"a ".repeat(100_000),
        "menuentry a { true }\n".repeat(40_000),
        "'".to_owned(),
        "if".to_owned(),
        "{".to_owned(),
        "}".to_owned(),
        "${".to_owned(),
    ] {
        declined(start(&script));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn any_script_starts_something_or_is_declined(
        parts in prop::collection::vec(prop::sample::select(vec![
            "if ", "then ", "else ", "fi\n", "menuentry ", "{", "}\n", "function f ", "f ", "[ ", "] ",
            "-a ", "-e ", "! ", "( ", ") ", "= ", "\"", "'", "$x", "${", "set x=", "linux /k ", "boot\n",
            "search ", "--set=root ", "load_env ", ";", "\n", "\\", "submenu ", "blscfg\n", "source ",
        ]), 0..60),
    ) {
        let _ = start(&parts.concat());
    }
}
