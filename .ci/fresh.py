"Which notebooks' outputs are those of the code as it stands: hashes of the code that was run are kept in the metadata."
import ast
import hashlib
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT/"nbs", ROOT/"gpt2_nb"
KEY = "gpt2_nb"  # in the notebook's metadata; settings.ini lets nbdev_clean keep it


def directives(source: str) -> dict:
    "The `#| name: value` lines at the top of a cell"
    return dict(re.findall(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)$", source, re.M))


def digest(sources: list[str]) -> str:
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def imported(source: str) -> set[str]:
    "The modules of the package that some code imports"
    found = re.findall(r"^\s*from gpt2_nb\.(\w+) import|^\s*import gpt2_nb\.(\w+)", source, re.M)
    return {name for pair in found for name in pair if name}


def with_dependencies(names: set[str]) -> set[str]:
    "These modules, and those that they import, and so on"
    seen, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        file = LIB/f"{name}.py"
        if name in seen or not file.exists(): continue
        seen.add(name)
        waiting += imported(file.read_text(encoding="utf-8"))
    return seen


def behaviour(file: Path) -> str:
    "A module without its comments, which change no output but for help texts"
    return ast.unparse(ast.parse(file.read_text(encoding="utf-8")))


def hashes(cells) -> dict[str, str]:
    "Of the cells that every run executes, of the slow ones, and of the modules that they import"
    code = [c.source for c in cells if c.cell_type == "code"]
    code = [s for s in code if "cuda" not in directives(s) and directives(s).get("eval") != "false"]
    modules = with_dependencies(imported("\n".join(code)))
    return {"sources": digest([s for s in code if "slow" not in directives(s)]),
            "slow": digest([s for s in code if "slow" in directives(s)]),
            "package": digest([behaviour(LIB/f"{name}.py") for name in sorted(modules)])}


def stamp(book, quick: bool = False):
    "Note in a notebook that its outputs were made now; a quick run leaves those of slow cells as they were"
    new = hashes(book.cells)
    if quick and new["slow"] != digest([]): new["slow"] = book.metadata.get(KEY, {}).get("slow", "")
    book.metadata[KEY] = new


def outdated(path: Path, package: bool = False) -> str:
    "What changed in a notebook since its outputs were made, or nothing; with `package`, in the modules it imports too"
    book = nbformat.read(path, as_version=4)
    old, new = book.metadata.get(KEY, {}), hashes(book.cells)
    names = {"sources": "its cells", "slow": "its slow cells"}
    if package: names["package"] = "the package"
    return " and ".join(text for key, text in names.items() if old.get(key) != new[key])


def complaints() -> list[str]:
    "Notebooks whose own code changed after their outputs were made"
    found = [(path.name, outdated(path)) for path in sorted(NBS.glob("*.ipynb"))]
    return [f"{name}: {what} changed after the outputs were made; make notebooks" for name, what in found if what]
