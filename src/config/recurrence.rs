//! Recurrence rules (RFC 5545, section 3.3.10) and the windows of time made of them.
//!
//! A [`Rule`] is the text after `RRULE:`; [`Rule::starts`] gives the moments it names, in order, from any moment on and
//! without walking there from the beginning. A [`Schedule`] says whether a moment lies in a window, and when the next
//! one opens. Pure: the time zone comes from the database inside the binary, so that every machine answers the same.
//!
//! Understood: `FREQ` from `DAILY` to `YEARLY`, `INTERVAL`, `COUNT`, `UNTIL`, `BYMONTH`, `BYMONTHDAY`, `BYYEARDAY`, `BYDAY` with
//! ordinals, `BYHOUR`, `BYMINUTE`, `BYSECOND`, `BYSETPOS` and `WKST`. Not understood, and refused: `BYWEEKNO`, and frequencies
//! below a day, for which `BYHOUR` says the same. A local time that a clock change skips or repeats is what section 3.3.5
//! says: the offset before the gap, the first of the two.

use std::collections::VecDeque;
use std::str::FromStr;
use std::sync::LazyLock;

use jiff::civil::{Date, DateTime, Time, Weekday, date};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Timestamp, ToSpan as _};

use super::syntax::Wrong;

/// Where a rule begins when nothing is said: before every release.
pub const EPOCH: DateTime = date(1970, 1, 1).at(0, 0, 0, 0);
/// How far ahead a next moment is looked for: a rule for 29 February in years that are Sundays comes every 28 years.
const HORIZON_YEARS: i16 = 30;
/// Largest `COUNT`: such a rule is walked from its beginning.
const COUNT_MAX: u32 = 10_000;
/// Steps from one edge of a window to the next before a next opening is given up.
const EDGES_MAX: usize = 2_000;

static ZONES: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);

/// The time zone `name` of the IANA database, like `Europe/Berlin`.
///
/// # Errors
/// There is none, with the nearest names.
pub fn timezone(name: &str) -> Result<TimeZone, Wrong> {
    ZONES.get(name).map_err(|_| {
        let names: Vec<String> = ZONES.available().map(|name| name.to_string()).collect();
        let near = crate::error::nearest(name, names.iter().map(String::as_str));
        let hint = near.map_or("like `Europe/Berlin` or `UTC`".into(), |name| format!("did you mean `{name}`?"));
        Wrong { message: format!("`{name}` is not a time zone"), hint: Some(hint) }
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frequency {
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

/// The last moment of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The whole of that day.
    Day(Date),
    Local(DateTime),
    Utc(Timestamp),
}

/// A recurrence rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    frequency: Frequency,
    interval: i32,
    count: Option<u32>,
    until: Option<Until>,
    months: Vec<i16>,
    month_days: Vec<i16>,
    year_days: Vec<i16>,
    /// With the ordinal: 1 the first of the month or year, -1 the last, 0 every one.
    days: Vec<(i16, Weekday)>,
    hours: Vec<i16>,
    minutes: Vec<i16>,
    seconds: Vec<i16>,
    positions: Vec<i16>,
    week_start: Weekday,
}

fn wrong<T>(message: impl Into<String>, hint: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong { message: message.into(), hint: Some(hint.into()) })
}

impl FromStr for Rule {
    type Err = Wrong;

    /// With or without `RRULE:` before it.
    fn from_str(text: &str) -> Result<Self, Wrong> {
        let body = text.trim().strip_prefix("RRULE:").unwrap_or(text.trim());
        if body.contains(['\n', '\r']) {
            return wrong("a rule is one line", "DTSTART is `start`, EXDATE is `except`, and several rules are a list");
        }
        let mut rule = Self::empty();
        let mut seen: Vec<String> = Vec::new();
        for part in body.split(';').filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return wrong(format!("`{part}` is not a part of a recurrence rule"), "like `FREQ=WEEKLY;BYDAY=MO,TU;BYHOUR=9`");
            };
            let (key, value) = (key.to_ascii_uppercase(), value.to_ascii_uppercase());
            if seen.contains(&key) {
                return wrong(format!("`{key}` is in the rule twice"), "several values are separated with commas");
            }
            rule.set(&key, &value)?;
            seen.push(key);
        }
        if !seen.iter().any(|key| key == "FREQ") {
            return wrong(
                format!("`{text}` is not a recurrence rule"),
                "it begins with `FREQ=`, like `FREQ=WEEKLY;BYDAY=MO,TU;BYHOUR=9`",
            );
        }
        rule.consistent()
    }
}

