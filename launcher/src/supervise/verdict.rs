//! Which rank failed first, and with what code the launcher ends. Pure: fed with what the loop saw, in order.

use rustix::process::Signal;
use spec::contract::exit;
use std::fmt;

/// Signals that ask a rank to stop.
pub const STOPS: [Signal; 4] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1];

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Code(u8),
    Signal(i32),
}

impl End {
    /// As a shell reports it: the code, or 128 + signal.
    pub fn exit_code(self) -> u8 {
        match self {
            End::Code(code) => code,
            End::Signal(number) => exit::SIGNAL_BASE.saturating_add(u8::try_from(number).unwrap_or(u8::MAX)),
        }
    }

    /// Ended by `number`, or by a shell or a handler that says so.
    fn is_by(self, number: i32) -> bool {
        self == End::Signal(number) || i32::from(self.exit_code()) == i32::from(exit::SIGNAL_BASE) + number
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Code(code) => write!(f, "exit code {code}"),
            End::Signal(number) => write!(f, "{} (signal {number})", signal_name(*number)),
        }
    }
}

/// `SIGSEGV` for 11; real-time signals by number.
pub fn signal_name(number: i32) -> String {
    const NAMES: [(Signal, &str); 18] = [
        (Signal::HUP, "SIGHUP"),
        (Signal::INT, "SIGINT"),
        (Signal::QUIT, "SIGQUIT"),
        (Signal::ILL, "SIGILL"),
        (Signal::TRAP, "SIGTRAP"),
        (Signal::ABORT, "SIGABRT"),
        (Signal::BUS, "SIGBUS"),
        (Signal::FPE, "SIGFPE"),
        (Signal::KILL, "SIGKILL"),
        (Signal::USR1, "SIGUSR1"),
        (Signal::SEGV, "SIGSEGV"),
        (Signal::USR2, "SIGUSR2"),
        (Signal::PIPE, "SIGPIPE"),
        (Signal::ALARM, "SIGALRM"),
        (Signal::TERM, "SIGTERM"),
        (Signal::XCPU, "SIGXCPU"),
        (Signal::XFSZ, "SIGXFSZ"),
        (Signal::SYS, "SIGSYS"),
    ];
    let name = NAMES.iter().find(|(signal, _)| signal.as_raw() == number).map(|(_, name)| (*name).to_owned());
    name.unwrap_or_else(|| format!("signal {number}"))
}

/// A rank's own report of its failure before it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub code: u8,
    pub step: Option<u64>,
    pub error: String,
}

/// The failure that decides.
#[derive(Clone, Debug)]
pub struct Cause {
    /// Index of the rank in the job's list.
    pub index: usize,
    pub said: Option<Said>,
}

#[derive(Debug, Default)]
pub struct Verdict {
    ends: Vec<Option<End>>,
    /// Ranks that greeted: they know Headroom's exit codes.
    headroom: Vec<bool>,
    /// The job is a training run, whose ranks end by a signal only while they have not begun.
    trains: bool,
    cause: Option<Cause>,
    /// The cause so far is a rank that only followed another's failure.
    follower: bool,
    /// Signals of the user that were passed on, first one first.
    forwarded: Vec<i32>,
    /// The other ranks were asked to end because one failed.
    told: bool,
}

impl Verdict {
    pub fn new(ranks: usize, trains: bool) -> Self {
        Self { ends: vec![None; ranks], headroom: vec![false; ranks], trains, ..Self::default() }
    }

    pub fn greeted(&mut self, index: usize) {
        self.headroom[index] = true;
    }

    pub fn has_greeted(&self, index: usize) -> bool {
        self.headroom[index]
    }

    /// The user's signal goes to every rank now.
    pub fn forwarded(&mut self, number: i32) {
        self.forwarded.push(number);
    }

    pub fn told(&mut self) {
        self.told = true;
    }

