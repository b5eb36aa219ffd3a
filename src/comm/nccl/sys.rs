//! NCCL's C interface, symbol by symbol, in a library found at run time. Layouts as in nccl.h of 2.28.
//!
//! Source of the numbers: the header's enums. Functions used here exist since 2.14.

use super::error::NcclError;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

/// `ncclComm_t`.
pub type RawComm = *mut c_void;
/// `ncclResult_t`.
pub type Code = c_int;

pub const SUCCESS: Code = 0;
pub const IN_PROGRESS: Code = 7;

/// `ncclDataType_t`.
pub const UINT8: c_int = 1;
pub const INT64: c_int = 4;
pub const FLOAT16: c_int = 6;
pub const FLOAT32: c_int = 7;
pub const FLOAT64: c_int = 8;
pub const BFLOAT16: c_int = 9;

/// `ncclRedOp_t`.
pub const SUM: c_int = 0;

pub const UNIQUE_ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawUniqueId(pub [u8; UNIQUE_ID_BYTES]);

/// `ncclConfig_v22800`. NCCL copies `size` bytes of it, so that an older library reads the part that it knows.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    pub blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    n_channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER`, with calls that return before they are done.
    pub fn non_blocking() -> Config {
        const UNDEF: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 22809,
            blocking: 0,
            cga_cluster_size: UNDEF,
            min_ctas: UNDEF,
            max_ctas: UNDEF,
            net_name: std::ptr::null(),
            split_share: UNDEF,
            traffic_class: UNDEF,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEF,
            cta_policy: UNDEF,
            shrink_share: UNDEF,
            nvls_ctas: UNDEF,
            n_channels_per_net_peer: UNDEF,
            nvlink_centric_sched: UNDEF,
        }
    }
}

macro_rules! api {
    ($($field:ident: $symbol:literal fn($($arg:ty),*) -> $out:ty;)*) => {
        /// The functions of one loaded library.
        pub struct Api {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> $out,)*
        }

        impl Api {
            /// # Safety
            /// `library` must be NCCL.
            unsafe fn bind(library: &Library) -> Result<Api, NcclError> {
                // SAFETY: the types are those of nccl.h, and the caller vouches for the library.
                unsafe {
                    Ok(Api { $($field: *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| NcclError::NoSymbol($symbol))?,)* })
                }
            }
        }
    };
}

api! {
    get_version: "ncclGetVersion" fn(*mut c_int) -> Code;
    get_unique_id: "ncclGetUniqueId" fn(*mut RawUniqueId) -> Code;
    comm_init_rank_config: "ncclCommInitRankConfig" fn(*mut RawComm, c_int, RawUniqueId, c_int, *mut Config) -> Code;
    comm_finalize: "ncclCommFinalize" fn(RawComm) -> Code;
    comm_destroy: "ncclCommDestroy" fn(RawComm) -> Code;
    comm_abort: "ncclCommAbort" fn(RawComm) -> Code;
    comm_async_error: "ncclCommGetAsyncError" fn(RawComm, *mut Code) -> Code;
    error_string: "ncclGetErrorString" fn(Code) -> *const c_char;
    last_error: "ncclGetLastError" fn(RawComm) -> *const c_char;
    all_reduce: "ncclAllReduce" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Code;
    broadcast: "ncclBroadcast" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Code;
    all_gather: "ncclAllGather" fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> Code;
}

/// An NCCL that is loaded for the life of the process.
pub struct Loaded {
    pub api: Api,
    /// `NCCL_VERSION_CODE`: 22809 is 2.28.9.
    pub version: u32,
    /// Where it came from.
    pub origin: String,
}

/// Oldest version that serves: non-blocking communicators.
pub const OLDEST: u32 = 21400;

/// Where an NCCL may be found, in the order in which to look.
pub struct SearchPaths {
    /// `HEADROOM_NCCL`: a path, or a name for the dynamic linker.
    pub named: Option<PathBuf>,
    /// Folder of libtorch's libraries.
    pub torch: Option<PathBuf>,
}

/// The library that libtorch mapped already, else the one named, else the wheel's beside libtorch. Asked once; later
/// calls get the first answer.
///
/// # Errors
/// The library is missing or too old.
pub fn load(places: &SearchPaths) -> Result<&'static Loaded, NcclError> {
    static LOADED: OnceLock<Result<Loaded, NcclError>> = OnceLock::new();
    LOADED.get_or_init(|| find(places)).as_ref().map_err(Clone::clone)
}

/// [`load`] without its memory, for tests.
pub fn find(places: &SearchPaths) -> Result<Loaded, NcclError> {
    const SONAME: &str = "libnccl.so.2";
    // Two NCCLs in one process corrupt each other: the one that is there wins, whatever was named.
    const RTLD_NOLOAD: c_int = 4;
    let mut tried = Vec::new();
    // SAFETY: with RTLD_NOLOAD nothing is loaded and no initialiser runs.
    if let Ok(library) = unsafe { Library::open(Some(SONAME), RTLD_NOLOAD | RTLD_NOW) } {
        return bind(library, format!("{SONAME}, mapped already"));
    }
    if let Some(path) = &places.named {
        return open(path)
            .map_err(|e| NcclError::Missing { tried: vec![format!("HEADROOM_NCCL={}: {e}", path.display())] })?;
    }
    let beside = places.torch.iter().flat_map(|lib| {
        // torch/lib → site-packages/nvidia/nccl/lib, and torch's own folder for other builds.
        [lib.join("../../nvidia/nccl/lib").join(SONAME), lib.join(SONAME)]
    });
    for path in beside.chain([PathBuf::from(SONAME)]) {
        match open(&path) {
            Ok(found) => return found,
            Err(problem) => tried.push(problem),
        }
    }
    Err(NcclError::Missing { tried })
}

fn open(path: &std::path::Path) -> Result<Result<Loaded, NcclError>, String> {
    // SAFETY: NCCL's initialisers only set up tables; it is the library that libtorch itself would load.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| e.to_string())?;
    Ok(bind(library, path.display().to_string()))
}

fn bind(library: Library, origin: String) -> Result<Loaded, NcclError> {
    // SAFETY: found under NCCL's name, or named by the user as NCCL.
    let api = unsafe { Api::bind(&library) }?;
    let mut version: c_int = 0;
    // SAFETY: one place to write to.
    let code = unsafe { (api.get_version)(&mut version) };
    // Its threads and tables live as long as the process.
    std::mem::forget(library);
    let version = u32::try_from(version).unwrap_or(0);
    if code != SUCCESS || version < OLDEST {
        return Err(NcclError::TooOld { origin, version });
    }
    Ok(Loaded { api, version, origin })
}
