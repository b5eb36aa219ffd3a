//! Names of those who meet, and advice for the one who waits.

/// Who meets. Each has its own number, counted from 0, and number 0 listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// Numbers are those of nodes.
    Launchers,
    /// The first rank of every node; numbers are those of nodes.
    FirstRanks,
    /// Every rank; numbers are those of ranks.
    Ranks,
}

impl Party {
    pub(super) fn one(self) -> &'static str {
        if self == Party::Ranks { "rank" } else { "node" }
    }

    /// `node 1`, or `nodes 1, 3`.
    pub(super) fn named(self, numbers: impl Iterator<Item = usize>) -> String {
        let numbers: Vec<String> = numbers.map(|number| number.to_string()).collect();
        format!("{}{} {}", self.one(), if numbers.len() == 1 { "" } else { "s" }, numbers.join(", "))
    }

    /// What to do if somebody does not come.
    pub(super) fn way_out(self) -> &'static str {
        match self {
            Party::Launchers => {
                "start `launch` with the same --nnodes, --master-addr and --master-port on every node, see that the port can be \
                 reached, or raise --join-timeout"
            }
            Party::FirstRanks | Party::Ranks => {
                "its own output says why it ended; if it did not, see that MASTER_ADDR and MASTER_PORT are the same everywhere and \
                 can be reached, or raise train.step_timeout"
            }
        }
    }

    /// Who has ended, of those in `who`.
    pub(super) fn process_of(self, who: &str) -> String {
        match self {
            Party::Launchers => format!("the launcher of {who}"),
            Party::FirstRanks => format!("the first rank of {who}"),
            Party::Ranks => who.to_owned(),
        }
    }
}
