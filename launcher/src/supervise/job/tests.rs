use super::*;
use crate::cache::PolicyKind;
use crate::cache::server::tests::breakdown;
use crate::supervise::{CacheSpec, RankSpec};
use spec::contract::exit;
use std::sync::Mutex;

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Watcher for Notes {
    fn line(&self, _: u32, _: Stream, _: &str) {}
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

/// Rank 1 makes the directory's thread panic; both would live for minutes.
const SCRIPT: &str = r#"
import os, time
if os.environ["RANK"] == "1":
    os.write(int(os.environ["HEADROOM_CACHE_FD"]), bytes.fromhex(os.environ["TEST_BYTES"]))
time.sleep(300)
"#;

#[test]
fn the_death_of_the_directory_alone_fails_the_job_with_its_cause() {
    let hex: String = breakdown().iter().map(|byte| format!("{byte:02x}")).collect();
    let rank = |rank: u32| RankSpec { rank, env: vec![("RANK".into(), rank.to_string())] };
    let spec = Spec {
        program: "python3".into(),
        args: vec!["-c".into(), SCRIPT.into()],
        env: vec![("TEST_BYTES".into(), hex)],
        ranks: vec![rank(0), rank(1)],
        log_dir: None,
        grace: Duration::from_secs(20),
        control: true,
        cache: Some(CacheSpec { capacity_bytes: 1 << 20, policy: PolicyKind::Pin }),
        watch: crate::watch::WatchSpec::silent(),
        limits: None,
    };
    let notes = Notes::default();
    let outcome = crate::supervise::run(&spec, &notes).unwrap();
    assert_eq!(outcome.exit_code, exit::INTERNAL);
    let failure = outcome.first_failure.unwrap().to_string();
    assert!(failure.contains("the page cache's directory in the launcher is gone"), "{failure}");
    assert!(failure.contains("ended in a panic"), "{failure}");
    assert!(notes.0.lock().unwrap().iter().any(|note| note.starts_with("page cache: the directory's thread")));
    println!("the job ended after {:?}", outcome.wall);
}
