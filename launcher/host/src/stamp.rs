//! Time as part of a file's name.

use std::time::SystemTime;

/// `YYYYmmdd-HHMMSS`, UTC. Days to date: H. Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.
pub fn time_stamp(now: SystemTime) -> String {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn time_stamps() {
        assert_eq!(time_stamp(at(0)), "19700101-000000");
        assert_eq!(time_stamp(at(951_782_400)), "20000229-000000");
        assert_eq!(time_stamp(at(1_763_655_609)), "20251120-162009");
        assert_eq!(time_stamp(at(4_107_542_399)), "21000228-235959");
    }
}