impl Rule {
    fn empty() -> Self {
        Self {
            frequency: Frequency::Daily,
            interval: 1,
            count: None,
            until: None,
            months: Vec::new(),
            month_days: Vec::new(),
            year_days: Vec::new(),
            days: Vec::new(),
            hours: Vec::new(),
            minutes: Vec::new(),
            seconds: Vec::new(),
            positions: Vec::new(),
            week_start: Weekday::Monday,
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Wrong> {
        let positive = |limit: u32| match value.parse::<u32>() {
            Ok(number) if (1..=limit).contains(&number) => Ok(number),
            _ => wrong(format!("`{key}={value}` is not a number from 1 to {limit}"), "digits only"),
        };
        match key {
            "FREQ" => self.frequency = frequency(value)?,
            "INTERVAL" => self.interval = positive(1000)? as i32,
            "COUNT" => self.count = Some(positive(COUNT_MAX)?),
            "UNTIL" => self.until = Some(until(value)?),
            "BYMONTH" => self.months = numbers(key, value, 1..=12, false)?,
            "BYMONTHDAY" => self.month_days = numbers(key, value, 1..=31, true)?,
            "BYYEARDAY" => self.year_days = numbers(key, value, 1..=366, true)?,
            "BYDAY" => self.days = value.split(',').map(day).collect::<Result<_, _>>()?,
            "BYHOUR" => self.hours = numbers(key, value, 0..=23, false)?,
            "BYMINUTE" => self.minutes = numbers(key, value, 0..=59, false)?,
            "BYSECOND" => self.seconds = numbers(key, value, 0..=59, false)?,
            "BYSETPOS" => self.positions = numbers(key, value, 1..=366, true)?,
            "WKST" => self.week_start = weekday(value)?,
            "BYWEEKNO" => return wrong("`BYWEEKNO` is not understood here", "say it with `BYMONTH` and `BYDAY`"),
            _ => {
                const KNOWN: [&str; 13] = [
                    "FREQ",
                    "INTERVAL",
                    "COUNT",
                    "UNTIL",
                    "BYMONTH",
                    "BYMONTHDAY",
                    "BYYEARDAY",
                    "BYDAY",
                    "BYHOUR",
                    "BYMINUTE",
                    "BYSECOND",
                    "BYSETPOS",
                    "WKST",
                ];
                let hint = match crate::error::nearest(key, KNOWN) {
                    Some(name) => format!("did you mean `{name}`?"),
                    None => "the parts are those of RFC 5545, section 3.3.10".into(),
                };
                return wrong(format!("`{key}` is not a part of a recurrence rule"), hint);
            }
        }
        Ok(())
    }

    /// What RFC 5545 forbids together.
    fn consistent(self) -> Result<Self, Wrong> {
        use Frequency::{Daily, Monthly, Weekly};
        if self.count.is_some() && self.until.is_some() {
            return wrong("a rule has `COUNT` or `UNTIL`, not both", "keep one of them");
        }
        if self.days.iter().any(|(ordinal, _)| *ordinal != 0) && matches!(self.frequency, Daily | Weekly) {
            return wrong("a number before a day needs `FREQ=MONTHLY` or `FREQ=YEARLY`", "like `FREQ=MONTHLY;BYDAY=1MO`");
        }
        if !self.month_days.is_empty() && self.frequency == Weekly {
            return wrong("`BYMONTHDAY` does not go with `FREQ=WEEKLY`", "write `FREQ=MONTHLY`");
        }
        if !self.year_days.is_empty() && matches!(self.frequency, Daily | Weekly | Monthly) {
            return wrong("`BYYEARDAY` goes with `FREQ=YEARLY` only", "write `FREQ=YEARLY`");
        }
        let by_something = [&self.months, &self.month_days, &self.year_days, &self.hours, &self.minutes, &self.seconds];
        if !self.positions.is_empty() && self.days.is_empty() && by_something.iter().all(|list| list.is_empty()) {
            return wrong("`BYSETPOS` chooses from what another part gives", "like `BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-1`");
        }
        Ok(self)
    }

    /// Why the rule says too little without a beginning of its own.
    pub fn needs_start(&self) -> Option<&'static str> {
        let no_days = self.days.is_empty() && self.month_days.is_empty() && self.year_days.is_empty();
        match self.frequency {
            _ if self.count.is_some() => Some("`COUNT` counts from a beginning"),
            _ if self.interval > 1 => Some("`INTERVAL` counts from a beginning"),
            Frequency::Weekly if no_days => Some("nothing says which day of the week"),
            Frequency::Monthly if no_days => Some("nothing says which day of the month"),
            Frequency::Yearly if no_days => Some("nothing says which day of the year"),
            _ => None,
        }
    }

    /// The moments at or after `from`, in order, for at most [`HORIZON_YEARS`]; `start` is DTSTART. As everywhere but in the
    /// RFC's own words, a `start` that does not fit the rule is not one of them.
    pub fn starts<'r>(&'r self, start: DateTime, zone: &'r TimeZone, from: Timestamp) -> Starts<'r> {
        let local = zone.to_datetime(from);
        let last = local.date().max(start.date()).saturating_add(i32::from(HORIZON_YEARS).years());
        let mut starts = Starts { rule: self, zone, start, from, last, period: 0, seen: 0, ready: VecDeque::new(), ended: false };
        if self.count.is_none() {
            // Two days before: a clock change, and the week or month the day before belongs to.
            starts.period = starts.period_of(local.date().saturating_sub(2.days())).max(0);
        }
        starts
    }

    fn times(&self, start: Time) -> Vec<Time> {
        let or = |list: &[i16], default: i8| {
            let mut list: Vec<i8> = if list.is_empty() { vec![default] } else { list.iter().map(|n| *n as i8).collect() };
            list.sort_unstable();
            list.dedup();
            list
        };
        let (hours, minutes) = (or(&self.hours, start.hour()), or(&self.minutes, start.minute()));
        let seconds = or(&self.seconds, start.second());
        let mut times = Vec::with_capacity(hours.len() * minutes.len() * seconds.len());
        for hour in &hours {
            for minute in &minutes {
                times.extend(seconds.iter().filter_map(|second| Time::new(*hour, *minute, *second, 0).ok()));
            }
        }
        times
    }

    /// Whether the rule names the day `day`, as far as its period allows it.
    fn names(&self, day: Date, start: Date) -> bool {
        let either = |list: &[i16], value: i16, length: i16| list.contains(&value) || list.contains(&(value - length - 1));
        let (of_month, of_year) = (i16::from(day.day()), day.day_of_year());
        let no_days = self.days.is_empty() && self.month_days.is_empty() && self.year_days.is_empty();
        let default = match self.frequency {
            _ if !no_days => true,
            Frequency::Daily => true,
            Frequency::Weekly => day.weekday() == start.weekday(),
            Frequency::Monthly => day.day() == start.day(),
            Frequency::Yearly => day.day() == start.day() && (!self.months.is_empty() || day.month() == start.month()),
        };
        default
            && (self.months.is_empty() || self.months.contains(&i16::from(day.month())))
            && (self.month_days.is_empty() || either(&self.month_days, of_month, i16::from(day.days_in_month())))
            && (self.year_days.is_empty() || either(&self.year_days, of_year, day.days_in_year()))
            && (self.days.is_empty() || self.days.iter().any(|(ordinal, weekday)| self.is_nth(day, *ordinal, *weekday)))
    }

    fn is_nth(&self, day: Date, ordinal: i16, weekday: Weekday) -> bool {
        if day.weekday() != weekday || ordinal == 0 {
            return day.weekday() == weekday;
        }
        let of_month = self.frequency == Frequency::Monthly || !self.months.is_empty();
        let (position, length) = match of_month {
            true => (i16::from(day.day()), i16::from(day.days_in_month())),
            false => (day.day_of_year(), day.days_in_year()),
        };
        if ordinal > 0 { (position - 1) / 7 + 1 == ordinal } else { (length - position) / 7 + 1 == -ordinal }
    }
}

fn frequency(value: &str) -> Result<Frequency, Wrong> {
    match value {
        "DAILY" => Ok(Frequency::Daily),
        "WEEKLY" => Ok(Frequency::Weekly),
        "MONTHLY" => Ok(Frequency::Monthly),
        "YEARLY" => Ok(Frequency::Yearly),
        "HOURLY" | "MINUTELY" | "SECONDLY" => {
            wrong(format!("`FREQ={value}` is too often for a window"), "hours of a day are `FREQ=DAILY;BYHOUR=9,13`")
        }
        _ => wrong(format!("`FREQ={value}` is not a frequency"), "`DAILY`, `WEEKLY`, `MONTHLY` or `YEARLY`"),
    }
}

fn numbers(key: &str, value: &str, range: std::ops::RangeInclusive<i16>, negative: bool) -> Result<Vec<i16>, Wrong> {
    let number = |text: &str| {
        let number: Option<i16> = text.strip_prefix('+').unwrap_or(text).parse().ok();
        number.filter(|number| range.contains(number) || (negative && range.contains(&-number)))
    };
    let list: Option<Vec<i16>> = value.split(',').map(number).collect();
    let minus = if negative { ", or that from the end with `-`" } else { "" };
    let hint = format!("numbers from {} to {}{minus}, separated with commas", range.start(), range.end());
    list.ok_or(Wrong { message: format!("`{key}={value}` is not a list of numbers that fit"), hint: Some(hint) })
}

fn weekday(text: &str) -> Result<Weekday, Wrong> {
    const NAMES: [&str; 7] = ["MO", "TU", "WE", "TH", "FR", "SA", "SU"];
    let index = NAMES.iter().position(|name| *name == text);
    let weekday = index.and_then(|index| Weekday::from_monday_zero_offset(index as i8).ok());
    weekday.ok_or(Wrong {
        message: format!("`{text}` is not a day of the week"),
        hint: Some("`MO`, `TU`, `WE`, `TH`, `FR`, `SA` or `SU`, with a number before it like `-1FR`".into()),
    })
}

/// `MO`, `1MO`, `-1FR`.
fn day(text: &str) -> Result<(i16, Weekday), Wrong> {
    let split = text.len().saturating_sub(2);
    let (ordinal, name) = if text.is_char_boundary(split) { text.split_at(split) } else { ("", text) };
    let weekday = weekday(name).map_err(|error| Wrong { message: format!("`{text}` is not a day of the week"), ..error })?;
    if ordinal.is_empty() {
        return Ok((0, weekday));
    }
    match numbers("BYDAY", ordinal, 1..=53, true)?.as_slice() {
        [number] => Ok((*number, weekday)),
        _ => wrong(format!("`{text}` is not a day of the week"), "like `1MO`"),
    }
}

fn until(text: &str) -> Result<Until, Wrong> {
    let hint = "like `20261231`, or `20261231T180000Z`";
    let bad = || Wrong { message: format!("`UNTIL={text}` is not a date"), hint: Some(hint.into()) };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (body, utc) = text.strip_suffix('Z').map_or((text, false), |body| (body, true));
    let (day, time) = body.split_once('T').map_or((body, None), |(day, time)| (day, Some(time)));
    if day.len() != 8 || !digits(day) || time.is_some_and(|time| time.len() != 6 || !digits(time)) {
        return Err(bad());
    }
    let number = |text: &str| text.parse::<i16>().unwrap_or_default();
    let day = Date::new(number(&day[..4]), number(&day[4..6]) as i8, number(&day[6..]) as i8).map_err(|_| bad())?;
    let Some(time) = time else { return if utc { Err(bad()) } else { Ok(Until::Day(day)) } };
    let part = |range: std::ops::Range<usize>| number(&time[range]) as i8;
    let local = day.to_datetime(Time::new(part(0..2), part(2..4), part(4..6), 0).map_err(|_| bad())?);
    if !utc {
        return Ok(Until::Local(local));
    }
    local.to_zoned(TimeZone::UTC).map(|zoned| Until::Utc(zoned.timestamp())).map_err(|_| bad())
}

/// The moments of a rule; made by [`Rule::starts`].
#[derive(Debug)]
pub struct Starts<'r> {
    rule: &'r Rule,
    zone: &'r TimeZone,
    start: DateTime,
    from: Timestamp,
    /// Last day looked at.
    last: Date,
    /// The next period: number of intervals after that of `start`.
    period: i32,
    /// Moments given or passed, for `COUNT`.
    seen: u32,
    ready: VecDeque<(Timestamp, DateTime)>,
    ended: bool,
}

