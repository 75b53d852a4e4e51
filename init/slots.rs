//! Slots A and B: how the name of a UKI and GRUB's variables tell their state.

/// A slot of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    A,
    B,
}

impl Slot {
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The slot whose root is the partition with this number.
    pub fn of_partition(number: u32) -> Option<Self> {
        match number {
            3 => Some(Self::A),
            5 => Some(Self::B),
            _ => None,
        }
    }

    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// What the boot loader thinks of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Empty,
    Good,
    /// Tries left, at least one.
    Trying(u32),
    Bad,
}

impl State {
    /// The boot loader would start it.
    pub fn bootable(self) -> bool {
        matches!(self, Self::Good | Self::Trying(_))
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Empty => f.write_str("empty"),
            Self::Good => f.write_str("good"),
            Self::Trying(left) => write!(f, "trying {left}"),
            Self::Bad => f.write_str("bad"),
        }
    }
}

/// The file name of a slot's UKI: `pipeline_<generation>_<a|b>[+left[-done]].efi`
/// (Boot Loader Specification, "Boot counting").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UkiName {
    stem: String,
    pub generation: u32,
    pub slot: Slot,
    pub state: State,
    /// Bad because its bytes are, not because its tries are over.
    pub damaged: bool,
}

/// Tries done that no boot loader counts up to: they say that the slot is damaged. Two digits, as the name of a
/// UKI must not need another record of its folder.
const DAMAGED: u32 = 90;

impl UkiName {
    /// `None` for a file that is not ours.
    pub fn parse(name: &str) -> Option<Self> {
        let lower = name.to_ascii_lowercase();
        let body = lower.strip_suffix(".efi")?;
        let (stem, counter) = body.split_once('+').map_or((body, None), |(stem, counter)| (stem, Some(counter)));
        let (generation, slot) = stem.strip_prefix("pipeline_")?.split_once('_')?;
        let slot = Slot::ALL.into_iter().find(|each| each.letter() == slot)?;
        let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u32>().ok())?;
        let (state, done) = match counter {
            None => (State::Good, 0),
            Some(counter) => {
                let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
                let state = match number(left)? {
                    0 => State::Bad,
                    left => State::Trying(left),
                };
                (state, number(done)?)
            }
        };
        let damaged = state == State::Bad && done >= DAMAGED;
        Some(Self { stem: name[..stem.len()].to_string(), generation: number(generation)?, slot, state, damaged })
    }

    /// The name that says good.
    pub fn good(&self) -> String {
        format!("{}.efi", self.stem)
    }

    /// The name that says damaged.
    pub fn bad(&self) -> String {
        format!("{}+0-{DAMAGED}.efi", self.stem)
    }
}

/// The state of a slot in GRUB's variables.
pub fn grub_state(variables: &[(String, String)], slot: Slot) -> State {
    let get = |name: &str| {
        let name = format!("{name}_{}", slot.letter());
        variables.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value.as_str())
    };
    let ordered = variables.iter().any(|(name, value)| name == "order" && value.split(' ').any(|each| each == slot.letter()));
    match (get("good"), get("tries").parse::<u32>()) {
        ("1", _) => State::Good,
        (_, Ok(left)) if left > 0 => State::Trying(left),
        _ if ordered => State::Bad,
        _ => State::Empty,
    }
}

/// The changes that mark a slot good or damaged in GRUB's variables.
pub fn grub_marks(slot: Slot, good: bool) -> Vec<(String, &'static str)> {
    let letter = slot.letter();
    let mut marks = vec![(format!("good_{letter}"), if good { "1" } else { "0" }), (format!("tries_{letter}"), "0")];
    if !good {
        marks.push((format!("damaged_{letter}"), "1"));
    }
    marks
}

/// Whether a slot is marked damaged in GRUB's variables.
pub fn is_grub_damaged(variables: &[(String, String)], slot: Slot) -> bool {
    let name = format!("damaged_{}", slot.letter());
    variables.iter().any(|(key, value)| *key == name && value == "1")
}
