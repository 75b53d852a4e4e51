//! The parts of the static program (`init/`) that only think: tables, names, formats.
//!
//! The program is not part of the library; its sources are compiled into this test once more.

#![allow(dead_code, reason = "each file is here whole; the program uses what the tests do not")]
#![allow(clippy::disallowed_methods, reason = "the tests start the tools that are their witnesses")]

#[path = "../init/alias.rs"]
mod alias;
#[path = "../init/cloud.rs"]
mod cloud;
#[path = "../init/cmdline.rs"]
mod cmdline;
#[path = "../init/ext4.rs"]
mod ext4;
#[path = "../init/fat.rs"]
mod fat;
#[path = "../init/gpt.rs"]
mod gpt;
#[path = "../init/grubenv.rs"]
mod grubenv;
#[path = "../init/guid.rs"]
mod guid;
#[path = "../init/health.rs"]
mod health;
#[path = "../init/kmsg.rs"]
mod kmsg;
#[path = "../init/label.rs"]
mod label;
#[path = "../init/slots.rs"]
mod slots;
#[path = "../init/smbios.rs"]
mod smbios;
#[path = "../init/verity.rs"]
mod verity;
#[path = "../init/wording.rs"]
mod wording;
#[path = "../init/yaml.rs"]
mod yaml;

#[path = "init/boot_tests.rs"]
mod boot_tests;
#[path = "init/cloud_tests.rs"]
mod cloud_tests;
#[path = "init/disk_tests.rs"]
mod disk_tests;
