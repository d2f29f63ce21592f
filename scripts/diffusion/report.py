"""Write what a run did as one page to open in a browser; of several runs, side by side.

python scripts/diffusion/report.py outputs/EXP
python scripts/diffusion/report.py outputs/FIRST outputs/SECOND --output compared.html
"""

import argparse
from pathlib import Path

from opensora.common import one_line_errors
from opensora.training.report.page import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, e.g. outputs/EXP")
    parser.add_argument("--output", type=Path, help="the page; default: report.html in the run folder (of the first)")
    arguments = parser.parse_args()
    page = arguments.output or arguments.runs[0] / default_name(arguments.runs)
    write_report(arguments.runs, page)
    print(page)


def default_name(runs: list[Path]) -> str:
    """`report.html`, or `report-with-SECOND.html`."""
    others = "-".join(run.resolve().name for run in runs[1:])
    return f"report-with-{others[:150]}.html" if others else "report.html"


if __name__ == "__main__":
    with one_line_errors():
        main()
