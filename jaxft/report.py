"""Write the report of a run again: `python -m jaxft.report --workdir DIR`."""

import sys
from pathlib import Path

from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.errors import UserError
from jaxft.runs.folders.workdir import read_config_file
from jaxft.tasks import OPTIONS


def main(argv: list[str] | None = None) -> int:
    """Write report.html of a run folder from its files, such as for a run of an earlier version."""
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    options, _ = parse("report", argv, OPTIONS)
    if "workdir" not in options:
        raise UserError("--workdir is missing: python -m jaxft.report --workdir DIR")
    workdir = Path(options["workdir"])
    read_config_file(workdir)  # raises where this is no run folder
    from jaxft.runs.pages.report import write_report

    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
    sys.exit(main())
