"""``llmq env``"""

from __future__ import annotations

from llmq.cli import options
from llmq.cli.console import out, print_json, table
from llmq.memory import format_bytes


def env(json: options.Json = False) -> None:
    """Show versions, devices and memory, and what is missing for which feature: for a bug report."""
    from llmq.bench.environment import describe

    facts = describe()
    if json:
        print_json("llmq.env/1", facts)
        return

    def size(key: str) -> str:
        return "unknown" if facts[key] is None else format_bytes(facts[key])

    machine = table("machine", "")
    machine.columns[1].justify = "left"
    machine.add_row("platform", facts["platform"])
    machine.add_row("CPU", f"{facts['cpu']}, {facts['cpu_count']} usable")
    machine.add_row("memory", f"{size('memory_free_bytes')} free of {size('memory_total_bytes')}")
    machine.add_row("disk here", f"{size('disk_free_bytes')} free")
    machine.add_row("driver", facts["driver"] or "none")
    machine.add_row("torch's CUDA", facts["torch_cuda"] or "none")
    for device in facts["devices"]:
        free, total = format_bytes(device["memory_free_bytes"]), format_bytes(device["memory_total_bytes"])
        machine.add_row("GPU", f"{device['name']}, {device['compute_capability']}, {free} free of {total}")
    out.print(machine)
    out.print()
    versions = table("package", "version")
    for package, version in facts["versions"].items():
        versions.add_row(package, version or "–")
    out.print(versions)
    if facts["missing"]:
        out.print()
        missing = table("missing", "for", "how")
        for column in missing.columns:
            column.justify, column.no_wrap = "left", False
        for entry in facts["missing"]:
            missing.add_row(entry["package"], entry["purpose"], entry["install"])
        out.print(missing)
