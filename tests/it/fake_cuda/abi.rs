//! What Headroom declares of NCCL and CUDA, held to the headers by a compiler.

use super::model::site_packages;
use crate::support::folder;
use std::path::Path;
use std::process::Command;

/// `sys.rs` in C: its constants, and the fields of its `Config`.
fn header(sys: &str) -> String {
    let mut text = String::from("#pragma once\n#include <cstddef>\n");
    for line in sys.lines().filter_map(|line| line.strip_prefix("pub const ")) {
        let (name, rest) = line.split_once(": ").unwrap();
        if let Some((kind, value)) = rest.split_once(" = ")
            && matches!(kind, "Code" | "c_int" | "usize")
        {
            text += &format!("constexpr long {name} = {}\n", value);
        }
    }
    let fields = sys.split("pub struct Config {").nth(1).unwrap().split('}').next().unwrap();
    text += "struct Config {\n";
    for field in fields.lines().map(|line| line.trim().trim_start_matches("pub ").trim_end_matches(',')) {
        let Some((name, kind)) = field.split_once(": ") else { continue };
        let kind = match kind {
            "usize" => "size_t",
            "c_uint" => "unsigned",
            "c_int" => "int",
            "*const c_char" => "const char*",
            other => panic!("{other} of {name} is not known here"),
        };
        text += &format!("  {kind} {name};\n");
    }
    text + "};\n"
}

#[test]
fn declarations_of_nccl_and_cuda_are_those_of_the_headers() {
    let (root, work) = (Path::new(env!("CARGO_MANIFEST_DIR")), folder());
    let sys = std::fs::read_to_string(root.join("src/comm/nccl/sys.rs")).unwrap();
    let write = |folder: &Path, text: String| {
        std::fs::write(folder.join("nccl_abi.h"), text).unwrap();
        // Macros of CUDA's C++ library, which the wheel lacks; nccl.h comes by them through its half floats.
        std::fs::create_dir(folder.join("nv")).unwrap();
        let names = ["NV_IF_TARGET", "NV_IF_ELSE_TARGET", "NV_DISPATCH_TARGET"];
        std::fs::write(folder.join("nv/target"), names.map(|name| format!("#define {name}(...)\n")).concat()).unwrap();
    };
    write(work.path(), header(&sys));
    let site = site_packages();
    // nccl.h is of the bench environment, where there is one: without it the numbers above stand for it.
    let bench = std::fs::read_dir(root.join(".bench-venv/lib")).into_iter().flatten().flatten().next();
    let nccl = bench.map(|python| python.path().join("site-packages/nvidia/nccl/include")).unwrap_or_default();
    let compile = |folder: &Path| {
        Command::new(std::env::var("CXX").unwrap_or_else(|_| "g++".into()))
            .args(["-std=c++17", "-fsyntax-only", "-I"])
            .arg(folder)
            .arg("-I")
            .arg(site.join("nvidia/cu13/include"))
            .arg("-I")
            .arg(&nccl)
            .arg(root.join("tests/fake_cuda/abi.cpp"))
            .output()
            .unwrap()
    };
    let made = compile(work.path());
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // A field too many is seen.
    let wrong = folder();
    write(wrong.path(), header(&sys).replace("  int blocking;", "  int blocking;\n  int more;"));
    assert!(!compile(wrong.path()).status.success());
}
