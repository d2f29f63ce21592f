"""Add the columns that training needs (height, width, fps, num_frames, aspect_ratio, resolution) to a table of videos.

python scripts/cnv/meta.py --input datasets/pexels_45k.csv --output datasets/pexels_45k_nec.csv --num_workers 64

A run that was interrupted goes on where it was when it is started again in the same way.
"""

import argparse
import sys
from pathlib import Path

from opensora.data.metadata import LONGEST, LONGEST_VERIFY, add_metadata
from opensora.data.table_stream import TableError


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="TABLE", help="csv or parquet with a column 'path'"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="TABLE", help="csv or parquet to write")
    parser.add_argument(
        "--num_workers", "--num-workers", type=int, metavar="N", help="processes; 0: in this one (default: all cores)"
    )
    parser.add_argument("--verify", action="store_true", help="decode all pictures: finds damaged ones, takes long")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help=f"seconds until a file is given up (default: {LONGEST:g}, with --verify {LONGEST_VERIFY:g})",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    try:
        summary = add_metadata(
            arguments.input, arguments.output, arguments.num_workers, arguments.verify, arguments.timeout
        )
    except (TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {arguments.output} was not written; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{summary.written:,} rows written to {arguments.output}")
    if summary.rejected:
        count = summary.rejected.total()
        print(f"{count:,} rows rejected ({summary.describe_rejected()}), listed in {summary.rejected_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
