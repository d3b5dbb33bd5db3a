"""Build the site from the notebooks as committed, without running them, and check its links."""
import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from api import Module, api_page, read_module
from check_links import dead_links
from collapsed import mend

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NBS, LIB = ROOT/"nbs", ROOT/"gpt2_nb"
SITE = ROOT/"_site"

# Directives of nbdev that tell a reader something, and the tag that carries them to the site.
SHOWN = {"export": "exported", "slow": "slow", "cuda": "cuda"}


def settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def directives(source: str) -> dict:
    "The `#| name: value` lines of a cell"
    return dict(re.findall(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)$", source, re.M))


# --- the parts of the book --------------------------------------------------------------------------------

def parts(index) -> dict[str, list[str]]:
    "The chapters of each part, read from the table in nbs/index.ipynb"
    text = "\n".join(c.source for c in index.cells if c.cell_type == "markdown")
    found, current = {}, None
    for line in text.splitlines():
        if not line.startswith("|"): continue
        first = line.strip("|").split("|")[0].strip()
        chapter = re.search(r"\]\((\d\d_\w+)\.ipynb\)", first)
        if chapter and current: found[current].append(chapter[1])
        elif part := re.fullmatch(r"\*\*(.+?)\*\*", first): found[current := part[1]] = []
    listed = {name for names in found.values() for name in names}
    missing = sorted({p.stem for p in NBS.glob("[0-9][0-9]_*.ipynb")} - listed)
    if missing: sys.exit(f"the table of chapters in nbs/index.ipynb does not list {', '.join(missing)}")
    return {part: names for part, names in found.items() if names}


def title(book) -> str:
    "The title of a chapter"
    text = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    return re.search(r"^# (.+)$", text, re.M)[1]


def tables_of_contents(chapters: dict, titles: dict, modules: list[Module]) -> str:
    "The navigation, in MyST: one list for each part, and one for the reference"
    blocks = []
    for part, names in chapters.items():
        entries = [f"{int(name[:2])} {titles[name]} <{name}>" for name in names]
        blocks.append((part, entries))
    blocks.append(("Reference", ["Modules <api/index>"]))
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *entries, "```"])
                       for part, entries in blocks)


# --- the chapters -----------------------------------------------------------------------------------------

def repository_link(target: str, blob: str) -> str:
    "The address in the repository of a file that is not a page of the site"
    path, hash_, anchor = target.partition("#")
    file = (NBS/path).resolve()
    if not file.exists(): raise FileNotFoundError(f"a link leads to {path}, which does not exist")
    kind = blob if file.is_file() else blob.replace("/blob/", "/tree/")
    return f"{kind}/{file.relative_to(ROOT).as_posix()}{hash_}{anchor}"


def convert_links(source: str, blob: str) -> str:
    "Links in prose: those to chapters stay, those to other files lead to the repository"
    def is_page(target): # or a picture, which is copied
        path = target.partition("#")[0]
        return not path or re.match(r"\w+:|//", target) or ("/" not in path and path.endswith(".ipynb"))

    def markdown(match):
        if match[1] or is_page(match[3]): return match[0]
        return f"{match[2]}({repository_link(match[3], blob)})"

    def raw(match):
        if "://" in match[2]: return match[0]
        if is_page(match[2]): return match[0].replace(".ipynb", ".html")
        return f'{match[1]}"{repository_link(match[2], blob)}"'

    pieces = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", source, flags=re.M | re.S) # code stays as it is
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"(!?)(?<=!)?(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)", markdown, pieces[i])
        pieces[i] = re.sub(r'(<a\s[^>]*href=)"([^"]+)"', raw, pieces[i])
    return "".join(pieces)


def is_set_up(cell) -> bool:
    "Whether a cell is collapsed and shows no output"
    return cell.cell_type == "code" and "hide-input" in cell.metadata.get("tags", []) and not cell.outputs


def join_set_up(cells: list) -> list:
    "Join the collapsed cells at the top of a page, which would be a stack of bars, into one"
    first = next((i for i, c in enumerate(cells) if re.search(r"^## ", c.source, re.M)), len(cells))
    joined = []
    for cell in cells[:first]:
        if joined and is_set_up(cell) and is_set_up(joined[-1]):
            last = joined[-1]
            last.source += f"\n\n{cell.source}"
            last.metadata.defines += cell.metadata.defines
            last.metadata.tags = [t for t in last.metadata.tags if t in cell.metadata.tags]
        else: joined.append(cell)
    for cell in filter(is_set_up, joined): cell.metadata["mystnb"] = {"code_prompt_show": "Show the set-up"}
    return joined + cells[first:]


