"""How Sphinx turns the prepared chapters into a site; `build.py` prepares them."""
import os
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

config = ConfigParser(delimiters=["="])
config.read(HERE.parent.parent/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

project = cfg["title"]
author = cfg["author"]
copyright = cfg["copyright"]
release = cfg["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.githubpages", "extension"]
exclude_patterns = ["extra"] # copied as it is
root_doc = "index"
smartquotes = False # they would turn the two dashes of a flag into one

# --- the notebooks: as committed, never run

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst" # tables that a cell writes are tables
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
myst_heading_slug_func = "extension.jupyterlab_anchor"

# --- the page

html_theme = "sphinx_book_theme"
html_title = cfg["title"]
html_baseurl = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
html_static_path = [str(HERE/"static")]
html_extra_path = [os.environ["GPT2_NB_EXTRA"]]
html_css_files = ["style.css"]
html_logo = str(HERE/"static"/"favicon.svg")
html_favicon = str(HERE/"static"/"favicon.svg")
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": cfg["title"]},
    "repository_url": cfg["git_url"],
    "repository_branch": cfg["branch"],
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    # a header, even an empty one, would take the buttons of the narrow screen for itself
    **{f"navbar_{part}": [] for part in ("start", "center", "end", "persistent")},
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "show_toc_level": 1,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

html_math_renderer = "mathml" # browsers draw it themselves, so that reading needs no network
