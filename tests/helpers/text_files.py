"""Texts that readers of files take for dates, numbers, nulls or truth values, and files of them."""

import json
from pathlib import Path

TEXTS = [
    *("2024-01-02", "2024-01-02T03:04:05Z", "2024-01-02 03:04:05", "12:30", "12:30:00Z", "1999", "Jan 2, 2024"),
    *("NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "<NA>", "#N/A", "-", "True", "true", "FALSE", "yes"),
    *("12", "007", "1e5", "1E-3", "+1", "-0", "0x10", "1_000", "1,000", ".5", "1.10", "inf", "-Infinity", "9" * 40),
    *(
        " padded ",
        "\tTab",
        "two\nlines",
        "carriage\r\nreturn",
        '"quoted", with comma',
        "'single'",
        "\u2028x",
        "naïve 日本 😀",
    ),
    *('{"a": 1}', "[1, 2]", '"text"', "\\n", "\\", "\ufeffmark", "x" * 200_000),
]
ROWS = [
    {"prompt": f"p{text}", "chosen": text, "rejected": text[::-1] or "x", "rating": str(i)}
    for i, text in enumerate(TEXTS)
]


def as_csv(rows: list[dict], separator: str = ",") -> str:
    """Returns rows as CSV. Every cell is in quotes."""
    quoted = [[str(cell).replace('"', '""') for cell in cells] for cells in [rows[0], *(row.values() for row in rows)]]
    return "".join(separator.join(f'"{cell}"' for cell in cells) + "\r\n" for cells in quoted)


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    """Writes rows in the form that the suffix of ``name`` says."""
    path = folder / name
    if path.suffix == ".csv":
        path.write_bytes(as_csv(rows).encode())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return path
