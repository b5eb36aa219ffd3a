use super::*;
use crate::supervise::{CacheSpec, RankSpec};
use cache::PolicyKind;
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

/// A page cache whose directory's thread panics beside ranks that would live for minutes.
fn start_and_panic(spec: &Spec) -> io::Result<Option<CacheHost>> {
    let host = start_cache(spec)?;
    host.as_ref().unwrap().panic();
    Ok(host)
}

#[test]
fn the_death_of_the_directory_alone_fails_the_job_with_its_cause() {
    let rank = |rank: u32| RankSpec { rank, env: vec![("RANK".into(), rank.to_string())] };
    let spec = Spec {
        program: "python3".into(),
        args: vec!["-c".into(), "import time; time.sleep(300)".into()],
        forks: false,
        env: Vec::new(),
        ranks: vec![rank(0), rank(1)],
        log_dir: None,
        grace: Duration::from_secs(20),
        control: true,
        cache: Some(CacheSpec { capacity_bytes: 1 << 20, policy: PolicyKind::Pin }),
        watch: crate::watch::WatchSpec::silent(),
        limits: None,
    };
    let notes = Notes::default();
    let outcome = run_with(&spec, &notes, &Signals::take().unwrap(), start_and_panic).unwrap();
    assert_eq!(outcome.exit_code, exit::INTERNAL);
    let failure = outcome.first_failure.unwrap().to_string();
    assert!(failure.contains("the page cache's directory in the launcher is gone"), "{failure}");
    assert!(failure.contains("ended in a panic"), "{failure}");
    assert!(notes.0.lock().unwrap().iter().any(|note| note.starts_with("page cache: the directory's thread")));
    println!("the job ended after {:?}", outcome.wall);
}
