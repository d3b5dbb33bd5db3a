"""Run a chapter in a real JupyterLab, in a headless Chromium, and test what a reader sees there."""
import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat

from collapsed import hidden

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"

CHAPTER = "02_attention"
MODULE, FUNCTION = "core", "test_tensor" # whose help is asked for
RUN_LIMIT = 600 # seconds for all cells of the chapter
WIDTH, HEIGHT = 1280, 900

# Every cell of the window, also those that are scrolled away: JupyterLab draws only what is near.
SETTINGS = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
            "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


# --- the server -------------------------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_settings(folder: Path):
    "Settings of a user, for this server alone"
    for plugin, values in SETTINGS.items():
        extension, _, name = plugin.partition(":")
        file = folder/extension/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")


@contextlib.contextmanager
def jupyterlab(notebooks: Path, home: Path, lines: Path):
    "`make lab` on the notebooks of a folder; gives its address and its token"
    port, token = free_port(), secrets.token_hex(16)
    write_settings(home/"settings")
    folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
               "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **{name: str(home/folder) for name, folder in folders.items()},
           "JUPYTER_TOKEN": token, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    flags = ["--no-browser", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if os.geteuid() == 0: flags.append("--allow-root")
    # the environment of this Python, as it is
    words = ["make", "--no-print-directory", "-C", str(ROOT), "-o", ".venv/.installed", "lab",
             f"BIN={Path(sys.executable).parent}", f"NOTEBOOKS={notebooks}", f"ARGS={' '.join(flags)}"]

    with lines.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT,
                                  start_new_session=True) # so that all that make starts can be ended
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, lines)
            yield f"http://127.0.0.1:{port}", token
        finally:
            end_group(server)


def end_group(server, seconds: float = 30):
    "End make and what it started: the server, and through it the kernels"
    end = time.time() + seconds
    with contextlib.suppress(ProcessLookupError): # the last of them has gone
        os.killpg(server.pid, signal.SIGTERM)
        while time.time() < end:
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.2)
        os.killpg(server.pid, signal.SIGKILL)


def wait_for(url: str, server, lines: Path, seconds: float = 120):
    "Wait until a server answers"
    end = time.time() + seconds
    while time.time() < end:
        if server.poll() is not None: break
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(url, timeout=5): return
        time.sleep(0.5)
    sys.exit(f"JupyterLab did not start:\n{lines.read_text(encoding='utf-8')[-2000:]}")


# --- the browser ------------------------------------------------------------------------------------------

def find_chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found: sys.exit("no Chromium was found: install the package chromium of the operating system")
    return found


class Reader:
    "A reader with a browser: opens notebooks, runs cells, looks"
    def __init__(self, page, address: str, token: str, out: Path):
        self.page, self.address, self.token, self.out = page, address, token, out

    def visit(self, path: str):
        self.page.goto(f"{self.address}/lab/tree/{path}?token={self.token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        self.page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=60_000)
        self.panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.until_idle(120)

    def shoot(self, name: str):
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=str(self.out/f"{name}.png"))

    def command(self, name: str, **args):
        "Run one of JupyterLab's commands, as a menu does"
        self.page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args)", [name, args])

    def menu(self, *entries: str):
        "Choose from the menus, by their names"
        self.page.locator(f'.lm-MenuBar-item:has-text("{entries[0]}")').first.click()
        for entry in entries[1:]: self.page.locator(f'.lm-Menu-item:has-text("{entry}")').first.click()

    def until_idle(self, seconds: float):
        "Wait until the kernel is there and no cell is waiting or running"
        idle = """() => {
            const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
            const status = panel?.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
            const prompts = [...panel?.querySelectorAll('.jp-InputPrompt') ?? []];
            return status === 'idle' && !prompts.some(prompt => prompt.textContent.includes('*'));
        }"""
        self.page.wait_for_function(idle, timeout=seconds * 1000, polling=500)

    def count(self, selector: str) -> int:
        return self.panel.locator(selector).count()

    def run_in_new_cell(self, code: str, seconds: float = 60) -> str:
        "Add a cell at the end, run it, and read its output"
        cells = self.panel.locator(".jp-Cell")
        cells.last.click()
        self.page.keyboard.press("Escape")
        self.command("notebook:insert-cell-below")
        self.command("notebook:enter-edit-mode")
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_timeout(300)
        self.until_idle(seconds)
        return self.panel.locator(".jp-Notebook .jp-Cell").last.locator(".jp-OutputArea").inner_text()


# --- what is tested ---------------------------------------------------------------------------------------

