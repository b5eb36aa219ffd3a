//! Events of a run: facts and numbers. Text is made by the reader, in the reader's language.

use super::{Effect, Level, Relief};
use serde::{Deserialize, Deserializer, Serialize};

/// Something that the watch saw or did at the moment of a [`super::NodeRecord`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// Levels changed, the highest first; `cause` explains the first.
    Level { changes: Vec<LevelChange>, cause: Cause },
    /// The run continues in new processes.
    Continued,
    /// All ranks carried out an order. Bytes over all ranks.
    Relieved { action: Relief, effect: Effect, before_bytes: u64, after_bytes: u64 },
    /// Ranks were given an order, and none has answered in time.
    Unanswered { action: Relief },
    /// The page cache changed its size; `wanted_bytes`: it has not reached that size yet.
    Cache { shrinks: bool, wanted_bytes: Option<u64>, before_bytes: u64, after_bytes: u64 },
    /// Memory of a rank grows from step to step.
    Leak { rank: u32, bytes_per_step: f64, steps_left: f64, hours_left: Option<f64> },
    /// The watch stops the run: `at` stays full after all that can be given back was given.
    Stop { at: Fill, cause: Cause },
    /// The watch would stop the run, and no process of the user's program has a handler for the request: it goes on.
    Unstoppable { at: Fill, cause: Cause },
    /// Ranks are suspended, by a signal or by the freezer of their cgroup.
    Suspended { ranks: Vec<u32> },
    /// They run again.
    RanAgain { ranks: Vec<u32>, seconds: f64 },
    /// The launcher itself did not run.
    DidNotRun { seconds: f64 },
    /// An attempt failed: the failure in one line, then what is known of it, one fact per line.
    Failed { rank: u32, step: Option<u64>, text: String },
    /// A line of an earlier version, which recorded text alone.
    Text { text: String },
}

/// A source that came to another level.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LevelChange {
    pub level: Level,
    pub at: Fill,
}

/// Memory that fills up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The job within `memory.budget`.
    Budget,
    /// Physical memory, by all programs.
    System,
    /// The memory cgroup with the least room.
    Cgroup,
    /// One device, by all programs.
    Gpu(u32),
}

/// How full a source is. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    pub source: Source,
    pub used_bytes: u64,
    pub total_bytes: u64,
}

/// The largest part behind a level, as far as it can be seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Cause {
    /// Other programs took so many bytes since the job began.
    Others { grown_bytes: u64, largest: Option<Program> },
    /// A rank uses more than its lines of the plan.
    Rank { rank: u32, over_bytes: u64 },
    /// The page cache is the largest part of what is used.
    PageCache { bytes: u64 },
    /// Memory of a device.
    Device,
    /// Nothing stands out.
    Unknown,
}

/// A process of another user or job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub pid: i32,
    pub bytes: u64,
}

/// Reads an event; text, as earlier versions recorded it, becomes [`Event::Text`].
pub(super) fn event_or_text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Event>, D::Error> {
    match Option::<serde_json::Value>::deserialize(from)? {
        None => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(Event::Text { text })),
        Some(value) => serde_json::from_value(value).map(Some).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::NodeRecord;

    #[test]
    fn events_are_readable_json_and_come_back() {
        let at = Fill { source: Source::Gpu(2), used_bytes: 9, total_bytes: 10 };
        let events = [
            Event::Level { changes: vec![LevelChange { level: Level::Critical, at }], cause: Cause::Device },
            Event::Relieved {
                action: Relief::Decoders { threads: 2 },
                effect: Effect::Halved { micro_batch: [4, 2], accumulation: [1, 2] },
                before_bytes: 5,
                after_bytes: 4,
            },
            Event::Continued,
        ];
        for event in events {
            let record = NodeRecord { event: Some(event.clone()), ..NodeRecord::default() };
            let line = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<NodeRecord>(&line).unwrap().event, Some(event), "{line}");
        }
        let stop = serde_json::to_value(Event::Stop { at, cause: Cause::PageCache { bytes: 3 } }).unwrap();
        assert_eq!((&stop["kind"], &stop["at"]["source"]["gpu"]), (&"stop".into(), &2.into()));
        assert_eq!(stop["cause"], serde_json::json!({"is": "page_cache", "bytes": 3}));
    }

    #[test]
    fn a_record_of_an_earlier_version_keeps_its_text() {
        let mut old = serde_json::to_value(NodeRecord::default()).unwrap();
        old["event"] = "🟡 note: GPU 2 memory 85.0%".into();
        let record: NodeRecord = serde_json::from_value(old.clone()).unwrap();
        assert_eq!(record.event, Some(Event::Text { text: "🟡 note: GPU 2 memory 85.0%".into() }));
        old.as_object_mut().unwrap().remove("event");
        assert_eq!(serde_json::from_value::<NodeRecord>(old).unwrap().event, None);
    }
}
