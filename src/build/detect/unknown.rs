//! What to say about a folder that no builder fits: what was seen, and a builder to begin with.

use super::{Folder, one_line};
use crate::build::builder::Meta;
use crate::config::diagnostic::quoted;
use crate::error::Problem;

/// A language there is no builder for, and how one could begin.
struct Known {
    file: &'static str,
    language: &'static str,
    packages: &'static str,
    build_packages: &'static str,
    inputs: &'static str,
    dependencies: &'static str,
    assemble: &'static str,
    run: &'static str,
}

/// By the file that tells; what stands in the scripts is a beginning, not a promise.
const KNOWN: [Known; 6] = [
    Known {
        file: "go.mod",
        language: "Go",
        packages: "ca-certificates",
        build_packages: "ca-certificates, golang-go",
        inputs: "go.mod, go.sum",
        dependencies: "cd /tmp/src && go mod download",
        assemble: "cd /tmp/src && go build -o /opt/app/app .",
        run: "exec /opt/app/app",
    },
    Known {
        file: "Cargo.toml",
        language: "Rust",
        packages: "ca-certificates",
        build_packages: "ca-certificates, cargo",
        inputs: "Cargo.toml, Cargo.lock",
        dependencies: "cd /tmp/src && mkdir -p src && touch src/main.rs && cargo fetch --locked",
        assemble: "cd /tmp/src && cargo build --release --locked --offline && install -D -t /opt/app target/release/NAME",
        run: "exec /opt/app/NAME",
    },
    Known {
        file: "pom.xml",
        language: "Java with Maven",
        packages: "default-jre-headless",
        build_packages: "ca-certificates, default-jdk-headless, maven",
        inputs: "pom.xml",
        dependencies: "cd /tmp/src && mvn -B dependency:go-offline",
        assemble: "cd /tmp/src && mvn -B -o package && install -D target/*.jar /opt/app/app.jar",
        run: "exec java -jar /opt/app/app.jar",
    },
    Known {
        file: "Gemfile",
        language: "Ruby",
        packages: "bundler, ruby",
        build_packages: "build-essential, ca-certificates, ruby-dev",
        inputs: "Gemfile, Gemfile.lock",
        dependencies: "cd /tmp/src && BUNDLE_PATH=/opt/gems bundle install",
        assemble: "mkdir -p /opt/app && cp -a /tmp/src/. /opt/app/",
        run: "BUNDLE_PATH=/opt/gems exec bundle exec rackup -o 0.0.0.0 -p 8080",
    },
    Known {
        file: "composer.json",
        language: "PHP",
        packages: "php-cli",
        build_packages: "ca-certificates, composer",
        inputs: "composer.json, composer.lock",
        dependencies: "mkdir -p /opt/app && cp /tmp/src/composer.* /opt/app && cd /opt/app && composer install --no-dev --no-scripts",
        assemble: "mkdir -p /opt/app && cp -a /tmp/src/. /opt/app/",
        run: "exec php -S 0.0.0.0:8080 -t /opt/app/public",
    },
    Known {
        file: "",
        language: "",
        packages: "ca-certificates",
        build_packages: "make",
        inputs: "LOCK-FILE",
        dependencies: "cd /tmp/src && echo 'install what LOCK-FILE names'",
        assemble: "cd /tmp/src && make && make install DESTDIR=/opt/app",
        run: "exec /opt/app/PROGRAM",
    },
];

impl Known {
    /// The files of a builder to begin with: path, text, and what the file is for.
    fn example(&self) -> [(&'static str, String, &'static str); 4] {
        let name = self.language.split(' ').next().filter(|word| !word.is_empty()).unwrap_or("mine").to_lowercase();
        let yaml = format!(
            "name: {name}\nsummary: {} applications\npackages: [{}]\nbuild_packages: [{}]\ndependencies: {{ inputs: [{}] }}\nport: 8080\n",
            if self.language.is_empty() { "My" } else { self.language },
            self.packages,
            self.build_packages,
            self.inputs
        );
        let script = |line: &str| format!("#!/bin/sh -e\n{line}\n");
        [
            ("builder.yaml", yaml, "what it needs"),
            ("s2i/bin/dependencies", script(self.dependencies), "has the network, and sees only the inputs in /tmp/src"),
            ("s2i/bin/assemble", script(self.assemble), "has no network, and all of the source in /tmp/src"),
            ("s2i/bin/run", script(self.run), "starts the application"),
        ]
    }
}

/// What was seen, and what to write.
pub(super) fn problem(folder: &Folder<'_>, builders: &[&Meta]) -> Problem {
    let known: Vec<&Known> = KNOWN.iter().filter(|known| folder.has(known.file)).collect();
    let mut seen: Vec<String> = known.iter().map(|known| format!("`{}` ({})", known.file, known.language)).collect();
    seen.extend(
        ["Dockerfile", "Containerfile", "Makefile"].iter().filter(|name| folder.has(name)).map(|name| format!("`{name}`")),
    );
    if seen.is_empty() {
        seen.extend(folder.files.iter().take(5).map(|name| format!("`{}`", one_line(name))));
    }
    let seen = if seen.is_empty() { "it has no files".into() } else { format!("saw {}", seen.join(", ")) };
    let mut problem = Problem::failed(format!("no builder fits {}: {seen}", folder.dir.display()));
    let wants =
        builders.iter().filter_map(|meta| Some(format!("`{}` looks for {}", meta.name, quoted(&meta.detect.as_ref()?.any))));
    let wants: Vec<String> = wants.collect();
    if !wants.is_empty() {
        problem = problem.hint(wants.join("; "));
    }
    if folder.files.is_empty() {
        return problem.hint("go to the folder with the source and call `pipeline init` there");
    }
    if folder.has("Dockerfile") || folder.has("Containerfile") {
        problem = problem.hint(
            "a Dockerfile is not read: its `FROM` becomes `base`, its `RUN` lines the scripts of a builder, its `EXPOSE` and `CMD` \
             `image.port` and `image.command`",
        );
    }
    let known = known.first().copied().unwrap_or(&KNOWN[KNOWN.len() - 1]);
    let mut text = String::from(
        "write a builder in the folder `builder/`, and a `pipeline.yaml` with `name: …`, `base: { debian: trixie }` and \
         `runtime: { builder: ./builder }`; to begin with:",
    );
    for (path, content, purpose) in known.example() {
        text += &format!("\n  builder/{path}: {purpose}");
        for line in content.lines() {
            text += &format!("\n    {line}");
        }
    }
    problem.hint(text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::build::builder::Builder;

    #[test]
    fn the_examples_are_whole_builders() {
        for known in &KNOWN {
            let files: BTreeMap<String, Vec<u8>> =
                known.example().into_iter().map(|(path, text, _)| (path.to_owned(), text.into_bytes())).collect();
            let builder = Builder::from_files(Path::new("builder"), files).unwrap();
            assert_eq!(builder.meta.port, Some(8080), "{}", known.file);
        }
    }
}
