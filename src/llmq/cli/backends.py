"""``llmq backends``"""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli import options
from llmq.cli.console import err, out, print_json, table
from llmq.quant.backends import BACKENDS, environment, find_backend

app = typer.Typer(help="Third-party quantizers, each in an environment of its own.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help=", ".join(BACKENDS), show_default=False)]


@app.command("list")
def list_backends(json: options.Json = False) -> None:
    """What there is, and what is installed.

    llmq backends list
    """
    versions = {name: environment.installed_version(backend) for name, backend in BACKENDS.items()}
    if json:
        print_json(
            "llmq.backends/1",
            {
                "backends": [
                    {
                        "name": name,
                        "installed": versions[name],
                        "methods": backend.methods,
                        "bits": backend.bits,
                        "formats": backend.formats,
                        "devices": backend.devices,
                        "note": backend.note,
                    }
                    for name, backend in BACKENDS.items()
                ]
            },
        )
        return
    grid = table("backend", "installed", "methods", "bits", "formats", "devices", "note")
    for name, backend in BACKENDS.items():
        words = (
            ", ".join(map(str, each)) for each in (backend.methods, backend.bits, backend.formats, backend.devices)
        )
        grid.add_row(name, versions[name] or "no", *words, backend.note)
    out.print(grid)


@app.command("install")
def install(name: Name) -> None:
    """Make the environment of a backend: 1.5 to 2.5 GB in the user's cache.

    llmq backends install gptqmodel
    """
    backend = find_backend(name)
    environment.install(backend, err.print)
    out.print(f"{name} {environment.installed_version(backend)} is installed: llmq quantize … --backend {name}")


@app.command("remove")
def remove(name: Name) -> None:
    """Remove the environment of a backend.

    llmq backends remove gptqmodel
    """
    removed = environment.remove(find_backend(name))
    out.print(f"{name} is removed" if removed else f"{name} was not installed")