impl Starts<'_> {
    /// First day of the period of the start.
    fn base(&self) -> Date {
        let day = self.start.date();
        match self.rule.frequency {
            Frequency::Daily => day,
            Frequency::Weekly => {
                let back = day.weekday().since(self.rule.week_start);
                day.saturating_sub(i32::from(back).days())
            }
            Frequency::Monthly => day.first_of_month(),
            Frequency::Yearly => day.first_of_year(),
        }
    }

    /// The number of the period that `day` is in or after.
    fn period_of(&self, day: Date) -> i32 {
        let base = self.base();
        let days = || (day.duration_since(base).as_hours() / 24) as i32;
        let months = || i32::from(day.year() - base.year()) * 12 + i32::from(day.month() - base.month());
        let units = match self.rule.frequency {
            Frequency::Daily => days(),
            Frequency::Weekly => days().div_euclid(7),
            Frequency::Monthly => months(),
            Frequency::Yearly => i32::from(day.year() - base.year()),
        };
        units.div_euclid(self.rule.interval)
    }

    /// First and last day of the period number `period`.
    fn days(&self, period: i32) -> Option<(Date, Date)> {
        let units = period.checked_mul(self.rule.interval)?;
        let base = self.base();
        let first = match self.rule.frequency {
            Frequency::Daily => base.checked_add(units.days()),
            Frequency::Weekly => base.checked_add(units.weeks()),
            Frequency::Monthly => base.checked_add(units.months()),
            Frequency::Yearly => base.checked_add(units.years()),
        };
        let first = first.ok()?;
        let last = match self.rule.frequency {
            Frequency::Daily => first,
            Frequency::Weekly => first.saturating_add(6.days()),
            Frequency::Monthly => first.last_of_month(),
            Frequency::Yearly => first.last_of_year(),
        };
        Some((first, last))
    }

    /// Fills `ready` with the moments of the next period; false after the last one.
    fn advance(&mut self) -> bool {
        let Some((first, last)) = self.days(self.period).filter(|(first, _)| *first <= self.last) else { return false };
        self.period += 1;
        let times = self.rule.times(self.start.time());
        let start = self.start.date();
        let mut set: Vec<DateTime> = Vec::new();
        let mut day = first;
        loop {
            if !self.rule.months.is_empty() && !self.rule.months.contains(&i16::from(day.month())) {
                day = day.last_of_month();
            } else if self.rule.names(day, start) {
                set.extend(times.iter().map(|time| day.to_datetime(*time)));
            }
            match day.tomorrow() {
                Ok(next) if day < last => day = next,
                _ => break,
            }
        }
        if !self.rule.positions.is_empty() {
            set = chosen(&set, &self.rule.positions);
        }
        for local in set.into_iter().filter(|local| *local >= self.start) {
            let Ok(at) = self.zone.to_ambiguous_zoned(local).compatible().map(|zoned| zoned.timestamp()) else { continue };
            let over = match self.rule.until {
                None => false,
                Some(Until::Day(day)) => local.date() > day,
                Some(Until::Local(last)) => local > last,
                Some(Until::Utc(last)) => at > last,
            };
            if over || self.rule.count.is_some_and(|count| self.seen >= count) {
                self.ended = true;
                break;
            }
            self.seen += 1;
            if at >= self.from {
                self.ready.push_back((at, local));
            }
        }
        true
    }
}

