"""Run a notebook by nbclient, as `python run_notebook.py CELLS.json OUTPUTS.json`, in a process of its own: the client
and the kernel have warnings and threads that are no business of the tests.
"""

import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(cells: Path, outputs: Path) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in json.loads(cells.read_text())]
    )
    # The kernel of this interpreter, whatever is installed under the name.
    specification = cells.parent / "jupyter" / "kernels" / "own" / "kernel.json"
    specification.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification.write_text(json.dumps({"argv": command, "display_name": "own", "language": "python"}))
    os.environ["JUPYTER_PATH"] = str(cells.parent / "jupyter")
    NotebookClient(
        notebook, timeout=600, startup_timeout=300, kernel_name="own", allow_errors=True,
        resources={"metadata": {"path": str(cells.parent)}},
    ).execute()  # fmt: skip
    outputs.write_text(json.dumps([cell["outputs"] for cell in notebook["cells"]]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
