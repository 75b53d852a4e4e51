//! The clock of the wall jumps: it is shown and written down, and nothing waits by it.

use super::*;

/// A jump, in hours, and the world after it.
fn jump(world: &mut World, hours: i64) {
    world.now.wall = world.now.wall.checked_add(jiff::SignedDuration::from_hours(hours)).unwrap();
    assert_eq!(world.settle(), [""; 0], "{hours} h");
}

#[test]
fn a_jump_moves_no_deadline() {
    for hours in [-1, 1] {
        let mut world = World::with_blue(1, false);
        world.well = false;
        world.want(generation(2, 1, false), false);
        assert_eq!(world.settle(), ["start 1.2"]);
        jump(&mut world, hours);
        world.later(59);
        assert_eq!(world.settle(), [""; 0], "{hours} h");
        world.later(1);
        assert!(world.settle().iter().any(|line| line.starts_with("tell rollback: 0/1 healthy after 60 s")), "{hours} h");
    }
}

#[test]
fn a_jump_ends_neither_watching_nor_what_is_warm() {
    for hours in [-1, 1] {
        let mut world = World::with_blue(1, false);
        world.want(generation(2, 1, false), false);
        assert_eq!(world.settle(), ["start 1.2", "serve 1.2"]);
        jump(&mut world, hours);
        world.later(29);
        assert_eq!((world.settle(), world.phase()), (Vec::new(), Some((Phase::Watching, None))), "{hours} h");
        world.later(1);
        assert_eq!(
            (world.settle(), world.phase()),
            (vec!["report healthy".into()], Some((Phase::Done, Some(Ending::Succeeded))))
        );
        jump(&mut world, hours);
        world.later(899);
        assert_eq!(world.settle(), [""; 0], "{hours} h");
        world.later(1);
        assert_eq!(world.settle(), ["stop 1.1", "forget 1.1"], "{hours} h");
    }
}
