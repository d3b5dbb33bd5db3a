"""Find the links of a built site that lead nowhere: pages, anchors, pictures. Other sites are not asked."""
import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).resolve().parent.parent.parent/"_site"

LOADING = {"img", "script", "source", "iframe"} # elements that fetch what they name
BADGES = (".svg",) # pictures that may come from the network: a reader without one does not miss them


class Page(HTMLParser):
    "The anchors of a page and the addresses that it links to or loads"
    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads = {"", "top"}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        loads = tag in LOADING or (tag == "link" and attrs.get("rel") != "canonical")
        addresses = [attrs.get("href"), attrs.get("src"), *first_words(attrs.get("srcset"))]
        for address in filter(None, addresses):
            (self.loads if loads else self.links).append(address)


def first_words(srcset: str | None) -> list[str]:
    "The addresses of a `srcset`"
    return [part.split()[0] for part in (srcset or "").split(",") if part.strip()]


def dead_links(site: Path) -> list[str]:
    "Links inside the site that lead nowhere, and files of the page itself that are loaded from elsewhere"
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))
             if "_static" not in p.parts} # templates of the theme lie there
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for address in dict.fromkeys(page.links + page.loads):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target/"index.html"
            if not target.exists(): found.append(f"{name} links to {address}, which does not exist")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name} links to {address}, and the page has no such anchor")
        found += [f"{name} loads {address} from the network" for address in page.loads
                  if urlsplit(address).netloc and not address.endswith(BADGES)]
    return found


def main():
    parser = argparse.ArgumentParser(prog="check_links.py", description=__doc__)
    parser.add_argument("site", nargs="?", type=Path, default=SITE)
    site = parser.parse_args().site
    if not (site/"index.html").exists(): sys.exit(f"{site} has no index.html; make docs builds it")
    sys.exit("\n".join(dead_links(site)) or None)


if __name__ == "__main__":
    main()
