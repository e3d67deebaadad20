"""A rendered page, read by an independent parser."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, ids and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def all(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]
