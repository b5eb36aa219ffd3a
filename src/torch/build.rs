//! Compiles the C++ shim against libtorch's headers, and lets every binary find libtorch at run time. Where the wheel
//! holds the CUDA headers, the shim of CUDA graphs is built too: a shared object beside the binaries.

use std::path::{Path, PathBuf};

const SHIM: [&str; 6] = [
    "src/torch/shim.cpp",
    "src/torch/autograd.cpp",
    "src/torch/device.cpp",
    "src/torch/gloo.cpp",
    "src/torch/memory.cpp",
    "src/torch/operators.cpp",
];
/// Where programs of a package look for libtorch, in place of where it lies on the machine that builds them.
const RPATH: &str = "HEADROOM_RPATH";
/// Declarations of what the wheel's headers name and do not bring.
const DECLARED: &str = "src/torch/declared";
const GRAPH: &str = "src/torch/graph.cpp";

fn main() {
    for file in SHIM.iter().chain(&[GRAPH, DECLARED, "src/torch/guarded.h", "src/torch/build.rs"]) {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed={RPATH}");
    let Some(libtorch) = libtorch() else {
        println!("cargo:warning=LIBTORCH names no libtorch folder: run scripts/setup, or point LIBTORCH at one");
        std::process::exit(1);
    };
    cpp(&libtorch).include(DECLARED).files(SHIM).compile("headroom_torch");
    // The plain form reaches binaries, tests, benches and examples of this package alike.
    let rpath = std::env::var_os(RPATH).map_or_else(|| libtorch.join("lib"), PathBuf::from);
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", rpath.display());
    if let Err(problem) = graph(&libtorch) {
        // Training works without it: the rank says why no graph is used.
        println!("cargo:warning=no CUDA graphs in this build: {problem}");
    }
}

fn cpp(libtorch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).warnings(false);
    build.include(libtorch.join("include")).include(libtorch.join("include/torch/csrc/api/include"));
    build
}

/// `libheadroom_graph.so` in the folder of the binaries. It has types of CUDA, which a binary for all machines cannot link.
fn graph(libtorch: &Path) -> Result<(), String> {
    let headers = libtorch.join("../nvidia/cu13/include");
    if !headers.join("cuda_runtime_api.h").exists() || !libtorch.join("lib/libtorch_cuda.so").exists() {
        return Err("the libtorch at hand has no CUDA headers or no libtorch_cuda.so".into());
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo names no OUT_DIR")?);
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let binaries = out.ancestors().nth(3).ok_or("OUT_DIR is not where cargo puts it")?;
    let built = out.join("libheadroom_graph.so");
    let mut command = cpp(libtorch).include(&headers).pic(true).get_compiler().to_command();
    command.args(["-shared", "-o"]).arg(&built).arg(GRAPH).arg("-L").arg(libtorch.join("lib"));
    command.args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10", "-Wl,--allow-shlib-undefined"]);
    let output = command.output().map_err(|e| format!("the compiler does not start: {e}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(text.lines().find(|line| line.contains("error")).unwrap_or("the compiler failed").to_owned());
    }
    // Beside and renamed: a binary that runs keeps the file that it has mapped.
    let (place, partial) = (binaries.join("libheadroom_graph.so"), binaries.join(".libheadroom_graph.so.partial"));
    std::fs::copy(&built, &partial).and_then(|_| std::fs::rename(&partial, &place)).map_err(|e| e.to_string())
}

/// The libtorch folder with links resolved, so that the rpath stays right when a link moves.
fn libtorch() -> Option<PathBuf> {
    let named = PathBuf::from(std::env::var_os("LIBTORCH")?);
    let folder = named.canonicalize().ok()?;
    folder.join("include/ATen/ATen.h").exists().then_some(folder)
}
