//! The builders inside the binary: the folder `builders/` as it was when the program was compiled.

use include_dir::{Dir, include_dir};

/// The folder `builders/`.
static BUILDERS: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/builders");

/// The names of the builders, sorted: the folders that hold a `builder.yaml`.
pub fn builder_names() -> Vec<&'static str> {
    let folders = BUILDERS.dirs().filter(|dir| dir.get_file(dir.path().join("builder.yaml")).is_some());
    let mut names: Vec<&str> = folders.filter_map(|dir| dir.path().to_str()).collect();
    names.sort_unstable();
    names
}

/// The folder of the builder `name`.
pub fn builder(name: &str) -> Option<&'static Dir<'static>> {
    builder_names().contains(&name).then(|| BUILDERS.get_dir(name)).flatten()
}
