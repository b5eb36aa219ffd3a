//! Every number that kernel and allocator have, as two lines.

use super::MonitorError;
use crate::report::memory::{MemorySnapshot, free_bytes};
use crate::torch;
use spec::config::Language;

/// The lines of [`super::MemoryMonitor::statistics`]; `now`: of this process.
pub fn lines(language: Language, now: &MemorySnapshot) -> Result<Vec<String>, MonitorError> {
    let (system, gpu) = match language {
        Language::En => ("System memory", "GPU memory"),
        Language::Zh => ("系统内存", "GPU内存"),
    };
    let mut lines = vec![format!("{system}: {}", of_system(now)?)];
    lines.extend(torch::device_statistics(0).map(|statistics| format!("{gpu}: {}", dictionary(&statistics))));
    Ok(lines)
}

/// Machine and process, bytes; percent of the machine.
fn of_system(now: &MemorySnapshot) -> Result<String, MonitorError> {
    let free = free_bytes()?;
    let (total, used) = (now.system_total_bytes, now.system_used_bytes);
    let available = total.saturating_sub(used);
    let [percent, own] = [used, now.rss_bytes].map(|bytes| 100.0 * bytes as f64 / total.max(1) as f64);
    let (rss, pss, uss) = (now.rss_bytes, now.pss_bytes, now.uss_bytes);
    Ok(format!(
        "{{'total': {total}, 'available': {available}, 'percent': {percent:.1}, 'used': {used}, 'free': {free}, \
         'process_rss': {rss}, 'process_percent': {own:.1}, 'process_pss': {pss}, 'process_uss': {uss}}}"
    ))
}

fn dictionary(statistics: &[(String, i64)]) -> String {
    let pairs: Vec<String> = statistics.iter().map(|(name, value)| format!("'{name}': {value}")).collect();
    format!("{{{}}}", pairs.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::own_loop::MemoryMonitor;
    use spec::contract::MemoryRecord;

    #[test]
    fn system_process_and_allocator_on_demand() {
        let monitor = MemoryMonitor::new(0);
        for (language, start) in [(Language::En, "System memory: {'total': "), (Language::Zh, "系统内存: {'total': ")]
        {
            let lines = monitor.statistics(language).unwrap();
            assert!(lines[0].starts_with(start), "{lines:?}");
            // Without a device there is nothing to say of one.
            assert_eq!(lines.len(), 1 + usize::from(torch::device_statistics(0).is_some()));
        }
        let record = MemoryRecord {
            rss_bytes: 25,
            pss_bytes: 20,
            uss_bytes: 10,
            system_used_bytes: 400,
            system_total_bytes: 1000,
            ..MemoryRecord::default()
        };
        let text = of_system(&MemorySnapshot { record, on_device: false }).unwrap();
        assert!(text.starts_with("{'total': 1000, 'available': 600, 'percent': 40.0, 'used': 400, 'free': "), "{text}");
        let process = "'process_rss': 25, 'process_percent': 2.5, 'process_pss': 20, 'process_uss': 10}";
        assert!(text.ends_with(process), "{text}");
        let statistics = [("allocated_bytes.all.current".to_owned(), 7), ("num_ooms".to_owned(), 0)];
        assert_eq!(dictionary(&statistics), "{'allocated_bytes.all.current': 7, 'num_ooms': 0}");
    }
}
