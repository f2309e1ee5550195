"""Joins the .py files of all packages that this Python has into a corpus for train_lm.py --data.

    python results/corpus.py FOLDER [--megabytes 120]        200 text files; then python train_lm.py --data FOLDER/*.txt

A file of 1 to 60 kB is taken once, however often it lies there. Its checksum says which text it joins, so that
the same packages in the same places make the same corpus. train_lm.py holds every tenth text back to validate, and logs size and hash.
"""
import argparse
import pathlib
import sys
import zlib

TEXTS = 200


def sources():
    """-> paths of the .py files below sys.path, sorted, as far as they can be read."""
    for folder in sorted({pathlib.Path(p).resolve() for p in sys.path if p and pathlib.Path(p).is_dir()}):
        yield from sorted(folder.rglob("*.py"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=pathlib.Path, help="where the texts are written")
    parser.add_argument("--megabytes", type=int, default=120, help="most of them that are taken")
    given = parser.parse_args()
    sys.path = [p for p in sys.path if pathlib.Path(p).resolve() != pathlib.Path(__file__).resolve().parent]
    left = given.megabytes * 10**6
    texts = [[] for _ in range(TEXTS)]
    seen = set()
    for path in sources():
        try:
            code = path.read_bytes()
        except OSError:
            continue
        checksum = zlib.crc32(code)
        if not 1000 <= len(code) <= 60_000 or checksum in seen or len(code) > left:
            continue
        seen.add(checksum)
        left -= len(code)
        texts[checksum % TEXTS].append(code)
    given.folder.mkdir(parents=True, exist_ok=True)
    texts = [some for some in texts if some]
    for i, some in enumerate(texts):
        (given.folder / f"{i:03}.txt").write_bytes(b"\n".join(some))
    print(f"{len(seen)} files, {given.megabytes * 10**6 - left:,} bytes in {len(texts)} texts: {given.folder}")


if __name__ == "__main__":
    main()
