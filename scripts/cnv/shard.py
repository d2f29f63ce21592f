"""Cut a table into shards, for training with --dataset.memory_efficient True on more rows than fit into memory.

python scripts/cnv/shard.py /path/to/dataset.parquet

makes /path/to/dataset/ with 00001.parquet, ... (all columns), rows/ (what training reads) and index.json. The table is
a csv or parquet that scripts/cnv/meta.py has been over. An interrupted run goes on when the command is given again.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from opensora.data.shards import ROWS_PER_SHARD, shard_folder, write_shards


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="TABLE", help="csv or parquet")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--num-shards", "--num_shards", type=positive, metavar="N", help="of like size")
    size.add_argument(
        "--rows-per-shard", "--rows_per_shard", type=positive, metavar="N", help=f"(default: {ROWS_PER_SHARD:,})"
    )
    return parser.parse_args(argv)


def describe(error: Exception, folder: Path) -> str:
    """One line; an error of the system, such as a full disk, does not always say where."""
    if isinstance(error, OSError) and error.strerror:
        return f"'{error.filename or folder}': {error.strerror}"
    return str(error)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    try:
        with tqdm(unit=" rows", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

            def show(done: int, total: int) -> None:
                if bar.total is None:
                    bar.total, bar.initial, bar.n = total, done, done
                bar.update(done - bar.n)

            index = write_shards(arguments.table, arguments.num_shards, arguments.rows_per_shard, show)
    except (ValueError, OSError) as error:
        print(f"error: {describe(error, shard_folder(arguments.table))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last finished shard", file=sys.stderr)
        return 130
    shards = f"{len(index.shards):,} shard{'s' if len(index.shards) > 1 else ''}"
    print(f"{index.rows:,} rows in {shards}: {shard_folder(arguments.table)}")
    if index.unusable:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in index.unusable.items())
        print(f"rows that training will not use: {reasons}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
