#!/usr/bin/env python3
"""Writes a bill of materials (CycloneDX 1.5) of a package's dependencies, and refuses licences that are not known to be free.

usage: sbom.py PACKAGE OUT.json, in the repository's root. Only what is linked counts: no dependencies of tests and builds."""
import json
import re
import subprocess
import sys
from collections import deque

FREE = {
    "MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "Unlicense", "CC0-1.0",
    "0BSD", "Unicode-3.0", "BSL-1.0", "MIT-0", "CDLA-Permissive-2.0", "bzip2-1.0.6", "HDF5", "LicenseRef-Bitstream-Vera",
}

# Crates that name no licence, with that of the sources in them.
NAMED = {"hdf5-metno-src": "BSD-3-Clause"}


def licence(package):
    return (package["license"] or NAMED.get(package["name"]) or "").replace("/", " OR ").replace("  ", " ")


def split(text, word):
    """Parts of an SPDX expression at `word`, outside of parentheses."""
    depth, found, start = 0, [], 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and text.startswith(f" {word} ", at):
            found.append(text[start:at])
            start = at + len(word) + 2
    return found + [text[start:]]


def is_free(text):
    """SPDX: one choice of each `OR`, all parts of each `AND`."""
    text = text.strip()
    for word, combine in (("OR", any), ("AND", all)):
        parts = split(text, word)
        if len(parts) > 1:
            return combine(map(is_free, parts))
    if text.startswith("(") and text.endswith(")"):
        return is_free(text[1:-1])
    return text in FREE


def main(package, out):
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    packages = {p["id"]: p for p in metadata["packages"]}
    nodes = {n["id"]: n for n in metadata["resolve"]["nodes"]}
    root = next(p["id"] for p in metadata["packages"] if p["name"] == package and p["id"] in metadata["workspace_members"])
    linked, queue = {}, deque([root])
    while queue:
        here = queue.popleft()
        if here in linked:
            continue
        normal = [d["pkg"] for d in nodes[here]["deps"] if any(k["kind"] is None for k in d["dep_kinds"])]
        linked[here] = sorted(normal)
        queue.extend(normal)
    name = lambda p: f"pkg:cargo/{p['name']}@{p['version']}"
    refused = sorted(f"{p['name']} {p['version']}: {p['license']}" for p in map(packages.get, linked) if not is_free(licence(p)))
    if refused:
        sys.exit("sbom: licences that nobody has looked at:\n  " + "\n  ".join(refused))
    sums = {(n, v): s for n, v, s in re.findall(r'name = "([^"]+)"\nversion = "([^"]+)"\nsource = "[^"]+"\nchecksum = "([0-9a-f]+)"', open("Cargo.lock").read())}
    components = []
    for p in sorted((packages[i] for i in linked if i != root), key=lambda p: (p["name"], p["version"])):
        one = {"type": "library", "bom-ref": name(p), "name": p["name"], "version": p["version"], "purl": name(p)}
        one["licenses"] = [{"expression": licence(p)}]
        checksum = sums.get((p["name"], p["version"]))
        if checksum:
            one["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        if p.get("repository"):
            one["externalReferences"] = [{"type": "vcs", "url": p["repository"]}]
        components.append(one)
    top = packages[root]
    bom = {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": name(top), "name": top["name"], "version": top["version"], "purl": name(top)}},
        "components": components,
        "dependencies": sorted(({"ref": name(packages[i]), "dependsOn": sorted({name(packages[d]) for d in deps})} for i, deps in linked.items()), key=lambda d: d["ref"]),
    }
    with open(out, "w") as file:
        json.dump(bom, file, indent=1, sort_keys=True)
        file.write("\n")
    print(f"{out}: {len(components)} components", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