impl Iterator for Starts<'_> {
    /// The moment, and what local clocks are meant to show then.
    type Item = (Timestamp, DateTime);

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            if self.ended || !self.advance() {
                return None;
            }
        }
        self.ready.pop_front()
    }
}

/// The members of `set` at `positions`, in order: 1 the first, -1 the last.
fn chosen(set: &[DateTime], positions: &[i16]) -> Vec<DateTime> {
    let index = |position: &i16| match *position {
        position if position > 0 => Some(position as usize - 1),
        position => set.len().checked_sub(position.unsigned_abs() as usize),
    };
    let mut indexes: Vec<usize> = positions.iter().filter_map(index).filter(|index| *index < set.len()).collect();
    indexes.sort_unstable();
    indexes.dedup();
    indexes.into_iter().map(|index| set[index]).collect()
}

/// A day or a moment that is left out (EXDATE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Except {
    Day(Date),
    Moment(DateTime),
}

impl FromStr for Except {
    type Err = Wrong;

    /// `2026-12-24` or `2026-12-24T09:00`.
    fn from_str(text: &str) -> Result<Self, Wrong> {
        let exact = text.len() >= 16 && !text.contains(['Z', '+', '[']);
        match (text.len() == 10).then(|| text.parse::<Date>().ok()).flatten() {
            Some(day) => Ok(Self::Day(day)),
            None => match text.parse::<DateTime>().ok().filter(|_| exact) {
                Some(moment) => Ok(Self::Moment(moment)),
                None => wrong(format!("`{text}` is not a day or a moment"), "like `2026-12-24` or `2026-12-24T09:00`"),
            },
        }
    }
}

