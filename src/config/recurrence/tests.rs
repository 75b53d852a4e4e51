//! Rules against what python-dateutil says of them, windows across clock changes, and what is no rule.

use super::*;

fn local(text: &str) -> DateTime {
    text.parse().unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// Beginning, rule, from, and the next four: what `rrulestr(RULE, dtstart=BEGINNING).xafter(FROM, inc=True)` of
/// python-dateutil 2.9.0 gives, up to 30 years ahead.
#[test]
fn rules_give_what_dateutil_gives() {
    let cases = [
        (
            "2026-01-05T09:00",
            "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR",
            "2026-11-19T00:00",
            "2026-11-19T09:00 2026-11-20T09:00 2026-11-23T09:00 2026-11-24T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=WEEKLY;INTERVAL=2;BYDAY=SU;WKST=MO",
            "2026-11-19T00:00",
            "2026-11-29T09:00 2026-12-13T09:00 2026-12-27T09:00 2027-01-10T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=WEEKLY;INTERVAL=2;BYDAY=SU;WKST=SU",
            "2026-11-19T00:00",
            "2026-11-22T09:00 2026-12-06T09:00 2026-12-20T09:00 2027-01-03T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=WEEKLY;INTERVAL=2;BYDAY=TU,SU;WKST=SU",
            "2026-01-01T00:00",
            "2026-01-06T09:00 2026-01-18T09:00 2026-01-20T09:00 2026-02-01T09:00",
        ),
        (
            "2026-01-31T09:00",
            "FREQ=MONTHLY",
            "2026-01-01T00:00",
            "2026-01-31T09:00 2026-03-31T09:00 2026-05-31T09:00 2026-07-31T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=MONTHLY;BYDAY=-1FR",
            "2026-11-19T00:00",
            "2026-11-27T09:00 2026-12-25T09:00 2027-01-29T09:00 2027-02-26T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=MONTHLY;BYDAY=1MO,-1MO;BYHOUR=22,6",
            "2026-11-19T00:00",
            "2026-11-30T06:00 2026-11-30T22:00 2026-12-07T06:00 2026-12-07T22:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=MONTHLY;BYMONTHDAY=-1,15;INTERVAL=3",
            "2026-11-19T00:00",
            "2027-01-15T09:00 2027-01-31T09:00 2027-04-15T09:00 2027-04-30T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=MONTHLY;BYDAY=FR;BYMONTHDAY=13",
            "2026-11-19T00:00",
            "2027-08-13T09:00 2028-10-13T09:00 2029-04-13T09:00 2029-07-13T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-1",
            "2026-11-19T00:00",
            "2026-11-30T09:00 2026-12-31T09:00 2027-01-29T09:00 2027-02-26T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYHOUR=8,17;BYSETPOS=1,-1",
            "2026-11-19T00:00",
            "2026-11-30T17:00 2026-12-01T08:00 2026-12-31T17:00 2027-01-01T08:00",
        ),
        (
            "2024-02-29T12:30",
            "FREQ=YEARLY",
            "2026-11-19T00:00",
            "2028-02-29T12:30 2032-02-29T12:30 2036-02-29T12:30 2040-02-29T12:30",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=YEARLY;BYMONTH=11,12;BYDAY=4TH",
            "2026-11-19T00:00",
            "2026-11-26T09:00 2026-12-24T09:00 2027-11-25T09:00 2027-12-23T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=YEARLY;BYDAY=20MO",
            "2026-11-19T00:00",
            "2027-05-17T09:00 2028-05-15T09:00 2029-05-14T09:00 2030-05-20T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=YEARLY;BYYEARDAY=1,-1,100",
            "2026-11-19T00:00",
            "2026-12-31T09:00 2027-01-01T09:00 2027-04-10T09:00 2027-12-31T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=YEARLY;BYMONTH=12;BYMONTHDAY=24,25,26",
            "2026-11-19T00:00",
            "2026-12-24T09:00 2026-12-25T09:00 2026-12-26T09:00 2027-12-24T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=YEARLY;BYMONTH=1",
            "2026-11-19T00:00",
            "2027-01-05T09:00 2028-01-05T09:00 2029-01-05T09:00 2030-01-05T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=DAILY;INTERVAL=10",
            "2026-11-19T00:00",
            "2026-11-21T09:00 2026-12-01T09:00 2026-12-11T09:00 2026-12-21T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=DAILY;BYMONTH=12;BYDAY=SA,SU",
            "2026-11-19T00:00",
            "2026-12-05T09:00 2026-12-06T09:00 2026-12-12T09:00 2026-12-13T09:00",
        ),
        (
            "2026-01-05T09:00",
            "FREQ=DAILY;BYHOUR=9,13,17;BYMINUTE=0,30",
            "2026-11-19T12:00",
            "2026-11-19T13:00 2026-11-19T13:30 2026-11-19T17:00 2026-11-19T17:30",
        ),
        ("2026-01-05T09:00", "FREQ=DAILY;COUNT=3", "2026-01-06T00:00", "2026-01-06T09:00 2026-01-07T09:00"),
        (
            "2026-01-05T09:00",
            "FREQ=WEEKLY;COUNT=5;BYDAY=MO,FR",
            "2026-01-06T00:00",
            "2026-01-09T09:00 2026-01-12T09:00 2026-01-16T09:00 2026-01-19T09:00",
        ),
        ("2026-01-05T09:00", "FREQ=DAILY;UNTIL=20260107T090000", "2026-01-06T00:00", "2026-01-06T09:00 2026-01-07T09:00"),
        ("2026-01-05T09:00", "FREQ=YEARLY;BYDAY=SU;BYMONTH=2;BYMONTHDAY=29", "2026-11-19T00:00", "2032-02-29T09:00"),
        (
            "2026-01-05T09:00",
            "FREQ=WEEKLY;BYDAY=MO;BYMONTH=1",
            "2026-11-19T00:00",
            "2027-01-04T09:00 2027-01-11T09:00 2027-01-18T09:00 2027-01-25T09:00",
        ),
    ];
    for (start, rule, from, expected) in cases {
        let parsed: Rule = rule.parse().unwrap();
        let from = local(from).to_zoned(TimeZone::UTC).unwrap().timestamp();
        let found: Vec<String> = parsed
            .starts(local(start), &TimeZone::UTC, from)
            .take(4)
            .map(|(_, local)| local.strftime("%Y-%m-%dT%H:%M").to_string())
            .collect();
        assert_eq!(found.join(" "), expected, "{rule}");
    }
}

#[test]
fn a_local_time_that_is_skipped_or_repeated_is_what_section_3_3_5_says() {
    let cases = [
        // The RFC's own examples.
        ("America/New_York", "2007-11-04T01:30", "2007-11-04T05:30:00Z"),
        ("America/New_York", "2007-03-11T02:30", "2007-03-11T07:30:00Z"),
        ("Europe/Berlin", "2026-03-29T02:30", "2026-03-29T01:30:00Z"),
        ("Europe/Berlin", "2026-10-25T02:30", "2026-10-25T00:30:00Z"),
        // Half an hour only.
        ("Australia/Lord_Howe", "2026-10-04T02:15", "2026-10-03T15:45:00Z"),
        // A whole day that was not.
        ("Pacific/Apia", "2011-12-30T09:00", "2011-12-30T19:00:00Z"),
    ];
    for (zone, start, expected) in cases {
        let zone = timezone(zone).unwrap();
        let rule: Rule = "FREQ=DAILY".parse().unwrap();
        let (first, shown) = rule.starts(local(start), &zone, Timestamp::MIN).next().unwrap();
        assert_eq!((first, shown), (at(expected), local(start)), "{start}");
    }
}

fn schedule(allow: &[&str], deny: &[&str], start: &str, hours: i64, zone: &str, except: &[&str]) -> Schedule {
    let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Schedule {
        allow: rules(allow),
        deny: rules(deny),
        start: if start.is_empty() { EPOCH } else { local(start) },
        duration: SignedDuration::from_hours(hours),
        zone: timezone(zone).unwrap(),
        except: except.iter().map(|text| text.parse().unwrap()).collect(),
    }
}

#[test]
fn windows_are_open_and_closed_to_the_second() {
    let office = schedule(&["FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR;BYHOUR=9"], &[], "", 8, "Europe/Berlin", &["2026-12-24"]);
    let nights = schedule(&["FREQ=DAILY;BYHOUR=22"], &[], "", 8, "Europe/Berlin", &[]);
    let denied = schedule(&[], &["FREQ=DAILY;BYHOUR=1;BYMINUTE=30"], "", 3, "Europe/Berlin", &[]);
    let christmas = schedule(&["FREQ=DAILY;BYHOUR=9"], &["FREQ=YEARLY;BYMONTH=12;BYMONTHDAY=24;BYHOUR=0"], "", 24, "UTC", &[]);
    let overlapping = schedule(&["FREQ=DAILY;BYHOUR=8,10"], &[], "", 4, "UTC", &[]);
    let over = schedule(&["FREQ=DAILY;COUNT=2"], &[], "2026-01-05T09:00", 1, "UTC", &[]);
    let never = schedule(&["FREQ=DAILY"], &["FREQ=DAILY"], "", 24, "UTC", &[]);
    let ended = schedule(&["FREQ=DAILY;BYHOUR=9;UNTIL=20260107"], &[], "", 1, "Europe/Berlin", &[]);
    let moment = schedule(&["FREQ=DAILY;BYHOUR=9,13"], &[], "", 1, "UTC", &["2026-01-05T09:00"]);
    let cases: [(&str, &Schedule, &str, bool, Option<&str>); 32] = [
        ("winter, before", &office, "2026-11-20T07:59:59Z", false, Some("2026-11-20T08:00:00Z")),
        ("winter, first second", &office, "2026-11-20T08:00:00Z", true, Some("2026-11-20T08:00:00Z")),
        ("winter, last second", &office, "2026-11-20T15:59:59Z", true, Some("2026-11-20T15:59:59Z")),
        ("winter, over: Monday", &office, "2026-11-20T16:00:00Z", false, Some("2026-11-23T08:00:00Z")),
        ("summer is an hour earlier", &office, "2026-07-20T07:00:00Z", true, Some("2026-07-20T07:00:00Z")),
        ("Friday before the spring change", &office, "2026-03-27T16:00:00Z", false, Some("2026-03-30T07:00:00Z")),
        ("Friday before the autumn change", &office, "2026-10-23T16:00:00Z", false, Some("2026-10-26T08:00:00Z")),
        ("a day left out", &office, "2026-12-24T10:00:00Z", false, Some("2026-12-25T08:00:00Z")),
        ("night into spring: 22:00 to 07:00 summer time", &nights, "2026-03-29T04:59:59Z", true, Some("2026-03-29T04:59:59Z")),
        ("night into spring is over", &nights, "2026-03-29T05:00:00Z", false, Some("2026-03-29T20:00:00Z")),
        ("night into autumn: 22:00 to 05:00 winter time", &nights, "2026-10-25T03:59:59Z", true, Some("2026-10-25T03:59:59Z")),
        ("night into autumn is over", &nights, "2026-10-25T04:00:00Z", false, Some("2026-10-25T21:00:00Z")),
        ("deny, spring, from 01:30 for 3 hours", &denied, "2026-03-29T00:30:00Z", false, Some("2026-03-29T03:30:00Z")),
        ("deny, spring, to 05:30", &denied, "2026-03-29T03:29:59Z", false, Some("2026-03-29T03:30:00Z")),
        ("deny, spring, after", &denied, "2026-03-29T03:30:00Z", true, Some("2026-03-29T03:30:00Z")),
        ("deny, autumn, the repeated hour is inside", &denied, "2026-10-25T01:15:00Z", false, Some("2026-10-25T02:30:00Z")),
        ("deny, autumn, after", &denied, "2026-10-25T02:30:00Z", true, Some("2026-10-25T02:30:00Z")),
        ("open-ended, far away", &office, "2062-07-14T15:00:00Z", false, Some("2062-07-17T07:00:00Z")),
        ("deny wins over allow", &christmas, "2026-12-24T10:00:00Z", false, Some("2026-12-25T00:00:00Z")),
        ("deny before", &christmas, "2026-12-23T23:59:59Z", true, Some("2026-12-23T23:59:59Z")),
        ("overlapping windows are one", &overlapping, "2026-01-05T13:30:00Z", true, Some("2026-01-05T13:30:00Z")),
        ("after both", &overlapping, "2026-01-05T14:00:00Z", false, Some("2026-01-06T08:00:00Z")),
        ("before the beginning", &over, "2026-01-04T09:00:00Z", false, Some("2026-01-05T09:00:00Z")),
        ("the second of two", &over, "2026-01-06T09:30:00Z", true, Some("2026-01-06T09:30:00Z")),
        ("after the second of two", &over, "2026-01-06T10:00:00Z", false, None),
        ("never", &never, "2026-01-06T10:00:00Z", false, None),
        ("the last day is inside", &ended, "2026-01-07T08:30:00Z", true, Some("2026-01-07T08:30:00Z")),
        ("after the last day", &ended, "2026-01-07T09:00:00Z", false, None),
        ("a moment left out", &moment, "2026-01-05T09:30:00Z", false, Some("2026-01-05T13:00:00Z")),
        ("the other moment of that day", &moment, "2026-01-05T13:30:00Z", true, Some("2026-01-05T13:30:00Z")),
        ("long ago", &nights, "1950-01-01T00:00:00Z", false, Some("1970-01-01T21:00:00Z")),
        ("far from now", &nights, "9900-12-30T22:00:00Z", true, Some("9900-12-30T22:00:00Z")),
    ];
    for (what, schedule, moment, open, next) in cases {
        assert_eq!((schedule.is_open(at(moment)), schedule.next_open(at(moment))), (open, next.map(at)), "{what}");
    }
}

#[test]
fn what_is_no_rule_is_told() {
    let cases = [
        ("", "`` is not a recurrence rule"),
        ("daily", "`daily` is not a part of a recurrence rule"),
        ("BYDAY=MO", "`BYDAY=MO` is not a recurrence rule"),
        ("FREQ=DALY", "`FREQ=DALY` is not a frequency"),
        ("FREQ=HOURLY", "`FREQ=HOURLY` is too often for a window"),
        ("FREQ=DAILY;FREQ=DAILY", "`FREQ` is in the rule twice"),
        ("FREQ=DAILY;BYDAI=MO", "`BYDAI` is not a part of a recurrence rule"),
        ("FREQ=WEEKLY;BYDAY=XX", "`XX` is not a day of the week"),
        ("FREQ=WEEKLY;BYDAY=é", "`é` is not a day of the week"),
        ("FREQ=MONTHLY;BYDAY=0MO", "`BYDAY=0` is not a list of numbers that fit"),
        ("FREQ=WEEKLY;BYDAY=1MO", "a number before a day needs `FREQ=MONTHLY` or `FREQ=YEARLY`"),
        ("FREQ=MONTHLY;BYMONTHDAY=32", "`BYMONTHDAY=32` is not a list of numbers that fit"),
        ("FREQ=WEEKLY;BYMONTHDAY=1", "`BYMONTHDAY` does not go with `FREQ=WEEKLY`"),
        ("FREQ=MONTHLY;BYYEARDAY=1", "`BYYEARDAY` goes with `FREQ=YEARLY` only"),
        ("FREQ=YEARLY;BYWEEKNO=20", "`BYWEEKNO` is not understood here"),
        ("FREQ=DAILY;BYHOUR=24", "`BYHOUR=24` is not a list of numbers that fit"),
        ("FREQ=DAILY;INTERVAL=0", "`INTERVAL=0` is not a number from 1 to 1000"),
        ("FREQ=DAILY;COUNT=99999", "`COUNT=99999` is not a number from 1 to 10000"),
        ("FREQ=DAILY;COUNT=1;UNTIL=20260101", "a rule has `COUNT` or `UNTIL`, not both"),
        ("FREQ=DAILY;UNTIL=20261301", "`UNTIL=20261301` is not a date"),
        ("FREQ=DAILY;UNTIL=2026ü101", "`UNTIL=2026ü101` is not a date"),
        ("FREQ=DAILY;UNTIL=20261201Z", "`UNTIL=20261201Z` is not a date"),
        ("FREQ=DAILY;BYSETPOS=1", "`BYSETPOS` chooses from what another part gives"),
        ("DTSTART:20260101T000000Z\nRRULE:FREQ=DAILY", "a rule is one line"),
    ];
    for (text, message) in cases {
        let wrong = text.parse::<Rule>().unwrap_err();
        assert_eq!(wrong.message, message, "{text}");
        assert!(wrong.hint.is_some(), "{text}");
    }
    let starts = [
        ("FREQ=DAILY", false),
        ("FREQ=DAILY;INTERVAL=2", true),
        ("FREQ=DAILY;COUNT=2", true),
        ("FREQ=WEEKLY", true),
        ("FREQ=WEEKLY;BYDAY=MO", false),
        ("FREQ=MONTHLY", true),
        ("FREQ=MONTHLY;BYMONTHDAY=1", false),
        ("FREQ=YEARLY;BYMONTH=2", true),
        ("RRULE:freq=yearly;byday=20mo", false),
    ];
    for (text, needs) in starts {
        assert_eq!(text.parse::<Rule>().unwrap().needs_start().is_some(), needs, "{text}");
    }
    assert_eq!(timezone("Europe/Berln").unwrap_err().hint.as_deref(), Some("did you mean `Europe/Berlin`?"));
    assert_eq!(timezone("../etc/passwd").unwrap_err().message, "`../etc/passwd` is not a time zone");
    for (text, good) in [
        ("2026-12-24", true),
        ("2026-12-24T09:00", true),
        ("2026-12-24T09:00:30", true),
        ("2026-12-24T09:00Z", false),
        ("24.12.2026", false),
        ("2026-13-24", false),
        ("", false),
    ] {
        assert_eq!(text.parse::<Except>().is_ok(), good, "{text}");
    }
}
