"""What `make docs` does to the pages: they are written to be read in the repository too, where links lead out of
`docs/`.

Results that pages show are copied into the site. Other files outside `docs/` are named without a link.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "benchmarks/results"
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<up>(?:\.\./)+)(?P<path>[^)]*)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of `docs/` lead to the copies of results, or are text alone."""
    root = Path(config.docs_dir).parent
    depth = page.file.src_uri.count("/")

    def replace(match: re.Match[str]) -> str:
        if match["up"].count("..") <= depth:
            return match[0]
        path = match["path"]
        if not (path.startswith(RESULTS + "/") and (root / path).is_file() and Path(path).suffix in (".png", ".csv")):
            return match["text"]
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(root / path)))
        return f"{match['image']}[{match['text']}]({'../' * depth}{path})"

    return _LINK.sub(replace, markdown)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """The colours of code, which pygments knows."""
    from pygments.formatters import HtmlFormatter

    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    files.append(File.generated(config, "site.css", content=css))
    return files
