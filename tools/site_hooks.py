"""What the documentation's site makes of the repository around it: pages of benchmarks, and links that leave docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_PAGES = ("engine.md", "strategies.md", "scale.md", "streaming.md", "synergy.md")
_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of benchmarks, and their figures."""
    for path in (*(ROOT / "benchmarks" / name for name in _PAGES), *(ROOT / "benchmarks").glob("*.svg")):
        content = path.read_text(encoding="utf-8")
        files.append(File.generated(config, f"benchmarks/{path.name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001  # as mkdocs calls it
    """Lead links out of docs/ to the site's own copy, or say where in the repository they lead."""

    def lead(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        if page.file.src_uri.startswith(("benchmarks/", "adr/")):
            return link[0]
        if files.get_file_from_path(path) is not None:
            return f"[{text}]({path}{anchor})"
        return f"{text} (`{path}` in the repository)" if text != path else f"`{path}` in the repository"

    return _LINK.sub(lead, markdown)
