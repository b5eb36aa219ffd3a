//! Options and variables of torchrun, so that its command lines work here.

use super::CliError;
use super::numbers::at_least_one;
use clap::Args;
use spec::contract::env;
use std::collections::BTreeSet;
use std::ffi::OsString;

/// torchrun's options that have no other name here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct TorchrunArgs {
    /// As torchrun: ranks of this node, a number, or one per GPU or core: auto, gpu, cpu
    #[arg(long, value_name = "N|auto|gpu|cpu", value_parser = nproc, conflicts_with_all = ["gpus", "ranks"])]
    pub nproc_per_node: Option<Nproc>,
    /// As torchrun: one node, whose ranks meet on this machine (the default here)
    #[arg(long, conflicts_with = "master_addr")]
    pub standalone: bool,
    /// As torchrun: HOST:PORT of node 0, in place of --master-addr and --master-port
    #[arg(long, value_name = "HOST:PORT", value_parser = endpoint, conflicts_with_all = ["master_addr", "master_port"])]
    pub rdzv_endpoint: Option<Endpoint>,
    /// As torchrun: name of the job
    #[arg(long, value_name = "ID")]
    pub rdzv_id: Option<String>,
    /// As torchrun; static and c10d mean the same here
    #[arg(long, value_name = "NAME", value_parser = ["static", "c10d"], hide = true)]
    pub rdzv_backend: Option<String>,
}

/// Host and port of node 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    pub port: Option<u16>,
}

/// `--nproc-per-node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nproc {
    Count(usize),
    /// One per GPU; without a GPU one per core.
    Auto,
    Gpu,
    Cpu,
}

impl Nproc {
    /// The number of ranks on a machine.
    ///
    /// # Errors
    /// One rank per GPU is asked for, and there is none.
    pub fn ranks(self, gpus: usize, cores: usize) -> Result<usize, CliError> {
        match self {
            Nproc::Count(count) => Ok(count),
            Nproc::Auto if gpus > 0 => Ok(gpus),
            Nproc::Auto | Nproc::Cpu => Ok(cores.max(1)),
            Nproc::Gpu if gpus > 0 => Ok(gpus),
            Nproc::Gpu => Err(CliError::Usage(
                "--nproc-per-node gpu: no GPU can be used here: give a number, or cpu for one rank per core".into(),
            )),
        }
    }
}

fn nproc(text: &str) -> Result<Nproc, String> {
    match text {
        "auto" => Ok(Nproc::Auto),
        "gpu" => Ok(Nproc::Gpu),
        "cpu" => Ok(Nproc::Cpu),
        text => at_least_one(text)
            .map(Nproc::Count)
            .map_err(|_| "expected a whole number of 1 or more, auto, gpu or cpu".into()),
    }
}

/// `--nnodes`: a number, or torchrun's MIN:MAX where both are the same.
pub(super) fn nnodes(text: &str) -> Result<usize, String> {
    match text.split_once(':') {
        Some((least, most)) if least == most => at_least_one(least),
        Some(_) => Err("the number of nodes is fixed here: give one number, or the same twice".into()),
        None => at_least_one(text),
    }
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, Some(port.parse().map_err(|_| format!("{port:?} is no port: expected HOST:PORT"))?))
        }
        _ => (text, None),
    };
    Ok(Endpoint { host: env::host(host)?, port })
}

/// Streams of ranks: torchrun's `--tee` and `--redirects`, `[0-3]` or `RANK:[0-3],…`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// For ranks that are not named: 1 standard output, 2 standard error, 3 both.
    all: u8,
    named: Vec<(usize, u8)>,
}

impl Streams {
    /// True if the stream (1: standard output, 2: standard error) of a local rank is meant.
    pub fn has(&self, local_rank: usize, stream: u8) -> bool {
        let named = self.named.iter().find(|(rank, _)| *rank == local_rank).map(|(_, streams)| *streams);
        // Ranks that are not named among others have none.
        named.unwrap_or(self.all) & stream != 0
    }
}

pub(super) fn streams(text: &str) -> Result<Streams, String> {
    let wrong =
        || "expected 0 (none), 1 (standard output), 2 (standard error) or 3 (both), or RANK:N,RANK:N".to_owned();
    let number = |text: &str| text.parse::<u8>().ok().filter(|number| *number <= 3).ok_or_else(wrong);
    if let Ok(all) = number(text) {
        return Ok(Streams { all, named: Vec::new() });
    }
    let one = |part: &str| {
        let (rank, streams) = part.split_once(':').ok_or_else(wrong)?;
        Ok((rank.trim().parse().map_err(|_| wrong())?, number(streams.trim())?))
    };
    Ok(Streams { all: 0, named: text.split(',').map(one).collect::<Result<_, String>>()? })
}