def prepare_chapter(path: Path, definitions: dict, blob: str):
    "A chapter as the site shows it"
    book = nbformat.read(path, as_version=4)
    book.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    mend(book.cells)
    cells = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            if cell.id == "contents": # without the neighbours, which the page shows by itself
                cell.source = cell.source.partition("\n\n")[2]
            try: cell.source = convert_links(cell.source, blob)
            except FileNotFoundError as e: sys.exit(f"{path.name}, cell {cell.id}: {e}")
        elif cell.id == "colab": continue # for a machine that has nothing yet
        else:
            said = directives(cell.source)
            if path.stem == "index" and "hide" in said and not cell.outputs: continue # as in README.md
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            if not cell.source: continue
            tags = cell.metadata.setdefault("tags", [])
            tags += [tag for name, tag in SHOWN.items() if name in said]
            if said.get("eval") == "false": tags.append("not-run")
            if ("hide" in said or "code-fold" in said) and "hide-input" not in tags: tags.append("hide-input")
            if said.get("echo") == "false": # the output alone, as in README.md
                tags[:] = [tag for tag in tags if tag != "hide-input"] + ["remove-input"]
            cell.metadata["defines"] = [d["id"] for d in definitions.get(cell.id, [])]
        cells.append(cell)
    book.cells = join_set_up(cells)
    return book


def imports(book) -> dict[str, str]:
    "The names that the code of a chapter imports from the package, with their modules"
    found = {}
    for cell in book.cells:
        if cell.cell_type != "code": continue
        for module, names in re.findall(r"^from gpt2_nb\.(\w+) import (\([^)]*\)|.+)$", cell.source, re.M):
            for name, alias in re.findall(r"(\w+)(?:\s+as\s+(\w+))?", names):
                found[alias or name] = (module, name)
    return found


# --- the site ---------------------------------------------------------------------------------------------

def prepare(to: Path) -> dict:
    "Write what Sphinx reads; returns the parts of the book"
    config = settings()
    blob = f"{config['git_url']}/blob/{config['branch']}"
    modules = [read_module(p) for p in sorted(LIB.glob("*.py")) if p.stem not in ("__init__", "_modidx")]
    modules.sort(key=lambda m: m.page)
    by_cell, names, where = {}, {}, {}
    for module in modules:
        for d in module.definitions:
            entry = dict(module=module.name, page=module.page, id=f"gpt2_nb.{module.name}.{d.name}",
                         help=d.help(), help_html=html.escape(d.help()))
            by_cell.setdefault((module.page, d.cell), []).append(entry)
            names.setdefault(d.name, []).append(entry)
            where[module.name, d.name] = entry

    books = {p.stem: nbformat.read(p, as_version=4) for p in sorted(NBS.glob("*.ipynb"))}
    titles = {name: title(book) for name, book in books.items()}
    chapters = parts(books["index"])
    imported = {}
    for name in books:
        own = {cell: found for (page, cell), found in by_cell.items() if page == name}
        book = prepare_chapter(NBS/f"{name}.ipynb", own, blob)
        if name == "index":
            toc = tables_of_contents(chapters, titles, modules)
            book.cells.append(nbformat.v4.new_markdown_cell(toc, id="navigation"))
        nbformat.write(book, to/f"{name}.ipynb")
        imported[name] = {name: where[key] for name, key in imports(book).items() if key in where}

    data = dict(names=names, imports=imported, modules=[m.name for m in modules])
    (to/"names.json").write_text(json.dumps(data), encoding="utf-8")
    (to/"api").mkdir()
    for module in modules:
        (to/"api"/f"{module.name}.md").write_text(api_page(module, titles, blob), encoding="utf-8")
    rows = [f"| [{m.name}]({m.name}.md) | {m.doc} | [{titles[m.page]}](../{m.page}.ipynb) |" for m in modules]
    toc = "\n".join(["```{toctree}", ":hidden:", "", *(m.name for m in modules), "```"])
    text = ["# Modules", "Every public name of the package, with the comments of its parameters. Each entry "
            "leads to the chapter in which the name is built and tested.",
            "\n".join(["| module | what it holds | chapter |", "|---|---|---|", *rows]), toc]
    (to/"api"/"index.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    if (NBS/"images").is_dir():
        shutil.copytree(NBS/"images", to/"images")
        shutil.copytree(NBS/"images", to/"extra"/"images") # for pictures that are written as HTML
    return chapters


def replace_site(new: Path, old: Path):
    "Put a new site in the place of an old one; a folder that is no site is left alone"
    if old.exists():
        if not (old/".buildinfo").exists(): sys.exit(f"{old} exists and is not a site that Sphinx built")
        shutil.rmtree(old)
    shutil.copytree(new, old)


def build(site: Path = SITE) -> list[str]:
    "Build the site; returns the complaints"
    with tempfile.TemporaryDirectory() as t:
        source, out = Path(t)/"source", Path(t)/"site"
        source.mkdir()
        prepare(source)
        words = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-c", str(HERE),
                 "-d", str(Path(t)/"doctrees"), str(source), str(out)]
        env = {**os.environ, "GPT2_NB_EXTRA": str(source/"extra")}
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        done = subprocess.run(words, env=env, **streams)
        found = [line.replace(f"{source}{os.sep}", "") for line in done.stdout.splitlines() if line.strip()]
        if done.returncode and not found: found = [f"Sphinx ended with {done.returncode}"]
        if not (out/"index.html").exists(): return found
        found += dead_links(out)
        replace_site(out, site)
    return found


def main():
    argparse.ArgumentParser(prog="build.py", description=__doc__).parse_args()
    start = time.time()
    found = build()
    print(*found, sep="\n", end="\n" if found else "")
    pages = len(list(SITE.rglob("*.html"))) if SITE.exists() else 0
    print(f"{pages} pages in {time.time() - start:.0f} s, {len(found)} complaints: {SITE.name}/index.html")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
