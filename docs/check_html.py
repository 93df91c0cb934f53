"""Looks for broken references in the HTML that pdoc made: `python docs/check_html.py DIRECTORY`.

A name of tfbig in a docstring that pdoc did not find is code without a link. Links within
the directory must lead to a page and a place in it.
"""

import html.parser
import pathlib
import re
import sys
import urllib.parse

NAME = re.compile(r"tfbig(\.\w+)+")


class Page(html.parser.HTMLParser):
    """What a page has that can be referred to, and what it refers to.

    Attributes:
        places: set of str, ids.
        links: set of str, targets.
        unlinked: set of str, names of tfbig that are code and no link.
    """

    def __init__(self, path):
        super().__init__()
        self.places, self.links, self.unlinked = set(), set(), set()
        self._open = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._open.append(tag)
        self.places.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.links.add(attributes["href"])

    def handle_endtag(self, tag):
        # Some elements, such as <input>, have no end.
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        # In a block the code is an example, or a signature.
        is_inline = "code" in self._open and "pre" not in self._open
        if is_inline and "a" not in self._open and NAME.fullmatch(data):
            self.unlinked.add(data)


def broken(directory):
    """Lines that say what is broken where."""
    pages = {path.resolve(): Page(path) for path in sorted(directory.rglob("*.html"))}
    for path, page in pages.items():
        for name in sorted(page.unlinked):
            yield f"{path.name}: `{name}` is not documented"
        for link in sorted(page.links):
            url = urllib.parse.urlsplit(link)
            if url.scheme:
                continue
            target = (path.parent / url.path).resolve() if url.path else path
            if target not in pages or (url.fragment and url.fragment not in pages[target].places):
                yield f"{path.name}: {link} leads nowhere"


if __name__ == "__main__":
    found = list(broken(pathlib.Path(sys.argv[1])))
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    sys.exit(bool(found))
