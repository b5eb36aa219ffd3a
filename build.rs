//! Compiles the C++ shim against libtorch's headers, and lets every binary find libtorch at run time.

use std::path::PathBuf;

fn main() {
    for file in ["src/torch/shim.cpp", "src/torch/memory.cpp", "build.rs"] {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = libtorch() else {
        println!("cargo:warning=LIBTORCH names no libtorch folder: run scripts/setup, or point LIBTORCH at one");
        std::process::exit(1);
    };
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .warnings(false)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .file("src/torch/shim.cpp")
        .file("src/torch/memory.cpp")
        .compile("headroom_torch");
    // The plain form reaches binaries, tests, benches and examples of this package alike.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libtorch.join("lib").display());
}

/// The libtorch folder with links resolved, so that the rpath stays right when a link moves.
fn libtorch() -> Option<PathBuf> {
    let named = PathBuf::from(std::env::var_os("LIBTORCH")?);
    let folder = named.canonicalize().ok()?;
    folder.join("include/ATen/ATen.h").exists().then_some(folder)
}
