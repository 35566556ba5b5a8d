"""How many bytes does the gradient of the head's weight move, and what is the peak, with one tile or several?

    python -m bench head_bytes --shape llama-8b

This is arithmetic, which ``tests/ops/head/test_traffic.py`` compares with a count of what the operators read and write.
Bytes are those of the gradient and of its sums. The peak is that of the tile, the sums and the gradient. A star marks
what the head takes, which is the smaller of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .shapes import SHAPES
from .timing import table


def gradient_bytes(tiles: int, leaf: int) -> int:
    """Returns the bytes that are moved per element of a weight of ``leaf`` bytes.

    One tile writes the gradient. Of several, the first writes fp32 sums, those between read and write them, and the
    last reads them and writes the gradient.
    """
    return leaf if tiles == 1 else 4 + 8 * (tiles - 2) + 4 + leaf


def peak_bytes(tokens: int, rows: int, hidden: int, vocab: int, leaf: int, product: int = 2) -> tuple[int, int]:
    """Returns the peaks of one tile and of tiles of ``rows`` rows, for operands of ``product`` bytes.

    A gradient in fp32 is made in place of its sums.
    """
    one = tokens * vocab * product + vocab * hidden * leaf
    several = rows * vocab * product + vocab * hidden * (4 + (leaf if leaf < 4 else 0))
    return one, several


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench head_bytes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "small"], default="llama-8b")
    parser.add_argument("--tile_mb", type=float, default=1024, help="budget of a tile in MiB")
    parser.add_argument("--tokens", default="4096,5257,8165,12378,16384,32768", help="comma-separated numbers of rows")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    rows = int(options.tile_mb * 2**20) // (2 * shape.vocab)
    elements = shape.vocab * shape.hidden
    lines = []
    for name, leaf in (("bf16", 2), ("fp32", 4)):
        for tokens in map(int, options.tokens.split(",")):
            tiles = -(-tokens // rows)
            one, several = peak_bytes(tokens, rows, shape.hidden, shape.vocab, leaf)
            is_one = tiles == 1 or one <= several
            before = leaf if tiles == 1 and leaf == 2 else 4 + 8 * tiles + (0 if tiles == 1 else 4 + leaf)
            moved = [before, gradient_bytes(1, leaf), gradient_bytes(tiles, leaf)]
            bytes_ = [f"{per_element * elements / 1e9:.1f}" for per_element in moved]
            mark = ["*" if is_one else "", "" if is_one else "*"]
            peaks = [f"{one / 1e9:.1f}{mark[0]}", f"{several / 1e9:.1f}{mark[1]}" if tiles > 1 else ""]
            lines.append([name, f"{tokens:,}", str(tiles), *bytes_[:2], bytes_[2] if tiles > 1 else "", *peaks])
    header = ["weights", "rows", "tiles", "GB before", "one tile", "several", "peak GB, one tile", "several"]
    print(f"{options.shape}: hidden {shape.hidden}, vocabulary {shape.vocab:,}, {rows:,} rows in a tile; * is taken")
    print(table(header, lines))


if __name__ == "__main__":
    main()
