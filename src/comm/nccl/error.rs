//! Failures of NCCL in words.

/// Why there is no NCCL, or what it had to say.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NcclError {
    #[error(
        "no NCCL found ({}): install the nvidia-nccl-cu13 package beside PyTorch, or name a libnccl.so.2 in HEADROOM_NCCL",
        tried.join("; ")
    )]
    Missing { tried: Vec<String> },
    #[error("NCCL {} at {origin} is too old: 2.14 or newer is needed; name another libnccl.so.2 in HEADROOM_NCCL", version_text(*version))]
    TooOld { origin: String, version: u32 },
    #[error("the NCCL library has no function {0}: name another libnccl.so.2 in HEADROOM_NCCL")]
    NoSymbol(&'static str),
    #[error("{call}: {text}")]
    Call { call: &'static str, text: String },
    #[error("{call} took longer than {limit_s:.0} s")]
    Late { call: &'static str, limit_s: f64 },
}

/// `2.28.9` of 22809; versions up to 2.8 counted in thousands.
pub fn version_text(version: u32) -> String {
    let unit = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}