    /// A rank says that it is about to fail: this counts as the failure's time.
    pub fn said(&mut self, index: usize, said: Said) {
        let follows = said.code == exit::PEER;
        match &mut self.cause {
            Some(cause) if cause.index == index => cause.said = Some(said),
            _ => self.blame(Cause { index, said: Some(said) }, follows),
        }
    }

    pub fn ended(&mut self, index: usize, end: End) {
        self.ends[index] = Some(end);
        if !self.is_harmless(index, end) {
            self.blame(Cause { index, said: None }, end == End::Code(exit::PEER));
        }
    }

    fn is_harmless(&self, index: usize, end: End) -> bool {
        let asked = !self.forwarded.is_empty() || self.told;
        end == End::Code(exit::OK)
            || (end == End::Code(exit::STOPPED) && (self.headroom[index] || !self.forwarded.is_empty()))
            || (self.is_early_stop(end) && asked)
            || self.forwarded.iter().any(|number| end.is_by(*number))
            // Signals that the launcher sends: SIGTERM to ranks that do not listen, SIGKILL after the grace.
            || (asked && end == End::Signal(Signal::KILL.as_raw()))
            || (self.told && end.is_by(Signal::TERM.as_raw()))
    }

    fn blame(&mut self, cause: Cause, follows: bool) {
        if self.cause.is_none() || (self.follower && !follows) {
            self.cause = Some(cause);
            self.follower = follows;
        }
    }

    pub fn cause(&self) -> Option<&Cause> {
        self.cause.as_ref()
    }

    pub fn end_of(&self, index: usize) -> Option<End> {
        self.ends[index]
    }

    pub fn stopped_by(&self) -> Option<i32> {
        self.forwarded.first().copied()
    }

    /// How the deciding rank ended; what it said of itself where the launcher ended it.
    pub fn cause_code(&self) -> Option<u8> {
        let cause = self.cause.as_ref()?;
        let said = cause.said.as_ref().map(|said| said.code).filter(|code| *code != exit::OK);
        let end = self.ends[cause.index].filter(|end| !matches!(end, End::Code(exit::OK)));
        let own = end.filter(|end| said.is_none() || matches!(end, End::Code(_)));
        own.map(End::exit_code).or(said).or(Some(exit::INTERNAL))
    }

    /// The launcher's exit code, once every rank has ended.
    pub fn exit_code(&self) -> u8 {
        if let Some(code) = self.cause_code() {
            return code;
        }
        if self.is_unstarted() {
            return exit::UNSTARTED;
        }
        let stopped = |end: &Option<End>| *end == Some(End::Code(exit::STOPPED));
        let killed =
            self.ends.iter().flatten().any(|end| !matches!(end, End::Code(exit::OK | exit::STOPPED | exit::UNSTARTED)));
        match self.stopped_by() {
            Some(number) if killed => End::Signal(number).exit_code(),
            _ if self.ends.iter().any(stopped) => exit::STOPPED,
            _ => exit::OK,
        }
    }

    /// Every rank was stopped on request before it began to train.
    fn is_unstarted(&self) -> bool {
        let early = |end: &Option<End>| end.is_some_and(|end| self.is_early_stop(end));
        !self.forwarded.is_empty() && self.ends.iter().all(early)
    }

