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
    std::fs::write(work.path().join("nccl_abi.h"), header(&sys)).unwrap();
    let site = site_packages();
    let compile = |folder: &Path| {
        Command::new(std::env::var("CXX").unwrap_or_else(|_| "g++".into()))
            .args(["-std=c++17", "-fsyntax-only", "-I"])
            .arg(folder)
            .arg("-I")
            .arg(site.join("nvidia/cu13/include"))
            .arg("-I")
            .arg(site.join("nvidia/nccl/include"))
            .arg(root.join("tests/fake_cuda/abi.cpp"))
            .output()
            .unwrap()
    };
    let made = compile(work.path());
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // A field too many is seen.
    let wrong = folder();
    let text = header(&sys).replace("  int blocking;", "  int blocking;\n  int more;");
    std::fs::write(wrong.path().join("nccl_abi.h"), text).unwrap();
    assert!(!compile(wrong.path()).status.success());
}
