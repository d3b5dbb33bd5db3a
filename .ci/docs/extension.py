"""Formulas as MathML, JupyterLab's anchors, and links from names to the cells that define them."""
import json
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert


def jupyterlab_anchor(title: str) -> str:
    "The anchor that JupyterLab gives a heading, so that links written for it work here too"
    return title.replace(" ", "-")


def mathml(text: str, display: str) -> str:
    text = text.replace(r"\!", "") # a thin negative space, which the converter cannot write
    text = re.sub(r"\\mathrm\{(\w+)\}", r"\\text{\1}", text) # one word rather than single letters
    return convert(text, display=display)


def visit_math(self, node):
    self.body.append(f'<span class="math">{mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def visit_display_math(self, node):
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


# --- links from names to the cells that define them

PROGRAMS = {"python", "torchrun"} # names in prose mean these, except where a function of that name is built


def site_data(app) -> dict:
    "What `build.py` found in the modules and the chapters"
    if not hasattr(app, "gpt2_nb"):
        app.gpt2_nb = json.loads((Path(app.srcdir)/"names.json").read_text(encoding="utf-8"))
    return app.gpt2_nb


def resolve(data: dict, page: str, text: str) -> dict | None:
    "The definition that a name in the prose of a page refers to, if there is exactly one"
    name = re.sub(r"\(\)$", "", text)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", name): return None
    module, _, rest = name.rpartition(".")
    candidates = data["names"].get(rest, [])
    if module: candidates = [d for d in candidates if d["module"] == module]
    else:
        own = [d for d in candidates if page in (d["page"], f"api/{d['module']}")]
        if not own and name in PROGRAMS: return None
        candidates = own or [d for d in candidates if name not in data["modules"] or d["module"] == name]
    return candidates[0] if len(candidates) == 1 else None


def up(page: str) -> str:
    "From a page to the root of the site"
    return "../" * page.count("/")


def add_definitions(app, doctree):
    "Give the cells that define names their anchors, and link the names in the prose"
    data, page = site_data(app), app.env.docname
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") != "cell_code": continue
        cell["ids"] += cell.get("cell_metadata", {}).get("defines", [])

    for literal in list(doctree.findall(nodes.literal)):
        if any(isinstance(a, nodes.reference | nodes.title) for a in ancestors(literal)): continue
        found = resolve(data, page, literal.astext())
        if not found: continue
        link = nodes.reference("", "", refuri=f"{up(page)}{found['page']}.html#{found['id']}", internal=True,
                               classes=["definition"], reftitle=found["help"])
        literal.replace_self(link)
        link += literal


def ancestors(node):
    while node.parent is not None:
        node = node.parent
        yield node


def link_code(app, page, template, context, doctree):
    "Link the names that the code of a page imports from the package"
    if "body" not in context: return
    data = site_data(app)
    imported = data["imports"].get(page, {})
    modules = data["modules"]

    def name(match):
        found = imported.get(match[2])
        if not found: return match[0]
        where, text = f"{up(page)}{found['page']}.html#{found['id']}", found["help_html"]
        return f'{match[1]}<a class="definition" href="{where}" title="{text}">{match[2]}</a></span>'

    def module(match):
        if match[2] not in modules: return match[0]
        where = f"{up(page)}api/{match[2]}.html"
        return f'{match[1]}<a class="definition" href="{where}">gpt2_nb.{match[2]}</a></span>'

    def block(match):
        html = re.sub(r'(?<!<span class="o">\.</span>)(<span class="n">)(\w+)</span>', name, match[0])
        return re.sub(r'(<span class="nn">)gpt2_nb\.(\w+)</span>', module, html)

    context["body"] = re.sub(r'<div class="highlight-ipython3?.*?</pre>', block, context["body"], flags=re.S)


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None),
                               block_renderers=(visit_display_math, None))
    app.connect("doctree-read", add_definitions)
    app.connect("html-page-context", link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
