"""Executes the notebooks from top to bottom, and stores their printed output and plots.

    python colabs/execute.py                      all of them, in place
    python colabs/execute.py 1_quickstart         one
    python colabs/execute.py --check              in a copy: fails if one raises or lacks outputs

Each notebook runs on the CPU, in its own folder and with the installed package, as users run it.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

COLABS = Path(__file__).parent
# Variables that a user's kernel would not have, and the setting that selects the CPU.
UNSET = ("MPLBACKEND", "XLA_FLAGS", "PYTHONPATH")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: nbformat.NotebookNode) -> list[str]:
    """Runs all cells and returns their stderr output, which is not stored."""
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    errors = []
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            errors += [output.text for output in cell.outputs if output.get("name") == "stderr"]
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            # Beside a picture is the repr of its object, which contains a memory address.
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data = {"image/png": output.data["image/png"]}
    return errors


def kinds_of_output(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The kinds of output of each code cell: printed text, pictures, and so on."""
    return [
        sorted(
            {kind for output in cell.outputs for kind in output.get("data", [output.get("name")])}
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def main() -> None:
    """Executes the notebooks that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks, all by default")
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    arguments = parser.parse_args()
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)
    # The kernel, and programs that it starts, use the Python that runs this program.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    paths = [COLABS / f"{Path(name).stem}.ipynb" for name in arguments.names]
    failed = []
    for path in paths or sorted(COLABS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        stored = kinds_of_output(notebook)
        start = time.perf_counter()
        errors = execute(notebook)
        print(f"{path.stem:24} {time.perf_counter() - start:6.1f} s", flush=True)
        for text in errors:
            print(f"  stderr, not kept: {text.strip()[-500:]}")
        if not arguments.check:
            nbformat.write(notebook, path)
        elif stored != kinds_of_output(notebook):
            failed.append(path.name)
    if failed:
        sys.exit(f"Stored outputs are missing or are others; run colabs/execute.py: {failed}")


if __name__ == "__main__":
    main()