class Report:
    "Counts what passed and what failed"
    def __init__(self): self.passed, self.failed = 0, 0

    def check(self, name: str, good: bool, found=""):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {name}{f': {found}' if found != '' else ''}", flush=True)


def test_chapter(reader: Reader, report: Report, path: Path):
    "Open a chapter as committed, look at what is collapsed, run it, and look again"
    cells = nbformat.read(path, as_version=4).cells
    folded = [sum(hidden(c, name) for c in cells) for name in ("source_hidden", "outputs_hidden")]
    reader.visit(path.name)
    reader.shoot(f"{path.stem}-opened")
    count = reader.count(".jp-Notebook .jp-Cell")
    report.check("all cells are shown", count == len(cells), f"{count} of {len(cells)}")
    sources = reader.count(".jp-InputPlaceholder")
    report.check("the sources marked as collapsed are collapsed, and no others", sources == folded[0] > 0,
                 f"{sources} of {folded[0]}")
    outputs = reader.count(".jp-OutputPlaceholder")
    report.check("the outputs marked as collapsed are collapsed, and no others", outputs == folded[1],
                 f"{outputs} of {folded[1]}")
    answers = reader.panel.locator("details:has(summary:text-matches('^Answer'))")
    closed = answers.evaluate_all("found => found.filter(answer => !answer.open).length")
    report.check("every answer is closed", closed == answers.count() > 0, f"{closed} of {answers.count()}")

    reader.menu("Edit", "Clear Outputs of All Cells")
    reader.page.wait_for_timeout(500)
    report.check("all outputs are cleared before the run", not reader.count(".jp-OutputArea-output"))
    start = time.time()
    reader.menu("Run", "Run All Cells")
    reader.page.wait_for_timeout(1000)
    reader.until_idle(RUN_LIMIT)
    print(f"     all cells ran in {time.time() - start:.0f} s")

    errors = reader.panel.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], "
                                  ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    report.check("no cell ends in an error", errors.count() == 0,
                 errors.first.inner_text()[-300:] if errors.count() else "")
    code = [c for c in cells if c.cell_type == "code" and c.source.strip()]
    ran = reader.page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.filter(
        cell => cell.model.type === 'code' && cell.model.executionCount > 0).length""")
    report.check("every code cell ran, the collapsed ones too", ran == len(code), f"{ran} of {len(code)}")
    plots = reader.panel.locator(".jp-OutputArea-output img").evaluate_all(
        "found => found.filter(image => image.naturalWidth > 100).length")
    expected = sum("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    report.check("the plots are shown", plots == expected > 0, f"{plots} of {expected}")
    sources = reader.count(".jp-InputPlaceholder")
    report.check("the sources are still collapsed after the run", sources == folded[0],
                 f"{sources} of {folded[0]}")
    reader.panel.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    reader.shoot(f"{path.stem}-plot")
    answers.first.scroll_into_view_if_needed()
    reader.shoot(f"{path.stem}-answers")


def test_opening(reader: Reader, report: Report):
    "One answer and one collapsed cell are opened with a click"
    answer = reader.panel.locator("details:has(summary:text-matches('^Answer'))").first
    answer.locator("summary").click()
    report.check("a click opens an answer", answer.evaluate("found => found.open"))
    before = reader.count(".jp-InputPlaceholder")
    reader.panel.locator(".jp-InputPlaceholder").last.click()
    reader.page.wait_for_timeout(300)
    report.check("a click opens a collapsed cell", reader.count(".jp-InputPlaceholder") == before - 1)
    reader.shoot("answer-opened")


def docstring_and_comment() -> tuple[str, str]:
    "The first words of a function's docstring, and the comment of its first parameter, from its source"
    source = (ROOT/"gpt2_nb"/f"{MODULE}.py").read_text(encoding="utf-8")
    source = source[source.index(f"def {FUNCTION}("):]
    return re.search(r'^    "{1,3}([^`\n"]{10,60})', source, re.M)[1], re.search(r"# (.+)", source)[1]


def test_help(reader: Reader, report: Report):
    "The help of an exported function: its docstring by `?`, and in the tooltip of Shift+Tab"
    name = FUNCTION
    doc, comment = docstring_and_comment()
    text = reader.run_in_new_cell(f"from gpt2_nb.{MODULE} import {name}\n{name}?")
    report.check(f"{name}? shows its docstring", doc in text, "" if doc in text else text[:200])
    reader.shoot("help")
    text = reader.run_in_new_cell(f"{name}??")
    report.check(f"{name}?? shows its parameters with their comments", comment in text,
                 "" if comment in text else text[:200])

    reader.command("notebook:insert-cell-below")
    reader.command("notebook:enter-edit-mode")
    reader.page.keyboard.insert_text(f"{name}(")
    reader.page.keyboard.press("Shift+Tab")
    tooltip = reader.page.locator(".jp-Tooltip")
    with contextlib.suppress(Exception): tooltip.wait_for(timeout=15_000) # the check says what is missing
    shown = tooltip.inner_text() if tooltip.count() else ""
    report.check("Shift+Tab shows its docstring", doc in shown, "" if doc in shown else shown[:200])
    reader.shoot("tooltip")
    reader.page.keyboard.press("Escape")
    reader.command("notebook:delete-cell")


def test_progress(reader: Reader, report: Report):
    "The progress bar of a training run: text in one line, which is drawn again and again"
    code = ("from gpt2_nb.train import train, TrainConfig\n"
            "import tempfile\n"
            "cfg = TrainConfig(out=tempfile.mkdtemp() + '/run', max_iters=30, eval_interval=30)\n"
            "train(cfg);")
    text = reader.run_in_new_cell(code, seconds=300)
    full = re.findall(r"100%\|\S+\| 30/30", text)
    report.check("a run of 30 steps shows its progress bar", bool(full), "" if full else text[-600:])
    lines = len(re.findall(r"\d+%\|", text)) # one before the remaining time is printed, one after
    report.check("the bar is drawn again in its line", 1 <= lines <= 2, f"{lines} lines")
    report.check("no widget is missing", "HBox" not in text and "Error displaying widget" not in text)
    reader.panel.locator(".jp-Notebook .jp-Cell").last.locator(".jp-OutputArea").scroll_into_view_if_needed()
    reader.shoot("progress")


def shoot_chapters(reader: Reader, names: list[str]):
    "Pictures of chapters as committed: their first screen, a plot, and their end"
    for name in names:
        reader.visit(f"{name}.ipynb")
        reader.shoot(f"{name}-top")
        images = reader.panel.locator(".jp-OutputArea-output img")
        if images.count():
            images.first.scroll_into_view_if_needed()
            reader.shoot(f"{name}-picture")
        reader.panel.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
        reader.shoot(f"{name}-end")


def shoot_readme(page, out: Path):
    "README.md as a page, about as GitHub shows it"
    from markdown_it import MarkdownIt
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    body = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text)
    style = """body { font: 16px/1.5 sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem; }
               img { max-width: 100%; }
               table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: 6px 13px; }
               pre, code { background: #f6f8fa; } pre { padding: 1rem; overflow: auto; font-size: 85%; }"""
    head = f"<!doctype html><meta charset='utf-8'><base href='{ROOT.as_uri()}/'><style>{style}</style>"
    with tempfile.TemporaryDirectory() as t:
        file = Path(t)/"README.html"
        file.write_text(head + body, encoding="utf-8")
        page.goto(file.as_uri())
        page.screenshot(path=str(out/"README-first-screen.png"))
        page.screenshot(path=str(out/"README.png"), full_page=True)


# --- the command ------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(prog="lab.py", description=__doc__)
    parser.add_argument("chapter", nargs="?", default=CHAPTER, help=f"what to run, by default {CHAPTER}")
    parser.add_argument("--out", type=Path, help="folder for pictures of what was seen")
    parser.add_argument("--also", nargs="*", default=[], help="chapters to look at without running them")
    args = parser.parse_args()
    try: from playwright.sync_api import sync_playwright
    except ImportError: sys.exit("playwright is missing: pip install -c constraints.txt -e .[lab]")
    executable = find_chromium()

    report = Report()
    with tempfile.TemporaryDirectory() as t, sync_playwright() as p:
        home = Path(t)
        out = args.out or home/"pictures"
        out.mkdir(parents=True, exist_ok=True)
        notebooks = home/"nbs" # a copy, so that nothing of the book changes
        shutil.copytree(NBS, notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        shoot_readme(page, out)
        with jupyterlab(notebooks, home, out/"jupyterlab.txt") as (address, token):
            reader = Reader(page, address, token, out)
            test_chapter(reader, report, notebooks/f"{Path(args.chapter).stem}.ipynb")
            test_opening(reader, report)
            test_help(reader, report)
            test_progress(reader, report)
            shoot_chapters(reader, args.also)
            page.goto("about:blank") # closes the page of JupyterLab before its server
        browser.close()
    if args.out: print(f"pictures are in {args.out}")
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