/// Options of torchrun by the names of their variables, without `PET_`; those after `|` mean the same and win.
const VARIABLES: [(&str, &[&str]); 12] = [
    ("NPROC_PER_NODE", &["--nproc-per-node", "--gpus", "--ranks"]),
    ("NNODES", &["--nnodes"]),
    ("NODE_RANK", &["--node-rank"]),
    ("MASTER_ADDR", &["--master-addr", "--rdzv-endpoint", "--standalone"]),
    ("MASTER_PORT", &["--master-port", "--rdzv-endpoint", "--standalone"]),
    ("MAX_RESTARTS", &["--max-restarts"]),
    ("RDZV_ENDPOINT", &["--rdzv-endpoint", "--master-addr", "--master-port", "--standalone"]),
    ("RDZV_ID", &["--rdzv-id", "--name"]),
    ("LOG_DIR", &["--log-dir"]),
    ("TEE", &["--tee"]),
    ("REDIRECTS", &["--redirects"]),
    ("LOCAL_RANKS_FILTER", &["--local-ranks-filter"]),
];
/// Those that only a program under `--exec` has.
const OF_PROGRAMS: [&str; 4] = ["LOG_DIR", "TEE", "REDIRECTS", "LOCAL_RANKS_FILTER"];

/// The command line before `--exec`, with torchrun's spelling of options (`--nproc_per_node`) made ours, and with options that
/// variables give where the line does not: `PET_…`, and for several nodes SLURM's. Only for a line that starts ranks.
pub(super) fn completed(
    mut head: Vec<OsString>,
    is_exec: bool,
    lookup: impl Fn(&str) -> Option<String>,
) -> Vec<OsString> {
    for word in &mut head {
        if let Some(dashed) = word.to_str().and_then(dashed) {
            *word = dashed.into();
        }
    }
    let starts_ranks = head.get(1).is_none_or(|word| word.to_string_lossy().starts_with('-') || word == "plan");
    if !starts_ranks {
        return head;
    }
    let names: BTreeSet<String> = head
        .iter()
        .filter_map(|word| word.to_str()?.split('=').next().filter(|name| name.starts_with("--")).map(str::to_owned))
        .collect();
    let has = |options: &[&str]| options.iter().any(|option| names.contains(*option));
    let mut given = BTreeSet::new();
    for (variable, options) in VARIABLES {
        let value = lookup(&format!("PET_{variable}")).filter(|value| !value.trim().is_empty());
        let fits = is_exec || !OF_PROGRAMS.contains(&variable);
        // What an earlier variable gave wins as well.
        let taken = has(options) || options.iter().any(|option| given.contains(option));
        if let Some(value) = value.filter(|_| fits && !taken) {
            head.extend([options[0].into(), value.trim().into()]);
            given.insert(options[0]);
        }
    }
    let stand_alone = lookup("PET_STANDALONE").is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
    if stand_alone && !has(&["--standalone", "--master-addr", "--rdzv-endpoint"]) && !given.contains("--master-addr") {
        head.push("--standalone".into());
    }
    let several = has(&["--nnodes"]) || given.contains("--nnodes");
    let known = |option: &str| has(&[option]) || given.contains(option);
    let placed = ["--node-rank", "--master-addr", "--rdzv-endpoint", "--standalone"].into_iter().any(known);
    if several && !placed {
        head.extend(from_slurm(&lookup, known("--master-port")));
    }
    head
}

/// Node's number and the address of the first node in a SLURM job step, which has one `launch` per node. `has_port`: that is
/// given already.
fn from_slurm(lookup: impl Fn(&str) -> Option<String>, has_port: bool) -> Vec<OsString> {
    let list = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"].into_iter().find_map(&lookup);
    let (Some(node), Some(host)) = (lookup("SLURM_NODEID"), list.as_deref().and_then(env::first_host)) else {
        return Vec::new();
    };
    // Jobs on one node rarely have numbers so far apart.
    let job: u64 = lookup("SLURM_JOB_ID").and_then(|job| job.parse().ok()).unwrap_or(0);
    let port = lookup("MASTER_PORT").unwrap_or_else(|| (29_500 + job % 10_000).to_string());
    let words = ["--node-rank", &node, "--master-addr", &host, "--master-port", &port];
    words[..if has_port { 4 } else { 6 }].iter().map(OsString::from).collect()
}

