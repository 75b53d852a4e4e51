//! What makes which step run again, and what does not.

mod common;

use common::{Project, users};

#[test]
fn smoke() {
    for user in users() {
        let project = Project::tiny(user);
        let first = project.build(&[]);
        assert_eq!(first.ran, ["base", "dependencies", "application"]);
        project.assert_clean();
        assert_eq!(project.build(&[]).ran, [""; 0]);
    }
}
