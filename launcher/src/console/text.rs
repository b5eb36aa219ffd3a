//! Text fit for a terminal.

/// Takes out what would move the cursor or change the terminal's state. Colours stay when `colour`, ended by a reset.
pub fn clean(text: &str, colour: bool) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut chars, mut coloured) = (text.chars().peekable(), false);
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                Some('[') => {
                    let mut sequence = String::new();
                    let last = loop {
                        match chars.next() {
                            Some(c @ '\u{40}'..='\u{7e}') => break Some(c),
                            Some(c) => sequence.push(c),
                            None => break None,
                        }
                    };
                    if colour && last == Some('m') {
                        coloured = true;
                        out.extend(["\u{1b}[", &sequence, "m"]);
                    }
                }
                // An operating system command, such as a window title: up to BEL or ESC \.
                Some(']') => while chars.next().is_some_and(|c| !matches!(c, '\u{7}' | '\u{9c}' | '\u{1b}')) {},
                _ => {}
            },
            '\t' => out.push('\t'),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    if coloured {
        out.push_str("\u{1b}[0m");
    }
    out
}

/// `47.3 s`, `12:05`, `3:02:45`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    let whole = seconds.round() as u64;
    match whole {
        ..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{}:{:02}", whole / 60, whole % 60),
        _ => format!("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_cursor_goes_and_colours_stay_where_wanted() {
        let wild = "\u{1b}[2A\u{1b}[31mred\u{1b}[K\u{8}\u{7} \u{1b}]0;title\u{7}end\u{1b}[?25l\tü";
        assert_eq!(clean(wild, false), "red end\tü");
        assert_eq!(clean(wild, true), "\u{1b}[31mred end\tü\u{1b}[0m");
        assert_eq!(clean("cut \u{1b}[3", true), "cut ");
    }

    #[test]
    fn durations_read_well() {
        assert_eq!([47.31, 725.0, 10_965.0, f64::NAN].map(duration), ["47.3 s", "12:05", "3:02:45", "?"]);
    }
}
