"""Put a world of your own in the place of section 1 of data.py: a folder of the scripts with it.

python notebooks/world.py notebooks/sums.py runs/sums
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(world, where):
    """Copy the scripts into the folder `where`, with the text `world` in place of section 1 of data.py."""
    Path(where).mkdir(parents=True, exist_ok=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, where)
    text = (ROOT / "data.py").read_text(encoding="utf-8")
    begin, end = (text.index(f"# {'-' * 100}\n# {section}. ") for section in (1, 2))
    Path(where, "data.py").write_text(f"{text[:begin]}{world}\n\n{text[end:]}", encoding="utf-8")


def main():
    world, where = (Path(word) for word in (*sys.argv[1:], "", "")[:2])
    if len(sys.argv) != 3 or not world.is_file() or where.resolve() == ROOT:
        sys.exit(
            "python notebooks/world.py WORLD FOLDER: a file such as notebooks/sums.py, and another folder"
        )
    make(world.read_text(encoding="utf-8"), where)
    print(f"Next: cd {where} && python data.py && python pretrain.py")


if __name__ == "__main__":
    main()
