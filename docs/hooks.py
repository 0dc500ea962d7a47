"""What the site takes from elsewhere: its first page from the README, the command line from the parsers.

mkdocs calls these functions (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import os
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
COMMANDS = "<!-- commands -->"
README = "<!-- readme -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill a page's places."""
    if README in markdown:
        markdown = markdown.replace(README, readme())
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return markdown


def readme() -> str:
    """The README with its links as the site has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    for file, page in {"CHANGELOG.md": "changelog.md", "ENVs.md": "environment.md"}.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text


def commands() -> str:
    """The help of every command."""
    from hf_gg.cli.main import COMMANDS as names
    from hf_gg.cli.main import build_parser

    os.environ["COLUMNS"] = "110"
    parser = build_parser(load=names)
    (subparsers,) = (action for action in parser._actions if action.dest == "command")
    pages = [f"## hf-gg\n\n```text\n{parser.format_help()}```\n"]
    for name in names:
        pages.append(f"## hf-gg {name}\n\n```text\n{subparsers.choices[name].format_help()}```\n")
    return "\n".join(pages)