/// `--nproc_per_node=2` with dashes in its name; `None`: nothing to change.
fn dashed(word: &str) -> Option<String> {
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    };
    if !name.starts_with("--") || !name.contains('_') {
        return None;
    }
    let name = name.replace('_', "-");
    Some(value.map_or_else(|| name.clone(), |value| format!("{name}={value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str, exec: bool, variables: &'static [(&str, &str)]) -> String {
        let head = std::iter::once("launch").chain(text.split_whitespace()).map(OsString::from).collect();
        let lookup = |name: &str| variables.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
        let words = completed(head, exec, lookup);
        words[1..].iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn underscores_and_variables_become_options_where_the_line_has_none() {
        assert_eq!(
            line("--nproc_per_node=2 --max_restarts 3 --set a.b_c=1", false, &[]),
            "--nproc-per-node=2 --max-restarts 3 --set a.b_c=1"
        );
        let kubeflow: &[(&str, &str)] = &[
            ("PET_NNODES", "2"),
            ("PET_NPROC_PER_NODE", "auto"),
            ("PET_NODE_RANK", "1"),
            ("PET_MASTER_ADDR", "job-node-0-0.job"),
            ("PET_MASTER_PORT", "29400"),
        ];
        assert_eq!(
            line("--name n", true, kubeflow),
            "--name n --nproc-per-node auto --nnodes 2 --node-rank 1 --master-addr job-node-0-0.job --master-port 29400"
        );
        assert!(line("--ranks 3", false, kubeflow).starts_with("--ranks 3 --nnodes 2"));
        assert_eq!(line("doctor night", false, kubeflow), "doctor night");
        assert_eq!(line("", false, &[("PET_TEE", "3"), ("PET_LOG_DIR", "x")]), "");
        assert_eq!(line("", true, &[("PET_STANDALONE", "1"), ("PET_TEE", "3")]), "--tee 3 --standalone");
    }

    #[test]
    fn a_step_of_slurm_says_where_a_node_stands() {
        let slurm: &[(&str, &str)] =
            &[("SLURM_NODEID", "1"), ("SLURM_JOB_NODELIST", "gpu[03-05,9],x"), ("SLURM_JOB_ID", "12345")];
        assert_eq!(
            line("--nnodes 2", false, slurm),
            "--nnodes 2 --node-rank 1 --master-addr gpu03 --master-port 31845"
        );
        assert_eq!(line("--nnodes 2 --node-rank 0", false, slurm), "--nnodes 2 --node-rank 0");
        assert_eq!(line("--config a", false, slurm), "--config a");
        assert_eq!(
            line("--nnodes 2 --master-port 7", false, slurm),
            "--nnodes 2 --master-port 7 --node-rank 1 --master-addr gpu03"
        );
        let mixed: &[(&str, &str)] =
            &[("SLURM_NODEID", "1"), ("SLURM_JOB_NODELIST", "a,b"), ("PET_NNODES", "2"), ("PET_NODE_RANK", "0")];
        assert_eq!(line("", false, mixed), "--nnodes 2 --node-rank 0", "a place that is given in part is not mended");
    }

    #[test]
    fn numbers_of_ranks_have_torchruns_meaning() {
        assert_eq!(nproc("3"), Ok(Nproc::Count(3)));
        assert!(nproc("0").is_err() && nproc("gpus").is_err());
        let ranks = |nproc: Nproc, gpus| nproc.ranks(gpus, 8).ok();
        assert_eq!((ranks(Nproc::Auto, 2), ranks(Nproc::Auto, 0)), (Some(2), Some(8)));
        assert_eq!((ranks(Nproc::Gpu, 2), ranks(Nproc::Gpu, 0), ranks(Nproc::Cpu, 2)), (Some(2), None, Some(8)));
        assert_eq!((nnodes("2:2"), nnodes("2")), (Ok(2), Ok(2)));
        assert!(nnodes("1:4").unwrap_err().contains("fixed"));
    }

    #[test]
    fn streams_are_of_all_ranks_or_of_those_named() {
        let both = streams("3").unwrap();
        assert!(both.has(5, 1) && both.has(5, 2));
        let some = streams("0:1,1:2").unwrap();
        assert!(some.has(0, 1) && !some.has(0, 2) && some.has(1, 2) && !some.has(2, 1));
        for wrong in ["4", "a", "0:9", "x:1"] {
            assert!(streams(wrong).is_err(), "{wrong}");
        }
        assert_eq!(endpoint("h:1"), Ok(Endpoint { host: "h".into(), port: Some(1) }));
        assert_eq!(endpoint("[::1]:2"), Ok(Endpoint { host: "::1".into(), port: Some(2) }));
        assert_eq!(endpoint("h").unwrap().port, None);
        assert!(endpoint("h:x").is_err());
    }
}
