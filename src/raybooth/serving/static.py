"""The page's files, with headers that say what browsers may do with them.

The page is made by hand, of a few files without a build step: Gradio, which its users know, would bring sixty megabytes of packages, and a server and
a queue of its own beside Ray Serve's.
"""

import os
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version must not meet an old one's scripts
}


class Files(StaticFiles):
    """A folder, shown at /."""

    def __init__(self, folder: Path):
        super().__init__(directory=folder, html=True)

    def file_response(self, full_path: Any, stat_result: os.stat_result, scope: Any, status_code: int = 200) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        return response
