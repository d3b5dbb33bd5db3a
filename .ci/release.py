"""Builds a wheel and a source archive, installs the wheel alone, and tries it. `make release-check` is this.

In a new environment, outside the repository, it runs `--help` of every command in settings.ini, trains ten
steps on the plays, resumes for two more, generates a line, and exports the model. With --tag it first checks
that the tag, settings.ini, the package and the changelog have the same version. The workflow `release` runs
this before it publishes the files in dist/.
"""
import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from book import LIB, ROOT, bare_failures, copy_project, install_bare, settings

CHANGELOG = ROOT/".github"/"CHANGELOG.md"


def version_problems(tag: str) -> list[str]:
    "What does not have the version of a tag such as v0.1.0"
    version, = settings("version")
    package = re.search(r'__version__ = "(.*)"', (LIB/"__init__.py").read_text(encoding="utf-8"))[1]
    found = []
    if tag.removeprefix("v") != version: found.append(f"the tag is {tag}, and settings.ini has {version}")
    if package != version: found.append(f"gpt2_nb/__init__.py has {package}, and settings.ini {version}")
    heading, changes = f"## [{version}]", CHANGELOG.read_text(encoding="utf-8")
    if heading not in changes: found.append(f"{CHANGELOG.name} has no heading {heading}")
    return found


def build(folder: Path, dist: Path) -> tuple[Path, list[str]]:
    "Build a copy of the project in `folder`; the wheel, which is in `dist` then, and what failed"
    env, source = folder/"build_env", folder/"source"
    python = env/("Scripts" if sys.platform == "win32" else "bin")/"python"
    copy_project(source)
    if dist.exists(): shutil.rmtree(dist)
    failures = bare_failures(
        folder, [sys.executable, "-m", "venv", env], [python, "-m", "pip", "install", "-q", "build"],
        [python, "-m", "build", "--outdir", dist, source])
    return next(dist.glob("*.whl"), None), failures


def commands() -> list[str]:
    "The console scripts of settings.ini"
    return [word.split("=")[0] for word in settings("console_scripts")]


def trials(programs: Path) -> dict[str, list]:
    "What is tried with the installed wheel: a name and a command line each"
    run = ["--out", "run", "--eval_interval", "10"]
    tried = {f"{name} --help": [programs/name, "--help"] for name in commands()}
    return tried | {
        "ten steps of training": [programs/"gpt2_train", *run, "--max_iters", "10"],
        "two more steps": [programs/"gpt2_train", "--out", "run", "--resume", "--max_iters", "12"],
        "generation": [programs/"gpt2_generate", "--model", "run", "--max_new_tokens", "20"],
        "export": [programs/"gpt2_export", "--model", "run", "--out", "exported"],
        "a plan": [programs/"gpt2_plan", "--preset", "gpt2", "--gpu", "H100"],
        "a ladder": [programs/"gpt2_ladder", "--device", "cpu", "--help"],
    }


def main():
    parser = argparse.ArgumentParser(prog="release.py", description=__doc__.splitlines()[0])
    parser.add_argument("--tag", default="", help="such as v0.1.0: its version must be that of the package")
    args = parser.parse_args()
    if problems := version_problems(args.tag) if args.tag else []: sys.exit("release: " + "; ".join(problems))

    with tempfile.TemporaryDirectory() as t:
        start = time.time()
        wheel, failures = build(Path(t), ROOT/"dist")
        if failures: sys.exit(f"release: the build failed: {failures[0]}")
        print(f"ok   built {wheel.name} and its source archive, {wheel.stat().st_size / 1e6:.2f} MB, "
              f"{time.time() - start:.0f} s", flush=True)

        start = time.time()
        programs, failures = install_bare(Path(t)/"env", wheel)
        if failures: sys.exit(f"release: the wheel cannot be installed: {failures[0]}")
        print(f"ok   installed, {time.time() - start:.0f} s", flush=True)

        broken = []
        for name, command in trials(programs).items():
            start = time.time()
            failures = bare_failures(Path(t)/"empty", command)
            broken += failures
            line = f"{'FAIL' if failures else 'ok  '} {name}, {time.time() - start:.0f} s"
            print(line, *failures, sep="\n     ", flush=True)
    if broken: sys.exit(f"release: {len(broken)} of {len(trials(programs))} trials failed")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace") # a console that is not UTF-8
    main()