    /// A rank of a training run ended on request before it began. One that has begun ends by no such signal: it saves.
    fn is_early_stop(&self, end: End) -> bool {
        let by_signal = STOPS.iter().any(|signal| end == End::Signal(signal.as_raw()));
        self.trains && (by_signal || end == End::Code(exit::UNSTARTED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: i32 = 15;

    #[test]
    fn a_training_run_stopped_before_it_began_has_a_code_of_its_own() {
        let unstarted = End::Code(exit::UNSTARTED);
        for (trains, ends, code) in [
            (true, [End::Signal(TERM), End::Signal(TERM)], exit::UNSTARTED),
            (true, [unstarted, End::Signal(TERM)], exit::UNSTARTED),
            (true, [unstarted, unstarted], exit::UNSTARTED),
            // Whoever asked signalled every process, and the launcher passes another signal on.
            (true, [End::Signal(1), End::Signal(TERM)], exit::UNSTARTED),
            // One trained already, or had to be killed.
            (true, [unstarted, End::Code(exit::STOPPED)], exit::STOPPED),
            (true, [unstarted, End::Signal(9)], 143),
            (false, [End::Signal(TERM), End::Signal(TERM)], 143),
        ] {
            let mut v = Verdict::new(2, trains);
            (0..2).for_each(|index| v.greeted(index));
            v.forwarded(TERM);
            ends.into_iter().enumerate().for_each(|(index, end)| v.ended(index, end));
            assert_eq!(v.exit_code(), code, "{trains} {ends:?}");
        }
    }

    fn said(code: u8) -> Said {
        Said { code, step: Some(37), error: "disk full".into() }
    }

    fn blamed(verdict: &Verdict) -> Option<usize> {
        verdict.cause().map(|cause| cause.index)
    }

    #[test]
    fn first_failure_decides_and_followers_never_do() {
        let mut v = Verdict::new(3, false);
        v.ended(1, End::Code(exit::PEER));
        assert_eq!(blamed(&v), Some(1));
        v.ended(2, End::Signal(11));
        v.ended(0, End::Code(5));
        assert_eq!((blamed(&v), v.exit_code()), (Some(2), 139));
    }

    #[test]
    fn what_a_rank_says_is_its_time_and_its_own_exit_its_code() {
        let mut v = Verdict::new(2, false);
        v.said(1, said(5));
        v.ended(0, End::Code(6));
        v.ended(1, End::Code(7));
        assert_eq!((blamed(&v), v.exit_code()), (Some(1), 7));
        let mut v = Verdict::new(2, false);
        v.said(1, said(5));
        v.told();
        v.ended(1, End::Signal(9));
        v.ended(0, End::Code(exit::PEER));
        assert_eq!((blamed(&v), v.exit_code()), (Some(1), 5), "killed after the grace");
    }

    #[test]
    fn ranks_that_we_ended_are_not_blamed_for_a_follower() {
        let mut v = Verdict::new(3, false);
        v.ended(0, End::Code(exit::PEER));
        v.told();
        v.ended(1, End::Signal(TERM));
        v.ended(2, End::Code(4));
        assert_eq!((blamed(&v), v.exit_code()), (Some(2), 4));
    }

    #[test]
    fn stopping_on_request_is_no_failure() {
        for (ends, code) in [
            ([End::Code(0), End::Code(0)], 0),
            ([End::Code(75), End::Code(75)], 75),
            ([End::Code(0), End::Signal(TERM)], 143),
            ([End::Signal(9), End::Code(143)], 143),
            ([End::Code(75), End::Code(5)], 5),
        ] {
            let mut v = Verdict::new(2, false);
            v.forwarded(TERM);
            ends.into_iter().enumerate().for_each(|(index, end)| v.ended(index, end));
            assert_eq!(v.exit_code(), code, "{ends:?}");
        }
    }

    #[test]
    fn exit_code_75_is_a_stop_only_of_a_rank_that_knows_it() {
        let mut v = Verdict::new(1, false);
        v.ended(0, End::Code(75));
        assert_eq!((blamed(&v), v.exit_code()), (Some(0), 75));
        let mut v = Verdict::new(1, false);
        v.greeted(0);
        v.ended(0, End::Code(75));
        assert_eq!((blamed(&v), v.exit_code()), (None, 75));
    }

    #[test]
    fn ends_read_like_words() {
        assert_eq!(End::Signal(11).to_string(), "SIGSEGV (signal 11)");
        assert_eq!(End::Code(3).to_string(), "exit code 3");
        assert_eq!(signal_name(64), "signal 64");
    }
}
