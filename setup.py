"Everything about this package is said in settings.ini; setup.py only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup, find_packages

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]
status = {"1": "Planning", "2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}[cfg["status"]]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="MIT",
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {cfg['status']} - {status}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
    ],
    packages=find_packages(include=["gpt2_nb", "gpt2_nb.*"]),
    include_package_data=True,
    package_data={"gpt2_nb": ["*.jsonl"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "slow", "docs", "lab")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
