"""Reference pages, one per module, read from its source: signatures, docstrings, comments of parameters."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Definition:
    name: str
    kind: str # class, function or data
    signature: str
    doc: str
    cell: str # id of the cell that defines it
    parameters: list = field(default_factory=list) # (name, type, default, comment)
    returns: tuple = ("", "") # type and comment
    methods: list = field(default_factory=list)

    def help(self) -> str:
        "One line for a tooltip"
        first = self.doc.strip().split("\n\n")[0].replace("\n", " ")
        head = f"{self.name}{self.signature}" if len(self.signature) < 100 else f"{self.name}(...)"
        return f"{head}: {first}" if first else head


@dataclass
class Module:
    name: str
    page: str # its chapter
    doc: str
    definitions: list[Definition]


def comments(source: str) -> dict[int, str]:
    "The comment of each line that has one"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def parameters(node: ast.FunctionDef, notes: dict) -> tuple[list, tuple]:
    "The parameters of a function and what it returns, with their comments; without `self`"
    a = node.args
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    pairs = list(zip(positional, defaults))
    if a.vararg: pairs.append((a.vararg, None))
    pairs += zip(a.kwonlyargs, a.kw_defaults)
    if a.kwarg: pairs.append((a.kwarg, None))

    lines = [arg.lineno for arg, _ in pairs]
    found = []
    for arg, default in pairs:
        if arg.arg in ("self", "cls"): continue
        line = (default or arg).end_lineno
        stars = "*" * (arg is a.vararg) + "**" * (arg is a.kwarg)
        alone = lines.count(arg.lineno) == 1 # else the comment is not about one parameter
        note = notes.get(line, "") if alone else ""
        found.append((stars + arg.arg, ast.unparse(arg.annotation) if arg.annotation else "",
                      ast.unparse(default) if default else "", note))
    returned = ("", "")
    if node.returns:
        alone = node.returns.end_lineno not in lines
        returned = (ast.unparse(node.returns), notes.get(node.returns.end_lineno, "") if alone else "")
    return found, returned


def fields(node: ast.ClassDef, notes: dict) -> list:
    "The fields of a dataclass, with their comments"
    found = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return [(n.target.id, ast.unparse(n.annotation), ast.unparse(n.value) if n.value else "",
             notes.get(n.end_lineno, "")) for n in found]


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def signature(found: list) -> str:
    "A signature without types, which the table below it shows"
    return "(" + ", ".join(f"{name}={default}" if default else name for name, _, default, _ in found) + ")"


def read_function(node, notes: dict, cell: str) -> Definition:
    found, returned = parameters(node, notes)
    if any(ast.unparse(d) == "property" for d in node.decorator_list): text = ""
    else: text = signature(found)
    return Definition(node.name, "function", text, ast.get_docstring(node) or "", cell, found, returned)


def read_class(node: ast.ClassDef, notes: dict, cell: str) -> Definition:
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    made = next((n for n in functions if n.name == "__init__"), None)
    if is_dataclass(node): found = fields(node, notes)
    elif made: found = parameters(made, notes)[0]
    else: found = []
    long = is_dataclass(node) and len(found) > 8 # the table is enough
    text = "(...)" if long else signature(found)
    methods = [read_function(n, notes, cell) for n in functions if not n.name.startswith("_")]
    return Definition(node.name, "class", text, ast.get_docstring(node) or "", cell, found, methods=methods)


def read_module(path: Path) -> Module:
    "What a module exports, in the order of its source"
    source = path.read_text(encoding="utf-8")
    tree, notes = ast.parse(source), comments(source)
    cells = {i: m for i, line in enumerate(source.splitlines(), 1)
             if (m := re.match(r"# %% (?:\.\./)*nbs/(\w+)\.ipynb #?(\w+)$", line))}
    page = next(m[1] for m in cells.values())
    public, found = set(), []
    for node in tree.body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        above = [i for i in cells if i < start]
        cell = cells[max(above)][2] if above else ""
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            if names == ["__all__"]: public = set(ast.literal_eval(node.value))
            note = notes.get(node.lineno, "") or notes.get(node.end_lineno, "")
            value = ast.unparse(node.value) if node.value else ""
            if not note and len(value) <= 60: note = f"`{value}`"
            found += [Definition(name, "data", "", note, cell) for name in names if name in public]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in public:
            found.append(read_function(node, notes, cell))
        elif isinstance(node, ast.ClassDef) and node.name in public:
            found.append(read_class(node, notes, cell))
    return Module(path.stem, page, (ast.get_docstring(tree) or "").strip(), found)


# --- pages ------------------------------------------------------------------------------------------------

def cell_text(text: str) -> str:
    "Text in a cell of a table"
    return text.replace("|", r"\|").replace("*", r"\*")


def code(text: str) -> str:
    return f"`{cell_text(text)}`".replace(r"\*", "*") if text else ""


def table(d: Definition) -> str:
    "The parameters of a definition, where there is something to say of them"
    rows = [(code(name), cell_text(note), code(kind), code(default))
            for name, kind, default, note in d.parameters]
    kind, note = d.returns
    if kind and kind != "None": rows.append(("*returns*", cell_text(note), code(kind), ""))
    if not any(kind or note for _, kind, _, note in rows): return ""
    head = ["| parameter | meaning | type | default |", "|---|---|---|---|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])


def directive(d: Definition, kind: str, body: list[str], fence: str) -> str:
    "One entry of a page, in MyST"
    text = "\n\n".join(part for part in body if part)
    return f"{fence}{{py:{kind}}} {d.name}{d.signature}\n\n{text}\n{fence}"


def entry(d: Definition, module: Module, title: str) -> str:
    where = f"../{module.page}.html#gpt2_nb.{module.name}.{d.name}"
    source = f'<a class="defined" href="{where}">defined in {title}</a>'
    methods = [directive(m, "method" if m.signature else "property", [m.doc, table(m)], "````")
               for m in d.methods]
    return directive(d, d.kind, [d.doc, table(d), source, *methods], "`````")


def api_page(module: Module, titles: dict, blob: str) -> str:
    title = titles[module.page]
    head = (f"Chapter: [{title}](../{module.page}.ipynb). "
            f"Source: [gpt2_nb/{module.name}.py]({blob}/gpt2_nb/{module.name}.py).")
    entries = [entry(d, module, title) for d in module.definitions]
    current = f"```{{py:module}} gpt2_nb.{module.name}\n```"
    return "\n\n".join([f"# {module.name}", current, module.doc, head, *entries]) + "\n"