/// Windows of time: open where an `allow` rule's window is (everywhere when there is none) and no `deny` rule's.
#[derive(Debug, Clone)]
pub struct Schedule {
    pub allow: Vec<Rule>,
    pub deny: Vec<Rule>,
    pub start: DateTime,
    /// Of each window, from its start, in time that passes: 2 hours are 2 hours also in the night of a clock change.
    pub duration: SignedDuration,
    pub zone: TimeZone,
    pub except: Vec<Except>,
}

impl Schedule {
    /// Whether `at` lies in a window that is open.
    pub fn is_open(&self, at: Timestamp) -> bool {
        self.covering(&self.deny, at).is_none() && (self.allow.is_empty() || self.covering(&self.allow, at).is_some())
    }

    /// The first moment at or after `at` that lies in an open window; none is in sight when the rules have ended.
    pub fn next_open(&self, at: Timestamp) -> Option<Timestamp> {
        let mut at = at;
        for _ in 0..EDGES_MAX {
            if let Some(end) = self.covering(&self.deny, at) {
                at = end;
            } else if self.allow.is_empty() || self.covering(&self.allow, at).is_some() {
                return Some(at);
            } else {
                at = self.allow.iter().filter_map(|rule| self.starts(rule, at).next()).min()?;
            }
        }
        None
    }

    /// The end of the window of `rules` that `at` lies in; of several, the last to end.
    fn covering(&self, rules: &[Rule], at: Timestamp) -> Option<Timestamp> {
        let from = at.checked_sub(self.duration).unwrap_or(Timestamp::MIN);
        let last = |rule: &Rule| self.starts(rule, from).take_while(|start| *start <= at).filter(|start| *start > from).last();
        rules.iter().filter_map(last).max().and_then(|start| start.checked_add(self.duration).ok())
    }

    fn starts<'s>(&'s self, rule: &'s Rule, from: Timestamp) -> impl Iterator<Item = Timestamp> + 's {
        let kept = move |(_, local): &(Timestamp, DateTime)| {
            !self.except.iter().any(|except| match except {
                Except::Day(day) => *day == local.date(),
                Except::Moment(moment) => moment == local,
            })
        };
        rule.starts(self.start, &self.zone, from).filter(kept).map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests;
